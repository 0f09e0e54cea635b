# SPDX-License-Identifier: GPL-3.0-or-later
"""The nodes themselves: start them, break them in each way the product must notice, put them right, remove them.

A node is one container with its own systemd, sshd, host key and small data disk. It answers at 127.0.x.N, through
Docker's proxy, and at a bridge address of its own without one. The proxy accepts connections for a node that is silent;
where a test needs a real cut or another node's view, it takes ``bridge_address``.
"""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .engine import Engine, FleetError, cache_directory, raise_kernel_limits
from .image import DATA_DIRECTORY, HOST_KEY, SERVICE, USER, locked
from .listing import write_listing
from .waiting import wait_until

LABEL = "node-manager.fleet"
DATA_DISK_BYTES = 16 * 1024**2
MOUNTS = Path("/run/node-manager-fleet")
START_DEADLINE_SECONDS = 60.0
# Starting is mostly CPU in the nodes: more at once only makes each one later.
STARTS_AT_ONCE = 4
# The last address stays free, so that a port can be tried there.
MOST_NODES = 253


@dataclass(frozen=True)
class Node:
    """One test node and everything that can go wrong with it."""

    engine: Engine
    node_id: str
    container: str
    network: str
    address: str
    port: int
    state_directory: Path
    user: str = USER

    @property
    def private_key(self) -> Path:
        """Name the key that the node lets in."""
        return self.state_directory / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        """Name the file with the host keys as they were when the nodes started."""
        return self.state_directory / "known_hosts"

    @property
    def bridge_address(self) -> str:
        """Read the address at which other nodes and this machine reach it without a proxy; empty when disconnected."""
        return self._inspect(
            f'{{{{with index .NetworkSettings.Networks "{self.network}"}}}}{{{{.IPAddress}}}}{{{{end}}}}'
        )

    @property
    def state(self) -> str:
        """Read the container's state: running, paused, exited."""
        return self._inspect("{{.State.Status}}")

    @property
    def process_id(self) -> int:
        """Read the id that the node's systemd has on this machine."""
        return int(self._inspect("{{.State.Pid}}"))

    def host_key(self) -> str:
        """Read the node's public host key, type and key, as it is now."""
        return self.exec("cat", f"{HOST_KEY}.pub").strip()

    def exec(self, *command: str, timeout_seconds: float = 30.0, text: str | None = None) -> str:
        """Run a command on the node as root, not over SSH, and return its output.

        Errors: FleetError if it fails.
        """
        return self.engine.run("exec", "-i", self.container, *command, timeout_seconds=timeout_seconds, text=text)

    def ssh_command(self, *command: str, options: tuple[str, ...] = ()) -> list[str]:
        """Build the OpenSSH call for *command* with the pinned host key; ssh's *options* come first, so they win."""
        return [
            "ssh", "-F", "none",
            *options,
            "-i", str(self.private_key), "-p", str(self.port),
            *(part for option in ssh_options(self.known_hosts) for part in ("-o", option)),
            f"{self.user}@{self.address}", "--", shlex.join(command),
        ]  # fmt: skip

    def ssh(
        self, *command: str, options: tuple[str, ...] = (), timeout_seconds: float = 30.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command over SSH as the node's user and return how it ended; ssh's own failures are code 255."""
        return subprocess.run(
            self.ssh_command(*command, options=options),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )

    def answers(self, timeout_seconds: float = 2.0) -> bool:
        """Say whether an SSH server introduces itself at the node's address."""
        try:
            with socket.create_connection((self.address, self.port), timeout=timeout_seconds) as connection:
                return connection.recv(4) == b"SSH-"
        except OSError:
            return False

    def wait_ready(self, deadline_seconds: float = START_DEADLINE_SECONDS) -> None:
        """Wait until systemd has started everything, failed units or not, and SSH answers.

        Errors: FleetError with the node's own words.
        """
        try:
            wait_until(self._booted, deadline_seconds=deadline_seconds, what=f"systemd on {self.node_id}")
            wait_until(self.answers, deadline_seconds=deadline_seconds, what=f"sshd at {self.address}:{self.port}")
        except TimeoutError as error:
            log = self.engine.attempt("exec", self.container, "journalctl", "--no-pager", "--lines=20").stdout
            raise FleetError(f"{error}\n{log}") from None

    def authorize(self, public_key: str) -> None:
        """Let the owner of *public_key* in, and nobody else."""
        script = f"umask 077; cat > ~{USER}/.ssh/authorized_keys; chown {USER}: ~{USER}/.ssh/authorized_keys"
        self.exec("sh", "-c", script, text=public_key)

    def stop(self) -> None:
        """Shut the node down in order: systemd stops its units first."""
        self.engine.run("stop", "--time", "20", self.container)

    def kill(self) -> None:
        """Crash the node: everything on it dies at once, and its address refuses connections."""
        self.engine.run("kill", self.container)

    def start(self) -> None:
        """Start a stopped or killed node and wait until it's ready; its host key and files are the same."""
        self.engine.run("start", self.container)
        self.wait_ready()

    def pause(self) -> None:
        """Freeze the node: it accepts connections, and never says a word."""
        self.engine.run("pause", self.container)

    def unpause(self) -> None:
        """Thaw a frozen node."""
        self.engine.run("unpause", self.container)

    def disconnect(self) -> None:
        """Unplug the node: its loopback address refuses connections, its bridge address is gone."""
        self.engine.run("network", "disconnect", self.network, self.container)

    def connect(self) -> None:
        """Plug the node in again and wait until it's ready. Its bridge address may be another one."""
        self.engine.run("network", "connect", self.network, self.container)
        self.wait_ready()

    def cut(self, *, management_only: bool = False) -> None:
        """Drop every packet, silently: open connections hang. Needs root.

        With *management_only* this machine loses the node, and the other nodes still see it.
        """
        if management_only:
            gateway = self._inspect(
                f'{{{{with index .NetworkSettings.Networks "{self.network}"}}}}{{{{.Gateway}}}}{{{{end}}}}'
            )
            self._filter("-A", "INPUT", "-s", gateway, "-j", "DROP")
            self._filter("-A", "OUTPUT", "-d", gateway, "-j", "DROP")
        else:
            self.lose_packets(100)

    def lose_packets(self, percent: float) -> None:
        """Drop this share of packets, by chance, in each direction. Needs root."""
        chance = ("-m", "statistic", "--mode", "random", "--probability", f"{percent / 100:.4f}")
        self._filter("-A", "INPUT", "!", "-i", "lo", *chance, "-j", "DROP")
        self._filter("-A", "OUTPUT", "!", "-o", "lo", *chance, "-j", "DROP")

    def mend(self) -> None:
        """Undo `cut` and `lose_packets`."""
        self._filter("-F")

    def stop_service(self, service: str = SERVICE) -> None:
        """Stop a unit in order: it becomes inactive."""
        self.exec("systemctl", "stop", service)

    def crash_service(self, service: str = SERVICE) -> None:
        """Kill a unit's processes: it becomes failed."""
        self.exec("systemctl", "kill", "--signal=KILL", service)
        wait_until(
            lambda: self.service_state(service) == "failed", deadline_seconds=10, what=f"{service} to have failed"
        )

    def start_service(self, service: str = SERVICE) -> None:
        """Start a unit, whatever became of it before."""
        self.exec("systemctl", "start", service)

    def service_state(self, service: str = SERVICE) -> str:
        """Read a unit's state: active, inactive, failed."""
        return self.exec("systemctl", "show", "--property=ActiveState", "--value", service).strip()

    def fill_disk(self, percent: int = 100) -> None:
        """Fill the small disk at /var/data; nothing else lives on it."""
        size = int(self.exec("df", "--block-size=1", "--output=size", DATA_DIRECTORY).split()[-1])
        # Past the end, head gives up with "No space left on device", and exactly that is wanted.
        amount = 2 * size if percent >= 100 else size * percent // 100
        self.exec("sh", "-c", f"head -c {amount} /dev/zero > {DATA_DIRECTORY}/filler || true")

    def empty_disk(self) -> None:
        """Undo `fill_disk`."""
        self.exec("rm", "-f", f"{DATA_DIRECTORY}/filler")

    def disk_used_percent(self) -> int:
        """Read how full /var/data is, as df rounds it."""
        return int(self.exec("df", "--output=pcent", DATA_DIRECTORY).split()[-1].rstrip("%"))

    def remove_python(self) -> None:
        """Take every Python away under its own name; what runs goes on."""
        self.exec("sh", "-c", 'for name in /usr/bin/python3*; do mv "$name" "/root/${name##*/}"; done')

    def restore_python(self) -> None:
        """Undo `remove_python`."""
        self.exec("sh", "-c", "mv /root/python3* /usr/bin/")

    def regenerate_host_key(self) -> None:
        """Give the node another identity, as after a reinstallation. The known_hosts file keeps the old one."""
        self.exec("sh", "-c", f"rm -f {HOST_KEY} {HOST_KEY}.pub; systemctl restart node-host-key.service ssh.service")
        self.wait_ready()

    def _booted(self) -> bool:
        """Say whether the start is over; until D-Bus runs, systemctl fails at once."""
        done = self.engine.attempt("exec", self.container, "systemctl", "is-system-running", "--wait")
        return done.stdout.strip() in {"running", "degraded"}

    def _inspect(self, template: str) -> str:
        return self.engine.run("inspect", "--format", template, self.container).strip()

    def _filter(self, *rule: str) -> None:
        """Change the packet filter in the node's own network."""
        command = ["nsenter", "--target", str(self.process_id), "--net", "iptables", "-w", *rule]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode != 0:
            raise FleetError(f"{shlex.join(command)}: {done.stderr.strip()}")


class Fleet:
    """A named set of nodes: node-1 at PREFIX.1, node-2 at PREFIX.2, and so on.

    Fleets of different names, prefixes and state directories don't see each other.
    """

    def __init__(self, engine: Engine, *, name: str, address_prefix: str, state_directory: Path) -> None:
        self.engine = engine
        self.name = name
        self.address_prefix = address_prefix
        self.state_directory = state_directory.absolute()
        self.network = f"node-manager-{name}"

    @property
    def inventory(self) -> Path:
        """Name the Ansible inventory of the fleet."""
        return self.state_directory / "hosts.yml"

    @property
    def nodes(self) -> list[Node]:
        """List the nodes there are, running or not, in the order of their numbers."""
        labels = ("node-manager.node", "node-manager.address", "node-manager.port")
        template = "\t".join(["{{.Names}}", *(f'{{{{.Label "{label}"}}}}' for label in labels)])
        listed = self.engine.run("ps", "--all", "--filter", f"label={LABEL}={self.name}", "--format", template)
        rows = (line.split("\t") for line in listed.splitlines())
        nodes = [self._node(node_id, address, int(port), container) for container, node_id, address, port in rows]
        return sorted(nodes, key=lambda node: int(node.node_id.rpartition("-")[2]))

    def up(self, count: int, *, image: str, docker_socket: bool = False) -> list[Node]:
        """Start what is missing of nodes 1 to *count*, wait until all are ready, and write the inventories.

        *docker_socket* mounts the engine's socket into new node-1, which then has real containers to report.
        Errors: FleetError; nodes that did start stay, for `down` or a look.
        """
        if not 1 <= count <= MOST_NODES:
            raise FleetError(f"A fleet has 1 to {MOST_NODES} nodes, not {count}.")
        raise_kernel_limits(count)
        with self._lock():
            self._prepare()
            present = {node.node_id: node for node in self.nodes}
            port = next((node.port for node in present.values()), None) or _free_port(self.address_prefix)
            wanted = [f"node-{number}" for number in range(1, count + 1)]

            def ready(node_id: str) -> None:
                node = present.get(node_id)
                if node is None:
                    self._create(node_id, port, image, docker_socket=docker_socket and node_id == "node-1")
                else:
                    self._revive(node)

            with ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
                list(pool.map(ready, wanted))
            return self._write_files()

    def replace(self, node: Node, *, image: str) -> Node:
        """Remove a node and start a new one in its place: other host key and machine id, no trace of earlier faults."""
        with self._lock():
            self._remove(node)
            fresh = self._create(node.node_id, node.port, image, docker_socket=False)
            self._write_files()
            return fresh

    def down(self) -> int:
        """Remove every node of this name and all that belongs to it; return how many there were."""
        with self._lock():
            nodes = self.nodes
            with ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
                list(pool.map(self._remove, nodes))
            if self.engine.attempt("network", "inspect", self.network).returncode == 0:
                self.engine.run("network", "rm", self.network)
            for leftover in sorted((MOUNTS / self.name).glob("*")):
                _unmount(leftover)
            with contextlib.suppress(OSError):
                (MOUNTS / self.name).rmdir()
                MOUNTS.rmdir()
            for file in ("hosts.yml", "nodes.yml", "known_hosts"):
                (self.state_directory / file).unlink(missing_ok=True)
            return len(nodes)

    def _prepare(self) -> None:
        """Make the state directory, the key and the network, where missing."""
        self.state_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.state_directory.chmod(0o700)
        key = self.state_directory / "id_ed25519"
        if not key.exists():
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"test fleet {self.name}", "-f", str(key)],
                stdin=subprocess.DEVNULL,
                timeout=30,
                check=True,
            )
        if self.engine.attempt("network", "inspect", self.network).returncode != 0:
            self.engine.run("network", "create", self.network)

    def _create(self, node_id: str, port: int, image: str, *, docker_socket: bool) -> Node:
        """Start a new node and wait until it's ready."""
        address = f"{self.address_prefix}.{node_id.rpartition('-')[2]}"
        node = self._node(node_id, address, port, f"node-manager-{self.name}-{node_id}")
        disk = self._mount_disk(node_id)
        data = (
            ("--mount", f"type=bind,source={disk},target={DATA_DIRECTORY}")
            if disk
            else ("--tmpfs", f"{DATA_DIRECTORY}:size={DATA_DISK_BYTES}")
        )
        labels = {
            LABEL: self.name,
            "node-manager.node": node_id,
            "node-manager.address": address,
            "node-manager.port": str(port),
        }
        # fmt: off
        self.engine.run(
            "run", "--detach", "--name", node.container, "--hostname", node_id, "--network", self.network,
            *(part for key, value in labels.items() for part in ("--label", f"{key}={value}")),
            # What systemd needs to run as a container's first process without --privileged.
            "--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined",
            "--cgroupns", "private", "--stop-signal", "SIGRTMIN+3", "--tmpfs", "/run", "--tmpfs", "/tmp",
            *data,
            *(("--volume", "/var/run/docker.sock:/run/docker.sock") if docker_socket else ()),
            "--publish", f"{address}:{port}:22",
            image,
        )
        # fmt: on
        self._revive(node)
        return node

    def _revive(self, node: Node) -> None:
        """Get a node that exists into its ready state, with this fleet's key."""
        state = node.state
        if state == "paused":
            node.unpause()
        elif state != "running":
            self.engine.run("start", node.container)
        node.authorize((self.state_directory / "id_ed25519.pub").read_text(encoding="ascii"))
        node.wait_ready()

    def _remove(self, node: Node) -> None:
        self.engine.run("rm", "--force", "--volumes", node.container)
        _unmount(MOUNTS / self.name / node.node_id)

    def _mount_disk(self, node_id: str) -> Path | None:
        """Make the node a small ext4 of its own; None without the right to, where a tmpfs has to do."""
        place = MOUNTS / self.name / node_id
        backing = self.state_directory / f"{node_id}.img"
        try:
            place.mkdir(parents=True, exist_ok=True)
            backing.unlink(missing_ok=True)
            with backing.open("wb") as file:
                file.truncate(DATA_DISK_BYTES)
            for command in (
                # No blocks kept for root: full is 100 %.
                ["/sbin/mkfs.ext4", "-q", "-m", "0", str(backing)],
                ["mount", "-o", "loop", str(backing), str(place)],
            ):
                subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        finally:
            # The loop device holds the file by itself, and lets go of it when unmounted.
            backing.unlink(missing_ok=True)
        return place

    def _write_files(self) -> list[Node]:
        """Write known_hosts, the Ansible inventory and the list for the registry."""
        nodes = self.nodes
        with ThreadPoolExecutor(STARTS_AT_ONCE) as pool:
            keys = list(pool.map(lambda node: node.host_key() if node.state == "running" else "", nodes))
        rows = [(node.node_id, node.address, node.port, key) for node, key in zip(nodes, keys, strict=True)]
        write_listing(self.state_directory, rows, ssh_options(self.state_directory / "known_hosts"))
        return nodes

    def _node(self, node_id: str, address: str, port: int, container: str) -> Node:
        return Node(self.engine, node_id, container, self.network, address, port, self.state_directory)

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        """Keep two processes from changing the same fleet at once."""
        return locked(cache_directory() / f"fleet-{self.name}.lock")


def ssh_options(known_hosts: Path) -> list[str]:
    """List OpenSSH's options for a pinned host key, no questions, and a dead connection noticed within seconds."""
    return [
        f"UserKnownHostsFile={known_hosts}",
        "GlobalKnownHostsFile=none",
        "StrictHostKeyChecking=yes",
        "IdentitiesOnly=yes",
        "BatchMode=yes",
        "ConnectTimeout=5",
        "ServerAliveInterval=2",
        "ServerAliveCountMax=2",
    ]


def _free_port(address_prefix: str) -> int:
    """Take port 22, or 2222 where this machine's own sshd holds 22 on all addresses."""
    for port in (22, 2222):
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((f"{address_prefix}.254", port))
                listener.listen()
            except OSError:
                continue
            return port
    raise FleetError(f"Neither port 22 nor 2222 is free on {address_prefix}.x.")


def _unmount(place: Path) -> None:
    """Take a node's data disk away, if it has one."""
    subprocess.run(["umount", str(place)], stdin=subprocess.DEVNULL, capture_output=True, timeout=30, check=False)
    with contextlib.suppress(OSError):
        place.rmdir()
