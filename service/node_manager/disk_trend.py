# SPDX-License-Identifier: GPL-3.0-or-later
"""Foretell when a filesystem will be full, from how its use rose in the last six hours.

Pure: what was known and one sample's filesystems in, what is known out. One reading per quarter of an hour is kept, so that
most samples change nothing. Prometheus' node mixin looks back six and ahead twenty-four hours as well; a straight line
through log rotation or a copied image is what its runbook warns of, hence the three doubts in _is_trend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from node_manager.condition_memory import key_of
from node_manager.shapes import FilesystemSample

BUCKET_SECONDS = 900
WINDOW_BUCKETS = 24
# A day and some hours: what rotates daily has shown its tooth by then.
TOOTH_BUCKETS = 104
MAX_DISKS = 3
WATCHED_PERCENT = 50
ENTER_HOURS = 24
LEAVE_HOURS = 36
_LEAST_POINTS = 4
_LEAST_SPAN_BUCKETS = 4
_GOOD_FIT = 0.8
_BUCKETS_PER_HOUR = 3600 // BUCKET_SECONDS
# Use is kept in thousandths: more than a percent point less is a fall, and teeth differ by some.
_FALL = 10
_TOOTH_MARGIN = 50
_FULL = 1000

# {"bucket": the newest one, "disks": {mount: [total, first bucket, hours, tooth, its bucket, [use or null, ...]]}}
Trends = Mapping[str, Any]


@dataclass(frozen=True)
class _Disk:
    """One filesystem's readings; hours is the time left where it is foretold to run full, else 0."""

    total_mib: int
    first: int
    hours: int
    # From where it last fell, and when: what went down by itself once is expected to again.
    tooth: int
    tooth_at: int
    use: tuple[int | None, ...]


def follow(before: Trends, disks: Sequence[FilesystemSample], now: int, *, hangs: bool = False) -> Trends:
    """Take in one sample's filesystems; the same object where nothing changed.

    Shapes: *disks* are those that can be written to; *hangs* says that some could not be read this time.
    """
    known: Mapping[str, Any] = before.get("disks", {})
    if not known and all(disk.use_percent <= WATCHED_PERCENT for disk in disks):
        return before
    present = {key_of(disk.mount): disk for disk in disks}
    kept = known if hangs or known.keys() <= present.keys() else {key: known[key] for key in known if key in present}
    bucket = now // BUCKET_SECONDS
    newest = before.get("bucket", 0)
    # One bucket ahead is a manager whose clock is a little ahead; more is a clock that was wrong.
    if bucket <= newest <= bucket + 1:
        return before if kept is known else {"bucket": newest, "disks": kept} if kept else {}
    after = {key: _of_data(kept[key]) for key in kept if newest < bucket}
    for key, disk in present.items():
        extended = _extend(after.get(key), disk, bucket)
        if extended is None:
            after.pop(key, None)
        else:
            after[key] = extended
    ranked = sorted(after, key=lambda key: (not after[key].hours, -(after[key].use[-1] or 0), key))[:MAX_DISKS]
    return {"bucket": bucket, "disks": {key: _as_data(after[key]) for key in ranked}} if ranked else {}


def filling(trends: Trends) -> dict[str, tuple[float, int]]:
    """List the filesystems that will be full soon, by key: their use in percent and the hours left."""
    return {
        key: (next(use for use in reversed(disk[5]) if use is not None) / 10, disk[2])
        for key, disk in trends.get("disks", {}).items()
        if disk[2]
    }


def _extend(before: _Disk | None, disk: FilesystemSample, bucket: int) -> _Disk | None:
    """Add a reading; None where the filesystem needs no watching."""
    use, total_mib = round(disk.use_percent * 10), disk.total_bytes >> 20
    if before is not None and not _continues(before, total_mib, bucket):
        before = None
    if before is None:
        watched = use > WATCHED_PERCENT * 10
        return _Disk(total_mib, bucket, 0, 0, 0, (use,)) if watched else None
    last = next(known for known in reversed(before.use) if known is not None)
    tooth, tooth_at = before.tooth, before.tooth_at
    if use < last - _FALL:
        tooth, tooth_at = last, bucket
    elif bucket - tooth_at > TOOTH_BUCKETS:
        tooth, tooth_at = 0, 0
    if use <= WATCHED_PERCENT * 10 and not tooth:
        return None
    series = (*before.use, *[None] * (bucket - before.first - len(before.use)), use)
    dropped = max(0, len(series) - WINDOW_BUCKETS - 1)
    # The window begins with a reading: a series of nulls alone has no last one.
    dropped += next(offset for offset, known in enumerate(series[dropped:]) if known is not None)
    after = replace(before, first=before.first + dropped, tooth=tooth, tooth_at=tooth_at, use=series[dropped:])
    return replace(after, hours=_foretell(after))


def _continues(before: _Disk, total_mib: int, bucket: int) -> bool:
    """Tell a filesystem that goes on from one that was resized or not seen for the whole window."""
    resized = abs(total_mib - before.total_mib) * 100 > before.total_mib
    return not resized and 0 < bucket - (before.first + len(before.use) - 1) <= WINDOW_BUCKETS


def _foretell(disk: _Disk) -> int:
    """Give the hours until the filesystem is full, at least 1; 0 where that is far off or can't be told."""
    # Beyond its teeth, only what it did since the last one counts.
    since = disk.tooth_at - disk.first
    points = [(offset, use) for offset, use in enumerate(disk.use) if use is not None and offset >= since]
    use = points[-1][1]
    beyond = WATCHED_PERCENT * 10 if not disk.tooth else max(WATCHED_PERCENT * 10, disk.tooth + _TOOTH_MARGIN)
    if len(points) < _LEAST_POINTS or use <= beyond:
        return 0
    slope, fit = _line_through(points)
    if slope <= 0:
        return 0
    hours = (_FULL - use) / slope / _BUCKETS_PER_HOUR
    foretold = hours <= LEAVE_HOURS if disk.hours else hours < ENTER_HOURS and _is_trend(points, fit)
    return max(1, round(hours)) if foretold else 0


def _is_trend(points: Sequence[tuple[int, int]], fit: float) -> bool:
    """Doubt what is too short, what scatters (a saw), and what jumped once (a copied file)."""
    span = points[-1][0] - points[0][0]
    highest_jump = max(later[1] - earlier[1] for earlier, later in pairwise(points))
    return span >= _LEAST_SPAN_BUCKETS and fit >= _GOOD_FIT and highest_jump * 2 <= points[-1][1] - points[0][1]


def _line_through(points: Sequence[tuple[int, int]]) -> tuple[float, float]:
    """Fit a line by least squares: its slope per bucket, and R squared."""
    count = len(points)
    mean_x = sum(x for x, _ in points) / count
    mean_y = sum(y for _, y in points) / count
    spread_x = sum((x - mean_x) ** 2 for x, _ in points)
    spread_y = sum((y - mean_y) ** 2 for _, y in points)
    common = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return (common / spread_x, common**2 / (spread_x * spread_y)) if spread_y else (0.0, 0.0)


def _of_data(raw: Sequence[Any]) -> _Disk:
    total_mib, first, hours, tooth, tooth_at, use = raw
    return _Disk(total_mib, first, hours, tooth, tooth_at, tuple(use))


def _as_data(disk: _Disk) -> list[Any]:
    return [disk.total_mib, disk.first, disk.hours, disk.tooth, disk.tooth_at, list(disk.use)]
