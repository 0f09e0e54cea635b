# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Turn the text of /proc and /sys into numbers: what changes from sample to sample.

Pure: imports the standard library only, opens nothing. Runs on nodes with Python 3.8. What a node *is* is read in
_facts_parse.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

_KIB = 1024


class ResourceFormatError(ValueError):
    """The text is not what the kernel documents, so nothing can be said from it."""


class CpuTimes(NamedTuple):
    """Clock ticks since boot, over all CPUs; guest time is inside user and nice already."""

    cpu_count: int
    user: int
    nice: int
    system: int
    idle: int
    iowait: int
    irq: int
    softirq: int
    steal: int


class Memory(NamedTuple):
    """Bytes of memory and swap."""

    total_bytes: int
    available_bytes: int
    swap_total_bytes: int
    swap_free_bytes: int


class Mount(NamedTuple):
    """One line of mountinfo; *device_id* names the superblock, which bind mounts of one filesystem share."""

    device_id: str
    root: str
    mount_point: str
    filesystem_type: str
    device: str
    read_only: bool


class FilesystemSpace(NamedTuple):
    """The numbers of statvfs(3) that are reported, blocks already multiplied."""

    total_bytes: int
    free_bytes: int
    available_bytes: int
    inodes_total: int
    inodes_free: int
    read_only: bool = False


class ServiceUnit(NamedTuple):
    """One systemd service; *restarts* counts those that systemd did by itself since somebody last started it."""

    name: str
    failed: bool
    restarts: int


class InterfaceCounters(NamedTuple):
    """What one network interface counted since it came up."""

    received_bytes: int
    received_errors: int
    transmitted_bytes: int
    transmitted_errors: int


# cpu  11133 0 4460 160514 652 0 104 32 0 0
# cpu0 2140 0 1509 84739 27 0 9 15 0 0
def parse_cpu_times(text: str) -> CpuTimes:
    """Read the CPU counters of /proc/stat.

    Shapes: *text* starts with the ``cpu`` lines; counters that an old kernel lacks are 0; the CPUs online are counted.
    Units: USER_HZ ticks.
    Errors: ResourceFormatError without a sound ``cpu`` line.
    Source: proc_stat(5).
    """
    fields = text.partition("\n")[0].split()
    if len(fields) < 5 or fields[0] != "cpu":
        raise ResourceFormatError("/proc/stat does not start with the cpu line")
    try:
        ticks = [int(field) for field in fields[1:9]]
    except ValueError as error:
        raise ResourceFormatError("/proc/stat: {}".format(error)) from error
    ticks += [0] * (8 - len(ticks))
    # The interrupt line after the CPUs is kilobytes long on servers: counting on the text is cheaper than splitting it.
    count = text.count("\ncpu")
    return CpuTimes(max(count, 1), *ticks)


# 0.42 0.36 0.30 1/123 4567
# 3.00 2.10 1.05 4/1290 98765
def parse_loadavg(text: str) -> Tuple[float, float, float]:
    """Read the load averages over 1, 5 and 15 minutes.

    Errors: ResourceFormatError if three numbers are not there.
    Source: proc_loadavg(5).
    """
    try:
        one, five, fifteen = (float(field) for field in text.split()[:3])
    except ValueError as error:
        raise ResourceFormatError("/proc/loadavg: {}".format(error)) from error
    return one, five, fifteen


# some avg10=0.33 avg60=0.34 avg300=0.26 total=9070072
# full avg10=0.00 avg60=0.00 avg300=0.00 total=0
def parse_pressure(text: str, *, with_full: bool) -> Dict[str, Optional[float]]:
    """Read one PSI file.

    Shapes: the result has the *some* averages, and the *full* ones if *with_full*, null where the file lacks them:
        the ``full`` line of the cpu file came with Linux 5.13 and says nothing for the whole machine.
    Units: percent of wall-clock time.
    Errors: ResourceFormatError if an average is no number.
    Source: Linux Documentation/accounting/psi.rst, Linux >= 4.20.
    """
    result = dict.fromkeys(_SOME_AND_FULL if with_full else _SOME)
    for line in text.splitlines():
        fields = line.split()
        for field in fields[1:]:
            window, _equals, number = field.partition("=")
            name = _PRESSURE_NAMES.get((fields[0], window))
            if name in result:
                try:
                    result[name] = float(number)
                except ValueError as error:
                    raise ResourceFormatError("pressure: {}".format(error)) from error
    return result


_PRESSURE_NAMES = {
    (kind, window): "{}_{}_percent".format(kind, window)
    for kind in ("some", "full")
    for window in ("avg10", "avg60", "avg300")
}
_SOME_AND_FULL = tuple(_PRESSURE_NAMES.values())
_SOME = _SOME_AND_FULL[:3]


# MemTotal:       24684084 kB
# MemAvailable:   23911220 kB
def parse_meminfo(text: str) -> Memory:
    """Read the kernel's memory counters.

    Shapes: *text* is all of /proc/meminfo; unknown lines are skipped. Without MemAvailable (Linux < 3.14) it is
        estimated as MemFree + Buffers + Cached + SReclaimable - Shmem, never below MemFree.
    Units: kB in the file (1024 bytes), bytes in the result.
    Errors: ResourceFormatError if MemTotal, or MemAvailable and MemFree both, are missing.
    Source: proc_meminfo(5).
    """
    numbers: Dict[str, int] = {}
    for line in text.splitlines():
        name, _colon, rest = line.partition(":")
        if name in _MEMINFO_NAMES:
            try:
                numbers[name] = int(rest.split()[0])
            except (ValueError, IndexError) as error:
                raise ResourceFormatError("/proc/meminfo: {}: {}".format(name, error)) from error
            # The other two thirds of the file serve only the estimate.
            if name == "SwapFree" and "MemAvailable" in numbers:
                break
    total = numbers.get("MemTotal", 0)
    available = numbers.get("MemAvailable")
    if available is None and "MemFree" in numbers:
        reclaimable = numbers.get("Buffers", 0) + numbers.get("Cached", 0) + numbers.get("SReclaimable", 0)
        available = numbers["MemFree"] + max(0, reclaimable - numbers.get("Shmem", 0))
    if total <= 0 or available is None:
        raise ResourceFormatError("/proc/meminfo lacks MemTotal or MemAvailable")
    return Memory(
        total_bytes=total * _KIB,
        available_bytes=min(available, total) * _KIB,
        swap_total_bytes=numbers.get("SwapTotal", 0) * _KIB,
        swap_free_bytes=numbers.get("SwapFree", 0) * _KIB,
    )


_MEMINFO_NAMES = frozenset(
    ("MemTotal", "MemFree", "MemAvailable", "Buffers", "Cached", "SReclaimable", "Shmem", "SwapTotal", "SwapFree")
)


# oom_kill 2
# numa_hit 8421377
def parse_oom_kills(text: Optional[str]) -> Optional[int]:
    """Read from /proc/vmstat how many processes the kernel has killed since boot because memory ran out.

    Shapes: null where the kernel doesn't count them.
    Source: Linux mm/oom_kill.c, Linux >= 4.13.
    """
    # The file has about 180 lines; splitting them all would cost as much as the rest of the memory part.
    _before, found, after = (text or "").partition("\noom_kill ")
    return parse_integer(after.partition("\n")[0]) if found else None


# 93784.20 370123.55
# 12.34 45.60
def parse_uptime(text: str) -> float:
    """Read the seconds since boot.

    Errors: ResourceFormatError if there is no number.
    Source: proc_uptime(5).
    """
    try:
        return float(text.partition(" ")[0])
    except ValueError as error:
        raise ResourceFormatError("/proc/uptime: {}".format(error)) from error


# 27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
# 98 27 0:45 / /mnt/my\040nas rw,relatime - nfs4 nas:/export rw,vers=4.2
def parse_mountinfo(text: str) -> List[Mount]:
    """Read the mounts that this process sees, in mount order.

    Shapes: lines that don't have all fields are skipped; blanks in paths arrive as octal escapes.
        *read_only* looks at the mount's own options and at the superblock's: ``errors=remount-ro`` changes only the
        latter, and since about Linux 6.12 ext4 says ``emergency_ro`` there instead of ``ro``.
    Source: proc_pid_mountinfo(5), Linux >= 2.6.26.
    """
    mounts: List[Mount] = []
    for line in text.splitlines():
        before, separator, after = line.partition(" - ")
        fields, rest = before.split(" "), after.split(" ")
        if not separator or len(fields) < 6 or len(rest) < 2:
            continue
        super_options = rest[2].split(",") if len(rest) > 2 else []
        mounts.append(
            Mount(
                device_id=fields[2],
                root=_unescape(fields[3]),
                mount_point=_unescape(fields[4]),
                filesystem_type=rest[0],
                device=_unescape(rest[1]),
                read_only="ro" in fields[5].split(",") or not _NOT_WRITABLE.isdisjoint(super_options),
            )
        )
    return mounts


_NOT_WRITABLE = frozenset(("ro", "emergency_ro", "shutdown"))
# Kept in memory, or windows into the kernel: nothing there fills up a disk.
_PSEUDO_TYPES = frozenset(
    (
        "autofs", "binder", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "devtmpfs",
        "efivarfs", "functionfs", "fuse.gvfsd-fuse", "fuse.lxcfs", "fuse.portal", "fusectl", "hugetlbfs", "mqueue",
        "nsfs", "overlay", "proc", "pstore", "ramfs", "rootfs", "rpc_pipefs", "securityfs", "selinuxfs", "smackfs",
        "sysfs", "tmpfs", "tracefs", "usbfs",
    )
)  # fmt: skip
# Images are always full and always read-only: a snap or a firmware partition would raise an alarm for ever.
# A tuple: `in` compares, where a set would hash a type that a hostile sample gives as a list.
IMAGE_FILESYSTEMS = ("cramfs", "erofs", "iso9660", "romfs", "squashfs", "udf")
# A container runtime binds these single files from the host's disk into every container.
_RUNTIME_FILES = frozenset(("/etc/hostname", "/etc/hosts", "/etc/resolv.conf"))
_REMOTE_TYPES = frozenset(
    (
        "9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "glusterfs", "gfs2", "lustre", "ncpfs", "nfs",
        "nfs4", "ocfs2", "orangefs", "smb3", "smbfs", "virtiofs",
    )
)  # fmt: skip


def real_filesystems(mounts: Sequence[Mount]) -> List[Mount]:
    """Choose the mounts that stand for real storage, each filesystem once, sorted by mount point.

    Shapes: pseudo filesystems and images are left out. ``/`` counts whatever it is made of (overlay in a container,
        tmpfs on a live system) unless it is an image. Of several mounts of one filesystem ``/`` wins, then one of its
        whole tree, then the shortest path. Of mounts stacked on one path only the last can be seen.
    """
    visible = {mount.mount_point: mount for mount in mounts}
    chosen: Dict[str, Mount] = {}
    for mount in visible.values():
        kind = mount.filesystem_type
        if kind in IMAGE_FILESYSTEMS or (kind in _PSEUDO_TYPES and mount.mount_point != "/"):
            continue
        if mount.mount_point in _RUNTIME_FILES:
            continue
        rival = chosen.get(mount.device_id)
        if rival is None or _preference(mount) < _preference(rival):
            chosen[mount.device_id] = mount
    return sorted(chosen.values(), key=lambda mount: mount.mount_point)


def is_remote(mount: Mount) -> bool:
    """Tell whether asking this filesystem may wait for another machine or for a user's process."""
    kind = mount.filesystem_type
    return kind in _REMOTE_TYPES or kind == "fuse" or (kind.startswith("fuse.") and kind != "fuse.exfat")


def _preference(mount: Mount) -> Tuple[bool, bool, int, str]:
    return mount.mount_point != "/", mount.root != "/", len(mount.mount_point), mount.mount_point


_OCTAL = re.compile(r"\\([0-7]{3})")


def _unescape(path: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match.group(1), 8)), path) if "\\" in path else path


#   eth0: 469145276   12835    0    0    0     0          0         0   866684    7756    0    0    0     0       0
#       0 wlan0:1000 5 0 0 0 0 0 0 900 4 0 0 0 0 0 0
def parse_net_dev(text: str) -> Dict[str, InterfaceCounters]:
    """Read the counters of every network interface.

    Shapes: the two heading lines and lines that lack counters are skipped; the first counter may touch the colon.
    Source: proc_pid_net(5).
    """
    counters: Dict[str, InterfaceCounters] = {}
    for line in text.splitlines():
        name, separator, rest = line.rpartition(":")
        fields = rest.split()
        if not separator or len(fields) < 16:
            continue
        try:
            counters[name.strip()] = InterfaceCounters(int(fields[0]), int(fields[2]), int(fields[8]), int(fields[10]))
        except ValueError:
            continue
    return counters


# Half of every container's veth pair, and devices that carry no traffic of the machine's own.
_QUIET_INTERFACES = re.compile(r"lo$|veth|cali[0-9a-f]|lxc[0-9a-f_]|dummy\d|ifb\d|bonding_masters$")


@lru_cache(maxsize=256)
def is_reported_interface(name: str) -> bool:
    """Tell whether an interface says something about the node, not about one container."""
    return _QUIET_INTERFACES.match(name) is None


# 1000
# -1
def parse_speed(text: Optional[str]) -> Optional[int]:
    """Read a link speed in Mbit/s; drivers say -1, 0 or 4294967295 where they don't know.

    Source: Linux Documentation/ABI/testing/sysfs-class-net.
    """
    speed_mbps = parse_integer(text)
    return speed_mbps if speed_mbps is not None and 0 < speed_mbps < 10_000_000 else None


# 51078
# -273200
def parse_temperature(text: Optional[str]) -> Optional[float]:
    """Read a thermal zone or hwmon temperature.

    Shapes: what no board survives is a sensor that is switched off, and null.
    Units: millidegrees in the file, degrees Celsius in the result.
    Source: Linux Documentation/driver-api/thermal/sysfs-api.rst.
    """
    millidegrees = parse_integer(text)
    if millidegrees is None or not -60_000 <= millidegrees <= 200_000 or millidegrees == 0:
        return None
    return round(millidegrees / 1000, 1)


# throttled=0x50005
# 50005
def parse_throttled(text: Optional[str]) -> Optional[Dict[str, bool]]:
    """Read the Raspberry Pi firmware's throttling bits.

    Shapes: *text* is the answer of ``vcgencmd get_throttled``, or the sysfs file's bare hexadecimal number.
    Source: raspberrypi.com documentation of get_throttled; Linux drivers/firmware/raspberrypi.c.
    """
    if text is None:
        return None
    try:
        bits = int(text.strip().rpartition("=")[2], 16)
    except ValueError:
        return None
    return {name: bool(bits >> bit & 1) for name, bit in _THROTTLED_BITS}


_THROTTLED_BITS = (
    ("undervoltage", 0),
    ("frequency_capped", 1),
    ("throttled", 2),
    ("soft_temperature_limit", 3),
    ("undervoltage_since_boot", 16),
    ("throttled_since_boot", 18),
)


# Id=ssh.service
# NRestarts=0
def parse_service_units(text: str) -> List[ServiceUnit]:
    """Read what ``systemctl show --property=Id,ActiveState,NRestarts`` prints of many units.

    Shapes: a block for each unit, parted by blank lines, its lines in any order; blocks without an id are skipped, and a
        systemd before 235, which has no NRestarts, counts none.
    Source: systemctl(1), org.freedesktop.systemd1(5).
    """
    units: List[ServiceUnit] = []
    for block in text.split("\n\n"):
        pairs = dict(line.partition("=")[::2] for line in block.splitlines())
        if pairs.get("Id"):
            failed = pairs.get("ActiveState") == "failed"
            units.append(ServiceUnit(pairs["Id"], failed, parse_integer(pairs.get("NRestarts")) or 0))
    return units


def parse_integer(text: Optional[str]) -> Optional[int]:
    """Read a file that holds one decimal integer; anything else is null."""
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        return None
