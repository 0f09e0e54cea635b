#!/usr/bin/python
# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: node_resources
short_description: Read how busy and how full a node is
version_added: "0.1.0"
author:
  - The Node Manager developers (@node-manager)
description:
  - Takes one sample of a node's CPUs, memory, swap, filesystems, network interfaces, containers and temperature.
  - Reads files of the kernel and the container engine's socket only, and changes nothing.
  - What the node can't tell is V(null). A part that fails or hangs is V(null) too, or lacks the item, and is named in
    RV(sample.errors).
options:
  interval_seconds:
    description:
      - The time over which the use of the CPUs, the network and the containers is measured. The module waits for it.
    type: float
    default: 1.0
  timeout_seconds:
    description:
      - How long all of it may take together, the interval included.
    type: float
    default: 5.0
attributes:
  check_mode:
    description: Can run in check mode and return the same as without it.
    support: full
  diff_mode:
    description: Returns details on what has changed, or would change, in diff mode.
    support: none
    details:
      - The module changes nothing.
  platform:
    description: The platforms that the module runs on.
    support: full
    platforms: linux
notes:
  - Needs Python 3.8 or newer on the node, and nothing else.
  - Containers are seen only by users who may open the engine's socket, usually V(root).
seealso:
  - module: iot_platform.node_manager.node_facts
"""

EXAMPLES = r"""
- name: Read the resources of the nodes
  iot_platform.node_manager.node_resources:
  register: resources

- name: Show how busy the processors are
  ansible.builtin.debug:
    var: resources.sample.cpu.use_percent

- name: Measure over a longer time
  iot_platform.node_manager.node_resources:
    interval_seconds: 10
    timeout_seconds: 15
"""

RETURN = r"""
sample:
  description: The sample; the whole shape is in the collection's C(docs/observations.md).
  returned: success
  type: dict
  contains:
    interval_seconds:
      description: The time between the two readings that the shares and rates were made from.
      returned: success
      type: float
      sample: 1.0
    cpu:
      description: The use of all processors together, the load averages and the pressure.
      returned: success
      type: dict
      sample: {"count": 4, "use_percent": 12.5, "load_1m": 0.42}
    memory:
      description: Memory and swap.
      returned: success
      type: dict
      sample: {"total_bytes": 4014080000, "available_bytes": 2812080000, "use_percent": 29.9}
    filesystems:
      description: The real filesystems, each once.
      returned: success
      type: list
      elements: dict
      sample: [{"mount": "/", "read_only": false, "use_percent": 28.3}]
    network:
      description: The network interfaces with their counters and rates.
      returned: success
      type: list
      elements: dict
      sample: [{"interface": "eth0", "up": true, "received_bytes_per_second": 1200.0}]
    containers:
      description: The containers that the engine knows, or a message why there are none.
      returned: success
      type: dict
      sample: {"runtime": "docker", "version": "24.0.7", "message": null, "items": []}
    errors:
      description: The collectors that failed or hung, with the reason.
      returned: success
      type: list
      elements: dict
      sample: []
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe import (
    DEFAULT_INTERVAL_SECONDS,
    DEFAULT_TIMEOUT_SECONDS,
    collect_sample,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_read import Reader


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "interval_seconds": {"type": "float", "default": DEFAULT_INTERVAL_SECONDS},
            "timeout_seconds": {"type": "float", "default": DEFAULT_TIMEOUT_SECONDS},
        },
        supports_check_mode=True,
    )
    interval_seconds, timeout_seconds = module.params["interval_seconds"], module.params["timeout_seconds"]
    if not 0 < interval_seconds < timeout_seconds <= 300:
        module.fail_json(msg="interval_seconds must be more than 0 and less than timeout_seconds, which is at most 300")
    sample = collect_sample(Reader(), interval_seconds, timeout_seconds=timeout_seconds)
    module.exit_json(changed=False, sample=sample)


if __name__ == "__main__":
    main()
