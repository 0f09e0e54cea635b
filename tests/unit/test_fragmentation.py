# SPDX-License-Identifier: GPL-3.0-or-later
"""What a placement costs by the requests seen so far, and what a mix remembers of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import repeat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from node_manager.fragmentation import KEPT_SHAPES, MOST_SEEN, USED_SHAPES, Ask, Fragmentation, FreeSpace, RequestMix

# A node: free processors and memory, what each of its GPUs has free, and its cameras.
Node = tuple[int, int, tuple[int, ...], tuple[int, ...]]


def cpu_only(cpu: int, memory: int = 1000) -> Ask:
    return Ask((("cpu_millicores", cpu), ("memory_mib", memory)), ())


def on_gpu(cpu: int, count: int = 1, share: int = 1000) -> Ask:
    return Ask((("cpu_millicores", cpu), ("memory_mib", 1000)), (("gpu", count, share),))


def with_camera(cpu: int) -> Ask:
    return Ask((("cpu_millicores", cpu), ("memory_mib", 1000)), (("camera", 1, 1000), ("gpu", 1, 500)))


def node(cpu: int, memory: int = 100_000, gpus: tuple[int, ...] = (), cameras: tuple[int, ...] = ()) -> Node:
    return cpu, memory, gpus, cameras


def units_of(lists: Sequence[tuple[int, ...]]) -> np.ndarray:
    widest = max(map(len, lists), default=0)
    return np.array([[*units, *repeat(0, widest - len(units))] for units in lists], dtype=np.int16)


def space_of(*nodes: Node) -> FreeSpace:
    amounts = {
        "cpu_millicores": np.array([cpu for cpu, _, _, _ in nodes], dtype=np.float64),
        "memory_mib": np.array([memory for _, memory, _, _ in nodes], dtype=np.float64),
    }
    gpus, cameras = [gpus for _, _, gpus, _ in nodes], [cameras for _, _, _, cameras in nodes]
    return FreeSpace(
        amounts=amounts,
        totals={name: np.full(len(nodes), 128_000.0) for name in amounts},
        devices={"gpu": units_of(gpus), "camera": units_of(cameras)},
        device_counts={
            "gpu": np.array(list(map(len, gpus)), dtype=np.int16),
            "camera": np.array(list(map(len, cameras)), dtype=np.int16),
        },
        version=np.zeros(len(nodes), dtype=np.int64),
    )


def mix_of(shapes: Iterable[Ask]) -> RequestMix:
    mix = RequestMix()
    for shape in shapes:
        mix.observe(shape)
    return mix


def rooms(shape: Ask, space: FreeSpace) -> np.ndarray:
    room = np.ones(len(space.version), dtype=bool)
    for name, amount in shape.amounts:
        room &= space.amounts[name] >= amount
    for name, count, share in shape.devices:
        room &= (space.devices[name] >= share).sum(axis=1) >= count
    return np.flatnonzero(room)


def take(shape: Ask, space: FreeSpace, row: int, units: dict[str, tuple[int, ...]]) -> None:
    for name, amount in shape.amounts:
        space.amounts[name][row] -= amount
    for name, _, share in shape.devices:
        space.devices[name][row, list(units[name])] -= share
    space.version[row] += 1


def cheapest(shape: Ask, seen: Iterable[Ask], *nodes: Node) -> int:
    space = space_of(*nodes)
    return int(Fragmentation(mix_of(seen)).growth(shape, space, np.arange(len(nodes))).argmin())


SHAPES = st.one_of(
    st.builds(cpu_only, st.integers(1, 40).map(lambda cores: cores * 500), st.sampled_from([0, 500, 4000, 60_000])),
    st.builds(on_gpu, st.integers(1, 40).map(lambda cores: cores * 500), st.just(1), st.integers(1, 1000)),
    st.builds(on_gpu, st.integers(1, 40).map(lambda cores: cores * 500), st.sampled_from([1, 2, 4])),
    st.builds(with_camera, st.integers(1, 40).map(lambda cores: cores * 500)),
)
UNITS = st.lists(st.one_of(st.just(1000), st.integers(0, 1000)), max_size=8).map(tuple)
NODES = st.tuples(st.integers(0, 128_000), st.integers(0, 500_000), UNITS, UNITS)
FLEETS = st.lists(NODES, min_size=1, max_size=20)


# the mix


def test_mix_of_the_same_requests_has_the_same_data() -> None:
    shapes = [cpu_only(100 * (number % 7) + 100) for number in range(500)]

    assert mix_of(shapes).as_data() == mix_of(shapes).as_data()


def test_mix_keeps_a_bounded_number_of_shapes() -> None:
    mix = mix_of(cpu_only(number + 1) for number in range(3 * KEPT_SHAPES))

    assert (len(mix.as_data()["counts"]), len(mix.classes)) == (KEPT_SHAPES, USED_SHAPES)


def test_mix_keeps_the_frequent_among_many_rare() -> None:
    frequent = on_gpu(4000)
    mix = mix_of(shape for number in range(1000) for shape in (frequent, cpu_only(number + 1)))

    assert mix.classes[0][0] == frequent


@pytest.mark.parametrize("times", [1, 2])
def test_mix_forgets_the_oldest_of_the_rarest(times: int) -> None:
    mix = mix_of(cpu_only(number + 1) for number in range(KEPT_SHAPES) for _ in range(times + (number == 0)))

    mix.observe(on_gpu(4000))

    kept = [dict(amounts)["cpu_millicores"] for amounts, _, _ in mix.as_data()["counts"]]
    assert [1, *range(3, KEPT_SHAPES + 1), 4000] == kept


@given(st.lists(SHAPES, max_size=80))
def test_mix_has_the_same_classes_however_often_it_is_asked(shapes: list[Ask]) -> None:
    asked, found = RequestMix(), []
    for shape in shapes:
        asked.observe(shape)
        found.append((asked.generation, asked.classes))

    assert len({generation for generation, _ in found}) == len(set(found))
    assert mix_of(shapes).classes == asked.classes


def test_mix_counts_stay_below_their_bound() -> None:
    mix = mix_of(repeat(cpu_only(100), 5 * MOST_SEEN))

    assert sum(count for _, _, count in mix.as_data()["counts"]) < MOST_SEEN


def test_mix_follows_a_change() -> None:
    mix = mix_of([*repeat(cpu_only(100), 10_000), *repeat(cpu_only(200), 10_000)])

    assert mix.classes[0][0] == cpu_only(200)


@given(before=st.lists(SHAPES, max_size=60), after=st.lists(SHAPES, max_size=60))
def test_mix_from_its_json_goes_on_alike(before: list[Ask], after: list[Ask]) -> None:
    mix = mix_of(before)
    restored = RequestMix.from_data(json.loads(json.dumps(mix.as_data())))

    for shape in after:
        mix.observe(shape)
        restored.observe(shape)

    assert restored.as_data() == mix.as_data()


# the choice of a node


@pytest.mark.parametrize(
    ("shape", "seen", "nodes", "expected"),
    [
        pytest.param(cpu_only(1000), [], [node(64_000), node(2000)], 1, id="empty-mix-is-best-fit"),
        pytest.param(cpu_only(1000), [], [node(8000, gpus=(1000,)), node(8000)], 1, id="empty-mix-spares-devices"),
        pytest.param(
            cpu_only(8000), [on_gpu(8000)], [node(16_000, gpus=(1000, 1000)), node(64_000)], 1, id="processors-of-gpus"
        ),
        pytest.param(
            cpu_only(8000),
            [on_gpu(8000)],
            [node(16_000, gpus=(1000, 1000)), node(16_000, gpus=(1000, 0))],
            1,
            id="processors-that-no-gpu-needs",
        ),
        pytest.param(
            on_gpu(4000),
            [on_gpu(4000, count=2), on_gpu(4000)],
            [node(64_000, gpus=(1000, 1000)), node(64_000, gpus=(1000, 0))],
            1,
            id="pairs-are-kept",
        ),
        pytest.param(
            on_gpu(1000, share=400),
            [on_gpu(1000, share=400), on_gpu(1000, share=600)],
            [node(64_000, gpus=(1000,)), node(64_000, gpus=(400,))],
            1,
            id="share-into-the-rest",
        ),
        pytest.param(
            cpu_only(4000, 1000),
            [cpu_only(4000, 1000), cpu_only(1000, 16_000)],
            [node(16_000, 64_000), node(16_000, 4000)],
            1,
            id="memory-is-left-to-who-needs-it",
        ),
        pytest.param(
            on_gpu(4000),
            [cpu_only(4000), with_camera(4000)],
            [node(64_000, gpus=(1000,), cameras=(1000,)), node(64_000, gpus=(1000,))],
            1,
            id="gpu-beside-a-camera-is-kept",
        ),
    ],
)
def test_growth_is_least_where(shape: Ask, seen: list[Ask], nodes: list[Node], expected: int) -> None:
    assert cheapest(shape, seen, *nodes) == expected


def test_growth_judges_a_class_that_the_fleet_lacks() -> None:
    space = space_of(node(8000), node(64_000))
    del space.devices["camera"], space.device_counts["camera"]
    fragmentation = Fragmentation(mix_of([with_camera(1000), Ask((("disk_mib", 10),), ()), cpu_only(1000)]))

    growth = fragmentation.growth(cpu_only(1000), space, np.arange(2))

    assert np.isfinite(growth).all()


def test_growth_judges_a_shape_never_seen() -> None:
    fragmentation = Fragmentation(mix_of([cpu_only(1000)]))

    growth = fragmentation.growth(with_camera(1000), space_of(node(8000, gpus=(700,), cameras=(1000,))), np.arange(1))

    assert np.isfinite(growth).all()


# the choice of units


@pytest.mark.parametrize(
    ("shape", "seen", "gpus", "expected"),
    [
        pytest.param(on_gpu(1, share=300), [], (1000, 300, 500), (1,), id="empty-mix-takes-the-fullest"),
        pytest.param(on_gpu(1, share=300), [cpu_only(1)], (1000, 300, 500), (1,), id="no-device-in-the-mix"),
        pytest.param(on_gpu(1, count=2), [on_gpu(1)], (1000, 300, 1000, 1000), (0, 2), id="whole-units"),
        pytest.param(
            on_gpu(1, share=300), [on_gpu(1, share=600)], (900, 800), (0,), id="the-rest-still-holds-what-is-asked"
        ),
        pytest.param(on_gpu(1, share=300), [on_gpu(1)], (1000, 400), (1,), id="whole-units-are-kept"),
    ],
)
def test_choose_units_takes(shape: Ask, seen: list[Ask], gpus: tuple[int, ...], expected: tuple[int, ...]) -> None:
    units = Fragmentation(mix_of(seen)).choose_units(shape, space_of(node(8000, gpus=gpus)), 0)

    assert units == {"gpu": expected}


def test_choose_units_of_each_device_class() -> None:
    space = space_of(node(8000, gpus=(200, 500), cameras=(0, 0, 1000)))

    units = Fragmentation(mix_of([with_camera(1)])).choose_units(with_camera(1), space, 0)

    assert units == {"camera": (2,), "gpu": (1,)}


@given(shapes=st.lists(SHAPES, min_size=1, max_size=12), one=NODES)
def test_choose_units_takes_units_with_room(shapes: list[Ask], one: Node) -> None:
    space = space_of(one)
    fragmentation = Fragmentation(mix_of(shapes))
    fitting = [shape for shape in shapes if len(rooms(shape, space))]

    chosen = [
        (space.devices[name][0, position] >= share)
        for shape in fitting
        for name, _, share in shape.devices
        for position in fragmentation.choose_units(shape, space, 0)[name]
    ]

    assert chosen == [True] * sum(count for shape in fitting for _, count, _ in shape.devices)


# what a row's cost may depend on


@settings(max_examples=50, deadline=None)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=3), fleet=FLEETS, arrivals=st.lists(st.integers(0, 2), max_size=60))
def test_growth_kept_is_growth_made_anew(shapes: list[Ask], fleet: list[Node], arrivals: list[int]) -> None:
    space = space_of(*fleet)
    mix = RequestMix()
    keeping = Fragmentation(mix)
    kept, anew = [], []

    for number in arrivals:
        shape = shapes[number % len(shapes)]
        mix.observe(shape)
        rows = rooms(shape, space)
        kept.append(keeping.growth(shape, space, rows).tolist())
        anew.append(Fragmentation(mix).growth(shape, space, rows).tolist())
        if len(rows):
            row = int(rows[np.argmin(kept[-1])])
            take(shape, space, row, keeping.choose_units(shape, space, row))

    assert kept == anew


@pytest.mark.parametrize("step", [1, 2, 3, 7, 250])
def test_growth_of_a_row_is_the_same_among_others(step: int) -> None:
    chance = np.random.default_rng(42)
    mix = mix_of(on_gpu(int(cpu), share=int(share)) for cpu, share in chance.integers(1, 1000, (500, 2)))
    gpus = [tuple(map(int, units)) for units in chance.integers(0, 1001, (600, 4))]
    space = space_of(
        *(node(int(cpu), gpus=units) for cpu, units in zip(chance.integers(1, 64_000, 600), gpus, strict=True))
    )
    rows = rooms(cpu_only(1), space)

    together = Fragmentation(mix).growth(cpu_only(1), space, rows)
    apart = [Fragmentation(mix).growth(cpu_only(1), space, rows[at : at + step]) for at in range(0, len(rows), step)]

    assert np.concatenate(apart).tolist() == together.tolist()


@given(shapes=st.lists(SHAPES, min_size=1, max_size=40), fleet=FLEETS, seed=st.integers(0, 2**32 - 1))
def test_growth_follows_rows_to_another_order(shapes: list[Ask], fleet: list[Node], seed: int) -> None:
    mix = mix_of(shapes)
    order = np.random.default_rng(seed).permutation(len(fleet))
    space, other = space_of(*fleet), space_of(*(fleet[place] for place in order))
    rows = rooms(shapes[0], other)

    assert (
        Fragmentation(mix).growth(shapes[0], other, rows).tolist()
        == Fragmentation(mix).growth(shapes[0], space, order[rows]).tolist()
    )


def test_growth_of_another_fleet_is_made_anew() -> None:
    fragmentation = Fragmentation(mix_of([on_gpu(4000), cpu_only(4000)]))
    small, large = space_of(node(8000, gpus=(1000,))), space_of(node(8000), node(64_000, gpus=(1000, 1000)))

    fragmentation.growth(cpu_only(4000), small, np.arange(1))

    assert (
        fragmentation.growth(cpu_only(4000), large, np.arange(2)).tolist()
        == Fragmentation(mix_of([on_gpu(4000), cpu_only(4000)])).growth(cpu_only(4000), large, np.arange(2)).tolist()
    )
