# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reserve resources on a node, keep them or release them. Works on the controller."""

from __future__ import annotations

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ..plugin_utils import _allocation
from ..plugin_utils._link import LinkError, open_link

ARGUMENT_SPEC = {
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "allocation_id": {"type": "str", "required": True},
    "node_id": {"type": "str"},
    "owner": {"type": "str"},
    "deployment_id": {"type": "str"},
    "resources": {"type": "dict"},
    "ttl_seconds": {"type": "int"},
    "confirmed": {"type": "bool", "default": False},
}


class ActionModule(ActionBase):
    """Make one allocation what the task says."""

    _requires_connection = False
    _supports_check_mode = True
    _supports_diff = True
    _supports_async = False

    def run(self, tmp=None, task_vars=None):
        """Reserve, keep or release."""
        super().run(tmp, task_vars)
        params = self.validate_argument_spec(ARGUMENT_SPEC, required_together=[["owner", "resources"]])[1]
        params = _allocation.plain(params)
        node_id = params["node_id"] or str((task_vars or {})["inventory_hostname"])
        try:
            with open_link() as link:
                if params["state"] == "absent":
                    return self._absent(link, params)
                if params["resources"] is not None:
                    return self._present(link, node_id, params)
                if params["confirmed"]:
                    return self._confirmed(link, params["allocation_id"])
        except LinkError as error:
            raise AnsibleActionFail(str(error), result={"code": error.code}) from None
        except _allocation.WrongValueError as error:
            raise AnsibleActionFail(str(error), result={"code": "invalid_input"}) from None
        raise AnsibleActionFail("owner and resources are required to reserve; confirmed alone keeps what is reserved")

    def _present(self, link, node_id, params):
        body = _allocation.allocation_of(params["allocation_id"], params)
        if self._task.check_mode:
            return self._predict(link, node_id, body, params["confirmed"])
        answer = link.allocate(node_id, body)
        allocation, created = answer["allocation"], answer["created"]
        before = {} if created else _allocation.shown(allocation)
        if params["confirmed"] and allocation["expires_at"] is not None:
            allocation = link.confirm(params["allocation_id"])
        return self._result(params, before, _allocation.shown(allocation), allocation)

    def _predict(self, link, node_id, body, confirmed):
        after = _allocation.expected(node_id, body)
        allocation = link.allocation(body["allocation_id"])
        if allocation is not None:
            before = _allocation.shown(allocation)
            names = _allocation.differing(before, after)
            if names:
                raise AnsibleActionFail(
                    f"allocation {body['allocation_id']!r} is there with another {', '.join(names)}; use a new allocation_id",
                    result={"code": "allocation_mismatch"},
                )
            after["confirmed"] = confirmed or before["confirmed"]
            return self._result(body, before, after, allocation)
        after["confirmed"] = confirmed or after["confirmed"]
        return {**self._result(body, {}, after, None), "fits": self._fits(link, node_id, body["resources"])}

    def _fits(self, link, node_id, resources):
        # A warning and no failure: tasks before this one, which changed nothing, may be to make room or register the node.
        try:
            lacking = _allocation.lacking(link.resources(node_id), resources)
        except LinkError as error:
            if error.code != "node_not_found":
                raise
            self._display.warning(str(error))
            return False
        if lacking:
            self._display.warning(f"node {node_id!r} lacks {', '.join(lacking)} now")
        return not lacking

    def _confirmed(self, link, allocation_id):
        allocation = link.allocation(allocation_id)
        before = {} if allocation is None else _allocation.shown(allocation)
        if not self._task.check_mode:
            allocation = link.confirm(allocation_id)
            after = _allocation.shown(allocation)
        elif allocation is None:
            # A task before this one, which changed nothing, may be to reserve it.
            self._display.warning(f"allocation {allocation_id!r} is not there now")
            after = {}
        else:
            after = {**before, "confirmed": True}
        return self._result({"allocation_id": allocation_id}, before, after, allocation)

    def _absent(self, link, params):
        allocation = link.allocation(params["allocation_id"])
        released = allocation is not None
        if released and not self._task.check_mode:
            try:
                released = link.deallocate(params["node_id"] or allocation["node_id"], params["allocation_id"])
            except LinkError as error:
                still_there = error.code != "node_not_found" or link.allocation(params["allocation_id"]) is not None
                if still_there:
                    raise
                released = False
        return self._result(params, _allocation.shown(allocation) if released else {}, {}, None)

    def _result(self, params, before, after, allocation):
        allocation_id = params["allocation_id"]
        result = {"changed": before != after, "allocation_id": allocation_id, "allocation": allocation}
        if self._task.diff:
            result["diff"] = {
                "before": before,
                "after": after,
                "before_header": f"{allocation_id} (manager)",
                "after_header": f"{allocation_id} (wanted)",
            }
        return result
