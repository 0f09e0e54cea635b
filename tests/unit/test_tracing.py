# SPDX-License-Identifier: GPL-3.0-or-later
"""What tracing costs and needs; what arrives is in tests/integration/api/test_tracing.py."""

from __future__ import annotations

import subprocess
import sys

import pytest
from node_manager.platform_settings import TracingSettings
from node_manager.settings import SettingsError
from node_manager.tracing import Tracing, add_trace_ids

SWITCHED_OFF = """
import sys
from node_manager import main, tracing
from node_manager.platform_settings import TracingSettings
assert not any(tracing.Tracing(TracingSettings()).telemetry[part] for part in ("tracing", "metrics", "logs"))
assert not [name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]
"""


def test_tracing_that_is_off_loads_nothing() -> None:
    subprocess.run([sys.executable, "-c", SWITCHED_OFF], check=True, timeout=60)


def test_tracing_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)

    with pytest.raises(SettingsError, match=r"node-manager\[tracing\]"):
        Tracing(TracingSettings(enabled=True))


def test_tracing_with_a_wrong_variable_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "-1")

    with pytest.raises(SettingsError, match="OTEL_"):
        Tracing(TracingSettings(enabled=True))


def test_line_outside_of_any_trace_stays_as_it_is() -> None:
    assert add_trace_ids(None, "info", {"event": "x"}) == {"event": "x"}
