# SPDX-License-Identifier: GPL-3.0-or-later
"""Connections to PostgreSQL that don't wait for ever.

The kernel notices a peer that is gone. One that takes what it is sent and says nothing (a stopped server, a disk that hangs, a
proxy whose server was lost) only its client can give up, and libpq has no bound for that.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg.abc import RV, PQGen

PING_SECONDS = 3.0
READ_SECONDS = 15.0
# Migrations, and what forgets history, may take long.
WRITE_SECONDS = 600.0
# What was sent and not acknowledged, and a connection on which nothing is heard, are given up after about so long.
_PEER_SECONDS = 10
_TCP = {
    "keepalives_idle": _PEER_SECONDS,
    "keepalives_interval": 3,
    "keepalives_count": 3,
    "tcp_user_timeout": _PEER_SECONDS * 1000,
}


def make_engine(url: sa.URL, busy_timeout_seconds: float, **more: Any) -> sa.Engine:
    """Make an engine whose connections are given up once they are silent; what *url* itself says of TCP stands."""
    engine = sa.create_engine(
        url,
        connect_args={
            "connect_timeout": max(2, int(busy_timeout_seconds)),
            "options": f"-c lock_timeout={max(1, int(busy_timeout_seconds * 1000))}",
            **{name: value for name, value in _TCP.items() if name not in url.query},
        },
        **more,
    )

    @sa.event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, _record: Any, arguments: Any, named: Any) -> psycopg.Connection:
        return _Connection.connect(*arguments, **named)

    return engine


class _Connection(psycopg.Connection):
    """A connection that closes itself, and raises, once its server has been silent for too long."""

    def wait(self, gen: PQGen[RV], *arguments: Any, **named: Any) -> RV:
        """Wait for an answer."""
        return super().wait(self._bounded(gen), *arguments, **named)

    def _bounded(self, gen: PQGen[RV]) -> Generator[Any, Any, RV]:
        """Pass *gen* through; it is sent nothing (0) each tenth of a second in which the server said nothing."""
        heard_at = time.monotonic()
        ready: Any = None
        while True:
            try:
                wanted = gen.send(ready)
            except StopIteration as end:
                found: RV = end.value
                return found
            ready = yield wanted
            if ready:
                heard_at = time.monotonic()
            elif time.monotonic() - heard_at >= (patience := self._patience()):
                self.pgconn.finish()
                raise psycopg.OperationalError(f"the server has said nothing for {patience:.0f} s")

    def _patience(self) -> float:
        # The pool asks whether a connection lives outside of transactions, and nothing else does that.
        if self.autocommit:
            return PING_SECONDS
        return READ_SECONDS if self.read_only else WRITE_SECONDS
