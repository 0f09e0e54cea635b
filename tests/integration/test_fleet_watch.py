# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes under watch, over real connections into a real store: what is recorded, who is left to Ansible, who is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from builders import make_facts, make_report, make_sample
from node_manager import fleet_watch, watch_list
from node_manager.declarations import NodeChange
from node_manager.domain import ObservationKind
from node_manager.events import EventType
from node_manager.fleet_watch import FleetWatch
from node_manager.node_registry import NodeRegistry, utc_now
from node_manager.observations import Observation, ObservationLog
from node_manager.recorder import Recorder
from node_manager.settings import Settings
from node_manager.store import Store, open_store, tables
from stored import Rows
from watched_nodes import (
    BEAT,
    WatchedNode,
    data_line,
    declaration_of,
    recording,
    register,
    row_of,
    until,
    watch_settings,
)

CHECK = {"name": "ssh-port", "kind": "tcp", "port": 9, "severity": "warning"}
SAMPLE = data_line("sample", make_sample())
REPORT = data_line("report", make_report())
# Silent for 2.2 s: suspect. Then three knocks and a second of silence.
SHORT = {"beat_interval_seconds": 0.6}
SHORT_HEALTH = {"silence_before_unreachable_seconds": 1.0, "knock_timeout_seconds": 0.5}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(open_store(f"sqlite:///{tmp_path}/node-manager.db", busy_timeout_seconds=2)) as opened:
        yield opened


@pytest.fixture
def settings(key_file: Path) -> Settings:
    return watch_settings(key_file)


@pytest.fixture
def recorder(store: Store, settings: Settings) -> Iterator[Recorder]:
    with recording(store, settings) as found:
        yield found


class Watching:
    """A watch over what the store lists."""

    def __init__(self, store: Store, settings: Settings, recorder: Recorder) -> None:
        self.store = store
        self.settings = settings
        self.registry = NodeRegistry(store, settings)
        self.watch = FleetWatch(store, settings, recorder, utc_now)

    def in_hand(self) -> set[str]:
        """Name the nodes that are not left to Ansible."""
        return {node_id for node_id, _, _ in self.watch.states()} - self.watch.left_to_ansible()

    def look(self) -> None:
        """Take the list in as it is now."""
        found = watch_list.read_nodes(self.store)
        wanted = self.watch.wanted(found)
        for node_id, target in watch_list.read_targets(self.store, self.settings, wanted).items():
            self.watch.add(*found[node_id], target)

    def state(self, node_id: str = "gw-1") -> str:
        """Tell how a node is watched."""
        return next((state for name, state, _ in self.watch.states() if name == node_id), "")

    def reason(self, node_id: str = "gw-1") -> str:
        """Tell why it is watched so."""
        return next(reason for name, _, reason in self.watch.states() if name == node_id)

    async def until_state(self, state: str, node_id: str = "gw-1") -> None:
        """Wait until a node is watched so."""
        await until(lambda: self.state(node_id) == state, f"{node_id}: {state}")

    async def until_healthy(self, *nodes: WatchedNode) -> None:
        """Wait until nodes are stored as healthy."""
        await until(lambda: all(self.health(node.node_id) == "healthy" for node in nodes), "their health")

    def ask(self, kind: ObservationKind = ObservationKind.SAMPLE, node_id: str = "gw-1") -> Future[bool]:
        """Have a node look at itself."""
        waiter: Future[bool] = Future()
        self.watch.ask(node_id, kind, waiter)
        return waiter

    def health(self, node_id: str = "gw-1") -> str:
        """Read the stored health."""
        row = row_of(self.store, tables.node_states, node_id)
        assert row is not None
        return str(row["health"])


@asynccontextmanager
async def watching(
    store: Store, settings: Settings, recorder: Recorder, *nodes: WatchedNode, **declared: Any
) -> AsyncIterator[Watching]:
    """Serve nodes, register them, and watch them."""
    async with AsyncExitStack() as stack:
        for node in nodes:
            await stack.enter_async_context(node.served())
            register(store, settings, node, **declared)
        found = Watching(store, settings, recorder)
        try:
            found.look()
            yield found
        finally:
            await found.watch.close()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a test in a loop of its own; what it leaves to run is an error."""
    asyncio.run(test())


async def answer_of(waiter: Future[bool]) -> bool:
    """Wait for an answer."""
    await until(waiter.done, "an answer")
    return waiter.result()


# what a node says


def test_what_a_node_says_is_recorded_as_it_came(store: Store, settings: Settings, recorder: Recorder) -> None:
    async def test() -> None:
        node = WatchedNode()
        node.first_words = [
            b'{"kind":"hello","schema":1,"python":"3.11.2","pid":7}',
            data_line("facts", make_facts()),
            SAMPLE,
            data_line("report", make_report()),
        ]
        async with watching(store, settings, recorder, node) as found:
            stored = [tables.node_facts, tables.node_samples, tables.node_reports]
            await until(lambda: all(row_of(store, table) for table in stored))

            rows = [row_of(store, table) or {} for table in stored]
            assert [row["source"] for row in rows] == ["stream"] * 3
            assert [rows[0]["facts"]["hostname"], rows[1]["sample"]["uptime_seconds"]] == ["gw-7", 93784.2]
            assert found.state() == "streaming"
            assert found.in_hand() == {"gw-1"}

    run(test)


class NotedRecorder(Recorder):
    """A recorder that notes what was handed in, and whether soon, of what nodes said."""

    def __init__(self, observations: ObservationLog) -> None:
        super().__init__(observations, pause_seconds=0.02)
        self.noted: list[tuple[str, bool]] = []

    def put(self, observation: Observation, recorded: Future[bool] | None = None, *, soon: bool = True) -> None:
        if isinstance(observation.data, bytes):
            self.noted.append((observation.kind.value, soon))
        super().put(observation, recorded, soon=soon)


def test_all_samples_of_a_stream_but_the_first_are_routine(store: Store, settings: Settings) -> None:
    recorder = NotedRecorder(ObservationLog(store, settings))
    recorder.start()

    async def test() -> None:
        node = WatchedNode()
        node.first_words = [data_line("facts", make_facts()), SAMPLE, SAMPLE, REPORT, SAMPLE]
        async with watching(store, settings, recorder, node) as found:
            await until(lambda: len(recorder.noted) == 5, "all that it said")
            node.drop()
            await until(lambda: len(recorder.noted) == 10, "all that it said again")
            await found.until_state("streaming")

    try:
        run(test)
    finally:
        recorder.stop()

    said = [("facts", True), ("sample", True), ("sample", False), ("report", True), ("sample", False)]
    assert recorder.noted == said * 2


def test_real_probe_is_watched(store: Store, key_file: Path, recorder: Recorder) -> None:
    settings = watch_settings(key_file, {"sample_interval_seconds": 60.0}, edge={"checks": [CHECK]})

    async def test() -> None:
        node = WatchedNode(real=True)
        async with watching(store, settings, recorder, node, node_type="edge") as found:
            stored = [tables.node_facts, tables.node_samples, tables.node_reports]
            await until(lambda: all(row_of(store, table) for table in stored), "facts, sample and report")
            first = (row_of(store, tables.node_samples) or {})["observed_at"]
            recorded = await answer_of(found.ask())

            again = (row_of(store, tables.node_samples) or {})["observed_at"]
            report = row_of(store, tables.node_reports) or {}
            assert (recorded, again > first) == (True, True)
            assert [check["name"] for check in report["report"]["checks"]] == ["ssh-port"]

    run(test)


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(BEAT, id="beat"),
        pytest.param(b'{"kind":"hello","schema":1}', id="hello"),
        pytest.param(b'{"kind":"weather","data":{"rain":true}}', id="unknown-kind"),
        pytest.param(b'{"kind":"verdict","data":{"liveness":"unreachable","reason":"TimedOut"}}', id="not-its-to-say"),
        pytest.param(b'{"kind":"contact","data":{"reached":false,"reason":"TimedOut","message":""}}', id="contact"),
        pytest.param(b'{"kind":"error","message":"sample: OSError"}', id="error"),
        pytest.param(b'{"kind":"error","id":7,"message":["x"]}', id="odd-error"),
        pytest.param(b'{ "kind": "sample", "data": {} }', id="other-spelling"),
    ],
)
def test_line_without_an_observation_changes_nothing(
    store: Store, settings: Settings, recorder: Recorder, line: bytes
) -> None:
    async def test() -> None:
        node = WatchedNode()
        node.first_words = [REPORT]
        node.answer = lambda command: [data_line("sample", make_sample(), command)]
        async with watching(store, settings, recorder, node) as found:
            await until(lambda: found.health() == "healthy")
            await node.say(line)
            # What comes after it is taken as if it had not been.
            recorded = await answer_of(found.ask())

            assert (recorded, found.state(), found.in_hand()) == (True, "streaming", {"gw-1"})
            assert found.health() == "healthy"
            assert len(Rows(store).of(tables.sample_history)) == 1

    run(test)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        pytest.param(b"Welcome to gw-1!", "no JSON object: b'Welcome", id="words"),
        pytest.param(b"[1, 2]", "no JSON object", id="list"),
        pytest.param(b'"beat"', "no JSON object", id="text"),
        pytest.param(b"{}", "no JSON object", id="no-kind"),
        pytest.param(b'{"kind":"sample","data":', "no JSON object", id="cut"),
        pytest.param(b"\xff\xfe\x00", "no JSON object", id="bytes"),
        pytest.param(b"[" * 4000, "no JSON object", id="deep"),
        pytest.param(b'{"kind":"' + b"x" * 5000, "longer than 4096", id="giant"),
    ],
)
def test_node_that_says_anything_else_is_left_to_ansible(
    store: Store, key_file: Path, recorder: Recorder, line: bytes, words: str
) -> None:
    settings = watch_settings(key_file, {"max_line_bytes": 4096})

    async def test() -> None:
        node = WatchedNode()
        async with watching(store, settings, recorder, node) as found:
            await found.until_state("streaming")
            waiter = found.ask()
            await node.say(line)
            await found.until_state("left_to_ansible")
            await until(lambda: node.open_connections == 0, "the stream's end")

            assert await answer_of(waiter) is False
            assert words in found.reason()
            assert found.in_hand() == set()
            assert (found.health(), found.watch.has_stream("gw-1")) == ("unknown", False)

    run(test)


# having a node look at itself


@pytest.mark.parametrize(
    ("kind", "action", "data"),
    [
        (ObservationKind.SAMPLE, "sample", make_sample()),
        (ObservationKind.REPORT, "check", make_report()),
        (ObservationKind.FACTS, "facts", make_facts()),
    ],
)
def test_ask_waits_until_the_answer_is_recorded(
    store: Store, settings: Settings, recorder: Recorder, kind: ObservationKind, action: str, data: dict[str, Any]
) -> None:
    async def test() -> None:
        node = WatchedNode()
        async with watching(store, settings, recorder, node) as found:
            await found.until_state("streaming")
            waiter, other = found.ask(kind), found.ask(kind)
            await until(lambda: len(node.commands) == 2)
            await node.say(data_line(kind.value, data), data_line(kind.value, data, {"id": "0" * 32}))
            await node.say(data_line(kind.value, data, node.commands[0]))

            assert await answer_of(waiter) is True
            assert [command["do"] for command in node.commands] == [action, action]
            assert not other.done()

    run(test)


def test_ask_is_answered_when_the_probe_could_not_look(store: Store, settings: Settings, recorder: Recorder) -> None:
    async def test() -> None:
        node = WatchedNode()
        node.answer = lambda command: [b'{"kind":"error","id":"%s","message":"busy"}' % command["id"].encode()]
        async with watching(store, settings, recorder, node) as found:
            await found.until_state("streaming")

            assert await answer_of(found.ask()) is False
            assert found.state() == "streaming"

    run(test)


def test_ask_is_answered_when_the_stream_ends(store: Store, settings: Settings, recorder: Recorder) -> None:
    async def test() -> None:
        node = WatchedNode()
        async with watching(store, settings, recorder, node) as found:
            await found.until_state("streaming")
            waiter, gone = found.ask(), found.ask()
            gone.cancel()
            await until(lambda: len(node.commands) == 2)
            node.drop()

            assert await answer_of(waiter) is False
            await found.until_state("streaming")

    run(test)


def test_ask_without_a_stream_is_answered_at_once(store: Store, settings: Settings, recorder: Recorder) -> None:
    async def test() -> None:
        async with watching(store, settings, recorder) as found:
            assert found.ask(node_id="unknown").result(0) is False
            assert not found.watch.has_stream("unknown")

    run(test)


# the list changes


def test_removed_node_is_let_go(store: Store, settings: Settings, recorder: Recorder) -> None:
    async def test() -> None:
        node, other = WatchedNode(), WatchedNode("gw-2")
        async with watching(store, settings, recorder, node, other) as found:
            await found.until_state("streaming")
            await found.until_state("streaming", "gw-2")
            waiter = found.ask()
            found.registry.deregister("gw-1")
            found.look()

            assert await answer_of(waiter) is False
            await until(lambda: node.open_connections == 0, "the end of the stream")
            assert [name for name, _, _ in found.watch.states()] == ["gw-2"]
            assert (found.watch.has_stream("gw-2"), other.logins) == (True, 1)

    run(test)


def test_node_that_is_removed_while_its_stream_is_opened_leaves_nothing(
    store: Store, settings: Settings, recorder: Recorder
) -> None:
    async def test() -> None:
        node = WatchedNode()
        async with watching(store, settings, recorder, node) as found:
            before = asyncio.all_tasks()
            for delay in (0.0, 0.26, 0.28, 0.3, 0.32):
                await asyncio.sleep(delay)
                found.watch.wanted({})
                found.look()
            found.watch.wanted({})

            await until(lambda: node.open_connections == 0, "the end of all streams")
            await until(lambda: not leftovers(before), "the end of all tasks")
            assert found.watch.states() == []

    run(test)


def leftovers(before: set[asyncio.Task[Any]]) -> list[asyncio.Task[Any]]:
    """Give the new tasks, but for those of the served nodes."""
    return [task for task in asyncio.all_tasks() - before if "watched_nodes" not in repr(task.get_coro())]


def test_changed_node_is_watched_anew_with_its_new_options(store: Store, key_file: Path, recorder: Recorder) -> None:
    settings = watch_settings(key_file, edge={"checks": [CHECK]})

    async def test() -> None:
        node = WatchedNode()
        async with watching(store, settings, recorder, node) as found:
            await found.until_state("streaming")
            change = declaration_of(node, node_type="edge")
            change.pop("node_id")
            found.registry.update("gw-1", NodeChange.model_validate(change))
            found.look()
            await until(lambda: len(node.options) == 2 and found.state() == "streaming")
            await until(lambda: node.open_connections == 1)
            found.look()

            assert [[check["name"] for check in told["checks"]] for told in node.options] == [[], ["ssh-port"]]
            assert node.logins == 2

    run(test)


def test_recognised_node_gets_the_checks_of_its_type(store: Store, key_file: Path) -> None:
    recognised = {"recognised_by": {"memory_mib_min": 1000}, "checks": [CHECK]}
    settings = watch_settings(key_file, server=recognised)

    async def test() -> None:
        node = WatchedNode()
        node.first_words = [data_line("facts", make_facts())]
        with recording(store, settings) as recorder:
            async with watching(store, settings, recorder, node) as found:
                await until(lambda: row_of(store, tables.node_facts))
                found.look()
                await until(lambda: len(node.options) == 2)
                found.look()

                assert [len(told["checks"]) for told in node.options] == [0, 1]
                assert node.logins == 2

    run(test)


def test_options_follow_the_settings(store: Store, key_file: Path, recorder: Recorder) -> None:
    numbers = {"sample_interval_seconds": 7.0, "check_interval_seconds": 70.0, "max_line_bytes": 5000}
    settings = watch_settings(key_file, numbers, {"checks_timeout_seconds": 9.0})

    async def test() -> None:
        node = WatchedNode()
        async with watching(store, settings, recorder, node):
            await until(lambda: node.options)

            told = dict(node.options[0])
            assert 0 <= told.pop("first_delay_seconds") < 7
            assert told == {
                **numbers,
                "beat_interval_seconds": 3600.0,
                "checks": [],
                "checks_timeout_seconds": 9.0,
                "containers_interval_seconds": 7.0,
            }

    run(test)


# who can't be watched as configured


def test_changed_host_key_quarantines(store: Store, settings: Settings, recorder: Recorder) -> None:
    async def test() -> None:
        node = WatchedNode()
        other_key = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode()
        async with watching(store, settings, recorder, node, host_keys=[other_key]) as found:
            await until(lambda: (row_of(store, tables.node_states) or {})["quarantined"], "a quarantine")

            assert node.logins == 0
            assert found.state() == "opening"
            assert found.in_hand() == {"gw-1"}
            found.registry.forget_host_keys("gw-1")
            found.look()
            await found.until_state("streaming")

    run(test)


def test_node_that_refuses_the_login_is_left_to_ansible_and_tried_again(
    store: Store,
    settings: Settings,
    recorder: Recorder,
    key_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet_watch, "_FALLBACK_SECONDS", 0.3)
    other = tmp_path / "other.pub"
    asyncssh.generate_private_key("ssh-ed25519").write_public_key(other)

    async def test() -> None:
        node = WatchedNode(authorized_client_keys=str(other))
        async with watching(store, settings, recorder, node) as found:
            await found.until_state("left_to_ansible")
            assert "Permission denied" in found.reason()
            assert found.in_hand() == set()

            await node.stop()
            node._options["authorized_client_keys"] = str(key_file.with_suffix(".pub"))
            await node.start()
            await until(lambda: node.options, "a stream")
            # That it lets us in says nothing of what it will say.
            await until(lambda: found.watch.has_stream("gw-1"))
            assert found.in_hand() == set()
            await node.say(SAMPLE)
            await found.until_state("streaming")
            assert found.in_hand() == {"gw-1"}
            assert found.watch.faults == {}

    run(test)


@pytest.mark.parametrize(
    ("python", "words"),
    [
        pytest.param("echo sudo: no >&2; exit 1", "sudo", id="no-root"),
        pytest.param("no-such-program", "not found", id="no-python"),
        pytest.param("exit 3", "exit code 3", id="old-python"),
        pytest.param("echo why >&2; exit 4", "why", id="failing"),
    ],
)
def test_node_whose_probe_ends_is_left_to_ansible(
    store: Store,
    settings: Settings,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    python: str,
    words: str,
) -> None:
    monkeypatch.setattr(fleet_watch, "bootstrap_command", lambda: python)

    async def test() -> None:
        node = WatchedNode(real=True)
        async with watching(store, settings, recorder, node) as found:
            await found.until_state("left_to_ansible")

            assert words in found.reason()
            assert (found.in_hand(), found.health()) == (set(), "unknown")

    run(test)


def test_node_that_is_left_to_ansible_is_not_tried_all_the_time(
    store: Store, key_file: Path, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_watch, "_FALLBACK_SECONDS", 0.1)
    settings = watch_settings(key_file, {"reconnect_max_seconds": 60.0})
    other = tmp_path / "other.pub"
    asyncssh.generate_private_key("ssh-ed25519").write_public_key(other)
    connections: list[int] = []

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(1)
        writer.transport.abort()

    async def test() -> None:
        node = WatchedNode(authorized_client_keys=str(other))
        async with watching(store, settings, recorder, node) as found:
            await found.until_state("left_to_ansible")
            await node.stop()
            monkeypatch.setattr(fleet_watch, "_FALLBACK_SECONDS", 3600.0)
            server = await asyncio.start_server(hang_up, node.address, node.port)
            await until(lambda: connections, "another try")
            before = len(connections)
            await asyncio.sleep(1.5)
            server.close()

            # One knock may come beside.
            assert len(connections) <= before + 2

    run(test)


def test_fault_of_our_own_is_told_and_blames_nobody(
    store: Store, settings: Settings, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        gate, node = WatchedNode("gate"), WatchedNode("gw-1")
        async with gate.served(), node.served():
            register(store, settings, gate)
            register(store, settings, node, connection={"jump_host": "gate"})
            async with watching(store, settings, recorder) as found:
                found.look()
                await until(lambda: any(fault.count >= 3 for fault in found.watch.faults.values()), "faults")

                (fault,) = found.watch.faults.values()
                assert "allow TCP forwarding there" in fault.message
                assert (utc_now() - fault.last_at).total_seconds() < 10
                assert (found.state(), found.health()) == ("opening", "unknown")
                assert found.in_hand() == {"gate", "gw-1"}

    run(test)


def test_fault_while_a_line_is_taken_is_told(
    store: Store, settings: Settings, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_arguments: object) -> None:
        raise MemoryError

    async def test() -> None:
        node = WatchedNode()
        async with watching(store, settings, recorder, node) as found:
            await found.until_state("streaming")
            with monkeypatch.context() as patch:
                patch.setattr(recorder, "put", no_room)
                await node.say(SAMPLE)
                await until(lambda: found.watch.faults, "a fault")
            await until(lambda: node.logins == 2 and found.state() == "streaming")
            assert found.health() == "unknown"

    run(test)


def test_faults_are_bounded(
    store: Store, settings: Settings, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_watch, "_MAX_FAULTS", 1)

    async def test() -> None:
        gate, nodes = WatchedNode("gate"), [WatchedNode(f"gw-{number}") for number in range(2)]
        async with AsyncExitStack() as stack:
            for node in (gate, *nodes):
                await stack.enter_async_context(node.served())
                register(store, settings, node, connection={} if node is gate else {"jump_host": "gate"})
            seen: set[str] = set()

            async with watching(store, settings, recorder) as found:

                def look() -> bool:
                    assert len(found.watch.faults) <= 1
                    seen.update(found.watch.faults)
                    return len(seen) == 2

                await until(look, "the faults of both")

    run(test)


def test_missing_private_key_is_a_fault_and_leaves_the_node_to_ansible(
    store: Store, recorder: Recorder, tmp_path: Path
) -> None:
    settings = watch_settings(tmp_path / "no-key")

    async def test() -> None:
        async with watching(store, settings, recorder, WatchedNode()) as found:
            await found.until_state("left_to_ansible")

            assert "No such file" in found.reason()
            assert list(found.watch.faults) == [found.reason()]
            assert (found.in_hand(), found.health()) == (set(), "unknown")

    run(test)


# who is lost


def test_lost_stream_is_suspect_at_once_and_opened_again(store: Store, settings: Settings, recorder: Recorder) -> None:
    async def test() -> None:
        node = WatchedNode()
        node.first_words = [REPORT]
        async with watching(store, settings, recorder, node) as found:
            await until(lambda: found.health() == "healthy")
            node.drop()
            await until(lambda: node.logins == 2 and found.state() == "streaming")
            await until(lambda: found.health() == "healthy")

            told = [event["data"] for event in Rows(store).events(EventType.HEALTH_CHANGED.value)]
            assert [(item["to"], item["source"]) for item in told][1:] == [("suspect", "stream"), ("healthy", "stream")]

    run(test)


def test_stall_of_our_own_makes_nobody_suspect(store: Store, key_file: Path, recorder: Recorder) -> None:
    settings = watch_settings(key_file, {"beat_interval_seconds": 0.5})

    async def test() -> None:
        nodes = [WatchedNode(f"gw-{number}") for number in range(1, 4)]
        for node in nodes:
            node.first_words, node.beat_seconds = [REPORT], 0.2
        async with watching(store, settings, recorder, *nodes) as found:
            await found.until_healthy(*nodes)
            time.sleep(3.2)
            await until(lambda: found.watch.faults, "a fault")
            await asyncio.sleep(0.6)

            assert "the manager itself was held up for" in next(iter(found.watch.faults))
            assert {state for _, state, _ in found.watch.states()} == {"streaming"}
            assert [node.logins for node in nodes] == [1, 1, 1]
            assert [found.health(node.node_id) for node in nodes] == ["healthy"] * 3

    run(test)


@asynccontextmanager
async def site_of_three(
    store: Store, key_file: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Watching, WatchedNode]]:
    """Watch three nodes of one site that can see each other, all of them healthy; give the one to lose."""
    # Here loopback means the same machine to all of them.
    monkeypatch.setattr(watch_list, "_is_own", lambda _: False)
    monkeypatch.setattr(fleet_watch, "_PEER_SECONDS", 2.0)
    settings = watch_settings(key_file, SHORT, SHORT_HEALTH)
    nodes = [WatchedNode(f"gw-{number}", address="127.0.0.5") for number in range(1, 4)]
    for node in nodes:
        node.first_words, node.beat_seconds = [REPORT], 0.2
    async with watching(store, settings, recorder, *nodes, location={"site": "hall-1"}) as found:
        await found.until_healthy(*nodes)
        yield found, nodes[0]
        assert [found.health(node.node_id) for node in nodes[1:]] == ["healthy"] * 2


def test_frozen_node_that_its_neighbours_do_not_see_is_unreachable(
    store: Store, key_file: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with site_of_three(store, key_file, recorder, monkeypatch) as (found, node):
            await node.freeze()
            await until(lambda: found.health() == "unreachable", "a verdict")

            row = row_of(store, tables.node_states) or {}
            assert row["evidence"] == "peers_blind"
            assert "not seen by gw-2" in row["health_cause"]
            await node.start()
            await until(lambda: found.health() == "recovering", "its return")

    run(test)


def test_node_that_its_neighbours_see_is_not_unreachable(
    store: Store, key_file: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        async with site_of_three(store, key_file, recorder, monkeypatch) as (found, node):
            # A port that refuses is the answer of a living kernel.
            await node.stop()
            await until(lambda: found.state() == "path_lost" and found.health() == "degraded", "a verdict")

            cause = (row_of(store, tables.node_states) or {})["health_cause"]
            assert "seen by" in cause, cause

    run(test)


def test_node_whose_neighbours_can_not_find_it_has_nobody_to_ask(
    store: Store, key_file: Path, recorder: Recorder
) -> None:
    settings = watch_settings(key_file, SHORT, SHORT_HEALTH)

    async def test() -> None:
        # Loopback means another machine to each of them.
        nodes = [WatchedNode(f"gw-{number}") for number in (1, 2)]
        for node in nodes:
            node.first_words, node.beat_seconds = [REPORT], 0.2
        async with watching(store, settings, recorder, *nodes, location={"site": "hall-1"}) as found:
            await found.until_healthy(*nodes)
            await nodes[0].stop()
            await until(lambda: found.health() == "unreachable", "a verdict")

            assert (row_of(store, tables.node_states) or {})["evidence"] == "nobody_to_ask"
            assert found.health("gw-2") == "healthy"

    run(test)


# the end


def test_close_leaves_nothing_behind(store: Store, settings: Settings, recorder: Recorder) -> None:
    async def test() -> None:
        nodes = [WatchedNode(f"gw-{number}") for number in range(1, 4)]
        async with AsyncExitStack() as stack:
            for node in nodes:
                await stack.enter_async_context(node.served())
                register(store, settings, node)
            dead = WatchedNode("gw-9")
            dead.port = nodes[0].port
            await nodes[0].freeze()
            before = asyncio.all_tasks()
            found = Watching(store, settings, recorder)
            found.look()
            await found.until_state("streaming", "gw-2")
            await found.until_state("streaming", "gw-3")
            waiter = found.ask(node_id="gw-2")

            async with asyncio.timeout(5):
                await found.watch.close()

            assert waiter.result(0) is False
            await until(lambda: not leftovers(before), "the end of all tasks")
            await until(lambda: not any(node.open_connections for node in nodes), "the end of all streams")
            assert found.watch.states() == []
            assert found.in_hand() == set()

    run(test)
