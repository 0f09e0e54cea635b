# SPDX-License-Identifier: GPL-3.0-or-later
"""The nodes as Prometheus' HTTP service discovery takes them: an address and a port each, and what is known as labels.

Source: prometheus.io, "Writing HTTP service discovery", Prometheus 2.42: a list of {targets, labels}, all values text.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from node_manager import node_brief
from node_manager.domain import Admin, Health
from node_manager.health_checker import derive_status
from node_manager.node_filters import NodeFilter, conditions
from node_manager.settings import Settings
from node_manager.store import Store, tables

PREFIX = "__meta_node_manager_"
_LABEL = f"{PREFIX}label_"
_NO_NAME = re.compile(r"[^a-zA-Z0-9_]")
_QUERY = (
    sa.select(*node_brief.COLUMNS, tables.nodes.c.address, tables.nodes.c.labels)
    .join(tables.node_states, tables.node_states.c.node_id == tables.nodes.c.node_id)
    .order_by(tables.nodes.c.node_id)
)


def read(store: Store, settings: Settings, wanted: NodeFilter, port: int, now: datetime) -> list[dict[str, Any]]:
    """Read the targets of all nodes that pass *wanted*, by node_id.

    Errors: StoreUnavailableError.
    """
    fresh_from = now - timedelta(seconds=settings.configuration.monitoring.stale_after_seconds)
    with store.read() as connection:
        return [_target(row, port, fresh_from) for row in connection.execute(_QUERY.where(*conditions(wanted)))]


def target_address(address: str, port: int) -> str:
    """Write an address with a port; one of IPv6 in brackets.

    Source: RFC 3986, section 3.2.2; Go's dialler takes a zone within the brackets as it is.
    """
    try:
        bare = isinstance(ipaddress.ip_address(address), ipaddress.IPv6Address)
    except ValueError:
        bare = False
    return f"[{address}]:{port}" if bare else f"{address}:{port}"


def label_names(keys: Iterable[str]) -> dict[str, str]:
    """Give each key of a node's labels the name of a Prometheus label, no two the same.

    What a name can't have becomes "_". Where that makes two keys alike, the one that needed no change keeps the name, else the
    first in order does; the others end in "_2", "_3" and so on.
    """
    names: dict[str, str] = {}
    taken = set()
    for key in sorted(keys, key=lambda key: (_NO_NAME.search(key) is not None, key)):
        plain = name = _NO_NAME.sub("_", key)
        number = 1
        while name in taken:
            number += 1
            name = f"{plain}_{number}"
        taken.add(name)
        names[key] = _LABEL + name
    return names


def _target(row: Any, port: int, fresh_from: datetime) -> dict[str, Any]:
    known: Mapping[str, str | None] = {
        "node_id": row.node_id,
        "name": row.name,
        "type": row.type,
        "zone": row.zone,
        "region": row.region,
        "site": row.site,
        "admin": row.admin,
        "status": derive_status(Admin(row.admin), Health(row.health)).value,
        "health": row.health,
        "schedulable": "true" if node_brief.is_schedulable(row, fresh_from) else "false",
        "address": row.address,
    }
    # To Prometheus an empty label is none.
    labels = {PREFIX + name: value or "" for name, value in known.items()}
    names = label_names(row.labels)
    labels.update((names[key], value) for key, value in row.labels.items())
    return {"targets": [target_address(row.address, port)], "labels": labels}
