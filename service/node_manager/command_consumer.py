# SPDX-License-Identifier: GPL-3.0-or-later
"""Take commands from Kafka, one after the other, and put aside what can't be understood.

A message counts as taken when it was handled, or is a dead letter that Kafka has; what ends this thread before that, another
manager of the group finds it again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from node_manager.commands import Commands, DeadLetter
from node_manager.kafka_link import LinkError, Message, Topic, topic_name
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
        self._stumbled: tuple[object, int] = (None, 0)

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
                    self._log.warning("commands wait, Kafka can't be reached", reason=_words(error))
                self._stopped.wait(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])
                failures += 1
            finally:
                self._close(consumer)

    def _take(self, consumer: Any) -> None:
        """Handle what has come, and say so to the group."""
        from kafka import OffsetAndMetadata  # noqa: PLC0415

        for partition, records in consumer.poll(timeout_ms=_POLL_MILLISECONDS).items():
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
        where = (record.partition, record.offset)
        try:
            letter = self._commands.handle(record.headers, record.value)
        except StoreUnavailableError as error:
            self._log.warning("a command waits, the store does not answer", offset=record.offset, reason=str(error))
            return False
        except Exception as error:
            known, times = self._stumbled
            times = times + 1 if known == where else 1
            self._stumbled = (where, times)
            self._log.exception("a command could not be handled", offset=record.offset, attempt=times)
            if times < _ATTEMPTS:
                return False
            letter = DeadLetter("internal_error", _words(error))
        if letter is not None:
            try:
                self._put_aside(record, letter)
            except LinkError as error:
                self._log.warning("a dead letter waits", offset=record.offset, reason=str(error))
                self._give_up_dead_letters()
                return False
        return True

    def _put_aside(self, record: ConsumerRecord, letter: DeadLetter) -> None:
        told = {
            "dlq_code": letter.code,
            "dlq_reason": letter.reason,
            "dlq_topic": record.topic,
            "dlq_partition": str(record.partition),
            "dlq_offset": str(record.offset),
            "dlq_at": render_time(self._clock()) or "",
        }
        headers = [(name, value or b"") for name, value in record.headers]
        headers += [(name, text.encode()) for name, text in told.items()]
        topic = topic_name(self._settings, Topic.DEAD_LETTERS)
        message = Message(topic, record.key or b"", record.value, headers)
        if self._dead_letters is None:
            self._dead_letters = self._connect()
        refused = self._dead_letters.publish([message], lambda: not self._stopped.is_set())
        if refused:
            # With its headers it is larger than it was: what it said is lost, that it was there is not.
            self._dead_letters.publish([message._replace(value=b"")], lambda: not self._stopped.is_set())
        self._log.warning("a message on the topic of commands is a dead letter", **told)

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


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
