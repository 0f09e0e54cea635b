#!/usr/bin/python
# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: deployment
short_description: Keep or release what is reserved for a deployment
version_added: "0.1.0"
description:
  - Keeps for good, or releases, all that P(iot_platform.node_manager.select_nodes#lookup) or
    M(iot_platform.node_manager.node_allocation) reserved for a deployment, on whichever nodes.
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
    description: Can run in check mode and return changed status prediction without modifying the allocations.
    support: full
  diff_mode:
    description: Returns details on what has changed, or would change, in diff mode.
    support: full
  idempotent:
    description: When run twice with the same arguments, the second run changes nothing.
    support: full
options:
  deployment_id:
    description: The name of the deployment.
    type: str
    required: true
  state:
    description:
      - V(confirmed) keeps for good what was reserved with a limit of time. The task fails where nothing is reserved, except in
        check mode.
      - V(absent) releases everything.
    type: str
    choices: [confirmed, absent]
    required: true
seealso:
  - module: iot_platform.node_manager.node_allocation
  - plugin: iot_platform.node_manager.select_nodes
    plugin_type: lookup
"""

EXAMPLES = r"""
- name: Keep what was reserved for ten minutes only
  iot_platform.node_manager.deployment:
    deployment_id: web-1
    state: confirmed
  run_once: true

- name: Release everything
  iot_platform.node_manager.deployment:
    deployment_id: web-1
    state: absent
  run_once: true
"""

RETURN = r"""
deployment_id:
  description: The name of the deployment.
  returned: success
  type: str
  sample: web-1
allocations:
  description: What is reserved for it, one entry for each replica; empty when it is absent.
  returned: success
  type: list
  elements: dict
  sample: [{"allocation_id": "web-1:0", "node_id": "gw-7", "owner": "team-a", "expires_at": null}]
code:
  description: The manager's stable code of what went wrong.
  returned: failure
  type: str
  sample: deployment_not_found
"""
