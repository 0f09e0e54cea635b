# SPDX-License-Identifier: GPL-3.0-or-later
"""Every setting is described, in the schemas and in docs/configuration.md, and what is shipped keeps to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from node_manager import schemas
from node_manager.node_types import NodeTypes
from node_manager.settings import Configuration, SettingsError, load_settings
from pydantic import BaseModel

CHECKOUT = Path(__file__).resolve().parents[2]
REFERENCE = (CHECKOUT / "docs/configuration.md").read_text("utf-8")
ROOTS = [Configuration, NodeTypes]
KEYS = [key for root in ROOTS for key in schemas.keys_of(root)]


def models_under(root: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """Give the schemas of a file's model and all that it holds, by name."""
    schema = schemas.schema_of(root)
    return {root.__name__: schema, **schema["$defs"]}


def describe(found: dict[str, Any], schemas_by_name: dict[str, dict[str, Any]]) -> str:
    """Give a key's description: its own, or that of the one section that it holds."""
    reference = found.get("$ref", "").rpartition("/")[2]
    return str(found.get("description") or schemas_by_name.get(reference, {}).get("description", ""))


DESCRIPTIONS = {
    f"{name}.{key}": describe(found, models_under(root))
    for root in ROOTS
    for name, schema in models_under(root).items()
    for key, found in schema.get("properties", {}).items()
    # What a kind of check is, its section says.
    if key != "kind"
}


@pytest.mark.parametrize("description", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_each_key_has_a_description(description: str) -> None:
    assert len(description) >= 4


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_each_key_stands_in_the_reference(key: schemas.Key) -> None:
    assert f"| `{key.path}` |" in REFERENCE
    assert key.description in REFERENCE


@pytest.mark.parametrize(
    "key", [key for key in schemas.keys_of(Configuration) if key.variable], ids=lambda key: key.variable
)
def test_each_variable_of_the_reference_reaches_its_key(key: schemas.Key) -> None:
    # No key takes a list, so that the refusal names the variable and where it belongs.
    with pytest.raises(SettingsError) as caught:
        load_settings({str(key.variable): "[{}]"}, CHECKOUT / "config.json")

    section = key.path.replace("<name>", "name").rpartition(".")[0]
    assert str(caught.value).startswith(f"{key.variable} ({section}.")


@pytest.mark.parametrize("name", schemas.documents())
def test_each_document_is_what_the_models_say(name: str) -> None:
    assert (CHECKOUT / name).read_text("utf-8") == schemas.documents()[name], "run: make schemas"


@pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.__name__)
def test_schema_is_valid_itself(root: type[BaseModel]) -> None:
    jsonschema.Draft202012Validator.check_schema(schemas.schema_of(root))


@pytest.mark.parametrize("name", ["config", "node_types"])
def test_shipped_file_keeps_to_its_schema(name: str) -> None:
    schema = json.loads((CHECKOUT / f"{name}.schema.json").read_text())
    shipped = json.loads((CHECKOUT / f"{name}.json").read_text())

    jsonschema.Draft202012Validator(schema).validate(shipped)

    assert shipped["$schema"] == f"{name}.schema.json"


@pytest.mark.parametrize(
    ("root", "wrong"),
    [
        (Configuration, {"server": {"port": "8080"}}),
        (Configuration, {"sever": {}}),
        (Configuration, {"logging": {"level": "loud"}}),
        (NodeTypes, {"node_types": {"X": {"description": "x"}}}),
        (NodeTypes, {"node_types": {"x": {"description": "x", "checks": [{"name": "a", "kind": "sql"}]}}}),
        (NodeTypes, {}),
    ],
    ids=["type", "key", "word", "name", "kind", "missing"],
)
def test_schema_refuses_what_the_service_refuses(root: type[BaseModel], wrong: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(schemas.schema_of(root))

    with pytest.raises(ValueError, match="validation error"):
        root.model_validate(wrong)
    assert not validator.is_valid(wrong)


def test_main_tells_which_documents_are_out_of_date(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "galaxy.yml").touch()
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(schemas, "_CHECKOUT", tmp_path)

    codes = [schemas.main(["--check"]), schemas.main([]), schemas.main(["--check"])]

    assert codes == [1, 0, 0]
    assert "config.schema.json is out of date" in capsys.readouterr().err
