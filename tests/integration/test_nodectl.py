# SPDX-License-Identifier: GPL-3.0-or-later
"""nodectl and the first start, as a new user meets them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from node_manager.cli import ExitCode
from running_service import RunningService

FIRST_SCREEN_SECONDS = 60


@pytest.fixture
def service(tmp_path: Path) -> RunningService:
    """Give a service that is not started, for its environment."""
    # What a busy test machine says of its own load is not what these tests are about.
    calm = {"NODE_MANAGER_THRESHOLDS__CPU_PERCENT": "{}", "NODE_MANAGER_THRESHOLDS__LOAD_PER_CPU": "{}"}
    return RunningService(tmp_path / "home", calm)


def nodectl(service: RunningService, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run nodectl on the service's store."""
    return subprocess.run(
        [sys.executable, "-m", "node_manager", *arguments],
        env={**service.variables(), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def write_nodes(path: Path, *nodes: dict[str, object]) -> str:
    """Write a file for `nodectl apply` (JSON is YAML)."""
    path.write_text(json.dumps({"nodes": nodes}), "utf-8")
    return str(path)


def wait_for_screen(service: RunningService, times: int = 1) -> str:
    """Wait until the start screen has been printed so many times, and give all that was printed."""
    deadline = time.monotonic() + FIRST_SCREEN_SECONDS
    while time.monotonic() < deadline:
        if service.log.count("Ctrl-C stops") >= times:
            return service.log
        try:
            assert service.process is not None
            service.process.wait(0.2)
        except subprocess.TimeoutExpired:
            continue
        break
    raise TimeoutError(service.log)


def test_serve_local_shows_a_healthy_first_node(service: RunningService) -> None:
    service.command = (*service.command, "--local")
    service.start()
    try:
        screen = wait_for_screen(service)
    finally:
        status = service.stop()

    assert re.search(rf"API +http://127\.0\.0\.1:{service.port}\b", screen)
    assert f"{service.home}/admin.token" in screen
    assert re.search(r"Node +local", screen)
    assert re.search(r"Status +online", screen)
    assert re.search(r"Health +healthy", screen)
    assert re.search(r"CPU +[0-9.]+ %", screen)
    assert re.search(r"Memory +[0-9.]+ %", screen)
    assert re.search(r"Disk +[0-9.]+ % of /", screen)
    assert re.search(r"Containers +\S+", screen)
    assert (status, "Traceback" in screen) == (0, False)


def test_second_start_finds_everything_as_it_was(service: RunningService) -> None:
    service.command = (*service.command, "--local")
    service.start()
    wait_for_screen(service)
    token = service.token
    with service.client() as api:
        before = api.get("/nodes/local").json()
        api.put("/nodes/local/status", json={"status": "cordoned", "reason": "mine"})
    service.stop()

    service.start()
    wait_for_screen(service, times=2)
    with service.client(token) as api:
        after = api.get("/nodes/local").json()
    service.stop()

    assert (after["created_at"], after["admin"]) == (before["created_at"], "cordoned")


def test_serve_on_a_taken_port_says_so_in_one_line(service: RunningService) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]

        done = nodectl(service, "serve", NODE_MANAGER_SERVER__PORT=str(port))

    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "NODE_MANAGER_SERVER__PORT=9090" in done.stderr


BAD_CONFIG = {
    "wrong-type": ('{"ansible": {"forks": "many"}}', "ansible.forks"),
    "unknown-key": ('{"server": {"prot": 1}}', "server.prot"),
    "unknown-section": ('{"servers": {}}', "servers"),
    "not-json": ("{", "not valid JSON"),
    "missing-types": ('{"node_types_file": "nowhere.json"}', "nowhere.json"),
}


@pytest.mark.parametrize(("text", "named"), BAD_CONFIG.values(), ids=BAD_CONFIG)
def test_serve_with_bad_config_refuses_in_one_line(
    service: RunningService, tmp_path: Path, text: str, named: str
) -> None:
    config = tmp_path / "config.json"
    config.write_text(text, "utf-8")

    done = nodectl(service, "serve", NODE_MANAGER_CONFIG=str(config))

    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
    assert named in done.stderr
    assert str(tmp_path) in done.stderr


def test_serve_without_config_refuses_in_one_line(service: RunningService, tmp_path: Path) -> None:
    done = nodectl(service, "serve", NODE_MANAGER_CONFIG=str(tmp_path / "missing.json"))

    assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)


def test_apply_registers_and_again_changes_nothing(service: RunningService, tmp_path: Path) -> None:
    nodes = ({"node_id": f"gw-{number}", "address": f"127.0.9.{number}"} for number in range(1, 4))
    file = write_nodes(tmp_path / "nodes.yml", *nodes)

    first = nodectl(service, "apply", "-f", file)
    second = nodectl(service, "apply", "-f", file)

    assert (first.returncode, first.stdout.strip()) == (0, "3 created, 0 unchanged, 0 refused")
    assert (second.returncode, second.stdout.strip()) == (0, "0 created, 3 unchanged, 0 refused")


def test_apply_goes_on_past_a_refused_node_and_exits_4(service: RunningService, tmp_path: Path) -> None:
    file = write_nodes(
        tmp_path / "nodes.yml",
        {"node_id": "gw-1", "address": "127.0.9.1", "node_type": "toaster"},
        {"node_id": "gw-2", "address": "127.0.9.2"},
    )

    done = nodectl(service, "apply", "-f", file, "-o", "json")

    assert done.returncode == ExitCode.PARTLY
    assert [(item["node_id"], item["result"]) for item in json.loads(done.stdout)] == [
        ("gw-1", "refused"),
        ("gw-2", "created"),
    ]


def test_apply_with_an_invalid_node_registers_nothing(service: RunningService, tmp_path: Path) -> None:
    file = write_nodes(
        tmp_path / "nodes.yml", {"node_id": "gw-1", "address": "127.0.9.1"}, {"node_id": "GW 2", "address": "x"}
    )

    done = nodectl(service, "apply", "-f", file)

    assert (done.returncode, "node 2 (GW 2): node_id" in done.stderr) == (2, True)
    assert json.loads(nodectl(service, "nodes", "-o", "json").stdout) == []


def test_nodes_filters_and_prints_a_table(service: RunningService, tmp_path: Path) -> None:
    file = write_nodes(
        tmp_path / "nodes.yml",
        {"node_id": "gw-1", "address": "127.0.9.1", "location": {"zone": "eu-1a"}},
        {"node_id": "gw-2", "address": "127.0.9.2", "location": {"zone": "eu-1b"}},
    )
    nodectl(service, "apply", "-f", file)

    done = nodectl(service, "nodes", "--zone", "eu-1b")

    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        "NODE",
        "STATUS",
        "HEALTH",
        "SCHEDULABLE",
        "TYPE",
        "ADDRESS",
        "ZONE",
        "SITE",
        "CPU",
        "MEMORY",
    ]
    assert [line.split()[0] for line in lines[1:]] == ["gw-2"]


def test_nodes_over_http_shows_the_same(service: RunningService, tmp_path: Path) -> None:
    file = write_nodes(tmp_path / "nodes.yml", {"node_id": "gw-1", "address": "127.0.9.1"})
    service.start()
    try:
        made = nodectl(service, "apply", "-f", file, NODE_MANAGER_URL=service.url)
        remote = nodectl(service, "nodes", "-o", "json", NODE_MANAGER_URL=service.url)
        local = nodectl(service, "nodes", "-o", "json")
    finally:
        service.kill()

    assert made.stdout.strip() == "1 created, 0 unchanged, 0 refused"
    assert [node["node_id"] for node in json.loads(remote.stdout)] == ["gw-1"]
    assert json.loads(remote.stdout)[0]["created_at"] == json.loads(local.stdout)[0]["created_at"]


def test_unreachable_service_exits_3(service: RunningService) -> None:
    done = nodectl(service, "nodes", NODE_MANAGER_URL=service.url)

    assert (done.returncode, len(done.stderr.strip().splitlines())) == (3, 1)


def test_register_local_twice_is_one_node(service: RunningService) -> None:
    first = nodectl(service, "register", "--local")
    second = nodectl(service, "register", "--local")

    assert (first.stdout.strip(), second.stdout.strip()) == ("local registered", "local was registered already")


def test_token_create_prints_it_once(service: RunningService) -> None:
    made = nodectl(service, "token", "create", "deployer", "--role", "operator")
    listed = nodectl(service, "token", "list", "-o", "json")

    assert re.fullmatch(r"nm_[A-Za-z0-9_-]{43}\n", made.stdout)
    assert made.stdout.strip() not in listed.stdout
    assert [(token["name"], token["role"]) for token in json.loads(listed.stdout)] == [("deployer", "operator")]


def test_killed_service_comes_back_with_its_nodes(service: RunningService) -> None:
    service.start()
    with service.client() as api:
        api.post("/nodes", params={"look": "false"}, json={"node_id": "gw-1", "address": "127.0.9.1"})
    assert service.process is not None
    os.kill(service.process.pid, signal.SIGKILL)
    service.process.wait(10)

    service.start()
    try:
        with service.client() as api:
            found = [node["node_id"] for node in api.get("/nodes").json()["items"]]
        alive = httpx.get(f"{service.url}/healthz").json()
    finally:
        service.kill()

    assert (found, alive) == (["gw-1"], {"status": "ok"})
