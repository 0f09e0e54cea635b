# SPDX-License-Identifier: GPL-3.0-or-later
"""The tables of repair and maintenance: climbs of the ladder, the guard, drains, lost nodes and their workloads."""

from __future__ import annotations

from sqlalchemy import JSON, Boolean, Column, ForeignKey, Index, Integer, String, Table, Text, and_, false

from node_manager.store.columns import Sequence, UtcDateTime, metadata, node_id_column

# Climbs of the recovery ladder, dry runs included.
recoveries = Table(
    "recoveries",
    metadata,
    Column("sequence", Sequence, primary_key=True, autoincrement=True),
    Column("recovery_id", String(36), nullable=False, unique=True),
    # No foreign key: the record outlives the node.
    Column("node_id", String(253), nullable=False, index=True),
    Column("zone", Text),
    Column("state", String(16), nullable=False),
    Column("dry_run", Boolean, nullable=False),
    # The conditions that asked for it; empty where a person did.
    Column("conditions", JSON, nullable=False),
    # Whether one of them is critical, so that giving up cordons the node.
    Column("critical", Boolean, nullable=False),
    # Which try since the node was last well, from 1; 0 where a person asked.
    Column("attempt", Integer, nullable=False),
    # Started by a half-open guard, to see whether repairs work again.
    Column("canary", Boolean, nullable=False),
    # "manager", or "playbook" where Ansible was started by hand and climbs by itself.
    Column("driver", String(16), nullable=False),
    Column("requested_by", String(64), nullable=False),
    Column("reason", Text, nullable=False),
    Column("message", Text),
    Column("started_at", UtcDateTime, nullable=False),
    # When one that is driven by a playbook counts as abandoned.
    Column("deadline_at", UtcDateTime),
    Column("cancel_requested_at", UtcDateTime),
    Column("ended_at", UtcDateTime, index=True),
    sqlite_autoincrement=True,
)
# One at a time on a node.
Index(
    "uq_recoveries_active_node_id",
    recoveries.c.node_id,
    unique=True,
    sqlite_where=and_(recoveries.c.ended_at.is_(None), recoveries.c.dry_run.is_(false())),
    postgresql_where=and_(recoveries.c.ended_at.is_(None), recoveries.c.dry_run.is_(false())),
)

recovery_steps = Table(
    "recovery_steps",
    metadata,
    Column(
        "recovery_id",
        String(36),
        ForeignKey("recoveries.recovery_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    # From 0, in the order of the ladder.
    Column("position", Integer, primary_key=True),
    Column("step", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    # All jobs that were started for it, in order: more than one where a manager was restarted in the middle.
    Column("job_ids", JSON, nullable=False),
    Column("message", Text),
    Column("started_at", UtcDateTime),
    # Written before the act begins, once: whoever finds it set must not act again.
    Column("acted_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
)

# What is remembered of a node that was repaired, until it has been well for long enough.
repair_records = Table(
    "repair_records",
    metadata,
    node_id_column(primary_key=True),
    Column("attempts", Integer, nullable=False),
    Column("last_ended_at", UtcDateTime),
    # When something to repair was last seen.
    Column("troubled_at", UtcDateTime, nullable=False),
    Column("gave_up_at", UtcDateTime),
)

# The mass-failure guard of each scope: "fleet", or "zone:" and its name.
guards = Table(
    "guards",
    metadata,
    Column("scope", String(300), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("since", UtcDateTime, nullable=False),
    Column("document", JSON, nullable=False),
)

recovery_pauses = Table(
    "recovery_pauses",
    metadata,
    Column("name", String(64), primary_key=True),
    # None: the whole fleet.
    Column("zone", Text),
    Column("reason", Text, nullable=False),
    Column("until", UtcDateTime),
    Column("created_by", String(64), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

# What is known of a node's maintenance or drain, while it lasts.
maintenances = Table(
    "maintenances",
    metadata,
    node_id_column(primary_key=True),
    Column("reason", Text, nullable=False),
    Column("requested_by", String(64), nullable=False),
    Column("started_at", UtcDateTime, nullable=False),
    # Whether the node is to be emptied first, and where that stands.
    Column("drain", Boolean, nullable=False),
    Column("deadline_at", UtcDateTime),
    Column("drained_at", UtcDateTime),
    Column("until", UtcDateTime),
    Column("keep_cordon", Boolean, nullable=False),
    # Set once somebody asked to end it: the node leaves with the next check that passes.
    Column("leaving_at", UtcDateTime),
    Column("document", JSON, nullable=False),
)

# The managed workloads that were last seen on a node.
node_workloads = Table(
    "node_workloads",
    metadata,
    node_id_column(primary_key=True),
    Column("container", String(128), primary_key=True),
    Column("allocation_id", String(128), index=True),
    Column("deployment_id", String(253)),
    Column("seen_at", UtcDateTime, nullable=False),
)

# Nodes that were called unreachable, until they are back or their work was taken from them.
lost_nodes = Table(
    "lost_nodes",
    metadata,
    node_id_column(primary_key=True),
    Column("lost_at", UtcDateTime, nullable=False),
    Column("reclaim_at", UtcDateTime, nullable=False),
    Column("reclaimed_at", UtcDateTime),
)
