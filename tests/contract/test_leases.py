# SPDX-License-Identifier: GPL-3.0-or-later
"""Leases: of two managers one gets it, on either engine."""

from __future__ import annotations

import threading

import pytest
from builders import START, seconds
from node_manager import leases
from node_manager.store import Store


def acquire(store: Store, holder: str, after: float = 0) -> bool:
    """Try to take the lease for ten seconds, some seconds after START."""
    with store.write() as connection:
        return leases.acquire(connection, "leader", holder, START + seconds(after), 10)


def test_acquire_takes_what_is_free(store: Store) -> None:
    assert acquire(store, "a")


@pytest.mark.parametrize(("after", "taken"), [(0, False), (9.9, False), (10, True)], ids=["held", "nearly", "run-out"])
def test_acquire_takes_from_another_only_what_ran_out(store: Store, after: float, taken: bool) -> None:
    acquire(store, "a")

    assert acquire(store, "b", after) == taken


def test_acquire_again_prolongs(store: Store) -> None:
    acquire(store, "a")
    acquire(store, "a", 8)

    assert not acquire(store, "b", 15)


def test_acquire_at_once_gives_it_to_one(store: Store) -> None:
    barrier = threading.Barrier(4)
    taken: list[bool] = []

    def compete(holder: str) -> None:
        barrier.wait(10)
        taken.append(acquire(store, holder))

    threads = [threading.Thread(target=compete, args=(holder,)) for holder in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert sorted(taken) == [False, False, False, True]


def test_renew_tells_that_it_was_taken_away(store: Store) -> None:
    acquire(store, "a")
    acquire(store, "b", 11)

    with store.write() as connection:
        renewed = [leases.renew(connection, "leader", holder, START + seconds(12), 10) for holder in "ab"]

    assert renewed == [False, True]


def test_release_gives_back_only_ones_own(store: Store) -> None:
    acquire(store, "a")

    with store.write() as connection:
        leases.release(connection, "leader", "b")
    held = not acquire(store, "c", 1)
    with store.write() as connection:
        leases.release(connection, "leader", "a")

    assert (held, acquire(store, "c", 1)) == (True, True)


def test_live_and_sweep_take_the_prefix_literally(store: Store) -> None:
    with store.write() as connection:
        for name, holder, after in [("job_1", "a", 0), ("jobx2", "b", 0), ("job_3", "c", -60)]:
            leases.acquire(connection, name, holder, START + seconds(after), 10)

        live = leases.live(connection, "job_", START)
        leases.sweep(connection, "job_", START + seconds(3600))
        left = leases.live(connection, "", START - seconds(3600))

    assert (live, left) == ({"a"}, {"b"})
