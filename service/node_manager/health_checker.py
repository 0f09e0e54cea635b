# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide a node's health from what was seen of it.

Pure: state and observation in, state and cause out. The clock is a parameter; nothing is read or written here. The rules in
words are in docs/health.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, assert_never

from node_manager.domain import (
    Admin,
    CheckKind,
    CheckState,
    ConditionType,
    ContactReason,
    Evidence,
    Health,
    Liveness,
    Severity,
    Status,
)
from node_manager.liveness_terms import SILENT_REASONS
from node_manager.settings import HealthSettings
from node_manager.shapes import Contact, Report, Verdict

CRITICAL_CHECK_FAILED = "CriticalCheckFailed"
WARNING_CHECK_FAILED = "WarningCheckFailed"

_CONDITION_OF = {
    ContactReason.AUTHENTICATION_FAILED: ConditionType.AUTHENTICATED,
    ContactReason.HOST_KEY_CHANGED: ConditionType.HOST_KEY_TRUSTED,
    ContactReason.PYTHON_MISSING: ConditionType.PYTHON_AVAILABLE,
    ContactReason.MODULE_FAILED: ConditionType.PROBE_WORKING,
    ContactReason.OUTPUT_UNUSABLE: ConditionType.PROBE_WORKING,
}
# From the outside in: a step that worked proves all before it.
_PATH = (
    ConditionType.REACHABLE,
    ConditionType.HOST_KEY_TRUSTED,
    ConditionType.AUTHENTICATED,
    ConditionType.PYTHON_AVAILABLE,
    ConditionType.PROBE_WORKING,
)


_ORDER = {condition: place for place, condition in enumerate(ConditionType)}
# What a report that says nothing of it ends.
_OF_REPORTS = frozenset((ConditionType.CERTIFICATES_VALID,))
_WELL = "no check failed"
_MAX_CAUSE_CHARACTERS = 4000


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that can be said about a node; status true is good, severity is what a false one weighs."""

    type: ConditionType
    status: bool
    reason: str
    message: str
    since: datetime
    severity: Severity = Severity.CRITICAL


@dataclass(frozen=True, slots=True)
class Return:
    """How far a node that was lost is on its way back: good samples in a row, and the time of the first."""

    samples: int = 0
    since: datetime | None = None


@dataclass(frozen=True)
class NodeState:
    """What the manager concludes about one node."""

    health: Health
    health_since: datetime
    health_cause: str
    last_contact_at: datetime | None = None
    last_attempt_at: datetime | None = None
    failures: int = 0
    conditions: tuple[Condition, ...] = ()
    quarantined: bool = False
    # Of an unreachable node: what stands behind it, and until when nothing is done about it.
    evidence: Evidence | None = None
    frozen_until: datetime | None = None
    # None: it was not lost since it last proved itself.
    returning: Return | None = None
    probation_until: datetime | None = None
    # The penalty for losses as it was at flap_at; it decays.
    flap_penalty: float = 0.0
    flap_at: datetime | None = None
    suppressed: bool = False
    # What the rules of thresholds remember of earlier samples; theirs to read.
    readings: Mapping[str, Any] = field(default_factory=dict)

    def condition(self, wanted: ConditionType) -> Condition | None:
        """Find one condition; None where nothing is known of it."""
        return next((condition for condition in self.conditions if condition.type is wanted), None)


def new_state(now: datetime) -> NodeState:
    """Give the state of a node that nobody has looked at."""
    return NodeState(Health.UNKNOWN, now, "not looked at yet")


def after_success(
    state: NodeState,
    at: datetime,
    limits: HealthSettings,
    seen: Iterable[Condition] = (),
    unknown: Collection[ConditionType] = (),
    good_samples: int = 1,
) -> NodeState:
    """Judge a contact in which the node was reached and the probe answered.

    Shapes: *seen* are the conditions that a sample tells of, *unknown* those that nothing is known of any more;
        *good_samples* is what the contact counts for where the node must prove that it is back.
    """
    state = _without(_with_conditions(_answered(state, at), seen), *unknown)
    if state.returning is not None and good_samples:
        since = at if state.returning.since is None else min(at, state.returning.since)
        state = replace(state, returning=Return(state.returning.samples + good_samples, since))
    return _judged(state, at, limits)


def after_report(
    state: NodeState, report: Report, at: datetime, limits: HealthSettings, seen: Iterable[Condition] = ()
) -> NodeState:
    """Judge one run of the health checks; *seen* are the conditions of their own that some checks have.

    A report that a later look has overtaken still tells of the checks; whether the node answers, the later look knows.
    Checks of thresholds are left out: one sample beyond a limit is no finding, see node_conditions.
    """
    overtaken = state.last_attempt_at is not None and at < state.last_attempt_at
    if overtaken and _is_void(state, at):
        return state
    if not overtaken:
        state = _answered(state, at)
    judged = [check for check in report.checks if check.kind != CheckKind.THRESHOLD.value]
    failed = [check for check in judged if check.state is CheckState.FAILED]
    critical = [check for check in failed if check.severity is Severity.CRITICAL]
    message = "; ".join(f"{check.name}: {check.message}" for check in critical or failed)[:_MAX_CAUSE_CHARACTERS]
    checks = Condition(
        ConditionType.CHECKS_PASSING,
        not failed,
        (CRITICAL_CHECK_FAILED if critical else WARNING_CHECK_FAILED) if failed else ContactReason.OK,
        message,
        at,
        Severity.WARNING if failed and not critical else Severity.CRITICAL,
    )
    before = state.condition(ConditionType.CHECKS_PASSING)
    unknown = [check.name for check in judged if check.state is CheckState.UNKNOWN]
    if not failed and before is not None and not before.status and _is_about(before, unknown):
        # What failed can't be told now, as on a node that is too busy to answer in time: that is no sign that it is well.
        checks = before
    told = [checks, *seen]
    ended = _OF_REPORTS - {condition.type for condition in told}
    state = _with_conditions(_without(state, *ended), told)
    reachable = state.condition(ConditionType.REACHABLE)
    silent = reachable is None or not reachable.status
    if overtaken and (silent or state.health in {Health.RECOVERING, Health.FLAPPING}):
        return state
    return _judged(state, at, limits)


def after_failure(
    state: NodeState,
    contact: Contact,
    at: datetime,
    limits: HealthSettings,
    silence: timedelta,
    *,
    asleep: bool = False,
) -> NodeState:
    """Judge a contact that failed; *silence* without contact, and failures in a row, make a node unreachable.

    One that may be silent now, as declared, is *asleep*. A fault of the manager itself changes nothing: it says nothing about
    the node.
    """
    if contact.reason is ContactReason.MANAGER_FAULT:
        return state
    state = replace(state, last_attempt_at=at)
    if contact.reason in SILENT_REASONS and asleep:
        return _asleep(state, f"asleep, as declared ({_cause(contact)})", at)
    if contact.reason in SILENT_REASONS:
        return _after_silence(state, contact, at, limits, silence)
    broken = _CONDITION_OF.get(contact.reason, ConditionType.PROBE_WORKING)
    state = replace(
        _heard(state),
        last_contact_at=at,
        quarantined=state.quarantined or contact.reason is ContactReason.HOST_KEY_CHANGED,
        returning=_set_back(state),
    )
    proven = _PATH[: _PATH.index(broken)]
    state = _with_conditions(
        state,
        [
            *(Condition(condition, True, ContactReason.OK, "", at) for condition in proven),
            Condition(broken, False, contact.reason, contact.message, at),
        ],
    )
    return _with_health(state, Health.DEGRADED, _cause(contact), at)


def after_verdict(state: NodeState, verdict: Verdict, at: datetime, limits: HealthSettings) -> NodeState:
    """Take over what the manager itself concludes from a node's silence; it has waited, asked and counted already."""
    state = replace(state, last_attempt_at=at)
    silent = Condition(ConditionType.REACHABLE, False, verdict.reason, verdict.message, at)
    match verdict.liveness:
        case Liveness.SUSPECT:
            if state.health is Health.UNREACHABLE:
                return state
            state = replace(_with_conditions(state, [silent]), returning=_set_back(state))
            return _with_health(state, Health.SUSPECT, _cause(verdict), at)
        case Liveness.UNREACHABLE:
            frozen_until = None if verdict.frozen_seconds is None else at + timedelta(seconds=verdict.frozen_seconds)
            state = _lost(_with_conditions(state, [silent]), _cause(verdict), at, limits)
            return replace(state, evidence=verdict.evidence, frozen_until=frozen_until)
        case Liveness.PATH_LOST:
            # Somebody reaches it, so it lives; only we don't.
            path = Condition(ConditionType.MANAGEMENT_PATH, False, verdict.reason, verdict.message, at)
            reached = Condition(ConditionType.REACHABLE, True, ContactReason.OK, "", at)
            state = replace(_with_conditions(_heard(state), [reached, path]), returning=_set_back(state))
            return _with_health(state, Health.DEGRADED, _cause(verdict), at)
        case Liveness.ASLEEP:
            return _asleep(state, verdict.message or "asleep, as declared", at)
        case _:
            assert_never(verdict.liveness)


def in_maintenance(before: NodeState, after: NodeState) -> NodeState:
    """Keep what was seen and drop every verdict that would follow: an operator works on the node."""
    return replace(
        after,
        health=before.health,
        health_since=before.health_since,
        health_cause=before.health_cause,
        evidence=before.evidence,
        frozen_until=before.frozen_until,
        returning=before.returning,
        probation_until=before.probation_until,
        flap_penalty=before.flap_penalty,
        flap_at=before.flap_at,
        suppressed=before.suppressed,
    )


def without_future(state: NodeState, now: datetime, limits: HealthSettings) -> NodeState:
    """Bring times that can't be back to now: the manager's clock ran ahead when they were written.

    Left in place they would hold off every verdict until the clock has caught up.
    """
    returning = state.returning
    if returning is not None and returning.since is not None and returning.since > now:
        returning = Return(returning.samples, now)
    return replace(
        state,
        health_since=min(state.health_since, now),
        last_contact_at=_at_most(state.last_contact_at, now),
        last_attempt_at=_at_most(state.last_attempt_at, now),
        flap_at=_at_most(state.flap_at, now),
        returning=returning,
        frozen_until=_at_most(state.frozen_until, now + timedelta(seconds=limits.autonomy_seconds)),
        probation_until=_at_most(state.probation_until, now + timedelta(seconds=limits.probation_seconds)),
    )


def is_settled(state: NodeState) -> bool:
    """Tell whether one more good answer would change nothing but times."""
    good = {condition.type for condition in state.conditions if condition.status}
    path = state.condition(ConditionType.MANAGEMENT_PATH)
    return (
        state.failures == 0
        and state.returning is None
        and state.probation_until is None
        and state.evidence is None
        and state.frozen_until is None
        and not state.suppressed
        and good.issuperset(_PATH)
        and (path is None or path.status)
        and (state.health, state.health_cause) == _health_by_checks(state)
    )


def penalty_at(state: NodeState, at: datetime, limits: HealthSettings) -> float:
    """Tell what is left of a node's penalty for losses."""
    if state.flap_at is None:
        return 0.0
    elapsed = max(0.0, (at - state.flap_at).total_seconds())
    return float(state.flap_penalty * 0.5 ** (elapsed / limits.flap_half_life_seconds))


def derive_status(admin: Admin, health: Health) -> Status:
    """Fold the two axes into the one word of the API."""
    if admin is Admin.MAINTENANCE:
        return Status.MAINTENANCE
    if admin is Admin.OFFLINE or health is Health.UNREACHABLE:
        return Status.OFFLINE
    return Status.ONLINE


def is_schedulable(admin: Admin, state: NodeState, now: datetime, stale_after: timedelta) -> bool:
    """Tell whether new work may be placed: active, trusted, seen lately, and healthy or degraded by warnings only."""
    if admin is not Admin.ACTIVE or state.quarantined:
        return False
    if state.last_contact_at is None or now - state.last_contact_at > stale_after:
        return False
    return state.health in {Health.HEALTHY, Health.DEGRADED} and all(
        condition.status or condition.severity is Severity.WARNING for condition in state.conditions
    )


def _answered(state: NodeState, at: datetime) -> NodeState:
    path = state.condition(ConditionType.MANAGEMENT_PATH)
    proven = _PATH if path is None else (*_PATH, ConditionType.MANAGEMENT_PATH)
    return _with_conditions(
        replace(_heard(state), last_contact_at=at, last_attempt_at=at),
        [Condition(condition, True, ContactReason.OK, "", at) for condition in proven],
    )


def _is_about(checks: Condition, names: Iterable[str]) -> bool:
    """Tell whether one of these checks is among those that failed."""
    return any(f"; {name}: " in f"; {checks.message}" for name in names)


def _heard(state: NodeState) -> NodeState:
    """End what only holds of a node that is silent."""
    return replace(state, failures=0, evidence=None, frozen_until=None)


def _is_void(state: NodeState, at: datetime) -> bool:
    """Tell whether checks of that time no longer count: the node was lost since."""
    if state.returning is None:
        return state.health is Health.UNREACHABLE
    return state.returning.since is None or at < state.returning.since


def _judged(state: NodeState, at: datetime, limits: HealthSettings) -> NodeState:
    """Give the verdict on a node that answers: what it must prove first, then whether it keeps still, then its checks."""
    on_trial = state.returning is not None or state.suppressed
    if state.suppressed and penalty_at(state, at, limits) < limits.flap_reuse:
        state = replace(state, suppressed=False)
    if state.returning is not None:
        missing = _missing(state, state.returning, at, limits)
        if missing:
            return _with_health(state, Health.RECOVERING, missing, at)
        state = replace(state, returning=None)
    if state.suppressed:
        cause = (
            f"comes and goes: penalty {penalty_at(state, at, limits):.0f}, takes work again below {limits.flap_reuse:g}"
        )
        return _with_health(state, Health.FLAPPING, cause, at)
    if on_trial:
        until = at + timedelta(seconds=limits.probation_seconds)
        state = replace(state, probation_until=until if until > at else None)
    elif state.probation_until is not None and at >= state.probation_until:
        state = replace(state, probation_until=None)
    return _with_health(state, *_health_by_checks(state), at)


def _missing(state: NodeState, returning: Return, at: datetime, limits: HealthSettings) -> str:
    """Say what a node that is back has yet to prove; nothing is the empty text."""
    span = max(0.0, (at - returning.since).total_seconds()) if returning.since is not None else 0.0
    unchecked = state.condition(ConditionType.CHECKS_PASSING) is None
    if returning.samples >= limits.return_samples and span >= limits.return_seconds and not unchecked:
        return ""
    told = f"is back: {returning.samples} of {limits.return_samples} good samples"
    told += f" over {span:.0f} of {limits.return_seconds:g} s"
    return f"{told}; waits for a full health check" if unchecked else told


def _after_silence(
    state: NodeState, contact: Contact, at: datetime, limits: HealthSettings, silence: timedelta
) -> NodeState:
    path = state.condition(ConditionType.MANAGEMENT_PATH)
    if path is not None and not path.status:
        # That we don't reach it is known, and that others do.
        return replace(state, failures=state.failures + 1)
    state = replace(state, failures=state.failures + 1)
    state = _with_conditions(state, [Condition(ConditionType.REACHABLE, False, contact.reason, contact.message, at)])
    if state.health is Health.UNREACHABLE:
        return state
    # One that was never there has nothing to lose. Failures in a row beside the time: a clock that was set proves nothing.
    if state.last_contact_at is None or (
        at - state.last_contact_at >= silence and state.failures >= limits.failures_before_unreachable
    ):
        return _lost(state, _cause(contact), at, limits)
    return _with_health(replace(state, returning=_set_back(state)), Health.SUSPECT, _cause(contact), at)


def _asleep(state: NodeState, cause: str, at: datetime) -> NodeState:
    """Take silence for what was declared: no failure, and nothing that speaks against the node."""
    state = _without(_heard(state), ConditionType.REACHABLE, ConditionType.MANAGEMENT_PATH)
    return _with_health(state, Health.UNKNOWN, cause, at)


def _lost(state: NodeState, cause: str, at: datetime, limits: HealthSettings) -> NodeState:
    """Call a node unreachable: it must prove itself anew, and is the less trusted the more often it is lost."""
    if state.health is not Health.UNREACHABLE and state.last_contact_at is not None:
        penalty = penalty_at(state, at, limits) + limits.flap_penalty
        suppressed = state.suppressed or penalty > limits.flap_suppress
        state = replace(state, flap_penalty=penalty, flap_at=at, suppressed=suppressed)
    # What was checked before the silence no longer counts: a node that comes back is checked anew.
    state = _without(state, ConditionType.CHECKS_PASSING, ConditionType.MANAGEMENT_PATH)
    state = replace(state, returning=Return(), probation_until=None)
    return _with_health(state, Health.UNREACHABLE, cause, at)


def _set_back(state: NodeState) -> Return | None:
    """Let a node that has yet to prove itself start again."""
    return None if state.returning is None else Return()


def _cause(told: Contact | Verdict) -> str:
    return f"{told.reason}: {told.message}"


def _health_by_checks(state: NodeState) -> tuple[Health, str]:
    broken = [condition for condition in state.conditions if not condition.status]
    if broken:
        told = "; ".join(f"{condition.reason}: {condition.message}" for condition in broken)
        return Health.DEGRADED, told[:_MAX_CAUSE_CHARACTERS]
    if state.condition(ConditionType.CHECKS_PASSING) is None:
        return Health.UNKNOWN, "answers; waits for a full health check"
    return Health.HEALTHY, _WELL


def _with_conditions(state: NodeState, found: Iterable[Condition]) -> NodeState:
    """Put *found* in the place of what was known; their times count only if the status changed."""
    known = {condition.type: condition for condition in state.conditions}
    changed = False
    for new in found:
        old = known.get(new.type)
        since = old.since if old is not None and old.status == new.status else new.since
        if old is None or (old.status, old.reason, old.message, old.severity) != (
            new.status,
            new.reason,
            new.message,
            new.severity,
        ):
            known[new.type] = replace(new, reason=str(new.reason), since=since)
            changed = True
    if not changed:
        return state
    return replace(state, conditions=tuple(sorted(known.values(), key=lambda condition: _ORDER[condition.type])))


def _without(state: NodeState, *types: ConditionType) -> NodeState:
    if not any(known.type in types for known in state.conditions):
        return state
    return replace(state, conditions=tuple(known for known in state.conditions if known.type not in types))


def _with_health(state: NodeState, health: Health, cause: str, at: datetime) -> NodeState:
    since = state.health_since if health is state.health else max(at, state.health_since)
    return replace(state, health=health, health_since=since, health_cause=cause)


def _at_most(at: datetime | None, limit: datetime) -> datetime | None:
    return None if at is None else min(at, limit)
