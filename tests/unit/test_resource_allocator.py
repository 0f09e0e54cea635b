# SPDX-License-Identifier: GPL-3.0-or-later
"""The books of a node."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from builders import make_facts
from hypothesis import given
from hypothesis import strategies as st
from node_manager.node_types import NodeType
from node_manager.resource_allocator import Account, account, capacity_of

CORE = ["cpu_millicores", "memory_mib", "disk_mib", "network_mbps"]


def node_type(**changes: Any) -> NodeType:
    """Read one node type."""
    return NodeType.model_validate({"description": "X", **changes})


def test_capacity_of_reads_facts() -> None:
    facts = make_facts(devices={"gpu": [{"id": "0"}, {"id": "1"}], "camera": []})

    assert capacity_of({}, facts) == {
        "cpu_millicores": 4000,
        "memory_mib": 4096,
        "disk_mib": 30000,
        "network_mbps": 1000,
        "gpu": 2,
        "camera": 0,
    }


def test_capacity_of_leaves_out_what_nobody_knows() -> None:
    unknown = dict.fromkeys(("memory_total_bytes", "disk_total_bytes", "network_mbps"))

    assert capacity_of({}, make_facts(**unknown, cpu={"count": None, "model": None})) == {}
    assert capacity_of({}, None) == {}


def test_capacity_of_takes_what_is_declared_over_what_is_seen() -> None:
    capacity = capacity_of({"disk_mib": 10, "licences": 3}, make_facts())

    assert (capacity["disk_mib"], capacity["memory_mib"], capacity["licences"]) == (10, 4096, 3)


def test_capacity_of_lets_no_device_pass_for_a_common_resource() -> None:
    facts = make_facts(devices={"cpu_millicores": [{"id": str(n)} for n in range(9)], "memory_mib": []})
    facts["memory_total_bytes"] = None

    capacity = capacity_of({}, facts)

    assert capacity["cpu_millicores"] == 4000
    assert "memory_mib" not in capacity


def test_account_without_a_type_reserves_nothing() -> None:
    books = account({"cpu_millicores": 4000}, None, [{"cpu_millicores": 1500}, {"cpu_millicores": 500}])

    assert books == Account(
        capacity={"cpu_millicores": 4000},
        reserved={"cpu_millicores": 0},
        effective={"cpu_millicores": 4000},
        allocated={"cpu_millicores": 2000},
        available={"cpu_millicores": 2000},
    )


def test_account_takes_reserved_off_before_overcommit() -> None:
    kind = node_type(reserved={"cpu_millicores": 200, "memory_mib": 96}, overcommit={"cpu": 1.5})

    books = account({"cpu_millicores": 4000, "memory_mib": 1000}, kind, [])

    assert books.effective == {"cpu_millicores": 5700, "memory_mib": 904}


@pytest.mark.parametrize(
    ("capacity", "factor", "effective"),
    [(100, 1.15, 115), (1000, 1.1, 1100), (2**53, 1.0, 2**53), (10**15 + 1, 2.0, 2 * 10**15 + 2), (3, 1.5, 4)],
    ids=["1.15", "1.1", "large", "large-and-odd", "rounds-down"],
)
def test_account_overcommits_exactly(capacity: int, factor: float, effective: int) -> None:
    books = account({"cpu_millicores": capacity}, node_type(overcommit={"cpu": factor}), [])

    assert books.effective == {"cpu_millicores": effective}


def test_account_reserves_no_more_than_there_is() -> None:
    books = account({"memory_mib": 64}, node_type(reserved={"memory_mib": 96}), [])

    assert (books.reserved, books.effective, books.available) == (
        {"memory_mib": 64},
        {"memory_mib": 0},
        {"memory_mib": 0},
    )


def test_account_of_a_node_that_shrank_has_nothing_to_give() -> None:
    books = account({"memory_mib": 64}, None, [{"memory_mib": 100, "gpu": 1}])

    assert (books.allocated, books.available) == ({"memory_mib": 100, "gpu": 1}, {"memory_mib": 0, "gpu": 0})


@given(
    capacity=st.dictionaries(st.sampled_from([*CORE, "gpu"]), st.integers(0, 2**53)),
    reserved=st.dictionaries(st.sampled_from(CORE), st.integers(0, 2**53)),
    hundredths=st.integers(100, 1600),
    allocations=st.lists(st.dictionaries(st.sampled_from([*CORE, "gpu"]), st.integers(0, 2**53)), max_size=4),
)
def test_account_adds_up(
    capacity: dict[str, int], reserved: dict[str, int], hundredths: int, allocations: list[dict[str, int]]
) -> None:
    factor = hundredths / 100
    kind = node_type(reserved=reserved, overcommit={"cpu": factor, "memory": factor, "disk": factor})

    books = account(capacity, kind, allocations)

    for name, total in capacity.items():
        factors = Fraction(hundredths, 100) if name in {"cpu_millicores", "memory_mib", "disk_mib"} else 1
        assert books.effective[name] == int(max(0, total - reserved.get(name, 0)) * factors)
        assert books.allocated[name] == sum(each.get(name, 0) for each in allocations)
        assert books.available[name] == max(0, books.effective[name] - books.allocated[name])
    assert all(isinstance(value, int) for value in books.effective.values())
