# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Read what a board says of its heat: the processor's temperature, and whether it was throttled.

Standard library only. Runs on nodes with Python 3.8.
"""

from __future__ import annotations

from typing import Callable, Dict, List, Optional, Tuple

from ._probe_parse import parse_temperature, parse_throttled
from ._probe_read import Reader

NO_SENSORS = {"temperature_celsius": None, "throttled": None}

# vcgencmd is a process; its bits that matter stay set until the next boot.
_THROTTLED_MAX_AGE_SECONDS = 15.0
_MAX_SENSORS = 16
_CPU_ZONES = ("cpu", "soc", "x86_pkg", "package", "bigcore", "tdie")
_CPU_CHIPS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")


class Sensors:
    """The sensors of one node, looked for once."""

    def __init__(self, reader: Reader, clock: Callable[[], float]) -> None:
        self._reader = reader
        self._clock = clock
        self._temperatures: Optional[List[str]] = None
        self._throttled_path: Optional[str] = None
        self._throttled: Tuple[float, Optional[Dict[str, bool]]] = (float("-inf"), None)

    @property
    def may_exist(self) -> bool:
        """Tell whether there may be any: there are, or nobody has looked."""
        return self._temperatures is None or bool(self._temperatures) or self._throttled_path is not None

    def read(self) -> Dict[str, object]:
        """Give the sample's part."""
        if self._temperatures is None:
            self._temperatures = _find_temperatures(self._reader)
            self._throttled_path = _find_throttled(self._reader)
        readings = [parse_temperature(self._reader.read_word(path)) for path in self._temperatures]
        return {
            "temperature_celsius": max((reading for reading in readings if reading is not None), default=None),
            "throttled": self._read_throttled(),
        }

    def _read_throttled(self) -> Optional[Dict[str, bool]]:
        path = self._throttled_path
        if path is None:
            return None
        if path.startswith("/sys"):
            return parse_throttled(self._reader.read_word(path))
        now = self._clock()
        if now - self._throttled[0] >= _THROTTLED_MAX_AGE_SECONDS:
            self._throttled = (now, parse_throttled(self._reader.run(["vcgencmd", "get_throttled"], 1.0)))
        return self._throttled[1]


def _find_temperatures(reader: Reader) -> List[str]:
    """Choose the sensors of the processor, else all thermal zones, else the processor's hwmon chip."""
    base = "/sys/class/thermal"
    zones = {
        "{}/{}/temp".format(base, name): (reader.read_word("{}/{}/type".format(base, name)) or "").lower()
        for name in reader.names(base)
        if name.startswith("thermal_zone")
    }
    chosen = [path for path, kind in zones.items() if kind.startswith(_CPU_ZONES)] or list(zones)
    if not chosen:
        for name in reader.names("/sys/class/hwmon"):
            chip = "/sys/class/hwmon/" + name
            if reader.read_word(chip + "/name") in _CPU_CHIPS:
                chosen.append(chip + "/temp1_input")
    return chosen[:_MAX_SENSORS]


def _find_throttled(reader: Reader) -> Optional[str]:
    """Find what tells a Raspberry Pi's throttling: the firmware driver's file, or the device that vcgencmd asks."""
    for bus in reader.names("/sys/devices/platform"):
        if not bus.startswith("soc"):
            continue
        for device in reader.names("/sys/devices/platform/" + bus):
            path = "/sys/devices/platform/{}/{}/get_throttled".format(bus, device)
            if device.endswith("firmware") and reader.exists(path):
                return path
    return "/dev/vcio" if reader.exists("/dev/vcio") else None
