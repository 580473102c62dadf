"""The submit and cancel verbs, put together: prepare, show or create, then queue, run here, or leave to the background. Called by cli.py.

What shows the progress is handed in, because watch may import launch and not the other way round."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medgen import plan, redact, rundir
from medgen.errors import Exit, InputError, Interrupted
from medgen.launch import nodes as bad_nodes
from medgen.launch import preflight, space
from medgen.launch.backend import Backend
from medgen.launch.dry import describe
from medgen.launch.fit import Limits
from medgen.launch.local import AlreadyRunning, LocalBackend, detach
from medgen.launch.queued import was_queued
from medgen.launch.script import Chunk, whole_stage
from medgen.launch.slurm_backend import SlurmBackend, chunks
from medgen.launch.submit import Prepared, check_data, create, prepare
from medgen.launch.supervisor import living_supervisor
from medgen.rundir import RunDir

Display = Callable[[RunDir, str], AbstractContextManager[Callable[[], None]]]
HINT = "Ctrl-C stops: running tasks save first, and the same command goes on from there"


def submit(
    spec_path: Path,
    overrides: Sequence[str],
    site_name: str | None,
    runs_root: Path,
    *,
    display: Display,
    watch: Callable[[RunDir], Exit],
    here: bool = False,
    dry_run: bool = False,
    detached: bool = False,
    as_json: bool = False,
) -> Exit:
    """Queue a spec on Slurm, or run it on this machine; a sweep point by point.

    Raises InputError before anything is written if spec, site or request are wrong."""
    prepared = prepare(spec_path, overrides, site_name, runs_root, here)
    tell([*dict.fromkeys(note for item in prepared for note in item.notes), *space.retention(prepared)])
    if dry_run:
        _show(prepared, as_json)
        return Exit.DONE
    on_slurm = prepared[0].site.scheduler == "slurm"
    if on_slurm and detached:
        raise InputError("--detach has no effect on a cluster, where submit returns at once; remove it, or write --local")
    for line in dict.fromkeys(check_data(item.spec) for item in prepared):
        tell([line])
    if on_slurm:
        tell(preflight.check(prepared))
    try:
        codes = [_submit_one(item, display, watch, detached, as_json) for item in prepared]
    except KeyboardInterrupt:
        raise Interrupted("interrupted; if anything was queued it is held and will not run; submit again to go on, or `medgen cancel` it") from None
    if len(prepared) > 1 and not as_json:
        print(f"{len(prepared)} points; compare them: medgen ls --sweep {prepared[0].plan.name}")
    return max(codes)


def _submit_one(item: Prepared, display: Display, watch: Callable[[RunDir], Exit], detached: bool, as_json: bool) -> Exit:
    if item.site.scheduler == "local" and was_queued(item.run) and (queued := SlurmBackend(Limits()).poll(item.run)).alive:
        raise InputError(f"{item.run.run_id}: {queued.where}; `medgen cancel {item.run.run_id}` first, then run it here")
    tell(list(dict.fromkeys(create(item))))
    if item.site.scheduler == "slurm":
        code = SlurmBackend(item.limits).submit(item.run, item.plan)
        if not as_json:
            print(queued_text(item))
    else:
        try:
            code = _start_here(item, display, detached)
        except AlreadyRunning as already:
            tell([str(already)])
            if detached:
                return Exit.DONE
            code = watch(item.run)
            if code == Exit.UNFINISHED:
                tell([f"the run goes on; `medgen cancel {item.run.run_id}` stops it"])
            return code
    if as_json:
        print(json.dumps({"run_id": item.run.run_id, "path": str(item.run.root), "exit": int(code)}))
    return code


def _start_here(item: Prepared, display: Display, detached: bool) -> Exit:
    run, site = item.run, item.site
    if detached:
        tell([detach(run, site.cpus, site.gpus)])
        return Exit.DONE
    if (known := living_supervisor(run)) is not None:
        raise AlreadyRunning(run, known)
    with display(run, HINT) as update:
        return LocalBackend(site.cpus, site.gpus, display=update).submit(run, item.plan)


def _lines_of_jobs(item: Prepared, intents: list[dict[str, Any]], jobs: dict[str, int]) -> list[tuple[str, str, str]]:
    """(stage, tasks, job): a line per sbatch call, one for all jobs of a chain."""
    lines = []
    for stage in item.plan.stages:
        own = [event for event in intents if event["stage"] == stage.name]
        numbers = [jobs[event["name"]] for event in own]
        if stage.chain > 1 and len(own) > 1:
            lines.append((stage.name, "1 task", f"jobs {numbers[0]} to {numbers[-1]}, one behind the other"))
            continue
        for number, event in zip(numbers, own, strict=True):
            lines.append((stage.name, "1 task" if len(event["shards"]) == 1 else f"{len(event['shards'])} tasks", f"job {number}"))
    return lines


def queued_text(item: Prepared) -> str:
    """What the last submit has queued, a line per stage."""
    run = item.run
    events = run.events()
    start = max((number for number, event in enumerate(events) if event["event"] == "submitted"), default=len(events))
    jobs = {event["name"]: event["job_id"] for event in events[start:] if event["event"] == "job_submitted"}
    lines = _lines_of_jobs(item, [event for event in events[start:] if event["event"] == "job_intent" and event["name"] in jobs], jobs)
    name = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in item.point.values.items())
    title = f"{run.run_id}" + (f"  ({name})" if name else "")
    done = all(run.is_done(task.stage, task.shard, task.hash) for stage in item.plan.stages for task in stage.tasks)
    if done:
        return f"{title}: everything is done already"
    if not lines or run.submitted_at() < item.prepared_at:
        return f"{title}: everything that is not done is in the queue already; follow it: medgen watch {run.run_id}"
    if item.point.values:  # one of many
        numbers = sorted(jobs.values())
        return f"{title}: queued, " + (f"job {numbers[0]}" if len(numbers) == 1 else f"jobs {numbers[0]} to {numbers[-1]}")
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    table = ["  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"{title}: queued", *table, f"follow it: medgen watch {run.run_id}"])


def _show(prepared: list[Prepared], as_json: bool) -> None:
    if as_json:
        plans = [redact.value(plan.to_json(item.plan)) for item in prepared]
        print(json.dumps(plans[0] if len(plans) == 1 else plans, indent=1))
        return
    print(redact.text("\n".join(describe(item.plan, item.run.root, _first_chunks(item)) for item in prepared)), end="")


def _first_chunks(item: Prepared) -> dict[str, list[Chunk]]:
    """The sbatch calls of a submit that finds nothing done and nothing queued."""
    number = int(item.run.next_submission().name)
    if item.site.scheduler == "local":
        return {stage.name: [whole_stage(stage, number)] for stage in item.plan.stages}
    return {stage.name: chunks(stage, [task.shard for task in stage.tasks], number, item.limits.array) for stage in item.plan.stages}


def cancel(run: RunDir) -> str:
    """Stop a run wherever it runs; returns what happened in words."""
    return backend_of(run).cancel(run, plan.read(run))


def nodes(avoid: str | None, reason: str | None, forget: str | None, as_json: bool) -> None:
    """Change what is remembered of nodes, then print it. Raises InputError for a node without a reason, or a reason without a node."""
    cache = rundir.cache_root(rundir.runs_root())
    if avoid is not None and forget is not None:
        raise InputError("--avoid and --forget: one at a time")
    if (avoid is None) != (reason is None):
        raise InputError("--avoid NODE and --reason TEXT go together: whoever reads it in a week wants to know why")
    if avoid is not None and reason is not None:
        if not reason.strip():
            raise InputError("--reason: say why in a few words")
        if avoid not in bad_nodes.known_to_slurm({avoid}):
            raise InputError(f"--avoid {avoid}: Slurm knows no such node; one at a time, as `sinfo -N` calls it")
        bad_nodes.remember(cache, avoid, reason, "")
    if forget is not None:
        bad_nodes.forget(cache, forget)
    entries = bad_nodes.believed(cache)
    if as_json:
        print(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    for entry in entries:
        print(f"{entry.node}  until {time.strftime('%Y-%m-%d', time.localtime(entry.until))}  {entry.reason}" + (f"  ({entry.run_id})" if entry.run_id else ""))
    if not entries:
        print("no node is kept away from; the site profile may exclude some (exclude:)")


def backend_of(run: RunDir) -> Backend:
    """What runs it now, else what it was last given to."""
    if living_supervisor(run) is not None or not was_queued(run):
        return LocalBackend(1, 0)
    return SlurmBackend(Limits())


def tell(messages: Sequence[str]) -> None:
    """For people, on stderr: stdout is kept for what was asked for."""
    for message in messages:
        print(redact.text(message), file=sys.stderr, flush=True)
