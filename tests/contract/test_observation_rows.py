# SPDX-License-Identifier: GPL-3.0-or-later
"""What is read of a batch's nodes before anything is folded into them, on either engine."""

from __future__ import annotations

from builders import START, FakeClock, make_declaration, make_report, make_sample, observe, seconds
from node_manager.domain import Health, ObservationKind
from node_manager.node_registry import NodeRegistry
from node_manager.node_states import transitions_of
from node_manager.observation_rows import load
from node_manager.observations import ObservationLog
from node_manager.settings import HealthSettings
from node_manager.store import Store

LIMITS = HealthSettings.model_validate({})
SAMPLES = {ObservationKind.SAMPLE}


def test_load_leaves_out_what_is_not_there(store: Store, registry: NodeRegistry) -> None:
    registry.register(make_declaration())

    with store.write() as connection:
        works = load(connection, ["gw-7", "nobody"], SAMPLES, START, LIMITS)

    assert list(works) == ["gw-7"]
    assert (works["gw-7"].newest, works["gw-7"].stored, works["gw-7"].settled) == ({}, set(), False)


def test_load_knows_a_row_from_the_future_and_not_its_time(
    store: Store, registry: NodeRegistry, log: ObservationLog, clock: FakeClock
) -> None:
    registry.register(make_declaration())
    log.record([observe("sample", make_sample(), START)])

    with store.write() as connection:
        (work,) = load(connection, ["gw-7"], SAMPLES, START - seconds(10), LIMITS).values()

    assert (work.newest, work.stored) == ({}, SAMPLES)
    assert work.state.last_contact_at == START - seconds(10)


def test_transitions_of_gives_the_newest_first(store: Store, registry: NodeRegistry, log: ObservationLog) -> None:
    registry.register(make_declaration())
    for number, checks in enumerate([(), (("critical", "failed"),), ()]):
        log.record([observe("report", make_report(*checks), START + seconds(number - 10))])

    with store.read() as connection:
        found = transitions_of(connection, "gw-7", 2)

    assert [(item.before, item.after) for item in found] == [
        (Health.DEGRADED, Health.HEALTHY),
        (Health.HEALTHY, Health.DEGRADED),
    ]
