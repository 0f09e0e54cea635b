# SPDX-License-Identifier: GPL-3.0-or-later
"""The probe's loop as a real process, started and fed the way the service does over SSH."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from node_manager.probe_bundle import LoopOptions, bootstrap_command, bundle


def find_pythons(version: str) -> list[str]:
    """List the interpreters of one version, such as 3.8, in pyenv."""
    return [str(path) for path in sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))]


class LoopProcess:
    """A running loop; its lines are gathered beside, each with the time at which it came."""

    def __init__(self, command: str, sent: bytes, **more: Any) -> None:
        self._process = subprocess.Popen(
            ["/bin/sh", "-c", f"exec {command}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            **more,
        )
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        self.stdin, self.stdout, self.stderr = self._process.stdin, self._process.stdout, self._process.stderr
        self.lines: list[tuple[float, dict[str, Any]]] = []
        self._came = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self.send(sent)

    @classmethod
    def start(cls, python: str, **options: Any) -> Self:
        """Start the loop and read what it says."""
        process = cls(bootstrap_command(python), bundle(LoopOptions(**options)))
        process.listen()
        return process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_details: object) -> None:
        self._process.kill()
        self._process.wait()
        if self._reader.ident:
            self._reader.join(10)
        for pipe in (self.stdin, self.stdout, self.stderr):
            pipe.close()

    @property
    def pid(self) -> int:
        """Give its process id."""
        return self._process.pid

    def listen(self) -> None:
        """Begin to read its lines."""
        self._reader.start()

    def send(self, data: bytes) -> None:
        """Write to its standard input."""
        os.write(self.stdin.fileno(), data)

    def wait_for(self, kind: str, wanted: Callable[[dict[str, Any]], bool] = lambda _line: True) -> dict[str, Any]:
        """Wait for a line of a kind, at most 20 s."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [line for _at, line in self.lines if line["kind"] == kind and wanted(line)]
            return bool(found)

        with self._came:
            assert self._came.wait_for(look, 20), f"no {kind} among {[line for _at, line in self.lines]}"
        return found[0]

    def wait_for_count(self, kind: str, count: int) -> list[float]:
        """Wait for so many lines of a kind, at most 20 s, and give the times of all of them."""
        with self._came:
            assert self._came.wait_for(lambda: len(self.times(kind)) >= count, 20), self.lines
            return self.times(kind)

    def times(self, kind: str) -> list[float]:
        """Give the times at which lines of a kind came."""
        return [at for at, line in self.lines if line["kind"] == kind]

    def wait_for_end(self, seconds: float) -> int:
        """Wait until it has ended, at most so long, and give its exit code."""
        return self._process.wait(seconds)

    def _read(self) -> None:
        for line in self.stdout:
            with self._came:
                self.lines.append((time.monotonic(), json.loads(line)))
                self._came.notify_all()
