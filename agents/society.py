"""All agents of a society, living side by side on one event loop until nothing is left to do."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import aiosqlite
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from society import logs
from society.agents import graph
from society.agents.graph import Agent
from society.errors import UsageError
from society.roles import load_role
from society.settings import DEFAULT_ROLES

if TYPE_CHECKING:
    from pathlib import Path

    from langchain_core.runnables import RunnableConfig

    from society.agents.laboratory import Laboratory
    from society.roles import Role
    from society.settings import Settings

OTHERS_S = 0.5
"""Seconds between looks at the runs of other societies, when there is nothing else to do."""
ESSENTIAL_ROLES = ("experimenter", "verifier", "statistician")
"""Roles that fixed casts must include: a proposer, somebody else, and a judge."""


def cast_roles(settings: Settings) -> list[tuple[Role, ...]]:
    """The roles each agent may play: all of them, or one each with fixed `roles`.

    Raises:
        UnknownName: A role that is not installed.
        UsageError: Fixed roles without one that nothing can be accepted without.
    """
    names = dict.fromkeys((*DEFAULT_ROLES, *settings.extra_roles))
    if not settings.roles:
        everyone = tuple(load_role(name) for name in names)
        return [everyone] * settings.agents
    stray = [name for name in settings.extra_roles if name not in settings.roles]
    if stray:
        raise UsageError(f"--role {stray[0]}: with fixed --roles, give it a count there instead.")
    loaded = {name: load_role(name) for name in settings.roles}
    playing = {role.name for role in loaded.values()}
    missing = [name for name in ESSENTIAL_ROLES if name not in playing]
    if missing:
        raise UsageError(f"--roles has no {missing[0]}: nothing could be accepted without one.")
    return [(loaded[name],) for name, count in settings.roles.items() for _ in range(count)]


def agent_names(count: int) -> list[str]:
    """`a01`, `a02`, ..."""
    return [f"a{number:02d}" for number in range(1, count + 1)]


async def live(laboratory: Laboratory, casts: list[tuple[Role, ...]], checkpoints: Path) -> None:
    """Let every agent live until the society is quiet.

    Returns when no agent has anything left to do: the budget is spent or a drain was asked for,
    and all runs under way have been recorded.

    Raises:
        ExecutorError: Experiments cannot be run any more.
        SocietyError: A role keeps failing.
    """
    agents = [
        Agent(name, roles, laboratory)
        for name, roles in zip(agent_names(len(casts)), casts, strict=True)
    ]
    async with aiosqlite.connect(checkpoints) as connection:
        saver = AsyncSqliteSaver(connection)
        await saver.setup()
        await connection.execute("PRAGMA synchronous=NORMAL")
        compiled = graph.build(saver)
        quiet = asyncio.create_task(_nothing_left(laboratory))
        lives = [asyncio.create_task(_cycle(agent, compiled)) for agent in agents]
        try:
            await asyncio.wait({quiet, *lives}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (quiet, *lives):
                task.cancel()
            ended = await asyncio.gather(quiet, *lives, return_exceptions=True)
        for error in ended:
            if isinstance(error, BaseException) and not isinstance(error, asyncio.CancelledError):
                raise error
        if not laboratory.draining:
            for agent in agents:
                await saver.adelete_thread(_thread(agent))


async def _nothing_left(laboratory: Laboratory) -> None:
    """Return once no agent has anything to do and no other society can change that.

    Societies that share a ledger wait for each other's runs: all seeds of the noise floor may be
    leased elsewhere, and a claim may be under verification there. Whoever holds a lease is running
    it, so two societies never wait for one another; the leases of one that died expire.
    """
    floor, log = laboratory.floor, logs.get("society")
    while True:
        await floor.quiet.wait()
        awaited = laboratory.runs_of_others()
        if not awaited:
            return
        log.info("waits for runs of other societies", runs=len(awaited))
        while awaited and floor.quiet.is_set():
            await asyncio.sleep(OTHERS_S)
            now = laboratory.runs_of_others()
            left = now if laboratory.preparing else awaited & now
            if left != awaited:
                laboratory.look_again()
            awaited = left
        if floor.quiet.is_set():
            return


async def _cycle(agent: Agent, compiled: Any) -> None:
    """Finish what an earlier session left between two nodes, then live duty by duty."""
    config: RunnableConfig = {"configurable": {"thread_id": _thread(agent)}}
    floor = agent.laboratory.floor
    await floor.enter(lambda: True)
    try:
        state = await compiled.aget_state(config)
        if state.next:
            await compiled.ainvoke(None, config, context=agent, durability="sync")
    finally:
        floor.leave()
    while True:
        await floor.enter(lambda: bool(agent.duties()))
        try:
            await compiled.ainvoke({"offers": []}, config, context=agent, durability="sync")
        finally:
            floor.leave()


def _thread(agent: Agent) -> str:
    return f"{agent.laboratory.record.id}/{agent.name}"
