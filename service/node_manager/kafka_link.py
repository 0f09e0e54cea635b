# SPDX-License-Identifier: GPL-3.0-or-later
"""The link to Kafka: the topics, a publisher that says what has arrived, a consumer of commands.

The only file that imports the Kafka library, and only when a link is opened. Knows nothing of the store.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from node_manager.events import EventType
from node_manager.platform_settings import KafkaSettings

if TYPE_CHECKING:
    from kafka import KafkaConsumer, TopicPartition
    from kafka.consumer.fetcher import ConsumerRecord

_VERSION = "v1"
_CONNECT_SECONDS = 3
_METADATA_SECONDS = 5
_FLUSH_SECONDS = 0.5
# Without it a producer that lost its way (they do, now and then) would wait for ever.
_STUCK_SECONDS = 60.0
# The library gives up a message after a time, and then sends those behind it: that would be another order.
_NEVER_MILLISECONDS = 2**31 - 1
_CLOSE_SECONDS = 3.0
_LINGER_MILLISECONDS = 5
_MAX_MESSAGE_BYTES = 1_000_000
_WEEK_MILLISECONDS = 7 * 24 * 3600 * 1000


class Topic(StrEnum):
    """The topics beside those of the outbox's events, without prefix and version."""

    STATE = "node.state"
    RESOURCES = "node.resources"
    COMMANDS = "commands"
    DEAD_LETTERS = "commands.dead-letter"


class Message(NamedTuple):
    """One message to be published; without a value it deletes what its key stands for."""

    topic: str
    key: bytes
    value: bytes | None
    headers: list[tuple[str, bytes]]


class LinkError(Exception):
    """Kafka can't be reached or doesn't take what it is given; a retry on a new link may succeed."""


class UnreadableError(Exception):
    """The library can't read what is in a partition at an offset; those behind it can't be read before it is passed."""

    def __init__(self, partition: TopicPartition, offset: int, reason: str, *, corrupt: bool) -> None:
        super().__init__(reason)
        self.partition = partition
        self.offset = offset
        # True: it is broken for everybody, or for this library; False: it lacks something to read it with.
        self.corrupt = corrupt


def topic_name(settings: KafkaSettings, topic: str) -> str:
    """Give the full name of a topic."""
    return f"{settings.topic_prefix}.{topic}.{_VERSION}"


def topic_configurations(settings: KafkaSettings) -> dict[str, dict[str, str]]:
    """Give all topics by their full names, with what they are configured to."""
    plain = {"cleanup.policy": "delete", "retention.ms": str(_WEEK_MILLISECONDS)}
    found = {topic_name(settings, event.topic): plain for event in EventType}
    found |= {topic_name(settings, topic): plain for topic in Topic}
    found[topic_name(settings, Topic.STATE)] = {"cleanup.policy": "compact"}
    return found


class Publisher:
    """Publishes messages in their order; for one thread."""

    def __init__(self, settings: KafkaSettings) -> None:
        """Connect.

        Errors: LinkError.
        """
        from kafka import KafkaProducer  # noqa: PLC0415  # 0.1 s, which who has no Kafka needn't pay

        self._log = structlog.get_logger()
        with _Translated():
            self._producer = KafkaProducer(
                **_options(settings),
                acks="all",
                # One request at a time for each broker: a later one can't overtake one that has to be repeated.
                max_in_flight_requests_per_connection=1,
                delivery_timeout_ms=_NEVER_MILLISECONDS,
                max_block_ms=_METADATA_SECONDS * 1000,
                request_timeout_ms=10_000,
                reconnect_backoff_max_ms=2000,
                linger_ms=_LINGER_MILLISECONDS,
                batch_size=128 * 1024,
                compression_type="gzip",
                max_request_size=_MAX_MESSAGE_BYTES,
                allow_auto_create_topics=False,
                metrics_enabled=False,
            )

    def publish(self, messages: Sequence[Message], goes_on: Callable[[], bool]) -> list[int]:
        """Publish all and wait until all in-sync replicas have them; give the numbers of those too large to be taken.

        Shapes: *goes_on* is asked while it takes time.
        Errors: LinkError; some may have arrived then, in their order. The publisher is of no use any more.
        """
        from kafka import errors  # noqa: PLC0415

        futures = [self._send(message, goes_on) for message in messages]
        waited = 0.0
        while True:
            try:
                self._producer.flush(timeout=_FLUSH_SECONDS)
                break
            except errors.KafkaTimeoutError:
                waited += _FLUSH_SECONDS
                if not goes_on():
                    raise LinkError("ended before Kafka had answered") from None
                if waited >= _STUCK_SECONDS:
                    raise LinkError(f"no answer from Kafka in {waited:.0f} s") from None
        refused = []
        for number, future in enumerate(futures):
            if future is None or isinstance(
                future.exception, errors.RecordListTooLargeError | errors.MessageSizeTooLargeError
            ):
                refused.append(number)
            elif future.failed():
                raise LinkError(_words(future.exception))
        return refused

    def close(self) -> None:
        """Give up what has not arrived and end."""
        from kafka import errors  # noqa: PLC0415

        try:
            self._producer.close(timeout=0.1)
        except errors.KafkaTimeoutError:
            # It stops at what can't be flushed, and would leave its thread to go on sending.
            self._producer._sender.force_close()
            self._producer._sender.join(_CLOSE_SECONDS)
        except errors.KafkaError as error:
            self._log.debug("the link to Kafka was not closed cleanly", reason=_words(error))

    def _send(self, message: Message, goes_on: Callable[[], bool]) -> Any:
        """Hand a message to the library; None if it is too large."""
        from kafka import errors  # noqa: PLC0415

        topic, key, value, headers = message
        for _ in range(max(1, int(_STUCK_SECONDS / _METADATA_SECONDS))):
            try:
                return self._producer.send(topic, key=key, value=value, headers=headers)
            except errors.MessageSizeTooLargeError:
                return None
            except errors.KafkaTimeoutError as error:
                # It doesn't know where the topic is, and can't ask.
                if not goes_on():
                    raise LinkError(_words(error)) from None
            except (errors.KafkaError, ValueError) as error:
                raise LinkError(f"{topic}: {_words(error)}") from error
        raise LinkError(f"nothing is known of topic {topic} after {_STUCK_SECONDS:.0f} s; is it there?")


def create_topics(settings: KafkaSettings) -> list[str]:
    """Create the topics that are missing and give their names.

    Errors: LinkError.
    """
    from kafka import KafkaAdminClient  # noqa: PLC0415
    from kafka.admin import NewTopic  # noqa: PLC0415
    from kafka.errors import TopicAlreadyExistsError  # noqa: PLC0415

    with _Translated():
        admin = KafkaAdminClient(**_options(settings), request_timeout_ms=10_000)
        try:
            there = set(admin.list_topics())
            missing = {name: found for name, found in topic_configurations(settings).items() if name not in there}
            for name, configuration in missing.items():
                topic = NewTopic(name, settings.partitions, settings.replication_factor, topic_configs=configuration)
                try:
                    admin.create_topics([topic])
                except TopicAlreadyExistsError:
                    # Another manager, at the same time.
                    continue
            return sorted(missing)
        finally:
            admin.close()


def open_consumer(settings: KafkaSettings) -> KafkaConsumer:
    """Join the group that takes commands; offsets are committed by the caller.

    Errors: LinkError.
    """
    from kafka import KafkaConsumer  # noqa: PLC0415

    with _Translated():
        consumer = KafkaConsumer(
            **_options(settings),
            group_id=settings.group_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            max_poll_records=50,
            # A manager that was killed is missed after this, and others take its commands.
            session_timeout_ms=10_000,
            heartbeat_interval_ms=3000,
            metrics_enabled=False,
        )
        consumer.subscribe([topic_name(settings, Topic.COMMANDS)])
        return consumer


def poll(consumer: KafkaConsumer, milliseconds: int) -> dict[TopicPartition, list[ConsumerRecord]]:
    """Give what has come, by partition.

    Errors: UnreadableError; the consumer must be closed then, or sought past it. The library's own.
    """
    from kafka import errors  # noqa: PLC0415

    try:
        found: dict[TopicPartition, list[ConsumerRecord]] = consumer.poll(timeout_ms=milliseconds)
    except (errors.CorruptRecordError, errors.UnsupportedCodecError) as error:
        # kafka-python 3.0.12 doesn't say where it is. False: it was at nothing that it had got, but at a broker's answer.
        reading = consumer._fetcher._next_partition_records
        offset = consumer.position(reading.topic_partition, timeout_ms=milliseconds) if reading else None
        if offset is None:
            raise
        corrupt = isinstance(error, errors.CorruptRecordError)
        raise UnreadableError(reading.topic_partition, offset, _words(error), corrupt=corrupt) from error
    return found


def is_of_the_link(error: BaseException) -> bool:
    """Tell whether an error means that Kafka can't be reached."""
    from kafka import errors  # noqa: PLC0415

    return isinstance(
        error,
        LinkError
        | OSError
        | errors.KafkaConnectionError
        | errors.KafkaTimeoutError
        | errors.NetworkExceptionError
        | errors.NodeNotReadyError,
    )


class _Translated:
    """Turns the library's errors into LinkError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from kafka.errors import KafkaError  # noqa: PLC0415

        if isinstance(error, KafkaError | OSError | ValueError):
            raise LinkError(_words(error)) from error


def _knock(settings: KafkaSettings) -> None:
    """See whether any broker takes a connection: where none does, the library would leave its sockets behind at each try.

    Errors: OSError.
    """
    failure: OSError | None = None
    for broker in settings.bootstrap_servers:
        host, _, port = broker.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            failure = OSError(f"{broker}: {error.strerror or error}")
        else:
            return
    raise failure or OSError("no broker is configured")


def _options(settings: KafkaSettings) -> dict[str, Any]:
    """Give what all clients are opened with, once a broker is there.

    Errors: OSError if none is, or the password can't be read.
    """
    _knock(settings)
    options: dict[str, Any] = {
        "bootstrap_servers": list(settings.bootstrap_servers),
        "client_id": "node-manager",
        "security_protocol": settings.security_protocol,
        "bootstrap_timeout_ms": _CONNECT_SECONDS * 1000,
    }
    for option, file in (
        ("ssl_cafile", settings.ca_file),
        ("ssl_certfile", settings.certificate_file),
        ("ssl_keyfile", settings.key_file),
    ):
        if file is not None:
            options[option] = str(file.expanduser())
    if settings.security_protocol.startswith("SASL") and settings.sasl_password_file is not None:
        options |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.sasl_username,
            "sasl_plain_password": settings.sasl_password_file.expanduser().read_text("utf-8").strip(),
        }
    return options


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]
