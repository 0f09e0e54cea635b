# SPDX-License-Identifier: GPL-3.0-or-later
"""Nodes have Python 3.8 and nothing else: the probe runs there as it is."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

COLLECTIONS = Path(__file__).parents[2] / "collections"
PACKAGE = "ansible_collections.iot_platform.node_manager.plugins.module_utils"
SCRIPT = f"""
import json, sys
sys.path.insert(0, sys.argv[1])
from {PACKAGE}._bounds import clean
from {PACKAGE}._probe import collect_facts, collect_sample
from {PACKAGE}._probe_read import Reader
from {PACKAGE}._recognise import recognise
facts = collect_facts(Reader())
sample = collect_sample(Reader(), 0.2)
print(json.dumps({{"facts": facts, "sample": sample, "type": recognise(facts, {{"any": {{}}}})}}))
"""


def find_python38() -> str | None:
    """Find a Python 3.8 that really runs: a version manager may put a name on PATH that only says "not found"."""
    candidates = [shutil.which("python3.8") or ""]
    candidates += [str(path) for path in sorted(Path.home().glob(".pyenv/versions/3.8*/bin/python"))]
    for candidate in filter(None, candidates):
        try:
            done = subprocess.run(
                [candidate, "-c", "import sys; sys.exit(sys.version_info[:2] != (3, 8))"], check=False
            )
        except OSError:
            continue
        if done.returncode == 0:
            return candidate
    return None


PYTHON38 = find_python38()


@pytest.mark.skipif(
    PYTHON38 is None and not os.environ.get("NODE_MANAGER_REQUIRE_ALL"), reason="needs a Python 3.8 on PATH or in pyenv"
)
def test_collect_runs_on_bare_python38() -> None:
    assert PYTHON38 is not None, "no Python 3.8 on PATH or in pyenv"

    done = subprocess.run(
        [PYTHON38, "-S", "-E", "-c", SCRIPT, str(COLLECTIONS)], capture_output=True, text=True, timeout=60, check=False
    )

    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["facts"]["python_version"].startswith("3.8.")
    assert seen["sample"]["cpu"]["count"] == os.cpu_count()
    assert seen["type"] == "any"
