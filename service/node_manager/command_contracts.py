# SPDX-License-Identifier: GPL-3.0-or-later
"""The commands that the manager takes from Kafka: what the data of each may be.

Each is what an endpoint takes, with the ids of its path. Hostile until it has passed these models. Imports models only.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from node_manager.declarations import NodeDeclaration, NodeId
from node_manager.status_input import StatusIn

# As the path of DELETE /deployment/{deployment_id} has it.
DeploymentId = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,252}$")]


class CommandType(StrEnum):
    """The commands there are: what `ce_type` may be."""

    NODE_REGISTER = "node.register"
    NODE_SET_STATUS = "node.set_status"
    DEPLOYMENT_RELEASE = "deployment.release"
    NODE_REQUEST_CHECK = "node.request_check"


class RegisterNode(NodeDeclaration):
    """Register a node, as POST /nodes does; the same declaration again changes nothing."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "node_id": "gw-7",
                    "address": "192.0.2.7",
                    "node_type": "edge-gateway",
                    "labels": {"line": "a"},
                    "location": {"region": "eu", "zone": "eu-1a", "site": "plant-2"},
                    "connection": {"user": "manager", "become": True},
                }
            ]
        }
    )


class SetNodeStatus(StatusIn):
    """Say whether a node takes part, as PUT /nodes/{node_id}/status does."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "node_id": "gw-7",
                    "status": "maintenance",
                    "drain": True,
                    "deadline_seconds": 3600,
                    "reason": "new disk",
                }
            ]
        }
    )

    node_id: NodeId = Field(description="The node")


class ReleaseDeployment(BaseModel):
    """Release all that is reserved for a deployment, as DELETE /deployment/{deployment_id} does."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, json_schema_extra={"examples": [{"deployment_id": "web-1"}]}
    )

    deployment_id: DeploymentId = Field(description="The deployment", examples=["web-1"])


class RequestCheck(BaseModel):
    """Ask for a health check of a node, as POST /nodes/{node_id}/health/check does."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, json_schema_extra={"examples": [{"node_id": "gw-7"}]}
    )

    node_id: NodeId = Field(description="The node")


COMMANDS: Mapping[str, type[BaseModel]] = MappingProxyType(
    {
        CommandType.NODE_REGISTER: RegisterNode,
        CommandType.NODE_SET_STATUS: SetNodeStatus,
        CommandType.DEPLOYMENT_RELEASE: ReleaseDeployment,
        CommandType.NODE_REQUEST_CHECK: RequestCheck,
    }
)
