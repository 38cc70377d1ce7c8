"""The `openai` brain: a language model behind any endpoint that speaks OpenAI's protocol.

It reads what the notebook knows, packed into the prompts of `agents/prompts`, and proposes knobs
and code changes; reviews what others propose; explains results; tells a society's story. What comes
back is only ever a proposal, which is checked like any other, or a sentence whose numbers are
checked. What it does wrong is told to it; where it fails, or the endpoint does, the brain `search`
takes over for this one proposal.

Agents take turns in four temperaments, by their number.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from society import logs
from society.agents import tokens
from society.agents.briefing import Briefing
from society.agents.context import Quoter, Section, inert, pack
from society.agents.endpoint import Question
from society.agents.laboratory import STORYTELLER
from society.agents.search import SearchBrain
from society.errors import BadAnswer, EndpointError, InvalidVariant
from society.experiments import patches
from society.experiments.patches import BadPatch, Edit
from society.records import NewHypothesis, RefusalReason
from society.roles.base import Advice, Proposal, Reading, Review

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import jinja2

    from society.agents.endpoint import Endpoint
    from society.records import Variant
    from society.roles.base import Background, Knowledge, Refused
    from society.settings import Endpoint as EndpointSettings

TEMPERAMENTS = ("bold", "careful", "contrarian", "simplifier")
"""Those of the agents a01, a02, a03, a04; a05 is bold again."""
CORRECTIONS = 2
"""How often an unusable answer is given back to its author with what is wrong with it; code that
does not apply or run, so often in all of a duty."""
PATIENCE = 3
"""Proposals of one duty that may be refused before `search` makes the next one."""
MOST_GAIN = 1.0
"""What an idea for others counts at most, in noise floors: it is an opinion, not an estimate."""
MARGIN = 64
"""Tokens of a prompt that are left free, for the frame that a server puts around messages."""

Short = Annotated[str, Field(max_length=300)]
Long = Annotated[str, Field(max_length=900)]
Name = Annotated[str, Field(max_length=60)]
Code = Annotated[str, Field(max_length=6_000)]

T = TypeVar("T", bound=BaseModel)


def _as_text(said: object) -> object:
    """A number or a flag of JSON as the text that it stands for."""
    return json.dumps(said) if isinstance(said, bool | int | float) else said


Value = Annotated[Name, BeforeValidator(_as_text)]
"""Of a knob. Schemas ask for a text, so that one type does for all; others are taken as well."""


class Form(BaseModel):
    """An answer: no field beside those that are asked for."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Override(Form):
    """One knob."""

    name: Name
    value: Value


class EditForm(Form):
    """One replacement in one file."""

    file: Name
    search: Code
    replace: Code


class Guess(Form):
    """An idea for others."""

    statement: Short
    name: Name
    value: Value


class Idea(Form):
    """A proposal of knobs."""

    idea: Short
    rationale: Long
    expected_gain: float
    overrides: Annotated[list[Override], Field(max_length=8)]
    despite: Short
    hypotheses: Annotated[list[Guess], Field(max_length=2)]


class CodeIdea(Form):
    """A proposal of knobs, code, or both."""

    idea: Short
    rationale: Long
    expected_gain: float
    overrides: Annotated[list[Override], Field(max_length=8)]
    edits: Annotated[list[EditForm], Field(max_length=8)]
    simplification: bool
    despite: Short
    hypotheses: Annotated[list[Guess], Field(max_length=2)]


class ReviewForm(Form):
    """A review."""

    verdict: Literal["run", "revise", "skip"]
    reasons: Short
    expected_gain: float


class InsightForm(Form):
    """One insight."""

    text: Short
    evidence: Annotated[list[Name], Field(max_length=8)]


class InsightsForm(Form):
    """Insights."""

    insights: Annotated[list[InsightForm], Field(max_length=3)]


class StoryForm(Form):
    """A story."""

    paragraphs: Annotated[list[Long], Field(max_length=4)]


class Unusable(Exception):
    """The model's answers were no proposal, although it was told what was wrong with them."""


class Researcher:
    """See the module. Implements `society.roles.Brain` and `society.roles.Reader`."""

    name = "openai"
    slow = True

    def __init__(self, endpoint: Endpoint, settings: EndpointSettings, key: bytes) -> None:
        """Ask `endpoint`; `key` names the fences around quoted text, see `fence_key`."""
        self._endpoint, self._settings, self._key = endpoint, settings, key
        self._search = SearchBrain()
        self._said: Counter[str] = Counter()
        self._withheld: set[str] = set()
        self._log = logs.get("researcher")
        self.trouble = ""
        """Why `search` makes proposals now; empty while the model does."""

    # ---------------------------------------------------------------- proposals

    async def propose(self, knowledge: Knowledge) -> Proposal:
        """A proposal of the model, or of `search` where it has none that can be used."""
        if knowledge.background is None:
            return await self._search.propose(knowledge)
        if len(knowledge.refused) >= PATIENCE or _given_up(knowledge):
            self._log.info("search proposes instead", agent=knowledge.agent, reason="refused")
            return await self._search.propose(knowledge)
        try:
            proposal = await self._think(knowledge, knowledge.background)
        except (EndpointError, Unusable) as error:
            self._say(knowledge.agent, error)
            return await self._search.propose(knowledge)
        self._answered()
        return proposal

    async def _think(self, knowledge: Knowledge, background: Background) -> Proposal:
        files = self._code(knowledge, background)
        complaints: list[str] = []
        spoilt: Proposal | None = None
        answer: Idea | CodeIdea | None = None
        tries = 1 + CORRECTIONS - sum(_is_broken(one) for one in knowledge.refused)
        for _ in range(tries):
            failed = _change(answer) or _failed_change(knowledge, background)
            question = self._ask_for_idea(knowledge, background, files, complaints, failed)
            answer = None
            try:
                answer = await self._endpoint.ask(question)
                return self._proposal(answer, knowledge, files)
            except BadAnswer as error:
                complaints.append(error.feedback)
            except InvalidVariant as error:
                complaints.append(str(error))
            except BadPatch as error:
                complaints.append(str(error))
                spoilt = self._spoilt(answer, knowledge, str(error)) or spoilt
            except EndpointError as error:
                if spoilt is None:
                    raise
                self._say(knowledge.agent, error)
                return spoilt
            self._log.info("unusable idea", agent=knowledge.agent, reason=inert(complaints[-1]))
        if spoilt is not None:
            return spoilt
        raise Unusable(f"No usable proposal in {tries} answers: {complaints[-1]}")

    def _code(self, knowledge: Knowledge, background: Background) -> Mapping[str, str]:
        """The champion's code; empty where it may not be changed."""
        if not (self._settings.code and background.sources):
            return {}
        try:
            return patches.effective(background.sources, knowledge.champion.patch)
        except BadPatch as error:  # a champion of another version of the task
            self._log.warning("the champion's code cannot be shown", reason=str(error))
            return {}

    def _ask_for_idea(
        self,
        knowledge: Knowledge,
        background: Background,
        files: Mapping[str, str],
        complaints: Sequence[str],
        failed: str,
    ) -> Question[Any]:
        """The question for a proposal; for one of knobs only, if there is no room for a file."""
        marks = ["propose", knowledge.agent, str(knowledge.entropy), *complaints]
        quoter = self._quoter("\n".join(marks))
        sections = Briefing(knowledge, background, quoter).for_proposal(files, failed, complaints)
        question = self._question(
            knowledge.agent,
            "propose",
            sections,
            CodeIdea if files else Idea,
            temperament_of(knowledge.agent),
            metric=background.about.partition(":")[0],
            direction="lower" if knowledge.direction.sign < 0 else "higher",
            code=bool(files),
            complaints=[quoter.line(one, "a complaint", 600) for one in complaints[-CORRECTIONS:]],
        )
        shown = [one.file for one in sections if one.file and one.text in question.user]
        if files and not shown:
            return self._ask_for_idea(knowledge, background, {}, complaints, failed)
        return replace(question, words={"name": list(knowledge.space.knobs), "file": shown})

    def _proposal(
        self, answer: Idea | CodeIdea, knowledge: Knowledge, files: Mapping[str, str]
    ) -> Proposal:
        """The proposal that an answer amounts to. Raises `InvalidVariant` and `BadPatch`."""
        variant = self._with_overrides(answer, knowledge)
        simpler = False
        if isinstance(answer, CodeIdea) and answer.edits and files:
            assert knowledge.background is not None
            sources = knowledge.background.sources
            edited = patches.apply_edits(files, _edits(answer))
            patches.check(edited, sources, knowledge.background.rules or patches.TRAINER)
            patch = patches.canonical(sources, edited)
            variant = knowledge.space.variant(knowledge.task, variant.overrides, patch)
            simpler = answer.simplification
        return self._worded(answer, variant, knowledge, simpler)

    @staticmethod
    def _with_overrides(answer: Idea | CodeIdea, knowledge: Knowledge) -> Variant:
        champion = knowledge.champion
        changes = {one.name.strip(): one.value.strip() for one in answer.overrides}
        return knowledge.space.variant(
            knowledge.task, {**champion.overrides, **changes}, champion.patch
        )

    def _spoilt(
        self, answer: Idea | CodeIdea | None, knowledge: Knowledge, reason: str
    ) -> Proposal | None:
        """A proposal whose code change does not apply, for the record."""
        if not isinstance(answer, CodeIdea):
            return None
        overrides = self._with_overrides(answer, knowledge).overrides
        text = patches.broken(reason, _edits(answer))
        variant = knowledge.space.variant(knowledge.task, overrides, text)
        return self._worded(answer, variant, knowledge, simpler=False)

    def _worded(
        self, answer: Idea | CodeIdea, variant: Variant, knowledge: Knowledge, simpler: bool
    ) -> Proposal:
        words = (_sentence(answer.idea), _sentence(answer.rationale))
        return Proposal(
            variant,
            idea=" ".join(filter(None, words)) or "No reason was given.",
            despite=inert(answer.despite),
            model=self._settings.model,
            simplification=simpler,
            expected=_bounded(answer.expected_gain),
            hypotheses=tuple(_hypotheses(answer, knowledge)),
        )

    # ---------------------------------------------------------------- reviews

    async def review(self, proposal: Proposal, knowledge: Knowledge) -> Review | None:
        """What the next temperament thinks of a proposal; None if it cannot be asked."""
        background = knowledge.background
        if not self._settings.review or background is None:
            return None
        reviewer = temperament_of(knowledge.agent, 1)
        mark = f"review\n{knowledge.agent}\n{knowledge.entropy}\n{proposal.variant.fingerprint}"
        quoter = self._quoter(mark)
        changes = _diff(background.sources, knowledge.champion, proposal.variant)
        sections = Briefing(knowledge, background, quoter).for_review(proposal, changes)
        question = self._question(knowledge.agent, "review", sections, ReviewForm, reviewer)
        try:
            answer = await self._endpoint.ask(question)
        except EndpointError as error:
            self._say(knowledge.agent, error)
            return None
        expected = _bounded(answer.expected_gain)
        return Review(Advice(answer.verdict), inert(answer.reasons, 300), expected, reviewer)

    # ---------------------------------------------------------------- prose

    async def explain(self, agent: str, facts: Sequence[str]) -> Sequence[Reading]:
        """At most three insights with the ids they rest on; none if it cannot be asked."""
        section = self._facts(f"explain\n{agent}", facts)
        question = self._question(agent, "explain", [section], InsightsForm, temperament_of(agent))
        try:
            answer = await self._endpoint.ask(question)
        except EndpointError as error:
            self._say(agent, error)
            return ()
        return [
            Reading(inert(one.text, 300), tuple(name.strip() for name in one.evidence))
            for one in answer.insights
        ]

    async def narrate(self, facts: Sequence[str], unsupported: Sequence[str] = ()) -> str:
        """A few paragraphs on a society; empty if it cannot be asked."""
        section = self._facts("narrate", facts)
        question = self._question(
            STORYTELLER, "narrate", [section], StoryForm, "", unsupported=list(unsupported)
        )
        try:
            answer = await self._endpoint.ask(question)
        except EndpointError as error:
            self._say(STORYTELLER, error)
            return ""
        return "\n\n".join(filter(None, (inert(one, 900) for one in answer.paragraphs)))

    def _facts(self, mark: str, facts: Sequence[str]) -> Section:
        quoter = self._quoter("\n".join((mark, *facts)))
        lines = tuple(quoter.line(fact, "a fact", 600) for fact in facts)
        return Section("Facts", lines, 0, least=min(5, len(lines)), nonce=quoter.nonce)

    # ---------------------------------------------------------------- prompts

    def _question(
        self,
        agent: str,
        purpose: str,
        sections: Sequence[Section],
        form: type[T],
        temperament: str,
        **values: Any,
    ) -> Question[T]:
        """The prompt of that purpose, with as much of the sections as there is room for."""
        told = render(f"temperaments/{temperament}.md") if temperament else ""
        system = render("system.md", temperament=told).strip()
        values.setdefault("unsupported", [])
        frame = render(f"{purpose}.md", facts="", **values)
        room = self._settings.context_tokens - MARGIN - tokens.count(system) - tokens.count(frame)
        facts = pack(sections, max(0, room), tokens.count)
        user = render(f"{purpose}.md", facts=facts, **values).strip()
        return Question(agent, purpose, system, user, form)

    def _quoter(self, content: str) -> Quoter:
        return Quoter(self._key, content, self._withheld)

    # ---------------------------------------------------------------- trouble

    def _say(self, agent: str, error: Exception) -> None:
        """In the log: in full the first time, and again after an answer in between."""
        kind = type(error).__name__
        if not isinstance(error, BadAnswer | Unusable):
            self.trouble = kind
        self._said[kind] += 1
        if self._said[kind] == 1:
            self._log.warning("search proposes instead", agent=agent, reason=inert(str(error)))
        else:
            self._log.debug("search proposes instead", agent=agent, reason=kind)

    def _answered(self) -> None:
        if self.trouble:
            self._log.warning("the model answers again", after=self.trouble)
        self.trouble = ""
        self._said.clear()

    async def close(self) -> None:
        """Give the endpoint back."""
        await self._endpoint.close()


def temperament_of(agent: str, step: int = 0) -> str:
    """The temperament of an agent, by the number in its name; `step` further for its reviewer."""
    number = re.search(r"\d+", agent)
    place = int(number.group()) - 1 if number else 0
    return TEMPERAMENTS[(place + step) % len(TEMPERAMENTS)]


@cache
def _templates() -> jinja2.Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("society.agents", "prompts"),
        undefined=StrictUndefined,
        autoescape=False,
        keep_trailing_newline=False,
    )


def render(name: str, **values: Any) -> str:
    """A file of `agents/prompts` with its values filled in; a missing one is an error."""
    return _templates().get_template(name).render(**values)


def fence_key(path: Path) -> bytes:
    """The key of a notebook's fences, made when it is first asked for; see `context.Quoter`.

    Kept, so that a question asked again after a crash is the same one and its answer is known.
    """
    try:
        with path.open("xb") as file:
            path.chmod(0o600)
            file.write(secrets.token_bytes(16))
    except FileExistsError:
        pass
    return path.read_bytes()


def _is_broken(refused: Refused) -> bool:
    return bool(refused.proposal.model) and refused.reason is RefusalReason.BROKEN


def _given_up(knowledge: Knowledge) -> bool:
    """Whether code was given back so often that its author is asked for no more of it."""
    broken = [one for one in knowledge.refused if _is_broken(one)]
    spoilt = any(patches.reason_of(one.proposal.variant.patch) for one in broken)
    return spoilt or len(broken) > CORRECTIONS


def _change(answer: Idea | CodeIdea | None) -> str:
    """The edits of an answer that could not be used, to be shown to their author."""
    edits = answer.edits if isinstance(answer, CodeIdea) else []
    return "\n".join(
        f"file: {one.file}\n--- search\n{one.search}\n--- replace\n{one.replace}" for one in edits
    )


def _failed_change(knowledge: Knowledge, background: Background) -> str:
    """The latest code change of this duty that was tried and did not work."""
    if not knowledge.refused or not _is_broken(knowledge.refused[-1]):
        return ""
    variant = knowledge.refused[-1].proposal.variant
    return "\n".join(_diff(background.sources, knowledge.champion, variant))


def _edits(answer: CodeIdea) -> list[Edit]:
    return [Edit(one.file.strip(), one.search, one.replace) for one in answer.edits]


def _hypotheses(answer: Idea | CodeIdea, knowledge: Knowledge) -> list[NewHypothesis]:
    """The ideas for others that are variants; each is the champion with one more change."""
    found = []
    for guess in answer.hypotheses:
        champion = knowledge.champion
        overrides = {**champion.overrides, guess.name.strip(): guess.value.strip()}
        try:
            variant = knowledge.space.variant(knowledge.task, overrides, champion.patch)
        except InvalidVariant:
            continue
        if variant.fingerprint == champion.fingerprint or variant.fingerprint in knowledge.known:
            continue
        statement = _sentence(guess.statement) or f"{guess.name}={guess.value} improves it."
        found.append(NewHypothesis(statement, "A language model's idea.", variant, MOST_GAIN))
    return found


def _diff(sources: Mapping[str, str], champion: Variant, variant: Variant) -> list[str]:
    """The lines of a proposal's code change against the champion's code."""
    import difflib

    if not sources or variant.code == champion.code:
        return []
    try:
        old = patches.effective(sources, champion.patch)
        new = patches.effective(sources, variant.patch)
    except BadPatch:  # of another version of the task
        return []
    found: list[str] = []
    for name in sorted(new):
        before, after = old.get(name, "").splitlines(), new[name].splitlines()
        found += difflib.unified_diff(before, after, name, name, n=3, lineterm="")
    return found


def _sentence(text: str) -> str:
    clean = inert(text)
    return clean if not clean or clean[-1] in ".!?…" else f"{clean}."


def _bounded(gain: float) -> float:
    """An expected gain in noise floors, within reason."""
    return max(-99.0, min(99.0, gain)) if gain == gain else 0.0
