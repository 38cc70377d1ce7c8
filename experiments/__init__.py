"""Experiments: what a run is, which ones there can be, and who executes them.

    task        the seam: what is being improved, and how one run of it is made
    space       typed knobs, canonical variants, distances
    neighbourhood  what lies near a variant, and which changes it repeats
    noise       spread over seeds, its components, and what pairing removes
    provenance  what a run depends on, as text that can be kept: the profile, the source
    executor    the contract of executors, and one that runs in this process
    local       warm worker processes on this machine
    worker      what those processes do
    placement   which accelerator each slot works on
    synthetic   a task for tests and documentation, milliseconds per run
    pretrain    the reference workload: GPT pre-training, bits per byte
    script      any repository with a training command and a metric
    scriptfile  what its profile says, checked
    snapshot    the files of a repository as they were at the start
    findings    published findings as data
    verdicts    the rules by which the replication of a finding is judged

`LocalExecutor` is in `society.experiments.local`; neither it nor this package imports torch.
"""

from society.experiments.executor import Executor, InlineExecutor
from society.experiments.space import Space, variant
from society.experiments.task import (
    Direction,
    Diverged,
    Limits,
    Profile,
    Refused,
    Role,
    Task,
    TrainReport,
    cache_dir,
    known_profiles,
    known_tasks,
    load_task,
)

__all__ = [
    "Direction",
    "Diverged",
    "Executor",
    "InlineExecutor",
    "Limits",
    "Profile",
    "Refused",
    "Role",
    "Space",
    "Task",
    "TrainReport",
    "cache_dir",
    "known_profiles",
    "known_tasks",
    "load_task",
    "variant",
]
