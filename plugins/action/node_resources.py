# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Runs the module of the same name on the node and bounds its answer."""

from __future__ import annotations

from ..plugin_utils._bounded import BoundedAction


class ActionModule(BoundedAction):
    """Let only the module's own answer through."""

    answer_key = "sample"
