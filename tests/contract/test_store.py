# SPDX-License-Identifier: GPL-3.0-or-later
"""What a transaction promises on either engine."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from builders import START
from node_manager.health_checker import Return
from node_manager.node_states import state_of_row
from node_manager.store import NewerSchemaError, Store, migrate, open_store, tables
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, StatementError

LEASE = {"name": "leader", "holder": "a", "expires_at": START}


def test_write_commits_at_the_end(store: Store) -> None:
    with store.write() as connection:
        connection.execute(tables.leases.insert(), LEASE)

    with store.read() as connection:
        assert connection.execute(sa.select(tables.leases)).one()._asdict() == LEASE


def test_write_that_raises_leaves_nothing(store: Store) -> None:
    with suppress(ZeroDivisionError), store.write() as connection:
        connection.execute(tables.leases.insert(), LEASE)
        raise ZeroDivisionError

    with store.read() as connection:
        assert connection.execute(sa.select(tables.leases)).all() == []


def test_write_passes_broken_constraints_through(store: Store) -> None:
    with store.write() as connection:
        connection.execute(tables.leases.insert(), LEASE)

    with pytest.raises(IntegrityError), store.write() as connection:
        connection.execute(tables.leases.insert(), LEASE)


def test_write_passes_a_wrong_statement_through(store: Store) -> None:
    with pytest.raises((OperationalError, ProgrammingError)), store.write() as connection:
        connection.execute(sa.text("SELECT * FROM there_is_no_such_table"))


def test_write_refuses_a_naive_time(store: Store) -> None:
    with pytest.raises(StatementError), store.write() as connection:
        connection.execute(tables.leases.insert(), {**LEASE, "expires_at": datetime(2026, 1, 1)})  # noqa: DTZ001


def test_write_of_two_threads_loses_no_update(store: Store) -> None:
    with store.write() as connection:
        connection.execute(tables.leases.insert(), {**LEASE, "holder": "0"})

    def count_up() -> None:
        for _ in range(25):
            with store.write() as connection:
                row = connection.execute(sa.select(tables.leases.c.holder).with_for_update()).one()
                connection.execute(tables.leases.update(), {"holder": str(int(row.holder) + 1)})

    threads = [threading.Thread(target=count_up) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    with store.read() as connection:
        assert connection.scalar(sa.select(tables.leases.c.holder)) == "50"


def test_read_sees_one_state(store: Store) -> None:
    count = sa.select(sa.func.count()).select_from(tables.leases)

    with store.read() as reader:
        before = reader.scalar(count)
        with store.write() as writer:
            writer.execute(tables.leases.insert(), LEASE)
        after = reader.scalar(count)

    assert (before, after) == (0, 0)


def test_read_sees_what_was_committed_before(store: Store) -> None:
    with store.read() as connection:
        connection.execute(sa.select(tables.leases)).all()
    with store.write() as connection:
        connection.execute(tables.leases.insert(), LEASE)

    with store.read() as connection:
        assert len(connection.execute(sa.select(tables.leases)).all()) == 1


@pytest.mark.parametrize(
    "at",
    [
        START,
        datetime(1970, 1, 1, tzinfo=UTC),
        datetime(1, 1, 1, tzinfo=UTC),
        datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
        datetime(2026, 3, 29, 2, 30, 0, 1, tzinfo=timezone(timedelta(hours=2))),
    ],
    ids=["now", "epoch", "first-year", "last-microsecond", "another-zone"],
)
def test_times_come_back_to_the_microsecond(store: Store, at: datetime) -> None:
    with store.write() as connection:
        connection.execute(tables.leases.insert(), {**LEASE, "expires_at": at})

    with store.read() as connection:
        assert connection.scalar(sa.select(tables.leases.c.expires_at)) == at


def test_deleting_a_node_deletes_what_hangs_on_it(store: Store) -> None:
    with store.read() as connection:
        names = sa.inspect(connection).get_table_names()
        keys = {name: sa.inspect(connection).get_foreign_keys(name) for name in names}

    cascading = {
        name
        for name, foreign in keys.items()
        if any(key["referred_table"] == "nodes" and key["options"].get("ondelete") == "CASCADE" for key in foreign)
    }

    expected = {"host_keys", "node_facts", "node_labels", "node_reports", "node_samples", "node_states"}
    expected |= {"node_accounts", "sample_history", "repair_records", "maintenances", "node_workloads", "lost_nodes"}
    assert cascading == expected


def test_open_store_finds_its_data_again(store: Store, store_url: str) -> None:
    with store.write() as connection:
        connection.execute(tables.leases.insert(), LEASE)
    store.close()

    again = open_store(store_url)

    with again.read() as connection:
        assert connection.scalar(sa.select(tables.leases.c.holder)) == "a"
    again.close()


def test_open_store_may_run_in_several_processes_at_once(empty_url: str) -> None:
    code = "import sys; from node_manager.store import open_store; open_store(sys.argv[1], 20).close()"

    started = [subprocess.Popen([sys.executable, "-c", code, empty_url], stderr=subprocess.PIPE) for _ in range(3)]

    outcomes = [(process.communicate(timeout=60)[1], process.returncode) for process in started]
    assert outcomes == [(b"", 0)] * 3


def test_open_store_refuses_the_schema_of_a_later_version(empty_url: str) -> None:
    with closing(open_store(empty_url)) as store, store.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))

    with pytest.raises(NewerSchemaError, match="9999"):
        open_store(empty_url)


def test_open_store_makes_a_file_for_its_owner_only(tmp_path: Path) -> None:
    open_store(f"sqlite:///{tmp_path}/nodes.db").close()

    assert (tmp_path / "nodes.db").stat().st_mode & 0o777 == 0o600


def test_change_mark_stands_while_nothing_is_committed(store: Store) -> None:
    before = store.change_mark()
    with store.read() as connection:
        connection.execute(sa.select(tables.leases)).all()

    assert store.change_mark() == before


def test_change_mark_differs_after_a_commit(store: Store) -> None:
    before = store.change_mark()
    with store.write() as connection:
        connection.execute(tables.leases.insert(), LEASE)

    assert store.change_mark() != before


def test_change_mark_differs_after_another_process_committed(store: Store, store_url: str) -> None:
    before = store.change_mark()
    with closing(open_store(store_url)) as other, other.write() as connection:
        connection.execute(tables.leases.insert(), LEASE)

    assert store.change_mark() != before


def test_migration_of_health_tells_warnings_apart_and_lets_what_is_lost_prove_its_return(empty_url: str) -> None:
    engine = sa.create_engine(empty_url)
    config = Config()
    config.set_main_option("script_location", str(Path(migrate.__file__).parent / "migrations"))
    conditions = [
        {"type": kind, "status": False, "reason": reason, "message": "", "since": 0.0}
        for kind, reason in [("Reachable", "TimedOut"), ("ChecksPassing", "WarningCheckFailed")]
    ]
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        old = sa.MetaData()
        old.reflect(connection)
        node = {"labels": {}, "connection": {}, "capacity": {}, "admin": "active", "generation": 1}
        times = {"created_at": 0, "updated_at": 0}
        connection.execute(old.tables["nodes"].insert(), {"node_id": "a", "name": "a", "address": "a", **node, **times})
        state = {"health": "unreachable", "health_since": 0, "health_cause": "", "failures": 3, "quarantined": False}
        more = {"conditions": conditions, "cpu_readings": [], "revision": 1}
        connection.execute(old.tables["node_states"].insert(), {"node_id": "a", **state, **more})
    engine.dispose()

    with closing(open_store(empty_url)) as store, store.read() as connection:
        found = state_of_row(connection.execute(sa.select(tables.node_states)).one())

    assert found.returning == Return()
    assert [condition.severity.value for condition in found.conditions] == ["critical", "warning"]
