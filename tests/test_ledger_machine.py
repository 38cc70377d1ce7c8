"""The whole ledger against a model in plain Python, step by random step, on every backend.

After each step the two must agree, the tables must break no rule of the design, nothing that was
acknowledged may be gone, and whoever reads must see the same: the ledger that writes, a reader
that was opened at the start, and one that is opened afresh.
"""

from __future__ import annotations

import dataclasses
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from ledger_audit import breaches, fact_counts
from ledger_model import LISTS, PROBATION, Held, Idea, Job, Known, Model
from postgres import Server
from sqlalchemy import event

from society.errors import InvariantViolated, LeaseLost, SocietyError
from society.memory.ledger import Ledger
from society.memory.prose import Prose
from society.records import (
    Activity,
    Budget,
    BudgetKind,
    Champion,
    Claim,
    Cost,
    Crown,
    Decision,
    Effect,
    Entry,
    Environment,
    Hypothesis,
    HypothesisDropped,
    HypothesisState,
    Lease,
    Measurement,
    NewClaim,
    NewHypothesis,
    NewInsight,
    NewPrior,
    NewRefusal,
    NewStudy,
    Noise,
    Outcome,
    RefusalReason,
    Run,
    RunKind,
    Scope,
    SeedList,
    SocietyState,
    Study,
    StudyResult,
    Variant,
    Verdict,
)

SCOPES = (Scope("toy/cpu", "cpu-A"), Scope("toy/cpu", "cpu-B"))
BASELINE = Variant("toy/cpu")
VARIANTS = (BASELINE, *(Variant("toy/cpu", {"lr": lr}) for lr in (0.01, 0.02, 0.04)))
AGENTS = ("ada", "ben", "cyd")
LONG_S, OVER_S = 3600.0, -1.0
"""A lease that outlives the test, and one that has run out by the database's clock at once."""

scopes = st.sampled_from((SCOPES[0],) * 5 + SCOPES[1:])
agents, variants = st.sampled_from(AGENTS), st.sampled_from(VARIANTS)
recent = st.integers(0, 5)
"""Which of the latest records, 0 the last one."""
lasting = st.sampled_from((LONG_S,) * 4 + (OVER_S,))
outcomes = st.sampled_from((Outcome.COMPLETED,) * 5 + tuple(Outcome))
rarely = st.sampled_from((False,) * 9 + (True,))
steps = st.integers(0, 24)
"""How many statements a call may send before its process dies."""

Places = Callable[[], Path | str]


class Death(BaseException):
    """The process is killed."""


@contextmanager
def death_after(ledger: Ledger, statements: int) -> Iterator[None]:
    """Kill the caller before it sends one more statement, or before it commits."""
    left = [statements]

    def step(*_: Any) -> None:
        if left[0] <= 0:
            raise Death
        left[0] -= 1

    engine = ledger._db._engine
    names = ("before_cursor_execute", "commit")
    for name in names:
        event.listen(engine, name, step)
    try:
        yield
    finally:
        for name in names:
            event.remove(engine, name, step)


def latest(records: list[Any], back: int) -> Any:
    """One of the last records."""
    return records[-1 - back % len(records)]


def everything(ledger: Ledger) -> dict[str, Any]:
    """All that a ledger can be asked, for comparing two of them."""
    return {
        "version": ledger.version(),
        "societies": ledger.societies(),
        "runs": ledger.runs(),
        "claims": ledger.claims(),
        "open": [ledger.claims(scope, open_only=True) for scope in SCOPES],
        "champions": [ledger.champions(scope) for scope in SCOPES],
        "insights": ledger.insights(),
        "hypotheses": ledger.hypotheses(),
        "open ideas": [ledger.hypotheses(one, state=HypothesisState.OPEN) for one in SCOPES],
        "noise": ledger.noise_history(),
        "studies": ledger.studies(),
        "activities": ledger.activities(),
        "scopes": ledger.scopes(),
        "leases": [ledger.leases(scope) for scope in SCOPES],
        "ended": [ledger.ended_leases(scope) for scope in SCOPES],
        "counts": [ledger.counts(scope) for scope in SCOPES],
        "refusals": ledger.refusals(),
        "priors": ledger.priors(),
        "outbox": ledger.posted(0, 10**6),
        "prose": list(Prose(ledger).all()),
        "screened": [
            ledger.runs(SCOPES[0], kinds=[RunKind.SCREENING], variant=variant)
            for variant in VARIANTS
        ],
        "pools": [ledger.pool(SCOPES[0], variant) for variant in VARIANTS],
        "lists": [ledger.pool(SCOPES[0], BASELINE, which) for which in SeedList],
    }


class LedgerMachine(RuleBasedStateMachine):
    """Every way to write to a ledger, deaths included."""

    places: ClassVar[Places]
    reached: ClassVar[Counter[str]]
    """How often each rule ended how, over all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.place = type(self).places()
        self.ledger = Ledger.open(self.place)
        self.reader = Ledger.open(self.place, read_only=True)
        self.model, self.steps = Model(), 0
        self.facts = fact_counts(self.ledger)
        self.version = self.ledger.version()
        self.other: dict[str, list[Any]] = {
            name: [] for name in ("insights", "noise", "refusals", "priors", "activities")
        }

    def teardown(self) -> None:
        self.all_readers_see_the_same()
        self.reader.close()
        self.ledger.close()

    # --- how a step is made --------------------------------------------------------------------

    def call(self, name: str, refused: type[Exception] | None, act: Callable[[], Any]) -> Any:
        """Make a call that must succeed (and grow the version), or raise just that error."""
        before = self.ledger.version()
        if refused is None:
            result = act()
            self.reached[f"{name}: done"] += 1
            assert self.ledger.version() > before
            return result
        with pytest.raises(SocietyError) as caught:
            act()
        assert type(caught.value) is refused, f"{caught.value!r}, not {refused.__name__}"
        self.reached[f"{name}: {refused.__name__}"] += 1
        assert self.ledger.version() == before
        return None

    def commit(
        self,
        name: str,
        scope: Scope,
        agent: str,
        *entries: Entry,
        refused: type[Exception] | None = None,
        society: str | None = None,
    ) -> bool:
        """Commit under a new key; whether it was written."""
        key = f"key {len(self.model.keys)}"
        society = society or self.model.societies[0]
        activity = Activity(agent, "role", name, key, 1.0, 2.0, "")

        def act() -> bool:
            return self.ledger.commit(scope, society, agent, entries, key=key, activity=activity)

        if self.call(name, refused, act) is None:
            return False
        self.model.keys.add(key)
        self.other["activities"].append(activity)
        return True

    def society(self, back: int) -> str:
        return str(latest(self.model.societies, back))

    def seeds(self, which: str, scope: Scope, count: int) -> tuple[int, ...]:
        """The head of a list, which must be what it was, and the same on both ledgers."""
        found = self.ledger.seeds(SeedList(which), scope, count)
        known = self.model.seeds.get((which, scope), ())
        shared = min(len(found), len(known))
        assert found[:shared] == known[:shared]
        if len(found) > len(known):
            self.model.seeds[which, scope] = found
        return found

    # --- societies and seeds -------------------------------------------------------------------

    @initialize(stage=st.integers(0, 4))
    def begin(self, stage: int) -> None:
        """Two societies and a life at one of five stages, before chance takes over."""
        here = SCOPES[0]
        self.open_society(1)
        self.open_society(2)
        if stage >= 1:  # a baseline was crowned and calibrated
            self.screened(here, 0, "ada", BASELINE)
            self.crown(here, 0, "ada", fair=True)
            self.calibrated(here, 0, "cyd", BASELINE)
        if stage >= 2:  # there is an idea, and a claim against the baseline
            self.publish(here, "ben", VARIANTS[3], 1)
            self.screened(here, 0, "ada", VARIANTS[1])
            self.claim(0, BASELINE, elsewhere=False, fair=True)
        if stage >= 3:  # it was verified by somebody else
            self.verify(0, "ben", Outcome.COMPLETED, 2)
        if stage >= 4:  # accepted and crowned, and there is another claim
            self.accept(0)
            self.screened(here, 1, "ben", VARIANTS[2])
            self.claim(0, BASELINE, elsewhere=False, fair=True)

    def open_society(self, seed: int) -> None:
        if len(self.model.societies) == 4:
            return
        record = self.call("society", None, lambda: self.ledger.start_society(seed, {"n": seed}))
        assert record == self.ledger.society(record.id)
        assert record.id not in self.model.societies
        self.model.societies.append(record.id)

    def set_state(self, back: int, state: SocietyState) -> None:
        one = self.society(back)
        self.call("state", None, lambda: self.ledger.set_society_state(one, state, wall_s=1.0))
        assert self.ledger.society(one).state is state

    def draw(self, which: str, scope: Scope, count: int) -> None:
        assert len(self.seeds(which, scope, count)) == count
        assert self.reader.seeds(SeedList(which), scope, count) == self.seeds(which, scope, count)

    # --- leases --------------------------------------------------------------------------------

    def lease(
        self,
        name: str,
        job: Job,
        society: str,
        ttl_s: float,
        refused: type[Exception] | None,
        take: Callable[[], Lease],
    ) -> Held | None:
        """Take a lease and check what it says against the seed lists and all leases before."""
        lease = self.call(name, refused, take)
        if lease is None:
            return None
        assert all(lease.token > held.lease.token for held in self.model.held)
        assert all(lease.run_id != held.lease.run_id for held in self.model.held)
        which = LISTS[lease.kind]
        place = 0 if which == "screening" else int(str(job.place[0]))
        assert lease.seed == self.seeds(which, job.scope, place + 1)[place]
        if which == "verification":
            assert lease.seed not in self.seeds("screening", job.scope, 1)
        self.model.leased(lease, job, society, expired=ttl_s < 0)
        return self.model.held[-1]

    @rule(scope=scopes, back=recent, agent=agents, variant=variants, ttl_s=lasting)
    def screen(self, scope: Scope, back: int, agent: str, variant: Variant, ttl_s: float) -> None:
        self.take_screening(scope, back, agent, variant, ttl_s)

    def take_screening(
        self, scope: Scope, back: int, agent: str, variant: Variant, ttl_s: float
    ) -> Held | None:
        society, job = self.society(back), self.model.screening_job(scope, variant)
        return self.lease(
            "screen", job, society, ttl_s, self.model.screening_refusal(scope, variant),
            lambda: self.ledger.lease_screening(
                scope, society, holder=agent, variant=variant, ttl_s=ttl_s, idea="an idea"
            ),
        )  # fmt: skip

    @rule(scope=scopes, back=recent, agent=agents, variant=variants)
    def screened(self, scope: Scope, back: int, agent: str, variant: Variant) -> None:
        """Screen and finish, as most agents do."""
        held = self.take_screening(scope, back, agent, variant, LONG_S)
        if held is not None:
            self.end(held, Outcome.COMPLETED, 1.0)

    @rule(scope=scopes, back=recent, agent=agents, variant=variants)
    def calibrated(self, scope: Scope, back: int, agent: str, variant: Variant) -> None:
        """Calibrate a variant on its next seed."""
        society, job = self.society(back), self.model.next_job(scope, variant, "verification")
        held = self.lease(
            "calibration", job, society, LONG_S,
            self.model.claim_refusal(scope, agent, variant, RunKind.CALIBRATION, None),
            lambda: self.ledger.lease_next_seed(
                scope, society, holder=agent, variant=variant, kind=RunKind.CALIBRATION,
                ttl_s=LONG_S,
            ),
        )  # fmt: skip
        if held is not None:
            self.end(held, Outcome.COMPLETED, 0.95)

    @rule(scope=scopes, back=recent, agent=agents, variant=variants, ttl_s=lasting,
          claim=st.none() | recent,
          kind=st.sampled_from((RunKind.CALIBRATION, RunKind.VERIFICATION)))  # fmt: skip
    def pool(
        self,
        scope: Scope,
        back: int,
        agent: str,
        variant: Variant,
        ttl_s: float,
        claim: int | None,
        kind: RunKind,
    ) -> None:
        asked = claim is not None and bool(self.model.claims)
        known: Known | None = latest(self.model.claims, claim or 0) if asked else None
        society, job = self.society(back), self.model.next_job(scope, variant, "verification")
        self.lease(
            kind.value, job, society, ttl_s,
            self.model.claim_refusal(scope, agent, variant, kind, known),
            lambda: self.ledger.lease_next_seed(
                scope, society, holder=agent, variant=variant, kind=kind, ttl_s=ttl_s,
                claim_id=None if known is None else known.claim.id,
            ),
        )  # fmt: skip

    @precondition(lambda self: self.model.claims)
    @rule(claim=recent, agent=agents, outcome=outcomes, count=st.integers(1, 3))
    def verify(self, claim: int, agent: str, outcome: Outcome, count: int) -> None:
        """Verify a claim on the next seeds, as most agents do."""
        known: Known = latest(self.model.claims, claim)
        for _ in range(count):
            job = self.model.next_job(known.scope, known.claim.variant, "verification")
            held = self.lease(
                "verification", job, self.society(0), LONG_S,
                self.model.claim_refusal(
                    known.scope, agent, known.claim.variant, RunKind.VERIFICATION, known
                ),
                lambda: self.ledger.lease_next_seed(
                    known.scope, self.society(0), holder=agent, variant=known.claim.variant,
                    kind=RunKind.VERIFICATION, claim_id=known.claim.id, ttl_s=LONG_S,
                ),
            )  # fmt: skip
            if held is not None:
                self.end(held, outcome, 0.9)

    @rule(scope=scopes, back=recent, agent=agents, variant=variants, ttl_s=lasting)
    def audit(self, scope: Scope, back: int, agent: str, variant: Variant, ttl_s: float) -> None:
        society, job = self.society(back), self.model.next_job(scope, variant, "audit")
        self.lease(
            "audit", job, society, ttl_s, None,
            lambda: self.ledger.lease_audit(
                scope, society, holder=agent, variant=variant, ttl_s=ttl_s
            ),
        )  # fmt: skip

    @rule(scope=scopes, agent=agents, variant=variants, ttl_s=lasting, position=st.integers(0, 2),
          data=st.none() | st.integers(0, 2), repeat=st.integers(0, 1))  # fmt: skip
    def study(
        self,
        scope: Scope,
        agent: str,
        variant: Variant,
        ttl_s: float,
        position: int,
        data: int | None,
        repeat: int,
    ) -> None:
        job = self.model.study_job(scope, variant, position, data, repeat)
        self.lease(
            "study", job, self.society(0), ttl_s, self.model.study_refusal(job),
            lambda: self.ledger.lease_study(
                scope, self.society(0), holder=agent, variant=variant, position=position,
                data_position=data, repeat=repeat, ttl_s=ttl_s,
            ),
        )  # fmt: skip

    @precondition(lambda self: self.model.claims)
    @rule(claim=recent, agent=agents, ttl_s=lasting)
    def reproduce(self, claim: int, agent: str, ttl_s: float) -> None:
        known: Known = latest(self.model.claims, claim)
        held = self.lease(
            "reproduction", self.model.reproduction_job(known), self.society(0), ttl_s,
            self.model.reproduction_refusal(known, agent),
            lambda: self.ledger.lease_reproduction(
                known.scope, self.society(0), holder=agent, claim_id=known.claim.id, ttl_s=ttl_s
            ),
        )  # fmt: skip
        if held is not None:
            assert held.lease.seed == self.ledger.run(known.claim.screening_run).seed

    @precondition(lambda self: self.model.held)
    @rule(back=recent, ttl_s=st.sampled_from((LONG_S, OVER_S)))
    def beat(self, back: int, ttl_s: float) -> None:
        """A heartbeat; a negative one lets the lease run out by the database's clock."""
        held: Held = latest(self.model.held, back)
        if not held.living:
            with pytest.raises(LeaseLost):
                self.ledger.heartbeat(held.lease, ttl_s)
            self.reached["heartbeat: LeaseLost"] += 1
            return
        prolonged = self.ledger.heartbeat(held.lease, ttl_s)
        assert (prolonged.expires_at > self.ledger.now()) == (ttl_s > 0)
        same = dataclasses.replace(prolonged, expires_at=held.lease.expires_at)
        assert same == held.lease
        held.lease, held.expired = prolonged, ttl_s < 0
        self.reached["heartbeat: done"] += 1

    @precondition(lambda self: self.model.held)
    @rule(back=recent)
    def release(self, back: int) -> None:
        held: Held = latest(self.model.held, back)
        self.ledger.release(held.lease)
        held.living = False

    def release_all(self, back: int) -> None:
        """A society starts again after a crash: what it held is free."""
        society = self.society(back)
        count = self.call("release all", None, lambda: self.ledger.release_all(society))
        assert count == self.model.released_all(society)
        for idea in self.model.ideas:
            if idea.record.state is HypothesisState.TAKEN and idea.taken_in == society:
                self.model.reopen(idea)

    def end(self, held: Held, outcome: Outcome, score: float) -> Run | None:
        """Finish a lease, which must fail with `LeaseLost` when it has ended."""
        measured = _measured(outcome, score)
        run: Run | None = self.call(
            "finish", self.model.end_refusal(held), lambda: self.finish_call(held, measured)
        )
        if run is not None:
            self.check_run(run, held, measured)
            self.model.finished(held, run)
        return run

    def finish_call(self, held: Held, measured: Measurement) -> Run:
        environment = Environment("cpu", held.job.scope.tier[-1], 1, "3.11", {"torch": "2"})
        return self.ledger.finish(held.lease, measured, environment, _BUDGET)

    def check_run(self, run: Run, held: Held, measured: Measurement) -> None:
        """A run is its lease and what was measured, and can be read back by anybody."""
        lease = held.lease
        for name in ("kind", "variant", "seed", "split", "claim_id", "data_seed", "repeat"):
            assert getattr(run, name) == getattr(lease, name)
        assert (run.id, run.agent, run.society) == (lease.run_id, lease.holder, held.society)
        for name in ("outcome", "score", "cost", "log_tail", "curve", "data_hash"):
            assert getattr(run, name) == getattr(measured, name)
        assert run.number == len(self.model.runs) + 1
        assert run.started_at <= run.finished_at
        assert self.reader.run(run.id) == run

    @precondition(lambda self: self.model.held)
    @rule(back=recent, outcome=outcomes, score=st.sampled_from((0.5, 0.9, 1.0)), slow=rarely)
    def finish(self, back: int, outcome: Outcome, score: float, slow: bool) -> None:
        """By its holder: in time, late while nobody has taken the work, or too late."""
        held: Held = latest(self.model.held, back)
        if slow:
            self.beat(back, OVER_S)
        late = held.living and held.expired
        if self.end(held, outcome, score) is not None and late:
            self.reached["finish: late"] += 1

    @precondition(lambda self: any(held.living for held in self.model.held))
    @rule(back=recent, harm=st.sampled_from(("token", "holder", "subject", "run_id", "score")))
    def finish_with_a_forgery(self, back: int, harm: str) -> None:
        """Another token, another name or an impossible score ends nothing."""
        held: Held = latest([one for one in self.model.held if one.living], back)
        measured = _measured(Outcome.COMPLETED, 1.0)
        forged, refused = held, LeaseLost
        if harm == "score":
            measured, refused = dataclasses.replace(measured, score=None), InvariantViolated
        else:
            value = held.lease.token + 10**6 if harm == "token" else "another"
            lease = dataclasses.replace(held.lease, **{harm: value})
            forged = dataclasses.replace(held, lease=lease)
        self.call(f"forged {harm}", refused, lambda: self.finish_call(forged, measured))

    # --- claims, verdicts, champions -------------------------------------------------------------

    @precondition(lambda self: self.model.runs)
    @rule(back=recent, reference=variants, elsewhere=rarely,
          fair=st.booleans())  # fmt: skip
    def claim(self, back: int, reference: Variant, elsewhere: bool, fair: bool) -> None:
        """From any run, against any variant; a fair one from a screening, against the champion."""
        run: Run = latest(self.model.runs, back)
        if fair:
            screened = [one for one in self.model.runs if one.kind is RunKind.SCREENING]
            run = latest(screened, back) if screened else run
            history = self.model.champions.get(self.model.job_of[run.id].scope)
            reference = history[-1].variant if history else reference
        scope = self.model.job_of[run.id].scope
        if elsewhere:
            scope = SCOPES[1 - SCOPES.index(scope)]
        entry = NewClaim(run.id, reference, 0.01, 1, 0.05, 0.0)
        refused = self.model.filing_refusal(scope, entry)
        if self.commit("claim", scope, "eve", entry, refused=refused):
            filed: Claim = self.ledger.claims()[-1]
            made = (filed.author, filed.variant, filed.screening_run, filed.verdict)
            assert made == (run.agent, run.variant, run.id, None)
            assert (filed.reference, filed.society) == (reference, run.society)
            self.model.claims.append(Known(filed, scope))

    @precondition(lambda self: self.model.claims)
    @rule(back=recent, decision=st.sampled_from(Decision), taken=st.integers(0, 2**12 - 1),
          extra=st.none() | recent, unknown=rarely, probation=st.booleans())  # fmt: skip
    def judge(
        self,
        back: int,
        decision: Decision,
        taken: int,
        extra: int | None,
        unknown: bool,
        probation: bool,
    ) -> None:
        """Any decision on any claim, citing some proper evidence and sometimes something else."""
        known: Known = latest(self.model.claims, back)
        if known.verdicts and probation:
            decision = PROBATION[taken % 2]
        cited = [run for n, run in enumerate(self.model.evidence(known)) if taken >> (n % 12) & 1]
        if extra is not None:
            cited.append(latest(self.model.runs, extra).id)
        if unknown:
            cited.append("r99999")
        cited = list(dict.fromkeys(cited))
        entry = _verdict(known, decision, cited)
        refused = self.model.verdict_refusal(known, decision, cited)
        if self.commit(decision.value, known.scope, "cyd", entry, refused=refused):
            self.judged(known, entry)

    def judged(self, known: Known, entry: Verdict) -> None:
        """Note a verdict as the ledger has it."""
        stored = self.ledger.claim(known.claim.id).verdict
        assert stored is not None
        assert dataclasses.replace(stored, decided_at=0.0) == entry
        known.verdicts.append(stored)

    @rule(scope=scopes, back=recent, agent=agents, fair=st.booleans(), variant=variants,
          reverts=st.booleans(), screening=st.none() | recent)  # fmt: skip
    def crown(
        self,
        scope: Scope,
        back: int,
        agent: str,
        fair: bool,
        variant: Variant = BASELINE,
        reverts: bool = False,
        screening: int | None = None,
    ) -> None:
        """Crown a claim's variant, the baseline, or (unfair) anything at all."""
        claims = [one for one in self.model.claims if one.scope == scope]
        claim = latest(claims, back) if claims else None
        history = self.model.champions.get(scope, [])
        if fair and history and claim is None:
            return
        if fair:
            claim = claim if history else None
            variant = claim.claim.variant if claim else BASELINE
            reverts, screening = False, None
        asked = screening is not None and bool(self.model.runs)
        run = latest(self.model.runs, screening or 0).id if asked else None
        entry = Crown(variant, claim.claim.id if claim else None, run, reverts)
        refused = self.model.crown_refusal(scope, entry, None)
        if self.commit("revert" if reverts else "crown", scope, agent, entry, refused=refused):
            self.crowned(scope, entry)

    def crowned(self, scope: Scope, entry: Crown) -> None:
        """Note an entry of the history as the ledger has it."""
        new: Champion = self.ledger.champions(scope)[-1]
        made = Champion(
            len(self.model.champions.get(scope, ())), entry.variant, entry.claim_id, new.since,
            entry.screening_run, entry.reverts,
        )  # fmt: skip
        assert new == made
        self.model.champions.setdefault(scope, []).append(new)

    @precondition(lambda self: self.model.claims)
    @rule(back=recent)
    def accept(self, back: int) -> None:
        """Verdict and crown in one commit, as a statistician does: both of them or neither."""
        known: Known = latest(self.model.claims, back)
        verdict = _verdict(known, Decision.ACCEPTED, self.model.evidence(known))
        crown = Crown(known.claim.variant, known.claim.id, known.claim.screening_run)
        refused = self.model.verdict_refusal(known, Decision.ACCEPTED, verdict.runs)
        refused = refused or self.model.crown_refusal(known.scope, crown, verdict)
        if self.commit("accept", known.scope, "cyd", verdict, crown, refused=refused):
            self.judged(known, verdict)
            self.crowned(known.scope, crown)

    @precondition(lambda self: any(len(h) > 1 for h in self.model.champions.values()))
    @rule()
    def roll_back(self) -> None:
        """Withdraw the champion's claim and restore the champion before, in one commit."""
        scope = next(scope for scope, h in self.model.champions.items() if len(h) > 1)
        last, before = self.model.champions[scope][-1], self.model.champions[scope][-2]
        known = next((one for one in self.model.claims if one.claim.id == last.claim_id), None)
        if known is None:
            return
        verdict = _verdict(known, Decision.ROLLED_BACK, self.model.evidence(known))
        crown = Crown(before.variant, before.claim_id, before.screening_run, reverts=True)
        refused = self.model.verdict_refusal(known, Decision.ROLLED_BACK, verdict.runs)
        if self.commit("roll back", scope, "cyd", verdict, crown, refused=refused):
            self.judged(known, verdict)
            self.crowned(scope, crown)

    # --- prose and plans -------------------------------------------------------------------------

    def note(self, scope: Scope, agent: str, number: int) -> None:
        """An insight, a noise floor, a refusal and a prior in one commit."""
        count = len(self.other["priors"])
        refusal = NewRefusal(
            VARIANTS[number % 4], RefusalReason.DUPLICATE, None, f"because {number}"
        )
        noise = Noise(scope.task, scope.tier, 0.1 * number, 0.0, 1.0, 8)
        prior = NewPrior("results.tsv", f"{count}", 0.9, "keep", "a line")
        cited = tuple(run.id for run in self.model.runs[-number:])
        insight = NewInsight(f"insight {number}", cited)
        if self.commit("note", scope, agent, insight, noise, refusal, prior):
            self.other["noise"].append(noise)
            self.read_note("insights", insight, ("text", "evidence"), author=agent)
            self.read_note(
                "refusals", refusal, ("variant", "reason", "run_id", "note"), agent=agent
            )
            self.read_note("priors", prior, ("source", "label", "score", "status", "description"))

    def read_note(self, name: str, entry: Entry, fields: tuple[str, ...], **others: str) -> None:
        """Keep the newest record of a kind, which must be the entry that was committed."""
        new = getattr(self.ledger, name)()[-1]
        assert all(getattr(new, field) == getattr(entry, field) for field in fields)
        assert all(getattr(new, field) == value for field, value in others.items())
        self.other[name].append(new)

    def register(self, scope: Scope, number: int) -> None:
        plan = {"runs": number, "nested": [1, "two", None]}
        if self.commit("register", scope, "eve", NewStudy("noise", f"study {number}", plan)):
            new = self.ledger.studies()[-1]
            assert (dict(new.plan), new.result, new.scope) == (plan, None, scope)
            self.model.studies.append(new)

    def conclude(self, back: int, number: int) -> None:
        """A result: once, of a study that is registered, citing runs that exist."""
        known: Study | None = latest(self.model.studies, back) if self.model.studies else None
        unknown = number > 7
        cited = [run.id for run in self.model.runs[-number:]] + (["r99999"] if unknown else [])
        fine = known is not None and known.result is None and not unknown
        study = "st999" if known is None else known.id
        entry = StudyResult(study, {"effect": 0.5}, tuple(cited))
        scope = SCOPES[0] if known is None else known.scope
        refused = None if fine else InvariantViolated
        if self.commit("conclude", scope, "eve", entry, refused=refused):
            done = self.ledger.study(study)
            assert (dict(done.result or {}), done.evidence) == ({"effect": 0.5}, tuple(cited))
            self.model.studies[self.model.studies.index(known)] = done

    # --- hypotheses ------------------------------------------------------------------------------

    @rule(scope=scopes, agent=agents, variant=variants, value=st.integers(0, 3))
    def publish(self, scope: Scope, agent: str, variant: Variant, value: int) -> None:
        """A new idea is listed; one that was had or screened before adds nothing."""
        entry = NewHypothesis("try it", "it may help", variant, float(value), cost=2.0)
        new = not self.model.proposed(scope, variant)
        if self.commit("publish" if new else "publish again", scope, agent, entry) and new:
            posted = next(one for one in self.ledger.hypotheses(scope) if one.variant == variant)
            made = (posted.author, posted.statement, posted.priority, posted.cost, posted.run_id)
            assert made == (agent, "try it", float(value), 2.0, None)
            stored = dataclasses.replace(
                posted, state=HypothesisState.OPEN, taken_by=None, taken_until=None
            )
            self.model.ideas.append(Idea(stored, scope))

    @precondition(lambda self: self.model.ideas)
    @rule(back=recent, society=recent, agent=agents, ttl_s=lasting, unknown=rarely)
    def take(self, back: int, society: int, agent: str, ttl_s: float, unknown: bool) -> None:
        """Take an idea to test it: nobody else may while it lasts, or while it is screened."""
        idea: Idea | None = None if unknown else latest(self.model.ideas, back)
        id, name = "h9999" if idea is None else idea.record.id, self.society(society)
        taken: Hypothesis | None = self.call(
            "take", self.model.take_refusal(idea),
            lambda: self.ledger.take_hypothesis(id, name, agent, ttl_s),
        )  # fmt: skip
        if taken is not None and idea is not None:
            until = taken.taken_until if ttl_s > 0 else idea.record.taken_until
            self.model.change(idea, state=HypothesisState.TAKEN, taken_by=agent, taken_until=until)
            idea.expired, idea.taken_in = ttl_s < 0, name
            assert taken == self.model.now(idea)

    @precondition(lambda self: self.model.ideas)
    @rule(back=recent, agent=agents)
    def give_back(self, back: int, agent: str) -> None:
        """Whoever has taken an idea reopens it; of anybody else it changes nothing."""
        idea: Idea = latest(self.model.ideas, back)
        self.ledger.return_hypothesis(idea.record.id, agent)
        record = idea.record
        if record.state is HypothesisState.TAKEN and record.taken_by == agent:
            self.model.reopen(idea)
            self.reached["give back: done"] += 1

    @precondition(lambda self: self.model.ideas)
    @rule(back=recent, agent=agents, unknown=rarely)
    def drop(self, back: int, agent: str, unknown: bool) -> None:
        """Closed for a reason, unless somebody has taken, tested or dropped it."""
        idea: Idea | None = None if unknown else latest(self.model.ideas, back)
        entry = HypothesisDropped("h9999" if idea is None else idea.record.id, "a reason")
        refused = InvariantViolated if idea is None else None
        scope = SCOPES[0] if idea is None else idea.scope
        waits = idea is not None and self.model.waits(idea)
        self.commit("drop" if waits else "drop in vain", scope, agent, entry, refused=refused)
        if idea is not None and waits:
            self.model.reopen(idea)
            self.model.change(idea, state=HypothesisState.DROPPED, dropped_because="a reason")

    # --- the smaller things, one rule for all so that they leave chance its time -----------------

    @rule(scope=scopes, agent=agents, back=recent, number=st.integers(0, 9),
          what=st.sampled_from(("society", "state", "seeds", "release all", "note", "register",
                                "conclude", "again", "half", "reopen", "abandon")))  # fmt: skip
    def chore(self, scope: Scope, agent: str, back: int, number: int, what: str) -> None:
        acts: dict[str, Callable[[], None]] = {
            "society": lambda: self.open_society(number),
            "state": lambda: self.set_state(back, list(SocietyState)[number % 3]),
            "seeds": lambda: self.draw(list(SeedList)[number % 4].value, scope, back),
            "release all": lambda: self.release_all(back),
            "note": lambda: self.note(scope, agent, number),
            "register": lambda: self.register(scope, number),
            "conclude": lambda: self.conclude(back, number),
            "again": lambda: self.repeat_a_key(agent),
            "half": lambda: self.half_a_commit(scope, agent),
            "reopen": self.reopen,
            "abandon": self.abandon,
        }
        acts[what]()

    @rule(scope=scopes, agent=agents, back=recent, variant=variants, step=steps,
          what=st.sampled_from(("commit", "finish", "lease")))  # fmt: skip
    def die(
        self, scope: Scope, agent: str, back: int, variant: Variant, step: int, what: str
    ) -> None:
        """The process is killed at any statement of a call, and another one goes on."""
        if what == "finish" and any(held.living for held in self.model.held):
            self.die_in_a_finish(step, back)
        elif what == "lease":
            self.die_in_a_lease(step, scope, agent, variant)
        else:
            self.die_in_a_commit(step, scope, agent)

    # --- keys, halves and deaths -----------------------------------------------------------------

    def repeat_a_key(self, agent: str) -> None:
        """A step that is made again after a crash writes nothing."""
        if not self.model.keys:
            return
        before, key = fact_counts(self.ledger), max(self.model.keys)
        entries = [NewInsight("again", ())]
        assert not self.ledger.commit(SCOPES[0], self.society(0), agent, entries, key=key)
        assert fact_counts(self.ledger) == before

    def half_a_commit(self, scope: Scope, agent: str) -> None:
        """One bad entry at the end takes everything before it along."""
        entries = (NewInsight("half", ()), NewHypothesis("half", "", VARIANTS[3], 1.0),
                   NewClaim("r99999", BASELINE, 0.1, 1, 0.05, 0.0))  # fmt: skip
        assert not self.commit("half", scope, agent, *entries, refused=InvariantViolated)

    def reopen(self) -> None:
        """The process ends and another one goes on."""
        self.ledger.close()
        self.ledger = Ledger.open(self.place)

    def die_in_a_commit(self, step: int, scope: Scope, agent: str) -> None:
        """Dead before, within or after the transaction: then all of it is there, or nothing."""
        key = f"death {len(self.model.keys)}"
        entries = [NewInsight(f"{key} {n}", ()) for n in range(3)]
        acknowledged = self.dies(step, lambda: self.ledger.commit(
            scope, self.society(0), agent, entries, key=key
        ))  # fmt: skip
        known = len(self.other["insights"])
        new = list(self.ledger.insights()[known:])
        assert len(new) in ((3,) if acknowledged else (0, 3))
        assert [one.text for one in new] == [one.text for one in entries][: len(new)]
        again = self.ledger.commit(scope, self.society(0), agent, entries, key=key)
        assert again == (not new)
        new = list(self.ledger.insights()[known:])
        assert [one.text for one in new] == [one.text for one in entries]
        self.other["insights"] += new
        self.model.keys.add(key)

    def die_in_a_finish(self, step: int, back: int) -> None:
        """Whoever finishes again after its death gets the run once."""
        held: Held = latest([one for one in self.model.held if one.living], back)
        measured = _measured(Outcome.COMPLETED, 0.7)
        acknowledged = self.dies(step, lambda: self.finish_call(held, measured))
        made = [run for run in self.ledger.runs() if run.id == held.lease.run_id]
        if acknowledged or made:
            (run,) = made
            with pytest.raises(LeaseLost):
                self.finish_call(held, measured)
        else:
            run = self.finish_call(held, measured)
        self.check_run(run, held, measured)
        self.model.finished(held, run)

    def die_in_a_lease(self, step: int, scope: Scope, agent: str, variant: Variant) -> None:
        """A lease nobody was told of runs out like any other."""
        job = self.model.next_job(scope, variant, "audit")
        self.dies(step, lambda: self.ledger.lease_audit(
            scope, self.society(0), holder=agent, variant=variant, ttl_s=LONG_S
        ))  # fmt: skip
        known = [one.token for one in self.model.living(scope)]
        new = [lease for lease in self.ledger.leases(scope) if lease.token not in known]
        assert len(new) <= 1
        for lease in new:
            assert (lease.holder, lease.kind) == (agent, RunKind.AUDIT)
            self.seeds("audit", scope, int(str(job.place[0])) + 1)
            self.model.leased(lease, job, self.society(0), expired=False)

    def abandon(self) -> None:
        """A connection is cut within a transaction: nothing of it is there."""
        before = everything(self.reader)
        writer = self.ledger._db.write()
        tx = writer.__enter__()
        tx.exec_driver_sql("UPDATE counters SET value = value + 1 WHERE name = 'version'")
        tx.exec_driver_sql("INSERT INTO scopes (task, tier) VALUES ('cut', 'off')")
        tx.connection.dbapi_connection.close()
        with pytest.raises((Death, SocietyError)):
            writer.__exit__(Death, Death(), None)
        self.ledger.close()
        self.ledger = Ledger.open(self.place)
        assert everything(self.ledger) == before

    def dies(self, step: int, act: Callable[[], object]) -> bool:
        """Whether a call came back before its process was killed; another process goes on."""
        acknowledged = True
        try:
            with death_after(self.ledger, step):
                act()
        except Death:
            acknowledged = False
        self.reached[f"death: {'after' if acknowledged else 'within'} a call"] += 1
        self.ledger.close()
        self.ledger = Ledger.open(self.place)
        return acknowledged

    # --- what must hold after every step ---------------------------------------------------------

    @invariant()
    def no_rule_of_the_design_is_broken(self) -> None:
        assert breaches(self.ledger) == {}

    @invariant()
    def nothing_is_lost_and_the_version_never_shrinks(self) -> None:
        facts, version = fact_counts(self.ledger), self.ledger.version()
        assert all(facts[name] >= count for name, count in self.facts.items())
        assert version >= self.version
        if facts != self.facts:
            assert version > self.version
        self.facts, self.version = facts, version

    @invariant()
    def the_model_agrees(self) -> None:
        model, reader = self.model, self.reader
        assert list(reader.runs()) == model.runs
        assert list(reader.claims()) == [known.record for known in model.claims]
        assert list(reader.studies()) == model.studies
        assert [record.id for record in reader.societies()] == model.societies
        for scope in SCOPES:
            assert [lease.token for lease in reader.leases(scope)] == [
                lease.token for lease in model.living(scope)
            ]
            assert list(reader.champions(scope)) == model.champions.get(scope, [])
        assert list(map(self.comparable, reader.hypotheses())) == [
            self.comparable(model.now(idea)) for idea in model.ideas
        ]
        assert list(reader.noise_history()) == self.other["noise"]
        for name in ("insights", "refusals", "priors", "activities"):
            assert list(getattr(reader, name)()) == self.other[name]

    @staticmethod
    def comparable(one: Hypothesis) -> Hypothesis:
        """Without who had taken what is closed, which is no promise."""
        closed = one.state in (HypothesisState.TESTED, HypothesisState.DROPPED)
        return dataclasses.replace(one, taken_by=None, taken_until=None) if closed else one

    @invariant()
    def the_pools_are_the_first_results_on_each_seed(self) -> None:
        turn = len(self.model.runs)
        variant, which = VARIANTS[turn % len(VARIANTS)], list(SeedList)[turn // 4 % len(SeedList)]
        pool = self.reader.pool(SCOPES[0], variant, which)
        assert list(pool.items()) == list(self.model.pool(SCOPES[0], variant, which.value).items())

    @invariant()
    def whoever_reads_sees_the_same(self) -> None:
        """Every so many steps, because everything is read, three times."""
        self.steps += 1
        if self.steps % 15 == 0:
            self.all_readers_see_the_same()

    def all_readers_see_the_same(self) -> None:
        """The writer, a reader from the start, and a fresh one."""
        with Ledger.open(self.place, read_only=True) as fresh:
            seen = everything(fresh)
        assert everything(self.ledger) == seen
        assert everything(self.reader) == seen


_BUDGET = Budget(BudgetKind.STEPS, 10)


def _measured(outcome: Outcome, score: float) -> Measurement:
    completed = outcome is Outcome.COMPLETED
    cost = Cost(wall_s=score, flops=1e9, tokens=7)
    return Measurement(outcome, score if completed else None, cost, "tail", "hash", (3.0, 2.0))


def _verdict(known: Known, decision: Decision, cited: list[str]) -> Verdict:
    effect = Effect(0.01, 0.009, 0.001, 0.02, 4)
    return Verdict(known.claim.id, decision, 3.5, effect, "because", tuple(cited), "cyd")


# --- running it ------------------------------------------------------------------------------


def explore(places: Places, *, examples: int, steps: int) -> Counter[str]:
    """Run the machine; how often each rule ended how."""

    class Machine(LedgerMachine):
        pass

    Machine.places, Machine.reached = staticmethod(places), Counter()
    chosen = settings(
        max_examples=examples, stateful_step_count=steps, derandomize=True, deadline=None,
        database=None, suppress_health_check=list(HealthCheck), print_blob=False,
        phases=(Phase.generate,),
    )  # fmt: skip
    run_state_machine_as_test(Machine, settings=chosen)
    return Machine.reached


def sqlite_places(folder: Path, template: Path) -> Places:
    """A function that makes a new ledger each time, as a copy of one file."""
    numbers = count()

    def place() -> Path:
        here = folder / str(next(numbers))
        here.mkdir()
        return Path(shutil.copy(template, here / "ledger.sqlite"))

    return place


def postgres_places(server: Server) -> Iterator[Places]:
    """The same on a server: a copy of one database; the one before is dropped."""
    template = server.create()
    Ledger.open(server.url_of(template), secret_seed=7).close()
    made: list[str] = []

    def place() -> str:
        while made:
            server.drop(made.pop())
        made.append(server.create(template))
        return server.url_of(made[0])

    yield place
    for name in (*made, template):
        server.drop(name)


@pytest.fixture(params=["sqlite", "postgres"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Places]:
    if request.param == "postgres":
        yield from postgres_places(request.getfixturevalue("postgres_server"))
    else:
        Ledger.open(tmp_path / "template.sqlite", secret_seed=7).close()
        yield sqlite_places(tmp_path, tmp_path / "template.sqlite")


MUST_HAPPEN = {
    "accept: done", "audit: done", "calibration: done", "calibration: NotIndependent",
    "claim: done", "claim: InvariantViolated", "crown: done", "crown: InvariantViolated",
    "death: after a call", "death: within a call", "drop: done", "finish: done",
    "finish: late", "finish: LeaseLost", "forged token: LeaseLost", "half: InvariantViolated",
    "heartbeat: done", "heartbeat: LeaseLost", "note: done", "publish: done",
    "publish again: done", "reproduction: done", "reproduction: NotIndependent",
    "roll back: done", "screen: done", "screen: AlreadyRun", "study: done", "take: done",
    "verification: done", "verification: NotIndependent",
}  # fmt: skip
"""What chance must have come across, or the run has shown less than it seems to."""


@pytest.mark.parametrize(
    "places", ["sqlite", pytest.param("postgres", marks=pytest.mark.slow)], indirect=True
)
def test_the_ledger_agrees_with_the_model(places: Places, request: pytest.FixtureRequest) -> None:
    fast = "sqlite" in request.node.name
    reached = explore(places, examples=24 if fast else 8, steps=40)
    if fast:
        assert len(MUST_HAPPEN - set(reached)) <= 4


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_ledger_agrees_with_the_model_for_long(
    places: Places, request: pytest.FixtureRequest
) -> None:
    fast = "sqlite" in request.node.name
    reached = explore(places, examples=80 if fast else 30, steps=60)
    assert len(MUST_HAPPEN - set(reached)) <= 4


def without(rule: str, folder: Path) -> Places:
    """Places of ledgers in which one rule is missing."""
    template = folder / "template.sqlite"
    Ledger.open(template, secret_seed=7).close()
    with closing(sqlite3.connect(template)) as raw, raw:
        raw.execute(f"DROP TRIGGER {rule}")
    return sqlite_places(folder, template)


def own_evidence(machine: LedgerMachine) -> None:
    """The author of an open claim runs its variant on a verification seed."""
    machine.begin(2)
    machine.calibrated(SCOPES[0], 0, "ada", VARIANTS[1])


def claim_from_a_calibration(machine: LedgerMachine) -> None:
    """The last run is no screening run."""
    machine.begin(1)
    machine.claim(0, VARIANTS[1], elsewhere=False, fair=False)


def screened_but_open(machine: LedgerMachine) -> None:
    """An idea's variant is screened."""
    machine.begin(2)
    machine.screened(SCOPES[0], 0, "cyd", VARIANTS[3])
    machine.no_rule_of_the_design_is_broken()


@pytest.mark.parametrize(
    ("rule", "life"),
    [
        ("leases_not_by_author_of_open_claim", own_evidence),
        ("claims_come_from_screening", claim_from_a_calibration),
        ("runs_close_hypotheses", screened_but_open),
    ],
)
def test_a_missing_rule_is_noticed(
    tmp_path: Path, rule: str, life: Callable[[LedgerMachine], None]
) -> None:
    """The same life passes with the rule, and fails without it."""
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    Ledger.open(tmp_path / "template.sqlite", secret_seed=7).close()
    whole = sqlite_places(tmp_path / "whole", tmp_path / "template.sqlite")

    class Machine(LedgerMachine):
        places = staticmethod(whole)
        reached: ClassVar[Counter[str]] = Counter()

    life(Machine())
    Machine.places = staticmethod(without(rule, tmp_path / "broken"))
    with pytest.raises((pytest.fail.Exception, AssertionError)):
        life(Machine())


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "rule", ["leases_not_by_author_of_open_claim", "claims_come_from_screening"]
)
def test_chance_finds_a_missing_rule(tmp_path: Path, rule: str) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        explore(without(rule, tmp_path), examples=60, steps=40)


def test_a_variant_is_screened_once_in_each_of_several_scopes(places: Places) -> None:
    """Found by chance: the seed of one scope was looked up in another."""

    class Machine(LedgerMachine):
        reached: ClassVar[Counter[str]] = Counter()

    Machine.places = staticmethod(places)
    machine = Machine()
    machine.begin(0)
    for _ in range(2):
        for scope in SCOPES:
            machine.screened(scope, 0, "ada", VARIANTS[2])
    assert Machine.reached["screen: done"] == Machine.reached["screen: AlreadyRun"] == 2
    machine.teardown()
