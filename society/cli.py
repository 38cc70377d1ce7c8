"""The command: `society`, or `python -m society`.

Only typer is imported here; everything else inside the commands, so that `--help` stays quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from society import cli_data, cli_export, cli_memory, cli_study
from society.cleaning import visible
from society.cli_common import (
    LAB,
    Json,
    Lab,
    emit_fields,
    emit_json,
    emit_table,
    opened,
    plain,
    reading,
    studies_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from society.app import Display, Ended
    from society.cli_common import Opened
    from society.doctor import Check
    from society.memory.folder import NotebookFolder
    from society.records import Effect, SocietyRecord
    from society.settings import Settings

DEFAULT_MINUTES = 9
"""The budget of `run` when none is given."""
OTHERS_SHOWN = 5
"""Finished societies of other folders that `status` names."""
BRAIN_WORDS = {"search": "a model-based optimiser; embedded, no key, no network"}
ASKS_A_MODEL = "openai"
"""The brain that the options of the endpoint are for."""

app = typer.Typer(
    help="A research society of agents that believe only what survives replication.\n\n"
    "Example: society run --agents 8 --minutes 9",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_memory.app, name="memory")
app.add_typer(cli_data.app, name="data")
app.add_typer(cli_study.app)
app.add_typer(cli_export.app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; an error a user can act on becomes one line and its exit code."""
    from society.errors import SocietyError

    try:
        app(args=arguments, prog_name="society")
    except SocietyError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)


def _version(wanted: bool) -> None:
    if wanted:
        from society import __version__

        typer.echo(f"society {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


# --------------------------------------------------------------------------- run


@app.command()
def run(
    agents: Annotated[
        int | None, typer.Option(help="Number of agents, at least 2.", show_default="8")
    ] = None,
    roles: Annotated[
        str | None,
        typer.Option(
            help="Fixed roles, name=count,...; without it every agent chooses its duties."
        ),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(help="A further role, by name or as module:Class; may be repeated."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="What is improved; see `tasks`.", show_default="pretrain")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Size of the task: a shipped name or a .yaml file.")
    ] = None,
    brain: Annotated[
        str | None,
        typer.Option(
            help="Where ideas come from: search, or openai: a language model.",
            show_default="search",
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            help="For --brain openai: server that speaks OpenAI's protocol (vLLM, llama.cpp, "
            "Ollama, ...). The key is read from OPENAI_API_KEY; a server on this machine needs "
            "none.",
            show_default="OpenAI's",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="For --brain openai: model to ask.", show_default="gpt-5-mini"),
    ] = None,
    max_dollars: Annotated[
        float | None,
        typer.Option(help="Most that models may cost; then search goes on.", show_default="5"),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens that models may use; then search goes on.", show_default="2000000"
        ),
    ] = None,
    sandbox: Annotated[
        str | None,
        typer.Option(
            help="Least confinement of changed code: limits, filters, namespaces or bubblewrap.",
            show_default="filters",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Makes a society with one slot repeatable.")
    ] = None,
    runs: Annotated[int | None, typer.Option(help="Stop after so many training runs.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop after so many minutes.")] = None,
    until: Annotated[
        float | None, typer.Option(help="Stop once a confirmed champion's score is this good.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Training runs at a time.", show_default="one per core")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.", show_default="cpu")] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            help="Screening runs that a result must stand unbeaten to be claimed.",
            show_default="2",
        ),
    ] = None,
    knowledge: Annotated[
        str | None,
        typer.Option(
            help="shared, or own: agents know only their own runs.", show_default="shared"
        ),
    ] = None,
    recall: Annotated[
        str | None,
        typer.Option(
            help="The semantic index: embedded, off, or a Chroma server's http://host:port.",
            show_default="embedded",
        ),
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option(
            help="Address of a ledger to share with other folders; remembered in this one. "
            "postgresql://USER@HOST/DATABASE or sqlite:////ABSOLUTE/PATH.sqlite.",
            show_default="the folder's own",
        ),
    ] = None,
    lab: Lab = LAB,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with these options; the command line wins.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the interrupted society of this folder.")
    ] = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Plain lines instead of the live view.")
    ] = False,
    log: Annotated[
        bool, typer.Option("--log", help="Also print every log line on stderr; implies --plain.")
    ] = False,
) -> None:
    """Let a society work, and write a report at the end.

    Without --runs, --minutes or --until it works for 9 minutes. Ctrl-C finishes and records the
    runs in progress; a second one stops at once. Either way --resume goes on later.

    Example: society run --agents 8 --minutes 60 --lab night

    Example: society run --task synthetic --runs 60 --lab try

    Example: society run --brain openai --base-url http://127.0.0.1:8080/v1 --model any --lab talk
    """
    from society.settings import parse_roles

    counts = parse_roles(roles) if roles else None
    if counts and agents is None:
        agents = sum(counts.values())
    given = {
        "agents": agents, "roles": counts, "extra_roles": tuple(role) if role else None,
        "task": task, "profile": profile, "brain": brain, "seed": seed, "runs": runs,
        "minutes": minutes, "until": until, "slots": slots, "device": device,
        "patience": patience, "knowledge": knowledge, "recall": recall, "sandbox": sandbox,
        "endpoint": _endpoint(base_url, model, max_dollars, max_tokens),
    }  # fmt: skip
    settings = _settings(lab, config, given, resume)
    settings = _joined(lab, settings, ledger)
    live = sys.stdout.isatty() and not plain and not log
    ended = _run(lab, settings, resume=resume, live=live, log=log)
    _summary(ended, lab)


def _endpoint(
    base_url: str | None, model: str | None, max_dollars: float | None, max_tokens: int | None
) -> dict[str, Any] | None:
    """What was given of the endpoint; None if nothing was."""
    given = {
        "base_url": base_url, "model": model, "max_dollars": max_dollars, "max_tokens": max_tokens,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None} or None


def _joined(lab: Path, settings: Settings, ledger: str | None) -> Settings:
    """The settings, with what the folder remembers of a shared memory; it remembers what is new."""
    from society.memory.folder import NotebookFolder

    folder = NotebookFolder(lab)
    if ledger is not None:
        folder.share(ledger, secret_seed=settings.seed)
        typer.echo(f"Ledger: {folder.ledger}")
    if settings.recall.startswith("http"):
        folder.share(recall=settings.recall)
    elif folder.shared.recall and "recall" not in settings.model_fields_set:
        settings = settings.model_copy(update={"recall": folder.shared.recall})
    return settings


def _settings(lab: Path, config: Path | None, given: dict[str, Any], resume: bool) -> Settings:
    """What the society will be, said aloud where the user did not choose."""
    from society.app import resume_settings
    from society.memory.folder import NotebookFolder
    from society.settings import load_settings

    folder = NotebookFolder(lab)
    settings = load_settings(config, **given)
    if resume:
        settings = resume_settings(folder, settings)
        typer.echo(
            "Resuming with the society's own settings; only budgets and the address of the model "
            "can be changed."
        )
        return settings
    if settings.endpoint != type(settings.endpoint)() and settings.brain != ASKS_A_MODEL:
        typer.echo(f"Note: no language model is asked; its options are for --brain {ASKS_A_MODEL}.")
    interrupted = _interrupted(folder)
    if interrupted is not None:
        typer.echo(
            f"Note: society {interrupted.id} in {lab} was interrupted; "
            f"`society run --resume --lab {lab}` would go on with it. Starting a new one."
        )
    if settings.bounded:
        return settings
    typer.echo(
        f"No budget given: working for {DEFAULT_MINUTES} minutes "
        "(choose with --minutes, --runs or --until)."
    )
    return settings.model_copy(update={"minutes": DEFAULT_MINUTES})


def _interrupted(folder: NotebookFolder) -> SocietyRecord | None:
    """The folder's last society, if it stopped with work left and nobody is at it."""
    from society.memory.ledger import Ledger
    from society.records import SocietyState

    if not folder.exists():
        return None
    with folder.lock(), Ledger.open(folder.ledger, read_only=True) as ledger:
        records = [record for record in folder.own(ledger.societies()) if not record.is_study]
    if records and records[-1].state is not SocietyState.FINISHED:
        return records[-1]
    return None


def _run(lab: Path, settings: Settings, *, resume: bool, live: bool, log: bool) -> Ended:
    import os

    from society.agents.brains import check_brain
    from society.app import run_society
    from society.live import LiveDisplay, PlainDisplay
    from society.memory.folder import NotebookFolder

    check_brain(settings, os.environ)
    about = BRAIN_WORDS.get(settings.brain)
    if settings.brain == ASKS_A_MODEL:
        about = f"{settings.endpoint.model} at {settings.endpoint.base_url}"
    typer.echo(f"Brain: {settings.brain}" + (f" ({about})" if about else ""))
    display: Display = LiveDisplay() if live else PlainDisplay()
    return run_society(NotebookFolder(lab), settings, resume=resume, display=display, console=log)


def _summary(ended: Ended, lab: Path) -> None:
    """A few sentences; the report's path is the last line."""
    from society.records import SocietyState
    from society.wording import headline_sentences

    typer.echo("")
    for sentence in headline_sentences(ended.report):
        typer.echo(sentence)
    if ended.record.state is SocietyState.STOPPED:
        typer.echo(f"Stopped before its end; go on with: society run --resume --lab {lab}")
    typer.echo(f"Markdown: {ended.markdown}")
    typer.echo(f"Report: {ended.html}")


# --------------------------------------------------------------------------- status, report, audit


@app.command()
def status(lab: Lab = LAB, as_json: Json = False) -> None:
    """Say how a society is doing, or how it ended. Works beside a running one; changes nothing.

    Example: society status --lab lab

    Example: society status --json | jq .champion.mean
    """
    alone = _studies_alone(lab)
    if alone and as_json:
        emit_json({"lab": str(lab), "society": None, "studies": alone})
        return
    if alone:
        typer.echo(f"No society has worked in {lab} yet.")
        _print_studies(alone)
        return
    with opened(lab) as notebook:
        found = _status(notebook, lab)
    if as_json:
        emit_json(found)
        return
    champion, noise = found["champion"], found["noise"]
    busy = found["busy"]
    emit_fields(
        {
            "society": f"{found['society']} ({found['state']}), {found['task']} on {found['tier']}",
            "worked": f"{found['wall_s']:.0f} s"
            + (f", slots {busy:.0%} busy" if busy is not None else ""),
            "runs": ", ".join(f"{n} {kind}" for kind, n in found["runs"].items() if n) or "none",
            "champion": champion["words"],
            "noise floor": noise["words"],
            "claims": ", ".join(f"{n} {word}" for word, n in found["claims"].items()),
            "learned": f"{found['insights']} insights, {found['hypotheses']} hypotheses",
            "saved": found["saved"]["words"],
        }
        | ({"models": found["usage"]["words"]} if found["usage"]["calls"] else {})
    )
    for claim in found["under_test"]:
        typer.echo(
            f"  {claim['id']} n={claim['n']} e={claim['e']:.3g} of {claim['e_needed']:.3g} "
            f"p(accept) {claim['p_accept']:.2f}  {claim['change']}"
        )
    _print_others(found["others"])
    _print_studies(found["studies"])


def _studies_alone(lab: Path) -> list[dict[str, Any]]:
    """The studies of a notebook in which no society has worked; empty if one has."""
    with reading(lab) as ledger:
        if all(record.is_study for record in ledger.societies()):
            return studies_of(ledger)
        return []


def _print_studies(studies: Sequence[dict[str, Any]]) -> None:
    for study in studies:
        typer.echo(f"study {visible(study['words'])}")


def _status(notebook: Opened, lab: Path) -> dict[str, Any]:
    from society.live import champion_text, changed, noise_text, snapshot
    from society.roles import BudgetLeft, Charter, View
    from society.wording import savings_sentence, usage_words

    ledger, record, scope = notebook.ledger, notebook.record, notebook.scope
    savings, usage = ledger.savings(scope), ledger.usage(record.id)
    view = View(
        ledger, scope=scope, society=record.id, task=notebook.task, space=notebook.space,
        charter=Charter(), budget=BudgetLeft(0, 0, 0), entropy=0,
    )  # fmt: skip
    now, counts = snapshot(view, ledger.version(), kept=0), ledger.counts(scope)
    return {
        "lab": str(lab),
        "society": record.id,
        "state": _state(lab, record),
        "task": scope.task,
        "tier": scope.tier,
        "wall_s": record.wall_s,
        "busy": record.busy,
        "settings": record.settings,
        "runs": counts.runs,
        "outcomes": counts.outcomes,
        "champion": {
            **plain(now.champion), "mean": now.mean, "gain": now.gain, "seeds": now.pool,
            "words": f"#{now.champion.number} {champion_text(now)}",
        },
        "noise": {
            **(plain(now.noise) or {}),
            "words": noise_text(now) if now.noise else "not measured yet",
        },
        "claims": {"open": counts.claims_open}
        | {decision.value: count for decision, count in counts.verdicts.items() if count},
        "under_test": [
            {
                "id": one.claim.id, "n": one.assessment.n, "e": one.e, "e_needed": one.needed,
                "p_accept": one.assessment.p_accept,
                "change": changed(one.claim.variant, one.claim.reference),
            }
            for one in now.under_test
        ],
        "insights": counts.insights,
        "hypotheses": sum(counts.hypotheses.values()),
        "saved": {
            **plain(savings), "seconds": savings.seconds,
            "words": savings_sentence(savings) or "no proposal was known before it was run",
        },
        "usage": {**plain(usage), "tokens": usage.tokens, "words": usage_words(usage)},
        "leases": counts.leases,
        "others": _others(notebook),
        "studies": studies_of(ledger),
    }  # fmt: skip


def _others(notebook: Opened) -> list[dict[str, Any]]:
    """Societies of other folders on the same ledger, with the time of their last activity.

    Nobody can see from here whether their process lives; when it last did something tells.
    """
    ledger, found = notebook.ledger, []
    for one in notebook.others:
        latest = ledger.activities(one.id, limit=1)
        seen = latest[0].ended_at if latest else one.started_at
        found.append(
            {
                "id": one.id, "state": one.state.value, "task": one.settings.get("task"),
                "last_active": seen, "idle_s": max(0.0, ledger.now() - seen),
            }
        )  # fmt: skip
    return found


def _print_others(others: Sequence[dict[str, Any]]) -> None:
    """A line for each that works, the number of those that have ended."""
    from society.live import clock
    from society.records import SocietyState

    ended = [one for one in others if one["state"] == SocietyState.FINISHED]
    for one in others:
        if one not in ended:
            ago = clock(one["idle_s"])
            typer.echo(f"also here: {one['id']} ({one['state']}, last active {ago} ago)")
    if ended:
        names = ", ".join(one["id"] for one in ended[-OTHERS_SHOWN:])
        typer.echo(f"also here: {len(ended)} finished, the latest: {names}")


def _state(lab: Path, record: SocietyRecord) -> str:
    """The recorded state; `interrupted` if it says running but nobody holds the folder."""
    from society.memory.folder import FileLock, NotebookFolder
    from society.records import SocietyState

    if record.state is not SocietyState.RUNNING or record.home != NotebookFolder(lab).home:
        return record.state.value
    holder = FileLock(NotebookFolder(lab).owner_lock).holder()
    alive = holder is not None and _alive(holder)
    return "running" if alive else "interrupted, --resume goes on"


def _alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid)


@app.command()
def report(lab: Lab = LAB, as_json: Json = False) -> None:
    """Write the report again from the notebook, as Markdown and as one HTML file.

    Every number is derived from the ledger at that moment, so it may be called during a run.

    Example: society report --lab lab
    """
    from society.memory.folder import NotebookFolder
    from society.render import write_report
    from society.report import build_report
    from society.wording import headline_sentences

    with opened(lab) as notebook:
        built = build_report(
            notebook.ledger, notebook.scope, notebook.task, notebook.space, notebook.record.id
        )
        markdown, html = write_report(built, NotebookFolder(lab).report)
    sentences = headline_sentences(built)
    if as_json:
        emit_json(
            {
                "markdown": markdown,
                "html": html,
                "headline": built.headline,
                "sentences": sentences,
            }
        )
        return
    for sentence in sentences:
        typer.echo(sentence)
    typer.echo(f"Markdown: {markdown}")
    typer.echo(f"Report: {html}")


@app.command()
def audit(
    lab: Lab = LAB,
    seeds: Annotated[int, typer.Option(min=4, help="Fresh seeds for each of the two.")] = 8,
    slots: Annotated[
        int | None, typer.Option(help="Training runs at a time.", show_default="one per core")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train the final champion and the baseline again on fresh seeds, and compare with the report.

    No agent ever saw these seeds; they are drawn after the society has ended.

    Example: society audit --seeds 8 --lab lab
    """
    from society.audit import audit as run_audit
    from society.memory.folder import NotebookFolder

    def progress(done: int, wanted: int) -> None:
        if not as_json:
            typer.echo(f"{done} of {wanted} runs")

    folder = NotebookFolder(lab).require()
    result = run_audit(folder, seeds=seeds, slots=slots, progress=progress)
    if as_json:
        emit_json(plain(result) | {"confirmed": result.confirmed})
        return
    low, high = result.expected
    emit_fields(
        {
            "champion": result.champion.describe(),
            "reported": f"{effect_words(result.reported, result.unit)} verification seeds",
            "audited": f"{effect_words(result.audited, result.unit)} fresh seeds",
            "expected": f"{low:+.4f} to {high:+.4f} on as many fresh seeds",
            "the audit": result.verdict,
        }
    )
    typer.echo(f"Markdown: {result.markdown}")
    typer.echo(f"Report: {result.html}")


@app.command()
def rerun(
    run_id: Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, e.g. r00012.")],
    recorded_code: Annotated[
        bool,
        typer.Option(
            "--recorded-code", help="Train with the source that made the run, not the installed."
        ),
    ] = False,
    lab: Lab = LAB,
    as_json: Json = False,
) -> None:
    """Make a recorded run again from what the notebook holds, and compare the bits.

    The profile is the recorded one. Nothing is written. Exit code 1 if other bits came in the
    environment that was recorded.

    Example: society rerun r00012 --lab lab
    """
    from society.memory.folder import NotebookFolder
    from society.rerun import rerun as run_again

    found = run_again(NotebookFolder(lab), run_id, recorded_code=recorded_code)
    told = {
        "run": f"{found.run.id} {found.run.variant.describe()}, {found.run.kind.value}",
        "recorded": f"{found.run.outcome.value} {found.run.score}",
        "now": f"{found.measured.outcome.value} {found.measured.score}",
        "verdict": found.verdict,
    }
    if as_json:
        emit_json(
            {
                **plain(found), **told, "same": found.same, "reproduced": found.reproduced,
                "differences": found.details, "profile": found.profile,
            }
        )  # fmt: skip
    else:
        emit_fields(told | ({"profile": found.profile} if found.profile else {}))
        for detail in found.details:
            typer.echo(f"  {detail}")
        if "code" in found.differences and not found.same and not recorded_code:
            typer.echo("--recorded-code trains with the source that made the run.")
    if found.reproduced is False:
        raise typer.Exit(1)


def effect_words(effect: Effect, unit: str) -> str:
    """A gain with its interval."""
    return (
        f"gain {effect.mean:+.4f} {unit}, 95 % interval "
        f"[{effect.low:+.4f}, {effect.high:+.4f}] on {effect.seeds}"
    )


# --------------------------------------------------------------------------- what there is


@app.command()
def roles(as_json: Json = False) -> None:
    """List the roles that agents can play, shipped and installed ones.

    Example: society roles
    """
    from society.roles import known_roles, load_role

    found = {name: load_role(name).about for name in known_roles()}
    if as_json:
        emit_json([{"name": name, "about": about} for name, about in found.items()])
        return
    emit_table(found.items())
    typer.echo("\nAdd your own with `society run --role module:Class`.")


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="Show this task's knobs.")] = None,
    profile: Annotated[str | None, typer.Option(help="Profile of the task.")] = None,
    as_json: Json = False,
) -> None:
    """List the tasks, or the knobs of one with ranges, units and sources.

    Example: society tasks

    Example: society tasks pretrain
    """
    if name is None:
        _list_tasks(as_json)
        return
    from society.experiments.space import Space
    from society.experiments.task import default_profile, load_task

    task = load_task(name, profile or default_profile(name))
    knobs = _knobs(Space.of(task))
    if as_json:
        emit_json({"task": task.key, "metric": task.metric, "unit": task.unit, "knobs": knobs})
        return
    typer.echo(f"{task.key}: {task.metric} in {task.unit}, {task.direction.value}")
    typer.echo(f"budget {task.budget.amount:g} {task.budget.kind.value} a run\n")
    for caveat in getattr(task, "caveats", ()):
        typer.echo(f"Mind: {caveat}")
    columns = ("knob", "default", "range", "unit", "about", "source")
    emit_table([columns, *([str(knob[column]) for column in columns] for knob in knobs)])


def _list_tasks(as_json: bool) -> None:
    from society.experiments.task import known_profiles, known_tasks, load_profile

    found = [
        {"task": name, "profile": profile, "about": load_profile(name, profile).about}
        for name in known_tasks()
        for profile in known_profiles(name)
    ]
    if as_json:
        emit_json(found)
        return
    emit_table([(f"{one['task']}/{one['profile']}", one["about"]) for one in found])
    typer.echo(
        "\nKnobs of one: `society tasks NAME`. Your own: --task module:Class, "
        "or --task script with a .yaml file that describes a repository (docs/script.md)."
    )


def _knobs(space: Any) -> list[dict[str, Any]]:
    return [
        {
            "knob": name,
            "default": space.default(name),
            "range": _range(knob, space.default(name)),
            "unit": knob.unit,
            "group": knob.group,
            "about": knob.about,
            "source": knob.source,
        }
        for name, knob in space.knobs.items()
    ]


def _range(knob: Any, default: object) -> str:
    if knob.choices:
        return " | ".join(map(str, knob.choices))
    if isinstance(default, bool):
        return "true | false"
    return f"{knob.low:g} .. {knob.high:g}{' (log)' if knob.log else ''}"


@app.command()
def doctor(
    lab: Annotated[
        Path | None, typer.Option("--lab", help="Also examine the notebook in this folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check whether this machine and installation are fit for work; exit code 1 if not.

    Example: society doctor --lab lab
    """
    from society.doctor import Health, examine

    checks = examine(lab)
    if as_json:
        emit_json(checks)
    else:
        for check in checks:
            typer.echo(_check_line(check))
    if any(check.health is Health.FAIL for check in checks):
        raise typer.Exit(1)


def _check_line(check: Check) -> str:
    todo = f" -> {check.todo}" if check.todo else ""
    return f"{check.health.value:<4}  {check.name:<9}  {check.found}{todo}"
