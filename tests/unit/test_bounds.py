# SPDX-License-Identifier: GPL-3.0-or-later
"""What a node says, however hostile, comes out as JSON of a bounded size."""

from __future__ import annotations

import json

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils._bounds import TooLargeError, clean
from ansible_collections.iot_platform.node_manager.plugins.module_utils._words import Health
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(float("nan"), None, id="nan"),
        pytest.param(float("-inf"), None, id="infinity"),
        pytest.param(2**63, None, id="beyond-64-bits"),
        pytest.param(-(2**63), -(2**63), id="smallest-integer"),
        pytest.param(10**5000, None, id="unprintable-integer"),
        pytest.param(True, True, id="boolean"),
        pytest.param(b"caf\xc3\xa9 \xff", "café \ufffd", id="bytes"),
        pytest.param("a\udc80b", "a\ufffdb", id="surrogate"),
        pytest.param("a\x00b", "a\ufffdb", id="nul"),
        pytest.param(Health.HEALTHY, "healthy", id="enum"),
        pytest.param((1, 2), [1, 2], id="tuple"),
        pytest.param({1: "x", None: "y"}, {"1": "x"}, id="keys"),
        pytest.param(object(), None, id="object"),
        pytest.param({"a": {"b": {"c": 1}}}, {"a": {"b": None}}, id="depth"),
        pytest.param([1, 2, 3, 4, 5], [1, 2, 3, 4], id="items"),
        pytest.param({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, {"a": 1, "b": 2, "c": 3, "d": 4}, id="members"),
        pytest.param("x" * 11, "x" * 10, id="long"),
        pytest.param("é" * 11, "é" * 5, id="long-in-bytes"),
        pytest.param("x" * 9 + "é", "x" * 9, id="cut-inside-character"),
    ],
)
def test_clean_makes_value_safe(value: object, expected: object) -> None:
    actual = clean(value, max_depth=2, max_items=4, max_string_bytes=10)

    assert expected == actual
    assert type(expected) is type(actual)


def test_clean_ends_in_a_cycle() -> None:
    value: dict[str, object] = {}
    value["self"] = value

    actual = clean(value, max_depth=3)

    assert actual == {"self": {"self": {"self": None}}}


def test_clean_refuses_too_much() -> None:
    with pytest.raises(TooLargeError, match="larger than 1000 bytes"):
        clean(["x" * 100] * 20, max_bytes=1000)


def test_clean_refuses_before_copying_everything() -> None:
    with pytest.raises(TooLargeError):
        clean([[0] * 1000] * 1000, max_bytes=1000)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.binary() | st.text(st.characters(categories=None)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(categories=None)) | st.integers(), inner),
)


@given(anything)
def test_clean_is_json_and_stays_the_same(value: object) -> None:
    once = clean(value)

    text = json.dumps(once, allow_nan=False, ensure_ascii=False).encode("utf-8")
    assert json.loads(text) == once
    assert clean(once) == once
