"""What a user sees while a society runs: a live view on a terminal, plain lines elsewhere.

Both read the laboratory and change nothing. What comes from the notebook is kept as a `Snapshot`
and taken again only when the notebook's version has changed; a refresh costs a few milliseconds.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from society.cleaning import bounded
from society.codechange import describe_patch
from society.exchange import outcomes
from society.records import SOCIETY_KINDS, Decision, HypothesisState, Usage
from society.wording import usage_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TextIO

    from rich.console import ConsoleOptions, RenderResult

    from society.agents.laboratory import Doing, Laboratory
    from society.exchange import Tested
    from society.experiments.gate import Assessment
    from society.records import Champion, Claim, Hypothesis, Insight, Noise, Run, Variant
    from society.roles.base import BudgetLeft
    from society.roles.view import View

REFRESH_S = 0.5
"""Shortest time between two refreshes of the live view."""
PLAIN_S = 15.0
"""Time between two progress lines when there is no terminal."""
WIDE = 120
"""Columns from which the live view stands in two columns."""
KEPT = 30
"""Recent runs, verdicts and insights that a snapshot keeps."""
IDEAS = 5
"""Recently published hypotheses that were tested, which a snapshot keeps."""
PRINTED_CHARS = 400
"""Most that is shown of one text; lines are cut at the terminal's width anyway."""
NO_CALLS = Usage()
GOOD = (Decision.ACCEPTED, Decision.CONFIRMED)


@dataclass(frozen=True, slots=True)
class UnderTest:
    """An open claim and the gate's present opinion on it."""

    claim: Claim
    assessment: Assessment

    @property
    def e(self) -> float:
        """Its e-value so far."""
        return exp(self.assessment.log_e)

    @property
    def needed(self) -> float:
        """The e-value at which it is accepted."""
        return exp(self.assessment.log_need)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the notebook says at one version of it."""

    version: int
    unit: str
    champion: Champion
    pool: int
    """Completed holdout runs of the champion."""
    mean: float | None
    """Their mean score."""
    gain: float | None
    """Their mean improvement over the baseline's mean; 0 for the baseline."""
    noise: Noise | None
    under_test: tuple[UnderTest, ...]
    closed: tuple[Claim, ...]
    """Claims with a verdict, in order of deciding, the latest."""
    insights: tuple[Insight, ...]
    tested: tuple[tuple[Hypothesis, Tested], ...]
    """The latest hypotheses that were tested, and what came out."""
    runs: tuple[Run, ...]
    accepted: int
    rejected: int
    """Claims of the notebook by verdict; roll-backs count as rejected."""


def snapshot(view: View, version: int, *, kept: int = KEPT) -> Snapshot:
    """Read everything that the displays show from the notebook; `kept` of what is recent."""
    champion = view.champion
    decided = view.ledger.decisions(view.scope)
    scores = _scores(view, champion.variant)
    return Snapshot(
        version=version,
        unit=view.task.unit,
        champion=champion,
        pool=len(scores),
        mean=_mean(scores),
        gain=_gain(view, scores),
        noise=view.noise,
        under_test=tuple(
            UnderTest(claim, view.assessments[claim.id]) for claim in view.open_claims
        ),
        closed=view.ledger.closed_claims(view.scope, last=kept),
        insights=view.ledger.insights(view.scope, last=kept),
        tested=_tested(view, min(IDEAS, kept)),
        runs=view.ledger.runs(view.scope, kinds=SOCIETY_KINDS, last=kept),
        accepted=sum(decided[decision] for decision in GOOD),
        rejected=decided[Decision.REJECTED] + decided[Decision.ROLLED_BACK],
    )


def _tested(view: View, count: int) -> tuple[tuple[Hypothesis, Tested], ...]:
    """The latest hypotheses that were tested; reads all screening runs, unless none is wanted."""
    if not count:
        return ()
    return outcomes(
        view.ledger.hypotheses(view.scope, state=HypothesisState.TESTED, last=count),
        view.ledger.champions(view.scope),
        view.ledger.run,
        lambda variant: view.board.score(variant.fingerprint),
        noise_sd=view.noise.sd if view.noise else None,
        sign=float(view.task.direction.sign),
    )


def _scores(view: View, variant: Variant) -> list[float]:
    return [score for score in view.pool(variant).values() if score is not None]


def _mean(scores: Sequence[float]) -> float | None:
    return sum(scores) / len(scores) if scores else None


def _gain(view: View, scores: Sequence[float]) -> float | None:
    mean, reference = _mean(scores), _mean(_scores(view, view.baseline))
    if mean is None or reference is None:
        return None
    return view.task.direction.improvement(reference, mean)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the society is; changes all the time."""

    society: str
    task: str
    brain: str
    slots: int
    busy: float
    """Share of slot time spent on runs in this session, 0..1."""
    wall_s: float
    budget: BudgetLeft
    limited: bool
    """Whether runs or minutes bound the society; without them nothing is known about its end."""
    draining: bool
    doing: tuple[tuple[str, Doing], ...]
    now: float
    """Monotonic seconds, as `Doing.since` counts them."""
    usage: Usage = NO_CALLS
    """What language models have cost the society."""
    brain_status: str = ""
    """What the brain says about itself, e.g. that its endpoint does not answer."""

    @classmethod
    def of(cls, laboratory: Laboratory) -> Progress:
        """Where the laboratory stands now."""
        session = max(1e-9, laboratory.wall_s - laboratory.record.wall_s)
        slots, settings = laboratory.executor.slots, laboratory.settings
        return cls(
            society=laboratory.record.id,
            task=laboratory.task.key,
            brain=laboratory.brain.name,
            slots=slots,
            busy=min(1.0, laboratory.executor.busy_s / slots / session),
            wall_s=laboratory.wall_s,
            budget=laboratory.budget(),
            limited=settings.runs is not None or settings.minutes is not None,
            draining=laboratory.draining,
            doing=tuple(sorted(laboratory.doing.items())),
            now=time.monotonic(),
            usage=laboratory.ledger.usage(laboratory.record.id),
            brain_status=printable(str(getattr(laboratory.brain, "status", "") or "")),
        )

    @property
    def eta_s(self) -> float | None:
        """Seconds until the budget is spent, by the pace so far; None while unknown."""
        by_clock, spent = self.budget.seconds, self.budget.spent_runs
        by_runs = self.wall_s / spent * self.budget.runs if spent and self.limited else None
        known = [seconds for seconds in (by_clock, by_runs) if seconds is not None]
        return min(known, default=None)


class Watch:
    """The laboratory through the displays' eyes: a snapshot per version of the notebook."""

    def __init__(self, laboratory: Laboratory) -> None:
        """Look at this laboratory; nothing is read yet."""
        self._laboratory = laboratory
        self._snapshot: Snapshot | None = None

    def snapshot(self) -> Snapshot:
        """The notebook's state; read again only when something was written."""
        version = self._laboratory.ledger.version()
        if self._snapshot is None or self._snapshot.version != version:
            self._snapshot = snapshot(self._laboratory.view(), version)
        return self._snapshot

    def progress(self) -> Progress:
        """Where the society stands."""
        return Progress.of(self._laboratory)


# --------------------------------------------------------------------------- the live view


class LiveDisplay:
    """A view on a terminal that refreshes itself; implements `society.app.Display`."""

    def __init__(self, console: Console | None = None) -> None:
        """Draw on `console`; on standard output by default."""
        self._live = Live(console=console or Console(), auto_refresh=False)
        self._watch: Watch | None = None
        self._shown = -math.inf

    def start(self, laboratory: Laboratory) -> None:
        """Take over the terminal."""
        self._watch = Watch(laboratory)
        self._live.start()

    def show(self, laboratory: Laboratory) -> None:
        """Draw the present state, unless the last drawing was a moment ago."""
        if time.monotonic() - self._shown >= REFRESH_S:
            self._draw()

    def stop(self) -> None:
        """Draw the last state and give the terminal back."""
        try:
            self._draw()
        finally:
            self._live.stop()

    def _draw(self) -> None:
        if self._watch is not None:
            screen = Screen(self._watch.snapshot(), self._watch.progress())
            self._live.update(screen, refresh=True)
            self._shown = time.monotonic()


@dataclass(frozen=True, slots=True)
class Screen:
    """One picture of the society; fits itself to the terminal's size."""

    notebook: Snapshot
    progress: Progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Two columns on a wide terminal, else one below the other."""
        height = options.height or console.height
        width = options.max_width
        head = header(self.notebook, self.progress)
        room = max(8, height - len(head) - 2)
        yield from head
        if width >= WIDE:
            yield self._columns(room)
        else:
            yield from self._stack(room)

    def _columns(self, room: int) -> Table:
        grid = Table.grid(expand=True, padding=(0, 2))
        grid.add_column(ratio=5)
        grid.add_column(ratio=6)
        claims = claim_rows(self.notebook, max(2, room // 3))
        news = news_rows(self.notebook, room - len(claims) - 3)
        left = Group(title("Agents"), *agent_rows(self.progress, room - 1))
        right = Group(title("Claims under test"), *claims, title("Latest"), *news)
        grid.add_row(left, right)
        return grid

    def _stack(self, room: int) -> Iterable[Text]:
        claims = claim_rows(self.notebook, 3)
        left = room - len(claims) - 3
        agents = agent_rows(self.progress, max(3, min(len(self.progress.doing), left - 3)))
        yield title("Agents")
        yield from agents
        yield title("Claims under test")
        yield from claims
        yield title("Latest")
        yield from news_rows(self.notebook, max(1, left - len(agents)))


def line(*parts: str | tuple[str, str]) -> Text:
    """One line that is cut, not wrapped."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for part in parts:
        if isinstance(part, str):
            text.append(part)
        else:
            text.append(part[0], style=part[1])
    return text


def title(words: str) -> Text:
    """The heading of a section."""
    return line((words, "bold cyan"))


def header(notebook: Snapshot, progress: Progress) -> list[Text]:
    """Who works on what, what it has come to, and what is left."""
    state = ("  stopping: runs in progress are finished", "bold yellow")
    return [
        line(
            (f"Society {progress.society}", "bold"),
            f"  {progress.task}  brain {progress.brain}  {clock(progress.wall_s)}",
            *([state] if progress.draining else []),
        ),
        line(("Champion ", "bold cyan"), f"#{notebook.champion.number} ", champion_text(notebook)),
        line(
            ("Noise    ", "bold cyan"), noise_text(notebook),
            f"   accepted {notebook.accepted}  rejected {notebook.rejected}",
        ),
        line(("Work     ", "bold cyan"), work_text(progress)),
        *(line(("Models   ", "bold cyan"), words) for words in [models_text(progress)] if words),
    ]  # fmt: skip


def models_text(progress: Progress) -> str:
    """What language models have cost, and what the brain says; empty if none was asked."""
    told = [usage_words(progress.usage)] if progress.usage.calls else []
    return "  ".join([*told, *([progress.brain_status] if progress.brain_status else [])])


def champion_text(notebook: Snapshot) -> str:
    """The champion's score and gain, then what it is."""
    name = printable(notebook.champion.variant.describe())
    if notebook.mean is None:
        return f"{name}, not measured on the holdout yet"
    gain = f", {notebook.gain:+.4f} over the baseline" if notebook.gain else ""
    return f"{notebook.mean:.4f} {notebook.unit}{gain} ({notebook.pool} seeds): {name}"


def noise_text(notebook: Snapshot) -> str:
    """The noise floor with its interval."""
    noise = notebook.noise
    if noise is None:
        return "being measured"
    return f"sd {noise.sd:.4f} [{noise.low:.4f}, {noise.high:.4f}] on {noise.seeds} seeds"


def work_text(progress: Progress) -> str:
    """Slots, runs and time."""
    budget = progress.budget
    words = [
        f"{progress.slots} slots {progress.busy:.0%} busy",
        f"{budget.spent_runs} runs done",
    ]
    if progress.limited:
        about = "" if budget.seconds is None else "about "
        words.append(f"{about}{budget.runs} left")
    eta = progress.eta_s
    words.append("end unknown" if eta is None else f"{clock(eta)} to go")
    return ", ".join(words)


def agent_rows(progress: Progress, limit: int) -> list[Text]:
    """A line per agent, those at work first when not all fit."""
    everyone = list(progress.doing)
    if len(everyone) > limit:
        everyone.sort(key=lambda pair: (not pair[1].role, pair[0]))
        hidden = len(everyone) - limit + 1
        shown = [_agent_row(name, doing, progress.now) for name, doing in everyone[: limit - 1]]
        return [*shown, line((f"and {hidden} more", "dim"))]
    return [_agent_row(name, doing, progress.now) for name, doing in everyone]


def _agent_row(name: str, doing: Doing, now: float) -> Text:
    since = clock(max(0.0, now - doing.since)) if doing.since else ""
    if not doing.role:
        return line(f"{name}  ", (f"{'waiting':<24} {since:>6}", "dim"))
    what = f"{doing.role} {doing.kind}"
    return line(f"{name}  ", (f"{what:<24}", "green"), f" {since:>6}  {printable(doing.why)}")


def claim_rows(notebook: Snapshot, limit: int) -> list[Text]:
    """A line per open claim, the most promising first."""
    if not notebook.under_test:
        return [line(("none", "dim"))]
    rows = [_claim_row(one) for one in notebook.under_test]
    if len(rows) > limit:
        return [*rows[: limit - 1], line((f"and {len(rows) - limit + 1} more", "dim"))]
    return rows


def _claim_row(one: UnderTest) -> Text:
    what = changed(one.claim.variant, one.claim.reference)
    return line(
        f"{one.claim.id}  n={one.assessment.n:<2} e={one.e:.3g} of {one.needed:.3g}  ",
        (f"p(accept) {one.assessment.p_accept:.2f}  ", "bold"),
        what,
    )


def news_rows(notebook: Snapshot, limit: int) -> list[Text]:
    """Verdicts, insights and tested hypotheses, then runs, newest first, sharing the lines."""
    verdicts = [_verdict_row(claim) for claim in reversed(notebook.closed)]
    insights = [
        line(("insight ", "magenta"), printable(one.text)) for one in reversed(notebook.insights)
    ]
    runs = [_run_row(run, notebook.unit) for run in reversed(notebook.runs)]
    share = max(1, limit // 3)
    ideas = [
        line((f"{one.id} ", "cyan"), printable(outcome.describe()))
        for one, outcome in reversed(notebook.tested)
    ]
    chosen = [*verdicts[:share], *insights[:share], *ideas[: share // 2]]
    return [*chosen, *runs[: max(0, limit - len(chosen))]][: max(1, limit)]


def _verdict_row(claim: Claim) -> Text:
    verdict = claim.verdict
    assert verdict is not None
    style = "bold green" if verdict.decision in GOOD else "yellow"
    reason = printable(verdict.reason).removeprefix(f"{verdict.decision.value}: ")
    return line((f"{claim.id} {verdict_word(claim)} ", style), reason)


def _run_row(run: Run, unit: str) -> Text:
    score = run.outcome.value if run.score is None else f"{run.score:.4f} {unit}"
    about = printable(run.variant.describe())
    return line(f"{run.id} {run.agent} {run.kind.value:<12} {score}  ", (about, "dim"))


# --------------------------------------------------------------------------- plain lines


class PlainDisplay:
    """A progress line every quarter of a minute, and one per event; implements `Display`."""

    def __init__(self, stream: TextIO | None = None, every_s: float = PLAIN_S) -> None:
        """Write to `stream` (standard output by default), progress every `every_s` seconds."""
        self._stream = stream or sys.stdout
        self._every_s = every_s
        self._watch: Watch | None = None
        self._told = 0.0
        self._known: set[str] = set()

    def start(self, laboratory: Laboratory) -> None:
        """Say what begins; what the notebook knows already is not repeated."""
        self._watch = Watch(laboratory)
        progress = self._watch.progress()
        self._say(
            f"society {progress.society}: {len(progress.doing)} agents on {progress.task}, "
            f"{progress.slots} training slots, brain {progress.brain}"
        )
        self._known = {key for key, _ in events(self._watch.snapshot())}
        self._told = time.monotonic()

    def show(self, laboratory: Laboratory) -> None:
        """Tell what is new, and how far the society is if it has been quiet for a while."""
        if self._watch is None:
            return
        self._tell_events(self._watch)
        if time.monotonic() - self._told >= self._every_s:
            self._tell_progress(self._watch)

    def stop(self) -> None:
        """Tell the last events and where the society ended."""
        if self._watch is not None:
            self._tell_events(self._watch)
            self._tell_progress(self._watch)

    def _tell_events(self, watch: Watch) -> None:
        for key, words in events(watch.snapshot()):
            if key not in self._known:
                self._known.add(key)
                self._say(words)

    def _tell_progress(self, watch: Watch) -> None:
        progress, notebook = watch.progress(), watch.snapshot()
        self._told = time.monotonic()
        champion = "" if notebook.mean is None else f", champion {notebook.mean:.4f}"
        self._say(
            f"{clock(progress.wall_s)}: {work_text(progress)}, "
            f"{len(notebook.under_test)} claims open{champion}"
            + (f", {models}" if (models := models_text(progress)) else "")
        )

    def _say(self, words: str) -> None:
        self._stream.write(words + "\n")
        self._stream.flush()


def events(notebook: Snapshot) -> list[tuple[str, str]]:
    """What is worth a line of its own: a key that says which event, and the words."""
    found = []
    if notebook.noise is not None:
        key = f"noise {notebook.noise.seeds} {notebook.noise.sd}"
        found.append((key, f"noise floor: {noise_text(notebook)}"))
    for claim in notebook.closed:
        verdict = claim.verdict
        assert verdict is not None
        what = changed(claim.variant, claim.reference)
        reason = printable(verdict.reason).removeprefix(f"{verdict.decision.value}: ")
        words = f"claim {claim.id} {verdict_word(claim)}: {what} ({reason})"
        found.append((f"{claim.id} {verdict.decision.value}", words))
    key = f"champion {notebook.champion.number}"
    found.append((key, f"champion #{notebook.champion.number}: {champion_text(notebook)}"))
    return found


# --------------------------------------------------------------------------- words


def verdict_word(claim: Claim) -> str:
    """The verdict as one reads it."""
    return claim.verdict.decision.value.replace("_", " ") if claim.verdict else "open"


def changed(variant: Variant, reference: Variant) -> str:
    """What a claim's variant does differently from its reference, e.g. `lr=0.1, -warm_up`."""
    words = [
        f"{name}={value}"
        for name, value in sorted(variant.overrides.items())
        if reference.overrides.get(name) != value
    ]
    words += [f"-{name}" for name in sorted({*reference.overrides} - {*variant.overrides})]
    if variant.code != reference.code:
        words.append("-patch" if variant.patch is None else describe_patch(variant.patch))
    return printable(", ".join(words) or "no change")


def clock(seconds: float) -> str:
    """Seconds as `12s`, `3m05s` or `1h02m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def exp(log: float) -> float:
    """The exponential, capped where it would overflow."""
    return math.exp(min(log, 700.0))


def printable(text: str) -> str:
    """Text on one line without control characters, bounded: it may come from anywhere."""
    return bounded(text, PRINTED_CHARS)
