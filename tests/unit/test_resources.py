# SPDX-License-Identifier: GPL-3.0-or-later
"""What a piece of work may ask for, and how it is counted."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_manager.resources import (
    MAX_AMOUNT,
    MAX_UNITS,
    Ask,
    DeviceShare,
    Resources,
    add_to,
    as_data,
    ask_of,
    in_thousandths,
    shown,
)
from pydantic import TypeAdapter, ValidationError

RESOURCES: TypeAdapter[Any] = TypeAdapter(Resources)
WANTED = st.dictionaries(st.sampled_from(["cpu_millicores", "memory_mib"]), st.integers(1, MAX_AMOUNT))
DEVICES = st.dictionaries(
    st.sampled_from(["gpu", "camera"]),
    st.integers(1, MAX_UNITS)
    | st.fixed_dictionaries({"count": st.integers(1, MAX_UNITS), "share_milli": st.integers(1, 1000)}),
)

REFUSED = {
    "zero": ({"memory_mib": 0}, "memory_mib"),
    "negative": ({"memory_mib": -1}, "memory_mib"),
    "huge": ({"memory_mib": MAX_AMOUNT + 1}, "memory_mib"),
    "beyond-64-bits": ({"memory_mib": 10**30}, "memory_mib"),
    "float": ({"memory_mib": 1.5}, "memory_mib"),
    "whole-float": ({"memory_mib": 1.0}, "memory_mib"),
    "bool": ({"memory_mib": True}, "memory_mib"),
    "string": ({"memory_mib": "1"}, "memory_mib"),
    "null": ({"memory_mib": None}, "memory_mib"),
    "list": ({"memory_mib": [1]}, "memory_mib"),
    "share-of-a-common-class": ({"memory_mib": {"count": 1}}, "memory_mib"),
    "share-of-nothing": ({"gpu": {"share_milli": 0}}, "gpu"),
    "share-beyond-whole": ({"gpu": {"share_milli": 1001}}, "gpu"),
    "share-bool": ({"gpu": {"share_milli": True}}, "gpu"),
    "share-string": ({"gpu": {"share_milli": "500"}}, "gpu"),
    "count-zero": ({"gpu": {"count": 0}}, "gpu"),
    "count-float": ({"gpu": {"count": 1.0}}, "gpu"),
    "count-too-many": ({"gpu": {"count": MAX_UNITS + 1}}, "gpu"),
    "units-too-many": ({"gpu": MAX_UNITS + 1}, "gpu"),
    "unknown-key": ({"gpu": {"count": 1, "unit": "0"}}, "gpu"),
    "name-upper": ({"GPU": 1}, "GPU"),
    "name-empty": ({"": 1}, ""),
    "name-newline": ({"gpu\n": 1}, "gpu\n"),
    "name-long": ({"a" * 64: 1}, "a" * 64),
    "nothing": ({}, "at least 1"),
    "too-much": ({f"device_{number}": 1 for number in range(33)}, "at most 32"),
    "no-object": ([["memory_mib", 1]], "should be"),
}


@pytest.mark.parametrize(("wanted", "named"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("border", ["python", "json"])
def test_resources_refuses_naming_the_class(border: str, wanted: Any, named: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RESOURCES.validate_json(json.dumps(wanted)) if border == "json" else RESOURCES.validate_python(wanted)

    assert any(named in (*error["loc"], error["msg"]) or named in error["msg"] for error in caught.value.errors())


@pytest.mark.parametrize(
    "wanted",
    [
        {"memory_mib": 1},
        {"memory_mib": MAX_AMOUNT, "gpu": MAX_UNITS},
        {"gpu": {}},
        {"gpu": {"share_milli": 1}},
        {"gpu": {"count": MAX_UNITS, "share_milli": 1000}},
        {"a" * 63: 1},
    ],
    ids=["least", "most", "one-whole-unit", "least-share", "most-shares", "longest-name"],
)
def test_resources_takes(wanted: dict[str, Any]) -> None:
    RESOURCES.validate_json(json.dumps(wanted))


def test_ask_of_is_the_same_however_it_is_spelled() -> None:
    spelled = [
        {"gpu": 2, "memory_mib": 5, "cpu_millicores": 1},
        {"cpu_millicores": 1, "memory_mib": 5, "gpu": {"count": 2, "share_milli": 1000}},
        {"memory_mib": 5, "gpu": DeviceShare(count=2), "cpu_millicores": 1},
    ]

    asks = {ask_of(wanted) for wanted in spelled}

    assert asks == {Ask((("cpu_millicores", 1), ("memory_mib", 5)), (("gpu", 2, 1000),))}


def test_classes_names_amounts_and_devices() -> None:
    assert ask_of({"gpu": 2, "memory_mib": 5}).classes == {"gpu", "memory_mib"}


@given(wanted=WANTED, devices=DEVICES)
def test_as_data_reads_back(wanted: dict[str, int], devices: dict[str, Any]) -> None:
    ask = ask_of({**wanted, **devices})

    assert ask_of(json.loads(json.dumps(as_data(ask)))) == ask


def test_in_thousandths_counts_devices_in_thousandths() -> None:
    ask = ask_of({"memory_mib": 5, "gpu": {"count": 2, "share_milli": 460}, "camera": 1})

    assert in_thousandths(ask, 3) == {"memory_mib": 15, "gpu": 2760, "camera": 3000}


@given(wanted=WANTED, devices=DEVICES)
def test_add_to_takes_away_what_it_added(wanted: dict[str, int], devices: dict[str, Any]) -> None:
    total = {"memory_mib": 7, "camera": 250}
    counted = in_thousandths(ask_of({**wanted, **devices}))

    add_to(total, counted)
    add_to(total, counted, -1)

    assert total == {"memory_mib": 7, "camera": 250}


def test_add_to_leaves_out_what_comes_to_nothing() -> None:
    total = {"gpu": 460}

    add_to(total, {"gpu": 460}, -1)

    assert total == {}


def test_shown_gives_devices_in_units() -> None:
    found = shown({"memory_mib": 1500, "gpu": 2000, "camera": 460})

    assert found == {"camera": 0.46, "gpu": 2, "memory_mib": 1500}
    assert [type(value) for value in found.values()] == [float, int, int]
