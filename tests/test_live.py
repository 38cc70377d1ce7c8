"""The live view and the plain lines, on the notebook of a real small society."""

import io
import time
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from society import live
from society.agents.laboratory import Doing
from society.cli_common import opened
from society.experiments import gate
from society.records import Decision, Effect, Usage, Variant, Verdict
from society.roles import BudgetLeft, Charter, View


class StillLaboratory:
    """A laboratory in which nothing happens: what the displays read, and no more."""

    def __init__(self, notebook, agents=4):
        self.notebook, self.ledger = notebook, notebook.ledger
        self.record, self.task = notebook.record, notebook.task
        self.brain = SimpleNamespace(name="search")
        self.executor = SimpleNamespace(slots=2, busy_s=0.0)
        self.settings = SimpleNamespace(runs=60, minutes=None)
        self.draining = False
        self.views = 0
        now = time.monotonic()
        self.doing = {f"a{number:02d}": Doing(since=now) for number in range(2, agents + 1)}
        self.doing["a01"] = Doing("verifier", "verify", "seed 3 of c0001", now - 5)

    @property
    def wall_s(self):
        return self.record.wall_s + 10.0

    def budget(self):
        return BudgetLeft(40, 20, 60)

    def view(self):
        self.views += 1
        return View(
            self.ledger,
            scope=self.notebook.scope,
            society=self.record.id,
            task=self.task,
            space=self.notebook.space,
            charter=Charter(),
            budget=self.budget(),
            entropy=0,
        )


@contextmanager
def still(lab, agents=4):
    with opened(lab) as notebook:
        yield StillLaboratory(notebook, agents)


def a_claim(identity, verdict=None):
    return SimpleNamespace(
        id=identity,
        variant=Variant("synthetic/quick", {"lr": 0.1, "depth": 3}),
        reference=Variant("synthetic/quick", {"depth": 3}),
        verdict=verdict,
    )


def an_assessment(n=3, log_e=2.0, p=0.75):
    return gate.Assessment(gate.Next.CONTINUE, n, 0.02, log_e, log_e, log_e, 3.0, p, "more")


def busy_snapshot(lab):
    """The snapshot of a finished society with claims put under test."""
    with still(lab) as laboratory:
        found = live.Watch(laboratory).snapshot()
        progress = live.Watch(laboratory).progress()
    effect = Effect(0.03, 0.02, 0.01, 0.05, 8)
    verdict = Verdict("c0009", Decision.REJECTED, -1.0, effect, "rejected: e = 0.37", (), "a02")
    return replace(
        found,
        under_test=tuple(
            live.UnderTest(a_claim(f"c{number:04d}"), an_assessment()) for number in range(10, 15)
        ),
        closed=(*found.closed, a_claim("c0009", verdict)),
    ), progress


def draw(screen, width, height):
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    console.print(screen)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (100, 30), (140, 40), (200, 60), (60, 20)])
def test_the_screen_fits_and_says_what_matters(small_lab, width, height):
    notebook, progress = busy_snapshot(small_lab)
    lines = draw(live.Screen(notebook, progress), width, height)
    text = "\n".join(lines)
    assert len(lines) < height
    assert max(map(len, lines)) <= width
    for words in (
        "Society s001", "Champion", "Noise", "2 slots", "40 runs done, 20 left", "verifier verify",
        "Claims under test", "c0010", "e=7.39 of 20.1", "p(accept) 0.75", "c0009 rejected",
    ):  # fmt: skip
        assert words in text, words


def test_many_agents_are_summed_up_with_the_busy_ones_first(small_lab):
    with still(small_lab, agents=200) as laboratory:
        watch = live.Watch(laboratory)
        lines = draw(live.Screen(watch.snapshot(), watch.progress()), 80, 24)
    assert len(lines) < 24
    assert lines[5].startswith("a01  verifier")
    assert any("more" in line for line in lines)


def test_nothing_is_read_again_until_something_is_written(small_lab):
    with still(small_lab) as laboratory:
        watch = live.Watch(laboratory)
        assert watch.snapshot() is watch.snapshot()
        assert laboratory.views == 1


def test_time_left_is_the_shorter_of_clock_and_pace(small_lab):
    with still(small_lab) as laboratory:
        progress = live.Progress.of(laboratory)
    assert progress.eta_s == pytest.approx(progress.wall_s / 40 * 20)
    clocked = replace(progress, budget=BudgetLeft(40, 20, 60, seconds=1.0))
    assert clocked.eta_s == 1.0
    assert replace(progress, limited=False).eta_s is None
    assert "end unknown" in live.work_text(replace(progress, limited=False))


def test_an_empty_notebook_is_shown_too(small_lab):
    notebook, progress = busy_snapshot(small_lab)
    empty = replace(
        notebook, mean=None, gain=None, noise=None, under_test=(), closed=(), insights=(), runs=()
    )
    text = "\n".join(draw(live.Screen(empty, progress), 80, 24))
    assert "being measured" in text
    assert "none" in text


def test_hostile_text_cannot_reach_the_terminal(small_lab):
    notebook, progress = busy_snapshot(small_lab)
    insight = SimpleNamespace(text="clear\x1b[2J [bold]all[/bold]\nnow")
    text = "\n".join(draw(live.Screen(replace(notebook, insights=(insight,)), progress), 80, 24))
    assert "\x1b" not in text
    assert "[bold]all[/bold] now" in text


def test_live_display_draws_at_its_own_pace(small_lab):
    console = Console(width=80, height=24, file=io.StringIO(), force_terminal=True, record=True)
    display = live.LiveDisplay(console)
    with still(small_lab) as laboratory:
        display.start(laboratory)
        for _ in range(50):
            display.show(laboratory)
        drawn = console.file.getvalue().count("Society s001")
        display.stop()
    assert drawn == 1
    assert "Claims under test" in console.export_text()


def test_displays_may_be_stopped_before_they_started():
    live.LiveDisplay(Console(file=io.StringIO())).stop()
    live.PlainDisplay(io.StringIO()).stop()


def test_plain_lines_tell_only_what_is_new(small_lab):
    stream = io.StringIO()
    display = live.PlainDisplay(stream, every_s=3600)
    with still(small_lab) as laboratory:
        display.start(laboratory)
        for _ in range(5):
            display.show(laboratory)
        quiet = stream.getvalue().splitlines()
        display._known.clear()
        display.show(laboratory)
        display.stop()
    assert len(quiet) == 1
    assert quiet[0].startswith("society s001: 4 agents on synthetic/quick, 2 training slots")
    told = stream.getvalue().splitlines()[1:]
    assert sum(line.startswith("noise floor: ") for line in told) == 1
    assert sum(line.startswith("champion #") for line in told) == 1
    assert told[-1].startswith("1") or "slots" in told[-1]


def test_plain_progress_comes_regularly(small_lab):
    stream = io.StringIO()
    display = live.PlainDisplay(stream, every_s=0.0)
    with still(small_lab) as laboratory:
        display.start(laboratory)
        display.show(laboratory)
        display.show(laboratory)
    assert stream.getvalue().count("2 slots") == 2


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0s"), (59.4, "59s"), (61, "1m01s"), (3599.9, "1h00m"), (7320, "2h02m")],
)
def test_clock(seconds, words):
    assert live.clock(seconds) == words


def test_changes_against_the_reference():
    lr = Variant("t", {"lr": 0.1, "depth": 3})
    assert live.changed(lr, Variant("t", {"depth": 3})) == "lr=0.1"
    assert live.changed(Variant("t"), lr) == "-depth, -lr"
    assert live.changed(lr, lr) == "no change"
    assert live.changed(Variant("t", {}, "diff"), Variant("t")) == "patch"


def test_models_are_shown_when_they_were_asked(small_lab):
    notebook, progress = busy_snapshot(small_lab)
    assert "Models" not in "\n".join(draw(live.Screen(notebook, progress), 100, 30))
    used = Usage(12, 2, 3, 9000, 500, 0.31)
    asked = replace(progress, usage=used, brain_status="endpoint down, search goes on")
    lines = draw(live.Screen(notebook, asked), 120, 30)
    (told,) = [line for line in lines if line.startswith("Models")]
    assert "12 calls (2 failed, 3 from the cache), 9500 tokens, $0.31" in told
    assert "endpoint down" in told
    with still(small_lab) as laboratory:
        laboratory.brain.status = "open\x1b[2J \u202e[red]circuit"
        assert live.Progress.of(laboratory).brain_status == "open [red]circuit"
