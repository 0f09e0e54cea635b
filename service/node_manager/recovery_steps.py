# SPDX-License-Identifier: GPL-3.0-or-later
"""Find the steps of recovery that there are: those of the role node_recover, and those of the operator.

Each is a folder with three task files. One that can't tell whether it helped is refused when the service starts, and not
when a node is on the floor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from node_manager.domain import RecoveryStep
from node_manager.playbook_process import COLLECTION, collections_path
from node_manager.settings import Settings, SettingsError

PHASES = ("precheck", "act", "postcheck")
# What may cost running work: only on a confirmed verdict, and after all else.
DRASTIC = frozenset((RecoveryStep.REBOOT.value, RecoveryStep.POWER_CYCLE.value))
# Those that reach the node by another way than SSH, or not at all.
WITHOUT_THE_NODE = frozenset((RecoveryStep.POWER_CYCLE.value, RecoveryStep.GIVE_UP.value))
OURS = frozenset(step.value for step in RecoveryStep)
_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")


def check(settings: Settings) -> None:
    """Look at every step that a ladder names, and at all that the operator brings.

    Errors: SettingsError names the ladder, the step, and what it lacks.
    """
    directory = directory_of(settings)
    if directory is not None and not directory.is_dir():
        raise SettingsError(f"{settings.config_file}: recovery.steps_directory: {directory} is no folder")
    own = own_steps(settings)
    for name, folder in own.items():
        if _NAME.fullmatch(name) is None:
            place = f"{settings.config_file}: recovery.steps_directory: step {name!r}"
            raise SettingsError(f"{place}: expected a name of small letters, digits and _")
        _check_step(folder, f"{settings.config_file}: recovery.steps_directory: step {name!r}")
    for place, steps in _ladders(settings):
        for name in steps:
            folder = own.get(name) or _role_folder() / name
            if not folder.is_dir():
                known = ", ".join(sorted(OURS | set(own)))
                raise SettingsError(f"{place}: expected steps out of {known}, got {name!r}")
            if name not in own:
                _check_step(folder, f"{place}: step {name!r}")


def own_steps(settings: Settings) -> dict[str, Path]:
    """List the operator's steps by name; they come before ours of the same name."""
    directory = directory_of(settings)
    if directory is None or not directory.is_dir():
        return {}
    folders = [folder for folder in sorted(directory.iterdir()) if folder.is_dir()]
    # A hidden one is of the tool that keeps them, such as Git.
    return {folder.name: folder for folder in folders if not folder.name.startswith(".")}


def directory_of(settings: Settings) -> Path | None:
    """Give the folder of the operator's steps; relative paths start at the folder of config.json."""
    directory = settings.configuration.recovery.steps_directory
    return None if directory is None else settings.config_file.absolute().parent / directory.expanduser()


def is_drastic(step: str) -> bool:
    """Tell whether a step may cost running work; nobody knows that of an operator's own, so those count."""
    return step in DRASTIC or step not in OURS


def _ladders(settings: Settings) -> Iterator[tuple[str, Iterable[str]]]:
    for condition, steps in settings.configuration.recovery.ladders.items():
        yield f"{settings.config_file}: recovery.ladders.{condition}", steps
    types_file = settings.config_file.parent / settings.configuration.node_types_file
    for name, definition in settings.node_types.items():
        for condition, steps in definition.ladders.items():
            yield f"{types_file}: node_types.{name}.ladders.{condition}", steps


def _role_folder() -> Path:
    return collections_path() / "ansible_collections" / Path(*COLLECTION.split(".")) / "roles/node_recover/tasks/steps"


def _check_step(folder: Path, place: str) -> None:
    for phase in PHASES:
        path = folder / f"{phase}.yml"
        try:
            # As nodes and not as values: tags such as !unsafe and !vault are Ansible's.
            tasks = yaml.compose(path.read_text("utf-8"), yaml.SafeLoader)
        except FileNotFoundError:
            raise SettingsError(f"{place} has no {phase}: {path} is missing") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SettingsError(f"{place}: its {phase} can't be read: {error}") from None
        if not isinstance(tasks, yaml.SequenceNode) or not any(isinstance(t, yaml.MappingNode) for t in tasks.value):
            raise SettingsError(f"{place} has no {phase}: {path} holds no tasks")
