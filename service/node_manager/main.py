# SPDX-License-Identifier: GPL-3.0-or-later
"""Wire the parts of the service together: create_app() and nothing else.

uvicorn can serve it by itself: `uvicorn --factory node_manager.main:create_app`.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from anyio import CapacityLimiter
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi_offline import FastAPIOffline
from starlette.concurrency import run_in_threadpool

from node_manager import __version__, accounts, recovery_steps
from node_manager.access import AuditLog, Tokens
from node_manager.advice import Optimiser
from node_manager.api import allocations, deployments, events, lost, system, watching
from node_manager.api import jobs as jobs_api
from node_manager.api import metrics as metrics_api
from node_manager.api import recoveries as recoveries_api
from node_manager.api.errors import Problem, add_handlers
from node_manager.api.fragments import NodeFragments
from node_manager.api.gate import Gate
from node_manager.api.nodes import make_router
from node_manager.api.schemas_deployment import SelectionBatch
from node_manager.commands import Commands
from node_manager.deployments import DeploymentPlacer
from node_manager.event_hub import EventHub
from node_manager.fault_handler import FaultHandler
from node_manager.ghosts import Ghosts
from node_manager.guard_keeper import GuardKeeper
from node_manager.jobs import JobQueue
from node_manager.kafka_handler import KafkaHandler
from node_manager.lost_nodes import LostNodes
from node_manager.maintenance import Maintenance
from node_manager.metrics import Metrics
from node_manager.node_registry import Clock, NodeRegistry, utc_now
from node_manager.observations import ObservationLog
from node_manager.parts import Parts
from node_manager.placement_queue import PlacementQueue
from node_manager.playbook_process import Runner
from node_manager.quotas import Quotas
from node_manager.recorder import Recorder
from node_manager.recoveries import Recoveries
from node_manager.replacements import Replacements
from node_manager.resource_allocator import ResourceAllocator
from node_manager.resource_monitor import ResourceMonitor
from node_manager.scheduler import Scheduler
from node_manager.selection_request import SelectionRequest
from node_manager.settings import Settings, SettingsError, load_settings
from node_manager.store import Store, open_store
from node_manager.tracing import Tracing
from node_manager.traffic import Traffic

_SCRAPES = 8
DESCRIPTION = """
Looks after the nodes of a distributed IoT platform: registers them, watches their resources, checks their health.

Every call but `/healthz` and `/readyz` takes a bearer token (`nodectl token create`). Errors are RFC 9457 problem+json with a
stable `code`. Lists are paged: repeat with `cursor` set to `next_cursor` until it is null. Long work answers 202 with a job;
`?wait=SECONDS` waits for its result.
"""


def create_app(
    settings: Settings | None = None,
    store: Store | None = None,
    clock: Clock = utc_now,
    on_started: Callable[[Parts], None] | None = None,
    runner: Runner | None = None,
) -> FastAPI:
    """Build the service.

    Shapes: *on_started* is called once jobs can be run, before periodic work begins; it must return soon.
    Errors: SettingsError, StoreUnavailableError: the service doesn't start.
    """
    settings = settings or load_settings()
    recovery_steps.check(settings)
    store = store or connect(settings)
    tokens = Tokens(store, settings.configuration.auth.cache_seconds, clock)
    instance_id = f"{socket.gethostname()[:24]}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    metrics = Metrics(store, settings, clock)
    queue = JobQueue(store, settings, clock, instance_id, runner=runner, timings=metrics.timings)
    registry = NodeRegistry(store, settings, clock)
    audit = AuditLog(store)
    allocator = ResourceAllocator(store, settings, clock, metrics.timings)
    placer = DeploymentPlacer(store, settings, allocator, clock, metrics.timings)
    observations = ObservationLog(store, settings, clock, metrics.timings)
    recorder = Recorder(observations)
    monitor = ResourceMonitor(store, settings, recorder, clock, metrics.timings)
    recoveries = Recoveries(store, settings, clock)
    guard = GuardKeeper(store, settings, queue, clock)
    faults = FaultHandler(store, settings, recoveries, queue, guard, clock)
    replacements = Replacements(store, settings, placer, clock)
    maintenance = Maintenance(store, settings, replacements, queue, clock)
    commands = Commands(store, registry, maintenance, placer, queue, clock, metrics.timings)
    scheduler = Scheduler(
        store,
        settings,
        queue,
        clock,
        instance_id,
        chores=[
            allocator.expire,
            placer.keep_fresh,
            maintenance.round,
            faults.round,
            LostNodes(store, settings, replacements, clock).round,
            Ghosts(store, settings, clock).round,
        ],
        hourly_chores=[placer.prune, recoveries.prune, guard.prune, commands.prune],
        is_in_hand=monitor.has_in_hand,
    )
    kafka = KafkaHandler(store, settings, registry, commands, scheduler.leads, clock, metrics.timings)
    observations.on_samples = kafka.offer_samples
    parts = Parts(
        settings=settings,
        store=store,
        registry=registry,
        observations=observations,
        monitor=monitor,
        allocator=allocator,
        quotas=Quotas(store, settings, clock),
        placer=placer,
        placements=PlacementQueue(placer, metrics.timings),
        traffic=Traffic(store, settings, placer, clock),
        optimiser=Optimiser(store, settings, placer, clock),
        jobs=queue,
        replacements=replacements,
        maintenance=maintenance,
        recoveries=recoveries,
        guard=guard,
        faults=faults,
        kafka=kafka,
        tokens=tokens,
        hub=EventHub(store, settings.configuration.event_stream, settings.configuration.kafka.source, clock),
        metrics=metrics.watching(monitor, recorder, scheduler.leads),
        clock=clock,
    )

    tracing = Tracing(settings.configuration.tracing)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(accounts.fit_all, store, settings)
        await run_in_threadpool(placer.warm)
        audit.start()
        parts.placements.start()
        await run_in_threadpool(queue.start)
        if on_started is not None:
            await run_in_threadpool(on_started, parts)
        await run_in_threadpool(scheduler.start)
        recorder.start()
        await run_in_threadpool(monitor.start, scheduler.leads)
        await run_in_threadpool(kafka.start)
        yield
        for stop in (
            parts.hub.stop,
            kafka.stop,
            monitor.stop,
            recorder.stop,
            scheduler.stop,
            queue.stop,
            parts.placements.stop,
            audit.stop,
            tracing.stop,
        ):
            await run_in_threadpool(stop)

    # Its documentation page brings its own scripts: managers run where there is no internet.
    app = FastAPIOffline(
        redoc_url=None,
        title="Node Manager",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        telemetry=tracing.telemetry,
        license_info={"name": "GPL-3.0-or-later", "identifier": "GPL-3.0-or-later"},
    )
    app.state.parts = parts
    # Threads beside those of all other calls, which may all wait for the store.
    app.state.scrapes = CapacityLimiter(_SCRAPES)
    add_handlers(app)
    for router in (
        make_router(NodeFragments(store, registry, settings, clock)),
        watching.router,
        allocations.router,
        deployments.router,
        jobs_api.router,
        recoveries_api.router,
        lost.router,
        events.router,
        metrics_api.router,
        system.router,
    ):
        app.include_router(router)
    app.add_middleware(Gate, audit=audit, max_body_bytes=settings.server.max_body_bytes, clock=clock)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]  # the framework's documented way
    return app


def connect(settings: Settings) -> Store:
    """Open the store that the settings name.

    Errors: StoreUnavailableError; SettingsError if the driver for its kind is not installed; NewerSchemaError.
    """
    storage = settings.configuration.storage
    try:
        return open_store(settings.storage_url, storage.busy_timeout_seconds, storage.pool_size)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"storage.url: the driver {error.name} is not installed; pip install 'node-manager[postgresql]' brings it"
        ) from None


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            license_info=app.license_info,
        )
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(problem.pop("$defs"))
        schemas["Problem"] = problem
        # Read by hand, so that the framework doesn't know them.
        for model in (SelectionRequest, SelectionBatch):
            described = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(described.pop("$defs", {}))
            schemas[model.__name__] = described
        app.openapi_schema = schema
    return app.openapi_schema
