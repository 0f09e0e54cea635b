# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Look at a node: its facts, and samples of its resources, in the shapes of docs/observations.md.

Standard library only. Runs on nodes with Python 3.8. Opens nothing by itself: _probe_read, _probe_facts and _engine do.

A collector that hangs is left behind on a daemon thread (see _probe_run). The answer is complete without it: the
caller prints it, flushes and returns, and must not join threads.
"""

from __future__ import annotations

import time
from typing import AbstractSet, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from ._bounds import JsonValue, TooLargeError, clean
from ._engine import Runtime, cannot_list_message, find_runtime, no_runtime_message, read_containers, read_usage
from ._engine_parse import ContainerUsage
from ._probe_facts import FactsReader
from ._probe_parse import (
    CpuTimes,
    Mount,
    parse_cpu_times,
    parse_loadavg,
    parse_meminfo,
    parse_mountinfo,
    parse_net_dev,
    parse_oom_kills,
    parse_pressure,
    parse_service_units,
    parse_speed,
    parse_uptime,
    real_filesystems,
)
from ._probe_read import Reader
from ._probe_run import Batch, BoundedRunner, Key, MoreTasks, Outcome, Task, Wait
from ._probe_sensors import NO_SENSORS, Sensors
from ._sample_parts import (
    ContainersReading,
    Counters,
    CpuReading,
    MemoryReading,
    NetworkReading,
    Pressure,
    TimeReading,
    clock_part,
    cpu_part,
    filesystem_part,
    is_root_read_only,
    memory_part,
    network_part,
    reported_interfaces,
    services_part,
)

SCHEMA = 1
DEFAULT_INTERVAL_SECONDS = 1.0
DEFAULT_TIMEOUT_SECONDS = 5.0

_COLLECTOR_LIMIT_SECONDS = 2.0
# Asking a driver for its link speed takes the network lock, and a USB adapter's bus: not with every sample.
_LINKS_MAX_AGE_SECONDS = 60.0
_INTERFACES = "/sys/class/net"
_MOUNTS = "/proc/self/mountinfo"
# What costs much of a sample and rarely changes: the clock, asked through ctypes; the mounts, of which the kernel tells when
# there are others, but not of a filesystem that gave up writing; and all of vmstat for one number in it.
_RARE_MAX_AGE_SECONDS = 30.0
_EARLY_SECONDS = 2.0
_MAX_FILESYSTEMS = 64
_SHOW_SERVICES = ("systemctl", "show", "--no-pager", "--property=Id,ActiveState,NRestarts", "--", "*.service")

Clock = Callable[[], float]
JsonObject = Dict[str, JsonValue]


def collect_facts(
    reader: Reader,
    *,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    clock: Clock = time.monotonic,
    runner: Optional[BoundedRunner] = None,
) -> JsonObject:
    """Say what the node is; what could not be found out in *timeout_seconds* is null and named in ``errors``.

    A loop gives the same *runner* each time, so that a collector which still hangs is not started again.
    """
    deadline = clock() + timeout_seconds
    runner = runner or BoundedRunner(clock)
    tasks = [Task(name, call, _COLLECTOR_LIMIT_SECONDS) for name, call in FactsReader(reader, deadline).collectors()]
    try:
        outcome = runner.run(tasks, deadline)
    finally:
        runner.close()
    facts: Dict[str, object] = {"schema": SCHEMA}
    for task in tasks:
        facts[task.collector] = outcome.values.get(task.key)
    runtime, devices = facts["container_runtime"], facts["devices"]
    features = set(_words(facts["features"])) | set(_words(list(devices) if isinstance(devices, dict) else None))
    features.update(_words([facts["service_manager"], runtime.get("name") if isinstance(runtime, dict) else None]))
    facts["features"] = sorted(features)
    facts["devices"] = devices or {}
    facts["addresses"] = facts["addresses"] or []
    facts["ssh_host_keys"] = facts["ssh_host_keys"] or []
    facts["architecture"] = reader.machine
    facts["python_version"] = reader.python_version
    facts["errors"] = outcome.errors
    return _cleaned(facts)


def collect_sample(
    reader: Reader,
    interval_seconds: float = DEFAULT_INTERVAL_SECONDS,
    previous: Optional[Counters] = None,
    *,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    clock: Clock = time.monotonic,
    wall_clock: Clock = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> JsonObject:
    """Read the node's resources once.

    Shapes: the use of CPUs, network and containers is over the time since *previous*, or else over *interval_seconds*,
        which this waits for.
    Errors: ValueError if the interval does not fit into the timeout.
    """
    if previous is None and not 0 < interval_seconds < timeout_seconds:
        raise ValueError("interval_seconds must be more than 0 and less than timeout_seconds")
    deadline = clock() + timeout_seconds
    sampler = Sampler(reader, clock=clock, wall_clock=wall_clock, previous=previous)
    try:
        if previous is None:
            started = clock()
            sampler.prime((timeout_seconds - interval_seconds) * 0.4)
            sleep(max(0.0, started + interval_seconds - clock()))
        return sampler.sample(deadline - clock())
    finally:
        sampler.close()


def cleaned_sample(sample: Dict[str, object]) -> JsonObject:
    """Cap what the node says in a sample, without its containers if it is too large with them."""
    try:
        return _cleaned(sample)
    except TooLargeError as error:
        return without_containers(sample, str(error))


def without_containers(sample: Mapping[str, object], reason: str) -> JsonObject:
    """Leave the containers out of a sample that is too large with them.

    Shapes: the part becomes null, which says that they are not known; an empty list would say that there are none.
    """
    errors = sample.get("errors")
    left_out = {"collector": "containers", "message": "left out, the sample is too large with them: " + reason}
    return _cleaned({**sample, "containers": None, "errors": [*(errors if isinstance(errors, list) else ()), left_out]})


class Sampler:
    """Take samples in a loop; keeps the last counters, what never changes, and which collectors are stuck.

    *containers_interval_seconds* is how old the containers part may become: asking an engine about many containers
    costs far more than all the rest of a sample. *services_interval_seconds* is the same of the services part, which
    takes a process; without it the part is null.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        clock: Clock = time.monotonic,
        wall_clock: Clock = time.time,
        previous: Optional[Counters] = None,
        containers_interval_seconds: float = 0.0,
        services_interval_seconds: Optional[float] = None,
        wait: Optional[Wait] = None,
    ) -> None:
        self._reader = reader
        self._clock = clock
        self._wall_clock = wall_clock
        self._runner = BoundedRunner(clock, wait)
        self._previous = previous
        self._boot_id: Optional[str] = None
        self._cpu_count = 1
        # Parsing the mounts costs more than all other parts of a sample, and they hardly ever change.
        self._mounts_text = ""
        self._mounts_at = float("-inf")
        self._oom_kills: Tuple[float, Optional[int]] = (float("-inf"), None)
        self._mounts: Sequence[Task] = ()
        self._is_root_read_only: Optional[bool] = None
        self._pressures: Dict[str, Tuple[Optional[str], Pressure]] = {}
        self._links: AbstractSet[str] = frozenset()
        self._links_at = float("-inf")
        self._speeds: Dict[str, Optional[int]] = {}
        self._clock_at = float("-inf")
        self._time = (0.0, TimeReading(0.0, None))
        self._sensors = Sensors(reader, clock)
        self._runtime: Optional[Runtime] = None
        self._containers_interval_seconds = containers_interval_seconds
        self._containers_at = float("-inf")
        self._containers: Optional[ContainersReading] = None
        self._services_interval_seconds = services_interval_seconds
        self._services_at = float("-inf")
        self._services: Optional[Dict[str, object]] = None
        # What is as good as read anew, in the sample that is under way.
        self._kept: Dict[Key, object] = {}
        self._every_time = [
            self._task("cpu", self._read_cpu),
            self._task("memory", self._read_memory),
            self._task("io", lambda: self._read_pressure("io", with_full=True)),
            self._task("network", self._read_network),
        ]

    @property
    def previous(self) -> Optional[Counters]:
        """The counters of the last sample, for a later one to compare with."""
        return self._previous

    def prime(self, timeout_seconds: float) -> None:
        """Read only the counters, so that the next sample has something to compare with."""
        deadline = self._clock() + timeout_seconds
        self._take_counters(self._runner.run(self._counters_tasks(deadline), deadline))

    def sample(self, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> JsonObject:
        """Take a sample; what can't be read in *timeout_seconds* is null and named in its errors."""
        deadline = self._clock() + timeout_seconds
        return cleaned_sample(self._assemble(self._runner.run(self._sample_tasks(deadline), deadline)))

    def begin(self, then: Callable[[Callable[[], Dict[str, object]]], None]) -> Batch:
        """Begin a sample, on the thread that waits (see BoundedRunner); *then* gets what gives the sample, not cleaned."""
        deadline = self._clock() + DEFAULT_TIMEOUT_SECONDS
        return self._runner.begin(
            self._sample_tasks(deadline), deadline, lambda outcome: then(lambda: self._assemble(outcome))
        )

    def begin_priming(self, timeout_seconds: float, then: Callable[[Callable[[], None]], None]) -> Batch:
        """Begin what `prime` does, as `begin` begins a sample."""
        deadline = self._clock() + timeout_seconds
        return self._runner.begin(
            self._counters_tasks(deadline), deadline, lambda outcome: then(lambda: self._take_counters(outcome))
        )

    def look(self) -> float:
        """Give up what hangs; give the time to look again."""
        return self._runner.look()

    def keep_worker(self) -> None:
        """See that there is a thread that waits, or reads.

        Errors: RuntimeError if no thread can be had.
        """
        self._runner.keep_worker()

    def _counters_tasks(self, deadline: float) -> List[Task]:
        return [
            self._task("cpu", self._read_cpu),
            self._task("network", self._read_network),
            self._task("containers", lambda: self._read_containers_usage(deadline)),
        ]

    def _take_counters(self, outcome: Outcome) -> None:
        values = outcome.values
        usage = values.get(("containers", ""))
        self._remember(values.get(("cpu", "")), values.get(("network", "")), usage if isinstance(usage, dict) else {})

    def _sample_tasks(self, deadline: float) -> List[Task]:
        now = self._clock()
        tasks: List[Task] = []
        kept: Dict[Key, object] = {}
        if self._reader.has_changed(_MOUNTS) or _is_due(now - self._mounts_at, _RARE_MAX_AGE_SECONDS):
            # The kernel tells of a change once: whoever fails to read it tries again.
            self._mounts_at = float("-inf")
            tasks.append(self._task("filesystems", lambda: self._find_filesystems(now)))
        else:
            kept["filesystems", ""] = self._is_root_read_only
        if _is_due(now - self._clock_at, _RARE_MAX_AGE_SECONDS):
            tasks.append(self._task("clock", lambda: self._read_clock(now)))
        else:
            read_at, time_then = self._time
            uptime_seconds = round(time_then.uptime_seconds + now - read_at, 2)
            kept["clock", ""] = TimeReading(uptime_seconds, time_then.clock)
        tasks.extend(self._every_time)
        if self._containers is None or _is_due(now - self._containers_at, self._containers_interval_seconds):
            tasks.append(self._task("containers", lambda: self._read_containers(deadline, now)))
        else:
            kept["containers", ""] = self._containers
        if self._sensors.may_exist:
            tasks.append(self._task("thermal", self._sensors.read))
        else:
            kept["thermal", ""] = NO_SENSORS
        interval = self._services_interval_seconds
        if interval is not None and _is_due(now - self._services_at, interval):
            tasks.append(self._task("services", lambda: self._read_services(now)))
        if ("filesystems", "") in kept:
            # Last: one that does not answer is to hold up none of the others.
            tasks.extend(self._mounts)
        self._kept = kept
        return tasks

    def close(self) -> None:
        """End the idle worker thread."""
        self._runner.close()

    def _assemble(self, outcome: Outcome) -> Dict[str, object]:
        values = {**self._kept, **outcome.values}
        at, memory = values.get(("clock", "")), values.get(("memory", ""))
        cpu, network = values.get(("cpu", "")), values.get(("network", ""))
        containers = values.get(("containers", ""))
        before = self._previous
        usage = containers.usage if isinstance(containers, ContainersReading) else {}
        after = self._remember(cpu, network, usage)
        root = ("filesystems", "")
        filesystems = [values[key] for key in sorted(values) if key[0] == "filesystems" and key != root]
        errors = outcome.errors + (containers.errors if isinstance(containers, ContainersReading) else [])
        return {
            "schema": SCHEMA,
            "boot_id": self._boot_id,
            "uptime_seconds": at.uptime_seconds if isinstance(at, TimeReading) else None,
            "clock_unix_seconds": round(self._wall_clock(), 3),
            "clock": clock_part(at.clock) if isinstance(at, TimeReading) else None,
            "interval_seconds": None if before is None else round(after.at_seconds - before.at_seconds, 3),
            "cpu": cpu_part(cpu, before.cpu if before else None) if isinstance(cpu, CpuReading) else None,
            "memory": memory_part(memory) if isinstance(memory, MemoryReading) else None,
            "io": {"pressure": values.get(("io", ""))},
            "filesystems": filesystems if root in values else None,
            "network": network_part(network, before) if isinstance(network, NetworkReading) else None,
            "containers": containers.part if isinstance(containers, ContainersReading) else None,
            "thermal": values.get(("thermal", "")),
            "services": self._services,
            "root_read_only": is_root_read_only(values.get(root), filesystems),
            "errors": errors,
        }

    def _remember(self, cpu: object, network: object, usage: Mapping[str, ContainerUsage]) -> Counters:
        seen = network if isinstance(network, NetworkReading) else NetworkReading(self._clock(), {})
        times: Optional[CpuTimes] = cpu.times if isinstance(cpu, CpuReading) else None
        self._previous = Counters(seen.at_seconds, times, seen.counters, usage)
        return self._previous

    def _task(self, name: str, call: Callable[[], object], where: str = "") -> Task:
        return Task(name, call, _COLLECTOR_LIMIT_SECONDS, where)

    def _read_clock(self, now: float) -> TimeReading:
        if self._boot_id is None:
            self._boot_id = self._reader.read_word("/proc/sys/kernel/random/boot_id")
        uptime_seconds = parse_uptime(self._reader.read_again("/proc/uptime", whole=True))
        read_at = self._clock()
        time_now = TimeReading(uptime_seconds, self._reader.clock())
        self._time, self._clock_at = (read_at, time_now), now
        return time_now

    def _read_cpu(self) -> CpuReading:
        times = parse_cpu_times(self._reader.read_again("/proc/stat", whole=True))
        self._cpu_count = times.cpu_count
        loads = parse_loadavg(self._reader.read_again("/proc/loadavg", whole=True))
        return CpuReading(times, loads, self._read_pressure("cpu", with_full=False))

    def _read_memory(self) -> MemoryReading:
        memory = parse_meminfo(self._reader.read_again("/proc/meminfo", whole=True))
        now = self._clock()
        if _is_due(now - self._oom_kills[0], _RARE_MAX_AGE_SECONDS):
            self._oom_kills = (now, parse_oom_kills(self._reader.read_optional("/proc/vmstat", again=True)))
        return MemoryReading(memory, self._read_pressure("memory", with_full=True), self._oom_kills[1])

    def _read_pressure(self, resource: str, *, with_full: bool) -> Pressure:
        text = self._reader.read_optional("/proc/pressure/" + resource, again=True, whole=True)
        # Most nodes wait for nothing most of the time.
        known = self._pressures.get(resource)
        if known is None or known[0] != text:
            known = self._pressures[resource] = text, parse_pressure(text, with_full=with_full) if text else None
        return known[1]

    def _find_filesystems(self, now: float) -> MoreTasks:
        text = self._reader.read_again(_MOUNTS)
        if text != self._mounts_text:
            mounts = parse_mountinfo(text)
            # Mounts stacked on the root: the last one is what programs see.
            roots = [mount.read_only for mount in mounts if mount.mount_point == "/"]
            chosen = real_filesystems(mounts)[:_MAX_FILESYSTEMS]
            self._mounts = [self._task("filesystems", self._space_of(mount), mount.mount_point) for mount in chosen]
            self._is_root_read_only = roots[-1] if roots else None
            self._mounts_text = text
        self._mounts_at = now
        return MoreTasks(self._mounts, self._is_root_read_only)

    def _space_of(self, mount: Mount) -> Callable[[], object]:
        limit_seconds = _COLLECTOR_LIMIT_SECONDS * 0.9
        return lambda: filesystem_part(mount, self._reader.space(mount, limit_seconds))

    def _read_network(self) -> NetworkReading:
        counters = reported_interfaces(parse_net_dev(self._reader.read_again("/proc/net/dev")))
        now = self._clock()
        if _is_due(now - self._links_at, _LINKS_MAX_AGE_SECONDS) or self._links != counters.keys():
            self._links_at, self._links = now, counters.keys()
            self._speeds.clear()
            # Two interfaces may have swapped their names.
            self._reader.let_go(_INTERFACES)
        return NetworkReading(now, counters, {name: self._read_link(name) for name in counters})

    def _read_link(self, name: str) -> Tuple[Optional[bool], Optional[int]]:
        base = _INTERFACES + "/" + name
        state = self._reader.read_word(base + "/operstate", again=True)
        if state == "unknown":
            # Tunnels and modems never say up: what counts there is the carrier.
            carrier = self._reader.read_word(base + "/carrier", again=True)
            up: Optional[bool] = carrier == "1"
        else:
            up = None if state is None else state == "up"
        if not up:
            self._speeds.pop(name, None)
            return up, None
        if name not in self._speeds:
            self._speeds[name] = parse_speed(self._reader.read_word(base + "/speed"))
        return up, self._speeds[name]

    def _read_services(self, now: float) -> None:
        # Before the question: one that fails is not asked again with every sample.
        self._services_at, self._services = now, None
        if self._reader.exists("/run/systemd/system"):
            listing = self._reader.run(_SHOW_SERVICES, _COLLECTOR_LIMIT_SECONDS * 0.9)
            self._services = services_part(parse_service_units(listing)) if listing is not None else None

    def _read_containers_usage(self, deadline: float) -> Dict[str, ContainerUsage]:
        runtime = self._find_runtime(self._engine_deadline(deadline))
        if runtime is None or not runtime.listable:
            return {}
        return read_usage(runtime, self._reader.path(runtime.socket), self._engine_deadline(deadline))

    def _read_containers(self, deadline: float, now: float) -> ContainersReading:
        previous = self._previous.containers if self._previous else {}
        engine_deadline = self._engine_deadline(deadline)
        runtime = self._find_runtime(engine_deadline)
        part: Dict[str, object] = {"runtime": None, "version": None, "message": no_runtime_message(), "items": []}
        usage: Mapping[str, ContainerUsage] = {}
        errors: List[Dict[str, str]] = []
        if runtime is not None:
            part.update(runtime=runtime.name, version=runtime.version, message=None)
            if runtime.listable:
                try:
                    socket_path = self._reader.path(runtime.socket)
                    seen = read_containers(runtime, socket_path, engine_deadline, previous, self._cpu_count)
                except Exception:
                    # The daemon may be gone, or another one come: look for it afresh next time.
                    self._runtime = None
                    raise
                part["items"], usage = seen.items, seen.usage
                errors = [{"collector": "containers", "message": message} for message in seen.errors]
            else:
                part["message"] = cannot_list_message(runtime)
        self._containers_at, self._containers = now, ContainersReading(part, usage, errors)
        return self._containers

    def _find_runtime(self, deadline: float) -> Optional[Runtime]:
        if self._runtime is None or not self._runtime.listable:
            self._runtime = find_runtime(self._reader.path, deadline)
        return self._runtime

    def _engine_deadline(self, deadline: float) -> float:
        """Turn a deadline of this clock into one of time.monotonic, early enough to hand in what is there."""
        allowed_seconds = min(_COLLECTOR_LIMIT_SECONDS, deadline - self._clock()) - 0.2
        return time.monotonic() + allowed_seconds


def _is_due(age_seconds: float, interval_seconds: float) -> bool:
    """Tell whether something is to be read again; samples come a little sooner or later than their beat."""
    return age_seconds >= interval_seconds - min(_EARLY_SECONDS, interval_seconds / 4)


def _cleaned(value: Dict[str, object]) -> JsonObject:
    cleaned = clean(value)
    if not isinstance(cleaned, dict):
        raise AssertionError("clean() gives an object for an object")
    return cleaned


def _words(value: object) -> List[str]:
    return [word for word in value if isinstance(word, str)] if isinstance(value, list) else []
