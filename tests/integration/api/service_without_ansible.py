# SPDX-License-Identifier: GPL-3.0-or-later
"""The service with a runner that looks at nothing: made-up addresses must not be tried for real.

NODE_MANAGER_TEST_HOLD_JOBS makes each job go on until it is stopped.
"""

from __future__ import annotations

import os
import threading

import uvicorn
from node_manager.access import Tokens
from node_manager.domain import NodeResult
from node_manager.logs import configure_logging
from node_manager.main import connect, create_app
from node_manager.playbook_process import NodeOutcome, RunEnd, RunRequest
from node_manager.settings import load_settings


class AnsweringRunner:
    """A Runner that finds each node in order and looks at none."""

    def __init__(self, hold: bool) -> None:
        self._hold = hold

    def run(self, request: RunRequest, stop: threading.Event) -> RunEnd:
        """End well, at once or when stopped."""
        if self._hold:
            stop.wait(60)
            return RunEnd(False, message="stopped")
        return RunEnd(True, {node_id: NodeOutcome(NodeResult.OK) for node_id in request.node_ids})

    def discard(self, job_id: str) -> None:
        """Leave nothing behind, as it made nothing."""


if __name__ == "__main__":
    settings = load_settings()
    configure_logging(settings.configuration.logging)
    store = connect(settings)
    Tokens(store).ensure_admin(settings.home)
    app = create_app(settings, store, runner=AnsweringRunner("NODE_MANAGER_TEST_HOLD_JOBS" in os.environ))
    uvicorn.run(app, host="127.0.0.1", port=settings.server.port, log_config=None)
