# SPDX-License-Identifier: GPL-3.0-or-later
"""What the registry promises about declared nodes, on either engine."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from builders import (
    START,
    FakeClock,
    make_contact,
    make_declaration,
    make_facts,
    make_host_key,
    make_request,
    make_settings,
    observe,
)
from node_manager import events
from node_manager.declarations import NodeChange
from node_manager.domain import Admin, ContactReason, Health, Status
from node_manager.host_keys import FIRST_USE, GIVEN
from node_manager.node_filters import NodeFilter
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.problems import (
    InvalidInputError,
    NodeExistsError,
    NodeInUseError,
    NodeNotFoundError,
    StaleGenerationError,
)
from node_manager.resource_allocator import ResourceAllocator
from node_manager.store import Store, tables
from stored import Rows

JINJA = "{{ lookup('pipe', 'touch /tmp/owned') }}"


def change(**changes: Any) -> NodeChange:
    """Give the body of an update."""
    return NodeChange.model_validate({"address": "192.0.2.7", **changes})


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Run calls at the same time, each in its thread; give what each returned or raised."""
    barrier = threading.Barrier(len(calls))
    outcomes: list[Any] = [None] * len(calls)

    def run(place: int, call: Callable[[], Any]) -> None:
        barrier.wait(10)
        try:
            outcomes[place] = call()
        except Exception as error:
            outcomes[place] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return outcomes


def listed(registry: NodeRegistry, limit: int = 100, after: str | None = None, **wanted: Any) -> list[str]:
    """List the ids of one page."""
    return [version.node_id for version in registry.page(NodeFilter(**wanted), limit, after).versions]


# register


def test_register_stores_what_is_declared(registry: NodeRegistry) -> None:
    declaration = make_declaration(
        name="Gateway hall 7",
        node_type="gateway",
        labels={"line": "a"},
        location={"region": "eu", "zone": "eu-1a", "site": "plant-2", "latitude": 48.1, "longitude": 11.5},
        connection={"user": "manager", "port": 2222, "become": True, "credential": "plant"},
        capacity={"disk_mib": 20000},
        admin="cordoned",
    )

    node, created = registry.register(declaration)

    assert created
    assert node == registry.get("gw-7")
    assert (node.name, node.address, node.node_type) == ("Gateway hall 7", "192.0.2.7", "gateway")
    assert (node.labels, node.declared_capacity, node.admin) == (
        {"line": "a"},
        {"disk_mib": 20000},
        Admin.CORDONED,
    )
    assert node.location == declaration.location.model_dump()
    assert node.connection == declaration.connection.model_dump()


def test_register_starts_with_defaults(registry: NodeRegistry) -> None:
    node, _ = registry.register(make_declaration())

    assert (node.name, node.admin, node.generation) == ("gw-7", Admin.ACTIVE, 1)
    assert (node.state.health, node.facts, node.host_keys) == (Health.UNKNOWN, None, ())
    assert (node.created_at, node.updated_at) == (START, START)


def test_register_tells_of_it_once(registry: NodeRegistry, rows: Rows) -> None:
    registry.register(make_declaration())

    assert [(row["type"], row["node_id"], row["occurred_at"]) for row in rows.events()] == [
        (events.EventType.NODE_REGISTERED, "gw-7", START)
    ]


def test_register_keeps_jinja_verbatim(registry: NodeRegistry) -> None:
    declaration = make_declaration(name=JINJA, labels={"x": JINJA}, location={"site": JINJA, "zone": JINJA})

    registry.register(declaration)

    node = registry.get("gw-7")
    assert (node.name, node.labels, node.location["site"], node.location["zone"]) == (JINJA, {"x": JINJA}, JINJA, JINJA)


def test_register_again_gives_the_node_there_is(registry: NodeRegistry, rows: Rows, clock: FakeClock) -> None:
    registry.register(make_declaration(labels={"b": "2", "a": "1"}, host_keys=[make_host_key()]))
    before = rows.everything()
    clock.advance(60)

    node, created = registry.register(make_declaration(labels={"a": "1", "b": "2"}, host_keys=[make_host_key()]))

    assert not created
    assert node == registry.get("gw-7")
    assert rows.everything() == before


def test_register_again_keeps_an_operators_maintenance(registry: NodeRegistry) -> None:
    registry.register(make_declaration())
    registry.set_admin("gw-7", Admin.MAINTENANCE, "fan")

    node, created = registry.register(make_declaration())

    assert (node.admin, created) == (Admin.MAINTENANCE, False)


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"address": "192.0.2.8"}, ["address"]),
        ({"name": "other"}, ["name"]),
        ({"node_type": "server"}, ["node_type"]),
        ({"labels": {"a": "1"}}, ["labels"]),
        ({"location": {"zone": "b", "site": "s"}}, ["site", "zone"]),
        ({"connection": {"port": 23}}, ["connection"]),
        ({"capacity": {"cpu_millicores": 1}}, ["capacity"]),
        ({"admin": "offline"}, ["admin"]),
        ({"host_keys": [make_host_key(2)]}, ["host_keys"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_register_otherwise_is_a_conflict(
    registry: NodeRegistry, rows: Rows, changes: dict[str, Any], differing: list[str]
) -> None:
    registry.register(make_declaration())
    before = rows.everything()

    with pytest.raises(NodeExistsError) as caught:
        registry.register(make_declaration(**changes))

    assert caught.value.extra["differing"] == differing
    assert rows.everything() == before


def test_register_twice_at_once_makes_one_node(registry: NodeRegistry, rows: Rows) -> None:
    outcomes = at_once(*[lambda: registry.register(make_declaration())] * 2)

    assert sorted(created for _, created in outcomes) == [False, True]
    assert len(rows.of(tables.nodes)) == len(rows.of(tables.node_states)) == len(rows.events()) == 1


def test_register_two_bodies_at_once_takes_one(registry: NodeRegistry, rows: Rows) -> None:
    outcomes = at_once(
        lambda: registry.register(make_declaration(address="192.0.2.7")),
        lambda: registry.register(make_declaration(address="192.0.2.8")),
    )

    kinds = sorted(type(outcome).__name__ for outcome in outcomes)
    assert kinds == ["NodeExistsError", "tuple"]
    assert len(rows.of(tables.nodes)) == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"node_type": "toaster"}, "node_type"),
        ({"connection": {"credential": "unheard-of"}}, "connection.credential"),
        ({"connection": {"jump_host": "nowhere"}}, "connection.jump_host"),
        ({"connection": {"jump_host": "gw-7"}}, "connection.jump_host"),
        ({"connection": {"kind": "local"}}, "connection.kind"),
    ],
    ids=["unknown-type", "unknown-credential", "unknown-jump-host", "itself-as-jump-host", "local"],
)
def test_register_refuses_unknown_references(
    registry: NodeRegistry, rows: Rows, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        registry.register(make_declaration(**changes))

    assert caught.value.extra["errors"][0]["field"] == field
    assert rows.of(tables.nodes) == []


def test_register_refuses_local_even_where_it_is_registered(registry: NodeRegistry) -> None:
    local = make_declaration("local", address="127.0.0.1", connection={"kind": "local"})
    registry.register(local, allow_local=True)

    with pytest.raises(InvalidInputError):
        registry.register(local)


def test_register_refuses_a_node_without_key_where_keys_are_given(store: Store) -> None:
    registry = NodeRegistry(store, make_settings({"ssh": {"host_key_policy": "given"}}))

    with pytest.raises(InvalidInputError, match="host_keys"):
        registry.register(make_declaration())


def test_register_takes_eight_hops(registry: NodeRegistry) -> None:
    registry.register(make_declaration("hop-0"))
    for number in range(1, 9):
        registry.register(make_declaration(f"hop-{number}", connection={"jump_host": f"hop-{number - 1}"}))

    with pytest.raises(InvalidInputError, match="at most 8 hops"):
        registry.register(make_declaration("too-far", connection={"jump_host": "hop-8"}))


# update


def test_update_replaces_what_is_declared(registry: NodeRegistry, clock: FakeClock) -> None:
    registry.register(make_declaration(labels={"a": "1"}, location={"zone": "x"}, capacity={"disk_mib": 1}))
    clock.advance(5)

    node = registry.update("gw-7", change(address="gw-7.example.net", labels={"b": "2"}), if_generation=1)

    assert (node.address, node.labels, node.declared_capacity) == ("gw-7.example.net", {"b": "2"}, {})
    assert (node.location["zone"], node.generation) == (None, 2)
    assert (node.created_at, node.updated_at) == (START, clock.now)
    assert listed(registry, labels=(("a", None),)) == []
    assert listed(registry, labels=(("b", "2"),)) == ["gw-7"]


def test_update_refuses_a_stale_generation(registry: NodeRegistry, rows: Rows) -> None:
    registry.register(make_declaration())
    registry.update("gw-7", change())
    before = rows.everything()

    with pytest.raises(StaleGenerationError) as caught:
        registry.update("gw-7", change(address="192.0.2.9"), if_generation=1)

    assert caught.value.extra["generation"] == 2
    assert rows.everything() == before


def test_update_at_once_lets_one_of_one_generation_through(registry: NodeRegistry) -> None:
    registry.register(make_declaration())

    outcomes = at_once(*[lambda: registry.update("gw-7", change(), if_generation=1)] * 3)

    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Node", *["StaleGenerationError"] * 2]
    assert registry.get("gw-7").generation == 2


def test_update_of_an_unknown_node_says_so(registry: NodeRegistry) -> None:
    with pytest.raises(NodeNotFoundError):
        registry.update("gw-7", change())


def test_update_keeps_admin_where_left_out(registry: NodeRegistry) -> None:
    registry.register(make_declaration(admin="cordoned"))

    assert registry.update("gw-7", change()).admin is Admin.CORDONED


def test_update_refuses_to_close_a_circle_of_jump_hosts(registry: NodeRegistry) -> None:
    registry.register(make_declaration("a"))
    registry.register(make_declaration("b", connection={"jump_host": "a"}))

    with pytest.raises(InvalidInputError, match="leads back"):
        registry.update("a", change(connection={"jump_host": "b"}))


def test_update_at_once_closes_no_circle_of_jump_hosts(registry: NodeRegistry) -> None:
    registry.register(make_declaration("a"))
    registry.register(make_declaration("b"))

    at_once(
        lambda: registry.update("a", change(connection={"jump_host": "b"})),
        lambda: registry.update("b", change(connection={"jump_host": "a"})),
    )

    hops = [registry.get(node_id).connection["jump_host"] for node_id in ("a", "b")]
    assert None in hops


def test_update_may_leave_out_the_keys_there_are(store: Store) -> None:
    registry = NodeRegistry(store, make_settings({"ssh": {"host_key_policy": "given"}}))
    registry.register(make_declaration(host_keys=[make_host_key()]))

    node = registry.update("gw-7", change())

    assert node.host_keys == ((make_host_key(), GIVEN),)


def test_update_lets_a_local_node_stay_local(registry: NodeRegistry) -> None:
    registry.register(make_declaration("local", connection={"kind": "local"}), allow_local=True)

    node = registry.update("local", change(connection={"kind": "local"}, labels={"a": "1"}))

    assert (node.connection["kind"], node.labels) == ("local", {"a": "1"})


def test_update_makes_no_node_local(registry: NodeRegistry) -> None:
    registry.register(make_declaration())

    with pytest.raises(InvalidInputError, match=r"connection\.kind"):
        registry.update("gw-7", change(connection={"kind": "local"}))


# set_admin


def test_set_admin_changes_the_status_and_tells_of_it(registry: NodeRegistry, rows: Rows) -> None:
    registry.register(make_declaration())

    node = registry.set_admin("gw-7", Admin.MAINTENANCE, "new fan", if_generation=1)

    assert (node.status, node.generation) == (Status.MAINTENANCE, 2)
    assert [row["data"] for row in rows.events(events.EventType.NODE_ADMIN_CHANGED)] == [
        {"from": "active", "to": "maintenance", "reason": "new fan"}
    ]


def test_set_admin_to_what_it_is_changes_nothing(registry: NodeRegistry, rows: Rows) -> None:
    registry.register(make_declaration())
    before = rows.everything()

    registry.set_admin("gw-7", Admin.ACTIVE, "again")

    assert rows.everything() == before


def test_set_admin_refuses_a_stale_generation(registry: NodeRegistry) -> None:
    registry.register(make_declaration())

    with pytest.raises(StaleGenerationError):
        registry.set_admin("gw-7", Admin.OFFLINE, "", if_generation=9)


# deregister


def test_deregister_leaves_only_events_and_that_it_is_gone(
    registry: NodeRegistry, log: ObservationLog, rows: Rows
) -> None:
    registry.register(make_declaration(labels={"a": "1"}, host_keys=[make_host_key()]))
    log.record([observe("facts", make_facts()), observe("contact", make_contact())])

    registry.deregister("gw-7")

    left = {name for name, content in rows.everything().items() if content}
    assert left == {"outbox", "node_changes"}
    assert [change["node_id"] for change in rows.of(tables.node_changes)] == ["gw-7"]
    assert rows.events()[-1]["type"] == events.EventType.NODE_DEREGISTERED


def test_deregister_refuses_while_allocations_are_held(
    registry: NodeRegistry, allocator: ResourceAllocator, rows: Rows
) -> None:
    registry.register(make_declaration(capacity={"memory_mib": 10}))
    allocator.allocate("gw-7", make_request("a1"))
    before = rows.everything()

    with pytest.raises(NodeInUseError) as caught:
        registry.deregister("gw-7")

    assert caught.value.extra["allocations"] == ["a1"]
    assert rows.everything() == before


def test_deregister_by_force_drops_allocations_and_says_which(
    registry: NodeRegistry, allocator: ResourceAllocator, rows: Rows
) -> None:
    registry.register(make_declaration(capacity={"memory_mib": 20}))
    allocator.allocate("gw-7", make_request("a1"))
    allocator.allocate("gw-7", make_request("a2"))

    registry.deregister("gw-7", force=True)

    assert (rows.of(tables.nodes), rows.of(tables.allocations)) == ([], [])
    assert [owner["used"] for owner in rows.of(tables.owners)] == [{}]
    assert rows.events()[-1]["data"] == {"forced": True, "dropped_allocations": ["a1", "a2"]}


@pytest.mark.parametrize("force", [False, True], ids=["gently", "by-force"])
def test_deregister_refuses_a_jump_host(registry: NodeRegistry, force: bool) -> None:
    registry.register(make_declaration("bastion"))
    registry.register(make_declaration("behind", connection={"jump_host": "bastion"}))

    with pytest.raises(NodeInUseError, match="jump host of behind"):
        registry.deregister("bastion", force=force)


def test_deregister_at_once_with_a_node_behind_it_leaves_no_dangling_jump_host(registry: NodeRegistry) -> None:
    registry.register(make_declaration("bastion"))

    at_once(
        lambda: registry.deregister("bastion"),
        lambda: registry.register(make_declaration("behind", connection={"jump_host": "bastion"})),
    )

    assert registry.existing(["bastion", "behind"]) in (set(), {"bastion", "behind"})


def test_deregister_refuses_a_stale_generation(registry: NodeRegistry) -> None:
    registry.register(make_declaration())

    with pytest.raises(StaleGenerationError):
        registry.deregister("gw-7", if_generation=2)


def test_deregister_of_an_unknown_node_says_so(registry: NodeRegistry) -> None:
    with pytest.raises(NodeNotFoundError):
        registry.deregister("gw-7")


def test_register_anew_is_another_version(registry: NodeRegistry, clock: FakeClock) -> None:
    registry.register(make_declaration())
    before = registry.page(NodeFilter(), 10, None).versions
    registry.deregister("gw-7")
    clock.advance(0.001)

    registry.register(make_declaration(address="192.0.2.99"))

    assert registry.page(NodeFilter(), 10, None).versions != before


# host keys


def test_host_keys_given_are_pinned(registry: NodeRegistry, rows: Rows) -> None:
    keys = [make_host_key(2), make_host_key(1)]

    node, _ = registry.register(make_declaration(host_keys=[*keys, keys[0]]))

    assert node.host_keys == tuple((key, GIVEN) for key in sorted(keys))
    assert rows.events(events.EventType.HOST_KEYS_PINNED)[0]["data"] == {"origin": GIVEN, "host_keys": sorted(keys)}


def test_host_keys_of_first_use_are_pinned(registry: NodeRegistry, log: ObservationLog) -> None:
    registry.register(make_declaration())

    log.record([observe("facts", make_facts(ssh_host_keys=[f"{make_host_key()} root@gw-7"]))])

    assert registry.get("gw-7").host_keys == ((make_host_key(), FIRST_USE),)


def test_host_keys_seen_later_change_nothing(registry: NodeRegistry, log: ObservationLog, clock: FakeClock) -> None:
    registry.register(make_declaration())
    log.record([observe("facts", make_facts(ssh_host_keys=[make_host_key(1)]))])

    later = clock.advance(60)
    log.record([observe("facts", make_facts(ssh_host_keys=[make_host_key(2)]), later)])

    assert registry.get("gw-7").host_keys == ((make_host_key(1), FIRST_USE),)


def test_host_keys_given_outlive_what_is_seen(registry: NodeRegistry, log: ObservationLog) -> None:
    registry.register(make_declaration(host_keys=[make_host_key(1)]))

    log.record([observe("facts", make_facts(ssh_host_keys=[make_host_key(2)]))])

    assert registry.get("gw-7").host_keys == ((make_host_key(1), GIVEN),)


@pytest.mark.parametrize(
    "key",
    ["", "*", "ssh-ed25519", f"ssh-ed25519 {JINJA}", "@cert-authority * ssh-ed25519 AAAA", "ssh-rsa " + "A" * 64],
    ids=["empty", "star", "no-blob", "jinja", "authority", "not-what-it-says"],
)
def test_host_keys_that_are_none_are_not_pinned(registry: NodeRegistry, log: ObservationLog, key: str) -> None:
    registry.register(make_declaration())

    log.record([observe("facts", make_facts(ssh_host_keys=[key, make_host_key()]))])

    assert registry.get("gw-7").host_keys == ((make_host_key(), FIRST_USE),)


def test_host_keys_of_a_local_node_are_not_pinned(registry: NodeRegistry, log: ObservationLog) -> None:
    registry.register(make_declaration(connection={"kind": "local"}), allow_local=True)

    log.record([observe("facts", make_facts(ssh_host_keys=[make_host_key()]))])

    assert registry.get("gw-7").host_keys == ()


def test_host_keys_are_not_pinned_where_they_must_be_given(store: Store, clock: FakeClock) -> None:
    settings = make_settings({"ssh": {"host_key_policy": "given"}})
    registry = NodeRegistry(store, settings, clock)
    registry.register(make_declaration(host_keys=[make_host_key(1)]))
    registry.forget_host_keys("gw-7")

    ObservationLog(store, settings, clock).record([observe("facts", make_facts(ssh_host_keys=[make_host_key(2)]))])

    assert registry.get("gw-7").host_keys == ()


def test_forget_host_keys_trusts_the_next_key(registry: NodeRegistry, log: ObservationLog, clock: FakeClock) -> None:
    registry.register(make_declaration(host_keys=[make_host_key(1)]))

    forgotten = registry.forget_host_keys("gw-7")
    log.record([observe("facts", make_facts(ssh_host_keys=[make_host_key(2)]), clock.advance(1))])

    assert (forgotten.host_keys, forgotten.generation) == ((), 2)
    assert registry.get("gw-7").host_keys == ((make_host_key(2), FIRST_USE),)


@pytest.mark.parametrize(
    "trust_again",
    [
        lambda registry: registry.forget_host_keys("gw-7"),
        lambda registry: registry.update("gw-7", change(host_keys=[make_host_key(2)])),
    ],
    ids=["forget", "give"],
)
def test_quarantine_ends_when_an_operator_decides_on_the_key(
    registry: NodeRegistry, log: ObservationLog, trust_again: Callable[[NodeRegistry], Any]
) -> None:
    registry.register(make_declaration(host_keys=[make_host_key(1)]))
    log.record([observe("contact", make_contact(ContactReason.HOST_KEY_CHANGED))])
    quarantined = registry.get("gw-7").state.quarantined

    trust_again(registry)

    assert (quarantined, registry.get("gw-7").state.quarantined) == (True, False)


# get, load, existing, page


def test_get_of_an_unknown_node_says_so(registry: NodeRegistry) -> None:
    with pytest.raises(NodeNotFoundError) as caught:
        registry.get("gw-7")

    assert caught.value.extra == {"node_id": "gw-7"}


def test_load_leaves_out_what_is_gone(registry: NodeRegistry) -> None:
    registry.register(make_declaration("a"))

    assert set(registry.load(["a", "b"])) == {"a"}


def test_existing_tells_which_are_registered(registry: NodeRegistry) -> None:
    registry.register(make_declaration("a"))

    assert registry.existing(["a", "b"]) == {"a"}


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, ["a", "b", "c"]),
        ({"zone": "z1"}, ["a", "b"]),
        ({"site": "s2"}, ["b"]),
        ({"region": "eu"}, ["a"]),
        ({"node_type": "gateway"}, ["a"]),
        ({"node_type": "server"}, ["c"]),
        ({"health": Health.UNREACHABLE}, ["b"]),
        ({"labels": (("env", None),)}, ["a", "b"]),
        ({"labels": (("env", "prod"),)}, ["a"]),
        ({"labels": (("env", "prod"), ("line", "1"))}, ["a"]),
        ({"labels": (("env", "test"), ("line", "1"))}, []),
        ({"zone": "z1", "labels": (("env", "test"),)}, ["b"]),
        ({"zone": "' OR 1=1 --"}, []),
    ],
    ids=str,
)
def test_page_filters(registry: NodeRegistry, log: ObservationLog, wanted: dict[str, Any], expected: list[str]) -> None:
    registry.register(
        make_declaration(
            "a", node_type="gateway", labels={"env": "prod", "line": "1"}, location={"region": "eu", "zone": "z1"}
        )
    )
    registry.register(make_declaration("b", labels={"env": "test"}, location={"zone": "z1", "site": "s2"}))
    registry.register(make_declaration("c"))
    log.record(
        [
            observe("contact", make_contact(), node_id="b"),
            observe("facts", make_facts(memory_total_bytes=2**34), node_id="c"),
        ]
    )

    assert listed(registry, **wanted) == expected


def test_page_filters_by_the_status_that_nodes_show(registry: NodeRegistry, store: Store) -> None:
    for admin, health in itertools.product(Admin, Health):
        node_id = f"{admin.value}-{health.value}"
        registry.register(make_declaration(node_id, admin=admin.value))
        with store.write() as connection:
            connection.execute(
                tables.node_states.update().where(tables.node_states.c.node_id == node_id), {"health": health.value}
            )

    pages = {status: listed(registry, status=status) for status in Status}

    shown = {node_id: node.status for node_id, node in registry.load([*itertools.chain(*pages.values())]).items()}
    assert {status: sorted(node_id for node_id in shown if shown[node_id] is status) for status in Status} == pages
    assert len(shown) == len(Admin) * len(Health)


def test_page_goes_through_all_in_order(registry: NodeRegistry) -> None:
    for number in range(5):
        registry.register(make_declaration(f"n{number}"))

    first = registry.page(NodeFilter(), 2, None)
    second = registry.page(NodeFilter(), 2, first.next_after)
    third = registry.page(NodeFilter(), 2, second.next_after)

    pages = [[version.node_id for version in page.versions] for page in (first, second, third)]
    assert pages == [["n0", "n1"], ["n2", "n3"], ["n4"]]
    assert third.next_after is None


def test_page_that_ends_with_the_last_node_has_no_next(registry: NodeRegistry) -> None:
    registry.register(make_declaration("a"))
    registry.register(make_declaration("b"))

    assert registry.page(NodeFilter(), 2, None).next_after is None


def test_page_skips_and_repeats_nothing_while_nodes_come_and_go(registry: NodeRegistry) -> None:
    for number in range(0, 60, 2):
        registry.register(make_declaration(f"n{number:03}"))
    seen: list[str] = []
    after: str | None = None

    for step in range(40):
        page = registry.page(NodeFilter(), 4, after)
        seen += [version.node_id for version in page.versions]
        after = page.next_after
        if after is None:
            break
        registry.register(make_declaration(f"n{2 * step + 1:03}"))
        registry.deregister(seen[0]) if step == 0 else None

    assert seen == sorted(set(seen))
    assert {f"n{number:03}" for number in range(0, 60, 2)} <= set(seen)


def test_page_versions_change_with_what_is_declared_and_seen(registry: NodeRegistry, log: ObservationLog) -> None:
    registry.register(make_declaration())
    versions = [registry.page(NodeFilter(), 1, None).versions[0]]

    registry.update("gw-7", change(labels={"a": "1"}))
    versions.append(registry.page(NodeFilter(), 1, None).versions[0])
    log.record([observe("facts", make_facts())])
    versions.append(registry.page(NodeFilter(), 1, None).versions[0])

    assert len(set(versions)) == 3


# events


def test_events_of_node_are_the_newest_first_and_paged(registry: NodeRegistry, store: Store) -> None:
    registry.register(make_declaration("other"))
    registry.register(make_declaration())
    registry.set_admin("gw-7", Admin.OFFLINE, "")
    registry.set_admin("gw-7", Admin.ACTIVE, "")

    with store.read() as connection:
        first = events.of_node(connection, "gw-7", 2, None)
        second = events.of_node(connection, "gw-7", 2, first[-1].sequence)

    changed, registered = events.EventType.NODE_ADMIN_CHANGED, events.EventType.NODE_REGISTERED
    assert [[row.type for row in page] for page in (first, second)] == [[changed, changed], [registered]]


def test_events_and_changes_land_together(registry: NodeRegistry, store: Store, rows: Rows) -> None:
    registry.register(make_declaration())
    before = rows.everything()

    @sa.event.listens_for(sa.Engine, "before_cursor_execute")
    def fail_on_the_event(_conn: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("INSERT INTO outbox"):
            raise ZeroDivisionError

    try:
        with pytest.raises(ZeroDivisionError):
            registry.update("gw-7", change(address="192.0.2.99"))
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", fail_on_the_event)

    assert rows.everything() == before
