# SPDX-License-Identifier: GPL-3.0-or-later
"""The pure rules that the service shares with the modules on the nodes; the only import of ansible_collections."""

from importlib import resources

from ansible_collections.iot_platform.node_manager.plugins import module_utils
from ansible_collections.iot_platform.node_manager.plugins.module_utils._bounds import TooLargeError, clean
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks_spec import one_line, parse_check
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_parse import IMAGE_FILESYSTEMS
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recognise import recognise
from ansible_collections.iot_platform.node_manager.plugins.module_utils._words import (
    Admin,
    CheckKind,
    CheckState,
    ConditionType,
    ContactReason,
    Evidence,
    GuardState,
    Health,
    JobAction,
    JobState,
    Liveness,
    NodeResult,
    ObservationKind,
    RecoveryState,
    RecoveryStep,
    Resource,
    Role,
    Severity,
    Status,
    StepState,
)

__all__ = [
    "IMAGE_FILESYSTEMS",
    "Admin",
    "CheckKind",
    "CheckState",
    "ConditionType",
    "ContactReason",
    "Evidence",
    "GuardState",
    "Health",
    "JobAction",
    "JobState",
    "Liveness",
    "NodeResult",
    "ObservationKind",
    "RecoveryState",
    "RecoveryStep",
    "Resource",
    "Role",
    "Severity",
    "Status",
    "StepState",
    "TooLargeError",
    "clean",
    "module_source",
    "one_line",
    "parse_check",
    "recognise",
]


def module_source(name: str) -> str:
    """Read the source of one of these files, by its module name.

    Errors: FileNotFoundError if there is no such file.
    """
    return resources.files(module_utils).joinpath(f"{name}.py").read_text("utf-8")
