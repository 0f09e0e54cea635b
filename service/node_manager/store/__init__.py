# SPDX-License-Identifier: GPL-3.0-or-later
"""The system of record: tables, engine, migrations. Imports nothing of the service above it."""

from node_manager.store.engine import Also, Store, StoreUnavailableError, open_store
from node_manager.store.migrate import NewerSchemaError

__all__ = ["Also", "NewerSchemaError", "Store", "StoreUnavailableError", "open_store"]
