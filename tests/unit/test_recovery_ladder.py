# SPDX-License-Identifier: GPL-3.0-or-later
"""What would be tried to repair a node, in which order, and when it is left alone instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from builders import START, seconds
from hypothesis import given
from hypothesis import strategies as st
from node_manager.domain import Admin, ConditionType, Evidence, Health, Severity
from node_manager.health_checker import Condition, NodeState
from node_manager.node_types import DEFAULT_LADDERS
from node_manager.recovery_ladder import (
    LeftOut,
    Patient,
    Plan,
    Repairs,
    goes_on,
    next_try_at,
    plan,
    plan_by_hand,
    why_not,
    why_not_now,
)
from node_manager.settings import RecoverySettings

POWER = {"power": {"command": ["/bin/true", "{node_id}"]}}
CLIMB = ["restart_service", "free_disk", "reboot", "power_cycle", "give_up"]
NOW = START + seconds(600)


def settings(**changes: Any) -> RecoverySettings:
    """Give the settings of recovery."""
    return RecoverySettings.model_validate(changes)


def broken(condition_type: ConditionType, severity: Severity = Severity.CRITICAL, since: float = 0) -> Condition:
    """Give a false condition."""
    return Condition(condition_type, False, "Broken", "it is broken", START + seconds(since), severity)


def sick(*conditions: Condition, health: Health = Health.DEGRADED, **more: Any) -> NodeState:
    """Give the state of a node with such conditions."""
    return NodeState(health, START, "it is sick", conditions=conditions, **more)


def silent(health: Health = Health.UNREACHABLE, evidence: Evidence | None = Evidence.PEERS_BLIND) -> NodeState:
    """Give the state of a node that doesn't answer."""
    return sick(broken(ConditionType.REACHABLE), health=health, evidence=evidence)


def patient(
    state: NodeState, ladders: Mapping[str, Sequence[str]] = DEFAULT_LADDERS, *, has_power: bool = False, **more: Any
) -> Patient:
    """Give a node that may need repair."""
    known: dict[str, Any] = {"node_id": "gw-7", "zone": "plant", "admin": Admin.ACTIVE, "is_local": False, **more}
    return Patient(state=state, ladders=ladders, has_power=has_power, **known)


def planned(node: Patient, *, last: bool = True, **changes: Any) -> Plan:
    """Plan a climb, the last one unless told otherwise."""
    return plan(node, settings(**changes), last_attempt=last)


def reasons(found: Plan) -> dict[str, str]:
    """Give why each step is left out."""
    return {left.step: left.why for left in found.left_out}


# what asks


@pytest.mark.parametrize(
    ("state", "asking"),
    [
        (sick(health=Health.HEALTHY), ()),
        (replace(sick(), conditions=(replace(broken(ConditionType.CHECKS_PASSING), status=True),)), ()),
        (sick(broken(ConditionType.CHECKS_PASSING)), ("ChecksPassing",)),
        (sick(broken(ConditionType.MEMORY_SUFFICIENT)), ()),
        (silent(Health.SUSPECT), ()),
        (silent(), ("Reachable",)),
        (sick(broken(ConditionType.DISK_SPACE_SUFFICIENT), health=Health.UNREACHABLE), ()),
    ],
    ids=["well", "true", "checks", "no-ladder", "suspect", "unreachable", "unreachable-for-no-known-reason"],
)
def test_plan_names_the_conditions_that_ask(state: NodeState, asking: tuple[str, ...]) -> None:
    found = planned(patient(state))

    assert found.conditions == asking
    assert bool(found.since) == bool(asking)


def test_plan_of_an_unreachable_node_asks_for_nothing_else() -> None:
    others = [broken(found) for found in ConditionType if found is not ConditionType.REACHABLE]
    ladders = {found.value: ["restart_service", "power_cycle"] for found in ConditionType}
    state = sick(*others, broken(ConditionType.REACHABLE), health=Health.UNREACHABLE, evidence=Evidence.PEERS_BLIND)

    found = planned(patient(state, ladders, has_power=True))

    assert (found.conditions, found.steps) == (("Reachable",), ("power_cycle",))
    assert reasons(found) == {"restart_service": "the node doesn't answer"}


def test_plan_of_a_suspect_node_asks_for_nothing() -> None:
    state = sick(broken(ConditionType.REACHABLE), broken(ConditionType.CHECKS_PASSING), health=Health.SUSPECT)

    assert planned(patient(state, has_power=True)) == Plan()


@pytest.mark.parametrize(
    "way",
    [ConditionType.MANAGEMENT_PATH, ConditionType.AUTHENTICATED, ConditionType.PYTHON_AVAILABLE],
    ids=str,
)
def test_plan_of_a_node_that_only_the_manager_cannot_use_asks_for_nothing_that_was_seen_before(
    way: ConditionType,
) -> None:
    state = sick(broken(way), broken(ConditionType.DISK_SPACE_SUFFICIENT), broken(ConditionType.CHECKS_PASSING))
    ladders = {"ChecksPassing": ["restart_service", "power_cycle", "give_up"], "DiskSpaceSufficient": ["free_disk"]}

    assert planned(patient(state, ladders, has_power=True)) == Plan()


def test_plan_of_a_node_whose_probe_fails_still_frees_its_disk() -> None:
    state = sick(broken(ConditionType.PROBE_WORKING), broken(ConditionType.DISK_SPACE_SUFFICIENT))

    assert planned(patient(state)).steps == ("free_disk", "give_up")


def test_plan_leaves_alone_what_an_empty_ladder_switched_off() -> None:
    ladders = {**DEFAULT_LADDERS, "ChecksPassing": []}
    state = sick(broken(ConditionType.CHECKS_PASSING), broken(ConditionType.CLOCK_SYNCHRONISED, Severity.WARNING))

    found = planned(patient(state, ladders))

    assert (found.conditions, found.critical, found.steps) == (
        ("ClockSynchronised",),
        False,
        ("renew_clock", "give_up"),
    )


def test_plan_takes_an_operators_ladder_for_a_condition_that_has_none_here() -> None:
    found = planned(patient(sick(broken(ConditionType.MEMORY_SUFFICIENT)), {"MemorySufficient": ["restart_service"]}))

    assert (found.conditions, found.steps) == (("MemorySufficient",), ("restart_service",))


def test_plan_dates_from_the_oldest_trouble() -> None:
    state = sick(broken(ConditionType.CHECKS_PASSING, since=50), broken(ConditionType.ROOT_WRITABLE, since=20))

    assert planned(patient(state)).since == START + seconds(20)


def test_plan_dates_silence_from_the_verdict() -> None:
    state = replace(silent(), health_since=START + seconds(40))

    assert planned(patient(state)).since == START + seconds(40)


# the order


def test_plan_merges_ladders_mild_drastic_and_giving_up_last() -> None:
    ladders = {
        "RootWritable": ["remount_root", "power_cycle", "reboot", "give_up"],
        "DiskSpaceSufficient": ["free_disk", "drain_queue", "give_up"],
        "ChecksPassing": ["give_up", "restart_service", "reboot", "free_disk"],
    }
    state = sick(*(broken(ConditionType(name)) for name in ("ChecksPassing", "DiskSpaceSufficient", "RootWritable")))

    found = planned(patient(state, ladders, has_power=True), **POWER)

    assert found.conditions == ("RootWritable", "DiskSpaceSufficient", "ChecksPassing")
    assert found.steps == (
        "remount_root",
        "free_disk",
        "restart_service",
        "drain_queue",
        "reboot",
        "power_cycle",
        "give_up",
    )


_LADDERS = st.dictionaries(
    st.sampled_from([found.value for found in ConditionType]),
    st.lists(st.sampled_from([*CLIMB, "restart_container", "own_step", "another"]), max_size=8),
)


@given(
    ladders=_LADDERS,
    conditions=st.dictionaries(st.sampled_from(list(ConditionType)), st.sampled_from(list(Severity))),
    health=st.sampled_from(list(Health)),
    evidence=st.sampled_from([None, *Evidence]),
    is_local=st.booleans(),
    has_power=st.booleans(),
    last=st.booleans(),
)
def test_plan_holds_its_promises_whatever_is_wrong(
    ladders: dict[str, list[str]],
    conditions: dict[ConditionType, Severity],
    health: Health,
    evidence: Evidence | None,
    is_local: bool,
    has_power: bool,
    last: bool,
) -> None:
    state = sick(*(broken(*found) for found in conditions.items()), health=health, evidence=evidence)

    found = planned(patient(state, ladders, has_power=has_power, is_local=is_local), last=last)

    asked = {step for name in found.conditions for step in ladders[name]}
    left = [item.step for item in found.left_out]
    weight = [
        {"give_up": 9, "power_cycle": 3, "reboot": 2}.get(s, 1 if "own" in s or "ano" in s else 0) for s in found.steps
    ]
    assert sorted([*found.steps, *left]) == sorted(asked)
    assert weight == sorted(weight)
    assert found.steps != ("give_up",)
    assert last or "give_up" not in found.steps
    assert has_power or "power_cycle" not in found.steps
    if is_local or Severity.CRITICAL not in conditions.values():
        assert not {"reboot", "power_cycle", "own_step", "another"} & set(found.steps)
    if health is Health.UNREACHABLE:
        assert set(found.steps) <= {"power_cycle", "give_up"}
        assert evidence is Evidence.PEERS_BLIND or not found.steps
    if health is Health.SUSPECT:
        assert found == Plan()


# what is left out


@pytest.mark.parametrize("evidence", [Evidence.NOBODY_TO_ASK, Evidence.SITE_DARK, None], ids=str)
def test_plan_cycles_no_power_without_a_witness(evidence: Evidence | None) -> None:
    node = patient(silent(evidence=evidence), has_power=True)

    found = planned(node, **POWER)

    assert found.steps == ()
    assert reasons(found) == {
        "power_cycle": "no other node could say whether it is really down (recovery.power_without_witness)",
        "give_up": "nothing else can be tried",
    }
    assert planned(node, **POWER, power_without_witness=True).steps == ("power_cycle", "give_up")


def test_plan_cycles_power_where_peers_are_blind() -> None:
    assert planned(patient(silent(), has_power=True), **POWER).steps == ("power_cycle", "give_up")


def test_plan_cycles_no_power_where_nobody_said_how() -> None:
    found = planned(patient(silent()))

    assert found.conditions == ("Reachable",)
    assert found.steps == ()
    assert reasons(found)["power_cycle"] == "recovery.power is not configured"


@pytest.mark.parametrize("step", ["reboot", "power_cycle", "own_step"])
def test_plan_does_nothing_drastic_on_the_managers_own_machine(step: str) -> None:
    ladders = {"ChecksPassing": ["restart_service", step]}

    found = planned(patient(sick(broken(ConditionType.CHECKS_PASSING)), ladders, is_local=True, has_power=True))

    assert found.steps == ("restart_service",)
    assert found.left_out == (LeftOut(step, "it is the manager's own machine"),)


@pytest.mark.parametrize("step", ["reboot", "power_cycle", "own_step"])
def test_plan_does_nothing_drastic_for_warnings(step: str) -> None:
    ladders = {"ChecksPassing": ["restart_service", step], "CpuSufficient": []}
    warning = broken(ConditionType.CHECKS_PASSING, Severity.WARNING)
    # That there is something critical counts only where it asks.
    state = sick(warning, broken(ConditionType.CPU_SUFFICIENT))

    found = planned(patient(state, ladders, has_power=True))

    assert (found.critical, found.steps) == (False, ("restart_service",))
    assert found.left_out == (LeftOut(step, "nothing critical is wrong"),)
    both = sick(warning, broken(ConditionType.ROOT_WRITABLE))
    assert step in planned(patient(both, {**ladders, "RootWritable": ["remount_root"]}, has_power=True)).steps


def test_plan_gives_up_with_the_last_try_only() -> None:
    node = patient(sick(broken(ConditionType.DISK_SPACE_SUFFICIENT)))

    found = planned(node, last=False, attempts=4)

    assert found.steps == ("free_disk",)
    assert reasons(found) == {"give_up": "comes with the last of 4 tries"}
    assert planned(node, last=True).steps == ("free_disk", "give_up")


def test_plan_never_gives_up_without_a_try() -> None:
    found = planned(patient(sick(broken(ConditionType.CHECKS_PASSING)), {"ChecksPassing": ["give_up"]}))

    assert found.conditions == ("ChecksPassing",)
    assert found.steps == ()
    assert reasons(found) == {"give_up": "nothing else can be tried"}


def test_plan_only_gives_up_once_no_tries_are_left() -> None:
    node, limits = patient(sick(broken(ConditionType.DISK_SPACE_SUFFICIENT))), settings()

    found = plan(node, limits, last_attempt=True, tries_left=False)

    assert found.steps == ("give_up",)
    assert reasons(found) == {"free_disk": "tried 3 times (recovery.attempts)"}
    spent = Repairs(3, NOW - seconds(480))
    assert why_not_now(node, found, spent, limits, NOW, START) is None
    sooner = why_not_now(node, found, replace(spent, last_ended_at=NOW - seconds(479)), limits, NOW, START)
    assert sooner == "tried 3 of 3 times, next at 18:10:01 UTC"
    endless = replace(node, ladders={"DiskSpaceSufficient": ["free_disk"]})
    found = plan(endless, limits, last_attempt=True, tries_left=False)
    assert found.steps == ()
    assert why_not_now(endless, found, spent, limits, NOW, START) == "free_disk: tried 3 times (recovery.attempts)"


@pytest.mark.parametrize("step", ["restart_service", "reboot", "own_step"])
@pytest.mark.parametrize("health", [Health.SUSPECT, Health.UNREACHABLE], ids=str)
def test_why_not_needs_a_node_that_answers(step: str, health: Health) -> None:
    assert why_not(step, patient(silent(health)), settings(), critical=True) == "the node doesn't answer"


def test_why_not_cycles_no_power_on_a_suspicion() -> None:
    node = patient(silent(Health.SUSPECT), has_power=True)

    assert why_not("power_cycle", node, settings(), critical=True) == "that it is down is not confirmed yet"


# by hand


def test_plan_by_hand_takes_what_is_wrong_and_does_not_give_up() -> None:
    found = plan_by_hand(patient(sick(broken(ConditionType.ROOT_WRITABLE))), settings())

    assert (found.conditions, found.steps) == (("RootWritable",), ("remount_root", "reboot"))


def test_plan_by_hand_of_a_node_that_seems_well_takes_all_that_is_mild() -> None:
    ladders = {**DEFAULT_LADDERS, "ChecksPassing": ["restart_service", "own_step", "reboot", "give_up"]}

    found = plan_by_hand(patient(sick(health=Health.HEALTHY), ladders, has_power=True), settings())

    assert found == Plan(steps=("remount_root", "free_disk", "renew_clock", "restart_service"))


def test_plan_by_hand_of_a_suspect_node_has_nothing_to_do() -> None:
    assert plan_by_hand(patient(silent(Health.SUSPECT), has_power=True), settings()).steps == ()


# not now


def not_now(
    node: Patient | None = None,
    repairs: Repairs | None = None,
    *,
    after: float = 600,
    waiting_since: float = 0,
    **changes: Any,
) -> str | None:
    """Ask why a node whose disk has been full since START is not repaired *after* that many seconds."""
    node = node or patient(sick(broken(ConditionType.DISK_SPACE_SUFFICIENT)))
    limits = settings(**changes)
    found = plan(node, limits, last_attempt=False)
    now, waited = START + seconds(after), START + seconds(waiting_since)
    return why_not_now(node, found, repairs or Repairs(), limits, now, waited)


def test_why_not_now_is_none_for_a_node_that_waited_long_enough() -> None:
    assert not_now() is None


FULL = sick(broken(ConditionType.DISK_SPACE_SUFFICIENT))


@pytest.mark.parametrize(
    ("why", "told"),
    [
        (not_now(automatic=False), "automatic recovery is off (recovery.automatic)"),
        (not_now(patient(FULL, admin=Admin.MAINTENANCE)), "it is maintenance: nothing is done by itself"),
        (not_now(patient(FULL, admin=Admin.DRAINING)), "it is draining: nothing is done by itself"),
        (not_now(patient(FULL, admin=Admin.OFFLINE)), "it is offline: nothing is done by itself"),
        (not_now(patient(FULL, admin=Admin.CORDONED)), None),
        (
            not_now(patient(FULL, is_local=True)),
            "it is the manager's own machine, which is repaired only when somebody asks",
        ),
        (not_now(patient(replace(FULL, quarantined=True))), "it is quarantined: its host key changed"),
        (not_now(patient(replace(FULL, suppressed=True))), "it comes and goes (flapping): somebody must look"),
        (not_now(patient(replace(FULL, health=Health.FLAPPING))), "it comes and goes (flapping): somebody must look"),
        (
            not_now(repairs=Repairs(3, START, START)),
            "given up after 3 tries; PUT /nodes/gw-7/status active begins anew",
        ),
        (
            not_now(patient(replace(FULL, frozen_until=NOW + seconds(1)))),
            "its whole site is dark: left alone until 18:10:01 UTC",
        ),
        (not_now(patient(replace(FULL, frozen_until=NOW))), None),
        (
            not_now(patient(silent())),
            "power_cycle: recovery.power is not configured; give_up: comes with the last of 3 tries",
        ),
        (not_now(patient(FULL, {})), "no step is configured for it"),
        (not_now(repairs=Repairs(3, START)), "tried 3 times (recovery.attempts)"),
        (not_now(repairs=Repairs(1, NOW - seconds(119))), "tried 1 of 3 times, next at 18:10:01 UTC"),
        (not_now(repairs=Repairs(1, NOW - seconds(120))), None),
        (not_now(repairs=Repairs(2, NOW - seconds(239))), "tried 2 of 3 times, next at 18:10:01 UTC"),
        (not_now(repairs=Repairs(2, NOW - seconds(240))), None),
        (not_now(after=9.9), "waits 10 s for it to mend itself (recovery.wait_seconds)"),
        (not_now(after=10), None),
        (not_now(waiting_since=591), "waits 10 s for it to mend itself (recovery.wait_seconds)"),
        (not_now(waiting_since=590), None),
        (not_now(after=0, wait_seconds=0), None),
    ],
)
def test_why_not_now_tells_the_reason(why: str | None, told: str | None) -> None:
    assert why == told


def test_why_not_now_comes_in_the_order_of_what_somebody_can_do_about_it() -> None:
    state = replace(FULL, quarantined=True, suppressed=True, frozen_until=NOW + seconds(60))

    # The one that holds longest first: the others would be told once it is gone.
    assert not_now(patient(state, admin=Admin.MAINTENANCE), Repairs(9, NOW, NOW)) == (
        "it is maintenance: nothing is done by itself"
    )


# pauses, and clocks that are set


def test_next_try_doubles_the_pause() -> None:
    limits = settings(backoff_seconds=30, attempts=9)

    pauses = [next_try_at(Repairs(count, START), limits) for count in range(1, 5)]

    assert pauses == [START + seconds(pause) for pause in (30, 60, 120, 240)]
    assert next_try_at(Repairs(), limits) is None
    assert next_try_at(Repairs(0, START), limits) is None


@pytest.mark.parametrize("tried", [1, 40, 2000])
def test_next_try_has_a_bound_however_many_tries_there_are(tried: int) -> None:
    limits = settings(attempts=5000)
    at = next_try_at(Repairs(tried, NOW), limits)

    assert at is not None
    assert NOW + seconds(120) <= at <= NOW + seconds(86400)
    assert not_now(repairs=Repairs(tried, NOW), attempts=5000) is not None


def test_why_not_now_waits_no_longer_than_the_longest_pause_after_a_clock_was_set_back() -> None:
    ahead = Repairs(1, NOW + seconds(30 * 86400))

    assert not_now(repairs=ahead) is None


def test_why_not_now_waits_for_no_trouble_that_lies_ahead() -> None:
    node = patient(sick(broken(ConditionType.DISK_SPACE_SUFFICIENT, since=30 * 86400)))

    assert not_now(node) is None
    assert not_now(waiting_since=30 * 86400) is None


# on to the next step


def test_goes_on_while_what_asked_is_wrong_and_nothing_helped() -> None:
    state = sick(broken(ConditionType.DISK_SPACE_SUFFICIENT))
    found = Plan(("DiskSpaceSufficient",))

    assert goes_on(found, state, [], DEFAULT_LADDERS)
    assert goes_on(found, state, ["restart_service"], DEFAULT_LADDERS)
    assert not goes_on(found, state, ["free_disk"], DEFAULT_LADDERS)
    assert not goes_on(found, sick(), [], DEFAULT_LADDERS)


def test_goes_on_asks_the_checks_and_not_the_steps() -> None:
    found = Plan(("ChecksPassing",))

    assert goes_on(found, sick(broken(ConditionType.CHECKS_PASSING)), ["restart_service"], DEFAULT_LADDERS)
    mended = replace(broken(ConditionType.CHECKS_PASSING), status=True)
    assert not goes_on(found, sick(mended), [], DEFAULT_LADDERS)


def test_goes_on_for_what_a_step_for_another_trouble_did_not_mend() -> None:
    found = Plan(("DiskSpaceSufficient", "ClockSynchronised"))
    state = sick(broken(ConditionType.DISK_SPACE_SUFFICIENT), broken(ConditionType.CLOCK_SYNCHRONISED))

    assert goes_on(found, state, ["free_disk"], DEFAULT_LADDERS)
    assert not goes_on(found, state, ["free_disk", "renew_clock"], DEFAULT_LADDERS)


def test_goes_on_ignores_what_went_wrong_since() -> None:
    assert not goes_on(Plan(("ClockSynchronised",)), FULL, [], DEFAULT_LADDERS)


@pytest.mark.parametrize("health", [Health.SUSPECT, Health.UNREACHABLE], ids=str)
def test_goes_on_where_a_node_that_fell_silent_no_longer_tells(health: Health) -> None:
    # What was checked before the silence is forgotten then: that is not to be well.
    assert goes_on(Plan(("ChecksPassing",)), silent(health), [], DEFAULT_LADDERS)


def test_goes_on_no_more_for_a_node_that_power_brought_back() -> None:
    assert not goes_on(Plan(("Reachable",)), silent(), ["power_cycle"], DEFAULT_LADDERS)
    assert goes_on(Plan(("Reachable",)), silent(), [], DEFAULT_LADDERS)
