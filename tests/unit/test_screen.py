# SPDX-License-Identifier: GPL-3.0-or-later
"""What is drawn on terminals: text from outside stays text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from node_manager import screen
from rich.console import Console, RenderableType

HEALTH = {"node_id": "local", "status": "online", "health": "healthy", "health_cause": "no check failed"}


def drawn(renderable: RenderableType) -> str:
    """Draw on a wide terminal without colours."""
    file = io.StringIO()
    Console(file=file, width=200).print(renderable)
    return file.getvalue()


def node(**changes: Any) -> dict[str, Any]:
    """Give a node as GET /nodes has it, as far as tables read it."""
    return {
        "node_id": "gw-7",
        "status": "online",
        "health": "healthy",
        "schedulable": True,
        "node_type": None,
        "address": "192.0.2.7",
        "location": {"zone": None, "site": None},
        "capacity": {"cpu_millicores": 1500, "memory_mib": 512},
        **changes,
    }


def test_nodes_table_writes_units_and_gaps() -> None:
    line = drawn(screen.nodes_table([node()])).splitlines()[1]

    assert line.split() == ["gw-7", "online", "healthy", "yes", "-", "192.0.2.7", "-", "-", "1.5", "0.5", "GiB"]


def test_nodes_table_does_not_read_markup_from_outside() -> None:
    table = drawn(screen.nodes_table([node(location={"zone": "[bold]x[/bold]", "site": None})]))

    assert "[bold]x[/bold]" in table


@pytest.mark.parametrize("cause", ["[red]x[/red]", "no [closing"], ids=["markup", "broken-markup"])
def test_start_screen_shows_the_cause_verbatim(cause: str) -> None:
    shown = drawn(screen.start_screen("http://x", Path("/t"), {**HEALTH, "health_cause": cause}, None, None))

    assert cause in shown


def test_start_screen_without_node_has_the_addresses() -> None:
    shown = drawn(screen.start_screen("http://127.0.0.1:8080", Path("/var/admin.token"), None, None, None))

    assert "http://127.0.0.1:8080/docs" in shown
    assert "/var/admin.token" in shown
