# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a task says about a node against what the registry has: pure functions of dictionaries."""

from __future__ import annotations

_PARTS = ("location", "connection")
_NEW = {
    "name": None,
    "node_type": None,
    "labels": {},
    "location": {},
    "connection": {},
    "capacity": {},
    "host_keys": [],
}


def declared(node):
    """Read the declared side out of a node as the registry shows it."""
    return {
        "name": node["name"],
        "address": node["address"],
        "node_type": node["node_type"] if node["node_type_source"] == "declared" else None,
        "labels": dict(node["labels"]),
        "location": dict(node["location"]),
        "connection": dict(node["connection"]),
        "capacity": dict(node["declared_capacity"]),
        "admin": node["admin"],
        "host_keys": sorted(key["public_key"] for key in node["host_keys"] if key["origin"] == "given"),
    }


def new(wanted):
    """Make the declaration of a node that isn't registered yet."""
    declaration = {**_NEW, **_given(wanted)}
    for part in _PARTS:
        declaration[part] = _given(declaration[part])
    return declaration


def merge(current, wanted):
    """Lay what a task gives over what is declared; what it leaves out stays."""
    merged = {**current, **_given(wanted)}
    for part in _PARTS:
        merged[part] = {**current[part], **_given(wanted.get(part) or {})}
    # As the registry keeps it: without the comment, each once.
    merged["host_keys"] = sorted({" ".join(key.split()[:2]) for key in merged["host_keys"]})
    return merged


def text_of(value):
    """Write a label's value the way YAML and JSON write it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "" if value is None else str(value)


def _given(values):
    return {key: value for key, value in values.items() if value is not None}
