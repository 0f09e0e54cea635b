# SPDX-License-Identifier: GPL-3.0-or-later
"""What is remembered of a token while the store can't say whether it is still good."""

from __future__ import annotations

import pytest
from builders import FakeClock
from node_manager.access import Identity, Tokens
from node_manager.domain import Role
from node_manager.store import Store

CACHE_SECONDS = 2
HOUR = 3600


@pytest.mark.parametrize(
    ("seconds", "known", "remembered"),
    [
        (CACHE_SECONDS - 0.001, True, True),
        (CACHE_SECONDS, False, True),
        (HOUR - 1, False, True),
        (CACHE_SECONDS + HOUR - 0.001, False, True),
        (CACHE_SECONDS + HOUR, False, False),
        (HOUR + CACHE_SECONDS + 1, False, False),
    ],
)
def test_a_token_is_remembered_for_an_hour(
    store: Store, clock: FakeClock, seconds: float, known: bool, remembered: bool
) -> None:
    tokens = Tokens(store, CACHE_SECONDS, clock)
    text, record = tokens.create("prometheus", Role.VIEWER)
    told = tokens.authenticate(text)

    clock.advance(seconds)

    identity = Identity(record.token_id, "prometheus", Role.VIEWER)
    assert told == identity
    assert tokens.cached(text) == (identity if known else None)
    assert tokens.remembered(text) == (
        Identity(record.token_id, "prometheus", Role.VIEWER, remembered=True) if remembered else None
    )


def test_a_token_that_nobody_showed_is_not_remembered(store: Store, clock: FakeClock) -> None:
    tokens = Tokens(store, CACHE_SECONDS, clock)
    text, record = tokens.create("prometheus", Role.VIEWER)
    before = tokens.remembered(text)
    tokens.authenticate(text)

    tokens.revoke(record.token_id)

    assert (before, tokens.remembered(text)) == (None, None)
