# SPDX-License-Identifier: GPL-3.0-or-later
"""The tables, as SQLAlchemy Core describes them.

Declared (nodes, node_labels, host_keys of origin "given") and observed (node_states, node_facts, node_samples,
node_reports) never share a column. A change here needs a migration beside it; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    String,
    Table,
    Text,
)

from node_manager.store.columns import Sequence, UtcDateTime, metadata, node_id_column
from node_manager.store.repair_tables import (
    guards,
    lost_nodes,
    maintenances,
    node_workloads,
    recoveries,
    recovery_pauses,
    recovery_steps,
    repair_records,
)

nodes = Table(
    "nodes",
    metadata,
    Column("node_id", String(253), primary_key=True),
    Column("name", Text, nullable=False),
    Column("address", String(253), nullable=False),
    Column("node_type", String(63)),
    Column("labels", JSON, nullable=False),
    Column("region", Text),
    Column("zone", Text, index=True),
    Column("site", Text, index=True),
    Column("latitude", Float),
    Column("longitude", Float),
    Column("connection", JSON, nullable=False),
    Column("capacity", JSON, nullable=False),
    Column("admin", String(16), nullable=False),
    Column("generation", BigInteger, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)

node_labels = Table(
    "node_labels",
    metadata,
    node_id_column(primary_key=True),
    Column("key", String(63), primary_key=True),
    Column("value", String(255), nullable=False),
    Index("ix_node_labels_key_value", "key", "value"),
)

host_keys = Table(
    "host_keys",
    metadata,
    node_id_column(primary_key=True),
    Column("public_key", Text, primary_key=True),
    Column("origin", String(16), nullable=False),
    Column("pinned_at", UtcDateTime, nullable=False),
)

node_states = Table(
    "node_states",
    metadata,
    node_id_column(primary_key=True),
    Column("health", String(16), nullable=False, index=True),
    Column("health_since", UtcDateTime, nullable=False),
    Column("health_cause", Text, nullable=False),
    Column("recognised_type", String(63)),
    Column("last_contact_at", UtcDateTime),
    Column("last_attempt_at", UtcDateTime),
    Column("failures", Integer, nullable=False),
    Column("conditions", JSON, nullable=False),
    Column("quarantined", Boolean, nullable=False),
    # The last CPU readings and when pressure was last seen: what overcommit follows.
    Column("cpu_readings", JSON, nullable=False),
    Column("pressed_at", UtcDateTime),
    # Of an unreachable node: what stands behind it, and until when nothing is done about it.
    Column("evidence", String(32)),
    Column("frozen_until", UtcDateTime),
    # Good samples since a node that was lost is back; None: it has nothing to prove.
    Column("return_samples", Integer),
    Column("return_since", UtcDateTime),
    Column("probation_until", UtcDateTime),
    # The penalty for losses as it was at flap_at.
    Column("flap_penalty", Float, nullable=False),
    Column("flap_at", UtcDateTime),
    Column("suppressed", Boolean, nullable=False),
    # What thresholds remember of earlier samples.
    Column("readings", JSON, nullable=False),
    # Whether one more good answer changes nothing but times.
    Column("settled", Boolean, nullable=False),
    Column("revision", BigInteger, nullable=False),
)


def _newest(name: str, document: str) -> Table:
    return Table(
        name,
        metadata,
        node_id_column(primary_key=True),
        Column("observed_at", UtcDateTime, nullable=False),
        Column("source", String(64), nullable=False),
        Column(document, JSON, nullable=False),
    )


node_facts = _newest("node_facts", "facts")
node_samples = _newest("node_samples", "sample")
node_reports = _newest("node_reports", "report")

sample_history = Table(
    "sample_history",
    metadata,
    node_id_column(primary_key=True),
    Column("minute", BigInteger, primary_key=True),
    Column("samples", Integer, nullable=False),
    # Of each metric the number of samples that knew it: what a node can't tell must not count as nothing used.
    Column("cpu_percent_count", Integer, nullable=False),
    Column("cpu_percent_sum", Float, nullable=False),
    Column("cpu_percent_max", Float),
    Column("memory_percent_count", Integer, nullable=False),
    Column("memory_percent_sum", Float, nullable=False),
    Column("memory_percent_max", Float),
    Column("disk_percent_max", Float),
    Column("received_bytes_per_second_count", Integer, nullable=False),
    Column("received_bytes_per_second_sum", Float, nullable=False),
    Column("transmitted_bytes_per_second_count", Integer, nullable=False),
    Column("transmitted_bytes_per_second_sum", Float, nullable=False),
)

# The books of a node. Everything that changes them counts the version up, and changes them only at the version it read.
node_accounts = Table(
    "node_accounts",
    metadata,
    node_id_column(primary_key=True),
    Column("node_type", String(63)),
    Column("capacity", JSON, nullable=False),
    # The ids of the units of each device class.
    Column("units", JSON, nullable=False),
    Column("allocated", JSON, nullable=False),
    # Per device class and unit: thousandths in use.
    Column("used_units", JSON, nullable=False),
    Column("version", BigInteger, nullable=False),
    # Counted up when the node's allocations are taken from it: work of an earlier epoch is no longer its own.
    Column("epoch", BigInteger, nullable=False),
)

# Which nodes changed, one row each, so that whoever keeps a picture of the fleet reads only what is new.
node_changes = Table(
    "node_changes",
    metadata,
    # No foreign key: that a node is gone is a change too.
    Column("node_id", String(253), primary_key=True),
    Column("mark", BigInteger, nullable=False, index=True),
    # Who wrote it, where the writer's own picture has the change already.
    Column("writer", String(64)),
)

allocations = Table(
    "allocations",
    metadata,
    Column("allocation_id", String(128), primary_key=True),
    Column("node_id", String(253), ForeignKey("nodes.node_id"), nullable=False, index=True),
    Column("owner", String(253), nullable=False, index=True),
    Column("deployment_id", String(253), index=True),
    Column("resources", JSON, nullable=False),
    # Per device class: which units, and how many thousandths of each.
    Column("units", JSON, nullable=False),
    Column("ttl_seconds", Integer),
    # None: confirmed, or never in need of it.
    Column("expires_at", UtcDateTime, index=True),
    Column("created_at", UtcDateTime, nullable=False),
)

owners = Table(
    "owners",
    metadata,
    Column("owner", String(253), primary_key=True),
    # The quota; None: no limit.
    Column("hard", JSON(none_as_null=True)),
    # Sum of the owner's allocations, devices in thousandths.
    Column("used", JSON, nullable=False),
    Column("version", BigInteger, nullable=False),
)

deployments = Table(
    "deployments",
    metadata,
    Column("deployment_id", String(253), primary_key=True),
    Column("owner", String(253), nullable=False, index=True),
    Column("request", JSON, nullable=False),
    Column("decision_id", String(36), nullable=False),
    # The weights last given to load balancers, per node.
    Column("weights", JSON, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
)

# What a run of the selector saw: the fleet whole, or what changed since the run before it in the chain.
decision_passes = Table(
    "decision_passes",
    metadata,
    Column("pass_id", Sequence, primary_key=True, autoincrement=True),
    Column("chain_id", String(36), nullable=False),
    Column("position", Integer, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Column("fleet", LargeBinary, nullable=False),
    Index("ix_decision_passes_chain_id_position", "chain_id", "position", unique=True),
    sqlite_autoincrement=True,
)

decisions = Table(
    "decisions",
    metadata,
    Column("sequence", Sequence, primary_key=True, autoincrement=True),
    Column("decision_id", String(36), nullable=False, unique=True),
    Column("deployment_id", String(253), nullable=False, index=True),
    Column("chain_id", String(36), nullable=False),
    Column("position", Integer, nullable=False),
    # Its place among the decisions of the same pass.
    Column("ordinal", Integer, nullable=False),
    Column("at", UtcDateTime, nullable=False),
    Column("request", JSON, nullable=False),
    Column("answer", JSON, nullable=False),
    Index("ix_decisions_chain_id_position", "chain_id", "position"),
    sqlite_autoincrement=True,
)

outbox = Table(
    "outbox",
    metadata,
    Column("sequence", Sequence, primary_key=True, autoincrement=True),
    Column("event_id", String(36), nullable=False, unique=True),
    Column("topic", String(64), nullable=False),
    Column("type", String(64), nullable=False),
    # No foreign key: the event that a node was deregistered outlives the node.
    Column("node_id", String(253), nullable=False),
    Column("occurred_at", UtcDateTime, nullable=False),
    Column("data", JSON, nullable=False),
    # The command that it follows from.
    Column("causation_id", String(128)),
    Index("ix_outbox_node_id_sequence", "node_id", "sequence"),
    sqlite_autoincrement=True,
)

# How far those who hand on what is in the store have got.
relay_positions = Table(
    "relay_positions",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("position", BigInteger, nullable=False),
    Column("updated_at", UtcDateTime, nullable=False),
)

# The commands that were carried out: what comes twice is not done twice.
commands = Table(
    "commands",
    metadata,
    Column("command_id", String(128), primary_key=True),
    Column("source", Text, primary_key=True),
    Column("type", String(64), nullable=False),
    Column("outcome", JSON, nullable=False),
    Column("handled_at", UtcDateTime, nullable=False, index=True),
)

jobs = Table(
    "jobs",
    metadata,
    # The order of arrival; times of several managers don't give one.
    Column("sequence", Sequence, primary_key=True, autoincrement=True),
    Column("job_id", String(36), nullable=False, unique=True),
    Column("action", String(16), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("requested_by", String(64), nullable=False),
    # What the playbook is told beside the nodes.
    Column("variables", JSON, nullable=False),
    Column("message", Text),
    # The manager that runs it; None until one does.
    Column("holder", String(64)),
    Column("created_at", UtcDateTime, nullable=False),
    Column("started_at", UtcDateTime),
    Column("deadline_at", UtcDateTime),
    Column("cancel_requested_at", UtcDateTime),
    Column("ended_at", UtcDateTime),
    sqlite_autoincrement=True,
)

job_nodes = Table(
    "job_nodes",
    metadata,
    Column("job_id", String(36), ForeignKey("jobs.job_id", ondelete="CASCADE"), primary_key=True),
    # No foreign key: a job's record outlives the node.
    Column("node_id", String(253), primary_key=True),
    # None until the job has ended.
    Column("result", String(16)),
    Column("message", Text),
    Index("ix_job_nodes_node_id", "node_id"),
)

# The nodes that running jobs work on: the primary key is what keeps two jobs off one node.
node_claims = Table(
    "node_claims",
    metadata,
    # No foreign key: a claim ends with its job, not with the node.
    Column("node_id", String(253), primary_key=True),
    Column("job_id", String(36), ForeignKey("jobs.job_id", ondelete="CASCADE"), nullable=False, index=True),
)

tokens = Table(
    "tokens",
    metadata,
    Column("token_id", String(36), primary_key=True),
    Column("name", String(64), nullable=False),
    Column("sha256", String(64), nullable=False, unique=True),
    Column("role", String(16), nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("revoked_at", UtcDateTime),
)

audit = Table(
    "audit",
    metadata,
    Column("sequence", Sequence, primary_key=True, autoincrement=True),
    Column("at", UtcDateTime, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("role", String(16)),
    Column("action", String(255), nullable=False),
    Column("outcome", Integer, nullable=False),
    Column("request_id", String(64), nullable=False),
    sqlite_autoincrement=True,
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("holder", String(64), nullable=False),
    Column("expires_at", UtcDateTime, nullable=False),
)

__all__ = [
    "UtcDateTime",
    "allocations",
    "audit",
    "commands",
    "decision_passes",
    "decisions",
    "deployments",
    "guards",
    "host_keys",
    "job_nodes",
    "jobs",
    "leases",
    "lost_nodes",
    "maintenances",
    "metadata",
    "node_accounts",
    "node_changes",
    "node_claims",
    "node_facts",
    "node_labels",
    "node_reports",
    "node_samples",
    "node_states",
    "node_workloads",
    "nodes",
    "outbox",
    "owners",
    "recoveries",
    "recovery_pauses",
    "recovery_steps",
    "relay_positions",
    "repair_records",
    "sample_history",
    "tokens",
]
