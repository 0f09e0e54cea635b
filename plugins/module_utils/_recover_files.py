# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Remove old files below a folder that anybody may write to, as root, without being led astray.

Every step is taken from an open folder by the bare name of the entry, never over a symbolic link, never onto another
filesystem or another mount. So whatever somebody puts into /tmp meanwhile, only entries of folders that were really
reached through the given one are removed. Standard library only. Runs on nodes with Python 3.8.
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass
from typing import Callable, FrozenSet, Iterator, List, Optional, Tuple

# A deeper tree than this was built to trouble whoever walks it; each level holds a file descriptor.
MAX_DEPTH = 64
# A folder of a million names takes a second to read; what is left over is met by the next run.
MAX_ENTRIES = 1_000_000
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_BLOCK_BYTES = 512

# Given the name and what lstat says, with the depth below the top, from 0.
Suits = Callable[[str, os.stat_result, int], bool]


@dataclass
class Sweep:
    """What one sweep may touch, and what it has done."""

    suits: Suits
    deadline: float
    # In check mode nothing is removed, and all is counted.
    check_mode: bool = False
    # Asked after each removal: whether enough is free.
    is_enough: Callable[[], bool] = lambda: False
    skipped_names: FrozenSet[str] = frozenset()
    # Names at the top that are left out, by how they begin.
    skipped_prefixes: Tuple[str, ...] = ()
    mount_points: FrozenSet[str] = frozenset()
    # Folders that are empty and older than this moment go too; None: folders stay.
    remove_folders_before: Optional[float] = None
    device: int = -1
    removed: int = 0
    freed_bytes: int = 0
    seen: int = 0
    over: bool = False

    def run(self, top: str) -> Sweep:
        """Remove what suits below *top*; a folder that isn't there, or is a link, has nothing."""
        try:
            folder = os.open(top, _FOLDER_FLAGS)
        except OSError:
            return self
        try:
            self.device = os.fstat(folder).st_dev
            self._enter(folder, top, 0)
        finally:
            os.close(folder)
        return self

    def _enter(self, folder: int, path: str, depth: int) -> None:
        for name in _names(folder):
            if self._is_over():
                return
            if name in self.skipped_names or (depth == 0 and name.startswith(self.skipped_prefixes or ("\0",))):
                continue
            try:
                entry = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except OSError:
                continue
            if entry.st_dev != self.device:
                continue
            if stat.S_ISDIR(entry.st_mode):
                self._descend(folder, name, os.path.join(path, name), depth)
            elif (stat.S_ISREG(entry.st_mode) or stat.S_ISLNK(entry.st_mode)) and self.suits(name, entry, depth):
                self._remove(folder, name, entry)

    def _descend(self, parent: int, name: str, path: str, depth: int) -> None:
        if depth + 1 >= MAX_DEPTH or path in self.mount_points:
            return
        try:
            folder = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
        except OSError:
            return
        try:
            now = os.fstat(folder)
            if now.st_dev != self.device:
                return
            self._enter(folder, path, depth + 1)
        finally:
            os.close(folder)
        limit = self.remove_folders_before
        # Its age as it was before this sweep emptied it.
        if limit is not None and not self.check_mode and max(now.st_mtime, now.st_ctime) < limit:
            try:
                os.rmdir(name, dir_fd=parent)
                self.removed += 1
            except OSError:
                # Not empty, or in use.
                return

    def _remove(self, folder: int, name: str, entry: os.stat_result) -> None:
        if not self.check_mode:
            try:
                os.unlink(name, dir_fd=folder)
            except OSError:
                return
        self.removed += 1
        # A file that has another name too frees nothing.
        if entry.st_nlink == 1:
            self.freed_bytes += entry.st_blocks * _BLOCK_BYTES
        self.over = self.over or self.is_enough()

    def _is_over(self) -> bool:
        self.seen += 1
        if self.seen > MAX_ENTRIES or time.monotonic() >= self.deadline:
            self.over = True
        return self.over


def older_than(seconds: float, now: float) -> Suits:
    """Tell files that nobody has written, moved or read for that long."""

    def suits(_name: str, entry: os.stat_result, _depth: int) -> bool:
        return max(entry.st_mtime, entry.st_ctime, entry.st_atime) < now - seconds

    return suits


def _names(folder: int) -> Iterator[str]:
    """List a folder once, before anything in it is removed."""
    names: List[str] = []
    # scandir takes over the descriptor's position and closes its own copy.
    with os.scandir(folder) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) >= MAX_ENTRIES:
                break
    return iter(names)
