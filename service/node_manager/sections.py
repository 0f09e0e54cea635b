# SPDX-License-Identifier: GPL-3.0-or-later
"""What all sections of config.json are made of. Must not import anything of the service."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Port = Annotated[int, Field(ge=1, le=65535)]
PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# JSON has no paths: from text, and from nothing else.
FilePath = Annotated[Path, Field(strict=False)]


class Section(BaseModel):
    """One part of config.json: closed, frozen, and no guessing: "8080" is not a port."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
