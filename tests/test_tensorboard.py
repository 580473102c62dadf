"""`medgen tensorboard` on this machine: a real one, started, asked, and ended by Ctrl-C; and the text of its job."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from launch_stub import build, wait_until

from medgen import site as sites
from medgen.rundir import RunDir
from medgen.watch.tensorboard import curve_folders, job_script

Medgen = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made, _ = build(tmp_path / "runs", [{"name": "train_a", "kind": "train"}, {"name": "train_b", "kind": "train"}, {"name": "report", "kind": "report"}])
    return made


def write_curve(folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder))
    for step in range(5):
        writer.add_scalar("loss", 1 / (step + 1), step)
    writer.close()


def test_a_real_one_shows_the_curves_and_ends_with_ctrl_c(run: RunDir, tmp_path: Path, environment: dict[str, str]) -> None:
    write_curve(run.tensorboard("train_a"))
    environment["SSH_CONNECTION"] = "10.0.0.5 50000 10.0.0.1 22"
    printed = tmp_path / "printed.txt"
    with printed.open("w") as output:
        board = subprocess.Popen([sys.executable, "-m", "medgen", "tensorboard", "stub"], cwd=tmp_path, env=environment, stdout=output, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: "ssh -N -L" in printed.read_text() or board.poll() is not None, 90)
    lines = printed.read_text().splitlines()
    assert board.poll() is None, board.communicate()
    address = lines[0].split()[0]
    port = address.rstrip("/").rpartition(":")[2]
    assert lines[1].startswith(f"from your own machine first: ssh -N -L {port}:localhost:{port} ") and lines[1].endswith("@10.0.0.1")

    def runs() -> list[str]:
        with urllib.request.urlopen(f"{address}data/runs", timeout=20) as answer:
            return list(json.load(answer))

    wait_until(lambda: runs() == ["stub-0123456789/train_a"], 60)
    write_curve(run.tensorboard("train_b"))  # one that begins later
    os.kill(board.pid, signal.SIGINT)
    _, stderr = board.communicate(timeout=30)
    assert board.returncode == 0 and "Traceback" not in stderr
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(port))) != 0  # nothing is left behind
    assert not list((tmp_path / "runs" / ".cache").glob("medgen-tensorboard*"))


def test_every_training_of_every_run_has_its_name(run: RunDir, tmp_path: Path) -> None:
    other = tmp_path / "runs" / "stub-9876543210"
    shutil.copytree(run.root, other)
    names = list(curve_folders([run, RunDir(other)]))
    assert names == ["stub-0123456789/train_a", "stub-0123456789/train_b", "stub-9876543210/train_a", "stub-9876543210/train_b"]


def test_errors(run: RunDir, medgen: Medgen, tmp_path: Path) -> None:
    assert "choose one" in medgen("tensorboard", "stub", "--here", "--job", expect=2).stderr
    assert "no such run" in medgen("tensorboard", "nothing", expect=2).stderr
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"--port {port}: something listens there already" in medgen("tensorboard", "stub", "--port", port, expect=2).stderr
    (tmp_path / "here.yaml").write_text("name: here\n")
    assert "--job needs a cluster, and here is none" in medgen("tensorboard", "stub", "--job", "--site", "here.yaml", expect=2).stderr
    shutil.rmtree(run.root)
    build(tmp_path / "runs", [{"name": "report", "kind": "report"}])
    assert "no train stage" in medgen("tensorboard", "stub", expect=2).stderr


def test_the_job_speaks_the_words_of_the_site(tmp_path: Path) -> None:
    profile = tmp_path / "lab.yaml"
    profile.write_text("{name: lab, scheduler: slurm, partitions: {cpu: short}, account: proj1, qos: low, environment: {modules: [Python/3.11], venv: /opt/env}}\n")
    script = job_script(sites.load(str(profile)), tmp_path / "a folder", None, "stub-1")
    for line in ("--job-name=medgen-tensorboard-stub-1", "--time=480", "--partition=short", "--account=proj1", "--qos=low"):
        assert f"#SBATCH {line}\n" in script
    assert "gres" not in script
    assert "module load Python/3.11\nsource /opt/env/bin/activate\n" in script and "\npython -m tensorboard.main --logdir" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
