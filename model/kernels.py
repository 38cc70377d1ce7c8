"""Attention on accelerators: which implementations there are, and which one is the fastest here.

    matmul           two matrix products and a softmax (`attention.attend`); works everywhere
    sdpa             torch's fused attention, torch's own choice of backend
    sdpa-flash       its flash backend (no mask, so for layers without a window only)
    sdpa-cudnn       its cuDNN backend
    sdpa-efficient   its memory-efficient backend
    flex             FlexAttention: the window as a block mask, blocks outside are skipped
    flex-flash       the same on the kernels of the package `flash_attn.cute`
    flash            the package `flash_attn_interface` (version 3) or `flash_attn` (version 2)

The fastest depends on card, library versions and shape, so it is measured: `probe` times a forward
and backward pass of each that works and gives the right numbers, per window, and remembers the
result on disk. A recipe's short and long layers may get different ones.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from society.errors import SocietyError, UnknownName
from society.model import gpt, ops
from society.model.attention import Attend, attend, window_mask
from society.model.files import write_atomically
from society.model.plain import PLAIN
from society.model.recipe import Recipe

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "flex": ("flex", "flex-flash"),
    "sdpa": ("sdpa", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient"),
    "flash": ("flash",),
    "matmul": ("matmul",),
}
"""What the option `attention` may name, beside `auto` (all of them), and what it stands for."""

REPEATS = 10
"""Timed passes of each candidate; the median counts."""
TOLERANCE = 0.03
"""Largest error of a usable candidate, relative to the largest value: bf16 has 8 bits."""
CHECKED_ROWS = 2


class UnusableShape(SocietyError):
    """No attention kernel works at a shape."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer's attention: query (rows, heads, T, head_dim), the others (rows, kv_heads, …)."""

    rows: int
    heads: int
    kv_heads: int
    seq_len: int
    head_dim: int
    window: int
    """Positions a query sees, itself included; `seq_len` for all before it."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How one candidate did at one shape."""

    kernel: str
    window: int
    ms: float | None
    """Milliseconds of a forward and backward pass; None if it cannot be used."""
    problem: str = ""
    """Why it cannot be used."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel of every window, and what the decision rests on."""

    kernels: Mapping[int, str]
    """Window -> name."""
    timings: tuple[Timing, ...] = ()


def constants(recipe: Recipe, like: Tensor, choice: Choice | None = None) -> gpt.Constants:
    """What a recipe fixes on the device of `like`: on accelerators, operators for a compiler.

    Without a choice an accelerator uses torch's fused attention: right for scoring, where nothing
    is measured. On a CPU the hand-written operators are used unless a choice is given.
    """
    if choice is None:
        if like.device.type == "cpu":
            return gpt.constants(recipe, like)
        choice = Choice(dict.fromkeys(recipe.windows, "sdpa"))
    angles = ops.rotation(recipe.seq_len, recipe.head_dim, recipe.rope_base, like)
    built = {
        window: build(choice.kernels[window], recipe.seq_len, window, like)
        for window in set(recipe.windows)
    }
    return gpt.Constants(angles, tuple(built[window] for window in recipe.windows), PLAIN)


def operators(device: torch.device) -> ops.Ops:
    """The operators that `constants` chooses without a choice of kernels."""
    return ops.HAND_WRITTEN if device.type == "cpu" else PLAIN


def build(kernel: str, seq_len: int, window: int, like: Tensor) -> Attend:
    """One layer's attention by the kernel's name, in the type and on the device of `like`.

    Raises:
        UnknownName: There is no such kernel.
        ImportError: The package it needs is not installed.
    """
    family, _, backend = kernel.partition("-")
    if kernel not in FAMILIES.get(family, ()):
        raise UnknownName("attention kernel", kernel, _all())
    if family == "sdpa":
        return _sdpa(seq_len, window, like, backend)
    if family == "flex":
        return _flex(seq_len, window, like, backend)
    if family == "flash":
        return _flash(seq_len, window)
    return partial(attend, mask=window_mask(seq_len, window, like))


def candidates(option: str) -> tuple[str, ...]:
    """The kernels that an option stands for.

    Raises:
        UnknownName: It is neither `auto` nor a family.
    """
    if option == "auto":
        return _all()
    if option not in FAMILIES:
        raise UnknownName("attention", option, ["auto", *FAMILIES])
    return FAMILIES[option]


def _all() -> tuple[str, ...]:
    return tuple(kernel for family in FAMILIES.values() for kernel in family)


# ------------------------------------------------------------------------ implementations


def _sdpa(seq_len: int, window: int, like: Tensor, backend: str) -> Attend:
    """Torch's fused attention; a window needs a mask, the whole row does not."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mask = None if window >= seq_len else window_mask(seq_len, window, like) == 0

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = key.shape[1] != query.shape[1]
        if grouped and backend == "efficient":  # it knows no groups
            group = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(group, dim=1) for part in (key, value))
            grouped = False
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, enable_gqa=grouped
        )

    if not backend:
        return call
    chosen = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }[backend]

    def by_backend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return call(query, key, value)

    return by_backend


def _flex(seq_len: int, window: int, like: Tensor, backend: str) -> Attend:
    """FlexAttention (Dong et al. 2024, arXiv:2412.05496) with the window as a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    if backend and importlib.util.find_spec("flash_attn") is None:
        raise ImportError("the package flash_attn (with flash_attn.cute) is not installed")

    def visible(row: Tensor, head: Tensor, position: Tensor, other: Tensor) -> Tensor:
        back = position - other
        return (back >= 0) & (back < window)

    mask = create_block_mask(visible, None, None, seq_len, seq_len, device=like.device)
    options = {"BACKEND": "FLASH"} if backend else None
    flex = _fused_flex() if like.device.type != "cpu" else _plain_flex()

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = key.shape[1] != query.shape[1]
        result: Tensor = flex(
            query, key, value, block_mask=mask, enable_gqa=grouped, kernel_options=options
        )
        return result

    return call


def _plain_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention


@functools.cache
def _fused_flex() -> Callable[..., Tensor]:
    """Compiled: without it torch holds all T x T scores. Inside compiled code it is inlined."""
    return torch.compile(_plain_flex(), dynamic=False)


def _flash(seq_len: int, window: int) -> Attend:
    """The flash-attn packages take (B, T, H, D) and a window that does not count the query."""
    package = _flash_package()
    reach = (-1, -1) if window >= seq_len else (window - 1, 0)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = (part.transpose(1, 2) for part in (query, key, value))
        found = package.flash_attn_func(*rows, causal=True, window_size=reach)
        result: Tensor = found[0] if isinstance(found, tuple) else found  # version 3 adds the lse
        return result.transpose(1, 2)

    return call


def _flash_package() -> ModuleType:
    for name in ("flash_attn_interface", "flash_attn"):
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise ImportError("neither flash_attn_interface nor flash_attn is installed")


# ------------------------------------------------------------------------------- the probe


def probe(
    recipe: Recipe,
    device: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    rows: int | None = None,
    option: str = "auto",
    cache: Path | None = None,
    repeats: int = REPEATS,
) -> Choice:
    """Measure the candidates at the recipe's shape and take the fastest per window.

    Args:
        recipe: Gives heads, row length and windows.
        device: Where to measure.
        dtype: Type of query, key and value.
        rows: Rows computed at once; by default the whole batch.
        option: `auto` or a family; a family of one kernel is not measured.
        cache: Folder to remember the result in.
        repeats: Timed passes per candidate.

    Raises:
        UnknownName: There is no such option.
        UnusableShape: No candidate works at this shape.
    """
    names = candidates(option)
    if len(names) == 1:
        return Choice(dict.fromkeys(recipe.windows, names[0]))
    shapes = [_shape(recipe, window, rows) for window in sorted(set(recipe.windows))]
    file = None if cache is None else cache / "attention" / f"{_key(shapes, device, dtype, option)}"
    if file is not None and (known := _read(file)) is not None:
        return known
    timings = tuple(
        measure(name, shape, device, dtype, repeats) for shape in shapes for name in names
    )
    choice = Choice({shape.window: _fastest(timings, shape) for shape in shapes}, timings)
    if file is not None:
        write_atomically(file, json.dumps(asdict(choice), indent=1).encode())
    return choice


def measure(
    kernel: str, shape: Shape, device: str, dtype: torch.dtype, repeats: int = REPEATS
) -> Timing:
    """Time one candidate; whatever it raises is its problem, not the caller's."""
    like = torch.empty((), dtype=dtype, device=device)
    try:
        attention = build(kernel, shape.seq_len, shape.window, like)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backend says why it does not apply
            error = _error(attention, shape, like)
            if not error <= TOLERANCE:
                return Timing(kernel, shape.window, None, f"wrong by {error:.3g}")
            seconds = _time(attention, shape, like, repeats)
    except Exception as problem:  # noqa: BLE001 - third-party kernels raise anything
        first = (str(problem).strip().splitlines() or [""])[0]
        return Timing(kernel, shape.window, None, f"{type(problem).__name__}: {first}"[:200])
    return Timing(kernel, shape.window, statistics.median(seconds) * 1e3)


def _shape(recipe: Recipe, window: int, rows: int | None) -> Shape:
    return Shape(
        rows or recipe.rows,
        recipe.heads,
        recipe.kv_count,
        recipe.seq_len,
        recipe.head_dim,
        window,
    )


def _inputs(shape: Shape, like: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value that ask for gradients."""
    generator = torch.Generator().manual_seed(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    query, key, value = (
        torch.randn(rows, count, shape.seq_len, shape.head_dim, generator=generator)
        .to(like)
        .requires_grad_()
        for count in heads
    )
    return query, key, value


def _pass(attention: Attend, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Output and gradients."""
    y = attention(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, y.detach())]


def _error(attention: Attend, shape: Shape, like: Tensor) -> float:
    """Largest deviation from the reference, relative to the largest value."""
    inputs = _inputs(shape, like, min(CHECKED_ROWS, shape.rows))
    exact = torch.empty((), dtype=torch.float32, device=like.device)
    wide = tuple(x.detach().float().requires_grad_() for x in inputs)
    reference = partial(attend, mask=window_mask(shape.seq_len, shape.window, exact))
    wanted = _pass(reference, (wide[0], wide[1], wide[2]))
    found = _pass(attention, inputs)
    return max(
        ((a.float() - b).abs().max() / b.abs().max()).item()
        for a, b in zip(found, wanted, strict=True)
    )


def _time(attention: Attend, shape: Shape, like: Tensor, repeats: int) -> list[float]:
    """Seconds of each timed pass, after two that are not."""
    inputs = _inputs(shape, like, shape.rows)
    seconds = []
    for turn in range(repeats + 2):
        started = _now(like)
        _pass(attention, inputs)
        if turn >= 2:
            seconds.append(_now(like) - started)
    return seconds


def _now(like: Tensor) -> float:
    if like.device.type != "cpu":
        torch.cuda.synchronize(like.device)
    return time.perf_counter()


def _fastest(timings: tuple[Timing, ...], shape: Shape) -> str:
    usable = [(t.ms, t.kernel) for t in timings if t.window == shape.window and t.ms is not None]
    if not usable:
        problems = "; ".join(f"{t.kernel}: {t.problem}" for t in timings)
        raise UnusableShape(
            f"No attention kernel works for {shape}: {problems}. Choose another one by the "
            "profile's option `attention`, or another heads, head_size or seq_len."
        )
    return min(usable)[1]


def _key(shapes: list[Shape], device: str, dtype: torch.dtype, option: str) -> str:
    """File name of a measurement: everything that may change its result."""
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    packages = [
        package
        for package in ("flash_attn", "flash_attn_interface")
        if importlib.util.find_spec(package) is not None
    ]
    told = [name, torch.__version__, str(dtype), option, packages, [asdict(s) for s in shapes]]
    return f"{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}.json"


def _read(file: Path) -> Choice | None:
    """An earlier result; None if there is none that can be read."""
    try:
        values = json.loads(file.read_bytes())
        kernels = {int(window): str(kernel) for window, kernel in values["kernels"].items()}
        return Choice(kernels, tuple(Timing(**timing) for timing in values["timings"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
