# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: PLC0415 -- what is imported where is this file's point, see below
"""The link to the registry: in process where the store is on this machine, over HTTP where NODE_MANAGER_URL says so.

Both links have the same methods and raise LinkError only. Imports of the service stay inside the functions: loading it
costs half a second that a run over HTTP, or without our plugins, must not pay.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

from ._http_link import TOKEN_FILE_VARIABLE, TOKEN_VARIABLE, URL_VARIABLE, HttpLink, LinkError

CA_FILE_VARIABLE = "NODE_MANAGER_CA_FILE"
HOME_VARIABLE = "NODE_MANAGER_HOME"

SOURCE = "ansible"


def open_link(environ=None):
    """Open the registry: over HTTP if NODE_MANAGER_URL is set, else the store of this machine.

    Errors: LinkError.
    """
    environ = os.environ if environ is None else environ
    url = environ.get(URL_VARIABLE)
    return HttpLink(url, _token(environ), environ.get(CA_FILE_VARIABLE)) if url else LocalLink(environ)


def is_remote(environ=None):
    """Tell whether the registry is asked over HTTP."""
    return bool((os.environ if environ is None else environ).get(URL_VARIABLE))


def state_directory(environ=None):
    """Tell where this controller keeps known_hosts and undelivered results; nothing is created."""
    environ = os.environ if environ is None else environ
    if environ.get(HOME_VARIABLE):
        return Path(environ[HOME_VARIABLE]).expanduser().absolute()
    if not is_remote(environ):
        try:
            from node_manager.settings import home_directory
        except ImportError:
            pass
        else:
            return home_directory(environ)
    return Path(environ.get("ANSIBLE_HOME") or "~/.ansible").expanduser() / "node_manager"


def preload():
    """Load what a link imports, so that forked workers inherit it and each open theirs in milliseconds."""
    if not is_remote():
        with _local_errors():
            from node_manager import declarations, inventory, observations  # noqa: F401
    else:
        from ansible.module_utils import urls  # noqa: F401


class LocalLink:
    """The registry of this machine, in process; works with the service running or stopped."""

    def __init__(self, environ=None):
        with _local_errors():
            from node_manager.settings import load_settings
            from node_manager.store import open_store

            self._settings = load_settings(environ)
            storage = self._settings.configuration.storage
            self._store = open_store(self._settings.storage_url, storage.busy_timeout_seconds, pool_size=1)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Close the store."""
        self._store.close()

    def inventory(self, node_ids=None):
        """Give hosts, groups, variables and host keys, of all nodes or of *node_ids*."""
        with _local_errors():
            from node_manager.inventory import build

            return build(self._store, self._settings, node_ids)

    def record(self, observations):
        """Hand in what was seen; give {recorded, late, rejected: [{index, node_id, code, message}]}."""
        with _local_errors():
            from dataclasses import asdict
            from datetime import datetime

            from node_manager.domain import ObservationKind
            from node_manager.observations import Observation, ObservationLog

            batch = [
                Observation(
                    node_id=item["node_id"],
                    observed_at=datetime.fromisoformat(item["observed_at"]),
                    source=item["source"],
                    kind=ObservationKind(item["kind"]),
                    data=item["data"],
                )
                for item in observations
            ]
            return asdict(ObservationLog(self._store, self._settings).record(batch))

    def register(self, declaration):
        """Add a node; give {node, created}."""
        with _local_errors():
            from node_manager.declarations import NodeDeclaration

            node, created = self._registry().register(NodeDeclaration.model_validate(declaration))
            return {"node": self._render(node), "created": created}

    def update(self, node_id, change, generation=None):
        """Replace what is declared about a node; give the node."""
        with _local_errors():
            from node_manager.declarations import NodeChange

            node = self._registry().update(node_id, NodeChange.model_validate(change), if_generation=generation)
            return self._render(node)

    def deregister(self, node_id, force=False, generation=None):
        """Remove a node."""
        with _local_errors():
            self._registry().deregister(node_id, force=force, if_generation=generation)

    def node(self, node_id):
        """Give one node with facts and host keys, or None."""
        with _local_errors():
            from node_manager.problems import NodeNotFoundError

            try:
                return self._render(self._registry().get(node_id))
            except NodeNotFoundError:
                return None

    def nodes(self, filters=None):
        """List the nodes that pass *filters* (status, health, type, zone, site, region, labels)."""
        with _local_errors():
            from node_manager.client import LocalManager

            wanted = dict(filters or {})
            wanted["label"] = [f"{key}={value}" for key, value in (wanted.pop("labels", None) or {}).items()]
            return list(LocalManager(self._store, self._settings).nodes(wanted))

    def node_types(self):
        """Give what is checked: {node_types: {name: {recognised_by, checks, thresholds}}, thresholds, ...}."""
        with _local_errors():
            from node_manager.views import render_node_types

            return render_node_types(self._settings)

    def allocation(self, allocation_id):
        """Give one allocation, or None."""
        with _local_errors():
            from node_manager.problems import AllocationNotFoundError
            from node_manager.views import render_allocation

            try:
                return render_allocation(self._allocator().get(allocation_id))
            except AllocationNotFoundError:
                return None

    def allocate(self, node_id, body):
        """Reserve on a node; give {allocation, created}."""
        with _local_errors():
            from node_manager.api.schemas_allocation import AllocateIn
            from node_manager.resource_allocator import AllocationRequest
            from node_manager.resources import ask_of
            from node_manager.views import render_allocation

            wanted = AllocateIn.model_validate(body)
            request = AllocationRequest(
                wanted.allocation_id, wanted.owner, ask_of(wanted.resources), wanted.deployment_id, wanted.ttl_seconds
            )
            allocation, created = self._allocator().allocate(node_id, request)
            return {"allocation": render_allocation(allocation), "created": created}

    def deallocate(self, node_id, allocation_id):
        """Release an allocation; tell whether there was one."""
        with _local_errors():
            return self._allocator().deallocate(node_id, allocation_id)

    def confirm(self, allocation_id):
        """Keep an allocation for good; give it."""
        with _local_errors():
            from node_manager.views import render_allocation

            return render_allocation(self._allocator().confirm(allocation_id))

    def resources(self, node_id):
        """Give what a node has, and what of it is available."""
        with _local_errors():
            from node_manager.views import render_resources

            return render_resources(node_id, *self._allocator().books(node_id))

    def select(self, request):
        """Choose nodes for a deployment, and reserve them where the request says so; give the placement."""
        with _local_errors():
            from node_manager.problems import ProblemError
            from node_manager.selection_request import SelectionRequest
            from node_manager.views import render_placed

            (outcome,) = self._placer().place([SelectionRequest.model_validate(request)])
            if isinstance(outcome, ProblemError):
                raise outcome
            return render_placed(outcome)

    def deployment(self, deployment_id):
        """Give the allocations of a deployment, or None."""
        with _local_errors():
            from node_manager.problems import DeploymentNotFoundError
            from node_manager.views import render_allocation

            try:
                return [render_allocation(found) for found in self._placer().nodes_of(deployment_id)[1]]
            except DeploymentNotFoundError:
                return None

    def confirm_deployment(self, deployment_id):
        """Keep all allocations of a deployment for good; give them."""
        with _local_errors():
            from node_manager.views import render_allocation

            return [render_allocation(found) for found in self._placer().confirm(deployment_id)]

    def release_deployment(self, deployment_id):
        """Release all allocations of a deployment; tell how many there were."""
        with _local_errors():
            return self._placer().delete(deployment_id)

    def optimization(self):
        """Give advice on which allocations had better be on other nodes."""
        with _local_errors():
            from node_manager.advice import Optimiser
            from node_manager.views import render_suggestions

            return render_suggestions(Optimiser(self._store, self._settings, self._placer()).advice())

    def begin_recovery(self, node_id, body):
        """Begin a recovery that a playbook drives; give it."""
        with _local_errors():
            from node_manager.recoveries import PLAYBOOK
            from node_manager.views import render_recovery

            recovery = self._recoveries().begin_by_hand(
                node_id,
                body["steps"],
                body["requested_by"],
                body["reason"],
                dry_run=body["dry_run"],
                driver=PLAYBOOK,
            )
            return render_recovery(recovery)

    def claim_act(self, recovery_id, position):
        """Ask for the act of a step, which is given once; give {act, message}."""
        with _local_errors():
            act, message = self._recoveries().claim_act(recovery_id, position)
            return {"act": act, "message": message}

    def end_step(self, recovery_id, position, state, message):
        """Write how a step ended; give the recovery."""
        with _local_errors():
            from node_manager.domain import StepState
            from node_manager.views import render_recovery

            return render_recovery(self._recoveries().end_step(recovery_id, position, StepState(state), message))

    def end_recovery(self, recovery_id, message):
        """End a recovery; give it."""
        with _local_errors():
            from node_manager.views import render_recovery

            return render_recovery(self._recoveries().end(recovery_id, message or None))

    def give_up(self, recovery_id, message):
        """Give up on the node of a recovery; give the recovery."""
        with _local_errors():
            from node_manager.views import render_recovery

            return render_recovery(self._recoveries().give_up(recovery_id, message))

    def power(self):
        """Give how a node is switched off and on, as its section of config.json; None where nobody said so."""
        power = self._settings.configuration.recovery.power
        return None if power is None else power.model_dump(mode="json")

    def _recoveries(self):
        from node_manager.recoveries import Recoveries

        return Recoveries(self._store, self._settings)

    def set_status(self, node_id, body):
        """Say whether a node takes part, as PUT /nodes/{node_id}/status does; give the node."""
        with _local_errors():
            from node_manager.maintenance_requests import StatusRequest
            from node_manager.status_input import StatusIn

            wanted = StatusRequest(**dict(StatusIn.model_validate(body)))
            self._maintenance().set_status(node_id, wanted, f"{SOURCE}:{_user()}")
            return self._render(self._registry().get(node_id))

    def node_status(self, node_id):
        """Give the node after all that is due now about its drain or maintenance: the service may be stopped."""
        with _local_errors():
            self._maintenance().advance(node_id)
            return self._render(self._registry().get(node_id))

    def _maintenance(self):
        from node_manager.maintenance import Maintenance
        from node_manager.replacements import Replacements

        # Nobody runs jobs here; the play looks at the node itself.
        return Maintenance(self._store, self._settings, Replacements(self._store, self._settings, self._placer()), None)

    def _allocator(self):
        from node_manager.resource_allocator import ResourceAllocator

        return ResourceAllocator(self._store, self._settings)

    def _placer(self):
        from node_manager.deployments import DeploymentPlacer

        return DeploymentPlacer(self._store, self._settings, self._allocator())

    def _registry(self):
        from node_manager.node_registry import NodeRegistry

        return NodeRegistry(self._store, self._settings)

    def _render(self, node):
        from node_manager.drain_blockers import load_situation
        from node_manager.node_registry import utc_now
        from node_manager.views import render_node_detail

        situation = load_situation(self._store, self._settings, node.node_id)
        return render_node_detail(node, None, situation, self._settings, utc_now())


def _user():
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # Containers may run as a number that has no name.
        return str(os.getuid())


def _token(environ):
    token = environ.get(TOKEN_VARIABLE)
    path = environ.get(TOKEN_FILE_VARIABLE)
    if token or not path:
        return (token or "").strip() or None
    try:
        return Path(path).expanduser().read_text("utf-8").strip() or None
    except (OSError, ValueError) as error:
        raise LinkError(f"{TOKEN_FILE_VARIABLE}: {path} can't be read: {error}", "settings") from None


@contextmanager
def _local_errors():
    """Turn whatever the service raises into a LinkError that says what to do."""
    try:
        import pydantic
        from node_manager.problems import ProblemError
        from node_manager.settings import SettingsError
        from node_manager.store import StoreUnavailableError
    except ImportError as error:
        raise LinkError(
            f"the registry isn't on this machine ({error}): set {URL_VARIABLE}, or install node-manager for the Python that "
            "runs Ansible",
            "not_installed",
        ) from None
    try:
        yield
    except ProblemError as error:
        raise LinkError(error.detail, error.code, error.status, temporary=error.status >= 500) from None
    except SettingsError as error:
        raise LinkError(str(error), "settings") from None
    except StoreUnavailableError as error:
        raise LinkError(f"the store can't be used now: {error}", "store_unavailable") from None
    except pydantic.ValidationError as error:
        raise LinkError(_explain(error), "invalid_input", 422, temporary=False) from None
    except OSError as error:
        raise LinkError(f"the store can't be used: {error}", "store_unavailable") from None


def _explain(error):
    return "; ".join(
        ".".join(str(part) for part in item["loc"])
        # What is wrong with the whole has no place.
        + (": " if item["loc"] else "")
        + item["msg"].removeprefix("Value error, ")
        for item in error.errors(include_url=False, include_input=False)[:5]
    )
