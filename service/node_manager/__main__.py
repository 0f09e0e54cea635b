# SPDX-License-Identifier: GPL-3.0-or-later
"""`python -m node_manager` is `nodectl`."""

from node_manager.cli import main

main()
