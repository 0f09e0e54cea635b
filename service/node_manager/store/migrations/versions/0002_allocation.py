# SPDX-License-Identifier: GPL-3.0-or-later
"""Allocation: accounts of nodes and owners, deployments, decisions, pressure, the feed of changes."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_SEQUENCE = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Widen node_states and allocations, create the other tables.

    Accounts of nodes that are there already are filled in by the manager's start, which knows the node types.
    """
    with op.batch_alter_table("node_states") as batch:
        batch.add_column(sa.Column("cpu_readings", sa.JSON(), nullable=False, server_default=sa.text("'[]'")))
        batch.add_column(sa.Column("pressed_at", sa.BigInteger(), nullable=True))
    with op.batch_alter_table("node_states") as batch:
        batch.alter_column("cpu_readings", server_default=None)
    # Nothing could write allocations before this version.
    op.drop_table("allocations")
    op.create_table(
        "allocations",
        sa.Column("allocation_id", sa.String(length=128), nullable=False),
        sa.Column("node_id", sa.String(length=253), nullable=False),
        sa.Column("owner", sa.String(length=253), nullable=False),
        sa.Column("deployment_id", sa.String(length=253), nullable=True),
        sa.Column("resources", sa.JSON(), nullable=False),
        sa.Column("units", sa.JSON(), nullable=False),
        sa.Column("ttl_seconds", sa.Integer(), nullable=True),
        sa.Column("expires_at", sa.BigInteger(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["node_id"], ["nodes.node_id"], name=op.f("fk_allocations_node_id")),
        sa.PrimaryKeyConstraint("allocation_id", name=op.f("pk_allocations")),
    )
    for column in ("node_id", "owner", "deployment_id", "expires_at"):
        op.create_index(op.f(f"ix_allocations_{column}"), "allocations", [column])
    op.create_table(
        "node_accounts",
        sa.Column("node_id", sa.String(length=253), nullable=False),
        sa.Column("node_type", sa.String(length=63), nullable=True),
        sa.Column("capacity", sa.JSON(), nullable=False),
        sa.Column("units", sa.JSON(), nullable=False),
        sa.Column("allocated", sa.JSON(), nullable=False),
        sa.Column("used_units", sa.JSON(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["node_id"], ["nodes.node_id"], name=op.f("fk_node_accounts_node_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("node_id", name=op.f("pk_node_accounts")),
    )
    op.create_table(
        "node_changes",
        sa.Column("node_id", sa.String(length=253), nullable=False),
        sa.Column("mark", sa.BigInteger(), nullable=False),
        sa.Column("writer", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("node_id", name=op.f("pk_node_changes")),
    )
    op.create_index(op.f("ix_node_changes_mark"), "node_changes", ["mark"])
    op.create_table(
        "owners",
        sa.Column("owner", sa.String(length=253), nullable=False),
        sa.Column("hard", sa.JSON(), nullable=True),
        sa.Column("used", sa.JSON(), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("owner", name=op.f("pk_owners")),
    )
    op.create_table(
        "deployments",
        sa.Column("deployment_id", sa.String(length=253), nullable=False),
        sa.Column("owner", sa.String(length=253), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("decision_id", sa.String(length=36), nullable=False),
        sa.Column("weights", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("deployment_id", name=op.f("pk_deployments")),
    )
    op.create_index(op.f("ix_deployments_owner"), "deployments", ["owner"])
    op.create_table(
        "decision_passes",
        sa.Column("pass_id", _SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("chain_id", sa.String(length=36), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("fleet", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("pass_id", name=op.f("pk_decision_passes")),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_decision_passes_chain_id_position", "decision_passes", ["chain_id", "position"], unique=True)
    op.create_table(
        "decisions",
        sa.Column("sequence", _SEQUENCE, autoincrement=True, nullable=False),
        sa.Column("decision_id", sa.String(length=36), nullable=False),
        sa.Column("deployment_id", sa.String(length=253), nullable=False),
        sa.Column("chain_id", sa.String(length=36), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("ordinal", sa.Integer(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("answer", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_decisions")),
        sa.UniqueConstraint("decision_id", name=op.f("uq_decisions_decision_id")),
        sqlite_autoincrement=True,
    )
    op.create_index(op.f("ix_decisions_deployment_id"), "decisions", ["deployment_id"])
    op.create_index("ix_decisions_chain_id_position", "decisions", ["chain_id", "position"])
