# SPDX-License-Identifier: GPL-3.0-or-later
"""What is made of the texts that OpenSSH and Ansible give.

Those of a refused, a frozen and an unreachable login, of a changed key and of a missing Python were provoked on real nodes
(OpenSSH 9.2, ansible-core 2.19); the others follow the programs' sources and documentation.
"""

from __future__ import annotations

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils._contact import classify
from ansible_collections.iot_platform.node_manager.plugins.module_utils._words import ContactReason

PREAMBLE = "Task failed: Failed to connect to the host via ssh: "
CHANGED = f"""{PREAMBLE}@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
@    WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED!     @
@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@@
IT IS POSSIBLE THAT SOMEONE IS DOING SOMETHING NASTY!
Offending ED25519 key in /tmp/home/known_hosts:3
Host key for node-3 has changed and you have requested strict checking.
Host key verification failed."""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(
            "ssh: connect to host 127.0.60.2 port 22: Connection refused",
            ContactReason.CONNECTION_REFUSED,
            id="refused",
        ),
        pytest.param(
            "ssh: connect to host 10.0.0.9 port 22: Connection timed out", ContactReason.TIMED_OUT, id="timeout"
        ),
        pytest.param(
            "Connection timed out during banner exchange\nConnection to 127.0.60.2 port 22 timed out",
            ContactReason.TIMED_OUT,
            id="frozen-node",
        ),
        pytest.param("ssh: connect to host 172.20.0.9 port 22: No route to host", ContactReason.NO_ROUTE, id="route"),
        pytest.param(
            "ssh: Could not resolve hostname gw.invalid: Name or service not known",
            ContactReason.NAME_NOT_RESOLVED,
            id="name",
        ),
        pytest.param("Shared connection to 127.0.60.2 closed.", ContactReason.CONNECTION_LOST, id="closed"),
        pytest.param(
            "Timeout, server 127.0.60.2 not responding.", ContactReason.CONNECTION_LOST, id="keepalive-missed"
        ),
        pytest.param(
            "manager@127.0.60.4: Permission denied (publickey).", ContactReason.AUTHENTICATION_FAILED, id="wrong-key"
        ),
        pytest.param(
            "No RSA host key is known for gw-7 and you have requested strict checking.\nHost key verification failed.",
            ContactReason.HOST_KEY_CHANGED,
            id="key-of-another-kind",
        ),
        pytest.param(
            "No ED25519 host key is known for 127.0.1.1 and you have requested strict checking.\r\n"
            "Host key verification failed.",
            ContactReason.MANAGER_FAULT,
            id="key-unknown-to-this-controller",
        ),
        pytest.param(
            "ssh: connect to host 192.0.2.1 port 22: Network is unreachable",
            ContactReason.MANAGER_FAULT,
            id="own-network",
        ),
        pytest.param(
            "unix_listener: cannot bind to path /root/.ansible/cp/0f: No space left on device",
            ContactReason.MANAGER_FAULT,
            id="control-socket",
        ),
        pytest.param("[Errno 24] Too many open files", ContactReason.MANAGER_FAULT, id="file-descriptors"),
        pytest.param(
            'Load key "/srv/key": error in libcrypto\nmanager@127.0.60.1: Permission denied (publickey).',
            ContactReason.MANAGER_FAULT,
            id="key-unreadable",
        ),
        pytest.param("something nobody has seen before", ContactReason.CONNECTION_LOST, id="unknown"),
    ],
)
def test_classify_names_why_a_node_is_unreachable(text: str, reason: ContactReason) -> None:
    found, _ = classify(PREAMBLE + text, unreachable=True, node_id="gw-7")

    assert reason is found


def test_classify_tells_a_changed_host_key() -> None:
    reason, message = classify(CHANGED, unreachable=True, node_id="node-3")

    assert ContactReason.HOST_KEY_CHANGED is reason
    assert message == "Host key for node-3 has changed and you have requested strict checking."


def test_classify_prefers_the_network_over_an_unreadable_key() -> None:
    text = (
        f'{PREAMBLE}Load key "/srv/key": error in libcrypto\nssh: connect to host 192.0.2.7 port 22: Connection refused'
    )

    reason, message = classify(text, unreachable=True)

    assert ContactReason.CONNECTION_REFUSED is reason
    assert message == "ssh: connect to host 192.0.2.7 port 22: Connection refused"


@pytest.mark.parametrize(
    ("message", "output", "return_code", "reason"),
    [
        pytest.param(
            "Task failed: Action failed: The module interpreter '/usr/bin/python3' was not found.",
            "/bin/sh: 1: /usr/bin/python3: not found",
            127,
            ContactReason.PYTHON_MISSING,
            id="no-python",
        ),
        pytest.param(
            "Module result deserialization failed: No start of json char found",
            'Traceback (most recent call last):\n  File "<stdin>", line 12\nZeroDivisionError: division by zero',
            1,
            ContactReason.MODULE_FAILED,
            id="crash",
        ),
        pytest.param(
            "Module result deserialization failed: No start of json char found",
            "welcome to this node",
            0,
            ContactReason.OUTPUT_UNUSABLE,
            id="garbage",
        ),
        pytest.param(
            "Module result deserialization failed: No start of json char found",
            "",
            127,
            ContactReason.PYTHON_MISSING,
            id="silent-python-shim",
        ),
        pytest.param(
            "Task failed: Timed out after 60 second(s).", "", None, ContactReason.MODULE_FAILED, id="task-timeout"
        ),
        pytest.param("Missing sudo password", "", None, ContactReason.AUTHENTICATION_FAILED, id="sudo"),
        pytest.param(
            "Task failed: [Errno 28] No space left on device: '/root/.ansible/tmp/x'",
            "",
            None,
            ContactReason.MANAGER_FAULT,
            id="own-disk",
        ),
        pytest.param(
            "Task failed: Finalization of task args for 'x' failed: Error while resolving value for 'checks'",
            "",
            None,
            ContactReason.MANAGER_FAULT,
            id="own-template",
        ),
        pytest.param("anything", "", None, ContactReason.MODULE_FAILED, id="unknown"),
    ],
)
def test_classify_names_why_a_module_failed(
    message: str, output: str, return_code: int | None, reason: ContactReason
) -> None:
    found, _ = classify(message, unreachable=False, output=output, return_code=return_code)

    assert reason is found


def test_classify_shows_the_last_line_of_a_crash() -> None:
    output = 'Traceback (most recent call last):\n  File "<stdin>", line 12\nZeroDivisionError: division by zero\n'

    _, message = classify("Module result deserialization failed", unreachable=False, output=output, return_code=1)

    assert message == "the module crashed: ZeroDivisionError: division by zero"


def test_classify_never_excuses_a_node_by_what_its_module_says() -> None:
    reason, message = classify("could not look: [Errno 24] Too many open files", unreachable=False, answered=True)

    assert ContactReason.MODULE_FAILED is reason
    assert message == "could not look: [Errno 24] Too many open files"


def test_classify_bounds_and_cleans_the_message() -> None:
    _, message = classify("a\x1b[31m\x00\u2028" + "b" * 10_000_000, unreachable=True)

    assert len(message) <= 500
    assert message.startswith("a [31m b")
