# SPDX-License-Identifier: GPL-3.0-or-later
"""The module node_health: run the way Ansible runs it on a node, as a program that reads its arguments as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MODULE = "ansible_collections.iot_platform.node_manager.plugins.modules.node_health"


def run_module(arguments: dict[str, Any], check_mode: bool = False) -> dict[str, Any]:
    given = {**arguments, "_ansible_check_mode": check_mode}
    program = (
        "import json, sys\n"
        "from ansible.module_utils.testing import patch_module_args\n"
        f"from {MODULE} import main\n"
        "with patch_module_args(json.load(sys.stdin)):\n"
        "    main()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(given),
        env={**os.environ, "PYTHONPATH": str(ROOT / "collections")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.stdout, ended.stderr
    return dict(json.loads(ended.stdout))


@pytest.mark.parametrize("check_mode", [False, True], ids=["run", "check-mode"])
def test_main_reports_failures_as_success(check_mode: bool) -> None:
    checks = [
        {"name": "bad", "kind": "command", "argv": ["false"]},
        {"name": "root", "kind": "filesystem", "mount": "/", "space_percent": 100, "severity": "warning"},
    ]

    result = run_module({"checks": checks}, check_mode)

    assert result["changed"] is False
    assert "failed" not in result
    assert [line["state"] for line in result["report"]["checks"]] == ["failed", "passed"]


def test_main_holds_the_given_sample_against_thresholds() -> None:
    result = run_module({"sample": {"cpu": {"use_percent": 99.5}}, "thresholds": {"cpu_percent": {"critical": 95}}})

    (line,) = result["report"]["checks"]
    assert (line["name"], line["state"], line["value"]) == ("cpu_percent", "failed", 99.5)


def test_main_takes_a_sample_itself() -> None:
    result = run_module({"thresholds": {"memory_percent": {"warning": 100}}, "timeout_seconds": 2})

    (line,) = result["report"]["checks"]
    assert line["state"] == "passed"
    assert 0 < line["value"] < 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(
            {"checks": [{"name": "a", "kind": "clock"}, {"name": "b", "kind": "tcp"}]},
            'checks[1]: check "b": port: is missing, expected an integer from 1 to 65535',
            id="check",
        ),
        pytest.param(
            {"checks": [{"name": "a", "kind": "clock"}, {"name": "a", "kind": "clock"}]},
            'checks[1]: check "a": name: expected one not used before',
            id="twice",
        ),
        pytest.param({"thresholds": {"cpu": {}}}, "threshold 'cpu': expected one of cpu_percent", id="threshold"),
        pytest.param(
            {"timeout_seconds": -1}, "timeout_seconds: expected a number from 0.1 to 3600, got -1", id="timeout"
        ),
        pytest.param({"timeout_seconds": "nan"}, "timeout_seconds: expected a number", id="nan"),
    ],
)
def test_main_fails_where_it_is_told_wrongly(arguments: dict[str, Any], said: str) -> None:
    result = run_module(arguments)

    assert result["failed"] is True
    assert said in result["msg"]
