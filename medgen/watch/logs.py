"""The log of a task, printed or followed over attempts and requeues. Called by the verb `logs`; reads only.

The log goes to stdout, which file it is and how it ended to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from medgen import plan as planning
from medgen import redact
from medgen.errors import Exit, InputError
from medgen.launch.backend import CONTROL, TAIL_BYTES, guilty_log, last_lines, next_attempt
from medgen.launch.life import may_live
from medgen.launch.queued import queued_tasks, was_queued
from medgen.launch.slurm import SlurmError
from medgen.launch.supervisor import living_supervisor
from medgen.launch.tries import Key, Tries, Try, all_tries, batch_section, read_end, read_tries
from medgen.plan import Plan, PlannedStage
from medgen.rundir import RunDir, find_run

LINES = 50
POLL_SECONDS = 0.5
LOOK_SECONDS = 5.0  # between two looks at events and the supervisor
QUEUE_SECONDS = 30.0  # between two looks at Slurm's queue
SHOWN_TASKS = 20
FAILED = ("failed", "refused")
BLOCK_BYTES = 64 * 1024


@dataclass(frozen=True)
class Target:
    """What was asked for; `stage` and `shard` are None where nothing was said."""

    run: RunDir
    plan: Plan
    stage: PlannedStage | None
    shard: int | None


@dataclass(frozen=True)
class Chosen:
    """One log: of a task, a rank and an attempt. `title` prefixes its lines where several are shown."""

    stage: str
    shard: int
    rank: int | None  # None: the guilty one
    attempt: int
    title: str

    @property
    def key(self) -> Key:
        return self.stage, self.shard


def logs(text: str, follow: bool, rank: int | None, attempt: int | None, lines: int) -> Exit:
    """Print the last `lines` of the log that matters most, or follow it until its task is done or given up.

    Raises InputError naming what there is, where RUN/stage/shard, rank or attempt do not exist."""
    target = parse_target(text)
    if follow:
        _wait_for_a_start(target)
    chosen = _choose(target, rank, attempt)
    if follow:
        return _follow(target, chosen, lines)
    for item in chosen:
        path, found = _read(target.run, item, lines)
        _tell(f"{_described(item)}: {path}")
        for line in found:
            print(f"{item.title}{line}")
    return Exit.DONE


def parse_target(text: str) -> Target:
    """`RUN`, `RUN/stage` or `RUN/stage/shard`; RUN may itself be a path. Raises InputError."""
    parts = text.rstrip("/").split("/")
    first: InputError | None = None
    for kept in range(len(parts), max(0, len(parts) - 3), -1):
        try:
            run = find_run("/".join(parts[:kept]))
        except InputError as error:
            first = error if kept == 1 or first is None else first  # the shortest is what was meant by NAME/stage
            continue
        return _inside(run, parts[kept:], text)
    raise first or InputError(f"{text}: no such run")


def _inside(run: RunDir, rest: list[str], text: str) -> Target:
    plan = planning.read(run)
    if not rest:
        return Target(run, plan, None, None)
    stage = plan.stage(rest[0])
    if len(rest) == 1:
        return Target(run, plan, stage, 0 if len(stage.tasks) == 1 else None)
    if not rest[1].isdecimal() or int(rest[1]) >= len(stage.tasks):
        raise InputError(f"{text}: {stage.name} has {_numbers('shard', list(range(len(stage.tasks))))}, not {rest[1]!r}")
    return Target(run, plan, stage, int(rest[1]))


# --- which log -------------------------------------------------------------------------------------------------------


def _choose(target: Target, rank: int | None, attempt: int | None) -> list[Chosen]:
    """The logs to show, at least one. Raises InputError if there is none of what was asked for."""
    tries = _started(target)
    if not tries:
        what = target.run.run_id if target.stage is None else f"{target.stage.name} of {target.run.run_id}"
        raise InputError(f"{what}: nothing has started, so there is no log; `medgen watch {target.run.run_id}` tells what it waits for")
    several = target.stage is not None and target.shard is None
    keys = _that_matter(target.run, tries) if several else [_most_relevant(target.run, tries)]
    width = max(len(f"{stage}.{shard}") for stage, shard in keys)
    chosen = []
    for stage, shard in keys:
        title = f"{f'{stage}.{shard}'.ljust(width)} | " if several and len(keys) > 1 else ""
        chosen.append(Chosen(stage, shard, rank, _attempt(target.run, tries[stage, shard], attempt), title))
        if rank is not None:
            _check_rank(target.run, chosen[-1])
    return chosen


def _started(target: Target) -> Tries:
    """All attempts of the tasks that are meant, without those that never began."""
    told = read_tries(target.run.events())
    stages = target.plan.stages if target.stage is None else [target.stage]
    found = {}
    for stage in stages:
        shards = [task.shard for task in stage.tasks] if target.shard is None else [target.shard]
        for shard in shards:
            tries = all_tries(target.run, stage.name, shard, told.get((stage.name, shard), []))
            if tries:
                found[stage.name, shard] = tries
    return found


def _rank_of_relevance(run: RunDir, tries: list[Try]) -> tuple[int, float]:
    """Failed before running before interrupted before done; among equals the last that began."""
    last = tries[-1]
    if last.status in FAILED or (last.status is None and not last.told and living_supervisor(run) is None):
        order = 0 if not last.comes_back else 1
    else:
        order = {None: 1, "interrupted": 2}.get(last.status, 3)
    return order, -last.started


def _most_relevant(run: RunDir, tries: Tries) -> Key:
    return min(tries, key=lambda key: _rank_of_relevance(run, tries[key]))


def _that_matter(run: RunDir, tries: Tries) -> list[Key]:
    """Of the shards of a stage the failed and running ones; all where there are none of those; a limited number."""
    ranked = {key: _rank_of_relevance(run, items)[0] for key, items in tries.items()}
    keys = [key for key, order in ranked.items() if order < 2] or list(ranked)
    if len(keys) > SHOWN_TASKS:
        _tell(f"{len(keys)} tasks; the first {SHOWN_TASKS} are shown, name one for another: {keys[0][0]}/{keys[SHOWN_TASKS][1]}")
    return keys[:SHOWN_TASKS]


def _attempt(run: RunDir, tries: list[Try], wanted: int | None) -> int:
    numbers = sorted({item.attempt for item in tries})
    if wanted is None:
        return numbers[-1]
    if wanted not in numbers:
        task = f"{tries[0].stage} shard {tries[0].shard} of {run.run_id}"
        raise InputError(f"--attempt {wanted}: {task} has {_numbers('attempt', numbers)}")
    return wanted


def _check_rank(run: RunDir, chosen: Chosen) -> None:
    folder = run.log(chosen.stage, chosen.shard, 0, 0).parent
    names = [path.name for path in folder.glob(f"r*.a{chosen.attempt}.log")]
    ranks = sorted(int(name[1:].partition(".")[0]) for name in names if name[1:].partition(".")[0].isdecimal())
    if chosen.rank not in ranks:
        have = _numbers("rank", ranks) if ranks else "no log of a rank yet"
        raise InputError(f"--rank {chosen.rank}: attempt {chosen.attempt} of {chosen.stage} shard {chosen.shard} has {have}")


def _numbers(what: str, numbers: list[int]) -> str:
    """`shard 0`, `shards 0 to 7`, `attempts 0, 2`."""
    if len(numbers) == 1:
        return f"{what} {numbers[0]}"
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{what}s {numbers[0]} to {numbers[-1]}"
    return f"{what}s {', '.join(map(str, numbers))}"


def _path(run: RunDir, item: Chosen) -> Path:
    """The rank's log, or the batch log while that is empty."""
    if item.rank is None:
        return guilty_log(run, item.stage, item.shard, item.attempt)
    log = run.log(item.stage, item.shard, item.rank, item.attempt)
    return log if log.exists() and log.stat().st_size else run.batch_log(item.stage, item.shard)


def _read(run: RunDir, item: Chosen, lines: int) -> tuple[Path, list[str]]:
    path = _path(run, item)
    if path == run.batch_log(item.stage, item.shard):  # holds all attempts
        return path, last_lines(batch_section(run, item.stage, item.shard, item.attempt) or read_end(path), lines)
    return path, last_lines(read_end(path), lines)


def _described(item: Chosen) -> str:
    return f"{item.stage} shard {item.shard} attempt {item.attempt}"


def _tell(text: str) -> None:
    print(f"medgen: {text}", file=sys.stderr, flush=True)


# --- following -------------------------------------------------------------------------------------------------------


@dataclass
class Follower:
    """One task that is followed: where reading has got to, and which attempt is next."""

    run: RunDir
    item: Chosen
    lines: int
    path: Path | None = None
    offset: int = 0
    rest: bytes = b""
    has_begun: bool = False

    def new_lines(self) -> Iterator[str]:
        """What has been written since the last call, also by later attempts."""
        while True:
            path = _path(self.run, self.item)
            if path != self.path:
                yield from self._begin(path)
            yield from self._more()
            later = self.item.attempt + 1
            if later >= next_attempt(self.run, self.item.stage, self.item.shard):
                return
            yield from self.last_words()
            self.item = replace(self.item, attempt=later)
            self.path = None
            yield f"--- attempt {later} ---"

    def _begin(self, path: Path) -> Iterator[str]:
        """Of the first file the last lines, of a batch log the part of this attempt, of later files everything."""
        _tell(f"{_described(self.item)}: {path}")
        yield from self.last_words()
        is_first, self.path, self.offset = self.path is None and not self.has_begun, path, 0
        self.has_begun = True
        if path == self.run.batch_log(self.item.stage, self.item.shard):
            self.offset = path.stat().st_size if path.exists() else 0
            yield from _read(self.run, self.item, self.lines)[1]
        elif is_first and path.exists():
            size_bytes = path.stat().st_size
            self.offset = max(0, size_bytes - TAIL_BYTES)
            shown = list(self._more())
            yield from [line for line in shown if line][-self.lines :]

    def _more(self) -> Iterator[str]:
        if self.path is None or not self.path.exists():
            return
        with self.path.open("rb") as handle:
            handle.seek(self.offset)
            while block := handle.read(BLOCK_BYTES):
                self.offset += len(block)
                *whole, self.rest = (self.rest + block).split(b"\n")
                for line in whole:
                    yield _shown(line)

    def last_words(self) -> Iterator[str]:
        """A last line without an end."""
        if self.rest.strip():
            yield _shown(self.rest)
        self.rest = b""


def _shown(line: bytes) -> str:
    """A progress bar rewrites its line with carriage returns: what was last on screen counts."""
    return redact.text(CONTROL.sub("", line.decode(errors="replace").rstrip("\r").rsplit("\r", 1)[-1].rstrip()))


def _follow(target: Target, chosen: list[Chosen], lines: int) -> Exit:
    """Until every task that is shown is done or will not be started again; Ctrl-C ends it too."""
    followers = [Follower(target.run, item, lines) for item in chosen]
    watcher = _Watcher(target)
    try:
        while True:
            over = watcher.over([item.key for item in chosen])  # asked before reading: what came until then is shown
            for follower in followers:
                for line in follower.new_lines():
                    print(f"{follower.item.title}{line}", flush=True)
            if over:
                break
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        return Exit.DONE
    for follower in followers:
        for line in follower.last_words():
            print(f"{follower.item.title}{line}", flush=True)
    return watcher.tell_ends([item.key for item in chosen])


class _Watcher:
    """Knows whether tasks are over; asks the events every few seconds, and Slurm twice a minute."""

    def __init__(self, target: Target):
        self.run = target.run
        self.hashes = {(task.stage, task.shard): task.hash for stage in target.plan.stages for task in stage.tasks}
        self.on_slurm = was_queued(target.run)
        self.queued: set[Key] | None = None  # None: Slurm has not answered
        self.next_look = self.next_queue = 0.0
        self.was_over = False

    def over(self, keys: list[Key]) -> bool:
        now = time.monotonic()
        if now < self.next_look:
            return self.was_over
        self.next_look = now + LOOK_SECONDS if self.next_look else 0.01  # the first look may be right after the start
        tries = read_tries(self.run.events())
        self.was_over = all(self._is_over(key, tries.get(key, [])) for key in keys)
        return self.was_over

    def _is_over(self, key: Key, tries: list[Try]) -> bool:
        if self.run.is_done(*key, self.hashes[key]):
            return True
        last = tries[-1] if tries else None
        if last is not None and last.status is not None and not last.comes_back:
            return True
        if not self.on_slurm:
            return living_supervisor(self.run) is None and not self._beats(key)
        self._ask_slurm()
        return self.queued is not None and key not in self.queued and not self._beats(key)

    def _beats(self, key: Key) -> bool:
        beat = self.run.read_heartbeat(*key)
        return may_live(beat, time.time())

    def _ask_slurm(self) -> None:
        if time.monotonic() < self.next_queue:
            return
        self.next_queue = time.monotonic() + QUEUE_SECONDS
        try:
            self.queued = {(task.stage, task.shard) for task in queued_tasks(self.run)}
        except SlurmError as error:
            _tell(f"Slurm does not answer; going on: {error}")

    def tell_ends(self, keys: list[Key]) -> Exit:
        tries = read_tries(self.run.events())
        code = Exit.DONE
        for key in keys:
            stage, shard = key
            if self.run.is_done(stage, shard, self.hashes[key]):
                _tell(f"{stage} shard {shard}: done")
                continue
            last = tries[key][-1] if tries.get(key) else None
            words = f"{last.status}: {last.cause}" if last is not None and last.status else "ended without a word"
            _tell(f"{stage} shard {shard}: {words}; `medgen why {self.run.run_id}` tells more")
            code = Exit.FAILED
        return code


def _wait_for_a_start(target: Target) -> None:
    """With -f, nothing to show yet is no error while something of the run is queued or about to start."""
    watcher = _Watcher(target)
    keys = [key for key in watcher.hashes if target.stage is None or (key[0] == target.stage.name and target.shard in (None, key[1]))]
    told = False
    while not _started(target):
        if watcher.over(keys):
            return
        if not told:
            _tell("nothing has started yet; waiting for it")
            told = True
        time.sleep(POLL_SECONDS)
