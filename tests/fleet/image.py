# SPDX-License-Identifier: GPL-3.0-or-later
"""The image of a test node: a small Debian with systemd, sshd and one service to break, built by debootstrap.

No registry takes part. The tarball is kept in the cache folder under a hash of the recipe below, so that it is built
again only when the recipe changes. Touches the cache folder and the engine's images.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .engine import Engine, FleetError, cache_directory

REPOSITORY = "node-manager-node"
USER = "manager"
SERVICE = "demo-app.service"
DATA_DIRECTORY = "/var/data"
HOST_KEY = "/etc/ssh/ssh_host_ed25519_key"
BUILD_DEADLINE_SECONDS = 900.0

# python3 and not python3-minimal, which lacks json.
PACKAGES = ("systemd", "systemd-sysv", "openssh-server", "iproute2", "dbus", "procps", "sudo", "python3")

FILES = {
    # With cgroup v2 the engine mounts the container's own tree read-only, and systemd must write to it.
    "/sbin/node-init": (
        0o755,
        "#!/bin/sh\n"
        "[ ! -e /sys/fs/cgroup/cgroup.controllers ] || mount -o remount,bind,rw /sys/fs/cgroup\n"
        "exec /sbin/init\n",
    ),
    "/etc/systemd/system/node-host-key.service": (
        0o644,
        "[Unit]\n"
        "Description=Host key of this node\n"
        "Before=ssh.service\n"
        f"ConditionPathExists=!{HOST_KEY}\n"
        "[Service]\n"
        "Type=oneshot\n"
        f"ExecStart=/usr/bin/ssh-keygen -q -t ed25519 -N '' -C '' -f {HOST_KEY}\n"
        "[Install]\n"
        "WantedBy=multi-user.target\n",
    ),
    "/etc/ssh/sshd_config.d/node.conf": (0o644, f"HostKey {HOST_KEY}\nPasswordAuthentication no\n"),
    f"/etc/systemd/system/{SERVICE}": (
        0o644,
        "[Unit]\n"
        "Description=Application to watch and to break\n"
        "[Service]\n"
        "User=demo-app\n"
        "WorkingDirectory=/srv\n"
        "ExecStart=/usr/bin/python3 -u -m http.server 8000 --bind 127.0.0.1\n"
        "[Install]\n"
        "WantedBy=multi-user.target\n",
    ),
    f"/etc/sudoers.d/{USER}": (0o440, f"{USER} ALL=(ALL) NOPASSWD: ALL\n"),
}

# The timers would start apt on every node of the fleet at once.
COMMANDS = (
    ("useradd", "--create-home", "--shell", "/bin/bash", USER),
    ("useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", "demo-app"),
    ("install", "-d", "-m", "0700", "-o", USER, "-g", USER, f"/home/{USER}/.ssh"),
    ("install", "-d", "-m", "0755", DATA_DIRECTORY),
    ("systemctl", "enable", "node-host-key.service", SERVICE),
    (
        "systemctl",
        "mask",
        "apt-daily.timer",
        "apt-daily-upgrade.timer",
        "dpkg-db-backup.timer",
        "e2scrub_all.timer",
        "fstrim.timer",
    ),
)

# What must differ between nodes (keys, machine id), and what only takes room.
REMOVED = (
    "etc/ssh/ssh_host_*",
    "etc/hostname",
    # The dbus package's own id, which systemd would take over.
    "var/lib/dbus/machine-id",
    "var/cache/apt/*",
    "var/cache/debconf/*",
    "var/lib/apt/lists/*",
    "var/log/*.log",
    "usr/share/doc/*",
    "usr/share/locale/*",
    "usr/share/man/*",
)


def ensure_image(engine: Engine) -> str:
    """Return the tag of the node image, building and importing what is missing.

    Errors: FleetError that names what to install, or the log of the build.
    """
    suite = _debian_suite()
    digest = recipe_hash(suite)
    tag = f"{REPOSITORY}:{digest}"
    with locked(cache_directory() / "image.lock"):
        if engine.attempt("image", "inspect", tag).returncode == 0:
            return tag
        tarball = cache_directory() / f"node-image-{digest}.tar"
        if not tarball.exists():
            _build(suite, tarball)
        engine.run(
            "import",
            "--change",
            'CMD ["/sbin/node-init"]',
            "--change",
            "ENV container=docker",
            str(tarball),
            tag,
            timeout_seconds=180,
        )
        _remove_older_images(engine, tag)
    return tag


def image_is_cached() -> bool:
    """Say whether the image can be had without debootstrap."""
    return (cache_directory() / f"node-image-{recipe_hash(_debian_suite())}.tar").exists()


def recipe_hash(suite: str) -> str:
    """Give everything that makes the image what it is a short name."""
    recipe = json.dumps([suite, platform.machine(), PACKAGES, FILES, COMMANDS, REMOVED])
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold *path* as a lock, waiting for other processes that do."""
    with path.open("a", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_older_images(engine: Engine, tag: str) -> None:
    """Drop the images of earlier recipes, except those whose nodes are still there."""
    listed = engine.run("images", "--format", "{{.Repository}}:{{.Tag}}", REPOSITORY)
    for other in listed.splitlines():
        if other != tag:
            engine.attempt("image", "rm", other)


def _build(suite: str, tarball: Path) -> None:
    """Make the tarball, in full or not at all."""
    if os.geteuid() != 0:
        raise FleetError("The node image isn't built yet, and debootstrap needs root. Run this once as root.")
    if shutil.which("debootstrap") is None:
        raise FleetError("The node image isn't built yet. Install the Debian package debootstrap.")
    log = cache_directory() / "image-build.log"
    with tempfile.TemporaryDirectory(prefix="image-", dir=cache_directory()) as folder, log.open("wb") as output:
        root = Path(folder) / "root"
        partial = Path(folder) / "image.tar"

        def step(*command: str) -> None:
            try:
                subprocess.run(
                    command,
                    env=_build_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=BUILD_DEADLINE_SECONDS,
                    check=True,
                )
            except subprocess.SubprocessError as error:
                raise FleetError(f"Building the node image failed: {error}. The log is {log}.") from None

        step("debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, str(root), *_mirror(suite))
        for name, (mode, content) in FILES.items():
            path = root / name.lstrip("/")
            path.write_text(content, encoding="utf-8")
            path.chmod(mode)
        for command in COMMANDS:
            step("chroot", str(root), *command)
        for pattern in REMOVED:
            for path in root.glob(pattern):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        # Empty, not absent: systemd then gives every node its own id at its first start.
        (root / "etc/machine-id").write_text("", encoding="ascii")
        step("tar", "--numeric-owner", "-C", str(root), "-cf", str(partial), ".")
        partial.replace(tarball)
    for old in tarball.parent.glob("node-image-*.tar"):
        if old != tarball:
            old.unlink()


def _debian_suite() -> str:
    """Name the release to build: this machine's own, for which it has the archive's keys and mirror."""
    release = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text(encoding="utf-8").splitlines() if "=" in line
    )
    return release.get("VERSION_CODENAME", "bookworm").strip('"')


def _mirror(suite: str) -> list[str]:
    """Read this machine's mirror of *suite* from apt, whatever format its sources have; else debootstrap's own."""
    for line in _ask_apt(
        "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"
    ):
        # http://mirror.example/debian/ bookworm main
        uri, _, place = line.partition(" ")
        if place == f"{suite} main":
            return [uri]
    return []


def _build_environment() -> dict[str, str]:
    """Give debootstrap, which doesn't read apt's configuration, the proxy that apt uses."""
    environment = dict(os.environ)
    for line in _ask_apt("apt-config", "shell", "proxy", "Acquire::http::Proxy"):
        # proxy='http://proxy.example:3128/'
        environment.setdefault("http_proxy", line.partition("=")[2].strip("'"))
    return environment


def _ask_apt(*command: str) -> list[str]:
    """Return the lines that one of apt's tools prints, none where it isn't there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []
