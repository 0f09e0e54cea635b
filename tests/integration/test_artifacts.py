# SPDX-License-Identifier: GPL-3.0-or-later
"""The wheel and the collection, built from this tree and used without it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from running_service import RunningService

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
COLLECTION = "ansible_collections/iot_platform/node_manager"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel in a folder that comes before this checkout on sys.path."""
    site = tmp_path_factory.mktemp("installed") / "site"
    run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], site.parent
    )
    return site


def run(command: list[str], cwd: Path, **variables: str) -> str:
    """Run a command that must succeed; give what it printed."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def files_below(folder: Path) -> set[str]:
    """List the files that belong to the collection, relative to the checkout."""
    return {str(path.relative_to(ROOT)) for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def test_wheel_carries_the_whole_collection_and_the_defaults(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())

    parts = files_below(ROOT / "plugins") | files_below(ROOT / "roles") | files_below(ROOT / "playbooks")
    assert {f"{COLLECTION}/{part}" for part in parts} <= names
    assert {"node_manager/data/config.json", "node_manager/data/node_types.json", f"{COLLECTION}/galaxy.yml"} <= names


def test_installed_wheel_offers_the_collection_to_ansible(installed: Path, tmp_path: Path) -> None:
    shown = run(
        [str(BIN / "ansible-doc"), "-t", "module", "iot_platform.node_manager.node_health"],
        tmp_path,
        PYTHONPATH=str(installed),
    )

    assert str(installed) in shown.splitlines()[0]


def test_installed_wheel_serves_a_healthy_first_node(installed: Path, tmp_path: Path) -> None:
    calm = {"NODE_MANAGER_THRESHOLDS__CPU_PERCENT": "{}", "NODE_MANAGER_THRESHOLDS__LOAD_PER_CPU": "{}"}
    service = RunningService(tmp_path / "home", {**calm, "PYTHONPATH": str(installed)})
    service.command = (*service.command, "--local")
    service.start()
    try:
        with service.client() as api:
            health = api.post("/nodes/local/health/check", params={"wait": 60}).json()
    finally:
        service.stop()

    assert (health["health"], health["source"]) == ("healthy", "ansible")


def test_built_collection_has_what_galaxy_needs_and_nothing_else(tmp_path: Path) -> None:
    run([str(BIN / "ansible-galaxy"), "collection", "build", "--output-path", str(tmp_path), str(ROOT)], tmp_path)

    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as artifact:
        names = {name.rstrip("/") for name in artifact.getnames()}

    assert {"MANIFEST.json", "README.md", "meta/runtime.yml", "playbooks/check.yml"} <= names
    assert {name.split("/")[0] for name in names} <= {
        "MANIFEST.json",
        "FILES.json",
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "galaxy.yml",
        "meta",
        "playbooks",
        "plugins",
        "roles",
        "extensions",
        "tests",
    }
