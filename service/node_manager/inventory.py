# SPDX-License-Identifier: GPL-3.0-or-later
"""The registry as Ansible sees it: hosts, their groups and variables, and the keys they must show.

Reads with a few queries over all nodes, not one per node: 10,000 nodes are one answer. Paths of known_hosts and the like
are the reader's matter, who may be on another machine.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from node_manager.domain import Admin, Health, Status
from node_manager.health_checker import derive_status, is_schedulable
from node_manager.node_registry import utc_now
from node_manager.node_states import state_of_row
from node_manager.settings import Settings
from node_manager.store import Store, tables

SCHEMA = 1
SCHEDULABLE = "schedulable"
QUARANTINED = "quarantined"
# Always there, even when empty: `-l offline` must mean "nobody", not a warning about an unknown group.
STATE_GROUPS = (*(status.value for status in Status), SCHEDULABLE, QUARANTINED)

# Group names become folder and file names under group_vars; a file name has at most 255 bytes.
_GROUP_NAME_CHARACTERS = 80
_UNSAFE = re.compile(r"\W")
_JUMP_LIMIT = 8
# SQLite takes 32,766 parameters in a statement; PostgreSQL 65,535.
_IDS_PER_QUERY = 10_000
_MAY_BE_SCHEDULABLE = {Health.HEALTHY.value, Health.DEGRADED.value}


def build(
    store: Store, settings: Settings, node_ids: Sequence[str] | None = None, now: datetime | None = None
) -> dict[str, Any]:
    """Give the inventory of all nodes, or of *node_ids* (unknown ones are left out).

    Shapes: {schema, groups: the names that are always there, nodes: [{node_id, groups, vars, ssh}], known_hosts: [line],
    jump_hosts: {node_id: ssh}}. `ssh` is {address, port, user, private_key_file, host_key_alias, strict, jump_host}, null
    for the manager's own machine. Every text comes from outside and must never be templated.
    """
    now = now or utc_now()
    with store.read() as connection:
        rows = _select_nodes(connection, node_ids)
        keys = _select_keys(connection, None if node_ids is None else [row.node_id for row in rows])
        hops = _select_hops(connection, rows)
        missing = [node_id for node_id in hops if node_id not in keys]
        if missing:
            keys.update(_select_keys(connection, missing))
    renderer = _Renderer(settings, keys, now)
    return {
        "schema": SCHEMA,
        "groups": list(STATE_GROUPS),
        "nodes": [renderer.node(row) for row in rows],
        "known_hosts": [f"{node_id} {key}" for node_id in sorted(keys) for key in keys[node_id]],
        "jump_hosts": {node_id: renderer.ssh(row) for node_id, row in hops.items()},
    }


def group_name(prefix: str, *parts: str) -> str:
    """Make a group name that Ansible takes: what it doesn't becomes an underscore, and different texts may meet.

    Shapes: ("zone", "eu-1a") -> zone_eu_1a.
    """
    return _UNSAFE.sub("_", "_".join((prefix, *parts)))[:_GROUP_NAME_CHARACTERS]


class _Renderer:
    """Turn rows into inventory entries; group names repeat, so each is made once."""

    def __init__(self, settings: Settings, keys: dict[str, list[str]], now: datetime) -> None:
        self._settings = settings
        self._ssh_settings = settings.configuration.ssh
        self._keys = keys
        self._now = now
        self._stale_after = timedelta(seconds=settings.configuration.monitoring.stale_after_seconds)
        self._names: dict[tuple[str, ...], str] = {}
        self._credentials: dict[str | None, tuple[str | None, str | None]] = {}

    def node(self, row: sa.Row[Any]) -> dict[str, Any]:
        variables: dict[str, Any] = {
            "ansible_host": row.address,
            "node_manager_name": row.name,
            "node_manager_labels": row.labels,
            "node_manager_location": {
                key: value
                for key, value in (("region", row.region), ("zone", row.zone), ("site", row.site))
                if value is not None
            },
            "node_manager_generation": row.generation,
        }
        if row.node_type is not None:
            variables["node_manager_type"] = row.node_type
        link = row.connection
        ssh = None
        if link["kind"] == "local":
            variables["ansible_connection"] = "local"
            variables["ansible_python_interpreter"] = sys.executable
        else:
            ssh = self.ssh(row)
            variables["ansible_user"] = ssh["user"]
            if ssh["port"] is not None:
                variables["ansible_port"] = ssh["port"]
            if ssh["private_key_file"] is not None:
                variables["ansible_ssh_private_key_file"] = ssh["private_key_file"]
        if link["become"]:
            variables["ansible_become"] = True
        return {"node_id": row.node_id, "groups": self._groups(row), "vars": variables, "ssh": ssh}

    def ssh(self, row: sa.Row[Any]) -> dict[str, Any]:
        link = row.connection
        key_file, user = self._credential(link["credential"])
        pinned = row.node_id in self._keys
        return {
            "address": row.address,
            "port": link["port"],
            "user": link["user"] or user or self._ssh_settings.user,
            "private_key_file": key_file,
            # A key seen once counts until the declaration changes: then, as after forget_host_keys or for a new device of the
            # same name, the next key is a first one again.
            "host_key_alias": row.node_id
            if pinned
            else f"{row.node_id}_{int(row.created_at.timestamp())}_{row.generation}",
            "strict": pinned or self._ssh_settings.host_key_policy == "given",
            "jump_host": link["jump_host"],
        }

    def _credential(self, name: str | None) -> tuple[str | None, str | None]:
        if name not in self._credentials:
            found = self._settings.credential_of(name)
            self._credentials[name] = (None, None) if found is None else (str(found.private_key_file), found.user)
        return self._credentials[name]

    def _groups(self, row: sa.Row[Any]) -> list[str]:
        groups = [derive_status(Admin(row.admin), Health(row.health)).value]
        if self._schedulable(row):
            groups.append(SCHEDULABLE)
        if row.quarantined:
            groups.append(QUARANTINED)
        for prefix, value in (
            ("type", row.node_type or row.recognised_type),
            ("zone", row.zone),
            ("region", row.region),
            ("site", row.site),
        ):
            if value is not None:
                groups.append(self._name(prefix, value))
        groups.extend(self._name("label", key, value) for key, value in row.labels.items())
        return list(dict.fromkeys(groups))

    def _schedulable(self, row: sa.Row[Any]) -> bool:
        # Reading a state with its conditions costs; most nodes that can't be schedulable show it without.
        if row.admin != Admin.ACTIVE.value or row.quarantined or row.health not in _MAY_BE_SCHEDULABLE:
            return False
        return is_schedulable(Admin(row.admin), state_of_row(row), self._now, self._stale_after)

    def _name(self, *parts: str) -> str:
        name = self._names.get(parts)
        if name is None:
            name = self._names[parts] = group_name(*parts)
        return name


_QUERY = sa.select(
    *(column for column in tables.nodes.c if column.name not in {"capacity", "latitude", "longitude", "updated_at"}),
    *(column for column in tables.node_states.c if column.name not in {"node_id", "revision"}),
).join(tables.node_states, tables.node_states.c.node_id == tables.nodes.c.node_id)


def _select_nodes(connection: sa.Connection, node_ids: Sequence[str] | None) -> list[sa.Row[Any]]:
    query = _QUERY.order_by(tables.nodes.c.node_id)
    if node_ids is None:
        return list(connection.execute(query))
    rows: list[sa.Row[Any]] = []
    for some in _batches(sorted(set(node_ids))):
        rows.extend(connection.execute(query.where(tables.nodes.c.node_id.in_(some))))
    return rows


def _select_keys(connection: sa.Connection, node_ids: Sequence[str] | None) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    query = sa.select(tables.host_keys.c.node_id, tables.host_keys.c.public_key).order_by(
        tables.host_keys.c.node_id, tables.host_keys.c.public_key
    )
    wanted: Iterable[sa.Select[Any]] = (
        [query]
        if node_ids is None
        else (query.where(tables.host_keys.c.node_id.in_(some)) for some in _batches(node_ids))
    )
    for part in wanted:
        for node_id, key in connection.execute(part):
            keys.setdefault(node_id, []).append(key)
    return keys


def _select_hops(connection: sa.Connection, rows: Sequence[sa.Row[Any]]) -> dict[str, sa.Row[Any]]:
    """Read the nodes through which *rows* are reached, and those through which these are."""
    hops: dict[str, sa.Row[Any]] = {}
    behind: Iterable[sa.Row[Any]] = rows
    for _ in range(_JUMP_LIMIT):
        wanted = {row.connection["jump_host"] for row in behind} - {None} - hops.keys()
        if not wanted:
            break
        found = _select_nodes(connection, sorted(wanted))
        hops.update((row.node_id, row) for row in found)
        behind = found
    return hops


def _batches(node_ids: Sequence[str]) -> Iterable[Sequence[str]]:
    return (node_ids[start : start + _IDS_PER_QUERY] for start in range(0, len(node_ids), _IDS_PER_QUERY))
