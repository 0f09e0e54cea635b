# SPDX-License-Identifier: GPL-3.0-or-later
"""The HTTP API: endpoints parse, call one domain module and return. Nothing but main imports this package."""
