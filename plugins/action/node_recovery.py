# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep the record of a recovery. Works on the controller, so also for nodes that are dead."""

from __future__ import annotations

import getpass
import json
import time

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ..module_utils._checks_spec import one_line
from ..plugin_utils._link import LinkError, open_link

ARGUMENT_SPEC = {
    "state": {"type": "str", "required": True, "choices": ["begun", "claimed", "step_ended", "gave_up", "ended"]},
    "node_id": {"type": "str"},
    "recovery_id": {"type": "str"},
    "steps": {"type": "list", "elements": "str"},
    "reason": {"type": "str", "default": "started by hand"},
    "dry_run": {"type": "bool", "default": False},
    "position": {"type": "int"},
    "step_state": {"type": "str", "choices": ["skipped", "succeeded", "failed", "planned"]},
    "message": {"type": "str", "default": ""},
}
_NEEDED = [
    ("state", "claimed", ("recovery_id", "position")),
    ("state", "step_ended", ("recovery_id", "position", "step_state")),
    ("state", "gave_up", ("recovery_id",)),
    ("state", "ended", ("recovery_id",)),
]
# A manager that restarts in the middle of a repair must not cost the record of it.
_TRIES = 5
_PAUSE_SECONDS = 2.0
_AWAY = ("unavailable", "store_unavailable")


class ActionModule(ActionBase):
    """Tell the manager how far a recovery is."""

    _requires_connection = False
    _supports_check_mode = True
    _supports_diff = False
    _supports_async = False

    def run(self, tmp=None, task_vars=None):
        """Begin, claim, write down or end."""
        super().run(tmp, task_vars)
        params = self.validate_argument_spec(ARGUMENT_SPEC, required_if=_NEEDED)[1]
        # Plain values: what Ansible notes on each text of where it came from is no business of the manager.
        params = json.loads(json.dumps(params, default=str))
        params["message"] = one_line(params["message"])
        params["node_id"] = params["node_id"] or str((task_vars or {})["inventory_hostname"])
        if self._task.check_mode:
            foreseen = {"act": True, "message": ""} if params["state"] == "claimed" else {}
            return {"changed": params["state"] == "gave_up", "recovery": None, **foreseen}
        try:
            # One that is begun but whose answer is lost would refuse the second try.
            return self._told(params, 1 if params["state"] == "begun" else _TRIES)
        except LinkError as error:
            raise AnsibleActionFail(str(error), result={"code": error.code}) from None

    def _told(self, params, tries):
        while True:
            tries -= 1
            try:
                with open_link() as link:
                    return _tell(link, params)
            except LinkError as error:
                away = error.code in _AWAY or (error.status or 0) >= 500
                if not away or tries < 1:
                    raise
            time.sleep(_PAUSE_SECONDS)


def _tell(link, params):
    state, recovery_id, message = params["state"], params["recovery_id"], params["message"]
    if state == "claimed":
        claim = link.claim_act(recovery_id, params["position"])
        return {"changed": False, "recovery": None, "act": claim["act"], "message": claim["message"]}
    if state == "begun":
        body = {key: params[key] for key in ("steps", "reason", "dry_run")}
        recovery = link.begin_recovery(params["node_id"], {**body, "requested_by": _user()})
    elif state == "step_ended":
        recovery = link.end_step(recovery_id, params["position"], params["step_state"], message)
    elif state == "gave_up":
        recovery = link.give_up(recovery_id, message)
    else:
        recovery = link.end_recovery(recovery_id, message)
    return {"changed": state == "gave_up", "recovery": recovery}


def _user():
    try:
        return f"ansible:{getpass.getuser()}"[:64]
    except (OSError, KeyError):
        return "ansible"
