"""The search brain: valid, new, repeatable, aware of what is pending, and better than chance."""

import asyncio
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from society.agents.brains import load_brain
from society.agents.search import SearchBrain
from society.errors import UnknownName
from society.experiments import Space, load_task
from society.experiments.task import Direction
from society.records import Split, Variant
from society.roles import Knowledge, Result


def knowledge(results=(), pending=(), entropy=0, task=None):
    task = task or load_task("synthetic", "quick")
    return Knowledge(
        space=Space.of(task),
        direction=Direction.MINIMISE,
        task=task.key,
        champion=Variant(task.key),
        champion_score=1.8,
        results=tuple(results),
        pending=tuple(pending),
        noise_sd=0.013,
        entropy=entropy,
    )


def propose(known):
    return asyncio.run(SearchBrain().propose(known))


def screened(task, variant, scratch):
    recipe = Space.of(task).recipe(variant)
    scratch.mkdir()
    try:
        task.train(recipe, 1, task.budget, scratch, "cpu")
        return Result(variant, task.score(scratch, recipe, Split.VALIDATION, "cpu"))
    except Exception:  # noqa: BLE001 - any failed run is a result without a score
        return Result(variant, None)


@settings(derandomize=True, max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
@pytest.mark.slow
def test_proposals_are_valid_and_new(entropy):
    rng = random.Random(entropy)
    known = knowledge(entropy=entropy)
    for count in range(14):
        proposal = propose(replace(known, entropy=entropy + count))
        assert known.space.recipe(proposal.variant)
        assert proposal.variant.fingerprint not in {r.variant.fingerprint for r in known.results}
        assert proposal.idea
        score = rng.choice([None, 1.8 + rng.random()])
        known = replace(known, results=(*known.results, Result(proposal.variant, score)))


def test_same_knowledge_same_proposal():
    done = [Result(Variant("synthetic/quick"), 1.8)]
    known = knowledge(done, entropy=5)
    assert propose(known) == propose(known)
    assert propose(known) != propose(replace(known, entropy=6))


def test_pending_variants_are_not_proposed_again():
    known = knowledge(entropy=3)
    first = propose(known)
    assert propose(replace(known, pending=(first.variant,))).variant != first.variant


@pytest.mark.slow
def test_model_based_search_beats_random_search(tmp_path):
    task = load_task("synthetic", "quick")

    def best_after(count, next_variant):
        known = knowledge(task=task)
        for index in range(count):
            variant = next_variant(replace(known, entropy=7 + index))
            folder = tmp_path / f"{next_variant.__name__}{index}"
            known = replace(known, results=(*known.results, screened(task, variant, folder)))
        return min(result.score for result in known.results if result.score is not None)

    def searched(known):
        return propose(known).variant

    def blind(known):
        return propose(replace(known, results=())).variant

    assert best_after(60, searched) < best_after(60, blind) - 0.02


def test_unknown_brain_lists_the_known():
    with pytest.raises(UnknownName, match="search"):
        load_brain("serch")
