# SPDX-License-Identifier: GPL-3.0-or-later
"""Sections of the configuration guess nothing."""

from __future__ import annotations

import pytest
from node_manager.platform_settings import KafkaSettings
from node_manager.sections import Port, Section
from pydantic import ValidationError


class Listener(Section):
    """A section as the others are."""

    port: Port


@pytest.mark.parametrize("given", [{"port": "8080"}, {"port": 8080, "prot": 1}, {"port": 0}, {"port": 65536}, {}])
def test_section_refuses_what_it_does_not_know(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Listener.model_validate(given)


@pytest.mark.parametrize("broker", ["127.0.0.1:9092", "kafka.example.org:9092", "[2001:db8::1]:9092"])
def test_brokers_are_host_and_port(broker: str) -> None:
    assert KafkaSettings(bootstrap_servers=[broker]).enabled


@pytest.mark.parametrize("broker", ["kafka", "kafka:", "http://kafka:9092", "a:1,b:2", "2001:db8::1:9092", ""])
def test_brokers_that_are_none_are_refused(broker: str) -> None:
    with pytest.raises(ValidationError):
        KafkaSettings(bootstrap_servers=[broker])


@pytest.mark.parametrize(
    "given",
    [
        {"security_protocol": "SASL_SSL"},
        {"security_protocol": "SASL_SSL", "sasl_username": "me"},
        {"alarm_pending_events": 5000, "max_pending_events": 1000},
    ],
)
def test_kafka_settings_must_fit_each_other(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="expected"):
        KafkaSettings.model_validate(given)
