# SPDX-License-Identifier: GPL-3.0-or-later
"""How checks are written: what is accepted with which defaults, and what a refusal says."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks_spec import (
    CertificateCheck,
    CheckFormatError,
    ClockCheck,
    CommandCheck,
    ContainerCheck,
    DnsCheck,
    FilesystemCheck,
    HttpCheck,
    PortCheck,
    ProcessCheck,
    ServiceCheck,
    TcpCheck,
    one_line,
    parse_check,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._words import Severity

HEAD = ("x", Severity.CRITICAL, 3.0)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        pytest.param({"kind": "tcp", "port": 22}, TcpCheck(*HEAD, host="127.0.0.1", port=22), id="tcp"),
        pytest.param(
            {"kind": "http", "url": "http://[::1]:8080/a?b=c"},
            HttpCheck(*HEAD, url="http://[::1]:8080/a?b=c", expect_status=(200,), expect_text=None, verify_tls=True),
            id="http",
        ),
        pytest.param(
            {
                "kind": "http",
                "url": "https://a",
                "expect_status": [200, 301],
                "expect_text": "ok",
                "verify_tls": False,
            },
            HttpCheck(*HEAD, url="https://a", expect_status=(200, 301), expect_text="ok", verify_tls=False),
            id="http-all-keys",
        ),
        pytest.param({"kind": "dns", "hostname": "a.example"}, DnsCheck(*HEAD, hostname="a.example"), id="dns"),
        pytest.param(
            {"kind": "service", "unit": "a@b-1.service"}, ServiceCheck(*HEAD, unit="a@b-1.service"), id="service"
        ),
        pytest.param({"kind": "process", "process": "nginx"}, ProcessCheck(*HEAD, process="nginx"), id="process"),
        pytest.param(
            {"kind": "container", "container": "/app"}, ContainerCheck(*HEAD, container="app"), id="container"
        ),
        pytest.param({"kind": "port", "port": 53}, PortCheck(*HEAD, port=53, protocol="tcp"), id="port"),
        pytest.param(
            {"kind": "filesystem", "mount": "/"},
            FilesystemCheck(*HEAD, mount="/", space_percent=95.0, inodes_percent=95.0),
            id="filesystem",
        ),
        pytest.param(
            {"kind": "certificate", "path": "/a.pem"},
            CertificateCheck(*HEAD, path="/a.pem", host=None, port=None, server_name=None, days=14.0),
            id="certificate-file",
        ),
        pytest.param(
            {"kind": "certificate", "host": "a", "port": 443, "server_name": "b", "days": 30},
            CertificateCheck(*HEAD, path=None, host="a", port=443, server_name="b", days=30.0),
            id="certificate-server",
        ),
        pytest.param({"kind": "clock"}, ClockCheck(*HEAD, max_offset_seconds=1.0), id="clock"),
        pytest.param({"kind": "command", "argv": ["true", ""]}, CommandCheck(*HEAD, argv=("true", "")), id="command"),
        pytest.param(
            {"kind": "dns", "hostname": "a", "severity": "warning", "timeout_seconds": 0.5},
            DnsCheck("x", Severity.WARNING, 0.5, hostname="a"),
            id="severity-and-timeout",
        ),
        pytest.param(
            {"kind": "tcp", "port": 1, "host": None, "severity": None, "timeout_seconds": None},
            TcpCheck(*HEAD, host="127.0.0.1", port=1),
            id="null-is-default",
        ),
    ],
)
def test_parse_check_reads_each_kind(raw: dict[str, Any], expected: object) -> None:
    check = parse_check({"name": "x", **raw})

    assert check == expected


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        pytest.param({"kind": "tcp"}, "port: is missing, expected an integer from 1 to 65535", id="missing"),
        pytest.param(
            {"kind": "tcp", "port": "22"}, "port: expected an integer from 1 to 65535, got '22' (str)", id="text-port"
        ),
        pytest.param({"kind": "tcp", "port": True}, "port: expected an integer", id="boolean-port"),
        pytest.param({"kind": "tcp", "port": 70000}, "got 70000 (int)", id="high-port"),
        pytest.param({"kind": "tcp", "port": 10**5000}, "a value too large to show (int)", id="endless-port"),
        pytest.param(
            {"kind": "tcp", "port": 1, "hots": "a"}, "'hots' (str): tcp checks have no such key", id="unknown-key"
        ),
        pytest.param({"kind": "ping"}, "kind: expected one of certificate, clock,", id="unknown-kind"),
        pytest.param({"kind": ["tcp"]}, "kind: expected one of", id="list-kind"),
        pytest.param({"kind": "threshold"}, "kind: expected one of", id="threshold-listed-apart"),
        pytest.param({}, "kind: is missing", id="no-kind"),
        pytest.param(
            {"kind": "clock", "severity": "bad"}, "severity: expected one of critical, warning", id="severity"
        ),
        pytest.param(
            {"kind": "clock", "timeout_seconds": 0}, "timeout_seconds: expected a number from 0.01", id="zero-timeout"
        ),
        pytest.param({"kind": "clock", "timeout_seconds": float("nan")}, "timeout_seconds: expected", id="nan-timeout"),
        pytest.param({"kind": "clock", "timeout_seconds": 10**400}, "timeout_seconds: expected", id="huge-timeout"),
        pytest.param({"kind": "http", "url": "ftp://a"}, "url: expected an http:// or https:// URL", id="scheme"),
        pytest.param({"kind": "http", "url": "http://a/ b"}, "url: expected", id="blank-in-url"),
        pytest.param({"kind": "http", "url": "http://a/\r\nX: y"}, "url: expected", id="header-in-url"),
        pytest.param({"kind": "http", "url": "http://u:p@a/"}, "url: expected", id="password-in-url"),
        pytest.param({"kind": "http", "url": "http://a:99999/"}, "url: expected", id="port-in-url"),
        pytest.param({"kind": "http", "url": "http://[::1/"}, "url: expected", id="broken-url"),
        pytest.param({"kind": "http", "url": "http://"}, "url: expected", id="no-host"),
        pytest.param(
            {"kind": "http", "url": "http://a", "expect_status": 200},
            "expect_status: expected a list",
            id="bare-status",
        ),
        pytest.param(
            {"kind": "http", "url": "http://a", "expect_status": [20]}, "expect_status: expected", id="status-range"
        ),
        pytest.param(
            {"kind": "http", "url": "http://a", "verify_tls": "no"}, "verify_tls: expected true or false", id="flag"
        ),
        pytest.param({"kind": "service", "unit": "*"}, "unit: expected the name of one systemd unit", id="glob-unit"),
        pytest.param({"kind": "service", "unit": "--all"}, "unit: expected", id="option-unit"),
        pytest.param(
            {"kind": "port", "port": 1, "protocol": "sctp"}, "protocol: expected one of tcp, udp", id="protocol"
        ),
        pytest.param({"kind": "filesystem", "mount": "data"}, "mount: expected an absolute path", id="relative-mount"),
        pytest.param(
            {"kind": "certificate"}, "path: is missing, expected either path, or host and port", id="no-source"
        ),
        pytest.param(
            {"kind": "certificate", "path": "/a", "host": "b"}, "either path, or host and port", id="two-sources"
        ),
        pytest.param(
            {"kind": "certificate", "path": "/a", "port": 1}, "no port and no server_name", id="path-and-port"
        ),
        pytest.param({"kind": "certificate", "host": "b"}, "port: is missing", id="host-without-port"),
        pytest.param({"kind": "command", "argv": "rm -rf /"}, "argv: expected a list", id="command-line"),
        pytest.param({"kind": "command", "argv": []}, "argv: expected a list", id="empty-argv"),
        pytest.param({"kind": "command", "argv": ["a", "\0"]}, "argv: expected a list", id="nul-argument"),
        pytest.param({"kind": "process", "process": " "}, "process: expected a printable text", id="blank-text"),
    ],
)
def test_parse_check_refuses_and_names_check_and_key(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckFormatError) as refusal:
        parse_check({"name": "x", **raw})

    assert 'check "x": ' in str(refusal.value)
    assert said in str(refusal.value)


@pytest.mark.parametrize("name", [None, "", 3, "a\nb", "x" * 201], ids=["null", "empty", "number", "lines", "long"])
def test_parse_check_refuses_names(name: object) -> None:
    with pytest.raises(CheckFormatError, match="name: expected a printable text"):
        parse_check({"name": name, "kind": "clock"})


def test_parse_check_refuses_what_is_no_mapping() -> None:
    with pytest.raises(CheckFormatError, match="expected a mapping, got 'tcp'"):
        parse_check("tcp")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("a\r\nb\x1b[31m c", "a b [31m c", id="control"),
        pytest.param("x" * 50, "x" * 9 + "…", id="long"),
        pytest.param("\ud800ok", "ok", id="surrogate"),
        pytest.param(None, "None", id="none"),
    ],
)
def test_one_line_keeps_one_printable_line(text: object, expected: str) -> None:
    assert one_line(text, 10) == expected
