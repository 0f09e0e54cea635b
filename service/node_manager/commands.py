# SPDX-License-Identifier: GPL-3.0-or-later
"""Carry out commands that came by Kafka: each once, answered by an event that names it.

Decides what a message means and what becomes of it; knows nothing of brokers. What a command does, that it was done, and the
answer are one transaction, so a message that comes again, to whichever manager, finds it done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
import structlog
from pydantic import ValidationError
from sqlalchemy.dialects import postgresql, sqlite

from node_manager.command_contracts import COMMANDS, RegisterNode, ReleaseDeployment, RequestCheck, SetNodeStatus
from node_manager.declarations import NodeDeclaration
from node_manager.domain import JobAction
from node_manager.events import EventType, caused_by, emit
from node_manager.maintenance_requests import StatusRequest
from node_manager.node_registry import Clock
from node_manager.problems import ProblemError
from node_manager.store import Store, tables
from node_manager.timings import NO_TIMINGS, CommandOutcome, Timings

if TYPE_CHECKING:
    from pydantic import BaseModel

    from node_manager.deployments import DeploymentPlacer
    from node_manager.jobs import JobQueue
    from node_manager.maintenance import Maintenance
    from node_manager.node_registry import NodeRegistry

STRUCTURED = "application/cloudevents+json"

_KEEP = timedelta(days=7)
_MAX_ID_CHARACTERS = 128
_MAX_SOURCE_CHARACTERS = 255
_MAX_ACTOR_CHARACTERS = 64
_MAX_BYTES = 1_048_576
_MAX_TEXT = 500


@dataclass(frozen=True)
class DeadLetter:
    """Why a message is none that can be understood."""

    code: str
    reason: str


@dataclass(frozen=True)
class _Envelope:
    command_id: str
    source: str
    type: str
    data: Any


class _UnreadableError(Exception):
    """A message that is no command, as far as it could be read."""

    def __init__(self, code: str, reason: str, envelope: _Envelope | None = None) -> None:
        super().__init__(reason)
        self.letter = DeadLetter(code, reason[:_MAX_TEXT])
        self.envelope = envelope


class _RepeatedError(Exception):
    """The command was carried out before."""


class Commands:
    """What the platform may ask for by message."""

    def __init__(
        self,
        store: Store,
        registry: NodeRegistry,
        maintenance: Maintenance,
        placer: DeploymentPlacer,
        jobs: JobQueue,
        clock: Clock,
        timings: Timings = NO_TIMINGS,
    ) -> None:
        self._store = store
        self._registry = registry
        self._maintenance = maintenance
        self._placer = placer
        self._jobs = jobs
        self._clock = clock
        self._timings = timings
        self._log = structlog.get_logger()

    def handle(self, headers: Sequence[tuple[str, bytes]], value: bytes | None) -> DeadLetter | None:
        """Carry out one message; give why it can't be understood, where that is so.

        Errors: StoreUnavailableError; then nothing was done, and it is to be handed in again.
        """
        try:
            envelope, command = _read(headers, value)
        except _UnreadableError as error:
            self._timings.count_command(CommandOutcome.DEAD_LETTER)
            if error.envelope is not None:
                self._refuse(error.envelope, 422, error.letter.code, error.letter.reason)
            return error.letter
        with structlog.contextvars.bound_contextvars(command_id=envelope.command_id), caused_by(envelope.command_id):
            self._timings.count_command(self._carry_out(envelope, command))
        return None

    def prune(self) -> None:
        """Forget commands that nobody will repeat any more."""
        with self._store.write() as connection:
            connection.execute(tables.commands.delete().where(tables.commands.c.handled_at < self._clock() - _KEEP))

    def _carry_out(self, envelope: _Envelope, command: BaseModel) -> CommandOutcome:
        with self._store.read() as connection:
            if _is_known(connection, envelope):
                return CommandOutcome.REPEATED
        about, result = _about(command)
        answered = False

        def answer(connection: sa.Connection) -> None:
            nonlocal answered
            self._record(connection, envelope, EventType.COMMAND_DONE, about, {"result": result})
            answered = True

        try:
            # As long as who asks for an endpoint by HTTP, a sender of commands is known by name in what it leads to.
            actor = f"kafka:{envelope.source}"[:_MAX_ACTOR_CHARACTERS]
            match command:
                case RegisterNode():
                    _, created = self._registry.register(NodeDeclaration(**dict(command)), also=answer)
                    if created:
                        self._look_at(command.node_id, actor)
                case SetNodeStatus():
                    wanted = {key: value for key, value in dict(command).items() if key != "node_id"}
                    self._maintenance.set_status(command.node_id, StatusRequest(**wanted), actor, also=answer)
                case ReleaseDeployment():
                    self._placer.delete(command.deployment_id, also=answer)
                case RequestCheck():
                    self._registry.get(command.node_id)
                    result["job_id"] = self._jobs.submit(JobAction.CHECK, [command.node_id], actor).job_id
                case _:
                    raise AssertionError(type(command))
            if not answered:
                # A check, where asking twice does no harm; or a registration that somebody else made at the same moment.
                with self._store.write() as connection:
                    answer(connection)
        except _RepeatedError:
            return CommandOutcome.REPEATED
        except ProblemError as problem:
            return self._refuse(envelope, problem.status, problem.code, problem.detail, about)
        self._log.info("a command was carried out", type=envelope.type, source=envelope.source, about=about)
        return CommandOutcome.DONE

    def _look_at(self, node_id: str, actor: str) -> None:
        try:
            self._jobs.submit(JobAction.REGISTER, [node_id], actor)
        except ProblemError as problem:
            # It is registered, which was asked for; the scheduler comes to it.
            self._log.warning("a new node waits for its first look", node_id=node_id, reason=problem.detail)

    def _refuse(
        self, envelope: _Envelope, status: int, code: str, message: str, about: str | None = None
    ) -> CommandOutcome:
        told = {"status": status, "code": code, "message": message[:_MAX_TEXT]}
        try:
            with caused_by(envelope.command_id), self._store.write() as connection:
                about = about or envelope.command_id
                self._record(connection, envelope, EventType.COMMAND_FAILED, about, told)
        except _RepeatedError:
            return CommandOutcome.REPEATED
        self._log.info("a command was refused", command_id=envelope.command_id, type=envelope.type, **told)
        return CommandOutcome.FAILED

    def _record(
        self, connection: sa.Connection, envelope: _Envelope, event: EventType, about: str, told: Mapping[str, Any]
    ) -> None:
        """Note that a command was handled, and answer it.

        Errors: _RepeatedError where that was done before: whatever the transaction did is to be undone.
        """
        now = self._clock()
        insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
        statement = insert(tables.commands).values(
            command_id=envelope.command_id,
            source=envelope.source,
            type=envelope.type[:64],
            outcome={"event": event.value, **told},
            handled_at=now,
        )
        statement = statement.on_conflict_do_nothing()
        if connection.scalar(statement.returning(tables.commands.c.command_id)) is None:
            raise _RepeatedError
        named = {
            "command_id": envelope.command_id,
            "command_source": envelope.source,
            "command_type": envelope.type[:64],
        }
        emit(connection, event, about, now, {**named, **told})


def _about(command: BaseModel) -> tuple[str, dict[str, Any]]:
    """Give the node or deployment that a command is about, and what its answer begins with."""
    if isinstance(command, ReleaseDeployment):
        return command.deployment_id, {"deployment_id": command.deployment_id}
    node_id: str = command.node_id  # type: ignore[attr-defined]  # all others have one
    return node_id, {"node_id": node_id}


def _is_known(connection: sa.Connection, envelope: _Envelope) -> bool:
    table = tables.commands.c
    query = sa.select(table.command_id).where(table.command_id == envelope.command_id, table.source == envelope.source)
    return connection.scalar(query) is not None


def _read(headers: Sequence[tuple[str, bytes]], value: bytes | None) -> tuple[_Envelope, BaseModel]:
    """Read a CloudEvent in either mode, and the command in it.

    Errors: _UnreadableError, with the envelope if there is enough of one to be answered.
    """
    if value is None:
        raise _UnreadableError("no_data", "the message has no value")
    if len(value) > _MAX_BYTES:
        raise _UnreadableError("too_large", f"expected at most {_MAX_BYTES} bytes, got {len(value)}")
    named = _texts(headers)
    content_type = named.get("content-type", "").partition(";")[0].strip().lower()
    document = _parse(value)
    if content_type == STRUCTURED:
        if not isinstance(document, dict):
            raise _UnreadableError("not_a_cloudevent", "expected a JSON object in structured mode")
        found, data = document, document.get("data")
    else:
        found = {name.removeprefix("ce_"): text for name, text in named.items() if name.startswith("ce_")}
        data = document
    envelope = _envelope(found, data)
    model = COMMANDS.get(envelope.type)
    if model is None:
        known = ", ".join(sorted(COMMANDS))
        raise _UnreadableError("unknown_command", f"{_quoted(envelope.type)} is none of {known}", envelope)
    try:
        # As JSON, where a time is a text; what was read from it is no longer that.
        return envelope, model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "data"
        raise _UnreadableError("invalid_data", f"{where}: {first['msg']}", envelope) from None
    except RecursionError:
        raise _UnreadableError("invalid_data", "nested too deeply", envelope) from None


def _envelope(found: Mapping[str, Any], data: Any) -> _Envelope:
    if found.get("specversion") != "1.0":
        raise _UnreadableError("not_a_cloudevent", "expected specversion 1.0; docs/commands.md shows a command")
    texts: dict[str, str] = {}
    for name, most in (
        ("id", _MAX_ID_CHARACTERS),
        ("source", _MAX_SOURCE_CHARACTERS),
        ("type", _MAX_SOURCE_CHARACTERS),
    ):
        text = found.get(name)
        if not isinstance(text, str) or not 0 < len(text) <= most or not text.isprintable():
            raise _UnreadableError("not_a_cloudevent", f"{name}: expected 1 to {most} printable characters")
        texts[name] = text
    return _Envelope(texts["id"], texts["source"], texts["type"], data)


def _texts(headers: Sequence[tuple[str, bytes]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, raw in headers:
        try:
            found[name.lower()] = (raw or b"").decode("utf-8")
        except UnicodeDecodeError:
            raise _UnreadableError("not_a_cloudevent", f"header {_quoted(name)}: expected UTF-8") from None
    return found


def _parse(value: bytes) -> Any:
    try:
        return json.loads(value.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        words = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise _UnreadableError("not_json", words) from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _quoted(text: str) -> str:
    return ascii(text[:80])
