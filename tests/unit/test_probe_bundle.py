# SPDX-License-Identifier: GPL-3.0-or-later
"""What is sent to a node to watch it, and what each shell and each Python makes of it."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest
from loop_process import LoopProcess, find_pythons
from node_manager.domain import module_source
from node_manager.probe_bundle import LoopOptions, bootstrap_command, bundle, bundle_parts, strip_prose

OLD_PYTHONS = [python for version in ("2.7", "3.6", "3.7") for python in find_pythons(version)]
SHELLS = [shell for shell in ("sh", "bash", "dash", "busybox", "zsh", "csh", "tcsh", "fish") if shutil.which(shell)]


def run(command: str, sent: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["/bin/sh", "-c", command], input=sent, capture_output=True, timeout=20, check=False)


@pytest.mark.parametrize("python", OLD_PYTHONS, ids=lambda path: Path(path).parents[1].name)
def test_bootstrap_refuses_an_old_python(python: str) -> None:
    done = run(bootstrap_command(python), bundle(LoopOptions()))

    assert done.returncode == 3
    assert done.stdout == b""
    assert done.stderr.startswith(b"node_manager: needs Python 3.8 or newer, this is ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("shell", SHELLS)
def test_bootstrap_means_the_same_to_each_shell(shell: str) -> None:
    words = [shutil.which(shell) or shell, *(["sh"] if shell == "busybox" else []), "-c"]

    done = subprocess.run(
        [*words, bootstrap_command(sys.executable)],
        input=bundle(LoopOptions()),
        capture_output=True,
        timeout=20,
        check=False,
    )

    # Its input ends behind the bundle, so it may get no further than its first line.
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("kept", [0, 3, 1000], ids=["nothing", "header", "part"])
def test_bootstrap_ends_quietly_where_the_bundle_is_cut(kept: int) -> None:
    done = run(bootstrap_command(sys.executable), bundle(LoopOptions())[:kept])

    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_bootstrap_imports_nothing_from_the_users_folder(tmp_path: Path) -> None:
    for name in ("json", "zlib", "select", "node_manager_probe"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")

    with LoopProcess(bootstrap_command(sys.executable), bundle(LoopOptions()), cwd=tmp_path) as loop:
        loop.listen()

        assert loop.wait_for("hello")["pid"] == loop.pid


def test_bootstrap_command_quotes_the_interpreter() -> None:
    assert bootstrap_command("/opt/my python").startswith("'/opt/my python' -S -E -c '")


def test_bootstrap_command_is_one_short_line() -> None:
    command = bootstrap_command()

    assert len(command) < 1000
    assert "\n" not in command


def test_bundle_parts_share_the_sources() -> None:
    options = [LoopOptions(checks=[{"name": f"check {number}"}]) for number in range(1000)]
    _header, sources, _own = bundle_parts(options[0])
    tracemalloc.start()

    fleet = [bundle_parts(each) for each in options]
    held_bytes, _peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert all(parts[1] is sources for parts in fleet)
    assert held_bytes / len(fleet) < 2048
    assert len(sources) < 48 * 1024


def test_bundle_holds_the_installed_sources_and_the_options() -> None:
    header, rest = bundle(LoopOptions(max_line_bytes=4096)).split(b"\n", 1)
    unpacker = zlib.decompressobj()
    sources = json.loads(unpacker.decompress(rest))

    assert int(header) == len(rest)
    assert json.loads(unpacker.unused_data)["max_line_bytes"] == 4096
    assert {"_probe_loader", "_probe_loop", "_checks", "_checks_certificate", "_probe_run"} <= set(sources)
    assert "_contact" not in sources


def test_strip_prose_leaves_the_code() -> None:
    source = module_source("_probe_loop")

    stripped = strip_prose(source)

    assert len(stripped) < len(source) * 0.85
    assert code_of(stripped) == code_of(source)


def test_strip_prose_keeps_the_lines_in_place() -> None:
    source = '"""One\n\ntwo."""\nx = "# no"  # yes\n\n\ndef f():\n    """Only this."""\n'

    assert strip_prose(source) == '""\n\n\nx = "# no"\n\n\ndef f():\n    ""\n'


def test_loader_compiles_the_checks_only_when_they_are_needed() -> None:
    _header, sources, _own = bundle_parts(LoopOptions())
    script = (
        "import json, sys, zlib\nmodules = json.loads(zlib.decompress(sys.stdin.buffer.read()))\n"
        "exec(modules['_probe_loader'])\nsys.meta_path.insert(0, SourceFinder(modules))\n"
        "import node_manager_probe._probe_loop\nbefore = 'node_manager_probe._checks' in sys.modules\n"
        "import node_manager_probe._checks\nprint(before, node_manager_probe._checks.AT_ONCE)"
    )

    done = subprocess.run([sys.executable, "-c", script], input=sources, capture_output=True, timeout=20, check=True)

    assert done.stdout == b"False 8\n"


def test_loop_needs_no_place_to_write() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may take the write permission from everything")
    # The one behind the virtual environment, which may lie in /tmp itself.
    python = os.path.realpath(sys.executable)
    read_only = "mount -t tmpfs -o ro none /tmp && mount -o remount,bind,ro /"
    wrapped = f"unshare -m sh -c '{read_only} && exec \"$@\"' sh {bootstrap_command(python)}"
    checks = [{"name": "shell", "kind": "command", "argv": ["true"]}]
    if run(f"unshare -m sh -c '{read_only}'", b"").returncode != 0:
        pytest.skip("no mount namespace may be made here")

    with LoopProcess(wrapped, bundle(LoopOptions(checks=checks))) as loop:
        loop.listen()
        sample, report = loop.wait_for("sample"), loop.wait_for("report")

    assert sample["data"]["root_read_only"] is True
    assert [check["state"] for check in report["data"]["checks"]] == ["passed"]


def code_of(source: str) -> str:
    """Give a source's meaning without its docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)
