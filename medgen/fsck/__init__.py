"""`medgen fsck`: reads a whole run again, says what is wrong, what the next submit will do, and what is safe to delete. Called by cli.py.

Only reads, unless it is told to clean. Imports no torch: it runs where the run lies, on a login node or a laptop."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from medgen import plan as planning
from medgen.errors import Exit, InputError
from medgen.fsck import at_work, leftovers, verify
from medgen.fsck.hashing import Hasher, progress
from medgen.fsck.leftovers import Leftover
from medgen.fsck.verify import Part
from medgen.plan import Plan
from medgen.rundir import RunDir, find_run, runs_root


@dataclass(frozen=True)
class Examined:
    """All that fsck found. `at_work`: who works on the run now, or why it cannot be told that nobody does; then nothing is called safe to delete."""

    run_id: str
    path: str
    parts: list[Part]
    at_work: str | None
    at_work_is_certain: bool
    safe: list[Leftover]
    notes: list[str]
    files_read: int
    bytes_read: int
    seconds: float

    @property
    def damaged(self) -> list[Part]:
        return [part for part in self.parts if part.problems]

    @property
    def exit(self) -> Exit:
        return Exit.FAILED if self.damaged else Exit.DONE


def fsck(name: str, clean: bool, as_json: bool) -> Exit:
    """Print what was found. DONE if everything verifies, FAILED if something does not or could not be deleted."""
    run = find(name)
    mark = leftovers.mark_of(run)
    found = examine(run)
    cleaned = leftovers.clean(run, found.safe, mark) if clean and found.at_work is None else []
    if as_json:
        record = {**asdict(found), "exit": int(found.exit), "cleaned": [asdict(item) for item in cleaned] if clean else None}
        print(json.dumps(record, indent=1))
    else:
        from medgen.fsck import view

        view.show(found, cleaned if clean else None)
    return Exit.FAILED if any(item.problem for item in cleaned) else found.exit


def find(name: str) -> RunDir:
    """A run as everywhere, or a folder whose plan is lost: that is what fsck is for. Raises InputError."""
    named = sorted(path for path in runs_root().glob("*") if path.name.rpartition("-")[0] == name)
    for candidate in (Path(name), runs_root() / name, *named):
        if (candidate / "plan.json").exists():
            break
        if candidate.is_dir():
            run = RunDir(candidate.absolute())
            if _looks_like_a_run(run):
                return run
            if os.sep in name:
                raise InputError(f"{name}: not a run folder: it has none of plan.json, manifest.json, spec.yaml; `medgen ls` shows the runs")
    return find_run(name)


def _looks_like_a_run(run: RunDir) -> bool:
    return run.is_begun or run.manifest.exists() or run.prepare_lock.exists()


def examine(run: RunDir) -> Examined:
    """Read everything. Raises InputError if the plan cannot be read or is of another version of medgen."""
    plan, problem = _plan(run)
    working = at_work.look(run, plan)
    with progress(verify.listed_bytes(run, plan)) as advance:
        hasher = Hasher(advance)
        parts = verify.parts(run, plan, problem, working, hasher)
    is_seen = plan is not None and working.words is None and not any(part.name == verify.FOLDERS for part in parts)
    safe = leftovers.find(run, plan, parts, hasher) if plan is not None and is_seen else []
    return Examined(run.run_id, str(run.root), parts, working.words, working.is_certain, safe, [*leftovers.notes(run), *leftovers.keys_left(run)], hasher.files, hasher.bytes, round(hasher.seconds, 1))


def _plan(run: RunDir) -> tuple[Plan | None, str | None]:
    """The plan, or what is wrong with it in words."""
    if not run.plan.exists():
        return None, "is missing: a submit was stopped before it was written, or somebody removed it"
    try:
        plan = planning.read(run)
    except planning.DamagedPlan:
        return None, "holds no plan that can be read"
    return plan, None
