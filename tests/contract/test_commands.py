# SPDX-License-Identifier: GPL-3.0-or-later
"""Commands: each carried out once and answered by an event, whatever comes twice, at once, or as garbage."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from builders import FakeClock, make_declaration, make_request, make_settings
from hypothesis import given
from hypothesis import strategies as st
from job_parts import FakeRunner
from node_manager.commands import STRUCTURED, Commands
from node_manager.deployments import DeploymentPlacer
from node_manager.domain import Admin, JobAction
from node_manager.jobs import JobQueue
from node_manager.maintenance import Maintenance
from node_manager.node_registry import NodeRegistry
from node_manager.replacements import Replacements
from node_manager.resource_allocator import ResourceAllocator
from node_manager.settings import Settings
from node_manager.store import Store, StoreUnavailableError, open_store, tables
from stored import Rows

Headers = list[tuple[str, bytes]]
DONE, FAILED = "commands.answer.done", "commands.answer.failed"


def headers(command_type: str, command_id: str = "c-1", **more: str) -> Headers:
    found = {"ce_specversion": "1.0", "ce_id": command_id, "ce_source": "/deployer", "ce_type": command_type, **more}
    return [(name, text.encode()) for name, text in found.items()]


def body(**data: Any) -> bytes:
    return json.dumps(data).encode()


REGISTER = headers("node.register"), body(node_id="gw-9", address="192.0.2.9")
CORDON = headers("node.set_status"), body(node_id="gw-7", status="cordoned")


@pytest.fixture
def queue(store: Store, settings: Settings, clock: FakeClock) -> JobQueue:
    return JobQueue(store, settings, clock, runner=FakeRunner(settings))


@pytest.fixture
def placer(store: Store, settings: Settings, allocator: ResourceAllocator, clock: FakeClock) -> DeploymentPlacer:
    return DeploymentPlacer(store, settings, allocator, clock)


@pytest.fixture
def commands(
    store: Store,
    settings: Settings,
    registry: NodeRegistry,
    placer: DeploymentPlacer,
    queue: JobQueue,
    clock: FakeClock,
) -> Commands:
    registry.register(make_declaration(capacity={"memory_mib": 4096}))
    with store.write() as connection:
        connection.execute(tables.outbox.delete())
    maintenance = Maintenance(store, settings, Replacements(store, settings, placer, clock), queue, clock)
    return Commands(store, registry, maintenance, placer, queue, clock)


def test_register_is_carried_out_and_answered(commands: Commands, registry: NodeRegistry, rows: Rows) -> None:
    assert commands.handle(*REGISTER) is None

    assert registry.get("gw-9").address == "192.0.2.9"
    registered, answer = rows.events()
    assert (registered["type"], registered["causation_id"]) == ("node.lifecycle.registered", "c-1")
    assert (answer["type"], answer["node_id"], answer["causation_id"]) == (DONE, "gw-9", "c-1")
    assert answer["data"] == {
        "command_id": "c-1",
        "command_source": "/deployer",
        "command_type": "node.register",
        "result": {"node_id": "gw-9"},
    }


def test_register_has_the_node_looked_at(commands: Commands, queue: JobQueue) -> None:
    commands.handle(*REGISTER)

    (job,) = queue.page(10).jobs
    assert (job.action, job.node_ids, job.requested_by) == (JobAction.REGISTER, ("gw-9",), "kafka:/deployer")


def test_set_status_is_carried_out(commands: Commands, registry: NodeRegistry, rows: Rows) -> None:
    commands.handle(*CORDON)

    assert registry.get("gw-7").admin is Admin.CORDONED
    assert [event["type"] for event in rows.events()] == ["node.lifecycle.admin_changed", DONE]


def test_release_is_carried_out(commands: Commands, allocator: ResourceAllocator, rows: Rows, store: Store) -> None:
    allocator.allocate("gw-7", make_request("a-1", deployment_id="web"))
    commands.handle(headers("deployment.release"), body(deployment_id="web"))

    with store.read() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.allocations)) == 0
    assert rows.events()[-1]["type"] == DONE
    assert rows.events("allocation.released")[0]["causation_id"] == "c-1"


def test_request_check_answers_with_the_job(commands: Commands, queue: JobQueue, rows: Rows) -> None:
    commands.handle(headers("node.request_check"), body(node_id="gw-7"))

    (job,) = queue.page(10).jobs
    assert rows.events(DONE)[0]["data"]["result"] == {"node_id": "gw-7", "job_id": job.job_id}


def test_a_command_that_comes_twice_is_done_once(commands: Commands, registry: NodeRegistry, rows: Rows) -> None:
    commands.handle(*CORDON)
    registry.set_admin("gw-7", Admin.ACTIVE, "an operator, since then")
    told = rows.events()

    assert commands.handle(*CORDON) is None
    assert registry.get("gw-7").admin is Admin.ACTIVE
    assert rows.events() == told


def test_ids_are_those_of_their_source(commands: Commands, registry: NodeRegistry) -> None:
    commands.handle(*CORDON)
    registry.set_admin("gw-7", Admin.ACTIVE, "back")
    commands.handle([*CORDON[0], ("ce_source", b"/scheduler")], CORDON[1])

    assert registry.get("gw-7").admin is Admin.CORDONED


@pytest.mark.parametrize(
    ("given_headers", "value"),
    [
        REGISTER,
        CORDON,
        (headers("deployment.release"), body(deployment_id="web")),
        (headers("node.request_check"), body(node_id="gw-7")),
    ],
    ids=["register", "set-status", "release", "check"],
)
def test_what_several_managers_take_at_once_is_done_once(
    commands: Commands, allocator: ResourceAllocator, rows: Rows, given_headers: Headers, value: bytes
) -> None:
    allocator.allocate("gw-7", make_request("a-1", deployment_id="web"))

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: commands.handle(given_headers, value), range(6)))

    assert results == [None] * 6
    assert [event["type"] for event in rows.events() if event["type"].startswith("commands.")] == [DONE]
    changed = rows.events("node.lifecycle.admin_changed") + rows.events("node.lifecycle.registered")
    assert len(changed) <= 1


def test_a_crash_before_the_end_undoes_all(
    commands: Commands, registry: NodeRegistry, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StoreUnavailableError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("node_manager.commands.emit", fail)
        with pytest.raises(StoreUnavailableError):
            commands.handle(*CORDON)

    assert registry.get("gw-7").admin is Admin.ACTIVE
    assert rows.events() == []
    commands.handle(*CORDON)
    assert registry.get("gw-7").admin is Admin.CORDONED


@pytest.mark.parametrize(
    ("command_type", "value", "status", "code"),
    [
        ("node.set_status", body(node_id="nobody", status="cordoned"), 404, "node_not_found"),
        ("node.request_check", body(node_id="nobody"), 404, "node_not_found"),
        ("deployment.release", body(deployment_id="none"), 404, "deployment_not_found"),
        ("node.register", body(node_id="gw-7", address="192.0.2.200"), 409, "node_exists"),
        ("node.register", body(node_id="gw-9", address="192.0.2.9", node_type="toaster"), 422, "invalid_input"),
    ],
)
def test_what_cant_be_done_is_answered_with_the_reason(
    commands: Commands, rows: Rows, command_type: str, value: bytes, status: int, code: str
) -> None:
    assert commands.handle(headers(command_type), value) is None
    assert commands.handle(headers(command_type), value) is None

    (answer,) = rows.events()
    assert answer["type"] == FAILED
    assert (answer["data"]["status"], answer["data"]["code"]) == (status, code)
    assert answer["causation_id"] == "c-1"


@pytest.mark.parametrize(
    ("given_headers", "value", "code"),
    [
        (headers("node.register"), None, "no_data"),
        (headers("node.register"), b"x" * 2_000_000, "too_large"),
        (headers("node.register"), b"\xff\xfe", "not_json"),
        (headers("node.register"), b'{"node_id": NaN}', "not_json"),
        (headers("node.register"), b"[" * 100_000, "not_json"),
        ([], body(node_id="gw-7"), "not_a_cloudevent"),
        (headers("node.register", ce_specversion="0.3"), body(), "not_a_cloudevent"),
        (headers("node.register", command_id=""), body(), "not_a_cloudevent"),
        (headers("node.register", command_id="x" * 129), body(), "not_a_cloudevent"),
        (headers("node.register", command_id="a\nb"), body(), "not_a_cloudevent"),
        ([("ce_id", b"\xff")], body(), "not_a_cloudevent"),
        (headers("x", **{"content-type": STRUCTURED}), b"[]", "not_a_cloudevent"),
    ],
)
def test_what_is_no_command_is_a_dead_letter(
    commands: Commands, rows: Rows, given_headers: Headers, value: bytes | None, code: str
) -> None:
    letter = commands.handle(given_headers, value)

    assert letter is not None
    assert letter.code == code
    assert letter.reason.isprintable()
    assert rows.events() == []


@pytest.mark.parametrize(
    ("command_type", "value", "code"),
    [
        ("node.explode", body(), "unknown_command"),
        ("node.register", body(node_id="gw-9"), "invalid_data"),
        ("node.register", body(node_id="gw-9", address="192.0.2.9", ansible_user="root"), "invalid_data"),
        ("node.set_status", body(node_id="gw-7", status="blue"), "invalid_data"),
        ("node.request_check", b"[]", "invalid_data"),
        ("node.request_check", b"null", "invalid_data"),
    ],
)
def test_a_dead_letter_with_an_id_is_answered_too(
    commands: Commands, rows: Rows, command_type: str, value: bytes, code: str
) -> None:
    letters = [commands.handle(headers(command_type), value) for _ in range(2)]

    assert [letter.code for letter in letters if letter] == [code, code]
    (answer,) = rows.events()
    assert (answer["type"], answer["data"]["code"]) == (FAILED, code)


def test_structured_mode_is_read_too(commands: Commands, registry: NodeRegistry) -> None:
    document = {
        "specversion": "1.0",
        "id": "s-1",
        "source": "/deployer",
        "type": "node.set_status",
        "data": {"node_id": "gw-7", "status": "cordoned"},
    }

    kind = [("Content-Type", b"application/cloudevents+json; charset=UTF-8")]
    assert commands.handle(kind, json.dumps(document).encode()) is None
    assert registry.get("gw-7").admin is Admin.CORDONED


def test_prune_forgets_commands_of_long_ago(commands: Commands, clock: FakeClock, rows: Rows) -> None:
    commands.handle(*CORDON)
    clock.advance(6 * 24 * 3600)
    commands.prune()
    assert len(rows.of(tables.commands)) == 1
    clock.advance(2 * 24 * 3600)
    commands.prune()

    assert rows.of(tables.commands) == []


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Headers, bytes | None], object]]:
    """Give commands on a store that many examples share."""
    folder: Path = tmp_path_factory.mktemp("commands")
    settings, clock = make_settings(), FakeClock()
    with closing(open_store(f"sqlite:///{folder}/store.db")) as store:
        registry = NodeRegistry(store, settings, clock)
        placer = DeploymentPlacer(store, settings, ResourceAllocator(store, settings, clock), clock)
        queue = JobQueue(store, settings, clock, runner=FakeRunner(settings))
        maintenance = Maintenance(store, settings, Replacements(store, settings, placer, clock), queue, clock)
        yield Commands(store, registry, maintenance, placer, queue, clock).handle


_TEXTS = st.text(max_size=40)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4),
    max_leaves=12,
)
_NAMES = st.sampled_from(["ce_id", "ce_source", "ce_type", "ce_specversion", "content-type", "CE_ID"])
_VALUES = st.binary(max_size=40) | st.sampled_from(
    [b"1.0", b"node.register", b"node.set_status", b"application/cloudevents+json"]
)


@given(
    given_headers=st.lists(st.tuples(_NAMES, _VALUES), max_size=8),
    value=st.none() | st.binary(max_size=200) | _JSON.map(lambda found: json.dumps(found).encode()),
)
def test_no_message_stops_the_consumer(
    lasting: Callable[[Headers, bytes | None], object], given_headers: Headers, value: bytes | None
) -> None:
    lasting(given_headers, value)
