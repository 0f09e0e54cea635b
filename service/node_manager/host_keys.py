# SPDX-License-Identifier: GPL-3.0-or-later
"""The SSH host keys that a node is trusted by: given by an operator, or pinned at first use.

Writes inside the caller's transaction, with the event that tells of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from node_manager import events
from node_manager.store import tables

GIVEN = "given"
FIRST_USE = "first_use"


def pin(connection: sa.Connection, node_id: str, keys: Sequence[str], origin: str, at: datetime) -> None:
    """Trust *keys* from now on; does nothing for none."""
    if not keys:
        return
    public_keys = sorted(set(keys))
    connection.execute(
        tables.host_keys.insert(),
        [{"node_id": node_id, "public_key": key, "origin": origin, "pinned_at": at} for key in public_keys],
    )
    events.emit(
        connection, events.EventType.HOST_KEYS_PINNED, node_id, at, {"origin": origin, "host_keys": public_keys}
    )


def forget(connection: sa.Connection, node_id: str) -> None:
    """Trust no key any more, and end the quarantine that a changed key brought."""
    connection.execute(tables.host_keys.delete().where(tables.host_keys.c.node_id == node_id))
    connection.execute(
        tables.node_states.update()
        .where(tables.node_states.c.node_id == node_id)
        .values(quarantined=False, revision=tables.node_states.c.revision + 1)
    )
