"""Attention kernels against matrix products; the probe and its memory."""

import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from society.errors import UnknownName
from society.model import gpt, kernels, ops
from society.model.attention import attend, window_mask
from society.model.kernels import Choice, Shape
from society.model.plain import PLAIN
from society.model.recipe import Recipe
from society.model.threads import single_thread

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning")
"""On a CPU it holds all scores; on accelerators it is compiled."""

LIKE = torch.empty((), dtype=torch.float32)
TINY = Recipe(vocab=300, dim=32, depth=2, seq_len=32, batch_tokens=128)
ON_CPU = ("matmul", "sdpa", "sdpa-flash")
"""Kernels with a backward pass on a CPU, where `sdpa-flash` is another one than on a GPU."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    single_thread()


def inputs(kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    shape = Shape(2, 4, kv_heads, 32, 16, 32)
    return kernels._inputs(shape, LIKE, 2)


def reference(window: int, given: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    return kernels._pass(partial(attend, mask=window_mask(32, window, LIKE)), given)


@pytest.mark.parametrize("kernel", ON_CPU)
@pytest.mark.parametrize("window", [1, 8, 31, 32])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_outputs_and_gradients_equal_the_reference(kernel: str, window: int, kv_heads: int) -> None:
    given = inputs(kv_heads)
    found = kernels._pass(kernels.build(kernel, 32, window, LIKE), given)
    for one, other in zip(found, reference(window, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [1, 8, 32])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_flex_equals_the_reference_forwards(window: int, kv_heads: int) -> None:
    """torch has no backward pass of it on CPUs."""
    with torch.no_grad():
        query, key, value = inputs(kv_heads)  # it refuses inputs that ask for gradients
        given = (query.detach(), key.detach(), value.detach())
        found = kernels.build("flex", 32, window, LIKE)(*given)
        wanted = attend(*given, mask=window_mask(32, window, LIKE))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def fake_flash(*, tuple_back: bool) -> ModuleType:
    """What the packages promise: (B, T, H, D), a window that does not count the query itself."""

    def flash_attn_func(
        q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]
    ) -> Any:
        assert causal
        left, right = window_size
        assert right == (-1 if left == -1 else 0)
        window = q.shape[1] if left == -1 else left + 1
        parts = (part.transpose(1, 2) for part in (q, k, v))
        y = attend(*parts, mask=window_mask(q.shape[1], window, q)).transpose(1, 2)
        return (y, None) if tuple_back else y

    module = ModuleType("flash")
    module.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("window", [1, 8, 32])
@pytest.mark.parametrize("tuple_back", [True, False])
def test_flash_is_called_as_its_packages_are(
    window: int, tuple_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_flash_package", lambda: fake_flash(tuple_back=tuple_back))
    given = inputs(2)
    found = kernels._pass(kernels.build("flash", 32, window, LIKE), given)
    for one, other in zip(found, reference(window, given), strict=True):
        torch.testing.assert_close(one, other)


def test_a_missing_package_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="flash_attn"):
        kernels.build("flash", 32, 8, LIKE)
    with pytest.raises(ImportError, match="flash_attn"):
        kernels.build("flex-flash", 32, 8, LIKE)


@pytest.mark.parametrize("kernel", ["matmul", "sdpa", "sdpa-flash"])
def test_a_compiler_takes_each_in_one_piece(kernel: str) -> None:
    given = inputs()
    built = kernels.build(kernel, 32, 32, LIKE)
    compiled = torch.compile(built, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), built(*given))


def test_names_are_a_closed_set() -> None:
    with pytest.raises(UnknownName, match="sdpa-efficient"):
        kernels.build("sdpa-eficient", 32, 8, LIKE)
    with pytest.raises(UnknownName, match="auto"):
        kernels.candidates("flsh")
    assert set(kernels.candidates("sdpa")) < set(kernels.candidates("auto"))
    assert kernels.candidates("matmul") == ("matmul",)


def test_the_probe_takes_the_fastest_that_is_right() -> None:
    choice = kernels.probe(TINY, "cpu", torch.float32, rows=2, repeats=1)
    assert set(choice.kernels) == set(TINY.windows) == {16, 32}
    for window, kernel in choice.kernels.items():
        times = {t.kernel: t.ms for t in choice.timings if t.window == window and t.ms}
        assert kernel == min(times, key=times.__getitem__)
        assert {"matmul", "sdpa"} <= set(times)
    problems = {t.kernel: t.problem for t in choice.timings if t.ms is None}
    assert "backward on CPU" in problems["flex"]
    assert "ImportError" in problems["flash"]


def test_a_wrong_kernel_is_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kernels.build("matmul", 32, 32, LIKE)
    monkeypatch.setattr(kernels, "_sdpa", lambda *args: whole)  # forgets the window
    shape = Shape(2, 2, 2, 32, 16, 4)
    assert "wrong by" in kernels.measure("sdpa", shape, "cpu", torch.float32, 1).problem
    assert kernels.measure("sdpa", Shape(2, 2, 2, 32, 16, 32), "cpu", torch.float32, 1).ms


def test_no_kernel_at_all_is_said_with_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kernels.FAMILIES, "flash", ("flash", "flex"))  # type: ignore[index]
    with pytest.raises(kernels.UnusableShape, match=r"flash: ImportError.*backward on CPU"):
        kernels.probe(TINY, "cpu", torch.float32, rows=1, option="flash", repeats=1)


def test_a_measurement_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kernels.probe(
        TINY, "cpu", torch.float32, rows=1, option="sdpa", cache=tmp_path, repeats=1
    )
    monkeypatch.setattr(kernels, "measure", None)  # a second one would fail
    again = kernels.probe(
        TINY, "cpu", torch.float32, rows=1, option="sdpa", cache=tmp_path, repeats=1
    )
    assert again == first
    with pytest.raises(TypeError):  # another shape is another measurement
        kernels.probe(TINY, "cpu", torch.float32, rows=2, option="sdpa", cache=tmp_path)
    (file,) = (tmp_path / "attention").iterdir()
    assert json.loads(file.read_text())["kernels"]
    file.write_text("{}")
    with pytest.raises(TypeError):  # and an unreadable one is made again
        kernels.probe(TINY, "cpu", torch.float32, rows=1, option="sdpa", cache=tmp_path)


def test_a_single_kernel_is_taken_unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure", None)
    assert kernels.probe(TINY, "cpu", option="matmul") == Choice({16: "matmul", 32: "matmul"})


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 1, "norm_placement": "post"}])
def test_the_whole_model_is_the_same_under_every_kernel(changes: dict[str, Any]) -> None:
    recipe = TINY.model_copy(update=changes)
    from society.model.init import initial_weights

    weights = gpt.working_copy(initial_weights(recipe, 1), grad=False, dtype=torch.float32)
    ids = torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(1))
    wanted = gpt.activations(recipe, weights, gpt.constants(recipe, LIKE), ids)
    for name in ("matmul", "sdpa", "flex"):
        choice = Choice(dict.fromkeys(recipe.windows, name))
        fixed = kernels.constants(recipe, LIKE, choice)
        assert fixed.ops is PLAIN
        with torch.no_grad():
            found = gpt.activations(recipe, weights, fixed, ids)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_cpu_keeps_its_own_operators() -> None:
    assert kernels.constants(TINY, LIKE).ops is ops.HAND_WRITTEN
