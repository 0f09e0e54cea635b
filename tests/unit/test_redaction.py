# SPDX-License-Identifier: GPL-3.0-or-later
"""What may stand in a log line, and what never does."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from node_manager.redaction import MAX_TEXT, REDACTED, Redactor

PEM = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\nAAAA\n-----END OPENSSH PRIVATE KEY-----"
KEYS = [
    "password", "Password", "db_password", "sasl_password", "sasl_plain_username", "token", "admin_token", "secret",
    "client_secret", "authorization", "Authorization", "private_key", "privateKey", "cookie", "set-cookie", "api_key",
    "passphrase", "access-key",
]  # fmt: skip
PRINTABLE = st.text(
    st.sampled_from("@/\"\\+ é'%&") | st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"]),
    min_size=8,
    max_size=30,
).filter(lambda text: sum(character.isalnum() for character in text) > 5 and "redact" not in text)
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
        'body {\\"password\\": \\"hunter2 hunter2\\", \\"user\\": \\"me\\"}',
        json.dumps({"body": json.dumps({"body": json.dumps({"db_password": 'a "b\\" hunter2', "user": "me"})})}),
        'password: "correct horse hunter2',
        "password: 'correct\nhorse hunter2",
        'password: \\"correct horse hunter2',
        "Cookie: a=1; session=hunter2",
        'Cookie: a="1"; session=hunter2',
        "Set-Cookie: a=1; Path=/; session=hunter2",
        "{'cookie': 'a=1; session=hunter2', 'x': 1}",
        'Authorization: Digest username="me", realm="x", response="hunter2"',
        'Proxy-Authorization: "Digest" response="hunter2"',
        r"{\"authorization\": \"Digest username=\\\"me\\\", response=\\\"hunter2\\\"\"}",
        "sent Basic bWU6aHVudGVyMg==",
        "sent basic bWU6aHVudGVyMg",
        "postgresql://nodes:8080hunter2@db",
        "http://127.0.0.1:8080/x?y=postgres://nodes:hunter2@db",
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
    shown = Redactor().text(text)

    assert "hunter2" not in shown
    assert "aHVudGVyMg" not in shown


@pytest.mark.parametrize(
    "text",
    [
        "the token is unknown or revoked; nodectl token create makes a new one",
        "http://127.0.0.1:8080/docs",
        "http://127.0.0.1:8080/nodes/a@b",
        "http://[::1]:8080/nodes/a@b",
        '{"url":"http://127.0.0.1:8080","by":"a@b"}',
        "token_id=abc",
        "access_key_id: abc, token_name = 'b'",
        "private_key_file=/x/y",
        "secret_count=3",
        "tokenizer=fast",
        "the basic functions fail",
        "basic authentication, basic node-manager, basic read/write and basic OpenTelemetry",
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


def forms_of(secret: str) -> dict[str, str]:
    """Give what may have become of a secret on its way into the log."""
    url = sa.URL.create("postgresql", "nodes", secret, "db").render_as_string(hide_password=False)
    return {
        "plain": secret,
        "repr": repr(secret)[1:-1],
        "repr beside quotes": repr(f"'\"{secret}")[4:-1],
        "bytes": repr(secret.encode())[2:-1],
        "JSON": json.dumps(secret)[1:-1],
        "JSON in UTF-8": json.dumps(secret, ensure_ascii=False)[1:-1],
        "JSON in JSON": json.dumps(json.dumps(secret))[3:-3],
        "quoted": quote(secret),
        "quoted all": quote(secret, safe=""),
        "in a form": quote_plus(secret),
        "in a URL": url.removeprefix("postgresql://nodes:").removesuffix("@db"),
    }


@given(PRINTABLE, st.dictionaries(TEXTS, VALUES, max_size=4), st.data())
def test_known_secret_appears_nowhere(secret: str, line: dict[str, Any], data: st.DataObject) -> None:
    forms = forms_of(secret)
    form = forms[data.draw(st.sampled_from(sorted(forms)))]
    hidden = [form, f"a{form}b", form.encode(), {form: [form]}, [(form,)]]

    cleaned = Redactor([secret]).line(
        {
            **line,
            "value": hidden,
            "event": f"with {form}",
            "repr": f"{[secret, hidden]!r}",
            "json": json.dumps([secret]),
        }
    )

    shown = [text for key in ("value", "event", "repr", "json") for text in texts_in(cleaned[key])]
    assert [(name, text) for name, form in forms.items() for text in shown if form in text] == []


def texts_in(value: Any) -> Iterator[str]:
    """Give all texts in a value, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_in(key)
            yield from texts_in(item)
    else:
        for item in value:
            yield from texts_in(item)


UNITS = [
    "://", "://a:", "://a:b@", "a", "password", "password=", 'password:"', 'password=\\"', "\\", "\\\"", "-----BEGIN ",
    "-----BEGIN PRIVATE KEY-----", "bearer ", "basic ", "basic aaaaaaaa ", "nm_", "nm_aaaaaaaaaaaaaaaa", "Authorization: ",
    'authorization: digest a="b', "cookie: a=1; ", "token_", "token_id=", "token-", "token\n", "sasl_", " ", "\n", '"', "'", "=",
]  # fmt: skip
BEGINNINGS = [
    "",
    "password=",
    'password: "',
    '{\\"password\\": \\"',
    "Authorization: ",
    "://a:",
    "basic ",
    "nm_",
    "-----BEGIN PRIVATE KEY-----",
]


@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_time_grows_no_faster_than_the_text(beginning: str) -> None:
    redactor = Redactor(["s3cr3t"])
    for unit in UNITS:
        text = (beginning + unit * 100_000)[:99_999]
        begun = time.process_time()
        redactor.text(text)
        # Some 10 ms; with a pattern that begins anew at each character it is 4 s.
        assert time.process_time() - begun < 1, unit


@given(st.dictionaries(TEXTS, VALUES, max_size=5))
def test_line_is_always_json(line: dict[str, Any]) -> None:
    text = json.dumps(Redactor(["hunter2hunter2"]).line(line), allow_nan=False)

    assert "\n" not in text
    json.loads(text)
