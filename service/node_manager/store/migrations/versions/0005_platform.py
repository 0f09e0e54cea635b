# SPDX-License-Identifier: GPL-3.0-or-later
"""Speaking to the platform: how far events were relayed, which commands were carried out, what an event follows from."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Widen outbox, create the other tables."""
    with op.batch_alter_table("outbox") as batch:
        batch.add_column(sa.Column("causation_id", sa.String(length=128), nullable=True))
    op.create_table(
        "relay_positions",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_relay_positions")),
    )
    op.create_table(
        "commands",
        sa.Column("command_id", sa.String(length=128), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("type", sa.String(length=64), nullable=False),
        sa.Column("outcome", sa.JSON(), nullable=False),
        sa.Column("handled_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("command_id", "source", name=op.f("pk_commands")),
    )
    op.create_index(op.f("ix_commands_handled_at"), "commands", ["handled_at"])
