# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Decide a node's type from its facts and the rules of the node types.

Pure: imports the standard library only. Facts come from the node and may be anything; no input makes it raise.
"""

from __future__ import annotations

import math
import re
from typing import Callable, Dict, List, Mapping, Optional, Tuple

# A hand-written pattern can backtrack exponentially; these keep the subject short, since the facts are not ours.
_MAX_SUBJECT_CHARACTERS = 200
_MAX_PATTERN_CHARACTERS = 200
_MIB = 1024 * 1024


def recognise(facts: object, types: Mapping[str, object]) -> Optional[str]:
    """Name the node type whose rules hold for *facts*, or None.

    Shapes: *types* maps a type's name to its ``recognised_by`` rules; None means that it is never recognised. All
        keys given must hold, and a key or a value that can't be understood holds never. The highest ``priority`` wins
        (default 0), ties go to the first name.
    Units: ``memory_mib_min`` and ``memory_mib_max`` in MiB, both edges included like those of ``cpu_count``.
    """
    seen: Mapping[str, object] = facts if isinstance(facts, dict) else {}
    matches: List[Tuple[float, str]] = [
        (-_priority(rules), name) for name, rules in types.items() if isinstance(rules, dict) and _hold(seen, rules)
    ]
    return min(matches)[1] if matches else None


def _hold(facts: Mapping[str, object], rules: Mapping[str, object]) -> bool:
    return all(key in _RULES and _RULES[key](facts, wanted) for key, wanted in rules.items() if key != "priority")


def _any_device(facts: Mapping[str, object], wanted: object) -> bool:
    devices = _member(facts, "devices")
    return any(bool(devices.get(name)) for name in _words(wanted))


def _architectures(facts: Mapping[str, object], wanted: object) -> bool:
    return facts.get("architecture") in _words(wanted)


def _virtualization(facts: Mapping[str, object], wanted: object) -> bool:
    return facts.get("virtualization") in _words(wanted)


def _features(facts: Mapping[str, object], wanted: object) -> bool:
    names = _words(wanted)
    return bool(names) and set(names) <= set(_words(facts.get("features")))


def _board_pattern(facts: Mapping[str, object], wanted: object) -> bool:
    if not isinstance(wanted, str) or len(wanted) > _MAX_PATTERN_CHARACTERS:
        return False
    board = _member(facts, "board")
    words = [word for word in (board.get("vendor"), board.get("model")) if isinstance(word, str)]
    subject = " ".join(words)[:_MAX_SUBJECT_CHARACTERS]
    try:
        return bool(words) and re.search(wanted, subject) is not None
    except (re.error, RecursionError, OverflowError):
        return False


def _cpu_count_min(facts: Mapping[str, object], wanted: object) -> bool:
    return _at_most(wanted, _member(facts, "cpu").get("count"))


def _cpu_count_max(facts: Mapping[str, object], wanted: object) -> bool:
    return _at_most(_member(facts, "cpu").get("count"), wanted)


def _memory_mib_min(facts: Mapping[str, object], wanted: object) -> bool:
    return _at_most(wanted, _memory_mib(facts))


def _memory_mib_max(facts: Mapping[str, object], wanted: object) -> bool:
    return _at_most(_memory_mib(facts), wanted)


_RULES: Dict[str, Callable[[Mapping[str, object], object], bool]] = {
    "any_device": _any_device,
    "architectures": _architectures,
    "board_pattern": _board_pattern,
    "cpu_count_max": _cpu_count_max,
    "cpu_count_min": _cpu_count_min,
    "features": _features,
    "memory_mib_max": _memory_mib_max,
    "memory_mib_min": _memory_mib_min,
    "virtualization": _virtualization,
}


def _priority(rules: Mapping[str, object]) -> float:
    number = _number(rules.get("priority", 0))
    return 0.0 if number is None else number


def _memory_mib(facts: Mapping[str, object]) -> Optional[float]:
    total_bytes = _number(facts.get("memory_total_bytes"))
    return None if total_bytes is None else total_bytes / _MIB


def _at_most(low: object, high: object) -> bool:
    low_number, high_number = _number(low), _number(high)
    return low_number is not None and high_number is not None and low_number <= high_number


def _number(value: object) -> Optional[float]:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number


def _member(facts: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = facts.get(key)
    return value if isinstance(value, dict) else {}


def _words(value: object) -> List[str]:
    return [word for word in value if isinstance(word, str)] if isinstance(value, (list, tuple)) else []
