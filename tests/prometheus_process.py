# SPDX-License-Identifier: GPL-3.0-or-later
"""A real Prometheus on loopback, with a folder of its own, and the tool that checks its files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

START_SECONDS = 30


def promtool(*arguments: str, cwd: Path | None = None, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run promtool, with *text* on its standard input."""
    command = [shutil.which("promtool") or "promtool", *arguments]
    return subprocess.run(command, cwd=cwd, input=text or "", capture_output=True, text=True, timeout=120, check=False)


@contextmanager
def prometheus(folder: Path, configuration: dict[str, Any], port: int) -> Iterator[httpx.Client]:
    """Run a Prometheus on *port* of loopback until the end of the block; yield a client of its API."""
    (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration), "utf-8")
    command = [
        shutil.which("prometheus") or "prometheus",
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    log = folder / "prometheus.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, "GOMAXPROCS": "1"}
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/", timeout=10) as client:
            _wait_until_ready(client, process, log)
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)


def _wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"Prometheus ended at once:\n{log.read_text('utf-8', 'replace')}")
        try:
            if client.get("-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    raise TimeoutError(f"Prometheus was not ready in {START_SECONDS} s:\n{log.read_text('utf-8', 'replace')}")
