# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
name: select_nodes
short_description: Choose nodes for a deployment and reserve them
version_added: "0.1.0"
description:
  - Has the manager choose the nodes that suit a deployment best, and reserves its resources there, for all replicas or none.
  - >-
    B(This lookup reserves) unless O(reserve=false). The reservation stays until M(iot_platform.node_manager.deployment)
    releases it, or O(ttl_seconds) have passed. It is not counted as a change of the task.
  - >-
    Asking again for the same deployment with the same request gives the nodes that are reserved already; with another request
    it is an error.
  - >-
    Ansible evaluates a lookup anew at each use, and only when it is used. Keep the answer with M(ansible.builtin.set_fact).
    From C(vars), it would reserve once more when used after the release.
  - >-
    Nothing is reserved in check mode, and none with C(--list-hosts), C(--list-tasks), C(--list-tags) and C(--syntax-check);
    the answer then is what would be chosen, or what is reserved already. The keyword C(check_mode) of a single task is not
    visible to lookups; use O(reserve=false) there.
  - The manager is the store of this machine, or the HTTP API when E(NODE_MANAGER_URL) is set.
author:
  - The Node Manager developers (@node-manager)
options:
  _terms:
    description: The deployments to place, each with the same request. Excludes O(deployment_id).
    type: list
    elements: str
  deployment_id:
    description: The deployment to place.
    type: str
  owner:
    description: Whose quota counts.
    type: str
    required: true
  resources:
    description: >-
      What one replica needs, per resource class, such as C(cpu_millicores), C(memory_mib) or C(gpu): a whole number, as a number
      or a text; of devices also a dictionary of C(count) and C(share_milli).
    type: dict
    required: true
  replicas:
    description: How many nodes' worth. Several replicas may share a node.
    type: int
    default: 1
  constraints:
    description: >-
      What each node must be: C(node_types), C(labels), C(features), C(regions), C(zones), C(sites), C(node_ids),
      C(exclude_node_ids), C(within) with C(latitude), C(longitude) and C(max_km).
    type: dict
  affinity:
    description: >-
      What to be near to: dictionaries of C(mode) (V(required) or V(preferred)), C(scope) (V(node), V(zone), V(site) or
      V(region)), C(weight), and one of C(deployment_id), C(deployment_labels) and C(node_labels).
    type: list
    elements: dict
  anti_affinity:
    description: What to be away from, in the form of O(affinity).
    type: list
    elements: dict
  spread:
    description: How even the distribution must be, C(scope) and C(max_skew).
    type: dict
  near:
    description: The nearer to this point the better, C(latitude) and C(longitude).
    type: dict
  images:
    description: Container images; nodes that have them are preferred.
    type: list
    elements: str
  strategy:
    description: What a good choice is.
    type: str
    choices: [balanced, binpack, spread]
    default: balanced
  labels:
    description: The deployment's own labels, for the affinities of others.
    type: dict
  ttl_seconds:
    description: Release after this time unless confirmed. Kept until released where left out.
    type: int
  reserve:
    description: Whether to reserve what is chosen.
    type: bool
    default: true
  details:
    description: Give the whole placement for each deployment, with scores and allocations, instead of the names of nodes.
    type: bool
    default: false
notes:
  - Use C(query) to have a list in all cases; C(lookup) joins several names with commas.
seealso:
  - module: iot_platform.node_manager.deployment
  - module: iot_platform.node_manager.node_allocation
"""

EXAMPLES = r"""
- name: Choose two gateways for ten minutes, in different zones
  ansible.builtin.set_fact:
    chosen: >-
      {{ query('iot_platform.node_manager.select_nodes', 'web-1', owner='team-a', replicas=2,
               resources={'cpu_millicores': 500, 'memory_mib': 256}, constraints={'node_types': ['edge-gateway']},
               spread={'scope': 'zone', 'max_skew': 1}, ttl_seconds=600) }}

- name: Make them the hosts of the next play
  ansible.builtin.add_host:
    name: "{{ item }}"
    groups: chosen_nodes
  loop: "{{ chosen | unique }}"
  changed_when: false

- name: See what would be chosen, and why
  ansible.builtin.debug:
    msg: >-
      {{ query('iot_platform.node_manager.select_nodes', 'web-2', owner='team-a', resources={'gpu': 1},
               reserve=false, details=true) }}
"""

RETURN = r"""
_raw:
  description:
    - The chosen nodes, one for each replica, so that a node may be there more than once.
    - With O(details=true), one placement for each deployment.
  type: list
  elements: raw
  sample: [gw-7, gw-12]
"""

from ansible import context
from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase

from ..plugin_utils import _allocation
from ..plugin_utils._link import LinkError, open_link

# Runs that only look, and yet resolve the hosts of plays.
_LISTINGS = ("listhosts", "listtasks", "listtags", "syntax")


class LookupModule(LookupBase):
    """Have the manager choose nodes."""

    def run(self, terms, variables=None, **kwargs):
        """Give the chosen nodes, deployment by deployment."""
        self.set_options(var_options=variables, direct=kwargs)
        options = _allocation.plain(self.get_options())
        chosen = []
        try:
            requests = [
                _allocation.selection_of(deployment_id, options) for deployment_id in _deployments(terms, options)
            ]
            with open_link() as link:
                for request in requests:
                    placement = link.select({**request, "dry_run": _only_looks(variables or {})})
                    node_ids = _allocation.node_ids_of(placement)
                    chosen += [placement] if options["details"] else node_ids
        except (LinkError, _allocation.WrongValueError) as error:
            raise AnsibleLookupError(f"No nodes were chosen: {error}") from None
        return chosen


def _deployments(terms, options):
    deployment_ids = [str(term) for term in _allocation.plain(terms)]
    if bool(deployment_ids) == bool(options["deployment_id"]):
        raise _allocation.WrongValueError("expected the deployment as a term or as deployment_id, one of the two")
    return deployment_ids or [options["deployment_id"]]


def _only_looks(variables):
    return bool(variables.get("ansible_check_mode")) or any(context.CLIARGS.get(name) for name in _LISTINGS)
