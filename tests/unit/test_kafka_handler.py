# SPDX-License-Identifier: GPL-3.0-or-later
"""The handler without brokers: nothing of it runs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

from builders import START, FakeClock, make_sample, make_settings
from node_manager.kafka_handler import KafkaHandler
from node_manager.node_registry import NodeRegistry
from node_manager.shapes import Sample
from node_manager.store import open_store


def test_without_brokers_nothing_runs(tmp_path: Path) -> None:
    store, settings, clock = open_store(f"sqlite:///{tmp_path}/store.db"), make_settings(), FakeClock()
    registry = NodeRegistry(store, settings, clock)
    handler = KafkaHandler(store, settings, registry, cast("Any", None), lambda: True, clock)
    before = set(threading.enumerate())

    handler.start()
    handler.offer_samples([("gw-7", START, "test", Sample.model_validate(make_sample()))])
    assert set(threading.enumerate()) == before
    assert not handler.status.connected
    handler.stop()
    store.close()
