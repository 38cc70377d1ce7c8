"""Other files in place of a package's modules: what is replaced, what stays, what is refused."""

import os
import subprocess
import sys
from pathlib import Path

from society.experiments.pretrain import EDITABLE, Pretrain

PRELUDE = """
import sys
from pathlib import Path
from society.experiments import adopt
from society.experiments.pretrain import EDITABLE, PACKAGE, Pretrain
import numpy
from society.model.data import TrainTokens
task = Pretrain("cpu")
task.warm_up()
text = (numpy.random.default_rng(1).zipf(1.3, 50_000) % 1024).astype(numpy.uint16)
task._train[1024] = TrainTokens(text, 1024, "test")
code, scratch = Path(sys.argv[1]), Path(sys.argv[2])
"""


def write(folder: Path, **changes: tuple[str, str]) -> Path:
    """The editable files, some with one place replaced."""
    folder.mkdir()
    for name, text in Pretrain("cpu").sources().items():
        old, new = changes.get(Path(name).stem, ("", ""))
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1) if old else text)
    return folder


def child(tmp_path: Path, code: str, **changes: tuple[str, str]) -> list[str]:
    """What a process of its own prints that runs `code`."""
    write(tmp_path / "code", **changes)
    return run(tmp_path, code)


def run(tmp_path: Path, code: str) -> list[str]:
    """The same, with what lies in the folder `code`."""
    folder, scratch = tmp_path / "code", tmp_path / "scratch"
    scratch.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, folder, scratch],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


SAMPLES = """
recipe = task.baseline.model_copy(update={"depth": 2, "dim": 64, "heads": 2})
print(task.sample(recipe, 1, scratch, "cpu").replace(" ", "-"))
for folder in sorted(code.iterdir()):
    task.adopt(folder)
    print(task.sample(recipe, 1, scratch, "cpu").replace(" ", "-"))
"""


def test_unmodified_files_train_to_the_same_bits_and_a_change_of_any_is_live(tmp_path):
    changes = {
        "attention": ("scale=recipe.qk_scale * ", "scale=1.1 * recipe.qk_scale * "),
        "gpt": ("x0 = fixed.ops.norm(", "x0 = 1.1 * fixed.ops.norm("),
        "init": ("HEAD_SD = 0.001", "HEAD_SD = 0.002"),
        "optim": ("ADAM_EPS = 1e-10", "ADAM_EPS = 1e-3"),
        "schedule": ("return 1 - progress", "return 1 - progress / 2"),
    }
    assert tuple(changes) == EDITABLE
    (tmp_path / "code").mkdir()
    write(tmp_path / "code" / "0-unmodified")
    for name, change in changes.items():
        write(tmp_path / "code" / name, **{name: change})
    before, same, *others = run(tmp_path, SAMPLES)
    assert len(before) == 64
    assert before == same
    assert len({before, *others}) == 6
    assert not list(tmp_path.rglob("*.pyc"))


def test_data_modules_and_their_objects_stay(tmp_path):
    told = child(
        tmp_path,
        """
from society.model import data, evaluate, gpt, init, recipe, train
import society.model, time
task.adopt(code)
from society.model import data as d, evaluate as e, gpt as g, recipe as r, train as t
print(d is data, r is recipe, g is gpt, t is train, e is evaluate)
print(t.gpt is g, society.model.gpt is g, isinstance(task.baseline, r.Recipe))
print(Path(g.__file__) == code / "gpt.py")
print(sum(isinstance(f, adopt._Finder) for f in sys.meta_path))
""",
    )
    assert told == [*["True"] * 2, *["False"] * 3, *["True"] * 4, "1"]


def test_broken_files_say_so(tmp_path):
    told = child(
        tmp_path,
        """
try:
    task.adopt(code)
except SyntaxError as error:
    print(Path(error.filename) == code / "gpt.py")
""",
        gpt=('"""The model', 'not python\n"""The model'),
    )
    assert told == ["True"]


def test_files_that_may_not_be_replaced_are_refused(tmp_path):
    told = child(
        tmp_path,
        """
(code / "evaluate.py").write_text("")
for package, path in ((PACKAGE, code), ("society.roles", code)):
    try:
        adopt.adopt(package, path)
    except adopt.NotAdoptable as error:
        print(str(error).split()[0])
""",
    )
    assert told == ["evaluate:", "society.roles:"]


def test_adopting_is_quick(tmp_path):
    """Milliseconds, of which nobody pays for more than a few; generous for a busy machine."""
    (seconds,) = child(
        tmp_path,
        """
import time
started = time.process_time()
task.adopt(code)
print(time.process_time() - started)
""",
    )
    assert float(seconds) < 0.2


def test_a_step_is_charged_by_what_it_multiplies(tmp_path):
    told = child(
        tmp_path,
        """
import dataclasses
from society.model import flops
recipe = task.baseline
print(task._step_flops(recipe, "cpu"))
yard = task.measure(recipe, task.budget, "cpu")
print(yard.steps, 0.5 < yard.cpu_s < 60)
plain = flops.flops_per_step(recipe)
task.adopt(code, yard)
charged = task._step_flops(recipe, "cpu")
print(1.05 < charged / plain < 1.6)
for before in (1.0, charged):
    task.adopt(code, dataclasses.replace(yard, charged_flops=before))
    print(task._step_flops(recipe, "cpu") == max(plain, before))
""",
        gpt=(
            '    return F.linear(active, weights[layer + "contract"])',
            '    twice = F.linear(active, weights[layer + "contract"])\n'
            '    return (twice + F.linear(active, weights[layer + "contract"])) / 2',
        ),
    )
    assert told == ["None", "107", "True", "True", "True", "True"]


def test_the_text_of_the_corpus_is_hidden():
    """The corpus' own text, which holds all splits, is found without importing its package."""
    (hidden,) = Pretrain("cpu").access.hidden
    assert (hidden / "data" / "kjv.jsonl").is_file()
    assert "bible" not in sys.modules
