# SPDX-License-Identifier: GPL-3.0-or-later
"""Which nodes are to be watched, and how each is reached: the registry as the monitor needs it.

Reads only.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import sqlalchemy as sa

from node_manager import inventory
from node_manager.domain import Admin, Health
from node_manager.settings import Settings
from node_manager.ssh_stream import Target
from node_manager.store import Store, tables

_SSH_PORT = 22
_MAX_ADDRESSES = 4
_JUMP_LIMIT = 8
_HEALTH = {health.value: health for health in Health}


class Listed(NamedTuple):
    """What decides whether and how a node is watched; another value means: look at it anew."""

    node_id: str
    generation: int
    node_type: str | None
    site: str | None


_nodes, _states = tables.nodes.c, tables.node_states.c
_NODES = (
    sa.select(
        _nodes.node_id,
        _nodes.generation,
        _nodes.node_type,
        _states.recognised_type,
        _nodes.site,
        _nodes.zone,
        _states.health,
    )
    .join(tables.node_states, _states.node_id == _nodes.node_id)
    .where(_nodes.admin != Admin.OFFLINE.value)
)


def read_nodes(store: Store) -> dict[str, tuple[Listed, Health]]:
    """Read the nodes to watch, all but those that an operator took offline, each with its stored health.

    Errors: StoreUnavailableError.
    """
    with store.read() as connection:
        # Read every two seconds: unpacked, 10,000 rows take 30 ms, and 62 ms by their names.
        return {
            # Nodes of one zone that name no site are neighbours as far as anybody knows.
            node_id: (Listed(node_id, generation, declared or recognised, site or zone), _HEALTH[health])
            for node_id, generation, declared, recognised, site, zone, health in connection.execute(_NODES)
        }


def read_targets(store: Store, settings: Settings, node_ids: Collection[str]) -> dict[str, Target]:
    """Read how nodes are reached, with the keys that they must show; nodes that are gone are left out.

    Errors: StoreUnavailableError.
    """
    found = inventory.build(store, settings, sorted(node_ids))
    keys: dict[str, list[str]] = defaultdict(list)
    for line in found["known_hosts"]:
        node_id, key = line.split(" ", 1)
        keys[node_id].append(key)
    hops: Mapping[str, Any] = found["jump_hosts"]

    def target(node_id: str, ssh: Mapping[str, Any], *, become: bool, depth: int = 0) -> Target:
        hop = ssh["jump_host"]
        return Target(
            node_id=node_id,
            address=ssh["address"],
            port=ssh["port"] or _SSH_PORT,
            user=ssh["user"],
            private_key_file=ssh["private_key_file"],
            host_keys=tuple(keys.get(node_id, ())),
            strict=ssh["strict"],
            become=become,
            local=False,
            jump=target(hop, hops[hop], become=False, depth=depth + 1) if hop in hops and depth < _JUMP_LIMIT else None,
        )

    return {
        node["node_id"]: (
            _local(node["node_id"], become=node["vars"].get("ansible_become", False))
            if node["ssh"] is None
            else target(node["node_id"], node["ssh"], become=node["vars"].get("ansible_become", False))
        )
        for node in found["nodes"]
    }


class TargetReader:
    """Reads targets for many that ask at once: all that ask while a read is under way share the next one.

    One by one a fleet of 10,000 that is opened costs ten times as much, and a thread's time for each.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._settings = settings
        self._one_by_one = asyncio.Lock()
        self._wanted: set[str] = set()
        self._next: asyncio.Task[dict[str, Target]] | None = None

    async def read(self, node_id: str) -> Target | None:
        """Read how a node is reached, as it is now; None for one that is gone.

        Errors: StoreUnavailableError.
        """
        self._wanted.add(node_id)
        if self._next is None:
            self._next = asyncio.create_task(self._read_wanted())
            self._next.add_done_callback(_retrieve)
        # One that is cancelled must not take it from the others.
        return (await asyncio.shield(self._next)).get(node_id)

    async def _read_wanted(self) -> dict[str, Target]:
        async with self._one_by_one:
            wanted, self._wanted, self._next = self._wanted, set(), None
            return await asyncio.to_thread(read_targets, self._store, self._settings, wanted)


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Take in how a task ended, though nobody waits for it any more."""
    if not task.cancelled():
        task.exception()


def read_addresses(store: Store, node_id: str) -> list[str]:
    """Read where other nodes may find a node: as declared, and what it last said its addresses are."""
    with store.read() as connection:
        declared = connection.scalar(sa.select(tables.nodes.c.address).where(tables.nodes.c.node_id == node_id))
        facts = connection.scalar(sa.select(tables.node_facts.c.facts).where(tables.node_facts.c.node_id == node_id))
    told = [declared] if declared else []
    told += facts.get("addresses") or [] if facts else []
    return [address for address in dict.fromkeys(told) if not _is_own(address)][:_MAX_ADDRESSES]


def public_of(addresses: Collection[str]) -> list[str]:
    """Leave out the addresses that mean another device at each site."""
    return [address for address in addresses if _is_public(address)]


def _is_public(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_global
    except ValueError:  # a name, which means the same everywhere as far as anybody knows
        return True


def _is_own(address: str) -> bool:
    """Tell whether an address means whoever uses it."""
    return address.startswith(("127.", "::1", "fe80:", "169.254.")) or address == "localhost"


def _local(node_id: str, *, become: bool) -> Target:
    return Target(
        node_id=node_id,
        address="",
        port=_SSH_PORT,
        user="",
        private_key_file=None,
        host_keys=(),
        strict=True,
        become=become,
        local=True,
        jump=None,
    )
