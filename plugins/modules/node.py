#!/usr/bin/python
# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: node
short_description: Declare a node in the registry
version_added: "0.1.0"
description:
  - Registers a node, changes what is declared about it, or deregisters it.
  - Works on the controller and never connects to the node, so it also works for a node that is dead.
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
    description: Can run in check mode and return changed status prediction without modifying the registry.
    support: full
  diff_mode:
    description: Returns details on what has changed, or would change, in diff mode.
    support: full
  idempotent:
    description: When run twice with the same arguments, the second run changes nothing.
    support: full
options:
  state:
    description:
      - V(present) registers the node or brings what is declared about it up to date. What the task leaves out stays.
      - V(absent) removes the node with all that was seen on it.
    type: str
    choices: [present, absent]
    default: present
  node_id:
    description: The name of the node, and of its host in the inventory. The host of the task where left out.
    type: str
  name:
    description: A name for people.
    type: str
  address:
    description: IP address or host name. C(ansible_host), else the name of the host, for a new node where left out.
    type: str
  node_type:
    description: A type of C(node_types.json). Recognised from facts where never declared.
    type: str
  labels:
    description: Free key-value pairs. All of the node's labels where given.
    type: dict
  location:
    description: Where the node stands.
    type: dict
    suboptions:
      region:
        description: The largest unit.
        type: str
      zone:
        description: Failure domain within the region.
        type: str
      site:
        description: Building or plant.
        type: str
      latitude:
        description: Degrees north.
        type: float
      longitude:
        description: Degrees east.
        type: float
  connection:
    description: How the node is reached.
    type: dict
    suboptions:
      user:
        description: Login name.
        type: str
      port:
        description: SSH port.
        type: int
      become:
        description: Use sudo for what needs root.
        type: bool
      credential:
        description: Name of a credential in C(config.json) of the manager.
        type: str
      jump_host:
        description: The node to connect through.
        type: str
  capacity:
    description: What replaces the observed capacity, per resource class.
    type: dict
  admin:
    description: Whether the node takes part.
    type: str
    choices: [active, cordoned, maintenance, offline]
  host_keys:
    description: Public SSH host keys to pin. The first ones seen where never given.
    type: list
    elements: str
  force:
    description: Remove the node even if it holds allocations, which are dropped.
    type: bool
    default: false
seealso:
  - module: iot_platform.node_manager.node_info
"""

EXAMPLES = r"""
- name: Register the host of the play
  iot_platform.node_manager.node:
    node_type: edge-gateway
    location: {region: eu, zone: eu-1a, site: plant-2}
    labels: {line: a}

- name: Take a node out of service for a while
  iot_platform.node_manager.node:
    node_id: gw-7
    admin: maintenance

- name: Forget a node that was scrapped
  iot_platform.node_manager.node:
    node_id: gw-7
    state: absent
"""

RETURN = r"""
node_id:
  description: The name of the node.
  returned: always
  type: str
  sample: gw-7
node:
  description: The node as the registry shows it; null when it is absent, and in check mode for a new one.
  returned: always
  type: dict
  sample: {"node_id": "gw-7", "address": "192.0.2.7", "status": "online", "generation": 1}
code:
  description: The registry's stable code of what went wrong.
  returned: failure
  type: str
  sample: invalid_input
"""
