# SPDX-License-Identifier: GPL-3.0-or-later
"""What quotas promise, on either engine."""

from __future__ import annotations

import pytest
from books import assert_books_add_up
from builders import make_declaration, make_request
from node_manager.node_registry import NodeRegistry
from node_manager.problems import QuotaExceededError, QuotaNotFoundError
from node_manager.quotas import Quota, Quotas
from node_manager.resource_allocator import ResourceAllocator
from node_manager.store import tables
from stored import Rows

SHARED = {"gpu": {"count": 1, "share_milli": 460}}


@pytest.fixture(autouse=True)
def _node(registry: NodeRegistry) -> None:
    """Register gw-7 with 100 MiB and 2 GPUs."""
    registry.register(make_declaration(capacity={"memory_mib": 100, "gpu": 2}))


def test_put_sets_and_shows_what_is_used(quotas: Quotas, allocator: ResourceAllocator) -> None:
    allocator.allocate("gw-7", make_request("a1", {"memory_mib": 30, **SHARED}))

    quota = quotas.put("shop", {"memory_mib": 50, "gpu": 2})

    assert quota == Quota("shop", {"memory_mib": 50, "gpu": 2}, {"memory_mib": 30, "gpu": 0.46})
    assert quotas.get("shop") == quota


def test_put_replaces_all_limits(quotas: Quotas) -> None:
    quotas.put("shop", {"memory_mib": 50})

    quotas.put("shop", {"gpu": 0})

    assert quotas.get("shop").hard == {"gpu": 0}


def test_put_of_nothing_to_a_class_refuses_all_of_it(quotas: Quotas, allocator: ResourceAllocator) -> None:
    quotas.put("shop", {"gpu": 0})

    with pytest.raises(QuotaExceededError, match=r"gpu \(hard 0, used 0, requested 0.46\)"):
        allocator.allocate("gw-7", make_request("a1", SHARED))
    allocator.allocate("gw-7", make_request("a1"))


def test_put_below_what_is_used_evicts_nothing_and_stops_growth(
    quotas: Quotas, allocator: ResourceAllocator, rows: Rows
) -> None:
    allocator.allocate("gw-7", make_request("a1", {"memory_mib": 30}))
    before = rows.of(tables.allocations)

    quotas.put("shop", {"memory_mib": 20})

    assert rows.of(tables.allocations) == before
    with pytest.raises(QuotaExceededError):
        allocator.allocate("gw-7", make_request("a2", {"memory_mib": 1}))
    allocator.allocate("gw-7", make_request("a2", {"memory_mib": 1}, owner="other"))
    assert_books_add_up(rows)


def test_delete_lifts_the_limits_and_forgets_no_use(quotas: Quotas, allocator: ResourceAllocator, rows: Rows) -> None:
    quotas.put("shop", {"memory_mib": 30})
    allocator.allocate("gw-7", make_request("a1", {"memory_mib": 30}))

    assert quotas.delete("shop")

    allocator.allocate("gw-7", make_request("a2", {"memory_mib": 70}))
    assert_books_add_up(rows)
    assert quotas.put("shop", {"memory_mib": 1}).used == {"memory_mib": 100}


def test_delete_again_changes_nothing(quotas: Quotas, rows: Rows) -> None:
    quotas.put("shop", {"memory_mib": 30})
    quotas.delete("shop")
    before = rows.everything()

    assert not quotas.delete("shop")
    assert not quotas.delete("nobody")

    assert rows.everything() == before


@pytest.mark.parametrize("owner", ["nobody", "unlimited"])
def test_get_of_none_says_how_to_set_one(quotas: Quotas, allocator: ResourceAllocator, owner: str) -> None:
    allocator.allocate("gw-7", make_request("a1", owner="unlimited"))

    with pytest.raises(QuotaNotFoundError, match=f"is not limited; PUT /quotas/{owner} sets one"):
        quotas.get(owner)


def test_page_walks_through_those_that_are_limited(quotas: Quotas, allocator: ResourceAllocator) -> None:
    for owner in ("c", "a", "b"):
        quotas.put(owner, {"gpu": 1})
    allocator.allocate("gw-7", make_request("a1", owner="bb"))
    quotas.put("d", {"gpu": 1})
    quotas.delete("d")

    first, after = quotas.page(2, None)
    second, end = quotas.page(2, after)

    assert [quota.owner for quota in first + second] == ["a", "b", "c"]
    assert (after, end) == ("b", None)
