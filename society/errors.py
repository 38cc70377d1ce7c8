"""The one error tree.

SocietyError                 anything the user can act on; the command prints it in one line
├── UsageError               exit code 2: what was asked for is wrong
│   ├── UnknownName          a name that is not known; lists the known ones
│   ├── InvalidVariant       an override that the task's recipe refuses; names the knob
│   └── NotANotebook         a folder without a readable notebook
├── NotebookInUse            exit code 1: another process owns the folder
├── NotebookDamaged          exit code 1: a file of the notebook cannot be read or written
│   └── LedgerUnreachable    the server of a shared ledger does not answer, or not to this user
├── RecallUnavailable        the semantic index is down; the society goes on without it
├── LeaseError               the lease is not yours (any more)
│   ├── AlreadyLeased        somebody else holds it
│   ├── AlreadyRun           the work was done before; carries the run id
│   ├── ClaimClosed          the claim it would serve has its verdict
│   └── LeaseLost            it expired or was fenced off
├── InvariantViolated        the ledger refused a write that breaks a rule of the design
│   └── NotIndependent       an author may not make the evidence of their own claim
├── ExecutorError            the workers cannot run experiments at all
├── EndpointError            no answer of the language model; the brain `search` takes over
│   ├── EndpointDown         it cannot be reached, refuses, or takes longer than the deadline
│   ├── BadAnswer            it answered, but not what was asked for; carries what to tell it
│   └── AllowanceSpent       one more request might cost more than a cap allows
├── StudyStopped             exit code 130: a study was interrupted; what was finished is recorded
└── of the trainer, in society.model: CorpusUnavailable, DownloadFailed, BadTokens, NoDevice,
    NoRows, UnusableShape, BadWeights, BadScore, Diverged
    (the last three end as a run's outcome, not as an error of the command)
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SocietyError(Exception):
    """Base of everything a user can act on. `exit_code` is what the command returns."""

    exit_code = 1


class UsageError(SocietyError):
    """What was asked for is wrong; asking differently helps."""

    exit_code = 2


class UnknownName(UsageError):
    """A name outside a closed set. Carries `kind`, `name` and the `known` names."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        """Name what was given and what is known."""
        self.kind, self.name, self.known = kind, name, tuple(sorted(known))
        near = get_close_matches(name, self.known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(self.known)}.")


class InvalidVariant(UsageError):
    """An override the recipe refuses. Carries the `knob`."""

    def __init__(self, knob: str, problem: str) -> None:
        """Name the knob and what is wrong with its value."""
        self.knob = knob
        super().__init__(f"Knob {knob!r}: {problem}")


class NotANotebook(UsageError):
    """The folder holds no notebook, or one that this version cannot read."""


class NotebookInUse(SocietyError):
    """Another living process owns the notebook."""


class NotebookDamaged(SocietyError):
    """A file of the notebook cannot be read or written."""


class LedgerUnreachable(NotebookDamaged):
    """The server of a shared ledger does not answer, or not to this user; nothing is lost."""


class RecallUnavailable(SocietyError):
    """The semantic index cannot be reached; exact-match deduplication still works."""


class LeaseError(SocietyError):
    """A lease is not (or no longer) held by who tries to use it."""


class AlreadyLeased(LeaseError):
    """Somebody else holds an unexpired lease on the same work."""


class AlreadyRun(LeaseError):
    """The same work was done before. Carries the `run_id` that holds the result."""

    def __init__(self, run_id: str, message: str) -> None:
        """Name the run that holds the result."""
        self.run_id = run_id
        super().__init__(message)


class ClaimClosed(LeaseError):
    """The claim has a verdict; another run would decide nothing."""


class LeaseLost(LeaseError):
    """The lease expired and was given to somebody else, or was finished before."""


class InvariantViolated(SocietyError):
    """The ledger refused a write that would break an invariant of the notebook."""


class NotIndependent(InvariantViolated):
    """The author of a claim tried to verify, reproduce or otherwise support it."""


class ExecutorError(SocietyError):
    """The executor cannot run experiments (its workers do not start, or keep dying)."""


class EndpointError(SocietyError):
    """The language model gave no usable answer; a society goes on with the brain `search`."""


class EndpointDown(EndpointError):
    """No answer within the deadline, and another request now would bring none.

    Carries `retry_in_s`, the seconds until asking makes sense again; None where nobody knows.
    """

    def __init__(self, message: str, retry_in_s: float | None = None) -> None:
        """Say what was found and what to do about it."""
        self.retry_in_s = retry_in_s
        super().__init__(message)


class BadAnswer(EndpointError):
    """The model refused, was cut off, or answered in another form than asked for.

    Carries `feedback`, one short text that tells the model what was wrong, and the `kind` of the
    problem: `refusal`, `cut_off`, `too_large`, `no_json` or `schema`.
    """

    def __init__(self, kind: str, feedback: str) -> None:
        """Name the kind and what to tell the model."""
        self.kind, self.feedback = kind, feedback
        super().__init__(f"Unusable answer of the language model ({kind}): {feedback}")


class AllowanceSpent(EndpointError):
    """One more request might cost more than a cap allows, so it was not made.

    Carries the `cap`, e.g. `max_tokens`, and `final`: whether even an end of the requests under way
    would leave too little.
    """

    def __init__(self, cap: str, message: str, *, final: bool) -> None:
        """Name the cap, what is left of it and how to raise it."""
        self.cap, self.final = cap, final
        super().__init__(message)


class StudyStopped(SocietyError):
    """A study was interrupted. Carries how many runs were `made` by then."""

    exit_code = 130

    def __init__(self, made: int) -> None:
        """Say what is kept, and how to go on."""
        self.made = made
        super().__init__(
            f"Stopped; {made} run{'' if made == 1 else 's'} of this session recorded. "
            "The same command goes on from there."
        )
