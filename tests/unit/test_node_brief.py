# SPDX-License-Identifier: GPL-3.0-or-later
"""The few words of a node, beside the rule that they stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from builders import START, seconds
from hypothesis import given
from hypothesis import strategies as st
from node_manager import node_brief
from node_manager.domain import Admin, ConditionType, Health, Severity
from node_manager.health_checker import Condition, is_schedulable, new_state
from node_manager.store.documents import write_json

STALE_AFTER = seconds(180)


@dataclass(frozen=True)
class Row:
    """What a query gives."""

    admin: str
    health: str
    quarantined: bool
    last_contact_at: datetime | None
    conditions: str | None


CONDITIONS = st.lists(
    st.builds(
        lambda kind, status, severity: Condition(kind, status, "Reason", "", START, severity),
        st.sampled_from(ConditionType),
        st.booleans(),
        st.sampled_from(Severity),
    ),
    max_size=4,
)


@given(
    st.sampled_from(Admin),
    st.sampled_from(Health),
    st.booleans(),
    st.none() | st.sampled_from([0, 1, 179, 180, 181, 4000]),
    CONDITIONS,
)
def test_is_schedulable_says_what_the_rule_says(
    admin: Admin, health: Health, quarantined: bool, age: int | None, conditions: list[Condition]
) -> None:
    if health is Health.HEALTHY:
        # Healthy means that none fails.
        conditions = [condition for condition in conditions if condition.status]
    seen_at = None if age is None else START - seconds(age)
    state = replace(
        new_state(START), health=health, quarantined=quarantined, last_contact_at=seen_at, conditions=tuple(conditions)
    )
    told = write_json([{"status": item.status, "severity": item.severity} for item in conditions])
    row = Row(admin.value, health.value, quarantined, seen_at, told if health is Health.DEGRADED else None)

    found = node_brief.is_schedulable(row, START - STALE_AFTER)

    assert found == is_schedulable(admin, state, START, STALE_AFTER)
