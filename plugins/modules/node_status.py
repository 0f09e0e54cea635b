#!/usr/bin/python
# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: node_status
short_description: Put a node into maintenance, drain it, take it back
version_added: "0.1.0"
description:
  - Says whether a node takes part, and waits for what follows from that.
  - Works on the controller and never connects to the node.
  - The registry is the store of this machine, or the HTTP API when E(NODE_MANAGER_URL) is set. With the store of this machine
    and the service stopped, nobody but the play looks at nodes. Run the role P(iot_platform.node_manager.node_check#role)
    between O(status=active) and O(wait=left) then.
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
      - Never waits, and supposes that drains and checks go well.
  diff_mode:
    description: Returns details on what has changed, or would change, in diff mode.
    support: full
  idempotent:
    description: When run twice with the same arguments, the second run changes nothing.
    support: partial
    details:
      - While a drain is under way, O(deadline_seconds) counts anew from each run.
options:
  node_id:
    description: The node. Where left out, the host of the task.
    type: str
  status:
    description:
      - What the node shall be. Where left out nothing is set, only waited.
      - V(active) ends maintenance once a full check that was made after the request passes, and cancels a drain.
      - V(cordoned) keeps new work off the node.
      - V(maintenance) keeps new work off it too. No verdicts and no repairs follow from what is seen on it.
      - V(offline) takes it out. Nobody looks at it any more.
    type: str
    choices: [active, cordoned, maintenance, offline]
  drain:
    description:
      - Empty the node first. Its owners are told by event what they have there and where it could go.
      - For O(status=maintenance) and O(status=cordoned).
    type: bool
    default: false
  deadline_seconds:
    description: End the drain after this time, whatever is still there. Waits without end where left out.
    type: float
  reason:
    description: Why, for the record; the first 255 characters count.
    type: str
  until:
    description: >-
      From this time on, as in RFC 3339, the node leaves maintenance by itself once its check passes. For
      O(status=maintenance).
    type: str
  keep_cordon:
    description: Cordon the node when it leaves maintenance. Where left out, that is so if it was cordoned before.
    type: bool
  force:
    description:
      - With O(status=active), leave at once and unchecked.
      - With O(status=maintenance), take the node over from the operator who holds it.
    type: bool
    default: false
  wait:
    description:
      - What to wait for. The task fails if that does not come, or not within O(wait_seconds).
      - V(emptied) is when no allocation is left, V(drained) when moreover no workload was seen since, or at the deadline.
      - V(left) is when the node has left maintenance.
    type: str
    choices: ["no", emptied, drained, left]
    default: "no"
  wait_seconds:
    description: How long to wait.
    type: float
    default: 1800.0
seealso:
  - module: iot_platform.node_manager.node
"""

EXAMPLES = r"""
- name: Empty the host of the play, at most for an hour
  iot_platform.node_manager.node_status:
    status: maintenance
    drain: true
    deadline_seconds: 3600
    reason: new disk
    wait: drained
    wait_seconds: 3700

- name: Take it back, once its check passes
  iot_platform.node_manager.node_status:
    status: active
    wait: left
    wait_seconds: 300
"""

RETURN = r"""
node_id:
  description: The node.
  returned: always
  type: str
  sample: gw-7
admin:
  description: Whether it takes part now.
  returned: always
  type: str
  sample: maintenance
admin_before:
  description: Whether it took part before.
  returned: success
  type: str
  sample: active
maintenance:
  description: How it stands with its drain or maintenance, as GET /nodes/{node_id} shows it; null where there is none.
  returned: always
  type: dict
  sample:
    phase: draining
    reason: new disk
    requested_by: anna
    started_at: "2026-11-22T18:00:00.000000Z"
    then: maintenance
    deadline_at: "2026-11-22T19:00:00.000000Z"
    drained_at: null
    until: null
    keep_cordon: false
    leaving_at: null
    message: ""
    blockers:
      - kind: allocation
        allocation_id: web-1:0
        container: null
        deployment_id: web-1
        owner: team-a
        since: "2026-11-22T12:00:00.000000Z"
        message: is still reserved here; its owner releases it once it is elsewhere
    proposals:
      - allocation_id: web-1:0
        owner: team-a
        deployment_id: web-1
        resources: {memory_mib: 256}
        to_node: gw-8
        why: the best of 12 that would do, score 71.2
code:
  description: What went wrong, a stable code of the manager's, or not_left, drain_cancelled or wait_timed_out.
  returned: failure
  type: str
  sample: not_left
"""
