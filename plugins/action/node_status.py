# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Set a node's status and wait for what follows from it. Works on the controller, so also for nodes that are dead."""

from __future__ import annotations

import json
import time

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ..plugin_utils._link import LinkError, open_link

ARGUMENT_SPEC = {
    "node_id": {"type": "str"},
    "status": {"type": "str", "choices": ["active", "cordoned", "maintenance", "offline"]},
    "drain": {"type": "bool", "default": False},
    "deadline_seconds": {"type": "float"},
    "reason": {"type": "str"},
    "until": {"type": "str"},
    "keep_cordon": {"type": "bool"},
    "force": {"type": "bool", "default": False},
    "wait": {"type": "str", "choices": ["no", "emptied", "drained", "left"], "default": "no"},
    "wait_seconds": {"type": "float", "default": 1800.0},
}
_TOLD = ("drain", "deadline_seconds", "reason", "until", "keep_cordon", "force")
_POLL_SECONDS = 1.0
_MAX_REASON_CHARACTERS = 255


class ActionModule(ActionBase):
    """Say whether a node takes part."""

    _requires_connection = False
    _supports_check_mode = True
    _supports_diff = True
    _supports_async = False

    def run(self, tmp=None, task_vars=None):
        """Set the status where one is given, then wait."""
        super().run(tmp, task_vars)
        params = self.validate_argument_spec(
            ARGUMENT_SPEC,
            required_by=dict.fromkeys(("deadline_seconds", "reason", "until", "keep_cordon"), "status"),
        )[1]
        # Plain values: what Ansible notes on each text of where it came from is no business of the registry.
        params = json.loads(json.dumps(params, default=str))
        node_id = params["node_id"] or str((task_vars or {})["inventory_hostname"])
        try:
            with open_link() as link:
                before = link.node(node_id)
                if before is None:
                    raise AnsibleActionFail(
                        f"node {node_id!r} is not registered; playbooks/register.yml registers it",
                        result={"code": "node_not_found"},
                    )
                if self._task.check_mode:
                    return self._result(before, {**before, "admin": _expected(before["admin"], params)})
                after = link.set_status(node_id, body_of(params)) if params["status"] else before
                if params["wait"] != "no":
                    after = _wait(link, node_id, params["wait"], params["wait_seconds"])
                return self._result(before, after)
        except LinkError as error:
            raise AnsibleActionFail(str(error), result={"code": error.code}) from None

    def _result(self, before, after):
        node_id = after["node_id"]
        result = {
            "changed": before["admin"] != after["admin"] or before["generation"] != after["generation"],
            "node_id": node_id,
            "admin": after["admin"],
            "admin_before": before["admin"],
            "maintenance": after["maintenance"],
        }
        if self._task.diff:
            result["diff"] = {
                "before": {"admin": before["admin"]},
                "after": {"admin": after["admin"]},
                "before_header": f"{node_id} (registry)",
                "after_header": f"{node_id} (wanted)",
            }
        return result


def body_of(params):
    """Build the body of PUT /nodes/{node_id}/status, of what the task says."""
    told = {name: params[name] for name in _TOLD if params[name] not in (None, False) or name == "keep_cordon"}
    if params["keep_cordon"] is None:
        del told["keep_cordon"]
    if params["reason"]:
        # It may hold what a failed task said, which may be long, and of many lines.
        told["reason"] = " ".join(params["reason"].split())[:_MAX_REASON_CHARACTERS]
    return {"status": params["status"], **told}


def reached(wanted, node):
    """Tell whether what is waited for is so: True, or False for not yet; raises AnsibleActionFail if it won't be."""
    found = node["maintenance"]
    phase = found["phase"] if found else None
    if wanted == "left":
        if phase is None:
            return True
        if phase == "leaving":
            return False
        why = found["message"] or f"it is in {phase}, held by {found['requested_by'] or 'its declaration'}"
        raise _failure("not_left", f"node {node['node_id']!r} did not leave maintenance: {why}", node)
    if phase == "draining":
        return wanted == "emptied" and all(item["kind"] != "allocation" for item in found["blockers"])
    if phase is None and node["admin"] not in ("cordoned", "offline"):
        raise _failure("drain_cancelled", f"the drain of node {node['node_id']!r} was cancelled", node)
    return True


def _wait(link, node_id, wanted, seconds):
    give_up = time.monotonic() + seconds
    while True:
        node = None
        try:
            node = link.node_status(node_id)
        except LinkError as error:
            # A manager that restarts goes on where it was; so does who waits for it.
            if not error.temporary or time.monotonic() >= give_up:
                raise
        if node is not None and reached(wanted, node):
            return node
        if node is not None and time.monotonic() >= give_up:
            raise _failure("wait_timed_out", _late(node, wanted, seconds), node)
        time.sleep(_POLL_SECONDS)


def _late(node, wanted, seconds):
    found = node["maintenance"]
    names = [
        f"{item['kind']} {item['container'] or item['allocation_id'] or item['message']}" for item in found["blockers"]
    ]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    still = f"; still there: {shown}" if names else ""
    return f"node {node['node_id']!r} is not {wanted} after {seconds:g} s, it stays {found['phase']}{still}"


def _failure(code, message, node):
    result = {"code": code, "node_id": node["node_id"], "admin": node["admin"], "maintenance": node["maintenance"]}
    return AnsibleActionFail(message, result=result)


def _expected(admin, params):
    if params["status"] is None:
        return admin
    if params["status"] == "maintenance" and params["drain"] and admin != "maintenance":
        return "maintenance" if params["wait"] == "drained" else "draining"
    return params["status"]
