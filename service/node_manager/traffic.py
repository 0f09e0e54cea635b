# SPDX-License-Identifier: GPL-3.0-or-later
"""What load balancers are told: the weights of a deployment's nodes, and the load of all nodes.

Reads; of what it says it keeps only the weights last given, which small changes are held against. How weights come about is
load_distribution's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
import structlog

from node_manager.deployments import DeploymentPlacer
from node_manager.domain import Admin, Health
from node_manager.load_distribution import Target, Weight, distribute
from node_manager.node_registry import Clock, utc_now
from node_manager.problems import DeploymentNotFoundError
from node_manager.selection_filters import STALE
from node_manager.settings import Settings
from node_manager.store import Store, StoreUnavailableError, tables

_log = structlog.get_logger()


@dataclass(frozen=True)
class Load:
    """How busy a node is, and whether it takes new work."""

    node_id: str
    region: str | None
    zone: str | None
    site: str | None
    health: str
    schedulable: bool
    # Of what keeps new work away: not_active, quarantined, unhealthy or stale; None where nothing does.
    reason: str | None
    cpu_percent: float | None
    memory_percent: float | None
    # 0 to 100: what is idle now, less what was reserved since it was measured.
    idle_percent: float
    deployments: int
    last_contact_at: datetime | None


class Traffic:
    """Advice for load balancers."""

    def __init__(self, store: Store, settings: Settings, placer: DeploymentPlacer, clock: Clock = utc_now) -> None:
        self._store = store
        self._settings = settings
        self._placer = placer
        self._clock = clock

    def weights_of(self, deployment_id: str) -> list[Weight]:
        """Share a deployment's traffic among its nodes.

        Errors: DeploymentNotFoundError if it has no replica anywhere.
        """
        with self._store.read() as connection:
            replicas = Counter(
                connection.scalars(
                    sa.select(tables.allocations.c.node_id).where(tables.allocations.c.deployment_id == deployment_id)
                )
            )
            if not replicas:
                raise DeploymentNotFoundError(deployment_id)
            rows = connection.execute(_TARGETS.where(tables.nodes.c.node_id.in_(sorted(replicas)))).all()
            previous = connection.scalar(
                sa.select(tables.deployments.c.weights).where(tables.deployments.c.deployment_id == deployment_id)
            )
        now = self._clock()
        stale_before = now - timedelta(seconds=self._settings.configuration.monitoring.stale_after_seconds)
        weights = distribute(
            [
                Target(
                    node_id=row.node_id,
                    address=row.address,
                    replicas=replicas[row.node_id],
                    admin=Admin(row.admin),
                    health=Health(row.health),
                    answering=row.last_contact_at is not None and row.last_contact_at >= stale_before,
                    cpu_percent=row.cpu_percent,
                    memory_percent=row.memory_percent,
                    cpu_pressure_percent=row.cpu_pressure_percent,
                    probation=row.probation_until is not None and now < row.probation_until,
                )
                for row in rows
            ],
            previous or {},
        )
        told = {weight.node_id: weight.weight for weight in weights}
        if previous is not None and told != previous:
            self._remember(deployment_id, told)
        return weights

    def load(self) -> Iterator[Load]:
        """Tell the load and health of all nodes, in the order of their ids."""
        stale_after = self._settings.configuration.monitoring.stale_after_seconds
        with self._placer.picture() as (index, now):
            found = [(row, float(index.load[place])) for place, row in enumerate(index.rows) if row is not None]
        for row, idle_percent in sorted(found, key=lambda item: item[0].node_id):
            fresh = row.last_contact is not None and row.last_contact >= now.timestamp() - stale_after
            yield Load(
                node_id=row.node_id,
                region=row.region,
                zone=row.zone,
                site=row.site,
                health=row.health,
                schedulable=fresh and row.blocked is None,
                reason=row.blocked if row.blocked is not None or fresh else STALE,
                cpu_percent=row.cpu_percent,
                memory_percent=row.memory_percent,
                idle_percent=round(idle_percent, 2),
                deployments=len(row.deployments),
                last_contact_at=None if row.last_contact is None else datetime.fromtimestamp(row.last_contact, UTC),
            )

    def _remember(self, deployment_id: str, told: dict[str, int]) -> None:
        table = tables.deployments
        try:
            with self._store.write() as connection:
                connection.execute(table.update().where(table.c.deployment_id == deployment_id).values(weights=told))
        except StoreUnavailableError as error:
            # The advice stands without it; the next one is held against older weights.
            _log.warning("weights not kept", deployment_id=deployment_id, reason=str(error))


_samples = tables.node_samples.c
_TARGETS = (
    sa.select(
        tables.nodes.c.node_id,
        tables.nodes.c.address,
        tables.nodes.c.admin,
        tables.node_states.c.health,
        tables.node_states.c.last_contact_at,
        tables.node_states.c.probation_until,
        _samples.sample[("cpu", "use_percent")].as_float().label("cpu_percent"),
        _samples.sample[("memory", "use_percent")].as_float().label("memory_percent"),
        _samples.sample[("cpu", "pressure", "some_avg60_percent")].as_float().label("cpu_pressure_percent"),
    )
    .join(tables.node_states, tables.node_states.c.node_id == tables.nodes.c.node_id)
    .join(tables.node_samples, _samples.node_id == tables.nodes.c.node_id, isouter=True)
)
