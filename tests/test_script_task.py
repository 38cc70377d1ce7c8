"""The task `script`: a repository becomes a task by a short file, and stays inside its sandbox."""

import asyncio
import json
import os
import shutil
import socket
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from society.errors import SocietyError, UsageError
from society.experiments import Diverged, InlineExecutor, Refused, load_task, patches, sandbox
from society.experiments.local import LocalExecutor
from society.experiments.provenance import profile_digest, profile_text
from society.experiments.space import Space
from society.records import Budget, BudgetKind, Outcome, Split, Variant, Work

LOOP = Path(__file__).parent / "data" / "loop"
TASK = LOOP / "task.yaml"
CONFINES = sandbox.best_for_commands().rank >= sandbox.Level.FILTERS.rank
confined = pytest.mark.skipif(not CONFINES, reason="no sandbox for commands on this machine")

PLAIN = """
task: script
name: mine
budget: {kind: steps, amount: 5}
limits: {timeout_s: 20, mem_bytes: 0}
options:
  files: [train.py, fixed.py]
  editable: [train.py]
  command: "{python} train.py {seed}"
  metric: {name: loss, regex: '^loss (\\S+)'}
"""


@pytest.fixture
def repo(tmp_path):
    """A repository with one editable and one fixed file; write `train.py` by calling it."""

    def build(train="print('loss', 1.5)", profile=PLAIN, **options):
        home = tmp_path / "repo"
        home.mkdir(exist_ok=True)
        (home / "train.py").write_text(train)
        (home / "fixed.py").write_text("VALUE = 2.5\n")
        values = yaml.safe_load(profile)
        values["options"] |= options
        path = home / "mine.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    return build


def measure(path, tmp_path, split=Split.VALIDATION, seed=1, data_seed=None, budget=None, **knobs):
    """One run in this process; whatever it raises comes through."""
    task = load_task("script", str(path))
    scratch = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    scratch.mkdir()
    recipe = task.recipe(**knobs)
    report = task.train(recipe, seed, budget or task.budget, scratch, "cpu", data_seed=data_seed)
    assert report.train_s > 0
    return task.score(scratch, recipe, split, "cpu")


@asynccontextmanager
async def started(path, **more):
    executor = LocalExecutor("script", str(path), slots=1, **more)
    try:
        await executor.start()
        yield executor
        await executor.close()
    finally:
        executor.kill()


def work(task, variant=None, seed=1, run="r1"):
    return Work(run, variant or Variant(task.key), seed, Split.VALIDATION, task.budget)


def edited(task, old, new, file="train.py"):
    sources = task.sources()
    changed = patches.apply_edits(sources, [patches.Edit(file, old, new)])
    return Variant(task.key, patch=patches.canonical(sources, changed))


# ------------------------------------------------------------------ what it is


def test_a_repository_becomes_a_task_by_a_short_file():
    assert len(TASK.read_text().splitlines()) <= 20
    task = load_task("script", str(TASK))
    assert (task.key, task.metric, task.unit) == ("script/loop", "val_bpb", "BPB")
    space = Space.of(task)
    assert list(space.knobs) == ["lr", "momentum"]
    assert space.default("lr") == 0.01
    assert space.knobs["lr"].log
    assert list(task.sources()) == ["train.py"]


def test_the_recorded_profile_makes_the_same_task_anywhere(tmp_path):
    task = load_task("script", str(TASK))
    text = profile_text(task)
    (tmp_path / "elsewhere.yaml").write_text(text)
    again = load_task("script", str(tmp_path / "elsewhere.yaml"))
    assert profile_text(again) == text
    assert (again.folder, again.baseline.model_dump()) == (LOOP, task.baseline.model_dump())
    changed = text.replace("{python} train.py", "{python} -B train.py")
    (tmp_path / "other.yaml").write_text(changed)
    other = load_task("script", str(tmp_path / "other.yaml"))
    assert profile_digest(other) != profile_digest(task)


def test_the_caveats_say_what_a_reader_must_know(repo):
    own = " ".join(load_task("script", str(repo())).caveats)
    assert "script's own word" in own
    assert "no separate holdout" in own
    assert "not measured" in own
    scored = repo(score="{python} fixed.py {split}")
    told = " ".join(load_task("script", str(scored)).caveats)
    assert "beside the changed files" in told
    assert "no separate holdout" not in told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"comand": "x"}, "unknown key 'comand'; did you mean 'command'?"),
        ({"folder": "nowhere"}, "there is no folder"),
        ({"editable": ["model.py"]}, "there is no file model.py"),
        ({"editable": ["../secret.py"]}, "'../secret.py' must lie below the folder"),
        ({"files": ["/etc/passwd"]}, "'/etc/passwd' must lie below the folder"),
        ({"files": ["nothing"]}, "there is no nothing"),
        ({"read": ["nothing"]}, "there is no"),
        ({"read": ["a/../../b"]}, "must lie below the folder"),
        ({"command": "{python} train.py {sed}"}, "unknown placeholder {sed}. Did you mean {seed}?"),
        ({"command": "{python} train.py {seed} {split}"}, "Only `score` and `metric` are told"),
        ({"command": "{python} train.py {seed"}, "write {{ for a plain brace"),
        ({"command": "{python} train.py"}, "every run would be the same one"),
        ({"command": "'"}, "No closing quotation"),
        ({"command": ""}, "it is empty"),
        ({"command": "{python} {seed:q}"}, "cannot be filled in"),
        ({"metric": {"name": "loss", "regex": "loss ("}}, "regex: missing )"),
        ({"metric": {"name": "loss", "regex": "loss"}}, "needs one group in parentheses"),
        ({"metric": {"name": "x", "regex": "(x)", "json": "a"}}, "either `regex` or `json`"),
        ({"metric": {"name": "x"}}, "either `regex` or `json`"),
        ({"metric": {"name": "x", "regex": "(x)", "key": "a"}}, "name the file by `json`"),
        ({"metric": {"name": "x", "json": "../a"}}, "must lie below the folder"),
        ({"metric": {"nam": "x", "regex": "(x)"}}, "did you mean 'name'?"),
        ({"artifacts": ["a"]}, "there is none"),
        ({"editable": []}, "nothing can be varied"),
        ({"files": "train.py"}, "expected a list"),
        ({"replace": {"fixed.py": {"a": "b"}}}, "fixed.py is not among the editable files"),
        ({"replace": {"train.py": {"absent": "b"}}}, "train.py does not contain 'absent'"),
        ({"knobs": {"lr": {"default": 1, "low": 0, "high": 2}}}, "knob 'lr' is not used"),
        ({"knobs": {"lr": {"default": 1}}}, "give `low` and `high`"),
        ({"knobs": {"lr": {"default": 3, "low": 0, "high": 2}}}, "is not from 0.0 to 2.0"),
        ({"knobs": {"lr": {"default": "a", "choices": ["b"]}}}, "none of the choices"),
        ({"knobs": {"seed": {"default": 1, "low": 0, "high": 2}}}, "the name is taken"),
        ({"knobs": {"copy": {"default": 1, "low": 0, "high": 2}}}, "the name is taken"),
        ({"knobs": {"a-b": {"default": 1, "low": 0, "high": 2}}}, "letters, digits and _"),
        ({"packages": ["../x"]}, "no name of a distribution"),
    ],
)
def test_every_mistake_in_the_file_is_one_clear_line(repo, change, words):
    path = repo(**change)
    with pytest.raises(UsageError) as caught:
        load_task("script", str(path))
    assert words in str(caught.value)
    assert "mine.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_link_out_of_the_repository_is_not_editable(repo, tmp_path):
    path = repo()
    (tmp_path / "secret.py").write_text("x = 1")
    (path.parent / "train.py").unlink()
    (path.parent / "train.py").symlink_to(tmp_path / "secret.py")
    with pytest.raises(UsageError, match=r"there is no file train.py"):
        load_task("script", str(path))


def test_limits_must_leave_room_for_the_budget(repo):
    text = PLAIN.replace("kind: steps, amount: 5", "kind: seconds, amount: 50")
    with pytest.raises(UsageError, match=r"less than the budget of 50 s"):
        load_task("script", str(repo(profile=text)))


def test_a_numeric_knob_takes_the_type_of_its_values(repo):
    path = repo(
        command="{python} train.py {seed} {a} {b} {c} {d}",
        knobs={
            "a": {"default": 1, "low": 1, "high": 9},
            "b": {"default": 1, "low": 0.5, "high": 9},
            "c": {"default": "1e-3", "low": 1e-4, "high": 1, "log": True},
            "d": {"default": "x", "choices": ["x", "y"]},
        },
    )
    space = Space.of(load_task("script", str(path)))
    defaults = [space.default(name) for name in "abcd"]
    assert defaults == [1, 1.0, 0.001, "x"]
    assert [type(value) for value in defaults] == [int, float, float, str]


# ------------------------------------------------------------------ a run


def test_a_run_repeats_its_bits_and_depends_on_seed_and_knobs(tmp_path):
    first = measure(TASK, tmp_path, seed=3)
    assert measure(TASK, tmp_path, seed=3) == first
    assert measure(TASK, tmp_path, seed=4) != first
    assert measure(TASK, tmp_path, seed=3, lr=0.05) < first


def test_placeholders_reach_command_environment_and_code(repo, tmp_path):
    code = (
        "import os, sys\nRATE = 0.5\n"
        "print('loss', float(sys.argv[1]) + 10 * float(os.environ['N']) + 100 * RATE)\n"
    )
    path = repo(
        code,
        env={"N": "{steps}"},
        replace={"train.py": {"RATE = 0.5": "RATE = {rate}"}},
        knobs={"rate": {"default": 0.5, "low": 0, "high": 9.5}},
    )
    assert measure(path, tmp_path, seed=7, rate=2.0) == 7 + 50 + 200


def test_a_second_seed_is_passed_where_the_script_takes_one(repo, tmp_path):
    path = repo(
        "import sys; print('loss', sys.argv[1] + '.' + sys.argv[2])",
        command="{python} train.py {seed} {data_seed}",
    )
    assert measure(path, tmp_path, seed=4, data_seed=9) == 4.9
    assert measure(path, tmp_path, seed=4) == 4.4
    with pytest.raises(Refused, match="no second seed"):
        measure(repo(), tmp_path, seed=4, data_seed=9)


def test_the_last_match_counts_and_carriage_returns_end_lines(repo, tmp_path):
    code = "print('loss 9'); print('step\\rloss 3\\rloss 2.25', end=''); print()"
    assert measure(repo(code), tmp_path) == 2.25


def test_the_metric_from_a_json_file_by_split(repo, tmp_path):
    code = "import json; json.dump({'a': [{'val': 1.5, 'test': 2.5}]}, open('out.json', 'w'))"
    path = repo(
        code,
        metric={"name": "loss", "json": "out.json", "key": "a.0.{split}"},
        splits={"validation": "val", "holdout": "test"},
    )
    assert measure(path, tmp_path) == 1.5
    assert measure(path, tmp_path, Split.HOLDOUT) == 2.5
    assert "holdout" not in " ".join(load_task("script", str(path)).caveats)


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("print('nothing here')", SocietyError, r"matches .*it ends with: nothing here"),
        ("", SocietyError, "nothing was printed"),
        ("print('loss abc')", SocietyError, "'abc' is no number"),
        ("print('loss nan')", Diverged, "loss is nan"),
        ("print('loss 1'); raise SystemExit('no luck')", SocietyError, "code 1.*no luck"),
        ("print('loss 1'); open('fixed.py', 'w').write('')", Refused, "changed fixed.py"),
        ("import os; print('loss 1'); os.remove('fixed.py')", Refused, "changed fixed.py"),
    ],
)
def test_what_goes_wrong_in_a_run_is_said(repo, tmp_path, code, error, words):
    with pytest.raises(error, match=words):
        measure(repo(code), tmp_path)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("", "no out.json was written"),
        ("open('out.json', 'w').write('{')", "cannot be read"),
        ("open('out.json', 'w').write('{\"b\": 1}')", "has no loss; there is b"),
        ("open('out.json', 'w').write('{\"loss\": [1]}')", "is no number"),
        ("import os; os.symlink('/etc/hostname', 'out.json')", "out.json"),
        ("import os; os.mkdir('out.json')", "no plain file"),
    ],
)
def test_a_json_file_that_is_none(repo, tmp_path, code, words):
    path = repo(code, metric={"name": "loss", "json": "out.json", "key": "loss"})
    with pytest.raises((SocietyError, Refused), match=words):
        measure(path, tmp_path)


def test_a_run_over_its_seconds_is_stopped_and_refused(repo, tmp_path):
    text = PLAIN.replace("kind: steps, amount: 5", "kind: seconds, amount: 0.2")
    path = repo("import time; time.sleep(60)", profile=text, extra_s=1.0)
    with pytest.raises(Refused, match=r"the budget of 0.2 s allows 1.2 s"):
        measure(path, tmp_path)


def test_the_scoring_command_is_apart_from_the_training(repo, tmp_path):
    train = (
        "import os\n"
        "open('model.txt', 'w').write('3')\n"
        "open('fixed.py', 'w').write('VALUE = -100')\n"
        "print(os.path.exists('answers.txt'))\n"
        "print('loss -50')\n"
    )
    path = repo(
        train,
        files=["train.py", "fixed.py", "evaluate.py"],
        score="{python} evaluate.py {split}",
        artifacts=["model.txt"],
        score_read=["answers.txt"],
    )
    (path.parent / "answers.txt").write_text("0.125")
    (path.parent / "evaluate.py").write_text(
        "import sys, fixed\n"
        "value = sum(float(open(name).read()) for name in ('model.txt', 'answers.txt'))\n"
        "print('loss', value + fixed.VALUE + (100 if sys.argv[1] == 'holdout' else 0))\n"
    )
    assert measure(path, tmp_path) == 5.625
    assert measure(path, tmp_path, Split.HOLDOUT) == 105.625


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("pass", SocietyError, "left no model.txt"),
        ("import os; os.symlink('/etc/hostname', 'model.txt')", Refused, "model.txt cannot be"),
        ("import os; os.symlink('/etc', 'model.txt')", Refused, "model.txt cannot be"),
        ("import os; os.mkdir('model.txt')", SocietyError, "scoring command ended with code 1"),
    ],
)
def test_what_the_training_leaves_is_taken_with_tongs(repo, tmp_path, code, error, words):
    path = repo(
        code, score="{python} -c \"print('loss', len(open('model.txt').read()))\"",
        artifacts=["model.txt"],
    )  # fmt: skip
    with pytest.raises(error, match=words):
        measure(path, tmp_path)


def test_the_shipped_evaluation_of_the_small_loop(tmp_path):
    home = tmp_path / "loop"
    shutil.copytree(LOOP, home)
    values = yaml.safe_load(TASK.read_text())
    del values["options"]["files"]
    values["options"] |= {
        "score": "{python} evaluate.py {split}",
        "artifacts": ["weights.npy"],
        "metric": {"name": "val_bpb", "json": "score.json", "key": "eval.bpb"},
        "splits": {"validation": "val", "holdout": "test"},
    }
    (home / "scored.yaml").write_text(yaml.safe_dump(values))
    runs = tmp_path / "runs"
    runs.mkdir()
    own = measure(TASK, runs, seed=3)
    assert measure(home / "scored.yaml", runs, seed=3) == pytest.approx(own, abs=1e-6)
    assert measure(home / "scored.yaml", runs, Split.HOLDOUT, seed=3) != own


# ------------------------------------------------------------------ what it may touch


@confined
def test_a_script_reaches_no_network_and_no_file_of_others(repo, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("42")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"""
import socket, pathlib
found = 0
try:
    socket.create_connection(("127.0.0.1", {port}), 2); found += 1
except OSError: pass
try:
    pathlib.Path({str(secret)!r}).read_text(); found += 10
except OSError: pass
for place in ({str(tmp_path)!r}, "..", {str(Path.home())!r}):
    try:
        pathlib.Path(place, "left.txt").write_text("x"); found += 100
    except OSError: pass
print("loss", found)
"""
        assert measure(repo(code), tmp_path) == 0
    allowed = repo(f"print('loss', open({str(secret)!r}).read())", read=[str(secret)])
    assert measure(allowed, tmp_path) == 42


def test_the_environment_holds_no_key(repo, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    code = "import os; print('loss', sum('sk-secret' in v for v in os.environ.values()))"
    assert measure(repo(code), tmp_path) == 0


def test_data_is_read_in_place_and_counts_for_the_hash(repo, tmp_path):
    path = repo("print('loss', open('data/x.txt').read())", read=["data"])
    with pytest.raises(UsageError, match="there is no"):
        load_task("script", str(path))
    (path.parent / "data").mkdir()
    (path.parent / "data/x.txt").write_text("4")
    before = load_task("script", str(path)).prepare()
    assert measure(path, tmp_path) == 4
    (path.parent / "data/x.txt").write_text("5")
    task = load_task("script", str(path))
    assert task.prepare() != before
    (path.parent / "fixed.py").write_text("VALUE = 0\n")
    assert load_task("script", str(path)).prepare() != task.prepare()


def test_runs_are_made_with_the_repository_as_it_was_at_the_start(repo, tmp_path):
    path = repo()
    task = load_task("script", str(path))
    task.warm_up()
    (path.parent / "train.py").write_text("print('loss 7')")
    scratch = tmp_path / "run"
    scratch.mkdir()
    task.train(task.baseline, 1, task.budget, scratch, "cpu")
    assert task.score(scratch, task.baseline, Split.VALIDATION, "cpu") == 1.5


def test_a_notebook_and_hidden_files_are_never_copied(repo, tmp_path):
    code = "import os; print('loss', sum(len(files) for _, _, files in os.walk('.')))"
    path = repo(code, files=None)
    for name in (".env", ".git/config", "lab/ledger.sqlite", "__pycache__/x.pyc", "more.txt"):
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).write_text("x")
    shutil.rmtree(path.parent / ".git")
    assert measure(path, tmp_path) == 4  # train.py, fixed.py, mine.yaml, more.txt


def test_too_much_to_copy_is_said(repo, monkeypatch):
    monkeypatch.setattr("society.experiments.snapshot.MAX_BYTES", 10)
    with pytest.raises(UsageError, match=r"put data under `read`. Largest: "):
        load_task("script", str(repo())).warm_up()


# ------------------------------------------------------------------ code changes


def test_a_trial_finds_code_that_cannot_run(repo, tmp_path):
    task = load_task("script", str(repo("RATE = 1\nprint('loss', RATE)\n", replace={
        "train.py": {"RATE = 1": "RATE = {seed}"}})))  # fmt: skip
    own = task.sample(task.baseline, 1, tmp_path, "cpu")
    code = tmp_path / "code"
    code.mkdir()
    (code / "train.py").write_text("RATE = 1\nprint('loss', 2 * RATE)\n")
    task.adopt(code)
    assert task.sample(task.baseline, 1, tmp_path, "cpu") != own
    (code / "train.py").write_text("RATE = 1\nprint('loss'\n")
    task.adopt(code)
    with pytest.raises(SocietyError, match=r"train.py: line 2: .*never closed"):
        task.sample(task.baseline, 1, tmp_path, "cpu")
    (code / "train.py").write_text("print('loss', 2)\n")
    task.adopt(code)
    with pytest.raises(Refused, match=r"no longer contains 'RATE = 1'"):
        task.sample(task.baseline, 1, tmp_path, "cpu")


@confined
def test_changed_code_runs_in_the_workers():
    task = load_task("script", str(TASK))
    better = edited(task, "weights = 0.1 *", "weights = np.linspace(-1, 1, WIDTH) + 0.0 *")
    broken = edited(
        task, "for _ in range(STEPS):", "raise ValueError('no')\nfor _ in range(STEPS):"
    )

    async def scenario():
        async with started(TASK) as executor:
            assert executor.environment.sandbox == sandbox.best_for_commands()
            plain = await executor.run(work(task))
            again = await executor.run(work(task))
            trial = await executor.trial(better)
            changed = await executor.run(work(task, better))
            failed = await executor.run(work(task, broken))
            after = await executor.run(work(task))
            return plain, again, trial, changed, failed, after

    plain, again, trial, changed, failed, after = asyncio.run(scenario())
    assert plain.outcome is Outcome.COMPLETED, plain.log_tail
    assert plain.score == again.score == after.score
    assert plain.data_hash == task.prepare()
    assert "val_bpb:" in plain.log_tail
    assert (trial.problem, trial.same) == ("", False)
    assert changed.outcome is Outcome.COMPLETED, changed.log_tail
    assert changed.score < plain.score
    assert failed.outcome is Outcome.CRASHED
    assert "ValueError: no" in failed.log_tail


@confined
def test_a_hanging_script_is_killed_with_all_that_it_started(repo, tmp_path):
    mark = tmp_path / "repo" / "mark"
    code = (
        "import os, time\n"
        "os.fork()\n"
        f"os.write(os.open({str(mark)!r}, os.O_WRONLY), b'x')\n"
        "time.sleep(600)\n"
    )
    path = repo(code, profile=PLAIN.replace("timeout_s: 20", "timeout_s: 1"))
    task = load_task("script", str(path))

    async def scenario():
        async with started(path) as executor:
            return await executor.run(work(task))

    ended = asyncio.run(scenario())
    assert ended.outcome in (Outcome.TIMED_OUT, Outcome.CRASHED)
    assert not [line for line in processes() if "train.py" in line and str(tmp_path) in line]


def processes():
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found.append(f"{os.readlink(entry / 'cwd')} {(entry / 'cmdline').read_text()}")
            except OSError:
                continue
    return found


def test_the_inline_executor_gives_the_same_score():
    task = load_task("script", str(TASK))
    executor = InlineExecutor(task)

    async def scenario():
        await executor.start()
        return await executor.run(work(task, seed=3))

    assert asyncio.run(scenario()).outcome is Outcome.COMPLETED


# ------------------------------------------------------------------ a society


def run_society(society, lab, runs):
    done = society(
        "run", "--task", "script", "--profile", TASK, "--runs", runs, "--agents", 3, "--seed", 5,
        "--slots", 2, "--lab", lab, "--recall", "off",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    found = json.loads(society("status", "--lab", lab, "--json").out)
    assert found["task"] == "script/loop"
    return found


def test_a_society_works_on_a_script(society, tmp_path):
    found = run_society(society, tmp_path, 24)
    assert found["outcomes"]["completed"] == sum(found["outcomes"].values()) == 24
    assert found["runs"]["screening"] > 1  # the champion's own is one of them
    assert "script's own word" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.slow
def test_a_society_improves_a_script(society, tmp_path):
    found = run_society(society, tmp_path, 60)
    assert found["runs"]["screening"] > 5
    assert found["claims"].get("confirmed", 0) + found["claims"].get("accepted", 0) >= 1
    assert found["champion"]["gain"]


def test_search_without_knobs_is_a_clear_error(society, repo, tmp_path):
    done = society("run", "--task", "script", "--profile", repo(), "--lab", tmp_path / "lab")
    assert done.code == 2
    assert "declare knobs in its profile, or use --brain openai" in done.err


def test_the_command_lists_knobs_and_caveats(society):
    done = society("tasks", "script", "--profile", TASK)
    assert done.code == 0
    assert "momentum" in done.out
    assert "Mind: The score is the script's own word" in done.out
    assert "name a .yaml file by --profile" in society("tasks", "script").err


def test_the_page_shows_short_profiles_that_are_right(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "script.md").read_text()
    blocks = [part.partition("```")[0] for part in page.split("```yaml\n")[1:]]
    assert blocks
    for number, block in enumerate(blocks):
        assert len(block.splitlines()) <= 20
        home = tmp_path / str(number)
        home.mkdir()
        values = yaml.safe_load(block)
        options = values["options"]
        for name in (*options.get("files", ()), *options["editable"]):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).touch()
        for name, changes in options.get("replace", {}).items():
            (home / name).write_text("\n".join(changes))
        for key in ("read", "score_read"):
            if key in options:
                options[key] = [name.strip("~/") for name in options[key]]
                for name in options[key]:
                    (home / name).mkdir(parents=True)
        options["folder"] = "."
        (home / "task.yaml").write_text(yaml.safe_dump(values))
        task = load_task("script", str(home / "task.yaml"))
        assert task.options.editable


def test_seconds_budgets_are_passed_on(repo, tmp_path):
    text = PLAIN.replace("kind: steps, amount: 5", "kind: seconds, amount: 12")
    path = repo(
        "import sys; print('loss', sys.argv[2])", profile=text,
        command="{python} train.py {seed} {seconds}",
    )  # fmt: skip
    assert measure(path, tmp_path) == 12
    assert measure(path, tmp_path, budget=Budget(BudgetKind.SECONDS, 2.5)) == 2.5
