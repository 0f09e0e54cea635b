# SPDX-License-Identifier: GPL-3.0-or-later
"""Watch nodes over their streams: carry what they say to the recorder, and do what the liveness core asks for.

Lives in one event loop, for as long as this manager leads. Decides nothing about health: liveness and peers do, and the door.
Nodes whose stream can't be had as configured are left to Ansible, and tried again later.
"""

from __future__ import annotations

import asyncio
import time
import uuid
import zlib
from collections.abc import Callable, Collection, Coroutine, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import structlog
from pydantic_core import from_json

from node_manager import watch_list
from node_manager.contact_windows import expected_at
from node_manager.domain import ContactReason, Health, ObservationKind
from node_manager.liveness import (
    Action,
    AskPeers,
    CloseStream,
    Conclude,
    Knock,
    LivenessLimits,
    OpenStream,
    RecordFailure,
    Watch,
    Window,
)
from node_manager.loop_rest import LoopRest
from node_manager.node_registry import Clock
from node_manager.observations import Observation
from node_manager.peers import Answer, Finding, Findings, Fleet
from node_manager.probe_bundle import LoopOptions, bootstrap_command, bundle_parts
from node_manager.recorder import Recorder
from node_manager.settings import Settings
from node_manager.ssh_stream import StreamOpener
from node_manager.ssh_targets import NodeStream, StreamEnd, StreamError, Target, UnsuitedError
from node_manager.store import Store, StoreUnavailableError
from node_manager.stream_lines import BEAT, DATA_LINE
from node_manager.watch_list import Listed, public_of

SOURCE = "stream"
_SWEEP_SECONDS = 0.25
# A loop that is late by more was stopped, or starved: what it didn't hear then says nothing about nodes.
_STALL_SECONDS = 2.0
_FALLBACK_SECONDS = 600.0
_PEER_SECONDS = 3.0
_ANSWER_SECONDS = 30.0
_MAX_FAULTS = 32
# What is set back further, the door takes for a clock that was wrong before.
_SET_BACK = timedelta(seconds=60)
_MICROSECOND = timedelta(microseconds=1)
_MAX_MESSAGE_CHARACTERS = 500
_KINDS = {
    kind.value.encode("ascii"): kind for kind in (ObservationKind.FACTS, ObservationKind.SAMPLE, ObservationKind.REPORT)
}
_COMMANDS = {ObservationKind.FACTS: "facts", ObservationKind.SAMPLE: "sample", ObservationKind.REPORT: "check"}
# Where Ansible may manage: other keys, an agent, an interpreter found by discovery.
_LEFT_TO_ANSIBLE = frozenset(
    (
        ContactReason.AUTHENTICATION_FAILED,
        ContactReason.PYTHON_MISSING,
        ContactReason.MODULE_FAILED,
        ContactReason.OUTPUT_UNUSABLE,
    )
)


@dataclass
class Fault:
    """Trouble of the manager's own that made attempts worthless."""

    message: str
    count: int
    last_at: datetime


@dataclass
class _Watched:
    """One node under watch."""

    listed: Listed
    target: Target
    watch: Watch
    stream: NodeStream | None = None
    opening: bool = False
    # Whether the stream has brought a sample: the first one tells that a node is back.
    sampled: bool = False
    # Why the node is left to Ansible, and when its stream is tried again.
    fallback: str | None = None
    retry_at: float = 0.0
    waiters: dict[str, Future[bool]] = field(default_factory=dict)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class FleetWatch:
    """The nodes under watch, and their streams."""

    def __init__(self, store: Store, settings: Settings, recorder: Recorder, clock: Clock) -> None:
        monitoring, health = settings.configuration.monitoring, settings.configuration.health
        self._store = store
        self._settings = settings
        self._recorder = recorder
        self._clock = clock
        self._log = structlog.get_logger()
        self._limits = LivenessLimits.of(monitoring, health)
        self._peers = Fleet(self._limits.fresh_seconds, health.peers_of_site, health.peers_elsewhere)
        self._opener = StreamOpener(
            max_handshakes=monitoring.max_handshakes,
            handshake_timeout_seconds=monitoring.handshake_timeout_seconds,
            max_line_bytes=monitoring.max_line_bytes,
        )
        self._stamped = clock()
        self._targets = watch_list.TargetReader(store, settings)
        self._watched: dict[str, _Watched] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.rest = LoopRest()
        self._sweeper = asyncio.create_task(self._sweep())
        # By what it was; the newest ones.
        self.faults: dict[str, Fault] = {}
        self.on_fault: Callable[[], None] = lambda: None

    async def close(self) -> None:
        """Close all streams, and watch nothing any more."""
        self._sweeper.cancel()
        for node_id in list(self._watched):
            self._drop(node_id)
        await self._opener.close()
        if self._closing:
            await asyncio.wait(self._closing)

    # which nodes

    def wanted(self, found: Mapping[str, tuple[Listed, Health]]) -> list[str]:
        """Forget the nodes that are not listed any more; name those that are new, or are listed otherwise."""
        for node_id in self._watched.keys() - found.keys():
            self._drop(node_id)
        return [
            node_id
            for node_id, (listed, _) in found.items()
            if node_id not in self._watched or self._watched[node_id].listed != listed
        ]

    def add(self, listed: Listed, health: Health, target: Target) -> None:
        """Watch a node, or watch it otherwise."""
        self._drop(listed.node_id)
        node_id = listed.node_id
        # Silence counts from here: what a node did before it was declared so is no silence of it.
        now = time.monotonic()
        watch = Watch(
            self._limits,
            now,
            now,
            _nobody if target.local else lambda answers, now: self._peers.weigh(node_id, answers, now),
            lost=health is Health.UNREACHABLE,
            seed=_seed(node_id),
            window=self._window_of(listed),
        )
        self._watched[node_id] = _Watched(listed, target, watch)
        if not target.local:
            # The manager's own machine sees what the manager sees.
            self._peers.add(node_id, listed.site, watch)

    def left_to_ansible(self) -> frozenset[str]:
        """Name the nodes whose stream can't be had."""
        return frozenset(node_id for node_id, item in self._watched.items() if item.fallback is not None)

    def has_stream(self, node_id: str) -> bool:
        """Tell whether a node's stream is open."""
        watched = self._watched.get(node_id)
        return watched is not None and watched.stream is not None

    def states(self) -> list[tuple[str, str, str]]:
        """Tell of each node how it is watched, and why so."""
        return [(node_id, *_state_of(item)) for node_id, item in list(self._watched.items())]

    def ask(self, node_id: str, kind: ObservationKind, waiter: Future[bool]) -> None:
        """Have a node look at itself now; *waiter* gets true once that is recorded."""
        watched = self._watched.get(node_id)
        if watched is None or watched.stream is None:
            _give_up(waiter)
            return
        self.rest.expect_answer()
        asked = uuid.uuid4().hex
        watched.waiters[asked] = waiter
        watched.stream.send({"do": _COMMANDS[kind], "id": asked})
        asyncio.get_running_loop().call_later(_ANSWER_SECONDS, _expire, watched, asked)

    def _drop(self, node_id: str) -> None:
        watched = self._watched.pop(node_id, None)
        if watched is None:
            return
        self._peers.remove(node_id)
        for task in watched.tasks:
            task.cancel()
        self._close(watched)

    # time passes

    async def _sweep(self) -> None:
        """Let each node's watch act when its time has come."""
        before = time.monotonic()
        while True:
            await self.rest.pause(_SWEEP_SECONDS)
            now = time.monotonic()
            late, before = now - before - _SWEEP_SECONDS, now
            if late > _STALL_SECONDS:
                # What came in the meantime waits in the sockets: it is read before anybody is judged.
                self._fault(f"the manager itself was held up for {late:.1f} s")
                for watched in self._watched.values():
                    watched.watch.shift(late)
                continue
            for watched in list(self._watched.values()):
                # Nearly all: looked at here, four times a second 10,000 nodes take a third of what calls would.
                if watched.watch.next_at > now and watched.fallback is None:
                    continue
                try:
                    self._let_act(watched, now)
                except Exception:  # one node's trouble must not stop the watch of the others
                    self._log.exception("watching a node stumbled", node_id=watched.listed.node_id)

    def _let_act(self, watched: _Watched, now: float) -> None:
        if watched.watch.next_at <= now:
            self._act(watched, watched.watch.tick(now))
        if watched.fallback is not None and now >= watched.retry_at and watched.stream is None and not watched.opening:
            # Whatever becomes of this try: the next one has its time too.
            watched.retry_at = _retry_at(watched)
            self._open(watched)

    def _act(self, watched: _Watched, actions: Collection[Action]) -> None:
        for action in actions:
            match action:
                case OpenStream():
                    if watched.fallback is None:
                        self._open(watched)
                case CloseStream():
                    self._close(watched)
                case Knock():
                    self._spawn(watched, self._knock(watched))
                case AskPeers():
                    self._spawn(watched, self._ask_peers(watched, action.attempt))
                case Conclude():
                    self._conclude(watched, action)
                case RecordFailure():
                    self._put_failure(watched, action.reason, action.message)

    def _spawn(self, watched: _Watched, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        for tasks in (watched.tasks, self.rest.busy):
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    # streams

    def _open(self, watched: _Watched) -> None:
        if watched.stream is None and not watched.opening:
            watched.opening = True
            self._spawn(watched, self._opened(watched))

    async def _opened(self, watched: _Watched) -> None:
        """Open a node's stream; what becomes of it, the node's watch learns."""
        node_id = watched.listed.node_id
        try:
            # Keys may have been pinned since, or forgotten.
            watched.target = await self._targets.read(node_id) or watched.target
            stream = await self._opener.open(
                watched.target,
                bootstrap_command(),
                bundle_parts(self._options(watched.listed)),
                lambda line: self._on_line(watched, line),
                lambda end: self._on_end(watched, end),
            )
        except StoreUnavailableError as error:
            self._failed(watched, ContactReason.MANAGER_FAULT, str(error))
        except UnsuitedError as error:
            self._leave_to_ansible(watched, error.message)
            self._failed(watched, error.reason, error.message)
        except StreamError as error:
            self._failed(watched, error.reason, error.message)
        else:
            watched.stream, watched.sampled = stream, False
            self._act(watched, watched.watch.stream_opened(time.monotonic()))
        finally:
            watched.opening = False

    def _failed(self, watched: _Watched, reason: ContactReason, message: str) -> None:
        """Take in that no stream can be had; silence, and the manager's own trouble, are the watch's matter alone."""
        if reason is ContactReason.MANAGER_FAULT:
            self._fault(message)
        elif reason in _LEFT_TO_ANSIBLE:
            self._leave_to_ansible(watched, message)
        elif reason is ContactReason.HOST_KEY_CHANGED:
            self._put_failure(watched, reason, message)
        self._act(watched, watched.watch.open_failed(time.monotonic(), reason, message))

    def _leave_to_ansible(self, watched: _Watched, message: str) -> None:
        if watched.fallback is None:
            self._log.warning("a node is left to Ansible", node_id=watched.listed.node_id, reason=message)
        watched.fallback = message
        watched.retry_at = _retry_at(watched)

    def _on_line(self, watched: _Watched, line: bytes) -> None:
        watched.watch.heard(time.monotonic())
        if line == BEAT:
            return
        told = DATA_LINE.fullmatch(line)
        if told is None:
            self._on_other_line(watched, line)
            return
        kind = _KINDS.get(told["kind"])
        if kind is not None:
            watched.fallback = None
            waiter = watched.waiters.pop(told["id"].decode("ascii"), None) if told["id"] else None
            # As it came: the door reads it, and nobody before.
            observation = Observation(watched.listed.node_id, self._stamp(), SOURCE, kind, told["data"])
            routine = kind is ObservationKind.SAMPLE and watched.sampled
            watched.sampled = watched.sampled or kind is ObservationKind.SAMPLE
            self._recorder.put(observation, waiter, soon=not routine)

    def _on_other_line(self, watched: _Watched, line: bytes) -> None:
        node_id = watched.listed.node_id
        try:
            told = from_json(line)
            kind, message = told["kind"], str(told.get("message"))[:_MAX_MESSAGE_CHARACTERS]
        except (ValueError, TypeError, KeyError, AttributeError):
            self._close(watched)
            self._failed(
                watched, ContactReason.OUTPUT_UNUSABLE, f"the probe sent what is no JSON object: {line[:80]!r}"
            )
            return
        if kind == "error":
            self._log.info("a probe had trouble", node_id=node_id, message=message)
            waiter = watched.waiters.pop(str(told.get("id")), None)
            if waiter is not None:
                _give_up(waiter)

    def _on_end(self, watched: _Watched, end: StreamEnd) -> None:
        if watched.stream is None:
            return
        watched.stream = None
        _release(watched)
        if end.reason in _LEFT_TO_ANSIBLE or end.reason is ContactReason.MANAGER_FAULT:
            self._failed(watched, end.reason, end.message)
        else:
            self._act(watched, watched.watch.stream_lost(time.monotonic(), end.reason, end.message))

    def _close(self, watched: _Watched) -> None:
        stream, watched.stream = watched.stream, None
        _release(watched)
        if stream is not None:
            closing = asyncio.create_task(stream.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    def _options(self, listed: Listed) -> LoopOptions:
        monitoring = self._settings.configuration.monitoring
        definition = self._settings.node_types.get(listed.node_type or "")
        interval = monitoring.sample_interval_seconds
        return LoopOptions(
            sample_interval_seconds=interval,
            beat_interval_seconds=monitoring.beat_interval_seconds,
            check_interval_seconds=monitoring.check_interval_seconds,
            checks=definition.checks_as_data() if definition else [],
            checks_timeout_seconds=self._settings.configuration.health.checks_timeout_seconds,
            containers_interval_seconds=interval,
            first_delay_seconds=interval * _share(listed.node_id),
            max_line_bytes=monitoring.max_line_bytes,
        )

    # knocks and peers

    async def _knock(self, watched: _Watched) -> None:
        reason, message = await self._opener.knock(
            watched.target, self._settings.configuration.health.knock_timeout_seconds
        )
        if reason is ContactReason.MANAGER_FAULT:
            self._fault(message)
        self._act(watched, watched.watch.knocked(time.monotonic(), reason, message))

    async def _ask_peers(self, watched: _Watched, attempt: int) -> None:
        """Have peers look at a silent node; the watch gets their answers, none where nobody can be asked."""
        node_id = watched.listed.node_id
        try:
            addresses = await asyncio.to_thread(watch_list.read_addresses, self._store, node_id)
        except StoreUnavailableError:
            addresses = []
        asked = [] if watched.target.local or not addresses else self._peers.choose(node_id, time.monotonic(), attempt)
        looks = {
            name: peer.stream.ask_peer(known, watched.target.port, _PEER_SECONDS)
            for name in asked
            if (peer := self._watched.get(name)) is not None and peer.stream is not None
            # Elsewhere a private address is another device's.
            if (known := addresses if peer.listed.site == watched.listed.site else public_of(addresses))
        }
        answers = dict(zip(looks, await asyncio.gather(*looks.values()), strict=True))
        self._act(watched, watched.watch.peers_answered(time.monotonic(), answers))

    # what is recorded

    def _conclude(self, watched: _Watched, verdict: Conclude) -> None:
        data = {
            "liveness": verdict.liveness.value,
            "reason": verdict.reason.value,
            "message": verdict.message,
            "evidence": None if verdict.evidence is None else verdict.evidence.value,
            "frozen_seconds": verdict.frozen_seconds,
        }
        self._recorder.put(Observation(watched.listed.node_id, self._stamp(), SOURCE, ObservationKind.VERDICT, data))

    def _put_failure(self, watched: _Watched, reason: ContactReason, message: str) -> None:
        data = {"reached": False, "reason": reason.value, "message": message}
        self._recorder.put(Observation(watched.listed.node_id, self._stamp(), SOURCE, ObservationKind.CONTACT, data))

    def _stamp(self) -> datetime:
        """Give the time, but never an earlier one again: a clock that is set back a little must not make a verdict late."""
        now = self._clock()
        if now <= self._stamped <= now + _SET_BACK:
            now = self._stamped + _MICROSECOND
        self._stamped = now
        return now

    def _fault(self, message: str) -> None:
        """Say that the manager itself is in trouble; the same trouble is said once a minute."""
        self.on_fault()
        now = self._clock()
        known = self.faults.pop(message, None)
        if known is None or (now - known.last_at).total_seconds() > 60:
            self._log.error("an attempt is discarded, the manager itself is in trouble", reason=message)
        self.faults[message] = Fault(message, 1 if known is None else known.count + 1, now)
        while len(self.faults) > _MAX_FAULTS:
            del self.faults[next(iter(self.faults))]

    def _window_of(self, listed: Listed) -> Window | None:
        definition = self._settings.node_types.get(listed.node_type or "")
        if definition is None or not definition.contact_windows:
            return None
        windows = definition.contact_windows

        def expected(at: float) -> tuple[bool, float]:
            wall = self._clock().timestamp() + at - time.monotonic()
            inside, changes_in = expected_at(windows, wall % 86_400)
            return inside, at + changes_in

        return expected


def _state_of(watched: _Watched) -> tuple[str, str]:
    if watched.fallback is not None:
        return "left_to_ansible", watched.fallback
    if watched.watch.liveness is not None:
        return watched.watch.liveness.value, ""
    return ("streaming", "") if watched.stream is not None else ("opening", "")


def _retry_at(watched: _Watched) -> float:
    return time.monotonic() + _FALLBACK_SECONDS * (0.8 + 0.4 * _share(watched.listed.node_id))


def _release(watched: _Watched) -> None:
    """Let go of those who wait for an answer that won't come."""
    for waiter in watched.waiters.values():
        _give_up(waiter)
    watched.waiters.clear()


def _expire(watched: _Watched, asked: str) -> None:
    """Let go of who waits for a probe that doesn't answer; the next one asks anew."""
    waiter = watched.waiters.pop(asked, None)
    if waiter is not None:
        _give_up(waiter)


def _give_up(waiter: Future[bool]) -> None:
    # Whoever waited may have gone.
    if waiter.set_running_or_notify_cancel():
        waiter.set_result(False)


def _nobody(_answers: Mapping[str, Answer], _now: float) -> Findings:
    return Findings(Finding.NOBODY, "the manager's own machine")


def _seed(node_id: str) -> int:
    return zlib.crc32(node_id.encode())


def _share(node_id: str) -> float:
    """Give each node its own number from 0 to 1, so that a fleet doesn't act in step."""
    return _seed(node_id) % 1000 / 1000
