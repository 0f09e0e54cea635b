# SPDX-License-Identifier: GPL-3.0-or-later
"""What metrics say of each single node: how it stands, how busy it is, what is allocated on it.

Some twenty series a node, so that larger fleets do without, see metrics.max_nodes. Reads within the transaction that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from node_manager import node_brief
from node_manager.capacity import effective_of
from node_manager.domain import Admin, Health, Resource
from node_manager.health_checker import derive_status
from node_manager.overcommit import is_pressed
from node_manager.resources import COMMON, WHOLE_MILLI
from node_manager.settings import Settings
from node_manager.store import tables
from node_manager.store.documents import read_json

_MIB = 1024 * 1024
# As kube-state-metrics names and scales them: base units, and the unit as a label.
_SHOWN = {
    Resource.CPU_MILLICORES.value: ("cpu", "core", 0.001),
    Resource.MEMORY_MIB.value: ("memory", "byte", _MIB),
    Resource.DISK_MIB.value: ("disk", "byte", _MIB),
    Resource.NETWORK_MBPS.value: ("network", "byte_per_second", 125_000.0),
}
_nodes, _samples, _accounts = tables.nodes.c, tables.node_samples.c, tables.node_accounts.c
# Of the samples only what is shown: they are documents of some KB.
_QUERY = (
    sa.select(
        *node_brief.COLUMNS,
        tables.node_states.c.pressed_at,
        _samples.observed_at.label("sampled_at"),
        _samples.sample[("cpu", "use_percent")].as_float().label("cpu_percent"),
        _samples.sample[("memory", "use_percent")].as_float().label("memory_percent"),
        _samples.sample["filesystems"].label("filesystems"),
        _accounts.capacity.label("capacity"),
        _accounts.allocated,
        _accounts.units,
        _accounts.used_units,
        tables.lost_nodes.c.lost_at,
    )
    .join(tables.node_states, tables.node_states.c.node_id == _nodes.node_id)
    .join(tables.node_accounts, _accounts.node_id == _nodes.node_id, isouter=True)
    .join(tables.node_samples, _samples.node_id == _nodes.node_id, isouter=True)
    .join(tables.lost_nodes, tables.lost_nodes.c.node_id == _nodes.node_id, isouter=True)
    .order_by(_nodes.node_id)
)


def read(connection: sa.Connection, settings: Settings, now: datetime) -> str:
    """Read the gauges of all nodes, as lines that either form of a scrape takes."""
    found = _Gauges(settings, now)
    for row in connection.execute(_QUERY):
        found.add(row)
    return found.text()


class _Gauge:
    """One gauge, written while it is gathered.

    The library would do it too, and takes six times as long.
    Source: prometheus.io, "Exposition formats"; the specification of OpenMetrics 1.0, where gauges look the same.
    """

    def __init__(self, name: str, told: str, labels: Sequence[str] = ("node_id",)) -> None:
        name = f"node_manager_{name}"
        self._lines = [f"# HELP {name} {told}", f"# TYPE {name} gauge"]
        places = ",".join(f'{label}="%s"' for label in labels)
        self._form = f"{name}{{{places}}} %r"

    def add(self, labels: tuple[str, ...], value: float) -> None:
        """Add a series; its labels are escaped already."""
        self._lines.append(self._form % (*labels, float(value)))

    def text(self) -> str:
        """Give its lines."""
        return "\n".join(self._lines)


class _Gauges:
    """The gauges of nodes, while they are gathered."""

    def __init__(self, settings: Settings, now: datetime) -> None:
        self._settings = settings
        self._now = now
        self._fresh_from = now - timedelta(seconds=settings.configuration.monitoring.stale_after_seconds)
        # Device classes are words of the nodes' own: only those that the configuration knows become labels.
        self._devices = {name for definition in settings.node_types.values() for name in definition.resources} - COMMON
        self._info = _Gauge(
            "node_info",
            "Always 1: what is declared of a node, to join with the other series of it.",
            ("node_id", "name", "node_type", "region", "zone", "site"),
        )
        self._state = _Gauge(
            "node_state", "Always 1: the state that a node has now.", ("node_id", "status", "health", "admin")
        )
        self._up = _Gauge("node_up", "Whether a node answers: it was reached, and is not unreachable now.")
        self._schedulable = _Gauge("node_schedulable", "Whether new work may be placed on a node.")
        self._quarantined = _Gauge(
            "node_quarantined", "Whether a node's host key changed, so that nothing of it is trusted."
        )
        self._lost = _Gauge(
            "node_lost",
            "Whether a node is lost: unreachable, the owners of its work were told, and no operator has it in hand.",
        )
        self._contact = _Gauge(
            "node_last_contact_timestamp_seconds", "When a node was last reached, in seconds since 1970."
        )
        self._sampled = _Gauge(
            "node_sample_timestamp_seconds", "When a node's newest sample was taken, in seconds since 1970."
        )
        self._cpu = _Gauge("node_cpu_used_ratio", "Share of a node's CPU time in use; left out once stale.")
        self._memory = _Gauge("node_memory_used_ratio", "Share of a node's memory in use; left out once stale.")
        self._disk = _Gauge("node_disk_used_ratio", "Share of a node's fullest filesystem in use; left out once stale.")
        of_class = ("node_id", "resource", "unit")
        self._allocatable = _Gauge(
            "node_allocatable",
            "What may be allocated on a node: its capacity less what is reserved, overcommitted.",
            of_class,
        )
        self._allocated = _Gauge("node_allocated", "What is allocated on a node.", of_class)

    def add(self, row: Any) -> None:
        """Add one node."""
        one = (row.node_id,)
        status = derive_status(Admin(row.admin), Health(row.health)).value
        told = map(_escape, (row.name, row.type, row.region, row.zone, row.site))
        self._info.add((row.node_id, *told), 1)
        self._state.add((row.node_id, status, row.health, row.admin), 1)
        self._up.add(one, row.last_contact_at is not None and row.health != Health.UNREACHABLE.value)
        self._schedulable.add(one, node_brief.is_schedulable(row, self._fresh_from))
        self._quarantined.add(one, row.quarantined)
        self._lost.add(one, row.lost_at is not None and row.admin not in node_brief.IN_HAND)
        if row.last_contact_at is not None:
            self._contact.add(one, row.last_contact_at.timestamp())
        self._add_sample(row)
        self._add_books(row)

    def text(self) -> str:
        """Give the lines of all gauges."""
        return "".join(f"{found.text()}\n" for found in vars(self).values() if isinstance(found, _Gauge))

    def _add_sample(self, row: Any) -> None:
        if row.sampled_at is None:
            return
        one = (row.node_id,)
        self._sampled.add(one, row.sampled_at.timestamp())
        if row.sampled_at < self._fresh_from:
            return
        for family, percent in (
            (self._cpu, row.cpu_percent),
            (self._memory, row.memory_percent),
            (self._disk, _fullest(row.filesystems)),
        ):
            if percent is not None:
                family.add(one, percent / 100)

    def _add_books(self, row: Any) -> None:
        if row.capacity is None:
            return
        node_type = self._settings.node_types.get(row.type) if row.type else None
        pressed = is_pressed(row.pressed_at, self._now, self._settings.configuration.allocation)
        effective = effective_of(row.capacity, node_type, pressed=pressed)
        for name, (resource, unit, factor) in _SHOWN.items():
            if name in effective:
                labels = (row.node_id, resource, unit)
                self._allocatable.add(labels, effective[name] * factor)
                self._allocated.add(labels, row.allocated.get(name, 0) * factor)
        for name in self._devices.intersection(effective):
            labels = (row.node_id, name, "unit")
            self._allocatable.add(labels, effective[name])
            self._allocated.add(labels, _units_used(row.used_units, name))


def _escape(text: str | None) -> str:
    return (text or "").replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _fullest(filesystems: Any) -> float | None:
    # A part of a JSON document comes as text from one driver and read from the other.
    found = read_json(filesystems) if isinstance(filesystems, str) else filesystems
    return max((item["use_percent"] for item in found or () if not item["read_only"]), default=None)


def _units_used(used_units: Mapping[str, Mapping[str, int]], name: str) -> float:
    return sum(used_units.get(name, {}).values()) / WHOLE_MILLI
