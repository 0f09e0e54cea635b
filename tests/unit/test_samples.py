# SPDX-License-Identifier: GPL-3.0-or-later
"""What a sample comes down to."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from builders import make_container, make_containers, make_filesystem, make_interface, make_sample
from node_manager.samples import applications_of, summarise
from node_manager.shapes import Application, Sample


def sample(**changes: Any) -> Sample:
    """Read one sample."""
    return Sample.model_validate(make_sample(**changes))


def test_summarise_gives_the_numbers_people_ask_for() -> None:
    pressure = {"some_avg60_percent": 7.5}
    whole = make_sample(
        12.5,
        thermal={"temperature_celsius": 51.1, "throttled": None},
        containers=make_containers(make_container("a"), make_container("b", state="exited")),
    )
    whole["cpu"]["pressure"] = pressure
    whole["memory"]["swap_use_percent"] = 3.0

    assert asdict(summarise(Sample.model_validate(whole))) == {
        "cpu_percent": 12.5,
        "memory_percent": 30.0,
        "swap_percent": 3.0,
        "disk_percent": 40.0,
        "disk_fullest_mount": "/",
        "load_1m": 0.4,
        "cpu_pressure_avg60_percent": 7.5,
        "received_bytes_per_second": 1200.0,
        "transmitted_bytes_per_second": 800.0,
        "temperature_celsius": 51.1,
        "containers_running": 1,
    }


def test_summarise_of_a_sample_without_parts_knows_nothing() -> None:
    parts = ("cpu", "memory", "io", "filesystems", "network", "containers", "thermal", "root_read_only")

    assert set(asdict(summarise(sample(**dict.fromkeys(parts)))).values()) == {None}


def test_summarise_takes_the_fullest_filesystem_that_can_be_written() -> None:
    filesystems = [
        make_filesystem("/", 40.0),
        make_filesystem("/var", 70.0),
        make_filesystem("/snap", 100.0, read_only=True),
    ]

    use = summarise(sample(filesystems=filesystems))

    assert (use.disk_percent, use.disk_fullest_mount) == (70.0, "/var")


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ([make_interface("eth0", 10.0, 1.0), make_interface("wlan0", 5.0, 2.0)], (15.0, 3.0)),
        ([make_interface("lo", 99.0, 99.0), make_interface("eth0", 10.0, 1.0)], (10.0, 1.0)),
        ([make_interface("eth0", None, None), make_interface("wlan0", 5.0, 2.0)], (5.0, 2.0)),
        ([make_interface("eth0", None, None)], (None, None)),
        ([], (None, None)),
    ],
    ids=["sum", "without-loopback", "one-unknown", "unknown", "none"],
)
def test_summarise_adds_up_interfaces(
    network: list[dict[str, Any]], expected: tuple[float | None, float | None]
) -> None:
    use = summarise(sample(network=network))

    assert (use.received_bytes_per_second, use.transmitted_bytes_per_second) == expected


@pytest.mark.parametrize(
    ("containers", "expected"),
    [(None, None), (make_containers(runtime=None), None), (make_containers(), 0)],
    ids=["not-told", "no-runtime", "none-running"],
)
def test_summarise_tells_no_runtime_from_no_containers(containers: dict[str, Any] | None, expected: int | None) -> None:
    assert summarise(sample(containers=containers)).containers_running == expected


def test_applications_of_groups_by_label_then_project_then_name() -> None:
    containers = make_containers(
        make_container("shop-web-1", labels={"com.docker.compose.project": "shop"}),
        make_container("shop-db-1", state="exited", labels={"com.docker.compose.project": "shop"}),
        make_container("x", labels={"iot-platform.application": "vision", "com.docker.compose.project": "shop"}),
        make_container("alone"),
    )

    assert applications_of(sample(containers=containers)) == [
        Application(name="alone", deployment_id=None, containers=["alone"], running=1),
        Application(name="shop", deployment_id=None, containers=["shop-db-1", "shop-web-1"], running=1),
        Application(name="vision", deployment_id=None, containers=["x"], running=1),
    ]


def test_applications_of_keeps_deployments_of_one_application_apart() -> None:
    containers = make_containers(
        *(
            make_container(
                f"c{n}", labels={"iot-platform.application": "vision", "iot-platform.deployment-id": f"d{n}"}
            )
            for n in (2, 1)
        )
    )

    found = applications_of(sample(containers=containers))

    assert [(each.name, each.deployment_id) for each in found] == [("vision", "d1"), ("vision", "d2")]


def test_applications_of_survives_labels_of_any_length() -> None:
    labels = {"iot-platform.application": "a" * 4000, "iot-platform.deployment-id": "d" * 4000}

    (found,) = applications_of(sample(containers=make_containers(make_container("c", labels=labels))))

    assert (len(found.name), len(found.deployment_id or "")) == (255, 255)


def test_applications_of_a_sample_without_containers_is_empty() -> None:
    assert applications_of(sample()) == []
