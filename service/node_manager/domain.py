# SPDX-License-Identifier: GPL-3.0-or-later
"""The pure rules that the service shares with the modules on the nodes; the only import of ansible_collections."""

from ansible_collections.iot_platform.node_manager.plugins.module_utils._bounds import TooLargeError, clean
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks_spec import parse_check
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recognise import recognise
from ansible_collections.iot_platform.node_manager.plugins.module_utils._words import (
    Admin,
    CheckState,
    ConditionType,
    ContactReason,
    Evidence,
    Health,
    JobAction,
    JobState,
    Liveness,
    NodeResult,
    ObservationKind,
    Resource,
    Role,
    Severity,
    Status,
)

__all__ = [
    "Admin",
    "CheckState",
    "ConditionType",
    "ContactReason",
    "Evidence",
    "Health",
    "JobAction",
    "JobState",
    "Liveness",
    "NodeResult",
    "ObservationKind",
    "Resource",
    "Role",
    "Severity",
    "Status",
    "TooLargeError",
    "clean",
    "parse_check",
    "recognise",
]
