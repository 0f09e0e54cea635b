# SPDX-License-Identifier: GPL-3.0-or-later
"""What may be said about a node, and all that must not get through."""

from __future__ import annotations

import re
from typing import Any

import pytest
from builders import make_declaration, make_host_key
from hypothesis import given
from hypothesis import strategies as st
from node_manager.declarations import NodeChange, NodeDeclaration, is_node_id, parse_host_key
from node_manager.domain import Admin
from pydantic import ValidationError

JINJA = "{{ lookup('pipe', 'touch /tmp/owned') }}"


def refused_fields(**changes: Any) -> list[str]:
    """Give the places that a declaration with *changes* is refused for."""
    try:
        make_declaration(**changes)
    except ValidationError as error:
        return [".".join(str(part) for part in each["loc"]) for each in error.errors()]
    return []


# node_id


@pytest.mark.parametrize(
    "node_id",
    ["a", "7", "gw-7", "gw-7.plant-2", "a" * 63, ".".join(["a" * 61] * 4), "local", "192.0.2.7"],
    ids=["one", "digit", "usual", "dotted", "63-long", "247-long", "local", "address"],
)
def test_is_node_id_takes(node_id: str) -> None:
    assert is_node_id(node_id)
    assert make_declaration(node_id).node_id == node_id


BAD_NODE_IDS = {
    "empty": "",
    "path": "../../etc",
    "300-characters": "a" * 300,
    "254-characters": ".".join(["a" * 62] * 4) + ".aa",
    "label-of-64": "a" * 64,
    "upper-case": "GW-7",
    "cyrillic-a": "g\u0430teway",
    "fullwidth": "\uff47\uff57",
    "kelvin-sign": "\u212a7",
    "long-s": "\u017f7",
    "dotless-i": "\u0131",
    "arabic-digit": "gw-\u0667",
    "superscript": "gw-\u00b2",
    "combining": "e\u0301",
    "zero-width": "gw\u200b7",
    "right-to-left": "gw\u202e7",
    "soft-hyphen": "gw\u00ad7",
    "leading-hyphen": "-gw",
    "option": "--limit",
    "trailing-hyphen": "gw-",
    "underscore": "gw_7",
    "blank": "gw 7",
    "leading-blank": " gw",
    "newline": "gw-7\n",
    "newline-inside": "gw\n7",
    "carriage-return": "gw-7\r",
    "nul": "gw\x007",
    "surrogate": "gw\ud8007",
    "comma": "a,b",
    "colon": "a:b",
    "all-but": "!all",
    "and": "&gw",
    "at": "@hosts",
    "tilde": "~gw.*",
    "star": "*",
    "range": "gw[1:3]",
    "jinja": "{{x}}",
    "shell": "$(id)",
    "dot": ".",
    "double-dot": "a..b",
    "trailing-dot": "gw.",
    "slash": "a/b",
    "percent": "a%2f",
    "all": "all",
    "ungrouped": "ungrouped",
    "localhost": "localhost",
    "implicit-localhost": "127.0.0.1",
    "status-group": "online",
}


@pytest.mark.parametrize("node_id", BAD_NODE_IDS.values(), ids=BAD_NODE_IDS)
def test_is_node_id_refuses(node_id: str) -> None:
    assert not is_node_id(node_id)
    assert refused_fields(node_id=node_id) == ["node_id"]


@pytest.mark.parametrize("node_id", [None, 7, True, ["gw"], {"gw": 1}, b"gw"], ids=repr)
def test_node_id_of_another_kind_is_refused(node_id: Any) -> None:
    assert refused_fields(node_id=node_id) == ["node_id"]


def test_node_id_refusal_tells_the_rule() -> None:
    with pytest.raises(ValidationError, match=r"lower-case letters, digits, hyphens and dots.*RFC 1123"):
        make_declaration("GW-7")


@given(st.text(max_size=20))
def test_is_node_id_takes_nothing_but_rfc_1123(text: str) -> None:
    expected = bool(re.fullmatch(r"[a-z0-9.-]+", text)) and all(
        part and len(part) <= 63 and part[0] != "-" and part[-1] != "-" for part in text.split(".")
    )

    assert is_node_id(text) == expected


# address


@pytest.mark.parametrize(
    ("address", "stored"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:DB8::0007", "2001:db8::7"),
        ("fe80::7%eth0", "fe80::7%eth0"),
        ("fe80::7%br-lan.2", "fe80::7%br-lan.2"),
        ("GW-7.Example.NET", "gw-7.example.net"),
        ("gw-7.example.net.", "gw-7.example.net."),
        ("localhost", "localhost"),
        ("xn--mnchen-3ya.example", "xn--mnchen-3ya.example"),
    ],
    ids=["ipv4", "ipv6", "link-local", "link-local-bridge", "name", "rooted-name", "localhost", "punycode"],
)
def test_address_takes(address: str, stored: str) -> None:
    assert make_declaration(address=address).address == stored


BAD_ADDRESSES = {
    **{
        name: value
        for name, value in BAD_NODE_IDS.items()
        if name
        not in {"upper-case", "trailing-dot", "all", "ungrouped", "localhost", "implicit-localhost", "status-group"}
    },
    "octet-too-large": "192.0.2.256",
    "three-octets": "192.0.2",
    "octal": "192.0.02.7",
    "number": "3221225991",
    "hexadecimal": "0x7f.1",
    "network": "192.0.2.0/24",
    "port": "192.0.2.7:22",
    "bracketed": "[2001:db8::7]",
    "user": "root@gw",
    "url": "ssh://gw",
    "zone-jinja": "fe80::1%{{ x }}",
    "zone-newline": "fe80::1%eth0\n-oProxyCommand=x",
    "zone-shell": "fe80::1%$(id)",
    "zone-option": "fe80::1%-o",
    "zone-long": "fe80::1%" + "e" * 16,
    "zone-empty": "fe80::1%",
    "umlaut": "m\u00fcnchen.example",
    "dotted-capital-i": "\u0130x",
}


@pytest.mark.parametrize("address", BAD_ADDRESSES.values(), ids=BAD_ADDRESSES)
def test_address_refuses(address: str) -> None:
    assert refused_fields(address=address) == ["address"]


@given(st.text(max_size=30) | st.from_regex(r"(?s)fe80::1%.{0,20}", fullmatch=True))
def test_address_that_passes_is_plain(text: str) -> None:
    if refused_fields(address=text):
        return

    stored = make_declaration(address=text).address
    assert re.fullmatch(r"[0-9a-z:.%_A-Z-]+", stored)
    assert not stored.startswith("-")


# connection


@pytest.mark.parametrize(
    ("connection", "field"),
    [
        ({"user": "-oProxyCommand=x"}, "user"),
        ({"user": "root x"}, "user"),
        ({"user": "root\n"}, "user"),
        ({"user": "r\u043e\u043et"}, "user"),
        ({"user": ""}, "user"),
        ({"user": "a" * 33}, "user"),
        ({"user": JINJA}, "user"),
        ({"user": "root;id"}, "user"),
        ({"user": "root@other"}, "user"),
        ({"port": 0}, "port"),
        ({"port": 65536}, "port"),
        ({"port": "22"}, "port"),
        ({"port": True}, "port"),
        ({"port": 22.0}, "port"),
        ({"become": "yes"}, "become"),
        ({"become": 1}, "become"),
        ({"credential": "../key"}, "credential"),
        ({"credential": "-i"}, "credential"),
        ({"credential": "Plant"}, "credential"),
        ({"credential": "plant\n"}, "credential"),
        ({"jump_host": "!all"}, "jump_host"),
        ({"jump_host": "-oProxyCommand=x"}, "jump_host"),
        ({"jump_host": "all"}, "jump_host"),
        ({"kind": "winrm"}, "kind"),
        ({"kind": "docker"}, "kind"),
        ({"password": "x"}, "password"),
        ({"ssh_common_args": "-oProxyCommand=x"}, "ssh_common_args"),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_connection_refuses(connection: dict[str, Any], field: str) -> None:
    assert refused_fields(connection=connection) == [f"connection.{field}"]


def test_connection_takes_what_is_allowed() -> None:
    wanted = {"user": "svc_ansible.1-a", "port": 2222, "become": True, "credential": "plant-2", "jump_host": "bastion"}

    connection = make_declaration(connection=wanted).connection

    assert connection.model_dump() == {"kind": "ssh", **wanted}


# ansible_*


@pytest.mark.parametrize(
    "changes",
    [
        {"ansible_host": "x"},
        {"ANSIBLE_HOST": "x"},
        {"connection": {"ansible_ssh_common_args": "-oProxyCommand=x"}},
        {"location": {"ansible_user": "x"}},
        {"labels": {"ansible_connection": "local"}},
        {"labels": {"Ansible_Connection": "local"}},
        {"capacity": {"ansible_python_interpreter": 1}},
    ],
    ids=["top", "upper-case", "connection", "location", "label", "label-upper-case", "capacity"],
)
def test_ansible_variables_are_refused_anywhere(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"(?i)ansible"):
        make_declaration(**changes)


# labels


@pytest.mark.parametrize(
    "labels",
    [{"a": "1"}, {"App.Kubernetes.io/name": ""}, {"a_b-c/d.e": JINJA}, {"k" * 63: "v" * 255}, {"x": "M\u00fcnchen"}],
    ids=["usual", "prefixed", "jinja", "longest", "umlaut"],
)
def test_labels_take(labels: dict[str, str]) -> None:
    assert make_declaration(labels=labels).labels == labels


@pytest.mark.parametrize(
    "labels",
    [
        {"": "x"},
        {"k" * 64: "x"},
        {"-a": "x"},
        {"a-": "x"},
        {"a b": "x"},
        {"a\n": "x"},
        {"{{x}}": "x"},
        {"\u0430": "x"},
        {"a": "v" * 256},
        {"a": "line\nbreak"},
        {"a": "\x00"},
        {"a": "\x1b[2J"},
        {"a": "\u2028"},
        {"a": "\ud800"},
        {"a": 1},
        {"a": None},
        {"a": ["x"]},
        {1: "x"},
        {f"k{n}": "" for n in range(65)},
        ["a"],
        "a=b",
        None,
    ],
    ids=[
        "empty-key",
        "long-key",
        "leading-hyphen",
        "trailing-hyphen",
        "blank-in-key",
        "newline-in-key",
        "jinja-key",
        "cyrillic-key",
        "long-value",
        "newline",
        "nul",
        "escape",
        "line-separator",
        "surrogate",
        "number",
        "null",
        "list-value",
        "number-key",
        "too-many",
        "list",
        "text",
        "nothing",
    ],
)
def test_labels_refuse(labels: Any) -> None:
    assert {field.split(".")[0] for field in refused_fields(labels=labels)} == {"labels"}


# the rest


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "x" * 256}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": 7}, "name"),
        ({"node_type": "../x"}, "node_type"),
        ({"node_type": "Server"}, "node_type"),
        ({"location": {"zone": "a\tb"}}, "location.zone"),
        ({"location": {"zone": "z" * 64}}, "location.zone"),
        ({"location": {"latitude": 91, "longitude": 0}}, "location.latitude"),
        ({"location": {"latitude": float("nan"), "longitude": 0}}, "location.latitude"),
        ({"location": {"latitude": 0, "longitude": float("inf")}}, "location.longitude"),
        ({"location": {"latitude": 48.1}}, "location"),
        ({"location": {"latitude": "48.1", "longitude": 11}}, "location.latitude"),
        ({"location": []}, "location"),
        ({"capacity": {"disk_mib": -1}}, "capacity.disk_mib"),
        ({"capacity": {"disk_mib": 1.5}}, "capacity.disk_mib"),
        ({"capacity": {"disk_mib": 10**20}}, "capacity.disk_mib"),
        ({"capacity": {"disk_mib": "5"}}, "capacity.disk_mib"),
        ({"capacity": {"disk_mib": True}}, "capacity.disk_mib"),
        ({"capacity": {"Disk MiB": 1}}, "capacity.Disk MiB.[key]"),
        ({"admin": "asleep"}, "admin"),
        ({"admin": []}, "admin"),
        ({"generation": 7}, "generation"),
        ({"health": "healthy"}, "health"),
        ({"host_keys": [make_host_key(n) for n in range(17)]}, "host_keys"),
        ({"host_keys": make_host_key()}, "host_keys"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, dict) else "",
)
def test_declaration_refuses(changes: dict[str, Any], field: str) -> None:
    assert refused_fields(**changes) == [field]


@pytest.mark.parametrize("admin", list(Admin))
def test_declaration_takes_each_word_of_admin(admin: Admin) -> None:
    assert make_declaration(admin=admin.value).admin is admin


def test_declaration_keeps_jinja_verbatim() -> None:
    declaration = make_declaration(name=JINJA, location={"site": JINJA})

    assert (declaration.name, declaration.location.site) == (JINJA, JINJA)


def test_declaration_must_have_an_address() -> None:
    with pytest.raises(ValidationError, match="address"):
        NodeDeclaration.model_validate({"node_id": "gw-7"})


def test_change_has_no_id() -> None:
    with pytest.raises(ValidationError, match="node_id"):
        NodeChange.model_validate({"node_id": "gw-7", "address": "192.0.2.7"})


def test_declaration_survives_json() -> None:
    declaration = make_declaration(labels={"a": "1"}, admin="cordoned", host_keys=[make_host_key()])

    assert NodeDeclaration.model_validate(declaration.model_dump(mode="json")) == declaration


# host keys


@pytest.mark.parametrize(
    "text",
    [make_host_key(), f"{make_host_key()} root@gw-7", f"  {make_host_key()}\n", make_host_key().replace(" ", "   ")],
    ids=["bare", "comment", "as-in-the-file", "wide"],
)
def test_parse_host_key_takes(text: str) -> None:
    assert parse_host_key(text) == make_host_key()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ssh-ed25519",
        make_host_key().split()[1],
        "ssh-ed25519 " + "A" * 60,
        "ssh-ed25519 AAAA",
        "ssh-dss " + make_host_key().split()[1],
        "ssh-rsa " + make_host_key().split()[1],
        make_host_key()[:-3],
        make_host_key() + "\nssh-rsa " + "A" * 60,
        make_host_key() + "\x00",
        "gw-7 " + make_host_key(),
        "@cert-authority * " + make_host_key(),
        'command="id" ' + make_host_key(),
        "ssh-ed25519 " + JINJA,
        "-----BEGIN OPENSSH PRIVATE KEY-----",
    ],
    ids=[
        "empty",
        "no-blob",
        "no-kind",
        "no-key-inside",
        "short",
        "unknown-kind",
        "another-kind",
        "cut",
        "two-lines",
        "nul",
        "known-hosts-line",
        "authority",
        "options",
        "jinja",
        "private-key",
    ],
)
def test_parse_host_key_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_host_key(text)
