# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: ARG002 -- the methods' arguments are Ansible's

from __future__ import annotations

DOCUMENTATION = r"""
name: registry
type: aggregate
short_description: Hands what a run saw on nodes to the registry
version_added: "0.1.0"
description:
  - >-
    Takes the results of M(iot_platform.node_manager.node_facts), M(iot_platform.node_manager.node_resources) and
    M(iot_platform.node_manager.node_health) from any playbook or ad hoc run, and each failure to reach a node, and records
    them in the registry.
  - The registry is the store of this machine, or the HTTP API when E(NODE_MANAGER_URL) is set.
  - >-
    A result is on disk before it is delivered. What can't be delivered waits in C(spool) of the state directory and goes out
    with the next run.
  - >-
    Records nothing in check mode, nothing of a task that is delegated to another host, and nothing of hosts that aren't
    registered.
author:
  - The Node Manager developers (@node-manager)
requirements:
  - enable in C(callbacks_enabled) of ansible.cfg
"""

import json
import threading
import time
from datetime import datetime, timezone

from ansible.plugins.callback import CallbackBase

from ..module_utils._bounds import TooLargeError, clean
from ..module_utils._contact import classify
from ..module_utils._words import ContactReason, ObservationKind
from ..plugin_utils._link import SOURCE, LinkError, open_link, preload, state_directory
from ..plugin_utils._spool import Spool

_COLLECTION = "iot_platform.node_manager"
_FACTS = f"{_COLLECTION}.node_facts"
_RESOURCES = f"{_COLLECTION}.node_resources"
_HEALTH = f"{_COLLECTION}.node_health"
_OURS = frozenset((_FACTS, _RESOURCES, _HEALTH))

_BATCH_ITEMS = 200
# Half of what the API takes in one body.
_BATCH_BYTES = 2 * 1024 * 1024
_BATCH_SECONDS = 5.0
# How long a registry that failed is left alone, so that a run isn't slowed by it.
_RETRY_SECONDS = 30.0
_OUTPUT_CHARACTERS = 100_000


class CallbackModule(CallbackBase):
    """Collect observations and hand them in, in batches."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "iot_platform.node_manager.registry"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Results of loop items come in a thread of their own.
        self._lock = threading.Lock()
        self._spool = None
        self._segment = None
        self._batch = []
        self._batch_bytes = 0
        self._delivered_at = time.monotonic()
        self._failed_at = None
        self._failure = None
        self._undelivered = 0
        self._unknown = set()
        self._refused = []

    def v2_playbook_on_start(self, playbook):
        """Load the link before the first fork, and deliver what earlier runs could not."""
        self._begin()

    def v2_playbook_on_play_start(self, play):
        """Do the same for an ad hoc run, which has no playbook."""
        self._begin()

    def v2_runner_on_ok(self, result):
        """Take what our modules saw."""
        if "results" not in result.result:
            self._take_result(result)

    def v2_runner_item_on_ok(self, result):
        """Take what our modules saw, for one item of a loop."""
        self._take_result(result, deliver=False)

    def v2_runner_on_failed(self, result, ignore_errors=False):
        """Take the failure of one of our modules: it could not look."""
        if "results" not in result.result:
            self._take_failure(result, unreachable=False)

    def v2_runner_item_on_failed(self, result):
        """Take the failure of one of our modules, for one item of a loop."""
        self._take_failure(result, unreachable=False, deliver=False)

    def v2_runner_on_unreachable(self, result):
        """Take the failure to reach a node, whatever the task was."""
        self._take_failure(result, unreachable=True)

    def v2_playbook_on_stats(self, stats):
        """Hand in the rest and say what became of it."""
        with self._lock:
            self._deliver()
        self._conclude()

    def _begin(self):
        if self._spool is not None:
            return
        self._spool = Spool(state_directory() / "spool")
        try:
            preload()
        except LinkError as error:
            self._fail(error)
            return
        self._deliver_abandoned()

    def _take_result(self, result, deliver=True):
        action = result.task.resolved_action
        if action not in _OURS or not self._counts(result):
            return
        answer = result.result
        if action == _FACTS:
            kind, data = ObservationKind.FACTS, (answer.get("ansible_facts") or {}).get("node_manager")
        elif action == _RESOURCES:
            kind, data = ObservationKind.SAMPLE, answer.get("sample")
        else:
            kind, data = ObservationKind.REPORT, answer.get("report")
        if data is not None:
            self._take(result.host.name, kind, data, deliver)

    def _take_failure(self, result, unreachable, deliver=True):
        action = result.task.resolved_action
        if not self._counts(result) or not (unreachable or action in _OURS):
            return
        answer = result.result
        output = "\n".join(
            text[:_OUTPUT_CHARACTERS] + text[-_OUTPUT_CHARACTERS:] if len(text) > 2 * _OUTPUT_CHARACTERS else text
            for text in (str(answer.get("module_stdout") or ""), str(answer.get("module_stderr") or ""))
        )
        code = answer.get("rc")
        reason, message = classify(
            str(answer.get("msg") or ""),
            unreachable=unreachable,
            node_id=result.host.name,
            answered="invocation" in answer and not unreachable,
            output=output,
            return_code=code if isinstance(code, int) else None,
        )
        if reason is ContactReason.MANAGER_FAULT:
            self._display.warning(
                f"{result.host.name}: nothing was learnt about this node, the fault is here: {message}"
            )
        contact = {"reached": False, "reason": reason.value, "message": message}
        self._take(result.host.name, ObservationKind.CONTACT, contact, deliver)

    @staticmethod
    def _counts(result):
        """Tell whether a result says something about its host: it was no rehearsal and ran nowhere else."""
        return not result.task.check_mode and not result.task.delegate_to

    def _take(self, node_id, kind, data, deliver):
        try:
            data = clean(data)
        except TooLargeError as error:
            kind = ObservationKind.CONTACT
            data = {
                "reached": False,
                "reason": ContactReason.OUTPUT_UNUSABLE.value,
                "message": f"the result is {error}",
            }
        observation = {
            "node_id": str(node_id),
            # The controller's clock: what a node says of its own is never trusted.
            "observed_at": datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            "source": SOURCE,
            "kind": kind.value,
            "data": data,
        }
        with self._lock:
            try:
                if self._segment is None:
                    self._segment = self._spool.start()
                size = self._segment.append(observation)
            except OSError as error:
                # Still delivered from memory; only a crash now would lose it.
                self._display.warning(f"A result can't be written to the spool: {error}")
                size = len(json.dumps(observation))
            self._batch.append(observation)
            self._batch_bytes += size
            full = len(self._batch) >= _BATCH_ITEMS or self._batch_bytes >= _BATCH_BYTES
            # Only the thread that forks workers may open the store: a fork in the middle of a write would copy its locks.
            if deliver and (full or time.monotonic() - self._delivered_at >= _BATCH_SECONDS):
                self._deliver()

    def _deliver(self):
        """Hand in what has come together; what fails stays in the spool."""
        if not self._batch:
            return
        resting = self._failed_at is not None and time.monotonic() - self._failed_at < _RETRY_SECONDS
        if not resting:
            try:
                with open_link() as link:
                    for batch in _parts(self._batch):
                        self._count(link.record(batch))
            except LinkError as error:
                self._fail(error)
                if not error.temporary:
                    self._set_aside(error)
                    return
            else:
                if self._segment is not None:
                    self._segment.clear()
                self._start_batch()
                return
        self._undelivered += len(self._batch)
        self._leave_segment()

    def _leave_segment(self):
        if self._segment is not None:
            self._segment.release()
            self._segment = None
        self._start_batch()

    def _set_aside(self, error):
        self._refused.append(str(error))
        if self._segment is not None:
            self._segment.refuse()
        self._leave_segment()

    def _start_batch(self):
        self._batch = []
        self._batch_bytes = 0
        self._delivered_at = time.monotonic()

    def _deliver_abandoned(self):
        delivered = 0
        for segment in self._spool.abandoned():
            try:
                with open_link() as link:
                    for batch in segment.batches(_BATCH_ITEMS, _BATCH_BYTES):
                        link.record(batch)
                        delivered += len(batch)
            except LinkError as error:
                if error.temporary:
                    self._fail(error)
                    break
                self._refused.append(str(error))
                segment.refuse()
            except (KeyError, TypeError, ValueError, OSError) as error:
                self._refused.append(f"a spooled file can't be read: {error}")
                segment.refuse()
            else:
                segment.remove()
        if delivered:
            self._display.display(f"Node Manager: delivered {delivered} results of earlier runs to the registry.")
        removed = self._spool.trim()
        if removed:
            self._display.warning(
                f"The spool of undelivered results was full: its {removed} oldest files were dropped."
            )

    def _fail(self, error):
        self._failed_at = time.monotonic()
        self._failure = str(error)

    def _count(self, outcome):
        for rejection in outcome["rejected"]:
            if rejection["code"] == "node_not_found":
                self._unknown.add(rejection["node_id"])
            else:
                self._refused.append(f"{rejection['node_id']}: {rejection['message']}")

    def _conclude(self):
        if self._segment is not None:
            self._segment.remove()
            self._segment.release()
            self._segment = None
        if self._undelivered:
            self._display.warning(
                f"The registry can't take {self._undelivered} results now ({self._failure}); they are kept and go out with the "
                "next run."
            )
        if self._unknown:
            shown = ", ".join(sorted(self._unknown)[:5])
            self._display.warning(
                f"Not recorded, because not registered: {shown}{' and more' if len(self._unknown) > 5 else ''} "
                "(playbooks/register.yml registers them)."
            )
        if self._refused:
            self._display.warning(f"The registry refused {len(self._refused)} results; the first: {self._refused[0]}")


def _parts(batch):
    """Cut a batch into parts that one delivery takes; a single sample may be large."""
    part, size = [], 0
    for observation in batch:
        bytes_ = len(json.dumps(observation))
        if part and (len(part) >= _BATCH_ITEMS or size + bytes_ > _BATCH_BYTES):
            yield part
            part, size = [], 0
        part.append(observation)
        size += bytes_
    if part:
        yield part
