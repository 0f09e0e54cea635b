# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether a node takes part, and what is known of its maintenance: two rows of the store that change together.

Knows how they are read and written, in the transaction of the caller; who may change what is decided in maintenance.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from node_manager import changes, events
from node_manager.domain import Admin
from node_manager.problems import NodeNotFoundError, StaleGenerationError
from node_manager.store import tables


@dataclass(frozen=True)
class Standing:
    """A node's admin as it is while its row is held."""

    node_id: str
    admin: Admin
    generation: int


@dataclass(frozen=True)
class Notes:
    """What a maintenance must remember beside its columns."""

    # What the node was before, and is again if its drain is cancelled.
    before: Admin = Admin.ACTIVE
    # What it becomes once it is drained.
    then: Admin = Admin.MAINTENANCE
    # The drain is over, at its deadline, although something is still there.
    gave_up: bool = False
    # When its allocations were first seen to be gone: only what was seen of the node after that tells whether it is empty.
    emptied_at: datetime | None = None
    # What stood in the way when owners were last told.
    told: tuple[str, ...] = ()
    proposals: tuple[dict[str, Any], ...] = ()
    proposed_at: datetime | None = None
    # Who asked to end it, or why it did by itself.
    leaving_for: str = ""
    # Why it did not leave when it was last asked to.
    message: str = ""
    # Not before then it is tried again.
    retry_at: datetime | None = None
    # When the node was last had looked at on its account.
    looked_at: datetime | None = None

    def as_data(self) -> dict[str, Any]:
        """Write them as the store has them."""
        return {
            "before": self.before.value,
            "then": self.then.value,
            "gave_up": self.gave_up,
            "emptied_at": _text(self.emptied_at),
            "told": list(self.told),
            "proposals": list(self.proposals),
            "proposed_at": _text(self.proposed_at),
            "leaving_for": self.leaving_for,
            "message": self.message,
            "retry_at": _text(self.retry_at),
            "looked_at": _text(self.looked_at),
        }

    @classmethod
    def of_data(cls, data: dict[str, Any]) -> Notes:
        """Read them."""
        return cls(
            before=Admin(data["before"]),
            then=Admin(data["then"]),
            gave_up=data["gave_up"],
            emptied_at=_time(data["emptied_at"]),
            told=tuple(data["told"]),
            proposals=tuple(data["proposals"]),
            proposed_at=_time(data["proposed_at"]),
            leaving_for=data["leaving_for"],
            message=data["message"],
            retry_at=_time(data["retry_at"]),
            looked_at=_time(data["looked_at"]),
        )


@dataclass(frozen=True)
class Record:
    """A node's drain or maintenance, while it lasts."""

    node_id: str
    reason: str
    # Empty where it was declared with the node.
    requested_by: str
    started_at: datetime
    drain: bool = False
    deadline_at: datetime | None = None
    drained_at: datetime | None = None
    until: datetime | None = None
    keep_cordon: bool = False
    leaving_at: datetime | None = None
    notes: Notes = field(default_factory=Notes)

    @property
    def drains(self) -> bool:
        """Tell whether the node is being emptied now."""
        return self.drain and self.drained_at is None and not self.notes.gave_up


def lock(connection: sa.Connection, node_id: str, if_generation: int | None = None) -> Standing:
    """Hold the node's row until the end of the transaction.

    Errors: NodeNotFoundError; StaleGenerationError if *if_generation* is no longer the node's.
    """
    columns = tables.nodes.c
    row = connection.execute(
        sa.select(columns.admin, columns.generation).where(columns.node_id == node_id).with_for_update()
    ).one_or_none()
    if row is None:
        raise NodeNotFoundError(node_id)
    if if_generation is not None and if_generation != row.generation:
        raise StaleGenerationError(
            f"node {node_id!r} is at generation {row.generation}, not {if_generation}; read it again and repeat",
            node_id=node_id,
            generation=row.generation,
        )
    return Standing(node_id, Admin(row.admin), row.generation)


def forget_repairs(connection: sa.Connection, node_id: str) -> None:
    """Let repair begin anew with a node, also one that was given up: somebody looked after it."""
    connection.execute(tables.repair_records.delete().where(tables.repair_records.c.node_id == node_id))


def change(connection: sa.Connection, node: Standing, admin: Admin, reason: str, at: datetime) -> None:
    """Write a node's admin and a new generation; tell of it where it is another one."""
    connection.execute(
        tables.nodes.update().where(tables.nodes.c.node_id == node.node_id),
        {"admin": admin.value, "generation": node.generation + 1, "updated_at": at},
    )
    changes.note(connection, [node.node_id])
    if admin is Admin.ACTIVE:
        forget_repairs(connection, node.node_id)
    if admin is not node.admin:
        tell(connection, node.node_id, node.admin, admin, reason, at)


def tell(connection: sa.Connection, node_id: str, before: Admin, after: Admin, reason: str, at: datetime) -> None:
    """Add the event of a changed admin."""
    data = {"from": before.value, "to": after.value, "reason": reason}
    events.emit(connection, events.EventType.NODE_ADMIN_CHANGED, node_id, at, data)


def follow(connection: sa.Connection, node_id: str, before: Admin, after: Admin, reason: str, at: datetime) -> None:
    """Keep the record in step with an admin that was set without ceremony: declared, or by the manager's own parts."""
    if after is before:
        return
    forget(connection, node_id)
    if after in {Admin.MAINTENANCE, Admin.DRAINING}:
        drain, keep_cordon = after is Admin.DRAINING, before is Admin.CORDONED
        write(connection, Record(node_id, reason, "", at, drain, keep_cordon=keep_cordon, notes=Notes(before)))


def read(connection: sa.Connection, node_id: str) -> Record | None:
    """Read a node's maintenance; None where there is none."""
    row = connection.execute(_READ.where(tables.maintenances.c.node_id == node_id)).one_or_none()
    return None if row is None else of_row(row)


def of_row(row: sa.Row[Any]) -> Record:
    """Read a maintenance from a row that has its columns."""
    return Record(
        row.node_id,
        row.reason,
        row.requested_by,
        row.started_at,
        row.drain,
        row.deadline_at,
        row.drained_at,
        row.until,
        row.keep_cordon,
        row.leaving_at,
        Notes.of_data(row.document),
    )


def write(connection: sa.Connection, record: Record) -> None:
    """Write a node's maintenance, new or again."""
    values = {
        "reason": record.reason,
        "requested_by": record.requested_by,
        "started_at": record.started_at,
        "drain": record.drain,
        "deadline_at": record.deadline_at,
        "drained_at": record.drained_at,
        "until": record.until,
        "keep_cordon": record.keep_cordon,
        "leaving_at": record.leaving_at,
        "document": record.notes.as_data(),
    }
    table = tables.maintenances
    there = connection.execute(table.update().where(table.c.node_id == record.node_id), values)
    if not there.rowcount:
        connection.execute(table.insert(), {"node_id": record.node_id, **values})


def forget(connection: sa.Connection, node_id: str) -> None:
    """Remove a node's maintenance; nothing where there is none."""
    connection.execute(tables.maintenances.delete().where(tables.maintenances.c.node_id == node_id))


_READ = sa.select(tables.maintenances)


def _text(at: datetime | None) -> str | None:
    return None if at is None else at.isoformat()


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)
