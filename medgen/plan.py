"""The plan as every stage reads it back from the run folder: its JSON is what --dry-run shows and what runs.

Made by planning.py. Light to import: `watch` and the job scripts need no spec."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from medgen import files
from medgen.errors import InputError
from medgen.rundir import RunDir

PLAN_VERSION = 4
GRACE_SLACK_SECONDS = 60  # the signal may come late by as much
GRACE_SPARE_SECONDS = 29  # on top when a grace is advised: what was measured once is not the slowest there will be


class DamagedPlan(InputError):
    """plan.json is there and holds no plan: the next submit writes it anew."""


@dataclass(frozen=True)
class Shard:
    """One task of a generate stage: images first <= i < stop; whole chunks only."""

    first: int
    stop: int


@dataclass(frozen=True)
class Task:
    """One thing a backend starts. `hash` ties an outcome to exactly this work."""

    stage: str
    shard: int
    hash: str
    images: Shard | None  # generate only


@dataclass(frozen=True)
class PlannedStage:
    """A stage with its tasks and what it waits for. `threads`: CPU threads per process, part of the byte promise."""

    name: str
    kind: str
    needs: list[str]
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    threads: int
    time_minutes: int
    mem_mebibytes: int | None
    parallel: int
    segments: int | None  # how often it may meet its time limit and go on; None: as often as it progresses
    chain: int  # jobs queued at once for its one task, one behind the other; 1 where a job asks Slurm to be queued again
    launcher: str  # srun: a task per rank; torchrun: an agent per node; none: the batch shell itself
    setup: list[str]  # bash lines before anything of medgen
    command_setup: list[str]  # of a command stage: lines in its own shell, which may bring another interpreter
    directives: list[str]  # sbatch options in the site's and the user's words
    left_out: list[str]  # options that medgen writes no line for, because the user's own header is to stand alone
    settings: dict[str, Any]  # the stage as the user wrote it, resolved
    tasks: list[Task]

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def limit_seconds(self) -> int:
        """Of a job, after which Slurm ends it."""
        return self.time_minutes * 60

    @property
    def jobs(self) -> int:
        """What Slurm counts against the limits of its user: each element of an array and each job of a chain."""
        return self.chain if self.chain > 1 else len(self.tasks)

    @property
    def saves(self) -> bool:
        """True if its tasks are trainings, which save in the middle and go on from there."""
        return self.kind in ("train", "structure", "utility")

    @property
    def devices(self) -> int:
        """GPUs held by a task, or processes where there is no GPU."""
        return self.nodes * self.gpus_per_node or self.ranks


@dataclass(frozen=True)
class Place:
    """How jobs run at a site, the same for all stages. `interpreter` [] is the one that ran submit."""

    scheduler: str
    interpreter: list[str]
    export: list[str]
    secrets: str | None
    grace_seconds: int
    notify: dict[str, Any]
    lost_seconds: int  # of a rank's silence after which its task is given up; 0: never


def grace_needed_seconds(step_seconds: float, save_seconds: float) -> int:
    """What must lie between the warning signal and the time limit: whole seconds, rounded up."""
    return math.ceil(step_seconds + save_seconds + GRACE_SLACK_SECONDS)


@dataclass(frozen=True)
class Plan:
    """`data` is empty where every stage is a command."""

    version: int
    run_id: str
    name: str
    seed: int
    site: str
    place: Place
    data: dict[str, Any]
    stages: list[PlannedStage]

    def stage(self, name: str) -> PlannedStage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise InputError(f"{self.run_id}: no stage {name!r}; the stages are: {', '.join(item.name for item in self.stages)}")

    def trained_on(self, drawn: str) -> tuple[str, ...]:
        """The splits that the model of a generate stage has seen."""
        source = self.stage(self.stage(drawn).settings["from"])
        return ("train", "val") if source.settings["repeat"] is not None else ("train",)

    def only_stage(self, kind: str, name: str | None) -> PlannedStage:
        """The stage called `name`, or the only one of this kind."""
        if name is not None:
            stage = self.stage(name)
            if stage.kind != kind:
                raise InputError(f"{self.run_id}: {name} is a {stage.kind} stage, not {kind}; use `medgen {stage.kind}`")
            return stage
        found = [stage for stage in self.stages if stage.kind == kind]
        if len(found) != 1:
            names = ", ".join(stage.name for stage in found) or "none"
            raise InputError(f"{self.run_id}: say which stage with --stage; {kind} stages here: {names}")
        return found[0]


def collect_name(generate_stage: str) -> str:
    return f"collect_{generate_stage}"


def features_name(evaluate_stage: str) -> str:
    return f"features_{evaluate_stage}"


def to_json(plan: Plan) -> dict[str, Any]:
    return asdict(plan)


def from_json(record: dict[str, Any], source: str) -> Plan:
    if not isinstance(record, dict) or "version" not in record:
        raise DamagedPlan(f"{source}: not a plan; submit the spec again, it is written anew")
    if record["version"] != PLAN_VERSION:
        raise InputError(f"{source}: made by another version of medgen (plan version {record['version']}, here {PLAN_VERSION}); "
                         "the run carries its own: python CODE VERB RUN with the folder code/ beside this file, or submit the spec with it")
    try:
        stages = []
        for stage in record["stages"]:
            tasks = [Task(**{**task, "images": Shard(**task["images"]) if task["images"] else None}) for task in stage["tasks"]]
            stages.append(PlannedStage(**{**stage, "tasks": tasks}))
        return Plan(**{**record, "place": Place(**record["place"]), "stages": stages})
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedPlan(f"{source}: not a plan ({error}); submit the spec again, it is written anew") from None


def read(run: RunDir) -> Plan:
    """The plan of a run. Raises InputError if the folder is no run or its plan cannot be read, DamagedPlan if it holds none."""
    try:
        record = files.read_json(run.plan)
    except FileNotFoundError:
        if run.is_begun:
            raise InputError(f"{run.root}: plan.json is missing; submit the spec again, it is written anew") from None
        raise InputError(f"{run.root}: not a run folder (no plan.json)") from None
    except OSError as error:
        raise InputError(f"{run.plan}: cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DamagedPlan(f"{run.plan}: cannot be read ({error}); submit the spec again, it is written anew") from None
    return from_json(record, str(run.plan))
