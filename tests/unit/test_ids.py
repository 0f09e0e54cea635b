# SPDX-License-Identifier: GPL-3.0-or-later
"""Ids that grow with time."""

from __future__ import annotations

import time
import uuid

from node_manager.ids import ordered_ids


def test_ordered_ids_gives_uuids_of_version_7() -> None:
    found = [uuid.UUID(text) for text in ordered_ids(200)]

    assert {(each.version, each.variant) for each in found} == {(7, uuid.RFC_4122)}
    assert [str(each) for each in found] == [str(uuid.UUID(str(each))) for each in found]


def test_ordered_ids_differ() -> None:
    assert len(set(ordered_ids(5000))) == 5000


def test_ordered_ids_leave_no_bit_the_same() -> None:
    numbers = [uuid.UUID(text).int & ((1 << 80) - 1) for text in ordered_ids(500)]
    ones, zeros = 0, 0
    for number in numbers:
        ones |= number
        zeros |= ~number
    fixed = (0xF << 76) | (0x3 << 62)

    assert ones & zeros & ((1 << 80) - 1) == ((1 << 80) - 1) & ~fixed


def test_ordered_ids_tell_the_time() -> None:
    before = time.time_ns() // 1_000_000

    (found,) = ordered_ids(1)

    assert before <= uuid.UUID(found).int >> 80 <= time.time_ns() // 1_000_000


def test_ordered_ids_of_none() -> None:
    assert ordered_ids(0) == []
