# SPDX-License-Identifier: GPL-3.0-or-later
"""How the service is put together, as far as it can be told without running it."""

from __future__ import annotations

import sys

import pytest
from builders import make_settings
from node_manager.main import connect
from node_manager.settings import SettingsError


def test_connect_without_the_database_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    settings = make_settings({"storage": {"url": "postgresql+psycopg://127.0.0.1/nodes"}})

    with pytest.raises(SettingsError, match=r"node-manager\[postgresql\]"):
        connect(settings)
