# SPDX-License-Identifier: GPL-3.0-or-later
"""Carry what happened from the store to Kafka: the events of the outbox, the states of nodes, samples of their use.

One thread, in the manager that leads. An event counts as relayed when all in-sync replicas have it; the position is saved after
that, so that whatever ends this thread, the next one repeats some events and misses none.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Protocol

import structlog

from node_manager import outbox
from node_manager.cloud_events import CONTENT_TYPE, SPEC_VERSION, attributes, data_schema
from node_manager.event_contracts import RESOURCES_SAMPLED, STATE_SNAPSHOT
from node_manager.ids import ordered_ids
from node_manager.kafka_link import LinkError, Message, Topic, topic_name
from node_manager.node_registry import Clock
from node_manager.outbox import OutboxReader, StoredEvent
from node_manager.platform_settings import KafkaSettings
from node_manager.samples import summarise
from node_manager.shapes import Sample
from node_manager.state_feed import Snapshot, StateFeed
from node_manager.store import Store, StoreUnavailableError
from node_manager.timings import NO_TIMINGS, Timings
from node_manager.views import render_time

BATCH = 500

_IDLE_SECONDS = 0.1
_LEAD_SECONDS = 1.0
_SAVE_SECONDS = 1.0
_WATCH_SECONDS = 1.0
_LOOK_SECONDS = 1.0
_RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0)
_STOP_SECONDS = 10.0
_MAX_SAMPLES = 20_000
_COMPLAIN_SECONDS = 60.0


class Publishes(Protocol):
    """What messages go out by."""

    def publish(self, messages: Sequence[Message], goes_on: Callable[[], bool]) -> list[int]:
        """Publish all in their order; see kafka_link.Publisher."""

    def close(self) -> None:
        """End."""


@dataclass
class RelayStatus:
    """How it stands, for whoever watches the manager."""

    connected: bool = False
    # Events that Kafka has not got yet, and when the oldest of them happened.
    pending: int = 0
    oldest_pending_at: datetime | None = None
    alarm: bool = False
    relayed: int = 0
    last_error: str | None = None


class OutboxRelay:
    """The way from the store to Kafka."""

    def __init__(
        self,
        store: Store,
        settings: KafkaSettings,
        feed: StateFeed,
        connect: Callable[[], Publishes],
        leads: Callable[[], bool],
        clock: Clock,
        timings: Timings = NO_TIMINGS,
    ) -> None:
        self._store = store
        self._settings = settings
        self._feed = feed
        self._connect = connect
        self._leads = leads
        self._clock = clock
        self._timings = timings
        self._log = structlog.get_logger()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._reader: OutboxReader | None = None
        self._publisher: Publishes | None = None
        self._saved_position = 0
        self._samples: deque[Message] = deque()
        self._sampled_at: dict[str, datetime] = {}
        self._due: dict[str, float] = {}
        self._failures = 0
        self.status = RelayStatus()

    def start(self) -> None:
        """Begin; Kafka need not answer."""
        self._thread = threading.Thread(target=self._run, name="outbox-relay", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after what is under way, and save how far it got."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(_STOP_SECONDS)

    def offer_samples(self, found: Iterable[tuple[str, datetime, str, Sample]]) -> None:
        """Take samples to be told of: of a node no more than one in an interval, while there is a link, and only the newest."""
        interval = self._settings.resources_interval_seconds
        if interval == 0 or not self.status.connected:
            return
        for node_id, at, source, sample in found:
            last = self._sampled_at.get(node_id)
            if last is not None and 0 <= (at - last).total_seconds() < interval:
                continue
            if len(self._sampled_at) > _MAX_SAMPLES and last is None:
                self._sampled_at.clear()
            self._sampled_at[node_id] = at
            if len(self._samples) >= _MAX_SAMPLES:
                self._samples.popleft()
            self._samples.append(self._of_sample(node_id, at, source, sample))

    def _run(self) -> None:
        while not self._stopped.is_set():
            pause = _IDLE_SECONDS
            try:
                if self._leads():
                    if self._turn():
                        pause = 0.0
                    self._failures = 0
                    self._watch()
                else:
                    self._give_up_link()
                    self.status = RelayStatus(relayed=self.status.relayed)
                    pause = _LEAD_SECONDS
            except (LinkError, StoreUnavailableError) as error:
                pause = self._failed(error)
            except Exception as error:
                self._log.exception("the relay stumbled and begins anew")
                pause = self._failed(error)
            if pause:
                self._stopped.wait(pause)
        self._end()

    def _turn(self) -> bool:
        """Relay a batch; tell whether more waits."""
        if self._publisher is None:
            self._publisher = self._connect()
            self._saved_position = outbox.load_position(self._store, outbox.KAFKA)
            self._reader = OutboxReader(self._store, self._saved_position)
            self._feed.begin_anew()
            self._due.clear()
            # Those that waited when the link was lost.
            self._samples.clear()
            self._sampled_at.clear()
            self.status.connected = True
            self.status.last_error = None
            self._timings.set_kafka_up(True)
            self._log.info("events go to Kafka", position=self._saved_position)
        assert self._reader is not None
        events = self._reader.read(BATCH)
        if self._is_due("look", _LOOK_SECONDS):
            self._feed.look()
        snapshots = self._feed.take(BATCH)
        samples = [self._samples.popleft() for _ in range(min(BATCH, len(self._samples)))]
        messages = [self._of_event(event) for event in events]
        messages += [self._of_snapshot(snapshot) for snapshot in snapshots]
        messages += samples
        if messages:
            refused = set(self._publisher.publish(messages, self._goes_on))
            for number in sorted(refused):
                self._too_large(messages[number], is_event=number < len(events))
            taken = [event for number, event in enumerate(events) if number not in refused]
            now = self._clock()
            for event in taken:
                self._timings.observe_relay(max(0.0, (now - event.occurred_at).total_seconds()))
            self._timings.count_relayed(len(taken))
            self.status.relayed += len(taken)
        if self._is_due("save", _SAVE_SECONDS):
            self._save()
        return len(events) == BATCH or self._feed.waits or len(samples) == BATCH

    def _goes_on(self) -> bool:
        """Tell whether to wait on for Kafka, which takes its time."""
        self._watch()
        return not self._stopped.is_set() and self._leads()

    def _save(self) -> None:
        if self._reader is None or self._reader.position == self._saved_position:
            return
        position = self._reader.position
        with self._store.write() as connection:
            outbox.save_position(connection, outbox.KAFKA, position, self._clock())
        self._saved_position = position

    def _too_large(self, message: Message, *, is_event: bool) -> None:
        headers = {name: value.decode() for name, value in message.headers}
        self._log.error(
            "Kafka does not take a message of this size, it is given up",
            topic=message.topic,
            event_id=headers["ce_id"],
            type=headers["ce_type"],
            node_id=headers["ce_subject"],
            bytes=len(message.value or b""),
        )
        if is_event:
            self._timings.count_dropped(1)

    # how it stands

    def _watch(self) -> None:
        """Once a second, also while Kafka doesn't answer: how much waits, and whether it is too much."""
        if not self._is_due("watch", _WATCH_SECONDS):
            return
        position = self._reader.position if self._reader is not None else self._saved_position
        pending, oldest_at = outbox.backlog(self._store, position)
        if pending > self._settings.max_pending_events:
            self._give_up_oldest(pending - self._settings.max_pending_events)
            pending = self._settings.max_pending_events
        self.status.pending, self.status.oldest_pending_at = pending, oldest_at
        if not self.status.alarm and pending >= self._settings.alarm_pending_events:
            self.status.alarm = True
            self._log.error("many events wait for Kafka", pending=pending, most=self._settings.max_pending_events)
        elif self.status.alarm and pending < self._settings.alarm_pending_events / 2:
            self.status.alarm = False
            self._log.info("Kafka has caught up", pending=pending)

    def _give_up_oldest(self, count: int) -> None:
        position = self._reader.position if self._reader is not None else self._saved_position
        dropped, position = outbox.drop_oldest(self._store, position, count, self._clock())
        self._timings.count_dropped(dropped)
        self._saved_position = position
        self._log.error(
            "events were given up, more than kafka.max_pending_events waited", events=dropped, position=position
        )
        # It must not save the position of before.
        if self._reader is not None:
            self._reader = OutboxReader(self._store, max(position, self._reader.position))

    def _failed(self, error: Exception) -> float:
        self._give_up_link()
        words = str(error) or type(error).__name__
        if self._failures == 0 or self._is_due("complain", _COMPLAIN_SECONDS):
            self._due["complain"] = time.monotonic() + _COMPLAIN_SECONDS
            self._log.warning("events wait, Kafka can't be reached", reason=words, pending=self.status.pending)
        self.status.last_error = words
        pause = _RETRY_SECONDS[min(self._failures, len(_RETRY_SECONDS) - 1)]
        self._failures += 1
        try:
            self._watch()
        except StoreUnavailableError as unavailable:
            self.status.last_error = str(unavailable)
        return pause

    def _give_up_link(self) -> None:
        publisher, self._publisher, self._reader = self._publisher, None, None
        self.status.connected = False
        self._timings.set_kafka_up(False)
        if publisher is not None:
            publisher.close()

    def _end(self) -> None:
        try:
            if self._publisher is not None:
                self._save()
        except StoreUnavailableError as error:
            self._log.warning("how far events were relayed was not saved, some will be repeated", reason=str(error))
        self._give_up_link()

    def _is_due(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + seconds
        return True

    # how it looks

    def _of_event(self, event: StoredEvent) -> Message:
        found = attributes(event, self._settings.source)
        return self._message(event.topic, found, event.data)

    def _of_snapshot(self, snapshot: Snapshot) -> Message:
        found = self._attributes(STATE_SNAPSHOT, snapshot.node_id, self._clock())
        message = self._message(Topic.STATE, found, None)
        return message._replace(value=snapshot.document)

    def _of_sample(self, node_id: str, at: datetime, source: str, sample: Sample) -> Message:
        data = {"observed_at": render_time(at), "source": source, **asdict(summarise(sample))}
        return self._message(Topic.RESOURCES, self._attributes(RESOURCES_SAMPLED, node_id, at), data)

    def _attributes(self, event_type: str, node_id: str, at: datetime) -> dict[str, str]:
        return {
            "specversion": SPEC_VERSION,
            "id": next(iter(ordered_ids(1))),
            "source": self._settings.source,
            "type": event_type,
            "subject": node_id,
            "time": render_time(at) or "",
            "dataschema": data_schema(event_type),
            "datacontenttype": CONTENT_TYPE,
            "partitionkey": node_id,
        }

    def _message(self, topic: str, found: dict[str, str], data: dict[str, Any] | None) -> Message:
        # CloudEvents' binding for Kafka, binary mode: the content type is a header of its own.
        headers = [(f"ce_{name}", value.encode()) for name, value in found.items() if name != "datacontenttype"]
        headers.append(("content-type", CONTENT_TYPE.encode()))
        value = None if data is None else json.dumps(data, separators=(",", ":")).encode()
        return Message(topic_name(self._settings, topic), found["subject"].encode(), value, headers)
