# SPDX-License-Identifier: GPL-3.0-or-later
"""Many rows in one statement come out as SQLAlchemy would have written them, on either engine."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
import sqlalchemy as sa
from node_manager.store import Store, tables
from node_manager.store.bulk import BulkInsert, BulkUpdate, is_one_of
from node_manager.store.documents import JsonText
from sqlalchemy.exc import IntegrityError
from stored import Rows

AT = datetime(2026, 5, 1, 12, 0, 0, 123456, UTC)
NAMES = ("deployment_id", "owner", "request", "decision_id", "weights", "created_at")
INSERT = BulkInsert(tables.deployments, *NAMES)
INSERT_JOBS = BulkInsert(tables.jobs, "job_id", "action", "state", "requested_by", "variables", "message", "created_at")
UPDATE = BulkUpdate(tables.owners, ("used", "version"), ("owner", "version"))
ODD = "'\"\\{},% %s :x ? ä\u2028"


def rows_of(*names: str) -> list[tuple[object, ...]]:
    """Make deployments."""
    return [(name, "t", {"name": name, "odd": [ODD, None, 0.1, 1e300]}, "d", JsonText('{"a":1}'), AT) for name in names]


def test_insert_writes_what_sqlalchemy_writes(store: Store, rows: Rows) -> None:
    given = rows_of("a", ODD, "c")

    with store.write() as connection:
        INSERT(connection, given)
        found = [tuple(row) for row in connection.execute(sa.select(tables.deployments))]
        texts = connection.scalars(sa.select(sa.cast(tables.deployments.c.request, sa.Text))).all()
        connection.execute(tables.deployments.delete())
        named = [dict(zip(NAMES, row, strict=True)) for row in given]
        connection.execute(tables.deployments.insert(), [{**row, "weights": {"a": 1}} for row in named])
        expected = [tuple(row) for row in connection.execute(sa.select(tables.deployments))]
        expected_texts = connection.scalars(sa.select(sa.cast(tables.deployments.c.request, sa.Text))).all()

    assert found == expected
    assert texts == expected_texts
    assert len(rows.of(tables.deployments)) == 3


def test_insert_keeps_nothing_nothing(store: Store, rows: Rows) -> None:
    with store.write() as connection:
        INSERT_JOBS(
            connection, [("1", "check", "queued", "t", {}, None, AT), ("2", "check", "queued", "t", {}, "told", AT)]
        )

    assert [row["message"] for row in rows.of(tables.jobs)] == [None, "told"]
    assert [row["created_at"] for row in rows.of(tables.jobs)] == [AT, AT]


def test_insert_numbers_rows_in_their_order(store: Store, rows: Rows) -> None:
    names = [str(number) for number in range(300)]

    with store.write() as connection:
        INSERT_JOBS(connection, [(name, "check", "queued", "t", {}, None, AT) for name in names])

    assert [row["job_id"] for row in rows.of(tables.jobs)] == names


def test_insert_of_one_that_is_there_fails_as_a_whole(store: Store, rows: Rows) -> None:
    with pytest.raises(IntegrityError), store.write() as connection:
        INSERT(connection, rows_of("a", "b", "a"))

    assert rows.of(tables.deployments) == []


def test_insert_of_none_does_nothing(store: Store) -> None:
    with store.write() as connection:
        INSERT(connection, [])

        assert UPDATE(connection, []) == 0


def test_update_counts_what_it_found(store: Store, rows: Rows) -> None:
    with store.write() as connection:
        connection.execute(
            tables.owners.insert(), [{"owner": name, "used": {}, "version": 1} for name in ("a", "b", "c")]
        )

        found = UPDATE(connection, [({"cpu": 1}, 2, "a", 1), ({"cpu": 2}, 3, "b", 2), ({"cpu": 3}, 2, "gone", 1)])

    assert found == 1
    assert [(row["owner"], row["used"], row["version"]) for row in rows.of(tables.owners)] == [
        ("a", {"cpu": 1}, 2),
        ("b", {}, 1),
        ("c", {}, 1),
    ]


@pytest.mark.parametrize("wanted", [[], ["a"], ["a", ODD, "nobody"], ["a"] * 600], ids=["none", "one", "odd", "many"])
def test_is_one_of_finds_what_in_finds(store: Store, wanted: list[str]) -> None:
    table = tables.deployments.c
    query = sa.select(table.deployment_id).where(is_one_of(table.deployment_id, "ids"))

    with store.write() as connection:
        INSERT(connection, rows_of("a", ODD, "c"))
        found = connection.scalars(query, {"ids": wanted}).all()

    assert sorted(found) == sorted({"a", ODD, "c"}.intersection(wanted))


def test_is_one_of_is_looked_up_in_the_index(sqlite_plan: list[str]) -> None:
    assert any("SEARCH deployments USING INDEX" in step for step in sqlite_plan)


@pytest.fixture
def sqlite_plan(store: Store) -> list[str]:
    """Tell how SQLite finds deployments by their ids."""
    if store.dialect != "sqlite":
        pytest.skip("its own planner decides by what is in the table")
    table = tables.deployments.c
    query = sa.select(table.request).where(is_one_of(table.deployment_id, "ids"))
    with store.read() as connection:
        text = str(query.compile(connection.engine))
        return [row.detail for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", ('["a"]',))]
