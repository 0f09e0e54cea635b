# SPDX-License-Identifier: GPL-3.0-or-later
"""JSON columns: what is written is read again, to the last bit."""

from __future__ import annotations

import json
import math
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_manager.store.documents import JsonText, read_json, write_json

DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(DOCUMENTS)
def test_read_json_gives_what_write_json_was_given(document: object) -> None:
    assert read_json(write_json(document)) == document


@given(st.floats(allow_nan=False))
def test_numbers_keep_their_bits(number: float) -> None:
    found = read_json(write_json(number))

    assert struct.pack("d", found) == struct.pack("d", number)
    assert struct.pack("d", json.loads(write_json(number))) == struct.pack("d", number)


def test_half_a_surrogate_is_text_too() -> None:
    assert read_json(write_json({"name": "\ud800"})) == {"name": "\ud800"}


def test_what_is_no_number_is_read_again() -> None:
    assert math.isnan(read_json(write_json(math.nan)))


def test_write_json_takes_over_what_is_json() -> None:
    assert write_json(JsonText('{"a": 1}')) == '{"a": 1}'
    assert write_json('{"a": 1}') == '"{\\"a\\": 1}"'


def test_read_json_refuses_what_is_no_json() -> None:
    with pytest.raises(ValueError, match="Expecting"):
        read_json("{")
