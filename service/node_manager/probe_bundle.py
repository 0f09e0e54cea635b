# SPDX-License-Identifier: GPL-3.0-or-later
"""What is sent to a node to watch it: a short remote command, and over its standard input the probe's own sources.

Nothing is installed on the node. The sources are packed once for the whole fleet; only a header and the options are a
node's own. Reads the installed collection, through domain.py.
"""

from __future__ import annotations

import ast
import io
import json
import shlex
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from node_manager.domain import module_source

_LOADER, _LOOP = "_probe_loader", "_probe_loop"
# Understood by any Python back to 2.7, so that an old one says that it is too old. Standard input is read unbuffered: what
# follows the bundle are commands for the loop. An empty entry of the path is the user's home, where a file json.py may lie.
_BOOTSTRAP = f"""\
import sys
if sys.version_info < (3, 8):
    sys.stderr.write("node_manager: needs Python 3.8 or newer, this is %d.%d\\n" % sys.version_info[:2])
    sys.exit(3)
sys.path = [path for path in sys.path if path]
import json, zlib
source = open(0, "rb", buffering=0, closefd=False)
size = int(source.readline(20) or sys.exit(0))
data = b""
while len(data) < size:
    data += source.read(size - len(data)) or sys.exit(0)
unpacker = zlib.decompressobj()
modules = json.loads(unpacker.decompress(data))
loader = {{"__name__": "{_LOADER}"}}
exec(modules["{_LOADER}"], loader)
loader["start"](modules, json.loads(unpacker.unused_data))
"""


@dataclass(frozen=True)
class LoopOptions:
    """How one node is watched; *checks* are written as node types have them."""

    sample_interval_seconds: float = 15.0
    beat_interval_seconds: float = 5.0
    check_interval_seconds: float = 300.0
    checks: list[dict[str, Any]] = field(default_factory=list)
    checks_timeout_seconds: float = 20.0
    # Asking an engine about many containers costs far more than all the rest of a sample.
    containers_interval_seconds: float = 15.0
    # Moves the second and all later samples, so that a fleet does not answer in step. The first comes at once.
    first_delay_seconds: float = 0.0
    max_line_bytes: int = 1_048_576


def bootstrap_command(python: str = "python3") -> str:
    """Give the command that takes a bundle from standard input and runs the loop; as root is the stream's matter.

    Errors: the command ends with code 3 and one line on standard error under a Python before 3.8.
    """
    # One line without single quotes inside: csh and fish, which may be the user's shell, read it as sh does.
    script = f"exec({json.dumps(_BOOTSTRAP)})"
    return f"{shlex.quote(python)} -S -E -c '{script}'"


def bundle(options: LoopOptions) -> bytes:
    """Give what to write to the command's standard input before anything else."""
    return b"".join(bundle_parts(options))


def bundle_parts(options: LoopOptions) -> tuple[bytes, bytes, bytes]:
    """Give the bundle in three parts to write one after the other; the second, by far the largest, is the same object for all.

    Shapes: the length of the rest as a decimal line; the sources by module, JSON compressed by zlib; the options as JSON.
    """
    own = json.dumps(asdict(options), separators=(",", ":"), allow_nan=False).encode("ascii")
    sources = _pack_sources()
    return b"%d\n" % (len(sources) + len(own)), sources, own


def strip_prose(source: str) -> str:
    """Take the comments and docstrings out of a source, a third of what would be sent; its lines keep their numbers.

    The code itself stays as it is written, for Python 3.8: ast.unparse writes it for the Python that it runs under.
    """
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False):
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            lines[first - 1 : last] = [" " * node.body[0].col_offset + '""', *[""] * (last - first)]
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    return "\n".join(lines) + "\n"


@cache
def _pack_sources() -> bytes:
    """Pack the loader, the loop and every file that they import, however late."""
    sources: dict[str, str] = {}
    waiting = [_LOADER, _LOOP]
    while waiting:
        name = waiting.pop()
        if name not in sources:
            source = module_source(name)
            sources[name] = strip_prose(source)
            waiting.extend(_neighbours(source))
    return zlib.compress(json.dumps(sources, separators=(",", ":")).encode("ascii"), 9)


def _neighbours(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
            yield node.module
