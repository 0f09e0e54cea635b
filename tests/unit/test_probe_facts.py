# SPDX-License-Identifier: GPL-3.0-or-later
"""Facts that are told apart by small signs on the node."""

from __future__ import annotations

from pathlib import Path

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_facts import FactsReader
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_read import Reader


@pytest.mark.parametrize(
    ("inittab", "expected"),
    [
        # The first line of Buildroot's, and of a hand-made one.
        ("# Note: BusyBox init works just fine without an inittab.\n", "busybox"),
        ("::sysinit:/bin/busybox mount -a\n", "busybox"),
        ("id:2:initdefault:\n", "sysvinit"),
        (None, "sysvinit"),
    ],
    ids=["buildroot", "hand-made", "sysvinit", "no-inittab"],
)
def test_read_service_manager_tells_init_apart(tmp_path: Path, inittab: str | None, expected: str) -> None:
    (tmp_path / "proc" / "1").mkdir(parents=True)
    (tmp_path / "proc" / "1" / "comm").write_text("init\n", "ascii")
    if inittab is not None:
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc" / "inittab").write_text(inittab, "ascii")

    found = FactsReader(Reader(str(tmp_path)), 1.0).read_service_manager()

    assert found == expected
