# SPDX-License-Identifier: GPL-3.0-or-later
"""A service that repairs the test fleet by itself, and what can be broken there: power hook, container engine, own steps.

Touches the folder that it is given, and the nodes. The waits are short, so that a test sees many things happen; what is to
happen is the product's business.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from node_manager.recoveries import Recoveries
from node_manager.settings import load_settings
from node_manager.store import open_store
from running_service import RunningService

from .engine import SOCKET
from .image import SERVICE, USER
from .nodes import Fleet, Node
from .waiting import wait_until

SSH_PORT = 22
DEMO_CHECK = {"name": "demo-app", "kind": "service", "unit": SERVICE, "severity": "critical"}
DEMO_TYPES: dict[str, Any] = {"demo": {"description": "A node of the test fleet", "checks": [DEMO_CHECK]}}
# What the operator's own steps write on the node.
TRACE = "/var/lib/trace"
QUICK = {
    "NODE_MANAGER_MONITORING__SCHEDULED": "true",
    "NODE_MANAGER_MONITORING__CHECK_INTERVAL_SECONDS": "5",
    "NODE_MANAGER_MONITORING__SAMPLE_INTERVAL_SECONDS": "2",
    "NODE_MANAGER_MONITORING__RECONNECT_MAX_SECONDS": "4",
    "NODE_MANAGER_HEALTH__GRACE_SECONDS": "5",
    "NODE_MANAGER_HEALTH__RETURN_SAMPLES": "2",
    "NODE_MANAGER_HEALTH__RETURN_SECONDS": "4",
    "NODE_MANAGER_HEALTH__THRESHOLD_SAMPLES": "2",
    "NODE_MANAGER_RECOVERY__AUTOMATIC": "true",
    "NODE_MANAGER_RECOVERY__WAIT_SECONDS": "1",
    "NODE_MANAGER_RECOVERY__BACKOFF_SECONDS": "2",
    "NODE_MANAGER_RECOVERY__GUARD__START_INTERVAL_SECONDS": "0",
}


class Repairing:
    """A service that repairs nodes, seen by its API and by its store."""

    def __init__(self, service: RunningService, api: httpx.Client) -> None:
        self.service = service
        self.api = api

    def register(self, *nodes: Node, node_type: str = "demo", zone: str | None = None, site: str = "plant-1") -> None:
        """Register nodes at their own addresses, and wait until they are well."""
        for node in nodes:
            place = {"site": site} if zone is None else {"site": site, "zone": zone}
            declared = {
                "node_id": node.node_id,
                "address": node.bridge_address,
                "node_type": node_type,
                "location": place,
                "connection": {"credential": "fleet", "become": True, "port": SSH_PORT},
            }
            answer = self.api.post("/nodes", params={"look": False}, json=declared)
            assert answer.status_code == 201, answer.text
        for node in nodes:
            self.wait_for(node, "healthy", seconds=90)

    def health(self, node: Node) -> dict[str, Any]:
        """Read the verdict on a node."""
        return self.read(f"/nodes/{node.node_id}/health")

    def wait_for(self, node: Node, *healths: str, seconds: float = 60) -> None:
        """Wait for a verdict."""
        self.wait_until(
            lambda: self.health(node)["health"] in healths,
            seconds,
            f"{node.node_id} to be {' or '.join(healths)}",
            node,
        )

    def wait_until(
        self, condition: Callable[[], Any], seconds: float, what: str, node: Node | None = None, pause: float = 0.2
    ) -> Any:
        """Wait for a condition; where it doesn't come, say all that is known."""
        try:
            return wait_until(condition, deadline_seconds=seconds, what=what, interval_seconds=pause)
        except TimeoutError as error:
            known = "" if node is None else f"{self.health(node)}\n{self.recoveries(node)}"
            raise TimeoutError(f"{error}\n{known}\n{self.service.log[-4000:]}") from None

    def recoveries(self, node: Node | None = None, *, dry_runs: bool = False) -> list[dict[str, Any]]:
        """List the climbs, the oldest first."""
        params = {} if node is None else {"node_id": node.node_id}
        items = self.read("/recoveries", **params)["items"]
        return [item for item in reversed(items) if dry_runs or not item["dry_run"]]

    def wait_ended(self, node: Node, count: int = 1, seconds: float = 120) -> list[dict[str, Any]]:
        """Wait until that many climbs of a node have ended; give them all."""

        def ended() -> list[dict[str, Any]] | None:
            found = [item for item in self.recoveries(node) if item["ended_at"] is not None]
            return found if len(found) >= count else None

        found: list[dict[str, Any]] = self.wait_until(ended, seconds, f"{count} ended recoveries", node)
        return found

    def repaired(self, node: Node, broken_at: float, what: str, seconds: float = 150) -> dict[str, Any]:
        """Wait until a climb has helped and the node is well; print how long that took since the fault."""
        end = time.monotonic() + seconds
        found = self.wait_ended(node, seconds=seconds)[-1]
        assert found["state"] == "succeeded", (found, self.job_logs(found))
        self.wait_for(node, "healthy", seconds=max(1.0, end - time.monotonic()))
        took = time.monotonic() - broken_at
        print(f"\n{what}: healthy {took:.1f} s after the fault, by {', '.join(acted(found)) or 'nothing'}", flush=True)  # noqa: T201
        return found

    def events(self, node: Node, kind: str) -> list[dict[str, Any]]:
        """Read the data of a node's events of a type, the oldest first."""
        items = self.read(f"/nodes/{node.node_id}/events", limit=500)["items"]
        return [item["data"] for item in reversed(items) if item["type"] == kind]

    def recover(self, node: Node, *, wait: float = 0, dry_run: bool = False, **body: object) -> httpx.Response:
        """Ask for a repair."""
        params: dict[str, Any] = {"wait": wait, "dry_run": dry_run}
        return self.api.post(f"/nodes/{node.node_id}/recover", params=params, json=body, timeout=wait + 30)

    def set_active(self, node: Node) -> None:
        """Let a node take part again, as an operator does who has looked after it."""
        answer = self.api.put(f"/nodes/{node.node_id}/status", json={"status": "active"})
        assert answer.status_code == 200, answer.text

    def job_log(self, job_id: str) -> str:
        """Read what Ansible printed."""
        return self.api.get(f"/jobs/{job_id}/log").text

    def job_logs(self, recovery: Mapping[str, Any]) -> str:
        """Read what Ansible printed for a climb."""
        return "\n".join(self.job_log(job_id) for step in recovery["steps"] for job_id in step["job_ids"])

    def read(self, path: str, **params: Any) -> dict[str, Any]:
        """Read something of the API."""
        answer = self.api.get(path, params=params)
        assert answer.status_code == 200, answer.text
        shown: dict[str, Any] = answer.json()
        return shown

    @contextmanager
    def stored(self) -> Iterator[Recoveries]:
        """Look at the climbs in the store itself, with the service up or down."""
        settings = load_settings(self.service.variables())
        with contextlib.closing(open_store(settings.storage_url)) as store:
            yield Recoveries(store, settings)


@contextmanager
def repairing(
    fleet: Fleet,
    folder: Path,
    node_types: Mapping[str, Any] = DEMO_TYPES,
    config: Mapping[str, Any] | None = None,
    **environment: str,
) -> Iterator[Repairing]:
    """Run a service that repairs the nodes of a fleet by itself; its state is below *folder*."""
    (folder / "config.json").write_text(json.dumps({**(config or {}), "node_types_file": "node_types.json"}), "utf-8")
    (folder / "node_types.json").write_text(json.dumps({"node_types": node_types}), "utf-8")
    key = str(fleet.nodes[0].private_key)
    service = RunningService(
        folder / "home",
        {
            **QUICK,
            "NODE_MANAGER_CONFIG": str(folder / "config.json"),
            "NODE_MANAGER_SSH__CREDENTIALS": json.dumps({"fleet": {"private_key_file": key, "user": USER}}),
            **environment,
        },
    ).start()
    try:
        with service.client() as api:
            yield Repairing(service, api)
    finally:
        # In order, so that no job of it goes on.
        if service.process is not None and service.process.poll() is None:
            service.stop()


def acted(recovery: Mapping[str, Any]) -> list[str]:
    """List the steps of a climb whose acts were begun."""
    return [step["step"] for step in recovery["steps"] if step["acted_at"] is not None]


@dataclass(frozen=True)
class PowerHook:
    """An operator's command that switches a node off and on: it kills the container and starts it."""

    script: Path
    calls_file: Path

    @property
    def setting(self) -> dict[str, Any]:
        """Give recovery.power of config.json."""
        return {"command": [str(self.script), "{node_id}"], "back_within_seconds": 90}

    @property
    def calls(self) -> list[str]:
        """List the nodes that it was called for."""
        return self.calls_file.read_text("utf-8").split() if self.calls_file.exists() else []


def write_power_hook(fleet: Fleet, folder: Path) -> PowerHook:
    """Write the command for the nodes of a fleet."""
    hook = PowerHook(folder / "power", folder / "power.calls")
    docker = shlex.join([str(fleet.engine.client), "--host", f"unix://{SOCKET}"])
    names = "".join(f"  {node.node_id}) name={node.container} ;;\n" for node in fleet.nodes)
    hook.script.write_text(
        "#!/bin/sh -e\n"
        f'case "$1" in\n{names}  *) echo "unknown node $1" >&2; exit 1 ;;\nesac\n'
        f'echo "$1" >> {shlex.quote(str(hook.calls_file))}\n'
        # One that is paused can't be restarted; one that is dead can't be killed.
        f'{docker} kill "$name" >&2 || true\n{docker} start "$name" >&2\necho "$1 is switched on"\n',
        "utf-8",
    )
    hook.script.chmod(0o755)
    return hook


RELAY = """\
import os, socket, threading

HERE, ENGINE = "/run/docker.sock", "/run/engine.sock"

def pump(source, target):
    try:
        while data := source.recv(65536):
            target.sendall(data)
    except OSError:
        pass
    finally:
        try:
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

def serve(client):
    with client, socket.socket(socket.AF_UNIX) as engine:
        engine.connect(ENGINE)
        back = threading.Thread(target=pump, args=(engine, client), daemon=True)
        back.start()
        pump(client, engine)
        back.join()

if os.path.exists(HERE):
    os.unlink(HERE)
with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(HERE)
    listener.listen(64)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
RELAY_UNIT = """\
[Unit]
Description=The container engine of this node, in front of the one that carries the fleet
[Service]
ExecStart=/usr/bin/python3 /usr/local/lib/engine-relay.py
[Install]
WantedBy=multi-user.target
"""


def put_engine_behind_unit(node: Node) -> None:
    """Give a node that has the engine's socket a docker.service that can die: it passes on to that socket."""
    # What is mounted there stays reachable under another name.
    node.exec(
        "sh", "-ec", "touch /run/engine.sock; mount --bind /run/docker.sock /run/engine.sock; umount /run/docker.sock"
    )
    write_file(node, "/usr/local/lib/engine-relay.py", RELAY)
    write_file(node, "/etc/systemd/system/docker.service", RELAY_UNIT)
    node.exec("systemctl", "daemon-reload")
    node.exec("systemctl", "enable", "--now", "docker.service")


def write_file(node: Node, path: str, content: str) -> None:
    """Write a file on a node."""
    node.exec("sh", "-ec", 'mkdir -p "$(dirname "$1")"; cat > "$1"', "sh", path, text=content)


def write_step(
    directory: Path, name: str, *, act: Sequence[Any], precheck: Sequence[Any] = (), postcheck: Sequence[Any]
) -> None:
    """Write an operator's own step, which is always needed."""
    needed = {
        "name": "It is always needed",
        "ansible.builtin.set_fact": {"node_recover_needed": True, "node_recover_why": f"{name} was asked for"},
    }
    folder = directory / name
    folder.mkdir(parents=True, exist_ok=True)
    for phase, tasks in (("precheck", [*precheck, needed]), ("act", act), ("postcheck", postcheck)):
        # JSON is YAML.
        (folder / f"{phase}.yml").write_text(json.dumps(list(tasks)), "utf-8")


def noting(word: str, *, then: str = "true", changes: bool = True) -> dict[str, Any]:
    """Make a task that adds a word to the trace on the node, and goes on with a command."""
    command = f"echo {shlex.quote(word)} >> {TRACE}; {then}"
    return {
        "name": f"Note {word}",
        "ansible.builtin.command": {"argv": ["sh", "-c", command]},
        "changed_when": changes,
        "become": True,
    }


def traced(node: Node) -> list[str]:
    """Read the trace on a node."""
    return node.exec("sh", "-c", f"cat {TRACE} 2>/dev/null || true").split()


def clear_trace(node: Node) -> None:
    """Begin a new trace."""
    node.exec("rm", "-f", TRACE)


def boot_of(node: Node) -> str:
    """Tell the node's boot: the same as long as its first process lives."""
    return node.engine.run("inspect", "--format", "{{.State.StartedAt}} {{.State.Pid}}", node.container)


def invocation_of(node: Node, service: str = SERVICE) -> str:
    """Tell which start of a unit it is."""
    return node.exec("systemctl", "show", "--property=InvocationID", "--value", service).strip()
