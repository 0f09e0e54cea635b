# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""How long a certificate stays valid.

Reads one file, or asks one TLS server through `_checks_net`. The dates are taken from the DER by a few lines of our
own: the standard library shows them only for certificates that it has verified, and expired ones are what we look for.
Runs on nodes with Python 3.8.
"""

from __future__ import annotations

import base64
import binascii
import re
import socket
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Tuple

from ._checks_deadline import OutOfTimeError
from ._checks_net import explain, fetch_certificate, format_place
from ._checks_spec import CertificateCheck, Finding, one_line
from ._words import CheckState

MAX_FILE_BYTES = 1 << 20

_SEQUENCE, _UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x30, 0x17, 0x18, 0xA0
_PEM = re.compile(rb"-----BEGIN (?:X509 |TRUSTED )?CERTIFICATE-----(.*?)-----END ", re.DOTALL)


class CertificateFormatError(ValueError):
    """The bytes are not an X.509 certificate."""


@dataclass(frozen=True)
class Validity:
    """From when until when a certificate is valid."""

    not_before: datetime
    not_after: datetime


def check_certificate(check: CertificateCheck, deadline: float, now: datetime) -> Finding:
    """See how many days a certificate is still valid; *deadline* is a time.monotonic() value."""
    if check.path is not None:
        subject = one_line(check.path, 150)
        try:
            with open(check.path, "rb") as file:
                der = read_first_certificate(file.read(MAX_FILE_BYTES))
            return judge_validity(subject, parse_validity(der), check.days, now)
        except FileNotFoundError:
            return Finding(CheckState.FAILED, f"{subject} does not exist: issue the certificate or correct the path")
        except OSError as error:
            return Finding(CheckState.UNKNOWN, f"{subject} could not be read ({error.strerror}): run with become")
        except CertificateFormatError as error:
            return Finding(CheckState.FAILED, f"{subject} holds no certificate that can be read: {error}")
    if check.host is None or check.port is None:
        raise AssertionError("parse_check lets no certificate check through without path, or host and port")
    subject = f"the certificate of {format_place(check.host, check.port)}"
    try:
        der = fetch_certificate(check.host, check.port, check.server_name, deadline)
        return judge_validity(subject, parse_validity(der), check.days, now)
    except socket.timeout:
        raise OutOfTimeError from None
    except (OSError, UnicodeError) as error:
        # Whether the server is up is for a tcp or http check to say.
        return Finding(CheckState.UNKNOWN, f"{format_place(check.host, check.port)} {explain(error)}")
    except ValueError as error:
        return Finding(CheckState.FAILED, f"{subject} could not be read: {error}")


def judge_validity(subject: str, validity: Validity, days: float, now: datetime) -> Finding:
    """Decide whether a certificate stays valid long enough; the value is the days that are left."""
    left = round((validity.not_after - now).total_seconds() / 86400, 1)
    until = f"{validity.not_after:%Y-%m-%d}"
    if validity.not_before > now:
        message = f"{subject} is valid only from {validity.not_before:%Y-%m-%d %H:%M} UTC on: see the node's clock"
        return Finding(CheckState.FAILED, message, left, "days")
    if validity.not_after <= now:
        return Finding(CheckState.FAILED, f"{subject} expired {-left:g} days ago, on {until}: renew it", left, "days")
    if (validity.not_after - now).total_seconds() < days * 86400:
        message = f"{subject} expires on {until}, in {left:g} days (limit {days:g}): renew it"
        return Finding(CheckState.FAILED, message, left, "days")
    return Finding(CheckState.PASSED, f"{subject} is valid until {until}, {left:g} more days", left, "days")


def read_first_certificate(content: bytes) -> bytes:
    """Find the first certificate in a PEM or DER file, as DER; in a chain that is the server's own (RFC 8446, 4.4.2).

    Errors: CertificateFormatError if there is none.
    """
    block = _PEM.search(content)
    if block:
        try:
            return base64.b64decode(block.group(1), validate=False)
        except binascii.Error as error:
            raise CertificateFormatError("its PEM block is damaged") from error
    if content[:1] == bytes([_SEQUENCE]):
        return content
    raise CertificateFormatError("it has no CERTIFICATE block")


# 30 82 01 8f 30 82 01 35 a0 03 02 01 02 02 14 ...                   Certificate, TBSCertificate, version, serialNumber
# 30 1e 17 0d 3235303130313030303030305a 17 0d 3236303130313030303030305a     Validity "250101000000Z" "260101000000Z"
def parse_validity(der: bytes) -> Validity:
    """Read from when until when a certificate is valid.

    Shapes: *der* is one DER certificate; bytes after it are ignored.
    Errors: CertificateFormatError if it is damaged or something else.
    Source: RFC 5280, 4.1 (structure) and 4.1.2.5 (times).
    """
    at = _enter_sequence(der, _enter_sequence(der, 0))
    tag, _start, _end = _read_element(der, at)
    # version (only if not 1), serialNumber, signature, issuer, then validity.
    for _field in range(4 if tag == _VERSION else 3):
        _tag, _start, at = _read_element(der, at)
    at = _enter_sequence(der, at)
    not_before, at = _read_time(der, at)
    not_after, _at = _read_time(der, at)
    return Validity(not_before, not_after)


def _enter_sequence(der: bytes, at: int) -> int:
    tag, start, _end = _read_element(der, at)
    if tag != _SEQUENCE:
        raise CertificateFormatError(f"a sequence is missing at byte {at}")
    return start


def _read_element(der: bytes, at: int) -> Tuple[int, int, int]:
    """Read one tag and length: the tag, where the content starts, and where it ends."""
    head = der[at : at + 2]
    if len(head) < 2:
        raise CertificateFormatError("it is cut short")
    tag, length, start = head[0], head[1], at + 2
    if length & 0x80:
        size = length & 0x7F
        # 0 is BER's indefinite length, which DER forbids; 4 bytes say more than any file we read.
        if not 1 <= size <= 4:
            raise CertificateFormatError(f"a length at byte {at} is out of range")
        length = int.from_bytes(der[start : start + size], "big")
        start += size
    if start + length > len(der):
        raise CertificateFormatError("it is cut short")
    return tag, start, start + length


def _read_time(der: bytes, at: int) -> Tuple[datetime, int]:
    tag, start, end = _read_element(der, at)
    text = der[start:end].decode("ascii", "replace")
    if tag == _UTC_TIME:
        # Two-digit years are 1950 to 2049 here; strptime would say 1969 to 2068.
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise CertificateFormatError(f"a time is missing at byte {at}")
    if not re.fullmatch(r"[0-9]{14}Z", text):
        raise CertificateFormatError(f"a time is written as {text[:40]!r}")
    try:
        parts = [int(text[:4])] + [int(text[place : place + 2]) for place in range(4, 14, 2)]
        return datetime(parts[0], parts[1], parts[2], parts[3], parts[4], parts[5], tzinfo=timezone.utc), end
    except ValueError as error:
        raise CertificateFormatError(f"a time is written as {text[:40]!r}") from error
