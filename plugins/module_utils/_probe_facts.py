# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Gather the facts of a node: each collector reads through the Reader and leaves the understanding to the pure parsers.

Standard library only. Runs on nodes with Python 3.8. Only _probe imports this.
"""

from __future__ import annotations

import sys
import time
from typing import Callable, Dict, List, Optional, Tuple

from ._engine import Runtime, find_runtime
from ._facts_parse import (
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
from ._probe_parse import (
    Mount,
    is_remote,
    parse_cpu_times,
    parse_integer,
    parse_meminfo,
    parse_mountinfo,
    parse_speed,
    real_filesystems,
)
from ._probe_read import Reader

Device = Dict[str, object]

_CONTAINER_DATA = ("/var/lib/docker", "/var/lib/containers/storage", "/var/lib/containerd")
# Networks of the container runtime and of virtual machines: nobody reaches the node there.
_INNER_INTERFACES = ("docker", "br-", "podman", "cni", "veth", "virbr", "lxcbr", "lxdbr", "flannel", "cali")
# Video nodes that decode, encode or process pictures, but see nothing.
_NOT_CAMERAS = ("bcm2835-codec", "bcm2835-isp", "hantro", "pispbe", "rkvdec", "rpi-hevc", "rpivid", "v4l2loopback")
_FEATURE_PATHS = (
    ("psi", "/proc/pressure/cpu"),
    ("cgroup_v2", "/sys/fs/cgroup/cgroup.controllers"),
    ("cgroup_v1", "/sys/fs/cgroup/memory"),
    ("kvm", "/dev/kvm"),
    ("tpm", "/dev/tpm0"),
    ("watchdog", "/dev/watchdog"),
)
_FEATURE_PREFIXES = (
    ("i2c", "/sys/class/i2c-dev", "i2c-"),
    ("spi", "/sys/class/spidev", "spidev"),
    ("gpio", "/sys/bus/gpio/devices", "gpiochip"),
    ("bluetooth", "/sys/class/bluetooth", "hci"),
    ("wifi", "/sys/class/ieee80211", "phy"),
)


class FactsReader:
    """The collectors of facts, one method each."""

    def __init__(self, reader: Reader, deadline_seconds: float) -> None:
        self._reader = reader
        self._deadline_seconds = deadline_seconds

    def collectors(self) -> List[Tuple[str, Callable[[], object]]]:
        """List the collectors by the name of their fact."""
        return [
            ("hostname", lambda: self._reader.read_word("/proc/sys/kernel/hostname")),
            ("machine_id", self.read_machine_id),
            ("boot_id", lambda: self._reader.read_word("/proc/sys/kernel/random/boot_id")),
            ("os", self.read_os),
            ("kernel", lambda: self._reader.read_word("/proc/sys/kernel/osrelease")),
            ("board", self.read_board),
            ("virtualization", self.read_virtualization),
            ("service_manager", self.read_service_manager),
            ("cpu", self.read_cpu),
            ("memory_total_bytes", lambda: parse_meminfo(self._reader.read_text("/proc/meminfo")).total_bytes),
            ("disk_total_bytes", self.read_disk_total_bytes),
            ("network_mbps", self.read_network_mbps),
            ("devices", self.read_devices),
            ("container_runtime", self.read_container_runtime),
            ("features", self.read_features),
            ("addresses", self.read_addresses),
            ("ssh_host_keys", self.read_ssh_host_keys),
        ]

    def read_machine_id(self) -> Optional[str]:
        return self._reader.read_word("/etc/machine-id") or self._reader.read_word("/var/lib/dbus/machine-id")

    def read_os(self) -> Dict[str, Optional[str]]:
        text = self._reader.read_optional("/etc/os-release") or self._reader.read_optional("/usr/lib/os-release")
        return parse_os_release(text or "")

    def read_board(self) -> Dict[str, Optional[str]]:
        tree = "/proc/device-tree/"
        board = parse_device_tree_board(
            self._reader.read_optional(tree + "model"), self._reader.read_optional(tree + "compatible")
        )
        if board is None:
            board = choose_dmi_board(self._dmi_names())
        if board is None:
            model = parse_cpuinfo(self._reader.read_text("/proc/cpuinfo")).board_model
            board = {"vendor": None, "model": model}
        return board

    def read_virtualization(self) -> str:
        clocks = "/sys/devices/system/clocksource/clocksource0/available_clocksource"
        return choose_virtualization(
            self._container(),
            self._dmi_names(),
            self._reader.read_word(clocks) or "",
            self._reader.read_word("/sys/hypervisor/type"),
            parse_cpuinfo(self._reader.read_text("/proc/cpuinfo")).hypervisor,
        )

    def read_service_manager(self) -> Optional[str]:
        for name, path in (("systemd", "/run/systemd/system"), ("openrc", "/run/openrc"), ("procd", "/sbin/procd")):
            if self._reader.exists(path):
                return name
        first = self._reader.read_word("/proc/1/comm")
        if first == "init":
            inittab = self._reader.read_optional("/etc/inittab") or ""
            return "busybox" if "busybox" in inittab.lower() else "sysvinit"
        return {"runit": "runit", "s6-svscan": "s6"}.get(first or "")

    def read_cpu(self) -> Dict[str, object]:
        count = parse_cpu_times(self._reader.read_text("/proc/stat")).cpu_count
        return {"count": count, "model": parse_cpuinfo(self._reader.read_text("/proc/cpuinfo")).model}

    def read_disk_total_bytes(self) -> Optional[int]:
        """Measure the filesystem that containers are stored on: what is there can be promised to applications.

        Shapes: without container data it is the root, and where the root is read-only the largest local filesystem
            that can be written.
        """
        mounts = real_filesystems(parse_mountinfo(self._reader.read_text("/proc/self/mountinfo")))
        for path in _CONTAINER_DATA:
            if self._reader.exists(path):
                home = _holding(path, mounts)
                if home is not None and not home.read_only:
                    return self._reader.space(home, 1.0).total_bytes
        writable = [mount for mount in mounts if not mount.read_only and not is_remote(mount)]
        root = [mount for mount in writable if mount.mount_point == "/"]
        sizes = [self._reader.space(mount, 1.0).total_bytes for mount in root or writable]
        return max(sizes, default=None)

    def read_network_mbps(self) -> Optional[int]:
        """Read the speed of the link that the default route takes, else of the fastest physical one that is up."""
        speeds: Dict[str, int] = {}
        for name in self._reader.names("/sys/class/net"):
            base = "/sys/class/net/" + name
            # A container's veth claims 10 Gbit/s of nothing; bonds and bridges pass on what their ports say.
            if any(self._reader.exists(base + kind) for kind in ("/device", "/bonding", "/bridge")):
                speed_mbps = parse_speed(self._reader.read_word(base + "/speed"))
                if speed_mbps is not None:
                    speeds[name] = speed_mbps
        default = self._default_interface()
        return speeds.get(default or "") or max(speeds.values(), default=None)

    def read_devices(self) -> Dict[str, List[Device]]:
        classes = {
            "gpu": self._gpus(),
            "accelerator": self._accelerators(),
            "camera": self._cameras(),
            "serial": self._named("/sys/class/tty", ("ttyUSB", "ttyACM")),
        }
        return {name: devices for name, devices in classes.items() if devices}

    def read_container_runtime(self) -> Optional[Dict[str, Optional[str]]]:
        runtime = self._runtime()
        return {"name": runtime.name, "version": runtime.version, "socket": runtime.socket} if runtime else None

    def read_features(self) -> List[str]:
        features = {name for name, path in _FEATURE_PATHS if self._reader.exists(path)}
        if "cgroup_v2" in features:
            features.discard("cgroup_v1")
        for name, path, prefix in _FEATURE_PREFIXES:
            if any(entry.startswith(prefix) for entry in self._reader.names(path)):
                features.add(name)
        return sorted(features)

    def read_addresses(self) -> List[str]:
        routes = self._routes()
        default = self._default_interface()
        found: List[Tuple[bool, str]] = []
        for address in parse_local_addresses(self._reader.read_optional("/proc/net/fib_trie") or ""):
            interface = interface_of(address, routes) or ""
            if not interface.startswith(_INNER_INTERFACES):
                found.append((interface != default, address))
        found.sort(key=lambda pair: pair[0])
        addresses = [address for _inner, address in found]
        for interface, address in parse_if_inet6(self._reader.read_optional("/proc/net/if_inet6") or ""):
            if not interface.startswith(_INNER_INTERFACES):
                addresses.append(address)
        return addresses

    def read_ssh_host_keys(self) -> List[str]:
        keys: List[str] = []
        for name in self._reader.names("/etc/ssh"):
            if name.startswith("ssh_host_") and name.endswith("_key.pub"):
                key = parse_host_key(self._reader.read_optional("/etc/ssh/" + name))
                if key:
                    keys.append(key)
        return sorted(keys, key=lambda key: (not key.startswith("ssh-ed25519"), key))

    def _dmi_names(self) -> Dict[str, Optional[str]]:
        keys = ("sys_vendor", "product_name", "board_vendor", "board_name")
        return {key: self._reader.read_word("/sys/class/dmi/id/" + key) for key in keys}

    def _container(self) -> Optional[str]:
        told = self._reader.read_word("/run/systemd/container")
        if told:
            return told
        if self._reader.exists("/run/.containerenv"):
            return "podman"
        if self._reader.exists("/.dockerenv"):
            return "docker"
        return parse_container_cgroup(self._reader.read_optional("/proc/1/cgroup"))

    def _routes(self) -> List[Route]:
        return parse_routes(self._reader.read_optional("/proc/net/route") or "", sys.byteorder)

    def _default_interface(self) -> Optional[str]:
        routes = self._routes()
        return next((route.interface for route in routes if route.mask == 0), None)

    def _runtime(self) -> Optional[Runtime]:
        return find_runtime(self._reader.path, min(self._deadline_seconds, time.monotonic() + 1.5))

    def _gpus(self) -> List[Device]:
        return self._nvidia_gpus() or self._tegra_gpus() or self._drm_gpus()

    def _nvidia_gpus(self) -> List[Device]:
        base = "/proc/driver/nvidia/gpus"
        units = [
            parse_nvidia_information(self._reader.read_optional("{}/{}/information".format(base, bus)) or "")
            for bus in self._reader.names(base)
        ]
        if not units:
            return []
        query = ["nvidia-smi", "--query-gpu=index,name,memory.total", "--format=csv,noheader,nounits"]
        try:
            memory = parse_nvidia_smi(self._reader.run(query, 1.5))
        except TimeoutError:
            memory = {}
        gpus: List[Device] = []
        for position, (model, minor) in enumerate(units):
            key = minor or str(position)
            gpus.append({"id": key, "model": model, "memory_bytes": memory.get(key)})
        return sorted(gpus, key=lambda gpu: str(gpu["id"]))

    def _tegra_gpus(self) -> List[Device]:
        if not self._reader.exists("/dev/nvhost-gpu"):
            return []
        return [{"id": "0", "model": "NVIDIA Tegra", "memory_bytes": None}]

    def _drm_gpus(self) -> List[Device]:
        """List the GPUs that compute: no display controller, no virtual one, none built into an Intel processor."""
        gpus: List[Device] = []
        for card in self._reader.names("/sys/class/drm"):
            device = "/sys/class/drm/{}/device/".format(card)
            if not card.startswith("card") or "-" in card:
                continue
            vendor = _GPU_VENDORS.get(self._reader.read_word(device + "vendor") or "")
            slot = (self._reader.read_optional(device + "uevent") or "").partition("PCI_SLOT_NAME=")[2]
            if vendor is None or (vendor == "Intel" and slot.startswith("0000:00:")):
                continue
            model = "{} {}".format(vendor, self._reader.read_word(device + "device") or "")
            memory_bytes = parse_integer(self._reader.read_word(device + "mem_info_vram_total"))
            gpus.append({"id": card, "model": model.strip(), "memory_bytes": memory_bytes})
        return gpus

    def _accelerators(self) -> List[Device]:
        return (
            self._named("/sys/class/apex", ("apex_",))
            + self._named("/sys/class/hailo_chardev", ("hailo",))
            + self._named("/sys/class/accel", ("accel",))
        )

    def _cameras(self) -> List[Device]:
        base = "/sys/class/video4linux"
        cameras: List[Device] = []
        for entry in self._named(base, ("video",)):
            name = self._reader.read_word("{}/{}/name".format(base, entry["id"])) or ""
            # A USB camera has a second node for its metadata.
            index = self._reader.read_word("{}/{}/index".format(base, entry["id"])) or "0"
            if index == "0" and not name.startswith(_NOT_CAMERAS):
                cameras.append(entry)
        return cameras

    def _named(self, path: str, prefixes: Tuple[str, ...]) -> List[Device]:
        return [{"id": name} for name in self._reader.names(path) if name.startswith(prefixes)]


_GPU_VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD", "0x8086": "Intel"}


def _holding(path: str, mounts: List[Mount]) -> Optional[Mount]:
    """Find the filesystem that holds *path*: the longest mount point above it."""
    above = [mount for mount in mounts if mount.mount_point == "/" or (path + "/").startswith(mount.mount_point + "/")]
    return max(above, key=lambda mount: len(mount.mount_point), default=None)
