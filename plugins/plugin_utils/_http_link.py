# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# ruff: noqa: PLC0415 -- what sends requests is loaded by the first one
"""The link to the registry over HTTP. Imports nothing of the service."""

from __future__ import annotations

import json

URL_VARIABLE = "NODE_MANAGER_URL"
TOKEN_VARIABLE = "NODE_MANAGER_TOKEN"  # noqa: S105 -- the name of a variable, not a token
TOKEN_FILE_VARIABLE = "NODE_MANAGER_TOKEN_FILE"  # noqa: S105

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
        return self._ask_if_there("node_not_found", f"/nodes/{_quoted(node_id)}")

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

    def allocation(self, allocation_id):
        """Give one allocation, or None."""
        return self._ask_if_there("allocation_not_found", f"/allocations/{_quoted(allocation_id)}")

    def allocate(self, node_id, body):
        """Reserve on a node; give {allocation, created}."""
        status, allocation = self._ask("POST", f"/nodes/{_quoted(node_id)}/allocate", body)
        return {"allocation": allocation, "created": status == 201}

    def deallocate(self, node_id, allocation_id):
        """Release an allocation; tell whether there was one."""
        body = {"allocation_id": allocation_id}
        return self._ask("POST", f"/nodes/{_quoted(node_id)}/deallocate", body)[1]["released"]

    def confirm(self, allocation_id):
        """Keep an allocation for good; give it."""
        return self._ask("POST", f"/allocations/{_quoted(allocation_id)}/confirm")[1]

    def resources(self, node_id):
        """Give what a node has, and what of it is available."""
        return self._ask("GET", f"/nodes/{_quoted(node_id)}/resources")[1]

    def select(self, request):
        """Choose nodes for a deployment, and reserve them where the request says so; give the placement."""
        return self._ask("POST", "/deployment/node-selection", request)[1]

    def deployment(self, deployment_id):
        """Give the allocations of a deployment, or None."""
        found = self._ask_if_there("deployment_not_found", f"/deployment/{_quoted(deployment_id)}/nodes")
        return None if found is None else found["nodes"]

    def confirm_deployment(self, deployment_id):
        """Keep all allocations of a deployment for good; give them."""
        return self._ask("POST", f"/deployment/{_quoted(deployment_id)}/confirm")[1]["nodes"]

    def release_deployment(self, deployment_id):
        """Release all allocations of a deployment; tell how many there were."""
        return self._ask("DELETE", f"/deployment/{_quoted(deployment_id)}")[1]["released"]

    def optimization(self):
        """Give advice on which allocations had better be on other nodes."""
        return self._ask("GET", "/optimization")[1]

    def begin_recovery(self, node_id, body):
        """Begin a recovery that a playbook drives; give it."""
        # Who asks is known by the token.
        asked = {"driver": "playbook", "reason": body["reason"]}
        if body["steps"] is not None:
            asked["steps"] = body["steps"]
        query = [("dry_run", "true")] if body["dry_run"] else []
        return self._ask("POST", f"/nodes/{_quoted(node_id)}/recover", asked, query=query)[1]

    def claim_act(self, recovery_id, position):
        """Ask for the act of a step, which is given once; give {act, message}."""
        return self._ask("POST", f"/recoveries/{_quoted(recovery_id)}/steps/{position:d}/claim")[1]

    def end_step(self, recovery_id, position, state, message):
        """Write how a step ended; give the recovery."""
        body = {"state": state, "message": message}
        return self._ask("PUT", f"/recoveries/{_quoted(recovery_id)}/steps/{position:d}", body)[1]

    def end_recovery(self, recovery_id, message):
        """End a recovery; give it."""
        return self._ask("POST", f"/recoveries/{_quoted(recovery_id)}/end", {"message": message})[1]

    def give_up(self, recovery_id, message):
        """Give up on the node of a recovery; give the recovery."""
        return self._ask("POST", f"/recoveries/{_quoted(recovery_id)}/give-up", {"message": message})[1]

    def power(self):
        """Give None: how nodes are switched off and on is known where the manager runs."""
        return

    def set_status(self, node_id, body):
        """Say whether a node takes part; give the node."""
        return self._ask("PUT", f"/nodes/{_quoted(node_id)}/status", body)[1]

    def node_status(self, node_id):
        """Give the node; the service sees to its drain or maintenance."""
        return self._ask("GET", f"/nodes/{_quoted(node_id)}")[1]

    def _ask_if_there(self, absent, path):
        try:
            return self._ask("GET", path)[1]
        except LinkError as error:
            if error.code == absent:
                return None
            raise

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
