# SPDX-License-Identifier: GPL-3.0-or-later
"""What a piece of work asks for: amounts of the common resources, and units of devices, whole or shared.

Pure: JSON in and out, sums on integers. Units stand in the names of the common classes; devices are counted, a share of one is
in thousandths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, WrapValidator

from node_manager.domain import Resource

WHOLE_MILLI = 1000
MAX_AMOUNT = 10**12
MAX_UNITS = 256
COMMON = frozenset(resource.value for resource in Resource)
RESOURCE_PATTERN = r"^[a-z][a-z0-9_]{0,62}$"

ResourceName = Annotated[str, Field(pattern=RESOURCE_PATTERN)]


class DeviceShare(BaseModel):
    """Units of a device class, each whole or only a share of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    count: int = Field(1, ge=1, le=MAX_UNITS, description="Units")
    share_milli: int = Field(
        WHOLE_MILLI, ge=1, le=WHOLE_MILLI, description="Thousandths of each unit; 1000 is all of it"
    )


Amount = Annotated[int, Field(strict=True, ge=1, le=MAX_AMOUNT)]
_AMOUNT: TypeAdapter[int] = TypeAdapter(Amount)


def _read_wanted(value: Any) -> int | DeviceShare:
    if type(value) is int and 1 <= value <= MAX_AMOUNT:
        # Nearly all are that; the adapter takes ten times as long to say so.
        return value
    # By what it looks like: a union would complain of both forms, under names of its own making.
    if isinstance(value, dict | DeviceShare):
        return DeviceShare.model_validate(value)
    return _AMOUNT.validate_python(value)


def _check_resources(resources: dict[str, int | DeviceShare]) -> dict[str, int | DeviceShare]:
    for name, wanted in resources.items():
        if name in COMMON and not isinstance(wanted, int):
            raise ValueError(f"{name}: expected a whole number; only devices can be shared")
        if name not in COMMON and isinstance(wanted, int) and wanted > MAX_UNITS:
            raise ValueError(f"{name}: expected at most {MAX_UNITS} units")
    return resources


Resources = Annotated[
    dict[ResourceName, Annotated[Amount | DeviceShare, WrapValidator(lambda value, _: _read_wanted(value))]],
    Field(
        min_length=1,
        max_length=32,
        description="Amount per resource class; of devices a number of units, or {count, share_milli}",
        examples=[{"cpu_millicores": 500, "memory_mib": 256}],
    ),
    AfterValidator(_check_resources),
]


@dataclass(frozen=True, slots=True, order=True)
class Ask:
    """What one replica needs, in a canonical order, so that equal needs are equal and hash alike.

    Shapes: amounts (class, amount) of the common classes; devices (class, units, thousandths of each).
    """

    amounts: tuple[tuple[str, int], ...]
    devices: tuple[tuple[str, int, int], ...] = ()

    @property
    def classes(self) -> frozenset[str]:
        """Name the resource classes that are asked for."""
        return frozenset([*(name for name, _ in self.amounts), *(name for name, _, _ in self.devices)])


def ask_of(resources: Mapping[str, int | DeviceShare | Mapping[str, int]]) -> Ask:
    """Read what was validated (or stored) as Resources."""
    amounts, devices = [], []
    for name, wanted in sorted(resources.items()):
        if name in COMMON:
            assert isinstance(wanted, int)
            amounts.append((name, wanted))
        elif isinstance(wanted, int):
            devices.append((name, wanted, WHOLE_MILLI))
        elif isinstance(wanted, DeviceShare):
            devices.append((name, wanted.count, wanted.share_milli))
        else:
            devices.append((name, wanted["count"], wanted["share_milli"]))
    return Ask(tuple(amounts), tuple(devices))


def as_data(ask: Ask) -> dict[str, Any]:
    """Write an ask as JSON in its one canonical form: a plain number for whole units."""
    data: dict[str, Any] = dict(ask.amounts)
    for name, count, share in ask.devices:
        data[name] = count if share == WHOLE_MILLI else {"count": count, "share_milli": share}
    return data


def in_thousandths(ask: Ask, times: int = 1) -> dict[str, int]:
    """Count an ask per class: amounts as they are, devices in thousandths of a unit."""
    return {
        **{name: amount * times for name, amount in ask.amounts},
        **{name: count * share * times for name, count, share in ask.devices},
    }


def add_to(total: dict[str, int], counted: Mapping[str, int], sign: int = 1) -> None:
    """Add (or, with sign -1, take away) what in_thousandths counted; a class that comes to nothing is left out."""
    for name, amount in counted.items():
        value = total.get(name, 0) + sign * amount
        if value:
            total[name] = value
        else:
            total.pop(name, None)


def shown(counted: Mapping[str, int]) -> dict[str, float | int]:
    """Show what in_thousandths counted: devices in units, with at most three decimals."""
    found: dict[str, float | int] = {}
    for name, amount in sorted(counted.items()):
        if name in COMMON:
            found[name] = amount
        else:
            found[name] = amount / WHOLE_MILLI if amount % WHOLE_MILLI else amount // WHOLE_MILLI
    return found
