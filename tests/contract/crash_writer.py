# SPDX-License-Identifier: GPL-3.0-or-later
"""Write a thousand times and say after each commit what was committed: `python crash_writer.py URL`.

Run by test_crash.py, which kills it in the middle.
"""

from __future__ import annotations

import sys

from builders import START, make_declaration, make_facts, make_report, make_sample, make_settings, observe, seconds
from node_manager.declarations import NodeChange
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.store import open_store

NODES = 200
RECORDS_PER_NODE = 3


def main(url: str) -> None:
    """Register, update and observe one node after the other."""
    store, settings = open_store(url), make_settings()
    registry, log = NodeRegistry(store, settings), ObservationLog(store, settings)
    for number in range(NODES):
        node_id = f"node-{number}"
        registry.register(make_declaration(node_id, labels={"generation": "1"}))
        say("registered", node_id, 1)
        registry.update(node_id, NodeChange.model_validate({"address": "192.0.2.8", "labels": {"generation": "2"}}))
        say("updated", node_id, 2)
        for count in range(1, RECORDS_PER_NODE + 1):
            at = START + seconds(count)
            state = "failed" if count % 2 else "passed"
            log.record(
                [
                    observe("facts", make_facts(hostname=str(count)), at, node_id),
                    observe("sample", make_sample(float(count)), at, node_id),
                    observe("report", make_report(("critical", state)), at, node_id),
                ]
            )
            say("observed", node_id, count)


def say(what: str, node_id: str, count: int) -> None:
    """Acknowledge one write."""
    sys.stdout.write(f"{what} {node_id} {count}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1])
