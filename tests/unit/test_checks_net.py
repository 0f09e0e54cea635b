# SPDX-License-Identifier: GPL-3.0-or-later
"""The checks that talk to something, against real servers on loopback, good ones and hostile ones."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils import _checks_net as net
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks import parse_check, run_checks
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks_deadline import OutOfTimeError
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Answer = Callable[[socket.socket, threading.Event], None]

NOW = datetime.now(UTC)
OK = b"HTTP/1.1 200 OK\r\n"


@contextmanager
def serving(answer: Answer, host: str = "127.0.0.1", certificate: Path | None = None) -> Iterator[int]:
    """Run *answer* for each connection, and give the port; the event is set when the test is over."""
    over = threading.Event()
    context: ssl.SSLContext | None = None
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    threads: list[threading.Thread] = []

    def talk(connection: socket.socket) -> None:
        # The client may hang up at any point, which is what several tests are about.
        with contextlib.suppress(OSError), connection:
            connection.settimeout(10)
            if context is None:
                answer(connection, over)
            else:
                with context.wrap_socket(connection, server_side=True) as secured:
                    answer(secured, over)

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                if over.is_set():
                    connection.close()
                    return
                threads.append(threading.Thread(target=talk, args=(connection,)))
                threads[-1].start()

    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        acceptor = threading.Thread(target=accept, args=(listener,))
        acceptor.start()
        try:
            yield port
        finally:
            over.set()
            with socket.create_connection((host, port), timeout=5):
                pass
            acceptor.join(10)
            for thread in threads:
                thread.join(10)


def saying(reply: bytes) -> Answer:
    def answer(connection: socket.socket, over: threading.Event) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            part = connection.recv(4096)
            if not part:
                return
            request += part
        connection.sendall(reply)

    return answer


def dripping(start: bytes, drop: bytes = b"x") -> Answer:
    """Send *start*, then a drop every 20 ms for as long as somebody listens."""

    def answer(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(start)
        while not over.wait(0.02):
            connection.sendall(drop)

    return answer


def silent(connection: socket.socket, over: threading.Event) -> None:
    over.wait(20)


def look(**raw: Any) -> dict[str, Any]:
    report = run_checks([parse_check({"name": "x", **raw})], now=lambda: NOW)
    checks: Any = report["checks"]
    return dict(checks[0])


def self_signed(folder: Path, days: float = 365, since_days: float = -1) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW + timedelta(days=since_days))
        .not_valid_after(NOW + timedelta(days=days))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    path = folder / "server.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Give a port that is taken but not listened on, so that nobody else can start to."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_check_tcp_passes_where_a_connection_is_accepted(host: str) -> None:
    with serving(silent, "::1" if host == "::1" else "127.0.0.1") as port:
        check = look(kind="tcp", host=host, port=port)

    assert check["state"] == "passed"
    assert check["message"].startswith(("[::1]" if host == "::1" else host) + f":{port} accepted in ")
    assert check["latency_seconds"] > 0


def test_check_tcp_fails_where_nothing_listens(closed_port: int) -> None:
    check = look(kind="tcp", port=closed_port)

    assert check["state"] == "failed"
    assert check["message"] == f"127.0.0.1:{closed_port} refused the connection: start what should listen there"


@pytest.mark.parametrize(
    "host",
    ["no.such.host.invalid", "a" * 70 + ".example", ".", "a..b"],
    ids=["unknown", "long-label", "dot", "empty-label"],
)
def test_check_tcp_fails_for_names_that_do_not_resolve(host: str) -> None:
    check = look(kind="tcp", host=host, port=1)

    assert check["state"] == "failed"
    assert check["message"].startswith(f"{host}:1 ")


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """Give a port whose backlog is full: Linux drops further SYNs, so a connection neither opens nor fails."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_check_tcp_times_out_where_nobody_accepts(deaf_port: int) -> None:
    check = look(kind="tcp", port=deaf_port, timeout_seconds=0.3)

    assert check["state"] == "failed"
    assert "timed out after 0.3 s" in check["message"]


def test_check_tcp_goes_on_to_the_next_address(deaf_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(silent) as port:
        ports = [deaf_port, port]
        answers = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", number)) for number in ports]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_options: answers)
        check = look(kind="tcp", host="two.example", port=1, timeout_seconds=0.6)
        monkeypatch.undo()

    assert check["state"] == "passed"


@pytest.mark.parametrize(
    ("reply", "raw", "state", "said"),
    [
        pytest.param(OK + b"\r\nfine", {}, "passed", "answered 200 in ", id="ok"),
        pytest.param(OK + b"\r\nfine", {"expect_text": "fine"}, "passed", "answered 200", id="text"),
        pytest.param(OK + b"\r\nb\xc3\xb6se", {"expect_text": "böse"}, "passed", "answered 200", id="utf8-text"),
        pytest.param(OK + b"\r\nbad", {"expect_text": "fine"}, "failed", 'first 3 bytes lack "fine"', id="other-text"),
        pytest.param(
            b"HTTP/1.1 204 No\r\n\r\n", {"expect_status": [200, 204]}, "passed", "answered 204", id="no-content"
        ),
        pytest.param(b"HTTP/1.1 503 No\r\n\r\n", {}, "failed", "answered 503 in ", id="unavailable"),
        pytest.param(b"HTTP/1.1 100 Go\r\n\r\n" + OK + b"\r\n", {}, "passed", "answered 200", id="continue-first"),
        pytest.param(
            b"HTTP/1.1 301 Moved\r\nLocation: http://192.0.2.1/\r\n\r\n",
            {},
            "failed",
            "expected 200: it points to http://192.0.2.1/",
            id="redirect",
        ),
        pytest.param(
            OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nfi\r\n2\r\nne\r\n0\r\n\r\n",
            {"expect_text": "fine"},
            "passed",
            "answered 200",
            id="chunked",
        ),
        pytest.param(OK + b"Content-Length: 9\r\n\r\nfin", {"expect_text": "fine"}, "failed", "", id="cut-body"),
        pytest.param(
            OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            {"expect_text": "a"},
            "failed",
            "does not speak HTTP",
            id="bad-chunk",
        ),
        pytest.param(b"", {}, "failed", "closed the connection before it answered", id="empty"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", {}, "failed", "does not speak HTTP: BadStatusLine", id="ssh"),
        pytest.param(b"HTTP/1.1 abc OK\r\n\r\n", {}, "failed", "does not speak HTTP: BadStatusLine", id="status-word"),
        pytest.param(b"HTTP/1.1 99999 OK\r\n\r\n", {}, "failed", "does not speak HTTP", id="status-range"),
        pytest.param(b"\x00\xff\x16\x03" * 999, {}, "failed", "does not speak HTTP", id="binary"),
        pytest.param(b"HTTP/1.1 200 " + b"x" * 70000, {}, "failed", "does not speak HTTP: LineTooLong", id="long-line"),
        pytest.param(OK + b"a: b\r\n" * 200 + b"\r\n", {}, "failed", "got more than 100 headers", id="many-headers"),
        pytest.param(
            OK + b"\r\n" + b"x" * 65530 + b"fine" * 9, {"expect_text": "fine"}, "passed", "", id="text-at-64k"
        ),
        pytest.param(
            OK + b"\r\n" + b"x" * 65536 + b"fine",
            {"expect_text": "fine"},
            "failed",
            "first 65536 bytes",
            id="text-past-64k",
        ),
    ],
)
def test_check_http_judges_the_answer(reply: bytes, raw: dict[str, Any], state: str, said: str) -> None:
    with serving(saying(reply)) as port:
        check = look(kind="http", url=f"http://127.0.0.1:{port}/x", **raw)

    assert check["state"] == state
    assert said in check["message"]
    assert len(check["message"]) <= 300


def test_check_http_reads_no_more_than_it_needs() -> None:
    sent: list[int] = []

    def answer(connection: socket.socket, over: threading.Event) -> None:
        total_bytes = 50 * 1024 * 1024
        connection.sendall(OK + b"Content-Length: %d\r\n\r\n" % total_bytes)
        block = b"x" * 65536
        try:
            for count in range(total_bytes // len(block)):
                connection.sendall(block)
                sent.append(count)
        except OSError:
            return

    with serving(answer) as port:
        check = look(kind="http", url=f"http://127.0.0.1:{port}/", expect_text="never there")

    assert "its first 65536 bytes lack" in check["message"]
    # What the socket buffers of loopback hold besides, at most 6 MiB each by default.
    assert len(sent) * 65536 < 25 * 1024 * 1024


def test_check_http_passes_for_an_endless_stream_that_says_the_word() -> None:
    with serving(dripping(OK + b"\r\nhello fine", b"\n")) as port:
        check = look(kind="http", url=f"http://127.0.0.1:{port}/", expect_text="fine")

    assert check["state"] == "passed"


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(silent, id="silent"),
        pytest.param(dripping(b"HTTP/1.1 2"), id="status-line"),
        pytest.param(dripping(OK + b"a: "), id="header"),
        pytest.param(dripping(b"", b"HTTP/1.1 100 Go\r\n\r\n"), id="continue-for-ever"),
        pytest.param(dripping(OK + b"\r\n"), id="body"),
        pytest.param(dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"), id="chunks"),
    ],
)
def test_check_http_ends_at_its_deadline_however_slow_the_answer(answer: Answer) -> None:
    with serving(answer) as port:
        check = look(
            kind="http", url=f"http://127.0.0.1:{port}/?token=secret", expect_text="never", timeout_seconds=0.4
        )

    assert check["state"] == "failed"
    assert check["message"].startswith(f"http://127.0.0.1:{port}/ timed out after 0.4 s")
    # By itself, not because it was given up: its own deadline, less than the grace after it.
    assert 0.39 <= check["latency_seconds"] < 0.4 + 0.4


def test_check_http_asks_an_ipv6_address_with_its_host_header() -> None:
    asked: list[bytes] = []

    def answer(connection: socket.socket, over: threading.Event) -> None:
        asked.append(connection.recv(4096))
        connection.sendall(OK + b"\r\n")

    with serving(answer, "::1") as port:
        check = look(kind="http", url=f"http://[::1]:{port}/a?b=c")

    assert check["state"] == "passed"
    assert asked[0].startswith(b"GET /a?b=c HTTP/1.1\r\nHost: [::1]:%d\r\n" % port)


def test_check_http_keeps_tokens_out_of_the_report(closed_port: int) -> None:
    check = look(kind="http", url=f"http://127.0.0.1:{closed_port}/x?token=secret")

    assert "refused" in check["message"]
    assert "secret" not in check["message"]


def test_check_http_refuses_a_certificate_that_is_not_trusted(tmp_path: Path) -> None:
    with serving(saying(OK + b"\r\n"), certificate=self_signed(tmp_path)) as port:
        check = look(kind="http", url=f"https://127.0.0.1:{port}/")

    assert check["state"] == "failed"
    assert "shows a certificate that is not trusted: self-signed certificate" in check["message"].replace(
        "self signed", "self-signed"
    )


@pytest.mark.parametrize(
    ("host", "days", "state"),
    [("127.0.0.1", 365, "passed"), ("localhost", 365, "passed"), ("127.0.0.1", -0.5, "failed")],
    ids=["address", "name", "expired"],
)
def test_check_http_verifies_against_the_nodes_authorities(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, days: float, state: str
) -> None:
    certificate = self_signed(tmp_path, days)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    with serving(saying(OK + b"\r\n"), certificate=certificate) as port:
        check = look(kind="http", url=f"https://{host}:{port}/")

    assert check["state"] == state


def test_check_http_accepts_any_certificate_if_told_so(tmp_path: Path) -> None:
    with serving(saying(OK + b"\r\nfine"), certificate=self_signed(tmp_path, -0.5)) as port:
        check = look(kind="http", url=f"https://127.0.0.1:{port}/", verify_tls=False, expect_text="fine")

    assert check["state"] == "passed"


def test_check_http_says_that_a_server_speaks_no_tls() -> None:
    with serving(saying(OK + b"\r\n")) as port:
        # The server above waits for the end of a request that never comes in clear text.
        check = look(kind="http", url=f"https://127.0.0.1:{port}/", verify_tls=False, timeout_seconds=0.3)

    assert check["state"] == "failed"


@pytest.mark.parametrize("kind", ["http", "certificate"])
def test_checks_end_in_a_tls_handshake_that_hangs(kind: str) -> None:
    with serving(silent) as port:
        place = {"url": f"https://127.0.0.1:{port}/"} if kind == "http" else {"host": "127.0.0.1", "port": port}
        check = look(kind=kind, timeout_seconds=0.3, **place)

    assert "timed out after 0.3 s" in check["message"]
    assert check["latency_seconds"] < 0.3 + 0.4


def test_connect_opens_nothing_when_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    monkeypatch.setattr(net.socket, "socket", lambda *_: opened.append(_))

    with pytest.raises(OutOfTimeError):
        net.connect("127.0.0.1", 9, time.monotonic() - 1)
    assert opened == []


def test_check_dns_lists_the_addresses() -> None:
    check = look(kind="dns", hostname="localhost")

    assert check["state"] == "passed"
    assert "localhost resolves to " in check["message"]


@pytest.mark.parametrize("hostname", ["no.such.host.invalid", "a" * 70], ids=["unknown", "long-label"])
def test_check_dns_fails_for_names_that_do_not_resolve(hostname: str) -> None:
    check = look(kind="dns", hostname=hostname, timeout_seconds=10)

    assert check["state"] == "failed"
    assert check["message"].startswith(hostname)


@pytest.mark.parametrize(
    ("days", "since_days", "state", "said"),
    [
        pytest.param(365, -1, "passed", "more days", id="good"),
        pytest.param(10, -1, "failed", "in 10 days (limit 14): renew it", id="soon"),
        pytest.param(-0.5, -1, "failed", "expired 0.5 days ago", id="expired"),
        pytest.param(20, 1, "failed", "is valid only from ", id="not-yet"),
    ],
)
def test_check_certificate_reads_what_a_server_shows(
    tmp_path: Path, days: float, since_days: float, state: str, said: str
) -> None:
    with serving(silent, certificate=self_signed(tmp_path, days, since_days)) as port:
        check = look(kind="certificate", host="127.0.0.1", port=port, server_name="localhost")

    assert check["state"] == state
    assert said in check["message"]
    assert check["unit"] == "days"
    assert check["value"] == pytest.approx(days, abs=0.1)


def test_check_certificate_is_unknown_where_no_server_is(closed_port: int) -> None:
    check = look(kind="certificate", host="127.0.0.1", port=closed_port)

    assert check["state"] == "unknown"
    assert "refused the connection" in check["message"]


def test_check_certificate_is_unknown_where_no_tls_is() -> None:
    with serving(dripping(b"SSH-2.0-OpenSSH_9.2\r\n")) as port:
        check = look(kind="certificate", host="127.0.0.1", port=port)

    assert check["state"] == "unknown"
    assert "failed in the TLS handshake" in check["message"]


def test_connection_is_closed_after_a_check() -> None:
    ended = threading.Event()

    def answer(connection: socket.socket, over: threading.Event) -> None:
        if connection.recv(1) == b"":
            ended.set()

    with serving(answer) as port:
        look(kind="tcp", port=port)
        deadline = time.monotonic() + 5
        closed = ended.wait(deadline - time.monotonic())

    assert closed
