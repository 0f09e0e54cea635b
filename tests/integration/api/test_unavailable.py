# SPDX-License-Identifier: GPL-3.0-or-later
"""A store that can't answer: 503 with Retry-After, nothing half-written, and recovery without anybody's help."""

from __future__ import annotations

import itertools
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psycopg
import pytest
from parts import skip_or_fail
from running_service import RunningService
from sqlalchemy import make_url

BODY = {"address": "127.0.9.7"}


def register(api: httpx.Client, node_id: str) -> httpx.Response:
    """Register a node that nobody looks at."""
    return api.post("/nodes", params={"look": "false"}, json={"node_id": node_id, **BODY})


def listed(api: httpx.Client) -> list[str]:
    """Give the ids of all nodes."""
    return [node["node_id"] for node in api.get("/nodes").json()["items"]]


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a small filesystem at *folder*."""
    if os.geteuid() != 0:
        skip_or_fail("mounting a small filesystem needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "node-manager-test", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        skip_or_fail(f"a small filesystem can't be mounted: {mounted.stderr.decode()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write a file until its disk is full, to the last page."""
    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        file.writelines(itertools.repeat(b"x" * 4096))


def test_locked_store_answers_503_and_recovers(own_service: RunningService) -> None:
    own_service.environment["NODE_MANAGER_STORAGE__BUSY_TIMEOUT_SECONDS"] = "0.5"
    own_service.start()
    holder = sqlite3.connect(own_service.home / "node-manager.db", isolation_level=None)
    with own_service.client() as api:
        holder.execute("BEGIN IMMEDIATE")
        refused = register(api, "gw-1")
        readable = api.get("/nodes").status_code
        holder.execute("ROLLBACK")
        holder.close()
        taken = register(api, "gw-1")

    assert (refused.status_code, refused.json()["code"]) == (503, "store_unavailable")
    assert int(refused.headers["retry-after"]) > 0
    assert (readable, taken.status_code) == (200, 201)


def test_full_disk_answers_503_and_recovers(own_service: RunningService, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with small_disk(data, "3m"):
        own_service.environment["NODE_MANAGER_STORAGE__URL"] = f"sqlite:///{data}/nodes.db"
        own_service.start()
        filler = data / "filler"
        with own_service.client() as api:
            register(api, "gw-0")
            fill(filler)
            answers = [register(api, f"gw-{number}") for number in range(1, 40)]
            refused = [answer for answer in answers if answer.status_code != 201]
            acknowledged = ["gw-0", *(answer.json()["node_id"] for answer in answers if answer.status_code == 201)]
            kept = listed(api)
            filler.unlink()
            again = register(api, "gw-99")
        own_service.kill()

    assert {answer.status_code for answer in refused} == {503}
    assert {answer.json()["code"] for answer in refused} == {"store_unavailable"}
    assert kept == sorted(acknowledged)
    assert again.status_code == 201


def test_restarted_postgresql_is_found_again(own_service: RunningService, postgresql_database: str) -> None:
    own_service.environment["NODE_MANAGER_STORAGE__URL"] = postgresql_database
    own_service.start()
    with own_service.client() as api:
        before = register(api, "gw-1").status_code
        disconnect_everybody(postgresql_database)
        answers = [register(api, f"gw-{number}") for number in range(2, 12)]
        after = listed(api)

    assert before == 201
    assert {answer.status_code for answer in answers} <= {201, 503}
    assert answers[-1].status_code == 201
    acknowledged = {"gw-1", *(answer.json()["node_id"] for answer in answers if answer.status_code == 201)}
    assert acknowledged == set(after)


def disconnect_everybody(url: str) -> None:
    """End all other sessions of a database, as a restart does."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
