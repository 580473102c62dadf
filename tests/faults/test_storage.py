"""Faults of storage (F33 to F40), each made to happen on real files and disks and seen to have happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import unavailable
from slurm.conftest import slurm  # noqa: F401  (a fixture)
from slurm.test_submit import Lab, lab  # noqa: F401  (a fixture)
from test_damage import flip_last_byte
from test_pipeline import Medgen, WriteSpec, _equal, _last_tensors, only_run, tree

from medgen import checkpoint, files
from medgen.launch.backend import next_attempt
from medgen.rundir import Heartbeat, RunDir

from .disk import BLOCK_BYTES, SmallDisk, small_disk
from .test_compute import DATA, NET, Record, events, fired

TRAIN = {"kind": "train", "config": {**NET, "epochs": 3, "loop": {**NET["loop"], "keep": 6}}, "resources": {"cpus": 1}}
IMAGES = {"kind": "generate", "from": "train", "condition": "test", "count": 6, "chunk": 2, "shards": 2, "parallel": 1, "sampling": {"sampler": "ddim", "steps": 2}}
SPEC: dict[str, Any] = {"version": 1, "name": "disk", "data": DATA, "stages": {"train": TRAIN, "images": IMAGES}}


def temporaries(run: Path) -> list[Path]:
    """What a writer that was stopped must not leave behind for good."""
    return [path for path in run.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run folder of SPEC, to which nothing happened."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "disk.yaml").write_text(yaml.safe_dump(SPEC))
    environment = {**os.environ, "MEDGEN_RUNS": str(folder), "MEDGEN_CACHE": str(cache), "XDG_CACHE_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "medgen", "submit", "disk.yaml", "--local"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    [run] = folder.glob("disk-*")
    return run


@pytest.fixture
def disk(tmp_path: Path, private_mounts: list[str], environment: dict[str, str]) -> Iterator[SmallDisk]:
    with small_disk(private_mounts, tmp_path / "disk", "size=60m", environment) as made:
        yield made


# --- F33: the disk is full -------------------------------------------------------------------------------------------


@pytest.mark.fault("F33")
@pytest.mark.timeout(60)
def test_small_records_on_a_full_disk_are_refused_whole_and_leave_nothing(disk: SmallDisk, record_property: Record) -> None:
    """A disk that has room for a part of a line takes that part and reports no error: it must not pass for written."""
    run = RunDir(disk.inside / "runs" / "disk-1")
    while not run.events_file.exists() or run.events_file.stat().st_size < BLOCK_BYTES - 400:
        run.event("note", text="x" * 200)
    known, beat = len(run.events()), Heartbeat("train", 0, 0, 1, 2, "steps", None, time.time(), "here", 1)
    run.write_heartbeat(beat)
    assert disk.fill() == 0
    writers: list[Callable[[], None]] = [
        lambda: run.event("note", text="y" * 1000), lambda: run.write_heartbeat(beat), lambda: files.write_json(run.outcome_file("train", 0), {"status": "done"}),
    ]  # fmt: skip
    for write in writers:
        with pytest.raises(OSError, match="No space left") as refused:
            write()
        record_property("fired", str(refused.value))
    assert not temporaries(run.root) and not run.outcome_file("train", 0).exists()
    assert run.read_heartbeat("train", 0) == replace(beat, heard=run.heartbeat_file("train", 0).stat().st_mtime), "the last one is still there"
    disk.empty()
    run.event("note", text="after")
    assert len(run.events()) == known + 1 and run.events()[-1]["text"] == "after", "the cut line is left out, nothing else is lost"



def submit_until_it_stops(disk: SmallDisk, spec: Path, fault: str, leave_bytes: int) -> str:
    """Submit; a process stops itself at the armed place, the disk is filled up, the process goes on and meets that. What was said."""
    log = disk.mount.parent / f"fired-{len(list(disk.mount.parent.glob('fired-*')))}"
    disk.environment.update(MEDGEN_FAULT=f"{fault},action=stop", MEDGEN_FAULT_LOG=str(log))
    with disk.start("submit", spec, "--local") as process:
        deadline = time.monotonic() + 240
        while not fired(log):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        assert disk.fill(leave_bytes) <= leave_bytes
        os.kill(int(fired(log)[0].rpartition("pid=")[2]), signal.SIGCONT)
        said = process.communicate(timeout=240)[0]
    del disk.environment["MEDGEN_FAULT"]
    assert process.returncode == 1 and "Traceback" not in said, said
    assert len(fired(log)) == 1, f"not tried again: {said}"
    return said


def assert_told_as_full(disk: SmallDisk, stage: str) -> None:
    """While nothing has changed: why and watch can be asked, and say it."""
    finding = json.loads(disk.medgen("why", disk.run.name, "--json", expect=1))["findings"][0]
    assert (finding["stage"], finding["cause"]["kind"]) == (stage, "DISK_FULL"), finding
    assert any("Free some space" in line for line in finding["advice"]), finding
    disk.medgen("watch", disk.run.name, "--once", expect=1)


@pytest.mark.slow
@pytest.mark.fault("F33")
@pytest.mark.timeout(900)
def test_checkpoints_and_shards_on_a_disk_that_fills_up(disk: SmallDisk, write_spec: WriteSpec, undisturbed: Path, record_property: Record) -> None:
    """Full in the middle of a checkpoint; too full for another one; full in the middle of a shard. Each time the same submit goes on."""
    spec = write_spec(SPEC)
    for number, (fault, leave_bytes) in enumerate([("site=ckpt.commit,nth=4", 0), ("site=ckpt.commit,nth=2", 8 * 2**20), ("site=shard.write,shard=1,nth=2", 0)]):
        said = submit_until_it_stops(disk, spec, fault, leave_bytes)
        stage = "images" if "shard" in fault else "train"
        assert "not tried again: the disk is full; free some space and submit again" in said
        ended = [event for event in events(disk.run, "task_ended") if event["stage"] == stage and event["status"] != "done"][-1]
        assert (ended["cause_kind"], ended["again"]) == ("DISK_FULL", False), ended
        record_property("fired", f"{disk.free_bytes()} bytes free: {ended['cause']}")
        assert not temporaries(disk.run), temporaries(disk.run)
        newest = checkpoint.newest(RunDir(disk.run).checkpoints("train"), print)
        assert newest is not None and newest.step == (3, 5, 13)[number], "the last one is whole"
        assert_told_as_full(disk, stage)
        disk.empty()
    assert (disk.run / "images" / "shards" / "00000" / "manifest.json").exists() and not (disk.run / "images" / "shards" / "00001").exists()
    disk.medgen("submit", spec, "--local")
    assert _equal(_last_tensors(disk.run), _last_tensors(undisturbed))
    assert tree(disk.run / "images" / "dataset") == tree(undisturbed / "images" / "dataset")
    assert not temporaries(disk.run)


@pytest.mark.fault("F33")
@pytest.mark.timeout(120)
def test_a_command_that_fills_the_disk_of_its_local_supervisor(disk: SmallDisk, write_spec: WriteSpec, record_property: Record) -> None:
    """Nothing at all can be written at the end, by nobody: it is told all the same, and goes on when there is room."""
    run = "[ -e ../disk/roomy ] || cat /dev/zero > $MEDGEN_OUT/big || exit 1; echo made > $MEDGEN_OUT/made"
    spec = write_spec({"version": 1, "name": "command", "stages": {"a": {"kind": "command", "run": run.replace("../disk", str(disk.mount))}}})
    said = disk.medgen("submit", spec, "--local", expect=1)
    big = disk.run / "a" / "made" / "00000" / "big"
    assert disk.free_bytes() < 16 * BLOCK_BYTES and big.stat().st_size > 40 * 2**20
    record_property("fired", f"{disk.free_bytes()} bytes free")
    assert "No space left on device" in said or "the disk is full" in said, said
    assert next_attempt(RunDir(disk.run), "a", 0) == 1, "not tried again"
    assert_told_as_full(disk, "a")
    big.unlink()
    (disk.inside / "roomy").touch()
    disk.medgen("submit", spec, "--local")
    assert (disk.run / "a" / "made" / "00000" / "made").read_text() == "made\n"
    assert not temporaries(disk.run)


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A small disk that everybody on this machine sees, the jobs of Slurm too."""
    folder = tmp_path / "runs"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60m", "none", str(folder)], capture_output=True).returncode:
        unavailable("this machine lets nobody mount a small disk for all processes (mount -t tmpfs)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.fault("F33")
@pytest.mark.timeout(240)
def test_a_job_of_slurm_that_fills_the_disk_is_not_requeued(mounted: Path, lab: Lab, record_property: Record) -> None:  # noqa: F811
    roomy = lab.folder / "roomy"
    stages = {"a": {"kind": "command", "run": f"[ -e {roomy} ] || cat /dev/zero > $MEDGEN_OUT/big || exit 1; echo made > $MEDGEN_OUT/made", "resources": {"mem": "100M"}}}
    spec = lab.spec("full", stages)
    lab.submit(spec)
    lab.wait("full", 90)
    free = shutil.disk_usage(mounted).free
    assert free < 16 * BLOCK_BYTES
    record_property("fired", f"{free} bytes free")
    [job] = lab.jobs("full")
    assert job["state"] == "FAILED" and "Restarts=0 " in lab.slurm.run("scontrol", "show", "job", "--oneliner", job["id"]).stdout
    finding = json.loads(lab.medgen("why", "full", "--json", expect=1).stdout)["findings"][0]
    assert finding["cause"]["kind"] == "DISK_FULL", finding
    (lab.run("full") / "a" / "made" / "00000" / "big").unlink()
    roomy.touch()
    lab.submit(spec)
    lab.wait("full", 90)
    lab.assert_done("full")
    assert not temporaries(lab.run("full"))


# --- F34, F35, F36: checkpoints that are half written, damaged, or only pointed at ----------------------------------


@pytest.mark.slow
@pytest.mark.fault("F34", "F35", "F36")
@pytest.mark.timeout(900)
def test_half_checkpoints_damaged_ones_and_dead_links(
    tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, environment: dict[str, str], undisturbed: Path, record_property: Record
) -> None:
    """Killed twice behind the half of a file, and until it is given up while it restores; then the four newest are damaged, each in its way: the fifth is used."""
    spec = write_spec({**SPEC, "stages": {"train": TRAIN}})
    written = {0: 3 * 8 + 2, 1: 3 * 2 + 2}  # attempt -> which file of all it writes: a checkpoint has three
    halves = [f"site=ckpt.write,attempt={attempt},nth={nth},action={action}" for attempt, nth in written.items() for action in ("truncate:50", "kill9")]
    restoring = [f"site=ckpt.load,attempt={attempt},action=kill9" for attempt in (2, 3)]
    environment.update(MEDGEN_FAULT=";".join([*halves, *restoring]), MEDGEN_FAULT_LOG=str(tmp_path / "fired"))
    medgen("submit", spec, "--local", expect=1)
    run = only_run(tmp_path)
    seen = fired(tmp_path / "fired")
    assert [line.split()[1] for line in seen] == ["truncate", "kill9"] * 2 + ["kill9"] * 2, seen
    assert [event["from_step"] for event in events(run, "task_started")] == [0, 8, 10, 10], "the half of the ninth counted for nothing"
    assert len(temporaries(run)) == 1, "what the second kill has left; that of the first is cleared away"

    kept = {number: run / "train" / "ckpt" / f"step-{number:06d}" for number in range(5, 11)}
    assert all(folder.is_dir() for folder in kept.values())
    os.truncate(kept[10] / "modules.network.pt", (kept[10] / "modules.network.pt").stat().st_size - 1)
    flip_last_byte(kept[9] / "optimizers.network.pt")
    (kept[8] / "modules.ema.pt").unlink()
    (kept[7] / "commit.json").write_text('{"version": 1')
    (run / "train" / "ckpt" / "step-000099").symlink_to("step-000042")
    (run / "train" / "ckpt" / "latest").symlink_to("step-000099")
    record_property("fired", f"{seen[1]}; four damaged, two dead links")

    del environment["MEDGEN_FAULT"]
    medgen("submit", spec, "--local")
    log = (run / "logs" / "train" / "s0" / "r0.a4.log").read_text()
    told = [line.rpartition("/")[2] for line in log.splitlines() if line.startswith("skipping checkpoint")]
    assert [line.partition(":")[0] for line in told] == ["step-000099", "step-000010", "step-000009", "step-000008", "step-000007"], log
    assert "resuming from" in log and "(step 6 of 13)" in log, log
    assert _equal(_last_tensors(run), _last_tensors(undisturbed))
    assert not temporaries(run)
    [done] = [event for event in events(run, "task_ended") if event["status"] == "done"]
    record_property("recovery_seconds", done["seconds"])


# --- F38: a shard is made twice at the same time ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault("F38")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("locks", ["hold", "do not hold"])
def test_a_shard_that_two_processes_make_at_once(
    tmp_path: Path, environment: dict[str, str], undisturbed: Path, record_property: Record, locks: str
) -> None:
    """Also where the shared file system knows no locks: the first one to finish publishes, the other finds it and keeps it."""
    run = tmp_path / undisturbed.name
    shutil.copytree(undisturbed, run, symlinks=True)
    shutil.rmtree(run / "images" / "shards" / "00000")
    (run / "outcome" / "images.0.json").unlink()
    command = [sys.executable, "-m", "medgen", "generate", str(run), "--stage", "images", "--shard", "0"]
    environment.update(MEDGEN_FAULT="site=shard.write,nth=1,action=stop", MEDGEN_FAULT_LOG=str(tmp_path / "fired"))
    deadline = time.monotonic() + 200

    def wait_for(condition: Callable[[], bool]) -> None:
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    first = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: len(fired(tmp_path / "fired")) == 1)
    if locks == "do not hold":
        (run / "hb" / "images.0.lock").unlink()
        second = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        wait_for(lambda: len(fired(tmp_path / "fired")) == 2)
        record_property("fired", "both are in the middle of the shard: " + "; ".join(fired(tmp_path / "fired")))
        second.send_signal(signal.SIGCONT)
        said_second = second.communicate(timeout=200)[0]
        first.send_signal(signal.SIGCONT)
        said_first = first.communicate(timeout=200)[0]
        assert (first.returncode, second.returncode) == (0, 0), said_first + said_second
    else:
        second = subprocess.Popen(command, env={**environment, "MEDGEN_FAULT": ""}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said_second = second.communicate(timeout=200)[0]
        assert second.returncode == 2 and "another process is working on shard 0" in said_second, said_second
        record_property("fired", "the second one found the first at work")
        first.send_signal(signal.SIGCONT)
        said_first = first.communicate(timeout=200)[0]
        assert first.returncode == 0, said_first
    assert tree(run / "images" / "shards" / "00000") == tree(undisturbed / "images" / "shards" / "00000"), "the same bytes, one manifest"
    assert json.loads((run / "outcome" / "images.0.json").read_text())["status"] == "done"
    assert not temporaries(run) and not (run / "images" / "quarantine").exists()


# --- F39: files are seen late ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault("F39")
@pytest.mark.timeout(600)
def test_a_job_waits_for_outcomes_that_its_node_does_not_see_yet(
    tmp_path: Path, environment: dict[str, str], undisturbed: Path, medgen: Medgen, record_property: Record
) -> None:
    """A shard and its outcome appear a while after the job that needs them has begun; nothing is called missing meanwhile."""
    run = tmp_path / undisturbed.name
    shutil.copytree(undisturbed, run, symlinks=True)
    late = {run / "images" / "shards" / "00001": tmp_path / "shard", run / "outcome" / "images.1.json": tmp_path / "outcome"}
    for place, away in late.items():
        place.rename(away)
    shutil.rmtree(run / "images" / "dataset")
    before = len((run / "events.jsonl").read_text().splitlines())
    environment["SLURM_JOB_ID"] = "7"  # as in a job of a cluster
    command = [sys.executable, "-m", "medgen", "collect", str(run), "--stage", "collect_images", "--again"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        record_property("fired", told.strip())
        assert "1 of 2 outcomes of images are not to be seen here yet" in told
        time.sleep(3)
        for place, away in late.items():
            away.rename(place)
        rest = process.communicate(timeout=120)[0]
    assert process.returncode == 0, told + rest
    assert tree(run / "images" / "dataset") == tree(undisturbed / "images" / "dataset")
    assert len((run / "events.jsonl").read_text().splitlines()) == before, "no shard was set aside"


# --- F40: the run folder cannot be written ---------------------------------------------------------------------------


@pytest.mark.fault("F40")
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("options", "told"), [("size=500m,nr_inodes=64", "not enough room"), ("ro", "cannot be written")])
def test_nothing_is_queued_where_nothing_could_be_written(
    lab: Lab, private_mounts: list[str], options: str, told: str, record_property: Record  # noqa: F811
) -> None:
    """A submit to a real Slurm, with a runs folder that is read-only, or has bytes but no files left: refused with its path."""
    place = lab.folder / "disk"
    place.mkdir()
    spec = lab.spec("nowhere", {"a": {"kind": "command", "run": "true"}})
    script = f'mount -t tmpfs -o {options} none "$1"; MEDGEN_RUNS="$1" "$0" -m medgen submit "$2" --site "$3"; echo "submit $?"; ls -A "$1"'
    arguments = [sys.executable, str(place), str(spec), str(lab.folder / "lab.yaml")]
    done = subprocess.run([*private_mounts, "bash", "-c", script, *arguments], env=lab.environment, cwd=lab.folder, capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1] == "submit 2", f"and nothing stays on the disk: {done.stdout}{done.stderr}"
    assert told in done.stderr and str(place) in done.stderr and "Traceback" not in done.stderr, done.stderr
    record_property("fired", done.stderr.strip())
    after = lab.slurm.run("squeue", "-h", "-t", "all", "-o", "%j").stdout
    assert "nowhere" not in after, after
