# SPDX-License-Identifier: GPL-3.0-or-later
"""The node type is what the rules say of the facts, and no facts can break them."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recognise import recognise
from hypothesis import given
from hypothesis import strategies as st

PI = {
    "architecture": "aarch64",
    "board": {"vendor": "Raspberry Pi", "model": "Raspberry Pi 4 Model B Rev 1.4"},
    "virtualization": "none",
    "cpu": {"count": 4},
    "memory_total_bytes": 4014080000,
    "devices": {"camera": [{"id": "video0"}], "gpu": []},
    "features": ["camera", "cgroup_v2", "systemd"],
}


@pytest.mark.parametrize(
    ("rules", "holds"),
    [
        pytest.param({"architectures": ["armv7l", "aarch64"]}, True, id="architecture"),
        pytest.param({"architectures": ["x86_64"]}, False, id="other-architecture"),
        pytest.param({"any_device": ["gpu", "camera"]}, True, id="device"),
        pytest.param({"any_device": ["gpu"]}, False, id="no-such-device"),
        pytest.param({"board_pattern": "Jetson"}, False, id="pattern-misses"),
        pytest.param({"board_pattern": "^Raspberry Pi .* 4 "}, True, id="pattern"),
        pytest.param({"board_pattern": "("}, False, id="broken-pattern"),
        pytest.param({"board_pattern": "a" * 201}, False, id="long-pattern"),
        pytest.param({"cpu_count_min": 4, "cpu_count_max": 4}, True, id="cpu-edges"),
        pytest.param({"cpu_count_min": 5}, False, id="too-few-cpus"),
        pytest.param({"memory_mib_min": 3500, "memory_mib_max": 4096}, True, id="memory"),
        pytest.param({"memory_mib_max": 2048}, False, id="too-much-memory"),
        pytest.param({"virtualization": ["none"]}, True, id="bare-metal"),
        pytest.param({"features": ["systemd", "camera"]}, True, id="features"),
        pytest.param({"features": ["systemd", "psi"]}, False, id="a-feature-is-missing"),
        pytest.param({"architectures": ["aarch64"], "cpu_count_min": 8}, False, id="all-must-hold"),
        pytest.param({"colour": "red"}, False, id="unknown-rule"),
        pytest.param({"architectures": "aarch64"}, False, id="rule-of-wrong-type"),
        pytest.param({}, True, id="no-condition"),
        pytest.param(None, False, id="never"),
    ],
)
def test_recognise_holds_rules(rules: Any, holds: bool) -> None:
    actual = recognise(PI, {"edge": rules})

    assert actual == ("edge" if holds else None)


def test_recognise_prefers_highest_priority() -> None:
    types = {"any": {"priority": -1}, "arm": {"priority": 5, "architectures": ["aarch64"]}, "edge": {"priority": 1}}

    assert recognise(PI, types) == "arm"


def test_recognise_breaks_ties_by_name() -> None:
    assert recognise(PI, {"b": {"priority": 1}, "a": {"priority": 1}}) == "a"


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
RULES = {
    "any_device": ["gpu"],
    "architectures": ["aarch64"],
    "board_pattern": "Pi",
    "cpu_count_min": 1,
    "cpu_count_max": 8,
    "memory_mib_min": 1,
    "memory_mib_max": 10**6,
    "virtualization": ["none"],
    "features": ["psi"],
}


@given(st.dictionaries(st.sampled_from([*PI, "cpu"]), anything) | anything)
def test_recognise_never_raises_on_facts(facts: object) -> None:
    for key, wanted in RULES.items():
        assert recognise(facts, {"t": {key: wanted}}) in ("t", None)


@given(st.sampled_from(sorted(RULES)), anything)
def test_recognise_never_raises_on_rules(key: str, wanted: object) -> None:
    assert recognise(PI, {"t": {key: wanted, "priority": wanted}}) in ("t", None)
