"""Other files in place of some modules of a package, in one process, from now on.

`remember` is called while nothing foreign is near: it keeps the compiled code of the modules that
may be replaced and of all that are built on them. `adopt` then executes the replaced ones from
their new files, and the others anew when they are imported. Modules that do not depend on a
replaced one stay as they are, and with them every object that is alive: data, recipes, records.

    remember("society.model", ["gpt", "optim"])       once, in the parent of all processes
    adopt("society.model", folder)                    in a process that ends with its run

Whoever holds a name of a replaced module goes on with the old one; so import inside functions where
the new code is wanted. Nothing is written: no bytecode of a stranger is ever kept.
"""

from __future__ import annotations

import dis
import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType

from society.errors import SocietyError


class NotAdoptable(SocietyError):
    """The files are not those of modules that were remembered."""


@dataclass(frozen=True, slots=True)
class _Memory:
    """What `remember` found in one package."""

    replaceable: frozenset[str]
    """Names of files without `.py`."""
    code: Mapping[str, CodeType]
    """Full name of every module that is executed anew -> its code as installed."""
    files: Mapping[str, str]
    """Full name -> its file as installed."""
    texts: Mapping[str, bytes]
    """Full name of every replaceable module -> what is in its file."""


_memories: dict[str, _Memory] = {}


def remember(package: str, names: Iterable[str]) -> None:
    """Keep the code of `names` and of every loaded module of the package that depends on them.

    Args:
        package: Its modules must be loaded by now, as far as a run needs them.
        names: Modules that may be replaced, without the package's name.
    """
    replaceable = frozenset(names)
    loaded = {
        name: _code_of(name)
        for name in sys.modules
        if name.startswith(f"{package}.") and name.count(".") == package.count(".") + 1
    }
    wanted = {f"{package}.{name}" for name in replaceable}
    affected = _dependents(loaded, wanted)
    code = {name: code for name, code in loaded.items() if name in affected}
    files = {name: str(sys.modules[name].__file__) for name in code}
    texts = {name: Path(files[name]).read_bytes() for name in wanted}
    _memories[package] = _Memory(replaceable, code, files, texts)


def adopt(package: str, folder: Path) -> None:
    """Use every `.py` file in `folder` instead of the package's module of the same name.

    Raises:
        NotAdoptable: `remember` was not called, or a file is not one of those it was given.
        Exception: Whatever the files raise when they are executed. The process is not to be used
            any more then.
    """
    memory = _memories.get(package)
    if memory is None:
        raise NotAdoptable(f"{package}: nothing was remembered; call `warm_up` of its task first.")
    files = {path.stem: path for path in sorted(folder.glob("*.py"))}
    if odd := sorted(files.keys() - memory.replaceable):
        raise NotAdoptable(
            f"{', '.join(odd)}: no module that may be replaced; those are "
            f"{', '.join(sorted(memory.replaceable))}."
        )
    code, places = dict(memory.code), dict(memory.files)
    for name, path in files.items():
        full, text = f"{package}.{name}", path.read_bytes()
        if text != memory.texts[full]:
            code[full] = compile(text, str(path), "exec", dont_inherit=True)
        places[full] = str(path)
    sys.meta_path.insert(0, _Finder(code, places))
    _forget(package, code)
    for name in files:
        importlib.import_module(f"{package}.{name}")


def _forget(package: str, names: Iterable[str]) -> None:
    """Have modules executed anew when they are imported the next time."""
    for name in names:
        sys.modules.pop(name, None)
        vars(sys.modules[package]).pop(name.rpartition(".")[2], None)


class _Finder(MetaPathFinder, Loader):
    """Serves modules from code objects in memory."""

    def __init__(self, code: Mapping[str, CodeType], places: Mapping[str, str]) -> None:
        self._code, self._places = code, places

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The place of a module that is served here; None for all others."""
        if fullname not in self._code:
            return None
        return spec_from_loader(fullname, self, origin=self._places[fullname])

    def exec_module(self, module: ModuleType) -> None:
        """Run a module's code in its name space."""
        name = module.__name__
        module.__file__ = self._places[name]
        exec(self._code[name], module.__dict__)


# ------------------------------------------------------------------------------ dependencies


def _dependents(loaded: Mapping[str, CodeType], wanted: set[str]) -> set[str]:
    """`wanted` and all that import one of them, or one that does, and so on."""
    imports = {name: set(_imported(code)) for name, code in loaded.items()}
    affected = wanted & loaded.keys()
    while more := {name for name, used in imports.items() if used & affected} - affected:
        affected |= more
    return affected


def _code_of(name: str) -> CodeType:
    """A loaded module's code as it is installed."""
    spec = sys.modules[name].__spec__
    found = spec.loader.get_code(name) if spec is not None and spec.loader is not None else None  # type: ignore[attr-defined]
    if not isinstance(found, CodeType):
        raise NotAdoptable(f"{name} has no source that could be executed anew.")
    return found


def _imported(code: CodeType) -> Iterator[str]:
    """Every module that a code object and those inside it may import, by full name.

    `from a import b` names both `a` and `a.b`; the latter may be no module.
    """
    module = ""
    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            module = str(step.argval)
            yield module
        elif step.opname == "IMPORT_FROM":
            yield f"{module}.{step.argval}"
        elif isinstance(step.argval, CodeType):
            yield from _imported(step.argval)
