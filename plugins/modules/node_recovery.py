#!/usr/bin/python
# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: node_recovery
short_description: Keep the record of a recovery
version_added: "0.1.0"
description:
  - Begins a recovery of a node, claims its acts, writes down how its steps ended, and ends it.
  - Works on the controller and never connects to the node, so it also works for a node that is dead.
  - The manager is the store of this machine, or the HTTP API when E(NODE_MANAGER_URL) is set.
  - Only one recovery at a time holds a node. The task fails where another one does.
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
    description: Can run in check mode and return changed status prediction without modifying the record.
    support: full
    details:
      - Nothing is begun, claimed or written down.
  diff_mode:
    description: Returns details on what has changed, or would change, in diff mode.
    support: none
  idempotent:
    description: When run twice with the same arguments, the second run changes nothing.
    support: partial
    details:
      - An act is given once; each O(state=begun) is a recovery of its own.
options:
  state:
    description:
      - V(begun) begins a recovery.
      - V(claimed) asks for the act of a step. RV(act) says whether to do it; that is so only once.
      - V(step_ended) writes down how a step ended.
      - V(gave_up) says that nothing helps. The manager cordons the node where the trouble is critical.
      - V(ended) ends the recovery.
    type: str
    required: true
    choices: [begun, claimed, step_ended, gave_up, ended]
  node_id:
    description: The node to begin a recovery of. The host of the task where left out.
    type: str
  recovery_id:
    description: The recovery. Required unless O(state=begun).
    type: str
  steps:
    description: The steps of a recovery to begin. Those that the node's conditions ask for where left out.
    type: list
    elements: str
  reason:
    description: Why a recovery is begun.
    type: str
    default: started by hand
  dry_run:
    description: Begin one that only says what it would do; it doesn't hold the node.
    type: bool
    default: false
  position:
    description: The place of a step, from 0. Required for O(state=claimed) and O(state=step_ended).
    type: int
  step_state:
    description: How a step ended. Required for O(state=step_ended).
    type: str
    choices: [skipped, succeeded, failed, planned]
  message:
    description: What happened, in one line.
    type: str
    default: ""
notes:
  - Keeping the record counts as no change; only O(state=gave_up) does.
seealso:
  - module: iot_platform.node_manager.node_recover
"""

EXAMPLES = r"""
- name: Begin a recovery
  iot_platform.node_manager.node_recovery:
    state: begun
    steps: [restart_service]
    reason: the broker hangs
  register: begun

- name: Ask for the first act
  iot_platform.node_manager.node_recovery:
    state: claimed
    recovery_id: "{{ begun.recovery.recovery_id }}"
    position: 0
  register: claimed

- name: Do it
  iot_platform.node_manager.node_recover:
    step: restart_service
    units: [mosquitto.service]
  become: true
  when: claimed.act

- name: Write down how it ended
  iot_platform.node_manager.node_recovery:
    state: step_ended
    recovery_id: "{{ begun.recovery.recovery_id }}"
    position: 0
    step_state: succeeded
    message: the broker answers

- name: End the recovery
  iot_platform.node_manager.node_recovery:
    state: ended
    recovery_id: "{{ begun.recovery.recovery_id }}"
"""

RETURN = r"""
recovery:
  description: The recovery as the manager shows it; null in check mode and for O(state=claimed).
  returned: success
  type: dict
  sample:
    recovery_id: 3f2c1f0e-8f0a-4bb2-9a52-0c4e5c9f0a11
    node_id: gw-7
    state: running
    steps: [{"position": 0, "step": "restart_service", "state": "waiting"}]
act:
  description: Whether to do the act.
  returned: with O(state=claimed)
  type: bool
  sample: true
message:
  description: Why the act is not given.
  returned: with O(state=claimed)
  type: str
  sample: ""
code:
  description: The manager's stable code of what went wrong.
  returned: failure
  type: str
  sample: recovery_in_progress
"""
