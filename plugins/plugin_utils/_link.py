# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: PLC0415 -- what is imported where is this file's point, see below
"""The link to the registry: in process where the store is on this machine, over HTTP where NODE_MANAGER_URL says so.

Both links have the same methods and raise LinkError only. Imports of the service stay inside the functions: loading it
costs half a second that a run over HTTP, or without our plugins, must not pay.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from pathlib import Path

URL_VARIABLE = "NODE_MANAGER_URL"
TOKEN_VARIABLE = "NODE_MANAGER_TOKEN"  # noqa: S105 -- the name of a variable, not a token
TOKEN_FILE_VARIABLE = "NODE_MANAGER_TOKEN_FILE"  # noqa: S105
CA_FILE_VARIABLE = "NODE_MANAGER_CA_FILE"
HOME_VARIABLE = "NODE_MANAGER_HOME"

SOURCE = "ansible"
_TIMEOUT_SECONDS = 20
_MAX_IDS_PER_QUERY = 100
# An inventory of 10,000 nodes is 6 MiB; more than this is not one of ours.
_MAX_ANSWER_BYTES = 256 * 1024 * 1024
# Answers that a later try may better: no or an old token, too many requests, a server that is starting or full.
_TEMPORARY_STATUS = (401, 403, 408, 425, 429)


class LinkError(Exception):
    """The registry said no, or said nothing; the text says what to do. *temporary* errors are worth another try."""

    def __init__(self, message, code="unavailable", status=None, temporary=True):
        super().__init__(message)
        self.code = code
        self.status = status
        self.temporary = temporary


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

    def _registry(self):
        from node_manager.node_registry import NodeRegistry

        return NodeRegistry(self._store, self._settings)

    def _render(self, node):
        from node_manager.node_registry import utc_now
        from node_manager.views import render_node_detail

        return render_node_detail(node, None, self._settings, utc_now())


class HttpLink:
    """The registry behind the HTTP API, with a token."""

    def __init__(self, url, token, ca_file=None):
        if not url.startswith(("http://", "https://")):
            raise LinkError(f"{URL_VARIABLE}: expected http:// or https://, got {url!r}", "settings", temporary=False)
        self._url = url.rstrip("/")
        self._token = token
        self._ca_file = ca_file

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """Do nothing; each request has a connection of its own."""

    def inventory(self, node_ids=None):
        """Give hosts, groups, variables and host keys, of all nodes or of *node_ids*."""
        if node_ids is not None and not node_ids:
            return {"schema": 1, "groups": [], "nodes": [], "known_hosts": [], "jump_hosts": {}}
        # Past this many ids the URL grows too long; all nodes are then one answer, and the others are left out here.
        few = node_ids is not None and len(node_ids) <= _MAX_IDS_PER_QUERY
        query = [("node_id", node_id) for node_id in node_ids] if few else []
        answer = self._ask("GET", "/inventory", query=query)[1]
        if node_ids is not None and not few:
            answer["nodes"] = [node for node in answer["nodes"] if node["node_id"] in set(node_ids)]
        return answer

    def record(self, observations):
        """Hand in what was seen; give {recorded, late, rejected: [{index, node_id, code, message}]}."""
        return self._ask("POST", "/observations", {"observations": observations})[1]

    def register(self, declaration):
        """Add a node; give {node, created}."""
        # look=false: the play that registers looks at the node itself.
        status, node = self._ask("POST", "/nodes", declaration, query=[("look", "false")])
        return {"node": node, "created": status == 201}

    def update(self, node_id, change, generation=None):
        """Replace what is declared about a node; give the node."""
        headers = {} if generation is None else {"If-Match": f'"{generation}"'}
        return self._ask("PUT", f"/nodes/{_quoted(node_id)}", change, headers=headers)[1]

    def deregister(self, node_id, force=False, generation=None):
        """Remove a node."""
        headers = {} if generation is None else {"If-Match": f'"{generation}"'}
        query = [("force", "true")] if force else []
        self._ask("DELETE", f"/nodes/{_quoted(node_id)}", query=query, headers=headers)

    def node(self, node_id):
        """Give one node with facts and host keys, or None."""
        try:
            return self._ask("GET", f"/nodes/{_quoted(node_id)}")[1]
        except LinkError as error:
            if error.code == "node_not_found":
                return None
            raise

    def nodes(self, filters=None):
        """List the nodes that pass *filters* (status, health, type, zone, site, region, labels)."""
        filters = dict(filters or {})
        query = [("limit", "500")]
        query += [("label", f"{key}={value}") for key, value in (filters.pop("labels", None) or {}).items()]
        query += [(key, value) for key, value in filters.items() if value]
        found, cursor = [], None
        while True:
            page = self._ask("GET", "/nodes", query=[*query, *([("cursor", cursor)] if cursor else [])])[1]
            found.extend(page["items"])
            cursor = page.get("next_cursor")
            if not cursor:
                return found

    def node_types(self):
        """Give what is checked: {node_types: {name: {recognised_by, checks, thresholds}}, thresholds, ...}."""
        return self._ask("GET", "/node-types")[1]

    def _ask(self, method, path, body=None, query=(), headers=None):
        from http.client import HTTPException
        from urllib.error import HTTPError
        from urllib.parse import urlencode

        from ansible.module_utils.urls import open_url

        url = self._url + path + (f"?{urlencode(list(query))}" if query else "")
        sent = {"Accept": "application/json", **(headers or {})}
        if self._token:
            sent["Authorization"] = f"Bearer {self._token}"
        data = None
        if body is not None:
            sent["Content-Type"] = "application/json"
            data = json.dumps(body, separators=(",", ":")).encode()
        try:
            with open_url(
                url,
                method=method,
                data=data,
                headers=sent,
                timeout=_TIMEOUT_SECONDS,
                http_agent="node-manager-ansible",
                follow_redirects="none",
                ca_path=self._ca_file,
            ) as answer:
                return answer.status, _read_json(answer, url)
        except HTTPError as error:
            raise self._refused(error, method, path) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise LinkError(
                f"{self._url} can't be reached ({reason}): is the service running, and {URL_VARIABLE} right?"
            ) from None

    def _refused(self, error, method, path):
        with error:
            try:
                problem = json.loads(error.read(65536))
            except (ValueError, OSError):
                problem = {}
        problem = problem if isinstance(problem, dict) else {}
        detail = str(problem.get("detail") or error.reason)
        fields = "; ".join(
            f"{item.get('field')}: {item.get('message')}"
            for item in problem.get("errors") or []
            if isinstance(item, dict) and str(item.get("message")) not in detail
        )
        advice = f" (set {TOKEN_VARIABLE} or {TOKEN_FILE_VARIABLE})" if error.code in (401, 403) else ""
        return LinkError(
            f"{method} {path}: {detail}{': ' + fields if fields else ''}{advice}",
            str(problem.get("code") or "http_error"),
            error.code,
            temporary=error.code >= 500 or error.code in _TEMPORARY_STATUS or 300 <= error.code < 400,
        )


def _token(environ):
    token = environ.get(TOKEN_VARIABLE)
    path = environ.get(TOKEN_FILE_VARIABLE)
    if token or not path:
        return (token or "").strip() or None
    try:
        return Path(path).expanduser().read_text("utf-8").strip() or None
    except (OSError, ValueError) as error:
        raise LinkError(f"{TOKEN_FILE_VARIABLE}: {path} can't be read: {error}", "settings") from None


def _quoted(node_id):
    from urllib.parse import quote

    return quote(node_id, safe="")


def _read_json(answer, url):
    raw = answer.read(_MAX_ANSWER_BYTES + 1)
    if len(raw) > _MAX_ANSWER_BYTES:
        raise LinkError(f"{url} answered with more than {_MAX_ANSWER_BYTES} bytes", "answer_unusable")
    if not raw:
        return {}
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        raise LinkError(f"{url} didn't answer with JSON: is {URL_VARIABLE} right?", "answer_unusable") from None


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
        f"{'.'.join(str(part) for part in item['loc']) or 'declaration'}: {item['msg'].removeprefix('Value error, ')}"
        for item in error.errors(include_url=False, include_input=False)[:5]
    )
