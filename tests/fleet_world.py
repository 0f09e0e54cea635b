# SPDX-License-Identifier: GPL-3.0-or-later
"""A fleet in a store to which all the things happen that happen to fleets, by lot: what comes of it is the same for one seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from builders import (
    FakeClock,
    make_contact,
    make_container,
    make_containers,
    make_declaration,
    make_facts,
    make_report,
    make_request,
    make_sample,
    make_settings,
    observe,
)
from fleet_rows_builder import make_row
from node_manager.declarations import NodeChange
from node_manager.deployments import DeploymentPlacer, Placed
from node_manager.domain import Admin, ContactReason
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.problems import ProblemError
from node_manager.resource_allocator import ResourceAllocator
from node_manager.selection_request import SelectionRequest
from node_manager.settings import Settings
from node_manager.store import Store, tables
from selection_model import Fleet, random_request

SITES = [("r", "a", "a1"), ("r", "a", "a2"), ("r", "b", "b1"), ("r", "b", "b2"), ("s", "c", "c1"), (None, None, None)]


def make_world_settings() -> Settings:
    """Give settings with a type that is overcommitted."""
    return make_settings(None, edge={"overcommit": {"cpu": 2.0}, "reserved": {"memory_mib": 100}})


class World:
    """One store's fleet, as one manager changes it."""

    def __init__(self, store: Store, settings: Settings, clock: FakeClock, dice: random.Random) -> None:
        self.store = store
        self.clock = clock
        self.dice = dice
        self.registry = NodeRegistry(store, settings, clock)
        self.log = ObservationLog(store, settings, clock)
        self.allocator = ResourceAllocator(store, settings, clock)
        self.placer = DeploymentPlacer(store, settings, self.allocator, clock)
        self.requests = 0

    def node_ids(self) -> list[str]:
        """Name the nodes there are."""
        return self._column(tables.nodes.c.node_id)

    def populate(self, count: int) -> None:
        """Register nodes, and see them all."""
        for number in range(count):
            self.register(number)
        for node_id in self.node_ids():
            self.see(node_id)

    def step(self) -> None:
        """Let one thing happen."""
        happening = self.dice.choice(
            [
                self.look_at_some,
                self.look_at_some,
                self.look_at_some,
                self.register,
                self.change,
                self.change,
                self.set_admin,
                self.deregister,
                self.allocate,
                self.allocate,
                self.deallocate,
                self.place,
                self.place,
                self.place,
                self.delete,
                self.confirm,
                self.wait,
            ]
        )
        with suppress(ProblemError):
            happening()

    # what happens

    def register(self, number: int | None = None) -> None:
        """Register a node, or once more what is there."""
        node_id = f"n{self.dice.randrange(20) if number is None else number:02d}"
        self.registry.register(make_declaration(node_id, **self._declared()))

    def change(self) -> None:
        """Declare other labels, another place, another size."""
        self.registry.update(self._some_node(), NodeChange.model_validate({"address": "192.0.2.7", **self._declared()}))

    def set_admin(self) -> None:
        """Cordon or open a node."""
        self.registry.set_admin(
            self._some_node(), self.dice.choice([Admin.ACTIVE, Admin.ACTIVE, Admin.CORDONED]), "test"
        )

    def deregister(self) -> None:
        """Remove a node with all that is on it."""
        if self.dice.random() < 0.5:
            self.registry.deregister(self._some_node(), force=self.dice.random() < 0.7)

    def look_at_some(self) -> None:
        """See several nodes."""
        for node_id in self.node_ids():
            if self.dice.random() < 0.5:
                self.look(node_id)

    def look(self, node_id: str) -> None:
        """See a node, mostly well."""
        dice = self.dice
        what = dice.random()
        if what < 0.75:
            self._record(node_id, "report", make_report())
            self._record(node_id, "sample", self._sample())
        elif what < 0.8:
            self._record(node_id, "contact", make_contact(ContactReason.TIMED_OUT))
        elif what < 0.85:
            self._record(node_id, "report", make_report((dice.choice(["warning", "critical"]), "failed")))
        elif what < 0.9:
            self._record(node_id, "report", make_report())
        else:
            features = [name for name in ("docker", "systemd") if dice.random() < 0.8]
            self._record(node_id, "facts", make_facts(features=features))

    def allocate(self) -> None:
        """Reserve by hand, for a deployment or for none."""
        self.requests += 1
        resources = self.dice.choice([{"memory_mib": 50}, {"cpu_millicores": 300}, {"gpu": 1, "memory_mib": 10}])
        self.allocator.allocate(
            self._some_node(),
            make_request(
                f"hand-{self.dice.randrange(10**9)}",
                resources,
                deployment_id=self.dice.choice([None, "hand", f"d{self.dice.randrange(20)}"]),
                ttl_seconds=self.dice.choice([None, 90]),
            ),
        )

    def deallocate(self) -> None:
        """Release one allocation of whomever."""
        table = tables.allocations.c
        with self.store.read() as connection:
            held = connection.execute(sa.select(table.node_id, table.allocation_id).order_by(table.allocation_id)).all()
        if held:
            self.allocator.deallocate(*self.dice.choice(held))

    def place(self) -> list[Placed | ProblemError]:
        """Place one deployment, or several at once."""
        return self.placer.place([self.request() for _ in range(self.dice.choice([1, 1, 1, 3]))])

    def delete(self) -> None:
        """Delete a deployment."""
        self.placer.delete(self._some_deployment())

    def confirm(self) -> None:
        """Keep a deployment."""
        self.placer.confirm(self._some_deployment())

    def wait(self) -> None:
        """Let time pass: seconds, or long enough for pressure to be over."""
        self.clock.advance(self.dice.choice([0.5, 5, 40, 61, 700]))

    def request(self) -> SelectionRequest:
        """Make a request, sometimes one that was made before."""
        self.requests += 1
        fleet = Fleet([make_row(node_id) for node_id in self.node_ids()] or [make_row()], {})
        found = random_request(self.dice, fleet, f"d{self.dice.randrange(400)}")
        changes: dict[str, Any] = {
            "explain": self.dice.random() < 0.3,
            "dry_run": self.dice.random() < 0.1,
            "reserve": self.dice.random() < 0.9,
            "ttl_seconds": self.dice.choice([None, None, 100]),
        }
        return SelectionRequest.model_validate({**found.model_dump(mode="json"), **changes})

    # by lot

    def _declared(self) -> dict[str, Any]:
        dice = self.dice
        region, zone, site = dice.choice(SITES)
        location: dict[str, Any] = {"region": region, "zone": zone, "site": site}
        if dice.random() < 0.7:
            location |= {"latitude": dice.choice([48.0, -17.0]), "longitude": dice.choice([11.0, 179.9, -179.9])}
        return {
            "node_type": dice.choice(["server", "edge", "edge", None]),
            "labels": {key: dice.choice("xy") for key in ("line", "disk") if dice.random() < 0.7},
            "location": location,
            "capacity": {
                "cpu_millicores": dice.choice([1000, 4000]),
                "memory_mib": dice.choice([1000, 4000]),
                "gpu": dice.randrange(4),
            },
        }

    def _sample(self) -> dict[str, Any]:
        dice = self.dice
        sample = make_sample(dice.choice([None, 5.0, 33.3, 71.9, 99.0]))
        sample["cpu"]["pressure"] = dice.choice([None, None, {"some_avg60_percent": dice.choice([1.0, 60.0])}])
        sample["memory"]["use_percent"] = dice.choice([10.0, 50.0])
        sample["containers"] = dice.choice(
            [None, make_containers(), make_containers({**make_container("web"), "image": "app:1"})]
        )
        return sample

    def see(self, node_id: str) -> None:
        """See a node well, and idle."""
        self._record(node_id, "report", make_report())
        self._record(node_id, "sample", make_sample())

    def _record(self, node_id: str, kind: str, data: Any) -> None:
        self.log.record([observe(kind, data, self.clock.now, node_id)])

    def _some_node(self) -> str:
        return self.dice.choice(self.node_ids() or ["none"])

    def _some_deployment(self) -> str:
        return self.dice.choice(self._column(tables.deployments.c.deployment_id) or ["none"])

    def _column(self, column: sa.Column[str]) -> list[str]:
        with self.store.read() as connection:
            return list(connection.scalars(sa.select(column).order_by(column)))


def decision_ids(outcomes: Sequence[Placed | ProblemError]) -> list[str]:
    """Name the decisions that outcomes tell of."""
    found = [
        outcome.decision_id if isinstance(outcome, Placed) else outcome.extra.get("decision_id") for outcome in outcomes
    ]
    return [decision_id for decision_id in found if decision_id is not None]
