# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Files that other processes read while they are renewed."""

from __future__ import annotations

import fcntl
import os
import tempfile
from contextlib import contextmanager


def private_directory(path):
    """Make a folder that only its owner may enter; one that is there stays as it is."""
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


@contextmanager
def locked(path):
    """Hold *path* as a lock against other processes.

    Errors: OSError.
    """
    private_directory(path.parent)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def replace_if_changed(path, content):
    """Put *content* into *path*, whole or not at all, readable by its owner only; nothing is written if it is there.

    Errors: OSError.
    """
    wanted = content.encode()
    try:
        if path.read_bytes() == wanted:
            return False
    except FileNotFoundError:
        pass
    private_directory(path.parent)
    # mkstemp gives the file mode 0600.
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(wanted)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
    return True
