# SPDX-License-Identifier: GPL-3.0-or-later
"""The fleet by hand: ``python -m tests.fleet up 5 | status | down``."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .engine import FleetError, ensure_engine, find_engine
from .image import ensure_image
from .listing import credential_environment
from .nodes import Fleet, Node

STATE_DIRECTORY = Path(".cache")

Name = Annotated[str, typer.Option("--name", help="Name of the fleet; fleets of different names live side by side.")]
Prefix = Annotated[str, typer.Option("--addresses", help="First three numbers of the nodes' loopback addresses.")]

application = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(soft_wrap=True)


@application.command()
def up(
    count: Annotated[int, typer.Argument(min=1, help="How many nodes there shall be; running ones stay.")] = 5,
    name: Name = "fleet",
    addresses: Prefix = "127.0.1",
    docker_socket: Annotated[
        bool, typer.Option("--docker-socket", help="Give a new node-1 this machine's containers to report.")
    ] = False,
) -> None:
    """Start nodes, and print how to use them."""
    engine = ensure_engine()
    console.print("Preparing the node image (about two minutes the first time) ...")
    image = ensure_image(engine)
    fleet = _fleet(name, addresses)
    console.print(f"Starting {count} nodes ...")
    _show(fleet.up(count, image=image, docker_socket=docker_socket))
    relative = fleet.state_directory.relative_to(Path.cwd())
    settings = " ".join(
        f"{key}={shlex.quote(value)}" for key, value in credential_environment(fleet.state_directory).items()
    )
    first = fleet.nodes[0]
    console.print(
        f"\nTry:\n"
        f"  ansible -i {relative}/hosts.yml all -m ansible.builtin.ping\n"
        f"  ansible-playbook -i {relative}/hosts.yml playbooks/register.yml\n"
        f"  export {settings}\n"
        f"  nodectl serve\n"
        f"  nodectl apply -f {relative}/nodes.yml\n"
        f"  ssh -i {relative}/id_ed25519 -p {first.port} -o UserKnownHostsFile={relative}/known_hosts "
        f"{first.user}@{first.address}\n"
        f"  {engine.client} pause {first.container}\n"
        f"  {engine.client} exec {first.container} systemctl stop demo-app",
        markup=False,
        highlight=False,
    )


@application.command()
def status(name: Name = "fleet", addresses: Prefix = "127.0.1") -> None:
    """List the nodes there are."""
    _show(_fleet(name, addresses).nodes if find_engine() else [])


@application.command()
def down(name: Name = "fleet", addresses: Prefix = "127.0.1") -> None:
    """Stop and remove every node of the fleet. The engine and the image stay."""
    removed = _fleet(name, addresses).down() if find_engine() else 0
    console.print(f"Removed {removed} nodes.")


def _fleet(name: str, addresses: str) -> Fleet:
    return Fleet(
        ensure_engine(), name=name, address_prefix=addresses, state_directory=Path.cwd() / STATE_DIRECTORY / name
    )


def _show(nodes: list[Node]) -> None:
    table = Table("node", "address", "user", "state", "container")
    for node in nodes:
        table.add_row(node.node_id, f"{node.address}:{node.port}", node.user, node.state, node.container)
    console.print(table)


if __name__ == "__main__":
    try:
        application()
    except (FleetError, subprocess.SubprocessError, OSError) as error:
        console.print(f"fleet: {error}", markup=False, highlight=False)
        sys.exit(1)
