# SPDX-License-Identifier: GPL-3.0-or-later
"""Each role has a Molecule scenario on real nodes: converge, idempotence, verify."""

from __future__ import annotations

import os
import subprocess

import pytest
from ansible_runs import BIN, ROOT
from parts import require

SCENARIOS = sorted(path.parent.name for path in (ROOT / "extensions" / "molecule").glob("*/molecule.yml"))

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(420)]


def test_each_role_has_a_scenario() -> None:
    roles = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())

    assert roles == SCENARIOS


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario_of_the_role_passes(scenario: str) -> None:
    for part in ("docker", "ssh"):
        require(part, "Molecule runs the roles on real nodes in Docker")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("NODE_MANAGER_", "ANSIBLE_"))}

    done = subprocess.run(
        [str(BIN / "molecule"), "test", "-s", scenario],
        cwd=ROOT,
        env={**inherited, "PATH": f"{BIN}{os.pathsep}{inherited.get('PATH', os.defpath)}", "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
