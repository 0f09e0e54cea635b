# SPDX-License-Identifier: GPL-3.0-or-later
"""What processes use, as the kernel counts it: CPU, memory, threads; for benches, which compare CPU and not wall time."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Load:
    """What a process has used so far, and holds now."""

    cpu_seconds: float
    resident_bytes: int
    threads: int

    @classmethod
    def of(cls, process_id: int) -> Load:
        """Read it, with the CPU of children that have ended."""
        folder = _PROC / str(process_id)
        fields = (folder / "stat").read_text("ascii").rpartition(")")[2].split()
        resident = int((folder / "statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return cls(sum(map(int, fields[11:15])) / _TICKS, resident, int(fields[17]))


def processes_with(words: str) -> list[int]:
    """List the processes whose command line contains *words*."""
    found = []
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes()
            except OSError:  # it has ended
                continue
            if words.encode() in line:
                found.append(int(folder.name))
    return found


def container_cpu_seconds(process_id: int, container_id: str) -> float:
    """Read the CPU that a container has used since its start, by the cgroup that its first process is in."""
    for line in (_PROC / str(process_id) / "cgroup").read_text("ascii").splitlines():
        _, controllers, path = line.split(":", 2)
        # The container's systemd may have moved itself further down.
        head, found, tail = path.partition(container_id)
        group = f"{head}{found}{tail.partition('/')[0]}".lstrip("/")
        if "cpuacct" in controllers.split(","):
            return int((_CGROUPS / "cpuacct" / group / "cpuacct.usage").read_text("ascii")) / 1e9
        if not controllers and (_CGROUPS / group / "cpu.stat").exists():
            return int((_CGROUPS / group / "cpu.stat").read_text("ascii").split()[1]) / 1e6
    raise OSError(f"the cgroup of container {container_id} was not found")


_CGROUPS = Path("/sys/fs/cgroup")
