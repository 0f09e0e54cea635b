# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The checks that talk to something: a TCP port, a web server, a name server, a TLS server's certificate.

Touches the network, and only what the check names. Imports the standard library and the pure files. Every wait ends at
the deadline that the caller gives, except name resolution, which the C library does as it likes: the caller gives up on
it. Runs on nodes with Python 3.8.
"""

from __future__ import annotations

import http.client
import io
import socket
import ssl
import time
from typing import TYPE_CHECKING, Optional, Tuple
from urllib.parse import urlsplit

from ._checks_deadline import OutOfTimeError, time_left
from ._checks_spec import DnsCheck, Finding, HttpCheck, TcpCheck, one_line
from ._words import CheckState

if TYPE_CHECKING:
    # The type of a buffer to read into; Python 3.8 has no name for it at run time.
    from _typeshed import WriteableBuffer

MAX_BODY_BYTES = 65536


def check_tcp(check: TcpCheck, deadline: float) -> Finding:
    """See whether a TCP connection is accepted; *deadline* is a time.monotonic() value."""
    place = format_place(check.host, check.port)
    started = time.monotonic()
    try:
        connect(check.host, check.port, deadline).close()
    except socket.timeout:
        raise OutOfTimeError from None
    except (OSError, UnicodeError) as error:
        return Finding(CheckState.FAILED, f"{place} {explain(error)}")
    milliseconds = (time.monotonic() - started) * 1000
    return Finding(CheckState.PASSED, f"{place} accepted in {milliseconds:.1f} ms")


def check_http(check: HttpCheck, deadline: float) -> Finding:
    """Ask for a URL once and judge the answer; redirects are answers like any other and are not followed."""
    shown = without_query(check.url)
    started = time.monotonic()
    try:
        sock = _connect_url(check, deadline)
        with sock:
            sock.settimeout(time_left(deadline))
            sock.sendall(_request(check.url))
            response = http.client.HTTPResponse(_Incoming(sock, deadline), method="GET")  # type: ignore[arg-type]
            with response:
                response.begin()
                milliseconds = (time.monotonic() - started) * 1000
                return _judge_response(check, shown, response, milliseconds)
    except socket.timeout:
        raise OutOfTimeError from None
    except ssl.SSLCertVerificationError as error:
        advice = "renew it, put its CA on the node, or set verify_tls to false"
        return Finding(
            CheckState.FAILED, f"{shown} shows a certificate that is not trusted: {error.verify_message}; {advice}"
        )
    except (OSError, UnicodeError) as error:
        return Finding(CheckState.FAILED, f"{shown} {explain(error)}")
    except http.client.HTTPException as error:
        said = one_line(f"{type(error).__name__} {error}", 120)
        return Finding(CheckState.FAILED, f"{shown} does not speak HTTP: {said}; see what listens there")


def check_dns(check: DnsCheck) -> Finding:
    """See whether a name resolves, the way programs on this node resolve it."""
    try:
        answers = socket.getaddrinfo(check.hostname, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return Finding(CheckState.FAILED, f"{check.hostname} {explain(error)}")
    addresses = sorted({str(answer[4][0]) for answer in answers})
    return Finding(CheckState.PASSED, f"{check.hostname} resolves to {', '.join(addresses[:4])}")


def fetch_certificate(host: str, port: int, server_name: Optional[str], deadline: float) -> bytes:
    """Read the certificate that a TLS server shows, as DER.

    Errors: OSError, UnicodeError; ValueError if the server shows none.
    """
    context = ssl.create_default_context()
    # Only the dates are read and nothing is sent: an expired or private certificate is what this check is there to see.
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with connect(host, port, deadline) as plain:
        plain.settimeout(time_left(deadline))
        with context.wrap_socket(plain, server_hostname=server_name or host) as secured:
            certificate = secured.getpeercert(binary_form=True)
    if not certificate:
        raise ValueError("the server shows no certificate")
    return certificate


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """Connect to the first address of *host* that answers.

    Each address gets an equal part of the time that is left: socket.create_connection gives each the whole, and a dead
    IPv6 address then costs the working IPv4 one its turn.
    """
    answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    failure: Optional[OSError] = None
    for position, (family, kind, protocol, _name, address) in enumerate(answers):
        # Before there is a socket, which nobody would close.
        share = time_left(deadline) / (len(answers) - position)
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError as error:
            failure = error
            continue
        try:
            sock.settimeout(share)
            sock.connect(address)
        except OSError as error:
            failure = error
            sock.close()
        else:
            return sock
    raise failure or OSError("has no address")


def format_place(host: str, port: int) -> str:
    """Write host and port together, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def explain(error: Exception) -> str:
    """Say what a failed connection means and what to do about it."""
    if isinstance(error, UnicodeError):
        return "is no valid host name: correct it"
    if isinstance(error, socket.gaierror):
        if error.errno == socket.EAI_AGAIN:
            return "could not be resolved, no name server answers: see /etc/resolv.conf and the network"
        return f"does not resolve ({one_line(error.strerror, 80)}): correct the name or its DNS record"
    if isinstance(error, ConnectionRefusedError):
        return "refused the connection: start what should listen there"
    if isinstance(error, ConnectionError):
        return "closed the connection before it answered: see its log"
    if isinstance(error, ssl.SSLError):
        return f"failed in the TLS handshake ({one_line(error.reason or error, 80)}): see that it speaks TLS"
    reason = error.strerror if isinstance(error, OSError) else None
    return f"could not be reached ({one_line(reason or error, 80)}): see routes and firewalls"


def without_query(url: str) -> str:
    """Leave out the part of a URL where tokens travel; a report is read by many."""
    parts = urlsplit(url)
    return one_line(f"{parts.scheme}://{parts.netloc}{parts.path}", 150)


class _Incoming(io.RawIOBase):
    """The receiving half of a socket, for http.client, with one deadline over the whole answer.

    A socket's own timeout starts anew with every byte, and a server that drips one a second would never end.
    """

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        super().__init__()
        self._sock = sock
        self._deadline = deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._sock.settimeout(time_left(self._deadline))
        return self._sock.recv_into(buffer)


def _connect_url(check: HttpCheck, deadline: float) -> socket.socket:
    parts = urlsplit(check.url)
    host = parts.hostname or ""
    secure = parts.scheme == "https"
    sock = connect(host, parts.port or (443 if secure else 80), deadline)
    if not secure:
        return sock
    try:
        context = ssl.create_default_context()
        if not check.verify_tls:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        sock.settimeout(time_left(deadline))
        return context.wrap_socket(sock, server_hostname=host)
    except BaseException:
        sock.close()
        raise


def _request(url: str) -> bytes:
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    lines = [
        f"GET {target} HTTP/1.1",
        f"Host: {parts.netloc}",
        "User-Agent: node-manager",
        "Accept: */*",
        "Accept-Encoding: identity",
        "Connection: close",
        "",
        "",
    ]
    return "\r\n".join(lines).encode("ascii")


def _judge_response(check: HttpCheck, shown: str, response: http.client.HTTPResponse, milliseconds: float) -> Finding:
    seen = f"{shown} answered {response.status} in {milliseconds:.1f} ms"
    if response.status not in check.expect_status:
        expected = ", ".join(str(status) for status in check.expect_status)
        moved = response.getheader("Location")
        advice = f"it points to {one_line(moved, 120)}" if moved else "see its log"
        return Finding(CheckState.FAILED, f"{seen}, expected {expected}: {advice}")
    if check.expect_text is not None:
        found, size = _search_body(response, check.expect_text.encode())
        if not found:
            return Finding(
                CheckState.FAILED,
                f'{seen}, but its first {size} bytes lack "{one_line(check.expect_text, 80)}": see its log',
            )
    return Finding(CheckState.PASSED, seen)


def _search_body(response: http.client.HTTPResponse, text: bytes) -> Tuple[bool, int]:
    """Read until the text occurs, so that an endless stream passes as soon as it has said the word."""
    body = b""
    while text not in body and len(body) < MAX_BODY_BYTES:
        part = response.read1(MAX_BODY_BYTES - len(body))
        if not part:
            break
        body += part
    return text in body, len(body)
