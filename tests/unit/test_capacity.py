# SPDX-License-Identifier: GPL-3.0-or-later
"""The books of a node."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from builders import make_facts
from hypothesis import given
from hypothesis import strategies as st
from node_manager.capacity import (
    Account,
    Shortage,
    account,
    capacity_of,
    choose_units,
    effective_of,
    shortages,
    units_of,
)
from node_manager.node_types import NodeType
from node_manager.resources import MAX_UNITS, ask_of

CORE = ["cpu_millicores", "memory_mib", "disk_mib", "network_mbps"]
GPUS = {"gpu": ["0", "1", "2"]}


def node_type(**changes: Any) -> NodeType:
    """Read one node type."""
    return NodeType.model_validate({"description": "X", **changes})


def devices(**ids: list[str]) -> dict[str, Any]:
    """Give facts with these units of devices."""
    return make_facts(devices={name: [{"id": unit} for unit in units] for name, units in ids.items()})


def amounts(**allocated: int) -> Account:
    """Draw up the books of a node that has 4000 millicores and 64 MiB."""
    return account({"cpu_millicores": 4000, "memory_mib": 64}, {}, None, allocated, {})


# capacity_of


def test_capacity_of_reads_facts() -> None:
    facts = devices(gpu=["0", "1"], camera=[])

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


def test_capacity_of_takes_what_is_seen_over_what_the_type_has() -> None:
    kind = node_type(resources={"camera": 2, "gpu": 1})

    capacity = capacity_of({}, devices(gpu=["a", "b"]), kind)

    assert (capacity["camera"], capacity["gpu"]) == (2, 2)


def test_capacity_of_lets_no_device_pass_for_a_common_resource() -> None:
    facts = devices(cpu_millicores=[str(n) for n in range(9)], memory_mib=[])
    facts["memory_total_bytes"] = None

    capacity = capacity_of({}, facts)

    assert capacity["cpu_millicores"] == 4000
    assert "memory_mib" not in capacity


def test_capacity_of_counts_a_unit_told_twice_once() -> None:
    assert capacity_of({}, devices(gpu=["0", "0", "1"]))["gpu"] == 2


# units_of


@pytest.mark.parametrize(
    ("capacity", "seen", "expected"),
    [
        ({"gpu": 2}, ["b", "a"], ["b", "a"]),
        ({"gpu": 2}, [], ["0", "1"]),
        ({"gpu": 1}, ["b", "a"], ["b"]),
        ({"gpu": 4}, ["1", "b"], ["1", "b", "0", "2"]),
        ({"gpu": 3}, ["a", "a", "b"], ["a", "b", "0"]),
        ({"gpu": 0}, ["a"], []),
    ],
    ids=["as-seen", "by-number", "fewer-than-seen", "more-than-seen", "told-twice", "none"],
)
def test_units_of_names_each_unit_once(capacity: dict[str, int], seen: list[str], expected: list[str]) -> None:
    assert units_of(capacity, devices(gpu=seen)) == {"gpu": expected}


def test_units_of_leaves_out_common_resources() -> None:
    assert units_of(capacity_of({"camera": 1}, None, node_type(resources={"disk_mib": 9})), None) == {"camera": ["0"]}


def test_units_of_has_a_bound() -> None:
    units = units_of({"licences": 10**9}, None)["licences"]

    assert len(units) == MAX_UNITS


@given(count=st.integers(0, MAX_UNITS), seen=st.lists(st.sampled_from(["0", "1", "7", "a", "b"])))
def test_units_of_gives_as_many_as_there_are(count: int, seen: list[str]) -> None:
    units = units_of({"gpu": count}, devices(gpu=seen))["gpu"]

    assert len(set(units)) == len(units) == count


# account


def test_account_without_a_type_reserves_nothing() -> None:
    books = account({"cpu_millicores": 4000}, {}, None, {"cpu_millicores": 2000}, {})

    assert books == Account(
        capacity={"cpu_millicores": 4000},
        reserved={"cpu_millicores": 0},
        overcommit={"cpu_millicores": 1.0},
        effective={"cpu_millicores": 4000},
        allocated={"cpu_millicores": 2000},
        available={"cpu_millicores": 2000},
        overcommitted=False,
        devices={},
    )


def test_account_takes_reserved_off_before_overcommit() -> None:
    kind = node_type(reserved={"cpu_millicores": 200, "memory_mib": 96}, overcommit={"cpu": 1.5})

    books = account({"cpu_millicores": 4000, "memory_mib": 1000}, {}, kind, {}, {})

    assert books.effective == {"cpu_millicores": 5700, "memory_mib": 904}
    assert books.overcommit == {"cpu_millicores": 1.5, "memory_mib": 1.0}


@pytest.mark.parametrize(
    ("capacity", "factor", "effective"),
    [(100, 1.15, 115), (1000, 1.1, 1100), (2**53, 1.0, 2**53), (10**15 + 1, 2.0, 2 * 10**15 + 2), (3, 1.5, 4)],
    ids=["1.15", "1.1", "large", "large-and-odd", "rounds-down"],
)
def test_account_overcommits_exactly(capacity: int, factor: float, effective: int) -> None:
    books = account({"cpu_millicores": capacity}, {}, node_type(overcommit={"cpu": factor}), {}, {})

    assert books.effective == {"cpu_millicores": effective}


def test_account_under_pressure_gives_what_is_really_there() -> None:
    kind = node_type(reserved={"cpu_millicores": 200}, overcommit={"cpu": 1.5, "memory": 2})

    books = account({"cpu_millicores": 4000, "memory_mib": 64}, {}, kind, {"cpu_millicores": 3801}, {}, pressed=True)

    assert books.effective == {"cpu_millicores": 3800, "memory_mib": 64}
    assert books.overcommit == {"cpu_millicores": 1.0, "memory_mib": 1.0}
    assert books.overcommitted


def test_account_reserves_no_more_than_there_is() -> None:
    books = account({"memory_mib": 64}, {}, node_type(reserved={"memory_mib": 96}), {}, {})

    assert (books.reserved, books.effective, books.available) == (
        {"memory_mib": 64},
        {"memory_mib": 0},
        {"memory_mib": 0},
    )


@pytest.mark.parametrize(("memory", "overcommitted"), [(64, False), (65, True)], ids=["full", "past-full"])
def test_account_is_overcommitted_only_past_what_is_there(memory: int, overcommitted: bool) -> None:
    books = amounts(memory_mib=memory)

    assert (books.available["memory_mib"], books.overcommitted) == (0, overcommitted)


def test_account_of_a_node_that_lost_a_class_shows_what_is_still_taken() -> None:
    books = amounts(disk_mib=5)

    assert (books.allocated["disk_mib"], books.available["disk_mib"], books.overcommitted) == (5, 0, True)


def test_account_counts_a_shared_unit_as_taken() -> None:
    books = account({"gpu": 3}, GPUS, None, {}, {"gpu": {"0": 1000, "2": 1}})

    assert (books.allocated, books.available, books.overcommitted) == ({"gpu": 2}, {"gpu": 1}, False)
    assert books.devices == {
        "gpu": [
            {"unit": "0", "allocated_milli": 1000, "present": True},
            {"unit": "1", "allocated_milli": 0, "present": True},
            {"unit": "2", "allocated_milli": 1, "present": True},
        ]
    }


def test_account_of_a_node_that_lost_a_unit_shows_it_as_gone() -> None:
    books = account({"gpu": 1}, {"gpu": ["0"]}, None, {}, {"gpu": {"1": 500}})

    assert (books.allocated, books.available, books.overcommitted) == ({"gpu": 1}, {"gpu": 1}, True)
    assert books.devices["gpu"][1] == {"unit": "1", "allocated_milli": 500, "present": False}


@given(
    capacity=st.dictionaries(st.sampled_from(CORE), st.integers(0, 2**53)),
    reserved=st.dictionaries(st.sampled_from(CORE), st.integers(0, 2**53)),
    hundredths=st.integers(100, 1600),
    allocated=st.dictionaries(st.sampled_from(CORE), st.integers(0, 2**53)),
    pressed=st.booleans(),
)
def test_account_adds_up(
    capacity: dict[str, int], reserved: dict[str, int], hundredths: int, allocated: dict[str, int], pressed: bool
) -> None:
    factor = hundredths / 100
    kind = node_type(reserved=reserved, overcommit={"cpu": factor, "memory": factor, "disk": factor})

    books = account(capacity, {}, kind, allocated, {}, pressed=pressed)

    for name, total in capacity.items():
        factors = Fraction(hundredths, 100) if name != "network_mbps" and not pressed else 1
        assert books.effective[name] == int(max(0, total - reserved.get(name, 0)) * factors)
        assert books.allocated[name] == allocated.get(name, 0)
        assert books.available[name] == max(0, books.effective[name] - books.allocated[name])
    assert all(isinstance(value, int) for value in books.effective.values())
    assert books.overcommitted == any(taken > books.effective.get(name, 0) for name, taken in books.allocated.items())


# shortages


@pytest.mark.parametrize(("amount", "fits"), [(36, True), (37, False)], ids=["the-rest", "one-more"])
def test_shortages_of_an_amount(amount: int, fits: bool) -> None:
    found = shortages(ask_of({"memory_mib": amount}), {"memory_mib": 100}, {"memory_mib": 64}, {}, {})

    assert found == ([] if fits else [Shortage("memory_mib", amount, 36)])


@pytest.mark.parametrize("allocated", [100, 101], ids=["full", "shrunk"])
def test_shortages_of_a_node_that_is_full_refuses_the_least(allocated: int) -> None:
    found = shortages(ask_of({"memory_mib": 1}), {"memory_mib": 100}, {"memory_mib": allocated}, {}, {})

    assert found == [Shortage("memory_mib", 1, 0)]


def test_shortages_of_a_shrunk_class_leaves_the_others_alone() -> None:
    effective, allocated = {"memory_mib": 10, "cpu_millicores": 10}, {"memory_mib": 20}

    assert shortages(ask_of({"cpu_millicores": 10}), effective, allocated, {}, {}) == []


def test_shortages_names_every_class_that_lacks() -> None:
    found = shortages(ask_of({"memory_mib": 2, "cpu_millicores": 1, "gpu": 1}), {"memory_mib": 1}, {}, {}, {})

    assert [item.resource for item in found] == ["cpu_millicores", "memory_mib", "gpu"]


@pytest.mark.parametrize(
    ("wanted", "used", "fitting"),
    [
        (3, {}, None),
        (4, {}, 3),
        (3, {"1": 1}, 2),
        ({"count": 3, "share_milli": 400}, {"1": 600}, None),
        ({"count": 3, "share_milli": 401}, {"1": 600}, 2),
        ({"count": 1, "share_milli": 1}, {"0": 1000, "1": 1000, "2": 1000}, 0),
        (3, {"gone": 1000}, None),
    ],
    ids=["all", "too-many", "one-is-shared", "to-the-brim", "over-the-brim", "full", "a-gone-unit-takes-no-other"],
)
def test_shortages_of_devices(wanted: Any, used: dict[str, int], fitting: int | None) -> None:
    ask = ask_of({"gpu": wanted})

    found = shortages(ask, {"gpu": 3}, {}, GPUS, {"gpu": used})

    assert [item.available for item in found] == ([] if fitting is None else [fitting])


# choose_units


@pytest.mark.parametrize(
    ("wanted", "used", "chosen"),
    [
        (2, {}, {"0": 1000, "1": 1000}),
        (1, {"0": 1}, {"1": 1000}),
        ({"count": 1, "share_milli": 300}, {"1": 200, "2": 700}, {"2": 300}),
        ({"count": 1, "share_milli": 301}, {"1": 200, "2": 700}, {"1": 301}),
        ({"count": 2, "share_milli": 300}, {"1": 200}, {"1": 300, "0": 300}),
    ],
    ids=["in-order", "whole-needs-free", "fullest-first", "fullest-that-has-room", "each-on-its-own-unit"],
)
def test_choose_units_keeps_whole_ones_whole(wanted: Any, used: dict[str, int], chosen: dict[str, int]) -> None:
    assert choose_units(ask_of({"gpu": wanted}), GPUS, {"gpu": used}) == {"gpu": chosen}


def test_choose_units_of_amounts_is_empty() -> None:
    assert choose_units(ask_of({"memory_mib": 1}), GPUS, {}) == {}


@given(
    used=st.dictionaries(st.sampled_from(["0", "1", "2", "3", "gone"]), st.integers(1, 1000)),
    count=st.integers(1, 4),
    share=st.integers(1, 1000),
)
def test_choose_units_overfills_none_and_gives_all_that_fitted(used: dict[str, int], count: int, share: int) -> None:
    ask, units = ask_of({"gpu": {"count": count, "share_milli": share}}), {"gpu": ["0", "1", "2", "3"]}

    chosen = choose_units(ask, units, {"gpu": used})["gpu"]

    fits = not shortages(ask, effective_of({"gpu": 4}, None, pressed=False), {}, units, {"gpu": used})
    assert fits == (len(chosen) == count)
    assert all(used.get(unit, 0) + milli <= 1000 for unit, milli in chosen.items())
    assert set(chosen) <= set(units["gpu"])
