"""Which of our files a file is made of: itself and what it imports, through any number of others.

Only imports at the top of a file count (a compiled kernel cannot see others), and only files below the root of the
project, or of the package that the file belongs to. What does not lie there, as the standard library, is left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

#: The folder that holds ``engine``, ``policies``, ``env``, ``train`` and ``eval``.
ROOT = Path(__file__).resolve().parents[2]
_IMPORT = re.compile(r"^(?:from\s+(\S+)\s+import\s+(\([^)]*\)|[^\n#]*)|import\s+([^\n#]+))", re.MULTILINE)
_NAME = re.compile(r"\w+(?:\s+as\s+\w+)?")


def path_of(module: str, root: Path = ROOT) -> Path:
    """The file of a module; a package's is its ``__init__.py``. The file need not exist."""
    place = root.joinpath(*module.split("."))
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _root_of(file: Path) -> Path:
    """The folder from which ``file`` is imported: ours, or the first one above it that is no package."""
    if file.is_relative_to(ROOT):
        return ROOT
    folder = file.parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return folder


def dotted(file: Path) -> str:
    """The name by which ``file`` is imported."""
    return ".".join(file.relative_to(_root_of(file)).with_suffix("").parts)


@cache
def _imports(file: Path) -> tuple[Path, ...]:
    """The files of ours (or of the file's own package) that the top of ``file`` imports."""
    roots = dict.fromkeys((ROOT, _root_of(file)))
    package = dotted(file).split(".")
    found: list[Path] = []
    for source, names, plain in _IMPORT.findall(file.read_text(encoding="utf-8")):
        if plain:
            modules = [part.split()[0] for part in plain.split(",") if part.split()]
        else:
            dots = len(source) - len(source.lstrip("."))
            source = ".".join(([*package[:-dots]] if dots else []) + ([source[dots:]] if source[dots:] else []))
            modules = [source, *(f"{source}.{name.split()[0]}" for name in _NAME.findall(names))]
        found += [path for module in modules for root in roots if (path := path_of(module, root)).is_file()]
    return tuple(dict.fromkeys(found))


def closure(files: Iterable[Path]) -> tuple[Path, ...]:
    """``files`` and all that they import, in order of their names."""
    seen: set[Path] = set()
    ahead = [file.resolve() for file in files]
    while ahead:
        file = ahead.pop()
        if file not in seen:
            seen.add(file)
            ahead += _imports(file)
    return tuple(sorted(seen))


def sha256(files: Iterable[Path], *more: str) -> str:
    """Digest of the names and contents of ``files`` and of all that they import, and of ``more`` words."""
    digest = hashlib.sha256("\0".join(more).encode())
    for file in closure(files):
        content = file.read_bytes()
        digest.update(f"{dotted(file)}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()
