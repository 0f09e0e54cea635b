# SPDX-License-Identifier: GPL-3.0-or-later
"""Node Manager: looks after the nodes of a distributed IoT platform."""

__version__ = "0.1.0"
