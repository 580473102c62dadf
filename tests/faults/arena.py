"""Where the punisher works: a Slurm, one run on it as a user sees it, and an eye on the queue. Used by punisher.py and punishments.py.

Everything that is killed here is known by the run's own folder or by the sandbox's own pid files: a machine may be shared."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medgen import files
from medgen.launch.processes import start_ticks
from medgen.launch.script import parse_job_name
from medgen.rundir import RunDir

REPOSITORY = Path(__file__).parent.parent.parent
SANDBOX = REPOSITORY / "cluster" / "sandbox" / "sandbox.py"
STUCK = ("JobHeldUser", "JobHeldAdmin", "launch failed requeued held", "Dependency", "DependencyNeverSatisfied")  # alone, nothing of it will start
LOOK_SECONDS = 1.0
COMMAND_SECONDS = 240.0  # of one medgen command on a busy machine
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp|.+\.\d+\.\d+\.tmp")
DISK_MEBIBYTES = 640
UP_TRIES = 6


class Log:
    """A line per thing that happened: JSON in a file, words on the screen."""

    def __init__(self, path: Path):
        self.path, self.began = path, time.time()

    def write(self, what: str, **facts: Any) -> None:
        files.append_line(self.path, json.dumps({"time": round(time.time(), 1), "what": what, **facts}))
        words = "  ".join(f"{name}={value}" for name, value in facts.items())
        print(f"{(time.time() - self.began) / 60:6.1f} min  {what:<8} {words}", flush=True)


@dataclass
class Arena:
    """`sandbox`: the folder of our own Slurm; None for a cluster that was there before, whose daemons are left alone."""

    folder: Path
    sandbox: Path | None
    environment: dict[str, str]
    log: Log
    random: random.Random
    findings: list[dict[str, Any]] = field(default_factory=list)

    def found(self, what: str, **facts: Any) -> None:
        """Something that does not hold."""
        self.findings.append({"finding": what, **facts})
        self.log.write("FINDING", finding=what, **facts)

    def slurm(self, *command: object, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Never raises: the controller may be dead just now."""
        words = [str(word) for word in command]
        try:
            return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, 124, "", "no answer")

    def bring_back(self) -> None:
        """Start the daemons that are dead. Raises RuntimeError if they do not come, on a busy machine after several tries."""
        for _ in range(UP_TRIES):
            done = subprocess.run([sys.executable, str(SANDBOX), "up", "--folder", str(self.sandbox)], capture_output=True, text=True)
            if done.returncode == 0:
                return
        raise RuntimeError(f"the sandbox does not come back: {done.stderr}")

    def daemon(self, name: str) -> int | None:
        """The pid of a daemon of our own sandbox, if it lives."""
        if self.sandbox is None:
            return None
        pid, ticks, _ = (self.sandbox / "pid" / name).read_text().split()
        return int(pid) if str(start_ticks(int(pid))) == ticks else None


@dataclass(frozen=True)
class Process:
    """A process of one run: a rank (`kind` is its verb), or a batch shell (`batch`)."""

    pid: int
    kind: str
    shard: int
    attempt: int
    job: str

    def send(self, number: signal.Signals) -> bool:
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    @property
    def is_gone(self) -> bool:
        return start_ticks(self.pid) is None


@dataclass(frozen=True)
class Job:
    """A row of squeue that has not ended; an element of an array is one by itself."""

    id: int  # of the whole array
    index: int | None
    state: str
    reason: str
    stage: str
    shard: int
    segment: int

    @property
    def element(self) -> str:
        return str(self.id) if self.index is None else f"{self.id}_{self.index}"

    @property
    def may_go_on(self) -> bool:
        return self.state != "PENDING" or self.reason not in STUCK


class Graph:
    """One run of the spec in a runs folder of its own, which lies on a small disk of its own where we may mount one."""

    def __init__(self, arena: Arena, number: int, spec: Path, run_id: str, options: list[str]):
        self.arena, self.spec, self.options = arena, spec, options
        self.folder = arena.folder / "graphs" / f"{number:03d}"
        self.number = number
        self.runs = self.folder / "runs"
        self.runs.mkdir(parents=True)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MEBIBYTES}m", "punisher", str(self.runs)], capture_output=True)
        self.has_own_disk = mounted.returncode == 0
        self.run = RunDir(self.runs / run_id)
        self.environment = {**arena.environment, "MEDGEN_RUNS": str(self.runs)}
        self.damaged: set[str] = set()  # files that were altered on purpose, as outcomes name them
        self.later: list[tuple[float, str, Any]] = []  # (when, what, a function): what must be undone
        self.since_submit: list[str] = []  # kinds of faults

    def leave(self, keep: bool) -> None:
        """Take the disk away again. `keep`: copy the run folder first, to be looked at."""
        if self.has_own_disk:
            if keep and self.run.root.exists():
                shutil.copytree(self.run.root, self.folder / "kept", symlinks=True, dirs_exist_ok=True)
            for _ in range(20):
                if subprocess.run(["umount", str(self.runs)], capture_output=True).returncode == 0:
                    break
                time.sleep(1)
            else:
                subprocess.run(["umount", "--lazy", str(self.runs)], check=False)
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def command(self, *words: object, extra: dict[str, str] | None = None) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "medgen", *(str(word) for word in words)]
        return subprocess.Popen(command, cwd=self.folder, env={**self.environment, **(extra or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def medgen(self, *words: object, extra: dict[str, str] | None = None) -> tuple[int, str]:
        """(exit code, what it said)."""
        process = self.command(*words, extra=extra)
        try:
            said = process.communicate(timeout=COMMAND_SECONDS)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return 124, process.communicate()[0] + f"\nno end within {COMMAND_SECONDS:.0f} s"
        return process.returncode, said

    @property
    def submit_words(self) -> list[str]:
        return ["submit", str(self.spec), "--site", str(self.arena.folder / "lab.yaml"), *self.options]

    def submit(self, extra: dict[str, str] | None = None) -> tuple[int, str]:
        """As a user types it: never a flag, nothing cleaned before."""
        return self.medgen(*self.submit_words, extra=extra)

    # ---- what is there ----

    def plan(self) -> dict[str, Any]:
        found: dict[str, Any] = files.read_json(self.run.plan)
        return found

    def tasks(self) -> list[tuple[str, int]]:
        return [(stage["name"], task["shard"]) for stage in self.plan()["stages"] for task in stage["tasks"]]

    def outcome(self, stage: str, shard: int) -> dict[str, Any] | None:
        try:
            record: dict[str, Any] = files.read_json(self.run.outcome_file(stage, shard))
        except (OSError, ValueError):
            return None
        return record

    def done_tasks(self) -> list[tuple[str, int]]:
        try:
            tasks = self.tasks()
        except (OSError, ValueError, KeyError):
            return []
        return [task for task in tasks if (found := self.outcome(*task)) is not None and found["status"] == "done"]

    def is_done(self, stage: str) -> bool:
        try:
            tasks = [task for task in self.tasks() if task[0] == stage]
        except (OSError, ValueError):
            return False
        return bool(tasks) and set(tasks) <= set(self.done_tasks())

    def all_done(self) -> bool:
        try:
            return set(self.tasks()) == set(self.done_tasks())
        except (OSError, ValueError):
            return False

    def broken_promises(self) -> list[str]:
        """Files of done tasks that are not what their outcome says, but for those altered on purpose."""
        wrong = []
        for stage, shard in self.done_tasks():
            record = self.outcome(stage, shard) or {"files": []}
            for item in record["files"]:
                path = self.run.root / item["path"]
                if item["path"] not in self.damaged and (not path.is_file() or files.sha256_file(path) != item["sha256"]):
                    wrong.append(f"{stage} shard {shard}: {item['path']} is {'missing' if not path.is_file() else 'another'}")
        return wrong

    def whole_checkpoints(self) -> list[Path]:
        """Newest first; read here without medgen's own reader."""
        found = []
        for folder in sorted(self.run.checkpoints("train").glob("step-*"), reverse=True):
            try:
                commit = files.read_json(folder / "commit.json")
                if all(files.sha256_file(folder / name) == facts["sha256"] for name, facts in commit["files"].items()):
                    found.append(folder)
            except (OSError, ValueError, KeyError):
                continue
        return found

    def progress(self) -> tuple[object, ...]:
        beats = [self.run.read_heartbeat(stage, shard) for stage, shard in (self.tasks() if self.run.plan.exists() else [])]
        return (len(self.done_tasks()), self.run.saved_step("train", 0), sum(beat.step for beat in beats if beat is not None))

    def temporaries(self) -> list[str]:
        return sorted(str(path.relative_to(self.runs)) for path in self.runs.rglob("*") if TEMPORARY.fullmatch(path.name) and "code" not in path.parts)

    def told(self) -> list[str]:
        """The product's own last words on each task that it will not start again."""
        last = {(event["stage"], event["shard"]): event for event in self.run.events() if event["event"] in ("task_ended", "requeue_refused")}
        return sorted({f"{key[0]}: {event.get('status')}: {event.get('cause')}: {event['next']}" for key, event in last.items() if not event.get("again") and event.get("status") != "done"})

    # ---- who works on it ----

    def processes(self) -> list[Process]:
        """Ranks and batch shells of this run, known by its folder in their command line or environment."""
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                if str(self.run.code) in words and "python" in words[0] and "--attempt" in words and "attempt" not in words:
                    values = {name: words[words.index(name) + 1] for name in ("--shard", "--attempt")}
                    kind, shard, attempt = words[words.index(str(self.run.code)) + 1], int(values["--shard"]), int(values["--attempt"])
                elif any(word.endswith("/slurm_script") for word in words):
                    kind, shard, attempt = "batch", 0, 0
                else:
                    continue
                environment = dict(item.partition("=")[::2] for item in (folder / "environ").read_bytes().decode(errors="replace").split("\0"))
            except (OSError, ValueError):
                continue
            name = parse_job_name(environment.get("SLURM_JOB_NAME", ""))
            if name is not None and name.is_of(self.run) and name.folder is not None:
                found.append(Process(int(folder.name), kind, shard, attempt, environment.get("SLURM_JOB_ID", "")))
        return found

    def ranks(self) -> list[Process]:
        return [process for process in self.processes() if process.kind != "batch"]


class Observer(threading.Thread):
    """Looks at squeue all the time: who is alive, and whether any task ever has two jobs."""

    def __init__(self, arena: Arena, graph: Graph):
        super().__init__(daemon=True)
        self.arena, self.graph = arena, graph
        self.jobs: list[Job] = []
        self.seen_at = 0.0
        self.looks = 0
        self.ended = threading.Event()
        self._told: set[tuple[str, int, int]] = set()
        self._still_since: float | None = None

    def run(self) -> None:
        while not self.ended.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        answer = self.arena.slurm("squeue", "-h", "-r", "-o", "%F|%K|%T|%r|%j", seconds=30)
        if answer.returncode != 0:
            self._still_since = None
            return
        self.jobs = [job for line in answer.stdout.splitlines() if (job := self._job(line)) is not None]
        self.seen_at, self.looks = time.monotonic(), self.looks + 1
        counts = Counter((job.stage, job.shard, job.segment) for job in self.jobs if job.state != "COMPLETING")
        for key, count in counts.items():
            if count > 1 and key not in self._told:
                self._told.add(key)
                both = [f"{job.element} {job.state} {job.reason}" for job in self.jobs if (job.stage, job.shard, job.segment) == key]
                self.arena.found("two jobs for one task", graph=self.graph.number, task=key, jobs=both)
        if any(job.may_go_on for job in self.jobs):
            self._still_since = None
        elif self._still_since is None:
            self._still_since = time.monotonic()

    def _job(self, line: str) -> Job | None:
        number, index, state, reason, name = line.split("|", 4)
        parsed = parse_job_name(name)
        if parsed is None or parsed.folder is None or not parsed.is_of(self.graph.run):
            return None
        at = int(index) if index.isdigit() else None
        return Job(int(number), at, state, reason, parsed.stage, parsed.offset + (at or 0), parsed.segment)

    @property
    def still_seconds(self) -> float:
        """How long nothing of the run could go on by itself."""
        return 0.0 if self._still_since is None else time.monotonic() - self._still_since

    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.state == "RUNNING"]
