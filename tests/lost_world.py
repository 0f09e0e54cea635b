# SPDX-License-Identifier: GPL-3.0-or-later
"""A fleet whose nodes are lost and come back, with both clocks in the test's hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa
from builders import (
    FakeClock,
    make_container,
    make_containers,
    make_declaration,
    make_facts,
    make_report,
    make_request,
    make_sample,
    observe,
)
from fleet_rows_builder import make_selection_request
from node_manager.deployments import DeploymentPlacer, Placed
from node_manager.domain import Health
from node_manager.ghosts import Ghosts
from node_manager.lost_nodes import LostNodes
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.replacements import Replacements
from node_manager.resource_allocator import ResourceAllocator
from node_manager.settings import Settings
from node_manager.store import Store
from node_manager.workloads import ALLOCATION_LABEL

CAPACITY = {"cpu_millicores": 1000, "memory_mib": 100, "gpu": 2}


class Monotonic:
    """A clock that nobody sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Give the time."""
        return self.now


class LostWorld:
    """One manager's parts over a store, and what happens to the nodes in it."""

    def __init__(self, store: Store, settings: Settings, clock: FakeClock) -> None:
        self.store, self.settings, self.clock = store, settings, clock
        self.monotonic = Monotonic()
        self.registry = NodeRegistry(store, settings, clock)
        self.log = ObservationLog(store, settings, clock)
        self.allocator = ResourceAllocator(store, settings, clock)
        self.placer = DeploymentPlacer(store, settings, self.allocator, clock)
        self.replacements = Replacements(store, settings, self.placer, clock)
        self.begin_anew()

    def begin_anew(self) -> None:
        """Start the manager again, as after a crash: what it remembered is gone."""
        self.lost = LostNodes(self.store, self.settings, self.replacements, self.clock, self.monotonic)
        self.ghosts = Ghosts(self.store, self.settings, self.clock, self.monotonic)

    def pass_time(self, seconds: float) -> None:
        """Let time pass on both clocks."""
        self.clock.advance(seconds)
        self.monotonic.now += seconds

    def add(self, node_id: str, zone: str = "a", **changes: Any) -> None:
        """Register a node of 100 MiB and 2 GPUs and see it well."""
        location = {"region": "r", "zone": zone, "site": zone}
        self.registry.register(make_declaration(node_id, **{"capacity": CAPACITY, "location": location, **changes}))
        self.see(node_id)

    def see(self, node_id: str, *workloads: str, containers: dict[str, Any] | None = None) -> None:
        """See a node well, with a container for each of these allocations, named after it."""
        self.pass_time(0.5)
        items = [make_container(f"c-{name}", labels={ALLOCATION_LABEL: name}) for name in workloads]
        listed = make_containers(*items) if containers is None else containers
        sample = make_sample(containers=listed)
        for kind, data in (("facts", make_facts()), ("sample", sample), ("report", make_report())):
            self.pass_time(0.001)
            self.log.record([observe(kind, data, self.clock.now, node_id)])

    def lose(self, *node_ids: str, **more: Any) -> None:
        """Conclude that nodes are unreachable."""
        self.pass_time(1)
        verdict = {"liveness": "unreachable", "reason": "TimedOut", "message": "silent", "evidence": "peers_blind"}
        for node_id in node_ids:
            data = {**verdict, **more}
            self.log.record([observe("verdict", data, self.clock.now, node_id)], from_manager=True)
            assert self.registry.get(node_id).state.health is Health.UNREACHABLE

    def hold(self, node_id: str, *names: str, memory_mib: int = 10, **more: Any) -> None:
        """Allocate by hand."""
        for name in names:
            self.allocator.allocate(node_id, make_request(name, {"memory_mib": memory_mib}, **more))

    def place(self, name: str, memory_mib: int = 10, **more: Any) -> dict[str, str]:
        """Place a deployment that must fit; give its allocations' nodes."""
        (outcome,) = self.placer.place([make_selection_request(name, {"memory_mib": memory_mib}, **more)])
        assert isinstance(outcome, Placed), outcome
        return {item.allocation_id: item.node_id for item in outcome.allocations}

    def targets(self, node_id: str) -> dict[str, str | None]:
        """Tell what is proposed for a node's allocations."""
        return {item.allocation_id: item.to_node for item in self.replacements.of(node_id)}


@contextmanager
def counted(store: Store) -> Iterator[list[str]]:
    """Count the statements of a store."""
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_more: Any) -> None:
        statements.append(statement)

    # The reader is the engine itself, as is the writer but on SQLite.
    engines = {store._engine, store._writer.engine}  # there is no other way to count
    for engine in engines:
        sa.event.listen(engine, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        for engine in engines:
            sa.event.remove(engine, "before_cursor_execute", note)
