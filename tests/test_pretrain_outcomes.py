"""A training that cannot end well is a recorded outcome whose message names the knobs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from society.experiments.executor import describe_error, outcome_of, recipe_of
from society.experiments.pretrain import Pretrain
from society.experiments.task import Diverged, Refused, TrainReport
from society.model import data, train
from society.model.recipe import Recipe
from society.model.threads import single_thread
from society.records import Budget, BudgetKind, Outcome, Split, Variant, Work

TINY = {"dim": 32, "depth": 2, "seq_len": 32, "batch_tokens": 128}
STEPS = Budget(BudgetKind.STEPS, 20)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    single_thread()


def task() -> Pretrain:
    """The shipped task on random tokens."""
    made = Pretrain("cpu")
    drawn = (np.random.default_rng(1).zipf(1.3, 6000) % 1024).astype(np.uint16)
    made._train[1024] = data.TrainTokens(drawn, 1024, "test")
    return made


def tried(folder: Path, **knobs: Any) -> TrainReport:
    return task().train(Recipe(**TINY | knobs), 1, STEPS, folder, "cpu")


def test_a_run_reports_what_it_took(tmp_path: Path) -> None:
    report = tried(tmp_path, lr_scale=0.1)
    assert report.train_s > 0
    assert (report.mfu, report.device_mem_bytes) == (None, 0)
    assert (tmp_path / "model.safetensors").is_file()


def test_the_data_seed_reaches_the_trainer(tmp_path: Path) -> None:
    recipe = Recipe(**TINY, lr_scale=0.1)
    curves = [
        task().train(recipe, 1, STEPS, tmp_path, "cpu", data_seed=seed).curve
        for seed in (None, 1, 2)
    ]
    assert curves[0] == curves[1] != curves[2]


def test_divergence_names_the_knobs_that_were_raised(tmp_path: Path) -> None:
    with pytest.raises(
        Diverged, match=r"at step \d+: loss .* lr_scale=4 \(1\), head_lr=50"
    ) as told:
        tried(tmp_path, lr_scale=4.0, head_lr=50.0)
    assert told.value.report.steps >= 5
    assert outcome_of(told.value) is Outcome.DIVERGED


def test_a_failed_allocation_names_the_knobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(MemoryError) as told:
        tried(tmp_path, dim=128, depth=8)
    line = describe_error(told.value)
    assert line.startswith("out of memory: By estimate it needs ")
    assert "depth=8 (4), dim=128 (64)" in line
    assert line.endswith("Lower depth or dim.")


def test_other_errors_of_torch_stay_what_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **more: Any) -> None:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(train, "train", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        tried(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"heads": 3}, "heads"),
        ({"dim": 96, "heads": 4, "kv_heads": 3}, "kv_heads"),
        ({"warm_up": 0.5, "warm_down": 0.9}, "warm_up=0.5 and warm_down=0.9"),
    ],
)
def test_an_impossible_shape_is_refused_by_its_knob(overrides: dict[str, Any], words: str) -> None:
    made = task()
    work = Work("r1", Variant(made.key, overrides), 1, Split.VALIDATION, STEPS)
    with pytest.raises(Refused, match=words) as told:
        recipe_of(made, work)
    assert outcome_of(told.value) is Outcome.REJECTED


def test_tokens_that_hold_no_row_are_refused_by_the_knob(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="seq_len=8192"):
        tried(tmp_path, seq_len=8192, batch_tokens=8192)


LIMITED = """
import resource, sys
from pathlib import Path
import psutil
sys.path.insert(0, {folder!r})
from test_pretrain_outcomes import single_thread, task, tried
from society.experiments.executor import describe_error
single_thread()
task().warm_up()
most = psutil.Process().memory_info().vms + (256 << 20)
resource.setrlimit(resource.RLIMIT_AS, (most, most))
try:
    tried(Path({scratch!r}), dim=512, batch_tokens=65536, seq_len=2048)
except MemoryError as error:
    print(describe_error(error))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_the_memory_limit_of_a_cpu_run_is_explained(tmp_path: Path) -> None:
    code = LIMITED.format(folder=str(Path(__file__).parent), scratch=str(tmp_path))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("out of memory: By estimate it needs ")
    assert "seq_len=2048 (128)" in found.stdout
