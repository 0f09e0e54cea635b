# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide a node's health from what was seen of it.

Pure: state and observation in, state and cause out. The clock is a parameter; nothing is read or written here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from node_manager.domain import Admin, CheckState, ConditionType, ContactReason, Health, Severity, Status
from node_manager.settings import HealthSettings
from node_manager.shapes import Contact, Report

CRITICAL_CHECK_FAILED = "CriticalCheckFailed"
WARNING_CHECK_FAILED = "WarningCheckFailed"

# What each kind of failure says about the node: silence is a matter of life, the rest of repair.
_SILENT = frozenset(
    {
        ContactReason.CONNECTION_REFUSED,
        ContactReason.TIMED_OUT,
        ContactReason.NO_ROUTE,
        ContactReason.NAME_NOT_RESOLVED,
        ContactReason.CONNECTION_LOST,
    }
)
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


@dataclass(frozen=True)
class Condition:
    """One thing that can be said about a node; status true is good."""

    type: ConditionType
    status: bool
    reason: str
    message: str
    since: datetime


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

    def condition(self, wanted: ConditionType) -> Condition | None:
        """Find one condition; None where nothing is known of it."""
        return next((condition for condition in self.conditions if condition.type is wanted), None)


def new_state(now: datetime) -> NodeState:
    """Give the state of a node that nobody has looked at."""
    return NodeState(Health.UNKNOWN, now, "not looked at yet")


def after_success(state: NodeState, at: datetime) -> NodeState:
    """Judge a contact in which the node was reached and the probe answered."""
    state = _answered(state, at)
    if state.health in {Health.RECOVERING, Health.FLAPPING}:
        return state
    return _with_health(state, *_health_by_checks(state), at)


def after_report(state: NodeState, report: Report, at: datetime) -> NodeState:
    """Judge one run of the health checks.

    A report that a later look has overtaken still tells of the checks; whether the node answers, the later look knows.
    """
    overtaken = state.last_attempt_at is not None and at < state.last_attempt_at
    if overtaken and state.health is Health.UNREACHABLE:
        return state
    if not overtaken:
        state = _answered(state, at)
    failed = [check for check in report.checks if check.state is CheckState.FAILED]
    if not failed:
        state = _with_condition(state, Condition(ConditionType.CHECKS_PASSING, True, ContactReason.OK, "", at))
    else:
        critical = [check for check in failed if check.severity is Severity.CRITICAL]
        reason = CRITICAL_CHECK_FAILED if critical else WARNING_CHECK_FAILED
        message = "; ".join(f"{check.name}: {check.message}" for check in critical or failed)
        state = _with_condition(state, Condition(ConditionType.CHECKS_PASSING, False, reason, message[:4000], at))
    if overtaken and state.health is Health.SUSPECT:
        return state
    return _with_health(state, *_health_by_checks(state), at)


def after_failure(state: NodeState, contact: Contact, at: datetime, limits: HealthSettings) -> NodeState:
    """Judge a contact that failed.

    A fault of the manager itself changes nothing: it says nothing about the node.
    """
    if contact.reason is ContactReason.MANAGER_FAULT:
        return state
    state = replace(state, last_attempt_at=at)
    if contact.reason in _SILENT:
        return _after_silence(state, contact, at, limits)
    broken = _CONDITION_OF.get(contact.reason, ConditionType.PROBE_WORKING)
    state = replace(
        state,
        failures=0,
        last_contact_at=at,
        quarantined=state.quarantined or contact.reason is ContactReason.HOST_KEY_CHANGED,
    )
    for condition in _PATH[: _PATH.index(broken)]:
        state = _with_condition(state, Condition(condition, True, ContactReason.OK, "", at))
    state = _with_condition(state, Condition(broken, False, contact.reason, contact.message, at))
    return _with_health(state, Health.DEGRADED, f"{contact.reason}: {contact.message}", at)


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
        condition.status or condition.reason == WARNING_CHECK_FAILED for condition in state.conditions
    )


def _answered(state: NodeState, at: datetime) -> NodeState:
    state = replace(state, failures=0, last_contact_at=at, last_attempt_at=at)
    for condition in _PATH:
        state = _with_condition(state, Condition(condition, True, ContactReason.OK, "", at))
    return state


def _after_silence(state: NodeState, contact: Contact, at: datetime, limits: HealthSettings) -> NodeState:
    state = replace(state, failures=state.failures + 1)
    state = _with_condition(state, Condition(ConditionType.REACHABLE, False, contact.reason, contact.message, at))
    cause = f"{contact.reason}: {contact.message}"
    if state.health is Health.UNREACHABLE:
        return state
    never_seen = state.last_contact_at is None
    silent = never_seen or at - (state.last_contact_at or at) >= timedelta(
        seconds=limits.silence_before_unreachable_seconds
    )
    if silent and (never_seen or state.failures >= limits.failures_before_unreachable):
        # What was checked before the silence no longer counts: a node that comes back is checked anew.
        kept = (known for known in state.conditions if known.type is not ConditionType.CHECKS_PASSING)
        state = replace(state, conditions=tuple(kept))
        return _with_health(state, Health.UNREACHABLE, cause, at)
    return _with_health(state, Health.SUSPECT, cause, at)


def _health_by_checks(state: NodeState) -> tuple[Health, str]:
    broken = [condition for condition in state.conditions if not condition.status]
    if broken:
        return Health.DEGRADED, "; ".join(f"{condition.reason}: {condition.message}" for condition in broken)[:4000]
    if state.condition(ConditionType.CHECKS_PASSING) is None:
        return Health.UNKNOWN, "answers; waits for a full health check"
    return Health.HEALTHY, "no check failed"


def _with_condition(state: NodeState, new: Condition) -> NodeState:
    """Put *new* in the place of what was known; its time counts only if the status changed."""
    old = state.condition(new.type)
    since = old.since if old is not None and old.status == new.status else new.since
    kept = (known for known in state.conditions if known.type is not new.type)
    return replace(state, conditions=_sorted([*kept, replace(new, reason=str(new.reason), since=since)]))


def _sorted(conditions: Iterable[Condition]) -> tuple[Condition, ...]:
    order = list(ConditionType)
    return tuple(sorted(conditions, key=lambda condition: order.index(condition.type)))


def _with_health(state: NodeState, health: Health, cause: str, at: datetime) -> NodeState:
    since = state.health_since if health is state.health else max(at, state.health_since)
    return replace(state, health=health, health_since=since, health_cause=cause)
