# SPDX-License-Identifier: GPL-3.0-or-later
"""Connections and transactions on SQLite and PostgreSQL.

Touches the database and nothing else: a read sees one committed state, a write is one transaction that either lands
whole or raises. Imports no other part of the service.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from node_manager.store import migrate
from node_manager.store.documents import read_json, write_json

_READ_ONLY = "node_manager_read_only"
# SQLite's own default, and what holds the accounts of 10,000 nodes.
_CACHE_KIB = 2_000
_WRITER_CACHE_KIB = 32_000

# What somebody wants done in the transaction of something else.
Also = Callable[[sa.Connection], None]


class StoreUnavailableError(Exception):
    """The store can't answer now (locked, full, restarting); nothing was written and a retry may succeed."""

    retry_after_seconds = 2


_CHANGE_MARK = {
    "sqlite": "PRAGMA data_version",
    # Whatever commits leaves or enters the transactions that a snapshot lists.
    "postgresql": "SELECT pg_current_snapshot()::text",
}


class Store:
    """One database, opened."""

    def __init__(self, engine: sa.Engine, busy_timeout_seconds: float, writer: sa.Engine | None = None) -> None:
        """Take over an engine, and one of a single connection for writing where the database lets in one writer."""
        self._engine = engine
        self._writer = writer or engine
        # Outside of the pool, whose connections come and go: SQLite counts the commits of all connections but the one
        # that asks.
        if engine.dialect.name == "sqlite":
            self._mark_engine = sa.create_engine(engine.url, poolclass=sa.NullPool)
            self._reader = engine.execution_options(**{_READ_ONLY: True})
        else:
            # What a transaction began would go on seeing the same state.
            self._mark_engine = _postgresql_engine(
                engine.url, busy_timeout_seconds, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT"
            )
            self._reader = engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._busy_timeout_seconds = busy_timeout_seconds
        # SQLite lets one writer in and others poll with growing pauses; threads of one process queue here instead.
        self._mark_connection: sa.PoolProxiedConnection | None = None
        self._mark_lock = threading.Lock()
        self._write_lock = threading.Lock() if engine.dialect.name == "sqlite" else None

    @property
    def dialect(self) -> str:
        """Name the engine: sqlite or postgresql."""
        return self._engine.dialect.name

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Give a connection for reading; all its statements see the same state.

        Errors: StoreUnavailableError.
        """
        with _unavailable_translated(), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Give a connection whose statements commit together at the end, or not at all.

        Errors: StoreUnavailableError; anything raised inside rolls back and passes through.
        """
        if self._write_lock is not None and not self._write_lock.acquire(timeout=self._busy_timeout_seconds):
            raise StoreUnavailableError("the store is busy with other writes")
        try:
            with _unavailable_translated(), self._writer.begin() as connection:
                yield connection
        finally:
            if self._write_lock is not None:
                self._write_lock.release()

    def change_mark(self) -> str:
        """Give a text that differs from an earlier one if anything was committed in between, by whatever process.

        Costs a small part of any query, so that what was made from a state can be kept while the state stands.
        Errors: StoreUnavailableError.
        """
        if not self._mark_lock.acquire(timeout=self._busy_timeout_seconds):
            raise StoreUnavailableError("others have been waiting for the store for too long")
        try:
            with _unavailable_translated():
                return self._change_mark()
        finally:
            self._mark_lock.release()

    def _change_mark(self) -> str:
        try:
            if self._mark_connection is None:
                self._mark_connection = self._mark_engine.raw_connection()
            # Past SQLAlchemy, whose transaction around the one statement costs ten times the statement.
            cursor = self._mark_connection.cursor()
            cursor.execute(_CHANGE_MARK[self.dialect])
            row = cursor.fetchone()
        except self._engine.dialect.loaded_dbapi.Error as error:
            if self._mark_connection is not None:
                self._mark_connection.invalidate()
                self._mark_connection = None
            raise StoreUnavailableError(str(error)) from error
        assert row is not None
        return str(row[0])

    def close(self) -> None:
        """Close all connections."""
        with self._mark_lock:
            if self._mark_connection is not None:
                self._mark_connection.close()
                self._mark_connection = None
        self._writer.dispose()
        self._engine.dispose()


def open_store(url: str, busy_timeout_seconds: float = 5, pool_size: int = 8) -> Store:
    """Open the store at *url* and bring its tables up to date.

    Errors: StoreUnavailableError if the database can't be reached.
    """
    parsed = sa.make_url(url)
    writer = None
    if parsed.get_backend_name() == "sqlite":
        engine = _sqlite_engine(parsed, busy_timeout_seconds, pool_size)
        # What a connection keeps of the file is void once another one has written: always the same one writes.
        writer = _sqlite_engine(parsed, busy_timeout_seconds, 1, _WRITER_CACHE_KIB)
    else:
        engine = _postgresql_engine(
            parsed,
            busy_timeout_seconds,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=busy_timeout_seconds,
            pool_pre_ping=True,
            json_serializer=write_json,
            json_deserializer=read_json,
        )
    try:
        with _unavailable_translated():
            migrate.upgrade(engine)
    except BaseException:
        engine.dispose()
        raise
    return Store(engine, busy_timeout_seconds, writer)


def _postgresql_engine(url: sa.URL, busy_timeout_seconds: float, **more: Any) -> sa.Engine:
    from node_manager.store import patience  # noqa: PLC0415  # its driver is installed only where it is wanted

    return patience.make_engine(url, busy_timeout_seconds, **more)


def _sqlite_engine(url: sa.URL, busy_timeout_seconds: float, pool_size: int, cache_kib: int = _CACHE_KIB) -> sa.Engine:
    if url.database:
        file = Path(url.database)
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Before SQLite makes it, readable for all; its journal files take over the mode.
        file.touch(mode=0o600)
    engine = sa.create_engine(
        url,
        poolclass=sa.QueuePool,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=busy_timeout_seconds,
        json_serializer=write_json,
        json_deserializer=read_json,
        connect_args={"timeout": busy_timeout_seconds, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: sqlite3.Connection, _record: Any) -> None:
        # The driver must not open transactions by itself: BEGIN IMMEDIATE below takes the write lock at the start, so
        # that a transaction never fails half-way for want of it.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.execute(f"PRAGMA cache_size=-{cache_kib}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        reads = connection.get_execution_options().get(_READ_ONLY, False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


@contextmanager
def _unavailable_translated() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError) as error:
        if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
            # A mistake in a statement, which the driver puts in the same class as a full disk.
            raise
        raise StoreUnavailableError(str(error.orig)) from error
    except PoolTimeoutError as error:
        raise StoreUnavailableError("all connections to the store are in use") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise StoreUnavailableError(str(error.orig)) from error
        raise
