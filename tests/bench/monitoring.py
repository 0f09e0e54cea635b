# SPDX-License-Identifier: GPL-3.0-or-later
"""What one look at one node costs the controller and the node, by stream, by Ansible and by pyinfra, on the same real nodes.

The nodes are containers with their own systemd and sshd (tests/fleet), reached at their own addresses. Everybody reads the
same things: CPU, load, pressure, memory, mounts and disks, network counters. All ways are measured in one run, one after the
other, as CPU (user and system) and never as time:

- controller: the process and all its children, Ansible's ssh masters included; of the running service, what it uses above
  an idle service without nodes.
- node: what the containers' cgroups count (sshd, sudo and systemd's part included), less what they use when nobody looks.
  The application of the test nodes is stopped: it polls twice a second, which takes as much as the stream does, and more of
  it while others run.

"stream" is the service with the default probe; its signs of life and its store are in it. "gather.yml" is the playbook of
this collection, which writes into a store too. "Ansible, command" and "Ansible, raw" are as lean as Ansible gets: one task
without facts, pipelining, ControlPersist with connections that are open already, 20 forks; raw has no module, so that the
node only runs cat and df; what they bring back nobody reads or stores. "10 looks a run" spreads Ansible's start over ten
tasks of one play. pyinfra is installed into a temporary environment from the package index.

``python tests/bench/monitoring.py [--nodes N] [--window SECONDS] [--interval SECONDS] [--rounds N]``
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ansible_runs import BIN, Controller, make_controller
from fleet.conftest import THIRD_OCTETS
from fleet.engine import FleetError, cache_directory, ensure_engine
from fleet.image import USER, ensure_image
from fleet.listing import write_listing
from fleet.nodes import Fleet, ssh_options
from node_manager.declarations import NodeDeclaration
from node_manager.node_registry import NodeRegistry
from node_manager.settings import load_settings
from node_manager.store import Store, open_store, tables
from process_load import Load, container_cpu_seconds, processes_with
from running_service import RunningService

FORKS = 20
SETTLE_SECONDS = 20.0
STREAM_SECONDS = 120.0
RUN_SECONDS = 600.0
# How much later than it was seen a sample of a small fleet may be in the store.
STORED_WITHIN_SECONDS = 5.0
FILES = (
    "/proc/uptime /proc/stat /proc/loadavg /proc/meminfo /proc/vmstat /proc/net/dev /proc/self/mountinfo"
    " /proc/pressure/cpu /proc/pressure/memory /proc/pressure/io"
)
PYINFRA_FACTS = """\
from pyinfra import host
from pyinfra.facts import hardware, server

for fact in (
    server.LoadAverage, hardware.Cpus, hardware.Memory, hardware.BlockDevices, hardware.NetworkDevices, server.Mounts,
):
    host.get_fact(fact)
"""


@dataclass(frozen=True)
class Cost:
    """What a way of looking cost."""

    name: str
    looks: int
    controller_seconds: float
    node_seconds: float

    def line(self, stream: Cost) -> str:
        """Give the row of the table."""
        controller, node = self.controller_seconds / self.looks * 1000, self.node_seconds / self.looks * 1000
        base, node_base = stream.controller_seconds / stream.looks * 1000, stream.node_seconds / stream.looks * 1000
        return (
            f"{self.name:30} {self.looks:6} {controller:11.2f} {controller / base:8.0f}x"
            f" {node:11.2f} {node / node_base:8.0f}x"
        )


class Nodes:
    """The fleet under measurement."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.nodes = fleet.nodes
        self.addresses = [node.bridge_address for node in self.nodes]
        self.host_keys = [node.host_key() for node in self.nodes]
        identifiers = [fleet.engine.run("inspect", "--format", "{{.Id}}", node.container) for node in self.nodes]
        self._groups = [(node.process_id, name) for node, name in zip(self.nodes, identifiers, strict=True)]
        # What all nodes together use in a second when nobody looks.
        self.idle = 0.0

    @property
    def key(self) -> Path:
        """Name the key that lets in."""
        return self.nodes[0].private_key

    def cpu_seconds(self) -> float:
        """Read what all nodes have used so far."""
        return sum(container_cpu_seconds(process_id, name) for process_id, name in self._groups)

    def declarations(self) -> Iterator[NodeDeclaration]:
        """Declare the nodes at their own addresses."""
        for node, address, key in zip(self.nodes, self.addresses, self.host_keys, strict=True):
            connection = {"credential": "fleet", "become": True, "port": 22}
            declared = {"node_id": node.node_id, "address": address, "connection": connection, "host_keys": [key]}
            yield NodeDeclaration.model_validate(declared)


def main() -> None:
    """Measure all ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--nodes", type=int, default=40)
    parser.add_argument("--window", type=float, default=120, help="seconds of streaming, and of idleness before")
    parser.add_argument("--interval", type=float, default=5, help="seconds between two samples of a streaming node")
    parser.add_argument("--rounds", type=int, default=3, help="measured runs of each other way")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="monitoring-", ignore_cleanup_errors=True))
        )
        nodes = Nodes(stack.enter_context(running_fleet(arguments.nodes, folder / "fleet")))
        for node in nodes.nodes:
            node.stop_service()
        print(f"{len(nodes.nodes)} nodes; load of the machine at the start: {os.getloadavg()[0]:.1f}", flush=True)
        time.sleep(SETTLE_SECONDS)
        stream = measure_stream(nodes, folder, arguments)
        print(f"{'':30} {'looks':>6} {'controller':>11} {'ratio':>9} {'node ms':>11} {'ratio':>9}")
        print(stream.line(stream), flush=True)
        for cost in measure_others(nodes, folder, arguments.rounds):
            print(cost.line(stream), f"  load {os.getloadavg()[0]:.1f}", flush=True)


@contextmanager
def running_fleet(count: int, folder: Path) -> Iterator[Fleet]:
    """Run a fleet of our own, and remove it at the end."""
    with own_octet() as octet:
        engine = ensure_engine()
        image = ensure_image(engine)
        fleet = Fleet(engine, name=f"bench-{octet}", address_prefix=f"127.0.{octet}", state_directory=folder)
        # What a killed run may have left.
        fleet.down()
        try:
            fleet.up(count, image=image)
            yield fleet
        finally:
            fleet.down()


@contextmanager
def own_octet() -> Iterator[int]:
    """Hold a range of addresses that no test session on this machine uses now."""
    for octet in reversed(THIRD_OCTETS):
        with (cache_directory() / f"test-fleet-{octet}.lock").open("a", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield octet
            return
    raise FleetError("too many test fleets run on this machine already")


def measure_stream(nodes: Nodes, folder: Path, arguments: argparse.Namespace) -> Cost:
    """Let the service watch the nodes for a window, after one of the same length in which it has none."""
    service = RunningService(folder / "home", service_settings(nodes, folder, arguments.interval))
    settings = load_settings(service.variables())
    service.start()
    try:
        assert service.process is not None
        process_id = service.process.pid
        with closing(open_store(settings.storage_url)) as store:
            time.sleep(SETTLE_SECONDS)
            before, before_nodes, begun = used_so_far(process_id, nodes)
            time.sleep(arguments.window)
            after, after_nodes, ended = used_so_far(process_id, nodes)
            idle_seconds = (after - before) / (ended - begun)
            nodes.idle = (after_nodes - before_nodes) / (ended - begun)
            registry = NodeRegistry(store, settings)
            for declaration in nodes.declarations():
                registry.register(declaration)
            wait_for_samples(store, len(nodes.nodes), service)
            # The first checks, and the second samples, which come later than an interval.
            time.sleep(2 * arguments.interval + SETTLE_SECONDS)
            since, before, before_nodes, begun = datetime.now(UTC), *used_so_far(process_id, nodes)
            samples = follow_samples(store, arguments.window)
            until, after, after_nodes, ended = datetime.now(UTC), *used_so_far(process_id, nodes)
            used, used_nodes, took = after - before, after_nodes - before_nodes, ended - begun
            samples |= follow_samples(store, STORED_WITHIN_SECONDS)
            looks = sum(since <= at < until for _, at in samples)
            print(
                f"idle: service {idle_seconds * 1000:.1f} ms/s, each node {nodes.idle / len(nodes.nodes) * 1000:.2f} ms/s;"
                f" streaming at {arguments.interval:g} s: {used / took * 1000:.1f} ms/s and"
                f" {used_nodes / took / len(nodes.nodes) * 1000:.2f} ms/s"
            )
            return Cost("stream", looks, used - idle_seconds * took, used_nodes - nodes.idle * took)
    finally:
        service.kill()


def service_settings(nodes: Nodes, folder: Path, interval: float) -> dict[str, str]:
    """Write the service's configuration; give its environment."""
    (folder / "config.json").write_text('{"node_types_file": "node_types.json"}', "utf-8")
    (folder / "node_types.json").write_text('{"node_types": {"demo": {"description": "A test node"}}}', "utf-8")
    return {
        "NODE_MANAGER_CONFIG": str(folder / "config.json"),
        "NODE_MANAGER_SSH__CREDENTIALS": json.dumps({"fleet": {"private_key_file": str(nodes.key), "user": USER}}),
        "NODE_MANAGER_MONITORING__SCHEDULED": "true",
        "NODE_MANAGER_MONITORING__SAMPLE_INTERVAL_SECONDS": str(interval),
        "NODE_MANAGER_MONITORING__GATHER_INTERVAL_SECONDS": "86400",
    }


def wait_for_samples(store: Store, count: int, service: RunningService) -> None:
    """Wait until all nodes have told something.

    Errors: TimeoutError with the service's words.
    """
    deadline = time.monotonic() + STREAM_SECONDS
    while time.monotonic() < deadline:
        if len(newest_samples(store)) == count:
            return
        time.sleep(0.5)
    raise TimeoutError(f"not all nodes were heard in {STREAM_SECONDS:g} s:\n{service.log[-3000:]}")


def used_so_far(process_id: int, nodes: Nodes) -> tuple[float, float, float]:
    """Read what the service and all nodes have used, in seconds of CPU, and the time."""
    return Load.of(process_id).cpu_seconds, nodes.cpu_seconds(), time.monotonic()


def follow_samples(store: Store, seconds: float) -> set[tuple[str, datetime]]:
    """Collect the samples that get into the store in a time, by node and when they were seen."""
    end = time.monotonic() + seconds
    seen = set(newest_samples(store).items())
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(2.0, left))
        seen.update(newest_samples(store).items())
    return seen


def newest_samples(store: Store) -> dict[str, datetime]:
    """Read when each node's newest sample was seen."""
    samples = tables.node_samples.c
    with store.read() as connection:
        rows = connection.execute(sa.select(samples.node_id, samples.observed_at))
        return {row.node_id: row.observed_at for row in rows}


def measure_others(nodes: Nodes, folder: Path, rounds: int) -> Iterator[Cost]:
    """Measure the playbook, lean Ansible and pyinfra."""
    credentials = json.dumps({"fleet": {"private_key_file": str(nodes.key), "user": USER}})
    controller = make_controller(folder / "registry", NODE_MANAGER_SSH__CREDENTIALS=credentials)
    with controller.store() as store:
        registry = NodeRegistry(store, controller.settings)
        for declaration in nodes.declarations():
            registry.register(declaration)
    with masters_of(controller):
        yield measure_runs("gather.yml", nodes, rounds, 1, lambda: playbook(controller, "playbooks/gather.yml"))
    lean = make_lean(nodes, folder)
    look = f"cat {FILES}; df -kP"
    for name, module, times in (
        ("Ansible, command", "ansible.builtin.shell", 1),
        ("Ansible, raw", "ansible.builtin.raw", 1),
        ("Ansible, raw, 10 looks a run", "ansible.builtin.raw", 10),
    ):
        tasks = [{"name": f"Look {number}", module: look, "changed_when": False} for number in range(times)]
        play = [{"name": "Look", "hosts": "all", "gather_facts": False, "strategy": "free", "tasks": tasks}]
        path = folder / f"look-{module}-{times}.yml"
        path.write_text(json.dumps(play), "utf-8")
        with masters_of(lean):
            yield measure_runs(name, nodes, rounds, times, lambda path=path: playbook(lean, str(path)))  # type: ignore[misc]
    program = install_pyinfra(folder)
    if program is not None:
        yield measure_pyinfra(program, nodes, folder, rounds)


def make_lean(nodes: Nodes, folder: Path) -> Controller:
    """Set up Ansible with nothing but what makes it fast."""
    directory = folder / "lean"
    directory.mkdir()
    told = zip(nodes.nodes, nodes.addresses, nodes.host_keys, strict=True)
    rows = [(node.node_id, address, 22, key) for node, address, key in told]
    write_listing(directory, rows, ssh_options(directory / "known_hosts"))
    inventory = (directory / "hosts.yml").read_text("utf-8")
    (directory / "hosts.yml").write_text(inventory.replace(str(directory / "id_ed25519"), str(nodes.key)), "utf-8")
    (directory / "ansible.cfg").write_text(
        f"[defaults]\ninventory = {directory}/hosts.yml\nforks = {FORKS}\ngathering = explicit\n"
        "[connection]\npipelining = True\n"
        "[ssh_connection]\nssh_args = -o ControlMaster=auto -o ControlPersist=300s\n",
        "utf-8",
    )
    return make_controller(folder / "unused", ANSIBLE_CONFIG=str(directory / "ansible.cfg"))


@contextmanager
def masters_of(controller: Controller) -> Iterator[None]:
    """End the ssh masters of a controller afterwards."""
    try:
        yield
    finally:
        for process_id in masters(controller):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGTERM)


def masters(controller: Controller) -> list[int]:
    """List the ssh processes that hold a controller's connections."""
    return processes_with(f"ssh: {controller.environment['ANSIBLE_SSH_CONTROL_PATH_DIR']}/")


def playbook(controller: Controller, path: str) -> float:
    """Run a playbook; give the CPU that its ssh masters used meanwhile, which are nobody's children."""
    before = sum(Load.of(process_id).cpu_seconds for process_id in masters(controller))
    arguments = ("--forks", str(FORKS)) if path.startswith("playbooks/") else ()
    run(
        [str(BIN / "ansible-playbook"), path, *arguments],
        {**controller.environment, "ANSIBLE_STDOUT_CALLBACK": "default"},
    )
    return sum(Load.of(process_id).cpu_seconds for process_id in masters(controller)) - before


def measure_runs(name: str, nodes: Nodes, rounds: int, looks: int, once: Callable[[], float]) -> Cost:
    """Run something several times, after once that isn't counted; it gives what it used beside its children."""
    once()
    before, before_nodes, begun = children_seconds(), nodes.cpu_seconds(), time.monotonic()
    more = sum(once() for _ in range(rounds))
    took = time.monotonic() - begun
    controller = children_seconds() - before + more
    used_nodes = nodes.cpu_seconds() - before_nodes - nodes.idle * took
    return Cost(name, rounds * looks * len(nodes.nodes), controller, used_nodes)


def children_seconds() -> float:
    """Read what ended children have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def install_pyinfra(folder: Path) -> Path | None:
    """Install pyinfra into an environment of its own; None, and a line that says so, where it can't be had."""
    place = folder / "pyinfra"
    venv.create(place, with_pip=True)
    command = [str(place / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", "pyinfra"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=RUN_SECONDS, check=False
    )
    if done.returncode != 0:
        print(f"pyinfra is left out, it can't be installed: {done.stderr.strip()[-200:]}")
        return None
    return place / "bin" / "pyinfra"


def measure_pyinfra(program: Path, nodes: Nodes, folder: Path, rounds: int) -> Cost:
    """Gather facts with pyinfra, all nodes at once."""
    directory = folder / "lean"
    hosts = [
        (
            address,
            {
                "ssh_user": USER,
                "ssh_key": str(nodes.key),
                "ssh_known_hosts_file": str(directory / "known_hosts"),
                "ssh_strict_host_key_checking": "yes",
            },
        )
        for address in nodes.addresses
    ]
    (folder / "inventory.py").write_text(f"nodes = {hosts!r}\n", "utf-8")
    (folder / "look.py").write_text(PYINFRA_FACTS, "utf-8")
    command = [str(program), "-y", str(folder / "inventory.py"), str(folder / "look.py")]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}

    def once() -> float:
        run(command, environment)
        return 0.0

    return measure_runs("pyinfra", nodes, rounds, 1, once)


def run(command: Sequence[str], environment: dict[str, str]) -> None:
    """Run a program in the checkout.

    Errors: RuntimeError with its last words.
    """
    done = subprocess.run(
        command,
        cwd=Path(__file__).resolve().parents[2],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=RUN_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}: {done.stdout[-1500:]}\n{done.stderr[-1500:]}")


if __name__ == "__main__":
    main()
