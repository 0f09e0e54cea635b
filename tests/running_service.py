# SPDX-License-Identifier: GPL-3.0-or-later
"""The real service as its users have it: a process of its own, on a free port, with a state directory of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

START_SECONDS = 30
STOP_SECONDS = 30


@dataclass
class RunningService:
    """One `nodectl serve`, started by start() and ended by stop() or kill()."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ("-m", "node_manager", "serve")
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        """Choose a port unless one was given."""
        self.port = self.port or free_port()

    @property
    def url(self) -> str:
        """Give the service's base URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        """Read what the service wrote, on both streams."""
        return (self.home.parent / f"{self.home.name}.log").read_text("utf-8", "replace")

    @property
    def token(self) -> str:
        """Read the admin token that the first start made."""
        return (self.home / "admin.token").read_text("ascii").strip()

    def start(self) -> RunningService:
        """Start and wait until it is ready."""
        log = (self.home.parent / f"{self.home.name}.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command],
                env=self.variables(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the service ended at once:\n{self.log}")
            try:
                if httpx.get(f"{self.url}/readyz", timeout=1).status_code == 200:
                    return self
            except httpx.TransportError:
                self._pause()
        self.kill()
        raise TimeoutError(f"the service was not ready in {START_SECONDS} s:\n{self.log}")

    def variables(self) -> dict[str, str]:
        """Give the environment that the service has, for commands that are to meet the same store."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("NODE_MANAGER_")}
        return {
            **kept,
            "NODE_MANAGER_HOME": str(self.home),
            "NODE_MANAGER_SERVER__PORT": str(self.port),
            # Periodic work would run between the steps of a test, and try addresses that tests make up.
            "NODE_MANAGER_MONITORING__SCHEDULED": "false",
            "NODE_MANAGER_RECOVERY__AUTOMATIC": "false",
            **self.environment,
        }

    def client(self, token: str | None = None, timeout: float = 60) -> httpx.Client:
        """Open a client with the admin token, or with *token*."""
        headers = {"Authorization": f"Bearer {token or self.token}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=timeout)

    def stop(self) -> int:
        """End it as Ctrl-C does; give its exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP_SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it as a power cut does."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_SECONDS)

    def _pause(self) -> None:
        assert self.process is not None
        try:
            self.process.wait(0.1)
        except subprocess.TimeoutExpired:
            return


def free_port() -> int:
    """Find a TCP port on loopback that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
