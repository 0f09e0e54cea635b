# SPDX-License-Identifier: GPL-3.0-or-later
"""Put the collection and the default configuration into the wheel.

An editable install must not get copies (they would shadow the checkout and grow stale), which a plain force-include
in pyproject.toml can't tell apart; hence a hook.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

COLLECTION = "ansible_collections/iot_platform/node_manager"
COLLECTION_PARTS = ("galaxy.yml", "README.md", "meta", "plugins", "roles", "playbooks")
DEFAULTS = ("config.json", "node_types.json")


class CollectionInWheel(BuildHookInterface):  # type: ignore[type-arg]  # hatchling's generic is for its own plugins
    """Map the collection's parts and the default configuration into a standard wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files unless the wheel is an editable one."""
        if version == "editable":
            return
        include = build_data["force_include"]
        include.update({part: f"{COLLECTION}/{part}" for part in COLLECTION_PARTS})
        include.update({name: f"node_manager/data/{name}" for name in DEFAULTS})
