# SPDX-License-Identifier: GPL-3.0-or-later
"""What the parts tell, as metrics."""

from __future__ import annotations

import inspect
from itertools import product

import pytest
from node_manager.domain import JobAction, JobState
from node_manager.metric_timings import MetricTimings
from node_manager.timings import NO_TIMINGS, CommandOutcome, Timings
from prometheus_client import CollectorRegistry

TOLD = [name for name in vars(Timings) if not name.startswith("_")]
VALUES = {
    "action": JobAction.CHECK,
    "state": JobState.SUCCEEDED,
    "outcome": CommandOutcome.DONE,
    "up": True,
    **dict.fromkeys(("seconds", "events", "recorded", "late", "rejected"), 3),
}


def tell(timings: Timings, name: str) -> None:
    """Tell something."""
    method = getattr(timings, name)
    method(**{parameter: VALUES[parameter] for parameter in inspect.signature(method).parameters})


def samples(registry: CollectorRegistry) -> dict[tuple[str, tuple[str, ...]], float]:
    """Give all samples by name and label values, but for when they began."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


@pytest.mark.parametrize("name", TOLD)
def test_all_that_is_told_is_kept(name: str) -> None:
    registry = CollectorRegistry()
    timings = MetricTimings(registry, kafka=True)
    before = samples(registry)

    tell(timings, name)

    assert samples(registry) != before


@pytest.mark.parametrize("name", TOLD)
def test_no_timings_hear_all_and_make_nothing_of_it(name: str) -> None:
    tell(NO_TIMINGS, name)


def test_without_kafka_nothing_is_said_of_it() -> None:
    registry = CollectorRegistry()
    timings = MetricTimings(registry, kafka=False)

    for name in TOLD:
        tell(timings, name)

    named = {name for name, _ in samples(registry)}
    assert [name for name in named if "kafka" in name or "relay" in name or "command" in name] == []
    assert "node_manager_selection_duration_seconds_count" in named


def test_observations_are_counted_by_what_became_of_them() -> None:
    registry = CollectorRegistry()
    timings = MetricTimings(registry, kafka=False)

    timings.count_observations(200, 1, 0)
    timings.count_observations(0, 0, 7)

    found = {labels: value for (name, labels), value in samples(registry).items() if "observations_total" in name}
    assert found == {("recorded",): 200, ("late",): 1, ("rejected",): 7}


def test_a_clock_that_was_set_back_gives_no_negative_latency() -> None:
    registry = CollectorRegistry()

    MetricTimings(registry, kafka=True).observe_relay(-5.0)

    assert samples(registry)["node_manager_relay_latency_seconds_sum", ()] == 0


def test_registries_share_nothing() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    timings = MetricTimings(first, kafka=True)
    MetricTimings(second, kafka=True)

    timings.observe_selection(0.1)

    assert samples(first)["node_manager_selection_duration_seconds_count", ()] == 1
    assert samples(second)["node_manager_selection_duration_seconds_count", ()] == 0


def test_the_number_of_series_is_bounded_whatever_is_told() -> None:
    registry = CollectorRegistry()
    timings = MetricTimings(registry, kafka=True)

    for action, state in product(JobAction, JobState):
        timings.observe_job(action, state, 1e9)
    for name in TOLD * 100:
        tell(timings, name)

    assert len(samples(registry)) < 600
