# SPDX-License-Identifier: GPL-3.0-or-later
"""How things look as JSON."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

from node_manager.settings import load_settings
from node_manager.views import render_node_types, render_time


def test_render_time_is_utc_with_z() -> None:
    at = datetime(2026, 11, 22, 19, 0, 0, 5, tzinfo=timezone(timedelta(hours=1)))

    assert render_time(at) == "2026-11-22T18:00:00.000005Z"
    assert render_time(datetime(2026, 1, 1, tzinfo=UTC)) == "2026-01-01T00:00:00.000000Z"


def test_render_node_types_merges_the_general_thresholds() -> None:
    settings = load_settings({})

    shown = render_node_types(settings)

    constrained = shown["node_types"]["constrained"]["thresholds"]
    assert constrained["memory_percent"] == {"warning": 90.0, "critical": 97.0}
    assert constrained["disk_percent"] == shown["thresholds"]["disk_percent"]
    assert [check["name"] for check in shown["node_types"]["constrained"]["checks"]] == ["disk-root"]
