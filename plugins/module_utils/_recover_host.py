# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Make the root filesystem writable again, and start the node anew.

Runs on nodes with Python 3.8.
"""

from __future__ import annotations

import os
import subprocess
import time
from typing import Optional

from ._checks_host import parse_systemctl_show
from ._probe_clock import read_kernel_clock
from ._probe_parse import parse_mountinfo
from ._probe_read import Reader
from ._recover_run import Repair, RepairError, Run, run_program

# Long enough for the answer to leave and the connection to end.
REBOOT_AFTER_SECONDS = 3
_SYSTEMD_RUNS = "/run/systemd/system"


def remount_root(
    deadline: float, *, check_mode: bool, run: Run = run_program, reader: Optional[Reader] = None
) -> Repair:
    """Mount / for writing again, unless /etc/fstab wants it read-only."""
    eyes = reader or Reader()
    if not is_read_only(eyes.read_text("/proc/self/mountinfo")):
        return Repair(False, "/ is writable", before={"/": "rw"}, after={"/": "rw"})
    try:
        meant = wants_read_only(eyes.read_text("/etc/fstab"))
    except OSError:
        meant = False
    if meant:
        return Repair(False, "/ is read-only, as /etc/fstab wants it", before={"/": "ro"}, after={"/": "ro"})
    why = "/ is mounted read-only"
    if check_mode:
        return Repair(True, why, changed=True, before={"/": "ro"}, after={"/": "rw"})
    said = ""
    # The second is for a mount that is read-only by itself, on a filesystem that isn't.
    for options in ("remount,rw", "remount,bind,rw"):
        ended = run(["mount", "-o", options, "/"], deadline)
        if not is_read_only(eyes.read_text("/proc/self/mountinfo")):
            return Repair(True, "mounted / for writing", True, {"/": "ro"}, {"/": "rw"}, ["mount -o " + options + " /"])
        said = said or ended.describe()
    raise RepairError("/ can't be mounted for writing, see dmesg: mount {}".format(said))


# 25 1 259:2 / / ro,relatime shared:1 - ext4 /dev/nvme0n1p2 ro,errors=remount-ro
# 30 25 0:26 / /run rw,nosuid,nodev shared:5 - tmpfs tmpfs rw,size=1632660k
def is_read_only(mountinfo: str) -> bool:
    """Tell whether the root filesystem is mounted read-only.

    Source: proc_pid_mountinfo(5).
    """
    roots = [mount for mount in parse_mountinfo(mountinfo) if mount.mount_point == "/"]
    return bool(roots) and roots[-1].read_only


# UUID=0a1b2c3d / ext4 ro,noatime 0 1
# /dev/mmcblk0p1 /boot vfat defaults 0 2
def wants_read_only(fstab: str) -> bool:
    """Tell whether /etc/fstab has / read-only.

    Source: fstab(5).
    """
    rows = [line.split() for line in fstab.splitlines() if not line.lstrip().startswith("#")]
    return any(len(row) > 3 and row[1] == "/" and "ro" in row[3].split(",") for row in rows)


def read_boot(reader: Optional[Reader] = None) -> str:
    """Give what tells this start of the node from every other.

    A container shares the kernel's boot with its machine, so the start of the first process is in it too.
    """
    eyes = reader or Reader()
    boot = eyes.read_text("/proc/sys/kernel/random/boot_id").strip()
    # The fields after the name, which may hold blanks; the start is the 22nd of all. Source: proc_pid_stat(5).
    started = eyes.read_text("/proc/1/stat").rpartition(")")[2].split()[19]
    return "{}.{}".format(boot, started)


def reboot(*, check_mode: bool) -> Repair:
    """Start the node anew in a few seconds, from outside of this connection."""
    boot = read_boot()
    if check_mode:
        return Repair(True, "would reboot", changed=True, before={"boot": boot}, after={"boot": "another"})
    _detach_reboot()
    message = "reboots in {} s".format(REBOOT_AFTER_SECONDS)
    return Repair(True, message, changed=True, before={"boot": boot}, after={"boot": "another"}, done=[message])


def read_clock(deadline: float, run: Run = run_program) -> Optional[bool]:
    """Tell whether the clock is synchronised, None where nobody here may know."""
    try:
        return read_kernel_clock().synchronised
    except OSError:
        pass
    try:
        ended = run(["timedatectl", "show", "--property", "NTPSynchronized"], min(deadline, time.monotonic() + 5))
    except RepairError:
        return None
    answer = parse_systemctl_show(ended.output).get("NTPSynchronized")
    return {"yes": True, "no": False}.get(answer or "") if ended.status == 0 else None


def _detach_reboot() -> None:
    if os.path.isdir(_SYSTEMD_RUNS):
        # A timer of systemd itself outlives this session whatever logind does with it.
        after = "--on-active={}".format(REBOOT_AFTER_SECONDS)
        argv = ["systemd-run", "--collect", after, "systemctl", "reboot"]
        if run_program(argv, time.monotonic() + 10).status == 0:
            return
        command = "systemctl reboot || systemctl reboot --force || reboot -f"
    else:
        command = "reboot || reboot -f"
    subprocess.Popen(
        ["sh", "-c", "sleep {}; {}".format(REBOOT_AFTER_SECONDS, command)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
