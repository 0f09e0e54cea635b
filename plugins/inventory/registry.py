# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: registry
short_description: The nodes of the Node Manager's registry
version_added: "0.1.0"
description:
  - Gives every registered node as a host, with the way to reach it and the host key it must show.
  - Reads the store of this machine, or the HTTP API when E(NODE_MANAGER_URL) is set.
  - >-
    The groups C(online), C(offline), C(maintenance), C(schedulable) and C(quarantined) are always there. Each node is also
    in C(type_<type>), C(zone_<zone>), C(region_<region>), C(site_<site>) and C(label_<key>_<value>) for what is known of it;
    characters that Ansible doesn't take in group names become underscores.
  - Nothing that the registry says is ever templated.
  - >-
    Writes the pinned host keys to C(known_hosts) in the state directory (E(NODE_MANAGER_HOME), else C(var) of a checkout, or
    C(~/.ansible/node_manager) over HTTP), so that ssh refuses a node that shows another key.
  - >-
    Over HTTP the manager's own machine is left out, because a C(local) connection would mean another machine here, and a
    private key file is used only if this machine has it.
author:
  - The Node Manager developers (@node-manager)
extends_documentation_fragment:
  - ansible.builtin.inventory_cache
options:
  plugin:
    description: Names this plugin.
    type: str
    required: true
    choices: [iot_platform.node_manager.registry]
  node_ids:
    description: Only these nodes; all where left out.
    type: list
    elements: str
    env:
      - name: NODE_MANAGER_INVENTORY_NODES
  cache:
    description:
      - Keep the newest answer of the registry and use it, with a warning, when the registry doesn't answer.
      - The registry is always asked first.
  cache_plugin:
    default: ansible.builtin.jsonfile
  cache_timeout:
    description: How old an answer may be that stands in for the registry, in seconds.
    default: 86400
"""

EXAMPLES = r"""
# inventory/registry.yml: the store of this machine, or the API at NODE_MANAGER_URL
plugin: iot_platform.node_manager.registry
---
# Goes on with the last answer when the manager is down
plugin: iot_platform.node_manager.registry
cache: true
cache_connection: ~/.ansible/node_manager/inventory_cache
---
# Two nodes only
plugin: iot_platform.node_manager.registry
node_ids: [gw-7, gw-8]
"""

import os

from ansible.errors import AnsibleParserError
from ansible.plugins.inventory import BaseInventoryPlugin, Cacheable

from ..plugin_utils._files import locked, replace_if_changed
from ..plugin_utils._link import LinkError, is_remote, open_link, state_directory
from ..plugin_utils._ssh import JUMP_HOSTS, KNOWN_HOSTS, SshArguments, UnsafeValueError, jump_host_configs

_SCHEMA = 1


class InventoryModule(BaseInventoryPlugin, Cacheable):
    """Hosts and groups from the registry."""

    NAME = "iot_platform.node_manager.registry"

    def verify_file(self, path):
        """Take YAML files only; _read_config_data then tells ours from others."""
        return path.endswith((".yml", ".yaml")) and super().verify_file(path)

    def parse(self, inventory, loader, path, cache=True):
        """Ask the registry and fill the inventory."""
        super().parse(inventory, loader, path, cache)
        self._read_config_data(path)
        directory = state_directory()
        try:
            # Held from question to file: an older answer must not take a key away that a run beside this one relies on.
            with locked(directory / f"{KNOWN_HOSTS}.lock"):
                answer = self._ask(path)
                if not isinstance(answer, dict) or answer.get("schema") != _SCHEMA:
                    raise AnsibleParserError(
                        "The registry's answer has another form than this collection knows; bring both to the same version."
                    )
                self._write(directory, answer)
            self._fill(answer, SshArguments(directory))
        except UnsafeValueError as error:
            raise AnsibleParserError(f"The registry's answer can't be used: {error}") from error
        except OSError as error:
            raise AnsibleParserError(f"The pinned host keys can't be written to {directory}: {error}") from error

    def _ask(self, path):
        node_ids = self.get_option("node_ids")
        keeps = self.get_option("cache")
        key = self.get_cache_key(f"{path}{node_ids}")
        try:
            with open_link() as link:
                answer = link.inventory(node_ids)
        except LinkError as error:
            kept = self._cache.get(key) if keeps else None
            if kept is None:
                raise AnsibleParserError(f"The registry can't be read: {error}") from error
            self.display.warning(f"The registry can't be read ({error}); going on with its last answer.")
            return kept
        if keeps:
            self._cache[key] = answer
        return answer

    def _write(self, directory, answer):
        lines = answer["known_hosts"]
        if self.get_option("node_ids") is not None:
            # This answer knows some nodes only; the keys of the others stay.
            known = {node["node_id"] for node in answer["nodes"]}.union(answer["jump_hosts"])
            lines = sorted(
                {*lines, *(line for line in _lines(directory / KNOWN_HOSTS) if line.split()[0] not in known)}
            )
        replace_if_changed(directory / KNOWN_HOSTS, "".join(f"{line}\n" for line in lines))
        for node_id, config in jump_host_configs(directory, answer["jump_hosts"]).items():
            replace_if_changed(directory / JUMP_HOSTS / node_id, config)

    def _fill(self, answer, ssh_arguments):
        remote = is_remote()
        for group in answer["groups"]:
            self.inventory.add_group(group)
        groups = self.inventory.groups
        for node in answer["nodes"]:
            ssh = node["ssh"]
            variables = node["vars"]
            if ssh is None and remote:
                continue
            if remote and not os.path.exists(variables.get("ansible_ssh_private_key_file", "/")):
                variables.pop("ansible_ssh_private_key_file")
            if ssh is not None:
                variables.update(ssh_arguments.variables(ssh))
            node_id = self.inventory.add_host(node["node_id"])
            host = self.inventory.hosts[node_id]
            # Not set_variable, host by host and name by name: the names are ours, and with 10,000 nodes it costs as much as
            # all the rest.
            host.vars.update(variables)
            for name in node["groups"]:
                group = groups.get(name)
                if group is None:
                    group = groups[self.inventory.add_group(name)]
                group.add_host(host)


def _lines(path):
    try:
        return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    except FileNotFoundError:
        return []
