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


class AllocationNotFoundError(ProblemError):
    """No allocation of that id is there (any more)."""

    status = 404
    code = "allocation_not_found"


class DeploymentNotFoundError(ProblemError):
    """Nothing is reserved for a deployment of that id."""

    status = 404
    code = "deployment_not_found"

    def __init__(self, deployment_id: str) -> None:
        super().__init__(
            f"nothing is reserved for deployment {deployment_id!r}; POST /deployment/node-selection places it",
            deployment_id=deployment_id,
        )


class DecisionNotFoundError(ProblemError):
    """No decision of that id is on record (any more)."""

    status = 404
    code = "decision_not_found"


class QuotaNotFoundError(ProblemError):
    """The owner has no quota."""

    status = 404
    code = "quota_not_found"


class QuotaExceededError(ProblemError):
    """The owner would pass a hard limit."""

    status = 403
    code = "quota_exceeded"


class InsufficientResourcesError(ProblemError):
    """The node has less left than is asked for."""

    status = 409
    code = "insufficient_resources"


class NodeNotSchedulableError(ProblemError):
    """New work is kept off the node."""

    status = 409
    code = "node_not_schedulable"


class NothingFitsError(ProblemError):
    """No choice of nodes satisfies the request; carries the reasons and what would make it fit."""

    status = 409
    code = "nothing_fits"


class DeploymentExistsError(ProblemError):
    """The id is taken by a deployment that asks for something else."""

    status = 409
    code = "deployment_exists"


class AllocationMismatchError(ProblemError):
    """The id is taken by an allocation of something else."""

    status = 422
    code = "allocation_mismatch"


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


class RecoveryNotFoundError(ProblemError):
    """No recovery of that id is on record."""

    status = 404
    code = "recovery_not_found"


class RecoveryInProgressError(ProblemError):
    """Somebody repairs the node already; carries recovery_id, requested_by and started_at."""

    status = 409
    code = "recovery_in_progress"


class PauseNotFoundError(ProblemError):
    """No pause of that name is in force."""

    status = 404
    code = "pause_not_found"


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


class PlacementQueueFullError(ProblemError):
    """Too many requests wait to be placed already."""

    status = 503
    code = "placement_queue_full"


class TooManyReadersError(ProblemError):
    """As many follow the events already as may."""

    status = 503
    code = "too_many_readers"
