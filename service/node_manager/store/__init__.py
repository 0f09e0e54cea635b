# SPDX-License-Identifier: GPL-3.0-or-later
"""The system of record: tables, engine, migrations. Imports nothing of the service above it."""

from node_manager.store.engine import Store, StoreUnavailableError, open_store

__all__ = ["Store", "StoreUnavailableError", "open_store"]
