# SPDX-License-Identifier: GPL-3.0-or-later
"""Health: evidence, the way back of lost nodes, penalties, what thresholds remember; conditions get a severity."""

import json
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_NULLABLE: list[sa.Column[Any]] = [
    sa.Column("evidence", sa.String(length=32)),
    sa.Column("frozen_until", sa.BigInteger()),
    sa.Column("return_samples", sa.Integer()),
    sa.Column("return_since", sa.BigInteger()),
    sa.Column("probation_until", sa.BigInteger()),
    sa.Column("flap_at", sa.BigInteger()),
]
_REQUIRED: list[sa.Column[Any]] = [
    sa.Column("flap_penalty", sa.Float(), nullable=False, server_default="0"),
    sa.Column("suppressed", sa.Boolean(), nullable=False, server_default=sa.text("false")),
    sa.Column("readings", sa.JSON(), nullable=False, server_default="{}"),
    sa.Column("settled", sa.Boolean(), nullable=False, server_default=sa.text("false")),
]


def upgrade() -> None:
    """Widen node_states; what is lost already must prove its return as well."""
    with op.batch_alter_table("node_states") as batch:
        for column in (*_NULLABLE, *_REQUIRED):
            batch.add_column(column)
    with op.batch_alter_table("node_states") as batch:
        for column in _REQUIRED:
            batch.alter_column(column.name, server_default=None)
    states = sa.table(
        "node_states",
        sa.column("node_id", sa.String),
        sa.column("health", sa.String),
        sa.column("conditions", sa.JSON),
        sa.column("return_samples", sa.Integer),
    )
    op.execute(states.update().where(states.c.health == "unreachable").values(return_samples=0))
    connection = op.get_bind()
    rows = connection.execute(sa.select(states.c.node_id, states.c.conditions)).all()
    for node_id, stored in rows:
        conditions = json.loads(stored) if isinstance(stored, str) else stored
        for condition in conditions:
            condition["severity"] = "warning" if condition["reason"] == "WarningCheckFailed" else "critical"
        connection.execute(states.update().where(states.c.node_id == node_id).values(conditions=conditions))
