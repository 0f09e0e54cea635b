# SPDX-License-Identifier: GPL-3.0-or-later
"""A real PostgreSQL for the tests that ask for one: a temporary cluster per session, an empty database per test.

And for every test the watch over the events that it has written.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from event_watch import event_watch  # noqa: F401  # a fixture of every test
from parts import postgresql_binaries, require
from psycopg import sql
from sqlalchemy import make_url

# What a crash may lose is nothing a test would miss, unless the test is about exactly that.
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests that wait for real nodes first: at the end one file of them would leave the other workers idle."""
    items.sort(key=lambda item: "fleet" not in item.path.parts)


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """Start a PostgreSQL that is quick and forgets on power loss; give its SQLAlchemy URL."""
    require("postgresql", "PostgreSQL is the second engine of the store")
    with postgresql_cluster(FAST) as url:
        yield url


@pytest.fixture(scope="session")
def postgresql_durable_url() -> Iterator[str]:
    """Start a PostgreSQL that keeps every commit, as in production; give its SQLAlchemy URL."""
    require("postgresql", "PostgreSQL is the second engine of the store")
    with postgresql_cluster({}) as url:
        yield url


@pytest.fixture
def postgresql_database(postgresql_url: str) -> Iterator[str]:
    """Make an empty database for one test; give its SQLAlchemy URL."""
    with fresh_database(postgresql_url) as url:
        yield url


@pytest.fixture(scope="module")
def postgresql_shared_database(postgresql_url: str) -> Iterator[str]:
    """Make an empty database for the tests of a module, which share a service on it; give its SQLAlchemy URL."""
    with fresh_database(postgresql_url) as url:
        yield url


@pytest.fixture
def postgresql_durable_database(postgresql_durable_url: str) -> Iterator[str]:
    """Make an empty database that keeps every commit for one test; give its SQLAlchemy URL."""
    with fresh_database(postgresql_durable_url) as url:
        yield url


@contextmanager
def postgresql_cluster(settings: dict[str, str]) -> Iterator[str]:
    """Run a cluster on a unix socket in a temporary folder that only its user may enter; yield its URL.

    PostgreSQL refuses to run as root; for root it's the Debian package's user `postgres`.
    """
    binaries = postgresql_binaries()
    assert binaries is not None
    folder = Path(tempfile.mkdtemp(prefix="node-manager-postgresql-"))
    as_user: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
        as_user = ["runuser", "-u", "postgres", "--"]
    data = folder / "data"
    log = folder / "log"
    all_settings = {"listen_addresses": "", "unix_socket_directories": str(folder), **settings}
    options = " ".join(f"-c {name}={value}" for name, value in all_settings.items())

    def run(program: str, *arguments: str) -> None:
        # To the log and not into a pipe: the server would inherit it and keep it open.
        with (folder / "commands.log").open("ab") as output:
            subprocess.run(
                [*as_user, str(binaries / program), *arguments],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=60,
                check=True,
            )

    try:
        run("initdb", "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        run("pg_ctl", "start", "-D", str(data), "-l", str(log), "-o", options, "-w", "-t", "30")
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
        finally:
            run("pg_ctl", "stop", "-D", str(data), "-m", "immediate", "-w", "-t", "30")
    finally:
        shutil.rmtree(folder)


@contextmanager
def fresh_database(url: str) -> Iterator[str]:
    """Create an empty database beside that of *url*, yield its URL, and drop it with all its connections."""
    name = f"test_{uuid.uuid4().hex}"
    _administer(url, sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    try:
        yield make_url(url).set(database=name).render_as_string(hide_password=False)
    finally:
        _administer(url, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def _administer(url: str, statement: sql.Composed) -> None:
    """Run one statement outside a transaction, as CREATE DATABASE demands."""
    parsed = make_url(url)
    host = str(parsed.query["host"])
    with psycopg.connect(
        host=host, user=parsed.username, dbname=parsed.database, autocommit=True, connect_timeout=10
    ) as connection:
        connection.execute(statement)
