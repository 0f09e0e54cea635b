# SPDX-License-Identifier: GPL-3.0-or-later
"""Every platform is a recorded directory: what the probe makes of it is compared as a whole."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe import (
    Sampler,
    collect_facts,
    collect_sample,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_clock import ClockReading
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_read import Reader

PLATFORMS = Path(__file__).parents[1] / "fixtures" / "platforms"
NAMES = sorted(path.parent.name for path in PLATFORMS.glob("*/platform.json"))


def read_json(name: str, file: str) -> Any:
    return json.loads((PLATFORMS / name / file).read_text("utf-8"))


def open_platform(name: str, part: str = "tree") -> Reader:
    platform = read_json(name, "platform.json")
    commands: dict[str, str] = platform.get("commands", {})

    def read_clock() -> ClockReading:
        if "clock" not in platform:
            raise OSError(1, "Operation not permitted")
        return ClockReading("the kernel", **platform["clock"])

    return Reader(
        str(PLATFORMS / name / part),
        statvfs=lambda path: SimpleNamespace(**platform["statvfs"][path]),
        run=lambda argv, limit_seconds: commands.get(argv[0]),
        read_clock=read_clock,
        machine=platform["machine"],
        python_version=platform["python_version"],
    )


@pytest.mark.parametrize("name", NAMES)
def test_collect_facts_reads_platform(name: str) -> None:
    expected = read_json(name, "expected.json")["facts"]

    actual = collect_facts(open_platform(name))

    assert expected == actual


@pytest.mark.parametrize("name", NAMES)
def test_collect_sample_reads_platform(name: str) -> None:
    platform = read_json(name, "platform.json")
    expected = read_json(name, "expected.json")["sample"]
    before = Sampler(open_platform(name, "before"), clock=lambda: 100.0)
    before.prime(5.0)
    before.close()

    actual = collect_sample(
        open_platform(name),
        previous=before.previous,
        clock=lambda: 100.0 + platform["elapsed_seconds"],
        wall_clock=lambda: 1795363200.1,
    )

    assert expected == actual
