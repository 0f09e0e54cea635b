# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the texts of ssh and Ansible say about a contact that failed.

Pure: imports the standard library and the vocabulary only. Part of a text may be a node's own words (a banner, a
module's output), so patterns that excuse a node are the narrowest. Texts: OpenSSH 9.2 and ansible-core 2.19 and 2.21.
"""

from __future__ import annotations

import re
from typing import Dict, Iterable, Optional, Pattern, Tuple

from ._words import ContactReason

_MAX_MESSAGE_CHARACTERS = 500
# Only this much of a node's output is searched; the telling lines are the first or the last ones.
_MAX_SEARCHED_CHARACTERS = 20000
# What Ansible puts before the words of ssh or of the module.
_PREAMBLE = re.compile(r"^(?:Task failed: |Action failed: |Failed to connect to the host via ssh: )+")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")

_Rules = Tuple[Tuple[Pattern[str], ContactReason], ...]


def _rules(*rules: Tuple[ContactReason, str]) -> _Rules:
    return tuple((re.compile(pattern, re.MULTILINE), reason) for reason, pattern in rules)


# In this order: the first that is found anywhere in the text wins.
_UNREACHABLE = _rules(
    (ContactReason.HOST_KEY_CHANGED, r"^Host key for \S+ has changed and you have requested strict checking"),
    (ContactReason.HOST_KEY_CHANGED, r"REMOTE HOST IDENTIFICATION HAS CHANGED"),
    # The controller's own matters: nothing was learnt about the node.
    (ContactReason.MANAGER_FAULT, r"Host key verification failed"),
    (ContactReason.MANAGER_FAULT, r"\[Errno (?:12|23|24|28|30)\] |(?:socket|pipe|fork|dup): Too many open files"),
    (ContactReason.MANAGER_FAULT, r"unix_listener: |ControlPath .* too long|^mm_\w+: "),
    (ContactReason.MANAGER_FAULT, r"Bad owner or permissions on|Bad configuration option|command-line line \d+: "),
    (ContactReason.MANAGER_FAULT, r"connect to (?:host|address) .*: Network is unreachable"),
    (ContactReason.MANAGER_FAULT, r"connect to host .*: (?:Cannot assign requested address|Operation not permitted)"),
    (
        ContactReason.MANAGER_FAULT,
        r"Unable to (?:execute|find) .*ssh|No such file or directory: b?'ssh|sshpass program",
    ),
    (ContactReason.NAME_NOT_RESOLVED, r"Could not resolve hostname"),
    (ContactReason.CONNECTION_REFUSED, r"connect to (?:host|address) .*: Connection refused"),
    (ContactReason.NO_ROUTE, r"connect to (?:host|address) .*: (?:No route to host|Host is (?:unreachable|down))"),
    (ContactReason.TIMED_OUT, r"connect to (?:host|address) .*: (?:Connection|Operation) timed out"),
    (ContactReason.TIMED_OUT, r"timed out during banner exchange|Connection to \S+ port \d+ timed out"),
    (ContactReason.CONNECTION_LOST, r"Timeout, server \S+ not responding"),
    (ContactReason.MANAGER_FAULT, r"^(?:Load key|Identity file|no such identity:) .*"),
    (ContactReason.AUTHENTICATION_FAILED, r"Permission denied \(|: Permission denied, please try again"),
    (ContactReason.AUTHENTICATION_FAILED, r"Too many authentication failures|Invalid/incorrect password"),
    (ContactReason.MODULE_FAILED, r"Failed to create temporary directory"),
    (ContactReason.TIMED_OUT, r"timed out"),
    (ContactReason.CONNECTION_REFUSED, r"Connection refused"),
)
_BY_RETURN_CODE: Dict[Optional[int], ContactReason] = {
    0: ContactReason.OUTPUT_UNUSABLE,
    127: ContactReason.PYTHON_MISSING,
}
_UNTRUSTED_ALIAS = r"No \S+ host key is known for {} and you have requested strict checking"

_FAILED = _rules(
    (ContactReason.PYTHON_MISSING, r"module interpreter '.*' was not found|No python interpreters found"),
    (ContactReason.PYTHON_MISSING, r"python\S*: (?:\d+: )?(?:command )?not found|python\S*: No such file or directory"),
    (ContactReason.PYTHON_MISSING, r"requires a minimum of Python|future feature annotations is not defined"),
    (ContactReason.AUTHENTICATION_FAILED, r"[Mm]issing sudo password|sudo: a password is required"),
    (ContactReason.AUTHENTICATION_FAILED, r"Incorrect sudo password|Duplicate become password prompt"),
    (ContactReason.AUTHENTICATION_FAILED, r"is not in the sudoers file"),
    (ContactReason.OUTPUT_UNUSABLE, r"^Output unusable: "),
    (ContactReason.MODULE_FAILED, r"Timed out after \d+ second"),
    (ContactReason.CONNECTION_LOST, r"^Connection to \S+ closed by remote host|^Timeout, server \S+ not responding"),
    (ContactReason.MODULE_FAILED, r"^Traceback \(most recent call last\)"),
)
_MANAGER_FAILED = _rules(
    (ContactReason.MANAGER_FAULT, r"\[Errno (?:12|23|24|28|30)\] "),
    (ContactReason.MANAGER_FAULT, r"Finalization of task args|Error while resolving value"),
    (ContactReason.MANAGER_FAULT, r"couldn't resolve module/action|was not found in configured module paths"),
)


def classify(
    message: str,
    *,
    unreachable: bool,
    node_id: str = "",
    answered: bool = False,
    output: str = "",
    return_code: Optional[int] = None,
) -> Tuple[ContactReason, str]:
    """Tell why a node could not be used, and say it in one line.

    Shapes: *message* is Ansible's; *output* what the node wrote instead of a result. *answered* is true when the
    module itself reported the failure: then the words are its own.
    """
    text = _PREAMBLE.sub("", message[:_MAX_SEARCHED_CHARACTERS])
    if answered:
        return ContactReason.MODULE_FAILED, _one_line(text)
    if unreachable:
        reason, telling = _search(text, _UNREACHABLE)
        if node_id and re.search(_UNTRUSTED_ALIAS.format(re.escape(node_id)), text):
            # The alias is one that we pin keys under: the node shows a key of a kind that is not among them.
            reason = ContactReason.HOST_KEY_CHANGED
        return reason or ContactReason.CONNECTION_LOST, _one_line(telling or text)
    reason, telling = _search(text, _MANAGER_FAILED)
    if reason is not None:
        return reason, _one_line(telling or text)
    whole = f"{text}\n{_ends(output)}"
    reason, telling = _search(whole, _FAILED)
    if reason is None and "deserialization failed" in text:
        # 127 is the shell's "command not found", also where a version manager's stand-in for Python says nothing else.
        reason = _BY_RETURN_CODE.get(return_code, ContactReason.MODULE_FAILED)
        telling = f"{text.strip()} (exit code {return_code}): {_last_line(output)}"
    elif reason is ContactReason.MODULE_FAILED and "Traceback" in telling:
        telling = f"the module crashed: {_last_line(output) or text}"
    return reason or ContactReason.MODULE_FAILED, _one_line(telling or text)


def _search(text: str, rules: _Rules) -> Tuple[Optional[ContactReason], str]:
    for pattern, reason in rules:
        found = pattern.search(text)
        if found:
            return reason, _line_around(text, found.start())
    return None, ""


def _line_around(text: str, position: int) -> str:
    return text[text.rfind("\n", 0, position) + 1 :].split("\n", 1)[0].strip()


def _last_line(text: str) -> str:
    lines: Iterable[str] = (line.strip() for line in reversed(_ends(text).splitlines()))
    return next((line for line in lines if line), "no output")


def _ends(text: str) -> str:
    half = _MAX_SEARCHED_CHARACTERS // 2
    return text if len(text) <= 2 * half else f"{text[:half]}\n{text[-half:]}"


def _one_line(text: str) -> str:
    line = _CONTROL.sub(" ", text[: 4 * _MAX_MESSAGE_CHARACTERS]).strip()
    return line if len(line) <= _MAX_MESSAGE_CHARACTERS else f"{line[: _MAX_MESSAGE_CHARACTERS - 1]}…"
