"""Published findings: the shipped file is valid, and every verdict is reached by its own rule."""

import math
import random
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from society.errors import InvalidVariant, UnknownName, UsageError
from society.experiments import findings
from society.experiments.findings import (
    Change,
    Finding,
    Findings,
    Kind,
    Predicted,
    load,
)
from society.experiments.pretrain import Pretrain
from society.experiments.space import Space
from society.experiments.synthetic import Synthetic
from society.experiments.verdicts import (
    Judgement,
    Rules,
    Trail,
    Verdict,
    advantage,
    certified,
    judge,
    judge_noise,
    judge_pairs,
    judge_screening,
    judge_trail,
    screening_rules,
)
from society.records import Effect

RULES = Rules()
SD = 0.01


def pools(delta, n, *, own=0.001, baseline=30, seed=0):
    """Baseline and changed scores (lower is better) on common seeds, `delta` better."""
    rng = random.Random(seed)
    base = {s: 1.8 + rng.gauss(0, SD) for s in range(baseline)}
    return base, {s: base[s] - delta + rng.gauss(0, own) for s in range(n)}


def verdict(delta, n, *, predicted=Predicted.BETTER, size=None, **more):
    return judge(
        *pools(delta, n, **more), predicted=predicted, size=size, direction=-1, rules=RULES
    )


# ------------------------------------------------------------------------------ the data


def test_the_shipped_findings_are_ten_with_sources():
    found = load()
    assert len(found.findings) == 10
    assert {finding.kind for finding in found.findings} == set(Kind)
    for finding in found.findings:
        assert finding.statement.endswith(".")
        assert finding.sources
        for source in finding.sources:
            assert source.url.startswith("https://")
            assert source.says


def test_every_shipped_intervention_is_one_the_cpu_profile_allows():
    found, task = load(), Pretrain("cpu")
    space = Space.of(task)
    findings.check(found.findings, space, task.key)
    for finding in found.findings:
        variants = [findings.variant_of(change, space, task.key) for change in finding.changes]
        assert len({variant.fingerprint for variant in variants}) == len(variants)
        assert not any(variant.is_baseline for variant in variants)


def test_only_the_asked_ones_in_the_order_of_the_file():
    found = load()
    ids = [finding.id for finding in found.only(["residual-scalars", "steps-over-batch"])]
    assert ids == ["steps-over-batch", "residual-scalars"]
    assert found.only(()) == found.findings
    with pytest.raises(UnknownName, match="Did you mean 'seed-variance'"):
        found.only(["seed-variences"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "folklore"}, "kind"),
        ({"primary": None}, "needs `primary`"),
        ({"primery": {}}, "primery"),
        ({"primary": {"overrides": {"lr": 0.1}}}, "predicted"),
        ({"primary": {"predicted": "better"}}, "needs `overrides` or `factors`"),
        (
            {"primary": {"predicted": "better", "overrides": {"a": 1}, "factors": {"a": 2}}},
            "'a' is in `overrides` and in `factors`",
        ),
        ({"primary": {"predicted": "better", "overrides": {"a": 1}, "size": -1}}, "size"),
        ({"id": "Not An Id"}, "id"),
        ({"kind": "noise"}, "needs `size`"),
        ({"kind": "data_pipeline"}, "needs `arms`"),
        ({"kind": "negative_results"}, "needs `planted`"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path, change, message):
    one = {
        "id": "one",
        "statement": "It helps.",
        "kind": "model",
        "primary": {"overrides": {"lr": 0.1}, "predicted": "better"},
    }
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({"task": "synthetic", "findings": [one | change]}))
    with pytest.raises(UsageError, match=message) as caught:
        load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2", "- a", "task: x\nfindings: []\n", "about: nothing\n"])
def test_a_file_that_is_no_list_of_findings(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=str(file)):
        load(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load(tmp_path / "none.yaml")


def test_two_findings_may_not_share_an_id():
    one = {"id": "one", "statement": "s", "kind": "memory"}
    with pytest.raises(ValueError, match="two findings are called 'one'"):
        Findings.model_validate({"task": "synthetic", "findings": [one, one]})


def test_factors_follow_the_baseline():
    task = Synthetic("quick")
    space = Space.of(task)
    variant = findings.variant_of(Change(factors={"batch": 0.5, "lr": 2}), space, task.key)
    assert dict(variant.overrides) == {"batch": 512, "lr": 0.08}
    with pytest.raises(InvalidVariant, match="a factor needs a number"):
        findings.variant_of(Change(factors={"window": 2}), space, task.key)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [({"rate": 1}, "no such knob"), ({"lr": 7}, "not allowed"), ({"lr": 0.04}, "is the baseline")],
)
def test_a_change_the_space_refuses_names_the_finding(overrides, message):
    task = Synthetic("quick")
    one = Finding(
        id="mine",
        statement="s",
        kind=Kind.MODEL,
        primary={"overrides": overrides, "predicted": "better"},
    )
    with pytest.raises(UsageError, match=f"'mine'.*{message}"):
        findings.check([one], Space.of(task), task.key)


# ------------------------------------------------------------------------------ a change


def test_replicated_in_either_direction():
    better = verdict(0.03, 6)
    assert (better.verdict, better.decided) == (Verdict.REPLICATED, True)
    assert better.effect.low > 0
    worse = verdict(-0.03, 6, predicted=Predicted.WORSE)
    assert (worse.verdict, worse.decided) == (Verdict.REPLICATED, True)
    assert worse.effect.high < 0


def test_reversed_in_either_direction():
    assert verdict(-0.03, 6).verdict is Verdict.REVERSED
    assert verdict(0.03, 6, predicted=Predicted.WORSE).verdict is Verdict.REVERSED


def test_nothing_is_decided_below_four_seeds():
    for delta in (0.05, -0.05, 0.0):
        early = verdict(delta, 3)
        assert (early.verdict, early.decided) == (Verdict.UNDECIDED, False)


def test_not_at_this_scale_because_the_published_size_is_excluded():
    small = verdict(0.0005, 12, size=0.02, own=0.002)
    assert (small.verdict, small.decided) == (Verdict.ABSENT, True)
    assert small.effect.high < 0.02
    assert "0.02" in small.reason


def test_not_at_this_scale_within_half_a_noise_floor_of_zero():
    nothing = verdict(0.0, 12)
    assert (nothing.verdict, nothing.decided) == (Verdict.ABSENT, True)
    assert -SD / 2 < nothing.effect.low < nothing.effect.high < SD / 2


def test_a_small_effect_as_predicted_is_replicated_whatever_its_size():
    assert verdict(0.004, 10, size=0.02).verdict is Verdict.REPLICATED


def test_undecided_after_the_largest_number_of_seeds():
    wide = verdict(0.004, RULES.n_max, own=0.02, seed=3)
    assert (wide.verdict, wide.decided) == (Verdict.UNDECIDED, True)
    assert "24 seeds" in wide.reason


def test_failed_runs_count_against_a_change():
    base, changed = pools(0.03, 8)
    broken = {seed: None for seed in changed}
    result = judge(base, broken, predicted=Predicted.BETTER, size=None, direction=-1, rules=RULES)
    assert result.verdict is Verdict.REVERSED
    assert result.effect.high < 0
    half = {seed: None if seed % 2 else score for seed, score in changed.items()}
    mixed = judge(base, half, predicted=Predicted.BETTER, size=None, direction=-1, rules=RULES)
    assert mixed.verdict is Verdict.UNDECIDED
    fails = judge(base, broken, predicted=Predicted.WORSE, size=None, direction=-1, rules=RULES)
    assert fails.verdict is Verdict.REPLICATED


def test_large_harms_are_not_clipped():
    harm = verdict(-0.2, 6, predicted=Predicted.WORSE)
    assert harm.effect.mean == pytest.approx(-0.2, abs=0.01)
    assert harm.effect.low <= harm.effect.mean <= harm.effect.high < 0


def test_no_verdict_without_a_baseline():
    early = judge(
        {1: 1.8}, {1: 1.7}, predicted=Predicted.BETTER, size=None, direction=-1, rules=RULES
    )
    assert (early.verdict, early.decided, early.effect) == (Verdict.UNDECIDED, False, None)


@given(
    delta=st.floats(-0.05, 0.05),
    n=st.integers(1, 24),
    seed=st.integers(0, 50),
    size=st.sampled_from([None, 0.01]),
)
def test_the_two_directions_mirror_each_other(delta, n, seed, size):
    base, changed = pools(delta, n, own=0.003, seed=seed)
    ask = {"size": size, "rules": RULES}
    better = judge(base, changed, predicted=Predicted.BETTER, direction=-1, **ask)
    worse = judge(base, changed, predicted=Predicted.WORSE, direction=-1, **ask)
    assert better.log_e == worse.log_e_opposite
    mirror = {Verdict.REPLICATED: Verdict.REVERSED, Verdict.REVERSED: Verdict.REPLICATED}
    if better.verdict in mirror:
        assert worse.verdict is mirror[better.verdict]
    assert better.effect.low <= better.effect.mean <= better.effect.high
    up = {seed: -score for seed, score in base.items()}
    also = {seed: -score for seed, score in changed.items()}
    again = judge(up, also, predicted=Predicted.BETTER, direction=+1, **ask)
    assert again.verdict is better.verdict
    assert again.effect.mean == pytest.approx(better.effect.mean, abs=1e-12)


def test_false_replications_and_reversals_are_rare():
    """1/20 each is allowed at any time; looked at after every seed."""
    rng, wrong = random.Random(5), 0
    for _ in range(80):
        base = {s: rng.gauss(1.8, SD) for s in range(24)}
        changed = {}
        for seed in range(12):
            changed[seed] = 0.5 * (base[seed] - 1.8) + 1.8 + rng.gauss(0, 0.8 * SD)
            now = judge(
                base, changed, predicted=Predicted.BETTER, size=None, direction=-1, rules=RULES
            )
            if now.verdict in (Verdict.REPLICATED, Verdict.REVERSED):
                wrong += 1
                break
    assert wrong / 80 < 0.1


# ------------------------------------------------------------------------------ other kinds


def scores(sd, n=100, seed=1):
    rng = random.Random(seed)
    return [rng.gauss(1.8, sd) for _ in range(n)]


@pytest.mark.parametrize(
    ("sd", "expected"),
    [
        (0.002, Verdict.REPLICATED),
        (0.012, Verdict.ABSENT),
        (0.0003, Verdict.REVERSED),
        (0.004, Verdict.UNDECIDED),
    ],
)
def test_every_verdict_on_the_noise(sd, expected):
    found = judge_noise(scores(sd), 0.002, RULES)
    assert (found.verdict, found.decided, found.seeds) == (expected, True, 100)
    assert found.effect.low < found.effect.mean < found.effect.high


def test_the_noise_is_undecided_on_fewer_seeds_than_planned():
    early = judge_noise(scores(0.002, 40), 0.002, RULES)
    assert (early.verdict, early.decided) == (Verdict.UNDECIDED, False)
    assert judge_noise([1.8, None], 0.002, RULES).effect is None


def arm(log_e, opposite, verdict=Verdict.UNDECIDED, decided=True):
    high = 0.02 if verdict is Verdict.UNDECIDED else 0.001
    return Judgement(verdict, decided, 8, Effect(0, 0, -0.02, high, 8), log_e, opposite, "")


BETTER, WORSE = arm(9.0, -2.0, Verdict.REPLICATED), arm(-2.0, 9.0, Verdict.REVERSED)
NULL, OPEN = arm(-1.0, -1.0, Verdict.ABSENT), arm(0.5, 0.1)


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        ([BETTER, WORSE, OPEN], Verdict.REPLICATED),
        ([WORSE, WORSE], Verdict.REVERSED),
        ([WORSE, NULL], Verdict.ABSENT),
        ([NULL, NULL], Verdict.ABSENT),
        ([NULL, OPEN], Verdict.UNDECIDED),
        ([NULL, replace(NULL, decided=False)], Verdict.UNDECIDED),
    ],
)
def test_every_verdict_on_a_screening(arms, expected):
    assert judge_screening(arms, SD, RULES).verdict is expected


def test_a_screening_is_certified_over_both_directions():
    assert certified([BETTER, WORSE, NULL], RULES) == (Predicted.BETTER, Predicted.WORSE, None)
    alone = screening_rules(12, RULES)
    assert alone.e_needed == pytest.approx(240)
    short = arm(math.log(239), -2.0)
    assert certified([short, *[NULL] * 11], RULES)[0] is None
    enough = arm(math.log(241), -2.0)
    assert certified([enough, *[NULL] * 11], RULES)[0] is Predicted.BETTER
    assert certified([], RULES) == ()


TRAIL = Trail(leases=40, traced=40, planted=4, failed=4, told=4, recalled=True, tried=9, negative=5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, Verdict.REPLICATED),
        ({"traced": 39}, Verdict.REVERSED),
        ({"recalled": False}, Verdict.ABSENT),
        ({"recalled": None}, Verdict.UNDECIDED),
        ({"told": 3}, Verdict.REVERSED),
        ({"failed": 0, "told": 0}, Verdict.UNDECIDED),
        ({"planted": 2, "failed": 2, "told": 2}, Verdict.UNDECIDED),
    ],
)
def test_every_verdict_on_the_record(change, expected):
    found = judge_trail(replace(TRAIL, **change), RULES)
    assert found.verdict is expected
    assert "5 of 9 variants on record are negative results" in found.reason


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([0.10, 0.11, 0.09, 0.105], Verdict.REPLICATED),
        ([-0.10, -0.11, -0.09, -0.105], Verdict.REVERSED),
        ([0.0001, -0.0001, 0.0001, -0.0001], Verdict.ABSENT),
        ([0.10, -0.02, 0.03, -0.05], Verdict.UNDECIDED),
        ([0.10], Verdict.UNDECIDED),
        ([], Verdict.UNDECIDED),
    ],
)
def test_every_verdict_on_societies(differences, expected):
    found = judge_pairs(differences, SD, RULES)
    assert (found.verdict, found.seeds) == (expected, len(differences))
    assert found.decided is (len(differences) >= RULES.societies)


def test_the_advantage_of_one_recipe_over_another():
    base = {1: 1.80, 2: 1.82, 3: 1.81}
    one, other = {1: 1.6, 2: 1.7}, {1: 1.7, 2: 1.8, 3: 1.0}
    assert advantage(base, one, other, -1) == pytest.approx(0.1)
    assert advantage(base, other, one, +1) == pytest.approx(0.1)
    assert advantage(base, one, {}, -1) is None
    assert advantage({}, one, other, -1) is None
    assert advantage(base, one, {1: None, 2: None}, -1) > 0
