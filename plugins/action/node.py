# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Declare a node in the registry. Works on the controller, so also for nodes that are dead or not there yet."""

from __future__ import annotations

import json

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ..plugin_utils import _declaration
from ..plugin_utils._link import LinkError, open_link

_LOCATION = {
    "region": {"type": "str"},
    "zone": {"type": "str"},
    "site": {"type": "str"},
    "latitude": {"type": "float"},
    "longitude": {"type": "float"},
}
_CONNECTION = {
    "user": {"type": "str"},
    "port": {"type": "int"},
    "become": {"type": "bool"},
    "credential": {"type": "str"},
    "jump_host": {"type": "str"},
}
ARGUMENT_SPEC = {
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "node_id": {"type": "str"},
    "name": {"type": "str"},
    "address": {"type": "str"},
    "node_type": {"type": "str"},
    "labels": {"type": "dict"},
    "location": {"type": "dict", "options": _LOCATION},
    "connection": {"type": "dict", "options": _CONNECTION},
    "capacity": {"type": "dict"},
    "admin": {"type": "str", "choices": ["active", "cordoned", "maintenance", "offline"]},
    "host_keys": {"type": "list", "elements": "str", "no_log": False},
    "force": {"type": "bool", "default": False},
}
_DECLARED = ("name", "address", "node_type", "labels", "location", "connection", "capacity", "admin", "host_keys")


class ActionModule(ActionBase):
    """Make the registry's declaration of one node what the task says."""

    _requires_connection = False
    _supports_check_mode = True
    _supports_diff = True
    _supports_async = False

    def run(self, tmp=None, task_vars=None):
        """Register, update or deregister."""
        super().run(tmp, task_vars)
        task_vars = task_vars or {}
        params = self.validate_argument_spec(ARGUMENT_SPEC)[1]
        # Plain values: what Ansible notes on each text of where it came from is no business of the registry.
        params = json.loads(json.dumps(params, default=str))
        node_id = params["node_id"] or str(task_vars["inventory_hostname"])
        try:
            with open_link() as link:
                if params["state"] == "absent":
                    return self._absent(link, node_id, params["force"])
                return self._present(link, node_id, params, task_vars)
        except LinkError as error:
            raise AnsibleActionFail(str(error), result={"code": error.code}) from None

    def _present(self, link, node_id, params, task_vars):
        wanted = {key: params[key] for key in _DECLARED}
        if wanted["labels"] is not None:
            wanted["labels"] = {str(key): _declaration.text_of(value) for key, value in wanted["labels"].items()}
        node = link.node(node_id)
        if node is None:
            if wanted["address"] is None:
                wanted["address"] = str(self._templar.template(task_vars.get("ansible_host")) or node_id)
            before, after = {}, _declaration.new(wanted)
        else:
            before = _declaration.declared(node)
            after = _declaration.merge(before, wanted)
        changed = before != after
        if changed and not self._task.check_mode:
            if node is None:
                node = link.register({"node_id": node_id, **after})["node"]
            else:
                node = link.update(node_id, after, generation=node["generation"])
        return self._result(node_id, changed, before, after, node)

    def _absent(self, link, node_id, force):
        node = link.node(node_id)
        if node is not None and not self._task.check_mode:
            try:
                link.deregister(node_id, force=force)
            except LinkError as error:
                if error.code != "node_not_found":
                    raise
        before = {} if node is None else _declaration.declared(node)
        return self._result(node_id, node is not None, before, {}, None)

    def _result(self, node_id, changed, before, after, node):
        result = {"changed": changed, "node_id": node_id, "node": node}
        if self._task.diff:
            result["diff"] = {
                "before": before,
                "after": after,
                "before_header": f"{node_id} (registry)",
                "after_header": f"{node_id} (wanted)",
            }
        return result
