# SPDX-License-Identifier: GPL-3.0-or-later
"""What an operator may say about a node's status, by HTTP or by command. Imports the vocabulary only."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from node_manager.domain import Admin

# A month: longer is a mistake of units.
MAX_DEADLINE_SECONDS = 31 * 86400


def text_only(value: Any) -> Any:
    """Refuse numbers, which pydantic would read as seconds since 1970."""
    if not isinstance(value, str):
        raise ValueError("expected a time as in RFC 3339, such as 2026-11-22T18:00:00Z")
    return value


def storable(value: str) -> str:
    """Refuse what PostgreSQL has no text for."""
    if "\x00" in value:
        raise ValueError("expected text without NUL")
    return value


def _settable(value: Any) -> Any:
    settable = [admin for admin in Admin if admin is not Admin.DRAINING]
    if value not in settable:
        raise ValueError(f"expected one of {', '.join(settable)}")
    return value


class StatusIn(BaseModel):
    """What an operator says about a node."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: Annotated[Admin, BeforeValidator(_settable)] = Field(
        description="active, cordoned, maintenance or offline", examples=["maintenance"]
    )
    drain: bool = Field(
        False,
        strict=True,
        description="Empty the node first; with maintenance, or with cordoned as `kubectl drain` does",
        examples=[True],
    )
    deadline_seconds: Annotated[float, Field(strict=True, gt=0, le=MAX_DEADLINE_SECONDS)] | None = Field(
        None, description="End the drain after this time, whatever is still there; left out: wait", examples=[3600]
    )
    reason: Annotated[str, AfterValidator(storable)] = Field(
        "", max_length=255, description="Why, for the record", examples=["new disk"]
    )
    until: Annotated[AwareDatetime, BeforeValidator(text_only)] | None = Field(
        None, description="From then on the node leaves maintenance by itself, once its check passes"
    )
    keep_cordon: bool | None = Field(
        None,
        strict=True,
        description="Cordon the node when it leaves maintenance; left out: if it was cordoned before",
    )
    force: bool = Field(
        False,
        strict=True,
        description="With active: leave at once, without a check. With maintenance: take over from another operator",
    )
