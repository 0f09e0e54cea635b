# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Ask for advice on which allocations had better be on other nodes. Works on the controller."""

from __future__ import annotations

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ..plugin_utils import _allocation
from ..plugin_utils._link import LinkError, open_link


class ActionModule(ActionBase):
    """Give the manager's advice, and the same in words."""

    _requires_connection = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp=None, task_vars=None):
        """Ask the manager."""
        super().run(tmp, task_vars)
        self.validate_argument_spec({})
        try:
            with open_link() as link:
                advice = link.optimization()
        except LinkError as error:
            raise AnsibleActionFail(str(error), result={"code": error.code}) from None
        return {**advice, "changed": False, "summary": _allocation.summary_of(advice)}
