# SPDX-License-Identifier: GPL-3.0-or-later
"""What is found in stored conditions as text is what reading them would tell."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from builders import START, seconds
from hypothesis import given
from hypothesis import strategies as st
from node_manager.domain import ConditionType, Severity
from node_manager.health_checker import Condition
from node_manager.node_states import conditions_as_data, has_critical, is_good, is_known, is_said, read_conditions
from node_manager.store.documents import write_json

# Messages that look like the document around them.
TRAPS = ('"status":false', '"severity":"critical"}', '{"type":"', "\\", '", "', ',"since":', "ä\n\0")
messages = st.lists(st.one_of(st.sampled_from(TRAPS), st.text(max_size=5)), max_size=4).map("".join)
conditions = st.lists(
    st.builds(
        lambda kind, well, message, severity: (
            Condition(kind, True, "Ok", "", START)
            if well
            else Condition(kind, False, "ItFails", message, START + seconds(1.5), severity)
        ),
        st.sampled_from(ConditionType),
        st.booleans(),
        messages,
        st.sampled_from(Severity),
    ),
    unique_by=lambda condition: condition.type,
)


@given(conditions, conditions)
def test_text_says_what_the_conditions_say(stored: list[Condition], told: list[Condition]) -> None:
    text = write_json(conditions_as_data(stored))
    known = {condition.type: condition for condition in read_conditions(json.loads(text))}

    for condition in [*stored, *told]:
        same = replace(condition, since=known[condition.type].since) if condition.type in known else None
        assert is_known(condition.type, text) == (condition.type in known)
        assert is_good(condition.type, text) == (condition.type in known and known[condition.type].status)
        if not condition.status:
            assert is_said(condition, text) == (same is not None and same == known[condition.type])


@given(conditions, st.booleans())
def test_critical_is_found_with_and_without_spaces(stored: list[Condition], spaced: bool) -> None:
    data = conditions_as_data(stored)
    text = json.dumps(data) if spaced else write_json(data)

    assert has_critical(text) == any(not one.status and one.severity is Severity.CRITICAL for one in stored)


@pytest.mark.parametrize("changed", [{"message": "other"}, {"reason": "Other"}, {"severity": Severity.CRITICAL}])
def test_what_differs_in_one_thing_is_not_said(changed: dict[str, object]) -> None:
    warning = Condition(ConditionType.MEMORY_SUFFICIENT, False, "MemoryFull", "91 %", START, Severity.WARNING)
    text = write_json(conditions_as_data([warning]))

    assert is_said(warning, text)
    assert not is_said(replace(warning, **changed), text)  # type: ignore[arg-type]
