# SPDX-License-Identifier: GPL-3.0-or-later
"""What the API takes and gives out for Prometheus."""

from __future__ import annotations

from pydantic import Field

from node_manager.api.schemas import NodeFilterQuery, Output


class TargetQuery(NodeFilterQuery):
    """Which nodes to scrape, and on which port."""

    port: int = Field(9100, ge=1, le=65535, description="The port of each target: that of the node exporter")


class TargetGroupOut(Output):
    """One node as a target."""

    targets: list[str] = Field(description="Its address and the port", examples=[["192.0.2.7:9100"]])
    labels: dict[str, str] = Field(
        description="What is known of it, each name beginning with __meta_node_manager_",
        examples=[{"__meta_node_manager_node_id": "gw-7"}],
    )
