# SPDX-License-Identifier: GPL-3.0-or-later
"""The nodes as targets: addresses and labels that Prometheus takes, on either engine."""

from __future__ import annotations

import re
import string

import pytest
from builders import FakeClock, make_declaration, make_report, observe
from hypothesis import given
from hypothesis import strategies as st
from node_manager.domain import Admin, Status
from node_manager.node_filters import NodeFilter
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.prometheus_targets import PREFIX, label_names, read, target_address
from node_manager.settings import Settings
from node_manager.store import Store

# Source: prometheus.io, "Data model", as of Prometheus 2.42.
LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
KEYS = st.text(string.ascii_letters + string.digits + "_./-", min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("192.0.2.7", "192.0.2.7:9100"),
        ("gw-7.example.net", "gw-7.example.net:9100"),
        ("2001:db8::7", "[2001:db8::7]:9100"),
        ("fe80::7%eth0", "[fe80::7%eth0]:9100"),
    ],
    ids=["ipv4", "name", "ipv6", "link_local"],
)
def test_target_address_brackets_what_has_colons(address: str, expected: str) -> None:
    assert target_address(address, 9100) == expected


def test_label_names_keep_what_can_stay() -> None:
    found = label_names(["line", "a.b/c-d", "9", "Straße"])

    expected = {"line": "line", "a.b/c-d": "a_b_c_d", "9": "9", "Straße": "Stra_e"}
    assert found == {key: f"{PREFIX}label_{name}" for key, name in expected.items()}


def test_label_names_tell_apart_what_would_be_alike() -> None:
    found = label_names(["a.b", "a/b", "a-b", "a_b", "a_b_2"])

    assert {key: name.removeprefix(f"{PREFIX}label_") for key, name in found.items()} == {
        "a_b": "a_b",
        "a_b_2": "a_b_2",
        "a-b": "a_b_3",
        "a.b": "a_b_4",
        "a/b": "a_b_5",
    }


@given(st.sets(KEYS, max_size=40))
def test_label_names_are_valid_and_all_different(keys: set[str]) -> None:
    found = label_names(keys)

    assert set(found) == keys
    assert len(set(found.values())) == len(keys)
    assert all(LABEL_NAME.fullmatch(name) for name in found.values())
    assert all(found[key] == f"{PREFIX}label_{key}" for key in keys if re.fullmatch(r"\w+", key))


@given(st.sets(KEYS, max_size=10))
def test_label_names_do_not_depend_on_the_order(keys: set[str]) -> None:
    assert label_names(sorted(keys)) == label_names(sorted(keys, reverse=True))


def test_a_target_has_all_that_is_known_of_its_node(
    store: Store, settings: Settings, registry: NodeRegistry, log: ObservationLog, clock: FakeClock
) -> None:
    declared = {"name": "Gateway 7", "node_type": "gateway", "labels": {"line": "a", "team/x": "b"}}
    location = {"region": "eu", "zone": "eu-1a", "site": "plant-2"}
    registry.register(make_declaration("gw-7", **declared, location=location))
    registry.register(make_declaration("gw-8", address="2001:db8::8"))
    log.record([observe("report", make_report(), clock.advance(1))])

    first, second = read(store, settings, NodeFilter(), 9200, clock())

    assert first["targets"] == ["192.0.2.7:9200"]
    assert {name.removeprefix(PREFIX): value for name, value in first["labels"].items()} == {
        "node_id": "gw-7",
        "name": "Gateway 7",
        "type": "gateway",
        "region": "eu",
        "zone": "eu-1a",
        "site": "plant-2",
        "admin": "active",
        "status": "online",
        "health": "healthy",
        "schedulable": "true",
        "address": "192.0.2.7",
        "label_line": "a",
        "label_team_x": "b",
    }
    assert second["targets"] == ["[2001:db8::8]:9200"]
    shown = {name: second["labels"][PREFIX + name] for name in ("type", "zone", "health", "schedulable")}
    assert shown == {"type": "", "zone": "", "health": "unknown", "schedulable": "false"}


def test_targets_pass_the_filters_of_lists(
    store: Store, settings: Settings, registry: NodeRegistry, clock: FakeClock
) -> None:
    registry.register(make_declaration("a", labels={"line": "a"}))
    registry.register(make_declaration("b", labels={"line": "b"}))
    registry.register(make_declaration("c", labels={"line": "a"}))
    registry.set_admin("c", Admin.OFFLINE, "sold")

    wanted = NodeFilter(status=Status.ONLINE, labels=(("line", "a"),))
    found = read(store, settings, wanted, 9100, clock())

    assert [target["labels"][f"{PREFIX}node_id"] for target in found] == ["a"]
