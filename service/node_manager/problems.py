# SPDX-License-Identifier: GPL-3.0-or-later
"""What a caller can be told went wrong: a status, a stable code, and a text that says what, which node, what to do.

The API turns these into RFC 9457 problem+json, the command line into one line. Imports nothing of the service.
"""

from __future__ import annotations

from typing import Any


class ProblemError(Exception):
    """A request that can't be done, and why."""

    status = 500
    code = "internal_error"

    def __init__(self, detail: str, **extra: Any) -> None:
        super().__init__(detail)
        self.detail = detail
        self.extra = extra


class NodeNotFoundError(ProblemError):
    """No node of that id is registered."""

    status = 404
    code = "node_not_found"

    def __init__(self, node_id: str) -> None:
        super().__init__(f"node {node_id!r} is not registered; POST /nodes registers it", node_id=node_id)


class JobNotFoundError(ProblemError):
    """No job of that id is on record."""

    status = 404
    code = "job_not_found"


class NodeExistsError(ProblemError):
    """The id is taken by a node that was declared otherwise."""

    status = 409
    code = "node_exists"


class NodeInUseError(ProblemError):
    """Something still depends on the node."""

    status = 409
    code = "node_in_use"


class ConflictError(ProblemError):
    """The thing is in a state that doesn't allow this."""

    status = 409
    code = "conflict"


class StaleGenerationError(ProblemError):
    """The node changed since the caller read it."""

    status = 412
    code = "stale_generation"


class InvalidInputError(ProblemError):
    """The request is well formed but breaks a rule; names the field."""

    status = 422
    code = "invalid_input"

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}", errors=[{"field": field, "message": detail}])


class QueueFullError(ProblemError):
    """Too many jobs wait already."""

    status = 503
    code = "job_queue_full"
