# SPDX-License-Identifier: GPL-3.0-or-later
"""A running service for the tests of the API."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from running_service import RunningService

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """Run one service for all tests that leave it as they found it."""
    running = RunningService(tmp_path_factory.mktemp("service") / "home").start()
    yield running
    running.stop()


@pytest.fixture
def api(service: RunningService) -> Iterator[httpx.Client]:
    """Give a client with the admin token."""
    with service.client() as client:
        yield client


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[RunningService]:
    """Give a service, not started, that a test may break."""
    running = RunningService(tmp_path / "home")
    yield running
    if running.process is not None:
        running.kill()


@pytest.fixture
def node_id() -> str:
    """Give an id that no other test uses."""
    return f"gw-{next(_numbers)}"
