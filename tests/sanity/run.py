# SPDX-License-Identifier: GPL-3.0-or-later
"""Run `ansible-test sanity` on the collection as it would be published: built, installed, then tested.

`ansible-test` downloads a script to get pip into its environments; Python brings pip itself, so a script of ours that
takes its place makes the run independent of that site.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import ansible_test

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "node-manager" / "sanity"
GET_PIP = '''\
"""Stand in for get-pip.py: the pip that Python brings, then what was asked for."""
import ensurepip
import os
import runpy
import sys

ensurepip.bootstrap(default_pip=True)
# ensurepip turns the machine's configuration of pip off for its own process; the installation below needs it.
os.environ.pop("PIP_CONFIG_FILE", None)
asked = [argument for argument in sys.argv[1:] if argument not in ("--no-setuptools", "--no-wheel")]
sys.argv = ["pip", "install", *asked]
runpy.run_module("pip", run_name="__main__", alter_sys=True)
'''


def main() -> int:
    """Build, install, test; give the exit status of ansible-test."""
    home = CACHE / f"python{sys.version_info.major}.{sys.version_info.minor}"
    place_get_pip(home)
    # ansible-test leaves out what git or the global excludes ignore, so the copy lies outside of this checkout.
    with tempfile.TemporaryDirectory(prefix="node-manager-sanity-") as folder:
        collection = install_collection(Path(folder))
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        command = [str(BIN / "ansible-test"), "sanity", "--venv", "--python", version, "--color", "no"]
        environment = {**os.environ, "HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "LC_ALL": "C.UTF-8"}
        environment.pop("ANSIBLE_CONFIG", None)
        return subprocess.run(command, cwd=collection, env=environment, timeout=1500, check=False).returncode


def install_collection(folder: Path) -> Path:
    """Build the collection and install the artifact under *folder*; give where it is."""
    artifacts = folder / "artifact"
    run_galaxy(folder, "build", "--output-path", str(artifacts), str(ROOT))
    artifact = next(artifacts.glob("*.tar.gz"))
    run_galaxy(folder, "install", "--force", "--offline", "--collections-path", str(folder), str(artifact))
    shutil.rmtree(artifacts)
    return folder / "ansible_collections" / "iot_platform" / "node_manager"


def run_galaxy(folder: Path, *arguments: str) -> None:
    """Run `ansible-galaxy collection`, by force, since the editable install already offers the collection."""
    subprocess.run(
        [str(BIN / "ansible-galaxy"), "collection", *arguments],
        cwd=folder,
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(folder), "LC_ALL": "C.UTF-8"},
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=300,
    )


def place_get_pip(home: Path) -> None:
    """Put the script where ansible-test looks for a downloaded one, for the pip version that it wants."""
    source = (Path(ansible_test.__file__).parent / "_internal" / "python_requirements.py").read_text("utf-8")
    found = re.search(r"""['"]?pip['"]?\s*[=:]\s*['"]([0-9.]+)['"]""", source)
    if found is None:
        raise SystemExit("this ansible-test names no version of pip; place_get_pip needs to learn its new way")
    cache = home / ".ansible" / "test" / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    (cache / f"get_pip_{found[1].replace('.', '_')}.py").write_text(GET_PIP, "utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
