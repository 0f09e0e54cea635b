# SPDX-License-Identifier: GPL-3.0-or-later
"""Whatever is done, in whatever order and by whichever manager, the books add up, on either engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from allocation_model import Model, ModelNode
from books import assert_books_add_up, assert_nothing_is_left
from builders import FakeClock, make_declaration, make_report, make_request, make_sample, make_settings, observe
from hypothesis import HealthCheck, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from node_manager.declarations import NodeChange
from node_manager.deployments import DeploymentPlacer, Placed
from node_manager.domain import Admin
from node_manager.events import EventType
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.problems import (
    AllocationNotFoundError,
    ConflictError,
    DeploymentExistsError,
    DeploymentNotFoundError,
    InvalidInputError,
    NodeInUseError,
    NodeNotFoundError,
    NothingFitsError,
    QuotaExceededError,
    QuotaNotFoundError,
)
from node_manager.quotas import Quotas
from node_manager.resource_allocator import AllocationRequest, ResourceAllocator
from node_manager.resources import in_thousandths
from node_manager.selection_request import SelectionRequest, Strategy
from node_manager.store import Store, open_store, tables
from stored import Rows

SETTINGS = make_settings(packed={"reserved": {"cpu_millicores": 1}, "overcommit": {"cpu": 2.0}})
NODES = ["packed", "plain"]
OWNERS = ["shop", "lab"]
# So few and so small that they get into each other's way all the time.
NODE, OWNER = st.sampled_from(NODES), st.sampled_from(OWNERS)
WRITER, ALLOCATION = st.integers(0, 1), st.sampled_from([f"a{number}" for number in range(8)])
SHARE = st.sampled_from([1, 250, 400, 460, 500, 600, 1000])
RESOURCES = st.fixed_dictionaries(
    {},
    optional={
        "cpu_millicores": st.integers(1, 4),
        "memory_mib": st.integers(1, 3),
        "gpu": st.integers(1, 2) | st.fixed_dictionaries({"count": st.integers(1, 2), "share_milli": SHARE}),
    },
).filter(bool)
LIMITS = st.fixed_dictionaries(
    {}, optional={"cpu_millicores": st.integers(0, 8), "memory_mib": st.integers(0, 6), "gpu": st.integers(0, 2)}
).filter(bool)
SIZE = {"cpu": st.integers(0, 12), "memory": st.integers(0, 15), "gpu": st.integers(0, 5)}
TTL = st.none() | st.sampled_from([1, 60, 1000])
# None: an id of its own; the shared ones are often taken.
KEY = st.one_of(st.none(), st.none(), st.none(), ALLOCATION)
Call = tuple[int, str | None, dict[str, Any], str, int | None]
CALLS = st.lists(st.tuples(WRITER, KEY, RESOURCES, OWNER, TTL), min_size=3, max_size=8)


class Bench(RuleBasedStateMachine):
    """Two managers on one database, the model beside them, and what must hold after every step."""

    def __init__(self, stores: list[Store]) -> None:
        super().__init__()
        with stores[0].write() as connection:
            for table in reversed(tables.metadata.sorted_tables):
                connection.execute(table.delete())
        self.clock, self.rows, self.model = FakeClock(), Rows(stores[0]), Model()
        self.allocators = [ResourceAllocator(store, SETTINGS, self.clock) for store in stores]
        self.placers = [
            DeploymentPlacer(store, SETTINGS, allocator, self.clock)
            for store, allocator in zip(stores, self.allocators, strict=True)
        ]
        self.registry = NodeRegistry(stores[0], SETTINGS, self.clock)
        self.log = ObservationLog(stores[1], SETTINGS, self.clock)
        self.quotas = Quotas(stores[1], SETTINGS, self.clock)
        self.before: dict[tuple[str, str], int] = {}

    @initialize()
    def register_all(self) -> None:
        """Start with both nodes."""
        for node_id in NODES:
            self.register(node_id)

    def register(self, node_id: str) -> None:
        """Register a node as it is at first: of the one, 1 millicore is reserved and the rest is overcommitted twice."""
        packed = {"reserved_cpu": 1, "cpu_factor": 2} if node_id == "packed" else {}
        node = ModelNode(9, 12, 4, **packed)
        kind = "packed" if packed else None
        self.registry.register(make_declaration(node_id, node_type=kind, capacity=node.capacity))
        self.model.nodes[node_id] = node

    def allocate(self, writer: int, node_id: str, wanted: AllocationRequest) -> None:
        """Allocate, and hold the answer against the model's."""
        self.model.expire(self.clock.now)
        refusal = self.model.refusal(node_id, wanted, self.clock.now)
        there = self.model.held.get(wanted.allocation_id)
        if refusal is not None:
            with pytest.raises(refusal) as caught:
                self.allocators[writer].allocate(node_id, wanted)
            note(f"refused: {caught.value}")
            return
        made, created = self.allocators[writer].allocate(node_id, wanted)
        assert created == (there is None)
        if there is not None:
            assert made == there[1]
            return
        assert (made.node_id, made.owner, made.ask) == (node_id, wanted.owner, wanted.ask)
        for name, count, share in wanted.ask.devices:
            assert list(made.units[name].values()) == [share] * count
            assert made.units[name].keys() <= {str(unit) for unit in range(self.model.nodes[node_id].gpu)}
        self.model.took(wanted, made)

    @invariant()
    def nothing_grows_past_what_there_is(self) -> None:
        """Let no sum grow past what the node has or the owner may have; what shrank around a sum may leave it above."""
        now: dict[tuple[str, str], int] = {}
        bounds: dict[tuple[str, str], int] = {}
        for row in self.rows.of(tables.node_accounts):
            for name, amount in row["allocated"].items():
                now[row["node_id"], name] = amount
                bounds[row["node_id"], name] = self.model.nodes[row["node_id"]].effective(self.clock.now)[name]
            for unit, milli in row["used_units"].get("gpu", {}).items():
                now[row["node_id"], f"gpu {unit}"] = milli
                bounds[row["node_id"], f"gpu {unit}"] = 1000 if int(unit) < self.model.nodes[row["node_id"]].gpu else 0
        for row in self.rows.of(tables.owners):
            for name, amount in row["used"].items():
                now[row["owner"], name] = amount
                bounds[row["owner"], name] = (row["hard"] or {}).get(name, amount)
        for key, amount in now.items():
            assert amount <= max(bounds[key], self.before.get(key, 0)), key
        self.before = now

    @invariant()
    def books_add_up(self) -> None:
        """Find the same sums wherever they are kept, and the model's allocations."""
        assert_books_add_up(self.rows)
        held = {key: allocation for key, (_, allocation) in self.model.held.items()}
        assert {row["allocation_id"] for row in self.rows.of(tables.allocations)} == held.keys()
        for row in self.rows.of(tables.allocations):
            expected = held[row["allocation_id"]]
            assert (row["node_id"], row["owner"], row["units"], row["expires_at"]) == (
                expected.node_id,
                expected.owner,
                expected.units,
                expected.expires_at,
            )

    @invariant()
    def books_say_when_more_is_taken_than_there_is(self) -> None:
        """Find the flag of the books where the model sees a node over its limits."""
        for node_id in self.model.nodes:
            books, _ = self.allocators[0].books(node_id)
            assert books.overcommitted == self.model.over(node_id, self.clock.now), node_id

    @invariant()
    def every_change_has_one_event(self) -> None:
        """Count the outbox."""
        counted = Counter(row["type"] for row in self.rows.events())
        reasons = Counter(row["data"]["reason"] for row in self.rows.events(EventType.ALLOCATION_RELEASED))
        assert counted[EventType.ALLOCATION_RESERVED] == self.model.reserved
        assert counted[EventType.ALLOCATION_CONFIRMED] == self.model.confirmed
        assert reasons == self.model.released

    def teardown(self) -> None:
        """Release everything: nothing is left."""
        for allocation_id, (_, held) in list(self.model.held.items()):
            assert self.allocators[0].deallocate(held.node_id, allocation_id)
        assert_nothing_is_left(self.rows)


class AllocationRules(Bench):
    """Single allocations, by either manager."""

    # Three rules, and several calls in a step: most steps would else find nothing to get in the way of.
    @rule(node_id=NODE, calls=CALLS)
    def allocate_on_either(self, node_id: str, calls: list[Call]) -> None:
        """Allocate; an id may be taken."""
        for writer, key, resources, owner, ttl in calls:
            wanted = make_request(key or f"b{self.model.reserved}", resources, owner, ttl_seconds=ttl)
            self.allocate(writer, node_id, wanted)
            self.nothing_grows_past_what_there_is()

    @rule(calls=CALLS)
    def allocate_on_packed(self, calls: list[Call]) -> None:
        """Allocate on the node that is overcommitted."""
        self.allocate_on_either("packed", calls)

    @rule(calls=CALLS)
    def allocate_on_plain(self, calls: list[Call]) -> None:
        """Allocate on the other node."""
        self.allocate_on_either("plain", calls)

    @precondition(lambda self: self.model.held)
    @rule(writer=WRITER, data=st.data())
    def allocate_again(self, writer: int, data: st.DataObject) -> None:
        """Repeat a call, word for word."""
        wanted, held = self.model.held[data.draw(st.sampled_from(sorted(self.model.held)))]
        self.allocate(writer, held.node_id, wanted)

    @precondition(lambda self: self.model.held)
    @rule(writer=WRITER, data=st.data())
    def deallocate_some(self, writer: int, data: st.DataObject) -> None:
        """Release what is held, where it is."""
        for key in data.draw(st.lists(st.sampled_from(sorted(self.model.held)), min_size=1, max_size=4, unique=True)):
            self.deallocate(writer, self.model.held[key][1].node_id, key)

    @rule(writer=WRITER, node_id=NODE, key=ALLOCATION)
    def deallocate(self, writer: int, node_id: str, key: str) -> None:
        """Release; it may be gone, or elsewhere."""
        there = self.model.held.get(key)
        allocator = self.allocators[writer]
        if there is None and node_id not in self.model.nodes:
            with pytest.raises(NodeNotFoundError):
                allocator.deallocate(node_id, key)
        elif there is None:
            assert not allocator.deallocate(node_id, key)
        elif there[1].node_id != node_id:
            with pytest.raises(ConflictError):
                allocator.deallocate(node_id, key)
        else:
            assert allocator.deallocate(node_id, key)
            self.model.release(key, "deallocated")

    @rule(writer=WRITER, key=ALLOCATION, data=st.data())
    def confirm(self, writer: int, key: str, data: st.DataObject) -> None:
        """Keep for good; it may have expired, or never have been."""
        key = data.draw(st.sampled_from([key, *sorted(self.model.held)]))
        self.model.expire(self.clock.now)
        if key not in self.model.held:
            with pytest.raises(AllocationNotFoundError):
                self.allocators[writer].confirm(key)
            return
        kept = self.allocators[writer].confirm(key)
        wanted, before = self.model.held[key]
        self.model.confirmed += before.expires_at is not None
        self.model.held[key] = (wanted, kept)
        assert kept.expires_at is None


class SurroundingRules(Bench):
    """All that changes around allocations."""

    @rule(seconds=st.sampled_from([0.5, 1, 30, 60, 599, 600, 1000]), writer=st.none() | WRITER)
    def wait(self, seconds: float, writer: int | None) -> None:
        """Let time pass; one of the managers may release what is due."""
        self.clock.advance(seconds)
        if writer is not None:
            assert self.allocators[writer].expire() == self.model.expire(self.clock.now)

    @precondition(lambda self: self.model.nodes)
    @rule(data=st.data(), **SIZE)
    def resize(self, data: st.DataObject, cpu: int, memory: int, gpu: int) -> None:
        """Declare another capacity, more or less."""
        node = self.model.nodes[node_id := data.draw(st.sampled_from(sorted(self.model.nodes)))]
        node.cpu_millicores, node.memory_mib, node.gpu = cpu, memory, gpu
        kind = "packed" if node.cpu_factor > 1 else None
        body = {"address": "192.0.2.7", "node_type": kind, "capacity": node.capacity}
        self.registry.update(node_id, NodeChange.model_validate(body))

    @precondition(lambda self: self.model.nodes)
    @rule(data=st.data(), waiting=st.sampled_from([0.0, 25.0, 26.0, 90.0]))
    def sample(self, data: st.DataObject, waiting: float) -> None:
        """See how busy a node is: pressure takes overcommit away until it is long over."""
        node_id = data.draw(st.sampled_from(sorted(self.model.nodes)))
        sample = make_sample()
        sample["cpu"]["pressure"] = {"some_avg60_percent": waiting}
        outcome = self.log.record([observe("sample", sample, self.clock.advance(0.001), node_id)])
        assert outcome.recorded == 1
        if waiting > 25:
            self.model.nodes[node_id].pressed_at = self.clock.now

    @rule(owner=OWNER, hard=st.none() | LIMITS)
    def limit(self, owner: str, hard: dict[str, int] | None) -> None:
        """Limit an owner, also below what is used; or no more."""
        if hard is None:
            assert self.quotas.delete(owner) == (self.model.hard.pop(owner, None) is not None)
            with pytest.raises(QuotaNotFoundError):
                self.quotas.get(owner)
            return
        assert self.quotas.put(owner, hard).hard == hard
        self.model.hard[owner] = {name: limit * (1000 if name == "gpu" else 1) for name, limit in hard.items()}

    @rule(node_id=NODE, what=st.sampled_from(["cordon", "activate", "deregister", "force"]))
    def come_and_go(self, node_id: str, what: str) -> None:
        """Register a node that is gone; else keep work off it or let it in, or remove it, with what is on it only by force."""
        if node_id not in self.model.nodes:
            self.register(node_id)
        elif what in {"cordon", "activate"}:
            active = what == "activate"
            self.registry.set_admin(node_id, Admin.ACTIVE if active else Admin.CORDONED, "new disk")
            self.model.nodes[node_id].active = active
        else:
            self.deregister(node_id, force=what == "force")

    def deregister(self, node_id: str, *, force: bool) -> None:
        """Remove a node."""
        on_it = [key for key, (_, held) in self.model.held.items() if held.node_id == node_id]
        if on_it and not force:
            with pytest.raises(NodeInUseError):
                self.registry.deregister(node_id)
            return
        self.registry.deregister(node_id, force=force)
        for key in on_it:
            self.model.release(key, "node_deregistered")
        del self.model.nodes[node_id]


class DeploymentRules(Bench):
    """Deployments, placed by either manager from its own picture of the fleet."""

    @rule(
        writer=WRITER,
        name=st.sampled_from(["d0", "d1", "d2"]),
        replicas=st.integers(1, 3),
        resources=RESOURCES,
        owner=OWNER,
        ttl=TTL,
        strategy=st.sampled_from(list(Strategy)),
    )
    def place(
        self,
        writer: int,
        name: str,
        replicas: int,
        resources: dict[str, Any],
        owner: str,
        ttl: int | None,
        strategy: Strategy,
    ) -> None:
        """Place; the id may be taken, the quota too small, the nodes full or shut."""
        self.look_at_all()
        body = {"deployment_id": name, "owner": owner, "replicas": replicas, "resources": resources, "ttl_seconds": ttl}
        request = SelectionRequest.model_validate({**body, "strategy": strategy})
        self.model.expire(self.clock.now)
        there = self.replicas_of(name)
        (outcome,) = self.placers[writer].place([request])
        note(f"{outcome}")
        match outcome:
            case DeploymentExistsError():
                assert there
            case QuotaExceededError():
                hard, used = self.model.hard[owner], self.model.used(owner)
                assert any(used[key] + amount > hard.get(key, 10**9) for key, amount in self.counted(request).items())
            case NothingFitsError():
                for node_id in self.model.nodes if replicas == 1 else ():
                    wanted = AllocationRequest("one", "nobody", request.ask)
                    assert self.model.refusal(node_id, wanted, self.clock.now) is not None, node_id
            case Placed(created=False):
                assert sorted(allocation.allocation_id for allocation in outcome.allocations) == there
            case Placed():
                assert not there
                assert len(outcome.allocations) == replicas
                for made in outcome.allocations:
                    wanted = AllocationRequest(made.allocation_id, owner, request.ask, name, ttl)
                    self.model.took(wanted, made)
            case _:
                # A class that no node has any more, or has none of yet.
                assert isinstance(outcome, InvalidInputError)

    @rule(writer=WRITER, name=st.sampled_from(["d0", "d1", "d2"]))
    def delete(self, writer: int, name: str) -> None:
        """Release all replicas; there may be none."""
        there = self.replicas_of(name)
        if not there:
            with pytest.raises(DeploymentNotFoundError):
                self.placers[writer].delete(name)
            return
        assert self.placers[writer].delete(name) == len(there)
        for key in there:
            self.model.release(key, "deployment_deleted")

    def look_at_all(self) -> None:
        """See all nodes healthy, so that only what this test is about keeps them from being chosen."""
        for node_id in self.model.nodes:
            self.log.record([observe("report", make_report(), self.clock.advance(0.001), node_id)])

    def replicas_of(self, name: str) -> list[str]:
        """Name the model's allocations of a deployment."""
        return sorted(key for key, (_, held) in self.model.held.items() if held.deployment_id == name)

    @staticmethod
    def counted(request: SelectionRequest) -> dict[str, int]:
        """Sum up what all replicas ask for; GPUs in thousandths."""
        return in_thousandths(request.ask, request.replicas)


class AllocationMachine(AllocationRules, DeploymentRules, SurroundingRules):
    """Everything together."""


@pytest.fixture
def stores(store_url: str) -> Iterator[list[Store]]:
    """Open the database twice, as two managers do."""
    with closing(open_store(store_url, 5)) as one, closing(open_store(store_url, 5)) as two:
        yield [one, two]


@pytest.mark.timeout(600)
def test_books_add_up_whatever_is_done(stores: list[Store]) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: AllocationMachine(stores),
        settings=hypothesis_settings(
            max_examples=50 if stores[0].dialect == "sqlite" else 25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
