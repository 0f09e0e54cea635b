# SPDX-License-Identifier: GPL-3.0-or-later
"""The liveness core rule by rule, each with its times, and under whatever sequence of events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_manager.contact_windows import expected_at
from node_manager.domain import ContactReason, Evidence, Liveness
from node_manager.liveness import Action, AskPeers, CloseStream, Conclude, Knock, LivenessLimits, OpenStream, Watch
from node_manager.liveness_terms import NEVER, SILENT_REASONS, RecordFailure
from node_manager.node_types import ContactWindow
from node_manager.peers import Answer, Finding, Findings

TIMED_OUT, REFUSED, LOST = ContactReason.TIMED_OUT, ContactReason.CONNECTION_REFUSED, ContactReason.CONNECTION_LOST
LIMITS = LivenessLimits()
ALL_BLIND = {"peer": Answer.BLIND}


def weigh_simply(answers: Mapping[str, Answer], now: float) -> Findings:
    """Take peers at their word."""
    if Answer.SEEN in answers.values():
        return Findings(Finding.SEEN, "seen")
    if Answer.BLIND in answers.values():
        return Findings(Finding.BLIND, "not seen")
    return Findings(Finding.NOBODY, "nobody", settled=not answers)


class Network:
    """One watched node whose knocks and peers answer as a test says; *told* is what was concluded, and when."""

    def __init__(self, watch: Watch, now: float = 0.0) -> None:
        self.watch = watch
        self.now = now
        self.knock: tuple[ContactReason, float] = (TIMED_OUT, 3.0)
        self.open: tuple[ContactReason, float] = (ContactReason.OK, 0.5)
        self.answers: tuple[Mapping[str, Answer], float] = (ALL_BLIND, 3.1)
        self.told: list[tuple[float, Conclude]] = []
        self.log: list[tuple[float, Action]] = []
        self._due: list[tuple[float, str]] = []

    def take(self, actions: list[Action]) -> None:
        """Do what the watch wants."""
        for action in actions:
            self.log.append((round(self.now, 3), action))
            if isinstance(action, Knock):
                self._due.append((self.now + self.knock[1], "knock"))
            elif isinstance(action, OpenStream):
                self._due.append((self.now + self.open[1], "open"))
            elif isinstance(action, AskPeers):
                self._due.append((self.now + self.answers[1], "ask"))
            elif isinstance(action, Conclude):
                self.told.append((round(self.now, 3), action))

    def run(self, until: float) -> None:
        """Let time pass."""
        for _ in range(10_000):
            at, what = min([*self._due, (self.watch.next_at, "tick")])
            if at > until:
                self.now = until
                return
            self.now = max(at, self.now)
            if what == "tick":
                self.take(self.watch.tick(self.now))
                assert self.watch.next_at >= self.now
                continue
            self._due.remove((at, what))
            if what == "knock":
                self.take(self.watch.knocked(self.now, self.knock[0], "knocked"))
            elif what == "ask":
                self.take(self.watch.peers_answered(self.now, self.answers[0]))
            elif self.open[0] is ContactReason.OK:
                self.take(self.watch.stream_opened(self.now))
            else:
                self.take(self.watch.open_failed(self.now, self.open[0], "failed"))
        raise AssertionError("the watch never rests")

    def told_of(self, liveness: Liveness) -> list[float]:
        """Tell when a verdict was given."""
        return [at for at, verdict in self.told if verdict.liveness is liveness]

    def times_of(self, action: type) -> list[float]:
        """Tell when something was asked for."""
        return [at for at, what in self.log if isinstance(what, action)]


def a_watch(now: float = 100.0, started_at: float = 0.0, **more: object) -> Watch:
    """Make a watch whose stream has stood for a minute, and that was heard just now."""
    watch = Watch(LIMITS, now - 60, started_at, more.pop("weigh", weigh_simply), **more)  # type: ignore[arg-type]
    watch.tick(now - 60)
    watch.stream_opened(now - 60)
    for at in (now - 60, now - 10):
        watch.heard(at)
        watch.tick(at)
    watch.heard(now)
    return watch


def a_network(**more: object) -> Network:
    """Put a streaming node on a network that just fell silent, at time 100."""
    return Network(a_watch(**more), 100.0)


# silence


@pytest.mark.parametrize(("interval", "silence"), [(5.0, 9.0), (10.0, 14.0), (0.5, 2.0)])
def test_silence_is_a_late_beat_or_two_missed(interval: float, silence: float) -> None:
    assert LivenessLimits(beat_interval_seconds=interval).silence_seconds == silence


def test_a_silent_node_is_suspect_once_its_beat_is_late() -> None:
    network = a_network()

    network.run(109.5)

    assert network.told_of(Liveness.SUSPECT) == [109.0]
    assert network.times_of(CloseStream) == [109.0]


def test_a_node_that_beats_is_left_alone() -> None:
    watch = a_watch()

    actions = []
    for beat in range(1, 50):
        watch.heard(100 + beat * 8.9)
        actions += watch.tick(100 + beat * 8.9)

    assert actions == []


def test_a_silent_cut_is_unreachable_within_twenty_seconds() -> None:
    network = a_network()

    network.run(130)

    (at,) = network.told_of(Liveness.UNREACHABLE)
    assert 118 <= at <= 119
    assert network.told[-1][1].evidence is Evidence.PEERS_BLIND
    assert network.told[-1][1].frozen_seconds is None


def test_knocks_wait_for_each_other() -> None:
    network = a_network()

    network.run(118)

    assert network.times_of(Knock)[:3] == [109.0, 112.0, 115.0]


@pytest.mark.parametrize("last_heard", [96.0, 98.0, 99.9], ids=str)
@pytest.mark.parametrize("knock", [(REFUSED, 0.01), (TIMED_OUT, 3.0), (ContactReason.NO_ROUTE, 1.0)], ids=str)
def test_a_crash_is_unreachable_within_twelve_seconds(last_heard: float, knock: tuple[ContactReason, float]) -> None:
    network = Network(a_watch(last_heard), 100.0)
    network.knock = knock

    network.take(network.watch.stream_lost(100.0, LOST, "reset"))
    network.run(115)

    assert network.told_of(Liveness.SUSPECT) == [100.0]
    (at,) = network.told_of(Liveness.UNREACHABLE)
    assert last_heard + 10 <= at <= 112


def test_knocks_to_a_crashed_node_are_one_two_and_four_seconds_apart() -> None:
    network = a_network()
    network.knock = (REFUSED, 0.0)

    network.take(network.watch.stream_lost(100.0, LOST, "reset"))
    network.run(110)

    assert network.times_of(Knock)[:4] == [101.0, 103.0, 107.0, 110.0]


def test_a_node_that_is_back_when_silence_is_long_enough_is_not_lost() -> None:
    network = a_network()
    network.knock = (REFUSED, 0.0)
    network.take(network.watch.stream_lost(100.0, LOST, "reset"))
    network.run(109.9)

    network.knock = (ContactReason.OK, 0.1)
    network.run(113)

    assert network.told_of(Liveness.UNREACHABLE) == []
    assert network.times_of(OpenStream) == [110.1]


def test_peers_are_asked_twice_before_three_knocks_are_over() -> None:
    network = a_network()

    network.run(118)

    assert network.times_of(AskPeers) == [112.0, 115.1]


def test_one_blind_round_alone_is_no_evidence_while_there_is_time() -> None:
    network = a_network()
    network.answers = (ALL_BLIND, 6.2)

    network.run(125)

    # Asked at 112 and at 118.2; the verdict waits for the second answer until 122.
    assert network.told_of(Liveness.UNREACHABLE) == [122.0]


def test_a_verdict_waits_four_seconds_for_peers_that_never_answer() -> None:
    network = a_network()
    network.answers = ({}, NEVER)

    network.run(130)

    assert network.told_of(Liveness.UNREACHABLE) == [122.0]
    assert network.told[-1][1].evidence is Evidence.NOBODY_TO_ASK


def test_a_node_without_peers_is_unreachable_at_once() -> None:
    network = a_network()
    network.answers = ({}, 0.0)

    network.run(130)

    assert network.told_of(Liveness.UNREACHABLE) == [118.0]
    assert network.told[-1][1].evidence is Evidence.NOBODY_TO_ASK


def test_peers_that_cannot_tell_are_asked_again_and_do_not_count() -> None:
    network = a_network()
    network.answers = ({"peer": Answer.CANNOT_TELL}, 0.5)

    network.run(130)

    assert len(network.times_of(AskPeers)) >= 3
    assert network.told_of(Liveness.UNREACHABLE) == [122.0]


def test_a_dark_site_is_frozen() -> None:
    network = a_network(weigh=lambda answers, now: Findings(Finding.DARK, "dark"))

    network.run(130)

    verdict = network.told[-1][1]
    assert (verdict.evidence, verdict.frozen_seconds) == (Evidence.SITE_DARK, 3600.0)


def test_unsettled_findings_are_weighed_again_until_they_settle() -> None:
    network = a_network(weigh=lambda answers, now: Findings(Finding.DARK, "dark", settled=now >= 119.5))

    network.run(130)

    (at,) = network.told_of(Liveness.UNREACHABLE)
    assert 119.5 <= at <= 121


# cut off


def test_a_node_that_a_peer_sees_is_only_cut_off() -> None:
    network = a_network()
    network.answers = ({"near": Answer.BLIND, "far": Answer.SEEN}, 0.5)

    network.run(300)

    assert network.told_of(Liveness.UNREACHABLE) == []
    assert len(network.told_of(Liveness.PATH_LOST)) == 1


def test_peers_are_asked_again_every_minute_about_a_node_that_is_cut_off() -> None:
    network = a_network()
    network.answers = ({"far": Answer.SEEN}, 0.5)
    network.run(300)

    asked = [at for at in network.times_of(AskPeers) if at > network.told_of(Liveness.PATH_LOST)[0]]

    assert [round(later - earlier, 1) for earlier, later in pairwise(asked[:3])] == [60.5, 60.5]


def test_a_node_that_is_cut_off_is_lost_once_peers_go_blind() -> None:
    network = a_network()
    network.answers = ({"far": Answer.SEEN}, 0.5)
    network.run(130)

    network.answers = (ALL_BLIND, 3.1)
    network.run(260)

    (at,) = network.told_of(Liveness.UNREACHABLE)
    assert at <= network.told_of(Liveness.PATH_LOST)[0] + 70


def test_a_dark_site_that_has_living_nodes_again_leaves_a_single_loss() -> None:
    dark = {"now": True}
    network = a_network(weigh=lambda answers, now: Findings(Finding.DARK if dark["now"] else Finding.BLIND, ""))
    network.run(130)

    dark["now"] = False
    network.run(260)

    assert [told.evidence for _, told in network.told[1:]] == [Evidence.SITE_DARK, Evidence.PEERS_BLIND]


def test_being_seen_before_the_kernel_was_gone_is_forgotten() -> None:
    network = a_network()
    network.knock, network.answers = (REFUSED, 0.0), ({"peer": Answer.SEEN}, 0.1)
    network.take(network.watch.stream_lost(100.0, LOST, "reset"))
    network.run(104)

    network.knock, network.answers = (TIMED_OUT, 3.0), (ALL_BLIND, 3.1)
    network.run(130)

    assert network.told_of(Liveness.PATH_LOST) == []
    assert network.told_of(Liveness.UNREACHABLE)[0] <= 117


# coming back


def test_a_knock_that_is_answered_opens_a_stream_and_the_node_stays_suspect_until_heard() -> None:
    network = a_network()
    network.run(110)

    network.knock = (ContactReason.OK, 0.0)
    network.run(114)
    before = network.watch.liveness
    network.watch.heard(114.0)

    assert Liveness.SUSPECT is before
    assert network.watch.liveness is None
    assert network.times_of(OpenStream) == [112.0]


def test_an_unreachable_node_is_tried_ever_more_rarely() -> None:
    network = a_network()

    network.run(2000)

    knocks = network.times_of(Knock)
    pauses = [later - earlier for earlier, later in pairwise(knocks[-20:])]
    assert all(41 <= pause <= 60.001 for pause in pauses)
    assert len(network.told_of(Liveness.UNREACHABLE)) == 1


def test_different_nodes_are_tried_at_different_times() -> None:
    networks = [a_network(seed=seed) for seed in (1, 2)]

    for network in networks:
        network.run(1000)

    assert networks[0].times_of(Knock)[-1] != networks[1].times_of(Knock)[-1]


def test_a_node_that_answers_is_watched_at_full_speed_again() -> None:
    network = a_network()
    network.run(2000)

    network.knock = (ContactReason.OK, 0.0)
    network.run(2070)
    network.watch.heard(network.now)

    assert network.watch.streaming
    assert network.now + 9 == network.watch.next_at


def test_streams_that_fail_though_knocks_are_answered_are_no_silence() -> None:
    network = a_network()
    network.knock, network.open = (ContactReason.OK, 0.0), (TIMED_OUT, 1.0)

    network.take(network.watch.stream_lost(100.0, LOST, "reset"))
    network.run(1000)

    assert network.told_of(Liveness.UNREACHABLE) == []
    assert len(network.told_of(Liveness.SUSPECT)) == 1
    (first, *_) = [what for _, what in network.log if isinstance(what, RecordFailure)]
    assert first.reason not in SILENT_REASONS
    opens = network.times_of(OpenStream)
    assert 40 <= opens[-1] - opens[-2] <= 65


def test_streams_without_a_word_are_failures_too() -> None:
    network = a_network()
    network.knock = (ContactReason.OK, 0.0)

    network.run(250)

    assert network.times_of(RecordFailure)
    assert network.told_of(Liveness.UNREACHABLE) == []


@pytest.mark.parametrize(
    "reason", [ContactReason.AUTHENTICATION_FAILED, ContactReason.OUTPUT_UNUSABLE, ContactReason.HOST_KEY_CHANGED]
)
def test_a_node_that_answers_otherwise_is_not_silent(reason: ContactReason) -> None:
    network = a_network()
    network.knock, network.open = (ContactReason.OK, 0.0), (reason, 0.5)

    network.take(network.watch.stream_lost(100.0, LOST, "reset"))
    network.run(500)

    assert [at for at, _ in network.told] == [100.0]
    assert network.watch.liveness is None
    opens = network.times_of(OpenStream)
    assert 40 <= opens[-1] - opens[-2] <= 61


def test_an_unusable_word_ends_the_stream_without_suspicion() -> None:
    network = a_network()

    network.take(network.watch.open_failed(101.0, ContactReason.OUTPUT_UNUSABLE, "no JSON"))

    assert not network.watch.streaming
    assert network.watch.liveness is None


# the manager's own


def test_a_fault_of_the_manager_changes_nothing() -> None:
    network = a_network()
    network.run(116)

    network.knock = (ContactReason.MANAGER_FAULT, 0.0)
    network.run(1000)

    assert network.told_of(Liveness.UNREACHABLE) == []
    assert len(network.times_of(Knock)) < 40


def test_after_a_fault_of_the_manager_the_reckoning_goes_on() -> None:
    network = a_network()
    network.run(116)
    network.knock = (ContactReason.MANAGER_FAULT, 0.0)
    network.run(140)

    network.knock = (TIMED_OUT, 3.0)
    network.run(190)

    assert len(network.told_of(Liveness.UNREACHABLE)) == 1


def test_a_stream_lost_by_the_manager_itself_is_opened_again() -> None:
    network = a_network()

    network.take(network.watch.stream_lost(100.0, ContactReason.MANAGER_FAULT, "too many open files"))
    network.run(103)

    assert network.told == []
    assert network.times_of(OpenStream) == [101.0]


def test_nobody_is_lost_before_the_grace_is_over() -> None:
    watch = Watch(LIMITS, 0.0, 0.0, weigh_simply)
    network = Network(watch)
    network.open = (TIMED_OUT, 3.0)

    network.run(60)

    (at,) = network.told_of(Liveness.UNREACHABLE)
    assert 30 <= at <= 38


def test_time_in_which_the_manager_was_absent_is_nobodys_silence() -> None:
    network = a_network()

    network.watch.shift(50.0)
    network.now = 150.0
    network.run(158.9)
    before = list(network.told)
    network.run(160)

    assert before == []
    assert network.told_of(Liveness.SUSPECT) == [159.0]


def test_a_knock_that_a_stall_interrupted_is_not_counted() -> None:
    network = a_network()
    network.take(network.watch.tick(109.0))

    network.watch.shift(50.0)
    late = Network(network.watch, 159.0)
    late.take(late.watch.knocked(159.0, TIMED_OUT, "late"))
    late.run(190)

    # Three more are needed, from 160 on, one after the other.
    assert late.told_of(Liveness.UNREACHABLE)[0] >= 169


def test_no_verdict_is_given_while_a_fault_of_the_manager_is_the_latest_word() -> None:
    network = a_network()
    network.answers = ({"peer": Answer.CANNOT_TELL}, 0.5)
    network.run(118.5)

    network.knock = (ContactReason.MANAGER_FAULT, 0.0)
    network.run(130)

    assert network.told_of(Liveness.UNREACHABLE) == []


def test_what_peers_saw_seconds_ago_is_asked_anew() -> None:
    network = Network(a_watch(98.0), 100.0)
    network.knock, network.answers = (REFUSED, 0.0), ({"peer": Answer.SEEN}, 0.1)
    network.take(network.watch.stream_lost(100.0, LOST, "reset"))
    network.run(106.9)

    network.answers = (ALL_BLIND, 0.1)
    network.run(115)

    assert network.told_of(Liveness.PATH_LOST) == []
    assert len(network.told_of(Liveness.UNREACHABLE)) == 1


def test_a_silent_failure_to_open_says_nothing_of_a_stream_that_is_open() -> None:
    watch = a_watch()

    actions = watch.open_failed(101.0, TIMED_OUT, "timed out")

    assert actions == []
    assert watch.streaming


def test_a_suspect_node_whose_window_closes_is_asleep() -> None:
    network = Network(a_watch(430.0, window=window), 430.0)

    network.run(990)

    assert [told.liveness for _, told in network.told] == [Liveness.SUSPECT, Liveness.ASLEEP]


@pytest.mark.parametrize("answers", [ALL_BLIND, {}], ids=["blind", "nobody"])
def test_a_node_that_was_lost_already_is_knocked_at_and_confirmed_once(answers: Mapping[str, Answer]) -> None:
    network = Network(Watch(LIMITS, 0.0, 0.0, weigh_simply, lost=True))
    network.answers = (answers, 1.0)

    network.run(500)

    assert isinstance(network.log[0][1], Knock)
    (told,) = network.told
    assert told[0] >= 30
    assert told[1].liveness is Liveness.UNREACHABLE


def test_an_attempt_that_never_ends_is_made_again() -> None:
    network = a_network()
    network.knock = (TIMED_OUT, NEVER)

    network.run(720)

    assert len(network.times_of(Knock)) == 2


# nodes that sleep


def window(now: float) -> tuple[bool, float]:
    """Expect the node in the first half of each thousand seconds."""
    start = now // 1000 * 1000
    return (True, start + 500) if now < start + 500 else (False, start + 1000)


def test_silence_outside_a_window_is_sleep() -> None:
    network = Network(a_watch(600.0, window=window), 600.0)

    network.run(990)

    assert [told.liveness for _, told in network.told] == [Liveness.ASLEEP]
    assert len(network.times_of(Knock)) <= 8
    assert network.times_of(AskPeers) == []


def test_a_node_may_fall_asleep_a_little_early() -> None:
    network = Network(a_watch(435.0, window=window), 435.0)

    network.run(990)

    assert [told.liveness for _, told in network.told] == [Liveness.ASLEEP]


def test_a_sleeping_node_has_a_minute_to_wake_up_and_then_is_lost() -> None:
    network = Network(a_watch(600.0, window=window), 600.0)

    network.run(1100)

    assert network.told_of(Liveness.SUSPECT) == [1060.0]
    (at,) = network.told_of(Liveness.UNREACHABLE)
    assert 1070 <= at <= 1080


def test_a_sleeping_node_that_wakes_up_is_watched() -> None:
    network = Network(a_watch(600.0, window=window), 600.0)
    network.run(1020)

    network.knock = (ContactReason.OK, 0.0)
    network.run(1040)
    network.watch.heard(1040.0)

    assert network.watch.streaming
    assert network.watch.liveness is None


def test_silence_inside_a_window_is_none_of_sleep() -> None:
    network = Network(a_watch(100.0, window=window), 100.0)

    network.run(130)

    assert [told.liveness for _, told in network.told] == [Liveness.SUSPECT, Liveness.UNREACHABLE]


@pytest.mark.parametrize(
    ("spans", "at", "expected"),
    [
        ((), 0, (True, NEVER)),
        ((("06:00", "18:00"),), 6 * 3600, (True, 12 * 3600)),
        ((("06:00", "18:00"),), 5 * 3600, (False, 3600)),
        ((("06:00", "18:00"),), 18 * 3600, (False, 12 * 3600)),
        ((("22:00", "02:00"),), 23 * 3600, (True, 3 * 3600)),
        ((("22:00", "02:00"),), 3600, (True, 3600)),
        ((("22:00", "02:00"),), 3 * 3600, (False, 19 * 3600)),
        ((("06:00", "08:00"), ("08:00", "09:00")), 7 * 3600, (True, 2 * 3600)),
        ((("08:00", "09:00"), ("06:00", "08:30")), 7 * 3600, (True, 2 * 3600)),
        ((("06:00", "07:00"), ("12:00", "13:00")), 8 * 3600, (False, 4 * 3600)),
        ((("06:00", "06:00"),), 0, (True, NEVER)),
        ((("00:00", "12:00"), ("12:00", "00:00")), 3600, (True, NEVER)),
    ],
)
def test_expected_at_tells_until_when(
    spans: tuple[tuple[str, str], ...], at: float, expected: tuple[bool, float]
) -> None:
    windows = [ContactWindow(start=start, end=end) for start, end in spans]

    assert expected == expected_at(windows, at)


# whatever happens


@dataclass
class Abuse:
    """A watch that anything may happen to, and what must hold of its verdicts."""

    watch: Watch
    now: float = 0.0
    heard_at: float = -NEVER
    grace_until: float = 30.0
    latest: ContactReason | None = None

    def heard(self, reason: ContactReason, answers: Mapping[str, Answer]) -> list[Action]:
        """Give a sign of life: it always leads back."""
        self.watch.heard(self.now)
        self.heard_at = self.now
        assert self.watch.liveness is None
        return []

    def opened(self, reason: ContactReason, answers: Mapping[str, Answer]) -> list[Action]:
        """Open a stream, wanted or not."""
        self.latest = None
        return self.watch.stream_opened(self.now)

    def lost(self, reason: ContactReason, answers: Mapping[str, Answer]) -> list[Action]:
        """End the stream, if there is one."""
        if self.watch.streaming:
            self.latest = reason
        return self.watch.stream_lost(self.now, reason, "")

    def failed(self, reason: ContactReason, answers: Mapping[str, Answer]) -> list[Action]:
        """Fail to open a stream."""
        if not self.watch.streaming or reason not in SILENT_REASONS:
            self.latest = reason
        return self.watch.open_failed(self.now, reason, "")

    def knocked(self, reason: ContactReason, answers: Mapping[str, Answer]) -> list[Action]:
        """End a knock, asked for or not."""
        if self.watch._pending is not None and self.watch._pending.value == "knock":
            self.latest = reason
        return self.watch.knocked(self.now, reason, "")

    def answered(self, reason: ContactReason, answers: Mapping[str, Answer]) -> list[Action]:
        """Bring answers, asked for or not."""
        return self.watch.peers_answered(self.now, answers)

    def tick(self, reason: ContactReason, answers: Mapping[str, Answer]) -> list[Action]:
        """Let time pass until something is due: soon all is done."""
        self.now = min(max(self.now, self.watch.next_at), self.now + 100)
        actions = [action for _ in range(3) for action in self.watch.tick(self.now)]
        assert self.watch.next_at > self.now
        return actions

    def stall(self, reason: ContactReason, answers: Mapping[str, Answer]) -> list[Action]:
        """Be away for a while."""
        self.watch.shift(7.0)
        self.now, self.heard_at, self.grace_until = self.now + 7, self.heard_at + 7, self.grace_until + 7
        return []

    def check(self, action: Action) -> None:
        """Hold a verdict against what happened."""
        assert not (self.watch.streaming and isinstance(action, OpenStream))
        if isinstance(action, Conclude) and action.liveness is Liveness.UNREACHABLE:
            assert self.now - self.heard_at >= 10
            assert self.now >= self.grace_until
            assert self.latest is not ContactReason.MANAGER_FAULT
            assert action.evidence is not None
            assert (action.evidence is Evidence.SITE_DARK) is (action.frozen_seconds is not None)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["heard", "opened", "lost", "failed", "knocked", "knocked", "answered", "tick", "tick", "stall"]
        ),
        st.floats(0, 20),
        st.sampled_from(list(ContactReason)) | st.just(TIMED_OUT),
        st.dictionaries(st.sampled_from("ab"), st.sampled_from(list(Answer))),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(events=EVENTS, lost=st.booleans(), sleeps=st.booleans())
def test_whatever_happens_the_rules_hold(
    events: list[tuple[str, float, ContactReason, dict[str, Answer]]], lost: bool, sleeps: bool
) -> None:
    abuse = Abuse(Watch(LIMITS, 0.0, 0.0, weigh_simply, lost=lost, window=window if sleeps else None))

    for what, pause, reason, answers in events:
        abuse.now += pause
        for action in getattr(abuse, what)(reason, answers):
            abuse.check(action)
