"""The submit verb, put together: prepare, show or create, then run here or in the background. Called by cli.py.

What shows the progress is handed in, because watch may import launch and not the other way round."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from medgen import plan
from medgen.errors import Exit, InputError
from medgen.launch.dry import describe
from medgen.launch.local import AlreadyRunning, LocalBackend, detach
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
    dry_run: bool = False,
    detached: bool = False,
    as_json: bool = False,
) -> Exit:
    """Run a spec on this machine. A run that is already running here is watched, or with `detached` left alone.

    Raises InputError before anything is written if spec, site or request are wrong."""
    prepared = prepare(spec_path, overrides, site_name, runs_root)
    tell(prepared.notes)
    if dry_run:
        print(json.dumps(plan.to_json(prepared.plan), indent=1) if as_json else describe(prepared.plan, prepared.run.root), end="\n" if as_json else "")
        return Exit.DONE
    tell([check_data(prepared.spec)])
    tell(create(prepared))
    try:
        code = _start(prepared, display, detached)
    except AlreadyRunning as already:
        tell([str(already)])
        return Exit.DONE if detached else watch(prepared.run)
    if as_json:
        print(json.dumps({"run_id": prepared.run.run_id, "path": str(prepared.run.root), "exit": int(code)}))
    return code


def require_local(local: bool) -> None:
    """Raise InputError on a login node, where a training would run beside everyone's editors."""
    if not local and shutil.which("sbatch") is not None:
        raise InputError("this machine has sbatch, and submitting to Slurm is not built yet; --local runs the job on this machine itself")


def _start(prepared: Prepared, display: Display, detached: bool) -> Exit:
    run, site = prepared.run, prepared.site
    if detached:
        tell([detach(run, site.cpus, site.gpus)])
        return Exit.DONE
    if (known := living_supervisor(run)) is not None:
        raise AlreadyRunning(run, known)
    with display(run, HINT) as update:
        return LocalBackend(site.cpus, site.gpus, display=update).submit(run, prepared.plan)


def tell(messages: Sequence[str]) -> None:
    """For people, on stderr: stdout is kept for what was asked for."""
    for message in messages:
        print(message, file=sys.stderr, flush=True)
