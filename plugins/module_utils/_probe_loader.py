# Copyright (c) 2026, The Node Manager developers
# GNU General Public License v3.0-or-later (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Load the probe from sources that came over standard input, and run its loop.

Standard library only. Runs on nodes with Python 3.8, before anything else of the probe: it can import none of the
other files itself, and is not imported but run by the few lines of the remote command.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Dict, Mapping, Optional, Sequence

# Any name will do: the files import each other relatively.
PACKAGE = "node_manager_probe"


class SourceFinder:
    """Find modules of one package in a mapping of names to sources.

    Each is compiled when it is first imported, then its source is let go: the checks are a third of all, and a node
    without checks never needs them.
    """

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._sources: Dict[str, str] = {PACKAGE + "." + name: source for name, source in sources.items()}

    def find_spec(
        self, fullname: str, _path: Optional[Sequence[str]] = None, _target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        """Know the package and its modules; leave every other name to Python."""
        if fullname == PACKAGE or fullname in self._sources:
            origin = fullname.replace(".", "/") + ".py"
            return ModuleSpec(fullname, self, origin=origin, is_package=fullname == PACKAGE)  # type: ignore[arg-type]
        return None

    def create_module(self, _spec: ModuleSpec) -> Optional[ModuleType]:
        """Take what Python makes by itself."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Run a module's source; the package has none."""
        source = self._sources.pop(module.__name__, "")
        # Nothing else of the loader's own, such as its future imports, is to reach the module.
        code = compile(source, module.__name__.replace(".", "/") + ".py", "exec", dont_inherit=True)
        exec(code, module.__dict__)  # noqa: S102  the manager's own sources are what this file is for


def start(sources: Mapping[str, str], options: Mapping[str, object]) -> None:
    """Run the loop; it ends the process."""
    # First of all finders: a file of the same name in some folder of the node must not come before.
    sys.meta_path.insert(0, SourceFinder(sources))
    __import__(PACKAGE + "._probe_loop")
    sys.modules[PACKAGE + "._probe_loop"].main(options)
