# SPDX-License-Identifier: GPL-3.0-or-later
"""What the operator configured: config.json, node_types.json and NODE_MANAGER_* variables, read once and frozen.

Decides where the state directory is and which value wins (environment over file over default). Must not import anything
of the service but node_types and the other sections.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from node_manager.node_types import DEFAULT_LADDERS, Ladders, NodeType, NodeTypes, Thresholds
from node_manager.platform_settings import EventStreamSettings, KafkaSettings, MetricsSettings, TracingSettings
from node_manager.sections import FilePath, Port, PositiveSeconds, Section

ENVIRONMENT_PREFIX = "NODE_MANAGER_"
_CHECKOUT = Path(__file__).resolve().parents[2]
_PACKAGED_DATA = Path(__file__).resolve().parent / "data"

# What pydantic says in terms of Python, in terms of JSON.
_EXPECTED = {"model_type": "expected an object", "path_type": "expected the path of a file"}


class SettingsError(Exception):
    """The configuration can't be used; the text names the file, the key and what was expected."""


class ServerSettings(Section):
    """The HTTP listener."""

    host: str = Field("127.0.0.1", description="Address to listen on; change it only behind TLS and a firewall")
    port: Port = Field(8080, description="TCP port to listen on")
    max_body_bytes: int = Field(4_194_304, ge=1024, description="Largest request body; larger ones get 413")
    max_wait_seconds: PositiveSeconds = Field(120, description="Upper bound of ?wait=")
    shutdown_seconds: PositiveSeconds = Field(
        10, description="How long a stop waits for open requests and running jobs"
    )


class StorageSettings(Section):
    """Where the state is kept."""

    url: str = Field(
        "sqlite:///node-manager.db",
        pattern=r"^(sqlite:///|postgresql\+psycopg://).",
        description="SQLAlchemy URL: sqlite:///FILE (relative to the state directory) or postgresql+psycopg://...",
    )
    busy_timeout_seconds: PositiveSeconds = Field(
        5, description="How long a write waits for the store before the caller gets 503"
    )
    pool_size: int = Field(8, ge=1, le=100, description="Connections kept open per process")
    history_days: int = Field(7, ge=1, description="How long one-minute history and events are kept")


class MonitoringSettings(Section):
    """How often nodes are looked at."""

    scheduled: bool = Field(
        True, description="Whether the service looks at nodes by itself; false where cron or AWX run the playbooks"
    )
    gather_interval_seconds: PositiveSeconds = Field(60, description="Pause between two readings of a node's resources")
    check_interval_seconds: PositiveSeconds = Field(300, description="Pause between two runs of a node's health checks")
    stream: bool = Field(
        True, description="Watch nodes over a lasting SSH connection each; false: gather with Ansible on the interval"
    )
    sample_interval_seconds: PositiveSeconds = Field(15, description="Pause between two samples of a watched node")
    beat_interval_seconds: PositiveSeconds = Field(
        5,
        description="Longest pause between two signs of life of a watched node; one that is 4 s late makes it suspect",
    )
    max_handshakes: int = Field(32, ge=1, le=1000, description="SSH connections that are being opened at once")
    handshake_timeout_seconds: PositiveSeconds = Field(15, description="Limit for opening a connection and logging in")
    reconnect_max_seconds: PositiveSeconds = Field(60, description="Longest pause before a lost node is tried again")
    max_line_bytes: int = Field(1_048_576, ge=4096, description="Longest line that a watched node may send")
    sample_seconds: PositiveSeconds = Field(1.0, description="Interval over which CPU and network rates are measured")
    stale_after_seconds: PositiveSeconds = Field(
        180, description="Age of the last contact from which on a node is not schedulable"
    )


class HealthSettings(Section):
    """When a silent node counts as lost."""

    failures_before_unreachable: int = Field(
        3, ge=1, description="Failed contacts in a row before a node is unreachable"
    )
    silence_before_unreachable_seconds: PositiveSeconds = Field(
        10, description="Time without contact before a node is unreachable"
    )
    reprobe_seconds: PositiveSeconds = Field(2, description="Pause before a suspect node is tried again")
    knock_timeout_seconds: PositiveSeconds = Field(
        3, description="Limit for one look at whether a suspect node's SSH port answers, on a fresh connection"
    )
    grace_seconds: PositiveSeconds = Field(
        30, description="Time after the manager's start in which no node is called unreachable"
    )
    autonomy_seconds: PositiveSeconds = Field(
        3600, description="How long the nodes of a site that is dark as a whole are left alone"
    )
    peers_of_site: int = Field(3, ge=0, le=10, description="Nodes of the same site that are asked about a silent one")
    peers_elsewhere: int = Field(1, ge=0, le=10, description="Nodes of other sites that are asked about a silent one")
    return_samples: int = Field(3, ge=1, description="Good samples that a node needs to come back")
    return_seconds: float = Field(30, ge=0, description="Time that these samples must span")
    probation_seconds: float = Field(120, ge=0, description="How long a node that came back gets half the traffic")
    threshold_samples: int = Field(
        3, ge=1, description="Samples in a row beyond an edge before a threshold counts as passed, or as left"
    )
    flap_penalty: float = Field(1000, ge=0, description="What each loss of a node adds to its penalty")
    flap_half_life_seconds: PositiveSeconds = Field(900, description="Time in which a penalty falls to its half")
    flap_suppress: float = Field(2000, ge=0, description="Penalty above which a node is flapping and takes no work")
    flap_reuse: float = Field(750, ge=0, description="Penalty below which it no longer is")
    checks_timeout_seconds: PositiveSeconds = Field(20, description="Deadline for all health checks of one node")


class GuardSettings(Section):
    """When repairs stop because too much fails at once: for each zone, and for the fleet."""

    start_interval_seconds: float = Field(10, ge=0, description="Least time between two starts of recoveries")
    in_flight_percent: float = Field(
        10, gt=0, le=100, description="Part of the nodes that may be in recovery at once; one always may"
    )
    unhealthy_nodes: int = Field(3, ge=1, description="The guard opens when at least this many nodes are unhealthy ...")
    unhealthy_percent: float = Field(40, gt=0, le=100, description="... and at least this part of all")
    dark_nodes: int = Field(2, ge=1, description="A scope with at least this many nodes, all unreachable, is dark")
    failed_recoveries: int = Field(3, ge=1, description="The guard opens when this many ...")
    last_recoveries: int = Field(5, ge=1, le=100, description="... of this many last recoveries failed")
    open_seconds: PositiveSeconds = Field(60, description="Least time that it stays open before it tries one repair")
    settle_seconds: PositiveSeconds = Field(
        30, description="How long its cause must be gone before it tries one repair, or a check where none is due"
    )

    @model_validator(mode="after")
    def _failures_can_be_reached(self) -> GuardSettings:
        if self.failed_recoveries > self.last_recoveries:
            raise ValueError("expected failed_recoveries <= last_recoveries")
        return self


class PowerSettings(Section):
    """How a node is switched off and on: a command on the manager, or an HTTP call; one of the two."""

    command: list[str] | None = Field(
        None,
        min_length=1,
        max_length=100,
        description="Program and arguments, no shell; {node_id} and {address} are replaced, and are in NODE_ID and NODE_ADDRESS",
    )
    url: str | None = Field(
        None,
        pattern=r"^https?://",
        description="URL that gets a POST with {node_id, address, recovery_id}; {node_id} in it is replaced",
    )
    token_file: FilePath | None = Field(None, description="File with the bearer token for the URL")
    timeout_seconds: PositiveSeconds = Field(60, description="Limit for the command or the call")
    back_within_seconds: PositiveSeconds = Field(300, description="Time in which a node must be back after it")

    @model_validator(mode="after")
    def _one_way(self) -> PowerSettings:
        if (self.command is None) == (self.url is None):
            raise ValueError("expected either command or url")
        return self


class RecoverySettings(Section):
    """How nodes are repaired."""

    automatic: bool = Field(True, description="Whether nodes are repaired without being asked to")
    ladders: Ladders = Field(
        DEFAULT_LADDERS, description="The steps to try, in their order, by the condition that is false"
    )
    wait_seconds: float = Field(10, ge=0, description="How long a condition must be false before anything is done")
    attempts: int = Field(3, ge=1, description="Climbs of the ladder before the manager gives up on a node")
    backoff_seconds: PositiveSeconds = Field(
        120, description="Pause after the first climb; it doubles with each further one"
    )
    reset_seconds: PositiveSeconds = Field(3600, description="Time without trouble after which climbs are forgotten")
    step_timeout_seconds: PositiveSeconds = Field(600, description="Deadline of one step")
    steps_directory: FilePath | None = Field(
        None, description="Folder with steps of your own, each a folder with precheck.yml, act.yml and postcheck.yml"
    )
    power: PowerSettings | None = Field(None, description="How power_cycle is done; without it that step is left out")
    power_without_witness: bool = Field(
        False, description="Switch off and on also where no other node could be asked whether it is really down"
    )
    reclaim_after_seconds: PositiveSeconds = Field(
        3600, description="How long a lost node keeps its allocations; then they are released"
    )
    guard: GuardSettings = Field(default_factory=GuardSettings, description=GuardSettings.__doc__)


class AllocationSettings(Section):
    """How resources are promised."""

    pressure_percent: float = Field(
        25, ge=0, le=100, description="Time that work waits for a CPU (PSI some avg60) above which overcommit is off"
    )
    busy_percent: float = Field(
        85, ge=0, le=100, description="CPU use, 95th percentile of the last 20 samples, above which overcommit is off"
    )
    pressure_hold_seconds: PositiveSeconds = Field(
        600, description="How long after the last sign of pressure overcommit stays off"
    )
    max_ttl_seconds: int = Field(86400, ge=1, description="Longest time that an unconfirmed allocation may ask for")


class SelectionSettings(Section):
    """How nodes are chosen for deployments."""

    keep_decisions: int = Field(10_000, ge=1, description="Newest decisions that are kept and can be replayed")
    max_deployments: int = Field(500, ge=1, le=5000, description="Deployments that one request may carry")
    max_replicas: int = Field(1000, ge=1, le=10_000, description="Replicas that one deployment may have")


class AnsibleSettings(Section):
    """How jobs are run."""

    forks: int = Field(20, ge=1, le=500, description="Nodes that one job works on at once")
    job_timeout_seconds: PositiveSeconds = Field(300, description="Deadline of one job; it is killed after that")
    max_running_jobs: int = Field(2, ge=1, le=64, description="Jobs that run at once; each is one process")
    max_queued_jobs: int = Field(1000, ge=1, description="Jobs that may wait; further ones get 503")
    task_timeout_seconds: int = Field(60, ge=1, description="Deadline of one task on one node")
    max_result_bytes: int = Field(1_048_576, ge=4096, description="Largest result of one task that is kept")
    keep_jobs: int = Field(500, ge=1, description="Finished jobs whose record and log are kept")


class Credential(Section):
    """How to log in to nodes; nodes refer to it by name."""

    private_key_file: FilePath = Field(description="SSH private key; relative paths start at the state directory")
    user: str | None = Field(None, description="Login name where the node doesn't declare one")


class SshSettings(Section):
    """Defaults for reaching nodes."""

    user: str = Field("root", description="Login name where neither node nor credential gives one")
    connect_timeout_seconds: int = Field(5, ge=1, le=120, description="Limit for opening a connection")
    keepalive_interval_seconds: int = Field(2, ge=1, description="Pause between two SSH keepalives")
    keepalive_count: int = Field(2, ge=1, description="Keepalives that may be missed before the connection is given up")
    host_key_policy: Literal["first_use", "given"] = Field(
        "first_use", description="first_use pins the key seen first; given refuses nodes registered without a key"
    )
    default_credential: str | None = Field(None, description="Credential of nodes that name none")
    credentials: dict[str, Credential] = Field(default_factory=dict, description="Credentials by name")


class AuthSettings(Section):
    """Who may call the API."""

    enabled: bool = Field(True, description="Ask for a bearer token; switch off only behind an authenticating proxy")
    cache_seconds: PositiveSeconds = Field(
        2, description="How long a token, once read, is trusted without reading it again; a revoked one lives that long"
    )


class LoggingSettings(Section):
    """What the service writes about itself."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least important level written")
    format: Literal["console", "json"] = Field("console", description="For people or for log collectors")


class Configuration(Section):
    """All of config.json."""

    schema_: str | None = Field(None, alias="$schema", description="Where editors find the JSON Schema of this file")
    server: ServerSettings = Field(default_factory=ServerSettings, description=ServerSettings.__doc__)
    storage: StorageSettings = Field(default_factory=StorageSettings, description=StorageSettings.__doc__)
    monitoring: MonitoringSettings = Field(default_factory=MonitoringSettings, description=MonitoringSettings.__doc__)
    thresholds: Thresholds = Field(
        default_factory=Thresholds, description="Limits for types that set none of their own, by what they watch"
    )
    health: HealthSettings = Field(default_factory=HealthSettings, description=HealthSettings.__doc__)
    recovery: RecoverySettings = Field(default_factory=RecoverySettings, description=RecoverySettings.__doc__)
    allocation: AllocationSettings = Field(default_factory=AllocationSettings, description=AllocationSettings.__doc__)
    selection: SelectionSettings = Field(default_factory=SelectionSettings, description=SelectionSettings.__doc__)
    ansible: AnsibleSettings = Field(default_factory=AnsibleSettings, description=AnsibleSettings.__doc__)
    ssh: SshSettings = Field(default_factory=SshSettings, description=SshSettings.__doc__)
    auth: AuthSettings = Field(default_factory=AuthSettings, description=AuthSettings.__doc__)
    kafka: KafkaSettings = Field(default_factory=KafkaSettings, description=KafkaSettings.__doc__)
    event_stream: EventStreamSettings = Field(
        default_factory=EventStreamSettings, description=EventStreamSettings.__doc__
    )
    metrics: MetricsSettings = Field(default_factory=MetricsSettings, description=MetricsSettings.__doc__)
    tracing: TracingSettings = Field(default_factory=TracingSettings, description=TracingSettings.__doc__)
    logging: LoggingSettings = Field(default_factory=LoggingSettings, description=LoggingSettings.__doc__)
    node_types_file: FilePath = Field(
        Path("node_types.json"), description="The node types; relative paths start at the folder of config.json"
    )


@dataclass(frozen=True)
class Settings:
    """The configuration in force, with its paths resolved."""

    home: Path
    config_file: Path
    configuration: Configuration
    node_types: Mapping[str, NodeType]

    @property
    def server(self) -> ServerSettings:
        """Give the HTTP listener's section."""
        return self.configuration.server

    @property
    def storage_url(self) -> str:
        """Give the store's URL with a relative SQLite path made absolute under the state directory."""
        prefix = "sqlite:///"
        url = self.configuration.storage.url
        if url.startswith(prefix) and not url.startswith(prefix + "/"):
            return prefix + str(self.home / url.removeprefix(prefix))
        return url

    def ladders_of(self, node_type: str | None) -> dict[str, list[str]]:
        """Merge the ladders of *node_type* over the general ones."""
        merged: dict[str, list[str]] = dict(self.configuration.recovery.ladders)
        if node_type is not None and node_type in self.node_types:
            merged.update(self.node_types[node_type].ladders)
        return merged

    def thresholds_of(self, node_type: str | None) -> dict[str, dict[str, float]]:
        """Merge the thresholds of *node_type* over the general ones."""
        merged = self.configuration.thresholds.as_limits()
        if node_type is not None and node_type in self.node_types:
            merged.update(self.node_types[node_type].thresholds.as_limits())
        return merged

    def credential_of(self, name: str | None) -> Credential | None:
        """Look up a credential by name, the default one for no name; None where nothing is configured."""
        wanted = name or self.configuration.ssh.default_credential
        credential = self.configuration.ssh.credentials.get(wanted) if wanted else None
        if credential is None:
            return None
        key = credential.private_key_file.expanduser()
        return credential.model_copy(update={"private_key_file": key if key.is_absolute() else self.home / key})


def load_settings(environ: Mapping[str, str] | None = None, config_file: Path | None = None) -> Settings:
    """Read the configuration.

    Shapes: *config_file* wins over NODE_MANAGER_CONFIG, which wins over config.json of the checkout, then of the
        package.
    Errors: SettingsError with one line that names file (or variable), key and what was expected.
    """
    environ = os.environ if environ is None else environ
    path = config_file or Path(environ.get("NODE_MANAGER_CONFIG") or _default_config_file())
    raw = _read_json(path, "set NODE_MANAGER_CONFIG to your config.json or restore the one shipped")
    overridden = _apply_environment(raw, environ)
    try:
        configuration = Configuration.model_validate(raw)
    except ValidationError as error:
        raise SettingsError(_explain(error, path, overridden)) from None
    types_path = path.parent / configuration.node_types_file
    try:
        node_types = NodeTypes.model_validate(
            _read_json(types_path, f"copy the one shipped there, or change node_types_file in {path}")
        ).node_types
    except ValidationError as error:
        raise SettingsError(_explain(error, types_path, {})) from None
    _check_references(configuration, path)
    return Settings(home_directory(environ), path, configuration, node_types)


def home_directory(environ: Mapping[str, str] | None = None) -> Path:
    """Tell where the state directory is: NODE_MANAGER_HOME, var/ of the checkout, or the user's state folder."""
    environ = os.environ if environ is None else environ
    if home := environ.get("NODE_MANAGER_HOME"):
        return Path(home).expanduser().absolute()
    if (_CHECKOUT / "galaxy.yml").exists():
        return _CHECKOUT / "var"
    state = Path(environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    return state / "node-manager"


def _default_config_file() -> Path:
    checkout = _CHECKOUT / "config.json"
    return checkout if checkout.exists() else _PACKAGED_DATA / "config.json"


def _read_json(path: Path, if_missing: str) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file; {if_missing}") from None
    except OSError as error:
        raise SettingsError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{path}: not valid JSON: {error}") from None


def _apply_environment(raw: Any, environ: Mapping[str, str]) -> dict[str, str]:
    """Lay NODE_MANAGER_SECTION__KEY over the file's values; give the variable of each key so set."""
    overridden: dict[str, str] = {}
    if not isinstance(raw, dict):
        return overridden
    # In order, so that a section given whole comes before its single keys.
    for name, text in sorted(environ.items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or "__" not in name:
            continue
        keys = name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")
        place = raw
        for key in keys[:-1]:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise SettingsError(f"{name}: {key} is not a section; the form is NODE_MANAGER_<SECTION>__<KEY>")
        place[keys[-1]] = _parse_value(text)
        overridden[".".join(keys)] = name
    return overridden


def _parse_value(text: str) -> Any:
    """Read numbers, booleans, null, lists and objects as JSON; anything else is the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _explain(error: ValidationError, path: Path, overridden: Mapping[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    key = " ".join(".".join(str(part) for part in first["loc"]).split()) or "(the whole file)"
    # What lacks a key may itself be there only by a variable.
    place = key.rpartition(".")[0] if first["type"] == "missing" else key
    source = next((name for given, name in overridden.items() if _overlap(given, place)), None)
    where = f"{source} ({key})" if source else f"{path}: {key}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key; see docs/configuration.md for the keys there are{more}"
    if first["type"] == "missing":
        return f"{where}: is missing{more}"
    shown = json.dumps(first["input"], default=str)[:80]
    expected = _EXPECTED.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    return f"{where}: {expected}, got {shown}{more}"


def _overlap(one: str, other: str) -> bool:
    """Tell whether one of two keys is the other or a section that holds it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _check_references(configuration: Configuration, path: Path) -> None:
    default = configuration.ssh.default_credential
    if default is not None and default not in configuration.ssh.credentials:
        known = ", ".join(sorted(configuration.ssh.credentials)) or "none"
        raise SettingsError(
            f"{path}: ssh.default_credential: expected one of ssh.credentials ({known}), got {default!r}"
        )
