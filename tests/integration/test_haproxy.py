# SPDX-License-Identifier: GPL-3.0-or-later
"""Weights in a real HAProxy: the section it reads, and where real requests go once weights are applied."""

from __future__ import annotations

import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from haproxy_process import (
    HaproxyProcess,
    ServingNode,
    SlowRequest,
    check_configuration,
    make_configuration,
    require_haproxy,
    serving_nodes,
)
from node_manager import haproxy
from node_manager.domain import Admin, Health
from node_manager.haproxy import Change, ChangeKind, HaproxyError, Mode, RuntimeApi, render_backend, server_name
from node_manager.load_distribution import Target, TrafficState, Weight, distribute

REQUESTS = 400
TOLERANCE_POINTS = 2
NODE_IDS = ["gw-1", "gw-2", "gw-3", "gw-4"]
HOSTILE_NODE_IDS = [
    "gw-1 127.0.0.9:1\n    server evil 127.0.0.9:1",
    "gw-1;show info",
    "gw-1/../x",
    'gw-1"#',
    "gw-1\\ x",
    "${HOME}",
    "BACKEND",
    "gw-1\u2028x",
    "\udce4",
    "a" * 254,
    "",
]
HOSTILE_ADDRESSES = [
    "",
    "192.0.2.7 weight 256",
    "192.0.2.7\n    server evil 192.0.2.8:80",
    "192.0.2.7;shutdown",
    "192.0.2.7:81",
    "gw-1.example.net:81",
    "0.0.0.0",
    "0",
    "0x0",
    "gw.0x",
    "::",
    "::ffff:0.0.0.0",
    "224.0.0.1",
    "*",
    "fe80::7%eth0",
    "fe80::7%a b",
    "unix@/run/docker.sock",
    "/run/docker.sock",
    "fd@3",
    "abns@x",
    "${HOME}",
    "gw\u212a.example.net",
    "a" * 254,
]


@dataclass
class Deployment:
    """A deployment on serving nodes behind a HAProxy, as the manager sees it."""

    haproxy: HaproxyProcess
    nodes: dict[str, ServingNode]
    targets: dict[str, Target]
    weights: list[Weight]

    @property
    def api(self) -> RuntimeApi:
        """Give the runtime API of the HAProxy."""
        return RuntimeApi(self.haproxy.socket_path)

    def see(self, node_id: str, **seen: object) -> list[Change]:
        """See something new of a node, share the traffic anew and apply that."""
        self.targets[node_id] = replace(self.targets[node_id], **seen)
        before = {weight.node_id: weight.weight for weight in self.weights}
        self.weights = distribute(list(self.targets.values()), before)
        return self.api.apply("shop", self.weights)

    def points(self) -> dict[str, int]:
        """Give the weights by node."""
        return {weight.node_id: weight.weight for weight in self.weights}


@pytest.fixture
def deployment() -> Iterator[Deployment]:
    """Run four idle healthy nodes behind a HAProxy that has the section rendered for them."""
    with serving_nodes(NODE_IDS) as nodes:
        targets = {
            node.node_id: Target(node.node_id, node.address, 1, Admin.ACTIVE, Health.HEALTHY, True, 0.0, 30.0, 0.0)
            for node in nodes.values()
        }
        weights = distribute(list(targets.values()), {})
        backend = render_backend("shop", weights, nodes["gw-1"].port)
        with HaproxyProcess(backend, "shop") as process:
            yield Deployment(process, nodes, targets, weights)


def make_weight(node_id: str = "gw-1", address: str = "192.0.2.7", weight: int = 100) -> Weight:
    """Make one node's weight."""
    return Weight(node_id, address, weight, TrafficState.READY if weight else TrafficState.DOWN, "")


def assert_shares(points: dict[str, int], answered: Counter[str]) -> None:
    """Each node answered its share, and nobody else answered."""
    total = answered.total()
    shares = {node_id: 100 * answered[node_id] / total for node_id in points}
    assert set(answered) == {node_id for node_id, weight in points.items() if weight}
    assert shares == pytest.approx(points, abs=TOLERANCE_POINTS)


# the section


@pytest.mark.parametrize("mode", Mode)
def test_render_backend_is_accepted(mode: Mode) -> None:
    weights = [
        make_weight("gw-1", "192.0.2.7", 40),
        make_weight("gw-2.plant-2", "2001:db8::7", 40),
        make_weight("gw-3", "gw-3.invalid", 20),
        make_weight("gw-4", "::ffff:192.0.2.9", 0),
        Weight("gw-5", "192.0.2.8", 0, TrafficState.DRAIN, "draining"),
        make_weight("a" * 63 + ("." + "b" * 63) * 2, "c" * 63 + ".invalid.", 0),
    ]

    rendered = render_backend("shop:v1", weights, 8080, mode=mode, check_path="/healthz?full=1")
    whole = make_configuration(rendered, "shop:v1", "127.0.0.1:1", Path("/nowhere"))
    judged = check_configuration(
        whole.replace("    mode http\nfront", f"    mode {mode}\nfront").replace(
            "    mode http\n    timeout", f"    mode {mode}\n    timeout"
        )
    )

    assert (judged.returncode, "ALERT" in judged.stderr) == (0, False), judged.stderr


def test_render_backend_is_what_it_says() -> None:
    weights = [
        make_weight(weight=60),
        make_weight("gw-2", "2001:DB8::7", 40),
        make_weight("gw-3", "GW-3.example.net", 0),
    ]

    rendered = render_backend("shop", weights, 8080, check_path="/healthz")

    assert rendered == (
        "backend shop\n"
        "    mode http\n"
        "    balance roundrobin\n"
        "    option redispatch\n"
        "    option httpchk GET /healthz\n"
        "    default-server check inter 2s fall 3 rise 2 init-addr last,libc,none\n"
        "    server gw-1 192.0.2.7:8080 weight 60\n"
        "    server gw-2 [2001:db8::7]:8080 weight 40\n"
        "    server gw-3 gw-3.example.net:8080 weight 0 disabled\n"
    )


def test_render_backend_gives_hostile_ids_harmless_names() -> None:
    weights = [make_weight(node_id, "127.0.0.9", 9) for node_id in HOSTILE_NODE_IDS]
    rendered = render_backend("shop", weights, 8080)

    with HaproxyProcess(rendered, "shop") as process:
        answer = RuntimeApi(process.socket_path).command("show servers state shop")

    names = [line.split()[3] for line in answer.splitlines()[2:]]
    assert names == [server_name(node_id) for node_id in HOSTILE_NODE_IDS]
    assert len(set(names)) == len(HOSTILE_NODE_IDS)
    assert not set(names) & {"evil", "gw-1", "BACKEND"}


@pytest.mark.parametrize("address", HOSTILE_ADDRESSES, ids=ascii)
def test_render_backend_refuses_hostile_addresses(address: str) -> None:
    with pytest.raises(HaproxyError, match="server gw-1: address "):
        render_backend("shop", [make_weight(address=address)], 8080)


@pytest.mark.parametrize("name", ["", "shop x", "shop\nlisten x", "shop#", "shop/x", "sh\u00f6p", "a" * 256], ids=ascii)
def test_render_backend_refuses_hostile_names(name: str) -> None:
    with pytest.raises(HaproxyError, match="expected 1 to 255 letters"):
        render_backend(name, [make_weight()], 8080)


@pytest.mark.parametrize("path", ["healthz", "/ x", "/\nserver", "/%[env(HOME)]", "/#", '/"', "/$HOME"], ids=ascii)
def test_render_backend_refuses_hostile_check_paths(path: str) -> None:
    with pytest.raises(HaproxyError, match="expected a /"):
        render_backend("shop", [make_weight()], 8080, check_path=path)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_render_backend_refuses_other_ports(port: int) -> None:
    with pytest.raises(HaproxyError, match="expected 1 to 65535"):
        render_backend("shop", [make_weight()], port)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([make_weight(), make_weight()], "twice"),
        ([make_weight(weight=257)], "expected 0 to 256"),
        ([make_weight(weight=-1)], "expected 0 to 256"),
        ([replace(make_weight(), state=TrafficState.DRAIN)], "0 unless it is ready"),
    ],
    ids=["twice", "large", "negative", "drained with weight"],
)
def test_render_backend_refuses_other_weights(weights: list[Weight], message: str) -> None:
    with pytest.raises(HaproxyError, match=message):
        render_backend("shop", weights, 8080)


# where requests go


def test_apply_balances_equal_nodes(deployment: Deployment) -> None:
    changes = deployment.api.apply("shop", deployment.weights)

    assert changes == []
    assert_shares(dict.fromkeys(NODE_IDS, 25), deployment.haproxy.ask(REQUESTS))


def test_apply_takes_traffic_from_a_loaded_node(deployment: Deployment) -> None:
    deployment.see("gw-1", cpu_percent=80.0)

    answered = deployment.haproxy.ask(REQUESTS)

    assert deployment.points() == {"gw-1": 7, "gw-2": 31, "gw-3": 31, "gw-4": 31}
    assert_shares(deployment.points(), answered)


def test_apply_drains_and_keeps_what_is_established(deployment: Deployment) -> None:
    for node_id in NODE_IDS[1:]:
        deployment.see(node_id, admin=Admin.DRAINING)
    with SlowRequest(deployment.haproxy) as slow:
        assert deployment.nodes["gw-1"].slow_begun.wait(10)

        for node_id in NODE_IDS[1:]:
            deployment.see(node_id, admin=Admin.ACTIVE)
        changes = deployment.see("gw-1", admin=Admin.DRAINING)
        answered = deployment.haproxy.ask(REQUESTS)
        deployment.nodes["gw-1"].release.set()
        finished = slow.finish()

    assert Change("gw-1", ChangeKind.STATE, "ready", "drain") in changes
    assert_shares({"gw-1": 0, "gw-2": 34, "gw-3": 33, "gw-4": 33}, answered)
    assert finished == (200, "gw-1")


@pytest.mark.parametrize(
    "seen",
    [
        {"health": Health.SUSPECT},
        {"health": Health.UNREACHABLE},
        {"answering": False},
        {"admin": Admin.MAINTENANCE},
        {"admin": Admin.OFFLINE},
        {"replicas": 0},
    ],
    ids=str,
)
def test_apply_sends_nothing_to_a_bad_node(deployment: Deployment, seen: dict[str, object]) -> None:
    changes = deployment.see("gw-2", **seen)

    answered = deployment.haproxy.ask(REQUESTS // 4)

    assert Change("gw-2", ChangeKind.STATE, "ready", "maint") in changes
    assert_shares(deployment.points(), answered)
    assert answered["gw-2"] == 0


def test_apply_brings_a_node_back_at_half_weight_and_then_whole(deployment: Deployment) -> None:
    deployment.see("gw-2", health=Health.UNREACHABLE)
    away = deployment.haproxy.ask(REQUESTS)

    deployment.see("gw-2", health=Health.HEALTHY, probation=True)
    half = deployment.haproxy.ask(REQUESTS)
    deployment.see("gw-2", probation=False)
    whole = deployment.haproxy.ask(REQUESTS)

    assert_shares({"gw-1": 34, "gw-2": 0, "gw-3": 33, "gw-4": 33}, away)
    assert_shares({"gw-1": 29, "gw-2": 14, "gw-3": 29, "gw-4": 28}, half)
    assert_shares(dict.fromkeys(NODE_IDS, 25), whole)


def test_apply_loses_no_request_while_traffic_moves(deployment: Deployment) -> None:
    answered: Counter[str] = Counter()
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            answered.update(deployment.haproxy.ask(20))

    asking = threading.Thread(target=keep_asking, name="asking")
    asking.start()
    try:
        for _ in range(10):
            for node_id, other in zip(NODE_IDS, [*NODE_IDS[1:], NODE_IDS[0]], strict=True):
                deployment.targets[other] = replace(deployment.targets[other], admin=Admin.ACTIVE)
                for rest in set(NODE_IDS) - {node_id, other}:
                    deployment.targets[rest] = replace(deployment.targets[rest], admin=Admin.MAINTENANCE)
                deployment.see(node_id, admin=Admin.MAINTENANCE)
    finally:
        stop.set()
        asking.join(60)

    assert set(answered) <= set(NODE_IDS)
    assert answered.total() > 0


# what is set


def test_apply_sets_only_what_differs(deployment: Deployment) -> None:
    first = deployment.see("gw-1", admin=Admin.MAINTENANCE)

    second = deployment.api.apply("shop", deployment.weights)

    assert first == [
        Change("gw-2", ChangeKind.WEIGHT, "25", "34"),
        Change("gw-3", ChangeKind.WEIGHT, "25", "33"),
        Change("gw-4", ChangeKind.WEIGHT, "25", "33"),
        Change("gw-1", ChangeKind.STATE, "ready", "maint"),
        Change("gw-1", ChangeKind.WEIGHT, "25", "0"),
    ]
    assert second == []


def test_apply_adds_a_missing_server_with_its_checks_on(deployment: Deployment) -> None:
    port = deployment.nodes["gw-1"].port
    with ServingNode("gw-5", "127.0.31.105", port) as node:
        deployment.targets["gw-5"] = replace(deployment.targets["gw-1"], node_id="gw-5", address=node.address)
        weights = distribute(list(deployment.targets.values()), {})

        changes = deployment.api.apply("shop", weights, port=port)
        again = deployment.api.apply("shop", weights, port=port)
        answered = deployment.haproxy.ask(REQUESTS)

    (line,) = [line for line in deployment.api.command("show servers state shop").splitlines() if " gw-5 " in line]
    assert changes[-2:] == [
        Change("gw-5", ChangeKind.ADDED, "", f"127.0.31.105:{port}"),
        Change("gw-5", ChangeKind.STATE, "maint", "ready"),
    ]
    assert again == []
    assert_shares(dict.fromkeys([*NODE_IDS, "gw-5"], 20), answered)
    # srv_check_state: configured and enabled.
    assert int(line.split()[13]) & 6 == 6


def test_apply_adds_nothing_for_a_node_without_traffic(deployment: Deployment) -> None:
    changes = deployment.api.apply("shop", [*deployment.weights, make_weight("gw-5", "127.0.31.105", 0)], port=80)

    assert changes == []


@pytest.mark.parametrize(
    ("missing", "port", "message"),
    [
        (make_weight("gw-5", "127.0.31.105", 20), None, "server gw-5: isn't in the backend; say the port"),
        (
            make_weight("gw-5", "gw-5.example.net", 20),
            80,
            r"server gw-5: HAProxy looks up host names \(gw-5.example.net\)",
        ),
        (make_weight("gw-5", "127.0.0.1;shutdown", 20), 80, "server gw-5: address '127.0.0.1;shutdown'"),
    ],
    ids=["no port", "host name", "hostile"],
)
def test_apply_reports_what_it_can_not_add_and_sets_the_rest(
    deployment: Deployment, missing: Weight, port: int | None, message: str
) -> None:
    rest = [replace(weight, weight=20) for weight in deployment.weights]

    with pytest.raises(HaproxyError, match=message) as caught:
        deployment.api.apply("shop", [missing, *rest], port=port)

    assert caught.value.changes == tuple(Change(node_id, ChangeKind.WEIGHT, "25", "20") for node_id in NODE_IDS)


def test_apply_follows_a_node_to_its_new_address(deployment: Deployment) -> None:
    with ServingNode("moved", "127.0.31.200", deployment.nodes["gw-1"].port):
        changes = deployment.see("gw-1", address="127.0.31.200")
        answered = deployment.haproxy.ask(REQUESTS)

    assert changes == [Change("gw-1", ChangeKind.ADDRESS, "127.0.31.1", "127.0.31.200")]
    assert_shares({"moved": 25, "gw-2": 25, "gw-3": 25, "gw-4": 25}, answered)


def test_apply_drains_servers_of_nodes_that_left(deployment: Deployment) -> None:
    weights = [make_weight("gw-1", deployment.nodes["gw-1"].address)]

    kept = deployment.api.apply("shop", weights, keep_others=True)
    changes = deployment.api.apply("shop", weights)

    assert kept == [Change("gw-1", ChangeKind.WEIGHT, "25", "100")]
    assert changes == [Change(node_id, ChangeKind.STATE, "ready", "drain") for node_id in NODE_IDS[1:]]
    assert deployment.haproxy.ask(20) == {"gw-1": 20}


def test_apply_sends_nothing_to_a_name_that_was_not_found() -> None:
    weights = [make_weight("gw-1", "gw-1.invalid", 50), make_weight("gw-2", "127.0.31.1", 50)]
    renamed = [make_weight("gw-1", "127.0.31.2", 50), weights[1]]
    drained = [Weight("gw-1", "gw-1.invalid", 0, TrafficState.DRAIN, "draining"), weights[1]]

    with HaproxyProcess(render_backend("shop", weights, 8080), "shop") as process:
        api = RuntimeApi(process.socket_path)
        with pytest.raises(HaproxyError, match="server gw-1: HAProxy looks up host names"):
            api.apply("shop", weights)
        with pytest.raises(HaproxyError, match=r"server gw-1: HAProxy found no address for gw-1\.invalid"):
            api.apply("shop", renamed)
        changes = api.apply("shop", drained)

    assert changes == [Change("gw-1", ChangeKind.WEIGHT, "50", "0")]


# what is refused


def test_apply_does_not_empty_a_backend_unless_told(deployment: Deployment) -> None:
    nobody = [
        Weight(weight.node_id, weight.address, 0, TrafficState.DOWN, "not seen lately") for weight in deployment.weights
    ]

    with pytest.raises(HaproxyError, match=r"no node may take traffic \(gw-1: not seen lately; ") as caught:
        deployment.api.apply("shop", nobody)
    kept = deployment.haproxy.ask(4)
    deployment.api.apply("shop", nobody, allow_empty=True)
    emptied = deployment.haproxy.ask(4)

    assert caught.value.changes == ()
    assert kept == dict.fromkeys(NODE_IDS, 1)
    assert emptied == {"503": 4}


def test_apply_leaves_a_backend_alone_that_has_none_of_the_nodes(deployment: Deployment) -> None:
    with pytest.raises(HaproxyError, match="is it the right backend"):
        deployment.api.apply("shop", [make_weight("cam-1", "127.0.31.9")], port=80)

    assert_shares(dict.fromkeys(NODE_IDS, 25), deployment.haproxy.ask(40))


def test_apply_says_that_the_backend_is_missing(deployment: Deployment) -> None:
    with pytest.raises(HaproxyError, match="HAProxy has no backend shop2; add"):
        deployment.api.apply("shop2", deployment.weights)


@pytest.mark.parametrize("name", ["shop;show info", "shop\nshow info", "#1", ""], ids=ascii)
def test_apply_refuses_hostile_names(name: str) -> None:
    with pytest.raises(HaproxyError, match="expected 1 to 255 letters"):
        RuntimeApi(Path("/nowhere")).apply(name, [make_weight()])


def test_apply_says_that_the_socket_needs_another_level(deployment: Deployment) -> None:
    api = RuntimeApi(deployment.haproxy.folder / "operator.sock")

    with pytest.raises(HaproxyError, match=r"server gw-1: .*operator.sock: permission denied; .* needs 'level admin'"):
        api.apply("shop", [replace(deployment.weights[0], weight=100)], keep_others=True)


def test_apply_says_what_haproxy_answered() -> None:
    section = (
        "backend shop\n    balance static-rr\n    server gw-1 192.0.2.7:80 weight 7\n    server gw-2 192.0.2.8:80\n"
    )
    weights = [make_weight(weight=50), make_weight("gw-2", "192.0.2.8", 50)]

    with HaproxyProcess(section, "shop") as process, pytest.raises(HaproxyError) as caught:
        RuntimeApi(process.socket_path).apply("shop", weights)

    assert str(caught.value).startswith("backend shop: server gw-1: HAProxy answered 'Backend is using a static LB")
    assert "; server gw-2: HAProxy answered" in str(caught.value)


@contextmanager
def answering_socket(*chunks: bytes, close: bool = True, pause_seconds: float = 0) -> Iterator[Path]:
    """Listen where a HAProxy would and answer this to one caller, who hangs up first unless *close*."""
    hung_up = threading.Event()

    with tempfile.TemporaryDirectory(prefix="haproxy-") as folder, socket.socket(socket.AF_UNIX) as listener:
        path = Path(folder, "s.sock")
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(20)
                try:
                    connection.recv(4096)
                    for chunk in chunks:
                        connection.sendall(chunk)
                        hung_up.wait(pause_seconds)
                    while not close and connection.recv(4096):
                        pass
                except OSError:
                    return

        thread = threading.Thread(target=answer, name="answering")
        thread.start()
        try:
            yield path
        finally:
            hung_up.set()
            thread.join(30)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"2\n# be_name\n",
        b"1\n# be_name srv_name\nshop gw-1\n",
        b"HTTP/1.1 400 Bad request\r\n\x1b[2J\r\n",
        b"\xff\xfe",
    ],
    ids=ascii,
)
def test_apply_refuses_an_answer_of_something_else(answer: bytes) -> None:
    with answering_socket(answer) as path, pytest.raises(HaproxyError, match="which isn't its version 1") as caught:
        RuntimeApi(path).apply("shop", [make_weight()])

    assert str(caught.value).isprintable()


COLUMNS = b"1\n# be_name srv_name srv_addr srv_admin_state srv_uweight srv_check_state srv_fqdn\n"


@pytest.mark.parametrize(
    "line", [b"shop gw-1\n", b"shop gw-1 - x 1 6 -\n", b"shop gw-1;show 192.0.2.7 0 1 6 -\n"], ids=ascii
)
def test_apply_refuses_a_line_that_is_no_server(line: bytes) -> None:
    with answering_socket(COLUMNS + line) as path, pytest.raises(HaproxyError, match="not a server's"):
        RuntimeApi(path).apply("shop", [make_weight()])


def test_apply_gives_up_on_a_socket_that_does_not_answer() -> None:
    with answering_socket(b"1\n", close=False) as path, pytest.raises(HaproxyError, match=r"no full answer in 0.2 s"):
        RuntimeApi(path, timeout_seconds=0.2).apply("shop", [make_weight()])


def test_apply_gives_up_on_an_answer_that_drips() -> None:
    with (
        answering_socket(*[b"x"] * 40, pause_seconds=0.05) as path,
        pytest.raises(HaproxyError, match=r"no full answer in 0.2 s"),
    ):
        RuntimeApi(path, timeout_seconds=0.2).apply("shop", [make_weight()])


def test_apply_reads_no_endless_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haproxy, "_LIMIT_ANSWER_BYTES", 200_000)

    with (
        answering_socket(*[b"x" * 100_000] * 3, close=False) as path,
        pytest.raises(HaproxyError, match="more than 200000 bytes"),
    ):
        RuntimeApi(path).apply("shop", [make_weight()])


@pytest.mark.parametrize("path", ["/nowhere/s.sock", "/tmp/" + "x" * 200, "/dev/null"])
def test_apply_says_that_the_socket_can_not_be_used(path: str) -> None:
    with pytest.raises(HaproxyError, match="it must be the path of a 'stats socket'"):
        RuntimeApi(Path(path)).apply("shop", [make_weight()])


def test_require_haproxy_finds_the_program() -> None:
    assert require_haproxy("the tests above need it").name == "haproxy"
