# SPDX-License-Identifier: GPL-3.0-or-later
"""What the mass-failure guard lets pass while a fleet is struck, beside a handler that repairs whatever is unreachable.

``python tests/bench/storm.py [--nodes N] [--seconds N] [--seeds N]``. Exits with 1 if a bound was passed. The clock is a
virtual one. Times in a state are those of all scopes together, in scope-hours.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from node_manager.domain import GuardState
from storm_traces import LIMITS, Books, Manager, storms

COLUMNS = (
    "storm",
    "hit",
    "started",
    "no guard",
    "of living",
    "while open",
    "in 10 s",
    "in flight",
    "opened",
    "open h",
    "half h",
    "closed h",
    "canaries",
    "closed after",
    "repaired",
    "well",
)


def row_of(name: str, books: Books, naive: Books, nodes: int) -> tuple[str, ...]:
    """Give a storm's row of the table."""
    hours = {state: f"{books.seconds_in[state] / 3600:.1f}" for state in GuardState}
    after = f"{books.closed_at - books.last_back:.0f} s" if books.closed_at is not None else "-"
    return (
        name,
        str(books.hit),
        str(books.started),
        str(naive.started),
        f"{books.on_living}/{naive.on_living}",
        str(books.started_open),
        str(books.in_any_window),
        f"{books.fullest[0]}/{books.fullest[1]}",
        str(books.opened),
        hours[GuardState.OPEN],
        hours[GuardState.HALF_OPEN],
        hours[GuardState.CLOSED],
        f"{books.canaries['recovery']}+{books.canaries['check']}",
        after,
        str(books.repaired),
        f"{100 * books.healthy_at_end / nodes:.1f} %",
    )


def main() -> int:
    """Run all storms and print what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=10_000)
    parser.add_argument("--seconds", type=int, default=5400)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    print(
        f"{arguments.nodes} nodes, {arguments.seconds} s of virtual time each; one start per "
        f"{LIMITS.start_interval_seconds:g} s and {LIMITS.in_flight_percent:g} % in flight, per zone and fleet\n"
        "no guard: recoveries that a handler without one starts; of living: recoveries of nodes that had not crashed, with"
        " the guard/without;\nwhile open: starts in a scope that was open; in 10 s: most starts of a scope in any such"
        " window;\nin flight: the fullest scope at a start, of what it may have; opened: anew, too; canaries: recoveries+checks;"
        " closed after: from the end of the last cut\nuntil all scopes are closed\n"
    )
    passed, began = [], time.process_time()
    for seed in range(arguments.seeds):
        rows: list[tuple[str, ...]] = [COLUMNS]
        for storm in storms(arguments.nodes, arguments.seconds, seed):
            books = Manager(storm, seed).run()
            naive = Manager(storm, seed, None).run()
            rows.append(row_of(storm.name, books, naive, arguments.nodes))
            passed += [f"seed {seed}, {storm.name}: {text}" for text in books.passed]
        widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
        print(f"seed {seed}")
        for row in rows:
            first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            print("  ".join([first.strip().ljust(widths[0]), *others]))
        print()
    print(f"{time.process_time() - began:.1f} s of CPU")
    print("\n".join(f"PASSED: {text}" for text in passed) if passed else "budget never passed")
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main())
