# SPDX-License-Identifier: GPL-3.0-or-later
"""The Docker engine that carries the nodes: found, or started where docker.io is installed and nothing runs it.

Touches the engine's socket, the cache folder and, for big fleets, kernel limits. Knows nothing of nodes or images.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .waiting import wait_until

SOCKET = Path("/var/run/docker.sock")
DOCKERD = Path("/usr/sbin/dockerd")
START_DEADLINE_SECONDS = 60.0
# systemd takes about 5 inotify instances per node, and each container a session keyring. Linux's defaults (128 and
# 200) ended at 23 nodes.
SMALL_FLEET = 20
LIMITS = {
    "fs/inotify/max_user_instances": 8192,
    "kernel/keys/maxkeys": 20_000,
    "kernel/keys/maxbytes": 2_000_000,
}


class FleetError(RuntimeError):
    """The test bed can't do what was asked; the message says what to do about it."""


@dataclass(frozen=True)
class Engine:
    """A Docker engine that answered, and the client to talk to it with."""

    client: Path

    def run(self, *arguments: str, timeout_seconds: float = 60.0, text: str | None = None) -> str:
        """Run one client command and return its output, less the last newline.

        Errors: FleetError with the client's own words if it fails or passes its time.
        """
        done = self.attempt(*arguments, timeout_seconds=timeout_seconds, text=text)
        if done.returncode != 0:
            raise FleetError(f"docker {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.removesuffix("\n")

    def attempt(
        self, *arguments: str, timeout_seconds: float = 60.0, text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run one client command and return how it ended, well or not."""
        try:
            return subprocess.run(
                [str(self.client), "--host", f"unix://{SOCKET}", *arguments],
                input=text or "",
                capture_output=True,
                text=True,
                timeout=timeout_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise FleetError(f"docker {' '.join(arguments)}: no answer within {timeout_seconds:g} s") from None


def cache_directory() -> Path:
    """Name the folder of everything that outlives a checkout: the image's tarball, locks, the engine's log."""
    base = os.environ.get("XDG_CACHE_HOME")
    directory = (Path(base) if base else Path.home() / ".cache") / "node-manager"
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def find_client() -> Path | None:
    """Name the Docker client, Debian's own first: another one may come earlier on PATH."""
    packaged = Path("/usr/bin/docker")
    if packaged.exists():
        return packaged
    found = shutil.which("docker")
    return Path(found) if found else None


def find_engine() -> Engine | None:
    """Return the engine that answers now, if one does."""
    client = find_client()
    if client is None or not SOCKET.exists():
        return None
    engine = Engine(client)
    try:
        answered = engine.attempt("version", "--format", "{{.Server.Version}}", timeout_seconds=10)
    except FleetError:
        return None
    return engine if answered.returncode == 0 else None


def ensure_engine() -> Engine:
    """Return an engine that answers, starting one if need be. It goes on running afterwards.

    Errors: FleetError that names the missing Debian package or the log to read.
    """
    engine = find_engine()
    if engine is not None:
        return engine
    client = find_client()
    if client is None:
        raise FleetError("No Docker client was found. Install the Debian package docker.io.")
    if not DOCKERD.exists():
        raise FleetError(
            f"No Docker engine answers at {SOCKET} and {DOCKERD} is missing. "
            "Install the Debian packages docker.io and iptables."
        )
    if os.geteuid() != 0:
        raise FleetError(f"No Docker engine answers at {SOCKET}. Start one, or run this as root, which starts it.")
    if shutil.which("iptables") is None:
        raise FleetError("dockerd needs iptables. Install the Debian package iptables.")
    log = cache_directory() / "dockerd.log"
    with log.open("ab") as output:
        # --fork leaves no child behind that this process would have to reap.
        subprocess.run(
            ["setsid", "--fork", str(DOCKERD)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            timeout=10,
            check=True,
        )
    try:
        return wait_until(find_engine, deadline_seconds=START_DEADLINE_SECONDS, what=f"dockerd to answer at {SOCKET}")
    except TimeoutError as error:
        raise FleetError(f"{error}. Its log is {log}.") from None


def raise_kernel_limits(count: int) -> None:
    """Make room for *count* nodes where Linux's defaults would end too early.

    Errors: FleetError with the command to give as root.
    """
    if count <= SMALL_FLEET:
        return
    for name, wanted in LIMITS.items():
        setting = Path("/proc/sys") / name
        if not setting.exists() or int(setting.read_text(encoding="ascii")) >= wanted:
            continue
        try:
            setting.write_text(f"{wanted}\n", encoding="ascii")
        except OSError:
            raise FleetError(
                f"{count} nodes need a higher limit. As root: sysctl -w {name.replace('/', '.')}={wanted}"
            ) from None
