# SPDX-License-Identifier: GPL-3.0-or-later
"""Write what the models know about the configuration: two JSON Schemas, and its reference for people; with those of the events.

`python -m node_manager.schemas` writes them into the checkout, `--check` only tells which are out of date. Reads the
models and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from node_manager import event_documents
from node_manager.node_types import NodeTypes
from node_manager.settings import ENVIRONMENT_PREFIX, Configuration

Schema = Mapping[str, Any]

_CHECKOUT = Path(__file__).resolve().parents[2]
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_WORDS = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))


@dataclass(frozen=True)
class Key:
    """One key of a configuration file, as the reference shows it."""

    path: str
    type: str
    default: str
    description: str

    @property
    def variable(self) -> str | None:
        """Name the environment variable that sets it; None where none can."""
        if "." not in self.path:
            return None
        return ENVIRONMENT_PREFIX + self.path.replace("<name>", "NAME").upper().replace(".", "__")


def main(arguments: list[str]) -> int:
    """Write the documents, or with --check only compare; the exit code is 1 if one is out of date."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m node_manager.schemas [--check]\n")
        return 2
    if not (_CHECKOUT / "galaxy.yml").exists():
        sys.stderr.write(f"{_CHECKOUT} is no checkout of Node Manager: the documents belong into one\n")
        return 2
    outdated = {name: text for name, text in documents().items() if _read(_CHECKOUT / name) != text}
    for name, text in outdated.items():
        if arguments:
            sys.stderr.write(f"{name} is out of date; make schemas writes it\n")
        else:
            (_CHECKOUT / name).parent.mkdir(parents=True, exist_ok=True)
            (_CHECKOUT / name).write_text(text, "utf-8")
    return 1 if arguments and outdated else 0


def documents() -> dict[str, str]:
    """Give each document's text by its path in the checkout."""
    return {
        "config.schema.json": _as_json(schema_of(Configuration)),
        "node_types.schema.json": _as_json(schema_of(NodeTypes)),
        "docs/configuration.md": _reference(),
        **event_documents.documents(),
    }


def schema_of(model: type[BaseModel]) -> dict[str, Any]:
    """Give a model's JSON Schema, of the 2020-12 dialect."""
    schema = {"$schema": _DIALECT, **model.model_json_schema(by_alias=True, mode="validation")}
    _close(schema)
    return schema


def keys_of(model: type[BaseModel]) -> list[Key]:
    """List all keys of a file whose root is *model*, sections before what they hold left out."""
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return list(_walk(schema, schema.get("$defs", {}), ""))


def _close(schema: Any) -> None:
    """Refuse names that match no pattern, as the model does and pydantic leaves out of its schema."""
    if isinstance(schema, list):
        for item in schema:
            _close(item)
    if isinstance(schema, dict):
        if "patternProperties" in schema:
            schema.setdefault("additionalProperties", False)
        for item in schema.values():
            _close(item)


def _walk(schema: Schema, definitions: Schema, prefix: str) -> Iterator[Key]:
    for name, found in schema.get("properties", {}).items():
        if name == "$schema":
            continue
        path = f"{prefix}{name}"
        inner, inner_path = _inside(found, definitions, path)
        if inner is not None:
            yield from _walk(inner, definitions, f"{inner_path}.")
        elif "oneOf" not in found.get("items", {}):
            yield Key(path, _type(found, definitions), _default(found, name, schema), found.get("description", ""))


def _inside(found: Schema, definitions: Schema, path: str) -> tuple[Schema | None, str]:
    """Find the object that a key holds, by itself, in a list or under names; None for a plain value."""
    options = [option for option in found.get("anyOf", [found]) if option.get("type") != "null"]
    option = options[0]
    if "$ref" in option:
        return _resolve(option, definitions), path
    if "$ref" in option.get("items", {}):
        return _resolve(option["items"], definitions), f"{path}[]"
    entries = [option.get("additionalProperties"), *option.get("patternProperties", {}).values()]
    for entry in entries:
        if isinstance(entry, dict) and "$ref" in entry:
            return _resolve(entry, definitions), f"{path}.<name>"
    return None, path


def _resolve(reference: Schema, definitions: Schema) -> Schema:
    resolved: Schema = definitions[reference["$ref"].rpartition("/")[2]]
    return resolved


def _type(found: Schema, definitions: Schema) -> str:
    if "anyOf" in found:
        return " or ".join(_type(option, definitions) for option in found["anyOf"])
    if "const" in found:
        return f"`{found['const']}`"
    if "enum" in found:
        return " or ".join(f"`{word}`" for word in found["enum"])
    if found.get("type") == "array":
        return f"list of {_type(found['items'], definitions)}"
    if found.get("type") == "object":
        (entry,) = found["patternProperties"].values()
        return f"{_type(entry, definitions)} by name"
    if found.get("format") == "path":
        return "path"
    word = _WORDS[found["type"]]
    bounds = [f"{sign} {found[key]:g}" for key, sign in _BOUNDS if key in found]
    return f"{word} {', '.join(bounds)}" if bounds else word


def _default(found: Schema, name: str, parent: Schema) -> str:
    if name in parent.get("required", []):
        return "required"
    return f"`{json.dumps(found.get('default'))}`"


def _reference() -> str:
    sections = Configuration.model_json_schema(by_alias=True)
    definitions = sections["$defs"]
    by_section: dict[str, list[Key]] = {}
    for key in keys_of(Configuration):
        by_section.setdefault(key.path.partition(".")[0], []).append(key)
    parts = [_INTRODUCTION]
    for name, keys in by_section.items():
        section = sections["properties"][name]
        if "$ref" in section:
            described = section.get("description") or _resolve(section, definitions)["description"]
            parts.append(f"### {name}\n\n{described}\n\n{_table(keys, variables=True)}")
        else:
            parts.append(f"### {name}\n\n{_table(keys, variables=False)}")
    parts.append(_NODE_TYPES)
    parts.append(_table(keys_of(NodeTypes), variables=False))
    parts.append(_CHECKS)
    parts.extend(_check_sections())
    return "\n".join(parts)


def _check_sections() -> Iterator[str]:
    """Describe each kind of check: what all have first, then each kind's own keys."""
    definitions = NodeTypes.model_json_schema(by_alias=True)["$defs"]
    kinds = {kind: _resolve({"$ref": reference}, definitions) for kind, reference in _kinds(definitions).items()}
    common = set.intersection(*(set(schema["properties"]) for schema in kinds.values())) - {"kind"}
    first = next(iter(kinds.values()))
    shared = [key for key in _walk(first, definitions, "") if key.path in common]
    yield f"Every check has `kind`, one of the words below, and:\n\n{_table(shared, variables=False)}"
    for kind, schema in kinds.items():
        own = [key for key in _walk(schema, definitions, "") if key.path not in {*common, "kind"}]
        yield f"#### {kind}\n\n{schema['description']}\n\n{_table(own, variables=False)}"


def _kinds(definitions: Schema) -> dict[str, str]:
    mapping: dict[str, str] = definitions["NodeType"]["properties"]["checks"]["items"]["discriminator"]["mapping"]
    return dict(sorted(mapping.items()))


def _table(keys: list[Key], *, variables: bool) -> str:
    head = ["Key", "Type", "Default", "Meaning", *(["Variable"] if variables else [])]
    rows = [head, ["---"] * len(head)]
    for key in keys:
        cells = [f"`{key.path}`", key.type, key.default, key.description]
        rows.append([*cells, f"`{key.variable}`"] if variables else cells)
    return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |\n" for row in rows)


def _as_json(schema: Schema) -> str:
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return None


_INTRODUCTION = """\
<!-- Written by `make schemas` from the models in service/node_manager; edit the descriptions there. -->
# Configuration

Two files, read once at the start: `config.json` and, named in it, `node_types.json`. A mistake in either stops the start
with one line that names the file, the key and what was expected. Editors find `config.schema.json` and
`node_types.schema.json` through the `$schema` key.

- The file is the one that `NODE_MANAGER_CONFIG` names, else `config.json` of the checkout.
- A variable `NODE_MANAGER_<SECTION>__<KEY>` wins over the file. Its value is read as JSON where it is JSON (`8080`,
  `false`, `null`, `{"a": 1}`), else as text; a text of digits needs quotes: `'"123"'`.
- The state directory is `NODE_MANAGER_HOME`, else `var/` of the checkout, else `~/.local/state/node-manager`.

## config.json
"""

_NODE_TYPES = """\
## node_types.json

What nodes there are. `<name>` is the type's name: lower-case letters, digits and hyphens, up to 63.
"""

_CHECKS = """\
### Checks

`node_types.<name>.checks` is a list of health checks that are run on each node of the type, with unique names.
"""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
