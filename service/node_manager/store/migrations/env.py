# SPDX-License-Identifier: GPL-3.0-or-later
"""Run migrations on the connection that node_manager.store.migrate hands over."""

from alembic import context
from node_manager.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
context.run_migrations()
