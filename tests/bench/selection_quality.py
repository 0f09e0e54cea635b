# SPDX-License-Identifier: GPL-3.0-or-later
"""How good the selector's choices are, beside those of a solver (HiGHS) that sees all replicas at once.

On small random fleets with random rules (tests/selection_model.py says what they mean) both place the same requests, and both are
measured by the same sum: of the score that each chosen node has for a first replica alone, by the selector's own scorers. The
solver is favoured: what the selector weighs beyond that, replicas among each other (spread, load and room that earlier ones
take), doesn't count in the sum, though it is why the selector takes another node. With one replica nothing of that plays a part.

``python tests/bench/selection_quality.py [--cases N] [--seed N]``
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fleet_rows_builder import NOW, chosen, make_index, make_selector
from node_manager import node_selector
from node_manager.selection_request import SelectionRequest
from selection_model import Fleet, breaches, random_fleet, random_request, solve


def main() -> None:
    """Run the cases, and print agreement, gaps and times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=1_000_000)
    arguments = parser.parse_args()
    # All nodes are told of, not only the next best.
    node_selector._CANDIDATES = 12
    agreed, missed, forbidden, broken = 0, [], [], []
    gaps: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    ours = theirs = 0.0
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        dice = random.Random(seed)
        fleet = random_fleet(dice)
        request = random_request(dice, fleet)
        worth = first_scores(fleet, request)
        start = time.perf_counter()
        selection = make_selector(make_index(fleet.rows, fleet.deployments.values())).select(request, NOW)
        middle = time.perf_counter()
        best = solve(fleet, request, worth)
        ours, theirs = ours + middle - start, theirs + time.perf_counter() - middle
        if selection.fits is (best is not None):
            agreed += 1
        else:
            (forbidden if selection.fits else missed).append(seed)
        if selection.fits and breaches(fleet, request, chosen(selection)):
            broken.append(seed)
        if selection.fits and best is not None and best[0] > 0:
            found = sum(worth[node_id] for node_id in chosen(selection))
            replicas = "1 replica" if request.replicas == 1 else "2 to 6"
            gaps[request.strategy.value, replicas].append(1 - found / best[0])
    feasible = sum(len(each) for each in gaps.values())
    print(f"{arguments.cases} cases, {feasible} placed by both; feasibility agrees in {agreed}")
    print(f"not placed though possible: {missed or 'none'}; placed though impossible: {forbidden or 'none'}")
    print(f"placed against a rule: {broken or 'none'}")
    print("strategy   replicas    cases   gap mean   median     95 %      max   at the optimum")
    for (strategy, replicas), found in sorted(gaps.items()):
        ranked = sorted(found)
        print(
            f"{strategy:9}  {replicas:9}  {len(found):6}   {statistics.mean(found):8.2%} {statistics.median(found):8.2%}"
            f" {ranked[int(len(ranked) * 0.95)]:8.2%} {ranked[-1]:8.2%}   {sum(gap < 1e-6 for gap in found) / len(found):8.1%}"
        )
    each = 1000 / arguments.cases
    print(f"milliseconds a case: index and selector {ours * each:.2f}, solver {theirs * each:.2f}")


def first_scores(fleet: Fleet, request: SelectionRequest) -> Mapping[str, float]:
    """Score every node that has room for the request's first replica."""
    single = request.model_copy(update={"replicas": 1, "spread": None, "explain": True})
    selection = make_selector(make_index(fleet.rows, fleet.deployments.values())).select(single, NOW)
    scores = {choice.node_id: choice.score for choice in selection.choices} | dict(selection.candidates)
    return defaultdict(float, scores)


if __name__ == "__main__":
    main()
