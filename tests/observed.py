# SPDX-License-Identifier: GPL-3.0-or-later
"""Observations for tests: the documented examples, so that the documentation is held to the code."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

_DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "observations.md"


def documented(kind: str) -> dict[str, Any]:
    """Give a fresh copy of the example of *kind* (facts, sample, report, contact) in docs/observations.md."""
    return copy.deepcopy(_examples()[kind])


def observation(node_id: str, kind: str, observed_at: str, **changes: Any) -> dict[str, Any]:
    """Give one observation as POST /observations takes it: the documented example with some keys changed."""
    data = {**documented(kind), **changes}
    return {"node_id": node_id, "observed_at": observed_at, "source": "test", "kind": kind, "data": data}


@cache
def _examples() -> dict[str, dict[str, Any]]:
    text = _DOCUMENT.read_text("utf-8")
    found = re.findall(r"^## (\w+)\n\n```json\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    return {name: json.loads(block) for name, block in found}
