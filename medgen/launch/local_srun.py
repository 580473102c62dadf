"""A stand-in for `srun` on one machine: starts the ranks, writes a log for each, ends all when one fails.

Called by the job scripts of the local backend as `python -m medgen.launch.local_srun`. Standard library only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from medgen.launch.processes import die_with_parent, end_with_parent, signal_group, signal_process

POLL_SECONDS = 0.05
LAST_WORDS_SECONDS = 1.0  # the other ranks may log what they saw before they are killed
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
GOOD_CODES = (0, 3)  # done, and stopped after saving


@dataclass
class Options:
    """The part of srun's command line that the scripts use. `output` may contain %t, the rank, and %%."""

    command: list[str]
    output: str | None = None
    kill_on_bad_exit: bool = False
    wait_seconds: float = 0  # after the first rank has ended; 0: for ever


@dataclass
class Rank:
    number: int
    process: subprocess.Popen[bytes]
    killed_by_us: bool = False

    @property
    def code(self) -> int | None:
        """Exit code as a shell gives it: 128 + signal for a killed process; None while it runs."""
        code = self.process.poll()
        return code if code is None or code >= 0 else 128 - code


@dataclass
class Step:
    ranks: list[Rank] = field(default_factory=list)
    received: list[int] = field(default_factory=list)  # signals to pass on

    def note_signal(self, number: int, frame: FrameType | None) -> None:
        """Only noted here: ranks that are just being started must get it too, and none twice."""
        self.received.append(number)

    def forward(self) -> None:
        """To the ranks themselves, not to their children: a rank tells its own workers."""
        while self.received:
            number = signal.Signals(self.received.pop(0))
            for rank in self.alive():
                signal_process(rank.process.pid, number)

    def alive(self) -> list[Rank]:
        return [rank for rank in self.ranks if rank.code is None]

    def kill(self) -> None:
        for rank in self.alive():
            rank.killed_by_us = True
            signal_group(rank.process.pid, signal.SIGKILL)


def parse(arguments: list[str]) -> Options:
    """Options come first, as --name=value; those that matter on a cluster only are accepted and ignored."""
    options = Options([])
    for index, argument in enumerate(arguments):
        if not argument.startswith("-"):
            options.command = arguments[index:]
            break
        name, _, value = argument.partition("=")
        if name == "--output":
            options.output = value
        elif name == "--kill-on-bad-exit":
            options.kill_on_bad_exit = value != "0"
        elif name == "--wait":
            options.wait_seconds = float(value)
    if not options.command:
        raise SystemExit("srun: error: no command given to execute")
    return options


def start(options: Options, rank: int, count: int) -> Rank:
    environment = {
        **os.environ,
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_NTASKS": str(count),
        "SLURM_STEP_NUM_TASKS": str(count),
        "SLURM_STEP_ID": "0",
    }
    output = None
    if options.output is not None:
        path = Path("%".join(part.replace("%t", str(rank)) for part in options.output.split("%%")))
        path.parent.mkdir(parents=True, exist_ok=True)
        output = path.open("ab")
    process = subprocess.Popen(
        options.command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        start_new_session=True,
        preexec_fn=die_with_parent(),
    )
    if output is not None:
        output.close()
    return Rank(rank, process)


def wait(step: Step, options: Options) -> None:
    """Until every rank has ended; kills the rest after a failure, or `wait_seconds` after the first one ended."""
    told: set[int] = set()
    deadline = float("inf")
    while alive := step.alive():
        step.forward()
        for rank in step.ranks:
            if rank.code is not None and rank.number not in told:
                told.add(rank.number)
                tell(rank)
                failed = rank.code not in GOOD_CODES and options.kill_on_bad_exit
                patience = LAST_WORDS_SECONDS if failed else options.wait_seconds or float("inf")
                deadline = min(deadline, time.monotonic() + patience)
        if time.monotonic() > deadline:
            print(f"srun: error: {len(alive)} of {len(step.ranks)} tasks did not end with the others: killed", file=sys.stderr, flush=True)
            step.kill()
        time.sleep(POLL_SECONDS)
    for rank in step.ranks:
        if rank.number not in told:
            tell(rank)


def tell(rank: Rank) -> None:
    """srun's own wording, so that one reader finds the guilty rank in both kinds of batch log."""
    code = rank.code
    if code in (0, None) or rank.killed_by_us:
        return
    how = signal.strsignal(code - 128) if code > 128 else f"Exited with exit code {code}"
    print(f"srun: error: {os.uname().nodename}: task {rank.number}: {how}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    end_with_parent()
    options = parse(arguments)
    count = int(os.environ["SLURM_NTASKS"])
    step = Step()
    for number in FORWARDED:
        signal.signal(number, step.note_signal)
    try:
        for rank in range(count):
            step.ranks.append(start(options, rank, count))
        wait(step, options)
    finally:
        for started in step.ranks:  # whatever a rank left behind in its session
            signal_group(started.process.pid, signal.SIGKILL)
    codes = [rank.code or 0 for rank in step.ranks if not rank.killed_by_us]
    return max(codes) if codes else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
