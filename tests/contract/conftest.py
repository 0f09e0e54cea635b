# SPDX-License-Identifier: GPL-3.0-or-later
"""One empty store per test, on each engine; what sits on it, with a clock that the test moves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from builders import FakeClock, make_settings
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.quotas import Quotas
from node_manager.resource_allocator import ResourceAllocator
from node_manager.settings import Settings
from node_manager.store import Store, open_store
from node_manager.store.columns import metadata
from stored import Rows

ENGINES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)]


@pytest.fixture(params=ENGINES)
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give the URL of a database without tables."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/node-manager.db"
    url: str = request.getfixturevalue("postgresql_database")
    return url


@pytest.fixture(scope="session")
def migrated_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Migrate an SQLite file once for all tests, which work on copies of it."""
    file = tmp_path_factory.mktemp("store") / "migrated.db"
    open_store(f"sqlite:///{file}").close()
    return file


@pytest.fixture(scope="session")
def migrated_store(postgresql_url: str) -> Iterator[Store]:
    """Migrate a PostgreSQL database once for all tests, which clear it before they start."""
    with closing(open_store(postgresql_url, pool_size=1)) as opened:
        yield opened


@pytest.fixture(params=ENGINES)
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Give the URL of a database with empty tables."""
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("migrated_file"), tmp_path / "node-manager.db")
        return f"sqlite:///{tmp_path}/node-manager.db"
    with request.getfixturevalue("migrated_store").write() as connection:
        for table in reversed(metadata.sorted_tables):
            connection.execute(table.delete())
    url: str = request.getfixturevalue("postgresql_url")
    return url


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    """Open a store that gives up after a second."""
    with closing(open_store(store_url, busy_timeout_seconds=1)) as opened:
        yield opened


@pytest.fixture
def clock() -> FakeClock:
    """Give the clock of registry and observations."""
    return FakeClock()


@pytest.fixture
def settings() -> Settings:
    """Give settings with the types server and gateway."""
    return make_settings({"ssh": {"credentials": {"plant": {"private_key_file": "/etc/keys/plant"}}}})


@pytest.fixture
def registry(store: Store, settings: Settings, clock: FakeClock) -> NodeRegistry:
    """Give the registry."""
    return NodeRegistry(store, settings, clock)


@pytest.fixture
def log(store: Store, settings: Settings, clock: FakeClock) -> ObservationLog:
    """Give the one door."""
    return ObservationLog(store, settings, clock)


@pytest.fixture
def allocator(store: Store, settings: Settings, clock: FakeClock) -> ResourceAllocator:
    """Give the allocator."""
    return ResourceAllocator(store, settings, clock)


@pytest.fixture
def quotas(store: Store, settings: Settings, clock: FakeClock) -> Quotas:
    """Give the quotas."""
    return Quotas(store, settings, clock)


@pytest.fixture
def rows(store: Store) -> Rows:
    """Give a look at what is stored."""
    return Rows(store)
