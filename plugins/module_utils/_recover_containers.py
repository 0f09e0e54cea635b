# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Restart containers, and drop what the container engine keeps for nobody.

Speaks the Docker Engine API on its unix socket; podman answers the same. Runs on nodes with Python 3.8.
Source: Docker Engine API v1.41 reference.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from dataclasses import dataclass
from typing import Callable, Dict, List, Mapping, Optional, Sequence
from urllib.parse import quote

from ._checks_spec import one_line
from ._engine import EngineClient, EngineDeniedError, EngineError, Runtime, find_runtime
from ._recover_run import Repair, RepairError, wait_until

# How long a container has to end by itself before it is killed.
_STOP_SECONDS = 10
_MAX_ANSWER_BYTES = 8 * 1024 * 1024
_ENGINE_SOCKETS = (("docker", "/run/docker.sock"), ("podman", "/run/podman/podman.sock"))
_DANGLING = "/images/json?filters=" + quote(json.dumps({"dangling": ["true"]}))
_PRUNE_IMAGES = "/images/prune?filters=" + quote(json.dumps({"dangling": ["true"]}))

Locate = Callable[[str], str]


@dataclass(frozen=True)
class Container:
    """A container by its name; *key* is empty where there is none."""

    name: str
    key: str = ""
    state: str = "missing"
    health: str = ""

    @property
    def works(self) -> bool:
        """Tell whether it runs and is not unhealthy."""
        return self.state == "running" and self.health != "unhealthy"

    @property
    def shown(self) -> str:
        """Say its state in a few words."""
        return "{} ({})".format(self.state, self.health) if self.health else self.state


class EngineWriter:
    """Send requests that change something, each over a connection of its own, bounded in time and size."""

    def __init__(self, socket_path: str, deadline: float) -> None:
        self._socket_path = socket_path
        self._deadline = deadline

    def post(self, path: str) -> object:
        """Send a POST; give the JSON of the answer, None where it has none.

        Errors: RepairError in words of the engine.
        """
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.sock.settimeout(self._left())
            connection.sock.connect(self._socket_path)
            connection.request("POST", path, headers={"Host": "localhost", "Content-Length": "0"})
            connection.sock.settimeout(self._left())
            with connection.getresponse() as response:
                raw = response.read(_MAX_ANSWER_BYTES)
                if response.status >= 400:
                    raise RepairError("the engine refused: {}".format(_said(raw) or response.status))
            return json.loads(raw) if raw.strip() else None
        except socket.timeout:
            raise RepairError("the engine did not answer in time") from None
        except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
            raise RepairError("the engine could not be asked: {}".format(one_line(error, 150))) from None
        finally:
            connection.close()

    def _left(self) -> float:
        return max(0.1, self._deadline - time.monotonic())


def ask_engines(locate: Locate, deadline: float) -> Dict[str, Optional[str]]:
    """Ask each engine whose socket is there: None if it answers, else the reason why not."""
    answers: Dict[str, Optional[str]] = {}
    for name, path in _ENGINE_SOCKETS:
        if not os.path.exists(locate(path)):
            continue
        client = EngineClient(locate(path), min(deadline, time.monotonic() + 5), shown_path=path)
        try:
            client.get("/version")
            answers[name] = None
        except EngineDeniedError:
            # Whether it works can't be told by this user.
            continue
        except EngineError as error:
            answers[name] = one_line(error, 150)
        finally:
            client.close()
    return answers


def restart_containers(names: Sequence[str], deadline: float, *, locate: Locate, check_mode: bool) -> Repair:
    """Restart those of the named containers that don't run or are unhealthy; thaw those that are paused."""
    if not names:
        return Repair(False, "no container to restart")
    runtime = _runtime(locate, deadline)
    found = list_containers(locate(runtime.socket), names, deadline)
    before: Dict[str, object] = {container.name: container.shown for container in found}
    broken = [container for container in found if not container.works]
    if not broken:
        return Repair(False, "all of these containers run", before=before, after=before)
    startable = [container for container in broken if container.key]
    if check_mode:
        why = "; ".join("container {} is {}".format(container.name, container.shown) for container in broken)
        after = {**before, **{container.name: "running" for container in startable}}
        return Repair(True, why, changed=bool(startable), before=before, after=after)
    failures = ["container {} does not exist: deploy it".format(each.name) for each in broken if not each.key]
    done: List[str] = []
    for container in startable:
        try:
            done.append(_revive(locate(runtime.socket), container, deadline))
        except RepairError as error:
            failures.append("container {}: {}".format(container.name, error))
    after = {each.name: each.shown for each in list_containers(locate(runtime.socket), names, deadline + 5)}
    if failures:
        raise RepairError("; ".join(failures))
    return Repair(True, ", ".join(done), changed=True, before=before, after=after, done=done)


def list_containers(socket_path: str, names: Sequence[str], deadline: float) -> List[Container]:
    """Find the named containers, in that order; those that don't exist have no key.

    Errors: RepairError if the engine doesn't list them.
    """
    client = EngineClient(socket_path, deadline)
    try:
        rows = client.get("/containers/json?all=1")
    except EngineError as error:
        raise RepairError(one_line(error, 200)) from None
    finally:
        client.close()
    return find_containers(rows, names)


# [{"Id": "4f66ad9a0b2e", "Names": ["/app"], "State": "running", "Status": "Up 2 hours (healthy)"}]
# [{"Id": "5a77be8b1c3f", "Names": ["/db"], "State": "exited", "Status": "Exited (137) 3 minutes ago"}]
def find_containers(rows: object, names: Sequence[str]) -> List[Container]:
    """Find containers by name in what the engine lists; anything else than a list has none.

    Source: Docker Engine API, GET /containers/json.
    """
    found: Dict[str, Container] = {}
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, Mapping) or not str(row.get("Id")).isalnum():
            continue
        status = str(row.get("Status"))
        health = "unhealthy" if "(unhealthy)" in status else "healthy" if "(healthy)" in status else ""
        listed = row.get("Names")
        for name in listed if isinstance(listed, list) else ():
            bare = str(name).lstrip("/")
            found[bare] = Container(bare, str(row["Id"]), one_line(row.get("State"), 40), health)
    return [found.get(name, Container(name)) for name in names]


def prune(locate: Locate, deadline: float, *, images: bool, build_cache: bool) -> int:
    """Drop images that have no name and no container, and the cache of builds; give the bytes that this freed."""
    try:
        runtime = find_runtime(locate, deadline)
    except EngineError:
        return 0
    if runtime is None or not runtime.listable:
        return 0
    writer = EngineWriter(locate(runtime.socket), deadline)
    paths = [path for path, wanted in ((_PRUNE_IMAGES, images), ("/build/prune", build_cache)) if wanted]
    freed = 0
    for path in paths:
        try:
            answer = writer.post(path)
        except RepairError:
            # podman and old engines have no cache of builds.
            continue
        reclaimed = answer.get("SpaceReclaimed") if isinstance(answer, Mapping) else None
        freed += reclaimed if isinstance(reclaimed, int) and reclaimed > 0 else 0
    return freed


def engine_directory(locate: Locate, deadline: float) -> Optional[str]:
    """Name the folder where the engine keeps images; None where no engine tells."""
    try:
        runtime = find_runtime(locate, deadline)
    except EngineError:
        return None
    if runtime is None or not runtime.listable:
        return None
    client = EngineClient(locate(runtime.socket), deadline, shown_path=runtime.socket)
    try:
        answer = client.get("/info")
    except EngineError:
        return None
    finally:
        client.close()
    path = answer.get("DockerRootDir") if isinstance(answer, Mapping) else None
    return path if isinstance(path, str) and path.startswith("/") else None


# {"message": "No such container: app"}
# {"cause": "no such image", "message": "app: image not known", "response": 404}
def _said(raw: bytes) -> str:
    try:
        answer = json.loads(raw)
    except (ValueError, RecursionError):
        return ""
    return one_line(answer.get("message") or "", 150) if isinstance(answer, dict) else ""


def _runtime(locate: Locate, deadline: float) -> Runtime:
    try:
        runtime = find_runtime(locate, deadline)
    except EngineError as error:
        raise RepairError(one_line(error, 200)) from None
    if runtime is None or not runtime.listable:
        raise RepairError("no container engine with the Docker API is on this node")
    return runtime


def _revive(socket_path: str, container: Container, deadline: float) -> str:
    writer = EngineWriter(socket_path, deadline)
    if container.state == "paused":
        writer.post("/containers/{}/unpause".format(container.key))
        verb = "thawed"
    else:
        writer.post("/containers/{}/restart?t={}".format(container.key, _STOP_SECONDS))
        verb = "restarted"
    seen: List[Container] = []

    def runs() -> bool:
        seen[:] = list_containers(socket_path, [container.name], deadline)
        return seen[0].state == "running"

    if not wait_until(runs, min(deadline, time.monotonic() + _STOP_SECONDS)):
        raise RepairError("it was {} and is {}".format(verb, seen[0].shown))
    return "{} container {}".format(verb, container.name)
