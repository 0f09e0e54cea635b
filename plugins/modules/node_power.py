#!/usr/bin/python
# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: node_power
short_description: Switch a node off and on
version_added: "0.1.0"
description:
  - Runs the operator's own command for it on the controller, or calls the operator's URL.
  - Works on the controller and never connects to the node, so it also works for a node that is dead.
  - How it is done comes from C(recovery.power) of the manager's C(config.json), unless the task says so.
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
    description: Can run in check mode and return changed status prediction without switching anything.
    support: full
  diff_mode:
    description: Returns details on what has changed, or would change, in diff mode.
    support: full
  idempotent:
    description: When run twice with the same arguments, the second run changes nothing.
    support: none
    details:
      - It switches the node off and on each time.
options:
  node_id:
    description: The name of the node. The host of the task where left out.
    type: str
  address:
    description: The address of the node. C(ansible_host) where left out, else O(node_id).
    type: str
  recovery_id:
    description: The recovery that this belongs to.
    type: str
    default: ""
  command:
    description:
      - Program and arguments. No shell is involved.
      - C({node_id}) and C({address}) in them are replaced. E(NODE_ID), E(NODE_ADDRESS) and E(RECOVERY_ID) are set.
      - It fails where it doesn't exit with 0. At its time limit it is killed with all that it has started.
    type: list
    elements: str
  url:
    description:
      - Where to send a POST with C(node_id), C(address) and C(recovery_id) as JSON.
      - C({node_id}) in it is replaced. It fails where the answer is not of the 2xx kind; redirects are not followed.
    type: str
  token_file:
    description: A file with the bearer token for O(url).
    type: path
  timeout_seconds:
    description: How long it may take. What C(config.json) says where left out, else 60.
    type: float
notes:
  - Refused for the manager's own machine.
seealso:
  - module: iot_platform.node_manager.node_recover
"""

EXAMPLES = r"""
- name: Switch the node off and on as config.json says
  iot_platform.node_manager.node_power:

- name: Switch the node off and on through its socket
  iot_platform.node_manager.node_power:
    command: [/usr/local/bin/pdu, cycle, "{node_id}"]
    timeout_seconds: 30
"""

RETURN = r"""
way:
  description: How it was done, V(command) or V(url).
  returned: success
  type: str
  sample: command
output:
  description: The end of what was answered.
  returned: success
  type: str
  sample: outlet 7 cycled
"""
