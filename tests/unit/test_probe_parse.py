# SPDX-License-Identifier: GPL-3.0-or-later
"""The parsers on single inputs: edges that no whole platform shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.iot_platform.node_manager.plugins.module_utils import _facts_parse, _probe_parse
from ansible_collections.iot_platform.node_manager.plugins.module_utils._facts_parse import (
    Route,
    choose_dmi_board,
    choose_virtualization,
    interface_of,
    parse_container_cgroup,
    parse_cpuinfo,
    parse_device_tree_board,
    parse_host_key,
    parse_if_inet6,
    parse_local_addresses,
    parse_nvidia_information,
    parse_nvidia_smi,
    parse_os_release,
    parse_routes,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._probe_parse import (
    CpuTimes,
    FilesystemSpace,
    InterfaceCounters,
    Memory,
    Mount,
    ResourceFormatError,
    ServiceUnit,
    is_remote,
    parse_cpu_times,
    parse_loadavg,
    parse_meminfo,
    parse_mountinfo,
    parse_net_dev,
    parse_oom_kills,
    parse_pressure,
    parse_service_units,
    parse_speed,
    parse_temperature,
    parse_throttled,
    parse_uptime,
    real_filesystems,
)
from ansible_collections.iot_platform.node_manager.plugins.module_utils._sample_parts import (
    Counters,
    CpuReading,
    NetworkReading,
    cpu_part,
    filesystem_part,
    network_part,
    services_part,
)
from hypothesis import example, given
from hypothesis import strategies as st


def mount(line: str) -> Mount:
    return parse_mountinfo(line)[0]


def test_parse_cpu_times_counts_cpus() -> None:
    times = parse_cpu_times("cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 0 0 0 0\ncpu2 0 0 0 0\nintr 9\nctxt 3\n")

    assert times == CpuTimes(2, 1, 2, 3, 4, 5, 6, 7, 8)


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        pytest.param(parse_cpu_times, "", id="stat-empty"),
        pytest.param(parse_cpu_times, "cpu  1 2 x 4\n", id="stat-no-number"),
        pytest.param(parse_loadavg, "0.1 0.2\n", id="loadavg-short"),
        pytest.param(parse_uptime, "\n", id="uptime-empty"),
        pytest.param(parse_meminfo, "MemFree: 12 kB\n", id="meminfo-no-total"),
        pytest.param(parse_meminfo, "MemTotal: kB\n", id="meminfo-no-number"),
    ],
)
def test_parser_refuses_what_is_no_such_file(parse: Callable[[str], object], text: str) -> None:
    with pytest.raises(ResourceFormatError):
        parse(text)


def test_parse_meminfo_estimates_available_on_old_kernels() -> None:
    text = "MemTotal: 1000 kB\nMemFree: 100 kB\nBuffers: 10 kB\nCached: 200 kB\nShmem: 50 kB\nSReclaimable: 5 kB\n"

    assert parse_meminfo(text) == Memory(1000 * 1024, 265 * 1024, 0, 0)


def test_parse_pressure_leaves_out_missing_lines() -> None:
    pressure = parse_pressure("some avg10=1.50 avg60=0.25 avg300=0.00 total=7\n", with_full=True)

    assert pressure["some_avg10_percent"] == 1.5
    assert pressure["full_avg10_percent"] is None


@pytest.mark.parametrize(
    ("options", "super_options", "read_only"),
    [
        ("rw,relatime", "rw", False),
        ("ro,relatime", "rw", True),
        ("rw,relatime", "ro,errors=remount-ro", True),
        # Newer kernels leave the flag alone after an error and say this instead.
        ("rw,relatime", "rw,emergency_ro,errors=remount-ro", True),
        ("rw,relatime", "rw,shutdown", True),
    ],
    ids=["writable", "mount", "superblock", "emergency", "shutdown"],
)
def test_parse_mountinfo_tells_what_cannot_be_written(options: str, super_options: str, read_only: bool) -> None:
    line = f"36 1 8:1 / / {options} - ext4 /dev/sda1 {super_options}"

    assert [mount.read_only for mount in parse_mountinfo(line)] == [read_only]


def test_parse_mountinfo_reads_escapes_and_optional_fields() -> None:
    line = r"98 27 0:45 / /mnt/my\040nas rw,relatime shared:1 master:2 - nfs4 nas:/export rw,vers=4.2"

    assert parse_mountinfo(line) == [Mount("0:45", "/", "/mnt/my nas", "nfs4", "nas:/export", read_only=False)]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param(["1 0 8:1 /sub /data rw - ext4 a rw", "2 0 8:1 / /disk rw - ext4 a rw"], ["/disk"], id="bind"),
        pytest.param(["1 0 8:1 / /long/path rw - xfs a rw", "2 0 8:1 / /b rw - xfs a rw"], ["/b"], id="shortest"),
        pytest.param(["1 0 0:9 /@ / rw - btrfs a rw", "2 0 0:9 / /pool rw - btrfs a rw"], ["/"], id="root-first"),
        pytest.param(["1 0 0:1 / / rw - rootfs r rw", "2 1 8:1 / / rw - ext4 a rw"], ["/"], id="stacked"),
        pytest.param(["1 0 0:5 / / rw - overlay overlay rw"], ["/"], id="container"),
        pytest.param(["1 0 0:5 / / rw - tmpfs t rw", "2 1 0:6 / /tmp rw - tmpfs t rw"], ["/"], id="live-system"),
        pytest.param(["1 0 7:0 / /snap/core ro - squashfs /dev/loop0 ro"], [], id="image"),
        pytest.param(["1 0 0:7 / /x rw - autofs a rw", "2 0 0:8 / /proc rw - proc proc rw"], [], id="pseudo"),
        pytest.param(["1 0 8:1 /c/hosts /etc/hosts rw - ext4 a rw"], [], id="runtime-files"),
    ],
)  # fmt: skip
def test_real_filesystems_chooses_each_once(lines: list[str], expected: list[str]) -> None:
    chosen = real_filesystems(parse_mountinfo("\n".join(lines)))

    assert [seen.mount_point for seen in chosen] == expected


@pytest.mark.parametrize(
    ("kind", "expected"), [("nfs4", True), ("cifs", True), ("fuse.sshfs", True), ("fuse", True), ("ext4", False)]
)
def test_is_remote_knows_what_may_hang(kind: str, expected: bool) -> None:
    assert is_remote(mount(f"1 0 0:1 / /x rw - {kind} a rw")) is expected


def test_parse_net_dev_reads_counter_at_colon() -> None:
    text = "Inter-| Receive\n face |bytes\nwlan0:1000 5 1 0 0 0 0 0 900 4 2 0 0 0 0 0\n eth0.5:0: 1\n"

    assert parse_net_dev(text) == {"wlan0": InterfaceCounters(1000, 1, 900, 2)}


@pytest.mark.parametrize(
    ("parse", "text", "expected"),
    [
        pytest.param(parse_speed, "1000\n", 1000, id="speed"),
        pytest.param(parse_speed, "-1\n", None, id="speed-unknown"),
        pytest.param(parse_speed, "4294967295", None, id="speed-unknown-unsigned"),
        pytest.param(parse_speed, None, None, id="speed-absent"),
        pytest.param(parse_temperature, "51078\n", 51.1, id="temperature"),
        pytest.param(parse_temperature, "-273200\n", None, id="temperature-off"),
        pytest.param(parse_temperature, "", None, id="temperature-empty"),
        pytest.param(parse_throttled, "garbage", None, id="throttled-garbage"),
        pytest.param(parse_host_key, "-----BEGIN OPENSSH PRIVATE KEY-----\nabc", None, id="private-key"),
        pytest.param(parse_host_key, "ssh-ed25519 AAAAC3 root@x\n", "ssh-ed25519 AAAAC3", id="public-key"),
        pytest.param(parse_container_cgroup, "0::/\n", None, id="cgroup-private"),
        pytest.param(parse_container_cgroup, "2:cpu:/docker/4f66\n", "docker", id="cgroup-docker"),
        pytest.param(parse_nvidia_smi, "0, Tesla T4, 15360\nno devices\n", {"0": 16106127360}, id="nvidia-smi"),
        pytest.param(parse_nvidia_information, "Model: \t\t Tesla T4\n", ("Tesla T4", None), id="nvidia-old-driver"),
    ],
)
def test_parser_reads_value(parse: Callable[[Any], object], text: Any, expected: object) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize("text", ["throttled=0x50005\n", "50005\n", "0x50005"], ids=["vcgencmd", "sysfs", "prefixed"])
def test_parse_throttled_reads_bits(text: str) -> None:
    assert parse_throttled(text) == {
        "undervoltage": True,
        "frequency_capped": False,
        "throttled": True,
        "soft_temperature_limit": False,
        "undervoltage_since_boot": True,
        "throttled_since_boot": True,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pgmajfault 9\noom_kill 2\nnuma_hit 7\n", 2),
        ("pgmajfault 9\noom_kill 2", 2),
        ("pgmajfault 9\n", None),
        ("", None),
        (None, None),
        ("a 1\noom_kill x\n", None),
    ],
    ids=["between", "last", "old-kernel", "empty", "absent", "odd"],
)
def test_parse_oom_kills_reads_one_line(text: str | None, expected: int | None) -> None:
    assert parse_oom_kills(text) == expected


def test_parse_service_units_reads_blocks() -> None:
    text = (
        "NRestarts=3\nId=app.service\nActiveState=active\n\nId=old.service\nActiveState=failed\n\n"
        "NRestarts=0\nId=x.service\nActiveState=failed\n\nActiveState=failed\n"
    )

    units = parse_service_units(text)

    assert units == [
        ServiceUnit("app.service", False, 3),
        ServiceUnit("old.service", True, 0),
        ServiceUnit("x.service", True, 0),
    ]


def test_services_part_names_the_worst_first_and_not_too_many() -> None:
    units = [ServiceUnit(f"{number:02}.service", True, number) for number in range(40)]

    part = services_part(units)

    assert part["failed"] == [f"{number:02}.service" for number in range(32)]
    assert part["restarts"] == {f"{number:02}.service": number for number in range(39, 7, -1)}


def test_cpu_part_takes_disk_waits_as_idle() -> None:
    before = CpuTimes(1, 0, 0, 0, 0, 0, 0, 0, 0)
    now = CpuTimes(1, 10, 0, 10, 60, 20, 0, 0, 0)

    part = cpu_part(CpuReading(now, None, None), before)

    assert (part["use_percent"], part["iowait_percent"]) == (20.0, 20.0)


def test_cpu_part_survives_counters_stepping_back() -> None:
    before = CpuTimes(1, 100, 0, 100, 100, 100, 0, 0, 0)
    now = CpuTimes(1, 110, 0, 100, 190, 90, 0, 0, 0)

    part = cpu_part(CpuReading(now, None, None), before)

    assert (part["use_percent"], part["iowait_percent"]) == (10.0, 0.0)


def test_filesystem_part_counts_as_df_does() -> None:
    line = "28 1 254:1 / / rw,relatime - ext4 /dev/vda1 ro,errors=remount-ro"

    part = filesystem_part(mount(line), FilesystemSpace(1000, 500, 300, 0, 0))

    assert (part["use_percent"], part["inodes_use_percent"], part["read_only"]) == (62.5, None, True)


def test_network_part_has_no_rate_after_a_reset() -> None:
    before = Counters(1.0, network={"eth0": InterfaceCounters(1000, 0, 1000, 0)})

    part = network_part(NetworkReading(3.0, {"eth0": InterfaceCounters(10, 0, 1500, 0)}), before)

    assert (part[0]["received_bytes_per_second"], part[0]["transmitted_bytes_per_second"]) == (None, 250.0)


def test_parse_os_release_reads_quotes_and_defaults() -> None:
    text = "# comment\nNAME='My \\'OS\\''\nVERSION_ID=1.2\nbroken\n"

    assert parse_os_release(text) == {"id": "linux", "version": "1.2", "name": "My 'OS'"}


def test_parse_cpuinfo_knows_arm_parts() -> None:
    assert parse_cpuinfo("CPU implementer\t: 0x41\nCPU part\t: 0xd08\n").model == "Cortex-A72"


@pytest.mark.parametrize(
    ("model", "compatible", "expected"),
    [
        pytest.param("Raspberry Pi 5\x00", "raspberrypi,5\x00brcm\x00", ("Raspberry Pi", "Raspberry Pi 5"), id="known"),
        pytest.param("Gateway One", "acme,gw1", ("acme", "Gateway One"), id="unknown-vendor"),
        pytest.param("Gateway One", None, (None, "Gateway One"), id="no-vendor"),
    ],
)
def test_parse_device_tree_board_names_vendor(
    model: str, compatible: str | None, expected: tuple[str | None, str]
) -> None:
    assert parse_device_tree_board(model, compatible) == {"vendor": expected[0], "model": expected[1]}


def test_choose_dmi_board_skips_placeholders() -> None:
    names = {"sys_vendor": "To Be Filled By O.E.M.", "board_vendor": "ASRock", "product_name": "Default string"}

    assert choose_dmi_board(names) == {"vendor": "ASRock", "model": None}


@pytest.mark.parametrize(
    ("container", "dmi", "clocks", "hypervisor", "expected"),
    [
        pytest.param("docker", {"sys_vendor": "QEMU"}, "kvm-clock", True, "docker", id="container-first"),
        pytest.param(None, {"sys_vendor": "QEMU"}, "kvm-clock tsc", True, "kvm", id="qemu-kvm"),
        pytest.param(None, {"sys_vendor": "QEMU"}, "tsc", True, "qemu", id="qemu-emulated"),
        pytest.param(None, {}, "kvm-clock tsc", True, "kvm", id="micro-vm"),
        pytest.param(None, {}, "xen tsc", True, "xen", id="xen"),
        pytest.param(None, {}, "tsc", True, "vm-other", id="only-the-flag"),
        pytest.param(None, {"sys_vendor": "Dell Inc."}, "tsc hpet", False, "none", id="bare-metal"),
    ],
)
def test_choose_virtualization_names_it(
    container: str | None, dmi: dict[str, str | None], clocks: str, hypervisor: bool, expected: str
) -> None:
    assert choose_virtualization(container, dmi, clocks, None, hypervisor) == expected


@pytest.mark.parametrize(("byte_order", "network"), [("little", "000200C0"), ("big", "C0000200")])
def test_parse_routes_follows_byte_order(byte_order: Any, network: str) -> None:
    mask = "00FFFFFF" if byte_order == "little" else "FFFFFF00"
    text = f"Iface\tDestination\nbr0\t{network}\t00000000\t0001\t0\t0\t0\t{mask}\t0\t0\t0\nshort\n"

    routes = parse_routes(text, byte_order)

    assert routes == [Route("br0", 0xC0000200, 0xFFFFFF00)]
    assert interface_of("192.0.2.7", routes) == "br0"
    assert interface_of("198.51.100.7", routes) is None


def test_parse_local_addresses_leaves_loopback_out() -> None:
    text = "|-- 127.0.0.1\n /32 host LOCAL\n|-- 192.0.2.7\n /32 host LOCAL\n|-- 192.0.2.255\n /32 link BROADCAST\n"

    assert parse_local_addresses(text * 2) == ["192.0.2.7"]


@pytest.mark.parametrize(
    ("digits", "flags", "expected"),
    [
        pytest.param("20010db8000000000000000000000007", "80", ["2001:db8::7"], id="middle"),
        pytest.param("20010db8000000010000000000000000", "80", ["2001:db8:0:1::"], id="end"),
        pytest.param("20010db8000100020003000400050006", "80", ["2001:db8:1:2:3:4:5:6"], id="full"),
        pytest.param("20010db8000000000000000000000007", "01", [], id="temporary"),
    ],
)
def test_parse_if_inet6_writes_short_form(digits: str, flags: str, expected: list[str]) -> None:
    found = parse_if_inet6(f"{digits} 02 40 00 {flags}     eth0\n")

    assert [address for _, address in found] == expected


SURVIVORS = [
    parse_mountinfo,
    parse_net_dev,
    parse_speed,
    parse_temperature,
    parse_throttled,
    parse_os_release,
    parse_cpuinfo,
    parse_host_key,
    parse_if_inet6,
    parse_local_addresses,
    parse_nvidia_information,
    parse_nvidia_smi,
    parse_container_cgroup,
]


@pytest.mark.parametrize("parse", SURVIVORS, ids=lambda parse: parse.__name__)
@given(text=st.text(alphabet=st.sampled_from("0123456789abcdefx:.,/-=\"' \n\t\x00\\é²")))
@example(text="0,x,²")
def test_parser_survives_any_text(parse: Callable[[str], object], text: str) -> None:
    parse(text)


@pytest.mark.parametrize(
    "parse",
    [parse_cpu_times, parse_loadavg, parse_meminfo, parse_uptime, lambda text: parse_pressure(text, with_full=True)],
    ids=["stat", "loadavg", "meminfo", "uptime", "pressure"],
)
@given(text=st.text())
def test_parser_raises_only_its_own_error(parse: Callable[[str], object], text: str) -> None:
    try:
        parse(text)
    except ResourceFormatError:
        assert text is not None


@pytest.mark.parametrize("module", [_probe_parse, _facts_parse], ids=lambda module: module.__name__.rpartition(".")[2])
def test_parsers_show_two_lines_of_their_input(module: Any) -> None:
    lines = Path(module.__file__).read_text("utf-8").splitlines()
    bare = [
        line
        for number, line in enumerate(lines)
        if line.startswith("def parse_")
        and not line.startswith("def parse_integer")
        and not (lines[number - 1].startswith("#") and lines[number - 2].startswith("#"))
    ]

    assert bare == []
