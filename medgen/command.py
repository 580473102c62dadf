"""A stage that is a shell command of the user's: runs it, passes signals on, keeps what it made. Called by task.py."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from medgen import files
from medgen.errors import InputError, Interrupted, MedgenError
from medgen.launch.processes import die_with_parent, end_with_parent
from medgen.spec_stages import CommandStage
from medgen.task import Done, Work

PASSED_ON = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


def command(work: Work) -> Done:
    """Run the stage's bash text in the folder of submit. Raises MedgenError for an exit code other than 0 or a missing
    output, and Interrupted if a signal came and the command did not end well."""
    stage = CommandStage.model_validate(work.stage.settings)
    if stage.submits_itself is not None:
        raise InputError(f"stages.{work.stage.name}.run: {stage.submits_itself}")
    if "SLURM_JOB_ID" in os.environ:
        end_with_parent()  # the job script: where Slurm tracks processes by their parents, an orphan would go on unseen
    folder = Path(files.read_json(work.run.manifest)["folder"])
    if not folder.is_dir():
        raise InputError(f"{folder}: the folder where the run was submitted is gone; the command of {work.stage.name} starts there")
    out = work.run.made(work.stage.name, work.task.shard)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    code, stopped_by = _run(work, stage, folder, out)
    if code == 128 + signal.SIGTERM:  # to the whole job: it may have reached the command first
        stopped_by = stopped_by or "SIGTERM"
    if stopped_by is not None and code != 0:
        raise Interrupted(f"{stopped_by} came, and the command ended with exit code {code}")
    if code != 0:
        raise MedgenError(f"the command ended with exit code {code}")
    outputs = _outputs(stage, folder)
    record = {"exit_code": code, "seconds": round(time.monotonic() - began, 3), "item": _item(stage, work.task.shard), "outputs": outputs}
    result = work.run.task_result(work.stage.name, work.task.shard)
    files.write_json(result, record)
    made = sorted(path for path in out.rglob("*") if path.is_file() and not path.is_symlink())
    return Done([result, *made], {"outputs": len(outputs)})


def _item(stage: CommandStage, shard: int) -> str | None:
    return stage.foreach[shard] if stage.foreach else None


def _run(work: Work, stage: CommandStage, folder: Path, out: Path) -> tuple[int, str | None]:
    """(exit code as a shell gives it, the signal that came meanwhile)."""
    item = _item(stage, work.task.shard)
    environment = {
        **os.environ, **stage.env, "MEDGEN_RUN": str(work.run.root), "MEDGEN_STAGE": work.stage.name, "MEDGEN_OUT": str(out),
        "MEDGEN_INDEX": str(work.task.shard), **({"MEDGEN_ITEM": item} if item is not None else {}),
    }  # fmt: skip
    text = "\n".join([*(["set -e", *work.stage.command_setup, "set +e"] if work.stage.command_setup else []), stage.run])
    process = subprocess.Popen(["bash", "-c", text, work.stage.name], cwd=folder, env=environment, preexec_fn=_as_a_child())
    names: list[str] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        names.append(signal.Signals(number).name)
        process.send_signal(number)

    def pass_on_as_term(number: int, frame: FrameType | None) -> None:
        names.append("the warning before the time limit")
        process.send_signal(signal.SIGTERM)  # medgen's own warning, which no command knows

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    signal.signal(signal.SIGUSR2, pass_on_as_term)
    code = process.wait()
    return (code if code >= 0 else 128 - code), (names[0] if names else None)


def _as_a_child() -> Callable[[], None]:
    """It dies with this process, and hears what the job script ignores."""
    bound = die_with_parent()

    def in_child() -> None:
        bound()
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)

    return in_child


def _outputs(stage: CommandStage, folder: Path) -> list[dict[str, object]]:
    """The promised files. Raises MedgenError if a pattern matches none."""
    found = []
    for pattern in stage.outputs:
        paths = sorted(folder.glob(pattern)) if not pattern.startswith("/") else sorted(Path("/").glob(pattern[1:]))
        if not paths:
            raise MedgenError(f"outputs: {pattern} matches no file in {folder} after the command ended well")
        found += [{"path": str(path), "size_bytes": path.stat().st_size, "sha256": files.sha256_file(path)} for path in paths if path.is_file()]
    return found
