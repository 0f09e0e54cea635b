# SPDX-License-Identifier: GPL-3.0-or-later
"""Many callers at once, each with an allocation of its own, that go on asking until they have an answer."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx

PATIENCE_SECONDS = 90


@dataclass
class Callers:
    """A crowd that wants slots of one node; caller n talks to the n-th service in turn."""

    services: Sequence[httpx.Client]
    node_id: str
    count: int
    answers: dict[str, httpx.Response] = field(default_factory=dict)
    # Calls that ended without an answer.
    cut: int = 0
    refused_for_now: int = 0
    _progress: threading.Condition = field(default_factory=threading.Condition)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Let all of them call at the same moment."""
        barrier = threading.Barrier(self.count)
        self._threads = [
            threading.Thread(target=self._call, args=(number, barrier), daemon=True) for number in range(self.count)
        ]
        for thread in self._threads:
            thread.start()

    def wait_for(self, answers: int) -> None:
        """Wait until so many have their answer."""
        with self._progress:
            assert self._progress.wait_for(lambda: len(self.answers) >= answers, PATIENCE_SECONDS), len(self.answers)

    def finish(self) -> list[int]:
        """Wait for all; give the statuses of their answers."""
        self.wait_for(self.count)
        for thread in self._threads:
            thread.join(10)
        return sorted(answer.status_code for answer in self.answers.values())

    def holders(self) -> list[str]:
        """Name the allocations that were promised to their callers."""
        return sorted(key for key, answer in self.answers.items() if answer.status_code in {200, 201})

    def _call(self, number: int, barrier: threading.Barrier) -> None:
        client, allocation_id = self.services[number % len(self.services)], f"caller-{number}"
        # Of several owners, or their account alone would keep the callers apart.
        owner = f"crowd-{number % 7}"
        wanted = {"allocation_id": allocation_id, "owner": owner, "resources": {"memory_mib": 1}}
        barrier.wait(30)
        deadline = time.monotonic() + PATIENCE_SECONDS
        for attempt in itertools.count():
            assert time.monotonic() < deadline
            try:
                answer = client.post(f"/nodes/{self.node_id}/allocate", json=wanted)
            except httpx.TransportError:
                answer = None
            with self._progress:
                if answer is not None and answer.status_code != 503:
                    self.answers[allocation_id] = answer
                    self._progress.notify_all()
                    return
                self.cut += answer is None
                self.refused_for_now += answer is not None
                # Others' answers wake it up; while the service is down there are none.
                self._progress.wait(0.05 * min(attempt + 1, 10))


def many_connections(url: str, token: str) -> httpx.Client:
    """Open a client that keeps none of its callers waiting for another."""
    return httpx.Client(
        base_url=url,
        headers={"Authorization": f"Bearer {token}"},
        timeout=60,
        # Each call on a connection of its own: the service may close an idle one just as it is taken up again.
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
    )
