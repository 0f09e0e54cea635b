# SPDX-License-Identifier: GPL-3.0-or-later
"""The rules, alerts, dashboard and table of metrics, against the scrape of a service that did a bit of everything.

Names that no scrape has, labels that no series has, and values that no label takes are mistakes that Prometheus never reports.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql
import pytest
import yaml
from exercised_service import LOST, NODES, exercise, make_service
from metrics_scrape import Scrape, read
from parts import require
from prometheus_process import promtool

DOCS = Path(__file__).resolve().parents[2] / "docs"
FOLDER = DOCS / "prometheus"
PAGE = (DOCS / "prometheus.md").read_text("utf-8")
# What Prometheus adds by itself.
OF_PROMETHEUS = {"job", "instance"}
VARIABLES = {"$job": "node-manager", "$node": NODES[0], "$__rate_interval": "5m"}
# States that the service of these tests isn't in.
MAY_BE_AWAY = {("node_manager_node_info", "node_id"), ("node_manager_node_state", "admin")}


def rules_of(name: str) -> list[dict[str, Any]]:
    """Read the rules of a file."""
    groups = yaml.safe_load((FOLDER / name).read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = {rule["alert"]: rule for rule in rules_of("alerts.yml")}
RECORDED = {rule["record"]: rule["expr"] for rule in rules_of("rules.yml")}
TESTS = yaml.safe_load((FOLDER / "alerts.test.yml").read_text("utf-8"))["tests"]
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))
TARGETS = [
    (panel["title"], target["expr"], target["legendFormat"])
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", ())
]
VARIABLE_QUERIES = [item["definition"] for item in DASHBOARD["templating"]["list"] if item["type"] == "query"]


def filled(expression: str) -> str:
    """Fill in the variables of the dashboard."""
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


EXPRESSIONS = {
    **{f"alert {name}": rule["expr"] for name, rule in ALERTS.items()},
    **{f"record {name}": expression for name, expression in RECORDED.items()},
    **{f"panel {title} {number}": filled(expression) for number, (title, expression, _) in enumerate(TARGETS)},
    **{
        f"variable {number}": filled(query.removeprefix("label_values(").rpartition(",")[0])
        for number, query in enumerate(VARIABLE_QUERIES)
    },
}


@pytest.fixture(scope="module")
def scrape(tmp_path_factory: pytest.TempPathFactory) -> Scrape:
    """Scrape a service that did a bit of everything."""
    service = make_service(tmp_path_factory.mktemp("service") / "home").start()
    with service.client() as api:
        exercise(api)
        answer = api.get("/metrics")
    service.kill()
    assert answer.status_code == 200
    return read(answer.text)


def labels_of(name: str, scrape: Scrape) -> set[str]:
    """Give the labels that a metric has, or one that is recorded may have."""
    if name in RECORDED:
        spoken = promql.read(RECORDED[name])
        return {label for metric, _ in spoken.metrics for label in labels_of(metric, scrape)}
    return {label for own, _ in scrape.samples.get(name, ()) for label in own} | OF_PROMETHEUS


@pytest.mark.parametrize("expression", EXPRESSIONS.values(), ids=EXPRESSIONS)
def test_expression_speaks_of_what_there_is(expression: str, scrape: Scrape) -> None:
    spoken = promql.read(expression)

    assert spoken.metrics != []
    known: set[str] = set()
    for name, matchers in spoken.metrics:
        assert name in scrape.samples or name in RECORDED or name == "up", name
        known |= labels_of(name, scrape)
        for label, operator, text in matchers:
            assert label in labels_of(name, scrape), f"{name} has no label {label}"
            seen = scrape.label(name, label)
            for value in text.split("|") if operator in {"=~", "!~"} else [text]:
                assert not seen or value in seen or (name, label) in MAY_BE_AWAY, f"{name}: {label} is never {value}"
    assert spoken.grouped <= known


@pytest.mark.parametrize(
    ("title", "expression", "legend"), TARGETS, ids=[f"{target[0]}-{n}" for n, target in enumerate(TARGETS)]
)
def test_legend_names_labels_that_are_there(title: str, expression: str, legend: str, scrape: Scrape) -> None:
    known = {label for name, _ in promql.read(filled(expression)).metrics for label in labels_of(name, scrape)}

    assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= known


def test_dashboard_can_be_imported() -> None:
    panels = DASHBOARD["panels"]
    ids = [panel["id"] for panel in panels]
    sources = [target["datasource"] for panel in panels for target in panel.get("targets", ())]

    assert len(set(ids)) == len(ids)
    assert {json.dumps(source) for source in sources} == {json.dumps({"type": "prometheus", "uid": "${datasource}"})}
    assert [item["name"] for item in DASHBOARD["templating"]["list"]] == ["datasource", "job", "node"]
    assert {"Nodes", "Jobs", "Streams and recording", "Repair", "Latencies"} <= {panel["title"] for panel in panels}
    used = {found for _, expression, _ in TARGETS for found in re.findall(r"\$\w+", expression)}
    assert used == set(VARIABLES)


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for cell in ((at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])):
            assert cell not in taken, f"{panel['title']} covers {taken[cell]}"
            taken[cell] = panel["title"]


def test_promtool_takes_the_rules_and_the_queries(tmp_path: Path) -> None:
    require("prometheus", "promtool comes with it")
    queries = [{"record": f"q:{number}", "expr": found} for number, found in enumerate(EXPRESSIONS.values())]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "q", "rules": queries}]}), "utf-8")

    files = [str(FOLDER / "rules.yml"), str(FOLDER / "alerts.yml"), str(tmp_path / "queries.yml")]
    done = promtool("check", "rules", *files)

    assert done.returncode == 0, done.stderr
    assert [f"{len(found)} rules found" in done.stdout for found in (RECORDED, ALERTS, queries)] == [True] * 3


def test_promtool_passes_the_tests_of_the_alerts() -> None:
    require("prometheus", "promtool comes with it")

    done = promtool("test", "rules", "alerts.test.yml", cwd=FOLDER)

    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_takes_the_example_configuration() -> None:
    require("prometheus", "promtool comes with it")

    done = promtool("check", "config", "--syntax-only", "prometheus.yml", cwd=FOLDER)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ALERTS)
def test_alert_is_tested_to_fire_to_clear_and_to_be_silent(name: str) -> None:
    steps = [
        [bool(step["exp_alerts"]) for step in test["alert_rule_test"]]
        for test in TESTS
        if {step["alertname"] for step in test["alert_rule_test"]} == {name}
    ]

    fires_and_clears = [found for found in steps if True in found and not found[-1] and not found[0]]
    silent = [found for found in steps if True not in found]
    assert fires_and_clears != []
    assert silent != []


@pytest.mark.parametrize("name", ALERTS)
def test_alert_says_what_to_do_and_leads_to_the_documentation(name: str) -> None:
    rule = ALERTS[name]

    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"]["runbook_url"] == f"docs/prometheus.md#{name.lower()}"
    assert f"\n#### {name}\n" in PAGE


def test_page_has_no_alert_that_is_gone() -> None:
    assert re.findall(r"^#### (\w+)$", PAGE, re.MULTILINE) == list(ALERTS)


def test_page_has_all_metrics_as_they_are(scrape: Scrape) -> None:
    rows = re.findall(r"^\| `(node_manager_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)

    documented = {name: (kind, labels.replace("`", ""), told) for name, kind, labels, told in rows}

    there = {}
    for name, family in scrape.families.items():
        if name.startswith("node_manager_") and not name.endswith("_created"):
            labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
            shown = f"{name}_total" if family.type == "counter" else name
            there[shown] = (family.type, ", ".join(labels), family.documentation)
    assert documented == there
    assert len(rows) == len(documented)


def test_the_exercised_service_has_a_node_that_is_lost(scrape: Scrape) -> None:
    assert scrape.value("node_manager_node_state", node_id=LOST, health="unreachable", status="offline") == 1
