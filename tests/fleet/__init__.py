# SPDX-License-Identifier: GPL-3.0-or-later
"""Real nodes to manage: systemd in Docker, each reached over SSH at its own loopback address.

Used by hand (``make fleet-up``) and by the tests marked ``fleet``. Imports nothing of the product, so that what it
proves about the product is proved from outside.
"""
