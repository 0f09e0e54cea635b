# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Turn the text of /proc, /sys and /etc into words: what a node is.

Pure: imports the standard library only, opens nothing. Runs on nodes with Python 3.8. What changes is read in
_probe_parse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Dict, List, Literal, Mapping, Optional, Tuple


@dataclass(frozen=True)
class CpuInfo:
    """What /proc/cpuinfo says about the processors and, on ARM, about the board."""

    model: Optional[str]
    board_model: Optional[str]
    hypervisor: bool


@dataclass(frozen=True)
class Route:
    """One IPv4 route: *destination* and *mask* as 32-bit numbers."""

    interface: str
    destination: int
    mask: int


# PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"
# ID=debian
def parse_os_release(text: str) -> Dict[str, Optional[str]]:
    """Read the name of the operating system.

    Shapes: ``id`` is linux where the file has none, as os-release(5) says; a rolling release has no version.
    Source: os-release(5).
    """
    values: Dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.strip().partition("=")
        if not separator or key.startswith("#"):
            continue
        if len(value) >= 2 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        values[key] = re.sub(r"\\(.)", r"\1", value)
    return {
        "id": values.get("ID") or "linux",
        "version": values.get("VERSION_ID"),
        "name": values.get("PRETTY_NAME") or values.get("NAME"),
    }


# model name      : Intel(R) Xeon(R) Processor @ 2.60GHz
# CPU part        : 0xd08
def parse_cpuinfo(text: str) -> CpuInfo:
    """Read the processor's name, the first one of several.

    Shapes: on ARM the part number is looked up, since a 32-bit kernel's ``model name`` names only the architecture.
        An unknown part falls back to the model name.
    Source: proc_cpuinfo(5); part numbers from Linux arch/arm64/include/asm/cputype.h.
    """
    values: Dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            values.setdefault(key.strip(), value.strip())
    part = _ARM_PARTS.get((values.get("CPU implementer", ""), values.get("CPU part", "")))
    named = values.get("model name") or values.get("cpu model") or values.get("uarch") or values.get("Processor")
    return CpuInfo(
        model=part or named or None,
        board_model=values.get("Model") or values.get("machine") or None,
        hypervisor="hypervisor" in values.get("flags", "").split(),
    )


_ARM_PARTS = {
    ("0x41", "0xb76"): "ARM1176",
    ("0x41", "0xc05"): "Cortex-A5",
    ("0x41", "0xc07"): "Cortex-A7",
    ("0x41", "0xc08"): "Cortex-A8",
    ("0x41", "0xc09"): "Cortex-A9",
    ("0x41", "0xc0f"): "Cortex-A15",
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd04"): "Cortex-A35",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd09"): "Cortex-A73",
    ("0x41", "0xd0a"): "Cortex-A75",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd49"): "Neoverse-N2",
    ("0x4e", "0x004"): "Carmel",
}


# Raspberry Pi 4 Model B Rev 1.4
# raspberrypi,4-model-b\0brcm,bcm2711\0
def parse_device_tree_board(model: Optional[str], compatible: Optional[str]) -> Optional[Dict[str, Optional[str]]]:
    """Read a board's vendor and model from the device tree; None where there is none.

    Source: Devicetree Specification 0.4, section 2.3; names from Linux vendor-prefixes.yaml.
    """
    name = (model or "").split("\x00")[0].strip()
    if not name:
        return None
    prefix = (compatible or "").split("\x00")[0].partition(",")[0].strip()
    return {"vendor": _DEVICE_TREE_VENDORS.get(prefix, prefix) or None, "model": name}


_DEVICE_TREE_VENDORS = {
    "beagle": "BeagleBoard.org",
    "friendlyarm": "FriendlyElec",
    "hardkernel": "Hardkernel",
    "nvidia": "NVIDIA",
    "pine64": "Pine64",
    "radxa": "Radxa",
    "raspberrypi": "Raspberry Pi",
    "ti": "Texas Instruments",
    "toradex": "Toradex",
    "xunlong": "Xunlong",
}


# Dell Inc.
# To Be Filled By O.E.M.
def choose_dmi_board(names: Mapping[str, Optional[str]]) -> Optional[Dict[str, Optional[str]]]:
    """Choose vendor and model from the files of /sys/class/dmi/id; the product first, then the mainboard.

    Shapes: placeholders that the maker left in the firmware count as missing.
    """

    def first(*keys: str) -> Optional[str]:
        for key in keys:
            name = (names.get(key) or "").strip()
            if name and name.lower() not in _DMI_PLACEHOLDERS:
                return name
        return None

    vendor, model = first("sys_vendor", "board_vendor"), first("product_name", "board_name")
    return {"vendor": vendor, "model": model} if vendor or model else None


_DMI_PLACEHOLDERS = frozenset(
    (
        "default string", "empty", "n/a", "none", "not applicable", "not specified", "o.e.m.", "oem",
        "system manufacturer", "system product name", "to be filled by o.e.m.",
        "type1productconfigid", "unknown", "x.x", "0123456789",
    )
)  # fmt: skip


# Model: 		 Tesla T4
# Device Minor: 	 0
def parse_nvidia_information(text: str) -> Tuple[Optional[str], Optional[str]]:
    """Read a GPU's model and device minor number from /proc/driver/nvidia/gpus/*/information.

    Source: NVIDIA driver README, "Using the /proc File System Interface".
    """
    values: Dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            values[key.strip()] = value.strip()
    return values.get("Model") or None, values.get("Device Minor") or None


# 0, Tesla T4, 15360
# 1, NVIDIA A100-PCIE-40GB, 40960
def parse_nvidia_smi(text: Optional[str]) -> Dict[str, int]:
    """Read each GPU's memory by its index.

    Shapes: the output of ``nvidia-smi --query-gpu=index,name,memory.total --format=csv,noheader,nounits``.
    Units: MiB in the text, bytes in the result.
    """
    memory: Dict[str, int] = {}
    for line in (text or "").splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) >= 3 and fields[-1].isdecimal():
            memory[fields[0]] = int(fields[-1][:12]) * 1024 * 1024
    return memory


# Iface	Destination	Gateway 	Flags	RefCnt	Use	Metric	Mask		MTU	Window	IRTT
# eth0	00000000	010200C0	0003	0	0	100	00000000	0	0	0
def parse_routes(text: str, byte_order: Literal["little", "big"]) -> List[Route]:
    """Read the IPv4 routes.

    Units: the file prints network-order addresses as numbers of the machine's own *byte_order*.
    Source: proc_pid_net(5).
    """
    routes: List[Route] = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        try:
            routes.append(Route(fields[0], _address(fields[1], byte_order), _address(fields[7], byte_order)))
        except (IndexError, ValueError):
            continue
    return routes


#            |-- 192.0.2.7
#               /32 host LOCAL
def parse_local_addresses(text: str) -> List[str]:
    """Read the machine's own IPv4 addresses from /proc/net/fib_trie, in file order, loopback left out."""
    addresses: List[str] = []
    leaf = ""
    for line in text.splitlines():
        word = line.strip()
        if word.startswith("|-- "):
            leaf = word[4:]
        elif word == "/32 host LOCAL" and leaf and not leaf.startswith("127.") and leaf not in addresses:
            addresses.append(leaf)
    return addresses


# 20010db8000000000000000000000007 02 40 00 80     eth0
# fe800000000000000242acfffe110002 02 40 20 80     eth0
def parse_if_inet6(text: str) -> List[Tuple[str, str]]:
    """Read the machine's global IPv6 addresses as (interface, address).

    Shapes: only scope 00 (global) that is neither temporary (flag 01) nor still tentative (40), both of which come
        and go.
    Source: Linux net/ipv6/addrconf.c, if6_seq_show.
    """
    addresses: List[Tuple[str, str]] = []
    for line in text.splitlines():
        fields = line.split()
        if len(fields) != 6 or len(fields[0]) != 32 or fields[3] != "00":
            continue
        try:
            if int(fields[4], 16) & 0x41:
                continue
            addresses.append((fields[5], _ipv6_text(fields[0])))
        except ValueError:
            continue
    return addresses


def interface_of(address: str, routes: List[Route]) -> Optional[str]:
    """Find the interface whose own network holds an IPv4 address: the longest matching prefix."""
    try:
        octets = [int(part) for part in address.split(".")]
    except ValueError:
        return None
    if len(octets) != 4:
        return None
    number = octets[0] << 24 | octets[1] << 16 | octets[2] << 8 | octets[3]
    matching = [route for route in routes if route.mask and number & route.mask == route.destination]
    return max(matching, key=lambda route: route.mask).interface if matching else None


# ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB… root@gw-7
# ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAI… root@gw-7
def parse_host_key(text: Optional[str]) -> Optional[str]:
    """Read a public key file without its comment."""
    fields = (text or "").split()
    return " ".join(fields[:2]) if len(fields) >= 2 and fields[1].startswith("AAAA") else None


# 0::/system.slice/docker-4f66ad9a0b2e.scope
# 12:cpu,cpuacct:/kubepods/besteffort/pod1/4f66ad9a0b2e
def parse_container_cgroup(text: Optional[str]) -> Optional[str]:
    """Tell from process 1's cgroup which kind of container this is, if it is one.

    Source: proc_pid_cgroup(5). Inside a private cgroup namespace there is only ``/``, which tells nothing.
    """
    for word, name in (("/docker", "docker"), ("/libpod", "podman"), ("kubepods", "container-other"), ("/lxc", "lxc")):
        if word in (text or ""):
            return name
    return None


def choose_virtualization(
    container: Optional[str],
    dmi: Mapping[str, Optional[str]],
    clocks: str,
    hypervisor_type: Optional[str],
    hypervisor: bool,
) -> str:
    """Name what the machine runs in, in the words of systemd-detect-virt(1).

    Shapes: *container* wins; *clocks* are the clock sources the kernel could use, which name KVM, Hyper-V and Xen
        even where there is no DMI, as in micro virtual machines.
    """
    if container:
        return container
    vendor = "{} {}".format(dmi.get("sys_vendor") or "", dmi.get("product_name") or "")
    for word, name in _DMI_HYPERVISORS:
        if word in vendor:
            return "kvm" if name == "qemu" and "kvm-clock" in clocks else name
    if hypervisor_type == "xen" or " xen" in " " + clocks:
        return "xen"
    if "kvm-clock" in clocks:
        return "kvm"
    if "hyperv" in clocks:
        return "microsoft"
    return "vm-other" if hypervisor else "none"


_DMI_HYPERVISORS = (
    ("KVM", "kvm"),
    ("OpenStack", "kvm"),
    ("Amazon EC2", "amazon"),
    ("QEMU", "qemu"),
    ("VMware", "vmware"),
    ("innotek GmbH", "oracle"),
    ("VirtualBox", "oracle"),
    ("Xen", "xen"),
    ("Bochs", "bochs"),
    ("Parallels", "parallels"),
    ("Google Compute Engine", "google"),
    ("Microsoft Corporation Virtual Machine", "microsoft"),
)


def _address(text: str, byte_order: Literal["little", "big"]) -> int:
    return int.from_bytes(bytes.fromhex(text), byte_order)


def _ipv6_text(digits: str) -> str:
    groups = ["{:x}".format(int(digits[start : start + 4], 16)) for start in range(0, 32, 4)]
    # RFC 5952: the longest run of at least two zero groups becomes "::", the first one of equals.
    best_start, best_length, start = 0, 1, 0
    while start < 8:
        length = 0
        while start + length < 8 and groups[start + length] == "0":
            length += 1
        if length > best_length:
            best_start, best_length = start, length
        start += max(1, length)
    if best_length < 2:
        return ":".join(groups)
    return ":".join(groups[:best_start]) + "::" + ":".join(groups[best_start + best_length :])
