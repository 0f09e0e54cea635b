#!/usr/bin/python
# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: node_allocation
short_description: Reserve resources on a node
version_added: "0.1.0"
description:
  - Reserves resources on a node, keeps them for good, or releases them.
  - Works on the controller and never connects to the node.
  - To have nodes chosen and reserved in one go, use the lookup P(iot_platform.node_manager.select_nodes#lookup).
  - The manager is the store of this machine, or the HTTP API when E(NODE_MANAGER_URL) is set.
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
    description: Can run in check mode and return changed status prediction without modifying the allocations.
    support: full
    details:
      - Says in RV(fits) whether the node has room now. Quotas are not looked at.
  diff_mode:
    description: Returns details on what has changed, or would change, in diff mode.
    support: full
  idempotent:
    description: When run twice with the same arguments, the second run changes nothing.
    support: full
options:
  state:
    description:
      - V(present) reserves the resources. An allocation can't be changed. The task fails where O(allocation_id) is taken by
        another one.
      - V(absent) releases them.
    type: str
    choices: [present, absent]
    default: present
  allocation_id:
    description: The name of the allocation. You choose it, and it makes repeated runs harmless.
    type: str
    required: true
  node_id:
    description: >-
      The node. Where left out, the host of the task; to release, whichever node the allocation is on.
    type: str
  owner:
    description: Whose quota counts. Required to reserve.
    type: str
  deployment_id:
    description: What it is for.
    type: str
  resources:
    description:
      - The amount per resource class, such as C(cpu_millicores), C(memory_mib) or C(gpu). Required to reserve.
      - A whole number, as a number or a text. Of devices also a dictionary of C(count), the number of units, and
        C(share_milli), the thousandths of each.
    type: dict
  ttl_seconds:
    description: Release after this time unless confirmed. Kept until released where left out.
    type: int
  confirmed:
    description:
      - Keep for good what was reserved with O(ttl_seconds).
      - Without O(owner) and O(resources) nothing new is reserved. The task then fails where the allocation isn't there any
        more, except in check mode.
    type: bool
    default: false
seealso:
  - module: iot_platform.node_manager.deployment
  - plugin: iot_platform.node_manager.select_nodes
    plugin_type: lookup
"""

EXAMPLES = r"""
- name: Reserve on the host of the play for ten minutes
  iot_platform.node_manager.node_allocation:
    allocation_id: "batch-1.{{ inventory_hostname }}"
    owner: team-a
    resources: {cpu_millicores: 500, memory_mib: 256, gpu: {count: 1, share_milli: 500}}
    ttl_seconds: 600

- name: Keep it
  iot_platform.node_manager.node_allocation:
    allocation_id: "batch-1.{{ inventory_hostname }}"
    confirmed: true

- name: Release it
  iot_platform.node_manager.node_allocation:
    allocation_id: "batch-1.{{ inventory_hostname }}"
    state: absent
"""

RETURN = r"""
allocation_id:
  description: The name of the allocation.
  returned: success
  type: str
  sample: batch-1.gw-7
allocation:
  description: The allocation as the manager shows it; null when it is absent, and in check mode for a new one.
  returned: success
  type: dict
  sample:
    allocation_id: batch-1.gw-7
    node_id: gw-7
    owner: team-a
    deployment_id: null
    resources: {cpu_millicores: 500, memory_mib: 256, gpu: {count: 1, share_milli: 500}}
    units: {gpu: {"0": 500}}
    ttl_seconds: 600
    expires_at: "2026-11-22T18:10:00.000000Z"
    created_at: "2026-11-22T18:00:00.000000Z"
fits:
  description: Whether the node has room now.
  returned: in check mode, for a new allocation
  type: bool
  sample: true
code:
  description: The manager's stable code of what went wrong.
  returned: failure
  type: str
  sample: insufficient_resources
"""
