# SPDX-License-Identifier: GPL-3.0-or-later
"""Bring a database to the schema of this version; safe when several processes start at once."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

# The newest migration; a test holds the two equal. Named here so that a start on a current database needs no alembic.
HEAD = "0005"
_LOCK_KEY = 0x6E6F6465  # "node"; any number that nothing else in the database uses


class NewerSchemaError(Exception):
    """The database was written by a later version of the manager, which this one must not touch."""


def upgrade(engine: sa.Engine) -> None:
    """Apply the migrations that *engine*'s database lacks, in one transaction.

    Errors: NewerSchemaError.
    """
    current = _current(engine)
    if current == HEAD:
        return
    if current is not None and current > HEAD:
        raise NewerSchemaError(
            f"the store has schema {current}, this version knows {HEAD}: it was used by a later version; install that one"
        )
    from alembic import command  # noqa: PLC0415  # loading alembic costs 0.15 s that only a migration should pay
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _current(engine: sa.Engine) -> str | None:
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        version: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
        return version
