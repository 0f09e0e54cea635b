# SPDX-License-Identifier: GPL-3.0-or-later
"""Distances on the earth, by columns: squared straight distances on the unit sphere, which need no trigonometry per node.

Pure. Such a distance is called a chord here; it grows with the distance along the ground.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

EARTH_RADIUS_KM = 6371.0088
_HALF_KM = 500.0


def position_of(latitude: float | None, longitude: float | None) -> tuple[float, float, float]:
    """Give a point's place on the unit sphere; not a number where it is unknown."""
    if latitude is None or longitude is None:
        return math.nan, math.nan, math.nan
    phi, theta = math.radians(latitude), math.radians(longitude)
    return math.cos(phi) * math.cos(theta), math.cos(phi) * math.sin(theta), math.sin(phi)


def chords_from(latitude: float, longitude: float, positions: Floats) -> Floats:
    """Give the chord from a point to each of *positions*, of shape (3, nodes)."""
    x, y, z = positions
    px, py, pz = position_of(latitude, longitude)
    chords: Floats = (x - px) ** 2 + (y - py) ** 2 + (z - pz) ** 2
    return chords


def nearness(chords: Floats) -> NDArray[np.float32]:
    """Score distances: 100 for none, half of it for 500 km, 0 for unknown."""
    kilometres = EARTH_RADIUS_KM * np.sqrt(chords)
    return np.nan_to_num(100 / (1 + kilometres / _HALF_KM), nan=0.0).astype(np.float32)


def chord_of(kilometres: float) -> float:
    """Turn kilometres along the ground into a chord; from half way round on all is within reach."""
    if kilometres >= math.pi * EARTH_RADIUS_KM:
        return math.inf
    return (2 * math.sin(kilometres / EARTH_RADIUS_KM / 2)) ** 2


def kilometres_of(chord: float) -> float:
    """Turn a chord into kilometres along the ground."""
    return 2 * EARTH_RADIUS_KM * math.asin(min(1.0, math.sqrt(chord) / 2))
