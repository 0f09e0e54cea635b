# SPDX-License-Identifier: GPL-3.0-or-later
"""A scrape, read as Prometheus reads it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


@dataclass
class Scrape:
    """The samples of a scrape by name, each with its labels; and its families."""

    samples: dict[str, list[tuple[dict[str, str], float]]] = field(default_factory=lambda: defaultdict(list))
    families: dict[str, Metric] = field(default_factory=dict)

    def value(self, name: str, /, **labels: str) -> float:
        """Give the one sample that has *labels* among its own."""
        (found,) = self.values(name, **labels)
        return found

    def values(self, name: str, /, **labels: str) -> list[float]:
        """Give the samples that have *labels* among their own."""
        return [value for own, value in self.samples.get(name, ()) if labels.items() <= own.items()]

    def label(self, name: str, label: str) -> set[str]:
        """Give the values that a label has in the samples of a name."""
        return {own[label] for own, _ in self.samples.get(name, ()) if label in own}

    def of_nodes(self) -> list[str]:
        """Name what has the label node_id."""
        return [name for name, found in self.samples.items() if any("node_id" in own for own, _ in found)]


def read(text: str) -> Scrape:
    """Read the text form.

    Errors: ValueError if it isn't that, or a series comes twice.
    """
    found = Scrape()
    seen = set()
    for family in text_string_to_metric_families(text):
        found.families[family.name] = family
        for sample in family.samples:
            series = (sample.name, tuple(sorted(sample.labels.items())))
            if series in seen:
                raise ValueError(f"twice: {series}")
            seen.add(series)
            found.samples[sample.name].append((sample.labels, sample.value))
    return found
