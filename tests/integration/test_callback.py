# SPDX-License-Identifier: GPL-3.0-or-later
"""What runs see lands in the registry, or waits on disk until it does: real runs, a real store, a real HTTP server."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from ansible_collections.iot_platform.node_manager.plugins.plugin_utils._spool import Spool
from ansible_runs import Controller, make_controller
from node_manager.domain import Health
from node_manager.samples import newest_sample

FACTS = "iot_platform.node_manager.node_facts"
RESOURCES = "iot_platform.node_manager.node_resources"
QUICK = "interval_seconds=0.1"
NOBODY_LISTENS = "http://127.0.0.1:9"


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    return make_controller(tmp_path / "home")


def ad_hoc(
    controller: Controller, module: str, arguments: str = "", *more: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    return controller.run(
        "ansible", "gw-7", "-i", "gw-7,", "-c", "local", "-m", module, "-a", arguments,
        "-e", f"ansible_python_interpreter={sys.executable}", *more, **environment,
        ANSIBLE_LOAD_CALLBACK_PLUGINS="1",
    )  # fmt: skip


def spooled(controller: Controller) -> list[Path]:
    return sorted((controller.home / "spool").glob("*"))


class Registry(BaseHTTPRequestHandler):
    """An API that answers each request in one way."""

    status = 422
    body = b'{"code": "invalid_input", "detail": "observations: no"}'
    requests: list[tuple[str, str | None, bytes]]

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.requests.append((self.path, self.headers["Authorization"], content))
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[tuple[str, type[Registry]]]:
    handler = type("Answering", (Registry,), {"requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_callback_records_what_a_module_saw(controller: Controller) -> None:
    controller.register("gw-7")

    done = ad_hoc(controller, RESOURCES, QUICK)

    assert done.returncode == 0, done.stdout + done.stderr
    with controller.store() as store:
        sample = newest_sample(store, "gw-7")
    assert sample is not None
    assert sample.source == "ansible"
    assert spooled(controller) == []


def test_callback_records_nothing_in_check_mode(controller: Controller) -> None:
    before = controller.register("gw-7").revision

    ad_hoc(controller, RESOURCES, QUICK, "--check")

    assert before == controller.node("gw-7").revision


def test_callback_records_that_a_node_refused(controller: Controller) -> None:
    controller.register("gw-7", connection={"kind": "ssh", "port": 9})

    done = controller.run("ansible", "gw-7", "-m", "ansible.builtin.ping", ANSIBLE_LOAD_CALLBACK_PLUGINS="1")

    assert done.returncode == 4
    state = controller.node("gw-7").state
    assert state.health is Health.UNREACHABLE
    assert "ConnectionRefused: ssh: connect to host 127.0.0.1 port 9: Connection refused" in state.health_cause


def test_callback_says_which_hosts_are_not_registered(controller: Controller) -> None:
    done = ad_hoc(controller, RESOURCES, QUICK)

    assert "Not recorded, because not registered: gw-7" in done.stderr
    assert spooled(controller) == []


def test_callback_keeps_what_it_cannot_deliver_for_the_next_run(controller: Controller) -> None:
    controller.register("gw-7")
    first = ad_hoc(controller, RESOURCES, QUICK, NODE_MANAGER_URL=NOBODY_LISTENS)
    assert first.returncode == 0
    assert "can't take 1 results now" in " ".join(first.stderr.split())
    assert len(spooled(controller)) == 1

    second = ad_hoc(controller, "ansible.builtin.ping")

    assert "delivered 1 results of earlier runs" in second.stdout
    assert spooled(controller) == []
    with controller.store() as store:
        assert newest_sample(store, "gw-7") is not None


def test_callback_hands_in_over_http_with_the_token(
    controller: Controller, api: tuple[str, type[Registry]], tmp_path: Path
) -> None:
    url, handler = api
    handler.status, handler.body = 200, b'{"recorded": 1, "late": 0, "rejected": []}'
    (tmp_path / "token").write_text("secret\n")

    done = ad_hoc(
        controller, FACTS, NODE_MANAGER_URL=url, NODE_MANAGER_TOKEN_FILE=str(tmp_path / "token"), https_proxy=""
    )

    assert done.stderr == ""
    ((path, authorization, content),) = handler.requests
    assert (path, authorization) == ("/observations", "Bearer secret")
    (observation,) = json.loads(content)["observations"]
    assert (observation["node_id"], observation["kind"], observation["source"]) == ("gw-7", "facts", "ansible")


def test_callback_does_not_retry_for_ever_what_was_refused(
    controller: Controller, api: tuple[str, type[Registry]]
) -> None:
    url, handler = api
    ad_hoc(controller, FACTS, NODE_MANAGER_URL=url)
    asked = len(handler.requests)

    done = ad_hoc(controller, "ansible.builtin.ping", NODE_MANAGER_URL=url)

    assert done.returncode == 0
    assert asked == len(handler.requests) == 1
    assert [path.suffix for path in spooled(controller)] == [".refused"]


def test_callback_ignores_what_was_seen_on_another_host(controller: Controller, tmp_path: Path) -> None:
    controller.register("gw-7")
    play = tmp_path / "delegated.yml"
    play.write_text(f"- hosts: gw-7\n  gather_facts: false\n  tasks:\n    - {FACTS}:\n      delegate_to: localhost\n")

    done = controller.run("ansible-playbook", str(play))

    assert done.returncode == 0, done.stderr
    assert controller.node("gw-7").facts is None


def test_callback_takes_each_item_of_a_loop(controller: Controller, tmp_path: Path) -> None:
    controller.register("gw-7")
    play = tmp_path / "loop.yml"
    play.write_text(
        "- hosts: gw-7\n  gather_facts: false\n  tasks:\n"
        f"    - {RESOURCES}:\n        {QUICK.replace('=', ': ')}\n      loop: [1, 2]\n"
    )
    before = controller.node("gw-7").revision

    controller.run("ansible-playbook", str(play))

    with controller.store() as store:
        assert newest_sample(store, "gw-7") is not None
    assert controller.node("gw-7").revision > before


KILLED = """
import os, signal, sys
from pathlib import Path
from ansible_collections.iot_platform.node_manager.plugins.plugin_utils._spool import Spool
segment = Spool(Path(sys.argv[1])).start()
segment.append({"node_id": "gw-7", "number": 1})
os.write(segment._handle, b'{"node_id": "half')
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_spool_outlives_a_killed_run(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=60)

    found = [batch for segment in Spool(tmp_path).abandoned() for batch in segment.batches(10, 1000)]

    assert found == [[{"node_id": "gw-7", "number": 1}]]


def test_spool_leaves_the_files_of_running_runs_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    segment = spool.start()
    segment.append({"node_id": "gw-7"})

    held = list(spool.abandoned())
    segment.release()
    free = list(spool.abandoned())

    assert held == []
    assert len(free) == 1


def test_spool_drops_the_oldest_files_beyond_its_bound(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=2500)
    for number in range(3):
        segment = spool.start()
        segment.append({"number": number, "text": "x" * 1000})
        segment.release()

    removed = spool.trim()

    kept = [batch[0]["number"] for segment in spool.abandoned() for batch in segment.batches(10, 10_000)]
    assert removed == 1
    assert kept == [1, 2]


def test_spool_cuts_batches_to_what_one_delivery_takes(tmp_path: Path) -> None:
    segment = Spool(tmp_path).start()
    for number in range(5):
        segment.append({"number": number, "text": "x" * 100})

    sizes = [len(batch) for batch in segment.batches(2, 10_000)]
    small = [len(batch) for batch in segment.batches(10, 250)]

    assert sizes == [2, 2, 1]
    assert small == [2, 2, 1]
