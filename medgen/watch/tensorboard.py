"""TensorBoard on the curves of runs: on this machine, or in a small job on the cluster. Called by the verb `tensorboard`."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from medgen import files, sbatch_options
from medgen import plan as planning
from medgen import site as sites
from medgen.errors import InputError, MedgenError
from medgen.launch import slurm
from medgen.launch.executor import submit_script
from medgen.launch.slurm import SlurmError, SlurmRefused
from medgen.rundir import RunDir, runs_root
from medgen.site import Site

FIRST_PORT, PORTS = 6006, 200
JOB_MINUTES, JOB_MEMORY_MEBIBYTES = 480, 4096
START_SECONDS = 60.0  # TensorBoard imports for a while
JOB_POLL_SECONDS = 2.0
END_SECONDS = 5.0
NAME = "medgen-tensorboard"


def tensorboard(runs: Sequence[RunDir], port: int | None, here: bool, in_job: bool, site_name: str | None) -> None:
    """Serve the curves of the runs until Ctrl-C, or from a job until `scancel`. Raises InputError if there are none."""
    if here and in_job:
        raise InputError("--here and --job: choose one of them")
    folders = curve_folders(runs)
    if in_job:
        _in_a_job(runs, port, site_name)
        return
    _here(folders, port)


def curve_folders(runs: Sequence[RunDir]) -> dict[str, Path]:
    """run/stage -> its TensorBoard folder. Raises InputError if no run has a training."""
    found = {}
    for run in runs:
        for stage in planning.read(run).stages:
            if stage.kind == "train":
                found[f"{run.run_id}/{stage.name}"] = run.tensorboard(stage.name)
    if not found:
        raise InputError(f"{', '.join(run.run_id for run in runs)}: no train stage, so there are no curves")
    return found


def link(folders: dict[str, Path], target: Path) -> None:
    """One folder with a link per training: TensorBoard names curves by their path; one that has not begun appears later."""
    files.private_folder(target)
    for name, folder in folders.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            (target / name).symlink_to(folder)


# --- here ------------------------------------------------------------------------------------------------------------


def _here(folders: dict[str, Path], port: int | None) -> None:
    number = free_port(port)
    collected = runs_root() / ".cache" / f"{NAME}-{os.getpid()}"
    link(folders, collected)
    process = subprocess.Popen(command(collected, number, "127.0.0.1"), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _wait_for_answer(process, number)
        print(f"http://localhost:{number}/   ({', '.join(folders)}; Ctrl-C ends it)")
        if "SSH_CONNECTION" in os.environ:
            print(f"from your own machine first: ssh -N -L {number}:localhost:{number} {_who()}@{_address()}")
        sys.stdout.flush()
        process.communicate()
        raise MedgenError(f"TensorBoard ended with exit code {process.returncode}")
    except KeyboardInterrupt:
        print("\nTensorBoard was ended", flush=True)
    finally:
        _end(process)
        shutil.rmtree(collected, ignore_errors=True)


def command(folder: Path, port: int, host: str) -> list[str]:
    return [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port), "--host", host, "--reload_interval", "15"]


def free_port(wanted: int | None) -> int:
    """`wanted`, or the first free one from 6006 on. Raises InputError if there is none."""
    candidates = [wanted] if wanted is not None else list(range(FIRST_PORT, FIRST_PORT + PORTS))
    for number in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", number))
                return number
    if wanted is not None:
        raise InputError(f"--port {wanted}: something listens there already; leave the option out, and a free port is found")
    raise InputError(f"no free port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1}; name one with --port")


def _wait_for_answer(process: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = [line for line in (process.stderr.read() if process.stderr is not None else "").splitlines() if line.strip()]
            raise MedgenError(f"TensorBoard did not start (exit code {process.returncode}): {said[-1] if said else 'without a word'}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise MedgenError(f"TensorBoard did not answer on port {port} within {START_SECONDS:.0f} s")


def _end(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _address() -> str:
    """This machine as the user's own reached it: the third word of SSH_CONNECTION is our address."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    return words[2] if len(words) == 4 else socket.gethostname()


# --- in a job --------------------------------------------------------------------------------------------------------


def _in_a_job(runs: Sequence[RunDir], port: int | None, site_name: str | None) -> None:
    """Queue it, wait until it runs, and say how to reach it. Ctrl-C meanwhile takes it out of the queue."""
    site = sites.load(site_name)
    if site.scheduler != "slurm":
        raise InputError(f"--job needs a cluster, and {site.name} is none; leave it out to run TensorBoard on this machine")
    folder = runs_root() / ".cache" / f"{NAME}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    link(curve_folders(runs), folder / "curves")
    log, address = folder / "log.txt", folder / "address"
    script = job_script(site, folder, port, runs[0].run_id)
    files.write_text(folder / "job.sh", script)
    try:
        job_id = submit_script(folder, script, [], site.export)
    except SlurmRefused as error:
        raise InputError(f"Slurm refused the job: {error.reason}; see partitions: and account: in the site profile ({site.name})") from None
    print(f"job {job_id} is queued; waiting until it runs (Ctrl-C takes it out again)", file=sys.stderr, flush=True)
    try:
        _wait_for_job(job_id, log, address)
    except BaseException:
        with contextlib.suppress(SlurmError):
            slurm.cancel([job_id])
        raise
    node, number = address.read_text().split()
    print(f"TensorBoard runs on {node} for {JOB_MINUTES // 60} h; from your own machine:")
    print(f"  ssh -N -L {number}:{node}:{number} {_who()}@{_address()}")
    print(f"and then open http://localhost:{number}/")
    print(f"to end it: scancel {job_id}")


def job_script(site: Site, folder: Path, port: int | None, run_id: str) -> str:
    """The bash script of the job: a free port on its node, told in the file `address` once it listens."""
    words = {"partition": site.partitions.cpu, "account": site.account, "qos": site.qos}
    directives = [
        f"--job-name={NAME}-{run_id}", f"--time={JOB_MINUTES}", "--ntasks=1", "--cpus-per-task=1", f"--mem={JOB_MEMORY_MEBIBYTES}M",
        f'--output="{str(folder / "log.txt").replace("%", "%%")}"', "--no-requeue", *(f"--{option}={value}" for option, value in words.items() if value is not None),
    ]  # fmt: skip
    interpreter = shlex.join([*site.environment.prefix(), "python"] if site.environment.brings_python else [sys.executable])
    search = f"port={port}" if port is not None else f"port=$(({FIRST_PORT} + SLURM_JOB_ID % {PORTS}))"
    lines = [
        "#!/bin/bash",
        *(sbatch_options.directive_line(directive) for directive in directives),
        "set -Eeo pipefail",
        *site.environment.lines(),
        *site.setup,
        search,
        'while (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port=$((port + 1)); done  # somebody listens there',
        f"{interpreter} -m tensorboard.main --logdir {shlex.quote(str(folder / 'curves'))} --port \"$port\" --bind_all --reload_interval 30 &",
        "board=$!",
        "trap 'kill \"$board\"' TERM",
        'until (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do kill -0 "$board"; sleep 0.5; done',
        f'echo "${{SLURMD_NODENAME:-$(hostname)}} $port" > {shlex.quote(str(folder / "address.part"))}',
        f"mv {shlex.quote(str(folder / 'address.part'))} {shlex.quote(str(folder / 'address'))}",
        'wait "$board"',
    ]
    return "\n".join(lines) + "\n"


def _wait_for_job(job_id: int, log: Path, address: Path) -> None:
    """Until TensorBoard listens. Raises MedgenError if the job ends before that."""
    told = ""
    while not address.exists():
        rows = [row for row in slurm.queue(NAME) if row.job_id == job_id]
        state = rows[0].state if rows else "gone"
        if state == "gone" or state in slurm.TERMINAL_STATES:
            if address.exists():
                return
            said = [line for line in (log.read_text(errors="replace") if log.exists() else "").splitlines() if line.strip()]
            raise MedgenError(f"job {job_id} ended ({state.lower()}) before TensorBoard listened: {said[-1] if said else 'without a word'}; all it said: {log}")
        reason = re.sub(r"^None$", "", rows[0].reason)
        words = f"{state.lower()}{f' ({reason})' if reason else ''}"
        if words != told:
            print(f"job {job_id}: {words}", file=sys.stderr, flush=True)
            told = words
        time.sleep(JOB_POLL_SECONDS)
