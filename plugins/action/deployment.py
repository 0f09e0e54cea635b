# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Keep or release all that is reserved for a deployment. Works on the controller."""

from __future__ import annotations

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ..plugin_utils import _allocation
from ..plugin_utils._link import LinkError, open_link

ARGUMENT_SPEC = {
    "deployment_id": {"type": "str", "required": True},
    "state": {"type": "str", "choices": ["confirmed", "absent"], "required": True},
}


class ActionModule(ActionBase):
    """Make a deployment's allocations what the task says."""

    _requires_connection = False
    _supports_check_mode = True
    _supports_diff = True
    _supports_async = False

    def run(self, tmp=None, task_vars=None):
        """Keep or release."""
        super().run(tmp, task_vars)
        params = _allocation.plain(self.validate_argument_spec(ARGUMENT_SPEC)[1])
        deployment_id = params["deployment_id"]
        try:
            with open_link() as link:
                before = link.deployment(deployment_id)
                if params["state"] == "absent":
                    after = self._absent(link, deployment_id, before)
                else:
                    after = self._confirmed(link, deployment_id, before)
        except LinkError as error:
            raise AnsibleActionFail(str(error), result={"code": error.code}) from None
        shown = [
            {allocation["allocation_id"]: _allocation.shown(allocation) for allocation in allocations or ()}
            for allocations in (before, after)
        ]
        result = {"changed": shown[0] != shown[1], "deployment_id": deployment_id, "allocations": after}
        if self._task.diff:
            result["diff"] = {
                "before": shown[0],
                "after": shown[1],
                "before_header": f"{deployment_id} (manager)",
                "after_header": f"{deployment_id} (wanted)",
            }
        return result

    def _absent(self, link, deployment_id, before):
        if before is not None and not self._task.check_mode:
            try:
                link.release_deployment(deployment_id)
            except LinkError as error:
                if error.code != "deployment_not_found":
                    raise
        return []

    def _confirmed(self, link, deployment_id, before):
        if self._task.check_mode:
            if before is None:
                # A task before this one, which changed nothing, may be to reserve it.
                self._display.warning(f"nothing is reserved for deployment {deployment_id!r} now")
            return [{**allocation, "expires_at": None} for allocation in before or ()]
        return link.confirm_deployment(deployment_id)
