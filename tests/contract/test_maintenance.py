# SPDX-License-Identifier: GPL-3.0-or-later
"""Drains and maintenance: what is asked for, what happens by itself, who is told; all of it from the store alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
from builders import (
    START,
    FakeClock,
    make_contact,
    make_container,
    make_containers,
    make_declaration,
    make_facts,
    make_report,
    make_request,
    make_sample,
    observe,
    seconds,
)
from job_parts import FakeRunner
from node_manager import drain_events, events, node_admin
from node_manager.declarations import NodeChange
from node_manager.deployments import DeploymentPlacer
from node_manager.domain import Admin, Health, JobAction
from node_manager.drain_blockers import load_situation
from node_manager.jobs import JobQueue
from node_manager.maintenance import Maintenance
from node_manager.maintenance_requests import StatusRequest
from node_manager.maintenance_steps import Step, next_step
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.problems import ConflictError, InvalidInputError, NodeNotFoundError, StaleGenerationError
from node_manager.replacements import Replacements
from node_manager.resource_allocator import ResourceAllocator
from node_manager.settings import Settings
from node_manager.store import Store, tables
from node_manager.views import render_maintenance
from node_manager.workloads import ALLOCATION_LABEL
from stored import Rows

NODE, OTHER = "gw-7", "gw-8"
JOB_SOURCE = "ansible"


@dataclass
class Site:
    """Two nodes that are well, and the operators' side of the manager."""

    store: Store
    settings: Settings
    clock: FakeClock
    registry: NodeRegistry
    log: ObservationLog
    allocator: ResourceAllocator
    queue: JobQueue
    maintenance: Maintenance

    def put(self, status: str, by: str = "anna", node_id: str = NODE, **more: Any) -> dict[str, Any] | None:
        """Ask for a status; show what became of it."""
        generation = more.pop("if_generation", None)
        wanted = StatusRequest(Admin(status), **more)
        self.maintenance.set_status(node_id, wanted, by, if_generation=generation)
        return self.shown(node_id)

    def shown(self, node_id: str = NODE) -> dict[str, Any] | None:
        """Show the node's drain or maintenance as the API does."""
        situation = load_situation(self.store, self.settings, node_id)
        return None if situation is None else render_maintenance(situation)

    def admin(self, node_id: str = NODE) -> Admin:
        """Read whether the node takes part."""
        return self.registry.get(node_id).admin

    def pass_time(self, count: float = 1.0) -> None:
        """Let time go by, and a round with it."""
        self.clock.advance(count)
        self.maintenance.round()

    def see(self, *containers: str, at: float = 0.0, source: str = JOB_SOURCE, **sample: Any) -> None:
        """Let a sample tell of the running containers, each for the allocation of its name."""
        items = [make_container(name, labels={ALLOCATION_LABEL: name}) for name in containers]
        data = make_sample(**{"containers": make_containers(*items), **sample})
        self.log.record([observe("sample", data, self.clock.now + seconds(at), source=source)])

    def check(self, *checks: tuple[str, str]) -> None:
        """Let a full check of the node end now."""
        self.log.record([observe("report", make_report(*checks), self.clock.now)])

    def restart(self) -> None:
        """Be another manager on the same store, that remembers nothing."""
        self.maintenance = make_maintenance(self.store, self.settings, self.clock, self.allocator, self.queue)

    def jobs(self) -> list[tuple[JobAction, tuple[str, ...]]]:
        """Give the jobs that were asked for, oldest first; they are gone then."""
        jobs = self.queue.page(100).jobs
        with self.store.write() as connection:
            connection.execute(tables.jobs.delete())
        return [(job.action, job.node_ids) for job in reversed(jobs)]


def make_maintenance(
    store: Store, settings: Settings, clock: FakeClock, allocator: ResourceAllocator, queue: JobQueue | None
) -> Maintenance:
    placer = DeploymentPlacer(store, settings, allocator, clock)
    return Maintenance(store, settings, Replacements(store, settings, placer, clock), queue, clock)


@pytest.fixture
def site(
    store: Store,
    settings: Settings,
    clock: FakeClock,
    registry: NodeRegistry,
    log: ObservationLog,
    allocator: ResourceAllocator,
) -> Site:
    queue = JobQueue(store, settings, clock, "one", runner=FakeRunner(settings))
    for node_id in (NODE, OTHER):
        registry.register(make_declaration(node_id))
        log.record(
            [
                observe("facts", make_facts(), START, node_id),
                observe("report", make_report(), START, node_id),
                observe("sample", make_sample(containers=make_containers()), START, node_id),
            ]
        )
    clock.advance(1)
    maintenance = make_maintenance(store, settings, clock, allocator, queue)
    return Site(store, settings, clock, registry, log, allocator, queue, maintenance)


def events_of(rows: Rows, kind: events.EventType) -> list[dict[str, Any]]:
    return [row["data"] for row in rows.events(kind)]


def blockers(shown: dict[str, Any] | None) -> list[tuple[str, str | None]]:
    assert shown is not None
    return [(item["kind"], item["container"] or item["allocation_id"]) for item in shown["blockers"]]


# plain maintenance


def test_maintenance_is_immediate_and_says_who_and_why(site: Site, rows: Rows) -> None:
    shown = site.put("maintenance", reason="new fan")

    assert shown is not None
    assert (shown["phase"], shown["reason"], shown["requested_by"]) == ("maintenance", "new fan", "anna")
    assert (site.admin(), shown["blockers"], shown["proposals"]) == (Admin.MAINTENANCE, [], [])
    assert events_of(rows, events.EventType.NODE_ADMIN_CHANGED) == [
        {"from": "active", "to": "maintenance", "reason": "new fan"}
    ]


def test_maintenance_asked_for_again_changes_nothing(site: Site, rows: Rows) -> None:
    site.put("maintenance", reason="new fan")
    before = rows.everything()

    site.put("maintenance", reason="new fan")

    assert rows.everything() == before


def test_stale_generation_is_refused_and_changes_nothing(site: Site, rows: Rows) -> None:
    before = rows.everything()

    with pytest.raises(StaleGenerationError):
        site.put("maintenance", drain=True, if_generation=9)

    assert rows.everything() == before


def test_unknown_node_is_refused(site: Site) -> None:
    for drain in (False, True):
        with pytest.raises(NodeNotFoundError):
            site.put("maintenance", node_id="nobody", drain=drain)


@pytest.mark.parametrize("status", ["cordoned", "offline"])
def test_cordoned_and_offline_end_maintenance_at_once(site: Site, status: str) -> None:
    site.put("maintenance")

    shown = site.put(status)

    assert (site.admin(), shown) == (Admin(status), None)


# leaving


def test_leaving_waits_for_a_check_made_after_the_request(site: Site, rows: Rows) -> None:
    site.put("maintenance")
    site.jobs()
    site.check()
    site.clock.advance(1)

    shown = site.put("active")
    site.pass_time()

    assert shown is not None
    assert (shown["phase"], site.admin()) == ("leaving", Admin.MAINTENANCE)
    assert site.jobs() == [(JobAction.CHECK, (NODE,))]
    site.check()
    site.pass_time()
    assert (site.admin(), site.shown()) == (Admin.ACTIVE, None)
    assert events_of(rows, events.EventType.NODE_ADMIN_CHANGED)[-1] == {
        "from": "maintenance",
        "to": "active",
        "reason": "its check passed, asked for by anna",
    }


def test_leaving_is_refused_by_a_failing_check_and_stays_so(site: Site) -> None:
    site.put("maintenance")
    site.put("active")

    site.clock.advance(1)
    site.check(("critical", "failed"))
    site.pass_time()
    site.check()
    site.pass_time(600)

    shown = site.shown()
    assert shown is not None
    assert (shown["phase"], site.admin()) == ("maintenance", Admin.MAINTENANCE)
    assert "its check failed: ChecksPassing: check-0: it failed" in shown["message"]


def test_leaving_passes_with_a_warning(site: Site) -> None:
    site.put("maintenance")
    site.put("active")

    site.clock.advance(1)
    site.check(("warning", "failed"))
    site.pass_time()

    assert site.admin() is Admin.ACTIVE


def test_leaving_is_refused_where_the_node_can_not_be_reached(site: Site) -> None:
    site.put("maintenance")
    site.put("active")

    site.clock.advance(1)
    site.log.record([observe("contact", make_contact(), site.clock.now)])
    site.pass_time()

    shown = site.shown()
    assert shown is not None
    assert (shown["phase"], "Reachable" in shown["message"]) == ("maintenance", True)


def test_leaving_asks_for_the_check_again_where_nothing_came_of_it(site: Site) -> None:
    site.put("maintenance")
    site.put("active")
    site.jobs()

    site.pass_time(10)
    early = site.jobs()
    site.pass_time(10)
    with_job_on_its_way = len(site.queue.page(10).jobs)
    site.pass_time(60)

    assert (early, with_job_on_its_way) == ([], 1)
    assert site.jobs() == [(JobAction.CHECK, (NODE,))]


def test_leaving_by_force_needs_no_check(site: Site, rows: Rows) -> None:
    site.put("maintenance")

    site.put("active", force=True, reason="I see it work")

    assert site.admin() is Admin.ACTIVE
    told = events_of(rows, events.EventType.NODE_ADMIN_CHANGED)[-1]["reason"]
    assert told == "anna ended it without a check: I see it work"


@pytest.mark.parametrize(
    ("before", "entering", "leaving", "after"),
    [
        ("active", None, None, "active"),
        ("active", True, None, "cordoned"),
        ("active", None, True, "cordoned"),
        ("cordoned", None, None, "cordoned"),
        ("cordoned", False, None, "active"),
        ("cordoned", None, False, "active"),
    ],
)
def test_leaving_keeps_a_cordon_where_wanted_or_there_before(
    site: Site, before: str, entering: bool | None, leaving: bool | None, after: str
) -> None:
    site.put(before)
    site.put("maintenance", keep_cordon=entering)
    site.put("active", keep_cordon=leaving)

    site.clock.advance(1)
    site.check()
    site.pass_time()

    assert site.admin() is Admin(after)


def test_maintenance_again_while_leaving_calls_the_leaving_off(site: Site) -> None:
    site.put("maintenance")
    site.put("active")

    site.put("maintenance", reason="forgot a cable")
    site.clock.advance(1)
    site.check()
    site.pass_time()

    shown = site.shown()
    assert shown is not None
    assert (shown["phase"], shown["reason"]) == ("maintenance", "forgot a cable")


def test_node_that_was_ill_before_is_looked_at_again_after_it_left(site: Site) -> None:
    site.check(("critical", "failed"))
    site.put("maintenance")
    site.put("active")
    site.clock.advance(1)
    site.jobs()

    site.check()
    site.pass_time()

    assert site.registry.get(NODE).state.health is Health.DEGRADED
    assert site.jobs() == [(JobAction.CHECK, (NODE,))]


# until


def test_until_ends_maintenance_by_itself_after_a_check(site: Site) -> None:
    site.put("maintenance", until=site.clock.now + seconds(100))
    site.jobs()

    site.check()
    site.pass_time(99)
    before, asked_before = site.admin(), site.jobs()
    site.pass_time(2)
    asked = site.jobs()
    site.clock.advance(1)
    site.check()
    site.pass_time()

    assert (before, asked_before) == (Admin.MAINTENANCE, [])
    assert (asked, site.admin()) == ([(JobAction.CHECK, (NODE,))], Admin.ACTIVE)


def test_until_stays_with_a_failing_check_says_why_and_tries_again(site: Site) -> None:
    site.put("maintenance", until=site.clock.now + seconds(100))
    site.pass_time(101)
    site.clock.advance(1)
    site.check(("critical", "failed"))
    site.pass_time()
    stays = site.shown()
    site.jobs()

    site.pass_time(30)
    resting = site.jobs()
    site.pass_time(31)
    again = site.jobs()
    site.clock.advance(1)
    site.check()
    site.pass_time()

    assert stays is not None
    assert (stays["phase"], "check-0" in stays["message"]) == ("maintenance", True)
    assert (resting, again) == ([], [(JobAction.CHECK, (NODE,))])
    assert site.admin() is Admin.ACTIVE


def test_until_ends_a_drain_that_was_not_done(site: Site, rows: Rows) -> None:
    site.allocator.allocate(NODE, make_request())
    site.put("maintenance", drain=True, until=site.clock.now + seconds(100))

    site.pass_time(101)

    assert (site.admin(), site.shown()) == (Admin.ACTIVE, None)
    (told,) = events_of(rows, events.EventType.DRAIN_ENDED)
    assert (told["outcome"], [item["allocation_id"] for item in told["blockers"]]) == ("cancelled", ["a1"])


# drain


def test_drain_tells_owners_what_is_there_and_where_it_could_go(site: Site, rows: Rows) -> None:
    site.allocator.allocate(NODE, make_request("a1", deployment_id="web"))

    shown = site.put("maintenance", drain=True, reason="new disk", deadline_seconds=600)

    assert shown is not None
    assert (site.admin(), shown["phase"]) == (Admin.DRAINING, "draining")
    assert shown["deadline_at"] == "2026-11-22T18:10:01.000000Z"
    (told,) = events_of(rows, events.EventType.DRAIN_STARTED)
    assert told["allocations"] == [{"allocation_id": "a1", "owner": "shop", "deployment_id": "web"}]
    assert (told["deployments"], told["reason"]) == (["web"], "new disk")
    assert [(item["allocation_id"], item["to_node"]) for item in told["replacements"]] == [("a1", OTHER)]
    assert shown["proposals"] == told["replacements"]
    assert not site.registry.get(NODE).schedulable(site.clock.now, seconds(180))


def test_drain_of_an_empty_node_ends_once_it_was_seen_to_be_empty(site: Site, rows: Rows) -> None:
    site.see()
    site.clock.advance(1)
    shown = site.put("maintenance", drain=True)

    site.pass_time()
    unseen = site.admin()
    site.see()
    site.pass_time()

    assert (unseen, blockers(shown)) == (Admin.DRAINING, [("unseen", None)])
    assert site.jobs() == [(JobAction.GATHER, (NODE,))]
    assert site.admin() is Admin.MAINTENANCE
    ended = site.shown()
    assert ended is not None
    assert (ended["phase"], ended["drained_at"] is not None, ended["blockers"]) == ("maintenance", True, [])
    assert [told["outcome"] for told in events_of(rows, events.EventType.DRAIN_ENDED)] == ["drained"]


def test_drain_names_each_blocker_until_the_last_is_gone(site: Site, rows: Rows) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.see("a1", "stray")
    site.put("maintenance", drain=True)

    begun = site.shown()
    site.pass_time()
    site.allocator.deallocate(NODE, "a1")
    site.pass_time()
    running = site.shown()
    site.see("stray")
    site.pass_time()
    stubborn = site.shown()
    site.see()
    site.pass_time()

    assert blockers(begun) == [("allocation", "a1"), ("workload", "a1"), ("workload", "stray")]
    assert begun is not None
    assert [item["owner"] for item in begun["blockers"]] == ["shop", "shop", None]
    assert blockers(running) == [("workload", "a1"), ("workload", "stray")]
    assert blockers(stubborn) == [("workload", "stray")]
    assert site.admin() is Admin.MAINTENANCE
    progressed = events_of(rows, events.EventType.DRAIN_PROGRESSED)
    assert [len(told["blockers"]) for told in progressed] == [2, 1]


def test_drain_believes_no_sample_from_before_the_last_allocation_was_gone(site: Site) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put("maintenance", drain=True)
    site.see()
    site.clock.advance(1)

    site.allocator.deallocate(NODE, "a1")
    site.pass_time()
    before = site.admin()
    site.see()
    site.pass_time()

    assert (before, site.admin()) == (Admin.DRAINING, Admin.MAINTENANCE)


def test_drain_believes_a_stream_only_one_interval_later(site: Site) -> None:
    site.put("maintenance", drain=True)

    site.see(source="stream", at=14)
    site.pass_time(14)
    early = site.admin()
    site.see(source="stream", at=2)
    site.pass_time(2)

    assert (early, site.admin()) == (Admin.DRAINING, Admin.MAINTENANCE)


def test_drain_does_not_end_where_containers_can_not_be_read(site: Site) -> None:
    site.put("maintenance", drain=True)
    site.clock.advance(1)

    site.see(containers=None, errors=[{"collector": "containers", "message": "permission denied"}])
    site.pass_time()
    shown = site.shown()
    site.see(at=1, containers={**make_containers(), "runtime": None, "message": "no container runtime"})
    site.pass_time(2)

    assert shown is not None
    assert [item["message"] for item in shown["blockers"]] == ["its containers are not known: permission denied"]
    assert site.admin() is Admin.MAINTENANCE


def test_drain_has_the_node_looked_at_until_somebody_did(site: Site) -> None:
    site.put("maintenance", drain=True)
    site.jobs()

    site.pass_time(20)
    early = site.jobs()
    site.pass_time(20)

    assert (early, site.jobs()) == ([], [(JobAction.GATHER, (NODE,))])


def test_drain_goes_into_maintenance_at_its_deadline_naming_what_is_left(site: Site, rows: Rows) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.see("a1")
    site.put("maintenance", drain=True, deadline_seconds=60, reason="new disk")

    site.pass_time(59)
    before = site.admin()
    site.pass_time(2)

    assert (before, site.admin()) == (Admin.DRAINING, Admin.MAINTENANCE)
    (told,) = events_of(rows, events.EventType.DRAIN_ENDED)
    assert (told["outcome"], len(told["blockers"])) == ("deadline", 2)
    changed = events_of(rows, events.EventType.NODE_ADMIN_CHANGED)[-1]
    assert changed["reason"] == "new disk (its deadline passed, still there: allocation a1, workload a1)"
    assert blockers(site.shown()) == [("allocation", "a1"), ("workload", "a1")]
    assert [item.allocation_id for item in site.allocator.books(NODE)[1]] == ["a1"]


def test_drain_without_deadline_waits(site: Site) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put("maintenance", drain=True)

    site.pass_time(7 * 86400)

    assert site.admin() is Admin.DRAINING


def test_drain_that_is_empty_after_its_deadline_says_so(site: Site, rows: Rows) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put("maintenance", drain=True, deadline_seconds=60)
    site.pass_time(61)

    site.allocator.deallocate(NODE, "a1")
    site.pass_time()
    site.see()
    site.pass_time()

    shown = site.shown()
    assert shown is not None
    assert (shown["drained_at"] is not None, shown["blockers"]) == (True, [])
    assert len(events_of(rows, events.EventType.DRAIN_ENDED)) == 1


@pytest.mark.parametrize("before", ["active", "cordoned", "offline"])
def test_drain_cancelled_half_way_makes_the_node_what_it_was(site: Site, rows: Rows, before: str) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put(before)
    site.put("maintenance", drain=True)
    site.pass_time()

    shown = site.put("active")

    assert (site.admin(), shown) == (Admin(before), None)
    (told,) = events_of(rows, events.EventType.DRAIN_ENDED)
    assert (told["outcome"], told["ended_by"]) == ("cancelled", "anna")


@pytest.mark.parametrize("status", ["cordoned", "offline"])
def test_drain_ended_by_another_status_is_told_of(site: Site, rows: Rows, status: str) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put("maintenance", drain=True)

    site.put(status)

    assert (site.admin(), site.shown()) == (Admin(status), None)
    assert [told["outcome"] for told in events_of(rows, events.EventType.DRAIN_ENDED)] == ["cancelled"]


def test_drain_cut_short_by_plain_maintenance_names_what_is_left(site: Site, rows: Rows) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put("maintenance", drain=True)

    site.put("maintenance")

    assert site.admin() is Admin.MAINTENANCE
    (told,) = events_of(rows, events.EventType.DRAIN_ENDED)
    assert (told["outcome"], [item["allocation_id"] for item in told["blockers"]]) == ("skipped", ["a1"])


def test_drain_to_cordoned_ends_cordoned(site: Site) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put("cordoned", drain=True)
    site.allocator.deallocate(NODE, "a1")
    site.pass_time()
    draining = site.admin()

    site.see()
    site.pass_time()

    assert (draining, site.admin(), site.shown()) == (Admin.DRAINING, Admin.CORDONED, None)


def test_drain_asked_for_in_maintenance_happens_there(site: Site, rows: Rows) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put("maintenance")

    shown = site.put("maintenance", drain=True)
    site.allocator.deallocate(NODE, "a1")
    site.pass_time()
    site.see()
    site.pass_time()

    assert shown is not None
    assert (shown["phase"], site.admin()) == ("draining", Admin.MAINTENANCE)
    ended = site.shown()
    assert ended is not None
    assert (ended["phase"], ended["drained_at"] is not None) == ("maintenance", True)
    assert [told["outcome"] for told in events_of(rows, events.EventType.DRAIN_ENDED)] == ["drained"]


def test_drain_asked_for_again_moves_its_deadline_and_tells_owners(site: Site, rows: Rows) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put("maintenance", drain=True, deadline_seconds=60)

    site.put("maintenance", drain=True, deadline_seconds=600)
    site.pass_time(61)

    assert site.admin() is Admin.DRAINING
    assert len(events_of(rows, events.EventType.DRAIN_STARTED)) == 1
    assert events_of(rows, events.EventType.DRAIN_PROGRESSED)[0]["deadline_at"] == "2026-11-22T18:10:01.000000Z"


def test_drained_node_stays_drained_when_asked_again(site: Site, rows: Rows) -> None:
    site.put("maintenance", drain=True)
    site.see()
    site.pass_time()

    shown = site.put("maintenance", drain=True)

    assert shown is not None
    assert (site.admin(), shown["phase"], shown["drained_at"] is not None) == (Admin.MAINTENANCE, "maintenance", True)
    assert len(events_of(rows, events.EventType.DRAIN_STARTED)) == 1


def test_proposals_follow_the_fleet_within_a_minute(site: Site) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put("maintenance", drain=True)
    site.put("cordoned", node_id=OTHER)

    site.pass_time(30)
    early = site.shown()
    site.pass_time(31)
    late = site.shown()

    assert early is not None
    assert late is not None
    assert [item["to_node"] for item in early["proposals"] + late["proposals"]] == [OTHER, None]


@pytest.mark.parametrize("moment", ["begun", "progressed", "emptied"])
def test_drain_goes_on_under_another_manager(site: Site, rows: Rows, moment: str) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put("maintenance", drain=True)
    if moment == "begun":
        site.restart()
    site.pass_time()
    if moment == "progressed":
        site.restart()
    site.allocator.deallocate(NODE, "a1")
    site.pass_time()
    if moment == "emptied":
        site.restart()
    site.see()
    site.pass_time()

    assert site.admin() is Admin.MAINTENANCE
    told = [row["type"].rpartition(".")[2] for row in rows.events() if "drain" in row["type"]]
    assert told == ["drain_started", "drain_progressed", "drain_ended"]


def test_leaving_goes_on_under_another_manager(site: Site) -> None:
    site.put("maintenance")
    site.put("active")
    # The manager died before it could ask for the check.
    site.jobs()

    site.restart()
    site.pass_time(16)

    assert site.jobs() == [(JobAction.CHECK, (NODE,))]
    site.check()
    site.pass_time()
    assert site.admin() is Admin.ACTIVE


def test_managers_that_act_at_once_tell_of_it_once(site: Site, rows: Rows) -> None:
    site.put("maintenance", drain=True)
    site.see()
    others = [make_maintenance(site.store, site.settings, site.clock, site.allocator, site.queue) for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda other: other.round(), others))

    assert site.admin() is Admin.MAINTENANCE
    assert len(events_of(rows, events.EventType.DRAIN_ENDED)) == 1


# who holds it


@pytest.mark.parametrize("drain", [False, True])
def test_second_operator_is_told_who_holds_the_node(site: Site, rows: Rows, drain: bool) -> None:
    site.put("maintenance", by="anna", reason="new disk", drain=drain)
    before = rows.everything()

    with pytest.raises(ConflictError) as caught:
        site.put("maintenance", by="ben", reason="firmware", drain=drain)

    assert caught.value.extra["requested_by"] == "anna"
    assert caught.value.extra["started_at"] == "2026-11-22T18:00:01+00:00"
    assert "'anna'" in caught.value.detail
    assert rows.everything() == before


def test_second_operator_may_take_it_over(site: Site) -> None:
    site.put("maintenance", by="anna")

    shown = site.put("maintenance", by="ben", force=True)

    assert shown is not None
    assert shown["requested_by"] == "ben"


def test_two_operators_at_once_make_one_holder(site: Site, rows: Rows) -> None:
    def ask(name: str) -> str | None:
        try:
            site.put("maintenance", by=name, drain=True)
        except ConflictError:
            return None
        return name

    with ThreadPoolExecutor(2) as pool:
        names = [name for name in pool.map(ask, ["anna", "ben"]) if name is not None]

    shown = site.shown()
    assert shown is not None
    assert names == [shown["requested_by"]]
    assert len(events_of(rows, events.EventType.DRAIN_STARTED)) == 1


# what is refused

LATER, EARLIER = START + timedelta(hours=1), START - timedelta(hours=1)


@pytest.mark.parametrize(
    ("status", "more", "field"),
    [
        ("active", {"drain": True}, "drain"),
        ("offline", {"drain": True}, "drain"),
        ("draining", {}, "status"),
        ("maintenance", {"deadline_seconds": 5.0}, "deadline_seconds"),
        ("maintenance", {"until": EARLIER}, "until"),
        ("cordoned", {"until": LATER}, "until"),
        ("active", {"until": LATER}, "until"),
        ("maintenance", {"drain": True, "deadline_seconds": 7200.0, "until": LATER}, "deadline_seconds"),
        ("offline", {"keep_cordon": True}, "keep_cordon"),
        ("active", {"keep_cordon": True}, "keep_cordon"),
        ("cordoned", {"force": True}, "force"),
    ],
)
def test_what_makes_no_sense_is_refused(site: Site, rows: Rows, status: str, more: dict[str, Any], field: str) -> None:
    before = rows.everything()

    with pytest.raises(InvalidInputError) as caught:
        site.put(status, **more)

    assert caught.value.extra["errors"][0]["field"] == field
    assert rows.everything() == before


def test_node_in_maintenance_is_not_drained_to_cordoned(site: Site) -> None:
    site.put("maintenance")

    with pytest.raises(ConflictError, match="status maintenance with drain"):
        site.put("cordoned", drain=True)


# declared, and set by other parts


@pytest.mark.parametrize("drain", [False, True])
def test_a_declaration_does_not_end_what_an_operator_began(site: Site, drain: bool) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put("maintenance", drain=drain)

    with pytest.raises(InvalidInputError, match="admin"):
        site.registry.update(NODE, NodeChange.model_validate({"address": "192.0.2.7", "admin": "active"}))

    assert site.shown() is not None


def test_declared_maintenance_has_a_record_and_is_left_after_a_check(site: Site) -> None:
    site.registry.update(NODE, NodeChange.model_validate({"address": "192.0.2.7", "admin": "maintenance"}))
    site.registry.register(make_declaration("gw-9", admin="maintenance"))
    declared = [site.shown(node_id) for node_id in (NODE, "gw-9")]

    leaving = site.put("active", by="ben")
    site.clock.advance(1)
    site.check()
    site.pass_time()

    assert [item["reason"] for item in declared if item is not None] == ["declared", "declared"]
    assert leaving is not None
    assert (leaving["phase"], site.admin()) == ("leaving", Admin.ACTIVE)


def test_declared_drain_is_one(site: Site, rows: Rows) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.registry.update(NODE, NodeChange.model_validate({"address": "192.0.2.7", "admin": "draining"}))
    site.pass_time()

    shown = site.put("maintenance", drain=True, by="ben")
    cancelled = site.put("active", by="ben")

    assert shown is not None
    assert (shown["phase"], shown["requested_by"], cancelled) == ("draining", "ben", None)
    (told,) = events_of(rows, events.EventType.DRAIN_PROGRESSED)
    assert [item["to_node"] for item in told["replacements"]] == [OTHER]


def test_a_record_whose_node_takes_part_is_forgotten(site: Site, rows: Rows) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put("maintenance", drain=True)
    with site.store.write() as connection:
        connection.execute(tables.nodes.update().where(tables.nodes.c.node_id == NODE), {"admin": "cordoned"})

    site.pass_time()

    assert (site.admin(), site.shown()) == (Admin.CORDONED, None)
    assert len(events_of(rows, events.EventType.DRAIN_ENDED)) == 1


def test_round_does_not_write_while_nothing_is_due(site: Site, rows: Rows) -> None:
    site.allocator.allocate(NODE, make_request("a1"))
    site.put("maintenance", drain=True)
    site.put("maintenance", node_id=OTHER, by="ben")
    site.pass_time()
    before = rows.everything()

    site.pass_time(5)

    assert rows.everything() == before


def test_record_is_read_as_it_was_written(site: Site) -> None:
    notes = node_admin.Notes(
        Admin.CORDONED, Admin.MAINTENANCE, True, START, ("allocation:a1",), ({"allocation_id": "a1"},), START, "x", "y",
        START, START,
    )  # fmt: skip
    record = node_admin.Record(
        NODE, "why", "anna", START, True, START, START, START, keep_cordon=True, leaving_at=START, notes=notes
    )

    with site.store.write() as connection:
        node_admin.write(connection, record)
        read = node_admin.read(connection, NODE)

    assert read == record


def test_next_step_waits_out_a_clock_that_was_set_back(site: Site) -> None:
    site.put("maintenance")
    site.put("active")
    situation = load_situation(site.store, site.settings, NODE)

    assert situation is not None
    assert next_step(situation, site.clock.now - seconds(5)) is None
    assert next_step(situation, site.clock.now - seconds(500)) is Step.CHECK


def test_named_says_how_many_more_there_are(site: Site) -> None:
    for number in range(7):
        site.allocator.allocate(NODE, make_request(f"a{number}"))
    site.put("maintenance", drain=True)
    situation = load_situation(site.store, site.settings, NODE)

    assert situation is not None
    told = drain_events.named(situation.blockers)
    assert told == "allocation a0, allocation a1, allocation a2, allocation a3, allocation a4 and 2 more"
