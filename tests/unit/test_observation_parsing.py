# SPDX-License-Identifier: GPL-3.0-or-later
"""What is read of data that nobody vouches for, as values and as JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from builders import (
    make_contact,
    make_container,
    make_containers,
    make_facts,
    make_filesystem,
    make_report,
    make_sample,
)
from hypothesis import given
from hypothesis import strategies as st
from node_manager.domain import ObservationKind
from node_manager.observation_parsing import MAX_BYTES, UnusableError, parse
from node_manager.shapes import Sample

EXAMPLES = {
    ObservationKind.FACTS: make_facts(),
    ObservationKind.SAMPLE: make_sample(),
    ObservationKind.REPORT: make_report(),
    ObservationKind.CONTACT: make_contact(),
    ObservationKind.VERDICT: {"liveness": "suspect", "reason": "TimedOut", "message": "two beats missed"},
}


def as_json(value: Any) -> bytes:
    """Write JSON as a probe does, NaN and lone surrogates included."""
    return json.dumps(value).encode()


@pytest.mark.parametrize("kind", ObservationKind)
def test_parse_gives_the_same_for_values_and_json(kind: ObservationKind) -> None:
    data = {**EXAMPLES[kind], "novelty": [1]}

    values, text = parse(kind, data), parse(kind, as_json(data))

    assert values == text
    assert "novelty" not in json.loads(text.document)


@pytest.mark.parametrize(
    "changes",
    [
        {"uptime_seconds": float("nan")},
        {"uptime_seconds": float("-inf")},
        {"containers": make_containers({**make_container("a"), "exit_code": 10**30})},
        {"containers": make_containers({**make_container("a"), "name": "a\x00b"})},
        {"containers": make_containers({**make_container("a"), "name": "\ud800"})},
        {"containers": make_containers({**make_container("a"), "image": "i" * 5000})},
        {"filesystems": [make_filesystem("/" + "m" * 5000, 1.0)]},
        {"filesystems": [make_filesystem("/", 1.0)] * 1100},
    ],
    ids=["nan", "infinity", "huge-number", "nul", "surrogate", "long-text", "long-mount", "long-list"],
)
def test_parse_cuts_json_as_it_cuts_values(changes: dict[str, Any]) -> None:
    data = make_sample(**changes)

    values, text = parse(ObservationKind.SAMPLE, data), parse(ObservationKind.SAMPLE, as_json(data))

    assert values == text
    assert "\x00" not in text.document


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b'{"schema": 2}',
        b"[" * 100_000,
        b'{"x":' * 50_000,
        b" " * (MAX_BYTES + 1),
        b'{"schema": ' + b"9" * 10_000 + b"}",
        as_json(make_sample(101.0)),
    ],
    ids=["empty", "half", "no-text", "null", "list", "later", "deep", "deeper", "large", "long-number", "above-100"],
)
def test_parse_refuses_what_is_none(data: bytes) -> None:
    with pytest.raises(UnusableError) as caught:
        parse(ObservationKind.SAMPLE, data)

    assert len(str(caught.value)) <= 4000


@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_parse_of_any_bytes_is_refused_or_bounded(data: bytes) -> None:
    with pytest.raises(UnusableError):
        parse(ObservationKind.SAMPLE, data)


def test_parse_keeps_every_character_of_other_scripts() -> None:
    data = make_sample(containers=make_containers({**make_container("a"), "image": "bücher:℃"}))

    content = parse(ObservationKind.SAMPLE, json.dumps(data, ensure_ascii=False).encode())

    assert Sample.model_validate(json.loads(content.document)) == content.shape
    assert "bücher:℃" in content.document
