# SPDX-License-Identifier: GPL-3.0-or-later
"""nodectl: the manager's command line.

Works on the local store, whether the service runs or not; with NODE_MANAGER_URL set, over HTTP instead.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import closing, contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import structlog
import typer
import uvicorn
import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress

from node_manager import __version__, haproxy, samples, screen
from node_manager.access import Tokens
from node_manager.client import HttpManager, LocalManager, Manager, UnreachableManagerError, read_token
from node_manager.declarations import Connection, NodeDeclaration
from node_manager.domain import Health, JobAction, Role, Status
from node_manager.event_history import EventFilter
from node_manager.events import EventType
from node_manager.http_server import CuttableProtocol, Server
from node_manager.jobs import Job
from node_manager.logs import configure_logging, secrets_of
from node_manager.main import connect, create_app
from node_manager.node_registry import NodeRegistry
from node_manager.parts import Parts
from node_manager.problems import ProblemError
from node_manager.settings import Settings, SettingsError, load_settings
from node_manager.shapes import Sample
from node_manager.store import NewerSchemaError, Store, StoreUnavailableError
from node_manager.views import render_health, render_time

LOCAL_NODE_ID = "local"
_FIRST_LOOK_SECONDS = 90.0

app = typer.Typer(
    name="nodectl",
    help="Looks after the nodes of a distributed IoT platform.",
    epilog="Exit codes: 0 done, 1 refused (the message says why), 2 wrong usage or configuration, "
    "3 store or service can't be reached, 4 some of many failed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
token_app = typer.Typer(help="Make, list and revoke bearer tokens.", no_args_is_help=True)
app.add_typer(token_app, name="token")


class Output(StrEnum):
    """How results are written."""

    TABLE = "table"
    JSON = "json"


class TrafficOutput(StrEnum):
    """How weights are written."""

    TABLE = "table"
    JSON = "json"
    HAPROXY = "haproxy"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="table for people, json for scripts")]


class ExitCode:
    """What the exit status tells."""

    REFUSED = 1
    USAGE = 2
    UNREACHABLE = 3
    PARTLY = 4


def main() -> None:
    """Run nodectl; every foreseeable failure is one line and an exit code."""
    try:
        app()
    except (SettingsError, NewerSchemaError) as error:
        _fail(str(error), ExitCode.USAGE)
    except ProblemError as error:
        _fail(f"{error.detail} ({error.code})", ExitCode.REFUSED)
    except (StoreUnavailableError, UnreachableManagerError) as error:
        _fail(str(error), ExitCode.UNREACHABLE)


@app.command()
def serve(
    local: Annotated[bool, typer.Option("--local", help="Register this machine as the first node")] = False,
) -> None:
    """Run the service until Ctrl-C."""
    settings = load_settings()
    configure_logging(
        settings.configuration.logging, secrets_of(settings), traces=settings.configuration.tracing.enabled
    )
    _check_port_is_free(settings)
    store = connect(settings)
    token_file = Tokens(store).ensure_admin(settings.home)
    if local:
        _register_local(store, settings)
    console = screen.make_console()

    def on_started(parts: Parts) -> None:
        job = parts.jobs.submit(JobAction.REGISTER, [LOCAL_NODE_ID], "first start") if local else None
        threading.Thread(
            target=_show_start, args=(console, parts, token_file, job), name="start-screen", daemon=True
        ).start()

    service = create_app(settings, store, on_started=on_started)
    config = uvicorn.Config(
        service,
        host=settings.server.host,
        port=settings.server.port,
        http=CuttableProtocol,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(settings.server.shutdown_seconds),
    )
    try:
        # Thousands of samples a minute are made of many small objects that live for a moment and form no cycles: looking for
        # cycles as often as is usual took a third of the CPU of recording them.
        gc.set_threshold(50_000, 20, 50)
        Server(config, on_shutdown=service.state.parts.hub.close).run()
    except KeyboardInterrupt:
        console.print("Stopped.")
    finally:
        store.close()


@app.command()
def nodes(
    status: Annotated[Status | None, typer.Option(help="Only of this status")] = None,
    health: Annotated[Health | None, typer.Option(help="Only of this health")] = None,
    node_type: Annotated[str | None, typer.Option("--type", help="Only of this type")] = None,
    zone: Annotated[str | None, typer.Option(help="Only in this zone")] = None,
    site: Annotated[str | None, typer.Option(help="Only at this site")] = None,
    region: Annotated[str | None, typer.Option(help="Only in this region")] = None,
    label: Annotated[list[str] | None, typer.Option(help="key=value, or key for any value")] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """List nodes."""
    wanted = {
        "status": status,
        "health": health,
        "type": node_type,
        "zone": zone,
        "site": site,
        "region": region,
        "label": label,
    }
    with _manager() as manager:
        found = list(manager.nodes(wanted))
    if output is Output.JSON:
        _write_json(found)
    elif found:
        screen.make_console().print(screen.nodes_table(found))
    else:
        _note("No nodes. 'nodectl register --local' registers this machine, 'nodectl apply -f nodes.yml' many.")


@app.command()
def apply(
    file: Annotated[Path, typer.Option("--file", "-f", help="YAML or JSON: a list of nodes, or {nodes: [...]}")],
    output: OutputOption = Output.TABLE,
) -> None:
    """Register the nodes of a file; those that are there already stay as they are."""
    declarations = _read_declarations(file)
    with _manager() as manager, Progress(console=Console(stderr=True), transient=True) as progress:
        tracked = progress.track(declarations, description="Registering")
        results = [_apply_one(manager, declaration) for declaration in tracked]
    failed = [result for result in results if result["result"] == "refused"]
    if output is Output.JSON:
        _write_json(results)
    else:
        counts = {word: sum(item["result"] == word for item in results) for word in ("created", "unchanged", "refused")}
        typer.echo(", ".join(f"{count} {word}" for word, count in counts.items()))
        for result in failed:
            _note(f"{result['node_id']}: {result['message']}")
    if failed:
        raise typer.Exit(ExitCode.PARTLY)


@app.command()
def register(
    local: Annotated[bool, typer.Option("--local", help="This machine, reached without SSH")] = False,
) -> None:
    """Register this machine as the node 'local'."""
    if not local:
        _fail(
            "say --local; other nodes are registered with 'nodectl apply -f nodes.yml' or POST /nodes", ExitCode.USAGE
        )
    settings = load_settings()
    store = connect(settings)
    try:
        created = _register_local(store, settings)
    finally:
        store.close()
    typer.echo(f"{LOCAL_NODE_ID} {'registered' if created else 'was registered already'}")


@app.command()
def traffic(
    deployment_id: Annotated[str, typer.Argument(help="The deployment", metavar="DEPLOYMENT")],
    output: Annotated[TrafficOutput, typer.Option("--output", "-o", help="haproxy writes a backend section")] = (
        TrafficOutput.TABLE
    ),
    backend: Annotated[str | None, typer.Option(help="HAProxy's backend; the deployment's id where left out")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port of the replicas, for new servers")] = None,
    haproxy_socket: Annotated[
        Path | None, typer.Option(help="Set the weights in a running HAProxy through its admin socket")
    ] = None,
    allow_empty: Annotated[bool, typer.Option(help="Let no server take traffic, if that is the advice")] = False,
) -> None:
    """Show how a deployment's traffic is to be shared, or bring it to HAProxy."""
    with _manager() as manager:
        weights = manager.traffic(deployment_id)
    try:
        if haproxy_socket is not None:
            api = haproxy.RuntimeApi(haproxy_socket)
            for change in api.apply(backend or deployment_id, weights, port=port, allow_empty=allow_empty):
                typer.echo(f"{change.server}: {change.kind} {change.before or '-'} -> {change.after}")
        elif output is TrafficOutput.HAPROXY:
            if port is None:
                _fail("say --port: the port on which the replicas serve", ExitCode.USAGE)
            typer.echo(haproxy.render_backend(backend or deployment_id, weights, port), nl=False)
        elif output is TrafficOutput.JSON:
            _write_json([asdict(weight) for weight in weights])
        else:
            screen.make_console().print(screen.weights_table(weights))
    except haproxy.HaproxyError as error:
        for change in error.changes:
            typer.echo(f"{change.server}: {change.kind} {change.before or '-'} -> {change.after}")
        _fail(str(error), ExitCode.PARTLY if error.changes else ExitCode.REFUSED)


@app.command()
def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens, until Ctrl-C")] = False,
    kinds: Annotated[list[EventType] | None, typer.Option("--type", help="Only of this type; may be repeated")] = None,
    node_ids: Annotated[list[str] | None, typer.Option("--node", help="Only of this node; may be repeated")] = None,
    after: Annotated[
        int | None, typer.Option(min=0, help="Only those behind this sequence; with --follow: from there on")
    ] = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what happened, oldest first, or follow what happens."""
    wanted = EventFilter(types=frozenset(kind.value for kind in kinds or ()), node_ids=frozenset(node_ids or ()))
    begin = after if after is not None or follow else 0
    with _manager() as manager:
        for event in manager.events(wanted, begin, _note, follow=follow):
            typer.echo(json.dumps(event) if output is Output.JSON else screen.event_line(event))


@app.command()
def version() -> None:
    """Show the version."""
    typer.echo(__version__)


@token_app.command("create")
def token_create(
    name: Annotated[str, typer.Argument(help="Who will use it", metavar="NAME")],
    role: Annotated[Role, typer.Option(help="What it allows")] = Role.VIEWER,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a token and print it, this once."""
    with _local_store() as (store, _settings):
        text, record = Tokens(store).create(name[:64], role)
    if output is Output.JSON:
        _write_json({"token": text, "token_id": record.token_id, "name": record.name, "role": record.role.value})
    else:
        typer.echo(text)
        _note(f"Shown this once. Role {role.value}, id {record.token_id}.")


@token_app.command("list")
def token_list(output: OutputOption = Output.TABLE) -> None:
    """List tokens by name and role; the tokens themselves are not stored."""
    with _local_store() as (store, _settings):
        records = Tokens(store).records()
    if output is Output.JSON:
        _write_json(
            [
                {
                    "token_id": record.token_id,
                    "name": record.name,
                    "role": record.role.value,
                    "created_at": render_time(record.created_at),
                    "revoked_at": render_time(record.revoked_at),
                }
                for record in records
            ]
        )
    else:
        screen.make_console().print(screen.tokens_table(records))


@token_app.command("revoke")
def token_revoke(token_id: Annotated[str, typer.Argument(help="From 'nodectl token list'", metavar="ID")]) -> None:
    """End a token."""
    with _local_store() as (store, _settings):
        Tokens(store).revoke(token_id)
    typer.echo(f"{token_id} revoked")


@contextmanager
def _local_store() -> Iterator[tuple[Store, Settings]]:
    settings = load_settings()
    store = connect(settings)
    try:
        yield store, settings
    finally:
        store.close()


@contextmanager
def _manager() -> Iterator[Manager]:
    if url := os.environ.get("NODE_MANAGER_URL"):
        with closing(HttpManager(url, read_token(os.environ, load_settings().home))) as remote:
            yield remote
        return
    with _local_store() as (store, settings):
        yield LocalManager(store, settings)


def _register_local(store: Store, settings: Settings) -> bool:
    """Register this machine; one that was registered and then changed by somebody stays as it is."""
    registry = NodeRegistry(store, settings)
    if registry.existing([LOCAL_NODE_ID]):
        return False
    declaration = NodeDeclaration(
        node_id=LOCAL_NODE_ID, name=socket.gethostname()[:255], address="127.0.0.1", connection=Connection(kind="local")
    )
    return registry.register(declaration, allow_local=True)[1]


def _show_start(console: Console, parts: Parts, token_file: Path, job: Job | None) -> None:
    server = parts.settings.server
    url = f"http://{server.host}:{server.port}"
    health = use = message = None
    if job is not None:
        console.print("Looking at this machine ...", style="dim")
        try:
            parts.jobs.future(job.job_id).result(_FIRST_LOOK_SECONDS)
            node = parts.registry.get(LOCAL_NODE_ID)
            report = samples.newest_report(parts.store, LOCAL_NODE_ID)
            health = render_health(node, report, parts.settings, parts.clock())
            sample = samples.newest_sample(parts.store, LOCAL_NODE_ID)
            if sample is not None:
                parsed = Sample.model_validate(sample.data)
                use = samples.summarise(parsed)
                message = parsed.containers.message if parsed.containers else None
        except (ProblemError, StoreUnavailableError, FutureTimeoutError) as error:
            structlog.get_logger().error("the first look at this machine failed", reason=str(error) or "timed out")
    console.print(screen.start_screen(url, token_file, health, use, message))


def _check_port_is_free(settings: Settings) -> None:
    host, port = settings.server.host, settings.server.port
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SettingsError(
                f"{host}:{port} can't be listened on ({error.strerror}); stop what holds it, or choose another port: "
                "NODE_MANAGER_SERVER__PORT=9090"
            ) from None


def _read_declarations(file: Path) -> list[NodeDeclaration]:
    try:
        data = yaml.safe_load(file.read_text("utf-8"))
    except OSError as error:
        _fail(f"{file}: {error.strerror}", ExitCode.USAGE)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        _fail(f"{file}: not valid YAML: {error}", ExitCode.USAGE)
    items = data.get("nodes") if isinstance(data, dict) else data
    if not isinstance(items, list):
        _fail(f"{file}: expected a list of nodes, or a mapping with the key 'nodes'", ExitCode.USAGE)
    declarations = []
    for index, item in enumerate(items):
        try:
            declarations.append(NodeDeclaration.model_validate(item))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"])
            name = item.get("node_id") if isinstance(item, dict) else None
            _fail(f"{file}: node {index + 1} ({name}): {place}: {first['msg']}; nothing was registered", ExitCode.USAGE)
    return declarations


def _apply_one(manager: Manager, declaration: NodeDeclaration) -> dict[str, Any]:
    try:
        _, created = manager.register(declaration)
    except ProblemError as error:
        return {"node_id": declaration.node_id, "result": "refused", "code": error.code, "message": error.detail}
    return {"node_id": declaration.node_id, "result": "created" if created else "unchanged"}


def _write_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2))


def _note(text: str) -> None:
    typer.echo(text, err=True)


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"nodectl: {message}", err=True)
    sys.exit(code)
