# SPDX-License-Identifier: GPL-3.0-or-later
"""The real parts that tests need and machines may lack: a missing one skips the test, with the reason.

Set ``NODE_MANAGER_REQUIRE_ALL=1`` (continuous integration does) to turn every such skip into a failure.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import pytest

REQUIRE_ALL = "NODE_MANAGER_REQUIRE_ALL"


def require(part: str, reason: str) -> None:
    """Go on if this machine has *part*, a key of `PARTS`; else skip or fail with *reason* and what to install."""
    missing = PARTS[part]()
    if missing is not None:
        skip_or_fail(f"{reason}: {missing}")


def skip_or_fail(reason: str) -> NoReturn:
    """Skip the test, or fail it where every part is required: for a part that is there and doesn't work."""
    if os.environ.get(REQUIRE_ALL) == "1":
        pytest.fail(f"{reason} ({REQUIRE_ALL}=1 forbids skipping)", pytrace=False)
    pytest.skip(reason)


def postgresql_binaries() -> Path | None:
    """Find the folder of initdb and pg_ctl, the newest version first."""
    packaged = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]), reverse=True
    )
    found = packaged[0] if packaged else shutil.which("initdb")
    return Path(found).parent if found else None


def _missing_program(program: str, package: str) -> Callable[[], str | None]:
    """Make a detector for a program on PATH or among the administrator's tools."""

    def detect() -> str | None:
        if shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"):
            return None
        return f"{program} was not found, install the Debian package {package}"

    return detect


def _missing_root() -> str | None:
    return None if os.geteuid() == 0 else "it needs root"


def _missing_postgresql() -> str | None:
    if postgresql_binaries() is None:
        return "initdb was not found, install the Debian package postgresql"
    if os.geteuid() == 0 and shutil.which("runuser") is None:
        return "PostgreSQL refuses to run as root and runuser was not found, install the Debian package util-linux"
    return None


def _missing_docker() -> str | None:
    """Ask for an engine's socket that we may use, or for all it takes to start an engine."""
    if not Path("/usr/bin/docker").exists() and shutil.which("docker") is None:
        return "no Docker client was found, install the Debian package docker.io"
    if os.access("/var/run/docker.sock", os.R_OK | os.W_OK):
        return None
    return _missing_program("dockerd", "docker.io")() or _missing_program("iptables", "iptables")() or _missing_root()


def _missing_systemd() -> str | None:
    return None if Path("/run/systemd/system").is_dir() else "this machine's first process isn't systemd"


PARTS: Mapping[str, Callable[[], str | None]] = {
    "debootstrap": lambda: _missing_program("debootstrap", "debootstrap")() or _missing_root(),
    "docker": _missing_docker,
    "kafka": lambda: _missing_program("mvn", "maven")() or _missing_program("java", "openjdk-17-jre-headless")(),
    "iptables": lambda: _missing_program("iptables", "iptables")() or _missing_root(),
    "postgresql": _missing_postgresql,
    "prometheus": _missing_program("prometheus", "prometheus"),
    "root": _missing_root,
    "ssh": _missing_program("ssh", "openssh-client"),
    "sshd": _missing_program("sshd", "openssh-server"),
    "systemd": _missing_systemd,
}
