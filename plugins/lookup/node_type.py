# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: node_type
short_description: What is checked on a node
version_added: "0.1.0"
description:
  - Gives the health checks and the thresholds of a node type, as M(iot_platform.node_manager.node_health) takes them.
  - Without a type it is recognised from facts. A node of no known type gets the general thresholds and no checks.
author:
  - The Node Manager developers (@node-manager)
options:
  _terms:
    description: The name of the type; empty to recognise it from O(facts).
    type: list
    elements: str
  facts:
    description: What M(iot_platform.node_manager.node_facts) returned.
    type: dict
    default: {}
"""

EXAMPLES = r"""
- name: Show what is checked on gateways
  ansible.builtin.debug:
    msg: "{{ lookup('iot_platform.node_manager.node_type', 'edge-gateway').checks }}"

- name: Show what is checked on this node
  ansible.builtin.debug:
    msg: >-
      {{ lookup('iot_platform.node_manager.node_type', node_manager_type | default(''),
                facts=ansible_facts.node_manager) }}
"""

RETURN = r"""
_raw:
  description: One entry for each type asked for.
  type: list
  elements: dict
  contains:
    name:
      description: The type, null if it isn't known.
      type: str
      sample: edge-gateway
    checks:
      description: The health checks.
      type: list
      elements: dict
    thresholds:
      description: The thresholds in force.
      type: dict
    timeout_seconds:
      description: The limit for all checks of one node together.
      type: float
      sample: 20.0
"""

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

from ..module_utils._recognise import recognise
from ..plugin_utils._link import LinkError, open_link


class LookupModule(LookupBase):
    """Look up node types in the registry's configuration."""

    def run(self, terms, variables=None, **kwargs):
        """Give one entry per term."""
        self.set_options(var_options=variables, direct=kwargs)
        facts = self.get_option("facts")
        try:
            with open_link() as link:
                answer = link.node_types()
        except LinkError as error:
            raise AnsibleLookupError(f"The node types can't be read: {error}") from None
        return [self._entry(answer, str(term or ""), facts) for term in terms or [""]]

    @staticmethod
    def _entry(answer, name, facts):
        types = answer["node_types"]
        if name and name not in types:
            raise AnsibleLookupError(f"There is no node type {name!r}; there are {', '.join(sorted(types))}.")
        found = name or recognise(facts, {key: value["recognised_by"] for key, value in types.items()})
        return {
            "name": found,
            "checks": types[found]["checks"] if found else [],
            "thresholds": (types[found] if found else answer)["thresholds"],
            "timeout_seconds": answer["checks_timeout_seconds"],
        }
