"""Preparing data: downloads from a scripted server, own text, and the command."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

from society.errors import UnknownName, UsageError
from society.experiments import Refused, Role, load_task
from society.model import corpora, data, download, shards, texts, tokenizer
from society.model.download import DownloadFailed, Wanted
from society.records import Budget, BudgetKind, Split

BODY = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
DIGEST = hashlib.sha256(BODY).hexdigest()


class Shelf:
    """What a server has, and how it misbehaves; every request is noted."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.linked: dict[str, str] = {}
        """Path -> the entity tag of a redirect, as a Git LFS store sends it."""
        self.cuts: dict[str, list[int]] = {}
        """Path -> bytes after which the next answers are cut off."""
        self.statuses: dict[str, list[int]] = {}
        """Path -> status of the next answers."""
        self.ranges = True
        self.requests: list[tuple[str, str | None, int]] = []
        """(path, range, status) of each answer."""
        self.url = ""

    def statuses_of(self, path):
        return [status for asked, _, status in self.requests if asked == path]


class Handler(BaseHTTPRequestHandler):
    shelf: Shelf

    def do_GET(self):
        shelf, path = self.shelf, self.path
        if path in shelf.linked:
            self._head(path, 302, {"Location": "/cdn" + path, "X-Linked-Etag": shelf.linked[path]})
            return
        path = path.removeprefix("/cdn")
        if shelf.statuses.get(path):
            self._head(path, shelf.statuses[path].pop(0), {"Content-Length": "0"})
        elif path not in shelf.files:
            self._head(path, 404, {"Content-Length": "0"})
        else:
            self._send(path, shelf.files[path], shelf.tags.get(path, '"one"'))

    def _send(self, path, body, tag):
        begin, status, headers = 0, 200, {"ETag": tag}
        asked = self.headers.get("Range")
        if asked and self.shelf.ranges and self.headers.get("If-Range") == tag:
            begin, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
            if begin >= len(body):
                self._head(path, 416, {"Content-Range": f"bytes */{len(body)}"})
                return
            headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        self._head(path, status, headers | {"Content-Length": str(len(body) - begin)})
        cuts = self.shelf.cuts.get(path)
        self.wfile.write(body[begin : begin + cuts.pop(0)] if cuts else body[begin:])

    def _head(self, path, status, headers):
        self.shelf.requests.append((path, self.headers.get("Range"), status))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *args):
        """Say nothing."""


@pytest.fixture
def shelf(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    shelf = Shelf()
    handler = type("Scripted", (Handler,), {"shelf": shelf})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        shelf.url = f"http://127.0.0.1:{server.server_port}"
        yield shelf
        server.shutdown()
        thread.join()


def get(shelf, folder, names=("a",), *, sha256=None, **more):
    """Download files; waiting takes no time."""
    wanted = [Wanted(name, f"{shelf.url}/{name}", sha256) for name in names]
    return download.download(wanted, folder, sleep=lambda seconds: None, **more)


# --------------------------------------------------------------------------- download


def test_files_arrive_whole_and_are_recorded(shelf, tmp_path):
    shelf.files = {f"/{name}": BODY + name.encode() for name in "abcde"}
    seen = []
    found = get(shelf, tmp_path, "abcde", on_bytes=lambda *one: seen.append(one))
    for name in "abcde":
        assert (tmp_path / name).read_bytes() == BODY + name.encode()
        assert found[name] == hashlib.sha256(BODY + name.encode()).hexdigest()
        assert (name, len(BODY) + 1, len(BODY) + 1) in seen
    assert download.recorded(tmp_path) == found
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", *"abcde", "lock.json"]


def test_what_is_there_is_not_downloaded_again(shelf, tmp_path):
    shelf.files["/a"] = BODY
    first = get(shelf, tmp_path)
    assert get(shelf, tmp_path) == first
    assert len(shelf.requests) == 1


def test_a_cut_connection_is_continued(shelf, tmp_path):
    shelf.files["/a"] = BODY
    shelf.cuts["/a"] = [100_000, 150_000]
    assert get(shelf, tmp_path)["a"] == DIGEST
    assert [(asked, status) for _, asked, status in shelf.requests] == [
        (None, 200), ("bytes=100000-", 206), ("bytes=250000-", 206),
    ]  # fmt: skip


def test_a_beginning_is_kept_and_continued_by_the_next_command(shelf, tmp_path):
    shelf.files["/a"] = BODY
    shelf.cuts["/a"] = [100_000]

    def stop_after_the_cut(seconds):
        shelf.statuses["/a"] = [403]

    with pytest.raises(DownloadFailed, match="403"):
        download.download([Wanted("a", f"{shelf.url}/a")], tmp_path, sleep=stop_after_the_cut)
    assert (tmp_path / "a.part").stat().st_size == 100_000
    assert not (tmp_path / "a").exists()
    assert get(shelf, tmp_path)["a"] == DIGEST
    assert shelf.requests[-1] == ("/a", "bytes=100000-", 206)


def test_a_complete_part_is_only_verified(shelf, tmp_path):
    """The process was killed between the last byte and the new name."""
    shelf.files["/a"] = BODY
    (tmp_path / "a.part").write_bytes(BODY)
    (tmp_path / "a.part.json").write_text(json.dumps({"version": '"one"'}))
    assert get(shelf, tmp_path)["a"] == DIGEST
    assert shelf.statuses_of("/a") == [416]


def test_a_changed_file_starts_anew(shelf, tmp_path):
    shelf.files["/a"] = BODY
    (tmp_path / "a.part").write_bytes(b"old" * 1000)
    (tmp_path / "a.part.json").write_text(json.dumps({"version": '"zero"'}))
    assert get(shelf, tmp_path)["a"] == DIGEST
    assert shelf.requests == [("/a", "bytes=3000-", 200)]


def test_a_file_that_became_shorter_starts_anew(shelf, tmp_path):
    shelf.files["/a"] = BODY
    (tmp_path / "a.part").write_bytes(BODY + b"more")
    (tmp_path / "a.part.json").write_text(json.dumps({"version": '"one"'}))
    assert get(shelf, tmp_path)["a"] == DIGEST
    assert shelf.statuses_of("/a") == [416, 200]


def test_a_beginning_of_unknown_version_starts_anew(shelf, tmp_path):
    shelf.files["/a"] = BODY
    (tmp_path / "a.part").write_bytes(b"old" * 1000)
    assert get(shelf, tmp_path)["a"] == DIGEST
    assert shelf.requests == [("/a", None, 200)]


def test_a_server_without_ranges_starts_anew(shelf, tmp_path):
    shelf.files["/a"], shelf.ranges = BODY, False
    shelf.cuts["/a"] = [100_000]
    assert get(shelf, tmp_path)["a"] == DIGEST
    assert shelf.statuses_of("/a") == [200, 200]


@pytest.mark.parametrize("known", ["description", "server", "lock"])
def test_a_wrong_checksum_deletes_the_part_and_fails(shelf, tmp_path, known):
    wrong = hashlib.sha256(b"another").hexdigest()
    shelf.files["/a"] = BODY
    if known == "server":
        shelf.linked["/a"] = f'"{wrong}"'
    if known == "lock":
        (tmp_path / "lock.json").write_text(json.dumps({"sha256": {"a": wrong}}))
    with pytest.raises(DownloadFailed, match=rf"{DIGEST}, expected {wrong}.*deleted") as caught:
        get(shelf, tmp_path, sha256=wrong if known == "description" else None)
    assert f"{shelf.url}/a" in str(caught.value)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "a.part").exists()


def test_the_digest_of_an_lfs_store_is_checked_and_recorded(shelf, tmp_path):
    shelf.files["/a"] = BODY
    shelf.linked["/a"] = f'"{DIGEST}"'
    assert get(shelf, tmp_path)["a"] == DIGEST
    assert [status for _, _, status in shelf.requests] == [302, 200]


def test_a_file_that_changed_on_the_server_is_refused_before_it_is_downloaded(shelf, tmp_path):
    shelf.files["/a"] = BODY
    get(shelf, tmp_path)
    (tmp_path / "a").unlink()
    other = hashlib.sha256(b"another").hexdigest()
    shelf.linked["/a"] = f'"{other}"'
    with pytest.raises(DownloadFailed, match=rf"{other} on the server, expected {DIGEST}"):
        get(shelf, tmp_path)


def test_a_file_that_was_changed_here_is_downloaded_again(shelf, tmp_path):
    shelf.files["/a"] = BODY
    get(shelf, tmp_path)
    (tmp_path / "a").write_bytes(BODY[:-1] + b"x")
    assert get(shelf, tmp_path)["a"] == DIGEST
    assert (tmp_path / "a").read_bytes() == BODY


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_file_that_is_not_there_is_a_clear_error_at_once(shelf, tmp_path, status):
    shelf.statuses["/a"] = [status] * 9
    with pytest.raises(DownloadFailed, match=rf"/a: the server answers {status}.*--base-url"):
        get(shelf, tmp_path)
    assert len(shelf.requests) == 1


def test_a_busy_server_is_asked_again(shelf, tmp_path):
    shelf.files["/a"] = BODY
    shelf.statuses["/a"] = [503, 429, 500]
    waits = []
    download.download([Wanted("a", f"{shelf.url}/a")], tmp_path, sleep=waits.append)
    assert waits == [1, 2, 4]


def test_a_server_that_stays_busy_is_given_up(shelf, tmp_path):
    shelf.statuses["/a"] = [503] * 20
    with pytest.raises(DownloadFailed, match=r"answers 503.*6 times in a row.*again"):
        get(shelf, tmp_path)
    assert len(shelf.requests) == download.ATTEMPTS


def test_a_dead_server_is_given_up(tmp_path):
    with pytest.raises(DownloadFailed, match=r"refused, 6 times in a row"):
        download.download(
            [Wanted("a", "http://127.0.0.1:9/a")], tmp_path, sleep=lambda seconds: None
        )


def test_a_slow_line_that_always_breaks_gets_there(shelf, tmp_path):
    """Every attempt that brings something starts the count anew."""
    shelf.files["/a"] = BODY
    shelf.cuts["/a"] = [20_000] * 14
    assert get(shelf, tmp_path)["a"] == DIGEST
    assert len(shelf.requests) == 15


def test_one_bad_file_does_not_lose_the_others(shelf, tmp_path):
    shelf.files = {"/a": BODY, "/c": BODY}
    with pytest.raises(DownloadFailed, match="/b: the server answers 404"):
        get(shelf, tmp_path, "abc", jobs=1)
    assert (tmp_path / "a").read_bytes() == BODY
    shelf.files["/b"] = BODY
    get(shelf, tmp_path, "abc")
    assert shelf.statuses_of("/a") == [200]


def test_a_full_disk_is_found_before_it_is_full(shelf, tmp_path, monkeypatch):
    shelf.files["/a"] = BODY
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DownloadFailed, match=r"a needs 0 MB more and 0 MB are free.*SOCIETY_CACHE"):
        get(shelf, tmp_path)


def test_a_disk_that_fills_up_meanwhile(shelf, tmp_path, monkeypatch):
    shelf.files["/a"] = BODY

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "write_atomically", full)
    with pytest.raises(DownloadFailed, match=r"a\.part.*No space left on device.*goes on"):
        get(shelf, tmp_path)


def test_a_damaged_lock_file_is_named(shelf, tmp_path):
    (tmp_path / "lock.json").write_text("{")
    with pytest.raises(DownloadFailed, match=r"lock\.json.*delete it"):
        get(shelf, tmp_path)


# --------------------------------------------------------------------------- shards


def sentences(seed, count=400):
    rng = np.random.default_rng(seed)
    words = ["the", "a", "of", "wind", "sea", "ship", "north", "harbour", "café", "storm", "42"]
    made = ["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(60)]
    return [" ".join(rng.choice([*words, *made], rng.integers(3, 60))) + "." for _ in range(count)]


def parquet(rows, size=128, column="text"):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({column: rows}), sink, row_group_size=size)
    return sink.getvalue().to_pybytes()


NAMES = ("shard_00000.parquet", "shard_00001.parquet", "shard_06542.parquet", "shard_06541.parquet")


@pytest.fixture
def climbmix(shelf):
    shelf.files = {f"/{name}": parquet(sentences(number)) for number, name in enumerate(NAMES)}
    return shelf


def test_the_shipped_corpora_are_described():
    assert shards.known() == ("climbmix", "kjv")
    found = shards.describe("climbmix")
    assert next(iter(found.files())) == "shard_00000.parquet"
    assert len(found.files()) == 12
    assert found.files()["shard_06542.parquet"] == "validation"
    assert found.files()["shard_06541.parquet"] == "holdout"
    assert tuple(found.files(2)) == NAMES
    assert found.vocab - found.plan.special == 8188
    with pytest.raises(UnknownName, match="Did you mean 'climbmix'"):
        shards.describe("climbmx")
    with pytest.raises(UsageError, match="1 to 6541 training shards, not 6542"):
        found.files(6542)
    with pytest.raises(UsageError, match="--base-url"):
        found.wanted(base_url="ftp://x")


@pytest.mark.parametrize("change", ["vocbab: 3", "sha256: {a: b}", "name: [", "train_shards: 0"])
def test_a_wrong_description_names_the_file_and_the_key(change):
    text = (Path(shards.__file__).parents[1] / "configs/corpus-climbmix.yaml").read_text()
    key = change.partition(":")[0]
    kept = "\n".join(line for line in text.splitlines() if not line.startswith(f"{key}:"))
    with pytest.raises(UsageError, match=r"odd\.yaml: ") as caught:
        shards.read_description(f"{kept}\n{change}", "odd.yaml")
    assert key in str(caught.value) or "not YAML" in str(caught.value)


SMALL = """
task: pretrain
name: small
budget: {kind: steps, amount: 4}
limits: {timeout_s: 60, mem_bytes: 0}
recipe: {vocab: 400}
knobs: {vocab: {choices: [400]}}
options: {corpus: climbmix}
"""


def test_the_public_profile_needs_the_public_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("SOCIETY_CACHE", str(tmp_path))
    task = load_task("pretrain", "h100")
    assert (task.vocabs, task.options.corpus) == ((8192,), "climbmix")
    assert task.options.eval_tokens == 40 * 524_288
    with pytest.raises(data.CorpusUnavailable, match="society data prepare --corpus climbmix"):
        task.prepare()


def test_shards_become_a_corpus(climbmix, society, tmp_path):
    """The whole command for a profile, with a connection that is cut once."""
    profile = tmp_path / "small.yaml"
    profile.write_text(SMALL)
    climbmix.cuts[f"/{NAMES[0]}"] = [5_000]
    more = ("--shards", 2, "--base-url", climbmix.url, "--workers", 2)
    done = society("data", "prepare", "--profile", profile, *more, SOCIETY_CACHE=str(tmp_path))
    assert (done.code, done.err) == (0, "")
    assert climbmix.statuses_of(f"/{NAMES[0]}") == [200, 206]
    encoder = tokenizer.encoding(
        tokenizer.load_ranks(data.corpus_at(tmp_path, 400, "climbmix").tokenizer), 4
    )
    train = data.load_train(tmp_path, 400, "climbmix")
    assert train.groups == (128, 128, 128, 16) * 2
    expected = [396, *encoder.encode_ordinary(sentences(0)[0])]
    assert train.tokens[: len(expected)].tolist() == expected
    for split, seed in ((Split.VALIDATION, 2), (Split.HOLDOUT, 3)):
        scored = data.load_eval(tmp_path, 400, split, "climbmix")
        assert scored.tokens.tolist() == [
            token for text in sentences(seed) for token in (396, *encoder.encode_ordinary(text))
        ]
    asked = len(climbmix.requests)
    again = society("data", "prepare", "--profile", profile, *more, SOCIETY_CACHE=str(tmp_path))
    assert again.code == 0
    assert len(climbmix.requests) == asked


def test_another_number_of_shards_is_another_text(climbmix, society, tmp_path):
    more = ("--base-url", climbmix.url, "--vocab", 300)
    start = ("data", "prepare", "--corpus", "climbmix")
    assert society(*start, "--shards", 1, *more, SOCIETY_CACHE=str(tmp_path)).code == 0
    done = society(*start, "--shards", 2, *more, SOCIETY_CACHE=str(tmp_path))
    assert done.code == 2
    assert "'climbmix' was prepared from another text" in done.err


def test_a_download_that_fails_is_one_line(climbmix, society, tmp_path):
    del climbmix.files[f"/{NAMES[2]}"]
    more = ("--shards", 2, "--base-url", climbmix.url)
    done = society("data", "prepare", "--corpus", "climbmix", *more, SOCIETY_CACHE=str(tmp_path))
    assert done.code == 1
    assert done.err.startswith(f"error: {climbmix.url}/{NAMES[2]}: the server answers 404")
    assert done.err.count("\n") == 1


def test_a_shard_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a").write_bytes(BODY)
    with pytest.raises(data.CorpusUnavailable, match=r"a cannot be read as Parquet"):
        list(shards.row_groups(tmp_path / "a", "text"))
    (tmp_path / "b").write_bytes(parquet(["x"], column="words"))
    with pytest.raises(data.CorpusUnavailable, match=r"b cannot be read.*column 'text'"):
        list(shards.row_groups(tmp_path / "b", "text"))


# --------------------------------------------------------------------------- own text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text of every kind: 40 files, 100 lines, 100 rows."""
    folder = tmp_path_factory.mktemp("texts") / "Sea stories"
    for number, text in enumerate(sentences(1, 40)):
        path = folder / ("old" if number % 2 else "new") / "deep" / f"{number:02d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text * 9)
    lines = [json.dumps({"text": text * 9, "domain": "log"}) for text in sentences(2, 100)]
    (folder / "lines.jsonl").write_text("\n\n".join([*lines, json.dumps({"text": "  "})]))
    rows = {"text": [text * 9 for text in sentences(3, 100)], "number": list(range(100))}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "rows.parquet")
    (folder / "picture.png").write_bytes(BODY)
    return folder


def test_every_kind_of_file_is_read_in_order(folder):
    found = list(texts.read_folder(folder))
    assert [text for text, _ in found[:100]] == [text * 9 for text in sentences(2, 100)]
    domains = [domain for _, domain in found]
    assert domains == ["log"] * 100 + ["new"] * 20 + ["old"] * 20 + ["all"] * 100


def test_splits_are_decided_by_the_text_alone(folder, tmp_path):
    def splits(place):
        source = texts.TextFolder.scan(place, "mine")
        return {one.text: one.split for group in source.groups() for one in group}

    before = splits(folder)
    shutil.copytree(folder, tmp_path / "more")
    (tmp_path / "more" / "00.txt").write_text("Another document. " * 90)
    after = splits(tmp_path / "more")
    assert len(after) == len(before) + 1
    assert before == {text: split for text, split in after.items() if text in before}
    counts = {split: list(before.values()).count(split) for split in data.SPLITS}
    assert 4 <= counts["validation"] <= 24
    assert 4 <= counts["holdout"] <= 24


@pytest.mark.parametrize("count", [20, 35, 60])
def test_few_documents_still_give_every_split_enough(tmp_path, count):
    for number, text in enumerate(sentences(7, count)):
        (tmp_path / f"{number}.txt").write_text(text * 30)
    source = texts.TextFolder.scan(tmp_path, "mine")
    sizes = dict.fromkeys(data.SPLITS, 0)
    for group in source.groups():
        for one in group:
            sizes[one.split] += len(one.text.encode())
    assert all(sizes[split] >= texts.MIN_BYTES[split] for split in data.SPLITS)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.png": b"x"}, r"holds no file that ends in \.txt"),
        ({"a.txt": b"one document" * 9999}, r"1 different documents.*JSON Lines"),
        ({f"{n}.txt": f"{n} short".encode() for n in range(9)}, r"too little text.*train \d+"),
        ({"a.txt": b"\xff\xfe\xff"}, r"a\.txt cannot be read as UTF-8"),
        ({"a.jsonl": b'{"text": "x"}\n{"text": 3}'}, r'a\.jsonl, line 2: .*"text"'),
        ({"a.jsonl": b'{"text": "x"'}, r"a\.jsonl, line 1: not JSON"),
        ({"a.parquet": BODY}, r"a\.parquet is not a Parquet file"),
        ({"a.parquet": parquet(["x"], column="words")}, r"no column 'text'; it has words"),
        ({"a.parquet": parquet([1, 2])}, r"'text' does not hold strings"),
    ],
)
def test_text_that_cannot_be_used_is_named(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=words):
        texts.TextFolder.scan(tmp_path, "mine")


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x \\ud800 y"}\n')
    assert [text for text, _ in texts.read_folder(tmp_path)] == ["x \ufffd y"]


def test_own_text_is_prepared_listed_and_named_by_a_profile(folder, society, tmp_path):
    cache = {"SOCIETY_CACHE": str(tmp_path / "cache")}
    done = society(
        "data", "prepare", "--text", folder, "--name", "sea", "--vocab", 300, "--vocab", 320,
        **cache,
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    assert "sea with vocab=300 is ready" in done.out
    listed = json.loads(society("data", "list", "--json", **cache).out)
    assert [(one["name"], one["vocab"]) for one in listed] == [("sea", 300), ("sea", 320)]
    assert listed[0]["domains"] == ["log", "new", "old", "all"]
    assert sum(one["documents"] for one in listed[0]["splits"].values()) == 240
    assert listed[0]["sha256"] in done.out
    shown = society("data", "list", **cache).out
    assert "sea" in shown
    assert listed[1]["splits"]["holdout"]["sha256"][:12] in shown
    doctor = json.loads(society("doctor", "--json", **cache).out)
    assert "sea (300, 320 tokens)" in next(c for c in doctor if c["name"] == "corpus")["found"]


def test_what_is_asked_for_must_be_clear(folder, society, tmp_path):
    cache = {"SOCIETY_CACHE": str(tmp_path)}
    (tmp_path / "mine.yaml").write_text(PROFILE)
    own = society("data", "prepare", "--profile", tmp_path / "mine.yaml", **cache)
    assert own.code == 1
    assert "--text FOLDER --name sea --vocab 300" in own.err
    for arguments, words in [
        ((), "Give one of --profile, --corpus and --text"),
        (("--corpus", "kjv", "--text", folder), "Give one of"),
        (("--corpus", "kv"), "Did you mean 'kjv'?"),
        (("--text", tmp_path / "none"), "no such folder"),
        (("--text", folder), "'Sea stories' cannot name a corpus"),
        (("--text", folder, "--name", "kjv"), "that of a shipped corpus"),
    ]:
        done = society("data", "prepare", *arguments, **cache)
        assert done.code == 2, done
        assert words in done.err
        assert done.err.count("\n") == 1


PROFILE = """
task: pretrain
name: mine
budget: {kind: steps, amount: 4}
limits: {timeout_s: 60, mem_bytes: 2_000_000_000}
recipe: {vocab: 300, dim: 32, depth: 1, seq_len: 32, batch_tokens: 128}
knobs:
  vocab: {choices: [300, 320]}
  dim: {choices: [32]}
options: {corpus: sea, eval_tokens: 3200, eval_seq_len: 64}
"""


def test_a_profile_trains_on_own_text(folder, society, tmp_path, monkeypatch):
    monkeypatch.setenv("SOCIETY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.yaml").write_text(PROFILE)
    task = load_task("pretrain", str(tmp_path / "mine.yaml"))
    with pytest.raises(data.CorpusUnavailable, match="--name sea --vocab 300"):
        task.prepare()
    corpora.build(texts.TextFolder.scan(folder, "sea"), tmp_path / "cache", 300)
    assert len(task.prepare()) == 64
    task.warm_up()
    for role in Role:
        task.preload(role)
    four = Budget(BudgetKind.STEPS, 4)
    for change in ({}, {"packing": "best_fit"}, {"domain_mix": 0.5}, {"data_order": "by_domain"}):
        recipe = task.baseline.model_copy(update=change)
        assert task.train(recipe, 1, four, tmp_path, "cpu").steps == 4
        assert 1 < task.score(tmp_path, recipe, Split.HOLDOUT, "cpu") < 10
    with pytest.raises(Refused, match=r"vocab=320: .* not prepared with vocab=320"):
        task.train(task.baseline.model_copy(update={"vocab": 320}), 1, four, tmp_path, "cpu")
    long = task.baseline.model_copy(update={"packing": "documents", "seq_len": 8192})
    with pytest.raises(Refused, match=r"packing=documents"):
        task.train(long, 1, four, tmp_path, "cpu")


def test_a_killed_command_leaves_no_workers_and_can_be_repeated(folder, tmp_path, society):
    """kill -9 while two processes tokenise."""
    lines = [json.dumps({"text": text * 40}) for text in sentences(5, 2000)]
    (tmp_path / "big.jsonl").write_text("\n".join(lines))
    command = [
        sys.executable, "-m", "society", "data", "prepare", "--text", str(tmp_path / "big.jsonl"),
        "--vocab", "300", "--workers", "2",
    ]  # fmt: skip
    cache = {"SOCIETY_CACHE": str(tmp_path / "cache")}
    child = subprocess.Popen(command, env=os.environ | cache, stdout=subprocess.DEVNULL)
    building = tmp_path / "cache/corpora/big"
    started = psutil.Process(child.pid)
    deadline = time.monotonic() + 60
    while len(started.children(recursive=True)) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = started.children(recursive=True)
    child.kill()
    child.wait(30)
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert len(gone) >= 2
    assert not alive
    assert not list(building.glob("300"))
    done = society(*command[3:], **cache)
    assert (done.code, done.err) == (0, "")
    assert [path.name for path in building.iterdir()] == ["300"]
