"""What can be known to fail before anything is queued. Called by the submit and check verbs.

Slurm itself is asked in slurm_checks.py, the disk in space.py; here is the rest, and what submit makes of all of it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from medgen import sbatch_options
from medgen.errors import InputError, MedgenError
from medgen.launch import record, slurm_checks, snapshot, space
from medgen.launch.executor import allowed_environment
from medgen.launch.findings import Finding, once, undone
from medgen.launch.processes import signal_group
from medgen.launch.script import tasks_per_node
from medgen.launch.slurm import SlurmError
from medgen.launch.submit import Prepared
from medgen.plan import GRACE_SLACK_SECONDS, GRACE_SPARE_SECONDS, PlannedStage, grace_needed_seconds
from medgen.site import Site
from medgen.spec_stages import CommandStage

ENVIRONMENT_SECONDS = 60.0  # modules and conda on a busy login node
SLOW_BYTES_PER_SECOND = 100e6  # a shared disk on a bad day
PACKAGES = ("torch", "monai", "nibabel", "pydantic", "yaml", "typer", "rich", "filelock", "ema_pytorch", "torch_fidelity", "lpips", "pandas", "tensorboard")
PROBE = "import importlib.util as u, sys; print(sys.version.split()[0], *[n for n in sys.argv[1:] if u.find_spec(n) is None])"
OLDEST_PYTHON = (3, 10)


def check(prepared: Sequence[Prepared]) -> list[str]:
    """Notes in words. Raises InputError, with the line of the spec, for what Slurm or the machine would refuse."""
    missing = slurm_checks.missing_commands()
    if missing:
        site = prepared[0].site
        raise InputError(f"{', '.join(missing)}: not on PATH, and {site.name} is a Slurm cluster; submit on its login node, or write --local to run here")
    try:
        found = [*look_here(prepared), *slurm_checks.look(prepared)]
    except SlurmError as error:
        raise MedgenError(f"{error}; nothing was queued") from None
    wrong = list(dict.fromkeys(item.text for item in found if item.mark == "wrong"))
    if wrong:
        raise InputError("\n".join(wrong))
    return list(dict.fromkeys(item.text for item in [*found, *_hint(prepared)] if item.mark != "fine"))


def look_here(prepared: Sequence[Prepared]) -> list[Finding]:
    """Everything that this machine can tell by itself: disk, environment, directives, processes, grace, code."""
    site = prepared[0].site
    findings = [*space.look(prepared), *_environment(site)]
    for item in prepared:
        findings += _processes(item)
        if site.scheduler == "slurm":
            findings += [*_directives(item), *_grace(item)]
    if site.scheduler == "slurm":
        findings += [*_seen_by_nodes(prepared[0]), *_enclosing_job()]
    return once([*findings, *_code()])


# --- the environment of a job ----------------------------------------------------------------------------------------


def _environment(site: Site) -> list[Finding]:
    """Run the set-up lines as a job would, as far as the tools are on this machine, and ask the interpreter for its packages."""
    environment = site.environment
    for key, path, what in (
        ("venv", environment.venv and environment.venv.expanduser() / "bin" / "activate", "a virtual environment"),
        ("apptainer", environment.apptainer and environment.apptainer.expanduser(), "a container image"),
    ):
        if path and not path.exists():
            return [Finding("environment", "wrong", str(site.error(("environment", key), f"no such file: {path}; give {what} that jobs can see")))]
    if environment.apptainer is not None:
        return [Finding("environment", "fine", f"{environment.apptainer} is there; it is not opened here")]
    parts = {"conda": environment.conda, "venv": environment.venv, "modules": environment.modules}
    place = ("environment", *[name for name, part in parts.items() if part][:1])
    interpreter = "python" if environment.brings_python else sys.executable
    lines = environment.lines()
    try:
        code, out, words = _bash(["set -eo pipefail", *lines, f'{interpreter} -c "$PROBE" {" ".join(PACKAGES)}'], site)
    except TimeoutError:
        return [Finding("environment", "warning", f"the environment of {site.name} was not ready after {ENVIRONMENT_SECONDS:.0f} s on this machine: every job will wait as long")]
    if code and "command not found" in words:
        return [Finding("environment", "warning", f"the environment of {site.name} cannot be tried on this machine: {words}")]
    if code:
        return [Finding("environment", "wrong", str(site.error(place, f"setting it up fails here, and would in every job: {words or f'exit code {code}'}")))]
    version, *missing = out.splitlines()[-1].split()
    if missing:
        fault = f"its interpreter lacks {', '.join(missing)}; install medgen's packages there"
        return [Finding("environment", "wrong", str(site.error(place, fault)), {"python": version, "missing": missing})]
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_PYTHON:
        return [Finding("environment", "wrong", str(site.error(place, f"its Python is {version}; medgen needs 3.10 or later")))]
    where = ", ".join([*environment.modules, *([environment.conda] if environment.conda else []), *([str(environment.venv)] if environment.venv else [])])
    return [Finding("environment", "fine", f"Python {version} with all packages, from {where or sys.executable}", {"python": version})]


def _bash(lines: list[str], site: Site) -> tuple[int, str, str]:
    """Exit code, stdout and the last words of stderr. Raises TimeoutError; nothing it started stays."""
    with allowed_environment(site.export):
        variables = {**os.environ, "PROBE": PROBE}
    process = subprocess.Popen(
        ["bash", "-c", "\n".join(lines)], env=variables, start_new_session=True, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, words = process.communicate(timeout=ENVIRONMENT_SECONDS)
    except subprocess.TimeoutExpired:
        raise TimeoutError from None
    finally:
        if process.returncode is None:
            signal_group(process.pid, signal.SIGKILL)
            process.wait()
    told = [line.strip() for line in words.splitlines() if line.strip()]
    return process.returncode, out, "; ".join(told[-2:])[:400]


# --- what a stage asks for -------------------------------------------------------------------------------------------


def _processes(item: Prepared) -> list[Finding]:
    """The user's own directives against the processes that the plan counts on."""
    findings = []
    for stage in item.plan.stages:
        asked = item.spec.stages.get(stage.name)
        if isinstance(asked, CommandStage) and asked.submits_itself is not None and undone(item.run, stage):
            findings.append(Finding(stage.name, "wrong", str(item.point.document.error(("stages", stage.name, "run"), asked.submits_itself))))
        if asked is not None and stage.launcher != "none":
            findings += _contradictions(item, stage, asked.resources.slurm)
    return findings


def _contradictions(item: Prepared, stage: PlannedStage, lines: list[str]) -> list[Finding]:
    """One process per GPU is what the ranks count on: other numbers behind the plan's back leave them waiting for each other."""
    planned = {
        "nodes": (stage.nodes, "nodes"), "ntasks-per-node": (tasks_per_node(stage), "gpus_per_node or processes"),
        "ntasks": (tasks_per_node(stage) * stage.nodes, "nodes, gpus_per_node or processes"),
        "gpus": (stage.gpus_per_node * stage.nodes, "gpus"), "gpus-per-node": (stage.gpus_per_node, "gpus_per_node"),
    }  # fmt: skip
    findings = []
    for number, line in enumerate(lines):
        for name, value in sbatch_options.options_of(line):
            if name == "gres" and "gpu" in (value or ""):
                name, value = "gpus-per-node", str(_gpus_of(value or ""))
            count = re.fullmatch(r"(?:\w+:)?(\d+)", value or "")
            if name in planned and count and int(count[1]) != planned[name][0]:
                expected, key = planned[name]
                message = f"{line} is not what {stage.name} is planned for ({expected}); write resources.{key} instead"
                findings.append(Finding(stage.name, "wrong", str(item.point.document.error(("stages", stage.name, "resources", "slurm", number), message))))
    return findings


def _gpus_of(gres: str) -> int:
    """`gpu`, `gpu:2`, `gpu:a100:2`, among other things."""
    parts = [part.split(":") for part in gres.split(",") if part.split(":")[0] == "gpu"]
    return sum(int(part[-1]) if part[-1].isdecimal() else 1 for part in parts)


def _directives(item: Prepared) -> list[Finding]:
    """Folders that a user's own --output, --error and --chdir name: Slurm ends a job whose log it cannot open, without a word."""
    findings = []
    for name, stage in item.spec.stages.items():
        base = Path.cwd()
        for number, line in enumerate(stage.resources.slurm):
            for option, value in sbatch_options.options_of(line):
                if option not in ("output", "error", "chdir") or not value or (option == "output" and stage.kind == "command"):
                    continue  # the log of a command is the run's, whatever its own --output says
                folder = base / value if option == "chdir" else (base / value).parent
                if "%" not in str(folder) and not folder.is_dir():
                    message = f"{line}: no such folder: {folder}; make it first, jobs that cannot open their log end without a word"
                    findings.append(Finding(name, "wrong", str(item.point.document.error(("stages", name, "resources", "slurm", number), message))))
    return findings


def _grace(item: Prepared) -> list[Finding]:
    """Between the warning and the limit a step must end and a checkpoint be written."""
    findings, grace = [], item.plan.place.grace_seconds
    for stage in item.plan.stages:
        if stage.kind != "train" or not undone(item.run, stage):
            continue
        if grace >= stage.limit_seconds:
            findings.append(Finding("grace", "warning", f"{stage.name}: the warning comes {grace} s before the limit, so at once in a job of {stage.time_minutes} min; "
                                                           "ask for more time, or set a shorter grace with -o site.grace=30s"))
            continue
        step, save = item.run.slowest_step_seconds(stage.name), save_seconds(item, stage.name)
        if save is None:
            continue
        needed = grace_needed_seconds(step, save)
        facts = {"grace_seconds": grace, "step_seconds": step, "save_seconds": save}
        told = f"a step ({step:.1f} s), a checkpoint ({save:.1f} s) and {GRACE_SLACK_SECONDS} s of slack"
        if needed > grace:
            findings.append(Finding("grace", "warning", f"{stage.name}: the grace of {grace} s is short for {told}; -o site.grace={needed + GRACE_SPARE_SECONDS}s gives enough", facts))
        else:
            findings.append(Finding("grace", "fine", f"{stage.name}: {grace} s hold {told}", facts))
    return findings


def save_seconds(item: Prepared, stage: str) -> float | None:
    """The slower of what `medgen check` measured and of a slow shared disk; None if the size of a checkpoint is not known."""
    size = space.checkpoint_bytes(item.run, stage)
    known = record.read(item.run)
    measured = known.stages[stage].save_seconds if known is not None and stage in known.stages else None
    return None if size is None else max(size / SLOW_BYTES_PER_SECOND, measured or 0.0)


# --- the place -------------------------------------------------------------------------------------------------------


def _seen_by_nodes(item: Prepared) -> list[Finding]:
    findings = []
    reason = space.why_only_here(space.existing(item.run.root))
    if reason is not None:
        findings.append(Finding("runs folder", "warning", f"the nodes may not see {item.run.root.parent}: {reason}; set MEDGEN_RUNS to a shared folder"))
    reason = space.why_only_here(Path(sys.prefix)) if not item.site.environment.brings_python else None
    if reason is not None:
        findings.append(Finding("environment", "warning", f"jobs run {sys.executable}, which the nodes may not see: {reason}; name an environment in the profile"))
    return findings


def _enclosing_job() -> list[Finding]:
    if "SLURM_JOB_ID" not in os.environ:
        return []
    return [Finding("Slurm", "note", f"this is inside job {os.environ['SLURM_JOB_ID']}: what it has set for itself is kept from the new jobs")]


def _code() -> list[Finding]:
    """Edits are no fault: the run keeps a copy of the code as it is, and the manifest the hash of the difference."""
    findings = []
    for folder in dict.fromkeys((snapshot.PACKAGE.parent, Path.cwd())):
        state = snapshot.git_state(folder)
        if state is not None and state["dirty"]:
            count = len(state["changed_files"])
            findings.append(Finding("code", "note", f"{folder} has {count} changed {'file' if count == 1 else 'files'} since commit {state['commit'][:10]}; the run keeps its own copy of the code"))
    return findings or [Finding("code", "fine", "the run keeps its own copy")]


def _hint(prepared: Sequence[Prepared]) -> list[Finding]:
    untried = [item for item in prepared if any(stage.kind == "train" for stage in item.plan.stages) and record.read(item.run) is None]
    if not untried:
        return []
    return [Finding("check", "note", f"no model of this spec has been tried: medgen check {prepared[0].spec_path} takes one step of each")]
