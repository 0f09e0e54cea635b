# SPDX-License-Identifier: GPL-3.0-or-later
"""How the service writes its log: structlog, for people or for collectors, on standard error, without secrets.

All lines pass the same way: the service's own, those of libraries, warnings, and errors that nobody caught.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any
from urllib.parse import unquote

import sqlalchemy as sa
import structlog

from node_manager.redaction import Redactor
from node_manager.settings import LoggingSettings, Settings
from node_manager.tracing import add_trace_ids

# These write what they send, or each statement with its values, where they are let to.
_NEVER_CHATTY = ("sqlalchemy", "httpx", "httpcore", "urllib3", "opentelemetry")
# `name=value,name=value`; OpenTelemetry writes what is no such list to the log as it is.
_HEADER_VARIABLES = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")


def configure_logging(settings: LoggingSettings, secrets: Iterable[str] = (), *, traces: bool = False) -> None:
    """Set up structlog, and let the libraries' own loggers through it.

    Shapes: *secrets* appear in no line, wherever they stand; with *traces* lines name the trace that they belong to.
    """
    level = getattr(logging, settings.level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *([add_trace_ids] if traces else []),
        # Without the values of local variables, which are where secrets are.
        structlog.processors.format_exc_info,
        structlog.processors.StackInfoRenderer(),
    ]
    last: structlog.typing.Processor
    if settings.format == "json":
        last = structlog.processors.JSONRenderer()
    else:
        last = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    redact = _Redact(Redactor(secrets))
    structlog.configure(
        processors=[*shared, redact, last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = _Handler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, redact, last],
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
        )
    )
    logging.basicConfig(
        level=logging.INFO if level == logging.DEBUG else max(level, logging.WARNING), handlers=[handler], force=True
    )
    for name in _NEVER_CHATTY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    logging.captureWarnings(True)
    sys.excepthook = _on_uncaught
    threading.excepthook = _on_uncaught_in_thread


def secrets_of(settings: Settings, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Collect the secrets that the settings hold, and those among OpenTelemetry's variables."""
    found = [sa.make_url(settings.storage_url).password]
    password_file = settings.configuration.kafka.sasl_password_file
    if password_file is not None:
        # Who needs it says what is wrong with it.
        with suppress(OSError, RuntimeError, UnicodeDecodeError):
            found.append(password_file.expanduser().read_text("utf-8").strip())
    for name in _HEADER_VARIABLES:
        found.extend(_header_values(environ.get(name, "")))
    return [str(secret) for secret in found if secret]


def _header_values(text: str) -> Iterator[str]:
    for part in text.split(","):
        value = re.split("[=:]", part, maxsplit=1)[-1].strip()
        yield value
        # As it is sent, and without the word before it, such as Bearer.
        yield from unquote(value).split()[-1:]


class _Redact:
    """The last processor before the renderer: nothing is added to a line behind it."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor

    def __call__(self, _logger: Any, _method: str, line: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return self._redactor.line(line)


class _Handler(logging.StreamHandler[Any]):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """Say that a line of a library could not be written; the default prints it as it is, past everything."""
        _, error, _ = sys.exc_info()
        structlog.get_logger().error(
            "a line of a library could not be written", logger=record.name, reason=type(error).__name__
        )


def _on_uncaught(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, at)
        return
    structlog.get_logger().critical("an error that nobody caught", exc_info=(kind, error, at))


def _on_uncaught_in_thread(found: threading.ExceptHookArgs) -> None:
    if found.exc_value is None or issubclass(found.exc_type, SystemExit):
        return
    name = found.thread.name if found.thread else None
    structlog.get_logger().critical(
        "an error that nobody caught", thread=name, exc_info=(found.exc_type, found.exc_value, found.exc_traceback)
    )
