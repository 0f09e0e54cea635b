# SPDX-License-Identifier: GPL-3.0-or-later
"""What people see on a terminal: tables of nodes and tokens, and the short screen of a start.

Rendering only: plain data in, rich objects out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from node_manager.access import TokenRecord
from node_manager.load_distribution import Weight
from node_manager.samples import Utilization
from node_manager.views import render_time

# A pipe or a file has no width; lines must not be cut for it.
_FILE_WIDTH = 400
_MAX_DATA = 200
_HEALTH_STYLES = {
    "healthy": "green",
    "degraded": "yellow",
    "suspect": "yellow",
    "unreachable": "bold red",
    "recovering": "cyan",
    "flapping": "magenta",
}


def make_console() -> Console:
    """Open standard output: as wide as the terminal, and wide enough for whole lines where it is none."""
    return Console() if sys.stdout.isatty() else Console(width=_FILE_WIDTH, soft_wrap=True)


def weights_table(weights: Iterable[Weight]) -> Table:
    """Lay out how traffic is to be shared."""
    table = Table("NODE", "ADDRESS", "WEIGHT", "STATE", "REASON", box=None, pad_edge=False)
    for weight in weights:
        table.add_row(
            escape(weight.node_id),
            escape(weight.address),
            str(weight.weight),
            weight.state.value,
            escape(weight.reason),
        )
    return table


def nodes_table(nodes: Iterable[Mapping[str, Any]]) -> Table:
    """Lay nodes out, one a line."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("NODE", "STATUS", "HEALTH", "SCHEDULABLE", "TYPE", "ADDRESS", "ZONE", "SITE", "CPU", "MEMORY"):
        table.add_column(heading, no_wrap=True)
    for node in nodes:
        capacity = node["capacity"]
        table.add_row(
            escape(node["node_id"]),
            escape(node["status"]),
            Text(node["health"], _HEALTH_STYLES.get(node["health"], "")),
            "yes" if node["schedulable"] else "no",
            escape(node["node_type"] or "-"),
            escape(node["address"]),
            escape(node["location"]["zone"] or "-"),
            escape(node["location"]["site"] or "-"),
            f"{capacity['cpu_millicores'] / 1000:g}" if "cpu_millicores" in capacity else "-",
            f"{capacity['memory_mib'] / 1024:.1f} GiB" if "memory_mib" in capacity else "-",
        )
    return table


def tokens_table(tokens: Iterable[TokenRecord]) -> Table:
    """Lay tokens out, one a line; the tokens themselves are not known."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("ID", "NAME", "ROLE", "CREATED", "REVOKED"):
        table.add_column(heading, no_wrap=True)
    for token in tokens:
        table.add_row(
            token.token_id,
            escape(token.name),
            token.role.value,
            render_time(token.created_at),
            render_time(token.revoked_at) or "-",
        )
    return table


def start_screen(
    url: str, token_file: Path, health: Mapping[str, Any] | None, use: Utilization | None, runtime_message: str | None
) -> Group:
    """Show where the manager is and how its first node does."""
    facts = Table.grid(padding=(0, 2))
    facts.add_row("API", url)
    facts.add_row("Docs", f"{url}/docs")
    facts.add_row("Token", f"{escape(str(token_file))}  (admin; keep it to yourself)")
    if health is None:
        return Group(Text("Node Manager is running", "bold green"), facts)
    node = Table.grid(padding=(0, 2))
    node.add_row("Node", escape(health["node_id"]))
    node.add_row("Status", escape(health["status"]))
    node.add_row(
        "Health", Text(f"{health['health']} ({health['health_cause'][:300]})", _HEALTH_STYLES.get(health["health"], ""))
    )
    if use is not None:
        node.add_row("CPU", _percent(use.cpu_percent))
        node.add_row("Memory", _percent(use.memory_percent))
        node.add_row("Disk", f"{_percent(use.disk_percent)} of {escape(use.disk_fullest_mount or '/')}")
        containers = runtime_message or f"{use.containers_running} running"
        node.add_row("Containers", escape(containers))
    try_next = Text("Next: .venv/bin/nodectl nodes   |   .venv/bin/ansible-inventory --graph   |   Ctrl-C stops", "dim")
    return Group(Text("Node Manager is running", "bold green"), facts, Text(), node, Text(), try_next)


def _percent(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1f} %"


def event_line(event: Mapping[str, Any]) -> str:
    """Show a CloudEvent in one line."""
    # As JSON, which holds no control characters: what is in an event may come from a node.
    data = json.dumps(event["data"])
    subject = json.dumps(event["subject"])[1:-1]
    shortened = data if len(data) <= _MAX_DATA else f"{data[:_MAX_DATA]} ..."
    return f"{event['time']}  {event['sequence']:>8}  {event['type']:<32}  {subject:<24}  {shortened}"
