# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules of the house that a reader can't see in one file: who may import whom, and what every file has."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from ansible_collections.iot_platform.node_manager.plugins.module_utils import _checks_spec, _recognise, _thresholds
from node_manager.node_types import Check, RecognisedBy, Thresholds
from node_manager.store import migrate, open_store, tables
from sqlalchemy import create_engine

CHECKOUT = Path(__file__).resolve().parents[2]
SERVICE = CHECKOUT / "service" / "node_manager"
PLUGINS = CHECKOUT / "plugins"
TESTS = CHECKOUT / "tests"
MAX_LINES = 500


def python_files(folder: Path) -> list[Path]:
    """List a folder's Python files, below it too."""
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


@cache
def parse(path: Path) -> ast.Module:
    """Read a file as a tree."""
    return ast.parse(path.read_text("utf-8"), str(path))


def name_of(path: Path) -> str:
    """Name a file for a test's id."""
    return str(path.relative_to(CHECKOUT))


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Name all that a file imports, each with its module, relative ones with their dots."""
    return frozenset(_imports_in(parse(path)))


def _imports_in(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}{'' if module.endswith('.') else '.'}{alias.name}" for alias in node.names)


def imports_any(path: Path, package: str) -> list[str]:
    """List what a file imports of *package*."""
    return [name for name in sorted(imports_of(path)) if name == package or name.startswith(f"{package}.")]


SERVICE_FILES = python_files(SERVICE)
PLUGIN_FILES = python_files(PLUGINS)
PURE_FILES = python_files(PLUGINS / "module_utils")
CONTROLLER_FILES = [
    path
    for folder in ("plugin_utils", "callback", "inventory", "action", "lookup", "filter")
    for path in python_files(PLUGINS / folder)
]
ALL_FILES = [*SERVICE_FILES, *PLUGIN_FILES, *python_files(TESTS), CHECKOUT / "hatch_build.py"]


# who may import whom


@pytest.mark.parametrize(
    "path",
    [path for path in SERVICE_FILES if path.name != "main.py" and SERVICE / "api" not in path.parents],
    ids=name_of,
)
def test_only_main_imports_the_api(path: Path) -> None:
    assert imports_any(path, "node_manager.api") == []


@pytest.mark.parametrize("path", [path for path in SERVICE_FILES if path.name != "domain.py"], ids=name_of)
def test_only_domain_imports_the_collection(path: Path) -> None:
    assert imports_any(path, "ansible_collections") == []


@pytest.mark.parametrize("path", python_files(SERVICE / "store"), ids=name_of)
def test_the_store_imports_nothing_above_it(path: Path) -> None:
    above = [name for name in imports_any(path, "node_manager") if not name.startswith("node_manager.store")]

    assert above == []


# What only type checkers import has no file at run time.
STANDARD = {*sys.stdlib_module_names, "_typeshed"}


@pytest.mark.parametrize("path", PURE_FILES, ids=name_of)
def test_pure_files_import_the_standard_library_and_each_other(path: Path) -> None:
    foreign = [
        name
        for name in imports_of(path)
        if name.partition(".")[0] not in STANDARD and not (name[0] == "." and name[1:2] not in {"", "."})
    ]

    assert foreign == []


@pytest.mark.parametrize("path", python_files(PLUGINS / "modules"), ids=name_of)
def test_modules_import_no_service(path: Path) -> None:
    assert imports_any(path, "node_manager") == []


@pytest.mark.parametrize("path", [path for path in CONTROLLER_FILES if path.name != "_link.py"], ids=name_of)
def test_only_the_link_imports_the_service(path: Path) -> None:
    assert imports_any(path, "node_manager") == []


# what every file has


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_file_is_one_room(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())

    assert lines <= MAX_LINES or TESTS in path.parents


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_file_names_its_licence(path: Path) -> None:
    head = path.read_text("utf-8").splitlines()[:5]

    assert "# SPDX-License-Identifier: GPL-3.0-or-later" in head


@pytest.mark.parametrize("path", ALL_FILES, ids=name_of)
def test_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(parse(path)) or (PLUGINS in path.parents and "DOCUMENTATION" in path.read_text("utf-8"))


@pytest.mark.parametrize("path", SERVICE_FILES, ids=name_of)
def test_file_explains_all_that_is_public(path: Path) -> None:
    silent = [
        node.name
        for scope in ast.walk(parse(path))
        if isinstance(scope, ast.Module) or (isinstance(scope, ast.ClassDef) and not scope.name.startswith("_"))
        for node in scope.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]

    assert silent == []


@pytest.mark.parametrize("path", [path for path in SERVICE_FILES if path.name != "cli.py"], ids=name_of)
def test_file_prints_nothing(path: Path) -> None:
    printed = [
        node.lineno
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]

    assert printed == []


def known_to_tests() -> set[str]:
    """Name all that some test imports, and all that has a test of its name."""
    files = python_files(TESTS)
    return {name for path in files for name in imports_of(path)} | {path.stem.removeprefix("test_") for path in files}


KNOWN_TO_TESTS = known_to_tests()


@pytest.mark.parametrize(
    "path",
    [path for path in SERVICE_FILES if path.name != "__init__.py" and "migrations" not in path.parts],
    ids=name_of,
)
def test_module_is_tested(path: Path) -> None:
    module = ".".join(path.relative_to(SERVICE.parent).with_suffix("").parts)
    # What serves HTTP is tested over HTTP, through the application.
    ways = {module, path.stem, *(["node_manager.main"] if path.parent.name == "api" else [])}

    assert ways & KNOWN_TO_TESTS


# what must agree


@pytest.mark.parametrize("path", [PLUGINS / "plugin_utils" / "_link.py"], ids=name_of)
def test_what_plugins_import_late_is_there(path: Path) -> None:
    found = [
        (node.module, alias.name)
        for node in ast.walk(parse(path))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("node_manager")
        for alias in node.names
    ]

    assert found
    for module, name in found:
        loaded = importlib.import_module(module or "")
        assert hasattr(loaded, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module} has no {name}"


def test_migrations_lead_to_the_tables(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/node-manager.db"
    open_store(url).close()
    engine = create_engine(url)

    with closing(engine.connect()) as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        differences = compare_metadata(context, tables.metadata)

    engine.dispose()
    assert differences == []


def test_head_is_the_newest_migration() -> None:
    assert ScriptDirectory(str(SERVICE / "store" / "migrations")).get_heads() == [migrate.HEAD]


CHECK_MODELS = {get_args(model.model_fields["kind"].annotation)[0]: model for model in get_args(get_args(Check)[0])}


def test_checks_have_the_kinds_that_nodes_know() -> None:
    assert set(CHECK_MODELS) == set(_checks_spec._READERS)


@pytest.mark.parametrize("kind", CHECK_MODELS)
def test_check_has_the_keys_that_nodes_know(kind: str) -> None:
    (on_the_node,) = (model for model in get_args(_checks_spec.Check) if model.kind == kind)

    fields = {field.name for field in dataclasses.fields(on_the_node)}

    assert set(CHECK_MODELS[kind].model_fields) == fields | {"kind"}


def test_recognised_by_has_the_keys_that_recognise_knows() -> None:
    assert set(RecognisedBy.model_fields) == set(_recognise._RULES) | {"priority"}


def test_thresholds_have_the_names_that_nodes_know() -> None:
    assert set(Thresholds.model_fields) == set(_thresholds._WATCHED)
