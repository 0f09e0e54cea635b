# SPDX-License-Identifier: GPL-3.0-or-later
"""The lines that are written past the library, beside those that it writes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from metrics_scrape import read
from node_manager.metrics_of_nodes import _escape, _Gauge
from prometheus_client import CollectorRegistry, Gauge, generate_latest

TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"])) | st.text('\\n"{}=,')


@given(TEXTS, st.floats(allow_nan=False) | st.integers(0, 2**53))
def test_gauge_is_read_as_what_the_library_writes(text: str, value: float) -> None:
    registry = CollectorRegistry()
    Gauge("node_manager_x", "What it is.", ["a", "b"], registry=registry).labels("1", text).set(value)
    own = _Gauge("x", "What it is.", ("a", "b"))

    own.add(("1", _escape(text)), value)

    expected, found = read(generate_latest(registry).decode()), read(own.text() + "\n")
    assert found.samples == expected.samples
    assert found.families == expected.families


@pytest.mark.parametrize("value", [True, 0, 1e300, math.inf, 1795425357.304409])
def test_gauge_keeps_values_exactly(value: float) -> None:
    own = _Gauge("x", "What it is.")

    own.add(("gw-7",), value)

    assert read(own.text()).value("node_manager_x", node_id="gw-7") == value
