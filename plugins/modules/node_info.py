#!/usr/bin/python
# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: node_info
short_description: Read nodes from the registry
version_added: "0.1.0"
description:
  - Gives one node with all that is known of it, or the nodes that pass some filters.
  - Works on the controller and never connects to a node.
  - The registry is the store of this machine, or the HTTP API when E(NODE_MANAGER_URL) is set.
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
options:
  node_id:
    description: Only this node, with its facts, conditions and host keys. Excludes all filters.
    type: str
  status:
    description: Only nodes of this status.
    type: str
    choices: [online, offline, maintenance]
  health:
    description: Only nodes of this health.
    type: str
    choices: [unknown, healthy, degraded, suspect, unreachable, recovering, flapping]
  type:
    description: Only nodes of this type.
    type: str
  zone:
    description: Only nodes in this zone.
    type: str
  site:
    description: Only nodes at this site.
    type: str
  region:
    description: Only nodes in this region.
    type: str
  labels:
    description: Only nodes that have all of these labels.
    type: dict
seealso:
  - module: iot_platform.node_manager.node
"""

EXAMPLES = r"""
- name: List the nodes of a zone that are out
  iot_platform.node_manager.node_info:
    zone: eu-1a
    status: offline
  register: out
  run_once: true

- name: Say which they are
  ansible.builtin.debug:
    msg: "{{ out.nodes | map(attribute='node_id') }}"
  run_once: true
"""

RETURN = r"""
nodes:
  description: The nodes, in the order of their ids; empty where there is none.
  returned: success
  type: list
  elements: dict
  sample: [{"node_id": "gw-7", "address": "192.0.2.7", "status": "offline", "generation": 1}]
code:
  description: The registry's stable code of what went wrong.
  returned: failure
  type: str
  sample: store_unavailable
"""
