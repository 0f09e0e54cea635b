# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Free disk space from a listed set of things that nobody misses, and from nothing else.

The set is `SOURCES`. Only what lies on a filesystem that is too full is looked at, mildest first, until enough is free. User
data, data of running containers, other filesystems and whatever a symbolic link points to are never touched. Runs on nodes with
Python 3.8.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import stat
import time
from dataclasses import dataclass
from typing import Callable, Dict, FrozenSet, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ._probe_parse import FilesystemSpace, Mount, is_remote, parse_mountinfo, real_filesystems
from ._probe_read import Reader
from ._recover_containers import engine_directory, prune
from ._recover_files import Sweep, older_than
from ._recover_run import Repair, RepairError, run_program

# Below the limit by a tenth, where the manager counts the trouble as over.
TARGET = 0.9
_DAY_SECONDS = 86400.0
_ROTATED = re.compile(r".+(\.(gz|xz|bz2|zst|old)|\.[0-9]{1,3}|-[0-9]{8})")
# systemd and X keep what runs now in these, and a folder of a service is that service's own.
_KEPT_IN_TMP = ("systemd-private-", "snap-private-tmp", ".X", ".ICE", ".font-unix", ".XIM", "tmux-", "ssh-", "ansible")
# Of the journal its own tool takes care; the others belong to containers that run.
_KEPT_IN_LOG = frozenset(("journal", "pods", "containers", "lost+found"))

PACKAGES, JOURNAL, TMPFILES, CORE_DUMPS, ROTATED_LOGS, TEMPORARY_FILES, IMAGES, BUILD_CACHE = SOURCES = (
    "packages",
    "journal",
    "tmpfiles",
    "core_dumps",
    "rotated_logs",
    "temporary_files",
    "images",
    "build_cache",
)


@dataclass(frozen=True)
class Limits:
    """From which use on a filesystem counts as too full."""

    space_percent: float
    inodes_percent: float


@dataclass(frozen=True)
class Disk:
    """One filesystem and how full it is."""

    mount_point: str
    device: int
    space_percent: float
    inodes_percent: float
    limits: Limits

    @property
    def is_full(self) -> bool:
        """Tell whether it is at a limit or beyond."""
        return self.space_percent >= self.limits.space_percent or self.inodes_percent >= self.limits.inodes_percent

    @property
    def has_enough(self) -> bool:
        """Tell whether it is so far below its limits that the trouble is over."""
        return (
            self.space_percent < self.limits.space_percent * TARGET
            and self.inodes_percent < self.limits.inodes_percent * TARGET
        )

    @property
    def shown(self) -> str:
        """Say how full it is."""
        return "{:g} % full, {:g} % of inodes used".format(self.space_percent, self.inodes_percent)


@dataclass(frozen=True)
class Order:
    """What may be removed, and how far to go."""

    sources: Sequence[str]
    general: Limits
    # Limits of single filesystems, by mount point; these are looked at whatever their type.
    own: Mapping[str, Limits]
    older_than_days: float
    journal_mib: int
    deadline: float
    check_mode: bool


class Freed(NamedTuple):
    """What was removed, or would be; programs don't tell how many files."""

    size_bytes: int = 0
    files: int = 0

    @property
    def shown(self) -> str:
        """Say it in words."""
        count = "{} files, ".format(self.files) if self.files else ""
        return "{}{:.1f} MiB".format(count, self.size_bytes / 1024**2)


@dataclass(frozen=True)
class _Source:
    """One thing of the set: the folders that it lies in, and how it is freed."""

    folders: Tuple[str, ...]
    free: Callable[[_Work], Freed]


@dataclass(frozen=True)
class _Work:
    order: Order
    disk: Disk
    folders: Tuple[str, ...]
    mount_points: FrozenSet[str]
    is_enough: Callable[[], bool]


def free_disk(order: Order, reader: Optional[Reader] = None) -> Repair:
    """Free space on filesystems that are too full.

    Errors: RepairError if none of the set lies there, or nothing of it could be removed.
    """
    eyes = reader or Reader()
    mounts = parse_mountinfo(eyes.read_text("/proc/self/mountinfo"))
    disks = list(read_disks(mounts, order, eyes))
    full = [disk for disk in disks if disk.is_full]
    before = {disk.mount_point: disk.shown for disk in disks}
    if not full:
        return Repair(False, "no filesystem is too full", before=before, after=before, freed_bytes=0)
    done: List[str] = []
    freed = 0
    for disk in full:
        for name, amount in _free_one(disk, mounts, order, eyes):
            freed += amount.size_bytes
            done.append("{} of {} ({})".format(name, disk.mount_point, amount.shown))
    why = "; ".join("{} is {}".format(disk.mount_point, disk.shown) for disk in full)
    after = {disk.mount_point: disk.shown for disk in read_disks(mounts, order, eyes)}
    if order.check_mode:
        # How much each program will free isn't known before.
        return Repair(True, why, changed=bool(done), before=before, after={**before}, done=done, freed_bytes=freed)
    if not done:
        raise RepairError("{}, and nothing that may be removed is there".format(why))
    return Repair(True, "freed {}".format("; ".join(done)), True, before, after, done, freed)


def read_disks(mounts: Sequence[Mount], order: Order, reader: Reader) -> List[Disk]:
    """Read how full each filesystem is that may be judged: real storage that can be written to, and those named."""
    real = real_filesystems(mounts)
    chosen = {mount.mount_point: mount for mount in real}
    chosen.update({mount.mount_point: mount for mount in mounts if mount.mount_point in order.own})
    disks = []
    for mount in chosen.values():
        # One that is on another machine is another machine's matter.
        if mount.read_only or is_remote(mount):
            continue
        try:
            space = reader.space(mount, 2.0)
            device = os.stat(mount.mount_point).st_dev
        except OSError:
            continue
        limits = _limits_of(mount.mount_point, order, mount in real)
        disks.append(judge_disk(mount.mount_point, device, space, limits))
    return disks


def judge_disk(mount_point: str, device: int, space: FilesystemSpace, limits: Limits) -> Disk:
    """Work out how full a filesystem is, as df(1) does; those without a fixed number of inodes use none."""
    used_bytes = space.total_bytes - space.free_bytes
    inodes_used = space.inodes_total - space.inodes_free
    return Disk(
        mount_point,
        device,
        _percent(used_bytes, used_bytes + space.available_bytes),
        _percent(inodes_used, space.inodes_total),
        limits,
    )


def is_rotated(name: str) -> bool:
    """Tell whether a log's name says that it was put aside."""
    return _ROTATED.fullmatch(name) is not None


def _limits_of(mount_point: str, order: Order, is_real: bool) -> Limits:
    """Give the stricter limits where both have some; the general ones are for real storage only."""
    own = order.own.get(mount_point)
    if own is None or not is_real:
        return own or order.general
    space = min(own.space_percent, order.general.space_percent)
    return Limits(space, min(own.inodes_percent, order.general.inodes_percent))


def _free_one(disk: Disk, mounts: Sequence[Mount], order: Order, reader: Reader) -> List[Tuple[str, Freed]]:
    """Go through the set for one filesystem; what was removed of each."""
    (mount,) = [mount for mount in mounts if mount.mount_point == disk.mount_point][-1:]
    points = frozenset(mount.mount_point for mount in mounts)

    def is_enough() -> bool:
        return judge_disk(disk.mount_point, disk.device, reader.space(mount, 2.0), disk.limits).has_enough

    freed = []
    for name in SOURCES:
        if name not in order.sources:
            continue
        if time.monotonic() >= order.deadline or (not order.check_mode and is_enough()):
            break
        source = _SOURCES[name]
        there = tuple(folder for folder in _expand(source.folders, order) if _device_of(folder) == disk.device)
        if there:
            amount = source.free(_Work(order, disk, there, points, is_enough))
            if any(amount):
                freed.append((name, amount))
    return freed


def _free_packages(work: _Work) -> Freed:
    """Drop downloaded packages, which can be downloaded again."""
    if work.order.check_mode:
        return Freed(sum(_size_below(folder) for folder in work.folders))
    freed = 0
    for program, arguments in (("apt-get", ["clean"]), ("dnf", ["clean", "packages"]), ("yum", ["clean", "packages"])):
        path = shutil.which(program)
        if path:
            freed += _by_program([path, *arguments], work)
    return Freed(freed)


def _free_journal(work: _Work) -> Freed:
    keep_bytes = work.order.journal_mib * 1024 * 1024
    held_bytes = sum(_size_below(folder) for folder in work.folders)
    if held_bytes <= keep_bytes or not shutil.which("journalctl"):
        return Freed()
    if work.order.check_mode:
        return Freed(held_bytes - keep_bytes)
    # What is written to now isn't dropped, so it is put aside first.
    _by_program(["journalctl", "--rotate"], work)
    _by_program(["journalctl", "--vacuum-size={}M".format(work.order.journal_mib)], work)
    return Freed(max(0, held_bytes - sum(_size_below(folder) for folder in work.folders)))


def _free_by_tmpfiles(work: _Work) -> Freed:
    # What the system's own rules call old; the same runs once a day anyway.
    if work.order.check_mode or not shutil.which("systemd-tmpfiles"):
        return Freed()
    return Freed(_by_program(["systemd-tmpfiles", "--clean"], work))


def _free_core_dumps(work: _Work) -> Freed:
    return _sweep(work, Sweep(lambda _name, entry, depth: depth == 0 and _is_file(entry), work.order.deadline))


def _free_rotated_logs(work: _Work) -> Freed:
    limit = time.time() - _DAY_SECONDS
    sweep = Sweep(
        lambda name, entry, _depth: is_rotated(name) and _is_file(entry) and entry.st_mtime < limit,
        work.order.deadline,
        skipped_names=_KEPT_IN_LOG,
    )
    return _sweep(work, sweep)


def _free_temporary_files(work: _Work) -> Freed:
    seconds = work.order.older_than_days * _DAY_SECONDS
    now = time.time()
    sweep = Sweep(
        older_than(seconds, now),
        work.order.deadline,
        skipped_prefixes=_KEPT_IN_TMP,
        remove_folders_before=now - seconds,
    )
    return _sweep(work, sweep)


def _free_images(work: _Work) -> Freed:
    return Freed(0 if work.order.check_mode else prune(_here, work.order.deadline, images=True, build_cache=False))


def _free_build_cache(work: _Work) -> Freed:
    return Freed(0 if work.order.check_mode else prune(_here, work.order.deadline, images=False, build_cache=True))


def _sweep(work: _Work, sweep: Sweep) -> Freed:
    sweep.check_mode = work.order.check_mode
    sweep.is_enough = (lambda: False) if work.order.check_mode else work.is_enough
    sweep.mount_points = work.mount_points
    for folder in work.folders:
        sweep.run(folder)
    return Freed(sweep.freed_bytes, sweep.removed)


def _by_program(argv: Sequence[str], work: _Work) -> int:
    """Run one of the system's own tools; what the filesystem has more afterwards is what it freed."""
    before = _available(work.disk.mount_point)
    run_program(argv, min(work.order.deadline, time.monotonic() + 60.0))
    return max(0, _available(work.disk.mount_point) - before)


def _available(path: str) -> int:
    numbers = os.statvfs(path)
    return numbers.f_bfree * numbers.f_frsize


def _size_below(folder: str) -> int:
    """Add up the files below a folder, without following links."""
    total = 0
    for path, _folders, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(path, name)).st_blocks * 512
            except OSError:
                continue
    return total


def _expand(folders: Sequence[str], order: Order) -> List[str]:
    found: List[str] = []
    for pattern in folders:
        if pattern == _ENGINE_FOLDER:
            place = engine_directory(_here, min(order.deadline, time.monotonic() + 5.0))
            found += [place] if place else []
        else:
            found += sorted(glob.glob(pattern))
    return found


def _device_of(folder: str) -> Optional[int]:
    try:
        return os.lstat(folder).st_dev
    except OSError:
        return None


def _is_file(entry: os.stat_result) -> bool:
    return stat.S_ISREG(entry.st_mode)


def _here(path: str) -> str:
    return path


def _percent(part: int, whole: int) -> float:
    return round(100.0 * part / whole, 1) if whole > 0 else 0.0


_TEMPORARY = ("/tmp", "/var/tmp")  # noqa: S108  these are what is cleaned
_ENGINE_FOLDER = "(the container engine's own)"
_SOURCES: Dict[str, _Source] = {
    PACKAGES: _Source(("/var/cache/apt/archives", "/var/cache/dnf", "/var/cache/yum"), _free_packages),
    JOURNAL: _Source(("/var/log/journal", "/run/log/journal"), _free_journal),
    TMPFILES: _Source(_TEMPORARY, _free_by_tmpfiles),
    CORE_DUMPS: _Source(("/var/lib/systemd/coredump",), _free_core_dumps),
    ROTATED_LOGS: _Source(("/var/log",), _free_rotated_logs),
    TEMPORARY_FILES: _Source(_TEMPORARY, _free_temporary_files),
    IMAGES: _Source((_ENGINE_FOLDER,), _free_images),
    BUILD_CACHE: _Source((_ENGINE_FOLDER,), _free_build_cache),
}
