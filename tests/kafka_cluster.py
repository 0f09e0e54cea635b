# SPDX-License-Identifier: GPL-3.0-or-later
"""A real Apache Kafka on loopback: brokers that can be killed and started again, their data kept.

The first broker is also the controller. The program comes from Maven Central, once, into the cache folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleet.engine import cache_directory
from running_service import free_port

VERSION = "4.1.0"
DOWNLOAD_SECONDS = 600
START_SECONDS = 60

_POM = f"""<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>node-manager</groupId><artifactId>test-broker</artifactId><version>1</version>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>{VERSION}</version></dependency>
    <dependency><groupId>org.slf4j</groupId><artifactId>slf4j-simple</artifactId><version>1.7.36</version></dependency>
  </dependencies>
</project>
"""
_SETTINGS = {
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "group.initial.rebalance.delay.ms": "0",
    # As a careful operator has it: topics are made on purpose.
    "auto.create.topics.enable": "false",
    "share.coordinator.state.topic.replication.factor": "1",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "offsets.topic.num.partitions": "4",
    # A killed broker is missed soon, so that a test sees leaders change.
    "broker.heartbeat.interval.ms": "500",
    "broker.session.timeout.ms": "3000",
    "log.cleaner.dedupe.buffer.size": "8388608",
}
# Quick to start, small, and no more than the brokers of a test need.
_JAVA = ("java", "-Xms64m", "-Xmx320m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto")


class KafkaCluster:
    """Some brokers; the addresses stay the same over kills and restarts."""

    def __init__(self, folder: Path, brokers: int = 1) -> None:
        self._folder = folder
        self._classes = f"{kafka_libraries()}/*"
        self._ports = [free_port() for _ in range(brokers)]
        self._controller_port = free_port()
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * brokers
        self._cluster_id = "bm9kZS1tYW5hZ2VyLXRlc3Q"
        for number in range(brokers):
            self._format(number)

    @property
    def addresses(self) -> list[str]:
        """Give the brokers, as clients are told them."""
        return [f"127.0.0.1:{port}" for port in self._ports]

    def start(self, number: int | None = None) -> None:
        """Start one broker, or all, and wait until they answer."""
        numbers = range(len(self._ports)) if number is None else [number]
        for each in numbers:
            with (self._folder / f"broker-{each}.log").open("ab") as log:
                self._processes[each] = subprocess.Popen(
                    [*_JAVA, "-cp", self._classes, "kafka.Kafka", str(self._file(each))],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._folder,
                    start_new_session=True,
                )
        for each in numbers:
            self._wait(each)

    def kill(self, number: int = 0) -> None:
        """End a broker as a power cut does."""
        process = self._processes[number]
        if process is not None:
            # A paused one too.
            process.kill()
            process.wait(30)
        self._processes[number] = None

    def pause(self, number: int = 0) -> None:
        """Let a broker hang: its connections stay, nothing answers."""
        self._signal(number, signal.SIGSTOP)

    def resume(self, number: int = 0) -> None:
        """Let it go on."""
        self._signal(number, signal.SIGCONT)

    def stop(self) -> None:
        """End all brokers."""
        for number in range(len(self._ports)):
            self.kill(number)

    def log_file(self, topic: str, partition: int = 0) -> Path:
        """Give the file in which the first broker has a partition's first messages."""
        return self._folder / "data-0" / f"{topic}-{partition}" / f"{0:020}.log"

    def _signal(self, number: int, what: signal.Signals) -> None:
        process = self._processes[number]
        assert process is not None
        process.send_signal(what)

    def _file(self, number: int) -> Path:
        return self._folder / f"broker-{number}.properties"

    def _format(self, number: int) -> None:
        roles = "broker,controller" if number == 0 else "broker"
        listeners = f"PLAINTEXT://127.0.0.1:{self._ports[number]}"
        if number == 0:
            listeners += f",CONTROLLER://127.0.0.1:{self._controller_port}"
        copies = str(min(2, len(self._ports)))
        settings = {
            **_SETTINGS,
            "process.roles": roles,
            "node.id": str(number + 1),
            "controller.quorum.voters": f"1@127.0.0.1:{self._controller_port}",
            "listeners": listeners,
            "advertised.listeners": f"PLAINTEXT://127.0.0.1:{self._ports[number]}",
            "log.dirs": str(self._folder / f"data-{number}"),
            "offsets.topic.replication.factor": copies,
            "default.replication.factor": copies,
        }
        self._file(number).write_text("".join(f"{key}={value}\n" for key, value in settings.items()), "utf-8")
        tool = (
            "kafka.tools.StorageTool",
            "format",
            "--cluster-id",
            self._cluster_id,
            "--config",
            str(self._file(number)),
        )
        done = subprocess.run([*_JAVA, "-cp", self._classes, *tool], capture_output=True, timeout=60, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the broker's storage can't be formatted: {done.stderr.decode()[-2000:]}")

    def _wait(self, number: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            process = self._processes[number]
            if process is None or process.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._ports[number]), 1):
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
        log = (self._folder / f"broker-{number}.log").read_text("utf-8", "replace")
        raise RuntimeError(f"broker {number} doesn't answer in {START_SECONDS} s:\n{log[-3000:]}")


@contextmanager
def kafka_cluster(brokers: int = 1) -> Iterator[KafkaCluster]:
    """Run a cluster in a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix="node-manager-kafka-"))
    cluster = KafkaCluster(folder, brokers)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def kafka_libraries() -> Path:
    """Give the folder with Kafka's archives; the first caller on a machine fetches them."""
    folder = cache_directory() / f"kafka-{VERSION}"
    with (cache_directory() / "kafka.lock").open("a", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.is_dir():
            return folder
        with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
            (Path(scratch) / "pom.xml").write_text(_POM, "utf-8")
            done = subprocess.run(
                ["mvn", "-q", "-B", "dependency:copy-dependencies", "-DoutputDirectory=lib"],
                cwd=scratch,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=DOWNLOAD_SECONDS,
                check=False,
                env={**os.environ, "MAVEN_OPTS": "-Xmx256m"},
            )
            if done.returncode != 0:
                raise RuntimeError(f"Kafka can't be fetched: {done.stdout.decode()[-2000:]}")
            (Path(scratch) / "lib").rename(folder)
    return folder
