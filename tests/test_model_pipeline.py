"""The data pipeline: the default rows, every knob, and best-fit packing against plain code."""

import itertools

import numpy as np
import pytest

from society.model import packing, pipeline
from society.model.data import TrainTokens, row_order
from society.model.recipe import Recipe

TINY = {"seq_len": 16, "batch_tokens": 64, "vocab": 300}
LENGTHS = [5, 40, 17, 100, 33, 18, 60, 9, 130, 25, 64, 51] * 6
BOS = 299


def a_text(lengths=LENGTHS, domains=3):
    """Documents of many lengths; later documents have rarer tokens."""
    rng = np.random.default_rng(0)
    documents = [
        np.concatenate([[BOS], rng.integers(0, 20 + 3 * number, length - 1)])
        for number, length in enumerate(lengths)
    ]
    starts = np.cumsum(lengths) - lengths
    return TrainTokens(
        np.concatenate(documents).astype(np.uint16), 300, "test", starts,
        np.arange(len(lengths)) % domains, tuple("abc"[:domains]),
    )  # fmt: skip


TEXT = a_text()


def rows_of(count, seed=1, steps=40, text=TEXT, **knobs):
    """The first rows of a run: (count, T + 1)."""
    stream = pipeline.batches(Recipe(**TINY | knobs), text, seed=seed, steps=steps)
    return np.concatenate(list(itertools.islice(stream, count // 4)))


def unordered(rows):
    return sorted(map(bytes, rows))


def documents_of(rows, text=TEXT):
    """Number of the document in which each row of a contiguous run starts."""
    whole = np.lib.stride_tricks.sliding_window_view(text.tokens.astype(np.int64), 17)
    found = {bytes(whole[at]): at for at in range(len(whole) - 1, -1, -1)}
    places = np.asarray([found[bytes(row)] for row in rows])
    return np.searchsorted(text.starts, places, side="right") - 1


# --------------------------------------------------------------------------- the default


def original(recipe, tokens, seed):
    """Shuffled contiguous rows, as the trainer made them before there were knobs."""
    length = recipe.seq_len
    count = (len(tokens.tokens) - 1) // length
    reach = np.arange(length + 1)
    waiting = np.empty(0, dtype=np.int64)
    epoch = 0
    while True:
        while len(waiting) < recipe.rows:
            waiting = np.concatenate([waiting, row_order(count, seed, epoch)])
            epoch += 1
        taken, waiting = waiting[: recipe.rows], waiting[recipe.rows :]
        block = tokens.tokens[taken[:, None] * length + reach]
        yield block.astype(np.int64)


@pytest.mark.parametrize("steps", [None, 1, 30])
@pytest.mark.parametrize("shape", [{}, {"seq_len": 32, "batch_tokens": 320}])
def test_the_default_gives_the_rows_of_always(steps, shape):
    recipe = Recipe(**TINY | shape)
    expected = original(recipe, TEXT, 7)
    found = pipeline.batches(recipe, TEXT, seed=7, steps=steps)
    for _ in range(120):  # several epochs
        block = next(found)
        assert block.dtype == np.int64
        assert np.array_equal(block, next(expected))


def test_tokens_without_documents_are_enough_for_the_default():
    bare = TrainTokens(TEXT.tokens, 300, "test")
    assert np.array_equal(rows_of(40, text=bare), rows_of(40))


# --------------------------------------------------------------------------- every knob


CHANGES = [
    *({"data_order": name} for name in pipeline.ORDERS),
    {"packing": "documents"},
    {"packing": "best_fit"},
    {"packing": "best_fit", "data_order": "corpus"},
    {"repeats": 2},
    {"domain_mix": 0.0},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("steps", [None, 40])
def test_every_knob_changes_the_rows_and_repeats_exactly(change, steps):
    assert not np.array_equal(rows_of(160, steps=steps, **change), rows_of(160, steps=steps))
    again = rows_of(160, steps=steps, **change)
    assert np.array_equal(rows_of(160, steps=steps, **change), again)
    assert again.shape == (160, 17)


@pytest.mark.parametrize("change", [c for c in CHANGES if c.get("data_order") != "corpus"], ids=str)
def test_the_seed_decides(change):
    assert not np.array_equal(rows_of(160, seed=1, **change), rows_of(160, seed=2, **change))


def test_a_setting_is_a_stream_without_end():
    for change in CHANGES:
        stream = pipeline.batches(Recipe(**TINY | change), TEXT, seed=1, steps=3)
        assert len(list(itertools.islice(stream, 20))) == 20


@pytest.mark.parametrize("order", pipeline.ORDERS)
def test_an_order_keeps_the_sample_of_the_shuffled_run(order):
    short = rows_of(40, steps=10, data_order=order)
    assert unordered(short) == unordered(rows_of(40, steps=10))


def test_orders_by_position_length_and_domain():
    def places(order):
        return documents_of(rows_of(80, steps=20, data_order=order))

    lengths, numbers = np.asarray(LENGTHS), np.arange(len(LENGTHS))
    assert (np.diff(places("corpus")) >= 0).all()
    assert (np.diff(places("reversed")) <= 0).all()
    assert (np.diff(lengths[places("short_first")]) >= 0).all()
    assert (np.diff(lengths[places("long_first")]) <= 0).all()
    assert (np.diff((numbers % 3)[places("by_domain")]) >= 0).all()


def test_easy_rows_have_frequent_tokens():
    counts = np.bincount(TEXT.tokens, minlength=300)
    nats = -np.log(counts / counts.sum(), where=counts > 0, out=np.zeros(300))
    easy = nats[rows_of(80, steps=20, data_order="easy_first")].mean(axis=1)
    hard = nats[rows_of(80, steps=20, data_order="hard_first")].mean(axis=1)
    assert (np.diff(easy) >= -1e-12).all()
    assert (np.diff(hard) <= 1e-12).all()
    assert easy[0] < easy[-1]


def test_rows_of_documents_never_cross_one():
    whole = sum((length - 1) // 16 for length in LENGTHS)
    rows = rows_of(whole // 4 * 4, steps=None, packing="documents")
    assert (rows[:, 1:] != BOS).all()
    assert len(set(unordered(rows))) == len(rows)  # one epoch: no row twice


def test_repeated_rows_are_few_and_come_in_reshuffled_passes():
    rows = rows_of(120, steps=30, repeats=3)
    first, second, third = (rows[at : at + 40] for at in (0, 40, 80))
    assert unordered(first) == unordered(second) == unordered(third)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)
    assert np.array_equal(first, rows_of(40, steps=30))


def test_repeats_that_do_not_divide_the_run():
    rows = rows_of(40, steps=10, repeats=3)
    assert len(set(unordered(rows))) == 14


def test_repeats_keep_the_order_within_each_pass():
    places = documents_of(rows_of(80, steps=20, repeats=2, data_order="corpus"))
    assert (np.diff(places[:40]) >= 0).all()
    assert np.array_equal(places[:40], places[40:])


MIXES = pytest.mark.parametrize(("mix", "expected"), [(0.0, 0.5), (0.5, 0.25)])
"""A tenth of the text is domain 1: (1/10)^a / ((9/10)^a + (1/10)^a)."""


@MIXES
@pytest.mark.parametrize("packing", ["contiguous", "best_fit"])
def test_domains_are_mixed_in_the_asked_proportions(packing, mix, expected):
    text = a_text([40] * 100, domains=1)
    tokens = text.tokens.copy()
    tokens[3600:] = np.where(tokens[3600:] == BOS, BOS, 250)
    text = TrainTokens(tokens, 300, "test", text.starts, np.repeat([0, 1], [90, 10]))
    knobs = {"packing": packing, "seq_len": 39, "batch_tokens": 156}
    rows = rows_of(4000, text=text, domain_mix=mix, steps=1000, **knobs)
    assert (rows == 250).sum() / (rows != BOS).sum() == pytest.approx(expected, abs=0.04)


@MIXES
def test_the_proportions_are_those_of_the_text_not_of_the_documents(mix, expected):
    sizes, domains = np.repeat([40, 5], [90, 80]), np.repeat([0, 1], [90, 80])
    drawn = np.concatenate(
        list(
            itertools.islice(
                pipeline._mixed(Recipe(domain_mix=mix), domains, sizes, seed=1),
                20,
            )
        )
    )
    share = sizes[drawn][domains[drawn] == 1].sum() / sizes[drawn].sum()
    assert share == pytest.approx(expected, abs=0.01)


def test_what_has_no_meaning_for_the_text_names_the_knob():
    single = TrainTokens(TEXT.tokens, 300, "test")
    short = a_text([9, 12, 7] * 20)
    for text, knobs, words in [
        (single, {"data_order": "short_first"}, "data_order=short_first.*single document"),
        (single, {"data_order": "by_domain"}, "data_order=by_domain.*one domain"),
        (single, {"domain_mix": 0.5}, "domain_mix=0.5.*one domain"),
        (short, {"packing": "documents"}, "packing=documents.*12 tokens.*seq_len=16"),
    ]:
        with pytest.raises(pipeline.NoRows, match=words):
            pipeline.batches(Recipe(**TINY | knobs), text, seed=1, steps=1)


# --------------------------------------------------------------------------- best fit


@pytest.mark.parametrize(
    ("count", "groups", "capacity"),
    [(3000, [1024, 1024, 952], 65), (40, [40], 33), (1500, [700, 1, 799], 129)],
)
def test_best_fit_packs_as_the_plain_algorithm(plain_best_fit, count, groups, capacity):
    rng = np.random.default_rng(count)
    lengths = np.maximum(1, rng.lognormal(3.5, 1.0, count).astype(int))
    lengths[rng.integers(0, count, count // 4)] = 30  # ties
    starts = np.cumsum(lengths) - lengths
    tokens = np.arange(lengths.sum())
    documents = np.split(tokens, starts[1:])
    arriving = packing.reading_order(groups)
    packer = packing.BestFit(starts, lengths, arriving, capacity)
    found = np.concatenate([packer.take(10).block(tokens) for _ in range(20)])
    assert np.array_equal(found, plain_best_fit(documents, groups, 200, capacity))


def test_best_fit_in_corpus_order_is_the_public_loader(plain_best_fit):
    text = TrainTokens(
        TEXT.tokens, 300, "test", TEXT.starts, TEXT.domains, TEXT.domain_names, (50, 22)
    )
    documents = np.split(TEXT.tokens, TEXT.starts[1:])
    expected = plain_best_fit(documents, (50, 22), 200, 17)
    for seed in (1, 2):
        found = rows_of(200, seed=seed, text=text, packing="best_fit", data_order="corpus")
        assert np.array_equal(found, expected)


def test_best_fit_rows_start_with_a_document():
    rows = rows_of(400, packing="best_fit", data_order="long_first", steps=100)
    assert (rows[:, 0] == BOS).all()


def test_rows_of_several_pieces_can_be_selected():
    tokens = np.arange(100)
    begin, length = np.asarray([0, 50, 20, 70, 90]), np.asarray([3, 1, 4, 2, 2])
    rows = packing.Rows(begin, length, np.asarray([2, 1, 2]))
    assert rows.block(tokens).tolist() == [[0, 1, 2, 50], [20, 21, 22, 23], [70, 71, 90, 91]]
    assert rows.first.tolist() == [0, 20, 70]
    assert rows.select(np.asarray([2, 0, 2])).block(tokens).tolist() == [
        [70, 71, 90, 91], [0, 1, 2, 50], [70, 71, 90, 91],
    ]  # fmt: skip
