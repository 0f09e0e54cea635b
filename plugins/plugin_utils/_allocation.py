# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What playbooks ask of allocation and selection, against what the manager has: pure functions of dictionaries."""

from __future__ import annotations

import json
import re

from ._declaration import text_of

_WHOLE = re.compile(r"-?[0-9]{1,18}")
_NODE_ID = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,251}[a-z0-9])?")
# What has a meaning of its own where Ansible takes hosts; no node can be named so.
_NO_NODE = frozenset(("all", "ungrouped", "localhost", "127.0.0.1"))
_WHOLE_MILLI = 1000
_SELECTION = (
    "owner", "replicas", "resources", "labels", "constraints", "affinity", "anti_affinity", "spread", "near", "images",
    "strategy", "ttl_seconds", "reserve",
)  # fmt: skip
_TARGETS = ("deployment_labels", "node_labels")
# Numbers that a template may have made texts, wherever they stand in a request.
_WHOLES = ("max_skew", "weight")
_FRACTIONS = ("latitude", "longitude", "max_km")


class WrongValueError(ValueError):
    """A value that a task or a lookup was given, or the manager's answer, can't be used; the text names it."""


def plain(value):
    """Copy what a template gave into plain values.

    What Ansible notes on each text of where it came from is no business of the manager, and a container may hold templates
    that are resolved only where it is iterated.
    """
    return json.loads(json.dumps(_unrolled(value), default=str))


def read_resources(resources):
    """Read amounts per resource class, which templates may have made texts.

    Shapes: a whole number, or for devices {count, share_milli}.
    Errors: WrongValueError.
    """
    return {
        str(name): {str(key): _whole(f"resources.{name}.{key}", part) for key, part in amount.items()}
        if isinstance(amount, dict)
        else _whole(f"resources.{name}", amount)
        for name, amount in resources.items()
    }


def selection_of(deployment_id, options):
    """Make the body of POST /deployment/node-selection.

    Errors: WrongValueError.
    """
    body = {name: options[name] for name in _SELECTION if options[name] is not None}
    body["deployment_id"] = deployment_id
    body["resources"] = read_resources(body["resources"])
    if "labels" in body:
        body["labels"] = _texts(body["labels"])
    if isinstance(body.get("constraints", {}).get("labels"), dict):
        labels = {str(key): _one_or_more(value) for key, value in body["constraints"]["labels"].items()}
        body["constraints"] = {**body["constraints"], "labels": labels}
    if isinstance(body.get("constraints", {}).get("within"), dict):
        body["constraints"] = {**body["constraints"], "within": _numbers("within", body["constraints"]["within"])}
    for name in ("affinity", "anti_affinity"):
        if name in body:
            body[name] = [_term(name, term) for term in body[name]]
    for name in ("spread", "near"):
        if name in body:
            body[name] = _numbers(name, body[name])
    return body


def node_ids_of(placement):
    """Name the chosen nodes, one for each replica.

    The answer may have come over the network, and where Ansible takes hosts it takes patterns.
    Errors: WrongValueError.
    """
    node_ids = [node["node_id"] for node in placement["nodes"]]
    for node_id in node_ids:
        if not isinstance(node_id, str) or not _NODE_ID.fullmatch(node_id) or node_id in _NO_NODE:
            raise WrongValueError(f"the manager chose {str(node_id)[:80]!r}, which is no node's name")
    return node_ids


def allocation_of(allocation_id, params):
    """Make the body of POST /nodes/{node_id}/allocate.

    Errors: WrongValueError.
    """
    body = {
        "allocation_id": allocation_id,
        "owner": params["owner"],
        "deployment_id": params["deployment_id"],
        "resources": read_resources(params["resources"]),
        "ttl_seconds": params["ttl_seconds"],
    }
    return {name: value for name, value in body.items() if value is not None}


def shown(allocation):
    """Show an allocation as a diff does."""
    return {
        "node_id": allocation["node_id"],
        "owner": allocation["owner"],
        "deployment_id": allocation["deployment_id"],
        "resources": canonical(allocation["resources"]),
        "ttl_seconds": allocation["ttl_seconds"],
        "confirmed": allocation["expires_at"] is None,
    }


def expected(node_id, body):
    """Show what an allocation will be that isn't there yet."""
    return {
        "node_id": node_id,
        "owner": body["owner"],
        "deployment_id": body.get("deployment_id"),
        "resources": canonical(body["resources"]),
        "ttl_seconds": body.get("ttl_seconds"),
        "confirmed": body.get("ttl_seconds") is None,
    }


def differing(before, after):
    """Name what makes two allocations different, but for whether they are confirmed, which can change."""
    return [name for name in after if name != "confirmed" and before[name] != after[name]]


def canonical(resources):
    """Write amounts the way the manager does: a plain number for whole units."""
    found = {}
    for name, amount in sorted(resources.items()):
        if isinstance(amount, dict):
            count, share = amount.get("count", 1), amount.get("share_milli", _WHOLE_MILLI)
            found[name] = count if share == _WHOLE_MILLI else {"count": count, "share_milli": share}
        else:
            found[name] = amount
    return found


def lacking(books, resources):
    """Name what a node has too little of, by its books as GET /nodes/{node_id}/resources gives them."""
    found = []
    for name, amount in canonical(resources).items():
        if name in books["devices"]:
            wanted = amount if isinstance(amount, dict) else {"count": amount, "share_milli": _WHOLE_MILLI}
            room = sum(
                unit["present"] and unit["allocated_milli"] + wanted["share_milli"] <= _WHOLE_MILLI
                for unit in books["devices"][name]
            )
            enough = room >= wanted["count"]
        else:
            enough = not isinstance(amount, dict) and books["available"].get(name, 0) >= amount
        if not enough:
            found.append(name)
    return found


def summary_of(advice):
    """Say in a few lines what had better be moved."""
    count = len(advice["moves"])
    if not count:
        return [f"imbalance {advice['imbalance_before']:.3f}, nothing to move"]
    told = "1 move" if count == 1 else f"{count} moves"
    more = "; there is more to move" if advice["more"] else ""
    return [
        f"imbalance {advice['imbalance_before']:.3f}, {advice['imbalance_after']:.3f} after {told}{more}",
        *(
            f"{move['allocation_id']}: {move['from_node']} -> {move['to_node']} ({move['reason']})"
            for move in advice["moves"]
        ),
    ]


def _whole(name, value):
    if isinstance(value, str) and _WHOLE.fullmatch(value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise WrongValueError(f"{name}: expected a whole number, got {value!r}")


def _texts(labels):
    return {str(key): text_of(value) for key, value in labels.items()}


def _one_or_more(value):
    return [text_of(each) for each in value] if isinstance(value, list) else text_of(value)


def _term(name, term):
    if not isinstance(term, dict):
        return term
    return {
        key: _texts(value) if key in _TARGETS and isinstance(value, dict) else value
        for key, value in _numbers(name, term).items()
    }


def _numbers(name, given):
    return {
        key: _whole(f"{name}.{key}", value)
        if key in _WHOLES
        else _number(f"{name}.{key}", value)
        if key in _FRACTIONS
        else value
        for key, value in given.items()
    }


def _number(name, value):
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        raise WrongValueError(f"{name}: expected a number, got {value!r}") from None


def _unrolled(value):
    if isinstance(value, dict):
        return {str(key): _unrolled(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_unrolled(each) for each in value]
    return value
