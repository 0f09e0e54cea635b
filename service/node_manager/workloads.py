# SPDX-License-Identifier: GPL-3.0-or-later
"""The managed workloads of nodes: containers that run with the id of an allocation as a label.

What a sample lists is compared with a mark of what was listed before; rows are written only where the set changed, in the
transaction of the sample. Whose the workloads are is judged by ghosts.py.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

import sqlalchemy as sa

from node_manager.samples import DEPLOYMENT_LABEL
from node_manager.shapes import ContainerSample, Sample
from node_manager.store import tables
from node_manager.store.bulk import BulkInsert, is_one_of

ALLOCATION_LABEL = "iot-platform.allocation-id"
# A node decides how much it lists.
MAX_WORKLOADS = 256
# What uses nothing and does nothing, as Docker and podman name it.
_AT_REST = frozenset(("created", "configured", "initialized", "exited", "stopped", "dead", "removing"))
_CONTAINER_CHARACTERS = 128
_ALLOCATION_CHARACTERS = 128
_DEPLOYMENT_CHARACTERS = 253


class Workload(NamedTuple):
    """One container that runs for an allocation, as its labels say."""

    container: str
    allocation_id: str
    deployment_id: str | None


def workloads_of(sample: Sample) -> list[Workload]:
    """List the managed workloads of a sample in the order of their names, at most MAX_WORKLOADS."""
    named = {}
    for item in sample.containers.items if sample.containers is not None else ():
        if ALLOCATION_LABEL in item.labels and item.state not in _AT_REST:
            workload = _workload(item)
            named[workload.container] = workload
    return sorted(named.values())[:MAX_WORKLOADS]


def mark_of(sample: Sample) -> str | None:
    """Give a short text that differs where the managed workloads do, the empty one for none; None: it can't tell."""
    containers = sample.containers
    if containers is None or containers.runtime is None:
        return None
    found = [
        f"{item.name}\0{item.labels[ALLOCATION_LABEL]}\0{item.labels.get(DEPLOYMENT_LABEL)}"
        for item in containers.items
        if ALLOCATION_LABEL in item.labels and item.state not in _AT_REST
    ]
    if not found:
        return ""
    found.sort()
    return hashlib.blake2b("\0".join(found).encode("utf-8", "replace"), digest_size=8).hexdigest()


def write(connection: sa.Connection, found: Mapping[str, Sequence[Workload]], at: datetime) -> None:
    """Make the stored workloads of nodes, whose rows are held, those that were *found*; what stays keeps its time."""
    if not found:
        return
    stored: dict[str, set[Workload]] = defaultdict(set)
    for row in connection.execute(_STORED, {"node_ids": sorted(found)}):
        stored[row.node_id].add(Workload(row.container, row.allocation_id, row.deployment_id))
    gone = [
        {"of_node": node_id, "of_container": workload.container}
        for node_id, workloads in sorted(found.items())
        for workload in sorted(stored[node_id].difference(workloads))
    ]
    if gone:
        connection.execute(_DELETE, gone)
    _INSERT(
        connection,
        [
            (node_id, *workload, at)
            for node_id, workloads in sorted(found.items())
            for workload in workloads
            if workload not in stored[node_id]
        ],
    )


def _workload(item: ContainerSample) -> Workload:
    deployment_id = item.labels.get(DEPLOYMENT_LABEL)
    return Workload(
        _cut(item.name, _CONTAINER_CHARACTERS),
        _cut(item.labels[ALLOCATION_LABEL], _ALLOCATION_CHARACTERS),
        None if deployment_id is None else _cut(deployment_id, _DEPLOYMENT_CHARACTERS),
    )


def _cut(text: str, most: int) -> str:
    """Shorten what no id is as long as, so that two that differ still do."""
    return text if len(text) <= most else f"{text[: most - 9]}~{zlib.crc32(text.encode('utf-8', 'replace')):08x}"


_table = tables.node_workloads.c
_STORED = sa.select(_table.node_id, _table.container, _table.allocation_id, _table.deployment_id).where(
    is_one_of(_table.node_id, "node_ids")
)
_DELETE = tables.node_workloads.delete().where(
    _table.node_id == sa.bindparam("of_node"), _table.container == sa.bindparam("of_container")
)
_INSERT = BulkInsert(tables.node_workloads, "node_id", "container", "allocation_id", "deployment_id", "seen_at")
