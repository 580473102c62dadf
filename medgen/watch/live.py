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
from medgen.watch.state import RunState, read_state, to_json

REFRESH_SECONDS = 0.5
PLAIN_SECONDS = 30  # between two progress lines where there is no terminal
GOING_ON = ("running", "stopping")
VERDICT_CODES = {"stopping": Exit.UNFINISHED, "done": Exit.DONE, "failed": Exit.FAILED, "interrupted": Exit.INTERRUPTED, "not started": Exit.UNFINISHED, "running": Exit.UNFINISHED}


def watch(run: RunDir, once: bool = False, as_json: bool = False) -> Exit:
    """Show a run until nothing of it runs any more, or until q or Ctrl-C; the jobs keep running.

    With `once`: show it once; DONE, FAILED, or UNFINISHED for everything else."""
    state = read_state(run)
    if once or as_json:
        if as_json:
            print(json.dumps(to_json(state), indent=1))
        else:
            _print_once(state)
        code = VERDICT_CODES[state.verdict]
        return Exit.UNFINISHED if code == Exit.INTERRUPTED else code
    with display(run, "q or Ctrl-C leaves; the jobs keep running") as update, _keys() as pressed:
        try:
            while state.verdict in GOING_ON:
                update()
                if pressed(REFRESH_SECONDS) == "q":
                    return Exit.UNFINISHED
                state = read_state(run)
            update()
        except KeyboardInterrupt:
            return Exit.UNFINISHED
    return VERDICT_CODES[state.verdict]


def _print_once(state: RunState) -> None:
    from rich.console import Console

    from medgen.watch.view import render

    Console(width=None if sys.stdout.isatty() else 120).print(render(state))


@contextmanager
def display(run: RunDir, hint: str) -> Iterator[Callable[[], None]]:
    """Yield a function that shows the run as it is now: a live screen on a terminal, else a line for each event."""
    if not sys.stdout.isatty():
        yield _Plain(run).update
        return
    from rich.live import Live

    from medgen.watch.view import render

    # no refresh thread: the caller may fork, and its loop comes by often enough
    with Live(render(read_state(run), hint), auto_refresh=False, vertical_overflow="crop") as live:

        def update() -> None:
            state = read_state(run)
            live.update(render(state, hint if state.verdict == "running" else None), refresh=True)

        yield update


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

    def __init__(self, run: RunDir):
        self.run = run
        self.shown = len(run.events())
        self.next_progress = time.monotonic() + PLAIN_SECONDS

    def update(self) -> None:
        events = self.run.events()
        for event in events[self.shown :]:
            line = describe_event(event)
            if line:
                print(f"{time.strftime('%H:%M:%S', time.localtime(event['time']))}  {line}", flush=True)
        self.shown = len(events)
        if time.monotonic() >= self.next_progress:
            self.next_progress = time.monotonic() + PLAIN_SECONDS
            for line in progress_lines(read_state(self.run)):
                print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def progress_lines(state: RunState) -> list[str]:
    """One line per running stage."""
    lines = []
    for stage in state.stages:
        if stage.word in ("running", "stalled"):
            loss = next((f", loss {task.loss:.4g}" for task in stage.tasks if task.word == "running" and task.loss is not None), "")
            lines.append(f"{stage.name}: {stage.word}, {stage.fraction:.0%}{loss}")
    return lines


def describe_event(event: dict[str, Any]) -> str | None:
    """An event in words; None for those that tell a person nothing."""
    kind = event["event"]
    if kind in ("task_started", "task_ended"):
        task = f"{event['stage']} shard {event['shard']}"
        if kind == "task_started":
            return f"{task}: started" + (f" (attempt {event['attempt'] + 1})" if event["attempt"] else "")
        if event["status"] == "done":
            return f"{task}: done in {event['seconds']:.1f} s"
        return f"{task}: {event['status']}: {event['cause']}; {event['next']}; log: {event['log']}"
    if kind == "submitted":
        return f"{event['tasks']} tasks to run"
    if kind == "stage_blocked":
        return f"{event['stage']}: not started, because {', '.join(event['needs'])} failed"
    if kind == "stopping":
        return f"stopping: {event['tasks']} tasks have {event['seconds']} s to save"
    if kind == "stopped":
        return f"stopped; {event['next']}"
    if kind == "finished":
        return "all done" if event["status"] == "done" else f"ended; failed: {', '.join(event['failed'])}"
    return None


def list_runs(as_json: bool = False) -> Exit:
    """Every run under the runs folder, newest first. A folder that is not readable is listed as such, not hidden."""
    states, unreadable = [], []
    for run in all_runs():
        try:
            states.append(read_state(run))
        except InputError as error:
            unreadable.append(str(error))
    if as_json:
        keys = ("run_id", "name", "verdict", "fraction", "device_hours", "created", "changed", "path")
        print(json.dumps([{key: value for key, value in {**to_json(state), "fraction": state.fraction}.items() if key in keys} for state in states], indent=1))
    else:
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
