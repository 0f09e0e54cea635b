#!/usr/bin/python
# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: optimization_info
short_description: Ask which allocations had better be on other nodes
version_added: "0.1.0"
description:
  - Gives advice on how to make the nodes more evenly full. Nothing is moved.
  - Works on the controller and never connects to a node.
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
    description: Can run in check mode and return the same as without it.
    support: full
  diff_mode:
    description: Returns details on what has changed, or would change, in diff mode.
    support: none
    details:
      - The module changes nothing.
options: {}
"""

EXAMPLES = r"""
- name: Ask for advice
  iot_platform.node_manager.optimization_info:
  register: advice
  run_once: true

- name: Show it
  ansible.builtin.debug:
    var: advice.summary
  run_once: true
"""

RETURN = r"""
summary:
  description: The advice in words, a line for each move.
  returned: success
  type: list
  elements: str
  sample: ["imbalance 0.310, 0.120 after 1 move", "web-1:0: gw-1 -> gw-2 (memory_mib 90 % -> 40 %)"]
moves:
  description: The moves, in the order in which to make them.
  returned: success
  type: list
  elements: dict
  contains:
    allocation_id:
      description: What to move.
      type: str
      sample: web-1:0
    deployment_id:
      description: What it is for.
      type: str
      sample: web-1
    from_node:
      description: Where it is.
      type: str
      sample: gw-1
    to_node:
      description: Where it had better be.
      type: str
      sample: gw-2
    gain:
      description: How far the imbalance falls by this move.
      type: float
      sample: 0.19
    reason:
      description: Why.
      type: str
      sample: memory_mib 90 % -> 40 %
imbalance_before:
  description: How unevenly the nodes are full, from 0, which is even, to 1.
  returned: success
  type: float
  sample: 0.31
imbalance_after:
  description: The same after all moves.
  returned: success
  type: float
  sample: 0.12
at:
  description: When the advice was given.
  returned: success
  type: str
  sample: "2026-11-22T18:00:00.000000Z"
more:
  description: Whether there is more to move than one advice names.
  returned: success
  type: bool
  sample: false
code:
  description: The manager's stable code of what went wrong.
  returned: failure
  type: str
  sample: store_unavailable
"""
