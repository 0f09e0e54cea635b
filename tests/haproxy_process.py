# SPDX-License-Identifier: GPL-3.0-or-later
"""A real HAProxy on loopback, and tiny HTTP servers behind it that tell who answered."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from parts import skip_or_fail

START_SECONDS = 15
STOP_SECONDS = 10
ANSWER_SECONDS = 20


def require_haproxy(reason: str) -> Path:
    """Find HAProxy; skip the test, or fail it where every part is required, if this machine has none."""
    found = shutil.which("haproxy", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        skip_or_fail(f"{reason}: haproxy was not found, install the Debian package haproxy")
    return Path(found)


def check_configuration(text: str) -> subprocess.CompletedProcess[str]:
    """Let the real HAProxy judge a configuration."""
    with tempfile.TemporaryDirectory(prefix="node-manager-haproxy-") as folder:
        path = Path(folder, "haproxy.cfg")
        path.write_text(text, "utf-8")
        return subprocess.run(
            [str(require_haproxy("HAProxy judges its own configuration")), "-c", "-f", str(path)],
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )


def make_configuration(backends: str, backend: str, address: str, folder: Path) -> str:
    """Put backend sections into a whole configuration, with a front door and a stats socket of each level."""
    return (
        "global\n"
        # With one thread the shares are exact.
        "    nbthread 1\n"
        f"    stats socket {folder}/admin.sock mode 600 level admin\n"
        f"    stats socket {folder}/operator.sock mode 600 level operator\n"
        "    maxconn 200\n"
        "defaults\n"
        "    mode http\n"
        "    timeout connect 2s\n"
        "    timeout client 30s\n"
        "    timeout server 30s\n"
        "frontend door\n"
        f"    bind {address}\n"
        f"    default_backend {backend}\n"
        f"{backends}"
    )


@dataclass
class HaproxyProcess:
    """One HAProxy with the given backend sections, between entering and leaving; its door leads to *backend*."""

    backends: str
    backend: str
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    folder: Path = field(init=False)

    @property
    def socket_path(self) -> Path:
        """Give the runtime API's socket."""
        return self.folder / "admin.sock"

    @property
    def log(self) -> str:
        """Read what HAProxy wrote."""
        return (self.folder / "log").read_text("utf-8", "replace")

    def __enter__(self) -> HaproxyProcess:
        """Start it and wait until its door is open."""
        program = require_haproxy("traffic is shared by a real HAProxy")
        self.port = free_port("127.0.0.1")
        # A unix socket's path may have some 90 characters only, which pytest's folders can pass.
        self.folder = Path(tempfile.mkdtemp(prefix="haproxy-"))
        (self.folder / "haproxy.cfg").write_text(
            make_configuration(self.backends, self.backend, f"127.0.0.1:{self.port}", self.folder), "utf-8"
        )
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [str(program), "-db", "-f", str(self.folder / "haproxy.cfg")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_until_open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it and forget all it had."""
        if self.process is not None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(STOP_SECONDS)
        shutil.rmtree(self.folder)

    def ask(self, requests: int) -> Counter[str]:
        """Send requests one after the other; count who answered, a failure under its status."""
        answered: Counter[str] = Counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)
        try:
            for _ in range(requests):
                connection.request("GET", "/")
                answer = connection.getresponse()
                body = answer.read().decode()
                answered[body if answer.status == 200 else str(answer.status)] += 1
        finally:
            connection.close()
        return answered

    def _wait_until_open(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"HAProxy ended at once:\n{self.log}")
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                # It opens its door a moment before its sockets have their names.
                for path in (self.socket_path, self.folder / "operator.sock"):
                    with socket.socket(socket.AF_UNIX) as probe:
                        probe.connect(str(path))
            except OSError:
                self._pause()
            else:
                return
        raise TimeoutError(f"HAProxy was not ready in {START_SECONDS} s:\n{self.log}")

    def _pause(self) -> None:
        assert self.process is not None
        try:
            self.process.wait(0.05)
        except subprocess.TimeoutExpired:
            return


class ServingNode:
    """An HTTP server in the place of a deployment's replica; GET /slow answers when it is released."""

    def __init__(self, node_id: str, address: str, port: int) -> None:
        self.node_id = node_id
        self.address = address
        self.slow_begun = threading.Event()
        self.release = threading.Event()
        node = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = ANSWER_SECONDS
            # Head and body in one packet: two of them wait 40 ms for each other.
            wbufsize = -1

            def do_GET(self) -> None:
                if self.path == "/slow":
                    node.slow_begun.set()
                    node.release.wait(ANSWER_SECONDS)
                body = node.node_id.encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
                pass

        self._server = _QuietServer((address, port), Handler)
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name=f"node {node_id}")

    def __enter__(self) -> ServingNode:
        """Serve."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Serve no more."""
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(STOP_SECONDS)


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing: HAProxy's checks connect and reset, which is no error here."""


@contextmanager
def serving_nodes(node_ids: Sequence[str], subnet: str = "127.0.31") -> Iterator[dict[str, ServingNode]]:
    """Serve as each of these nodes, on an address of its own each and one port for all."""
    last_error: OSError | None = None
    for _ in range(20):
        with ExitStack() as stack:
            try:
                port = free_port(f"{subnet}.1")
                nodes = {
                    node_id: stack.enter_context(ServingNode(node_id, f"{subnet}.{number}", port))
                    for number, node_id in enumerate(node_ids, 1)
                }
            except OSError as error:
                last_error = error
                continue
            yield nodes
            return
    raise RuntimeError(f"no port is free on all of {subnet}.1 to {len(node_ids)}") from last_error


@dataclass
class SlowRequest:
    """A request to /slow, from entering on in flight; finish() gives who answered it."""

    haproxy: HaproxyProcess
    connection: http.client.HTTPConnection | None = None

    def __enter__(self) -> SlowRequest:
        """Send it."""
        self.connection = http.client.HTTPConnection("127.0.0.1", self.haproxy.port, timeout=ANSWER_SECONDS)
        self.connection.request("GET", "/slow")
        return self

    def finish(self) -> tuple[int, str]:
        """Wait for its answer: status and who."""
        assert self.connection is not None
        answer = self.connection.getresponse()
        return answer.status, answer.read().decode()

    def __exit__(self, *_: object) -> None:
        """Give it up if it is still in flight."""
        if self.connection is not None:
            self.connection.close()


def free_port(address: str) -> int:
    """Find a TCP port on *address* that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
