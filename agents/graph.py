"""One agent = one durable LangGraph graph, cycled for as long as the society lives.

    survey → choose → perform → commit

`survey` asks every role the agent may play for open duties, `choose` takes the most valuable,
`perform` does it (the only node that awaits training runs), `commit` writes the outcome to the
notebook in one transaction. The thread id is `society/agent`; the state between nodes is plain
JSON and is checkpointed, so that a killed society resumes where each agent stood. A node that was
running when the process died runs again: `commit` carries an idempotency key, and runs that had
finished are in the notebook already.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime

from society import logs
from society.agents.codec import dump_duty, dump_entry, load_duty, load_entry
from society.agents.laboratory import Bench, Doing, Laboratory
from society.errors import ExecutorError, InvariantViolated, LeaseError, SocietyError
from society.records import Activity, NewRefusal
from society.roles.base import Duty, Interrupted, Outcome, Role

if TYPE_CHECKING:
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.graph.state import CompiledStateGraph

    from society.records import Entry

MAX_FAULTS = 5
"""Unexpected errors of one role after which the society stops instead of going on without it."""


class State(TypedDict, total=False):
    """What is checkpointed; JSON types only."""

    cycle: int
    """Duties committed so far; part of the idempotency key."""
    offers: list[dict[str, Any]]
    """The most valuable open duties at the last survey."""
    duty: dict[str, Any] | None
    """The duty being performed."""
    entries: list[dict[str, Any]]
    """What it wants recorded."""
    note: str
    started_at: float


@dataclass(slots=True)
class Agent:
    """An agent at work: its name, the roles it may play and its place in the laboratory.

    This is the runtime context of its graph; nothing of it is checkpointed.
    """

    name: str
    roles: tuple[Role, ...]
    laboratory: Laboratory
    faults: dict[str, int] = field(default_factory=dict)
    """Role name -> unexpected errors so far."""

    def duties(self) -> list[Duty]:
        """What it may do now, most valuable first."""
        return self.laboratory.open_duties(self.roles, self.name)

    def role(self, name: str) -> Role:
        """The role of that name."""
        return next(role for role in self.roles if role.name == name)

    def show(self, doing: Doing) -> None:
        """Tell the live view."""
        self.laboratory.doing[self.name] = doing


async def survey(state: State, runtime: Runtime[Agent]) -> State:
    """List the open duties."""
    return {"offers": [dump_duty(duty) for duty in runtime.context.duties()[:5]]}


async def choose(state: State, runtime: Runtime[Agent]) -> State:
    """Take the most valuable one."""
    offers = state["offers"]
    return {
        "cycle": state.get("cycle", 0) + 1,
        "duty": offers[0] if offers else None,
        "started_at": runtime.context.laboratory.ledger.now(),
    }


async def perform(state: State, runtime: Runtime[Agent]) -> State:
    """Do it; what goes wrong for understood reasons becomes a note."""
    agent, duty = runtime.context, load_duty(state["duty"] or {})
    laboratory = agent.laboratory
    bench = Bench(laboratory, agent.name, needs_slot=duty.needs_slot)
    laboratory.sign_up(duty)
    agent.show(Doing(duty.role, duty.kind, duty.why, time.monotonic()))
    outcome = Outcome(note="interrupted")
    try:
        outcome = await _attempt(agent, duty, bench)
    finally:
        found = [one for one in outcome.entries if not isinstance(one, NewRefusal)]
        fruitful = bool(found or bench.runs_made)
        laboratory.sign_off(duty, fruitful=fruitful, committed=bool(bench.runs_made))
        agent.show(Doing(since=time.monotonic()))
    entries = laboratory.unsaid(outcome.entries)
    return {"entries": [dump_entry(entry) for entry in entries], "note": outcome.note}


async def _attempt(agent: Agent, duty: Duty, bench: Bench) -> Outcome:
    log = logs.get("agent", agent=agent.name, role=duty.role, duty=duty.kind)
    try:
        return await agent.role(duty.role).perform(duty, bench)
    except (LeaseError, InvariantViolated) as error:
        log.info("duty lapsed", reason=str(error))
        return Outcome(note=f"lapsed: {error}")
    except Interrupted as stopped:
        log.info("duty given up", reason=str(stopped))
        return Outcome(note=f"given up: {stopped}")
    except ExecutorError:
        raise
    except Exception as error:
        # Roles are other people's code: one that fails must not lose the night.
        agent.faults[duty.role] = agent.faults.get(duty.role, 0) + 1
        if agent.faults[duty.role] >= MAX_FAULTS:
            raise SocietyError(
                f"Role {duty.role!r} failed {MAX_FAULTS} times, last with "
                f"{type(error).__name__}: {error}. The traceback is in the log; "
                "the society can be resumed."
            ) from error
        log.exception("role failed", error=repr(error))
        return Outcome(note=f"failed: {type(error).__name__}: {error}")


async def commit(state: State, runtime: Runtime[Agent]) -> State:
    """Write the outcome in one transaction, once."""
    agent, duty = runtime.context, load_duty(state["duty"] or {})
    laboratory = agent.laboratory
    entries = [load_entry(data) for data in state["entries"]]
    log = logs.get("agent", agent=agent.name, role=duty.role)

    def write(entries: list[Entry], note: str) -> bool:
        activity = Activity(
            agent.name, duty.role, duty.kind, duty.subject, state["started_at"],
            laboratory.ledger.now(), note,
        )  # fmt: skip
        return laboratory.ledger.commit(
            laboratory.scope,
            laboratory.record.id,
            agent.name,
            entries,
            key=f"{laboratory.record.id}/{agent.name}/{state['cycle']}@{state['started_at']}",
            activity=activity,
            room=laboratory.room,
        )

    try:
        written = write(entries, state["note"])
    except (LeaseError, InvariantViolated) as error:  # another society on the ledger was quicker
        log.warning("outcome refused", duty=duty.kind, subject=duty.subject, reason=str(error))
        laboratory.lapsed(duty)
        write([], f"lapsed: {error}")
        written = False
    if written and entries:
        log.info(duty.kind, note=state["note"], entries=len(entries))
    return {"duty": None, "entries": [], "offers": [], "note": ""}


def build(saver: BaseCheckpointSaver[Any]) -> CompiledStateGraph[State, Agent, State, State]:
    """Compile the graph that all agents share; each has its own thread and context."""
    graph = StateGraph(State, context_schema=Agent)
    for node in (survey, choose, perform, commit):
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "survey")
    graph.add_edge("survey", "choose")
    graph.add_conditional_edges(
        "choose", lambda state: "perform" if state["duty"] else END, ["perform", END]
    )
    graph.add_edge("perform", "commit")
    graph.add_edge("commit", END)
    return graph.compile(checkpointer=saver)
