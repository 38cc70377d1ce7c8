"""Edits, their canonical text, what it amounts to, and the early check of the code."""

from __future__ import annotations

import ast
import asyncio
import random
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from society import exchange
from society.agents.search import SearchBrain, best_of, with_champions_code
from society.experiments import coderules, patches
from society.experiments.neighbourhood import Changes, Neighbourhood
from society.experiments.patches import BadPatch, Edit, Rules
from society.experiments.space import Space
from society.experiments.task import load_task
from society.records import PATCH_MARK, Variant
from society.roles.base import Knowledge, Result

MODEL = Path(__file__).parent.parent / "model"
TRAINER = {name: (MODEL / name).read_text() for name in ("gpt.py", "optim.py", "schedule.py")}
TOY = {
    "net.py": '"""A net."""\n\nimport torch\n\n\ndef twice(x):\n    """Doubles."""\n'
    "    # a comment\n    return 2 * x\n\n\ndef once(x):\n    return x\n",
    "notes.txt": "one\ntwo\nthree\n",
}


def toy(**changed: str) -> dict[str, str]:
    return {**TOY, **{name.replace("_", "."): text for name, text in changed.items()}}


def edited(*edits: tuple[str, str, str]) -> dict[str, str]:
    return patches.apply_edits(TOY, [Edit(*edit) for edit in edits])


# --- edits ----------------------------------------------------------------------------------------


def test_an_edit_replaces_the_one_place():
    after = edited(("net.py", "return 2 * x", "return 3 * x"))
    assert after["net.py"] == TOY["net.py"].replace("2 * x", "3 * x")
    assert after["notes.txt"] == TOY["notes.txt"]


def test_edits_are_made_one_after_the_other():
    after = edited(("net.py", "2 * x", "3 * x"), ("net.py", "3 * x", "4 * x"))
    assert "4 * x" in after["net.py"]


def test_a_place_that_is_not_there_shows_the_closest_lines():
    with pytest.raises(BadPatch) as caught:
        edited(("net.py", "    return 2*x", "    return 3 * x"))
    assert "is not in the file" in str(caught.value)
    assert "9:     return 2 * x" in str(caught.value)


def test_a_place_that_is_not_the_only_one_says_how_often():
    with pytest.raises(BadPatch, match=r"occurs 2 times \(lines 6, 12\)"):
        edited(("net.py", "(x):", "(y):"))


def test_overlapping_places_count():
    with pytest.raises(BadPatch, match="2 times"):
        patches.apply_edits({"a.txt": "aaa"}, [Edit("a.txt", "aa", "b")])


@pytest.mark.parametrize("search", ["", " ", "\n\n", "\t"])
def test_an_empty_search_is_refused(search):
    with pytest.raises(BadPatch, match="empty"):
        edited(("net.py", search, "x"))


@pytest.mark.parametrize(
    "name",
    ["../net.py", "/etc/passwd", "./net.py", "net.py/", "a/../net.py", "NET.PY", "other.py",
     "net.py\x00", "net.py\n", "model/net.py", "..\\net.py", ""],
)  # fmt: skip
def test_only_the_declared_files_may_be_edited(name):
    with pytest.raises(BadPatch, match=r"Allowed: net\.py, notes\.txt"):
        edited((name, "return x", "return 0"))


def test_a_path_around_a_known_name_gets_a_hint():
    with pytest.raises(BadPatch, match=r"Did you mean 'net\.py'"):
        edited(("society/model/net.py", "return x", "return 0"))


def test_white_space_at_line_ends_may_differ():
    loose = edited(("net.py", "def once(x):   \n    return x\t\n", "def once(x):\n    return -x\n"))
    exact = edited(("net.py", "def once(x):\n    return x\n", "def once(x):\n    return -x\n"))
    assert loose == exact


def test_white_space_is_no_excuse_for_two_places():
    files = {"a.py": "x = 1 \ny = 2\nx = 1  \n"}
    with pytest.raises(BadPatch, match="occurs 2 times"):
        patches.apply_edits(files, [Edit("a.py", "\nx = 1\n", "\nx = 3\n")])


def test_lines_can_be_deleted_loosely():
    files = {"a.py": "x = 1\ny = 2 \nz = 3\n"}
    after = patches.apply_edits(files, [Edit("a.py", "y = 2\nz = 3\n", "z = 3\n")])
    assert after["a.py"] == "x = 1\nz = 3\n"
    after = patches.apply_edits(files, [Edit("a.py", "y = 2  \n", "")])
    assert after["a.py"] == "x = 1\nz = 3\n"


def test_line_ends_of_windows_are_read_as_ours():
    files = {"a.py": "x = 1\r\ny = 2\r\n"}
    after = patches.apply_edits(files, [Edit("a.py", "x = 1\ny = 2", "x = 1\r\ny = 3")])
    assert after["a.py"] == "x = 1\ny = 3\n"


@pytest.mark.parametrize("char", ["\x00", "\x1b", "\u202e", "\u2066", "\u200b", "\ufeff", "\u2028"])
def test_invisible_characters_are_refused(char):
    with pytest.raises(BadPatch, match=f"U\\+{ord(char):04X}"):
        edited(("net.py", "2 * x", f"2 * x  # {char}"))
    with pytest.raises(BadPatch, match=f"U\\+{ord(char):04X}"):
        edited(("net.py", f"2 * x{char}", "3 * x"))


def test_too_much_is_refused():
    with pytest.raises(BadPatch, match="at most 40"):
        patches.apply_edits(TOY, [Edit("net.py", "2 * x", "2 * x")] * 41)
    with pytest.raises(BadPatch, match="at most 40960"):
        edited(("net.py", "2 * x", "y\n" * 30_000))
    with pytest.raises(BadPatch, match="at most 500"):
        edited(("net.py", "2 * x", "y" * 501))


# --- normal form ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "same",
    [
        TOY["net.py"].replace("    # a comment\n", ""),
        TOY["net.py"].replace("2 * x", "(2*x)"),
        TOY["net.py"].replace('    """Doubles."""\n', ""),
        TOY["net.py"].replace("\n\n\n", "\n"),
        TOY["net.py"].replace("\n", "\r\n"),
        TOY["net.py"] + '\n\n"""The end."""',
    ],
)
def test_what_only_looks_different_is_no_change(same):
    assert patches.canonical(TOY, toy(net_py=same)) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [("2 * x", "2.0 * x"), ("2 * x", "x * 2"), ("def once(x)", "def once(x, /)"),
     ("return x\n", "return x or None\n"), ("twice", "thrice"),
     ("import torch", "from torch import nn")],
)  # fmt: skip
def test_what_is_different_is_a_change(old, new):
    assert patches.canonical(TOY, toy(net_py=TOY["net.py"].replace(old, new))) is not None


def test_true_is_not_one_and_text_is_not_bytes():
    texts = ["x = 1", "x = True", "x = 1.0", "x = '1'", "x = b'1'", "x = None", "x = ...", "x = -1"]
    assert len({patches.digest({"a.py": text}) for text in texts}) == len(texts)


def test_zero_and_minus_zero_differ():
    assert patches.digest({"a.py": "x = 0.0"}) != patches.digest({"a.py": "x = -0.0"})


def test_names_and_borders_of_files_count():
    assert patches.digest({"a.txt": "b", "b.txt": ""}) != patches.digest(
        {"a.txt": "", "b.txt": "b"}
    )


def test_other_files_count_as_text_without_white_space_at_line_ends():
    assert patches.canonical(TOY, toy(notes_txt="one  \ntwo\nthree")) is None
    assert patches.canonical(TOY, toy(notes_txt="one\n two\nthree\n")) is not None


def test_the_form_of_a_file_is_pinned():
    """It names runs in ledgers, so it may not change from version to version of anything."""
    code = (
        "from __future__ import annotations\nimport torch as t\n@t.no_grad()\n"
        "def f(a, *b, c: int = 1, **d) -> str:\n    '''Doc.'''\n    x: list[int] = [*a, -2.5e-3]\n"
        "    return f'{x!r:>{c}} {{}}' if a[1:] else {**d, 'k': (y := 1j)}\n"
        "class G[T](A, k=1): ...\n".replace("[T]", "")
        + "async def g():\n    async with a as b, c:\n        yield lambda: (i for i in x if i)\n"
        "match f:\n    case {'a': [1, *_], **rest} | None: pass\n"
    )
    digest = "7a78e0531777d0aeffed6f00d1be228df7dcd0ca6d9927ad9f0172b45aeff843"
    assert patches.digest({"a.py": code}) == digest


# --- the text -------------------------------------------------------------------------------------


def test_the_text_of_a_patch():
    after = edited(("net.py", "2 * x", "3 * x"), ("notes.txt", "two\n", ""))
    text = patches.canonical(TOY, after)
    assert text is not None
    assert text.splitlines() == [
        f"society-patch 1 {patches.digest(after)}",
        f"base {patches.digest(TOY)}",
        "--- a/net.py",
        "+++ b/net.py",
        "@@ -6,7 +6,7 @@ twice",
        " def twice(x):",
        '     """Doubles."""',
        "     # a comment",
        "-    return 2 * x",
        "+    return 3 * x",
        " ",
        " ",
        " def once(x):",
        "--- a/notes.txt",
        "+++ b/notes.txt",
        "@@ -1,3 +1,2 @@",
        " one",
        "-two",
        " three",
    ]
    assert patches.effective(TOY, text) == after
    variant = Variant("toy/one", {}, text)
    assert variant.code == text.split("\n")[0]
    assert variant.code.startswith(PATCH_MARK)


def test_no_patch_is_the_sources():
    assert patches.effective(TOY, None) == TOY


def test_patches_of_champions_compose():
    first = edited(("net.py", "2 * x", "3 * x"))
    champion = patches.canonical(TOY, first)
    second = patches.apply_edits(
        patches.effective(TOY, champion), [Edit("net.py", "    return x", "    return -x")]
    )
    both = patches.canonical(TOY, second)
    assert patches.effective(TOY, both) == second
    assert "3 * x" in second["net.py"]
    assert "-x" in second["net.py"]
    undone = patches.apply_edits(
        second, [Edit("net.py", "3 * x", "2 * x"), Edit("net.py", "-x", "x")]
    )
    assert patches.canonical(TOY, undone) is None


def test_two_texts_of_the_same_code_are_one_experiment():
    one = patches.canonical(TOY, edited(("net.py", "2 * x", "3 * x")))
    two = patches.canonical(TOY, edited(("net.py", "2 * x", "3*x  # thrice")))
    assert one != two
    a, b = Variant("t", {}, one), Variant("t", {}, two)
    assert a.fingerprint == b.fingerprint


def test_the_diffs_are_those_of_git(tmp_path):
    after = patches.apply_edits(
        TRAINER,
        [Edit("schedule.py", "    if left >= recipe.warm_down:", "    if left > recipe.warm_down:"),
         Edit("gpt.py", "    x = x0\n", "    x = 2 * x0\n")],
    )  # fmt: skip
    text = patches.canonical(TRAINER, after)
    for name, content in TRAINER.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "change.patch").write_text(text)
    git = ["git", "apply", "change.patch"]
    subprocess.run(git, cwd=tmp_path, check=True, capture_output=True)
    assert {name: (tmp_path / name).read_text() for name in TRAINER} == after


@pytest.mark.parametrize(
    ("content", "message"),
    [("def f(:\n", r"net\.py, line 1: .*'def f\(:'"), ("x = (\n", r"net\.py, line 1"),
     ("x = 1\x00\n", r"net\.py"), ("x = '\n", r"net\.py, line 1"), ("if 1:\nx\n", r"line 2")],
)  # fmt: skip
def test_a_syntax_error_names_file_and_line(content, message):
    with pytest.raises(BadPatch, match=message):
        patches.canonical(TOY, toy(net_py=content))


@pytest.mark.parametrize(
    "content",
    ["x = (" + "1+\n" * 9000 + "1)\n", "x = " + "-" * 450 + "1\n", "x = " + "(" * 400 + ")" * 400,
     "x = [" * 150 + "\n" + "]" * 150, "\n".join(" " * i + "if 1:" for i in range(300))],
)  # fmt: skip
def test_deep_nesting_is_a_bad_patch_or_works(content):
    try:
        text = patches.canonical(TOY, toy(net_py=content))
    except BadPatch:
        return
    assert patches.effective(TOY, text)["net.py"].strip() == content.strip()


def test_files_can_be_neither_added_nor_removed():
    with pytest.raises(BadPatch, match=r"net\.py, notes\.txt"):
        patches.canonical(TOY, {**TOY, "more.py": ""})
    with pytest.raises(BadPatch, match=r"net\.py, notes\.txt"):
        patches.canonical(TOY, {"net.py": ""})


def test_a_file_may_be_emptied_and_filled():
    empty = toy(notes_txt="")
    assert patches.effective(TOY, patches.canonical(TOY, empty)) == empty
    assert patches.effective(empty, patches.canonical(empty, TOY)) == TOY


PATCH = patches.canonical(TOY, edited(("net.py", "2 * x", "3 * x")))
assert PATCH is not None
ROWS = PATCH.split("\n")


def forged(row: int, text: str | None) -> str:
    rows = [*ROWS[:row], *([] if text is None else [text]), *ROWS[row + 1 :]]
    return "\n".join(rows)


@pytest.mark.parametrize(
    "text",
    [
        forged(0, PATCH_MARK + "0" * 64),
        forged(0, PATCH_MARK + "0" * 63),
        forged(0, ROWS[0].upper()),
        forged(0, None),
        forged(1, "base " + "0" * 64),
        forged(1, None),
        forged(2, "--- a/../net.py"),
        forged(2, "--- /dev/null"),
        forged(3, "+++ b/notes.txt"),
        forged(3, None),
        forged(4, "@@ -5,7 +5,7 @@"),
        forged(4, "@@ -6,7 +7,7 @@"),
        forged(4, "@@ -6,8 +6,8 @@"),
        forged(4, "@@ -6,6 +6,6 @@"),
        forged(4, "@@ -99,7 +99,7 @@"),
        forged(4, f"@@ -{'9' * 5000},7 +6,7 @@"),
        forged(4, None),
        forged(5, " def twice(y):"),
        forged(5, "\\ No newline at end of file"),
        forged(9, "+    return 4 * x"),
        forged(9, None),
        PATCH + "rubbish\n",
        PATCH + "\n".join(ROWS[2:]),
        PATCH[:-1],
        "\n".join(ROWS[:2]),
        "\n".join(ROWS[:2]) + "\n",
        "\n".join(ROWS[:4]) + "\n",
        "",
        "+ a",
        "society-patch 2 " + "0" * 64,
        PATCH.replace("\n", "\r\n"),
        PATCH + "x" * (300 << 10),
        PATCH.replace("3 * x", "3 * x\x00"),
        PATCH.replace("3 * x", "3 * x  # \u202e"),
        PATCH.replace("3 * x", "3 * x  # " + "y" * 500),
    ],
)
def test_a_forged_text_is_refused(text):
    with pytest.raises(BadPatch) as caught:
        patches.effective(TOY, text)
    assert len(str(caught.value)) < 1000


def test_a_patch_for_another_version_says_so():
    with pytest.raises(BadPatch, match="another version"):
        patches.effective(toy(notes_txt="none"), PATCH)


def test_reformatting_the_base_is_another_matter():
    """The same code in other words has the same digest; the diff then does not fit."""
    with pytest.raises(BadPatch, match="does not fit"):
        patches.effective(toy(net_py=TOY["net.py"].replace("    # a comment\n", "")), PATCH)


# --- properties -----------------------------------------------------------------------------------

BODIES = st.lists(
    st.sampled_from(
        ["x = 1", "y = x", "def f(x):\n    return x", "# note", "", "class A:\n    a = 1", "+ 1",
         "-- a", "@decorated\ndef g():\n    pass", "'''text'''", "-x",
         "x = '@@ -1 +1 @@'", "pass  "]
    ),
    max_size=14,
)  # fmt: skip


def texts_of(names: tuple[str, ...]) -> st.SearchStrategy[dict[str, str]]:
    return st.fixed_dictionaries({name: BODIES.map("\n".join) for name in names})


def as_read(files: dict[str, str]) -> dict[str, str]:
    return {
        name: text if not text else text.removesuffix("\n") + "\n" for name, text in files.items()
    }


@given(before=texts_of(("a.py", "b.txt")), after=texts_of(("a.py", "b.txt")))
def test_round_trip(before, after):
    before, after = as_read(before), as_read(after)
    text = patches.canonical(before, after)
    if text is None:
        assert patches.digest(before) == patches.digest(after)
        return
    assert patches.effective(before, text) == after
    assert patches.canonical(before, after) == text
    assert text.startswith(f"{PATCH_MARK}{patches.digest(after)}\nbase {patches.digest(before)}\n")


@given(before=texts_of(("a.txt",)), after=texts_of(("a.txt",)), seed=st.integers(0, 2**32))
def test_a_text_with_one_line_changed_never_passes_for_other_code(before, after, seed):
    text = patches.canonical(as_read(before), as_read(after))
    if text is None:
        return
    rng, rows = random.Random(seed), text.split("\n")
    row = rng.randrange(len(rows) - 1)
    rows[row] = rng.choice(["", "+x", "-x", " x", rows[row] + "1", rows[row][1:], rows[row - 1]])
    try:
        result = patches.effective(as_read(before), "\n".join(rows))
    except BadPatch:
        return
    assert patches.digest(result) == patches.digest(as_read(after))


@settings(max_examples=60)
@given(data=st.data())
def test_edits_of_real_code_round_trip(data):
    name = data.draw(st.sampled_from(sorted(TRAINER)))
    rows = TRAINER[name].split("\n")
    first = data.draw(st.integers(0, len(rows) - 4))
    last = data.draw(st.integers(first + 1, min(len(rows), first + 8)))
    search = "\n".join(rows[first:last])
    new = data.draw(st.sampled_from(["", "x = 1", "# gone", search + "\n" + search]))
    try:
        after = patches.apply_edits(TRAINER, [Edit(name, search, new)])
        text = patches.canonical(TRAINER, after)
    except BadPatch:
        return
    if text is not None:
        assert patches.effective(TRAINER, text) == after


@given(st.text(max_size=300))
def test_no_text_breaks_the_reader(text):
    for patch in (text, PATCH + text, "\n".join(ROWS[:4]) + "\n" + text):
        try:
            patches.effective(TOY, patch)
        except BadPatch:
            continue
        assert patch == PATCH


@given(search=st.text(max_size=40), replace=st.text(max_size=40))
def test_no_edit_breaks_the_editor(search, replace):
    try:
        after = patches.apply_edits(TOY, [Edit("notes.txt", search, replace)])
    except BadPatch:
        return
    assert after["net.py"] == TOY["net.py"]


# --- broken ideas ---------------------------------------------------------------------------------


def test_broken_edits_are_kept_with_their_reason():
    text = patches.broken("`search` is not in the file.\n3: x", [Edit("net.py", "y", "z")])
    assert text.startswith(patches.BROKEN_MARK + "\n")
    assert patches.reason_of(text) == "`search` is not in the file.\n3: x"
    with pytest.raises(BadPatch, match="is not in the file"):
        patches.effective(TOY, text)
    assert Variant("t", {}, text).code == text


def test_a_broken_text_is_bounded():
    text = patches.broken("no " * 5000, [Edit("net.py", "y" * 30_000, "\x00" * 30_000)] * 100)
    assert len(text) < 50_000
    assert len(patches.reason_of(text)) <= 2000


def test_any_text_under_the_mark_has_a_reason():
    assert patches.reason_of(patches.BROKEN_MARK) == "The edits do not apply."
    assert patches.reason_of(patches.BROKEN_MARK + "\nfoo") == "foo"
    assert patches.reason_of(patches.BROKEN_MARK + "\n[1]") == "[1]"
    assert patches.reason_of(patches.BROKEN_MARK + "\n" + "[" * 100_000) is not None
    assert patches.reason_of(PATCH) is None
    assert patches.reason_of(None) is None


# --- what code may use ----------------------------------------------------------------------------


def refusal(code: str) -> str:
    with pytest.raises(BadPatch) as caught:
        patches.check(toy(net_py=TOY["net.py"] + code), TOY)
    assert "net.py, line" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ("import os\n", "`os`"),
        ("import time\n", "`time`"),
        ("import random\n", "`random`"),
        ("import numpy as np\n", "`numpy`"),
        ("def f():\n    import sys\n", "`sys`"),
        ("from os import path\n", "`os`"),
        ("from . import data\n", "relative"),
        ("from society.model import data\n", "`society.model.data`"),
        ("from society.model.train import train\n", "`society.model.train`"),
        ("from society.experiments import worker\n", "`society.experiments`"),
        ("from torch import *\n", "`*`"),
        ("from torch import load\n", "`torch.load`"),
        ("from torch import random as r\n", "`torch.random`"),
        ("import torch.multiprocessing\n", "`torch.multiprocessing`"),
        ("import torch.utils.data\n", "`torch.utils.data`"),
        ("exec('x')\n", "`exec`"),
        ("f = eval\n", "`eval`"),
        ("open('x')\n", "`open`"),
        ("__import__('os')\n", "`__import__`"),
        ("globals()\n", "`globals`"),
        ("setattr(torch, 'x', 1)\n", "`setattr`"),
        ("getattr(torch, 'lo' + 'ad')\n", "literal"),
        ("getattr(torch, '_C')\n", "literal"),
        ("getattr(torch, 'manual_seed')\n", "literal"),
        ("x = __builtins__\n", "`__builtins__`"),
        ("x = ().__class__\n", "`.__class__`"),
        ("x = (lambda: 0).__globals__\n", "`.__globals__`"),
        ("torch.load('x')\n", "`torch.load`"),
        ("torch.manual_seed(1)\n", "`torch.manual_seed`"),
        ("torch.cuda.manual_seed(1)\n", "`torch.cuda.manual_seed`"),
        ("torch.Generator()\n", "`torch.Generator`"),
        ("torch.set_num_threads(8)\n", "`torch.set_num_threads`"),
        ("torch._C._foo()\n", "`torch._C`"),
        ("torch.os.environ\n", "`torch.os`"),
        ("import typing\ntyping.sys\n", "`typing.sys`"),
        ("import dataclasses as d\nd.sys.modules\n", "`dataclasses.sys`"),
        ("from society.model import ops\nops.torch.load('x')\n", "load`"),
        ("x = torch.randn(2)\nx.tofile('y')\n", "`.tofile`"),
        ("torch.relu = None\n", "`torch.relu`"),
        ("torch.nn.functional.relu = None\n", "`torch.nn.functional.relu`"),
        ("from society.model import ops\nops.EPS = 1.0\n", "`ops.EPS`"),
        ("from society.model import ops\nops.TABLE['x'] += 1.0\n", "`ops.TABLE['x']`"),
        ("from torch import Tensor\nTensor.add = None\n", "`Tensor.add`"),
        ("del torch.relu\n", "`torch.relu`"),
        ("for torch.x in range(2): pass\n", "`torch.x`"),
        ("class A:\n    def __torch_function__(self): ...\n", "`__torch_function__`"),
        ("class A:\n    def __reduce__(self): ...\n", "`__reduce__`"),
        (f"x = '{'a' * 2100}'\n", "literal of 2100"),
        (f"x = b'{'a' * 2100}'\n", "literal of 2100"),
        (f"x = {list(range(300))}\n", "300 numbers"),
        (f"x = {[[i, i] for i in range(150)]}\n", "300 numbers"),
        (f"x = {1 << 70}\n", "2**64"),
    ],
)
def test_what_candidate_code_must_not_use(code, named):
    assert named in refusal(code)


@pytest.mark.parametrize(
    "code",
    [
        "import math\nfrom collections.abc import Mapping\nfrom functools import partial\n",
        "from torch import Tensor, nn\nimport torch.nn.functional as F\n",
        "from torch.optim import SGD\n",
        "from torch.optim.adamw import adamw\nfrom torch.autograd import Function\n",
        "from society.model import ops, schedule\nfrom society.model.recipe import Recipe\n",
        "class Net(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.weight = torch.nn.Parameter(torch.zeros(2))\n"
        "    def forward(self, x):\n        self.last = x\n        return x @ self.weight\n",
        "def f(input, compile_time, x):\n    x[0] = 1\n    x.grad = None\n"
        "    return hasattr(x, 'grad')\n",
        "@torch.no_grad()\ndef step(p, g):\n    p.add_(g, alpha=-0.1)\n",
        f'def f():\n    """{"long " * 1000}"""\n',
        "TABLE = ((1.0, 2.0), (3.0, 4.0))\n__all__ = ['twice']\n",
        "class S:\n    __slots__ = ('a',)\n    def __call__(self, x): return x\n",
    ],
)
def test_what_candidate_code_may_use(code):
    patches.check(toy(net_py=TOY["net.py"] + code), TOY)


def test_what_the_task_itself_uses_may_stay_and_move():
    sources = {"init.py": (MODEL / "init.py").read_text()}
    moved = sources["init.py"].replace(
        "torch.Generator().manual_seed(_key(seed, name))",
        "(\n        torch.Generator().manual_seed(_key(seed, name))\n    )",
    )
    assert moved != sources["init.py"]
    patches.check({"init.py": moved + "\nX = 1\n"}, sources)
    again = moved + "\nY = torch.Generator().manual_seed(1)\n"
    with pytest.raises(BadPatch, match="Generator"):
        patches.check({"init.py": again}, sources)


def test_the_trainer_itself_passes():
    empty = ast.parse("")
    for name, text in TRAINER.items():
        assert coderules.violations(ast.parse(text), empty, patches.TRAINER, TRAINER) == [], name


def test_a_script_may_use_what_it_likes_but_must_parse():
    after = toy(net_py="import os\nos.system('true')\n")
    patches.check(after, TOY, Rules.none())
    with pytest.raises(BadPatch, match="line 1"):
        patches.check(toy(net_py="def f(:\n"), TOY, Rules.none())


def test_a_task_names_its_rules():
    class Script:
        rules = Rules.none()

    assert patches.rules_of(Script()) == Rules.none()
    assert patches.rules_of(object()) == patches.TRAINER


def test_many_violations_are_one_short_message():
    message = refusal("\n".join(f"import bad{i}" for i in range(50)))
    assert "and 45 more" in message


# --- how large a change is ------------------------------------------------------------------------


def test_summary_counts_code_lines_only():
    after = edited(
        (
            "net.py",
            "    # a comment\n    return 2 * x",
            "    # another\n\n    y = 2 * x\n    return y",
        ),
        (
            "net.py",
            "def once(x):\n    return x\n",
            "class A:\n    def b(self):\n        return 1\n",
        ),
        ("notes.txt", "two", "2"),
    )
    found = patches.summary(TOY, after)
    assert found.files == ("net.py", "notes.txt")
    assert found.functions == ("net.py:A", "net.py:A.b", "net.py:once", "net.py:twice")
    assert (found.added, found.removed, found.net) == (6, 4, 2)


def test_summary_of_a_comment_is_nothing():
    after = edited(("net.py", "# a comment", "# another comment"))
    assert patches.summary(TOY, after) == patches.Summary(0, 0, (), ())


def test_lines_of_code():
    assert patches.lines(TOY) == 1 + 2 + 2 + 3
    assert patches.lines(edited(("net.py", "def once(x):\n    return x\n", ""))) == 6


# --- what two codes mean to the search ------------------------------------------------------------

TASK = load_task("synthetic", "quick")
SPACE = Space.of(TASK)
FIRST = patches.canonical(TOY, edited(("net.py", "2 * x", "3 * x")))
SAME = patches.canonical(TOY, edited(("net.py", "2 * x", "3 * x  # thrice")))
OTHER = patches.canonical(TOY, edited(("net.py", "2 * x", "4 * x")))


def test_another_code_is_another_idea_and_another_text_is_not():
    champion = SPACE.variant(TASK.key, {"lr": 0.1})
    first, same, other = (SPACE.variant(TASK.key, {"lr": 0.1}, p) for p in (FIRST, SAME, OTHER))
    near = Neighbourhood(SPACE)
    near.add("champion", champion)
    near.add("first", first)
    assert near.within(same) == ("first",)
    assert near.within(other) == ()
    assert near.nearest(other, 5, 0.5) == ()
    assert SPACE.distance(first, same) == 0
    assert SPACE.distance(first, other) == SPACE.distance(first, champion) == 1
    assert not SPACE.near(first, champion)
    assert exchange.differing(first, same) == frozenset()
    assert exchange.differing(first, other) == {"patch"}


def test_what_failed_with_other_code_is_no_evidence():
    base = Variant(TASK.key)
    changes = Changes(SPACE)
    changes.add("failed", SPACE.variant(TASK.key, {"lr": 0.2}), base)
    changes.add("with first", SPACE.variant(TASK.key, {"lr": 0.2}, FIRST), base)

    def found(patch: str | None) -> list[str]:
        asked = SPACE.variant(TASK.key, {"lr": 0.2}, patch)
        return [one.key for one in changes.repeated(asked, base, 0.1)]

    assert found(None) == ["failed"]
    assert found(SAME) == ["with first"]
    assert found(OTHER) == []


def test_the_search_carries_the_champions_code_along():
    champion = SPACE.variant(TASK.key, {"lr": 0.1}, FIRST)
    results = [Result(SPACE.variant(TASK.key, {"lr": 0.01 * n}), 0.1) for n in range(2, 30)]
    results += [Result(SPACE.variant(TASK.key, {"lr": 0.01 * n}, SAME), 1.0 + n) for n in (2, 3)]
    for entropy in range(12):
        known = Knowledge(
            space=SPACE, direction=TASK.direction, task=TASK.key, champion=champion,
            champion_score=3.0, results=tuple(results), pending=(), noise_sd=0.1, entropy=entropy,
        )  # fmt: skip
        proposal = asyncio.run(SearchBrain().propose(known))
        assert proposal.variant.code == champion.code
        assert proposal.variant.fingerprint not in {one.variant.fingerprint for one in results}
    assert with_champions_code(known).tried == 2
    assert best_of(with_champions_code(known)).code == champion.code


# --- what is run ----------------------------------------------------------------------------------


def test_no_run_can_depend_on_what_the_digest_does_not_count():
    one = toy(net_py=TOY["net.py"].replace("2 * x", "3 * x"))
    other = toy(net_py=one["net.py"].replace("Doubles.", "Trebles.").replace("a comment", "b\n"))
    assert patches.digest(one) == patches.digest(other)
    assert one != other
    assert patches.executed(one, TOY)[0] == patches.executed(other, TOY)[0]


def test_what_is_run_names_the_lines_of_its_author():
    files = toy(net_py=TOY["net.py"].replace("2 * x", "3 * x"))
    texts, rows = patches.executed(files, TOY)
    ours, theirs = texts["net.py"].split("\n"), files["net.py"].split("\n")
    row = next(row for row, line in enumerate(ours, 1) if "3 * x" in line)
    assert "3 * x" in theirs[rows["net.py"][row] - 1]
    assert list(rows) == ["net.py"]
    assert texts["notes.txt"] == files["notes.txt"]


def test_code_of_the_task_itself_is_run_as_it_is():
    files = toy(net_py=TOY["net.py"].replace("Doubles.", "Trebles."))
    assert patches.executed(files, TOY) == (TOY, {})
