# SPDX-License-Identifier: GPL-3.0-or-later
"""What metrics say of the state in the store: nodes, jobs, recoveries, guards, the outbox. Counts only, none of a single node.

The number of series is bounded: by closed vocabularies, the configured node types, and a number of zones. Reads within the
transaction that it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from itertools import product

import sqlalchemy as sa
from prometheus_client.core import GaugeMetricFamily

from node_manager import fleet_census, node_brief
from node_manager.domain import Admin, GuardState, Health, JobAction, JobState, RecoveryState
from node_manager.guard_terms import Census
from node_manager.health_checker import derive_status
from node_manager.node_states import has_critical
from node_manager.outbox import KAFKA
from node_manager.recovery_guard import FLEET
from node_manager.settings import Settings
from node_manager.store import tables

# The guards of so many zones are told of: those that aren't closed, then those of the largest zones.
MAX_ZONES = 50
# What nodes are counted under whose type nobody configured, and those without a type.
OTHER_TYPE = "other"
NO_TYPE = "none"
# As the alert has it, so that it says the same of a fleet without gauges of each node.
NEARLY_FULL_PERCENT = 90
_MICROSECONDS_PER_MINUTE = 60_000_000
_WELL = (Health.HEALTHY.value, Health.DEGRADED.value)

_nodes, _states, _jobs, _outbox = tables.nodes.c, tables.node_states.c, tables.jobs.c, tables.outbox.c
_samples, _history = tables.node_samples.c, tables.sample_history.c
_recoveries, _pauses = tables.recoveries.c, tables.recovery_pauses.c
_is_fresh = sa.case(
    (_states.last_contact_at >= sa.bindparam("fresh_from", type_=tables.UtcDateTime), 1), else_=0
).label("fresh")
_groups = (_nodes.admin, _states.health, _states.quarantined, node_brief.TYPE, _is_fresh)
_COUNT_NODES = (
    sa.select(*_groups, sa.func.count().label("nodes"))
    .join(tables.node_states, _states.node_id == _nodes.node_id)
    .group_by(*_groups)
)
# Only those whose health leaves open whether they may be chosen: a node that is healthy has nothing critical.
_CONDITIONS = (
    sa.select(sa.cast(_states.conditions, sa.Text))
    .join(tables.nodes, _nodes.node_id == _states.node_id)
    .where(
        _nodes.admin == Admin.ACTIVE.value,
        _states.health == Health.DEGRADED.value,
        _states.quarantined.is_(sa.false()),
        _states.last_contact_at >= sa.bindparam("fresh_from", type_=tables.UtcDateTime),
    )
)
# Of the samples only their minute's row in the history is read: they are documents of some KB. By a subquery, so that no planner
# goes through the history of days.
_COUNT_NEARLY_FULL = (
    sa.select(sa.func.count())
    .select_from(tables.node_samples)
    .where(
        _samples.observed_at >= sa.bindparam("fresh_from", type_=tables.UtcDateTime),
        sa.select(_history.disk_percent_max)
        .where(
            _history.node_id == _samples.node_id,
            _history.minute == sa.type_coerce(_samples.observed_at, sa.BigInteger) // _MICROSECONDS_PER_MINUTE,
        )
        .scalar_subquery()
        > NEARLY_FULL_PERCENT,
    )
)
_COUNT_JOBS = sa.select(_jobs.action, _jobs.state, sa.func.count().label("jobs")).group_by(_jobs.action, _jobs.state)
_COUNT_RECOVERIES = (
    sa.select(_recoveries.state, sa.func.count().label("recoveries"))
    .where(_recoveries.dry_run.is_(sa.false()))
    .group_by(_recoveries.state)
)
# A node whose work was taken stays on record as lost until it is back, whatever an operator says of it.
_COUNT_LOST = (
    sa.select(sa.func.count(), sa.func.count(tables.lost_nodes.c.reclaimed_at))
    .join_from(tables.lost_nodes, tables.nodes, _nodes.node_id == tables.lost_nodes.c.node_id)
    .where(_nodes.admin.not_in(node_brief.IN_HAND))
)
_GUARDS = sa.select(tables.guards.c.scope, tables.guards.c.state)
_COUNT_PAUSES = sa.select(sa.func.count()).where(
    sa.or_(_pauses.until.is_(None), _pauses.until > sa.bindparam("now", type_=tables.UtcDateTime))
)
# Each by itself, which either engine answers from one end of the key; counting would read all that waits.
_EXTENT = sa.select(
    sa.select(sa.func.min(_outbox.sequence)).scalar_subquery(),
    sa.select(sa.func.max(_outbox.sequence)).scalar_subquery(),
    sa.select(tables.relay_positions.c.position).where(tables.relay_positions.c.name == KAFKA).scalar_subquery(),
)
_OLDEST = (
    sa.select(_outbox.occurred_at)
    .where(_outbox.sequence > sa.bindparam("position"))
    .order_by(_outbox.sequence)
    .limit(1)
)


def gauge(name: str, told: str, labels: Sequence[str] = ()) -> GaugeMetricFamily:
    """Begin a family of gauges."""
    return GaugeMetricFamily(f"node_manager_{name}", told, labels=labels)


def single(name: str, told: str, value: float) -> GaugeMetricFamily:
    """Make a gauge without labels."""
    return GaugeMetricFamily(f"node_manager_{name}", told, value=value)


def read(connection: sa.Connection, settings: Settings, now: datetime) -> tuple[list[GaugeMetricFamily], int]:
    """Read all of it; give also how many nodes there are."""
    nodes, total = _of_nodes(connection, settings, now)
    families = [
        *nodes,
        *_of_jobs(connection, settings),
        *_of_recoveries(connection, now),
        *_of_guards(connection),
        *(_of_outbox(connection, settings, now) if settings.configuration.kafka.enabled else ()),
    ]
    return families, total


def _of_nodes(connection: sa.Connection, settings: Settings, now: datetime) -> tuple[list[GaugeMetricFamily], int]:
    fresh_from = now - timedelta(seconds=settings.configuration.monitoring.stale_after_seconds)
    by_status = {(derive_status(*pair).value, pair[1].value): 0 for pair in product(Admin, Health)}
    by_admin = dict.fromkeys((admin.value for admin in Admin), 0)
    types = [*sorted(settings.node_types), OTHER_TYPE, NO_TYPE]
    by_type = dict.fromkeys(product(types, (health.value for health in Health)), 0)
    total = schedulable = quarantined = 0
    for row in connection.execute(_COUNT_NODES, {"fresh_from": fresh_from}):
        total += row.nodes
        by_status[derive_status(Admin(row.admin), Health(row.health)).value, row.health] += row.nodes
        by_admin[row.admin] += row.nodes
        by_type[_type_shown(row.type, settings), row.health] += row.nodes
        quarantined += row.nodes if row.quarantined else 0
        if row.admin == Admin.ACTIVE.value and row.health in _WELL and row.fresh and not row.quarantined:
            schedulable += row.nodes
    schedulable -= sum(map(has_critical, connection.scalars(_CONDITIONS, {"fresh_from": fresh_from})))
    nearly_full = connection.scalar(_COUNT_NEARLY_FULL, {"fresh_from": fresh_from}) or 0
    return [
        _counted("nodes", "Nodes by status and health.", ("status", "health"), by_status.items()),
        _counted("admin_nodes", "Nodes by what an operator says of them.", ("admin",), _keyed(by_admin)),
        _counted("type_nodes", "Nodes by type and health.", ("node_type", "health"), by_type.items()),
        single("schedulable_nodes", "Nodes that new work may be placed on.", schedulable),
        single("quarantined_nodes", "Nodes that nothing is trusted of, as their host key changed.", quarantined),
        single(
            "disk_nearly_full_nodes",
            f"Nodes whose fullest filesystem is in use by more than {NEARLY_FULL_PERCENT} %; without what is stale.",
            nearly_full,
        ),
    ], total


def _of_jobs(connection: sa.Connection, settings: Settings) -> list[GaugeMetricFamily]:
    counts = {(action.value, state.value): 0 for action, state in product(JobAction, JobState)}
    for row in connection.execute(_COUNT_JOBS):
        counts[row.action, row.state] += row.jobs
    ansible = settings.configuration.ansible
    waiting = sum(count for (_, state), count in counts.items() if state == JobState.QUEUED.value)
    return [
        _counted("jobs", "Jobs on record by action and state.", ("action", "state"), counts.items()),
        single("job_queue_length", "Jobs that wait to be run, by any manager of the store.", waiting),
        single("job_queue_limit", "Jobs that may wait; further ones are refused.", ansible.max_queued_jobs),
    ]


def _of_recoveries(connection: sa.Connection, now: datetime) -> list[GaugeMetricFamily]:
    counts = {state.value: 0 for state in RecoveryState if state is not RecoveryState.PLANNED}
    for row in connection.execute(_COUNT_RECOVERIES):
        counts[row.state] = counts.get(row.state, 0) + row.recoveries
    lost, reclaimed = connection.execute(_COUNT_LOST).one()
    told = "Recoveries on record by state, dry runs left out."
    return [
        _counted("recoveries", told, ("state",), _keyed(counts)),
        single(
            "recovery_pauses",
            "Pauses of automatic repair in force.",
            connection.scalar(_COUNT_PAUSES, {"now": now}) or 0,
        ),
        single(
            "lost_nodes",
            "Nodes that are lost: unreachable, and their owners were told; none in an operator's hand.",
            lost,
        ),
        single("reclaimed_nodes", "Lost nodes whose allocations were taken from them.", reclaimed),
    ]


def _of_guards(connection: sa.Connection) -> Iterator[GaugeMetricFamily]:
    censuses = {FLEET: Census(), **fleet_census.take(connection)}
    states = {row.scope: row.state for row in connection.execute(_GUARDS)}
    closed = GuardState.CLOSED.value
    zones = sorted(
        {*censuses, *states} - {FLEET},
        key=lambda scope: (states.get(scope, closed) == closed, -censuses.get(scope, Census()).nodes, scope),
    )
    shown = [FLEET, *zones[:MAX_ZONES]]
    state = gauge(
        "guard_state",
        "State of the guard of automatic repair: 1 for the one that it has. Scopes are the fleet and the zones.",
        ("scope", "state"),
    )
    for scope, word in product(shown, GuardState):
        state.add_metric((scope, word.value), states.get(scope, closed) == word.value)
    yield state
    for name, told in (
        ("nodes", "Nodes that the guard counts: without those in maintenance and those taken offline."),
        ("unhealthy", "Unhealthy nodes as the guard counts them, those in recovery among them."),
        ("unreachable", "Unreachable nodes as the guard counts them."),
        ("in_recovery", "Nodes in recovery as the guard counts them."),
    ):
        counts = (((scope,), getattr(censuses.get(scope, Census()), name)) for scope in shown)
        yield _counted(f"scope_{name}" if name == "nodes" else f"scope_{name}_nodes", told, ("scope",), counts)
    yield single("scopes_left_out", "Zones that are too many to have series of their own.", len(zones[MAX_ZONES:]))


def _of_outbox(connection: sa.Connection, settings: Settings, now: datetime) -> list[GaugeMetricFamily]:
    lowest, highest, saved = connection.execute(_EXTENT).one()
    pending, age = 0, 0.0
    if highest is not None:
        position = max(saved or 0, lowest - 1)
        pending = max(0, highest - position)
        oldest = connection.scalar(_OLDEST, {"position": position})
        age = 0.0 if oldest is None else max(0.0, (now - oldest).total_seconds())
    alarm = settings.configuration.kafka.alarm_pending_events
    return [
        single(
            "outbox_pending_events",
            "Events of the outbox that Kafka doesn't have yet; numbers that were never used count too.",
            pending,
        ),
        single("outbox_oldest_pending_age_seconds", "Age of the oldest event that Kafka doesn't have yet.", age),
        single("outbox_alarm_events", "Pending events from which on the manager raises its alarm.", alarm),
    ]


def _counted(
    name: str, told: str, labels: Sequence[str], counts: Iterable[tuple[Sequence[str], float]]
) -> GaugeMetricFamily:
    family = gauge(name, told, labels)
    for values, count in counts:
        family.add_metric(values, count)
    return family


def _keyed(counts: dict[str, int]) -> Iterator[tuple[tuple[str], int]]:
    return (((key,), count) for key, count in counts.items())


def _type_shown(node_type: str | None, settings: Settings) -> str:
    if node_type is None:
        return NO_TYPE
    return node_type if node_type in settings.node_types else OTHER_TYPE
