# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Results on their way to the registry: on disk before they are delivered, so that none is lost on the way.

Each run appends to a file of its own and holds a lock on it; a file without a holder was left by a run that could not
deliver, or that was killed. One line is one observation, and a line without its end is one that was never finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
import uuid

from ._files import private_directory

# A month of an unreachable registry in a fleet that Ansible visits hourly stays below this.
MAX_BYTES = 256 * 1024 * 1024
_SUFFIX = ".jsonl"
_REFUSED = ".refused"


class Spool:
    """The folder with all runs' files."""

    def __init__(self, directory, max_bytes=MAX_BYTES):
        self._directory = directory
        self._max_bytes = max_bytes

    def start(self):
        """Open this run's file.

        Errors: OSError.
        """
        private_directory(self._directory)
        path = self._directory / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}{_SUFFIX}"
        return Segment(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600))

    def abandoned(self):
        """Take over, oldest first, the files that no run holds; each is locked while it is used."""
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            try:
                handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            except OSError:
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                continue
            segment = Segment(path, handle)
            try:
                # Another run may have delivered and removed it between the two calls.
                if os.fstat(handle).st_nlink:
                    yield segment
            finally:
                segment.release()

    def trim(self):
        """Remove the oldest files beyond the bound; give how many went."""
        files = []
        for path in [*self._directory.glob(f"*{_SUFFIX}"), *self._directory.glob(f"*{_REFUSED}")]:
            with contextlib.suppress(OSError):
                files.append((path.name, path, path.stat().st_size))
        total = sum(file[2] for file in files)
        removed = 0
        # By name, which starts with the time.
        for path, size in (file[1:] for file in sorted(files)):
            if total <= self._max_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                removed += 1
            total -= size
        return removed


class Segment:
    """One file: observations that are not delivered yet."""

    def __init__(self, path, handle):
        self._path = path
        self._handle = handle
        fcntl.flock(handle, fcntl.LOCK_EX)

    def append(self, observation):
        """Write an observation so that it outlives this process; give its size in bytes.

        Errors: OSError.
        """
        line = json.dumps(observation, separators=(",", ":")).encode() + b"\n"
        written = os.write(self._handle, line)
        if written != len(line):
            # A full disk; what is there of the line must not spoil the next one.
            os.ftruncate(self._handle, os.fstat(self._handle).st_size - written)
            raise OSError("the disk is full")
        return len(line)

    def batches(self, max_items, max_bytes):
        """Read what the file holds, in parts of a size that one delivery takes."""
        batch, size = [], 0
        with open(self._path, "rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                try:
                    observation = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if batch and (len(batch) >= max_items or size + len(line) > max_bytes):
                    yield batch
                    batch, size = [], 0
                batch.append(observation)
                size += len(line)
        if batch:
            yield batch

    def clear(self):
        """Forget what was delivered; the file stays this run's."""
        os.ftruncate(self._handle, 0)

    def remove(self):
        """Remove the file: all of it was delivered."""
        with contextlib.suppress(OSError):
            self._path.unlink()

    def refuse(self):
        """Set the file aside: it was refused for good, and somebody may want to know why."""
        with contextlib.suppress(OSError):
            self._path.rename(self._path.with_suffix(_REFUSED))

    def release(self):
        """Let other runs have the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
