# SPDX-License-Identifier: GPL-3.0-or-later
"""What all tables are made of: their metadata, times, numbers that count up, and the reference to a node."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, Column, Dialect, ForeignKey, Integer, MetaData, String, TypeDecorator

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC datetimes, kept as microseconds since 1970: the same bits and order on every engine."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        """Turn a datetime into microseconds; a naive one is a bug and raises."""
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Turn microseconds into a datetime."""
        return None if value is None else _EPOCH + value * _MICROSECOND


# SQLite numbers rows by itself only for INTEGER PRIMARY KEY.
Sequence = BigInteger().with_variant(Integer, "sqlite")

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def node_id_column(*, primary_key: bool = False) -> Column[str]:
    """Make the column of a table whose rows go with their node."""
    return Column(
        "node_id",
        String(253),
        ForeignKey("nodes.node_id", ondelete="CASCADE"),
        primary_key=primary_key,
        nullable=False,
    )
