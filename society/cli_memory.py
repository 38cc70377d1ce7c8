"""`society memory`: look into a notebook, take its contents elsewhere, rebuild its index."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

from society.cli_common import (
    LAB,
    Json,
    Lab,
    emit_fields,
    emit_json,
    finite,
    plain,
    reading,
    task_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from society.memory.ledger import Ledger
    from society.records import Scope

LINKS_SHOWN = 20
"""Linked records listed one by one by `show`."""

app = typer.Typer(
    help="Search, show, export and reindex what a notebook holds.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command()
def search(
    text: Annotated[str, typer.Argument(help="A question, a statement or knob names.")],
    k: Annotated[int, typer.Option("--k", min=1, help="How many passages at most.")] = 5,
    kind: Annotated[
        str | None,
        typer.Option(help="Only one kind: run, claim, verdict, hypothesis or insight."),
    ] = None,
    lab: Lab = LAB,
    as_json: Json = False,
) -> None:
    """Find what the notebook knows about a topic, by meaning.

    Works beside a running society too.

    Example: society memory search "what do we know about warm-down?" --k 3
    """
    hits = _search(lab, text, k, kind)
    if as_json:
        emit_json(hits)
        return
    if not hits:
        typer.echo("Nothing found: the notebook holds no passage of this kind yet.")
    for hit in hits:
        typer.echo(f"{hit['similarity']:.2f}  {hit['kind']} {hit['ref']}")
        typer.echo(f"      {shorten(_one_line(hit['text']), 400, placeholder=' ...')}")


@app.command()
def show(
    record: Annotated[str, typer.Argument(metavar="ID", help="E.g. r00012, c0003 or s001.")],
    lab: Lab = LAB,
    as_json: Json = False,
) -> None:
    """Show one record with everything that is linked to it.

    Runs, claims, hypotheses, insights, studies and societies have ids; reports and logs name them.

    Example: society memory show c0003
    """
    with reading(lab) as ledger:
        found = lookup(ledger, record)
    if as_json:
        emit_json(found)
        return
    typer.echo(f"{found['kind']} {record}")
    _show(found["record"], "  ")
    for name, links in found["linked"].items():
        typer.echo(f"{name}")
        for link in links[:LINKS_SHOWN]:
            typer.echo(f"  {_one_line(link)}")
        if len(links) > LINKS_SHOWN:
            typer.echo(f"  and {len(links) - LINKS_SHOWN} more (--json has all)")


@app.command()
def export(
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write; standard output if not given.")
    ] = None,
    lab: Lab = LAB,
) -> None:
    """Write every record as JSON Lines, one object with its `kind` per line.

    Example: society memory export --out memory.jsonl
    """
    from society.errors import UsageError

    with reading(lab) as ledger:
        lines = (json.dumps(finite(one)) for one in everything(ledger))
        if out is None:
            for line in lines:
                typer.echo(line)
            return
        try:
            count = _write(out, lines)
        except OSError as error:
            raise UsageError(f"Cannot write {out}: {error.strerror}.") from None
    typer.echo(f"{count} records written to {out}")


@app.command()
def reindex(lab: Lab = LAB) -> None:
    """Rebuild the semantic index from the ledger, whatever state it is in.

    The ledger holds every fact, so nothing can be lost. Not while a society runs in the folder.

    Example: society memory reindex --lab lab
    """
    from society.memory.folder import NotebookFolder
    from society.memory.ledger import Ledger
    from society.memory.recall import Recall

    folder = NotebookFolder(lab).require()
    with (
        folder.lock(),
        Ledger.open(folder.ledger) as ledger,
        Recall.rebuild(folder, ledger, lower_is_better=_lower(ledger)) as recall,
    ):
        count = len(recall)
    typer.echo(f"{count} passages indexed in {folder.recall}")


def _search(lab: Path, text: str, k: int, kind: str | None) -> list[dict[str, Any]]:
    """By the index; if that is in use or damaged, by comparing with every passage."""
    from society.errors import RecallUnavailable, UnknownName
    from society.memory.folder import NotebookFolder
    from society.memory.ledger import Ledger
    from society.memory.prose import KINDS
    from society.memory.recall import Recall

    if kind is not None and kind not in KINDS:
        raise UnknownName("kind of passage", kind, KINDS)
    folder = NotebookFolder(lab).require()
    try:
        with (
            Ledger.open(folder.ledger) as ledger,
            Recall.open(folder, lower_is_better=_lower(ledger)) as recall,
        ):
            recall.sync(ledger)
            hits = recall.search(text, k, None if kind is None else [kind])
    except RecallUnavailable as error:
        print(f"note: {error} Searching without it.", file=sys.stderr)
        return _scan(folder.path, text, k, kind)
    return [
        {
            "similarity": round(hit.similarity, 4),
            "kind": hit.kind,
            "ref": hit.metadata["ref"],
            "text": hit.text,
        }
        for hit in hits
    ]


def _scan(path: Path, text: str, k: int, kind: str | None) -> list[dict[str, Any]]:
    from society.memory.frames import Memory

    with Memory(path) as memory:
        frame = memory.search(text, k=10**9)
    if kind is not None:
        frame = frame[frame["kind"] == kind]
    rows: list[dict[str, Any]] = frame.head(k).to_dict("records")  # type: ignore[assignment]
    return rows


def _lower(ledger: Ledger) -> bool:
    """Whether lower scores are better in the task of the last society."""
    records = ledger.societies()
    return not records or task_of(records[-1]).direction.sign < 0


def everything(ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Every record as plain values with its kind, parents before children."""
    for society in ledger.societies():
        yield _tagged("society", society)
    for scope in ledger.scopes():
        where = {"task": scope.task, "tier": scope.tier}
        yield from (_tagged("champion", one) | where for one in ledger.champions(scope))
    listings: Mapping[str, Sequence[object]] = {
        "run": ledger.runs(),
        "claim": ledger.claims(),
        "hypothesis": ledger.hypotheses(),
        "insight": ledger.insights(),
        "noise": ledger.noise_history(),
        "study": ledger.studies(),
    }
    for kind, records in listings.items():
        yield from (_tagged(kind, record) for record in records)
    for society in ledger.societies():
        for activity in ledger.activities(society.id):
            yield _tagged("activity", activity) | {"society": society.id}


def _tagged(kind: str, record: object) -> dict[str, Any]:
    """The record's fields behind its `kind`; a run's own kind is its `purpose`."""
    values = plain(record)
    if "kind" in values:
        values["purpose"] = values.pop("kind")
    return {"kind": kind, **values}


def lookup(ledger: Ledger, identity: str) -> dict[str, Any]:
    """A record of any kind by its id, and one line for everything that is linked to it.

    Raises:
        UsageError: There is no such record.
    """
    from society.errors import UsageError

    sources: Mapping[str, Sequence[Any]] = {
        "run": ledger.runs(),
        "claim": ledger.claims(),
        "hypothesis": ledger.hypotheses(),
        "insight": ledger.insights(),
        "society": ledger.societies(),
        "study": ledger.studies(),
    }
    for kind, records in sources.items():
        for record in records:
            if record.id == identity:
                linked = _linked(ledger, kind, record)
                filled = {name: links for name, links in linked.items() if links}
                return {"kind": kind, "record": plain(record), "linked": filled}
    known = ", ".join(f"{kind} {some[-1].id}" for kind, some in sources.items() if some)
    raise UsageError(
        f"No record {identity!r} in this notebook. The latest ones: {known or 'none'}."
    )


def _linked(ledger: Ledger, kind: str, record: Any) -> dict[str, list[str]]:
    if kind == "run":
        return _linked_to_run(ledger, record)
    if kind == "claim":
        return _linked_to_claim(ledger, record)
    if kind == "hypothesis":
        return {"tested by": _runs(ledger, {record.run_id}) if record.run_id else []}
    if kind == "study":
        return {"evidence": _runs(ledger, set(record.evidence))}
    if kind == "insight":
        claims = [_claim_line(one) for one in ledger.claims() if one.id in record.evidence]
        return {"evidence": [*_runs(ledger, set(record.evidence)), *claims]}
    counts = {
        "runs": len(ledger.runs(society=record.id)),
        "claims": sum(one.society == record.id for one in ledger.claims()),
        "insights": len(ledger.insights(society=record.id)),
        "hypotheses": len(ledger.hypotheses(society=record.id)),
    }
    return {"holds": [f"{count} {name}" for name, count in counts.items()]}


def _linked_to_run(ledger: Ledger, run: Any) -> dict[str, list[str]]:
    def about(claim: Any) -> bool:
        cited = claim.verdict.runs if claim.verdict else ()
        return run.id in (claim.screening_run, *cited) or run.claim_id == claim.id

    hypotheses = [one for one in ledger.hypotheses() if one.run_id == run.id]
    insights = [one for one in ledger.insights() if run.id in one.evidence]
    same = {one.id for one in ledger.runs(variant=run.variant) if one.id != run.id}
    return {
        "claims": [_claim_line(claim) for claim in ledger.claims() if about(claim)],
        "hypotheses": [f"{one.id} {one.statement}" for one in hypotheses],
        "insights": [f"{one.id} {one.text}" for one in insights],
        "runs of the same variant": _runs(ledger, same),
        "studies": [
            f"{one.id} {one.kind}: {one.title}"
            for one in ledger.studies()
            if run.id in one.evidence
        ],
        "champion": _crowned(ledger, run.variant.fingerprint),
    }


def _linked_to_claim(ledger: Ledger, claim: Any) -> dict[str, list[str]]:
    made_for = {run.id for run in ledger.runs() if run.claim_id == claim.id}
    cited = set(claim.verdict.runs) if claim.verdict else set()
    return {
        "screening run (never evidence)": _runs(ledger, {claim.screening_run}),
        "runs made for it": _runs(ledger, made_for),
        "other runs of the verdict": _runs(ledger, cited - made_for),
        "champion": _crowned(ledger, claim.variant.fingerprint),
        "insights": [
            f"{one.id} {one.text}" for one in ledger.insights() if claim.id in one.evidence
        ],
    }


def _runs(ledger: Ledger, ids: set[Any]) -> list[str]:
    return [
        f"{run.id} {run.kind.value} by {run.agent}, seed {run.seed}: "
        f"{run.outcome.value if run.score is None else run.score} ({run.variant.describe()})"
        for run in ledger.runs()
        if run.id in ids
    ]


def _claim_line(claim: Any) -> str:
    state = claim.verdict.decision.value if claim.verdict else "open"
    return f"{claim.id} {state}: {claim.variant.describe()} beats {claim.reference.describe()}"


def _crowned(ledger: Ledger, fingerprint: str) -> list[str]:
    def entries(scope: Scope) -> Iterator[str]:
        for one in ledger.champions(scope):
            if one.variant.fingerprint == fingerprint:
                yield f"#{one.number} on {scope.task}, {scope.tier}"

    return [words for scope in ledger.scopes() for words in entries(scope)]


def _show(values: Mapping[str, Any], indent: str) -> None:
    """Nested fields as indented lines; long lists are counted, texts kept."""
    flat = {name: _short(value) for name, value in values.items() if not isinstance(value, dict)}
    emit_fields(flat, indent)
    for name, value in values.items():
        if isinstance(value, dict):
            typer.echo(f"{indent}{name}")
            _show(value, indent + "  ")


def _short(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(map(str, value[:6]))
        return shown if len(value) <= 6 else f"{shown}, ... ({len(value)} in all)"
    if isinstance(value, float):
        return f"{value:.10g}"
    return _one_line(str(value))


def _one_line(text: str) -> str:
    """Without line breaks and control characters: a log tail is whatever a candidate printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _write(out: Path, lines: Iterator[str]) -> int:
    count = 0
    with out.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(line + "\n")
            count += 1
    return count
