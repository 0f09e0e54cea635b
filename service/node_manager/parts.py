# SPDX-License-Identifier: GPL-3.0-or-later
"""The parts of a running service, as main wires them and the API and the command line call them."""

from __future__ import annotations

from dataclasses import dataclass

from node_manager.access import Tokens
from node_manager.advice import Optimiser
from node_manager.deployments import DeploymentPlacer
from node_manager.event_hub import EventHub
from node_manager.fault_handler import FaultHandler
from node_manager.guard_keeper import GuardKeeper
from node_manager.jobs import JobQueue
from node_manager.kafka_handler import KafkaHandler
from node_manager.maintenance import Maintenance
from node_manager.metrics import Metrics
from node_manager.node_registry import Clock, NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.placement_queue import PlacementQueue
from node_manager.quotas import Quotas
from node_manager.recoveries import Recoveries
from node_manager.replacements import Replacements
from node_manager.resource_allocator import ResourceAllocator
from node_manager.resource_monitor import ResourceMonitor
from node_manager.settings import Settings
from node_manager.store import Store
from node_manager.traffic import Traffic


@dataclass(frozen=True)
class Parts:
    """The parts of the running service that its ways in call."""

    settings: Settings
    store: Store
    registry: NodeRegistry
    observations: ObservationLog
    monitor: ResourceMonitor
    allocator: ResourceAllocator
    quotas: Quotas
    placer: DeploymentPlacer
    placements: PlacementQueue
    traffic: Traffic
    optimiser: Optimiser
    jobs: JobQueue
    replacements: Replacements
    maintenance: Maintenance
    recoveries: Recoveries
    guard: GuardKeeper
    faults: FaultHandler
    kafka: KafkaHandler
    tokens: Tokens
    hub: EventHub
    metrics: Metrics
    clock: Clock
