# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Open what the probe reads, and nothing else decides where things are.

Standard library only. Runs on nodes with Python 3.8. Text goes to the pure parsers; time limits are set by _probe_run.
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import select
import subprocess
from typing import Callable, Dict, List, Optional, Sequence

from ._probe_clock import ClockReading, read_kernel_clock
from ._probe_parse import FilesystemSpace, Mount, is_remote

# As much as most files have: Python asks for that much memory for each, and gives back what it didn't need.
_CHUNK_BYTES = 8192
_MAX_FILE_BYTES = 1024 * 1024
# What the kernel answers where a file exists but the hardware or the configuration has nothing to say: speed of a
# link that is down, PSI switched off at boot, a sensor that sleeps.
_NOT_TOLD = frozenset(
    (
        errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENODEV, errno.ENXIO, errno.ENODATA,
        errno.EOPNOTSUPP, errno.EIO, errno.EAGAIN, errno.EBUSY,
    )
)  # fmt: skip

RunCommand = Callable[[Sequence[str], float], Optional[str]]


class Reader:
    """Read files below *root*, so that a recorded directory can stand for a whole platform.

    *statvfs*, *run*, *read_clock*, *machine* and *python_version* answer what has no file; recordings bring their own.
    """

    def __init__(
        self,
        root: str = "/",
        *,
        statvfs: Optional[Callable[[str], os.statvfs_result]] = None,
        run: Optional[RunCommand] = None,
        read_clock: Optional[Callable[[], ClockReading]] = None,
        machine: Optional[str] = None,
        python_version: Optional[str] = None,
    ) -> None:
        self._prefix = root.rstrip("/")
        self._statvfs = statvfs
        self.run: RunCommand = run or run_command
        self._read_clock = read_clock or read_kernel_clock
        self.machine = machine or os.uname().machine
        self.python_version = python_version or platform.python_version()
        self._kept: Dict[str, int] = {}

    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        """Close what was kept open, once not even a thread that hangs reads it any more."""
        for descriptor in self._kept.values():
            _close(descriptor)

    def path(self, path: str) -> str:
        """Return where the absolute *path* lies on this machine."""
        return self._prefix + path

    def read_text(self, path: str) -> str:
        """Read a file from its beginning, at most 1 MiB of it.

        Shapes: bytes that are not UTF-8 become lone surrogates, so that a path keeps its bytes; `clean` replaces them
            in the end.
        Errors: OSError as the kernel says.
        """
        descriptor = os.open(self._prefix + path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(descriptor, _CHUNK_BYTES)
            # Files of the kernel come in pieces and have no size; only an empty read is the end.
            more = data
            while more and len(data) < _MAX_FILE_BYTES:
                more = os.read(descriptor, _CHUNK_BYTES)
                data += more
        finally:
            os.close(descriptor)
        return data.decode("utf-8", "surrogateescape")

    def read_again(self, path: str, *, whole: bool = False) -> str:
        """Read a file of the kernel's that is read with every sample: left open, it takes half the time or less.

        For files whose meaning doesn't change while they are open, as those of /proc; for others see `let_go`. From its
        beginning, like `read_text`, and only one thread at a time may read the same path. A *whole* one the kernel gives in
        one piece (single_open in its sources): what ends with a newline needs no second look.
        """
        descriptor = self._kept.get(path)
        was_open = descriptor is not None
        if descriptor is None:
            descriptor = self._kept[path] = os.open(self._prefix + path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.pread(descriptor, _CHUNK_BYTES, 0)
            more = b"" if whole and data.endswith(b"\n") and len(data) < _CHUNK_BYTES else data
            while more and len(data) < _MAX_FILE_BYTES:
                more = os.pread(descriptor, _CHUNK_BYTES, len(data))
                data += more
        except OSError:
            # What answers may have been started anew, such as lxcfs in a container, or a device of this name come back.
            os.close(self._kept.pop(path))
            if was_open:
                return self.read_again(path, whole=whole)
            raise
        return data.decode("utf-8", "surrogateescape")

    def let_go(self, folder: str) -> None:
        """Close what `read_again` keeps below *folder*: something else may have its name by now."""
        for path in [path for path in list(self._kept) if path.startswith(folder + "/")]:
            os.close(self._kept.pop(path))

    def has_changed(self, path: str) -> bool:
        """Tell whether a file that `read_again` keeps has changed since this was last asked; true where that can't be told.

        For files of which the kernel tells by poll(2), as it does of the mounts.
        Source: proc_pid_mountinfo(5), Linux >= 2.6.30.
        """
        descriptor = self._kept.get(path)
        if descriptor is None or self._prefix:
            return True
        poller = select.poll()
        poller.register(descriptor, select.POLLPRI)
        return bool(poller.poll(0))

    def read_optional(self, path: str, *, again: bool = False, whole: bool = False) -> Optional[str]:
        """Read a file that not every node has; None where the node can't tell."""
        try:
            return self.read_again(path, whole=whole) if again else self.read_text(path)
        except OSError as error:
            if error.errno in _NOT_TOLD:
                return None
            raise

    def read_word(self, path: str, *, again: bool = False) -> Optional[str]:
        """Read a one-line file; None where the node can't tell or the line is blank."""
        text = self.read_optional(path, again=again, whole=True)
        return (text.strip().strip("\x00") or None) if text is not None else None

    def names(self, path: str) -> List[str]:
        """List a directory in order; an absent one is empty."""
        try:
            return sorted(os.listdir(self._prefix + path))
        except OSError as error:
            if error.errno in _NOT_TOLD:
                return []
            raise

    def exists(self, path: str) -> bool:
        return os.path.exists(self._prefix + path)

    def clock(self) -> Optional[ClockReading]:
        """Ask the kernel about its clock; None where it doesn't tell."""
        try:
            return self._read_clock()
        except OSError:
            # Whatever it is, a container's filter or a missing library, it stays so.
            return None

    def space(self, mount: Mount, limit_seconds: float) -> FilesystemSpace:
        """Ask how full a mounted filesystem is.

        Errors: OSError as the kernel says; TimeoutError if a remote filesystem does not answer within
            *limit_seconds*. A local one has no such limit here: the caller runs this under one.
        """
        if self._statvfs is None and is_remote(mount):
            return _space_through_child(mount.mount_point, limit_seconds)
        numbers = self._statvfs(mount.mount_point) if self._statvfs else os.statvfs(self._prefix + mount.mount_point)
        return FilesystemSpace(
            total_bytes=numbers.f_blocks * numbers.f_frsize,
            free_bytes=numbers.f_bfree * numbers.f_frsize,
            available_bytes=numbers.f_bavail * numbers.f_frsize,
            inodes_total=numbers.f_files,
            inodes_free=numbers.f_ffree,
            # Recordings don't have it.
            read_only=bool(getattr(numbers, "f_flag", 0) & os.ST_RDONLY),
        )


def run_command(argv: Sequence[str], limit_seconds: float) -> Optional[str]:
    """Run a command without a shell and return what it printed; None where it doesn't exist or fails.

    Errors: TimeoutError after *limit_seconds*; the child is killed, and left behind if even that does not end it.
    """
    try:
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"},
        )
    except OSError:
        return None
    try:
        output, _errors = process.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        raise TimeoutError("timed out after {:.1f} s".format(limit_seconds)) from None
    finally:
        if process.stdout is not None:
            process.stdout.close()
    return output.decode("utf-8", "replace") if process.returncode == 0 else None


def _space_through_child(mount_point: str, limit_seconds: float) -> FilesystemSpace:
    # A request that a FUSE process has taken and never answers waits uninterruptibly: a thread in it would keep this
    # process, and with it the SSH session, from ending. A child can be left behind. It costs about 1 ms, on nodes
    # with such mounts only. GNU and BusyBox agree on this format.
    output = run_command(["stat", "-f", "-c", "%S %b %f %a %c %d", "--", mount_point], limit_seconds)
    numbers = [int(field) for field in (output or "").split()]
    if len(numbers) != 6:
        raise OSError(errno.EIO, "stat -f does not answer")
    block_bytes, blocks, free, available, inodes, inodes_free = numbers
    return FilesystemSpace(blocks * block_bytes, free * block_bytes, available * block_bytes, inodes, inodes_free)
