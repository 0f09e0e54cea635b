# SPDX-License-Identifier: GPL-3.0-or-later
"""The log, as another process reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from builders import make_settings
from node_manager.logs import secrets_of

SECRET = "hunter2-hunter2"
PROGRAM = """
import logging, structlog
from node_manager.logs import configure_logging
from node_manager.settings import LoggingSettings
configure_logging(LoggingSettings(level="info", format="json"))
structlog.get_logger().debug("not written")
with structlog.contextvars.bound_contextvars(request_id="r-1"):
    structlog.get_logger().info("job started", nodes=3)
logging.getLogger("alembic").error("it %s", "broke")
"""
# Every way in which a line comes about, each with the secret somewhere.
EVERYTHING = f"""
import asyncio, logging, threading, warnings
import sqlalchemy as sa, structlog
from node_manager.logs import configure_logging
from node_manager.settings import LoggingSettings
SECRET = {SECRET!r}
configure_logging(LoggingSettings(level="debug", format=FORMAT), [SECRET])
url = "postgresql+psycopg://nodes:" + SECRET + "@127.0.0.1:1/nodes"
log = structlog.get_logger()

def fail():
    local = url
    raise ValueError(f"can't connect to {{local}}")

for logger in (log, logging.getLogger("asyncssh"), logging.getLogger("uvicorn.error"), logging.getLogger("kafka")):
    try:
        fail()
    except ValueError:
        logger.exception("broke")
    logger.error("with %s", url)
    logger.warning(url)
log.info("said", **{{"url": url, SECRET: SECRET, "deep": [{{"a": (SECRET, url.encode())}}], "token": "abc-123"}})
with structlog.contextvars.bound_contextvars(request_id=SECRET, command_id="c\\n1"):
    log.debug("a\\nb\\x1b[2J\\x00", value=b"\\xff", big="x" * 10**6, nan=float("nan"), half="\\ud800", huge=10**6000)
logging.getLogger("broken").error("%d", url)
warnings.warn("deprecated " + url)
thread = threading.Thread(target=fail, name="t")
thread.start()
thread.join()
try:
    sa.create_engine(url, connect_args={{"connect_timeout": 1}}).connect()
except Exception:
    log.exception("no connection", engine_url=sa.make_url(url))

async def forgotten():
    task = asyncio.ensure_future(asyncio.sleep(0, fail))
    task.add_done_callback(lambda done: fail())
    await task
    await asyncio.sleep(0)

asyncio.run(forgotten())
log.info("the end")
fail()
"""


def run(program: str, *, status: int = 0) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (status, b""), done.stderr
    return done.stderr.decode("utf-8")


def test_configure_logging_writes_one_json_object_a_line_to_standard_error() -> None:
    lines = [json.loads(line) for line in run(PROGRAM).splitlines()]

    assert [(line["level"], line["event"], line.get("request_id")) for line in lines] == [
        ("info", "job started", "r-1"),
        ("error", "it broke", None),
    ]
    assert lines[1]["logger"] == "alembic"


@pytest.mark.postgresql
def test_json_lines_are_json_without_secrets_however_they_come_about() -> None:
    written = run(f"FORMAT = 'json'\n{EVERYTHING}", status=1)

    lines = [json.loads(line) for line in written.splitlines()]
    assert SECRET not in written
    assert "abc-123" not in written
    assert all({"event", "level", "timestamp"} <= set(line) for line in lines)
    assert max(map(len, written.splitlines())) < 100_000
    assert {line.get("logger") for line in lines} >= {"asyncssh", "uvicorn.error", "kafka", "py.warnings", "asyncio"}
    assert [line["command_id"] for line in lines if "command_id" in line] == ["c\\n1"]
    assert "a line of a library could not be written" in [line["event"] for line in lines]
    assert [line.get("thread") for line in lines if line["event"] == "an error that nobody caught"] == ["t", None]
    traces = [line["exception"] for line in lines if line["event"] == "broke"]
    assert len(traces) == 4
    assert all("ValueError: can't connect to postgresql+psycopg://nodes:[redacted]@" in trace for trace in traces)


@pytest.mark.postgresql
def test_console_lines_hold_no_secrets_and_steer_no_terminal() -> None:
    written = run(f"FORMAT = 'console'\n{EVERYTHING}", status=1)

    assert SECRET not in written
    assert "abc-123" not in written
    assert "\x1b" not in written
    assert "\x00" not in written
    assert "a\\nb\\x1b[2J\\x00" in written
    assert "ValueError: can't connect to" in written


def test_secrets_of_finds_those_that_the_settings_hold(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{SECRET}\n")
    kafka = {
        "bootstrap_servers": ["127.0.0.1:9092"],
        "security_protocol": "SASL_SSL",
        "sasl_username": "nodes",
        "sasl_password_file": str(file),
    }
    url = "postgresql+psycopg://nodes:pass%40word@db/nodes"

    assert secrets_of(make_settings({"storage": {"url": url}, "kafka": kafka}), {}) == ["pass@word", SECRET]
    assert secrets_of(make_settings({"kafka": {**kafka, "sasl_password_file": "/nowhere"}}), {}) == []
    assert secrets_of(make_settings({"kafka": {**kafka, "sasl_password_file": "~nobody-here/x"}}), {}) == []


def test_secrets_of_looks_where_the_link_to_kafka_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "password").write_text(SECRET)

    assert secrets_of(make_settings({"kafka": {"sasl_password_file": "~/password"}}), {}) == [SECRET]


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"])
def test_headers_of_the_collector_are_secret_also_where_they_are_wrong(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_MANAGER_HOME", str(tmp_path))
    monkeypatch.setenv(
        name, "x-honeycomb-team: hunter2hunter2,authorization=Basic%20aHVudGVyMg==,x=first=hunter3,lonely-hunter4"
    )
    written = run("""
from node_manager.logs import configure_logging, secrets_of
from node_manager.platform_settings import TracingSettings
from node_manager.settings import load_settings
from node_manager.tracing import Tracing
import structlog
settings = load_settings()
configure_logging(settings.configuration.logging, secrets_of(settings))
Tracing(TracingSettings(enabled=True)).stop()
structlog.get_logger().info("aHVudGVyMg==")
""")

    assert "Header format invalid" in written
    assert "x-honeycomb-team" in written
    assert "hunter" not in written
    assert "aHVudGVyMg" not in written
