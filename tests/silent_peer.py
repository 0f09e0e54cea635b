# SPDX-License-Identifier: GPL-3.0-or-later
"""A way to a PostgreSQL that a test can silence: who is connected stays so, and what it sends is taken and never answered."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sqlalchemy import make_url


class SilentPeer:
    """A port on loopback before the socket of a PostgreSQL."""

    def __init__(self, url: str) -> None:
        """Listen; *url* is that of the cluster's unix socket."""
        self._url = make_url(url)
        self._path = f"{self._url.query['host']}/.s.PGSQL.5432"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._silent = threading.Event()
        self._open: list[socket.socket] = []

    @property
    def url(self) -> str:
        """Give the database's URL by this way."""
        host, port = self._listener.getsockname()
        by_port = self._url.set(host=host, port=port).difference_update_query(["host"])
        return by_port.render_as_string(hide_password=False)

    def fall_silent(self) -> None:
        """Say nothing any more to whoever is connected or connects."""
        self._silent.set()

    def speak(self) -> None:
        """Serve whoever connects from now on; the connections of before stay silent."""
        self._silent.clear()

    def serve(self) -> None:
        """Take connections until close()."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._path)
            self._open += [client, server]
            muted = threading.Event()
            for ends in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(*ends, muted), daemon=True).start()

    def close(self) -> None:
        """End with all connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for end in (self._listener, *self._open):
            end.close()

    def _pass_on(self, source: socket.socket, target: socket.socket, muted: threading.Event) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                if self._silent.is_set():
                    muted.set()
                if not muted.is_set():
                    target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)


@contextmanager
def silent_peer(url: str) -> Iterator[SilentPeer]:
    """Stand before a PostgreSQL until the end of the block."""
    peer = SilentPeer(url)
    threading.Thread(target=peer.serve, daemon=True).start()
    try:
        yield peer
    finally:
        peer.close()
