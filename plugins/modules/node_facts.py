#!/usr/bin/python
# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: node_facts
short_description: Find out what a node is
version_added: "0.1.0"
author:
  - The Node Manager developers (@node-manager)
description:
  - Reads the hardware, the operating system, the devices, the container runtime and the features of a node.
  - Reads files of the kernel and the container engine's socket only, and changes nothing.
  - What the node can't tell is V(null). What could not be read in time is V(null) as well, and is named in
    RV(ansible_facts.node_manager.errors).
options:
  timeout_seconds:
    description:
      - How long all of it may take together. A part that hangs costs only itself.
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
  - Container runtimes are seen only by users who may open their socket, usually V(root).
seealso:
  - module: iot_platform.node_manager.node_resources
"""

EXAMPLES = r"""
- name: Find out what the nodes are
  iot_platform.node_manager.node_facts:

- name: Show the board
  ansible.builtin.debug:
    var: ansible_facts.node_manager.board
"""

RETURN = r"""
ansible_facts:
  description: The facts, under one name of their own.
  returned: success
  type: dict
  contains:
    node_manager:
      description: What the node is; the whole shape is in the collection's C(docs/observations.md).
      returned: success
      type: dict
      contains:
        architecture:
          description: The machine name of the kernel.
          returned: success
          type: str
          sample: aarch64
        board:
          description: The vendor and the model of the board or the machine.
          returned: success
          type: dict
          sample: {"vendor": "Raspberry Pi", "model": "Raspberry Pi 4 Model B Rev 1.4"}
        cpu:
          description: The number and the model of the processors.
          returned: success
          type: dict
          sample: {"count": 4, "model": "Cortex-A72"}
        memory_total_bytes:
          description: The memory that the kernel manages.
          returned: success
          type: int
          sample: 4014080000
        features:
          description: What applications may ask for, in order.
          returned: success
          type: list
          elements: str
          sample: ["cgroup_v2", "docker", "psi", "systemd"]
        errors:
          description: The parts that could not be read, with the reason.
          returned: success
          type: list
          elements: dict
          sample: []
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe import (
    DEFAULT_TIMEOUT_SECONDS,
    collect_facts,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_read import Reader


def main() -> None:
    module = AnsibleModule(
        argument_spec={"timeout_seconds": {"type": "float", "default": DEFAULT_TIMEOUT_SECONDS}},
        supports_check_mode=True,
    )
    timeout_seconds = module.params["timeout_seconds"]
    if not 0 < timeout_seconds <= 300:
        module.fail_json(msg="timeout_seconds must be more than 0 and at most 300")
    facts = collect_facts(Reader(), timeout_seconds=timeout_seconds)
    module.exit_json(changed=False, ansible_facts={"node_manager": facts})


if __name__ == "__main__":
    main()
