# SPDX-License-Identifier: GPL-3.0-or-later
"""The log, as another process reads it."""

from __future__ import annotations

import json
import subprocess
import sys

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


def test_configure_logging_writes_one_json_object_a_line_to_standard_error() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60)

    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.stdout == ""
    assert [(line["level"], line["event"], line.get("request_id")) for line in lines] == [
        ("info", "job started", "r-1"),
        ("error", "it broke", None),
    ]
