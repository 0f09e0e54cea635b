# SPDX-License-Identifier: GPL-3.0-or-later
"""What the data of commands may be: what the endpoints take, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from node_manager import status_input
from node_manager.api import nodes
from node_manager.command_contracts import COMMANDS, CommandType, RegisterNode, SetNodeStatus
from node_manager.declarations import NodeDeclaration
from node_manager.event_documents import command_schema_of
from node_manager.maintenance_requests import StatusRequest
from pydantic import ValidationError

EXAMPLES = {name: command_schema_of(name)["examples"][0] for name in COMMANDS}
NODE = EXAMPLES["node.register"]
STATUS = {"node_id": "gw-7", "status": "maintenance"}


def read(name: str, data: Any) -> Any:
    """Read data as they come from Kafka."""
    return COMMANDS[name].model_validate_json(json.dumps(data))


def test_each_type_has_a_contract() -> None:
    assert list(COMMANDS) == list(CommandType)


@pytest.mark.parametrize("name", COMMANDS)
def test_command_takes_its_example_from_json_and_from_python(name: str) -> None:
    assert COMMANDS[name].model_validate(EXAMPLES[name]) == read(name, EXAMPLES[name])


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("data", [None, [], "gw-7", {}, 5, True], ids=repr)
def test_command_refuses_what_is_no_data(name: str, data: Any) -> None:
    with pytest.raises(ValidationError):
        read(name, data)


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "unknown field": ("node.request_check", {"node_id": "gw-7", "force": True}),
    "id of another type": ("node.request_check", {"node_id": 7}),
    "id in upper case": ("node.request_check", {"node_id": "GW-7"}),
    "id with a path": ("node.request_check", {"node_id": "../gw-7"}),
    "id with a line break": ("node.request_check", {"node_id": "gw-7\n"}),
    "id of a group": ("node.request_check", {"node_id": "all"}),
    "id too long": ("node.request_check", {"node_id": "a" * 254}),
    "no deployment": ("deployment.release", {"deployment_id": ""}),
    "deployment with a colon": ("deployment.release", {"deployment_id": "web:1"}),
    "deployment with a line break": ("deployment.release", {"deployment_id": "web\n"}),
    "deployment too long": ("deployment.release", {"deployment_id": "a" * 254}),
    "status that nobody sets": ("node.set_status", {**STATUS, "status": "draining"}),
    "status of no kind": ("node.set_status", {**STATUS, "status": ["active"]}),
    "text for true": ("node.set_status", {**STATUS, "drain": "true"}),
    "deadline of nothing": ("node.set_status", {**STATUS, "drain": True, "deadline_seconds": 0}),
    "deadline past a month": (
        "node.set_status",
        {**STATUS, "drain": True, "deadline_seconds": status_input.MAX_DEADLINE_SECONDS + 1},
    ),
    "time as a number": ("node.set_status", {**STATUS, "until": 1795370400}),
    "time without a zone": ("node.set_status", {**STATUS, "until": "2026-11-22T18:00:00"}),
    "reason too long": ("node.set_status", {**STATUS, "reason": "x" * 256}),
    "reason with NUL": ("node.set_status", {**STATUS, "reason": "disk\x00"}),
    "template in an address": ("node.register", {**NODE, "address": "{{ lookup('pipe', 'id') }}"}),
    "option in a connection": ("node.register", {**NODE, "connection": {"ssh_args": "-o ProxyCommand=id"}}),
    "number for a port": ("node.register", {**NODE, "connection": {"port": "22"}}),
    "no address": ("node.register", {"node_id": "gw-7"}),
}


@pytest.mark.parametrize(("name", "data"), WRONG.values(), ids=WRONG)
def test_command_refuses(name: str, data: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        read(name, data)


@pytest.mark.parametrize(
    "data",
    [
        STATUS,
        {**STATUS, "until": "2027-11-22T18:00:00+01:00", "keep_cordon": False},
        {**STATUS, "drain": True, "deadline_seconds": status_input.MAX_DEADLINE_SECONDS},
        {"node_id": "gw-7", "status": "active", "force": True},
        {**STATUS, "reason": "neue Platte, größer; 新しい"},
    ],
    ids=["plain", "until", "deadline", "force", "words"],
)
def test_status_is_what_maintenance_takes(data: dict[str, Any]) -> None:
    wanted = read("node.set_status", data)
    request = StatusRequest(**{key: value for key, value in dict(wanted).items() if key != "node_id"})

    assert wanted.node_id == "gw-7"
    assert request.status.value == data["status"]
    assert jsonschema.Draft202012Validator(command_schema_of("node.set_status")).is_valid(data)


def test_commands_take_what_the_endpoints_take() -> None:
    assert set(RegisterNode.model_fields) == set(NodeDeclaration.model_fields)
    assert set(SetNodeStatus.model_fields) == {*status_input.StatusIn.model_fields, "node_id"}
    assert nodes.StatusIn is status_input.StatusIn
