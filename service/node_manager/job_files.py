# SPDX-License-Identifier: GPL-3.0-or-later
"""The files of jobs under <home>/jobs: the log that is kept, the private folder that is not, the lock of a manager.

Touches these files and nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

_INSTANCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_JOB = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_INSTANCES = "instances"
# ssh binds PATH.XXXXXXXXXXXXXXXX first; sun_path holds 108 bytes with the final NUL. Names have up to 16 characters.
_CONTROL_PATH_LIMIT = 108 - 1 - 17 - 16 - 1


class JobFiles:
    """Where each file of a job is."""

    def __init__(self, home: Path) -> None:
        self._root = home / "jobs"

    def log(self, job_id: str) -> Path:
        """Name the job's log."""
        return self._directory(job_id) / "log"

    def private(self, job_id: str) -> Path:
        """Name the folder that lives only as long as the job runs."""
        return self._directory(job_id) / "private"

    def control(self, job_id: str) -> Path:
        """Name the folder of ssh's sockets: the job's alone too, but elsewhere if a socket's path would be too long."""
        beside = self.private(job_id) / "c"
        if len(os.fsencode(beside)) <= _CONTROL_PATH_LIMIT:
            return beside
        # Nobody can be there first: the id is random and not known to anybody before this folder is made.
        return Path(tempfile.gettempdir(), f"nm-{job_id.replace('-', '')}")

    def make(self, job_id: str) -> Path:
        """Make the job's folders anew, for this user only, and an empty log; give the private one.

        Errors: FileExistsError if the job has run before.
        """
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._directory(job_id).mkdir(mode=0o700, exist_ok=True)
        private = self.private(job_id)
        private.mkdir(mode=0o700)
        self.control(job_id).mkdir(mode=0o700)
        os.close(os.open(self.log(job_id), os.O_CREAT | os.O_WRONLY, 0o600))
        return private

    def discard_private(self, job_id: str) -> None:
        """Remove all but the log."""
        shutil.rmtree(self.control(job_id), ignore_errors=True)
        shutil.rmtree(self.private(job_id), ignore_errors=True)

    def read_log(self, job_id: str, offset: int, limit: int) -> bytes:
        """Read the log from *offset* on; empty at its end, and where another machine has it."""
        try:
            with self.log(job_id).open("rb") as log:
                log.seek(offset)
                return log.read(limit)
        except FileNotFoundError:
            return b""

    def tail(self, job_id: str, limit: int) -> str:
        """Read the last *limit* bytes of the log."""
        try:
            with self.log(job_id).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - limit))
                return log.read(limit).decode("utf-8", "replace")
        except FileNotFoundError:
            return ""

    def job_ids(self) -> list[str]:
        """List the jobs that have files here."""
        try:
            return sorted(path.name for path in self._root.iterdir() if _JOB.fullmatch(path.name))
        except FileNotFoundError:
            return []

    def remove(self, job_ids: Collection[str]) -> None:
        """Remove all files of these jobs."""
        for job_id in job_ids:
            self.discard_private(job_id)
            shutil.rmtree(self._directory(job_id), ignore_errors=True)

    def lock_instance(self, instance_id: str, wait: Callable[[float], object]) -> int:
        """Hold the lock of a manager until the descriptor is closed or the process dies; give the descriptor.

        Errors: ValueError if the id can't be a file name; BlockingIOError if a manager of that id runs already.
        """
        if not _INSTANCE.fullmatch(instance_id):
            raise ValueError(f"instance id {instance_id!r}: expected 1 to 64 letters, digits, '.', '_' and '-'")
        (self._root / _INSTANCES).mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self._lock(instance_id)
        for attempt in range(10):
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                # A manager that looks whether this one lives holds the lock for an instant.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(lock, path):
                    return lock
            except BlockingIOError:
                if attempt == 9:
                    os.close(lock)
                    raise
                wait(0.05)
            os.close(lock)
        raise BlockingIOError(f"{path} is replaced again and again")

    def dead_instances(self) -> list[str]:
        """List the managers that ran with this home and don't any more: their locks are free."""
        return [path.stem for path in self._locks() if _is_free(path)]

    def forget_instances(self, instance_ids: Collection[str]) -> None:
        """Remove the locks of dead managers."""
        for instance_id in instance_ids:
            if _is_free(self._lock(instance_id)):
                self._lock(instance_id).unlink(missing_ok=True)

    def _directory(self, job_id: str) -> Path:
        if not _JOB.fullmatch(job_id):
            raise ValueError(f"job id {job_id!r}: expected a UUID")
        return self._root / job_id

    def _lock(self, instance_id: str) -> Path:
        return self._root / _INSTANCES / f"{instance_id}.lock"

    def _locks(self) -> Iterator[Path]:
        return (self._root / _INSTANCES).glob("*.lock")


def _is_free(path: Path) -> bool:
    try:
        lock = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return True
        return False
    finally:
        os.close(lock)


def _same_file(descriptor: int, path: Path) -> bool:
    """Tell whether the file that was opened is still the one of that name: a tidy-up may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
