# SPDX-License-Identifier: GPL-3.0-or-later
"""Recovery: climbs and their steps, the guard, pauses, maintenance, lost nodes and workloads; jobs get variables."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_ACTIVE = sa.text("ended_at IS NULL AND dry_run IS false")


def upgrade() -> None:
    """Widen jobs and node_accounts, create the other tables."""
    for table, column in (
        ("jobs", sa.Column("variables", sa.JSON(), nullable=False, server_default="{}")),
        ("node_accounts", sa.Column("epoch", sa.BigInteger(), nullable=False, server_default="1")),
    ):
        with op.batch_alter_table(table) as batch:
            batch.add_column(column)
        with op.batch_alter_table(table) as batch:
            batch.alter_column(column.name, server_default=None)
    op.create_table(
        "recoveries",
        sa.Column("sequence", _SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("recovery_id", sa.String(length=36), nullable=False),
        sa.Column("node_id", sa.String(length=253), nullable=False),
        sa.Column("zone", sa.Text(), nullable=True),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("dry_run", sa.Boolean(), nullable=False),
        sa.Column("conditions", sa.JSON(), nullable=False),
        sa.Column("critical", sa.Boolean(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("canary", sa.Boolean(), nullable=False),
        sa.Column("driver", sa.String(length=16), nullable=False),
        sa.Column("requested_by", sa.String(length=64), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("deadline_at", sa.BigInteger(), nullable=True),
        sa.Column("cancel_requested_at", sa.BigInteger(), nullable=True),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_recoveries")),
        sa.UniqueConstraint("recovery_id", name=op.f("uq_recoveries_recovery_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_recoveries_node_id"), "recoveries", ["node_id"])
    op.create_index(op.f("ix_recoveries_ended_at"), "recoveries", ["ended_at"])
    op.create_index(
        "uq_recoveries_active_node_id",
        "recoveries",
        ["node_id"],
        unique=True,
        sqlite_where=_ACTIVE,
        postgresql_where=_ACTIVE,
    )
    op.create_table(
        "recovery_steps",
        sa.Column("recovery_id", sa.String(length=36), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("step", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("job_ids", sa.JSON(), nullable=False),
        sa.Column("message", sa.Text(), nullable=True),
        sa.Column("started_at", sa.BigInteger(), nullable=True),
        sa.Column("acted_at", sa.BigInteger(), nullable=True),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["recovery_id"],
            ["recoveries.recovery_id"],
            name=op.f("fk_recovery_steps_recovery_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("recovery_id", "position", name=op.f("pk_recovery_steps")),
    )
    op.create_table(
        "repair_records",
        sa.Column("node_id", sa.String(length=253), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("last_ended_at", sa.BigInteger(), nullable=True),
        sa.Column("troubled_at", sa.BigInteger(), nullable=False),
        sa.Column("gave_up_at", sa.BigInteger(), nullable=True),
        _of_node("repair_records"),
        sa.PrimaryKeyConstraint("node_id", name=op.f("pk_repair_records")),
    )
    op.create_table(
        "guards",
        sa.Column("scope", sa.String(length=300), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("since", sa.BigInteger(), nullable=False),
        sa.Column("document", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("scope", name=op.f("pk_guards")),
    )
    op.create_table(
        "recovery_pauses",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("zone", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=True),
        sa.Column("created_by", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_recovery_pauses")),
    )
    op.create_table(
        "maintenances",
        sa.Column("node_id", sa.String(length=253), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("requested_by", sa.String(length=64), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("drain", sa.Boolean(), nullable=False),
        sa.Column("deadline_at", sa.BigInteger(), nullable=True),
        sa.Column("drained_at", sa.BigInteger(), nullable=True),
        sa.Column("until", sa.BigInteger(), nullable=True),
        sa.Column("keep_cordon", sa.Boolean(), nullable=False),
        sa.Column("leaving_at", sa.BigInteger(), nullable=True),
        sa.Column("document", sa.JSON(), nullable=False),
        _of_node("maintenances"),
        sa.PrimaryKeyConstraint("node_id", name=op.f("pk_maintenances")),
    )
    op.create_table(
        "node_workloads",
        sa.Column("node_id", sa.String(length=253), nullable=False),
        sa.Column("container", sa.String(length=128), nullable=False),
        sa.Column("allocation_id", sa.String(length=128), nullable=True),
        sa.Column("deployment_id", sa.String(length=253), nullable=True),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        _of_node("node_workloads"),
        sa.PrimaryKeyConstraint("node_id", "container", name=op.f("pk_node_workloads")),
    )
    op.create_index(op.f("ix_node_workloads_allocation_id"), "node_workloads", ["allocation_id"])
    op.create_table(
        "lost_nodes",
        sa.Column("node_id", sa.String(length=253), nullable=False),
        sa.Column("lost_at", sa.BigInteger(), nullable=False),
        sa.Column("reclaim_at", sa.BigInteger(), nullable=False),
        sa.Column("reclaimed_at", sa.BigInteger(), nullable=True),
        _of_node("lost_nodes"),
        sa.PrimaryKeyConstraint("node_id", name=op.f("pk_lost_nodes")),
    )


def _of_node(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["node_id"], ["nodes.node_id"], name=op.f(f"fk_{table}_node_id"), ondelete="CASCADE")
