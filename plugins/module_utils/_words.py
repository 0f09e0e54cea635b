# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The closed vocabularies of the product: each word is spelled here once.

Pure: imports the standard library only. Runs on nodes with Python 3.8.
"""

from __future__ import annotations

from enum import Enum


class Word(str, Enum):
    """A closed vocabulary whose members are their own JSON text."""

    def __str__(self) -> str:
        return str.__str__(self)


class Admin(Word):
    """What an operator says about a node."""

    ACTIVE = "active"
    CORDONED = "cordoned"
    DRAINING = "draining"
    MAINTENANCE = "maintenance"
    OFFLINE = "offline"


class Health(Word):
    """What the manager concludes about a node from what was seen."""

    UNKNOWN = "unknown"
    HEALTHY = "healthy"
    DEGRADED = "degraded"
    SUSPECT = "suspect"
    UNREACHABLE = "unreachable"
    RECOVERING = "recovering"
    FLAPPING = "flapping"


class Status(Word):
    """The one word derived from the two axes above."""

    ONLINE = "online"
    OFFLINE = "offline"
    MAINTENANCE = "maintenance"


class ObservationKind(Word):
    """What kind of thing was seen on a node."""

    FACTS = "facts"
    SAMPLE = "sample"
    REPORT = "report"
    CONTACT = "contact"
    # The manager's own conclusion from what it heard of a node, or didn't; nobody else's word is taken for it.
    VERDICT = "verdict"


class ContactReason(Word):
    """How an attempt to reach and use a node ended."""

    OK = "Ok"
    CONNECTION_REFUSED = "ConnectionRefused"
    TIMED_OUT = "TimedOut"
    NO_ROUTE = "NoRoute"
    NAME_NOT_RESOLVED = "NameNotResolved"
    CONNECTION_LOST = "ConnectionLost"
    AUTHENTICATION_FAILED = "AuthenticationFailed"
    HOST_KEY_CHANGED = "HostKeyChanged"
    PYTHON_MISSING = "PythonMissing"
    MODULE_FAILED = "ModuleFailed"
    OUTPUT_UNUSABLE = "OutputUnusable"
    MANAGER_FAULT = "ManagerFault"


class Liveness(Word):
    """What the manager concludes from a node's silence."""

    SUSPECT = "suspect"
    UNREACHABLE = "unreachable"
    # A peer sees the node: only the manager's way to it is cut.
    PATH_LOST = "path_lost"
    # Silent outside its contact windows, as declared.
    ASLEEP = "asleep"


class Evidence(Word):
    """What stands behind the verdict that a node is unreachable."""

    PEERS_BLIND = "peers_blind"
    SITE_DARK = "site_dark"
    NOBODY_TO_ASK = "nobody_to_ask"


class ConditionType(Word):
    """What can be said about a node beside its health; each is true when all is well."""

    REACHABLE = "Reachable"
    MANAGEMENT_PATH = "ManagementPath"
    AUTHENTICATED = "Authenticated"
    HOST_KEY_TRUSTED = "HostKeyTrusted"
    PYTHON_AVAILABLE = "PythonAvailable"
    PROBE_WORKING = "ProbeWorking"
    CHECKS_PASSING = "ChecksPassing"
    ROOT_WRITABLE = "RootWritable"
    POWER_SUFFICIENT = "PowerSufficient"
    UNTHROTTLED = "Unthrottled"
    TEMPERATURE_NORMAL = "TemperatureNormal"
    CLOCK_SYNCHRONISED = "ClockSynchronised"
    DISK_SPACE_SUFFICIENT = "DiskSpaceSufficient"
    INODES_SUFFICIENT = "InodesSufficient"
    DISK_LASTING = "DiskLasting"
    CPU_SUFFICIENT = "CpuSufficient"
    LOAD_NORMAL = "LoadNormal"
    MEMORY_SUFFICIENT = "MemorySufficient"
    SWAP_SUFFICIENT = "SwapSufficient"
    NO_MEMORY_KILLS = "NoMemoryKills"
    RESTARTS_NORMAL = "RestartsNormal"
    CERTIFICATES_VALID = "CertificatesValid"
    # No managed workload runs whose allocation is gone, as on a node that comes back after its work was moved.
    WORKLOADS_OWNED = "WorkloadsOwned"


class CheckState(Word):
    """The outcome of one health check."""

    PASSED = "passed"
    FAILED = "failed"
    UNKNOWN = "unknown"


class Severity(Word):
    """How much a failed check weighs: a critical one makes the node unschedulable, a warning does not."""

    CRITICAL = "critical"
    WARNING = "warning"


class CheckKind(Word):
    """The health checks that a node type may list."""

    TCP = "tcp"
    HTTP = "http"
    DNS = "dns"
    SERVICE = "service"
    PROCESS = "process"
    CONTAINER = "container"
    PORT = "port"
    FILESYSTEM = "filesystem"
    CERTIFICATE = "certificate"
    CLOCK = "clock"
    THRESHOLD = "threshold"
    COMMAND = "command"


class Resource(Word):
    """The resource classes that every node has."""

    CPU_MILLICORES = "cpu_millicores"
    MEMORY_MIB = "memory_mib"
    DISK_MIB = "disk_mib"
    NETWORK_MBPS = "network_mbps"


class Role(Word):
    """What a token's bearer may do."""

    VIEWER = "viewer"
    AGENT = "agent"
    OPERATOR = "operator"
    ADMIN = "admin"


class JobAction(Word):
    """The work that the service runs through Ansible; each names its playbook."""

    REGISTER = "register"
    GATHER = "gather"
    CHECK = "check"
    RECOVER = "recover"


class RecoveryStep(Word):
    """The steps of recovery that come with the product, mildest first; an operator may add others."""

    RESTART_SERVICE = "restart_service"
    RESTART_CONTAINER = "restart_container"
    RESTART_CONTAINER_RUNTIME = "restart_container_runtime"
    FREE_DISK = "free_disk"
    RENEW_CLOCK = "renew_clock"
    REMOUNT_ROOT = "remount_root"
    REBOOT = "reboot"
    POWER_CYCLE = "power_cycle"
    GIVE_UP = "give_up"


class RecoveryState(Word):
    """Where a climb of the recovery ladder is, or how it ended."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    # No step helped; a later climb may.
    FAILED = "failed"
    GAVE_UP = "gave_up"
    CANCELLED = "cancelled"
    # A dry run has ended: the steps say what they would do.
    PLANNED = "planned"


class StepState(Word):
    """Where one step of a climb is, or how it ended."""

    WAITING = "waiting"
    RUNNING = "running"
    # Its precheck found nothing to do.
    SKIPPED = "skipped"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    # Of a dry run: it would act.
    PLANNED = "planned"


class GuardState(Word):
    """Whether automatic recoveries may start: of a zone, or of the fleet."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class JobState(Word):
    """Where a job is on its way."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMED_OUT = "timed_out"
    INTERRUPTED = "interrupted"


class NodeResult(Word):
    """How a job ended for one node."""

    OK = "ok"
    FAILED = "failed"
    UNREACHABLE = "unreachable"
    NOT_RUN = "not_run"
