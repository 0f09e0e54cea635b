# SPDX-License-Identifier: GPL-3.0-or-later
"""Which nodes are watched, and how they are reached, as a registry on each engine has them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from builders import START, FakeClock, make_declaration, make_facts, make_host_key, make_settings, observe, seconds
from node_manager import watch_list
from node_manager.domain import Admin, Health
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.settings import Settings
from node_manager.ssh_targets import Target
from node_manager.store import Store, StoreUnavailableError, open_store
from node_manager.watch_list import Listed

CREDENTIALS = {
    "plant": {"private_key_file": "/etc/keys/plant", "user": "manager"},
    "spare": {"private_key_file": "keys/spare"},
}


@pytest.fixture
def settings() -> Settings:
    """Give settings with two credentials, one the default, the other's key in the state directory."""
    return settings_with()


def settings_with(**ssh: Any) -> Settings:
    """Give settings with other words about SSH."""
    return make_settings({"ssh": {"credentials": CREDENTIALS, "default_credential": "plant", **ssh}}, Path("/srv/nm"))


def make_target(**changes: Any) -> Target:
    """Give the target of a node that declares nothing but its address."""
    usual: dict[str, Any] = {
        "node_id": "gw-7",
        "address": "192.0.2.7",
        "port": 22,
        "user": "manager",
        "private_key_file": "/etc/keys/plant",
        "host_keys": (),
        "strict": False,
        "become": False,
        "local": False,
        "jump": None,
    }
    return Target(**{**usual, **changes})


# which nodes


def test_read_nodes_lists_all_but_those_that_are_offline_by_order(store: Store, registry: NodeRegistry) -> None:
    for admin in Admin:
        registry.register(make_declaration(f"node-{admin.value}", admin=admin.value))

    found = watch_list.read_nodes(store)

    assert sorted(found) == sorted(f"node-{admin.value}" for admin in Admin if admin is not Admin.OFFLINE)


@pytest.mark.parametrize(
    ("declared", "site"),
    [
        pytest.param({"site": "hall-1", "zone": "eu-1a"}, "hall-1", id="site"),
        pytest.param({"zone": "eu-1a"}, "eu-1a", id="zone"),
        pytest.param({}, None, id="nowhere"),
    ],
)
def test_read_nodes_tells_who_is_whose_neighbour(
    store: Store, registry: NodeRegistry, declared: dict[str, str], site: str | None
) -> None:
    registry.register(make_declaration(location=declared))

    assert watch_list.read_nodes(store) == {"gw-7": (Listed("gw-7", 1, None, site), Health.UNKNOWN)}


def test_read_nodes_takes_the_recognised_type_where_none_is_declared(
    store: Store, registry: NodeRegistry, log: ObservationLog
) -> None:
    registry.register(make_declaration("plain"))
    registry.register(make_declaration("declared", node_type="gateway"))
    facts = make_facts(memory_total_bytes=8000 * 1024 * 1024)
    log.record([observe("facts", facts, START, node_id) for node_id in ("plain", "declared")])

    types = {node_id: listed.node_type for node_id, (listed, _) in watch_list.read_nodes(store).items()}

    assert types == {"plain": "server", "declared": "gateway"}


def test_read_nodes_shows_every_declared_change(store: Store, registry: NodeRegistry) -> None:
    registry.register(make_declaration())
    (before, _) = watch_list.read_nodes(store)["gw-7"]

    registry.update("gw-7", make_declaration(address="192.0.2.8"))

    (after, _) = watch_list.read_nodes(store)["gw-7"]
    assert (before.generation, after.generation) == (1, 2)


def test_read_nodes_gives_the_stored_health(
    store: Store, registry: NodeRegistry, log: ObservationLog, clock: FakeClock
) -> None:
    registry.register(make_declaration())
    log.record([observe("facts", make_facts(), clock())])
    lost = {"liveness": "unreachable", "reason": "TimedOut", "message": "gone", "evidence": "peers_blind"}
    log.record([observe("verdict", lost, clock.advance(60))], from_manager=True)

    (_, health) = watch_list.read_nodes(store)["gw-7"]

    assert health is Health.UNREACHABLE


# how they are reached


@pytest.mark.parametrize(
    ("connection", "expected"),
    [
        pytest.param({}, {}, id="nothing-declared"),
        pytest.param({"port": 2222, "user": "pi"}, {"port": 2222, "user": "pi"}, id="port-and-user"),
        pytest.param(
            {"credential": "spare"}, {"user": "root", "private_key_file": "/srv/nm/keys/spare"}, id="other-credential"
        ),
        pytest.param({"become": True}, {"become": True}, id="become"),
    ],
)
def test_read_targets_follows_the_declaration(
    store: Store, registry: NodeRegistry, settings: Settings, connection: dict[str, Any], expected: dict[str, Any]
) -> None:
    registry.register(make_declaration(connection=connection))

    found = watch_list.read_targets(store, settings, ["gw-7"])

    assert found == {"gw-7": make_target(**expected)}


def test_read_targets_without_any_credential_leaves_the_key_to_ssh(store: Store, registry: NodeRegistry) -> None:
    registry.register(make_declaration())

    found = watch_list.read_targets(store, make_settings({"ssh": {"user": "op"}}), ["gw-7"])

    assert found == {"gw-7": make_target(user="op", private_key_file=None)}


def test_read_targets_gives_the_pinned_keys_of_each_node(
    store: Store, registry: NodeRegistry, settings: Settings
) -> None:
    keys = [make_host_key(number) for number in (1, 2, 3)]
    registry.register(make_declaration(host_keys=keys[:2]))
    registry.register(make_declaration("gw-8", host_keys=keys[2:]))

    found = watch_list.read_targets(store, settings, ["gw-7", "gw-8"])

    assert {node_id: target.host_keys for node_id, target in found.items()} == {
        "gw-7": tuple(keys[:2]),
        "gw-8": (keys[2],),
    }
    assert all(target.strict for target in found.values())


def test_read_targets_takes_a_first_key_only_where_that_is_the_policy(store: Store, registry: NodeRegistry) -> None:
    registry.register(make_declaration())

    strict = {
        policy: watch_list.read_targets(store, settings_with(host_key_policy=policy), ["gw-7"])["gw-7"].strict
        for policy in ("first_use", "given")
    }

    assert strict == {"first_use": False, "given": True}


def test_read_targets_goes_through_all_jump_hosts_without_their_sudo(
    store: Store, registry: NodeRegistry, settings: Settings
) -> None:
    key = make_host_key()
    registry.register(make_declaration("outer", address="192.0.2.1", host_keys=[key]))
    inner = {"jump_host": "outer", "user": "hop", "port": 2200, "become": True}
    registry.register(make_declaration("inner", address="192.0.2.2", connection=inner))
    registry.register(make_declaration(connection={"jump_host": "inner", "become": True}))

    found = watch_list.read_targets(store, settings, ["gw-7"])

    outer = make_target(node_id="outer", address="192.0.2.1", host_keys=(key,), strict=True)
    hop = make_target(node_id="inner", address="192.0.2.2", user="hop", port=2200, jump=outer)
    assert found == {"gw-7": make_target(become=True, jump=hop)}


def test_read_targets_shares_a_jump_host_among_the_nodes_behind_it(
    store: Store, registry: NodeRegistry, settings: Settings
) -> None:
    registry.register(make_declaration("gate", address="192.0.2.1"))
    for node_id in ("gw-1", "gw-2"):
        registry.register(make_declaration(node_id, connection={"jump_host": "gate"}))

    found = watch_list.read_targets(store, settings, ["gate", "gw-1", "gw-2"])

    assert found["gw-1"].jump == found["gw-2"].jump == found["gate"]


@pytest.mark.parametrize("become", [False, True])
def test_read_targets_knows_the_managers_own_machine(
    store: Store, registry: NodeRegistry, settings: Settings, become: bool
) -> None:
    here = make_declaration("here", address="127.0.0.1", connection={"kind": "local", "become": become})
    registry.register(here, allow_local=True)

    (target,) = watch_list.read_targets(store, settings, ["here"]).values()

    assert (target.local, target.become, target.address, target.jump) == (True, become, "", None)


def test_read_targets_leaves_out_nodes_that_are_gone(store: Store, registry: NodeRegistry, settings: Settings) -> None:
    registry.register(make_declaration())

    assert list(watch_list.read_targets(store, settings, ["gone", "gw-7"])) == ["gw-7"]


# where others find them


@pytest.mark.parametrize(
    ("declared", "told", "expected"),
    [
        pytest.param("192.0.2.7", None, ["192.0.2.7"], id="no-facts"),
        pytest.param("192.0.2.7", ["192.0.2.7", "198.51.100.7"], ["192.0.2.7", "198.51.100.7"], id="once-each"),
        pytest.param("gw-7.example", ["2001:db8::7"], ["gw-7.example", "2001:db8::7"], id="name"),
        pytest.param("127.0.0.1", ["192.0.2.7"], ["192.0.2.7"], id="declared-loopback"),
        pytest.param("localhost", ["127.1.2.3", "::1", "192.0.2.7"], ["192.0.2.7"], id="loopback"),
        pytest.param("192.0.2.7", ["fe80::1", "169.254.3.4", "198.51.100.7"], ["192.0.2.7", "198.51.100.7"], id="link"),
        pytest.param("127.0.0.1", [], [], id="nowhere"),
        pytest.param(
            "192.0.2.7",
            [f"198.51.100.{number}" for number in range(9)],
            ["192.0.2.7", "198.51.100.0", "198.51.100.1", "198.51.100.2"],
            id="many",
        ),
    ],
)
def test_read_addresses_tells_where_others_may_look(
    store: Store,
    registry: NodeRegistry,
    log: ObservationLog,
    declared: str,
    told: list[str] | None,
    expected: list[str],
) -> None:
    registry.register(make_declaration(address=declared))
    if told is not None:
        log.record([observe("facts", make_facts(addresses=told), START + seconds(1))])

    assert watch_list.read_addresses(store, "gw-7") == expected


def test_public_of_leaves_out_what_means_another_device_elsewhere() -> None:
    told = ["gw-7.example.org", "192.168.1.7", "10.0.0.7", "100.64.0.7", "fd00::7", "8.8.8.8", "2600::7"]

    assert watch_list.public_of(told) == ["gw-7.example.org", "8.8.8.8", "2600::7"]


def test_read_addresses_of_an_unknown_node_are_none(store: Store) -> None:
    assert watch_list.read_addresses(store, "unknown") == []


def test_reading_from_a_store_that_does_not_answer_says_so(store_url: str, settings: Settings) -> None:
    with closing(open_store(store_url, busy_timeout_seconds=0.1, pool_size=1)) as busy, busy.read():
        for read in (
            lambda: watch_list.read_nodes(busy),
            lambda: watch_list.read_targets(busy, settings, ["gw-7"]),
            lambda: watch_list.read_addresses(busy, "gw-7"),
        ):
            with pytest.raises(StoreUnavailableError):
                read()
