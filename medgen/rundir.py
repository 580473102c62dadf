"""The run folder: the only module that knows file names inside a run. Used by every stage, the launcher and watch.

Outcomes, heartbeats and events are small JSON files; see docs/architecture.md for the tree."""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from medgen import commits, files, names, redact
from medgen.errors import InputError

RUNS_VARIABLE = "MEDGEN_RUNS"
CACHE_VARIABLE = "MEDGEN_CACHE"
CLOCK_SLACK_SECONDS = 60  # by which the clocks of two machines may differ without a word
Status = Literal["done", "interrupted", "failed"]


@dataclass(frozen=True)
class Produced:
    """One file that a task made; `path` counts from the run folder."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Outcome:
    """How one attempt at one task ended. DONE only with the plan's task hash and files that verify (I1)."""

    run_id: str
    stage: str
    shard: int
    task_hash: str
    attempt: int
    status: Status
    cause: str | None  # one line in words; None when done
    host: str
    device: str  # "cpu", or the GPU's name
    devices: int  # how many GPUs (or CPU processes) were held
    started: float  # unix seconds
    ended: float
    files: list[Produced] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # what the stage wants to tell: counts, rejected, ...

    @property
    def device_hours(self) -> float:
        return self.devices * (self.ended - self.started) / 3600


@dataclass(frozen=True)
class Heartbeat:
    """Rewritten by rank 0 while a task runs. `step` of `total` in units of `unit` (steps, images, files).

    `advanced`: unix seconds of the last progress; None in those that an older medgen wrote. `doing`: a word of activity.py.
    `slow`: ranks that keep the others waiting, and how many times slower they are.
    `skipped`: where too many steps of a training are: how many `steps` `of` the last.
    `heard`: when it came, for whoever asks how old it is; `time` and `advanced` are by the clock of its node, which may be wrong."""

    stage: str
    shard: int
    attempt: int
    step: int
    total: int
    unit: str
    loss: float | None
    time: float
    host: str
    pid: int
    advanced: float | None = None
    doing: str = ""
    slow: list[tuple[int, float]] = field(default_factory=list)
    skipped: dict[str, int] | None = None
    heard: float = 0.0  # set by reading, not written

    @property
    def last_advance(self) -> float | None:
        """`advanced` on the scale of `heard`."""
        return None if self.advanced is None else self.heard - (self.time - self.advanced)


@dataclass(frozen=True)
class RankBeat:
    """The same from every rank of a task that has several, rank 0's taken from its heartbeat."""

    rank: int
    attempt: int
    step: int
    advanced: float  # unix seconds
    doing: str
    time: float
    host: str
    pid: int
    heard: float = 0.0  # as in Heartbeat

    @property
    def last_advance(self) -> float:
        """`advanced` on the scale of `heard`."""
        return self.heard - (self.time - self.advanced)

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Relief:
    """With what a task starts again after it had too little memory. `mem_mebibytes` None: with what the plan says.

    `micro_batch_divisor`: into how many more parts a rank's batch is cut; the global batch stays the same."""

    mem_mebibytes: int | None = None
    micro_batch_divisor: int = 1


class RunDir:
    """Paths and small records of one run. Creating the object touches nothing on disk."""

    def __init__(self, root: Path):
        self.root = Path(root)

    @property
    def run_id(self) -> str:
        return self.root.name

    @property
    def spec(self) -> Path:
        return self.root / "spec.yaml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    @property
    def events_file(self) -> Path:
        return self.root / "events.jsonl"

    @property
    def code(self) -> Path:
        return self.root / "code"

    @property
    def lock(self) -> Path:
        """Held for life by the one supervisor of a local run."""
        return self.root / ".lock"

    @property
    def prepare_lock(self) -> Path:
        """Held for a moment while the folder is made or its plan is changed."""
        return self.root / ".prepare.lock"

    @property
    def supervisor(self) -> Path:
        """Who holds the lock: pid, start, host; rewritten every few seconds while it lives."""
        return self.root / ".supervisor.json"

    @property
    def written_at(self) -> float | None:
        """When its plan was written, or what else makes a folder a run; unix seconds, None if nothing of that can be seen."""
        for path in (self.plan, self.spec, self.events_file):
            with contextlib.suppress(OSError):
                return path.stat().st_mtime
        return None

    @property
    def is_begun(self) -> bool:
        """True if the folder is a run, with or without its plan."""
        return self.written_at is not None

    @property
    def cancel_mark(self) -> Path:
        """There from `medgen cancel` to the next submit: no job starts itself again meanwhile."""
        return self.root / ".cancelled"

    @property
    def local_log(self) -> Path:
        """What a detached supervisor prints."""
        return self.root / "logs" / "local.log"

    def batch_log(self, stage: str, shard: int) -> Path:
        """What the job script itself prints, all attempts in one file."""
        return self.root / "logs" / stage / f"s{shard}" / "batch.log"

    @property
    def cache(self) -> Path:
        """Slice caches and phantoms, shared by all runs beside this one: $MEDGEN_CACHE, else .cache in the runs folder."""
        return cache_root(self.root.parent)

    @property
    def report(self) -> Path:
        return self.root / "report" / "index.html"

    @property
    def report_table(self) -> Path:
        """Every score of every stage, as CSV."""
        return self.report.parent / "scores.csv"

    def dataset_card(self, generate_stage: str) -> Path:
        return self.report.parent / f"dataset_card_{generate_stage}.md"

    def submission(self, number: int) -> Path:
        return self.root / "submissions" / str(number)

    def next_submission(self) -> Path:
        taken = [int(path.name) for path in (self.root / "submissions").glob("*") if path.name.isdecimal()]
        return self.submission(max(taken, default=0) + 1)

    def stage(self, stage: str) -> Path:
        return self.root / stage

    def checkpoints(self, stage: str) -> Path:
        return self.root / stage / "ckpt"

    def trial(self, stage: str, shard: int) -> Path:
        """The checkpoints of one task of a structure or utility stage, until it is done."""
        return self.root / stage / f"trial-{shard:05d}"

    def predictions(self, stage: str) -> Path:
        return self.root / stage / "predictions.csv"

    def saved_step(self, stage: str, shard: int) -> int:
        """The newest step with a committed checkpoint, where a training goes on; 0 if there is none. Contents are not verified here."""
        newest = commits.newest(self.checkpoints(stage)) or commits.newest(self.trial(stage, shard))
        return newest[0] if newest is not None else 0

    def tensorboard(self, stage: str) -> Path:
        return self.root / stage / "tb"

    def previews(self, stage: str) -> Path:
        """Sample grids that a training drew on its way, all from the same noise."""
        return self.root / stage / "previews"

    def preview(self, stage: str, step: int) -> Path:
        return self.previews(stage) / f"{commits.folder_name(step)}.png"

    def drawn_previews(self, stage: str) -> dict[int, Path]:
        """By step, the first one first."""
        found = ((commits.STEP_FOLDER.fullmatch(path.stem), path) for path in self.previews(stage).glob("step-*.png"))
        return dict(sorted((int(match.group(1)), path) for match, path in found if match is not None))

    def training_log(self, stage: str) -> Path:
        """One JSON line per logged step: the source of every curve."""
        return self.root / stage / "log.jsonl"

    def lr_search(self, stage: str) -> Path:
        """The learning rate that was found before a training, and the curve it was read from; a picture of it beside it."""
        return self.root / stage / "find_lr.json"

    def noise_key(self, stage: str) -> Path:
        """What the noise of a differentially private training depends on. Nobody else may have it; it is removed when the training ends."""
        return self.root / stage / "noise.key"

    def hide_data(self) -> None:
        """From now on `data_mark` tells the data to nobody who has not this folder. Once made it stays, whoever comes second."""
        path = self._data_salt
        if not path.is_file():
            files.write_once_private(path, secrets.token_hex(32))

    def data_mark(self, fingerprint: str) -> str:
        """What stands for the data wherever others may read it. Where a private training is in the run, not the fingerprint itself: whoever has
        all images but one patient's could compute it with and without that one."""
        if not self._data_salt.is_file():
            return fingerprint
        return hmac.new(self._data_salt.read_bytes(), fingerprint.encode(), "sha256").hexdigest()

    @property
    def _data_salt(self) -> Path:
        return self.root / "data.salt"

    def step_search(self, stage: str) -> Path:
        """What `find-steps` has measured of a generate stage; a picture of it beside it."""
        return self.root / stage / "find_steps.json"

    def slowest_step_seconds(self, stage: str) -> float:
        """The slowest pace among the last lines of the training log, of all attempts; 0 if none is logged."""
        try:
            lines = self.training_log(stage).read_text().splitlines()[-1000:]
        except OSError:
            return 0.0
        return max((seconds for line in lines if (seconds := _logged_pace(line)) is not None), default=0.0)

    def made(self, stage: str, shard: int) -> Path:
        """Where a command stage may put what it makes: MEDGEN_OUT."""
        return self.root / stage / "made" / f"{shard:05d}"

    def task_result(self, stage: str, shard: int) -> Path:
        return self.root / stage / "results" / f"{shard:05d}.json"

    def shard(self, stage: str, shard: int) -> Path:
        return self.root / stage / "shards" / f"{shard:05d}"

    def quarantine(self, stage: str, shard: int) -> Path:
        """Where a shard that failed verification is moved, for people to look at."""
        return self.root / stage / "quarantine" / f"{shard:05d}.{int(time.time())}"

    def dataset(self, stage: str) -> Path:
        return self.root / stage / "dataset"

    def metrics(self, stage: str) -> Path:
        return self.root / stage / "metrics.json"

    def suspects(self, stage: str) -> Path:
        """Every synthetic image that may be a copy of a training slice, a line each."""
        return self.root / stage / "suspects.csv"

    def log(self, stage: str, shard: int, rank: int, attempt: int) -> Path:
        return self.root / "logs" / stage / f"s{shard}" / f"r{rank}.a{attempt}.log"

    def outcome_file(self, stage: str, shard: int) -> Path:
        return self.root / "outcome" / f"{stage}.{shard}.json"

    def task_lock(self, stage: str, shard: int) -> Path:
        """Held by the process that works on a task, and free again the moment it dies."""
        return self.root / "hb" / f"{stage}.{shard}.lock"

    def heartbeat_file(self, stage: str, shard: int) -> Path:
        return self.root / "hb" / f"{stage}.{shard}.json"

    def rank_beat_file(self, stage: str, shard: int, rank: int) -> Path:
        """Of ranks other than 0, which writes the heartbeat of the task."""
        return self.root / "hb" / f"{stage}.{shard}.r{rank}.json"

    def write_outcome(self, outcome: Outcome) -> None:
        record = asdict(outcome)
        record["cause"] = redact.value(record["cause"])
        files.write_json(self.outcome_file(outcome.stage, outcome.shard), record)

    def read_outcome(self, stage: str, shard: int) -> Outcome | None:
        """The last outcome of a task, or None if there is none or it is not readable."""
        try:
            record = files.read_json(self.outcome_file(stage, shard))
            outcome = Outcome(**{**record, "files": [Produced(**item) for item in record["files"]]})
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None
        return outcome if _is_plausible(outcome) else None

    def is_done(self, stage: str, shard: int, task_hash: str) -> bool:
        """True if the task has a DONE outcome for exactly this plan and its files are there with the right size.

        Contents are re-hashed by `collect` and by whoever reads them."""
        outcome = self.done_outcome(stage, shard, task_hash)
        try:
            return outcome is not None and all(self.size_problem(item) is None for item in outcome.files)
        except OSError:
            return False

    def damage_to(self, outcome: Outcome) -> str | None:
        """What is wrong with the files of a DONE outcome, in words; None if each has the sha256 it was written with: reads all of them.

        Raises OSError for what is there and cannot be read: nobody knows that it is damaged."""
        for item in outcome.files:
            problem = self.size_problem(item)
            if problem is None and files.sha256_file(self.root / item.path) != item.sha256:
                problem = f"{item.path} does not match its sha256"
            if problem is not None:
                return problem
        return None

    def done_outcome(self, stage: str, shard: int, task_hash: str) -> Outcome | None:
        """The outcome of a task that exactly this plan asks for and that was done, whatever became of its files."""
        outcome = self.read_outcome(stage, shard)
        if outcome is None or outcome.status != "done" or not outcome.files:
            return None
        return outcome if outcome.task_hash == task_hash and outcome.run_id == self.run_id else None

    def size_problem(self, item: Produced) -> str | None:
        """What is wrong with a file without reading it; None if it is there with the right size. Raises OSError if that cannot be seen."""
        try:
            found_bytes = (self.root / item.path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return f"{item.path} is missing"
        return None if found_bytes == item.size_bytes else f"{item.path} has {found_bytes:,} bytes, not {item.size_bytes:,}"

    def produced(self, path: Path) -> Produced:
        return Produced(str(path.relative_to(self.root)), path.stat().st_size, files.sha256_file(path))

    def write_heartbeat(self, beat: Heartbeat) -> None:
        _write_beat(self.heartbeat_file(beat.stage, beat.shard), asdict(beat))

    def write_rank_beat(self, stage: str, shard: int, beat: RankBeat) -> None:
        _write_beat(self.rank_beat_file(stage, shard, beat.rank), asdict(beat))

    def read_heartbeat(self, stage: str, shard: int) -> Heartbeat | None:
        try:
            beat = Heartbeat(**_read_beat(self.heartbeat_file(stage, shard)))
        except (OSError, ValueError, TypeError):
            return None
        numbers = (beat.step, beat.total, beat.time, beat.attempt, beat.time if beat.advanced is None else beat.advanced)
        sound = all(isinstance(number, int | float) for number in numbers) and isinstance(beat.doing, str) and isinstance(beat.slow, list)
        sound = sound and (beat.skipped is None or (isinstance(beat.skipped, dict) and all(isinstance(beat.skipped.get(key), int) for key in ("steps", "of"))))
        return beat if sound and all(_is_rank_and_factor(item) for item in beat.slow) else None

    def read_rank_beat(self, stage: str, shard: int, rank: int) -> RankBeat | None:
        """None if there is none or it is not readable."""
        if rank == 0:
            first = self.read_heartbeat(stage, shard)
            return _as_rank_beat(first) if first is not None else None
        try:
            beat = RankBeat(**_read_beat(self.rank_beat_file(stage, shard, rank)))
        except (OSError, ValueError, TypeError):
            return None
        numbers, texts = (beat.rank, beat.attempt, beat.step, beat.advanced, beat.time), (beat.doing, beat.host)
        return beat if all(isinstance(number, int | float) for number in numbers) and all(isinstance(text, str) for text in texts) else None

    def relief_file(self, stage: str, shard: int) -> Path:
        return self.root / "hb" / f"{stage}.{shard}.relief.json"

    def write_relief(self, stage: str, shard: int, relief: Relief) -> None:
        files.write_json(self.relief_file(stage, shard), asdict(relief))

    def read_relief(self, stage: str, shard: int) -> Relief:
        """What later attempts were promised; nothing where there is no readable word of it."""
        try:
            relief = Relief(**files.read_json(self.relief_file(stage, shard)))
        except (OSError, ValueError, TypeError):
            return Relief()
        sound = isinstance(relief.micro_batch_divisor, int) and relief.micro_batch_divisor >= 1 and isinstance(relief.mem_mebibytes, int | None)
        return relief if sound else Relief()

    def event(self, kind: str, **facts: Any) -> None:
        """Append one line to events.jsonl: kind, time, host and the facts."""
        record = {"time": round(time.time(), 3), "event": kind, "host": socket.gethostname(), **redact.value(facts)}
        files.append_line(self.events_file, json.dumps(record))

    def events(self) -> list[dict[str, Any]]:
        """All events in order; lines that are cut or damaged are left out."""
        try:
            lines = self.events_file.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        records = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if is_sound(record):
                records.append(record)
        return records


    def submitted_at(self) -> float:
        """Unix seconds of the last submit; 0 if there was none."""
        return max((event["time"] for event in self.events() if event["event"] == "submitted"), default=0.0)


# what others calculate with, by kind of event
EVENT_FACTS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "submitted": {"tasks": int},
    "job_intent": {"name": str, "stage": str, "offset": int, "shards": list},
    "job_submitted": {"name": str, "job_id": int},
    "jobs_released": {"job_ids": list},
    "jobs_cancelled": {"job_ids": list},
    "task_started": {"stage": str, "shard": int, "attempt": int, "devices": int, "from_step": int},
    "task_ended": {"stage": str, "shard": int, "seconds": (int, float), "status": str, "next": str, "again": bool, "cause": (str, type(None))},
    "outcome_withdrawn": {"stage": str, "shard": int},
    "shard_set_aside": {"stage": str, "shard": int},
    "dataset_damaged": {"stage": str},
    "checkpoint_lost": {"stage": str},
    "many_rejected": {"stage": str, "cause": str},
    "requeue_refused": {"stage": str, "shard": int},
    "rank_lost": {"stage": str, "shard": int, "attempt": int, "cause": str},
    "steps_skipped": {"stage": str, "shard": int, "cause": str},
    "rank_ended": {"stage": str, "shard": int, "attempt": int, "cause": str},
}


def _write_beat(target: Path, record: dict[str, Any]) -> None:
    """Rename without fsync: a heartbeat lost in a power cut is no loss, and it is written every few seconds."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    del record["heard"]
    try:
        temporary.write_text(json.dumps(record))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _read_beat(path: Path) -> dict[str, Any]:
    """`heard` is the later of what the clocks of storage and node say, but a node that is ahead of this machine is not believed:
    its heartbeats would seem new long after its death."""
    with open(path, "rb") as handle:
        record = json.load(handle)
        stored = os.fstat(handle.fileno()).st_mtime
    if not isinstance(record, dict) or not isinstance(record.get("time"), int | float):
        raise ValueError(f"{path}: not a heartbeat")
    told: float = record["time"]
    return {**record, "heard": max(stored, told) if told <= time.time() + CLOCK_SLACK_SECONDS else stored}


def _as_rank_beat(beat: Heartbeat) -> RankBeat:
    return RankBeat(0, beat.attempt, beat.step, beat.time if beat.advanced is None else beat.advanced, beat.doing, beat.time, beat.host, beat.pid, beat.heard)


def _is_rank_and_factor(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(isinstance(number, int | float) for number in item)


def is_sound(record: Any) -> bool:
    """True if a line of events.jsonl, parsed, holds what its kind of event must: the file may have been damaged or edited."""
    if not isinstance(record, dict) or not isinstance(record.get("event"), str) or not isinstance(record.get("time"), int | float):
        return False
    return all(isinstance(record.get(name), kind) for name, kind in EVENT_FACTS.get(record["event"], {}).items())


def _is_plausible(outcome: Outcome) -> bool:
    """True if the fields that are calculated with hold numbers and texts: the file may have been damaged or edited."""
    numbers = (outcome.shard, outcome.attempt, outcome.devices, outcome.started, outcome.ended)
    texts = (outcome.stage, outcome.task_hash, outcome.status, *(item.path for item in outcome.files))
    return all(isinstance(value, int | float) for value in numbers) and all(isinstance(value, str) for value in texts)


def runs_root() -> Path:
    """Where runs live: $MEDGEN_RUNS, else ./runs."""
    return names.runs_folder(Path(os.environ.get(RUNS_VARIABLE) or "runs"))


def cache_root(runs: Path) -> Path:
    """The slice caches of the runs in this folder."""
    return names.absolute(Path(os.environ.get(CACHE_VARIABLE) or runs / ".cache"))


def find_run(name: str) -> RunDir:
    """A run by path, by run id, or by the name in its spec: the newest if several runs have it, which is told on stderr.

    Also one that has lost its plan, last of all by path: a folder of the user's own may hold a spec.yaml too."""
    for candidate in (Path(name), runs_root() / name):
        if (candidate / "plan.json").is_file():
            return RunDir(candidate.absolute())
    runs = all_runs()
    matches = [run for run in runs if run.run_id == name] or [run for run in runs if run.run_id.rpartition("-")[0] == name]
    if len(matches) > 1:
        print(f"{name}: the newest of {len(matches)} runs with this name is {matches[0].run_id}; `medgen ls` shows all", file=sys.stderr)
    if matches:
        return matches[0]
    if (given := RunDir(Path(name).absolute())).is_begun:
        return given
    known = ", ".join(run.run_id for run in runs[:10]) or "none yet"
    raise InputError(f"{name}: no such run in {runs_root()}; runs there: {known}")


def find_only_run(name: str) -> RunDir:
    """`find_run` for what cannot be taken back: a name that several runs have is refused."""
    run = find_run(name)
    others = [other.run_id for other in all_runs() if other.run_id.rpartition("-")[0] == name]
    if len(others) > 1:
        raise InputError(f"{name}: several runs have this name; say which: {', '.join(others)}")
    return run


def all_runs() -> list[RunDir]:
    """Every run under the runs folder, also one that has lost its plan, newest first."""
    runs = [RunDir(path) for path in runs_root().glob("*")]
    return sorted((run for run in runs if run.is_begun), key=lambda run: run.written_at or 0.0, reverse=True)


def _logged_pace(line: str) -> float | None:
    try:
        return float(json.loads(line)["seconds_per_step"])
    except (ValueError, KeyError, TypeError):
        return None
