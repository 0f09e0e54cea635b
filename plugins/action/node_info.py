# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read nodes from the registry, on the controller."""

from __future__ import annotations

import json

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ..plugin_utils._declaration import text_of
from ..plugin_utils._link import LinkError, open_link

_FILTERS = {
    "status": {"type": "str", "choices": ["online", "offline", "maintenance"]},
    "health": {
        "type": "str",
        "choices": ["unknown", "healthy", "degraded", "suspect", "unreachable", "recovering", "flapping"],
    },
    "type": {"type": "str"},
    "zone": {"type": "str"},
    "site": {"type": "str"},
    "region": {"type": "str"},
    "labels": {"type": "dict"},
}
ARGUMENT_SPEC = {"node_id": {"type": "str"}, **_FILTERS}


class ActionModule(ActionBase):
    """Give one node with all that is known of it, or a list of nodes."""

    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp=None, task_vars=None):
        """Ask the registry."""
        super().run(tmp, task_vars)
        params = self.validate_argument_spec(
            ARGUMENT_SPEC, mutually_exclusive=[["node_id", name] for name in _FILTERS]
        )[1]
        params = json.loads(json.dumps(params, default=str))
        try:
            with open_link() as link:
                if params["node_id"] is not None:
                    node = link.node(params["node_id"])
                    nodes = [] if node is None else [node]
                else:
                    filters = {name: params[name] for name in _FILTERS if params[name] is not None}
                    if "labels" in filters:
                        filters["labels"] = {str(key): text_of(value) for key, value in filters["labels"].items()}
                    nodes = link.nodes(filters)
        except LinkError as error:
            raise AnsibleActionFail(str(error), result={"code": error.code}) from None
        return {"changed": False, "nodes": nodes}
