# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the module of the same name on the node, bounds its answer, and waits for a node that was rebooted."""

from __future__ import annotations

import time

from ansible.errors import AnsibleActionFail, AnsibleConnectionFailure

from ..plugin_utils._bounded import BoundedAction

_PAUSE_SECONDS = 2.0


class ActionModule(BoundedAction):
    """Let only the module's own answer through."""

    answer_key = "act"
    _supports_diff = True

    def run(self, tmp=None, task_vars=None):
        """Do the act, or wait until the node has started anew."""
        arguments = self._task.args
        if arguments.get("step") != "reboot":
            return self._act(tmp, task_vars)
        if arguments.get("since_boot"):
            return self._await_boot(str(arguments["since_boot"]), tmp, task_vars)
        if self._connection.transport == "local" and not self._task.check_mode:
            raise AnsibleActionFail("This is the manager's own machine: it is not rebooted.")
        return self._act(tmp, task_vars)

    def _act(self, tmp, task_vars):
        result = super().run(tmp, task_vars)
        act = result.get("act")
        if not isinstance(act, dict):
            return result
        result["changed"] = act.get("changed") is True
        if self._task.diff:
            node_id = task_vars["inventory_hostname"]
            result["diff"] = {
                "before": act.get("before") or {},
                "after": act.get("after") or {},
                "before_header": f"{node_id} (found)",
                "after_header": f"{node_id} ({act.get('step')})",
            }
        return result

    def _await_boot(self, since, tmp, task_vars):
        try:
            seconds = float(self._task.args.get("timeout_seconds") or 50)
        except ValueError:
            raise AnsibleActionFail("timeout_seconds: expected a number") from None
        deadline = time.monotonic() + seconds
        last = "it never answered"
        while True:
            boot, last = self._boot(tmp, task_vars, last)
            if boot is not None and boot != since:
                message = "started anew"
                act = {
                    "step": "reboot",
                    "needed": False,
                    "changed": False,
                    "message": message,
                    "before": {"boot": since},
                }
                return {"changed": False, "act": {**act, "after": {"boot": boot}, "done": [], "freed_bytes": None}}
            if boot is not None:
                last = "it is still up from before"
            if time.monotonic() + _PAUSE_SECONDS >= deadline:
                return {"changed": False, "failed": True, "msg": f"not back within {seconds:g} s: {last}"}
            time.sleep(_PAUSE_SECONDS)

    def _boot(self, tmp, task_vars, last):
        """Ask for the present boot; None while the node doesn't answer, with the reason."""
        try:
            # The connection of before may hang until its keepalive says so.
            if hasattr(self._connection, "reset"):
                self._connection.reset()
            # A folder for temporary files that was there before may be gone now.
            self._connection._shell.tmpdir = None
            result = super().run(tmp, task_vars)
        except AnsibleConnectionFailure as error:
            return None, str(error)[:300]
        act = result.get("act")
        if not isinstance(act, dict):
            return None, str(result.get("msg") or last)[:300]
        before = act.get("before")
        return (str(before.get("boot")) if isinstance(before, dict) else None), last
