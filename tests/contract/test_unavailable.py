# SPDX-License-Identifier: GPL-3.0-or-later
"""A store that can't answer: every caller is told so in time, nothing is written by half, and it recovers by itself."""

from __future__ import annotations

import itertools
import os
import socket
import sqlite3
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import sqlalchemy as sa
from builders import START, FakeClock, make_declaration, make_facts, make_sample, make_settings, observe
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.store import Store, StoreUnavailableError, open_store, patience, tables
from parts import postgresql_binaries, require, skip_or_fail
from silent_peer import SilentPeer, silent_peer
from stored import Rows

BUSY_SECONDS = 0.3


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """Open a store that gives up soon."""
    with closing(open_store(store_url, busy_timeout_seconds=BUSY_SECONDS)) as opened:
        yield opened


@contextmanager
def locked_from_outside(store_url: str) -> Iterator[None]:
    """Hold every lock that a write wants, as another process would."""
    url = sa.make_url(store_url)
    if url.get_backend_name() == "sqlite":
        assert url.database is not None
        with closing(sqlite3.connect(url.database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
            other.execute("ROLLBACK")
        return
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        names = ", ".join(table.name for table in tables.metadata.sorted_tables)
        connection.execute(sa.text(f"LOCK TABLE {names} IN EXCLUSIVE MODE"))
        yield
    engine.dispose()


# locked


def test_register_while_the_store_is_locked_gives_up_in_time(
    registry: NodeRegistry, rows: Rows, store_url: str
) -> None:
    with locked_from_outside(store_url):
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError):
            registry.register(make_declaration())
        waited_seconds = time.monotonic() - started

    # The bound says that it waits for the timeout and not for the lock; the rest is room for a busy machine.
    assert BUSY_SECONDS * 0.9 <= waited_seconds < BUSY_SECONDS + 5
    assert not any(rows.everything().values())


def test_register_works_again_after_the_lock(registry: NodeRegistry, store_url: str) -> None:
    with locked_from_outside(store_url), pytest.raises(StoreUnavailableError):
        registry.register(make_declaration())

    _, created = registry.register(make_declaration())

    assert created


def test_record_while_the_store_is_locked_takes_nothing_and_all_of_it_later(
    registry: NodeRegistry, log: ObservationLog, rows: Rows, store_url: str
) -> None:
    registry.register(make_declaration())
    before = rows.everything()
    batch = [observe("facts", make_facts()), observe("sample", make_sample())]

    with locked_from_outside(store_url), pytest.raises(StoreUnavailableError):
        log.record(batch)

    assert rows.everything() == before
    assert log.record(batch).recorded == 2


def test_get_while_the_store_is_locked_for_writing_answers(registry: NodeRegistry, store_url: str) -> None:
    registry.register(make_declaration())

    with locked_from_outside(store_url):
        node = registry.get("gw-7")

    assert node.node_id == "gw-7"


def test_write_while_another_thread_writes_gives_up_in_time(store: Store, registry: NodeRegistry) -> None:
    holds, release = threading.Event(), threading.Event()

    def hold() -> None:
        with store.write() as connection:
            connection.execute(tables.nodes.delete())
            if store.dialect == "postgresql":
                connection.execute(sa.text("LOCK TABLE nodes IN EXCLUSIVE MODE"))
            holds.set()
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    holds.wait(10)
    try:
        with pytest.raises(StoreUnavailableError):
            registry.register(make_declaration())
    finally:
        release.set()
        holder.join(10)


def test_read_without_a_free_connection_gives_up_in_time(store_url: str) -> None:
    with (
        closing(open_store(store_url, busy_timeout_seconds=BUSY_SECONDS, pool_size=1)) as store,
        store.read(),
        pytest.raises(StoreUnavailableError, match="in use"),
        store.read(),
    ):
        pass


# full


def make_full(store: Store) -> None:
    """Leave SQLite no page to grow by."""
    with store.write() as connection:
        pages = connection.scalar(sa.text("PRAGMA page_count"))
        # As if the disk ended here; it holds for this connection, the one that writes.
        connection.execute(sa.text(f"PRAGMA max_page_count={pages}"))


def test_record_on_a_full_disk_takes_nothing_and_all_of_it_later(migrated_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "node-manager.db"
    file.write_bytes(migrated_file.read_bytes())
    with closing(open_store(f"sqlite:///{file}", pool_size=1)) as store:
        settings, clock = make_settings(), FakeClock()
        registry, log, rows = NodeRegistry(store, settings, clock), ObservationLog(store, settings, clock), Rows(store)
        registry.register(make_declaration())
        make_full(store)
        before = rows.everything()
        batch = [observe("sample", make_sample(errors=[{"collector": "x", "message": "y" * 4000}] * 64))]

        with pytest.raises(StoreUnavailableError, match="full"):
            log.record(batch)

        assert rows.everything() == before
        with store.write() as connection:
            connection.execute(sa.text("PRAGMA max_page_count=1000000"))
        assert log.record(batch).recorded == 1


def test_register_on_a_full_filesystem_leaves_whole_nodes_only(migrated_file: Path, tmp_path: Path) -> None:
    require("root", "mounting a small filesystem")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        skip_or_fail(f"this machine may not mount: {mounted.stderr.decode().strip()}")
    try:
        fill_up_with_nodes(migrated_file, tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def fill_up_with_nodes(migrated_file: Path, folder: Path) -> None:
    """Register until the filesystem is full, then hold nodes against events."""
    file = folder / "node-manager.db"
    file.write_bytes(migrated_file.read_bytes())
    with closing(open_store(f"sqlite:///{file}", busy_timeout_seconds=BUSY_SECONDS)) as store:
        registry, rows = NodeRegistry(store, make_settings()), Rows(store)
        registered = itertools.count()

        def register_many() -> None:
            while next(registered) < 100_000:
                registry.register(make_declaration(f"node-{uuid.uuid4()}", labels={"text": "x" * 255}))

        with pytest.raises(StoreUnavailableError):
            register_many()

        # The count had already gone on to the node that failed, and goes on once more here.
        whole = next(registered) - 1
        assert len(rows.of(tables.nodes)) == len(rows.of(tables.node_states)) == len(rows.events()) == whole
    assert whole > 10


# restarted


@pytest.mark.postgresql
def test_store_recovers_by_itself_when_postgresql_restarts(
    postgresql_durable_url: str, postgresql_durable_database: str
) -> None:
    clock = FakeClock()
    with closing(open_store(postgresql_durable_database, busy_timeout_seconds=2)) as store:
        registry, log = NodeRegistry(store, make_settings(), clock), ObservationLog(store, make_settings(), clock)
        registry.register(make_declaration())

        control(postgresql_durable_url, "stop", "-m", "immediate")
        with pytest.raises(StoreUnavailableError):
            registry.get("gw-7")
        with pytest.raises(StoreUnavailableError):
            log.record([observe("sample", make_sample())])
        control(postgresql_durable_url, "start", "-o", options_of(postgresql_durable_url))

        assert registry.get("gw-7").node_id == "gw-7"
        assert log.record([observe("sample", make_sample())]).recorded == 1


@pytest.mark.postgresql
def test_write_cut_by_a_restart_of_postgresql_leaves_nothing(
    postgresql_durable_url: str, postgresql_durable_database: str
) -> None:
    with closing(open_store(postgresql_durable_database, busy_timeout_seconds=2)) as store:

        def write_over_a_restart() -> None:
            with store.write() as connection:
                connection.execute(tables.leases.insert(), {"name": "x", "holder": "y", "expires_at": START})
                control(postgresql_durable_url, "restart", "-m", "immediate")

        with pytest.raises(StoreUnavailableError):
            write_over_a_restart()

        assert Rows(store).of(tables.leases) == []


# silent


@pytest.fixture
def peer(postgresql_database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SilentPeer]:
    """Stand between the store and its PostgreSQL, with less patience than usual."""
    for name in ("PING_SECONDS", "READ_SECONDS"):
        monkeypatch.setattr(patience, name, 0.5)
    with silent_peer(postgresql_database) as between:
        yield between


def read_one(store: Store) -> None:
    with store.read() as connection:
        connection.execute(sa.select(tables.leases)).all()


def read_on(store: Store, peer: SilentPeer) -> None:
    with store.read() as connection:
        connection.execute(sa.select(tables.leases)).all()
        peer.fall_silent()
        connection.execute(sa.select(tables.leases)).all()


SILENCES: dict[str, Callable[[Store, SilentPeer], object]] = {
    "read": lambda store, _peer: read_one(store),
    "read_under_way": read_on,
    "write": lambda store, _peer: NodeRegistry(store, make_settings(), FakeClock()).register(make_declaration()),
    "change_mark": lambda store, _peer: store.change_mark(),
}


@pytest.mark.postgresql
@pytest.mark.parametrize("ask", SILENCES.values(), ids=SILENCES)
def test_store_gives_up_a_postgresql_that_says_nothing_and_goes_on_once_it_does(
    peer: SilentPeer, ask: Callable[[Store, SilentPeer], object]
) -> None:
    with closing(open_store(peer.url, busy_timeout_seconds=2)) as store:
        ask_again = SILENCES["read"] if ask is read_on else ask
        read_one(store)
        store.change_mark()
        if ask is not read_on:
            peer.fall_silent()

        began = time.monotonic()
        for attempt in (ask, ask_again):
            with pytest.raises(StoreUnavailableError):
                attempt(store, peer)
        waited_seconds = time.monotonic() - began
        peer.speak()
        ask_again(store, peer)

    # Each waits for the silent connection, the one that there was, and the next one that it tries.
    assert waited_seconds < 2 * (0.5 + 2) + 5


@pytest.mark.postgresql
def test_writes_may_take_longer_than_reads(peer: SilentPeer) -> None:
    with closing(open_store(peer.url)) as store:
        with store.write() as connection:
            connection.execute(sa.text("SELECT pg_sleep(1)"))
        with pytest.raises(StoreUnavailableError, match="said nothing"), store.read() as connection:
            connection.execute(sa.text("SELECT pg_sleep(30)"))


@pytest.mark.postgresql
def test_connections_notice_that_their_peer_is_gone(peer: SilentPeer) -> None:
    with closing(open_store(f"{peer.url}?keepalives_idle=7")) as store, store.read() as connection:
        driver = connection.connection.driver_connection
        with socket.socket(fileno=os.dup(driver.fileno())) as link:
            options = (socket.TCP_USER_TIMEOUT, socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
            found = [link.getsockopt(socket.IPPROTO_TCP, option) for option in options]
            alive = link.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    assert (found, alive) == ([10_000, 7, 3, 3], 1)


def control(url: str, action: str, *arguments: str) -> None:
    """Have the test's own cluster stopped or started, and wait until it is."""
    binaries, folder = postgresql_binaries(), folder_of(url)
    assert binaries is not None
    place = ["-D", str(folder / "data"), "-l", str(folder / "log")]
    with (folder / "commands.log").open("ab") as output:
        subprocess.run(
            [*as_owner(folder), str(binaries / "pg_ctl"), action, *place, "-w", "-t", "30", *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=60,
            check=True,
        )


def as_owner(folder: Path) -> list[str]:
    """Run as the user whose cluster it is."""
    return ["runuser", "-u", folder.owner(), "--"] if folder.owner() != "root" else []


def options_of(url: str) -> str:
    """Give the options that the cluster was started with, but for the program and the data directory."""
    words = (folder_of(url) / "data" / "postmaster.opts").read_text().split('"')[1::2]
    return " ".join(word for word in words if word not in {"-D", str(folder_of(url) / "data")})


def folder_of(url: str) -> Path:
    """Find the cluster's folder, which is where its socket is."""
    return Path(str(sa.make_url(url).query["host"]))
