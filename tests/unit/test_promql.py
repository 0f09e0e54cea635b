# SPDX-License-Identifier: GPL-3.0-or-later
"""The reader of PromQL that other tests trust."""

from __future__ import annotations

import promql
import pytest


@pytest.mark.parametrize(
    ("expression", "metrics", "grouped"),
    [
        ("up", [("up", [])], set()),
        ('a{x="1, {}", y=~"b|c"} == 0', [("a", [("x", "=", "1, {}"), ("y", "=~", "b|c")])], set()),
        ("sum by (x) (rate(a_total[5m])) / on (y) group_left (z) b", [("a_total", []), ("b", [])], {"x", "y", "z"}),
        ("max without (instance) (a) > 0 and on (job) b == 0", [("a", []), ("b", [])], {"instance", "job"}),
        ("histogram_quantile(0.95, sum(rate(a_bucket[5m] offset 1h)))", [("a_bucket", [])], set()),
        ("time() - level:a:rate5m unless absent(b)", [("level:a:rate5m", []), ("b", [])], set()),
        ("count(a) by (x) * 2e3", [("a", [])], {"x"}),
    ],
    ids=["bare", "matchers", "joined", "and", "range", "recorded", "grouped_behind"],
)
def test_read_names_what_is_spoken_of(
    expression: str, metrics: list[tuple[str, list[tuple[str, str, str]]]], grouped: set[str]
) -> None:
    found = promql.read(expression)

    assert (found.metrics, found.grouped) == (metrics, grouped)


def test_read_refuses_what_is_no_promql() -> None:
    with pytest.raises(ValueError, match=r"no PromQL: '\$job"):
        promql.read("a{job=$job}")
