# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide what would be tried to repair a node, in which order, and why not.

Pure: what is known of the node and the configuration in, a plan out. Whether so many repairs may go on at once is the guard's
business, who carries them out the fault handler's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from node_manager.domain import Admin, ConditionType, Evidence, Health, RecoveryStep, Severity
from node_manager.health_checker import Condition, NodeState
from node_manager.recovery_steps import WITHOUT_THE_NODE, is_drastic
from node_manager.settings import RecoverySettings

# What other troubles follow from comes first.
_ORDER = (
    ConditionType.REACHABLE,
    ConditionType.ROOT_WRITABLE,
    ConditionType.INODES_SUFFICIENT,
    ConditionType.DISK_SPACE_SUFFICIENT,
    ConditionType.CLOCK_SYNCHRONISED,
    ConditionType.CHECKS_PASSING,
)
_SILENT = frozenset((Health.SUSPECT, Health.UNREACHABLE))
# Without these the manager can use a node for nothing, and what it knows of the rest is from before.
_WAY = frozenset(
    (
        ConditionType.MANAGEMENT_PATH,
        ConditionType.HOST_KEY_TRUSTED,
        ConditionType.AUTHENTICATED,
        ConditionType.PYTHON_AVAILABLE,
    )
)
_DAY_SECONDS = 86400.0
# Nothing is repaired while an operator has the node, or says that it is out.
REPAIRABLE = frozenset((Admin.ACTIVE, Admin.CORDONED))


@dataclass(frozen=True)
class Patient:
    """What is known of a node that may need repair."""

    node_id: str
    zone: str | None
    admin: Admin
    is_local: bool
    state: NodeState
    ladders: Mapping[str, Sequence[str]]
    has_power: bool


@dataclass(frozen=True)
class LeftOut:
    """A step of the ladder that is not tried, and why."""

    step: str
    why: str


@dataclass(frozen=True)
class Plan:
    """What would be tried: the false conditions behind it, the steps in their order, and those that are left out."""

    conditions: tuple[str, ...] = ()
    critical: bool = False
    since: datetime | None = None
    steps: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Repairs:
    """What is remembered of a node's repairs since it was last well."""

    attempts: int = 0
    last_ended_at: datetime | None = None
    gave_up_at: datetime | None = None


def plan(patient: Patient, settings: RecoverySettings, *, last_attempt: bool, tries_left: bool = True) -> Plan:
    """Plan a climb for what is wrong with a node; without conditions where nothing asks for one.

    Shapes: on the *last_attempt* the ladder's give_up is part of it; where no *tries_left*, as when the trouble came back
        after the last one had helped, it is all.
    """
    asking = [condition for condition in _asking(patient) if patient.ladders.get(condition.type.value)]
    if not asking:
        return Plan()
    critical = any(condition.severity is Severity.CRITICAL for condition in asking)
    wanted = _merged([patient.ladders[condition.type.value] for condition in asking])
    steps, left_out = [], []
    for step in wanted:
        why = why_not(step, patient, settings, critical=critical)
        if step == RecoveryStep.GIVE_UP and not last_attempt:
            why = f"comes with the last of {settings.attempts} tries"
        if step != RecoveryStep.GIVE_UP and not tries_left:
            why = f"tried {settings.attempts} times (recovery.attempts)"
        if why is None:
            steps.append(step)
        else:
            left_out.append(LeftOut(step, why))
    if tries_left and all(step == RecoveryStep.GIVE_UP for step in steps):
        # To give up without a try helps nobody: a node that comes back by itself would stay cordoned.
        left_out += [LeftOut(step, "nothing else can be tried") for step in steps]
        steps = []
    since = min(_since(patient.state, condition) for condition in asking)
    return Plan(tuple(condition.type.value for condition in asking), critical, since, tuple(steps), tuple(left_out))


def plan_by_hand(patient: Patient, settings: RecoverySettings) -> Plan:
    """Plan a climb that somebody asked for: for what is wrong, or all mild steps where nothing is known to be."""
    found = plan(patient, settings, last_attempt=False)
    if found.conditions:
        return found
    every = _merged([patient.ladders.get(condition.value, ()) for condition in _ORDER])
    steps = [
        step
        for step in every
        if not is_drastic(step)
        and step != RecoveryStep.GIVE_UP
        and why_not(step, patient, settings, critical=True) is None
    ]
    return Plan(steps=tuple(steps))


def never(step: str, patient: Patient) -> str | None:
    """Say why a step can't be done on a node whoever asks for it; None where it can."""
    if step == RecoveryStep.POWER_CYCLE and not patient.has_power:
        return "recovery.power is not configured"
    if is_drastic(step) and patient.is_local:
        return "it is the manager's own machine"
    return None


def why_not(step: str, patient: Patient, settings: RecoverySettings, *, critical: bool) -> str | None:
    """Say why a step can't be tried on a node now; None where it can."""
    state = patient.state
    silent = state.health in _SILENT
    if silent and step not in WITHOUT_THE_NODE:
        return "the node doesn't answer"
    why_never = never(step, patient)
    if why_never is not None:
        return why_never
    if step == RecoveryStep.POWER_CYCLE:
        if state.health is Health.UNREACHABLE and not (
            state.evidence is Evidence.PEERS_BLIND or settings.power_without_witness
        ):
            return "no other node could say whether it is really down (recovery.power_without_witness)"
        if state.health is Health.SUSPECT:
            return "that it is down is not confirmed yet"
    if is_drastic(step) and not critical:
        return "nothing critical is wrong"
    return None


def why_not_now(
    patient: Patient, found: Plan, repairs: Repairs, settings: RecoverySettings, now: datetime, waiting_since: datetime
) -> str | None:
    """Say why a node is not repaired by itself now, the guard and pauses apart; None where it may be.

    Shapes: *waiting_since* is when all waiting began anew, as after a mass failure.
    """
    state = patient.state
    if not settings.automatic:
        return "automatic recovery is off (recovery.automatic)"
    if patient.admin not in REPAIRABLE:
        return f"it is {patient.admin}: nothing is done by itself"
    if patient.is_local:
        return "it is the manager's own machine, which is repaired only when somebody asks"
    if state.quarantined:
        return "it is quarantined: its host key changed"
    if state.suppressed or state.health is Health.FLAPPING:
        return "it comes and goes (flapping): somebody must look"
    if repairs.gave_up_at is not None:
        return f"given up after {repairs.attempts} tries; PUT /nodes/{patient.node_id}/status active begins anew"
    if state.frozen_until is not None and now < state.frozen_until:
        return f"its whole site is dark: left alone until {state.frozen_until:%H:%M:%S} UTC"
    if not found.steps:
        return "; ".join(f"{left.step}: {left.why}" for left in found.left_out) or "no step is configured for it"
    if repairs.attempts >= settings.attempts and RecoveryStep.GIVE_UP not in found.steps:
        return f"tried {repairs.attempts} times (recovery.attempts)"
    again_at = next_try_at(repairs, settings)
    if again_at is not None and now < again_at <= now + _longest_pause(settings):
        return f"tried {repairs.attempts} of {settings.attempts} times, next at {again_at:%H:%M:%S} UTC"
    since = max(found.since or now, waiting_since)
    # A time that lies further ahead is of a clock that was set back since.
    if abs(now - since) < timedelta(seconds=settings.wait_seconds):
        return f"waits {settings.wait_seconds:g} s for it to mend itself (recovery.wait_seconds)"
    return None


def next_try_at(repairs: Repairs, settings: RecoverySettings) -> datetime | None:
    """Tell when the next climb may begin; None at any time."""
    if repairs.last_ended_at is None or repairs.attempts < 1:
        return None
    return repairs.last_ended_at + _pause(settings, repairs.attempts)


def goes_on(found: Plan, state: NodeState, done: Sequence[str], ladders: Mapping[str, Sequence[str]]) -> bool:
    """Tell whether a climb goes on after a step that helped: something that asked for it is still wrong.

    Shapes: *done* are the steps that helped. What only samples can tell lags behind, so a condition whose ladder has one of
        them counts as mended; checks were run anew.
    """
    for name in found.conditions:
        condition = state.condition(ConditionType(name))
        if condition is None and state.health in _SILENT:
            # Forgotten because the node fell silent, which is not to be well.
            return True
        if condition is None or condition.status:
            continue
        helped = not set(done).isdisjoint(ladders.get(name, ()))
        if name == ConditionType.CHECKS_PASSING or not helped:
            return True
    return False


def _asking(patient: Patient) -> list[Condition]:
    state = patient.state
    broken = {condition.type: condition for condition in state.conditions if not condition.status}
    if state.health in _SILENT:
        # Whatever else was wrong, nobody can tell now.
        broken = {ConditionType.REACHABLE: broken[ConditionType.REACHABLE]} if ConditionType.REACHABLE in broken else {}
        if state.health is Health.SUSPECT:
            return []
    elif not _WAY.isdisjoint(broken):
        broken = {condition_type: broken[condition_type] for condition_type in _WAY & set(broken)}
    others = [condition_type for condition_type in broken if condition_type not in _ORDER]
    return [broken[condition_type] for condition_type in (*_ORDER, *others) if condition_type in broken]


def _since(state: NodeState, condition: Condition) -> datetime:
    if condition.type is ConditionType.REACHABLE:
        return state.health_since
    return condition.since


def _merged(ladders: Sequence[Sequence[str]]) -> list[str]:
    """Put ladders together: what is mild first, then what is drastic, giving up last; each step once."""
    every = list(dict.fromkeys(step for ladder in ladders for step in ladder))
    last = [step for step in every if step == RecoveryStep.GIVE_UP]
    drastic = [step for step in every if is_drastic(step)]
    # An operator's own come before ours.
    drastic.sort(key=lambda step: (step == RecoveryStep.REBOOT) + 2 * (step == RecoveryStep.POWER_CYCLE))
    mild = [step for step in every if step not in drastic and step not in last]
    return [*mild, *drastic, *last]


def _longest_pause(settings: RecoverySettings) -> timedelta:
    """What a clock that was set back could make of the pause is more than this."""
    return _pause(settings, settings.attempts)


def _pause(settings: RecoverySettings, attempts: int) -> timedelta:
    """Double the pause with each try, up to a day."""
    first = settings.backoff_seconds
    return timedelta(seconds=min(first * 2 ** min(attempts - 1, 30), max(first, _DAY_SECONDS)))
