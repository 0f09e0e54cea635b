# SPDX-License-Identifier: GPL-3.0-or-later
"""OpenTelemetry traces of requests, by the framework's own support; nothing of the SDK is loaded while they are off.

Where to and how much is set by OpenTelemetry's own OTEL_* variables.
"""

from __future__ import annotations

import os
import threading
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import structlog
from fastapi.telemetry import TelemetryConfig
from opentelemetry import trace

from node_manager.platform_settings import TracingSettings
from node_manager.settings import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

_SERVICE_NAME = "node-manager"
# A collector that doesn't answer must not hold up the end.
_FLUSH_SECONDS = 2.0
# What load balancers and collectors ask every few seconds.
_NOT_TRACED = frozenset({"/healthz", "/readyz", "/metrics"})
_OFF: TelemetryConfig = {"tracing": False, "metrics": False, "logs": False, "auto_configure": False}


class Tracing:
    """The way of spans to the collector, or nothing."""

    def __init__(self, settings: TracingSettings) -> None:
        """Errors: SettingsError if traces are wanted and what they need isn't installed, or an OTEL_* variable is wrong."""
        self._provider: TracerProvider | None = None
        self._exporter: SpanExporter | None = None
        if settings.enabled:
            self._provider, self._exporter = _make_provider()

    @property
    def telemetry(self) -> TelemetryConfig:
        """Say to the framework what is to be traced."""
        if self._provider is None:
            return _OFF
        return {
            **_OFF,
            "tracing": True,
            "tracer_provider": self._provider,
            "operation_spans": False,
            "exclude": _excluded,
        }

    def stop(self) -> None:
        """Send what waits, and end."""
        if self._provider is None or self._exporter is None:
            return
        ending = threading.Thread(target=self._provider.shutdown, name="tracing-end", daemon=True)
        ending.start()
        ending.join(_FLUSH_SECONDS)
        if ending.is_alive():
            # Breaks off what it repeats because nobody answers.
            self._exporter.shutdown()
            ending.join(_FLUSH_SECONDS)


def add_trace_ids(_logger: Any, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Name the trace in a log line, while there is one; a processor of structlog."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        line["trace_id"] = trace.format_trace_id(context.trace_id)
        line["span_id"] = trace.format_span_id(context.span_id)
    return line


def _make_provider() -> tuple[TracerProvider, SpanExporter]:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"tracing.enabled: {error.name} is not installed; pip install 'node-manager[tracing]' brings it"
        ) from None
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: _SERVICE_NAME}
    try:
        provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        exporter = OTLPSpanExporter()
        provider.add_span_processor(BatchSpanProcessor(exporter))
    except ValueError as error:
        raise SettingsError(f"tracing.enabled: an OTEL_* variable can't be used: {error}") from None
    return provider, exporter


def _excluded(scope: MutableMapping[str, Any]) -> bool:
    return scope.get("path") in _NOT_TRACED
