# SPDX-License-Identifier: GPL-3.0-or-later
"""Two hundred callers want a hundred slots, all at once: nothing is promised twice, whatever dies meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest
from books import assert_books_add_up, assert_nothing_is_left
from callers import Callers, many_connections
from node_manager.store import open_store
from running_service import RunningService
from stored import Rows

SLOTS, CALLERS = 100, 200
NODE = "srv-1"


class Fleet:
    """Services on one database, and a node with a hundred slots."""

    def __init__(self, services: list[RunningService], url: str, stack: ExitStack) -> None:
        self.services, self.url = services, url
        for service in services:
            service.start()
        token = services[0].token
        self.clients = [stack.enter_context(many_connections(service.url, token)) for service in services]
        body = {"node_id": NODE, "address": "127.0.9.7", "capacity": {"memory_mib": SLOTS}}
        assert self.api.post("/nodes", params={"look": "false"}, json=body).status_code == 201

    @property
    def api(self) -> httpx.Client:
        """Give a client of the first service."""
        return self.clients[0]

    def callers(self) -> Callers:
        """Gather the crowd."""
        return Callers(self.clients, NODE, CALLERS)

    def assert_holds(self, held: list[str]) -> None:
        """Find exactly these allocations, whomever one asks, and books that add up."""
        for client in self.clients:
            shown = client.get(f"/nodes/{NODE}/resources").json()
            assert [allocation["allocation_id"] for allocation in shown["allocations"]] == held
            assert (shown["allocated"], shown["available"]) == ({"memory_mib": SLOTS}, {"memory_mib": 0})
        with closing(open_store(self.url)) as store:
            assert_books_add_up(Rows(store))


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Fleet]:
    """Run one service on SQLite."""
    service = RunningService(tmp_path / "home")
    url = f"sqlite:///{tmp_path}/books.db"
    service.environment["NODE_MANAGER_STORAGE__URL"] = url
    with ExitStack() as stack:
        stack.callback(_kill, service)
        yield Fleet([service], url, stack)


@pytest.fixture
def two(tmp_path: Path, postgresql_database: str) -> Iterator[Fleet]:
    """Run two services on one PostgreSQL database."""
    environment = {"NODE_MANAGER_STORAGE__URL": postgresql_database}
    services = [RunningService(tmp_path / f"home-{number}", environment) for number in range(2)]
    with ExitStack() as stack:
        for service in services:
            stack.callback(_kill, service)
        yield Fleet(services, postgresql_database, stack)


@pytest.fixture(params=["one", pytest.param("two", marks=pytest.mark.postgresql)])
def fleet(request: pytest.FixtureRequest) -> Fleet:
    """Give one service on SQLite, or two on PostgreSQL."""
    found: Fleet = request.getfixturevalue(request.param)
    return found


def test_two_hundred_callers_for_a_hundred_slots(fleet: Fleet) -> None:
    callers = fleet.callers()

    callers.start()
    statuses = callers.finish()

    assert statuses == [201] * SLOTS + [409] * (CALLERS - SLOTS)
    assert (callers.cut, callers.refused_for_now) == (0, 0)
    refusals = [answer.json() for answer in callers.answers.values() if answer.status_code == 409]
    assert {refusal["code"] for refusal in refusals} == {"insufficient_resources"}
    assert all(
        refusal["shortages"] == [{"resource": "memory_mib", "requested": 1, "available": 0}] for refusal in refusals
    )
    fleet.assert_holds(callers.holders())


def test_two_hundred_callers_for_a_hundred_slots_over_a_crash(fleet: Fleet) -> None:
    callers, killed = fleet.callers(), fleet.services[0]

    callers.start()
    callers.wait_for(SLOTS // 4)
    killed.kill()
    before = len(callers.answers)
    killed.start()
    statuses = callers.finish()

    # A slot that was taken just before the crash answers 200 to the one who took it.
    assert [status if status == 409 else 201 for status in statuses] == [201] * SLOTS + [409] * (CALLERS - SLOTS)
    assert before < CALLERS
    assert callers.cut > 0
    fleet.assert_holds(callers.holders())


def test_two_hundred_callers_release_at_once_what_they_hold(fleet: Fleet) -> None:
    callers = fleet.callers()
    callers.start()
    callers.finish()
    held = callers.holders()

    def release(allocation_id: str, client: httpx.Client) -> bool:
        answer = client.post(f"/nodes/{NODE}/deallocate", json={"allocation_id": allocation_id})
        assert answer.status_code == 200, answer.text
        return bool(answer.json()["released"])

    with ThreadPoolExecutor(50) as pool:
        # Each twice, by way of all services.
        released = [
            [pool.submit(release, allocation_id, client) for client in (fleet.clients * 2)[:2]]
            for allocation_id in held
        ]

    assert [sorted(answer.result() for answer in twice) for twice in released] == [[False, True]] * SLOTS
    with closing(open_store(fleet.url)) as store:
        assert_nothing_is_left(Rows(store))


def _kill(service: RunningService) -> None:
    if service.process is not None:
        service.kill()
