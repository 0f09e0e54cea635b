# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a health check is: the typed form of each kind, and how it is read from the lists in node types.

Pure: imports the standard library and the vocabularies, looks at nothing. Runs on nodes with Python 3.8.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Callable, ClassVar, Dict, List, Mapping, Optional, Set, Tuple, Union
from urllib.parse import urlsplit

from ._words import CheckKind, CheckState, Severity

DEFAULT_TIMEOUT_SECONDS = 3.0
MAX_TIMEOUT_SECONDS = 300.0
MAX_NAME_CHARACTERS = 200
MAX_TEXT_CHARACTERS = 4096
MAX_ARGUMENTS = 100
MAX_MESSAGE_CHARACTERS = 300

# The characters of systemd.unit(5). Globs are left out on purpose: `systemctl show 'x*'` answers for several units.
_UNIT_NAME = re.compile(r"[A-Za-z0-9:_.\\@][A-Za-z0-9:_.\\@-]*")


class CheckFormatError(ValueError):
    """A check or threshold is not written the way docs/observations.md says."""


@dataclass(frozen=True)
class Finding:
    """What one look at the node found."""

    state: CheckState
    message: str
    value: Optional[float] = None
    unit: Optional[str] = None


@dataclass(frozen=True)
class _Common:
    """What every check has."""

    name: str
    severity: Severity
    timeout_seconds: float


@dataclass(frozen=True)
class TcpCheck(_Common):
    """A connection is accepted."""

    kind: ClassVar[CheckKind] = CheckKind.TCP
    host: str
    port: int


@dataclass(frozen=True)
class HttpCheck(_Common):
    """A request is answered as expected."""

    kind: ClassVar[CheckKind] = CheckKind.HTTP
    url: str
    expect_status: Tuple[int, ...]
    expect_text: Optional[str]
    verify_tls: bool


@dataclass(frozen=True)
class DnsCheck(_Common):
    """A name resolves."""

    kind: ClassVar[CheckKind] = CheckKind.DNS
    hostname: str


@dataclass(frozen=True)
class ServiceCheck(_Common):
    """A systemd unit is active."""

    kind: ClassVar[CheckKind] = CheckKind.SERVICE
    unit: str


@dataclass(frozen=True)
class ProcessCheck(_Common):
    """A process of that name runs."""

    kind: ClassVar[CheckKind] = CheckKind.PROCESS
    process: str


@dataclass(frozen=True)
class ContainerCheck(_Common):
    """A container of that name runs and is not unhealthy."""

    kind: ClassVar[CheckKind] = CheckKind.CONTAINER
    container: str


@dataclass(frozen=True)
class PortCheck(_Common):
    """Something listens on a port, on any local address."""

    kind: ClassVar[CheckKind] = CheckKind.PORT
    port: int
    protocol: str


@dataclass(frozen=True)
class FilesystemCheck(_Common):
    """A filesystem is mounted, writable and has room."""

    kind: ClassVar[CheckKind] = CheckKind.FILESYSTEM
    mount: str
    space_percent: float
    inodes_percent: float


@dataclass(frozen=True)
class CertificateCheck(_Common):
    """A certificate, in a file or shown by a server, stays valid long enough."""

    kind: ClassVar[CheckKind] = CheckKind.CERTIFICATE
    path: Optional[str]
    host: Optional[str]
    port: Optional[int]
    server_name: Optional[str]
    days: float


@dataclass(frozen=True)
class ClockCheck(_Common):
    """The clock is synchronised."""

    kind: ClassVar[CheckKind] = CheckKind.CLOCK
    max_offset_seconds: float


@dataclass(frozen=True)
class CommandCheck(_Common):
    """A command exits 0."""

    kind: ClassVar[CheckKind] = CheckKind.COMMAND
    argv: Tuple[str, ...]


Check = Union[
    TcpCheck,
    HttpCheck,
    DnsCheck,
    ServiceCheck,
    ProcessCheck,
    ContainerCheck,
    PortCheck,
    FilesystemCheck,
    CertificateCheck,
    ClockCheck,
    CommandCheck,
]


def parse_check(raw: Mapping[str, object]) -> Check:
    """Read one check as it is written in a node type.

    Errors: CheckFormatError naming the check, the key and what was expected; unknown keys are refused.
    Source: "How checks are written" in docs/observations.md.
    """
    fields = _Fields(raw)
    kind = fields.choice("kind", sorted(_READERS))
    common = (
        fields.text("name", most=MAX_NAME_CHARACTERS),
        Severity(fields.choice("severity", [word.value for word in Severity], Severity.CRITICAL.value)),
        fields.number("timeout_seconds", 0.01, MAX_TIMEOUT_SECONDS, DEFAULT_TIMEOUT_SECONDS),
    )
    check = _READERS[kind](fields, common)
    fields.refuse_unknown(kind)
    return check


def one_line(text: object, most: int = MAX_MESSAGE_CHARACTERS) -> str:
    """Make one printable line of at most *most* characters from text that a node or a server wrote."""
    # Cut first: a hostile text of megabytes is not worth going through.
    cut = str(text)[: most * 4]
    line = " ".join("".join(character if character.isprintable() else " " for character in cut).split())
    return line if len(line) <= most else line[: most - 1] + "…"


class _Fields:
    """The keys of one check, read one by one so that what nobody read can be refused."""

    def __init__(self, raw: Mapping[str, object]) -> None:
        if not isinstance(raw, Mapping):
            raise CheckFormatError(f"a check: expected a mapping, got {_shown(raw)}")
        self._raw = raw
        self._read: Set[object] = set()
        name = raw.get("name")
        self._where = f'check "{one_line(name, 80)}"' if isinstance(name, str) and name else "a check without a name"

    def refuse(self, key: str, expected: str) -> CheckFormatError:
        if key not in self._raw:
            # Often the key is there, misspelled.
            there = one_line(", ".join(str(word) for word in self._raw), 120)
            return CheckFormatError(
                f"{self._where}: {key}: is missing, expected {expected} (it has {there or 'no keys'})"
            )
        return CheckFormatError(f"{self._where}: {key}: expected {expected}, got {_shown(self._raw[key])}")

    def has(self, key: str) -> bool:
        # An optional key may be spelled with null: Ansible's `omit` and JSON writers both leave it so.
        self._read.add(key)
        return self._raw.get(key) is not None

    def text(self, key: str, default: Optional[str] = None, most: int = MAX_TEXT_CHARACTERS) -> str:
        if default is not None and not self.has(key):
            return default
        self._read.add(key)
        value = self._raw.get(key)
        if not isinstance(value, str) or not value.strip() or len(value) > most or not value.isprintable():
            raise self.refuse(key, f"a printable text of 1 to {most} characters")
        return value

    def choice(self, key: str, words: List[str], default: Optional[str] = None) -> str:
        if default is not None and not self.has(key):
            return default
        self._read.add(key)
        value = self._raw.get(key)
        if not isinstance(value, str) or value not in words:
            raise self.refuse(key, "one of " + ", ".join(words))
        return str(value)

    def integer(self, key: str, least: int, most: int) -> int:
        self._read.add(key)
        value = self._raw.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self.refuse(key, f"an integer from {least} to {most}")
        return value

    def number(self, key: str, least: float, most: float, default: float) -> float:
        if not self.has(key):
            return default
        value = self._raw[key]
        # The comparison also refuses NaN, and integers too long for a float.
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise self.refuse(key, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        if not self.has(key):
            return default
        value = self._raw[key]
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def sequence(self, key: str, expected: str, suits: Callable[[object], bool]) -> List[object]:
        self._read.add(key)
        value = self._raw.get(key)
        if not isinstance(value, (list, tuple)) or not value or not all(suits(item) for item in value):
            raise self.refuse(key, expected)
        return list(value)

    def refuse_unknown(self, kind: str) -> None:
        for key in self._raw:
            if key not in self._read:
                known = ", ".join(sorted(str(word) for word in self._read))
                raise CheckFormatError(f"{self._where}: {_shown(key)}: {kind} checks have no such key, only {known}")


_Head = Tuple[str, Severity, float]


def _read_tcp(fields: _Fields, head: _Head) -> Check:
    return TcpCheck(*head, host=fields.text("host", "127.0.0.1"), port=fields.integer("port", 1, 65535))


def _read_http(fields: _Fields, head: _Head) -> Check:
    statuses = [200]
    if fields.has("expect_status"):
        found = fields.sequence("expect_status", "a list of status codes from 100 to 599", _is_status)
        statuses = [status for status in found if isinstance(status, int)]
    return HttpCheck(
        *head,
        url=_read_url(fields),
        expect_status=tuple(statuses),
        expect_text=fields.text("expect_text") if fields.has("expect_text") else None,
        verify_tls=fields.flag("verify_tls", True),
    )


def _read_url(fields: _Fields) -> str:
    url = fields.text("url")
    expected = "an http:// or https:// URL of ASCII characters, without blanks, user or password"
    try:
        parts = urlsplit(url)
        usable = (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
        )
    except ValueError:
        usable = False
    # A blank or a line end in a request line would let the rest of the URL pass for headers.
    if not usable or not url.isascii() or " " in url:
        raise fields.refuse("url", expected)
    return url


def _read_dns(fields: _Fields, head: _Head) -> Check:
    return DnsCheck(*head, hostname=fields.text("hostname"))


def _read_service(fields: _Fields, head: _Head) -> Check:
    unit = fields.text("unit", most=255)
    if not _UNIT_NAME.fullmatch(unit):
        raise fields.refuse("unit", "the name of one systemd unit, without wildcards")
    return ServiceCheck(*head, unit=unit)


def _read_process(fields: _Fields, head: _Head) -> Check:
    return ProcessCheck(*head, process=fields.text("process"))


def _read_container(fields: _Fields, head: _Head) -> Check:
    return ContainerCheck(*head, container=fields.text("container").lstrip("/"))


def _read_port(fields: _Fields, head: _Head) -> Check:
    return PortCheck(
        *head, port=fields.integer("port", 1, 65535), protocol=fields.choice("protocol", ["tcp", "udp"], "tcp")
    )


def _read_filesystem(fields: _Fields, head: _Head) -> Check:
    mount = fields.text("mount")
    if not mount.startswith("/"):
        raise fields.refuse("mount", "an absolute path")
    return FilesystemCheck(
        *head,
        mount=mount,
        space_percent=fields.number("space_percent", 0.0, 100.0, 95.0),
        inodes_percent=fields.number("inodes_percent", 0.0, 100.0, 95.0),
    )


def _read_certificate(fields: _Fields, head: _Head) -> Check:
    from_file = fields.has("path")
    if from_file == fields.has("host"):
        raise fields.refuse("path", "either path, or host and port")
    if from_file and (fields.has("port") or fields.has("server_name")):
        raise fields.refuse("path", "no port and no server_name beside it")
    if from_file and not fields.text("path").startswith("/"):
        raise fields.refuse("path", "an absolute path")
    return CertificateCheck(
        *head,
        path=fields.text("path") if from_file else None,
        host=None if from_file else fields.text("host"),
        port=None if from_file else fields.integer("port", 1, 65535),
        server_name=fields.text("server_name") if fields.has("server_name") else None,
        days=fields.number("days", 0.0, 36500.0, 14.0),
    )


def _read_clock(fields: _Fields, head: _Head) -> Check:
    return ClockCheck(*head, max_offset_seconds=fields.number("max_offset_seconds", 0.0, 86400.0, 1.0))


def _read_command(fields: _Fields, head: _Head) -> Check:
    expected = f"a list of 1 to {MAX_ARGUMENTS} texts, the program first"
    argv = [str(item) for item in fields.sequence("argv", expected, _is_argument)]
    if len(argv) > MAX_ARGUMENTS or not argv[0]:
        raise fields.refuse("argv", expected)
    return CommandCheck(*head, argv=tuple(argv))


# `threshold` has no reader: thresholds are listed apart, by what they watch.
_READERS: Dict[str, Callable[[_Fields, _Head], Check]] = {
    "tcp": _read_tcp,
    "http": _read_http,
    "dns": _read_dns,
    "service": _read_service,
    "process": _read_process,
    "container": _read_container,
    "port": _read_port,
    "filesystem": _read_filesystem,
    "certificate": _read_certificate,
    "clock": _read_clock,
    "command": _read_command,
}


def _is_status(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 599


def _is_argument(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value and len(value) <= MAX_TEXT_CHARACTERS


def _shown(value: object) -> str:
    """Show a refused value with its type, short enough for one line of an error."""
    try:
        shown = one_line(repr(value), 60)
    except (ValueError, RecursionError):
        # An integer past sys.get_int_max_str_digits(), or a mapping nested thousands deep.
        shown = "a value too large to show"
    return f"{shown} ({type(value).__name__})"
