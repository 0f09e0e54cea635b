# SPDX-License-Identifier: GPL-3.0-or-later
"""Certificates in files: the dates as `cryptography` writes them, and bytes that are no certificate."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks import parse_check, run_checks
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks_certificate import (
    CertificateFormatError,
    Validity,
    parse_validity,
    read_first_certificate,
)
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import NameOID

NOW = datetime(2026, 6, 1, 12, 0, tzinfo=UTC)


def issue(not_before: datetime, not_after: datetime, key: Any = None, serial: int = 1) -> bytes:
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ünit " + "x" * 50)])
    builder = x509.CertificateBuilder(name, name, key.public_key(), serial, not_before, not_after)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(serialization.Encoding.DER)


def pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def look(path: Path, **raw: Any) -> dict[str, Any]:
    check = parse_check({"name": "x", "kind": "certificate", "path": str(path), **raw})
    checks: Any = run_checks([check], now=lambda: NOW)["checks"]
    return dict(checks[0])


@pytest.mark.parametrize(
    ("not_before", "not_after"),
    [
        pytest.param(datetime(2025, 1, 1, tzinfo=UTC), datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC), id="utc-time"),
        pytest.param(
            datetime(1950, 1, 1, tzinfo=UTC), datetime(2049, 12, 31, 23, 59, 59, tzinfo=UTC), id="utc-time-ends"
        ),
        pytest.param(
            datetime(2050, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC), id="generalized-time"
        ),
    ],
)
@pytest.mark.parametrize(
    "key",
    [
        pytest.param(ec.generate_private_key(ec.SECP256R1()), id="ec"),
        pytest.param(rsa.generate_private_key(65537, 2048), id="rsa"),
        pytest.param(ed25519.Ed25519PrivateKey.generate(), id="ed25519"),
    ],
)
def test_parse_validity_agrees_with_the_writer(key: Any, not_before: datetime, not_after: datetime) -> None:
    der = issue(not_before, not_after, key, serial=2**158 - 1)

    validity = parse_validity(der)

    assert validity == Validity(not_before, not_after)


def test_parse_validity_reads_version_1_without_a_version_field() -> None:
    der = issue(NOW, NOW + timedelta(days=1))
    # Take `a0 03 02 01 02` out and shorten both sequences by its 5 bytes.
    start = der.index(bytes.fromhex("a003020102"))
    outer, inner = int.from_bytes(der[2:4], "big") - 5, int.from_bytes(der[6:8], "big") - 5
    version_1 = (
        der[:2] + outer.to_bytes(2, "big") + der[4:6] + inner.to_bytes(2, "big") + der[8:start] + der[start + 5 :]
    )

    validity = parse_validity(version_1)

    assert validity == Validity(NOW, NOW + timedelta(days=1))


def test_parse_validity_refuses_every_cut() -> None:
    der = issue(NOW, NOW + timedelta(days=1))

    for length in range(len(der)):
        with pytest.raises(CertificateFormatError):
            parse_validity(der[:length])


def test_parse_validity_survives_damage() -> None:
    der = issue(NOW, NOW + timedelta(days=1))
    chance = random.Random(1)

    for _ in range(2000):
        damaged = bytearray(der)
        for _ in range(chance.randint(1, 8)):
            damaged[chance.randrange(200)] = chance.randrange(256)
        try:
            outcome: object = parse_validity(bytes(damaged))
        except CertificateFormatError as error:
            outcome = error

        assert isinstance(outcome, (Validity, CertificateFormatError))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x30",
        b"hello",
        b"-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----",
        b"\x30\x80\x00\x00",
        b"\x00" * 99,
    ],
    ids=["empty", "one-byte", "text", "empty-pem", "indefinite-length", "zeros"],
)
def test_read_first_certificate_refuses_what_is_none(content: bytes) -> None:
    with pytest.raises(CertificateFormatError):
        parse_validity(read_first_certificate(content))


def test_read_first_certificate_takes_the_servers_own_of_a_chain() -> None:
    own, authority = issue(NOW, NOW + timedelta(days=9)), issue(NOW, NOW + timedelta(days=900))
    content = b"-----BEGIN EC PRIVATE KEY-----\nAAAA\n-----END EC PRIVATE KEY-----\n" + pem(own) + pem(authority)

    assert read_first_certificate(content) == own


@pytest.mark.parametrize(
    ("left", "days", "expected"),
    [
        pytest.param(
            timedelta(days=14), 14, ("passed", "{} is valid until 2026-06-15, 14 more days"), id="exactly-enough"
        ),
        pytest.param(
            timedelta(days=14, seconds=-1),
            14,
            ("failed", "{} expires on 2026-06-15, in 14 days (limit 14): renew it"),
            id="a-second-short",
        ),
        pytest.param(timedelta(days=3), 2, ("passed", "{} is valid until 2026-06-04, 3 more days"), id="own-limit"),
        pytest.param(timedelta(days=-2), 0, ("failed", "{} expired 2 days ago, on 2026-05-30: renew it"), id="expired"),
    ],
)
@pytest.mark.parametrize("encode", [pem, bytes], ids=["pem", "der"])
def test_check_certificate_judges_a_file(
    tmp_path: Path, encode: Any, left: timedelta, days: int, expected: tuple[str, str]
) -> None:
    path = tmp_path / "server.crt"
    path.write_bytes(encode(issue(NOW - timedelta(days=30), NOW + left)))

    check = look(path, days=days)

    assert (check["state"], check["message"]) == (expected[0], expected[1].format(path))
    assert check["value"] == pytest.approx(left.total_seconds() / 86400, abs=0.06)


def test_check_certificate_fails_for_a_missing_file(tmp_path: Path) -> None:
    check = look(tmp_path / "none.pem")

    assert (check["state"], check["value"]) == ("failed", None)
    assert "does not exist" in check["message"]


def test_check_certificate_is_unknown_for_a_directory(tmp_path: Path) -> None:
    check = look(tmp_path)

    assert check["state"] == "unknown"
    assert "could not be read (Is a directory)" in check["message"]


def test_check_certificate_reads_a_bounded_part_of_an_endless_file() -> None:
    check = look(Path("/dev/zero"))

    assert check["state"] == "failed"
    assert "holds no certificate" in check["message"]
