# SPDX-License-Identifier: GPL-3.0-or-later
"""Which node types are taken: only those whose checks and rules also hold on the nodes."""

from __future__ import annotations

from typing import Any

import pytest
from node_manager.domain import parse_check, recognise
from node_manager.node_types import NodeType, NodeTypes
from pydantic import ValidationError

CHECKS: dict[str, dict[str, Any]] = {
    "tcp": {"host": "192.0.2.1", "port": 22},
    "http": {"url": "https://gw:8443/x", "expect_status": [200, 204], "expect_text": "ok", "verify_tls": False},
    "dns": {"hostname": "example.net"},
    "service": {"unit": "docker.service"},
    "process": {"process": "mosquitto"},
    "container": {"container": "app"},
    "port": {"port": 53, "protocol": "udp"},
    "filesystem": {"mount": "/var", "space_percent": 90, "inodes_percent": 80.5},
    "certificate": {"host": "gw", "port": 443, "server_name": "gw.example", "days": 7},
    "clock": {"max_offset_seconds": 0.5},
    "command": {"argv": ["/usr/bin/test", "-e", "/run/ready"]},
}


def node_type(**changes: Any) -> NodeType:
    """Read one node type."""
    return NodeType.model_validate({"description": "X", **changes})


def check_of(kind: str, /, **changes: Any) -> dict[str, Any]:
    """Write one check as in node_types.json."""
    return {"name": "it", "kind": kind, "severity": "warning", "timeout_seconds": 2, **CHECKS[kind], **changes}


def refused_places(**changes: Any) -> list[str]:
    """Give the places that a node type with *changes* is refused for."""
    with pytest.raises(ValidationError) as caught:
        node_type(**changes)
    return [".".join(str(part) for part in error["loc"]) for error in caught.value.errors()]


@pytest.mark.parametrize("kind", CHECKS)
def test_checks_as_data_is_what_nodes_take(kind: str) -> None:
    (data,) = node_type(checks=[check_of(kind)]).checks_as_data()

    assert data == check_of(kind)
    assert parse_check(data).kind == kind


@pytest.mark.parametrize("kind", CHECKS)
def test_checks_as_data_spells_only_what_nodes_take_in_the_shortest_form(kind: str) -> None:
    optional = {"host", "expect_status", "expect_text", "verify_tls", "protocol", "space_percent", "inodes_percent"}
    needed = {key: value for key, value in CHECKS[kind].items() if kind == "certificate" or key not in optional}

    (data,) = node_type(checks=[{"name": "it", "kind": kind, **needed}]).checks_as_data()

    assert parse_check(data).name == "it"


@pytest.mark.parametrize(
    ("check", "place"),
    [
        (check_of("tcp", port=0), "checks.0.tcp.port"),
        (check_of("tcp", port="22"), "checks.0.tcp.port"),
        (check_of("tcp", extra=1), "checks.0.tcp.extra"),
        (check_of("tcp", kind="threshold"), "checks.0"),
        (check_of("tcp", kind="sql"), "checks.0"),
        (check_of("tcp", name=""), "checks.0.tcp.name"),
        (check_of("tcp", name=" "), "checks.0.tcp"),
        (check_of("tcp", name="a\nb"), "checks.0.tcp"),
        (check_of("tcp", severity="fatal"), "checks.0.tcp.severity"),
        (check_of("tcp", timeout_seconds=0), "checks.0.tcp.timeout_seconds"),
        (check_of("tcp", timeout_seconds=0.001), "checks.0.tcp.timeout_seconds"),
        (check_of("tcp", timeout_seconds=3600), "checks.0.tcp.timeout_seconds"),
        (check_of("tcp", timeout_seconds=float("nan")), "checks.0.tcp.timeout_seconds"),
        (check_of("http", url="ftp://x"), "checks.0.http.url"),
        (check_of("http", url="http://user:secret@x/"), "checks.0.http"),
        (check_of("http", url="http://x/ HTTP/1.1\r\nX: y"), "checks.0.http"),
        (check_of("http", expect_status=[]), "checks.0.http.expect_status"),
        (check_of("http", expect_status=[99]), "checks.0.http.expect_status.0"),
        (check_of("service", unit="-H"), "checks.0.service.unit"),
        (check_of("service", unit="docker*"), "checks.0.service.unit"),
        (check_of("filesystem", mount="var"), "checks.0.filesystem.mount"),
        (check_of("filesystem", space_percent=101), "checks.0.filesystem.space_percent"),
        (check_of("certificate", path="/x.pem"), "checks.0.certificate"),
        (check_of("certificate", port=None), "checks.0.certificate"),
        (check_of("certificate", host=None, port=443, path="/x.pem"), "checks.0.certificate"),
        (check_of("command", argv=[]), "checks.0.command.argv"),
        (check_of("command", argv=["a\x00"]), "checks.0.command"),
        (check_of("command", argv="rm -rf /"), "checks.0.command.argv"),
        (check_of("command", argv=["x"] * 101), "checks.0.command.argv"),
    ],
    ids=lambda value: repr(value)[8:60] if isinstance(value, dict) else "",
)
def test_node_type_refuses_a_check_that_nodes_refuse(check: dict[str, Any], place: str) -> None:
    assert refused_places(checks=[check]) == [place]


def test_node_type_refuses_two_checks_of_one_name() -> None:
    with pytest.raises(ValidationError, match="unique check names, it occurs twice"):
        node_type(checks=[check_of("clock"), check_of("dns")])


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"description": ""}, "description"),
        ({"recognised_by": {"board_pattern": "("}}, "recognised_by.board_pattern"),
        ({"recognised_by": {"board_pattern": "x" * 201}}, "recognised_by.board_pattern"),
        ({"recognised_by": {"colour": "red"}}, "recognised_by.colour"),
        ({"recognised_by": {"architectures": "arm"}}, "recognised_by.architectures"),
        ({"reserved": {"cpu_millicores": -1}}, "reserved.cpu_millicores"),
        ({"overcommit": {"cpu": 0.5}}, "overcommit.cpu"),
        ({"overcommit": {"cpu": 17}}, "overcommit.cpu"),
        ({"overcommit": {"cpu": float("nan")}}, "overcommit.cpu"),
        ({"thresholds": {"cpu_percent": {"warning": float("nan")}}}, "thresholds.cpu_percent.warning"),
        ({"thresholds": {"cpu_percent": {"critical": float("inf")}}}, "thresholds.cpu_percent.critical"),
        ({"thresholds": {"cpu_percent": {"warning": "85"}}}, "thresholds.cpu_percent.warning"),
        ({"contact_windows": [{"start": "24:00", "end": "01:00"}]}, "contact_windows.0.start"),
        ({"contact_windows": [{"start": "1:00", "end": "02:00"}]}, "contact_windows.0.start"),
        ({"contact_windows": [{"start": "01:00"}]}, "contact_windows.0.end"),
        ({"colour": "red"}, "colour"),
    ],
    ids=lambda value: repr(value)[:50] if isinstance(value, dict) else "",
)
def test_node_type_refuses(changes: dict[str, Any], place: str) -> None:
    assert refused_places(**changes) == [place]


@pytest.mark.parametrize("name", ["", "Server", "a_b", "-a", "a" * 64, "{{x}}", "a\n", "\u0430"], ids=repr)
def test_node_types_refuse_a_name(name: str) -> None:
    with pytest.raises(ValidationError, match="pattern"):
        NodeTypes.model_validate({"node_types": {name: {"description": "X"}}})


def test_as_limits_gives_only_what_is_set() -> None:
    thresholds = node_type(thresholds={"cpu_percent": {"warning": 85}, "swap_percent": {}}).thresholds

    assert thresholds.as_limits() == {"cpu_percent": {"warning": 85}}


def test_recognised_by_dumps_what_recognise_understands() -> None:
    rules = {
        "priority": 3,
        "any_device": ["gpu"],
        "architectures": ["aarch64"],
        "board_pattern": "Pi 4",
        "cpu_count_min": 2,
        "cpu_count_max": 4,
        "memory_mib_min": 1000,
        "memory_mib_max": 5000,
        "virtualization": ["none"],
        "features": ["systemd"],
    }
    facts = {
        "architecture": "aarch64",
        "board": {"vendor": "Raspberry", "model": "Pi 4"},
        "cpu": {"count": 4},
        "memory_total_bytes": 4 * 2**30,
        "devices": {"gpu": [{"id": "0"}]},
        "virtualization": "none",
        "features": ["systemd"],
    }

    recognised_by = node_type(recognised_by=rules).recognised_by

    assert recognised_by is not None
    assert recognise(facts, {"x": recognised_by.model_dump(exclude_none=True)}) == "x"
