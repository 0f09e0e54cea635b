#!/usr/bin/python
# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: node_recover
short_description: Do one act of repair on a node
version_added: "0.1.0"
description:
  - Does one act of repair on the node, if what it is for is really broken there.
  - In check mode it only looks, and says in RV(act.needed) whether there is something to repair.
  - The role P(iot_platform.node_manager.node_recover#role) runs it between a look before and a look after.
author:
  - The Node Manager developers (@node-manager)
attributes:
  action:
    description: Indicates this has a corresponding action plugin so some parts of the options can be executed on the controller.
    support: full
  async:
    description: Supports being used with the C(async) keyword.
    support: none
  check_mode:
    description: Can run in check mode and return changed status prediction without modifying the node.
    support: full
    details:
      - How much V(free_disk) will free can't be told before where other programs do it.
  diff_mode:
    description: Returns details on what has changed, or would change, in diff mode.
    support: full
  idempotent:
    description: When run twice with the same arguments, the second run changes nothing.
    support: partial
    details:
      - O(step=reboot) reboots each time it is asked to.
  platform:
    description: The operating systems of the nodes.
    platforms: linux
    support: full
requirements:
  - Python 3.8 or newer on the node
  - The right to do it, usually C(become)
options:
  step:
    description:
      - V(restart_service) restarts those of O(units) that are not active.
      - V(restart_container) restarts those of O(containers) that don't run or are unhealthy, and thaws those that are paused.
      - V(restart_container_runtime) restarts docker, containerd, cri-o or podman where its socket is there and does not
        answer, or its unit is not active although it is enabled, or in O(units), or O(unjudged).
      - V(free_disk) removes what O(sources) says from filesystems that are too full, until they are a tenth below their limit.
      - V(renew_clock) restarts the time daemon where the clock is not synchronised.
      - V(remount_root) mounts C(/) for writing, unless C(/etc/fstab) wants it read-only.
      - V(reboot) reboots the node in a few seconds; with O(since_boot) it waits until that is done. Refused for the
        manager's own machine.
    type: str
    required: true
    choices:
      - restart_service
      - restart_container
      - restart_container_runtime
      - free_disk
      - renew_clock
      - remount_root
      - reboot
  units:
    description: systemd units that should be active.
    type: list
    elements: str
    default: []
  containers:
    description: Names of containers that should run.
    type: list
    elements: str
    default: []
  unjudged:
    description: Whether there are containers of which nobody could tell whether they run.
    type: bool
    default: false
  sources:
    description:
      - What V(free_disk) may remove; nothing else is touched.
      - V(packages) are downloaded packages of apt and dnf. V(journal) is what the journal has beyond O(journal_mib).
      - V(tmpfiles) is what C(systemd-tmpfiles --clean) removes. V(core_dumps) are those of systemd-coredump.
      - V(rotated_logs) are files below C(/var/log) that were put aside more than a day ago.
      - V(temporary_files) are files in C(/tmp) and C(/var/tmp) that nobody read or wrote for O(older_than_days).
      - V(images) are images without a name and a container, V(build_cache) what builds of images left.
    type: list
    elements: str
    choices: [packages, journal, tmpfiles, core_dumps, rotated_logs, temporary_files, images, build_cache]
    default: [packages, journal, tmpfiles, core_dumps, rotated_logs, temporary_files, images, build_cache]
  space_percent:
    description: From which use of its space a filesystem is too full.
    type: float
    default: 85
  inodes_percent:
    description: From which use of its inodes a filesystem is too full.
    type: float
    default: 85
  filesystems:
    description:
      - Filesystems with limits of their own, each with C(mount), C(space_percent) and C(inodes_percent), as checks of the kind
        V(filesystem) are written; their other keys are left alone.
      - The stricter limit counts. These are looked at whatever their type.
    type: list
    elements: dict
    default: []
  older_than_days:
    description: How long nobody may have read or written a temporary file that is removed.
    type: float
    default: 10
  journal_mib:
    description: How much of the journal stays.
    type: int
    default: 64
  since_boot:
    description: The RV(act.before) C(boot) that was seen before a reboot. Waits until the node has started anew since.
    type: str
  timeout_seconds:
    description: How long all of it may take.
    type: float
    default: 50
seealso:
  - module: iot_platform.node_manager.node_health
  - module: iot_platform.node_manager.node_power
  - module: iot_platform.node_manager.node_recovery
"""

EXAMPLES = r"""
- name: Bring services back to work
  iot_platform.node_manager.node_recover:
    step: restart_service
    units: [mosquitto.service, chrony.service]
  become: true

- name: See what a full disk would give back
  iot_platform.node_manager.node_recover:
    step: free_disk
    sources: [packages, rotated_logs, core_dumps]
    space_percent: 80
  become: true
  check_mode: true
  diff: true
"""

RETURN = r"""
act:
  description: What was found, and what was done.
  returned: success
  type: dict
  contains:
    step:
      description: The O(step).
      type: str
      returned: success
      sample: restart_service
    needed:
      description: Whether there was something to repair.
      type: bool
      returned: success
      sample: true
    changed:
      description: Whether something was done, or would be.
      type: bool
      returned: success
      sample: true
    message:
      description: What was done, in one line; in check mode why it is needed.
      type: str
      returned: success
      sample: restarted mosquitto.service
    before:
      description: What was found.
      type: dict
      returned: success
      sample: {mosquitto.service: failed (failed)}
    after:
      description: What it is now, or would be.
      type: dict
      returned: success
      sample: {mosquitto.service: active (running)}
    done:
      description: Each thing that was done.
      type: list
      elements: str
      returned: success
      sample: [restarted mosquitto.service]
    freed_bytes:
      description: How much V(free_disk) freed, V(null) for other steps.
      type: int
      returned: success
      sample: 104857600
"""

import time
from typing import Any, Dict, Optional

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks_spec import one_line
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recover_containers import (
    ask_engines,
    restart_containers,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recover_disk import (
    SOURCES,
    Limits,
    Order,
    free_disk,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recover_host import (
    read_boot,
    read_clock,
    reboot,
    remount_root,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recover_run import Repair, RepairError
from ansible_collections.iot_platform.node_manager.plugins.module_utils._recover_units import (
    renew_clock,
    restart_runtime,
    restart_services,
)

ARGUMENT_SPEC: Dict[str, Dict[str, Any]] = {
    "step": {
        "type": "str",
        "required": True,
        "choices": [
            "restart_service",
            "restart_container",
            "restart_container_runtime",
            "free_disk",
            "renew_clock",
            "remount_root",
            "reboot",
        ],
    },
    "units": {"type": "list", "elements": "str", "default": []},
    "containers": {"type": "list", "elements": "str", "default": []},
    "unjudged": {"type": "bool", "default": False},
    "sources": {"type": "list", "elements": "str", "choices": list(SOURCES), "default": list(SOURCES)},
    "space_percent": {"type": "float", "default": 85},
    "inodes_percent": {"type": "float", "default": 85},
    "filesystems": {"type": "list", "elements": "dict", "default": []},
    "older_than_days": {"type": "float", "default": 10},
    "journal_mib": {"type": "int", "default": 64},
    "since_boot": {"type": "str"},
    "timeout_seconds": {"type": "float", "default": 50},
}


_PERCENTS = ("space_percent", "inodes_percent")


def check_params(params: Dict[str, Any]) -> Optional[str]:
    """Say what is wrong with the arguments, None if nothing is."""
    # The comparisons also refuse NaN.
    if not 1 <= params["timeout_seconds"] <= 3600:
        return "timeout_seconds: expected a number from 1 to 3600"
    if not 0 <= params["older_than_days"] <= 36500:
        return "older_than_days: expected a number from 0 to 36500"
    percents = [params["space_percent"], params["inodes_percent"]]
    for limits in params["filesystems"]:
        if not isinstance(limits.get("mount"), str) or not limits["mount"].startswith("/"):
            return "filesystems: mount: expected an absolute path"
        percents += [limits[key] for key in _PERCENTS if limits.get(key) is not None]
    if any(isinstance(percent, bool) or not isinstance(percent, (int, float)) for percent in percents):
        return "space_percent, inodes_percent: expected numbers"
    if any(not 0 <= percent <= 100 for percent in percents):
        return "space_percent, inodes_percent: expected a number from 0 to 100"
    return "journal_mib: expected at least 8" if params["journal_mib"] < 8 else None


def order_of(params: Dict[str, Any], deadline: float, check_mode: bool) -> Order:
    """Shape the arguments as the freeing of disks takes them."""
    general = Limits(params["space_percent"], params["inodes_percent"])
    own = {
        limits["mount"]: Limits(*(float(params[key] if limits.get(key) is None else limits[key]) for key in _PERCENTS))
        for limits in params["filesystems"]
    }
    return Order(
        params["sources"], general, own, params["older_than_days"], params["journal_mib"], deadline, check_mode
    )


def repair(params: Dict[str, Any], check_mode: bool) -> Repair:
    """Do the step."""
    deadline = time.monotonic() + params["timeout_seconds"]
    step = params["step"]
    if step == "restart_service":
        return restart_services(params["units"], deadline, check_mode=check_mode)
    if step == "restart_container":
        return restart_containers(params["containers"], deadline, locate=str, check_mode=check_mode)
    if step == "restart_container_runtime":
        engines = ask_engines(str, deadline)
        return restart_runtime(params["units"], engines, deadline, unjudged=params["unjudged"], check_mode=check_mode)
    if step == "free_disk":
        return free_disk(order_of(params, deadline, check_mode))
    if step == "renew_clock":
        return renew_clock(lambda: read_clock(deadline), deadline, check_mode=check_mode)
    if step == "remount_root":
        return remount_root(deadline, check_mode=check_mode)
    if params["since_boot"]:
        return Repair(False, "looked which boot it is", before={"boot": read_boot()})
    return reboot(check_mode=check_mode)


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    wrong = check_params(module.params)
    if wrong:
        module.fail_json(msg=wrong)
    try:
        act = repair(module.params, module.check_mode).as_answer(module.params["step"])
    except (RepairError, OSError) as error:
        module.fail_json(msg=one_line(error))
    act["message"] = one_line(act["message"])
    module.exit_json(changed=act["changed"], act=act)


if __name__ == "__main__":
    main()
