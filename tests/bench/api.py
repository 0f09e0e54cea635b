# SPDX-License-Identifier: GPL-3.0-or-later
"""How far `GET /nodes?limit=100` of 10,000 nodes is from a route that does nothing, on this machine.

Both are served by one uvicorn process with the same settings, by turns, under the same load (wrk, 8 connections). The list
has a token checked and 100 nodes in its answer; pages are asked for all over the fleet. "unchanged" is what pollers meet
while nothing was committed; "changing" asks for more pages than are kept, so each is put together anew, as after every
commit.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from running_service import RunningService, free_port

NODES = int(os.environ.get("NODE_MANAGER_BENCH_NODES", "10000"))
ROUNDS = 5
SECONDS = 3
NO_OP = """
from fastapi import FastAPI
app = FastAPI()
@app.get("/def")
def no_op_def(): return {}
@app.get("/async")
async def no_op_async(): return {}
"""
# Walks through the pages, so that no single page is served over and over.
SCRIPT = """
local cursors, token, n = {%s}, "%s", 0
request = function()
  n = n + 1
  local cursor = cursors[n %% #cursors + 1]
  local limit = 100 - math.floor(n / #cursors) %% %d
  return wrk.format("GET", "/nodes?limit=" .. limit .. "&cursor=" .. cursor, {["Authorization"] = "Bearer " .. token})
end
"""
FILL = """
from node_manager.main import connect
from node_manager.settings import load_settings
from node_manager.node_registry import NodeRegistry
from node_manager.declarations import NodeDeclaration
settings = load_settings()
registry = NodeRegistry(connect(settings), settings)
for n in range({nodes}):
    registry.register(NodeDeclaration(
        node_id=f"gw-{{n:05d}}", address=f"127.1.{{n // 250}}.{{n % 250 + 1}}", node_type="edge-gateway",
        labels={{"line": str(n % 7)}}, location={{"region": "eu", "zone": f"eu-{{n % 9}}", "site": f"plant-{{n % 50}}"}},
        capacity={{"cpu_millicores": 4000, "memory_mib": 4096, "disk_mib": 32000}}))
"""


def main() -> None:
    """Fill a store, serve it, and print requests per second of both routes and their ratio."""
    if shutil.which("wrk") is None:
        raise SystemExit("this benchmark drives the service with wrk: install the Debian package wrk")
    with tempfile.TemporaryDirectory(prefix="node-manager-bench-") as folder:
        service = RunningService(Path(folder) / "home", {"NODE_MANAGER_STORAGE__URL": "sqlite:///bench.db"})
        service.home.mkdir()
        subprocess.run([sys.executable, "-c", FILL.format(nodes=NODES)], env=service.variables(), check=True)
        service.start()
        try:
            with no_op(Path(folder)) as url:
                compare(service, url, Path(folder))
        finally:
            service.stop()


def compare(service: RunningService, no_op_url: str, folder: Path) -> None:
    """Load the routes by turns and print medians."""
    cursors = ",".join(f'"{cursor}"' for cursor in walk(service))
    for name, limits in (("unchanged", 1), ("changing", 10)):
        (folder / f"{name}.lua").write_text(SCRIPT % (cursors, service.token, limits), "utf-8")
    rates: dict[str, list[float]] = {"unchanged": [], "changing": [], "def": [], "async": []}
    for _ in range(ROUNDS):
        rates["def"].append(load(f"{no_op_url}/def"))
        rates["unchanged"].append(load(service.url, "--script", str(folder / "unchanged.lua")))
        rates["changing"].append(load(service.url, "--script", str(folder / "changing.lua")))
        rates["async"].append(load(f"{no_op_url}/async"))
    median = {name: statistics.median(values) for name, values in rates.items()}
    for name, text in (
        ("unchanged", "GET /nodes?limit=100, unchanged"),
        ("changing", "GET /nodes?limit=100, changing"),
        ("def", "no-op route, def (thread pool)"),
        ("async", "no-op route, async def"),
    ):
        print(f"{text:32} {median[name]:8.0f}/s   (min {min(rates[name]):.0f}, max {max(rates[name]):.0f})")
    for name in ("unchanged", "changing"):
        ratios = f"{median[name] / median['def']:.2f} of no-op def, {median[name] / median['async']:.2f} of no-op async"
        print(f"{name:10} {ratios}   (aim: 0.33)")


def walk(service: RunningService) -> Iterator[str]:
    """Give the cursor of each page, which also fills the cache of rendered nodes, as any poller does."""
    with service.client() as client:
        cursor = None
        while True:
            page = client.get("/nodes", params={"limit": 100, **({"cursor": cursor} if cursor else {})}).json()
            cursor = page["next_cursor"]
            if cursor is None:
                return
            yield cursor


def load(url: str, *options: str) -> float:
    """Run wrk; give requests per second, and fail on any answer that is not a success."""
    done = subprocess.run(
        ["wrk", "-t1", "-c8", f"-d{SECONDS}s", *options, url], capture_output=True, text=True, check=True, timeout=60
    )
    if "Non-2xx" in done.stdout:
        raise SystemExit(f"{url} answered with errors:\n{done.stdout}")
    found = re.search(r"Requests/sec:\s+([0-9.]+)", done.stdout)
    assert found is not None, done.stdout
    return float(found[1])


@contextmanager
def no_op(folder: Path) -> Iterator[str]:
    """Serve the routes that do nothing."""
    (folder / "no_op.py").write_text(NO_OP, "utf-8")
    port = free_port()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "uvicorn",
            "--app-dir",
            str(folder),
            "--port",
            str(port),
            "--log-level",
            "error",
            "no_op:app",
        ]
    )
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                httpx.get(f"http://127.0.0.1:{port}/def")
                break
            except httpx.TransportError:
                continue
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


if __name__ == "__main__":
    main()
