# SPDX-License-Identifier: GPL-3.0-or-later
"""How many deployments a second one service places durably over HTTP, and how long a caller waits.

Each deployment is selected among 10,000 nodes (every node filtered and scored), reserved, recorded as a decision and committed
with its events before the caller hears of it. "single" is one deployment per request from many connections at once, which the
service lets share transactions; "batch" is 100 deployments per request. The anchor is Nomad's C2M run, 1,500 a second on three
servers (hashicorp.com/c2m); it can't be run here, so the floor beside ours is one request after the other.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from conftest import fresh_database, postgresql_cluster
from running_service import RunningService

NODES = int(os.environ.get("NODE_MANAGER_BENCH_NODES", "10000"))
SECONDS = 8
BATCH = 100
# Every request carries ids of its own: the same one twice would be answered from what is there.
SCRIPT = """
local token, batch, n, thread = "%s", %d, 0, 0
function setup(thread_) thread_:set("id", thread); thread = thread + 1 end
local one = '{"deployment_id":"%s-%%d-%%d","owner":"team-%%d","resources":{"cpu_millicores":%%d,"memory_mib":16},' ..
  '"constraints":{"node_types":["edge-compute","server"],"zones":["zone-%%d","zone-%%d","zone-%%d"],"labels":{"line":"%%s"}}}'
local function body()
  n = n + 1
  local z = n %% 9
  return one:format(id, n, n %% 7, 5 + n %% 11, z, (z + 3) %% 9, (z + 5) %% 9, ("abc"):sub(n %% 3 + 1, n %% 3 + 1))
end
request = function()
  local text
  if batch == 1 then
    text = body()
  else
    local all = {}
    for i = 1, batch do all[i] = body() end
    text = '{"deployments":[' .. table.concat(all, ",") .. ']}'
  end
  local headers = {["Authorization"] = "Bearer " .. token, ["Content-Type"] = "application/json"}
  return wrk.format("POST", "/deployment/node-selection", headers, text)
end
response = function(status, headers, body)
  if status ~= 201 and status ~= 200 then print("answered " .. status .. ": " .. body:sub(1, 300)) end
  if batch > 1 and body:find('"placement": *null') then print("not placed: " .. body:match('"problem": *{.*'):sub(1, 300)) end
end
"""
FILL = """
import sys
from datetime import UTC, datetime
sys.path.insert(0, {tests!r})
from builders import make_facts, make_report, make_sample, observe
from node_manager.main import connect
from node_manager.settings import load_settings
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.declarations import NodeDeclaration
settings = load_settings()
store = connect(settings)
registry, log, now = NodeRegistry(store, settings), ObservationLog(store, settings), datetime.now(UTC)
for n in range({nodes}):
    registry.register(NodeDeclaration(
        node_id=f"gw-{{n:05d}}", address=f"127.1.{{n // 250}}.{{n % 250 + 1}}", node_type="edge-compute",
        labels={{"line": "abc"[n % 3]}}, location={{"region": "eu", "zone": f"zone-{{n % 9}}", "site": f"plant-{{n % 90}}"}},
        capacity={{"cpu_millicores": 16000, "memory_mib": 65536}}))
for start in range(0, {nodes}, 500):
    log.record([
        observe(kind, data, now, f"gw-{{n:05d}}")
        for n in range(start, min({nodes}, start + 500))
        for kind, data in (("facts", make_facts()), ("sample", make_sample(20.0 + n % 40)), ("report", make_report()))
    ])
"""


def main() -> None:
    """Measure both engines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--engine", choices=["sqlite", "postgresql"], nargs="+", default=["sqlite", "postgresql"])
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("this benchmark drives the service with wrk: install the Debian package wrk")
    for engine in arguments.engine:
        with tempfile.TemporaryDirectory(prefix="node-manager-bench-") as folder, database(engine, Path(folder)) as url:
            environment = {
                "NODE_MANAGER_STORAGE__URL": url,
                # Nobody looks at the made-up nodes while they are measured.
                "NODE_MANAGER_MONITORING__STALE_AFTER_SECONDS": "86400",
                "NODE_MANAGER_SELECTION__KEEP_DECISIONS": "100000",
            }
            service = RunningService(Path(folder) / "home", environment)
            service.home.mkdir()
            fill = FILL.format(nodes=NODES, tests=str(Path(__file__).resolve().parents[1]))
            subprocess.run([sys.executable, "-c", fill], env=service.variables(), check=True)
            service.start()
            try:
                print(f"{engine}, {NODES} nodes", flush=True)
                for name, connections, batch in (("one by one", 1, 1), ("single", 48, 1), ("batch", 4, BATCH)):
                    measure(service, Path(folder), name, connections, batch)
            finally:
                service.stop()


def measure(service: RunningService, folder: Path, name: str, connections: int, batch: int) -> None:
    """Load the service for a while and print what came of it."""
    script = folder / "load.lua"
    script.write_text(SCRIPT % (service.token, batch, name.replace(" ", "-")), "utf-8")
    with service.client() as client:
        before = used(client)
        start = time.perf_counter()
        done = subprocess.run(
            [
                "wrk",
                "-t1",
                f"-c{connections}",
                f"-d{SECONDS}s",
                "--timeout",
                "20s",
                "--latency",
                "-s",
                str(script),
                service.url,
            ],
            capture_output=True,
            text=True,
            check=True,
            timeout=SECONDS + 60,
        )
        took = time.perf_counter() - start
        placed = used(client) - before
    bad = [line for line in done.stdout.splitlines() if line.startswith(("answered", "not placed"))]
    if bad:
        raise SystemExit("\n".join(bad[:3]))
    latency = {share: re.search(rf"{share}%\s+(\S+)", done.stdout) for share in (50, 99)}
    told = ", ".join(f"p{share} {found[1]}" for share, found in latency.items() if found)
    print(
        f"  {name:10}  {connections:2} connections  {placed / took:7.0f} placements/s   per request: {told}", flush=True
    )


def used(client) -> int:  # type: ignore[no-untyped-def]
    """Count what is reserved: the store's own word, not the load generator's."""
    total = 0
    for team in range(7):
        answer = client.get(f"/quotas/team-{team}")
        if answer.status_code == 404:
            client.put(f"/quotas/team-{team}", json={"hard": {"memory_mib": 10**12}})
            answer = client.get(f"/quotas/team-{team}")
        total += answer.json()["used"].get("memory_mib", 0)
    return int(total) // 16


@contextmanager
def database(engine: str, folder: Path) -> Iterator[str]:
    """Give the URL of an empty store."""
    if engine == "sqlite":
        yield f"sqlite:///{folder}/bench.db"
        return
    with ExitStack() as stack:
        server = stack.enter_context(postgresql_cluster({}))
        yield stack.enter_context(fresh_database(server))


if __name__ == "__main__":
    main()
