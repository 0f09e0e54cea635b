# SPDX-License-Identifier: GPL-3.0-or-later
"""Take commands from Kafka, one after the other, and put aside what can't be understood.

A message counts as taken when it was handled, or is a dead letter that Kafka has; what ends this thread before that, another
manager of the group finds it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import structlog

from node_manager.commands import Commands, DeadLetter
from node_manager.kafka_link import LinkError, Message, Topic, UnreadableError, is_of_the_link, poll, topic_name
from node_manager.node_registry import Clock
from node_manager.outbox_relay import Publishes
from node_manager.platform_settings import KafkaSettings
from node_manager.store import StoreUnavailableError
from node_manager.views import render_time

if TYPE_CHECKING:
    from kafka import KafkaConsumer
    from kafka.consumer.fetcher import ConsumerRecord

_POLL_MILLISECONDS = 500
_RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0)
_STOP_SECONDS = 10.0
# What it stumbled over twice more will not be understood the next time either.
_ATTEMPTS = 3


class Handles(Protocol):
    """What commands are carried out by."""

    def handle(self, headers: Sequence[tuple[str, bytes]], value: bytes | None) -> DeadLetter | None:
        """Carry out one message; see commands.Commands."""


class _Unreadable(NamedTuple):
    """A message of which only is known where it is."""

    topic: str
    partition: int
    offset: int
    key: bytes | None = None
    value: bytes | None = None
    headers: Sequence[tuple[str, bytes]] = ()


class CommandConsumer:
    """One member of the group that takes commands."""

    def __init__(
        self,
        settings: KafkaSettings,
        commands: Commands | Handles,
        open_consumer: Callable[[], KafkaConsumer],
        connect: Callable[[], Publishes],
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._commands = commands
        self._open = open_consumer
        self._connect = connect
        self._clock = clock
        self._log = structlog.get_logger()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._dead_letters: Publishes | None = None
        # By partition: what it stumbled over last, and how often in a row.
        self._stumbled: dict[tuple[str, int], tuple[object, int]] = {}

    def start(self) -> None:
        """Begin; Kafka need not answer."""
        self._thread = threading.Thread(target=self._run, name="commands", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the command that is under way, and leave the group."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        failures = 0
        while not self._stopped.is_set():
            consumer = None
            try:
                consumer = self._open()
                while not self._stopped.is_set():
                    self._take(consumer)
                    failures = 0
            except Exception as error:  # whatever the library meets, commands are to be taken again
                if failures == 0:
                    self._tell(error)
                self._stopped.wait(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
                failures += 1
            finally:
                self._close(consumer)

    def _take(self, consumer: Any) -> None:
        """Handle what has come, and say so to the group."""
        from kafka import OffsetAndMetadata  # noqa: PLC0415

        try:
            polled = poll(consumer, _POLL_MILLISECONDS)
        except UnreadableError as error:
            self._pass_by(consumer, error)
            return
        for partition, records in polled.items():
            for record in records:
                if self._stopped.is_set():
                    return
                if not self._handled(record):
                    # All that follows in the partition waits with it.
                    consumer.seek(partition, record.offset)
                    self._stopped.wait(_RETRY_SECONDS[0])
                    break
                consumer.commit({partition: OffsetAndMetadata(record.offset + 1, "", -1)})

    def _handled(self, record: ConsumerRecord) -> bool:
        """Handle one message; False if it is to be tried again."""
        try:
            letter = self._commands.handle(record.headers, record.value)
        except StoreUnavailableError as error:
            self._log.warning("a command waits, the store does not answer", offset=record.offset, reason=str(error))
            return False
        except Exception as error:
            times = self._count_stumble(record.topic, record.partition, record.offset)
            self._log.exception("a command could not be handled", offset=record.offset, attempt=times)
            if times < _ATTEMPTS:
                return False
            letter = DeadLetter("internal_error", _words(error))
        return letter is None or self._put_aside(record, letter)

    def _pass_by(self, consumer: Any, error: UnreadableError) -> None:
        """Go on behind a message that can't be read, once that was tried often enough and it is a dead letter.

        Errors: UnreadableError if it is to be tried again.
        """
        from kafka import OffsetAndMetadata  # noqa: PLC0415

        # What is behind it in its batch fails in the same words: that is not tried anew each time.
        times = self._count_stumble(error.partition.topic, error.partition.partition, str(error))
        if not error.corrupt or times < _ATTEMPTS:
            raise error
        record = _Unreadable(error.partition.topic, error.partition.partition, error.offset)
        if not self._put_aside(record, DeadLetter("unreadable", str(error))):
            raise error
        consumer.seek(error.partition, error.offset + 1)
        consumer.commit({error.partition: OffsetAndMetadata(error.offset + 1, "", -1)})
        self._log.error("a message can't be read, it is passed by", **_place(error), reason=str(error))

    def _tell(self, error: Exception) -> None:
        """Say why commands wait."""
        if is_of_the_link(error):
            self._log.warning("commands wait, Kafka can't be reached", reason=_words(error))
        elif isinstance(error, UnreadableError):
            self._log.error("commands wait, a message can't be read", **_place(error), reason=str(error))
        else:
            self._log.warning("taking commands stumbled and begins anew", reason=_words(error))

    def _count_stumble(self, topic: str, partition: int, over: object) -> int:
        known, times = self._stumbled.get((topic, partition), (None, 0))
        times = times + 1 if known == over else 1
        self._stumbled[topic, partition] = (over, times)
        return times

    def _put_aside(self, record: ConsumerRecord | _Unreadable, letter: DeadLetter) -> bool:
        """Make a message a dead letter; False if that is to be tried again."""
        told = {
            "dlq_code": letter.code,
            "dlq_reason": letter.reason,
            "dlq_topic": record.topic,
            "dlq_partition": str(record.partition),
            "dlq_offset": str(record.offset),
            "dlq_at": render_time(self._clock()) or "",
        }
        why = [(name, text.encode()) for name, text in told.items()]
        headers = [(name, value or b"") for name, value in record.headers]
        topic = topic_name(self._settings, Topic.DEAD_LETTERS)
        whole = Message(topic, record.key or b"", record.value, headers + why)
        try:
            if self._dead_letters is None:
                self._dead_letters = self._connect()
            # With its headers it is larger than it was: what it said may be lost, that it was there should not.
            for message in (whole, whole._replace(value=b""), Message(topic, b"", b"", why)):
                if not self._dead_letters.publish([message], lambda: not self._stopped.is_set()):
                    self._log.warning("a message on the topic of commands is a dead letter", **told)
                    return True
        except LinkError as error:
            self._log.warning("a dead letter waits", offset=record.offset, reason=str(error))
            self._give_up_dead_letters()
            return False
        self._log.error("a dead letter is lost, Kafka does not take it", **told)
        return True

    def _close(self, consumer: Any) -> None:
        self._give_up_dead_letters()
        if consumer is not None:
            try:
                consumer.close()
            except Exception as error:
                self._log.debug("the group was not left cleanly", reason=_words(error))

    def _give_up_dead_letters(self) -> None:
        publisher, self._dead_letters = self._dead_letters, None
        if publisher is not None:
            publisher.close()


def _place(error: UnreadableError) -> dict[str, Any]:
    return {"topic": error.partition.topic, "partition": error.partition.partition, "offset": error.offset}


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
