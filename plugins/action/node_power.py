# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Switch a node off and on by the operator's own command or URL. Works on the controller, so also for nodes that are dead."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from urllib.parse import quote

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase

from ..module_utils._checks_spec import one_line
from ..module_utils._recover_run import RepairError, run_program
from ..plugin_utils._link import LinkError, open_link

ARGUMENT_SPEC = {
    "node_id": {"type": "str"},
    "address": {"type": "str"},
    "recovery_id": {"type": "str", "default": ""},
    "command": {"type": "list", "elements": "str"},
    "url": {"type": "str"},
    "token_file": {"type": "path", "no_log": False},
    "timeout_seconds": {"type": "float"},
}
_WORD = re.compile(r"\{(node_id|address)\}")
# Names and addresses of machines; nothing that a program could take for an option or a second argument.
_PLAIN = re.compile(r"[A-Za-z0-9:\[][A-Za-z0-9._:%\[\]-]{0,252}")
_RECOVERY_ID = re.compile(r"[A-Za-z0-9-]{0,64}")
_DEFAULT_SECONDS = 60.0
_ANSWER_BYTES = 8192


class ActionModule(ActionBase):
    """Switch one node off and on."""

    _requires_connection = False
    _supports_check_mode = True
    _supports_diff = True
    _supports_async = False

    def run(self, tmp=None, task_vars=None):
        """Run the command, or call the URL."""
        super().run(tmp, task_vars)
        task_vars = task_vars or {}
        params = self.validate_argument_spec(ARGUMENT_SPEC, mutually_exclusive=[["command", "url"]])[1]
        if self._templar.template(task_vars.get("ansible_connection")) == "local":
            raise AnsibleActionFail("This is the manager's own machine: it is not switched off.")
        node_id = str(params["node_id"] or task_vars["inventory_hostname"])
        address = str(params["address"] or self._templar.template(task_vars.get("ansible_host")) or node_id)
        words = {"node_id": node_id, "address": address, "recovery_id": str(params["recovery_id"])}
        _refuse_odd(words)
        power = _settings(params)
        way = "command" if power["command"] else "url"
        result = {"changed": True, "way": way, "output": ""}
        if self._task.diff:
            result["diff"] = {"before": {"power": "as it is"}, "after": {"power": "off, then on"}}
        if self._task.check_mode:
            return result
        deadline = time.monotonic() + power["timeout_seconds"]
        try:
            output = _run(power, words, deadline) if way == "command" else _call(power, words, deadline)
        except RepairError as error:
            raise AnsibleActionFail(str(error)) from None
        return {**result, "output": one_line(output)}


def _settings(params):
    """Take what the task says, else what the manager's configuration says."""
    power = {key: params[key] for key in ("command", "url", "token_file", "timeout_seconds")}
    if not power["command"] and not power["url"]:
        try:
            with open_link() as link:
                configured = link.power()
        except LinkError as error:
            raise AnsibleActionFail(str(error), result={"code": error.code}) from None
        if configured is None:
            raise AnsibleActionFail(
                "How to switch a node off and on isn't known: set recovery.power in config.json, or command or url of the task"
            )
        power.update({key: configured[key] for key in ("command", "url", "token_file")})
        power["timeout_seconds"] = power["timeout_seconds"] or configured["timeout_seconds"]
    power["timeout_seconds"] = power["timeout_seconds"] or _DEFAULT_SECONDS
    if not 0 < power["timeout_seconds"] <= 3600:
        raise AnsibleActionFail("timeout_seconds: expected a number above 0, at most 3600")
    return power


def _refuse_odd(words):
    for name in ("node_id", "address"):
        if not _PLAIN.fullmatch(words[name]):
            raise AnsibleActionFail(f"{name}: {words[name]!r} is no name or address of a machine")
    if not _RECOVERY_ID.fullmatch(words["recovery_id"]):
        raise AnsibleActionFail(f"recovery_id: {words['recovery_id']!r} is no id of a recovery")


def _filled(text, words, quoted=False):
    # In one pass: what is put in is not looked at again.
    return _WORD.sub(lambda found: quote(words[found[1]], safe="") if quoted else words[found[1]], text)


def _run(power, words, deadline):
    argv = [_filled(str(argument), words) for argument in power["command"]]
    environment = {
        "NODE_ID": words["node_id"],
        "NODE_ADDRESS": words["address"],
        "RECOVERY_ID": words["recovery_id"],
    }
    ended = run_program(argv, deadline, environment)
    if ended.status != 0:
        raise RepairError(one_line(f"the command {ended.describe()}"))
    return ended.last_line


def _call(power, words, deadline):
    from http.client import HTTPException  # noqa: PLC0415 -- what sends requests is loaded by the first one
    from urllib.error import HTTPError  # noqa: PLC0415

    from ansible.module_utils.urls import open_url  # noqa: PLC0415

    headers = {"Accept": "*/*", "Content-Type": "application/json"}
    if power["token_file"]:
        headers["Authorization"] = f"Bearer {_token(power['token_file'])}"
    try:
        with open_url(
            _filled(str(power["url"]), words, quoted=True),
            method="POST",
            data=json.dumps(words).encode(),
            headers=headers,
            timeout=max(1, deadline - time.monotonic()),
            http_agent="node-manager-ansible",
            follow_redirects="none",
        ) as answer:
            return _last_words(answer, deadline)
    except HTTPError as error:
        with error:
            raise RepairError(one_line(f"the URL answered {error.code}: {_last_words(error, deadline)}")) from None
    except (OSError, ValueError, HTTPException) as error:
        raise RepairError(one_line(f"the URL can't be called: {getattr(error, 'reason', error)}")) from None


def _token(path):
    try:
        token = Path(path).expanduser().read_text("utf-8").strip()
    except (OSError, ValueError) as error:
        raise RepairError(f"token_file: {path} can't be read: {one_line(error, 100)}") from None
    if not token or not token.isprintable() or " " in token:
        raise RepairError(f"token_file: {path} doesn't hold one token")
    return token


def _last_words(answer, deadline):
    raw = b""
    try:
        while len(raw) < _ANSWER_BYTES and time.monotonic() < deadline:
            part = answer.read1(_ANSWER_BYTES - len(raw)) if hasattr(answer, "read1") else answer.read(_ANSWER_BYTES)
            if not part:
                break
            raw += part
    except OSError:
        # It has done what it was asked to; only its words are lost.
        pass
    return one_line(raw.decode("utf-8", "replace"))
