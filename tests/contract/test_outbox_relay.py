# SPDX-License-Identifier: GPL-3.0-or-later
"""The relay and the feed of states: what is published, what is repeated after trouble, and that nothing is missing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
from builders import START, FakeClock, make_declaration, make_facts, make_report, make_sample, make_settings, observe
from node_manager import outbox
from node_manager.events import EventType, emit
from node_manager.kafka_link import LinkError, Message
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.outbox_relay import OutboxRelay
from node_manager.settings import Settings
from node_manager.shapes import Sample
from node_manager.state_feed import StateFeed
from node_manager.store import Store
from node_manager.timings import Timings
from node_manager.views import render_node_state

DEADLINE_SECONDS = 20.0
STATES = "node-manager.node.state.v1"


@dataclass
class Broker:
    """Takes messages, as long as it is up; forgets nothing."""

    taken: list[Message] = field(default_factory=list)
    up: bool = True
    # Breaks after so many more messages, once.
    breaks_after: int | None = None
    largest: int = 1_000_000
    links: int = 0
    # While it is cleared nothing is taken.
    ready: threading.Event = field(default_factory=threading.Event)
    asked: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.ready.set()

    def connect(self) -> Broker:
        if not self.up:
            raise LinkError("down")
        self.links += 1
        return self

    def publish(self, messages: Sequence[Message], goes_on: Callable[[], bool]) -> list[int]:
        self.asked.set()
        assert self.ready.wait(DEADLINE_SECONDS)
        refused = []
        for number, message in enumerate(messages):
            if self.breaks_after is not None:
                self.breaks_after -= 1
                if self.breaks_after < 0:
                    self.breaks_after = None
                    raise LinkError("broken")
            if not self.up:
                raise LinkError("gone")
            if len(message.value or b"") > self.largest:
                refused.append(number)
            else:
                self.taken.append(message)
        goes_on()
        return refused

    def close(self) -> None:
        pass

    def events(self) -> list[str]:
        """Give the nodes of the events taken, in order."""
        return [message.key.decode() for message in self.taken if message.topic != STATES]

    def states(self) -> dict[str, Any]:
        """Rebuild what a reader of the compacted topic has."""
        found: dict[str, Any] = {}
        for message in self.taken:
            if message.topic == STATES:
                found[message.key.decode()] = message.value
        return {node_id: json.loads(value) for node_id, value in found.items() if value is not None}


@dataclass
class Heard(Timings):
    """What the relay tells of its work."""

    relayed: int = 0
    dropped: int = 0
    latencies: int = 0

    def observe_relay(self, seconds: float) -> None:
        self.latencies += 1

    def count_relayed(self, events: int) -> None:
        self.relayed += events

    def count_dropped(self, events: int) -> None:
        self.dropped += events


@dataclass
class Site:
    """A relay that runs, and what stands around it."""

    store: Store
    settings: Settings
    clock: FakeClock
    registry: NodeRegistry
    broker: Broker = field(default_factory=Broker)
    leads: bool = True
    heard: Heard = field(default_factory=Heard)

    def relay(self) -> OutboxRelay:
        feed = StateFeed(self.store, self.settings, self.registry, self.clock)
        kafka = self.settings.configuration.kafka
        return OutboxRelay(self.store, kafka, feed, self.broker.connect, lambda: self.leads, self.clock, self.heard)

    @contextmanager
    def running(self) -> Iterator[OutboxRelay]:
        relay = self.relay()
        relay.start()
        try:
            yield relay
        finally:
            relay.stop()

    def write(self, *node_ids: str, **data: Any) -> None:
        with self.store.write() as connection:
            for node_id in node_ids:
                told = {"forced": False, "dropped_allocations": [], **data}
                emit(connection, EventType.NODE_DEREGISTERED, node_id, self.clock(), told)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let seconds be hundredths."""
    for name in ("_LOOK_SECONDS", "_WATCH_SECONDS", "_SAVE_SECONDS", "_LEAD_SECONDS", "_IDLE_SECONDS"):
        monkeypatch.setattr(f"node_manager.outbox_relay.{name}", 0.01)
    monkeypatch.setattr("node_manager.outbox_relay._RETRY_SECONDS", (0.01,))
    monkeypatch.setattr("node_manager.outbox._GAP_SECONDS", 0.05)


@pytest.fixture
def site(store: Store, clock: FakeClock, registry: NodeRegistry) -> Site:
    settings = make_settings(
        {"kafka": {"bootstrap_servers": ["127.0.0.1:9"], "alarm_pending_events": 5, "max_pending_events": 1000}}
    )
    return Site(store, settings, clock, registry)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        threading.Event().wait(0.01)


def test_relay_publishes_events_in_order(site: Site) -> None:
    site.write("a", "b")
    with site.running():
        until(lambda: site.broker.events() == ["a", "b"])
        site.write("a")
        until(lambda: site.broker.events() == ["a", "b", "a"])

    message = site.broker.taken[0]
    named = {name: value.decode() for name, value in message.headers}
    assert message.topic == "node-manager.node.lifecycle.v1"
    assert json.loads(message.value or b"") == {"forced": False, "dropped_allocations": []}
    assert named["ce_type"] == "node.lifecycle.deregistered"
    assert named["ce_source"] == "/node-manager"
    assert named["ce_subject"] == named["ce_partitionkey"] == "a"
    assert named["content-type"] == "application/json"
    assert "ce_datacontenttype" not in named


def test_relay_goes_on_where_it_ended(site: Site) -> None:
    site.write(*"abc")
    with site.running():
        until(lambda: len(site.broker.events()) == 3)
        until(lambda: outbox.load_position(site.store, outbox.KAFKA) == outbox.newest(site.store))
    site.write("d")
    with site.running():
        until(lambda: "d" in site.broker.events())

    assert site.broker.events() == ["a", "b", "c", "d"]


@pytest.mark.parametrize("after", range(1, 8))
def test_relay_repeats_what_it_is_not_sure_of(site: Site, after: int) -> None:
    names = [f"n-{number}" for number in range(8)]
    site.write(*names)
    site.broker.breaks_after = after
    with site.running():
        until(lambda: site.broker.events()[-8:] == names)

    assert list(dict.fromkeys(site.broker.events())) == names
    ids = {}
    for message in site.broker.taken:
        if message.topic != STATES:
            ids.setdefault(message.key, set()).add(dict(message.headers)["ce_id"])
    assert all(len(found) == 1 for found in ids.values())


def test_relay_waits_while_kafka_is_down(site: Site) -> None:
    site.broker.up = False
    with site.running() as relay:
        site.write(*[f"n-{number}" for number in range(6)])
        until(lambda: relay.status.pending == 6)
        until(lambda: relay.status.alarm)
        assert not relay.status.connected
        assert relay.status.last_error == "down"
        assert relay.status.oldest_pending_at == START
        site.broker.up = True
        until(lambda: len(site.broker.events()) == 6)
        until(lambda: relay.status.pending == 0 and not relay.status.alarm)


def test_relay_gives_up_the_oldest_beyond_the_bound(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    site.broker.up = False
    with site.running():
        site.write(*[f"n-{number}" for number in range(1010)])
        until(lambda: outbox.backlog(site.store, 0)[0] == 1000)
        site.broker.up = True
        until(lambda: len(site.broker.events()) == 1000)

    assert site.broker.events() == [f"n-{number}" for number in range(10, 1010)]


def test_relay_gives_up_what_kafka_never_takes(site: Site) -> None:
    site.broker.largest = 1000
    site.write("a")
    site.write("huge", dropped_allocations=["x" * 2000])
    site.write("b")
    with site.running() as relay:
        until(lambda: site.broker.events() == ["a", "b"])
        until(lambda: outbox.load_position(site.store, outbox.KAFKA) == outbox.newest(site.store))

    assert (site.heard.relayed, site.heard.latencies, relay.status.relayed) == (2, 2, 2)
    assert site.heard.dropped == 1


def test_relay_is_silent_without_the_lead(site: Site) -> None:
    site.leads = False
    site.write("a")
    with site.running() as relay:
        until(lambda: relay.status.pending == 0)
        assert site.broker.links == 0
        site.leads = True
        until(lambda: site.broker.events() == ["a"])
        site.leads = False
        until(lambda: not relay.status.connected)


def test_relay_stops_soon_while_kafka_is_down(site: Site) -> None:
    site.broker.up = False
    begun = time.monotonic()
    with site.running() as relay:
        until(lambda: relay.status.last_error is not None)

    assert time.monotonic() - begun < 5


def test_two_relays_of_one_store_lose_nothing(site: Site) -> None:
    other = Site(site.store, site.settings, site.clock, site.registry, site.broker)
    names = [f"n-{number}" for number in range(40)]
    with site.running(), other.running():
        for name in names:
            site.write(name)
        until(lambda: set(site.broker.events()) == set(names))

    assert list(dict.fromkeys(site.broker.events())) == names


# states


def see(log: ObservationLog, node_id: str, seconds: float = 0, **sample: Any) -> None:
    at = START + timedelta(seconds=seconds)
    log.record(
        [
            observe("facts", make_facts(), at, node_id),
            observe("report", make_report(), at, node_id),
            observe("sample", make_sample(**sample), at, node_id),
        ]
    )


def shown(site: Site, *node_ids: str) -> dict[str, Any]:
    nodes = site.registry.load(node_ids)
    return {name: render_node_state(node, site.settings, site.clock()) for name, node in nodes.items()}


def test_states_are_those_of_the_registry(site: Site, log: ObservationLog) -> None:
    for node_id in ("a", "b"):
        site.registry.register(make_declaration(node_id))
    see(log, "a")
    with site.running():
        until(lambda: site.broker.states() == shown(site, "a", "b"))
        site.registry.register(make_declaration("c"))
        site.registry.deregister("b")
        until(lambda: site.broker.states() == shown(site, "a", "c"))


def test_states_are_told_when_they_differ_only(site: Site, log: ObservationLog) -> None:
    site.registry.register(make_declaration("a"))
    see(log, "a")
    with site.running():
        until(lambda: site.broker.states() == shown(site, "a"))
        told = len(site.broker.taken)
        for count in range(1, 6):
            site.clock.advance(1)
            see(log, "a", count)
        site.write("end")
        until(lambda: "end" in site.broker.events())
        site.write("end again")
        until(lambda: "end again" in site.broker.events())

    assert [message.key for message in site.broker.taken[told:] if message.topic == STATES] == []


def test_states_tell_that_a_silent_node_is_no_longer_schedulable(site: Site, log: ObservationLog) -> None:
    site.registry.register(make_declaration("a"))
    see(log, "a")
    with site.running():
        until(lambda: site.broker.states().get("a", {}).get("schedulable") is True)
        site.clock.advance(1000)
        until(lambda: site.broker.states()["a"]["schedulable"] is False)


def test_states_begin_with_all_nodes_and_what_is_gone(site: Site) -> None:
    for number in range(3):
        site.registry.register(make_declaration(f"n-{number}"))
    with site.running():
        until(lambda: len(site.broker.states()) == 3)
    site.registry.deregister("n-1")
    # A topic that somebody emptied.
    site.broker.taken.clear()
    with site.running():
        until(lambda: site.broker.states() == shown(site, "n-0", "n-2"))
        until(lambda: any(message.key == b"n-1" and message.value is None for message in site.broker.taken))


# samples


def offer(relay: OutboxRelay, *node_ids: str) -> None:
    sample = Sample.model_validate(make_sample())
    relay.offer_samples([(node_id, START, "ssh", sample) for node_id in node_ids])


def hold(site: Site) -> None:
    """Have the relay wait for the broker."""
    site.broker.ready.clear()
    site.broker.asked.clear()
    site.write("held")
    assert site.broker.asked.wait(DEADLINE_SECONDS)


def test_samples_are_told_once_in_an_interval(site: Site) -> None:
    sample = Sample.model_validate(make_sample(41.5))
    times = (0, 10, 59, 60, 90, 125)
    with site.running() as relay:
        until(lambda: relay.status.connected)
        relay.offer_samples([("a", START + timedelta(seconds=at), "ssh", sample) for at in times])
        until(lambda: len(site.broker.events()) == 3)

    message = next(message for message in site.broker.taken if message.topic == "node-manager.node.resources.v1")
    data = json.loads(message.value or b"")
    assert data["cpu_percent"] == 41.5
    assert data["source"] == "ssh"
    assert data["observed_at"] == "2026-11-22T18:00:00.000000Z"


def test_samples_that_wait_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node_manager.outbox_relay._MAX_SAMPLES", 3)
    with site.running() as relay:
        until(lambda: relay.status.connected)
        hold(site)
        offer(relay, *[f"n-{number}" for number in range(9)])
        site.broker.ready.set()
        until(lambda: site.broker.events() == ["held", "n-6", "n-7", "n-8"])


def test_samples_of_an_outage_are_not_told_later(site: Site) -> None:
    with site.running() as relay:
        until(lambda: relay.status.connected)
        hold(site)
        offer(relay, "waits")
        site.broker.up = False
        site.broker.ready.set()
        until(lambda: not relay.status.connected)
        offer(relay, "waits", "meanwhile")
        site.broker.up = True
        until(lambda: relay.status.connected)
        offer(relay, "waits")
        until(lambda: len(site.broker.events()) == 2)
        site.write("end")
        until(lambda: "end" in site.broker.events())

    # Once, and that is the one of after it.
    assert site.broker.events() == ["held", "waits", "end"]


def test_samples_are_not_taken_by_one_who_does_not_lead(site: Site) -> None:
    site.leads = False
    with site.running() as relay:
        offer(relay, "standby")
        site.leads = True
        until(lambda: relay.status.connected)
        offer(relay, "leading")
        until(lambda: len(site.broker.events()) > 0)

    assert site.broker.events() == ["leading"]


def test_samples_are_not_told_where_that_is_switched_off(site: Site) -> None:
    site.settings = make_settings({"kafka": {"bootstrap_servers": ["127.0.0.1:9"], "resources_interval_seconds": 0}})
    with site.running() as relay:
        until(lambda: relay.status.connected)
        offer(relay, "a")
        site.write("end")
        until(lambda: site.broker.events() == ["end"])
