"""What of a run is safe to delete, and deleting it. Used by fsck, which asks for nothing here while somebody works on the run.

Safe is what nothing will read again: temporaries of killed writers, and what was set aside or superseded once what took its place verifies."""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from medgen import commits, files
from medgen import plan as planning
from medgen.errors import MedgenError
from medgen.fsck import at_work, checkpoints
from medgen.fsck.hashing import Hasher
from medgen.fsck.verify import Part
from medgen.plan import Plan, PlannedStage
from medgen.rundir import RunDir

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # files.py
BEAT = re.compile(r".+\.\d+\.\d+\.tmp")  # of a heartbeat
ATTEMPT_LOG = re.compile(r"r\d+\.a(\d+)\.log")
LOCK_SECONDS = 5


@dataclass(frozen=True)
class Leftover:
    """`path` counts from the run folder. `is_emptied`: the file stays, without content. `problem`: why cleaning it failed."""

    path: str
    why: str
    size_bytes: int
    is_emptied: bool = False
    problem: str | None = None


def find(run: RunDir, plan: Plan, parts: list[Part], hasher: Hasher) -> list[Leftover]:
    """Everything that is safe now; call it only while nobody works on the run."""
    known = {part.name: part for part in parts}
    found = dict.fromkeys(_temporaries(run, plan), "left by a writer that was killed")
    for stage in plan.stages:
        found |= _of_stage(run, plan, stage, known, hasher)
    found |= _stages_gone(run, plan)
    if known["code"].state == "whole":
        found |= dict.fromkeys(run.root.glob("code.bad.*"), "a damaged copy of the code; the one in use verifies")
    submissions = sorted((path for path in _children(run.submission(0).parent) if path.name.isdigit()), key=lambda path: int(path.name))
    found |= dict.fromkeys(submissions[:-1], "scripts of an earlier submit")
    inside = {path: why for path, why in found.items() if _is_inside(run, path)}
    emptied = {path for stage in plan.stages for path in _old_logs(run, stage, known[stage.name])}
    links = Counter(_key(file) for path in inside for file in _files(path))
    listed = [Leftover(str(path.relative_to(run.root)), why, _freed(path, links)) for path, why in sorted(inside.items())]
    logs = [Leftover(str(path.relative_to(run.root)), "log of an earlier attempt", path.lstat().st_size, is_emptied=True) for path in sorted(emptied)]
    return listed + logs


def _temporaries(run: RunDir, plan: Plan) -> Iterator[Path]:
    """What files.py and heartbeats write before they rename; never what a user's command has made."""
    own = {run.stage(stage.name) / "made" for stage in plan.stages} | {run.code}
    for here, folders, names in os.walk(run.root):
        folder = Path(here)
        for name in [*folders, *names]:
            if TEMPORARY.fullmatch(name) or (folder == run.heartbeat_file("", 0).parent and BEAT.fullmatch(name)):
                yield folder / name
        folders[:] = [name for name in folders if folder / name not in own and not TEMPORARY.fullmatch(name)]


def _of_stage(run: RunDir, plan: Plan, stage: PlannedStage, known: dict[str, Part], hasher: Hasher) -> dict[Path, str]:
    part, folder = known[stage.name], run.stage(stage.name)
    if stage.kind == "train":
        return _of_training(run, stage, part, hasher)
    if stage.kind == "collect":
        source = run.dataset(stage.settings["of"])
        again = dict.fromkeys(source.parent.glob(f"{source.name}.bad.*"), "a dataset that was set aside; the one in its place verifies")
        return again if part.state == "whole" else {}
    if stage.kind in ("structure", "utility"):
        return dict.fromkeys((path for shard in part.whole if (path := run.trial(stage.name, shard)).exists()), "checkpoints of a trial whose result verifies")
    if stage.kind != "generate":
        return {}
    aside = [path for path in _children(folder / "quarantine") if _number(path.name.partition(".")[0]) in part.whole]
    found = dict.fromkeys(aside, "a shard that was set aside; the one in its place verifies")
    if part.state == "whole":
        more = [path for path in _children(folder / "shards") if path.name.isdigit() and int(path.name) >= len(stage.tasks)]
        found |= dict.fromkeys(more, f"beyond the {len(stage.tasks)} shards of the plan, which verify")
    return found


def _of_training(run: RunDir, stage: PlannedStage, part: Part, hasher: Hasher) -> dict[Path, str]:
    """Nothing before a whole checkpoint is there; nothing that a training, a selector or a repair may still want."""
    folder = run.checkpoints(stage.name)
    saved = checkpoints.saved(folder, hasher)
    if part.whole != [0] or not any(item.problem is None for item in saved):
        return {}
    found = dict.fromkeys(folder.glob(commits.SET_ASIDE), "a damaged checkpoint that was set aside; the training is done and verifies")
    found |= dict.fromkeys(folder.parent.glob(commits.set_aside(folder).name), "damaged checkpoints that were set aside; the training is done and verifies")
    found |= {item.folder: "a damaged checkpoint that nothing uses; the training is done and verifies" for item in saved if item.problem is not None and item.command is None}
    outcome = run.read_outcome(stage.name, 0)
    used = {run.root / Path(item.path).parent for item in outcome.files} if outcome is not None else set()
    beyond = commits.beyond_policy(checkpoints.readable_commits(saved), stage.settings["config"]["loop"]["keep"])
    more = dict.fromkeys((item.folder for item in beyond if item.folder not in used), "a checkpoint beyond those that the training keeps; nothing selects it")
    return more | found


def _stages_gone(run: RunDir, plan: Plan) -> dict[Path, str]:
    """Folders of stages that this very run once had, as their outcomes say; anything else in the folder is somebody's own."""
    planned = {stage.name for stage in plan.stages}
    found: dict[Path, str] = {}
    for file in _children(run.outcome_file("", 0).parent):
        stage, _, shard = file.name.removesuffix(".json").rpartition(".")
        if stage in planned or not re.fullmatch(r"[a-z0-9_]+", stage) or not shard.isdigit():
            continue
        outcome = run.read_outcome(stage, int(shard))
        if outcome is not None and outcome.run_id == run.run_id:
            paths = (file, run.stage(stage), run.batch_log(stage, 0).parent.parent)
            found |= {path: f"of {stage}, a stage that the plan no longer has" for path in paths if os.path.lexists(path)}
    return found


def _old_logs(run: RunDir, stage: PlannedStage, part: Part) -> Iterator[Path]:
    """Logs of all but the last attempt of what is done. They are emptied: the number of the next attempt counts the files."""
    for shard in part.whole:
        numbered = [(int(match.group(1)), path) for path in _children(run.batch_log(stage.name, shard).parent) if (match := ATTEMPT_LOG.fullmatch(path.name))]
        last = max((number for number, _ in numbered), default=0)
        outcome = run.read_outcome(stage.name, shard)
        kept = {last, outcome.attempt if outcome is not None else last}
        yield from (path for number, path in numbered if number not in kept and path.is_file() and not path.is_symlink() and path.stat().st_size)


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _number(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _is_inside(run: RunDir, path: Path) -> bool:
    """False behind a link that leads out of the run: that may be another's."""
    return os.path.commonpath([os.path.realpath(run.root), os.path.realpath(path.parent)]) == os.path.realpath(run.root)


def _files(path: Path) -> Iterator[os.stat_result]:
    if path.is_symlink() or not path.is_dir():
        yield os.lstat(path)
        return
    for here, _, names in os.walk(path):
        for name in names:
            yield os.lstat(os.path.join(here, name))


def _key(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _freed(path: Path, links: Counter[tuple[int, int]]) -> int:
    """Bytes that deleting all that is listed frees here: an image that a dataset still links to frees none."""
    return sum(facts.st_size // links[_key(facts)] for facts in _files(path) if facts.st_nlink <= links[_key(facts)])


# --- deleting ----------------------------------------------------------------------------------------------------------


def mark_of(run: RunDir) -> int:
    """Changes with everything that anybody does with the run: nothing is started or ended without an event."""
    try:
        return run.events_file.stat().st_size
    except OSError:
        return 0


def clean(run: RunDir, safe: list[Leftover], mark: int) -> list[Leftover]:
    """Delete exactly these, while no submit can begin. Raises MedgenError if somebody works on the run by now, or has since `mark` was taken."""
    begun = MedgenError(f"{run.run_id}: somebody has worked on it while it was read; nothing was deleted, run it again")
    if not safe:
        return []
    try:
        with FileLock(run.prepare_lock, timeout=LOCK_SECONDS), FileLock(run.lock, timeout=0):
            if at_work.tasks(run, planning.read(run)).words is not None or mark_of(run) != mark:
                raise begun
            return [_remove(run, item) for item in safe]
    except Timeout:
        raise begun from None


def _remove(run: RunDir, item: Leftover) -> Leftover:
    path = run.root / item.path
    try:
        if item.is_emptied:
            os.truncate(path, 0)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        return replace(item, problem=f"{error.filename or path}: {error.strerror or error}")
    return item


# --- caches ------------------------------------------------------------------------------------------------------------


def notes(run: RunDir) -> list[str]:
    """Slice caches that no run beside this one uses: only told, because other folders of runs may share them."""
    caches = {path.name: path for path in _children(run.cache) if path.name.startswith("slices-") and path.is_dir()}
    used = set()
    for folder in {run.root, *(path.parent for path in run.root.parent.glob("*/plan.json"))}:
        names = _caches_of(RunDir(folder))
        if names is None:
            return []  # which one an unfinished run will want cannot be told
        used |= names
    unused = [caches[name] for name in sorted(caches.keys() - used)]
    size_bytes = sum(facts.st_size for path in unused for facts in _files(path))
    if not unused:
        return []
    listing = " ".join(str(path) for path in unused[:3]) + (f" and {len(unused) - 3} more" if len(unused) > 3 else "")
    return [f"No run in {run.root.parent} uses {'this slice cache' if len(unused) == 1 else 'these slice caches'} ({size_bytes / 2**20:,.1f} MiB); "
            f"other folders may, so they are left alone: {listing}"]


def keys_left(run: RunDir) -> list[str]:
    """Keys of private trainings that have not ended."""
    return [
        f"{path}: with this key the noise of a private training can be taken away again. The training removes it when it ends; until then, and if it never shall, give nobody the folder with it"
        for path in sorted(run.root.glob(f"*/{run.noise_key('').name}"))
    ]


def _caches_of(run: RunDir) -> set[str] | None:
    """None if it cannot be told yet, or not any more."""
    try:
        if not planning.read(run).data:
            return set()
    except MedgenError:
        return None
    outcomes = [files_of for path in _children(run.outcome_file("", 0).parent) if (files_of := _fingerprint(path)) is not None]
    return {f"slices-{fingerprint[:16]}" for fingerprint in outcomes} or None


def _fingerprint(outcome: Path) -> str | None:
    try:
        found = files.read_json(outcome)["facts"]["data"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None
