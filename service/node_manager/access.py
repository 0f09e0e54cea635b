# SPDX-License-Identifier: GPL-3.0-or-later
"""Who may do what: bearer tokens, their roles, and the audit of every write.

Of a token only the SHA-256 is kept; the token has 256 random bits, so a plain hash can't be searched.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from threading import Lock

import sqlalchemy as sa

from node_manager.coalescer import Coalescer
from node_manager.domain import Role
from node_manager.node_registry import Clock, utc_now
from node_manager.problems import ProblemError
from node_manager.store import Store, tables

TOKEN_PREFIX = "nm_"  # noqa: S105  # lets secret scanners find a leaked token
ADMIN_TOKEN_FILE = "admin.token"  # noqa: S105  # a file name
_CACHE_ENTRIES = 4096
_REMEMBER_FOR = timedelta(hours=1)
_MAX_SHARED_ENTRIES = 512


class TokenNotFoundError(ProblemError):
    """No living token of that id."""

    status = 404
    code = "token_not_found"


@dataclass(frozen=True)
class Identity:
    """Who is calling."""

    token_id: str
    name: str
    role: Role
    # Whether the store couldn't say that it still is.
    remembered: bool = False


@dataclass(frozen=True)
class TokenRecord:
    """One token as it can be shown: never the token itself."""

    token_id: str
    name: str
    role: Role
    created_at: datetime
    revoked_at: datetime | None


class Tokens:
    """The bearer tokens of one store."""

    def __init__(self, store: Store, cache_seconds: float = 2, clock: Clock = utc_now) -> None:
        self._store = store
        self._cache_for = timedelta(seconds=cache_seconds)
        self._clock = clock
        self._cache: OrderedDict[str, tuple[Identity, datetime]] = OrderedDict()
        self._cache_lock = Lock()

    def create(self, name: str, role: Role) -> tuple[str, TokenRecord]:
        """Make a token; the text is given this once and kept nowhere."""
        text = TOKEN_PREFIX + secrets.token_urlsafe(32)
        record = TokenRecord(str(uuid.uuid4()), name, role, self._clock(), None)
        with self._store.write() as connection:
            connection.execute(
                tables.tokens.insert(),
                {
                    "token_id": record.token_id,
                    "name": name,
                    "sha256": _digest(text),
                    "role": role.value,
                    "created_at": record.created_at,
                },
            )
        return text, record

    def cached(self, text: str) -> Identity | None:
        """Recognise a token without reading the store; None says nothing about it."""
        digest = _digest(text)
        with self._cache_lock:
            found = self._cache.get(digest)
            return found[0] if found is not None and found[1] > self._clock() else None

    def remembered(self, text: str) -> Identity | None:
        """Recognise a token that was good within the last hour; for what must be told even when the store can't say."""
        digest = _digest(text)
        with self._cache_lock:
            found = self._cache.get(digest)
            if found is None or found[1] + _REMEMBER_FOR <= self._clock():
                return None
            return replace(found[0], remembered=True)

    def authenticate(self, text: str) -> Identity | None:
        """Tell whose token it is; None for one that is unknown or revoked."""
        digest = _digest(text)
        query = sa.select(tables.tokens).where(tables.tokens.c.sha256 == digest, tables.tokens.c.revoked_at.is_(None))
        with self._store.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None:
            with self._cache_lock:
                self._cache.pop(digest, None)
            return None
        identity = Identity(row.token_id, row.name, Role(row.role))
        with self._cache_lock:
            self._cache[digest] = (identity, self._clock() + self._cache_for)
            self._cache.move_to_end(digest)
            while len(self._cache) > _CACHE_ENTRIES:
                self._cache.popitem(last=False)
        return identity

    def records(self) -> list[TokenRecord]:
        """List all tokens, oldest first."""
        with self._store.read() as connection:
            rows = connection.execute(sa.select(tables.tokens).order_by(tables.tokens.c.created_at))
            return [TokenRecord(row.token_id, row.name, Role(row.role), row.created_at, row.revoked_at) for row in rows]

    def revoke(self, token_id: str) -> None:
        """End a token; processes that know it forget it within the cache time.

        Errors: TokenNotFoundError.
        """
        with self._store.write() as connection:
            changed = connection.execute(
                tables.tokens.update()
                .where(tables.tokens.c.token_id == token_id, tables.tokens.c.revoked_at.is_(None))
                .values(revoked_at=self._clock())
            )
            if changed.rowcount == 0:
                raise TokenNotFoundError(f"no living token has the id {token_id!r}; nodectl token list shows them")
        with self._cache_lock:
            self._cache.clear()

    def ensure_admin(self, home: Path) -> Path:
        """Make the first admin token and write it to a file that only its owner can read; an existing one stays."""
        path = home / ADMIN_TOKEN_FILE
        if path.exists() and self.authenticate(path.read_text("ascii").strip()) is not None:
            return path
        text, _ = self.create("admin (first start)", Role.ADMIN)
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_suffix(f".{os.getpid()}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        return path


@dataclass(frozen=True)
class AuditEntry:
    """One write that somebody asked for, and its HTTP status."""

    at: datetime
    actor: str
    role: Role | None
    action: str
    outcome: int
    request_id: str


class AuditLog:
    """The audit of writes, which nothing ever changes or removes; entries that come together share a transaction."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._coalescer: Coalescer[AuditEntry, None] = Coalescer("audit", self._append, _MAX_SHARED_ENTRIES)

    def start(self) -> None:
        """Begin to write."""
        self._coalescer.start()

    def stop(self) -> None:
        """Write what waits, and end."""
        self._coalescer.stop()

    def append(self, entry: AuditEntry) -> Future[None]:
        """Add one entry; the future is done once it is in the store, or raises StoreUnavailableError.

        Errors: CoalescerFullError.
        """
        return self._coalescer.submit(entry)

    def _append(self, entries: Sequence[AuditEntry]) -> list[None]:
        with self._store.write() as connection:
            connection.execute(
                tables.audit.insert(),
                [
                    {
                        "at": entry.at,
                        "actor": entry.actor,
                        "role": None if entry.role is None else entry.role.value,
                        "action": entry.action[:255],
                        "outcome": entry.outcome,
                        "request_id": entry.request_id,
                    }
                    for entry in entries
                ],
            )
        return [None] * len(entries)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
