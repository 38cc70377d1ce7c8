"""The report: its numbers are the ledger's, its text is inert, and it never dresses anything up."""

import asyncio
import contextlib
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from society import plots
from society.cleaning import clean
from society.cli import main
from society.experiments import gate
from society.experiments.executor import InlineExecutor
from society.experiments.space import Space
from society.experiments.synthetic import Synthetic
from society.memory.ledger import Ledger
from society.records import (
    Activity,
    Call,
    Champion,
    Claim,
    Cost,
    Crown,
    Decision,
    Effect,
    Measurement,
    NewClaim,
    NewHypothesis,
    NewInsight,
    NewRefusal,
    Noise,
    Outcome,
    RefusalReason,
    Run,
    RunKind,
    Scope,
    SocietyState,
    Usage,
    Variant,
    Verdict,
    Work,
)
from society.render import render, write_report
from society.report import Confinement, build_report
from society.wording import (
    change_text,
    confinement_sentences,
    delta,
    headline_sentences,
    interval,
    number,
    rejection,
    reproduction,
    savings_sentence,
    usage_words,
)

HOSTILE = (
    "Traceback\n\x1b[31m</code></pre></td><script>alert(1)</script>"
    '<img src="https://evil.example/x.png" onerror=alert(2)> | `a` ![x](http://evil.example/y)'
    " \u202egnp.exe \x00 {{ 7 * 7 }}"
)
FASTER, SMALLER, WILD = {"lr": 0.08}, {"lr": 0.08, "depth": 3}, {"lr": 0.9, "momentum": 0.97}


class Lab:
    """A small society driven by hand, on real runs of the synthetic task."""

    def __init__(self, path):
        self.task = Synthetic("quick")
        self.space = Space.of(self.task)
        self.executor = InlineExecutor(self.task)
        asyncio.run(self.executor.start())
        self.scope = Scope(self.task.key, self.executor.environment.tier)
        self.ledger = Ledger.open(path / "ledger.sqlite", secret_seed=7)
        self.society = self.ledger.start_society(1, {"agents": 3, "note": "<b>"}).id
        self.keys = iter(range(10_000))

    def variant(self, overrides):
        return self.space.variant(self.task.key, overrides)

    def measured(self, lease):
        work = Work(lease.run_id, lease.variant, lease.seed, lease.split, self.task.budget)
        return asyncio.run(self.executor.run(work))

    def finish(self, lease, measurement=None):
        return self.ledger.finish(
            lease,
            measurement or self.measured(lease),
            environment=self.executor.environment,
            budget=self.task.budget,
        )

    def screen(self, overrides, holder="agent-1", measurement=None):
        lease = self.ledger.lease_screening(
            self.scope, self.society, holder=holder, variant=self.variant(overrides), ttl_s=60
        )
        return self.finish(lease, measurement)

    def pool(self, overrides, count, claim=None, holder="agent-2"):
        kind = RunKind.VERIFICATION if claim else RunKind.CALIBRATION
        return [
            self.finish(
                self.ledger.lease_next_seed(
                    self.scope,
                    self.society,
                    holder=holder,
                    variant=self.variant(overrides),
                    kind=kind,
                    claim_id=claim,
                    ttl_s=60,
                )
            )
            for _ in range(count)
        ]

    def commit(self, *entries, agent="agent-3", role="statistician"):
        now = self.ledger.now()
        activity = Activity(agent, role, "judge", "c0001", now - 2.0, now)
        key = str(next(self.keys))
        self.ledger.commit(self.scope, self.society, agent, entries, key=key, activity=activity)

    def claim(self, run, reference, family):
        change = NewClaim(run.id, self.variant(reference), 0.01, family, 0.05, 0.0)
        self.commit(change, agent=run.agent, role="experimenter")
        return self.ledger.claims(self.scope)[-1]

    def judge(self, claim, decision, runs, reason="e = 40"):
        pools = (self.ledger.pool(self.scope, v) for v in (claim.reference, claim.variant))
        evidence = gate.Evidence(*pools)
        log_e = gate.assess(evidence).log_e
        ids = tuple(run.id for run in runs)
        effect = gate.effect(evidence)
        self.commit(Verdict(claim.id, decision, log_e, effect, reason, ids, "agent-3"))

    def report(self):
        return build_report(self.ledger, self.scope, self.task, self.space)


@pytest.fixture
def lab(tmp_path):
    made = Lab(tmp_path)
    yield made
    made.ledger.close()


@pytest.fixture(scope="module")
def busy_lab(tmp_path_factory):
    """A champion change, a rejected, a superseded and an open claim, a divergence and a crash.

    Shared by the tests of this module, which only read it.
    """
    lab = Lab(tmp_path_factory.mktemp("lab"))
    first = lab.screen({})
    lab.commit(Crown(first.variant, None, first.id))
    lab.pool({}, 12)
    sd = Noise(lab.task.key, lab.scope.tier, 0.0123, 0.0087, 0.0209, 12)
    lab.commit(sd)
    better = lab.screen(FASTER)
    claim = lab.claim(better, {}, 1)
    runs = lab.pool(FASTER, 8, claim.id)
    again = lab.ledger.lease_reproduction(
        lab.scope, lab.society, holder="agent-2", claim_id=claim.id, ttl_s=60
    )
    lab.finish(again)
    lab.judge(claim, Decision.ACCEPTED, runs)
    lab.commit(Crown(better.variant, claim.id, better.id))
    worse = lab.claim(lab.screen({"lr": 0.02}), {}, 2)
    lab.judge(worse, Decision.REJECTED, lab.pool({"lr": 0.02}, 3, worse.id), HOSTILE)
    moot = lab.claim(lab.screen({"tied": True}), {}, 3)
    lab.commit(Verdict(moot.id, Decision.SUPERSEDED, 0.0, None, "moot", (), "agent-3"))
    still = lab.claim(lab.screen(SMALLER), FASTER, 4)
    lab.pool(SMALLER, 2, still.id)
    for step in range(12):
        lab.screen({"warm_down": 0.1 + 0.03 * step, "momentum": 0.9 if step % 3 else 0.85})
    lab.screen(WILD)
    crash = Measurement(Outcome.CRASHED, None, Cost(wall_s=1.5, cpu_s=1.0), HOSTILE)
    lab.screen({"width": 128}, measurement=crash)
    lab.commit(
        NewInsight(f"`lr` matters {HOSTILE}", (better.id,)),
        NewHypothesis(f"deeper {HOSTILE}", "because", lab.variant({"depth": 6}), 1.5),
        role="meta-analyst",
    )
    lab.ledger.set_society_state(lab.society, SocietyState.FINISHED, busy=0.83, wall_s=754.0)
    yield lab
    lab.ledger.close()


@pytest.fixture(scope="module")
def folder(busy_lab, tmp_path_factory):
    """Where the report of the busy lab was written."""
    path = tmp_path_factory.mktemp("report") / "out"
    write_report(busy_lab.report(), path)
    return path


@pytest.fixture(scope="module")
def pages(folder):
    """The Markdown and the HTML of the busy lab's report."""
    return [(folder / f"report.{form}").read_text("utf-8") for form in ("md", "html")]


class Page(HTMLParser):
    """Collects what a page would fetch or execute, its ids, and whether its tags nest."""

    VOID = frozenset({"meta", "br", "hr", "img", "path", "use", "rect", "line"})

    def __init__(self, text):
        super().__init__()
        self.fetched, self.ids, self.open, self.text, self.tags = [], [], [], [], set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self._attributes(tag, attributes)
        if tag not in {"meta"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self._attributes(tag, attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def _attributes(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            assert not name.startswith("on")
            if name == "id":
                self.ids.append(value)
            if "://" in (value or "") or "//" in (value or ""):
                self.fetched.append(value)
            if name in ("src", "href", "xlink:href"):
                assert value.startswith("#")


def written(lab, tmp_path):
    markdown, html = write_report(lab.report(), tmp_path / "out")
    return markdown.read_text("utf-8"), html.read_text("utf-8")


def test_the_numbers_are_the_ledgers(busy_lab, pages):
    report, ledger, scope = busy_lab.report(), busy_lab.ledger, busy_lab.scope
    base = ledger.pool(scope, busy_lab.variant({}))
    best = ledger.pool(scope, busy_lab.variant(FASTER))
    gain = gate.paired_gain(base, best)
    assert report.headline.gain == gain
    assert (gain.seeds, gain.mean > 0) == (8, True)
    claim = ledger.claims(scope)[0]
    for text in pages:
        for value in (
            number(sum(base.values()) / 12),
            number(sum(best.values()) / 8),
            f"Gain: {delta(gain.mean)} BPB",
            delta(gain.shrunken),
            "0.0123",
            "12 min 34 s",
            "83 %",
            delta(claim.verdict.effect.shrunken),
            str(len(ledger.runs(scope))),
        ):
            assert value in text.replace("\\[", "[").replace("\\]", "]")
        for run in ledger.runs(scope):
            assert run.id in text
            assert str(run.seed) in text
            assert run.score is None or number(run.score) in text
    assert interval(gain) in pages[1]


def test_findings_say_who_and_how(busy_lab):
    report = busy_lab.report()
    accepted, rejected, superseded, still = report.findings
    assert (accepted.decision, accepted.verifications) == (Decision.ACCEPTED, 8)
    assert (accepted.claim.author, accepted.verifiers) == ("agent-1", ("agent-2",))
    assert accepted.reproduced is True
    assert accepted.certified is (accepted.log_e >= math.log(4 / 0.1))
    assert rejected.decision is Decision.REJECTED
    assert superseded.effect is None
    assert (still.decision, still.effect, still.log_e, still.verifications) == (None, None, None, 2)
    assert report.undecided == (still,)
    changes = [change_text(f.claim.variant, f.claim.reference) for f in report.findings]
    assert changes == ["lr=0.08", "lr=0.02", "tied=True", "depth=3"]
    assert [f.against for f in report.findings] == ["baseline"] * 3 + ["champion 1"]
    back = busy_lab.variant({"tied": True})
    assert change_text(back, busy_lab.variant(FASTER)) == "tied=True, -lr"


def test_sums_and_shares(busy_lab):
    report, runs = busy_lab.report(), busy_lab.ledger.runs(busy_lab.scope)
    total = report.costs[-1]
    assert (total.kind, total.runs, total.failed) == ("total", len(runs), 2)
    assert total.cost.tokens == sum(run.cost.tokens for run in runs)
    assert total.cost.wall_s == pytest.approx(sum(run.cost.wall_s for run in runs))
    assert {run.outcome for run in report.failures} == {Outcome.DIVERGED, Outcome.CRASHED}
    assert sum(agent.runs for agent in report.agents) == len(runs)
    one = next(agent for agent in report.agents if agent.agent == "agent-1")
    assert (one.filed, one.accepted, one.verifications) == (4, 1, 0)
    assert sum(agent.judged for agent in report.agents) == 3
    assert [change.knob for change in report.recipe] == ["lr"]
    assert busy_lab.report() == report


def test_open_claims_and_screening_scores_are_called_what_they_are(busy_lab, pages):
    for text in pages:
        assert "not verified, and selected as the best of many" in text
        assert "interim results are not published" in text
    report = busy_lab.report()
    scores = [r.score for r in report.runs if r.kind is RunKind.SCREENING and r.score is not None]
    assert report.headline.best_screening.score == min(scores)


def test_the_page_is_self_contained_and_well_formed(pages):
    _, html = pages
    page = Page(html)
    assert not page.fetched
    assert len(page.ids) == len(set(page.ids))
    assert "url(http" not in html
    assert "@import" not in html
    assert html.count("<svg") == 5
    assert not {"script", "img", "link", "iframe", "object"} & page.tags


def test_hostile_text_is_inert(pages):
    markdown, html = pages
    assert "<script" not in html + markdown.replace("`", "") or "`" in markdown
    assert "alert(1)" in "".join(Page(html).text)
    for text in (markdown, html):
        assert not set(text) & {"\x1b", "\x00", "\u202e"}
        assert "{{ 7 * 7 }}" in text.replace("\\", "")
    rendered = commonmark(markdown)
    assert "<script" not in rendered
    assert "<img" not in re.sub(r'<img src="plots/\w+\.svg"', "", rendered)
    assert "evil.example" not in "".join(re.findall(r'(?:src|href)="([^"]*)"', rendered))
    tables = len(re.findall(r"^\|(?:---\|)+$", markdown, re.MULTILINE))
    assert rendered.count("<table>") == tables > 8


def test_half_characters_become_whole():
    assert clean("a\ud800b\r\n\tc\u200bd") == "a?b c d"


def commonmark(text):
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    return parser.render(text)


def test_every_row_of_a_table_has_its_columns(pages):
    markdown, _ = pages
    width = None
    for line in markdown.splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1
        assert width in (None, cells), line
        width = cells


def test_plots_are_files_beside_the_markdown(folder, pages):
    markdown, _ = pages
    linked = re.findall(r"\]\((plots/\w+\.svg)\)", markdown)
    assert sorted(linked) == sorted(f"plots/{p.name}" for p in (folder / "plots").iterdir())
    for name in linked:
        assert ET.parse(folder / name).getroot().tag.endswith("svg")
    left = {path.name for path in folder.iterdir()}
    assert left == {"plots", "report.md", "report.html"}


def test_an_empty_notebook_says_that_nothing_was_accepted(lab, tmp_path):
    for text in written(lab, tmp_path):
        assert "Nothing has been accepted: the notebook holds no run" in text
    Page(written(lab, tmp_path)[1])


def test_runs_without_an_accepted_claim(lab, tmp_path):
    first = lab.screen({})
    lab.commit(Crown(first.variant, None, first.id))
    lab.claim(lab.screen(FASTER), {}, 1)
    for text in written(lab, tmp_path):
        assert (
            "Nothing has been accepted: the champion is the baseline. 1 claim filed, 1 of" in text
        )
        assert "Gain" not in text.split("What the numbers mean")[0]
        assert "No claim stands accepted." in text
    report = lab.report()
    uncrowned = replace(report, headline=replace(report.headline, accepted=1))
    assert headline_sentences(uncrowned)[0].endswith("but the champion is still the baseline.")


def test_a_roll_back_is_said_first(lab):
    first = lab.screen({})
    lab.commit(Crown(first.variant, None, first.id))
    lab.pool({}, 4)
    better = lab.screen(FASTER)
    claim = lab.claim(better, {}, 1)
    runs = lab.pool(FASTER, 4, claim.id)
    lab.judge(claim, Decision.ACCEPTED, runs)
    lab.commit(Crown(better.variant, claim.id, better.id))
    lab.judge(claim, Decision.ROLLED_BACK, runs, "probation")
    lab.commit(Crown(first.variant, None, first.id, reverts=True))
    report = lab.report()
    assert report.headline.gain is None
    text = render(report, "md", {})
    assert "**Nothing stands accepted: 1 accepted claim was rolled back" in text


def test_the_reproduction_script_reproduces(busy_lab):
    script = reproduction(busy_lab.report())
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(script, "script", "exec"), {})
    again, _, _, recorded = printed.getvalue().split()
    assert again == recorded


def test_rendering_the_same_report_twice_gives_the_same_text(busy_lab, pages, tmp_path):
    assert list(written(busy_lab, tmp_path)) == pages


def many_claims(count):
    for index in range(count):
        decision = list(Decision)[index % 5]
        low = -math.inf if index % 7 == 0 else -0.01
        effect = Effect(0.001 * index, 0.0008 * index, low, 0.02 + 0.001 * index, 5)
        variant = Variant("t", {"a_knob_with_a_long_name": index, "$another$_one": 0.25})
        yield Claim(
            f"c{index}", "s", "a", variant, Variant("t"), "r", 0.1, index, 0.05, 0.0, 0.0,
            Verdict(f"c{index}", decision, 1.0, effect, "", (), "j"),
        )  # fmt: skip


def test_a_forest_of_many_claims_says_what_it_leaves_out():
    svg = plots.forest(list(many_claims(70)), unit="BPB")
    assert "30 more not shown" in svg
    assert "accepted, confirmed" in svg
    ET.fromstring(plots.standalone(svg))


def test_plots_with_nothing_to_show_are_none(lab):
    report = lab.report()
    assert plots.progress((), (), lower_is_better=True, metric="m") is None
    assert plots.forest((), unit="u") is None
    assert plots.noise_histogram((1.0, 1.0, 1.0), None, metric="m") is None
    assert plots.timeline(()) is None
    assert plots.knob_bars(report.effects, unit="u") is None


def test_progress_survives_failures_only_and_maximising(busy_lab):
    runs = busy_lab.ledger.runs(busy_lab.scope)
    failed = [run for run in runs if run.outcome is not Outcome.COMPLETED]
    assert "1 crashed" in plots.progress(failed, (), lower_is_better=True, metric="m")
    point = plots.PoolPoint(Champion(0, Variant("t"), None, runs[0].finished_at), 1.0, 0.1, 3)
    assert isinstance(runs[0], Run)
    svg = plots.progress(runs, [point], lower_is_better=False, metric="accuracy")
    assert "not verified" in svg
    assert "currentColor" in svg


def test_settings_of_a_society_are_shown_as_json(pages):
    _, html = pages
    assert json.dumps({"agents": 3, "note": "<b>"}, sort_keys=True) in "".join(Page(html).text)


def test_runs_on_an_accelerator_report_their_throughput(lab, tmp_path):
    lab.commit(Crown(lab.screen({}).variant, None, None))
    for lr, mfu, seconds in ((0.05, 0.5, 300.0), (0.07, 0.2, 100.0), (0.09, None, 100.0)):
        cost = Cost(
            tokens=10_000_000, train_s=seconds, compile_s=40.0, mfu=mfu, device_mem_bytes=3 << 30
        )
        lab.screen({"lr": lr}, measurement=Measurement(Outcome.COMPLETED, 1.0, cost))
    total = lab.report().costs[-1].cost
    assert total.mfu == pytest.approx((0.5 * 300 + 0.2 * 100) / 400)
    markdown, html = write_report(lab.report(), tmp_path / "report")
    for page in (markdown, html):
        words = page.read_text()
        assert "42.5 % of the card" in words
        assert "at most 3.0 GiB of its memory" in words


# ------------------------------------------------------------------------------------ savings


def refuse(lab, reason, **overrides):
    lab.commit(NewRefusal(lab.variant(overrides), reason, None, "known"), role="experimenter")


def test_what_was_not_run_is_counted_from_the_ledger(lab):
    cost = Cost(wall_s=30.0)
    for overrides in ({}, {"lr": 0.08}, {"depth": 3}):
        lab.screen(overrides, measurement=Measurement(Outcome.COMPLETED, 1.8, cost))
    assert "not run because" not in render(lab.report(), "md", {})
    refuse(lab, RefusalReason.DUPLICATE, lr=0.08)
    refuse(lab, RefusalReason.DUPLICATE, lr=0.08)
    refuse(lab, RefusalReason.NEAR_DUPLICATE, lr=0.081)
    refuse(lab, RefusalReason.DEAD_END, lr=0.5)
    refuse(lab, RefusalReason.DEAD_END, lr=0.6)
    refuse(lab, RefusalReason.SAME_IDEA, lr=0.7)
    lab.screen({"lr": 0.6}, measurement=Measurement(Outcome.COMPLETED, 1.9, cost))
    savings = lab.report().savings
    assert savings.proposals == 5
    assert savings.runs == 3, "lr=0.08 counts once, and lr=0.6 was run after all"
    assert (savings.run_s, savings.seconds) == (30.0, 90.0)
    assert lab.ledger.savings(Scope("synthetic/quick", "elsewhere")).proposals == 0
    sentence = (
        "5 proposals were not run because the notebook already knew (2 duplicates, "
        "1 near-duplicate, 2 dead ends), about 3 runs = 1 min 30 s saved."
    )
    assert savings_sentence(savings) == sentence
    html = render(lab.report(), "html", {})
    assert sentence in html
    assert "is a forecast" in html
    assert "is a forecast" in render(lab.report(), "md", {})


# ------------------------------------------------------------------------------------ foreign text

EVIL = (
    "<script>alert(1)</script> [link](http://evil.example) ![i](http://evil.example/i.png) "
    "\x1b[2J\x1b]8;;http://evil.example\x07 [red]x[/red] | a ``` b `c` \u202e\u2066 <b>"
)
PATCH = (
    f"society-patch 1 {'ab' * 32}\nbase {'cd' * 32}\n--- a/gpt.py\n+++ b/gpt.py\n"
    f"@@ -1,2 +1,3 @@ _block\n a = 1\n-b = 2\n+b = {EVIL}\n+````````\n"
)


@pytest.fixture
def evil_lab(lab):
    """A champion with a hostile patch, a rejected run, a narrative, refusals and model calls."""
    lab.society = lab.ledger.start_society(2, {"task": "synthetic", "profile": "quick"}).id
    first = lab.screen({})
    lab.commit(Crown(first.variant, None, first.id))
    lab.pool({}, 4)
    variant = Variant(lab.task.key, {}, PATCH)
    lab.variant = lambda overrides: Variant(lab.task.key, overrides, PATCH)
    measured = Measurement(Outcome.COMPLETED, 1.5, Cost(wall_s=1.0))
    better = lab.screen({}, measurement=measured)
    change = NewClaim(better.id, first.variant, 0.01, 1, 0.05, 0.0)
    lab.commit(change, agent="agent-1")
    claim = lab.ledger.claims(lab.scope)[-1]
    runs = []
    for _ in range(3):
        lease = lab.ledger.lease_next_seed(
            lab.scope, lab.society, holder="agent-2", variant=variant,
            kind=RunKind.VERIFICATION, claim_id=claim.id, ttl_s=60,
        )  # fmt: skip
        runs.append(lab.finish(lease, measured))
    lab.judge(claim, Decision.ACCEPTED, runs, EVIL)
    lab.commit(Crown(variant, claim.id, better.id))
    log = f"rejected: my own reason\n{EVIL}\nrejected: it looked ahead {EVIL}{'x' * 9999}"
    lab.screen({"lr": 0.9}, measurement=Measurement(Outcome.REJECTED, None, Cost(), log))
    lab.commit(
        NewInsight(f"Narrative: One run was made. {EVIL}\n\nA second paragraph.", ()),
        agent="narrator",
    )
    lab.commit(
        NewInsight(f"ordinary {EVIL}", ()),
        NewHypothesis(EVIL, EVIL, lab.variant({"depth": 6}), 1.0),
        NewRefusal(lab.variant({"depth": 7}), RefusalReason.BROKEN, None, EVIL),
        NewRefusal(lab.variant({"depth": 8}), RefusalReason.ADVISED_AGAINST, None, EVIL),
    )
    for outcome, spent in (("answered", 0.25), ("timeout", 0.25), ("cached", 0.0)):
        call = Call(lab.society, "agent-1", "propose", EVIL, outcome, 100, 10, spent, 1.0)
        lab.ledger.record_call(call)
    return lab


def assert_inert(markdown, html):
    page = Page(html)
    assert not page.fetched
    assert not {"script", "img", "a"} & page.tags
    rendered = commonmark(markdown)
    for text in (markdown, html):
        assert not set(text) & {"\x1b", "\x07", "\u202e", "\u2066"}
    assert "<script" not in rendered
    assert "<b>" not in rendered
    assert "evil.example" not in "".join(re.findall(r'(?:src|href)="([^"]*)"', rendered))
    tables = len(re.findall(r"^\|(?:---\|)+$", markdown, re.MULTILINE))
    assert rendered.count("<table>") == tables > 5


def test_hostile_code_narratives_and_rejections_are_inert(evil_lab, tmp_path):
    markdown, html = written(evil_lab, tmp_path)
    assert_inert(markdown, html)
    rendered = commonmark(markdown)
    assert rendered.count('<pre><code class="language-diff">') == 1
    assert "+````````" in rendered
    assert "+````````" in html
    assert "<details><summary>It also changes code" in html


def test_a_narrative_is_apart_and_says_who_wrote_it(evil_lab):
    report = evil_lab.report()
    assert [one.author for one in report.insights] == ["agent-3"]
    for form in ("md", "html"):
        text = render(report, form, {})
        assert "A language model wrote this" in text
        assert "One run was made." in text
        assert "A second paragraph." in text
        assert "Narrative: One" not in text
    evil_lab.commit(NewInsight("Narrative: Another one.", ()), agent="narrator")
    evil_lab.commit(NewInsight("Narrative: by an impostor", ()), agent="agent-1")
    report = evil_lab.report()
    assert report.narrative.text == "Narrative: Another one."
    assert len(report.insights) == 2


def test_what_the_guard_rejected_is_listed_with_the_reason_of_the_harness(evil_lab):
    report = evil_lab.report()
    (run,) = report.rejected
    reason = rejection(run)
    assert reason.startswith("rejected: it looked ahead")
    assert len(reason) <= 240
    text = render(report, "md", {})
    rejected = text.partition("## Rejected by the guard")[2].partition("## ")[0]
    failed = text.partition("## Failed runs")[2].partition("## ")[0]
    assert run.id in rejected
    assert "it looked ahead" in rejected
    assert failed.strip() == "None."
    assert rejection(replace(run, log_tail="")) == "no reason was recorded"


def test_what_models_cost_and_what_was_refused(evil_lab):
    report = evil_lab.report()
    assert report.usage == Usage(3, 1, 1, 200, 20, 0.5)
    for form in ("md", "html"):
        text = render(report, form, {})
        assert "3 calls (1 failed, 1 from the cache), 220 tokens, $0.50" in text
        assert "What language models cost" in text
        assert "1 code change did not work; another agent advised against 1 proposal" in text
    assert usage_words(Usage(1, 0, 0, 5, 1, 0.0012)) == "1 call, 6 tokens, $0.0012"


def test_confinement_and_caveats(evil_lab):
    report = evil_lab.report()
    assert sum(one.runs for one in report.confinement) == len(report.runs)
    said = (Confinement("bubblewrap", 7, 2), Confinement("", 1, 0))
    report = replace(report, confinement=said, caveats=(f"toy {EVIL}",))
    for form in ("md", "html"):
        text = render(report, form, {})
        assert "7 runs were confined at level" in text
        assert "2 of them with changed code" in text
        assert "1 run was confined at a level that was not recorded." in text
        assert "aveat:" in text.partition("recipe")[0]
    assert_inert(render(report, "md", {}), render(report, "html", {}))
    assert confinement_sentences(replace(report, confinement=said[1:])) == ()


def test_the_commands_show_foreign_text_without_control(evil_lab, capsys):
    lab = evil_lab.ledger.path.parent
    rejected = evil_lab.report().rejected[0].id
    for command in (
        ["memory", "show", rejected], ["memory", "show", "c0001"], ["memory", "show", "h0001"],
        ["memory", "show", "i0001"], ["memory", "search", "script"], ["status"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main([*command, "--lab", str(lab)])
        out = capsys.readouterr().out
        assert not end.value.code, command
        assert not set(out) & {"\x1b", "\x07", "\u202e", "\u2066"}
        if rejected in command:
            assert "patch(gpt.py:_block +2 -1)" in out
            assert "  -b = 2\n" in out
            assert re.search(r"code_kept +(True|False)", out)
            assert "sandbox" in out
