"""Following a run until it ends, on a terminal or as plain lines; the table of all runs. Called by watch, ls, submit.

Leaving never stops a job: only `medgen cancel` does, or Ctrl-C in the submit that runs it."""

from __future__ import annotations

import json
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from medgen.errors import Exit, InputError
from medgen.rundir import RunDir, all_runs, runs_root
from medgen.watch.poll import Impatient, Sparing
from medgen.watch.state import ON_DEVICES, Reader, RunState, read_state, to_json

REFRESH_SECONDS, SLURM_REFRESH_SECONDS = 0.5, 2.0
SHARE = 0.1  # of the time at most goes into looking: a big run is looked at less often
PLAIN_SECONDS = 30  # between two progress lines where there is no terminal
READABLE_TASKS = 1000  # JSON of more is for programs only, and on one line
GOING_ON = ("queued", "running", "stopping")
VERDICT_CODES = {"done": Exit.DONE, "failed": Exit.FAILED, "interrupted": Exit.INTERRUPTED}  # everything else is not finished


def watch(run: RunDir, once: bool = False, as_json: bool = False) -> Exit:
    """Show a run until nothing of it runs any more, or until q or Ctrl-C; the jobs keep running.

    With `once`: show it once; DONE, FAILED, or UNFINISHED for everything else."""
    if once or as_json:
        state = read_state(run)
        if as_json:
            is_big = sum(len(stage.tasks) for stage in state.stages) > READABLE_TASKS
            print(json.dumps(to_json(state), indent=None if is_big else 1))
        else:
            _print_once(state)
        return Exit.UNFINISHED if state.verdict == "interrupted" else VERDICT_CODES.get(state.verdict, Exit.UNFINISHED)
    reader = Reader(run, Impatient())
    with _screen(reader, "q or Ctrl-C leaves; the jobs keep running") as show, _keys() as pressed:
        try:
            while True:
                began = time.monotonic()
                state = reader.read()
                show(lambda: state)  # noqa: B023  called at once
                if state.verdict not in GOING_ON:
                    return VERDICT_CODES.get(state.verdict, Exit.UNFINISHED)
                pause_seconds = max(SLURM_REFRESH_SECONDS if state.on_slurm else REFRESH_SECONDS, (time.monotonic() - began) / SHARE)
                if pressed(pause_seconds) == "q":
                    return Exit.UNFINISHED
        except KeyboardInterrupt:
            return Exit.UNFINISHED


def _print_once(state: RunState) -> None:
    from rich.console import Console

    from medgen.watch.view import render

    Console(width=None if sys.stdout.isatty() else 120).print(render(state))


@contextmanager
def display(run: RunDir, hint: str) -> Iterator[Callable[[], None]]:
    """Yield a function that shows the run as it is now: a live screen on a terminal, else a line for each event."""
    reader = Reader(run, Impatient())
    with _screen(reader, hint) as show:
        yield lambda: show(reader.read)


@contextmanager
def _screen(reader: Reader, hint: str) -> Iterator[Callable[[Callable[[], RunState]], None]]:
    """Yield what shows a state; it is handed in as a function, because plain lines seldom need it."""
    if not sys.stdout.isatty():
        yield _Plain(reader).show
        return
    from rich.live import Live

    from medgen.watch.view import render

    # no refresh thread: the caller may fork, and its loop comes by often enough
    with Live(render(reader.read(), hint), auto_refresh=False, vertical_overflow="crop") as live:

        def show(read: Callable[[], RunState]) -> None:
            state = read()
            live.update(render(state, hint if state.verdict in ("queued", "running") else None), refresh=True)

        yield show


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Yield a function that waits some seconds for a key and returns it, or "". Restores the terminal."""
    if not sys.stdin.isatty():

        def no_key(seconds: float) -> str:
            time.sleep(seconds)
            return ""

        yield no_key
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)

    def pressed(seconds: float) -> str:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        return sys.stdin.read(1).lower() if ready else ""

    try:
        tty.setcbreak(descriptor)
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class _Plain:
    """For logs and pipes: every event from now on as a line, and progress twice a minute."""

    def __init__(self, reader: Reader):
        self.log = reader.log
        self.log.refresh()
        self.shown = len(self.log.records)
        self.next_progress = time.monotonic() + PLAIN_SECONDS

    def show(self, read: Callable[[], RunState]) -> None:
        self.log.refresh()
        for event in self.log.records[self.shown :]:
            line = describe_event(event)
            if line:
                print(f"{time.strftime('%H:%M:%S', time.localtime(event['time']))}  {line}", flush=True)
        self.shown = len(self.log.records)
        if time.monotonic() >= self.next_progress:
            self.next_progress = time.monotonic() + PLAIN_SECONDS
            for line in progress_lines(read()):
                print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def progress_lines(state: RunState) -> list[str]:
    """One line per stage that holds devices now."""
    lines = []
    for stage in state.stages:
        if stage.word in ON_DEVICES:
            loss = next((f", loss {task.loss:.4g}" for task in stage.tasks if task.word == "running" and task.loss is not None), "")
            lines.append(f"{stage.name}: {stage.word}, {stage.fraction:.0%}{loss}")
    return lines


def describe_event(event: dict[str, Any]) -> str | None:
    """An event in words; None for those that tell a person nothing, and for damaged ones."""
    try:
        return _in_words(event["event"], event)
    except (KeyError, TypeError, ValueError):
        return None


def _in_words(kind: str, event: dict[str, Any]) -> str | None:
    if kind in ("task_started", "task_ended"):
        task = f"{event['stage']} shard {event['shard']}"
        if kind == "task_started":
            return f"{task}: started" + (f" (try {event['attempt'] + 1})" if event["attempt"] else "")
        if event["status"] == "done":
            return f"{task}: done in {event['seconds']:.1f} s"
        return f"{task}: {event['status']}: {event['cause']}; {event['next']}; log: {event['log']}"
    if kind in ("rank_silent", "rank_lost", "rank_ended", "slow_rank"):
        return f"{event['stage']} shard {event['shard']}: {_of_rank(kind, event)}"
    if kind in ("outcome_withdrawn", "shard_set_aside"):
        return f"{event['stage']} shard {event['shard']}: {event['cause']}: it is made again"
    if kind in ("checkpoint_skipped", "checkpoint_lost", "starts_over", "dataset_set_aside", "dataset_damaged", "steps_skipped", "many_rejected"):
        return f"{event['stage']}: {event['cause']}"
    if kind == "submitted":
        return f"{_tasks(event['tasks'])} to run"
    if kind == "job_submitted":
        return f"queued as job {event['job_id']}: {event['name']}"
    if kind == "jobs_released":
        return f"released: {_numbers(event['job_ids'])} may start"
    if kind == "jobs_cancelled":
        return f"taken out of the queue: {_numbers(event['job_ids'])}: {event['cause']}"
    if kind == "submission_rolled_back":
        return f"taken back: {_numbers(event['job_ids'])}, because Slurm refused one of them"
    if kind == "cancelled":
        return f"cancelled: {_numbers(event['job_ids'])}; the same submit command goes on from here"
    if kind == "stage_blocked":
        return f"{event['stage']}: not started, because {', '.join(event['needs'])} failed"
    if kind == "stopping":
        return f"stopping: {_tasks(event['tasks'])} {'has' if event['tasks'] == 1 else 'have'} {event['seconds']} s to save"
    if kind == "stopped":
        return f"stopped; {event['next']}"
    if kind == "finished":
        return "all done" if event["status"] == "done" else f"ended; failed: {', '.join(event['failed'])}"
    return None


def _of_rank(kind: str, event: dict[str, Any]) -> str:
    rank = f"rank {event['rank']} on {event['node']}"
    if kind in ("rank_lost", "rank_ended"):
        return str(event["cause"])
    if kind == "slow_rank":
        return f"{rank} is {event['factor']:g} times slower than the others"
    return f"nothing was heard of {rank} for {event['seconds']} s; last heard of at step {event['step']}, {event['doing']}"


def _numbers(ids: list[int]) -> str:
    return f"job{'s' if len(ids) != 1 else ''} {', '.join(map(str, ids[:6]))}" + (f" and {len(ids) - 6} more" if len(ids) > 6 else "")


def _tasks(count: int) -> str:
    return f"{count} task{'s' if count != 1 else ''}"


def list_runs(as_json: bool = False) -> Exit:
    """Every run under the runs folder, newest first. A folder that is not readable is listed as such, not hidden."""
    states, unreadable = [], []
    source = Sparing()
    for run in all_runs():
        try:
            states.append(Reader(run, source).read())
        except InputError as error:
            unreadable.append(str(error))
    if as_json:
        keys = ("run_id", "name", "verdict", "fraction", "device_hours", "created", "changed", "path")
        print(json.dumps([{key: value for key, value in {**to_json(state), "fraction": state.fraction}.items() if key in keys} for state in states], indent=1))
    elif states or not unreadable:
        _print_runs(states)
    for message in unreadable:
        print(message, file=sys.stderr)
    return Exit.DONE


def _print_runs(states: list[RunState]) -> None:
    if not states:
        print(f"no runs in {runs_root()} yet; start one: medgen submit SPEC --local")
        return
    from rich.console import Console

    from medgen.watch.view import runs_table

    Console(width=None if sys.stdout.isatty() else 160).print(runs_table(states, time.time()))
