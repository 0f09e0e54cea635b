#!/usr/bin/python
# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: node_health
short_description: Run health checks on a node
version_added: "0.1.0"
description:
  - Runs the health checks of a node type on the node, side by side, and holds a sample of its resources against
    thresholds.
  - A check that fails is data, not a failed task. The task fails only if it could not look, for example because a check
    is written wrongly.
author:
  - The Node Manager developers (!UNKNOWN)
attributes:
  check_mode:
    description: Can run in C(check_mode) and returns what it would without it, because it changes nothing.
    support: full
  diff_mode:
    description: Will return details on what has changed when in diff mode.
    support: N/A
    details: It changes nothing.
  idempotent:
    description: A second run with the same arguments indicates no change.
    support: full
  platform:
    description: The operating systems of the nodes.
    platforms: linux
    support: full
requirements:
  - Python 3.8 or newer on the node
options:
  checks:
    description:
      - The checks to run. Each has a C(name), a C(kind), the keys of that kind, and optionally C(severity) (V(critical)
        or V(warning), default V(critical)) and C(timeout_seconds) (default V(3)).
      - V(tcp) takes C(host) (default V(127.0.0.1)) and C(port). It passes when a connection is accepted.
      - V(http) takes C(url), C(expect_status) (default V([200])), C(expect_text) and C(verify_tls) (default V(true)).
        It passes when the status is one of those and the text occurs in the first 64 KiB. Redirects are not followed.
      - V(dns) takes C(hostname). It passes when that resolves.
      - V(service) takes C(unit). It passes when that systemd unit is active.
      - V(process) takes C(process). It passes when a process of that name runs.
      - V(container) takes C(container). It passes when a container of that name runs and is not unhealthy.
      - V(port) takes C(port) and C(protocol) (V(tcp) or V(udp), default V(tcp)). It passes when something listens.
      - V(filesystem) takes C(mount), C(space_percent) and C(inodes_percent) (both default to V(95)). It passes when
        that is mounted, writable, and both are below their limit.
      - V(certificate) takes C(path), or C(host), C(port) and optionally C(server_name), and C(days) (default V(14)). It
        passes when the certificate stays valid for at least that many days.
      - V(clock) takes C(max_offset_seconds) (default V(1.0)). It passes when the clock is synchronised.
      - V(command) takes C(argv). It passes when that exits 0. No shell is involved.
    type: list
    elements: dict
    default: []
  thresholds:
    description:
      - Limits for what a sample holds, by what they watch. Each has C(warning), C(critical) or both.
      - The names are V(cpu_percent), V(load_per_cpu), V(memory_percent), V(swap_percent), V(disk_percent),
        V(inodes_percent) and V(temperature_celsius).
    type: dict
    default: {}
  sample:
    description:
      - The RV(iot_platform.node_manager.node_resources#module:sample) to hold against O(thresholds), and to look for
        containers in.
      - Without it the module takes a sample itself if there are O(thresholds), which takes about a second.
    type: dict
  timeout_seconds:
    description: How long all of it may take. Checks that are not finished by then are reported as unknown.
    type: float
    default: 20
seealso:
  - module: iot_platform.node_manager.node_resources
"""

EXAMPLES = r"""
- name: See whether the node can be logged in to, and has room
  iot_platform.node_manager.node_health:
    checks:
      - {name: ssh, kind: port, port: 22}
      - {name: disk-root, kind: filesystem, mount: /, space_percent: 90}
      - {name: clock, kind: clock, severity: warning}
  register: health

- name: Show what is wrong
  ansible.builtin.debug:
    msg: "{{ health.report.checks | rejectattr('state', 'equalto', 'passed') | map(attribute='message') }}"

- name: Hold the resources against limits
  iot_platform.node_manager.node_health:
    thresholds:
      memory_percent: {warning: 85, critical: 95}
      disk_percent: {warning: 85, critical: 95}

- name: Stop a rolling update where a service does not answer
  iot_platform.node_manager.node_health:
    checks:
      - name: web
        kind: http
        url: http://127.0.0.1:8080/healthz
        expect_status: [200, 204]
        timeout_seconds: 2
  register: web
  failed_when: web.report.checks | selectattr('state', 'equalto', 'failed') | list | length > 0
"""

RETURN = r"""
report:
  description: What was found, in the order of O(checks), then O(thresholds).
  returned: success
  type: dict
  contains:
    schema:
      description: The version of this shape.
      type: int
      returned: success
      sample: 1
    duration_seconds:
      description: How long the checks took, without the sample.
      type: float
      returned: success
      sample: 0.21
    checks:
      description: One entry for each check.
      type: list
      elements: dict
      returned: success
      contains:
        name:
          description: The name of the check, or of the threshold with the filesystem it was held against.
          type: str
          returned: success
          sample: disk-root
        kind:
          description: The kind of the check, V(threshold) for thresholds.
          type: str
          returned: success
          sample: filesystem
        severity:
          description: How much a failure weighs, V(critical) or V(warning).
          type: str
          returned: success
          sample: critical
        state:
          description: V(passed), V(failed), or V(unknown) if nobody could look.
          type: str
          returned: success
          sample: failed
        message:
          description: What was seen and what to do about it.
          type: str
          returned: success
          sample: "/ is 97.0 % full (limit 95 %): free space or extend it"
        latency_seconds:
          description: How long the check took.
          type: float
          returned: success
          sample: 0.0001
        value:
          description: The number that was judged, V(null) if there is none.
          type: float
          returned: success
          sample: 97.0
        unit:
          description: The unit of RV(report.checks[].value).
          type: str
          returned: success
          sample: percent
"""

import time
from typing import Any, Dict, List, Mapping

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.iot_platform.node_manager.plugins.module_utils._checks import (
    Check,
    CheckFormatError,
    parse_check,
    parse_thresholds,
    run_checks,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe import (
    DEFAULT_INTERVAL_SECONDS,
    DEFAULT_TIMEOUT_SECONDS,
    collect_sample,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_read import Reader

ARGUMENT_SPEC: Dict[str, Dict[str, Any]] = {
    "checks": {"type": "list", "elements": "dict", "default": []},
    "thresholds": {"type": "dict", "default": {}},
    "sample": {"type": "dict"},
    "timeout_seconds": {"type": "float", "default": 20},
}


def parse_checks(raw: List[Mapping[str, object]]) -> List[Check]:
    """Read a list of checks, whose names must tell them apart.

    Errors: CheckFormatError naming the place in the list, the check and the key.
    """
    checks: List[Check] = []
    for position, item in enumerate(raw):
        try:
            check = parse_check(item)
        except CheckFormatError as error:
            raise CheckFormatError(f"checks[{position}]: {error}") from None
        if any(check.name == earlier.name for earlier in checks):
            raise CheckFormatError(f'checks[{position}]: check "{check.name}": name: expected one not used before')
        checks.append(check)
    return checks


def measure(params: Dict[str, Any]) -> Dict[str, object]:
    """Take a sample if one is needed and none was given, then run the checks in the time that is left."""
    started = time.monotonic()
    checks, thresholds = parse_checks(params["checks"]), parse_thresholds(params["thresholds"])
    timeout_seconds = params["timeout_seconds"]
    # The comparison also refuses NaN.
    if not 0.1 <= timeout_seconds <= 3600:
        raise CheckFormatError(f"timeout_seconds: expected a number from 0.1 to 3600, got {timeout_seconds:g}")
    sample = params["sample"]
    if sample is None and thresholds:
        # At most half of the time, so that a node that reads slowly still gets its checks.
        half_seconds = timeout_seconds / 2
        sample = collect_sample(
            Reader(),
            interval_seconds=min(DEFAULT_INTERVAL_SECONDS, half_seconds / 2),
            timeout_seconds=min(DEFAULT_TIMEOUT_SECONDS, half_seconds),
        )
    left_seconds = max(0.1, timeout_seconds - (time.monotonic() - started))
    return run_checks(checks, sample, thresholds=thresholds, deadline_seconds=left_seconds)


def main() -> None:
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    try:
        report = measure(module.params)
    except CheckFormatError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, report=report)


if __name__ == "__main__":
    main()
