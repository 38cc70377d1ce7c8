"""Tasks and profiles: loading, errors, and the synthetic task's promises."""

import statistics
import sys
from importlib import resources
from pathlib import Path

import pytest

from society.errors import UnknownName, UsageError
from society.experiments import (
    Direction,
    Diverged,
    Refused,
    Role,
    Space,
    cache_dir,
    known_profiles,
    known_tasks,
    load_task,
)
from society.experiments.synthetic import FLOOR, OPTIMUM, Synthetic, SyntheticRecipe
from society.experiments.task import load_profile, read_profile
from society.records import Budget, BudgetKind, Split

SHIPPED = sorted(
    entry.name.removesuffix(".yaml")
    for entry in resources.files("society.configs").iterdir()
    if entry.name.endswith(".yaml") and entry.name.partition("-")[0] in known_tasks()
)
GOOD = """
task: synthetic
name: mine
budget: {kind: steps, amount: 50}
limits: {timeout_s: 5, mem_bytes: 100_000_000}
recipe: {depth: 3}
options: {sleep_s: 0.5}
"""


@pytest.mark.parametrize("stem", SHIPPED)
def test_every_shipped_profile_loads(stem):
    name, _, profile = stem.partition("-")
    task = load_task(name, profile)
    assert (task.name, task.profile, task.key) == (name, profile, f"{name}/{profile}")
    assert isinstance(task.baseline, task.recipe)
    assert len(Space.of(task).knobs) >= 8
    assert task.budget.amount > 0
    assert task.limits.timeout_s > 0
    assert load_profile(name, profile).about


def test_the_installed_tasks_are_known():
    assert {"pretrain", "synthetic"} <= set(known_tasks())
    assert "cpu" in known_profiles("pretrain")
    assert load_task("pretrain", "cpu").budget == Budget(BudgetKind.FLOPS, 2.35e11)


def test_a_task_by_module_and_class():
    task = load_task("society.experiments.synthetic:Synthetic", "quick")
    assert isinstance(task, Synthetic)


@pytest.mark.parametrize("name", ["synthetics", "no.such.module:Task", "society.records:Task"])
def test_an_unknown_task_lists_the_known_ones(name):
    with pytest.raises(UnknownName, match=r"Known: .*pretrain.*synthetic"):
        load_task(name, "quick")


def test_a_package_missing_inside_a_task_is_not_an_unknown_task(tmp_path, monkeypatch):
    (tmp_path / "needy_task.py").write_text("import a_package_that_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_nobody_has"):
        load_task("needy_task:Task", "quick")
    assert "needy_task" not in sys.modules


def test_an_unknown_profile_lists_the_known_ones():
    with pytest.raises(UnknownName, match=r"'quik'.*Did you mean 'quick'\?"):
        load_task("synthetic", "quik")


def test_a_profile_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    task = load_task("synthetic", str(path))
    assert task.key == "synthetic/mine"
    assert task.baseline == SyntheticRecipe(depth=3)
    assert task.options.sleep_s == 0.5
    with pytest.raises(UsageError, match=r"mine.yaml: a profile of task 'synthetic'"):
        load_task("pretrain", str(path))
    with pytest.raises(UsageError, match=r"other.yaml: No such file"):
        load_task("synthetic", str(tmp_path / "other.yaml"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: mine", "name: mine\nnmae: x", "nmae"),
        ("amount: 50", "amount: 50, amuont: 2", "budget.amuont"),
        ("timeout_s: 5, ", "", "limits.timeout_s"),
        ("kind: steps", "kind: parsecs", "budget.kind"),
        ("depth: 3", "depht: 3", "depht"),
        ("sleep_s: 0.5", "slepe_s: 0.5", "slepe_s"),
        ("task: synthetic", "task: [synthetic", "not YAML"),
    ],
)
def test_a_wrong_profile_names_the_file_and_the_key(tmp_path, old, new, words):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(UsageError) as caught:
        load_task("synthetic", str(path))
    assert "mine.yaml: " in str(caught.value)
    assert words in str(caught.value)


def test_a_profile_must_be_a_mapping():
    with pytest.raises(UsageError, match="expected keys and values, found list"):
        read_profile("[1, 2]", "odd.yaml")


def test_the_cache_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("SOCIETY_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("SOCIETY_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "society"


def test_improvement_is_positive_when_better():
    assert Direction.MINIMISE.improvement(1.8, 1.7) == pytest.approx(0.1)
    assert Direction.MAXIMISE.improvement(1.8, 1.7) == pytest.approx(-0.1)


@pytest.fixture(scope="module")
def task():
    return load_task("synthetic", "quick")


def score(task, scratch, seed, split=Split.VALIDATION, **changes):
    recipe = SyntheticRecipe(**changes)
    task.train(recipe, seed, task.budget, scratch, "cpu")
    return task.score(scratch, recipe, split, "cpu")


def test_the_synthetic_optimum_is_where_it_is_said_to_be(task):
    gain = task.expected(task.baseline) - task.expected(SyntheticRecipe(**OPTIMUM))
    assert task.expected(SyntheticRecipe(**OPTIMUM)) == pytest.approx(FLOOR)
    assert task.expected(task.baseline) == pytest.approx(1.8, abs=0.02)
    assert gain == pytest.approx(0.2, abs=0.02)
    for name, value in OPTIMUM.items():
        assert task.expected(SyntheticRecipe(**{name: value})) < task.expected(task.baseline)


@pytest.mark.parametrize("change", [{"depth": 8}, {"lr": 0.01}, {"warm_up": 0.2}, {"tied": True}])
def test_synthetic_harm(task, change):
    assert task.expected(SyntheticRecipe(**change)) > task.expected(task.baseline) + 0.01


def test_a_larger_synthetic_budget_helps(task):
    double = Budget(task.budget.kind, 2 * task.budget.amount)
    assert task.expected(task.baseline, double) < task.expected(task.baseline)


def test_synthetic_noise_is_shared_within_a_seed(task, tmp_path):
    seeds = range(200)
    base = [score(task, tmp_path, seed) for seed in seeds]
    holdout = [score(task, tmp_path, seed, Split.HOLDOUT) for seed in seeds]
    changed = [score(task, tmp_path, seed, lr=0.05) for seed in seeds]
    paired = [a - b for a, b in zip(base, changed, strict=True)]
    assert 0.011 < statistics.stdev(base) < 0.016
    assert statistics.stdev(paired) < 0.3 * statistics.stdev(base)
    assert statistics.correlation(base, holdout) > 0.97
    assert 0.03 < statistics.mean(holdout) - statistics.mean(base) < 0.05


def test_synthetic_runs_repeat_bit_for_bit(task, tmp_path):
    other = load_task("synthetic", "quick")
    assert score(task, tmp_path, 5, lr=0.05) == score(other, tmp_path, 5, lr=0.05)


def test_synthetic_divergence(task, tmp_path):
    wild = SyntheticRecipe(lr=0.9, momentum=0.97)
    with pytest.raises(Diverged, match="loss is nan at step"):
        task.train(wild, 1, task.budget, tmp_path, "cpu")
    calmed = SyntheticRecipe(lr=0.9, momentum=0.97, warm_up=0.4)
    assert task.train(calmed, 1, task.budget, tmp_path, "cpu").steps == 100


@pytest.fixture(scope="module")
def pretrain():
    task = load_task("pretrain", "cpu")
    task.warm_up()
    task.prepare()
    return task


def test_pretrain_loads_the_data_of_its_role_only(pretrain):
    for role, held in ((Role.TRAINER, "_train"), (Role.SCORER, "_eval")):
        task = load_task("pretrain", "cpu")
        task.preload(role)
        assert [name for name in ("_train", "_eval") if getattr(task, name)] == [held]


def test_pretrain_divergence_says_what_was_spent(pretrain, tmp_path):
    pretrain.preload(Role.TRAINER)
    wild = pretrain.baseline.model_copy(update={"lr_scale": 1e4, "depth": 1})
    with pytest.raises(Diverged, match="diverged at step") as caught:
        pretrain.train(wild, 1, Budget(BudgetKind.STEPS, 12), tmp_path, "cpu")
    report = caught.value.report
    assert 0 < report.steps <= 12
    assert report.tokens == report.steps * wild.batch_tokens
    assert report.flops > 0
    assert list(tmp_path.iterdir()) == []


def test_pretrain_refuses_a_forged_model(pretrain, tmp_path):
    pretrain.preload(Role.SCORER)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(Refused, match="not a saved model"):
        pretrain.score(tmp_path, pretrain.baseline, Split.VALIDATION, "cpu")


def test_pretrain_prepares_every_vocabulary_of_its_space():
    task = load_task("pretrain", "cpu")
    assert set(Space.of(task).knobs["vocab"].choices) <= set(task.vocabs)
