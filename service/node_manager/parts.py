# SPDX-License-Identifier: GPL-3.0-or-later
"""The parts of a running service, as main wires them and the API and the command line call them."""

from __future__ import annotations

from dataclasses import dataclass

from node_manager.access import Tokens
from node_manager.jobs import JobQueue
from node_manager.node_registry import Clock, NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.settings import Settings
from node_manager.store import Store


@dataclass(frozen=True)
class Parts:
    """The parts of the running service that its ways in call."""

    settings: Settings
    store: Store
    registry: NodeRegistry
    observations: ObservationLog
    jobs: JobQueue
    tokens: Tokens
    clock: Clock
