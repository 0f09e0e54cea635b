# SPDX-License-Identifier: GPL-3.0-or-later
"""The manager's side of Kafka: the relay of events and the consumer of commands, started and ended together.

Without brokers in the configuration nothing of it runs. What it is made of: outbox_relay, command_consumer, kafka_link.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from datetime import datetime

import structlog

from node_manager.command_consumer import CommandConsumer
from node_manager.commands import Commands
from node_manager.kafka_link import LinkError, Publisher, create_topics, open_consumer
from node_manager.node_registry import Clock, NodeRegistry
from node_manager.outbox_relay import OutboxRelay, RelayStatus
from node_manager.settings import Settings
from node_manager.shapes import Sample
from node_manager.state_feed import StateFeed
from node_manager.store import Store
from node_manager.timings import NO_TIMINGS, Timings


class KafkaHandler:
    """Events to Kafka and commands from it."""

    def __init__(
        self,
        store: Store,
        settings: Settings,
        registry: NodeRegistry,
        commands: Commands,
        leads: Callable[[], bool],
        clock: Clock,
        timings: Timings = NO_TIMINGS,
    ) -> None:
        self._settings = settings.configuration.kafka
        self._log = structlog.get_logger()
        self._topics_lock = threading.Lock()
        self._topics_made = False
        feed = StateFeed(store, settings, registry, clock)
        self._relay = OutboxRelay(store, self._settings, feed, self._connect, leads, clock, timings)
        self._consumer = CommandConsumer(self._settings, commands, self._join_group, self._connect, clock)

    @property
    def status(self) -> RelayStatus:
        """Tell how it stands with the relay."""
        return self._relay.status

    def start(self) -> None:
        """Begin, where brokers are configured."""
        if not self._settings.enabled:
            return
        self._relay.start()
        if self._settings.commands:
            self._consumer.start()

    def stop(self) -> None:
        """End both."""
        self._consumer.stop()
        self._relay.stop()

    def offer_samples(self, found: Iterable[tuple[str, datetime, str, Sample]]) -> None:
        """Take samples to be told of: (node_id, observed_at, source, sample) each."""
        if self._settings.enabled:
            self._relay.offer_samples(found)

    def _connect(self) -> Publisher:
        self._make_topics()
        return Publisher(self._settings)

    def _join_group(self) -> object:
        self._make_topics()
        return open_consumer(self._settings)

    def _make_topics(self) -> None:
        """Create what is missing, once; who may not create topics finds them made, or hears of it when they are used."""
        with self._topics_lock:
            if self._topics_made or not self._settings.create_topics:
                return
            try:
                created = create_topics(self._settings)
            except LinkError as error:
                self._log.warning("topics can't be looked at or created", reason=str(error))
                return
            self._topics_made = True
            if created:
                self._log.info("topics were created", topics=created)
