# SPDX-License-Identifier: GPL-3.0-or-later
"""The two ways to the manager, in process and over HTTP, held to one contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from node_manager.client import HttpManager, LocalManager, Manager, UnreachableManagerError, read_token
from node_manager.declarations import Location, NodeDeclaration
from node_manager.problems import ProblemError
from node_manager.settings import load_settings
from node_manager.store import open_store
from running_service import RunningService, free_port


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """Run a service for the way over HTTP."""
    running = RunningService(tmp_path_factory.mktemp("client") / "home")
    # These tests register addresses that nobody may try to reach.
    running.command = (str(Path(__file__).parent / "api" / "service_without_ansible.py"),)
    running.start()
    yield running
    running.kill()


@pytest.fixture(params=["local", "http"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """Give the manager, by each way."""
    if request.param == "http":
        service: RunningService = request.getfixturevalue("service")
        with service.client() as api:
            for node in api.get("/nodes").json()["items"]:
                api.delete(f"/nodes/{node['node_id']}")
        with closing(HttpManager(service.url, service.token)) as remote:
            yield remote
        return
    with closing(open_store(f"sqlite:///{tmp_path}/nodes.db")) as store:
        yield LocalManager(store, load_settings({"NODE_MANAGER_HOME": str(tmp_path)}))


def declare(number: int, zone: str = "eu-1a") -> NodeDeclaration:
    """Declare a node."""
    return NodeDeclaration(
        node_id=f"gw-{number}", address="127.0.9.7", labels={"line": "a"}, location=Location(zone=zone)
    )


def test_register_tells_new_from_known(manager: Manager) -> None:
    first, created = manager.register(declare(1))
    second, created_again = manager.register(declare(1))

    assert (created, created_again) == (True, False)
    assert first["node_id"] == second["node_id"] == "gw-1"


def test_register_otherwise_is_a_problem_with_its_code(manager: Manager) -> None:
    manager.register(declare(1))

    with pytest.raises(ProblemError) as refused:
        manager.register(declare(1, zone="eu-1b"))

    assert (refused.value.status, refused.value.code) == (409, "node_exists")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, ["gw-1", "gw-2"]),
        ({"zone": "eu-1b"}, ["gw-2"]),
        ({"label": ["line=a"]}, ["gw-1", "gw-2"]),
        ({"label": ["line=b"]}, []),
        ({"status": "offline"}, []),
    ],
    ids=["all", "zone", "label", "other-label", "status"],
)
def test_nodes_filters(manager: Manager, wanted: dict[str, object], expected: list[str]) -> None:
    manager.register(declare(1))
    manager.register(declare(2, zone="eu-1b"))

    found = [node["node_id"] for node in manager.nodes(wanted)]

    assert found == expected


def test_http_manager_without_service_says_where_it_looked() -> None:
    url = f"http://127.0.0.1:{free_port()}"

    with closing(HttpManager(url, None)) as manager, pytest.raises(UnreachableManagerError, match=url):
        list(manager.nodes({}))


def test_http_manager_without_token_is_refused(service: RunningService) -> None:
    with closing(HttpManager(service.url, None)) as manager, pytest.raises(ProblemError) as refused:
        list(manager.nodes({}))

    assert refused.value.code == "unauthenticated"
    assert httpx.get(f"{service.url}/nodes").status_code == 401


def test_read_token_prefers_the_variable_then_the_named_file(tmp_path: Path) -> None:
    (tmp_path / "admin.token").write_text("nm_home\n", "ascii")
    named = tmp_path / "named"
    named.write_text("nm_named\n", "ascii")

    found = [
        read_token({"NODE_MANAGER_TOKEN": "nm_given", "NODE_MANAGER_TOKEN_FILE": str(named)}, tmp_path),
        read_token({"NODE_MANAGER_TOKEN_FILE": str(named)}, tmp_path),
        read_token({}, tmp_path),
        read_token({}, tmp_path / "elsewhere"),
    ]

    assert found == ["nm_given", "nm_named", "nm_home", None]
