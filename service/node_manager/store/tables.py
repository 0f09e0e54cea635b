# SPDX-License-Identifier: GPL-3.0-or-later
"""The tables, as SQLAlchemy Core describes them.

Declared (nodes, node_labels, host_keys of origin "given") and observed (node_states, node_facts, node_samples,
node_reports) never share a column. A change here needs a migration beside it; a test compares the two.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    and_,
    false,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes, kept as microseconds since 1970: the same bits and order on every engine."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        """Turn a datetime into microseconds; a naive one is a bug and raises."""
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Turn microseconds into a datetime."""
        return None if value is None else _EPOCH + value * _MICROSECOND


# SQLite numbers rows by itself only for INTEGER PRIMARY KEY.
_Sequence = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _node_id_column(*, primary_key: bool = False) -> Column[str]:
    return Column(
        "node_id",
        String(253),
        ForeignKey("nodes.node_id", ondelete="CASCADE"),
        primary_key=primary_key,
        nullable=False,
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
    _node_id_column(primary_key=True),
    Column("key", String(63), primary_key=True),
    Column("value", String(255), nullable=False),
    Index("ix_node_labels_key_value", "key", "value"),
)

host_keys = Table(
    "host_keys",
    metadata,
    _node_id_column(primary_key=True),
    Column("public_key", Text, primary_key=True),
    Column("origin", String(16), nullable=False),
    Column("pinned_at", UtcDateTime, nullable=False),
)

node_states = Table(
    "node_states",
    metadata,
    _node_id_column(primary_key=True),
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
        _node_id_column(primary_key=True),
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
    _node_id_column(primary_key=True),
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
    _node_id_column(primary_key=True),
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
    Column("pass_id", _Sequence, primary_key=True, autoincrement=True),
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
    Column("sequence", _Sequence, primary_key=True, autoincrement=True),
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
    Column("sequence", _Sequence, primary_key=True, autoincrement=True),
    Column("event_id", String(36), nullable=False, unique=True),
    Column("topic", String(64), nullable=False),
    Column("type", String(64), nullable=False),
    # No foreign key: the event that a node was deregistered outlives the node.
    Column("node_id", String(253), nullable=False),
    Column("occurred_at", UtcDateTime, nullable=False),
    Column("data", JSON, nullable=False),
    Index("ix_outbox_node_id_sequence", "node_id", "sequence"),
    sqlite_autoincrement=True,
)

jobs = Table(
    "jobs",
    metadata,
    # The order of arrival; times of several managers don't give one.
    Column("sequence", _Sequence, primary_key=True, autoincrement=True),
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

# Climbs of the recovery ladder, dry runs included.
recoveries = Table(
    "recoveries",
    metadata,
    Column("sequence", _Sequence, primary_key=True, autoincrement=True),
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
    _node_id_column(primary_key=True),
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
    _node_id_column(primary_key=True),
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
    _node_id_column(primary_key=True),
    Column("container", String(128), primary_key=True),
    Column("allocation_id", String(128), index=True),
    Column("deployment_id", String(253)),
    Column("seen_at", UtcDateTime, nullable=False),
)

# Nodes that were called unreachable, until they are back or their work was taken from them.
lost_nodes = Table(
    "lost_nodes",
    metadata,
    _node_id_column(primary_key=True),
    Column("lost_at", UtcDateTime, nullable=False),
    Column("reclaim_at", UtcDateTime, nullable=False),
    Column("reclaimed_at", UtcDateTime),
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
    Column("sequence", _Sequence, primary_key=True, autoincrement=True),
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
