# SPDX-License-Identifier: GPL-3.0-or-later
"""Playbooks that reserve, choose and release: in process and over HTTP, twice and in check mode."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ansible_runs import ROOT, Controller, PlaybookRun, make_controller
from builders import make_report, observe
from node_manager.ledger import Allocation
from node_manager.node_registry import NodeRegistry
from node_manager.observations import ObservationLog
from node_manager.resource_allocator import AllocationFilter, ResourceAllocator
from running_service import RunningService

SERVICE = Path(__file__).parent / "api" / "service_without_ansible.py"
CAPACITY = {"cpu_millicores": 4000, "memory_mib": 1000, "gpu": 2}
FLEET = ("gw-1", "gw-2", "gw-3", "gw-4")


@dataclass(frozen=True)
class Site:
    """A controller, and the manager that it asks: in the same process, or over HTTP."""

    controller: Controller
    manager: Controller
    folder: Path

    def play(self, text: str, *arguments: str) -> PlaybookRun:
        """Run a playbook."""
        path = self.folder / "play.yml"
        path.write_text(text)
        done = self.controller.run("ansible-playbook", str(path), *arguments)
        return PlaybookRun(done.returncode, done.stdout, done.stderr)

    def add_nodes(self, *node_ids: str, **declared: Any) -> None:
        """Register nodes that were found healthy just now."""
        for node_id in node_ids:
            self.manager.register(node_id, connection={"kind": "ssh"}, **{"capacity": CAPACITY, **declared})
        with self.manager.store() as store:
            log = ObservationLog(store, self.manager.settings)
            log.record([observe("report", make_report(), datetime.now(UTC), node_id) for node_id in node_ids])

    def allocations(self) -> dict[str, Allocation]:
        """Read what is reserved."""
        with self.manager.store() as store:
            found, _ = ResourceAllocator(store, self.manager.settings).page(AllocationFilter(), 100, None)
        return {allocation.allocation_id: allocation for allocation in found}

    def clear(self) -> None:
        """Forget all nodes and what is on them."""
        with self.manager.store() as store:
            registry = NodeRegistry(store, self.manager.settings)
            for node_id in registry.load(list(FLEET)):
                registry.deregister(node_id, force=True)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    running = RunningService(tmp_path_factory.mktemp("service") / "home", command=(str(SERVICE),)).start()
    yield running
    running.kill()


@pytest.fixture(params=["local", "http"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    if request.param == "local":
        manager = controller = make_controller(tmp_path / "home")
    else:
        service: RunningService = request.getfixturevalue("service")
        manager = make_controller(service.home)
        controller = make_controller(tmp_path / "home", NODE_MANAGER_URL=service.url, NODE_MANAGER_TOKEN=service.token)
    made = Site(controller, manager, tmp_path)
    yield made
    made.clear()


@pytest.fixture
def local_site(tmp_path: Path) -> Site:
    """Give a site where it doesn't matter how the manager is asked."""
    controller = make_controller(tmp_path / "home")
    return Site(controller, controller, tmp_path)


def changed(run: PlaybookRun) -> dict[str, int]:
    """Give the changes by host of a run that ended well."""
    assert run.return_code == 0, run.output + run.errors
    return run.count("changed")


def told(run: PlaybookRun) -> str:
    """Give all that a run said, as one line."""
    return " ".join((run.output + run.errors).split())


# node_allocation

ALLOCATE = """
- hosts: gw-1
  gather_facts: false
  tasks:
    - iot_platform.node_manager.node_allocation:
        allocation_id: batch.a
        owner: team-a
        deployment_id: batch
        resources: {memory_mib: "{{ mib }}", gpu: {count: 1, share_milli: "460"}}
        ttl_seconds: "{{ ttl }}"
        confirmed: "{{ confirmed | default(false) }}"
      register: made
    - ansible.builtin.debug:
        msg: "on {{ made.allocation.node_id | default('none') }}, fits {{ made.fits | default('unsaid') }}"
"""
SIZES = ("-e", "mib=600", "-e", "ttl=600")
RELEASE = """
- hosts: localhost
  gather_facts: false
  tasks:
    - iot_platform.node_manager.node_allocation: {allocation_id: batch.a, state: absent}
"""
CONFIRM = """
- hosts: localhost
  gather_facts: false
  tasks:
    - iot_platform.node_manager.node_allocation: {allocation_id: batch.a, confirmed: true}
"""


def test_node_allocation_reserves_once(site: Site) -> None:
    site.add_nodes("gw-1")

    rehearsal = site.play(ALLOCATE, *SIZES, "--check", "--diff")
    assert site.allocations() == {}
    first = site.play(ALLOCATE, *SIZES, "--diff")
    second = site.play(ALLOCATE, *SIZES)
    check = site.play(ALLOCATE, *SIZES, "--check")

    assert (changed(rehearsal), changed(first)) == ({"gw-1": 1}, {"gw-1": 1})
    assert changed(second) == changed(check) == {"gw-1": 0}
    for run in (rehearsal, first):
        assert "+ memory_mib: 600" in told(run)
    assert "fits True" in told(rehearsal)
    assert "on gw-1, fits unsaid" in told(first)
    made = site.allocations()["batch.a"]
    assert (made.node_id, made.owner, made.deployment_id, made.ttl_seconds) == ("gw-1", "team-a", "batch", 600)
    assert made.expires_at is not None
    assert made.units == {"gpu": {"0": 460}}


def test_node_allocation_releases_once(site: Site) -> None:
    site.add_nodes("gw-1")
    site.play(ALLOCATE, *SIZES)

    rehearsal = site.play(RELEASE, "--check", "--diff")
    assert len(site.allocations()) == 1
    first = site.play(RELEASE)
    second = site.play(RELEASE)

    assert changed(rehearsal) == changed(first) == {"localhost": 1}
    assert changed(second) == {"localhost": 0}
    assert "batch.a (wanted)" in rehearsal.output
    assert site.allocations() == {}


def test_node_allocation_confirms_once(site: Site) -> None:
    site.add_nodes("gw-1")
    site.play(ALLOCATE, *SIZES)

    rehearsal = site.play(CONFIRM, "--check")
    assert site.allocations()["batch.a"].expires_at is not None
    first = site.play(CONFIRM)
    second = site.play(CONFIRM)
    whole = site.play(ALLOCATE, *SIZES, "-e", "confirmed=true")

    assert changed(rehearsal) == changed(first) == {"localhost": 1}
    assert changed(second) == {"localhost": 0}
    assert changed(whole) == {"gw-1": 0}
    assert site.allocations()["batch.a"].expires_at is None


def test_node_allocation_reserves_and_confirms_in_one_task(local_site: Site) -> None:
    local_site.add_nodes("gw-1")

    rehearsal = local_site.play(ALLOCATE, *SIZES, "-e", "confirmed=true", "--check")
    first = local_site.play(ALLOCATE, *SIZES, "-e", "confirmed=true")
    second = local_site.play(ALLOCATE, *SIZES, "-e", "confirmed=true")

    assert changed(rehearsal) == changed(first) == {"gw-1": 1}
    assert changed(second) == {"gw-1": 0}
    assert local_site.allocations()["batch.a"].expires_at is None


@pytest.mark.parametrize("mode", [[], ["--check"]], ids=["run", "check"])
def test_node_allocation_refuses_another_body_for_the_same_id(site: Site, mode: list[str]) -> None:
    site.add_nodes("gw-1")
    site.play(ALLOCATE, *SIZES)

    run = site.play(ALLOCATE, "-e", "mib=601", "-e", "ttl=600", *mode)

    assert run.return_code == 2
    assert "'batch.a' is there with another resources; use a new allocation_id" in told(run)


def test_node_allocation_too_large_fails_and_check_mode_tells(site: Site) -> None:
    site.add_nodes("gw-1")

    rehearsal = site.play(ALLOCATE, "-e", "mib=1001", "-e", "ttl=600", "--check")
    run = site.play(ALLOCATE, "-e", "mib=1001", "-e", "ttl=600")

    assert changed(rehearsal) == {"gw-1": 1}
    assert "fits False" in told(rehearsal)
    assert "'gw-1' lacks memory_mib now" in told(rehearsal)
    assert run.return_code == 2
    assert "lacks memory_mib (1001 requested, 1000 available)" in told(run)


WRONG_AMOUNTS = {
    "0.5": "resources.memory_mib: expected a whole number, got '0.5'",
    "512M": "resources.memory_mib: expected a whole number, got '512M'",
    "-1": "greater than or equal to 1",
    "9" * 18: "less than or equal to 1000000000000",
}


def test_node_allocation_says_which_value_is_wrong(local_site: Site) -> None:
    local_site.add_nodes("gw-1")
    text = ALLOCATE.partition("    - ansible.builtin.debug")[0]
    sizes = json.dumps({"mibs": list(WRONG_AMOUNTS), "mib": "{{ item }}"})

    run = local_site.play(f"{text}      loop: '{{{{ mibs }}}}'\n", "-e", sizes, "-e", "ttl=600")
    soon = local_site.play(ALLOCATE, "-e", "mib=1", "-e", "ttl=soon")

    assert (run.return_code, soon.return_code) == (2, 2)
    assert [expected for expected in WRONG_AMOUNTS.values() if expected not in told(run)] == []
    assert "ttl_seconds" in told(soon)
    assert local_site.allocations() == {}


def test_node_allocation_on_a_node_that_is_not_there_yet_rehearses(local_site: Site) -> None:
    text = ALLOCATE.replace("hosts: gw-1", "hosts: localhost")

    rehearsal = local_site.play(text, *SIZES, "--check")
    run = local_site.play(text, *SIZES)

    assert changed(rehearsal) == {"localhost": 1}
    assert "'localhost' is not registered" in told(rehearsal)
    assert run.return_code == 2


def test_node_allocation_is_not_released_on_another_node(local_site: Site) -> None:
    local_site.add_nodes("gw-1", "gw-2")
    local_site.play(ALLOCATE, *SIZES)

    run = local_site.play(RELEASE.replace("state: absent", "state: absent, node_id: gw-2"))

    assert run.return_code == 2
    assert "is on node 'gw-1', not on 'gw-2'" in told(run)
    assert len(local_site.allocations()) == 1


def test_node_allocation_with_nothing_to_confirm_fails_but_rehearses(local_site: Site) -> None:
    rehearsal, run = local_site.play(CONFIRM, "--check"), local_site.play(CONFIRM)

    assert changed(rehearsal) == {"localhost": 0}
    assert run.return_code == 2
    assert "'batch.a' is not there" in told(run)


# select_nodes, deployment

SELECT = """
- name: Choose and reserve
  hosts: localhost
  gather_facts: false
  tasks:
    - ansible.builtin.set_fact:
        chosen: >-
          {{ query('iot_platform.node_manager.select_nodes', 'web-1', owner='team-a', replicas=2, resources=needs,
                   labels={'tier': 1, 'spare': true}, constraints={'labels': {'line': 'a'}}, ttl_seconds=600,
                   anti_affinity=[{'scope': 'node', 'deployment_id': 'web-1'}]) }}
      vars:
        needs: {memory_mib: "{{ mib }}", cpu_millicores: 500}
        mib: "256"
    - ansible.builtin.add_host:
        name: "{{ item }}"
        groups: chosen_nodes
      loop: "{{ chosen | unique }}"
      changed_when: false

- name: Work on what was chosen
  hosts: chosen_nodes
  gather_facts: false
  tasks:
    - ansible.builtin.debug:
        msg: "here is {{ inventory_hostname }}, whose line is {{ node_manager_labels.line }}"
"""
KEEP = """
- name: Keep it
  hosts: localhost
  gather_facts: false
  tasks:
    - iot_platform.node_manager.deployment: {deployment_id: web-1, state: confirmed}
"""
FREE = """
- name: Release it
  hosts: localhost
  gather_facts: false
  tasks:
    - iot_platform.node_manager.deployment: {deployment_id: web-1, state: absent}
"""


def add_fleet(site: Site) -> None:
    """Register four nodes, two of which the deployment may use."""
    site.add_nodes("gw-1", "gw-2", labels={"line": "a"})
    site.add_nodes("gw-3", "gw-4", labels={"line": "b"})


def test_playbook_chooses_reserves_uses_and_releases_its_hosts(site: Site) -> None:
    add_fleet(site)

    rehearsal = site.play(SELECT + KEEP + FREE, "--check")
    assert site.allocations() == {}
    first = site.play(SELECT)
    reserved = site.allocations()
    second, check = site.play(SELECT), site.play(SELECT, "--check")

    for run in (rehearsal, first, second, check):
        assert changed(run) == {"localhost": 0, "gw-1": 0, "gw-2": 0}
        assert run.output.count("whose line is a") == 2
    assert {made.node_id for made in reserved.values()} == {"gw-1", "gw-2"}
    assert set(reserved) == {"web-1:0", "web-1:1"}
    assert site.allocations() == reserved


def test_deployment_is_confirmed_once_and_released_once(site: Site) -> None:
    add_fleet(site)
    site.play(SELECT)

    would_keep, keeps, kept = site.play(KEEP, "--check"), site.play(KEEP, "--diff"), site.play(KEEP)
    expiries = {made.expires_at for made in site.allocations().values()}
    would_free, frees, free = site.play(FREE, "--check"), site.play(FREE, "--diff"), site.play(FREE)

    assert [changed(run)["localhost"] for run in (would_keep, keeps, kept)] == [1, 1, 0]
    assert expiries == {None}
    assert [changed(run)["localhost"] for run in (would_free, frees, free)] == [1, 1, 0]
    assert "web-1 (wanted)" in keeps.output
    assert "web-1 (wanted)" in frees.output
    assert site.allocations() == {}


def test_whole_playbook_leaves_nothing_behind(local_site: Site) -> None:
    add_fleet(local_site)

    first, second = local_site.play(SELECT + KEEP + FREE), local_site.play(SELECT + KEEP + FREE)

    assert changed(first) == changed(second) == {"localhost": 2, "gw-1": 0, "gw-2": 0}
    assert local_site.allocations() == {}


def test_documented_playbook_runs_as_it_stands(local_site: Site) -> None:
    add_fleet(local_site)
    text = (ROOT / "docs" / "ansible.md").read_text("utf-8")
    playbook = text.partition("## A playbook that chooses its own hosts")[2].partition("```yaml")[2].partition("```")[0]

    check, first, second = (local_site.play(playbook, *mode) for mode in (["--check"], [], []))

    assert changed(check) == changed(second) == {"localhost": 0, "gw-1": 0, "gw-2": 0}
    assert changed(first) == {"localhost": 1, "gw-1": 0, "gw-2": 0}
    assert {made.expires_at for made in local_site.allocations().values()} == {None}
    assert "web-1 runs on gw-2" in told(first)


def test_deployment_that_is_not_there_cannot_be_confirmed(local_site: Site) -> None:
    run = local_site.play(KEEP)

    assert run.return_code == 2
    assert "nothing is reserved for deployment 'web-1'" in told(run)


CHOSEN_HOSTS = """
- hosts: "{{ query('iot_platform.node_manager.select_nodes', 'web-1', owner='team-a', resources={'memory_mib': 9}) }}"
  gather_facts: false
  tasks:
    - ansible.builtin.debug:
        msg: here
"""


@pytest.mark.parametrize("argument", ["--list-hosts", "--list-tasks", "--list-tags", "--syntax-check", "--check"])
def test_select_nodes_reserves_nothing_where_a_run_only_looks(local_site: Site, argument: str) -> None:
    local_site.add_nodes("gw-1")

    run = local_site.play(CHOSEN_HOSTS, argument)

    assert run.return_code == 0, told(run)
    assert local_site.allocations() == {}


def test_select_nodes_gives_the_hosts_of_a_play(local_site: Site) -> None:
    local_site.add_nodes("gw-1")

    run = local_site.play(CHOSEN_HOSTS)

    assert changed(run) == {"gw-1": 0}
    assert set(local_site.allocations()) == {"web-1:0"}


def looked_up(arguments: str) -> str:
    """Write the template that shows what the lookup gives for *arguments*."""
    return f"{{{{ query('iot_platform.node_manager.select_nodes', {arguments}) | to_json }}}}"


def ask(site: Site, arguments: str) -> PlaybookRun:
    """Show what the lookup gives for *arguments*."""
    task = {"ansible.builtin.debug": {"msg": looked_up(arguments)}}
    return site.play(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": [task]}]))


WELL = "owner='team-a', resources={'memory_mib': 600}"


def test_select_nodes_without_reserve_reserves_nothing(site: Site) -> None:
    site.add_nodes("gw-1")

    run = ask(site, f"deployment_id='web-1', {WELL}, reserve=false, details=true")

    assert changed(run) == {"localhost": 0}
    assert '"reserved": false' in told(run).replace("\\", "")
    assert site.allocations() == {}


def test_select_nodes_places_several_deployments(local_site: Site) -> None:
    local_site.add_nodes("gw-1", "gw-2")

    run = ask(local_site, f"'web-1', 'web-2', {WELL}, details=true")

    assert changed(run) == {"localhost": 0}
    found = local_site.allocations()
    assert {found["web-1:0"].node_id, found["web-2:0"].node_id} == {"gw-1", "gw-2"}


WRONG_REQUESTS = {
    WELL: "expected the deployment as a term or as deployment_id, one of the two",
    f"'a', deployment_id='b', {WELL}": "expected the deployment as a term or as deployment_id, one of the two",
    "'a', resources={'memory_mib': 1}": "owner",
    "'a', owner='t', resources={'memory_mib': 1.5}": "resources.memory_mib: expected a whole number, got 1.5",
    "'a', owner='t', resources={'memory_mib': true}": "resources.memory_mib: expected a whole number, got True",
    "'a', owner='t', resources={'gpu': {'count': 'x'}}": "resources.gpu.count: expected a whole number, got 'x'",
    f"'a', {WELL}, replicas='two'": "replicas",
    f"'a', {WELL}, strategy='cheap'": "strategy",
    f"'a', {WELL}, spread={{'skew': 1}}": "spread.skew: Extra inputs are not permitted",
    f"'a b', {WELL}": "deployment_id: String should match pattern",
    "'a', owner='t', resources={'memory_mib': 1001}": "fits nowhere: of 1 nodes were left out: 1 insufficient_memory_mib",
}


def test_select_nodes_says_what_is_wrong(local_site: Site) -> None:
    local_site.add_nodes("gw-1")
    tasks = [
        {"name": f"Number {number}", "ansible.builtin.debug": {"msg": looked_up(arguments)}, "ignore_errors": True}
        for number, arguments in enumerate(WRONG_REQUESTS)
    ]

    run = local_site.play(json.dumps([{"hosts": "localhost", "gather_facts": False, "tasks": tasks}]))

    assert run.count("ignored") == {"localhost": len(WRONG_REQUESTS)}
    answers = [told(PlaybookRun(0, text, "")) for text in run.output.split("TASK [")[1:]]
    assert [
        expected for expected, answer in zip(WRONG_REQUESTS.values(), answers, strict=True) if expected not in answer
    ] == []
    assert local_site.allocations() == {}


def test_select_nodes_for_another_request_of_the_same_name_fails(site: Site) -> None:
    site.add_nodes("gw-1")
    ask(site, f"'web-1', {WELL}")

    run = ask(site, f"'web-1', {WELL}, replicas=2")

    assert run.return_code == 2
    assert "'web-1' is placed already, for another request" in told(run)


# rebalance


def test_rebalance_shows_the_advice_and_moves_nothing(site: Site) -> None:
    site.add_nodes("gw-1")
    ask(site, "'web-1', 'web-2', 'web-3', owner='team-a', resources={'memory_mib': 300}")
    site.add_nodes("gw-2", "gw-3")
    before = site.allocations()

    runs = [site.controller.playbook("rebalance", *mode) for mode in ([], [], ["--check"])]

    for run in runs:
        assert changed(run) == {"localhost": 0}
        assert "gw-1 -> gw-2" in told(run)
    assert site.allocations() == before


def test_rebalance_of_nothing_says_so(local_site: Site) -> None:
    run = local_site.controller.playbook("rebalance")

    assert changed(run) == {"localhost": 0}
    assert "nothing to move" in told(run)


# a manager that means harm


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """Name a file that only an executed template makes."""
    return tmp_path / "executed"


@pytest.fixture
def harmful(trap: Path, local_site: Site) -> Iterator[Site]:
    """Give a site whose manager answers each question with templates."""
    bait = "{{ lookup('pipe', 'touch " + str(trap) + "') }}"
    placement = {
        "deployment_id": bait, "reserved": True, "rejected": {bait: 1},
        "nodes": [{"node_id": "gw-1", "allocation_id": bait, "units": {bait: {}}, "score": 1, "scores": {bait: 1}}],
    }  # fmt: skip
    move = {"allocation_id": bait, "deployment_id": bait, "from_node": bait, "to_node": bait, "gain": 1, "reason": bait}
    allocation = {
        "allocation_id": bait, "node_id": bait, "owner": bait, "deployment_id": bait, "resources": {bait: 1},
        "units": {}, "ttl_seconds": 1, "expires_at": bait, "created_at": bait,
    }  # fmt: skip
    answers: dict[str, Any] = {
        "/inventory": {"schema": 1, "groups": [], "nodes": [], "known_hosts": [], "jump_hosts": {}},
        "/optimization": {"at": bait, "imbalance_before": 1, "imbalance_after": 0, "moves": [move], "more": False},
        "/allocations/batch.a": allocation,
        "/allocations/batch.a/confirm": {**allocation, "expires_at": None},
    }

    class Answering(BaseHTTPRequestHandler):
        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            asked = json.loads(self.rfile.read(length) or b"{}")
            found = answers.get(self.path, placement)
            if asked.get("deployment_id") == "name-1":
                found = {**placement, "nodes": [{"node_id": asked["owner"]}]}
            body = json.dumps(found).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer  # noqa: N815 -- the names are the library's

        def log_message(self, *_arguments: Any) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        controller = make_controller(local_site.folder / "other", NODE_MANAGER_URL=url)
        yield Site(controller, controller, local_site.folder)
        server.shutdown()


SHOW_ALL = f"""
- hosts: localhost
  gather_facts: false
  tasks:
    - ansible.builtin.set_fact:
        placed: "{{{{ query('iot_platform.node_manager.select_nodes', 'web-1', {WELL}, details=true) }}}}"
    - iot_platform.node_manager.node_allocation: {{allocation_id: batch.a, confirmed: true}}
      register: kept
    - iot_platform.node_manager.optimization_info:
      register: advice
    - ansible.builtin.debug:
        msg: ["{{{{ placed }}}}", "{{{{ placed[0].nodes[0].allocation_id }}}}", "{{{{ kept }}}}", "{{{{ advice.summary }}}}"]
"""


def test_what_the_manager_says_is_never_executed(harmful: Site, trap: Path) -> None:
    shown = harmful.play(SHOW_ALL, "--diff", "-v")
    rebalance = harmful.controller.playbook("rebalance")

    assert (shown.return_code, rebalance.return_code) == (0, 0), told(shown) + told(rebalance)
    assert "{{ lookup(" in shown.output
    assert "{{ lookup(" in rebalance.output
    assert not trap.exists()


@pytest.mark.parametrize("name", ["localhost", "{{ 1 }}"])
def test_select_nodes_takes_only_names_of_nodes(harmful: Site, name: str) -> None:
    run = ask(harmful, f"'name-1', owner={json.dumps(name)}, resources={{'memory_mib': 1}}")

    assert run.return_code == 2
    assert "which is no node's name" in told(run)
