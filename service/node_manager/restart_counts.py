# SPDX-License-Identifier: GPL-3.0-or-later
"""Tell services and containers that restart over and over from those that did once.

Pure: what was known and one sample's counters in, what is known out. Kubernetes' node-problem-detector counts 5 starts in
20 minutes; a counter that fell belongs to a new one of the same name, as in Prometheus' increase().
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from node_manager.condition_memory import is_within

RESTARTS = 3
SPAN_SECONDS = 900
MAX_COUNTERS = 32
MAX_HOT = 6
_HIGHEST_COUNT = 999_999

# {"seen": [source, ...], "partial": were there more than fit, "counts": {name: restarts},
#  "hot": {name: [does it count, time of a restart, ...]}}; the newest time first.
Restarts = Mapping[str, Any]
# By source (services, containers) all its counters by key; None for a source that can't tell now.
Counters = Mapping[str, Mapping[str, int] | None]


def follow(before: Restarts, counters: Counters, now: int, *, rebooted: bool) -> Restarts:
    """Take in one sample's counters; the same object where nothing changed.

    A boot resets the counters, and what a source counted before it was first read says nothing about when.
    """
    seen: list[str] = [] if rebooted else before.get("seen", [])
    told = {source: counts for source, counts in counters.items() if counts is not None}
    # Nearly always.
    if not (any(told.values()) or before.get("counts") or before.get("hot")) and seen and told.keys() <= {*seen}:
        return before
    known: dict[str, int] = {} if rebooted else dict(before.get("counts", {}))
    hot: dict[str, list[int]] = dict(before.get("hot", {}))
    gone = sorted(key for key in known if not any(key in counts for counts in told.values()))
    # Where not all fitted in, a name that isn't known may have counted for long.
    partial = not rebooted and before.get("partial", False)
    all_known = not partial
    for source, counts in told.items():
        for key, found in counts.items():
            count = min(found, _HIGHEST_COUNT)
            last = known.get(key, 0)
            if count == last:
                continue
            restarts = count - last if count > last else count
            is_new = key not in known
            if is_new and len(known) >= MAX_COUNTERS:
                partial = True
            has_room = not is_new or _make_room(known, gone)
            if source in seen and has_room and restarts and (all_known or not is_new):
                hot[key] = _hotter(hot.get(key), restarts, now)
            if count == 0:
                del known[key]
            elif has_room:
                known[key] = count
    hot = {key: entry for key, entry in hot.items() if is_within(entry[1], now, SPAN_SECONDS)}
    if len(hot) > MAX_HOT:
        kept = sorted(hot, key=lambda key: (-hot[key][0], -len(hot[key]), -hot[key][1], key))[:MAX_HOT]
        hot = {key: hot[key] for key in kept}
    after = {"seen": sorted({*seen, *told}), "partial": partial, "counts": known, "hot": hot}
    return before if after == before else after


def restarting(restarts: Restarts) -> list[str]:
    """List the keys of what restarts over and over, sorted."""
    return sorted(key for key, entry in restarts.get("hot", {}).items() if entry[0])


def _hotter(entry: list[int] | None, restarts: int, now: int) -> list[int]:
    """Add restarts; three within the span count, and go on counting until a whole span was quiet."""
    counts, *stamps = entry or [0]
    stamps = ([now] * min(restarts, RESTARTS) + stamps)[:RESTARTS]
    often = len(stamps) == RESTARTS and is_within(stamps[-1], now, SPAN_SECONDS)
    return [int(counts or often), *stamps]


def _make_room(known: dict[str, int], gone: list[str]) -> bool:
    """Forget one that is gone where there is no room; False if all are still there."""
    if len(known) < MAX_COUNTERS:
        return True
    if not gone:
        return False
    del known[gone.pop()]
    return True
