# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run one of our modules and let only what it promises through: a node may answer anything.

Without this, 50 MB of a node's output would be parsed, sent to the main process and printed, and facts beside our own would
become variables of the play.
"""

from __future__ import annotations

from ansible.plugins.action import ActionBase

from ..module_utils._bounds import TooLargeError, clean

# A sample with a thousand containers stays below this.
_MAX_OUTPUT_CHARACTERS = 4 * 1024 * 1024
_SHOWN_CHARACTERS = 2000
_OF_FAILURES = ("msg", "rc", "exception", "unreachable", "invocation", "warnings", "deprecations")
_OF_SUCCESSES = ("invocation", "warnings", "deprecations")
_INTERPRETER = "discovered_interpreter_"


class BoundedAction(ActionBase):
    """Execute the module of the same name on the node; *answer_key* is what it returns."""

    answer_key: str
    _supports_check_mode = True
    _supports_async = False
    _oversize_characters = 0

    def run(self, tmp=None, task_vars=None):
        """Execute the module and bound its answer."""
        super().run(tmp, task_vars)
        try:
            result = self._execute_module(task_vars=task_vars)
        except RecursionError:
            return _unusable("the answer is nested too deeply")
        if self._oversize_characters:
            return _unusable(f"{self._oversize_characters} characters, more than {_MAX_OUTPUT_CHARACTERS}")
        if result.get("failed") or result.get("unreachable"):
            return _failure(result)
        found = result.get("ansible_facts")
        found = found if isinstance(found, dict) else {}
        facts = {key: value for key, value in found.items() if str(key).startswith(_INTERPRETER)}
        answer = found.get("node_manager") if self.answer_key == "ansible_facts" else result.get(self.answer_key)
        if not isinstance(answer, dict):
            return _unusable(f"the answer lacks {self.answer_key}")
        try:
            answer = clean(answer)
        except TooLargeError as error:
            return _unusable(f"the answer is {error}")
        bounded = {key: result[key] for key in _OF_SUCCESSES if key in result}
        if self.answer_key == "ansible_facts":
            facts["node_manager"] = answer
        else:
            bounded[self.answer_key] = answer
        if facts:
            bounded["ansible_facts"] = facts
        return {**bounded, "changed": False}

    def _parse_returned_data(self, res, *arguments, **named):
        # What this returns differs between versions of ansible-core, so core judges an empty answer in place of a huge one.
        size = len(res.get("stdout") or "")
        if size > _MAX_OUTPUT_CHARACTERS:
            self._oversize_characters = size
            res = {**res, "stdout": "", "stdout_lines": []}
        return super()._parse_returned_data(res, *arguments, **named)


def _failure(result):
    bounded = {key: result[key] for key in _OF_FAILURES if key in result}
    bounded["msg"] = str(result.get("msg", ""))[:_SHOWN_CHARACTERS]
    for stream in ("module_stdout", "module_stderr"):
        text = str(result.get(stream) or "")
        if text:
            half = _SHOWN_CHARACTERS // 2
            bounded[stream] = text if len(text) <= 2 * half else f"{text[:half]}\n...\n{text[-half:]}"
    return {**bounded, "changed": False, "failed": bool(result.get("failed"))}


def _unusable(message):
    return {"changed": False, "failed": True, "msg": f"Output unusable: {message}"}
