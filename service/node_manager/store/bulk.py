# SPDX-License-Identifier: GPL-3.0-or-later
"""Many rows or values in one statement, past what SQLAlchemy does for each of them.

Its way of binding costs more than SQLite needs to write a row, and a list of values makes a text of its own for each length.
SQLite takes the rows one by one and the values as JSON, PostgreSQL both as arrays, in one round trip.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from node_manager.store.documents import write_json

Row = tuple[Any, ...]


class TextList(sa.TypeDecorator[Collection[str]]):
    """Texts as one parameter."""

    impl = sa.Text
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        """Choose what the engine has for it."""
        return dialect.type_descriptor(postgresql.ARRAY(sa.Text) if dialect.name == "postgresql" else sa.Text())

    def process_bind_param(self, value: Collection[str] | None, dialect: sa.Dialect) -> Any:
        """Bring the texts into the engine's shape."""
        found = list(value or ())
        return found if dialect.name == "postgresql" else write_json(found)


class _Listed(FunctionElement[str]):
    name = "listed"
    type = sa.Text()
    inherit_cache = True


def is_one_of(column: sa.ColumnElement[Any], parameter: str) -> sa.ColumnElement[bool]:
    """Tell whether a column is one of the texts that a parameter brings: one statement, however many there are."""
    return column.op("IN", is_comparison=True)(_Listed(sa.bindparam(parameter, type_=TextList)))


@compiles(_Listed, "sqlite")
def _listed_sqlite(element: _Listed, compiler: SQLCompiler, **kw: Any) -> str:
    return f"(SELECT value FROM json_each{compiler.process(element.clause_expr, **kw)})"  # noqa: S608  # a mark


@compiles(_Listed, "postgresql")
def _listed_postgresql(element: _Listed, compiler: SQLCompiler, **kw: Any) -> str:
    return f"(SELECT unnest{compiler.process(element.clause_expr, **kw)})"


class BulkInsert:
    """Insert rows, given as tuples of the named columns; *conflict*, by dialect, says what becomes of those that are there."""

    def __init__(self, table: sa.Table, *names: str, conflict: Mapping[str, str] | None = None) -> None:
        self._columns = [table.c[name] for name in names]
        listed = ", ".join(names)
        marks = ", ".join("?" for _ in names)
        self._texts = {
            "sqlite": f"INSERT INTO {table.name} ({listed}) VALUES ({marks})",  # noqa: S608  # names of ours
            "postgresql": f"INSERT INTO {table.name} ({listed}) SELECT * FROM {_unnested(self._columns)}",  # noqa: S608
        }
        for dialect, clause in (conflict or {}).items():
            self._texts[dialect] += f" {clause}"

    def __call__(self, connection: sa.Connection, rows: Sequence[Row]) -> None:
        """Insert them; none does no harm."""
        if rows:
            _execute(connection, self._texts, self._columns, rows)


class BulkUpdate:
    """Update rows, given as tuples: first the new values of the named columns, then what finds the row."""

    def __init__(self, table: sa.Table, values: Sequence[str], keys: Sequence[str]) -> None:
        self._columns = [table.c[name] for name in (*values, *keys)]
        new = [f"new_{number}" for number in range(len(self._columns))]
        marked = ", ".join(f"{name} = ?" for name in values)
        found = " AND ".join(f"{name} = ?" for name in keys)
        assigned = ", ".join(f"{name} = {source}" for name, source in zip(values, new, strict=False))
        matched = " AND ".join(
            f"{table.name}.{name} = {source}" for name, source in zip(keys, new[len(values) :], strict=True)
        )
        given = f"{_unnested(self._columns)} AS given ({', '.join(new)})"
        self._texts = {
            "sqlite": f"UPDATE {table.name} SET {marked} WHERE {found}",  # noqa: S608  # names of ours
            "postgresql": f"UPDATE {table.name} SET {assigned} FROM {given} WHERE {matched}",  # noqa: S608
        }

    def __call__(self, connection: sa.Connection, rows: Sequence[Row]) -> int:
        """Update them; give how many were found."""
        return _execute(connection, self._texts, self._columns, rows) if rows else 0


def _unnested(columns: Sequence[sa.Column[Any]]) -> str:
    types = [column.type.compile(postgresql.dialect()) for column in columns]  # type: ignore[no-untyped-call]
    return f"unnest({', '.join(f'%s::{name}[]' for name in types)})"


def _execute(
    connection: sa.Connection, texts: dict[str, str], columns: Sequence[sa.Column[Any]], rows: Sequence[Row]
) -> int:
    dialect = connection.dialect
    bound = [
        values if process is None else [process(value) for value in values]
        for values, process in zip(
            zip(*rows, strict=True), (_processor_of(column, dialect) for column in columns), strict=True
        )
    ]
    if dialect.name == "sqlite":
        return connection.exec_driver_sql(texts["sqlite"], list(zip(*bound, strict=True))).rowcount
    return connection.exec_driver_sql(texts["postgresql"], tuple(list(values) for values in bound)).rowcount


def _processor_of(column: sa.Column[Any], dialect: sa.Dialect) -> Callable[[Any], Any] | None:
    if isinstance(column.type, sa.JSON):
        return write_json
    # Bound to the statement, so to say: a type knows how its values are given to the driver.
    processor: Callable[[Any], Any] | None = column.type.dialect_impl(dialect).bind_processor(dialect)
    return processor
