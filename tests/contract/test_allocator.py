# SPDX-License-Identifier: GPL-3.0-or-later
"""What the allocator promises, on either engine."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import sqlalchemy as sa
from books import assert_books_add_up, assert_nothing_is_left
from builders import (
    FakeClock,
    make_declaration,
    make_facts,
    make_request,
    make_sample,
    make_settings,
    observe,
    seconds,
)
from node_manager import resource_allocator
from node_manager.declarations import NodeChange
from node_manager.domain import Admin
from node_manager.events import EventType
from node_manager.ledger import Ledger, select_held
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.problems import (
    AllocationMismatchError,
    AllocationNotFoundError,
    ConflictError,
    InsufficientResourcesError,
    InvalidInputError,
    NodeNotFoundError,
    NodeNotSchedulableError,
    ProblemError,
    QuotaExceededError,
)
from node_manager.quotas import Quotas
from node_manager.resource_allocator import AllocationFilter, ResourceAllocator
from node_manager.settings import Settings
from node_manager.store import Store, StoreUnavailableError, open_store, tables
from stored import Rows

CAPACITY = {"cpu_millicores": 4000, "memory_mib": 100, "gpu": 2}


@pytest.fixture
def settings() -> Settings:
    """Give settings with a type that is overcommitted."""
    return make_settings(
        {"allocation": {"max_ttl_seconds": 3600}},
        packed={"reserved": {"cpu_millicores": 1000}, "overcommit": {"cpu": 2.0}},
    )


@pytest.fixture(autouse=True)
def _node(registry: NodeRegistry) -> None:
    """Register gw-7 with 4000 millicores, 100 MiB and 2 GPUs."""
    registry.register(make_declaration(capacity=CAPACITY))


@pytest.fixture
def other_store(store: Store, store_url: str) -> Iterator[Store]:
    """Open the same database once more, as a second manager does."""
    with closing(open_store(store_url, busy_timeout_seconds=5)) as opened:
        yield opened


def resize(registry: NodeRegistry, node_id: str = "gw-7", **capacity: int) -> None:
    """Declare another capacity."""
    registry.update(node_id, NodeChange.model_validate({"address": "192.0.2.7", "capacity": capacity}))


# allocate


def test_allocate_reserves_and_tells(allocator: ResourceAllocator, rows: Rows, clock: FakeClock) -> None:
    wanted = make_request("a1", {"memory_mib": 60, "gpu": {"count": 1, "share_milli": 460}}, deployment_id="web")

    made, created = allocator.allocate("gw-7", wanted)

    assert created
    assert (made.node_id, made.owner, made.deployment_id, made.ask) == ("gw-7", "shop", "web", wanted.ask)
    assert (made.units, made.ttl_seconds, made.expires_at, made.created_at) == (
        {"gpu": {"0": 460}},
        None,
        None,
        clock.now,
    )
    assert allocator.get("a1") == made
    (event,) = rows.events(EventType.ALLOCATION_RESERVED)
    assert (event["topic"], event["node_id"]) == ("allocation", "gw-7")
    assert event["data"] == {
        "allocation_id": "a1",
        "owner": "shop",
        "deployment_id": "web",
        "resources": {"memory_mib": 60, "gpu": {"count": 1, "share_milli": 460}},
        "units": {"gpu": {"0": 460}},
        "ttl_seconds": None,
    }
    assert_books_add_up(rows)


def test_allocate_again_gives_the_same_and_changes_nothing(allocator: ResourceAllocator, rows: Rows) -> None:
    wanted = make_request("a1", {"memory_mib": 60, "gpu": 1}, ttl_seconds=60)
    first, _ = allocator.allocate("gw-7", wanted)
    before = rows.everything()

    again = allocator.allocate("gw-7", wanted)

    assert again == (first, False)
    assert rows.everything() == before


@pytest.mark.parametrize("state", ["full", "cordoned", "over-quota"])
def test_allocate_again_gives_the_same_whatever_came_after(
    allocator: ResourceAllocator, registry: NodeRegistry, quotas: Quotas, state: str
) -> None:
    first, _ = allocator.allocate("gw-7", make_request("a1"))
    match state:
        case "full":
            resize(registry, memory_mib=1)
        case "cordoned":
            registry.set_admin("gw-7", Admin.CORDONED, "new disk")
        case "over-quota":
            quotas.put("shop", {"memory_mib": 1})

    assert allocator.allocate("gw-7", make_request("a1")) == (first, False)


@pytest.mark.parametrize(
    ("node_id", "changed", "field"),
    [
        ("gw-8", {}, "node_id"),
        ("gw-7", {"owner": "other"}, "owner"),
        ("gw-7", {"resources": {"memory_mib": 11}}, "resources"),
        ("gw-7", {"deployment_id": "web"}, "deployment_id"),
        ("gw-7", {"ttl_seconds": 5}, "ttl_seconds"),
    ],
    ids=["node", "owner", "resources", "deployment", "ttl"],
)
def test_allocate_refuses_an_id_taken_for_something_else(
    allocator: ResourceAllocator, registry: NodeRegistry, rows: Rows, node_id: str, changed: dict[str, Any], field: str
) -> None:
    registry.register(make_declaration("gw-8", capacity=CAPACITY))
    allocator.allocate("gw-7", make_request("a1"))
    before = rows.everything()

    with pytest.raises(AllocationMismatchError, match="use a new allocation_id") as caught:
        allocator.allocate(node_id, make_request("a1", **changed))

    assert caught.value.extra["differing"] == [field]
    assert rows.everything() == before


@pytest.mark.parametrize(
    ("resources", "lacking"),
    [
        ({"memory_mib": 101}, ("memory_mib", 101, 100)),
        ({"cpu_millicores": 1, "memory_mib": 101}, ("memory_mib", 101, 100)),
        ({"gpu": 3}, ("gpu", 3, 2)),
        ({"disk_mib": 1}, ("disk_mib", 1, 0)),
    ],
    ids=["amount", "one-of-two", "device", "class-of-ours-it-lacks"],
)
def test_allocate_refuses_more_than_there_is_and_takes_nothing(
    allocator: ResourceAllocator, rows: Rows, resources: dict[str, Any], lacking: tuple[str, int, int]
) -> None:
    before = rows.everything()

    with pytest.raises(InsufficientResourcesError, match="choose another node") as caught:
        allocator.allocate("gw-7", make_request("a1", resources))

    resource, requested, available = lacking
    assert caught.value.extra["shortages"] == [{"resource": resource, "requested": requested, "available": available}]
    assert rows.everything() == before


def test_allocate_fills_a_node_to_the_last(allocator: ResourceAllocator) -> None:
    allocator.allocate("gw-7", make_request("a1", CAPACITY))

    for resource in CAPACITY:
        with pytest.raises(InsufficientResourcesError):
            allocator.allocate("gw-7", make_request("a2", {resource: 1}))


def test_allocate_promises_a_fragment_once(allocator: ResourceAllocator) -> None:
    share = {"gpu": {"count": 1, "share_milli": 460}}
    placed = [allocator.allocate("gw-7", make_request(f"a{number}", share))[0].units for number in range(4)]

    with pytest.raises(InsufficientResourcesError, match="1 x 460 thousandths requested, 0 units have room"):
        allocator.allocate("gw-7", make_request("a4", share))

    assert placed == [{"gpu": {"0": 460}}, {"gpu": {"0": 460}}, {"gpu": {"1": 460}}, {"gpu": {"1": 460}}]


def test_allocate_refuses_growth_after_the_node_shrank_and_evicts_nothing(
    allocator: ResourceAllocator, registry: NodeRegistry
) -> None:
    allocator.allocate("gw-7", make_request("a1", {"memory_mib": 60, "gpu": 2}))

    resize(registry, **{**CAPACITY, "memory_mib": 50, "gpu": 1})

    books, allocations = allocator.books("gw-7")
    assert books.overcommitted
    assert [allocation.allocation_id for allocation in allocations] == ["a1"]
    for resource in ("memory_mib", "gpu"):
        with pytest.raises(InsufficientResourcesError):
            allocator.allocate("gw-7", make_request("a2", {resource: 1}))
    allocator.allocate("gw-7", make_request("a2", {"cpu_millicores": 4000}))


def test_allocate_gives_a_unit_that_came_back_to_nobody_else(
    allocator: ResourceAllocator, registry: NodeRegistry, rows: Rows
) -> None:
    allocator.allocate("gw-7", make_request("a1", {"gpu": 2}))
    resize(registry, **{**CAPACITY, "gpu": 0})
    resize(registry, **{**CAPACITY, "gpu": 3})

    made, _ = allocator.allocate("gw-7", make_request("a2", {"gpu": 1}))

    assert made.units == {"gpu": {"2": 1000}}
    assert_books_add_up(rows)


def test_allocate_promises_a_unit_told_twice_once(
    allocator: ResourceAllocator, log: ObservationLog, registry: NodeRegistry, rows: Rows
) -> None:
    registry.register(make_declaration("gw-8"))
    log.record([observe("facts", make_facts(devices={"gpu": [{"id": "a"}, {"id": "a"}]}), node_id="gw-8")])

    with pytest.raises(InsufficientResourcesError):
        allocator.allocate("gw-8", make_request("a1", {"gpu": 2}))

    allocator.allocate("gw-8", make_request("a1", {"gpu": 1}))
    assert_books_add_up(rows)


@pytest.mark.parametrize("admin", [Admin.CORDONED, Admin.DRAINING, Admin.MAINTENANCE, Admin.OFFLINE])
def test_allocate_refuses_a_node_that_takes_no_part(
    allocator: ResourceAllocator, registry: NodeRegistry, admin: Admin
) -> None:
    registry.set_admin("gw-7", admin, "new disk")

    with pytest.raises(NodeNotSchedulableError, match=f"is {admin.value}; choose another node"):
        allocator.allocate("gw-7", make_request())


def test_allocate_refuses_a_node_in_quarantine(allocator: ResourceAllocator, store: Store) -> None:
    with store.write() as connection:
        connection.execute(tables.node_states.update().values(quarantined=True))

    with pytest.raises(NodeNotSchedulableError, match="in quarantine, its host key changed"):
        allocator.allocate("gw-7", make_request())


def test_allocate_on_an_unknown_node_says_so(allocator: ResourceAllocator, rows: Rows) -> None:
    before = rows.everything()

    with pytest.raises(NodeNotFoundError):
        allocator.allocate("gw-8", make_request())

    assert rows.everything() == before


def test_allocate_names_a_class_that_no_node_has(allocator: ResourceAllocator, rows: Rows) -> None:
    before = rows.everything()

    with pytest.raises(InvalidInputError, match=r"^resources\.memory_mb: .*there are .*gpu.*memory_mib") as caught:
        allocator.allocate("gw-7", make_request("a1", {"memory_mb": 1}))

    assert caught.value.extra["errors"][0]["field"] == "resources.memory_mb"
    assert rows.everything() == before


def test_allocate_of_a_class_that_another_node_has_lacks_it(
    allocator: ResourceAllocator, registry: NodeRegistry
) -> None:
    registry.register(make_declaration("gw-8", capacity={"camera": 1}))

    with pytest.raises(InsufficientResourcesError, match=r"camera \(1 requested, 0 available\)"):
        allocator.allocate("gw-7", make_request("a1", {"camera": 1}))


@pytest.mark.parametrize(("ttl", "taken"), [(3600, True), (3601, False)], ids=["longest", "beyond"])
def test_allocate_bounds_the_ttl(allocator: ResourceAllocator, ttl: int, taken: bool) -> None:
    if taken:
        allocator.allocate("gw-7", make_request(ttl_seconds=ttl))
    else:
        with pytest.raises(InvalidInputError, match=r"ttl_seconds: expected at most 3600 \(allocation.max_ttl_seconds"):
            allocator.allocate("gw-7", make_request(ttl_seconds=ttl))


def test_allocate_on_a_node_registered_before_there_were_accounts(
    allocator: ResourceAllocator, store: Store, rows: Rows
) -> None:
    with store.write() as connection:
        connection.execute(tables.node_accounts.delete())
        connection.execute(tables.node_changes.delete())

    allocator.allocate("gw-7", make_request("a1", {"memory_mib": 100, "gpu": 1}))

    assert_books_add_up(rows)
    assert allocator.books("gw-7")[0].available == {"cpu_millicores": 4000, "memory_mib": 0, "gpu": 1}


# by quota


def test_allocate_refuses_more_than_the_quota_and_tells_the_sums(
    allocator: ResourceAllocator, quotas: Quotas, rows: Rows
) -> None:
    quotas.put("shop", {"memory_mib": 50, "gpu": 1})
    allocator.allocate("gw-7", make_request("a1", {"memory_mib": 30, "gpu": {"count": 1, "share_milli": 500}}))
    before = rows.everything()

    with pytest.raises(QuotaExceededError, match="PUT /quotas/shop") as caught:
        allocator.allocate("gw-7", make_request("a2", {"memory_mib": 21, "gpu": {"count": 1, "share_milli": 501}}))

    assert caught.value.extra["exceeded"] == [
        {"resource": "memory_mib", "hard": 50, "used": 30, "requested": 21},
        {"resource": "gpu", "hard": 1, "used": 0.5, "requested": 0.501},
    ]
    assert rows.everything() == before


def test_allocate_fills_a_quota_to_the_last_over_all_nodes(
    allocator: ResourceAllocator, registry: NodeRegistry, quotas: Quotas
) -> None:
    registry.register(make_declaration("gw-8", capacity=CAPACITY))
    quotas.put("shop", {"memory_mib": 50})

    allocator.allocate("gw-7", make_request("a1", {"memory_mib": 30}))
    allocator.allocate("gw-8", make_request("a2", {"memory_mib": 20}))

    with pytest.raises(QuotaExceededError):
        allocator.allocate("gw-8", make_request("a3", {"memory_mib": 1}))
    allocator.allocate("gw-8", make_request("a3", {"memory_mib": 1}, owner="other"))


# overcommit


@pytest.fixture
def packed(registry: NodeRegistry) -> str:
    """Register a node of which 1000 of 4000 millicores are reserved and the rest is overcommitted twice: 6000."""
    registry.register(make_declaration("srv-1", node_type="packed", capacity=CAPACITY))
    return "srv-1"


def sample(log: ObservationLog, clock: FakeClock, cpu_percent: float, waiting_percent: float | None = None) -> None:
    """Take a sample of srv-1 a second later."""
    taken = make_sample(cpu_percent)
    taken["cpu"]["pressure"] = None if waiting_percent is None else {"some_avg60_percent": waiting_percent}
    outcome = log.record([observe("sample", taken, clock.advance(1), "srv-1")])
    assert outcome.recorded == 1


def test_pressure_lowers_overcommit_within_two_samples_and_evicts_nothing(
    allocator: ResourceAllocator, log: ObservationLog, clock: FakeClock, packed: str, rows: Rows
) -> None:
    allocator.allocate(packed, make_request("a1", {"cpu_millicores": 5000}))
    for _ in range(20):
        sample(log, clock, 10)
    before = rows.of(tables.allocations)

    sample(log, clock, 99)
    sample(log, clock, 99)

    books, allocations = allocator.books(packed)
    assert (books.effective["cpu_millicores"], books.overcommit["cpu_millicores"]) == (3000, 1.0)
    assert books.overcommitted
    assert len(allocations) == 1
    assert rows.of(tables.allocations) == before
    with pytest.raises(InsufficientResourcesError):
        allocator.allocate(packed, make_request("a2", {"cpu_millicores": 1}))


@pytest.mark.parametrize("quiet", [20, 0], ids=["among-twenty-quiet-ones", "alone"])
def test_pressure_needs_more_than_one_spike(
    allocator: ResourceAllocator, log: ObservationLog, clock: FakeClock, packed: str, quiet: int
) -> None:
    for _ in range(quiet):
        sample(log, clock, 10)

    sample(log, clock, 100)

    allocator.allocate(packed, make_request("a1", {"cpu_millicores": 6000}))


def test_pressure_is_told_by_waiting_alone(
    allocator: ResourceAllocator, log: ObservationLog, clock: FakeClock, packed: str
) -> None:
    sample(log, clock, 10, waiting_percent=26)

    with pytest.raises(InsufficientResourcesError, match=r"3001 requested, 3000 available"):
        allocator.allocate(packed, make_request("a1", {"cpu_millicores": 3001}))


def test_pressure_is_over_ten_minutes_after_its_last_sign(
    allocator: ResourceAllocator, log: ObservationLog, clock: FakeClock, packed: str
) -> None:
    sample(log, clock, 10, waiting_percent=90)
    clock.advance(300)
    sample(log, clock, 10, waiting_percent=90)
    sample(log, clock, 10, waiting_percent=0)

    clock.advance(598.9)
    with pytest.raises(InsufficientResourcesError):
        allocator.allocate(packed, make_request("a1", {"cpu_millicores": 6000}))
    clock.advance(0.1)
    allocator.allocate(packed, make_request("a1", {"cpu_millicores": 6000}))


# deallocate


def test_deallocate_gives_all_back_and_tells(allocator: ResourceAllocator, rows: Rows) -> None:
    allocator.allocate("gw-7", make_request("a1", CAPACITY))

    assert allocator.deallocate("gw-7", "a1")

    assert_nothing_is_left(rows)
    (event,) = rows.events(EventType.ALLOCATION_RELEASED)
    assert event["data"] == {
        "allocation_id": "a1",
        "owner": "shop",
        "deployment_id": None,
        "resources": CAPACITY,
        "reason": "deallocated",
    }
    assert allocator.allocate("gw-7", make_request("a2", CAPACITY))[1]


def test_deallocate_again_does_nothing(allocator: ResourceAllocator, rows: Rows) -> None:
    allocator.allocate("gw-7", make_request())
    allocator.deallocate("gw-7", "a1")
    before = rows.everything()

    assert not allocator.deallocate("gw-7", "a1")

    assert rows.everything() == before


def test_deallocate_on_another_node_says_where_it_is(
    allocator: ResourceAllocator, registry: NodeRegistry, rows: Rows
) -> None:
    registry.register(make_declaration("gw-8"))
    allocator.allocate("gw-7", make_request())
    before = rows.everything()

    with pytest.raises(ConflictError, match="is on node 'gw-7', not on 'gw-8'; release it there"):
        allocator.deallocate("gw-8", "a1")

    assert rows.everything() == before


def test_deallocate_on_an_unknown_node_says_so(allocator: ResourceAllocator) -> None:
    with pytest.raises(NodeNotFoundError):
        allocator.deallocate("gw-8", "a1")


def test_deallocate_takes_from_a_node_in_maintenance(
    allocator: ResourceAllocator, registry: NodeRegistry, rows: Rows
) -> None:
    allocator.allocate("gw-7", make_request())
    registry.set_admin("gw-7", Admin.MAINTENANCE, "new disk")

    assert allocator.deallocate("gw-7", "a1")

    assert_nothing_is_left(rows)


@pytest.mark.postgresql
@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)
def test_deallocate_while_it_is_made_anew_elsewhere_takes_from_neither_account(
    store: Store, other_store: Store, registry: NodeRegistry, settings: Settings, clock: FakeClock, rows: Rows
) -> None:
    registry.register(make_declaration("gw-8", capacity=CAPACITY))
    here = ResourceAllocator(other_store, settings, clock)
    here.allocate("gw-7", make_request())

    with ThreadPoolExecutor(1) as pool:
        with store.write() as connection:
            ledger = Ledger(connection, settings, clock.now)
            (held,) = select_held(connection, ledger, tables.allocations.c.allocation_id == "a1")
            # It sees the allocation, and waits for its accounts.
            answer = pool.submit(here.deallocate, "gw-7", "a1")
            wait_until_somebody_waits(connection)
            ledger.drop(held, "deallocated")
            ledger.write()
            anew = Ledger(connection, settings, clock.now)
            anew.hold(["other"], ["gw-8"])
            anew.add(replace(held, owner="other", node_id="gw-8"))
            anew.write()
        released = answer.result(10)

    assert not released
    assert [row["node_id"] for row in rows.of(tables.allocations)] == ["gw-8"]
    assert_books_add_up(rows)


def wait_until_somebody_waits(connection: sa.Connection) -> None:
    """Wait until another transaction wants a lock that is held."""
    deadline = time.monotonic() + 10
    while not connection.scalar(sa.text("SELECT count(*) FROM pg_locks WHERE NOT granted")):
        assert time.monotonic() < deadline
        connection.execute(sa.text("SELECT pg_sleep(0.01)"))


# confirm and expire


def test_confirm_keeps_it_for_good(allocator: ResourceAllocator, clock: FakeClock, rows: Rows) -> None:
    made, _ = allocator.allocate("gw-7", make_request(ttl_seconds=60))
    clock.advance(59.9)

    kept = allocator.confirm("a1")

    clock.advance(3600)
    assert made.expires_at == made.created_at + seconds(60)
    assert kept == replace(made, expires_at=None)
    assert allocator.expire() == 0
    assert allocator.get("a1") == kept
    assert allocator.allocate("gw-7", make_request(ttl_seconds=60)) == (kept, False)
    assert len(rows.events(EventType.ALLOCATION_CONFIRMED)) == 1


@pytest.mark.parametrize("ttl", [None, 60], ids=["never-needed", "confirmed"])
def test_confirm_again_changes_nothing(allocator: ResourceAllocator, rows: Rows, ttl: int | None) -> None:
    allocator.allocate("gw-7", make_request(ttl_seconds=ttl))
    kept = allocator.confirm("a1")
    before = rows.everything()

    assert allocator.confirm("a1") == kept

    assert rows.everything() == before


def test_confirm_too_late_says_so_and_releases(allocator: ResourceAllocator, clock: FakeClock, rows: Rows) -> None:
    allocator.allocate("gw-7", make_request(ttl_seconds=60))
    clock.advance(60)

    with pytest.raises(AllocationNotFoundError, match="it expired, was released or never made; allocate again"):
        allocator.confirm("a1")

    assert_nothing_is_left(rows)


def test_confirm_keeps_nothing_that_expired_since_the_last_release(
    allocator: ResourceAllocator, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator.allocate("gw-7", make_request(ttl_seconds=60))
    clock.advance(60)
    # As if it had expired just after the others were released.
    monkeypatch.setattr(allocator, "expire", lambda: 0)

    with pytest.raises(AllocationNotFoundError):
        allocator.confirm("a1")


def test_expire_releases_what_was_not_confirmed_in_time(
    allocator: ResourceAllocator, clock: FakeClock, rows: Rows
) -> None:
    for number, ttl in enumerate([60, 61, None]):
        allocator.allocate("gw-7", make_request(f"a{number}", ttl_seconds=ttl))
    clock.advance(60)

    assert allocator.expire() == 1

    assert [row["allocation_id"] for row in rows.of(tables.allocations)] == ["a1", "a2"]
    assert [row["data"]["reason"] for row in rows.events(EventType.ALLOCATION_RELEASED)] == ["expired"]
    assert_books_add_up(rows)


def test_expire_goes_on_until_nothing_is_due(
    allocator: ResourceAllocator, clock: FakeClock, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(5):
        allocator.allocate("gw-7", make_request(f"a{number}", ttl_seconds=60))
    clock.advance(60)
    monkeypatch.setattr(resource_allocator, "_EXPIRED_AT_ONCE", 2)

    assert allocator.expire() == 5

    assert_nothing_is_left(rows)


def test_allocate_gets_what_just_expired(allocator: ResourceAllocator, clock: FakeClock, rows: Rows) -> None:
    allocator.allocate("gw-7", make_request("a1", CAPACITY, ttl_seconds=60))
    clock.advance(60)

    made, created = allocator.allocate("gw-7", make_request("a1", CAPACITY, ttl_seconds=60))

    assert created
    assert made.created_at == clock.now
    assert_books_add_up(rows)


# deregister


def test_deregister_by_force_gives_owners_back_what_they_used(
    allocator: ResourceAllocator, registry: NodeRegistry, rows: Rows
) -> None:
    registry.register(make_declaration("gw-8", capacity=CAPACITY))
    allocator.allocate("gw-7", make_request("a1", CAPACITY))
    allocator.allocate("gw-8", make_request("a3", {"memory_mib": 7}))

    registry.deregister("gw-7", force=True)

    assert [(row["owner"], row["used"]) for row in rows.of(tables.owners)] == [("shop", {"memory_mib": 7})]
    assert [row["data"]["reason"] for row in rows.events(EventType.ALLOCATION_RELEASED)] == ["node_deregistered"]
    assert_books_add_up(rows)


# what is read


def test_page_walks_through_all_that_pass(allocator: ResourceAllocator, registry: NodeRegistry) -> None:
    registry.register(make_declaration("gw-8", capacity=CAPACITY))
    for number in range(6):
        allocator.allocate(
            f"gw-{7 + number % 2}",
            make_request(f"a{number}", owner=f"o{number % 3}", deployment_id="web" if number < 2 else None),
        )

    def ids(**wanted: str) -> list[str]:
        found, after = [], None
        while True:
            page, after = allocator.page(AllocationFilter(**wanted), 2, after)
            found += [allocation.allocation_id for allocation in page]
            if after is None:
                return found

    assert ids() == ["a0", "a1", "a2", "a3", "a4", "a5"]
    assert ids(node_id="gw-8") == ["a1", "a3", "a5"]
    assert ids(owner="o0") == ["a0", "a3"]
    assert ids(deployment_id="web") == ["a0", "a1"]
    assert ids(node_id="gw-7", owner="o1") == ["a4"]


def test_get_of_none_says_so(allocator: ResourceAllocator) -> None:
    with pytest.raises(AllocationNotFoundError, match="GET /allocations"):
        allocator.get("a1")


def test_books_of_an_unknown_node_say_so(allocator: ResourceAllocator) -> None:
    with pytest.raises(NodeNotFoundError):
        allocator.books("gw-8")


# at once


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    """Run calls at the same time; give what each returned or raised."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait(10)
        try:
            return call()
        except ProblemError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_allocate_at_once_by_two_managers_never_oversells(
    store: Store, other_store: Store, settings: Settings, clock: FakeClock, rows: Rows
) -> None:
    writers = [ResourceAllocator(each, settings, clock) for each in (store, other_store)]

    outcomes = at_once(
        [
            partial(writers[number % 2].allocate, "gw-7", make_request(f"a{number}", {"memory_mib": 34}))
            for number in range(8)
        ]
    )

    assert [isinstance(outcome, InsufficientResourcesError) for outcome in outcomes].count(True) == 6
    assert_books_add_up(rows)


def test_allocate_at_once_with_one_id_makes_one(
    store: Store, other_store: Store, settings: Settings, clock: FakeClock, rows: Rows
) -> None:
    writers = [ResourceAllocator(each, settings, clock) for each in (store, other_store)]

    outcomes = at_once([partial(writers[number % 2].allocate, "gw-7", make_request()) for number in range(6)])

    assert sorted(created for _, created in outcomes) == [False] * 5 + [True]
    assert len({allocation.created_at for allocation, _ in outcomes}) == 1
    assert_books_add_up(rows)


def test_allocate_at_once_with_one_id_on_two_nodes_makes_one(
    store: Store, other_store: Store, registry: NodeRegistry, settings: Settings, clock: FakeClock, rows: Rows
) -> None:
    registry.register(make_declaration("gw-8", capacity=CAPACITY))
    writers = [ResourceAllocator(each, settings, clock) for each in (store, other_store)]

    outcomes = at_once(
        [
            partial(writers[number].allocate, f"gw-{7 + number}", make_request("a1", owner=f"owner-{number}"))
            for number in range(2)
        ]
    )

    assert sum(isinstance(outcome, AllocationMismatchError) for outcome in outcomes) == 1
    assert_books_add_up(rows)


@pytest.mark.parametrize("seed", range(3))
def test_all_at_once_by_two_managers_keeps_the_books(
    store: Store, other_store: Store, settings: Settings, registry: NodeRegistry, rows: Rows, seed: int
) -> None:
    clock = FakeClock()
    nodes = ["gw-7", "gw-8", "gw-9"]
    for node_id in nodes:
        registry.register(make_declaration(node_id, capacity=CAPACITY))
    Quotas(store, settings, clock).put("o1", {"memory_mib": 120})

    def work(number: int) -> None:
        chance = random.Random(seed * 100 + number)
        allocator = ResourceAllocator((store, other_store)[number % 2], settings, clock)
        for _ in range(40):
            node_id, allocation_id = chance.choice(nodes), f"a{chance.randrange(12)}"
            resources = {"memory_mib": chance.randint(1, 60), "gpu": {"count": 1, "share_milli": 400}}
            owner, ttl = f"o{chance.randrange(3)}", chance.choice([None, 1, 5])
            with suppress(ProblemError):
                match chance.randrange(8):
                    case 0 | 1:
                        allocator.deallocate(node_id, allocation_id)
                    case 2:
                        allocator.confirm(allocation_id)
                    case 3:
                        clock.advance(1)
                        allocator.expire()
                    case _:
                        allocator.allocate(node_id, make_request(allocation_id, resources, owner, ttl_seconds=ttl))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))

    assert_books_add_up(rows)
    assert all(row["used"].get("memory_mib", 0) <= 120 for row in rows.of(tables.owners) if row["hard"])
    for account in rows.of(tables.node_accounts):
        assert account["allocated"].get("memory_mib", 0) <= CAPACITY["memory_mib"]


def test_deregister_at_once_with_allocate_leaves_no_allocation_without_its_node(
    store: Store, other_store: Store, settings: Settings, clock: FakeClock, registry: NodeRegistry, rows: Rows
) -> None:
    def allocate(number: int) -> None:
        allocator = ResourceAllocator((store, other_store)[number % 2], settings, clock)
        for count in range(15):
            # Where the two wait for each other one gives up, having written nothing.
            with suppress(ProblemError, StoreUnavailableError):
                allocator.allocate("gw-7", make_request(f"a{number}-{count}", {"memory_mib": 5}, f"o{count}"))

    def deregister() -> None:
        for _ in range(8):
            with suppress(StoreUnavailableError):
                registry.deregister("gw-7", force=True)
                registry.register(make_declaration(capacity=CAPACITY))

    at_once([deregister, *(partial(allocate, number) for number in range(3))])

    assert_books_add_up(rows)
