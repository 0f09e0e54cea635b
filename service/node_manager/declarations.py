# SPDX-License-Identifier: GPL-3.0-or-later
"""What may be said about a node, and the rules it must keep before anything is stored.

Everything here is hostile until it has passed these models: text goes to inventories and command lines later. Imports
the vocabulary only.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from node_manager.domain import Admin

_DNS_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
NODE_ID_PATTERN = rf"^{_DNS_LABEL}(?:\.{_DNS_LABEL})*$"
# (?a): without it, ignoring case lets U+017F and U+212A pass for s and k.
_HOSTNAME = re.compile(rf"(?ai){_DNS_LABEL}(?:\.{_DNS_LABEL})*\.?")
# The zone of a link-local IPv6 address is an interface's name; ipaddress takes any text for one.
_IPV6_ZONE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
_NODE_ID = re.compile(NODE_ID_PATTERN.removeprefix("^").removesuffix("$"))
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LABEL_KEY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_./-]{0,61}[A-Za-z0-9])?")
_HOST_KEY = re.compile(
    r"(?:ssh-(?:ed25519|rsa)|ecdsa-sha2-nistp(?:256|384|521)|sk-[a-z0-9@.-]+) [A-Za-z0-9+/]{40,2000}={0,2}"
)
# Names that Ansible or our own groups give another meaning to.
RESERVED_NODE_IDS = frozenset(
    {"all", "ungrouped", "localhost", "127.0.0.1", "online", "offline", "maintenance", "schedulable", "quarantined"}
)


def _check_node_id(value: str) -> str:
    if len(value) > 253 or not _NODE_ID.fullmatch(value):
        raise ValueError(
            "expected 1 to 253 lower-case letters, digits, hyphens and dots, each part of at most 63, starting and "
            "ending with a letter or digit (RFC 1123), for example gw-7 or gw-7.plant-2"
        )
    if value in RESERVED_NODE_IDS:
        raise ValueError(f"{value} is the name of an inventory group or host with a meaning of its own; choose another")
    return value


def _check_address(value: str) -> str:
    try:
        parsed = ipaddress.ip_address(value)
    except ValueError:
        pass
    else:
        zone = parsed.scope_id if isinstance(parsed, ipaddress.IPv6Address) else None
        if zone is not None and not _IPV6_ZONE.fullmatch(zone):
            raise ValueError("expected the name of a network interface after %, for example fe80::7%eth0")
        return str(parsed)
    last = value.rstrip(".").rpartition(".")[2]
    if len(value) > 253 or not _HOSTNAME.fullmatch(value) or last.isdigit():
        raise ValueError(
            "expected an IPv4 or IPv6 address or a host name (RFC 1123), for example 192.0.2.7 or gw-7.example.net"
        )
    return value.lower()


def _check_text(value: str) -> str:
    if _CONTROL.search(value):
        raise ValueError("expected text without control characters or line breaks")
    return value


def _check_labels(value: dict[str, str]) -> dict[str, str]:
    for key in value:
        if not _LABEL_KEY.fullmatch(key) or key.lower().startswith("ansible_"):
            raise ValueError(
                f"label {key[:80]!r}: expected a key of 1 to 63 letters, digits, '_', '.', '/', '-', "
                "not starting with ansible_"
            )
    return value


def parse_host_key(value: str) -> str:
    """Read one public host key and drop its comment.

    Errors: ValueError if it isn't one line with a key of the kind it names.
    """
    # The comment at the end of a public key line says nothing about the key.
    key = " ".join(_check_text(value.strip()).split()[:2])
    if not _HOST_KEY.fullmatch(key) or not _encodes_its_kind(*key.split()):
        raise ValueError("expected a public host key as in /etc/ssh/ssh_host_ed25519_key.pub: 'ssh-ed25519 AAAA...'")
    return key


def is_node_id(value: str) -> bool:
    """Tell whether *value* can be the id of a node."""
    try:
        return _check_node_id(value) == value
    except ValueError:
        return False


def _encodes_its_kind(kind: str, encoded: str) -> bool:
    """Tell whether the key itself says that it is of *kind*."""
    # RFC 4253, section 6.6: the first field is the kind, after four bytes of length.
    try:
        blob = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        return False
    return blob.startswith(len(kind).to_bytes(4, "big") + kind.encode())


def _check_resource_name(value: str) -> str:
    if value.startswith("ansible_"):
        raise ValueError("Ansible variables are not taken; expected the name of a resource class")
    return value


NodeId = Annotated[
    str,
    AfterValidator(_check_node_id),
    Field(examples=["gw-7"], json_schema_extra={"pattern": NODE_ID_PATTERN, "maxLength": 253, "minLength": 1}),
]
Address = Annotated[str, Field(min_length=1, max_length=253), AfterValidator(_check_address)]
ShortText = Annotated[str, Field(min_length=1, max_length=255), AfterValidator(_check_text)]
PlaceName = Annotated[str, Field(min_length=1, max_length=63), AfterValidator(_check_text)]
ResourceName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$"), AfterValidator(_check_resource_name)]


class Declaration(BaseModel):
    """One part of what is declared: closed, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Location(Declaration):
    """Where a node stands."""

    region: PlaceName | None = Field(None, description="Largest unit, for example eu", examples=["eu"])
    zone: PlaceName | None = Field(None, description="Failure domain within the region", examples=["eu-1a"])
    site: PlaceName | None = Field(
        None, description="Building or plant: nodes that fail together", examples=["plant-2"]
    )
    latitude: float | None = Field(None, ge=-90, le=90, description="Degrees north")
    longitude: float | None = Field(None, ge=-180, le=180, description="Degrees east")

    @model_validator(mode="after")
    def _both_or_none(self) -> Location:
        if (self.latitude is None) != (self.longitude is None):
            raise ValueError("expected latitude and longitude together")
        return self


class Connection(Declaration):
    """How a node is reached: an allow-list, so that nothing declared can change what runs on the manager."""

    kind: Literal["ssh", "local"] = Field(
        "ssh", description="local is the manager's own machine, set by its command line only"
    )
    user: str | None = Field(
        None, pattern=r"^[A-Za-z_][A-Za-z0-9_.-]{0,31}$", description="Login name", examples=["manager"]
    )
    port: int | None = Field(None, ge=1, le=65535, description="SSH port")
    become: bool = Field(False, description="Use sudo for what needs root")
    credential: str | None = Field(
        None, pattern=r"^[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?$", description="Name of a credential in config.json"
    )
    jump_host: NodeId | None = Field(None, description="node_id of the node to connect through")


class NodeChange(Declaration):
    """All that can be declared about a node, without its id: the body of an update."""

    name: ShortText | None = Field(
        None, description="For people; the node_id where left out", examples=["Gateway hall 7"]
    )
    address: Address = Field(description="IP address or host name", examples=["192.0.2.7"])
    node_type: str | None = Field(
        None,
        pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$",
        description="A type of node_types.json; recognised from facts where left out",
        examples=["edge-gateway"],
    )
    labels: Annotated[
        dict[str, Annotated[str, Field(max_length=255), AfterValidator(_check_text)]],
        Field(max_length=64),
        AfterValidator(_check_labels),
    ] = Field(default_factory=dict, description="Free key-value pairs", examples=[{"line": "a"}])
    location: Location = Field(default_factory=Location, description="Where it stands")
    connection: Connection = Field(default_factory=Connection, description="How it is reached")
    capacity: dict[ResourceName, Annotated[int, Field(ge=0, le=2**53)]] = Field(
        default_factory=dict,
        max_length=64,
        description="What replaces the observed capacity, per resource class",
        examples=[{"disk_mib": 20000}],
    )
    admin: Annotated[Admin | None, BeforeValidator(lambda value: Admin(value) if value in list(Admin) else value)] = (
        Field(None, description="Whether it takes part; active at first, unchanged where left out")
    )
    host_keys: list[Annotated[str, Field(max_length=4096), AfterValidator(parse_host_key)]] = Field(
        default_factory=list, max_length=16, description="Pinned public SSH host keys; the first seen where left out"
    )


class NodeDeclaration(NodeChange):
    """A node as somebody declares it: the body of a registration."""

    node_id: NodeId = Field(description="The inventory host name; lower case, RFC 1123")
