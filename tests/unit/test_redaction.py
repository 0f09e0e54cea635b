# SPDX-License-Identifier: GPL-3.0-or-later
"""What may stand in a log line, and what never does."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from node_manager.redaction import MAX_TEXT, REDACTED, Redactor

PEM = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\nAAAA\n-----END OPENSSH PRIVATE KEY-----"
KEYS = [
    "password", "Password", "db_password", "sasl_password", "sasl_plain_username", "token", "admin_token", "secret",
    "client_secret", "authorization", "Authorization", "private_key", "privateKey", "cookie", "set-cookie", "api_key",
    "passphrase", "access-key",
]  # fmt: skip
WHOLE = st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=8, max_size=30).filter(
    lambda text: not text.isdecimal()
)
TEXTS = st.text(max_size=60)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.binary(max_size=40)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4), st.tuples(inner, inner)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("key", KEYS)
def test_line_hides_what_a_key_names_at_any_depth(key: str) -> None:
    line = {"event": "x", key: "hunter2", "deep": [{"deeper": ({key: ["hunter2"]},)}]}

    cleaned = Redactor().line(line)

    assert "hunter2" not in json.dumps(cleaned)
    assert cleaned[key] == REDACTED


@pytest.mark.parametrize(
    "key", ["token_id", "token_name", "sasl_password_file", "key_file", "node_id", "credential", "actor", "retries"]
)
def test_line_shows_what_only_sounds_like_a_secret(key: str) -> None:
    assert Redactor().line({key: "plant"}) == {key: "plant"}


@pytest.mark.parametrize(
    "text",
    [
        "postgresql+psycopg://nodes:hunter2@db.example/nodes",
        "postgresql://nodes:hun@ter2hunter2@db.example/nodes",
        "postgresql://:hunter2@/nodes?host=/run",
        "('postgresql://nodes:hunter2@db', 3)",
        "host=db password=hunter2 user=nodes",
        "https://x.example/?access_token=hunter2&y=1",
        'body {"password": "hunter2 hunter2", "user": "me"}',
        "{'sasl_plain_password': 'hunter2'}",
        "Authorization: Bearer hunter2",
        "header Authorization=Basic aHVudGVyMg==hunter2",
        "sent bearer hunter2",
        "nm_hunter2hunter2hunter2hunter2",
        PEM.replace("AAAA", "hunter2"),
        PEM.replace("AAAA", "hunter2")[:60],
        f"wrapped {PEM.replace('AAAA', 'hunter2')!r}",
    ],
)
def test_text_hides_secrets_within(text: str) -> None:
    assert "hunter2" not in Redactor().text(text)


@pytest.mark.parametrize(
    "text",
    [
        "the token is unknown or revoked; nodectl token create makes a new one",
        "http://127.0.0.1:8080/docs",
        "no credential named plant",
        "user@host asked",
        "TimedOut: no answer after 5 s",
    ],
)
def test_text_leaves_the_rest_as_it_is(text: str) -> None:
    assert Redactor().text(text) == text


class Hostile:
    """Can't be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


class Endless(Mapping[str, Any]):
    """Holds itself, and claims to be as long as one likes."""

    def __getitem__(self, key: str) -> Any:
        return self

    def __len__(self) -> int:
        return 10**9

    def __iter__(self) -> Any:
        number = 0
        while True:
            yield f"k{number}"
            number += 1


def cyclic() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    "value",
    [
        Hostile(), cyclic(), Endless(), float("nan"), float("inf"), 10**6000, b"\xff\x00", "\ud800", "a\nb\x1b[31m",
        {1: 2, None: 3, (4,): 5, Hostile(): 6}, "x" * 1_000_000, ["x" * 10_000] * 1000, {"k" * 10_000: 1},
        [[["y" * 500] * 90] * 90] * 90, bytearray(10), memoryview(b"abc"), object(), ValueError("x"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_line_is_bounded_json_of_one_line_whatever_is_put_in(value: Any) -> None:
    text = json.dumps(Redactor(["s3cr3t"]).line({"event": "x", "value": value, "more": value}), allow_nan=False)

    assert len(text) < 20 * MAX_TEXT
    assert json.loads(text)["event"] == "x"
    assert re.search(r"[\x00-\x1f]|(?<!\\)\\ud[89a-f]", text) is None


def test_line_keeps_its_event_whatever_else_there_is() -> None:
    line = Redactor().line({f"k{number}": "x" * 7000 for number in range(300)} | {"event": "what happened"})

    assert line["event"] == "what happened"


def test_text_that_is_cut_shows_both_ends() -> None:
    cut = Redactor().text("begin " + "x" * 50_000 + " end")

    assert (cut[:6], cut[-4:], len(cut) <= MAX_TEXT) == ("begin ", " end", True)


@given(WHOLE, st.dictionaries(TEXTS, VALUES, max_size=4), st.integers(0, 3))
def test_known_secret_appears_nowhere(secret: str, line: dict[str, Any], spelling: int) -> None:
    hidden = [secret, f"a{secret}b", secret.encode(), {secret: [secret]}][spelling]

    cleaned = Redactor([secret]).line({**line, "value": hidden, "event": f"with {hidden!r}"})

    assert secret not in json.dumps({key: cleaned[key] for key in ("value", "event")})


@given(st.dictionaries(TEXTS, VALUES, max_size=5))
def test_line_is_always_json(line: dict[str, Any]) -> None:
    text = json.dumps(Redactor(["hunter2hunter2"]).line(line), allow_nan=False)

    assert "\n" not in text
    json.loads(text)
