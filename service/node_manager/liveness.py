# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide from one node's silence whether it is suspect, unreachable, cut off or asleep.

Pure: events and a clock in, actions out. Times are seconds of a monotonic clock that the caller reads; a node's own clock plays
no part. Whom to ask, and what the answers mean, peers decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum

from node_manager.domain import ContactReason, Evidence, Liveness
from node_manager.liveness_terms import (
    NEVER,
    SILENT_REASONS,
    Action,
    AskPeers,
    CloseStream,
    Conclude,
    Knock,
    LivenessLimits,
    OpenStream,
    RecordFailure,
)
from node_manager.peers import Answer, Finding, Findings

__all__ = [
    "Action",
    "AskPeers",
    "CloseStream",
    "Conclude",
    "Knock",
    "LivenessLimits",
    "OpenStream",
    "RecordFailure",
    "Watch",
    "Weigh",
    "Window",
]

# How long a verdict whose conditions hold waits for peers that might tell more, and how often they are asked or weighed.
_VERDICT_WAIT_SECONDS = 4.0
_ASK_PAUSE_SECONDS = 2.0
_WEIGH_PAUSE_SECONDS = 1.0
# A node that is shut down refuses for a moment: that it was seen is older news than that it wasn't.
_SEEN_KEEPS_SECONDS = 2.0
_BLIND_KEEPS_SECONDS = 8.0
_ASK_AGAIN_SECONDS = 60.0
# Two rounds of blind peers in the time that three knocks take: one round alone may meet with a burst of loss.
_BLIND_ROUNDS = 2
# Attempts wait in queues, and a fleet that is lost as a whole makes them long; what takes longer got lost.
_PATIENCE_SECONDS = 600.0
# A stream that stood that long works; one that breaks sooner makes the pause before the next one longer.
_STREAM_STANDS_SECONDS = 30.0
_STREAMS_IN_VAIN = 3
# Nodes that sleep wake up, and fall asleep, by their own clocks.
_WAKE_SECONDS = 60.0
_ASLEEP_KNOCK_SECONDS = 60.0
_WAKING_KNOCK_SECONDS = 10.0


# What peers' answers mean at a time, as peers.Fleet.weigh tells for one node.
Weigh = Callable[[Mapping[str, Answer], float], Findings]
# Whether the node is expected to answer at a time, and when that changes.
Window = Callable[[float], tuple[bool, float]]

_EVIDENCE = {
    Finding.BLIND: Evidence.PEERS_BLIND,
    Finding.DARK: Evidence.SITE_DARK,
    Finding.NOBODY: Evidence.NOBODY_TO_ASK,
}


class _Try(Enum):
    OPEN = "open"
    KNOCK = "knock"


class Watch:
    """What is known of one node's life, and what is to be done about it.

    Each event gives the actions that follow. *lost* tells that the node is stored as unreachable; *seed* spreads the
    retries of different nodes; *window* is None for nodes that never sleep.
    """

    def __init__(
        self,
        limits: LivenessLimits,
        now: float,
        started_at: float,
        weigh: Weigh,
        *,
        lost: bool = False,
        seed: int = 0,
        window: Window | None = None,
    ) -> None:
        self.liveness: Liveness | None = Liveness.UNREACHABLE if lost else None
        self.streaming = False
        # Nothing was heard yet: counts as silence since the manager's start.
        self.last_sign_at = started_at
        self.next_at = now
        self._limits = limits
        self._weigh = weigh
        self._window = window
        self._seed = seed
        # Heard and not doubted: all that a sign of life has to look at.
        self._calm = False
        self._spoke = False
        self._opened_at = now
        self._evidence: Evidence | None = None
        # Silence counts from here, and no verdict is given before the grace is over.
        self._base_at = started_at
        self._grace_until = started_at + limits.grace_seconds
        self._wake_by = NEVER
        self._window_until = NEVER
        # The next attempt, and the one that is under way.
        self._attempt = _Try.KNOCK if lost else _Try.OPEN
        self._attempt_at = now
        self._pending: _Try | None = None
        self._pending_at = now
        self._stalled = False
        # How attempts went: silent ones in a row, manager faults in a row, streams since one stood, streams in vain.
        self._failures = 0
        self._failed_at = -NEVER
        self._faults = 0
        self._knocks = 0
        self._opens = 0
        self._vain = 0
        self._reason = ContactReason.TIMED_OUT
        self._message = ""
        self._answers: Mapping[str, Answer] = {}
        self._blind_rounds = 0
        self._answered_at = -NEVER
        self._asked_at: float | None = None
        self._ask_at = NEVER
        self._asks = 0
        self._verdict_by = NEVER
        self._weigh_at = NEVER

    # what the node, or its network, did

    def heard(self, now: float) -> None:
        """Take in a sign of life from the stream."""
        self.last_sign_at = now
        if not self._calm:
            self._come_back(now)

    def stream_opened(self, now: float) -> list[Action]:
        """Take in that the stream is open; its first word is yet to come."""
        self.streaming, self._spoke, self._calm = True, False, False
        self._opened_at = now
        self._answered(now)
        self._pending, self._attempt_at = None, NEVER
        return self._step(now)

    def stream_lost(self, now: float, reason: ContactReason, message: str) -> list[Action]:
        """Take in that the stream ended, unless that was our doing."""
        if not self.streaming:
            return []
        if reason not in SILENT_REASONS:
            return self.open_failed(now, reason, message)
        self._leave_stream()
        self._vain += not self._spoke
        actions = self._doubt(now, reason, message)
        self._plan(_Try.KNOCK, now + self._gap(0))
        self._knocks = 1
        return actions + self._step(now)

    def open_failed(self, now: float, reason: ContactReason, message: str) -> list[Action]:
        """Take in that no stream could be had. What isn't silence, the caller records as a failed contact."""
        silent = reason in SILENT_REASONS
        if self.streaming and silent:
            return []
        if self.streaming:
            self._leave_stream()
        started, stalled = self._end_attempt(_Try.OPEN, now)
        if reason is ContactReason.MANAGER_FAULT or (silent and stalled):
            self._fault(_Try.OPEN, now)
        elif silent:
            self._vain += 1
            if self.liveness is None and self._vain > _STREAMS_IN_VAIN:
                # That its streams fail is known; whether it is silent, a knock tells.
                self._reason, self._message = reason, message
                self._plan(_Try.KNOCK, now)
                return self._step(now)
            return self._fail(started, now, reason, message) + self._step(now)
        else:
            self._answered(now)
            self._vain = 0
            self._forget_verdict()
            self._plan_open(now)
        return self._step(now)

    def knocked(self, now: float, reason: ContactReason, message: str) -> list[Action]:
        """Take in how a knock ended; one that nothing hangs on any more changes nothing."""
        if self._pending is not _Try.KNOCK:
            return []
        started, stalled = self._end_attempt(_Try.KNOCK, now)
        if reason in SILENT_REASONS and not stalled:
            return self._fail(started, now, reason, message) + self._step(now)
        if reason is ContactReason.MANAGER_FAULT or reason in SILENT_REASONS:
            self._fault(_Try.KNOCK, now)
            return self._step(now)
        self._answered(now)
        actions: list[Action] = []
        if self._vain >= _STREAMS_IN_VAIN:
            # Silence isn't what is wrong with it: under this reason the node counts as degraded, not as lost.
            text = f"its SSH port answers, but {self._vain} streams in a row failed: {self._reason}: {self._message}"
            actions.append(RecordFailure(ContactReason.MODULE_FAILED, text))
            self._forget_verdict()
        self._plan_open(now)
        return actions + self._step(now)

    def peers_answered(self, now: float, answers: Mapping[str, Answer]) -> list[Action]:
        """Take in what peers found; nobody could be asked where there are none."""
        if self._asked_at is None:
            return []
        self._asked_at = None
        self._answers, self._answered_at = answers, now
        found = set(answers.values())
        if Answer.SEEN in found:
            self._blind_rounds = 0
        elif Answer.BLIND in found:
            self._blind_rounds += 1
            if self._blind_rounds < _BLIND_ROUNDS:
                self._ask_at = now
        return self._step(now)

    def tick(self, now: float) -> list[Action]:
        """Do what is due."""
        return self._step(now) if now >= self.next_at else []

    def shift(self, seconds: float) -> None:
        """Take the manager's own absence out of all reckoning: attempts that it interrupted prove nothing."""
        self._stalled = self._pending is not None
        for name in _TIMES:
            setattr(self, name, getattr(self, name) + seconds)
        if self._asked_at is not None:
            self._asked_at += seconds

    # what follows

    def _step(self, now: float) -> list[Action]:
        actions = [*self._listen(now), *self._wake(now), *self._judge(now), *self._ask(now), *self._attempt_due(now)]
        self.next_at = self._next_at()
        return actions

    def _listen(self, now: float) -> list[Action]:
        """Notice that an open stream went silent."""
        if self._pending is not None and now >= self._pending_at + _PATIENCE_SECONDS:
            self._fault(self._pending, now)
            self._pending = None
        if not self.streaming:
            return []
        if now < self._silent_at():
            if self._spoke and now >= self._opened_at + _STREAM_STANDS_SECONDS:
                self._opens = 0
            return []
        message = f"nothing heard for {now - self.last_sign_at:.1f} s"
        self._leave_stream()
        self._vain += not self._spoke
        self._plan(_Try.KNOCK, now)
        self._knocks = 0
        return [*self._doubt(now, ContactReason.TIMED_OUT, message), CloseStream()]

    def _doubt(self, now: float, reason: ContactReason, message: str) -> list[Action]:
        """Call a silent node suspect, or asleep where it may be; whoever is worse stays so."""
        self._reason, self._message = reason, message
        asleep = self._may_sleep(now)
        if self.liveness is None or (asleep and self.liveness is Liveness.SUSPECT):
            return [self._conclude(Liveness.ASLEEP if asleep else Liveness.SUSPECT, message)]
        return []

    def _fail(self, started: float, now: float, reason: ContactReason, message: str) -> list[Action]:
        """Count an attempt that met with silence."""
        self._faults = 0
        self._failures += 1
        self._failed_at = now
        actions = self._doubt(now, reason, message)
        if self.liveness is Liveness.ASLEEP:
            self._plan(_Try.KNOCK, now + (_ASLEEP_KNOCK_SECONDS if self._wake_by == NEVER else _WAKING_KNOCK_SECONDS))
            return actions
        at = max(now, started + self._gap(self._knocks))
        self._knocks += 1
        ripe_at = self._ripe_at()
        # No verdict without a knock from when it may be given: a node that is back by then must not be lost.
        self._plan(_Try.KNOCK, min(at, ripe_at) if ripe_at > now else at)
        if self._asked_at is None and self._wants_answers(now):
            self._ask_at = now
        return actions

    def _wants_answers(self, now: float) -> bool:
        if self.liveness is Liveness.SUSPECT or self._unconfirmed():
            age = now - self._answered_at
            seen = Answer.SEEN in self._answers.values()
            return age > (_SEEN_KEEPS_SECONDS if seen else _BLIND_KEEPS_SECONDS)
        return False

    def _judge(self, now: float) -> list[Action]:
        """Give the verdict once it may be given, and what peers know is known or has been waited for."""
        self._weigh_at = NEVER
        if not self._may_conclude():
            self._verdict_by = NEVER
            return []
        if self.liveness is not Liveness.SUSPECT and not self._unconfirmed():
            return self._judge_again(now)
        if self._verdict_by == NEVER:
            self._verdict_by = now + _VERDICT_WAIT_SECONDS
        late = now >= self._verdict_by
        stale = now - self._answered_at > _BLIND_KEEPS_SECONDS
        if not late and (self._asked_at is not None or self._ask_at <= now):
            self._weigh_at = self._verdict_by
            return []
        findings = self._weigh({} if stale else self._answers, now)
        if not late and (stale or not findings.settled):
            self._ask_at = min(self._ask_at, max(now, self._answered_at + _ASK_PAUSE_SECONDS))
            self._weigh_at = min(self._verdict_by, now + _WEIGH_PAUSE_SECONDS)
            return []
        return self._conclude_findings(findings, now)

    def _judge_again(self, now: float) -> list[Action]:
        """Revise a verdict whose evidence may change, by answers that just came."""
        if self._evidence is Evidence.PEERS_BLIND or self._asked_at is not None:
            return []
        if now != self._answered_at:
            self._ask_at = min(self._ask_at, max(now, self._answered_at + _ASK_AGAIN_SECONDS))
            return []
        self._ask_at = now + _ASK_AGAIN_SECONDS
        findings = self._weigh(self._answers, now)
        if not findings.settled:
            return []
        if self.liveness is Liveness.PATH_LOST:
            changed = findings.finding is not Finding.SEEN
        else:
            # That by now its site is silent too is no reason to leave a node alone that was lost before.
            changed = findings.finding in {Finding.SEEN, Finding.BLIND}
        return self._conclude_findings(findings, now) if changed else []

    def _conclude_findings(self, findings: Findings, now: float) -> list[Action]:
        self._verdict_by = NEVER
        self._vain = self._opens = 0
        message = f"{self._message}; {findings.message}"
        if findings.finding is Finding.SEEN:
            self._ask_at = now + _ASK_AGAIN_SECONDS
            return [self._conclude(Liveness.PATH_LOST, message)]
        evidence = _EVIDENCE[findings.finding]
        self._ask_at = NEVER if evidence is Evidence.PEERS_BLIND else now + _ASK_AGAIN_SECONDS
        return [self._conclude(Liveness.UNREACHABLE, message, evidence)]

    def _conclude(self, liveness: Liveness, message: str, evidence: Evidence | None = None) -> Conclude:
        self.liveness, self._evidence = liveness, evidence
        frozen = self._limits.autonomy_seconds if evidence is Evidence.SITE_DARK else None
        return Conclude(liveness, self._reason, message, evidence, frozen)

    def _ask(self, now: float) -> list[Action]:
        if self._asked_at is not None and now >= self._asked_at + _PATIENCE_SECONDS:
            self._asked_at = None
        if self._asked_at is not None or now < self._ask_at:
            return []
        self._asked_at, self._ask_at = now, NEVER
        self._asks += 1
        return [AskPeers(self._asks)]

    def _attempt_due(self, now: float) -> list[Action]:
        if self._pending is not None or now < self._attempt_at:
            return []
        self._pending, self._pending_at, self._attempt_at = self._attempt, now, NEVER
        self._stalled = False
        if self._pending is _Try.KNOCK:
            return [Knock()]
        self._opens += 1
        return [OpenStream()]

    def _wake(self, now: float) -> list[Action]:
        """Expect a sleeping node again, once its window opened and it had time to wake up."""
        if self.liveness is not Liveness.ASLEEP or self._may_sleep(now):
            self._wake_by = NEVER
            return []
        if self._wake_by == NEVER:
            self._wake_by = now + _WAKE_SECONDS
            if self._pending is None and not self.streaming:
                self._plan(_Try.KNOCK, now)
        if now < self._wake_by:
            return []
        if self.streaming or self._pending is _Try.OPEN:
            self._wake_by = now + self._limits.first_word_seconds
            return []
        self._wake_by, self._base_at = NEVER, now
        self._failures = self._knocks = 0
        if self._pending is None:
            self._plan(_Try.KNOCK, now)
        return [self._conclude(Liveness.SUSPECT, "silent though its contact window is open")]

    # small steps

    def _come_back(self, now: float) -> None:
        self._answered(now)
        self._forget_verdict()
        self._vain = 0
        if self.streaming:
            self._spoke = self._calm = True
            self._pending, self._attempt_at = None, NEVER
        elif self._pending is not _Try.OPEN:
            self._pending = None
            self._plan(_Try.OPEN, now)
        self.next_at = self._next_at()

    def _answered(self, now: float) -> None:
        """Take in that the node lives: all reckoning of its silence begins anew."""
        self.last_sign_at = now
        self._failures = self._faults = self._knocks = 0
        self._answers, self._answered_at = {}, -NEVER
        self._asked_at, self._ask_at, self._blind_rounds = None, NEVER, 0
        self._verdict_by = self._weigh_at = NEVER

    def _forget_verdict(self) -> None:
        self.liveness = self._evidence = None
        self._wake_by = NEVER

    def _leave_stream(self) -> None:
        self.streaming = self._calm = False

    def _end_attempt(self, attempt: _Try, now: float) -> tuple[float, bool]:
        """Tell when the attempt began, and whether the manager itself was absent meanwhile."""
        if self._pending is not attempt:
            return now, False
        self._pending = None
        return self._pending_at, self._stalled

    def _fault(self, attempt: _Try, now: float) -> None:
        """Try again later after a fault of the manager's own: it says nothing about the node."""
        self._faults += 1
        self._plan(attempt, now + self._gap(self._faults - 1))

    def _plan(self, attempt: _Try, at: float) -> None:
        self._attempt, self._attempt_at = attempt, at

    def _plan_open(self, now: float) -> None:
        self._plan(_Try.OPEN, now + self._gap(self._opens) if self._opens else now)

    def _gap(self, number: int) -> float:
        """Give the pause after so many attempts: 1, 2 and 4 s, then longer ones that differ from node to node."""
        if number < 3:
            return min(2.0**number, self._limits.reconnect_max_seconds)
        longest = min(2.0 ** min(number, 30), self._limits.reconnect_max_seconds)
        dice = (self._seed * 2_654_435_761 + number * 40_503 * 65_537) & 0xFFFF_FFFF
        return longest * (1 - 0.3 * dice / 0x1_0000_0000)

    def _may_conclude(self) -> bool:
        return (
            self.liveness in _DOUBTED
            and self._failures >= self._limits.failures_before_unreachable
            and not self._faults
            and self._failed_at >= self._ripe_at()
        )

    def _ripe_at(self) -> float:
        """Tell from when on the node may be called unreachable."""
        silent_from = max(self.last_sign_at, self._base_at)
        return max(silent_from + self._limits.silence_before_unreachable_seconds, self._grace_until)

    def _silent_at(self) -> float:
        limits = self._limits
        return self.last_sign_at + (limits.silence_seconds if self._spoke else limits.first_word_seconds)

    def _may_sleep(self, now: float) -> bool:
        if self._window is None:
            return False
        expected, until = self._window(now)
        # A caller's clock may be a hair short of the change it named.
        self._window_until = max(until, now + _WEIGH_PAUSE_SECONDS)
        return not expected or until - now <= _WAKE_SECONDS

    def _unconfirmed(self) -> bool:
        """Tell whether the node is lost by an earlier manager's word alone."""
        return self.liveness is Liveness.UNREACHABLE and self._evidence is None

    def _next_at(self) -> float:
        times = [self._weigh_at, self._silent_at() if self.streaming else NEVER]
        times.append(self._attempt_at if self._pending is None else self._pending_at + _PATIENCE_SECONDS)
        times.append(self._ask_at if self._asked_at is None else self._asked_at + _PATIENCE_SECONDS)
        if self.liveness is Liveness.ASLEEP:
            times.append(min(self._wake_by, self._window_until))
        return min(times)


_DOUBTED = frozenset((Liveness.SUSPECT, Liveness.UNREACHABLE, Liveness.PATH_LOST))
# All that shift moves; what never comes stays so.
_TIMES = (
    *("last_sign_at", "next_at", "_answered_at", "_ask_at", "_attempt_at", "_base_at", "_failed_at"),
    *("_grace_until", "_opened_at", "_pending_at", "_verdict_by", "_wake_by", "_weigh_at"),
)
