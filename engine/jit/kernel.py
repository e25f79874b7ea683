"""How every kernel is compiled, and where its machine code is kept.

Numba's on-disk cache only looks at the file of the function itself: a kernel that calls a changed helper in another
file would be served stale. Here the machine code of a kernel lies in a folder named by a digest of its own file and of
every file of ours that this one imports, directly or through others (``sources``). So old machine code is never run,
a change compiles only what depends on it, and clones of one version share what was compiled.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numba
from numba import njit
from numba.core.caching import CompileResultCacheImpl, FunctionCache, IndexDataCacheFile

from engine.errors import SlalomError
from engine.jit import sources
from engine.jit.parts import PART, Compiler, rebuilt


def _usable(folder: Path) -> bool:
    """Whether ``folder`` is there, ours and closed to others' writing: numba unpickles what lies in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
    except OSError:
        return False
    return found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK)


def _cache_dir() -> Path:
    """:raises SlalomError: the folder that the environment names may be written by others"""
    for name in ("SLALOM_CACHE_DIR", "NUMBA_CACHE_DIR"):
        if override := os.environ.get(name):
            if not _usable(Path(override)):
                fix = "name a folder that is yours and that nobody else can write (chmod 700): code is run from it"
                raise SlalomError(name, override, fix)
            return Path(override)
    base = Path(os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")))
    shared = Path(tempfile.gettempdir()) / f"slalom-cache-{os.getuid()}"
    for folder in (base / "slalom", shared):
        if _usable(folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="slalom-cache-"))


try:
    CACHE_DIR = _cache_dir()
except SlalomError as error:  # modules are still being read: no command is there to make one line of it
    print(f"slalom: {error}", file=sys.stderr)
    sys.exit(2)


@cache
def _folder_of(file: Path) -> Path:
    """Where the machine code of the kernels in ``file`` is kept."""
    digest = sources.sha256([file], numba.__version__)[:16]
    return CACHE_DIR / f"{sources.dotted(file)}-{digest}"


class _Locator:
    """Tells numba's cache where a kernel's machine code is, by what the kernel is made of (see the module)."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        self._py_file = py_file
        self._line = py_func.__code__.co_firstlineno
        self._folder = _folder_of(Path(py_file).resolve())

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator | None:
        return cls(py_func, py_file) if os.path.exists(py_file) else None

    def ensure_cache_path(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return self._folder.name  # holds the digest of all that the kernel is made of

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Overloads(CompileResultCacheImpl):
    _locator_classes = [_Locator]  # noqa: RUF012  (numba's own attribute)

    def rebuild(self, target_context: Any, payload: Any) -> Any:
        return (rebuilt if payload[0][1] == PART else super().rebuild)(target_context, payload)


class _Files(IndexDataCacheFile):
    """One file for each signature, found by its name.

    Numba numbers the files and keeps an index of them; of two processes that compile at once, one may then find the
    machine code of the other's signature under its own number.
    """

    def path(self, key: Any) -> str:
        named = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
        return self._index_path.removesuffix(".nbi") + f".{named}.nbc"

    def save(self, key: Any, data: Any) -> None:
        self._save_data(self.path(key), data)

    def load(self, key: Any) -> Any:
        try:
            return self._load_data(self.path(key))
        except OSError:
            return None


class _Cache(FunctionCache):
    _impl_class = _Overloads

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _Files(self._cache_path, self._impl.filename_base, stamp)


def is_warm(module: str) -> bool:
    """Whether kernels of this exact version of ``module`` (dotted name) were compiled on this machine before."""
    return any(_folder_of(sources.path_of(module)).glob("*.nbc"))


def is_compiled(kernel: Any, signature: tuple[Any, ...]) -> bool:
    """Whether the machine code of ``kernel`` for these argument types is on disk."""
    key = kernel._cache._index_key(signature, kernel.targetctx.codegen())
    return os.path.exists(kernel._cache._cache_file.path(key))


_MAKING = threading.RLock()


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """``functools.cache`` for what compiles or loads kernels: of threads that ask at once, one does, the others wait.

    The plain cache lets all of them begin, and who comes second finds that the first has closed the kernel already
    (numba's "compilation disabled").
    """
    known = cache(make)

    @wraps(make)
    def ask(*given: Any) -> Any:
        with _MAKING:
            return known(*given)

    return ask


def kernel(signature: Any = None, **options: Any) -> Callable[..., Any]:
    """``numba.njit`` with the settings every kernel shares: cached, GIL released, IEEE arithmetic.

    :param signature: optional eager signature (policies need one, see ``engine.core.decide.decision``);
        used bare (``@kernel``) it compiles lazily.
    """
    settings: dict[str, Any] = {"nogil": True, "error_model": "numpy"} | options

    def made(function: Any) -> Any:
        dispatcher = njit(**settings)(function)
        dispatcher._cache = _Cache(function)
        dispatcher._compiler = Compiler(
            function, dispatcher.targetdescr, dispatcher.targetoptions, dispatcher.locals,
            dispatcher._compiler.pipeline_class,
        )  # fmt: skip
        if signature is not None and not bare:
            dispatcher.compile(signature)
            dispatcher.disable_compile()
        return dispatcher

    bare = callable(signature) and hasattr(signature, "__code__")
    return made(signature) if bare else made
