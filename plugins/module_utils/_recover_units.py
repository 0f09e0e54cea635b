# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bring systemd units, the container runtime and the clock back to work.

What is to be done is decided by pure functions (`plan_...`) from what `systemctl show` says. Runs on nodes with Python
3.8; changes units only through systemctl.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

from ._checks_host import parse_systemctl_show
from ._checks_spec import one_line
from ._recover_run import Ended, Repair, RepairError, Run, run_program, wait_until

# What counts as at work, as for checks of kind `service`.
WORKING = ("active", "reloading", "refreshing")
# A service that dies right after its start is active for a moment: it must stay so, as the same process, for this long.
SETTLE_SECONDS = 2.0
_ASK_SECONDS = 10.0
_PROPERTIES = "Id,LoadState,ActiveState,SubState,Result,UnitFileState,Job,MainPID"

# In the order in which they need each other.
RUNTIME_UNITS = ("containerd.service", "crio.service", "docker.service", "podman.socket")
_UNIT_OF_ENGINE = {"docker": "docker.service", "podman": "podman.socket"}
# The first that is there and enabled or active is the one that keeps the time.
CLOCK_UNITS = (
    "chrony.service",
    "chronyd.service",
    "ntpsec.service",
    "ntpd.service",
    "ntp.service",
    "openntpd.service",
    "systemd-timesyncd.service",
)


@dataclass(frozen=True)
class Unit:
    """What systemd says of a unit."""

    name: str
    load: str = ""
    active: str = ""
    detail: str = ""
    result: str = ""
    enabled: str = ""
    job: str = ""
    main_pid: str = "0"

    @property
    def is_there(self) -> bool:
        """Tell whether it can be started."""
        return self.load == "loaded"

    @property
    def works(self) -> bool:
        """Tell whether it is active."""
        return self.active in WORKING

    @property
    def shown(self) -> str:
        """Say its state in a few words."""
        if not self.is_there:
            return self.load or "unknown"
        return "{} ({})".format(self.active, self.detail) if self.detail else self.active


class Systemd:
    """Ask and tell systemd, each time with a deadline."""

    def __init__(self, deadline: float, run: Run = run_program) -> None:
        self._deadline = deadline
        self._run = run

    def show(self, name: str) -> Unit:
        """Read a unit's state.

        Errors: RepairError if systemd can't be asked.
        """
        ended = self._ask("show", "--property", _PROPERTIES, "--", name)
        if ended.status != 0:
            raise RepairError("systemctl could not tell of {}: {}".format(name, one_line(ended.describe(), 200)))
        return parse_unit(name, ended.output)

    def restart(self, unit: Unit) -> Unit:
        """Restart a unit and wait until it is at work, has failed, or the time is over; give its state then.

        Errors: RepairError if systemd refuses.
        """
        # Without this a unit that was restarted too often is refused. It has nothing to say where nothing had failed.
        self._ask("reset-failed", "--", unit.name)
        ended = self._ask("--no-block", "restart", "--", unit.name)
        if ended.status != 0:
            raise RepairError("{} could not be restarted: {}".format(unit.name, one_line(ended.describe(), 200)))
        return self._settled(unit.name)

    def _settled(self, name: str) -> Unit:
        seen = [self.show(name)]
        stop_by = time.monotonic() + max(0.0, self._deadline - time.monotonic()) / 2

        def is_over() -> bool:
            seen.append(self.show(name))
            return not _is_busy(seen[-1])

        def is_stopped() -> bool:
            return is_over() or seen[-1].active != "deactivating"

        if not wait_until(is_stopped, stop_by):
            # It doesn't let itself be stopped, and its own time limit may be long.
            self._ask("kill", "--signal=KILL", "--", name)
        if not wait_until(is_over, self._deadline):
            if seen[-1].job:
                self._ask("cancel", seen[-1].job)
            return seen[-1]
        if seen[-1].works:
            time.sleep(max(0.0, min(SETTLE_SECONDS, self._deadline - time.monotonic())))
            later = self.show(name)
            if later.works and later.main_pid != seen[-1].main_pid:
                return Unit(name, later.load, "failing", "it ended right after its start", later.result)
            return later
        return seen[-1]

    def _ask(self, *arguments: str) -> Ended:
        # Past its own deadline there must still be time to cancel a job.
        now = time.monotonic()
        return self._run(["systemctl", *arguments], max(min(now + _ASK_SECONDS, self._deadline), now + 2.0))


# Id=demo-app.service
# ActiveState=failed
def parse_unit(name: str, text: str) -> Unit:
    """Read what `systemctl show --property` prints of one unit.

    Source: systemctl(1), systemd >= 239.
    """
    pairs = parse_systemctl_show(text)

    def word(key: str) -> str:
        return one_line(pairs.get(key, ""), 60)

    job = word("Job")
    return Unit(
        name,
        load=word("LoadState"),
        active=word("ActiveState"),
        detail=word("SubState"),
        result=word("Result"),
        enabled=word("UnitFileState"),
        job=job if job.isdigit() and job != "0" else "",
        main_pid=word("MainPID") or "0",
    )


def restart_services(names: Sequence[str], deadline: float, *, check_mode: bool, run: Run = run_program) -> Repair:
    """Restart those of the named units that are not at work."""
    systemd = Systemd(deadline, run)
    units = [systemd.show(name) for name in names]
    broken = [unit for unit in units if not unit.works]
    why = "; ".join("{} is {}".format(unit.name, unit.shown) for unit in broken)
    return _restart(systemd, units, broken, why or "no service to restart", check_mode)


def restart_runtime(
    units: Sequence[str],
    engines: Mapping[str, Optional[str]],
    deadline: float,
    *,
    unjudged: bool,
    check_mode: bool,
    run: Run = run_program,
) -> Repair:
    """Restart the container runtimes that don't work.

    Shapes: *units* are those of failed checks; *engines* has for each engine whose socket is there None if it answered,
    else the reason; *unjudged* where a check of a container could not be judged.
    """
    systemd = Systemd(deadline, run)
    found = [unit for unit in (systemd.show(name) for name in RUNTIME_UNITS) if unit.is_there]
    reasons = plan_runtime(found, units, engines, unjudged)
    broken = [unit for unit in found if unit.name in reasons]
    silent = [] if broken else ["{} ({})".format(name, reason) for name, reason in engines.items() if reason]
    why = "; ".join([*reasons.values(), *silent]) or "the container runtime works"
    if silent:
        return _impossible(check_mode, "no unit to restart for {}".format("; ".join(silent)))
    return _restart(systemd, found, broken, why, check_mode)


def plan_runtime(
    found: Sequence[Unit], units: Sequence[str], engines: Mapping[str, Optional[str]], unjudged: bool
) -> Dict[str, str]:
    """Decide which runtime units are to be restarted, and why; in the order in which they need each other."""
    reasons: Dict[str, str] = {}
    for unit in found:
        silent = [reason for name, reason in engines.items() if reason and _UNIT_OF_ENGINE.get(name) == unit.name]
        answers = any(not reason and _UNIT_OF_ENGINE.get(name) == unit.name for name, reason in engines.items())
        if silent:
            reasons[unit.name] = "{} does not answer ({})".format(unit.name, silent[0])
        # An engine that starts with the first question to its socket may be inactive until then.
        elif not unit.works and not answers and (unit.enabled == "enabled" or unit.name in units or unjudged):
            reasons[unit.name] = "{} is {}".format(unit.name, unit.shown)
    return reasons


def renew_clock(
    read_clock: Callable[[], Optional[bool]], deadline: float, *, check_mode: bool, run: Run = run_program
) -> Repair:
    """Restart what keeps the clock, where the clock is not synchronised.

    Shapes: *read_clock* gives None where nobody can tell.
    """
    synchronised = read_clock()
    if synchronised is None:
        return Repair(False, "whether the clock is synchronised can't be told here")
    if synchronised:
        return Repair(False, "the clock is synchronised")
    systemd = Systemd(deadline, run)
    unit = plan_clock([systemd.show(name) for name in CLOCK_UNITS])
    if unit is None:
        return _impossible(check_mode, "the clock is not synchronised, and no time daemon is installed")
    why = "the clock is not synchronised, {} is {}".format(unit.name, unit.shown)
    repair = _restart(systemd, [unit], [unit], why, check_mode)
    if not check_mode and unit.name.startswith("chrony"):
        # A large offset is otherwise slewed for hours. It has no sources yet where the network is slow: no failure.
        time.sleep(1)
        run(["chronyc", "-a", "makestep"], min(deadline, time.monotonic() + 5))
    return repair


def plan_clock(units: Sequence[Unit]) -> Optional[Unit]:
    """Choose the daemon that keeps the clock: one that runs, else one that should, else any that is there."""
    there = [unit for unit in units if unit.is_there]
    choices = [unit for unit in there if unit.works] + [unit for unit in there if unit.enabled == "enabled"] + there
    return choices[0] if choices else None


def _restart(systemd: Systemd, units: Sequence[Unit], broken: Sequence[Unit], why: str, check_mode: bool) -> Repair:
    before = {unit.name: unit.shown for unit in units}
    if not broken:
        return Repair(False, why, before=before, after=before)
    startable = [unit for unit in broken if unit.is_there]
    if check_mode:
        after = {**before, **{unit.name: "active" for unit in startable}}
        return Repair(True, why, changed=bool(startable), before=before, after=after)
    states, failures = _restart_each(systemd, startable)
    failures += ["{} is {}".format(unit.name, unit.shown) for unit in broken if not unit.is_there]
    if failures:
        raise RepairError("; ".join(failures))
    done = ["restarted {}".format(unit.name) for unit in startable]
    return Repair(True, ", ".join(done), changed=True, before=before, after={**before, **states}, done=done)


def _restart_each(systemd: Systemd, units: Sequence[Unit]) -> Tuple[Dict[str, str], List[str]]:
    states: Dict[str, str] = {}
    failures: List[str] = []
    for unit in units:
        try:
            now = systemd.restart(unit)
        except RepairError as error:
            failures.append(str(error))
            continue
        states[unit.name] = now.shown
        if not now.works:
            result = ", result {}".format(now.result) if now.result not in ("", "success") else ""
            failures.append("{} was restarted and is {}{}".format(unit.name, now.shown, result))
    return states, failures


def _impossible(check_mode: bool, message: str) -> Repair:
    if check_mode:
        return Repair(True, message)
    raise RepairError(message)


def _is_busy(unit: Unit) -> bool:
    if unit.active == "activating" and unit.detail == "auto-restart":
        return False
    return bool(unit.job) or unit.active in ("activating", "deactivating")
