# SPDX-License-Identifier: GPL-3.0-or-later
"""Which steps of recovery there are, and which configurations are refused before a node is on the floor."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from node_manager import recovery_steps
from node_manager.recovery_steps import PHASES, check, directory_of, is_drastic, own_steps
from node_manager.settings import Settings, SettingsError, load_settings

TASKS = "- name: Look\n  ansible.builtin.ping:\n"


def write_step(directory: Path, name: str, **phases: str | None) -> Path:
    """Write a step whose phases do nothing, or hold what is given; None leaves one out."""
    folder = directory / name
    folder.mkdir(parents=True)
    for phase in PHASES:
        text = phases.get(phase, TASKS)
        if text is not None:
            (folder / f"{phase}.yml").write_text(text, "utf-8")
    return folder


def load(
    tmp_path: Path,
    ladders: dict[str, list[str]] | None = None,
    steps_directory: Path | str | None = None,
    **type_ladders: list[str],
) -> Settings:
    """Read settings from files in *tmp_path*, with the type server, which has *type_ladders*."""
    recovery: dict[str, Any] = {"ladders": ladders or {}}
    if steps_directory is not None:
        recovery["steps_directory"] = str(steps_directory)
    server = {"description": "Server", "ladders": type_ladders}
    (tmp_path / "config.json").write_text(json.dumps({"recovery": recovery}), "utf-8")
    (tmp_path / "node_types.json").write_text(json.dumps({"node_types": {"server": server}}), "utf-8")
    return load_settings({"NODE_MANAGER_HOME": str(tmp_path)}, tmp_path / "config.json")


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """Give a folder for an operator's steps."""
    folder = tmp_path / "steps"
    folder.mkdir()
    return folder


def test_check_takes_the_configuration_and_the_steps_that_are_shipped() -> None:
    check(load_settings({}))


def test_check_takes_each_step_that_comes_with_the_product(tmp_path: Path) -> None:
    check(load(tmp_path, {"ChecksPassing": sorted(recovery_steps.OURS)}))


def test_check_takes_an_operators_step(tmp_path: Path, steps: Path) -> None:
    write_step(steps, "drain_queue")

    check(load(tmp_path, {"ChecksPassing": ["drain_queue"]}, steps, LoadNormal=["drain_queue"]))


def test_check_takes_tasks_with_the_tags_that_ansible_knows(tmp_path: Path, steps: Path) -> None:
    write_step(steps, "drain_queue", act='- ansible.builtin.debug:\n    msg: !unsafe "{{ not a template }}"\n')

    check(load(tmp_path, {"ChecksPassing": ["drain_queue"]}, steps))


def test_check_looks_at_steps_that_no_ladder_names(tmp_path: Path, steps: Path) -> None:
    # Somebody may ask for them by name.
    folder = write_step(steps, "drain_queue", postcheck=None)

    with pytest.raises(SettingsError) as caught:
        check(load(tmp_path, {}, steps))

    assert str(caught.value) == (
        f"{tmp_path}/config.json: recovery.steps_directory: step 'drain_queue' has no postcheck:"
        f" {folder}/postcheck.yml is missing"
    )


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        (None, "is missing"),
        ("", "holds no tasks"),
        ("---\n", "holds no tasks"),
        ("[]\n", "holds no tasks"),
        ("- \n", "holds no tasks"),
        ("tasks: []\n", "holds no tasks"),
        ("- name: [\n", "can't be read"),
        ("- a\x00b\n", "can't be read"),
        ("--- 1\n--- 2\n", "can't be read"),
    ],
    ids=["missing", "empty", "no-document", "no-task", "null", "no-list", "no-yaml", "no-text", "two-documents"],
)
def test_check_names_the_file_the_step_and_what_it_lacks(
    tmp_path: Path, steps: Path, phase: str, text: str | None, lacks: str
) -> None:
    write_step(steps, "drain_queue", **{phase: text})

    with pytest.raises(SettingsError, match=re.escape(lacks)) as caught:
        check(load(tmp_path, {"ChecksPassing": ["drain_queue"]}, steps))

    told = str(caught.value)
    assert told.startswith(f"{tmp_path}/config.json: recovery.steps_directory: step 'drain_queue'")
    assert phase in told


def test_check_refuses_a_phase_that_is_no_text(tmp_path: Path, steps: Path) -> None:
    (write_step(steps, "drain_queue") / "act.yml").write_bytes(b"- name: \xff\n")

    with pytest.raises(SettingsError, match="step 'drain_queue': its act can't be read"):
        check(load(tmp_path, {}, steps))


def test_check_refuses_a_phase_that_is_a_folder(tmp_path: Path, steps: Path) -> None:
    (write_step(steps, "drain_queue", act=None) / "act.yml").mkdir()

    with pytest.raises(SettingsError, match="step 'drain_queue': its act can't be read"):
        check(load(tmp_path, {}, steps))


def test_check_names_an_unknown_step_of_the_configuration(tmp_path: Path, steps: Path) -> None:
    write_step(steps, "drain_queue")

    with pytest.raises(SettingsError) as caught:
        check(load(tmp_path, {"RootWritable": ["drain_queue", "drain_que"]}, steps))

    told = str(caught.value)
    assert told.startswith(
        f"{tmp_path}/config.json: recovery.ladders.RootWritable: expected steps out of drain_queue, "
    )
    assert "restart_service" in told
    assert told.endswith("got 'drain_que'")


def test_check_names_an_unknown_step_of_a_node_type(tmp_path: Path, steps: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        check(load(tmp_path, {}, steps, RootWritable=["drain_queue"]))

    told = str(caught.value)
    assert told.startswith(
        f"{tmp_path}/node_types.json: node_types.server.ladders.RootWritable: expected steps out of "
    )
    assert told.endswith("got 'drain_queue'")


@pytest.mark.parametrize("there", ["nothing", "file"])
def test_check_names_a_steps_directory_that_is_none(tmp_path: Path, there: str) -> None:
    if there == "file":
        (tmp_path / "steps").write_text("", "utf-8")

    with pytest.raises(SettingsError) as caught:
        check(load(tmp_path, {}, tmp_path / "steps"))

    assert str(caught.value) == (f"{tmp_path}/config.json: recovery.steps_directory: {tmp_path}/steps is no folder")


def test_check_takes_a_steps_directory_that_is_a_checkout(tmp_path: Path, steps: Path) -> None:
    write_step(steps, "drain_queue")
    (steps / ".git").mkdir()
    (steps / "README.md").write_text("our steps", "utf-8")

    check(load(tmp_path, {}, steps))

    assert list(own_steps(load(tmp_path, {}, steps))) == ["drain_queue"]


@pytest.mark.parametrize("name", ["Drain", "drain-queue", "d" * 64, "1st"], ids=["upper", "dash", "long", "digit"])
def test_check_refuses_a_name_that_no_ladder_could_hold(tmp_path: Path, steps: Path, name: str) -> None:
    write_step(steps, name)

    with pytest.raises(SettingsError, match=f"steps_directory: step '{name}': expected a name"):
        check(load(tmp_path, {}, steps))


def test_steps_directory_starts_at_the_folder_of_the_configuration(tmp_path: Path, steps: Path) -> None:
    folder = write_step(steps, "drain_queue")
    settings = load(tmp_path, {"ChecksPassing": ["drain_queue"]}, "steps")

    check(settings)

    assert directory_of(settings) == steps
    assert own_steps(settings) == {"drain_queue": folder}
    assert directory_of(load(tmp_path)) is None


def test_own_steps_come_before_ours_of_the_same_name(tmp_path: Path, steps: Path) -> None:
    folder = write_step(steps, "free_disk")
    settings = load(tmp_path, {"DiskSpaceSufficient": ["free_disk"]}, steps)

    check(settings)

    assert own_steps(settings) == {"free_disk": folder}


def test_is_drastic_of_what_costs_running_work_and_of_what_nobody_knows() -> None:
    drastic = {step for step in (*recovery_steps.OURS, "drain_queue") if is_drastic(step)}

    assert drastic == {"reboot", "power_cycle", "drain_queue"}
