# SPDX-License-Identifier: GPL-3.0-or-later
"""What is known of a node's resources: the newest sample, its summary, the applications in it, its history.

The summary and the applications are pure; reading takes a store.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from node_manager.shapes import Application, Sample
from node_manager.store import Store, tables
from node_manager.store.bulk import BulkInsert

# Containers say which deployment they belong to with ours; compose's own label serves where ours is absent.
DEPLOYMENT_LABEL = "iot-platform.deployment-id"
APPLICATION_LABEL = "iot-platform.application"
COMPOSE_PROJECT_LABEL = "com.docker.compose.project"


@dataclass(frozen=True)
class Utilization:
    """The use of a node's resources in a handful of numbers; None where the node can't tell."""

    cpu_percent: float | None
    memory_percent: float | None
    swap_percent: float | None
    disk_percent: float | None
    disk_fullest_mount: str | None
    load_1m: float | None
    cpu_pressure_avg60_percent: float | None
    received_bytes_per_second: float | None
    transmitted_bytes_per_second: float | None
    temperature_celsius: float | None
    containers_running: int | None


@dataclass(frozen=True)
class Observed:
    """One newest observation as the store has it."""

    data: dict[str, Any]
    observed_at: datetime
    source: str


@dataclass(frozen=True)
class Minute:
    """What the samples of one minute say together; None where none of them could tell."""

    start: datetime
    samples: int
    cpu_percent_average: float | None
    cpu_percent_maximum: float | None
    memory_percent_average: float | None
    memory_percent_maximum: float | None
    disk_percent_maximum: float | None
    received_bytes_per_second_average: float | None
    transmitted_bytes_per_second_average: float | None


def summarise(sample: Sample) -> Utilization:
    """Fold a sample into the numbers that people and schedulers ask for."""
    cpu, memory = sample.cpu, sample.memory
    fullest = max(
        (fs for fs in sample.filesystems or [] if not fs.read_only), key=lambda fs: fs.use_percent, default=None
    )
    return Utilization(
        cpu_percent=cpu.use_percent if cpu else None,
        memory_percent=memory.use_percent if memory else None,
        swap_percent=memory.swap_use_percent if memory else None,
        disk_percent=fullest.use_percent if fullest else None,
        disk_fullest_mount=fullest.mount if fullest else None,
        load_1m=cpu.load_1m if cpu else None,
        cpu_pressure_avg60_percent=cpu.pressure.some_avg60_percent if cpu and cpu.pressure else None,
        received_bytes_per_second=_total(sample, "received_bytes_per_second"),
        transmitted_bytes_per_second=_total(sample, "transmitted_bytes_per_second"),
        temperature_celsius=sample.thermal.temperature_celsius if sample.thermal else None,
        containers_running=(
            sum(item.state == "running" for item in sample.containers.items)
            if sample.containers and sample.containers.runtime
            else None
        ),
    )


def applications_of(sample: Sample) -> list[Application]:
    """Group a sample's containers into the applications they belong to, sorted by name."""
    groups: dict[tuple[str, str | None], list[tuple[str, bool]]] = {}
    for item in sample.containers.items if sample.containers else []:
        name = item.labels.get(APPLICATION_LABEL) or item.labels.get(COMPOSE_PROJECT_LABEL) or item.name
        group = groups.setdefault((name[:255], (item.labels.get(DEPLOYMENT_LABEL) or "")[:255] or None), [])
        group.append((item.name, item.state == "running"))
    return [
        Application(
            name=name,
            deployment_id=deployment_id,
            containers=sorted(container for container, _ in members),
            running=sum(running for _, running in members),
        )
        for (name, deployment_id), members in sorted(groups.items(), key=lambda group: (group[0][0], group[0][1] or ""))
    ]


def add_to_history(connection: sa.Connection, samples: Sequence[tuple[str, datetime, Sample]]) -> None:
    """Count samples (node_id, observed_at, sample) into their minutes."""
    minutes: dict[tuple[str, int], list[Any]] = {}
    for node_id, at, sample in samples:
        key, values = (node_id, int(at.timestamp() // 60)), _history_values(summarise(sample))
        known = minutes.get(key)
        # One row of a statement for each row of the table: PostgreSQL insists on it.
        minutes[key] = values if known is None else [add(*pair) for add, *pair in zip(_ADD, known, values, strict=True)]
    _COUNT(connection, [(*key, *values) for key, values in sorted(minutes.items())])


def newest_sample(store: Store, node_id: str) -> Observed | None:
    """Read the newest sample of a node; None before the first."""
    return _newest(store, tables.node_samples, "sample", node_id)


def newest_report(store: Store, node_id: str) -> Observed | None:
    """Read the newest health report of a node; None before the first."""
    return _newest(store, tables.node_reports, "report", node_id)


def history(store: Store, node_id: str, since: datetime) -> list[Minute]:
    """Read a node's one-minute history from *since* on, oldest first."""
    table = tables.sample_history
    query = (
        sa.select(table)
        .where(table.c.node_id == node_id, table.c.minute >= int(since.timestamp() // 60))
        .order_by(table.c.minute)
    )
    with store.read() as connection:
        return [_minute_of_row(row) for row in connection.execute(query)]


def prune(store: Store, now: datetime, keep: timedelta) -> None:
    """Forget history older than *keep*."""
    with store.write() as connection:
        connection.execute(
            tables.sample_history.delete().where(tables.sample_history.c.minute < int((now - keep).timestamp() // 60))
        )


def _newest(store: Store, table: sa.Table, document: str, node_id: str) -> Observed | None:
    with store.read() as connection:
        row = connection.execute(sa.select(table).where(table.c.node_id == node_id)).one_or_none()
    return None if row is None else Observed(row._mapping[document], row.observed_at, row.source)


def _total(sample: Sample, rate: str) -> float | None:
    rates = [getattr(interface, rate) for interface in sample.network or [] if interface.interface != "lo"]
    known = [value for value in rates if value is not None]
    return sum(known) if known else None


def _history_values(use: Utilization) -> list[Any]:
    """Give the values of a sample in the order of the columns."""
    return [
        1,
        *_counted(use.cpu_percent),
        use.cpu_percent,
        *_counted(use.memory_percent),
        use.memory_percent,
        use.disk_percent,
        *_counted(use.received_bytes_per_second),
        *_counted(use.transmitted_bytes_per_second),
    ]


def _counted(value: float | None) -> tuple[int, float]:
    return (0, 0.0) if value is None else (1, value)


def _larger(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else max(one, other)


_KEY = ("node_id", "minute")
_COUNTED = [column.name for column in tables.sample_history.c if column.name not in _KEY]
_ADD: list[Callable[[Any, Any], Any]] = [_larger if name.endswith("_max") else operator.add for name in _COUNTED]


def _count_into(larger: str) -> str:
    table = tables.sample_history.name
    # SQLite's max() of a null is null, PostgreSQL's greatest() passes over it.
    counted = (
        f"{name} = {larger}(coalesce({table}.{name}, excluded.{name}), coalesce(excluded.{name}, {table}.{name}))"
        if name.endswith("_max")
        else f"{name} = {table}.{name} + excluded.{name}"
        for name in _COUNTED
    )
    return f"ON CONFLICT ({', '.join(_KEY)}) DO UPDATE SET {', '.join(counted)}"


_COUNT = BulkInsert(
    tables.sample_history,
    *_KEY,
    *_COUNTED,
    conflict={"sqlite": _count_into("max"), "postgresql": _count_into("greatest")},
)


def _minute_of_row(row: sa.Row[Any]) -> Minute:
    return Minute(
        start=datetime.fromtimestamp(row.minute * 60, UTC),
        samples=row.samples,
        cpu_percent_average=_average(row.cpu_percent_sum, row.cpu_percent_count),
        cpu_percent_maximum=row.cpu_percent_max,
        memory_percent_average=_average(row.memory_percent_sum, row.memory_percent_count),
        memory_percent_maximum=row.memory_percent_max,
        disk_percent_maximum=row.disk_percent_max,
        received_bytes_per_second_average=_average(
            row.received_bytes_per_second_sum, row.received_bytes_per_second_count
        ),
        transmitted_bytes_per_second_average=_average(
            row.transmitted_bytes_per_second_sum, row.transmitted_bytes_per_second_count
        ),
    )


def _average(total: float, count: int) -> float | None:
    return total / count if count else None
