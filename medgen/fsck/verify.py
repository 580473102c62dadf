"""Every part of a run against what was written of it, and what the next submit makes of each damage. Used by fsck.

What is not done is no damage: only what was finished and is not what it was, or cannot be read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from medgen import commits, document, planning, rundir, spec
from medgen.errors import MedgenError
from medgen.fsck import checkpoints
from medgen.fsck.at_work import AtWork
from medgen.fsck.checkpoints import Saved
from medgen.fsck.hashing import Hasher, unreadable
from medgen.launch import snapshot
from medgen.launch.tries import Key, Try, read_tries
from medgen.plan import Plan, PlannedStage, Task
from medgen.rundir import Outcome, RunDir

FOLDERS = "folders"  # the part that is there only if one cannot be read
WITHDRAWN = ("outcome_withdrawn", "shard_set_aside", "dataset_damaged", "checkpoint_lost")  # events: medgen itself took an outcome away
DEEPEST_RECORDS = 3  # <stage>/ckpt/step-000123, <stage>/shards/00042, logs/<stage>/s0
CLOSED = "what is in this folder counts as missing, or stops it; run the command below first"
BEGINS_ANEW = "it begins anew; times and GPU-hours of what was done before are lost, nothing else"
State = Literal["whole", "told", "working", "unfinished", "damaged"]  # told: in order, with something to know


@dataclass(frozen=True)
class Problem:
    """`next`: what the next submit does about it; `command`: what a person must run first, if it does not heal it."""

    what: str
    next: str
    command: str | None = None


@dataclass(frozen=True)
class Part:
    """One line of the table. `whole` tasks: those of the stage that are done and verify."""

    name: str
    state: State
    text: str
    problems: list[Problem] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)


def parts(run: RunDir, plan: Plan | None, plan_problem: str | None, working: AtWork, hasher: Hasher) -> list[Part]:
    found = [*_folders(run), _spec(run, plan), _plan(run, plan, plan_problem), _manifest(run), _code(run, plan), _events(run, plan)]
    if plan is None and not _has_begun(run):
        files_of = {"spec": run.spec, "plan": run.plan, "manifest": run.manifest, "code": run.code, "events": run.events_file}
        missing = {name for name, path in files_of.items() if not path.exists()}
        found = [Part(part.name, "unfinished", "not written yet: a submit was stopped, the next one writes it") if part.name in missing else part for part in found]
    if plan is None:
        return found
    told = _read_told(run, working)
    return found + [_stage(run, plan, stage, working, hasher, told) for stage in plan.stages]


def _has_begun(run: RunDir) -> bool:
    """True if anything was ever started, as far as can be seen without a plan."""
    return any(path.exists() for path in (run.submission(0).parent, run.outcome_file("", 0).parent, run.task_lock("", 0).parent))


def listed_bytes(run: RunDir, plan: Plan | None) -> int:
    """How much will be read, for the bar; images that are linked into a dataset count once."""
    total = 0
    for stage in plan.stages if plan is not None else []:
        outcomes = [run.read_outcome(task.stage, task.shard) for task in stage.tasks]
        named = {item.path: item.size_bytes for outcome in outcomes if outcome is not None and stage.kind != "collect" for item in outcome.files}
        with contextlib.suppress(OSError):
            for commit in commits.committed(run.checkpoints(stage.name)) if stage.kind == "train" else ():
                named |= {str((commit.folder / name).relative_to(run.root)): facts["size_bytes"] for name, facts in commit.files.items()}
        total += sum(named.values())
    return total


# --- the files of the run itself ---------------------------------------------------------------------------------------


def _damaged(name: str, what: str, next_: str, command: str | None = None) -> Part:
    return Part(name, "damaged", what, [Problem(what, next_, command)])


def _folders(run: RunDir) -> list[Part]:
    """Nothing, unless one cannot be read: what is in it looks as if it were not there."""
    closed = [(Path(error.filename), error) for error in _closed_folders(run)]
    problems = [Problem(f"{path.relative_to(run.root)}/ cannot be read: {error.strerror}", CLOSED, unreadable(path, path, error)) for path, error in closed]
    return [Part(FOLDERS, "damaged", f"{_count(len(problems), 'folder')} of the run cannot be read", problems)] if problems else []


def _closed_folders(run: RunDir) -> list[OSError]:
    """As deep as records and checkpoints lie; below are only files that are listed, and looked at one by one."""
    found: list[OSError] = []
    for here, folders, _ in os.walk(run.root, onerror=found.append):
        if os.access(here, os.R_OK) and not os.access(here, os.X_OK):
            found.append(PermissionError(errno.EACCES, os.strerror(errno.EACCES), here))
            folders.clear()
        elif len(Path(here).relative_to(run.root).parts) == DEEPEST_RECORDS and run.code not in Path(here).parents:
            folders.clear()
    return [error for error in found if not isinstance(error, FileNotFoundError)]  # a training deletes what it no longer needs


def _spec(run: RunDir, plan: Plan | None) -> Part:
    heals = "it is written anew from the spec that is submitted"
    try:
        text = run.spec.read_text()
        kept = spec.check(document.parse(text, str(run.spec), spec.BASH_KEYS))
    except FileNotFoundError:
        return _damaged("spec", "spec.yaml is missing", heals)
    except OSError as error:
        return _damaged("spec", f"spec.yaml cannot be read: {error.strerror or error}", heals)
    except (ValueError, MedgenError) as error:
        if plan is not None and _own_code(plan):
            return Part("spec", "told", f"spec.yaml cannot be checked from this folder: {str(error).splitlines()[0]}")
        return _damaged("spec", "spec.yaml does not read back as a spec", heals)
    if planning.run_id_of(kept) != run.run_id:
        return _damaged("spec", f"spec.yaml is that of {planning.run_id_of(kept)}, not of {run.run_id}", heals)
    return Part("spec", "whole", "reads back as this run")


def _plan(run: RunDir, plan: Plan | None, problem: str | None) -> Part:
    if plan is None:
        return _damaged("plan", f"plan.json {problem}", "it is written anew; what is finished is found again and kept. Until then the stages cannot be judged")
    if plan.run_id != run.run_id:
        back = shlex.join(["mv", str(run.root), str(run.root.with_name(plan.run_id))])
        return _damaged("plan", f"this folder is called {run.run_id}, its plan is that of {plan.run_id}",
                        "does not find this folder; under its new name nothing in it counts as done", back)  # fmt: skip
    tasks = sum(len(stage.tasks) for stage in plan.stages)
    return Part("plan", "whole", f"{len(plan.stages)} stages, {tasks} tasks")


def _manifest(run: RunDir) -> Part:
    try:
        facts = snapshot.read_manifest(run)
    except OSError as error:
        return _damaged("manifest", f"manifest.json cannot be read: {error.strerror or error}", "it stops and says so")
    if facts is None:
        problem = "is missing" if not run.manifest.exists() else "holds no manifest that can be read"
        return _damaged("manifest", f"manifest.json {problem}", "it is written anew, and then describes that submit")
    return Part("manifest", "whole", f"code {facts['code_sha256'][:12]}")


def _own_code(plan: Plan) -> list[str]:
    """Names of the user's packages that configs name as `pkg.mod:Name`, in the order in which their code was hashed."""
    configs = [stage.settings["config"] for stage in plan.stages if stage.kind == "train"]
    named = [config[key] for config in configs for key in snapshot.USER_CODE_KEYS if key in config]
    return list(dict.fromkeys(value.partition(":")[0].partition(".")[0] for value in named if isinstance(value, str) and ":" in value))


def _code(run: RunDir, plan: Plan | None) -> Part:
    if not run.code.exists():
        return _damaged("code", "code/ is missing", "it is copied again from the medgen that submits")
    try:
        promised = snapshot.promised_code(run)
    except OSError:
        promised = None
    if promised is None or plan is None:
        return Part("code", "told", f"is there; without {'manifest.json' if promised is None else 'plan.json'} it cannot be verified")
    names = [name for top in _own_code(plan) for name in (top, f"{top}.py") if (run.code / name).exists()]
    try:
        found = snapshot.copied_sha256(run.code, names)
    except OSError as error:
        return _damaged("code", f"code/ cannot be read: {error.strerror or error}", "it stops and says so")
    if found != promised:
        return _damaged("code", "code/ is not what was copied when the run was made",
                        "where the same medgen is installed, it is moved to code.bad.<time> and copied again; where there is another, submit stops and gives the command to take that")  # fmt: skip
    return Part("code", "whole", "is what was copied when the run was made")


def _events(run: RunDir, plan: Plan | None) -> Part:
    try:
        lines = [line for line in run.events_file.read_text(errors="replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return _damaged("events", "events.jsonl is missing", BEGINS_ANEW)
    except OSError as error:
        return _damaged("events", f"events.jsonl cannot be read: {error.strerror or error}", "it stops and says so")
    unsound = sum(not _is_event(line) for line in lines)
    if unsound == len(lines) and plan is not None and any(run.read_outcome(task.stage, task.shard) for stage in plan.stages for task in stage.tasks):
        what = f"none of the {_count(unsound, 'line')} of events.jsonl can be read" if lines else "events.jsonl is empty, though tasks have ended"
        return _damaged("events", what, BEGINS_ANEW)
    if unsound:
        return Part("events", "told", f"{len(lines) - unsound:,} events; {unsound:,} lines that were cut or damaged are left out by everything that reads them")
    return Part("events", "whole", f"{len(lines):,} events")


def _is_event(line: str) -> bool:
    try:
        return rundir.is_sound(json.loads(line))
    except (ValueError, RecursionError):
        return False


# --- stages ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Told:
    """What the events tell. `last`: of every task its newest start; `done`: those that must have an outcome, because nobody works on
    the run and it was not taken back."""

    last: dict[Key, Try]
    done: frozenset[Key]


def _read_told(run: RunDir, working: AtWork) -> _Told:
    try:
        events = run.events()
    except OSError:  # a damage of its own
        events = []
    done: set[Key] = set()
    for event in events:
        if event["event"] == "task_ended" and event["status"] == "done":
            done.add((event["stage"], event["shard"]))
        elif event["event"] in ("task_started", *WITHDRAWN):
            done.discard((event["stage"], event.get("shard", 0)))
    return _Told({key: items[-1] for key, items in read_tries(events).items()}, frozenset(done if working.words is None else ()))


@dataclass(frozen=True)
class _TaskState:
    """`seen`: whether a submit that only compares sizes notices the damage; `command`: what makes a file readable."""

    state: State
    text: str
    seen: bool = True
    outcome: Outcome | None = None
    command: str | None = None


def _stage(run: RunDir, plan: Plan, stage: PlannedStage, working: AtWork, hasher: Hasher, told: _Told) -> Part:
    states = {task.shard: _task(run, task, working, hasher, told) for task in stage.tasks}
    if stage.kind == "train":
        return _training(run, plan, stage, states[0], working, hasher)
    problems = [_problem(run, plan, stage, shard, state) for shard, state in states.items() if state.state == "damaged"]
    whole = [shard for shard, state in states.items() if state.state == "whole"]
    return Part(stage.name, _worst([state.state for state in states.values()]), _text(stage, states), problems, whole)


def _worst(states: list[State]) -> State:
    order: tuple[State, ...] = ("damaged", "working", "unfinished", "told", "whole")
    return next(state for state in order if state in states)


def _task(run: RunDir, task: Task, working: AtWork, hasher: Hasher, told: _Told) -> _TaskState:
    """Looked at twice if something is wrong: whoever makes it again takes its outcome away first."""
    if (task.stage, task.shard) in working.tasks:
        return _TaskState("working", "being worked on, not judged")
    before = _bytes(run.outcome_file(task.stage, task.shard))
    found = _task_now(run, task, hasher, told)
    if found.state == "damaged" and _bytes(run.outcome_file(task.stage, task.shard)) != before:
        return _TaskState("working", "changed while it was read, not judged")
    return found


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _task_now(run: RunDir, task: Task, hasher: Hasher, told: _Told) -> _TaskState:
    file, key = run.outcome_file(task.stage, task.shard), (task.stage, task.shard)
    lost = _TaskState("damaged", f"done according to the events, but its record {file.relative_to(run.root)} is lost")
    try:
        file.lstat()
    except FileNotFoundError:
        return lost if key in told.done else _TaskState("unfinished", "not done")
    except OSError as error:
        return _TaskState("unfinished", f"not known: {file.parent.name}/ cannot be read: {error.strerror}")
    outcome = run.read_outcome(task.stage, task.shard)
    if outcome is None:
        return _TaskState("damaged", f"{file.relative_to(run.root)} is not readable")
    if outcome.status != "done":
        last = told.last.get(key)
        if last is None or last.attempt <= outcome.attempt:
            return _TaskState("unfinished", _ending_in_words(outcome.status, outcome.cause))
        if last.status is None:
            return _TaskState("unfinished", f"attempt {last.attempt} has begun, and told no end")
        return lost if key in told.done else _TaskState("unfinished", _ending_in_words(last.status, last.cause))
    if outcome.task_hash != task.hash or outcome.run_id != run.run_id:
        return _TaskState("unfinished", "not done: what is there was made for another plan")
    if not outcome.files:
        return _TaskState("damaged", f"{file.relative_to(run.root)} names no files")
    wrong = [(item.path, problem) for item in outcome.files if (problem := hasher.problem_with(run.root / item.path, item.size_bytes, item.sha256)) is not None]
    if not wrong:
        return _TaskState("whole", "done", outcome=outcome)
    path, first = next((item for item in wrong if item[1].kind == "unreadable"), wrong[0])
    more = f", and {len(wrong) - 1} more of its {len(outcome.files)} files" if len(wrong) > 1 else ""
    return _TaskState("damaged", f"{path} {first.words}{more}", any(problem.kind == "size" for _, problem in wrong), outcome, first.command)


def _ending_in_words(status: str, cause: str | None) -> str:
    return f"{status}: {cause.splitlines()[0]}" if cause else status


STOPS = "it stops where it meets this file, and changes nothing; after the command below it goes on"
MADE_AGAIN = {
    "generate": "the shard is moved to quarantine/ and made again, the same images; the others stay",
    "collect": "the dataset is moved aside and built again from the shards",
    "features": "the features that are missing are taken again",
    "evaluate": "the scores are computed again",
    "structure": "the trial is run again",
    "utility": "the trial is run again",
    "report": "the page is written again",
    "command": "the command is run again",
}


def _problem(run: RunDir, plan: Plan, stage: PlannedStage, shard: int, state: _TaskState) -> Problem:
    what = state.text if len(stage.tasks) == 1 else f"shard {shard}: {state.text}"
    if state.command is not None:
        return Problem(what, STOPS, state.command)
    scores = stage.kind == "collect" and plan.stage(stage.settings["of"]).kind != "generate"
    again = MADE_AGAIN["evaluate" if scores else stage.kind] if state.outcome is not None else "it counts as not done and is made again, from whatever verifies"
    return Problem(what, *_noticed(run, plan, stage.name, shard, state, again))


def _noticed(run: RunDir, plan: Plan, stage: str, shard: int, state: _TaskState, again: str) -> tuple[str, str | None]:
    """A submit to Slurm compares sizes only, so that it never reads terabytes on a login node."""
    if state.seen or plan.place.scheduler == "local":
        return again, None
    return f"on Slurm it compares sizes only and leaves this as it is; after the command below, {again}", shlex.join(["rm", str(run.outcome_file(stage, shard))])


def _text(stage: PlannedStage, states: dict[int, _TaskState]) -> str:
    whole = [state.outcome for state in states.values() if state.state == "whole" and state.outcome is not None]
    damaged = sum(state.state == "damaged" for state in states.values())
    files = sum(len(outcome.files) for outcome in whole)
    if len(states) == 1:
        return f"done, {_count(files, 'file')}" if whole else next(iter(states.values())).text
    words = [f"{len(whole)} of {len(states)} shards done, {_count(files, 'file')}"]
    words += [f"{damaged} damaged"] if damaged else []
    others = [state.text for state in states.values() if state.state in ("unfinished", "working")]
    return "; ".join(words + [f"{others.count(text)} {text}" for text in dict.fromkeys(others)])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


# --- training ----------------------------------------------------------------------------------------------------------


def _training(run: RunDir, plan: Plan, stage: PlannedStage, state: _TaskState, working: AtWork, hasher: Hasher) -> Part:
    folder = run.checkpoints(stage.name)
    try:
        found = checkpoints.saved(folder, hasher)
    except OSError as error:
        return Part(stage.name, "unfinished", f"not known: {folder.relative_to(run.root)}/ cannot be read: {error.strerror}")
    if state.state == "working" or (working.words is not None and state.state != "whole"):
        bad: list[Saved] = []  # what is being replaced this moment is not judged
    else:
        bad = [item for item in found if item.problem is not None]
    good = [item for item in found if item.problem is None]
    steps = ", ".join(str(item.step) for item in reversed(good))
    text = "; ".join([state.text if state.outcome is None or state.state == "damaged" else "done", *([f"checkpoints of step{'s' if len(good) > 1 else ''} {steps}"] if good else [])])
    problems = [_checkpoint_problem(item, good, found, state, run.root) for item in bad]
    named = {f"{item.folder.relative_to(run.root)}/" for item in bad}
    if state.state == "damaged" and not any(name in state.text for name in named):
        problems.insert(0, _training_problem(run, plan, stage, state, good))
    if bad and not good and state.state != "whole" and all(item.command is None for item in bad):
        problems = [_nothing_left(folder, bad)]
    elif state.state == "damaged" and not state.seen and state.command is None and plan.place.scheduler != "local":
        rest = shlex.join(["rm", str(run.outcome_file(stage.name, 0))])
        problems = [Problem(item.what, f"on Slurm it compares sizes only and leaves this as it is; after the command below: {item.next}",
                            f"{item.command}; {rest}" if item.command else rest) if rest not in (item.command or "") else item for item in problems]  # fmt: skip
    return Part(stage.name, "damaged" if problems else state.state, text, problems, [0] if state.state == "whole" else [])


def _checkpoint_problem(item: Saved, good: list[Saved], found: list[Saved], state: _TaskState, root: Path) -> Problem:
    what = f"{item.folder.relative_to(root)}: {item.problem}"
    aside = shlex.join(["mv", str(item.folder), str(commits.set_aside(item.folder))])
    if state.state == "whole":
        return Problem(what, "it is left alone: the training is done and nothing uses this checkpoint", item.command)
    if item.command is not None and (item.commit is not None or state.command is not None):
        return Problem(what, STOPS, item.command)
    lost = [f"best-{metric}" for metric, chosen in commits.best(checkpoints.readable_commits(found)).items() if chosen is item.commit]
    if not good:
        return Problem(what, "training refuses to start while none of its checkpoints verifies", item.command)
    if item.step > good[0].step:
        return Problem(what, f"training goes on from step {good[0].step} and makes it again; the damaged one is kept as {commits.set_aside(item.folder).name}"
                             + ("" if item.command is None else ", unless it is made readable first, with the command below"), item.command)  # fmt: skip
    if lost:
        return Problem(what, f"training stops at its end: {', '.join(lost)} was this one, and cannot be made again. "
                             "After the command below the best of the others takes its place", aside)  # fmt: skip
    return Problem(what, "it is skipped: a newer one is whole", item.command)


def _training_problem(run: RunDir, plan: Plan, stage: PlannedStage, state: _TaskState, good: list[Saved]) -> Problem:
    if state.command is not None:
        return Problem(state.text, STOPS, state.command)
    if not good:
        return Problem(state.text, "training starts from step 0: no checkpoint is left")
    return Problem(state.text, f"training starts at its checkpoint of step {good[0].step} and goes on to its end")


def _nothing_left(folder: Path, bad: list[Saved]) -> Problem:
    listing = "; ".join(f"{item.folder.name}: {item.problem}" for item in bad)
    return Problem(f"none of {len(bad)} checkpoints verifies ({listing})", "training refuses to start: it never begins again from zero unasked. The command below allows it",
                   shlex.join(["mv", str(folder), str(commits.set_aside(folder))]))  # fmt: skip
