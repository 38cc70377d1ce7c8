"""What candidate code must not use, read off its syntax tree. No security boundary, see `check`.

Only what is new counts: each use of something has a name, and as many uses of one name as the
task's own file has are allowed, wherever they moved to.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

MODULES = frozenset(
    {
        "__future__", "math", "dataclasses", "collections", "collections.abc", "typing",
        "functools", "itertools", "contextlib", "enum", "torch", "torch.nn",
        "torch.nn.functional", "torch.optim", "torch.autograd",
        "society.model.ops", "society.model.flops", "society.model.recipe",
        "society.model.attention", "society.model.schedule", "society.model.gpt",
    }
)  # fmt: skip
NAMES = frozenset(
    {
        "exec", "eval", "compile", "open", "globals", "locals", "vars", "setattr", "delattr",
        "breakpoint", "exit", "quit", "get_type_hints", "ForwardRef",
    }
)  # fmt: skip
TORCH = frozenset(
    {
        "load", "save", "manual_seed", "seed", "initial_seed", "random", "Generator",
        "default_generator", "hub", "ops", "library", "utils", "jit", "package", "classes",
        "multiprocessing", "distributed", "serialization", "get_rng_state", "from_file", "fx",
        "export", "onnx", "overrides", "profiler",
    }
)  # fmt: skip
ATTRIBUTES = frozenset(
    {
        "manual_seed", "manual_seed_all", "set_rng_state", "get_rng_state", "set_state", "tofile",
        "from_file", "data_ptr", "untyped_storage", "f_globals", "f_locals", "f_back",
        "f_builtins", "gi_frame", "cr_frame", "ag_frame", "tb_frame", "get_type_hints",
        "ForwardRef",
    }
)  # fmt: skip
FOREIGN = frozenset(
    {
        "sys", "os", "io", "time", "random", "builtins", "inspect", "gc", "ctypes", "threading",
        "subprocess", "socket", "pickle", "importlib", "types", "warnings", "weakref", "abc",
    }
)  # fmt: skip
"""Modules that others hold as attributes, e.g. `dataclasses.sys`."""
METHODS = frozenset(
    {
        "__init__", "__post_init__", "__call__", "__len__", "__enter__", "__exit__", "__name__",
        "__iter__", "__next__", "__getitem__",
    }
)  # fmt: skip
"""Special names that may be used, e.g. in `super().__init__()`."""
HOOKS = frozenset(
    {
        "__torch_function__", "__torch_dispatch__", "__reduce__", "__reduce_ex__", "__getstate__",
        "__setstate__", "__del__", "__getattr__", "__getattribute__", "__setattr__",
        "__init_subclass__", "__set_name__",
    }
)  # fmt: skip
DECLARED = frozenset({"__slots__", "__all__", "__match_args__", "__name__"})
MAX_TEXT = 2048
"""Characters or bytes of one literal."""
MAX_NUMBERS = 256
"""Numbers within one list, tuple, set or dict, all levels together."""
MAX_INT = 1 << 64

RELATIVE = "relative imports are not allowed; write `society.model...` in full."
TORCH_IS_SHARED = (
    "must not be used: it reaches files, processes or random numbers, or changes torch for "
    "everybody; compute with tensors."
)
NOT_YOURS = "must not be used; seeds, files and frames are not the candidate's."
NO_NAME = "must not be used; write the computation itself, and give a variable another name."
NO_SPECIAL = "must not be used; call the function or operator that it stands for."
NOT_IN_PLACE = "belongs to another module and must not be assigned to; write a function instead."


@dataclass(frozen=True, slots=True)
class Rules:
    """What changed code may import, and whether its syntax tree is looked at all."""

    modules: frozenset[str] = MODULES
    """Dotted names; modules below `torch.optim` and the task's own files are allowed as well."""
    checked: bool = True

    @classmethod
    def none(cls) -> Rules:
        """For a task whose code is a stranger's anyway, e.g. a user's script: parses, no more."""
        return cls(frozenset(), False)


TRAINER = Rules()
"""For the trainer: arithmetic on tensors, and nothing that reaches anything else."""


@dataclass(frozen=True, slots=True)
class _Use:
    """One use of something that is forbidden."""

    key: str
    """Names it, so that it can be compared with the uses in another version of the file."""
    line: int
    message: str


def violations(
    tree: ast.Module, before: ast.Module, rules: Rules, files: Collection[str] = ()
) -> list[str]:
    """What the tree uses against the rules, and did not use before, e.g. `line 3: ...`.

    Args:
        tree: The changed file.
        before: The same file of the task.
        rules: What is allowed.
        files: Names of the task's editable files, which may import each other.
    """
    if not rules.checked:
        return []
    own = {f"society.model.{name.removesuffix('.py')}" for name in files}
    allowed = rules.modules | own
    left = Counter(use.key for use in _Reader(allowed).uses(before))
    found = []
    for use in sorted(_Reader(allowed).uses(tree), key=lambda use: use.line):
        left[use.key] -= 1
        if left[use.key] < 0:
            found.append(f"line {use.line}: {use.message}")
    return list(dict.fromkeys(found))


class _Reader:
    """Finds the forbidden uses in one file."""

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = allowed
        self._imported: dict[str, str] = {}
        """Name in the file -> the dotted name that it was imported as."""
        self._rules: tuple[tuple[type[ast.AST] | tuple[type[ast.AST], ...], _Rule], ...] = (
            ((ast.Import, ast.ImportFrom), self._import),
            (ast.Name, self._name),
            (ast.Attribute, self._attribute),
            (ast.Subscript, self._stored),
            (ast.Call, self._call),
            ((ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef), self._definition),
            (ast.Constant, self._constant),
            ((ast.List, ast.Tuple, ast.Set, ast.Dict), self._display),
        )

    def uses(self, tree: ast.Module) -> list[_Use]:
        """All forbidden uses, in no order."""
        self._imported = dict(_imports(tree))
        skipped = _ignored(tree)
        return [
            use
            for node in ast.walk(tree)
            if id(node) not in skipped
            for kind, rule in self._rules
            if isinstance(node, kind)
            for use in rule(node)
        ]

    def _import(self, node: ast.AST) -> Iterator[_Use]:
        assert isinstance(node, ast.Import | ast.ImportFrom)
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from self._module(alias.name, node.lineno)
        elif node.level:
            yield _Use("import .", node.lineno, RELATIVE)
        else:
            for alias in node.names:
                yield from self._taken(node.module or "", alias.name, node.lineno)

    def _taken(self, module: str, name: str, line: int) -> Iterator[_Use]:
        if name == "*":
            yield _Use(f"import {module}.*", line, "name what you import, not `*`.")
        elif not self._may_import(f"{module}.{name}"):
            whole = f"{module}.{name}" if module == "society.model" else module
            yield from self._module(whole, line)
            yield from self._member(module, name, line)

    def _may_import(self, module: str) -> bool:
        return module in self._allowed or module.startswith("torch.optim.")

    def _module(self, module: str, line: int) -> Iterator[_Use]:
        if not self._may_import(module):
            known = ", ".join(sorted(name for name in self._allowed if name != "__future__"))
            message = f"`{module}` must not be imported; allowed are {known}."
            yield _Use(f"import {module}", line, message)

    def _member(self, module: str, name: str, line: int) -> Iterator[_Use]:
        """A name taken out of a module, by import or as an attribute."""
        dotted = f"{module}.{name}"
        is_torch = "torch" in module.split(".")
        if is_torch and (name in TORCH or name.startswith("set_")):
            yield _Use(dotted, line, f"`{dotted}` {TORCH_IS_SHARED}")
        elif name in FOREIGN and not self._may_import(dotted):
            yield _Use(dotted, line, f"`{dotted}` is a module that must not be used.")
        elif name.startswith("_") and not module.startswith("society.") and name not in METHODS:
            yield _Use(dotted, line, f"`{dotted}` is private to its module; use public names.")
        elif name in ATTRIBUTES:
            yield _Use(dotted, line, f"`{name}` {NOT_YOURS}")

    def _name(self, node: ast.AST) -> Iterator[_Use]:
        assert isinstance(node, ast.Name)
        if node.id in NAMES or (_is_special(node.id) and node.id not in DECLARED):
            yield _Use(f"name {node.id}", node.lineno, f"`{node.id}` {NO_NAME}")

    def _attribute(self, node: ast.AST) -> Iterator[_Use]:
        assert isinstance(node, ast.Attribute)
        owner = self._dotted(node.value)
        if _is_special(node.attr) and node.attr not in METHODS:
            yield _Use(f".{node.attr}", node.lineno, f"`.{node.attr}` {NO_SPECIAL}")
        elif owner is not None:
            yield from self._member(owner, node.attr, node.lineno)
        elif node.attr in ATTRIBUTES:
            yield _Use(f".{node.attr}", node.lineno, f"`.{node.attr}` {NOT_YOURS}")
        yield from self._stored(node)

    def _stored(self, node: ast.AST) -> Iterator[_Use]:
        """An attribute or item of something imported that is assigned to or deleted."""
        assert isinstance(node, ast.Attribute | ast.Subscript)
        if not isinstance(node.ctx, ast.Load) and self._is_imported(node):
            target = ast.unparse(node)[:80]
            yield _Use(f"assign {target}", node.lineno, f"`{target}` {NOT_IN_PLACE}")

    def _call(self, node: ast.AST) -> Iterator[_Use]:
        """`getattr` with anything but a plain literal name."""
        assert isinstance(node, ast.Call)
        if not isinstance(node.func, ast.Name) or node.func.id not in ("getattr", "hasattr"):
            return
        name = node.args[1] if len(node.args) > 1 else None
        literal = name.value if isinstance(name, ast.Constant) else None
        plain = isinstance(literal, str) and not literal.startswith("_")
        if not plain or literal in ATTRIBUTES | TORCH | FOREIGN:
            message = f"`{node.func.id}` needs a literal, ordinary name; write `object.name`."
            yield _Use(f"getattr {ast.dump(node)}", node.lineno, message)

    def _definition(self, node: ast.AST) -> Iterator[_Use]:
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if node.name in HOOKS:
            message = f"`{node.name}` must not be defined: it changes what other code does."
            yield _Use(f"def {node.name}", node.lineno, message)

    def _constant(self, node: ast.AST) -> Iterator[_Use]:
        assert isinstance(node, ast.Constant)
        value = node.value
        if isinstance(value, str | bytes) and len(value) > MAX_TEXT:
            message = f"a literal of {len(value)} characters; at most {MAX_TEXT} are allowed."
            yield _Use(f"literal {value!r}", node.lineno, message)
        elif type(value) is int and value > MAX_INT:
            message = "a whole number beyond 2**64; compute it."
            yield _Use(f"literal {value:x}", node.lineno, message)

    def _display(self, node: ast.AST) -> Iterator[_Use]:
        assert isinstance(node, ast.List | ast.Tuple | ast.Set | ast.Dict)
        numbers = sum(
            isinstance(one, ast.Constant) and isinstance(one.value, int | float | complex)
            for one in ast.walk(node)
        )
        if numbers > MAX_NUMBERS:
            message = f"{numbers} numbers in one literal; at most {MAX_NUMBERS}: compute them."
            yield _Use(f"literal {ast.dump(node)}", node.lineno, message)

    def _dotted(self, node: ast.AST) -> str | None:
        """The dotted name of what an expression is taken from, if that was imported."""
        if isinstance(node, ast.Name):
            return self._imported.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._dotted(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        return None

    def _is_imported(self, node: ast.AST) -> bool:
        """Whether a chain of attributes and items starts from an imported name."""
        while isinstance(node, ast.Attribute | ast.Subscript):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self._imported


DISPLAYS = (ast.List, ast.Tuple, ast.Set, ast.Dict)
_Rule = Callable[[ast.AST], Iterator[_Use]]


def _imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.split(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (first, first)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module or ''}.{alias.name}"


def _ignored(tree: ast.Module) -> set[int]:
    """Docstrings and the like, and displays within a display."""
    ignored: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            ignored.add(id(node.value))
        elif isinstance(node, DISPLAYS) and id(node) not in ignored:
            ignored.update(id(one) for one in ast.walk(node) if isinstance(one, DISPLAYS))
            ignored.discard(id(node))
    return ignored


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")
