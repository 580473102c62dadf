"""Faults of compute and numerics (F41 to F45), each made to happen in the real thing and seen to have happened."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import test_watch_slurm
import torch
from conftest import TINY_NET, tiny_spec
from launch_stub import build, create_run
from slurm.conftest import slurm  # noqa: F401  (a fixture)
from slurm.test_submit import SITE, Lab, lab  # noqa: F401  (a fixture)
from test_pipeline import Medgen, WriteSpec, _equal, _last_tensors, only_run

from medgen import dist, files
from medgen.launch.script import Chunk, render_script
from medgen.launch.tries import all_tries, read_tries
from medgen.rundir import RunDir
from medgen.watch.state import Reader

Record = Callable[[str, object], None]
DATA = {"format": "phantom", "patients": 6, "size": 16, "positive_only": True, "every": 2}
NET = {**TINY_NET, "strategy": "ddpm", "mode": "bravo", "batch_size": 4,
       "loop": {"log_steps": 1, "checkpoint_steps": 1, "preview_images": 0, "validate_epochs": 1.0}}  # fmt: skip


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def fired(path: Path) -> list[str]:
    """What the armed faults told of themselves."""
    return path.read_text().splitlines() if path.exists() else []


# --- F42: too little memory ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault("F42")
@pytest.mark.timeout(420)
def test_slurm_kills_for_memory_and_the_next_attempt_has_half_as_much_again(lab: Lab, record_property: Record) -> None:  # noqa: F811
    """Two trainings that need about 900 MiB each: 800 become 1200, which is enough; 400 become 600, which is not."""
    lab.site({**SITE, "export": ["MEDGEN_FAULT", "MEDGEN_FAULT_LOG"]})
    lab.environment.update(MEDGEN_FAULT="site=start,action=hold:600", MEDGEN_FAULT_LOG=str(lab.folder / "fired"))
    stages = {name: {"kind": "train", "config": NET, "resources": {"cpus": 1, "mem": mem}} for name, mem in (("enough", "800M"), ("never", "400M"))}
    lab.submit(lab.spec("memory", stages, data=DATA))
    lab.wait("memory", 360)
    killed = [line for name in stages for line in (lab.run("memory") / "logs" / name / "s0" / "batch.log").read_text().splitlines() if "memory limit" in line]
    record_property("fired", killed[0])
    assert len(fired(lab.folder / "fired")) == 4, "two attempts at each"

    ends = {name: [end for end in lab.events("memory", "task_ended") if end["stage"] == name] for name in stages}
    assert [(end["status"], end["cause_kind"]) for end in ends["enough"]] == [("failed", "OOM"), ("done", None)], ends
    assert ends["enough"][0]["next"] == "will be tried again with 1200 MiB of memory instead of 800"
    assert [(end["status"], end["cause_kind"], end["again"]) for end in ends["never"]] == [("failed", "OOM", True), ("failed", "OOM", False)], ends
    assert ends["never"][1]["next"] == "not tried again: it had too little memory twice"
    record_property("recovery_seconds", ends["enough"][1]["time"] - ends["enough"][0]["time"])
    asked = {row["name"].split(".")[2]: lab.slurm.run("scontrol", "show", "job", "--oneliner", row["id"]).stdout for row in lab.jobs("memory")}
    assert "MinMemoryNode=1200M" in asked["enough"] and "MinMemoryNode=600M" in asked["never"]
    assert all("Restarts=1 " in words for words in asked.values()), "the same jobs, started once more"
    outcome = lab.outcome("memory", "enough")
    assert outcome is not None and outcome["status"] == "done"

    finding = json.loads(lab.medgen("why", "memory", "--json", expect=1).stdout)["findings"]
    assert [(item["stage"], item["cause"]["kind"], item["cause"]["certain"]) for item in finding] == [("never", "OOM", True)]
    assert any("resources.mem=" in line for line in finding[0]["advice"]), finding[0]["advice"]


def two_epochs(name: str, resources: dict[str, int]) -> dict[str, Any]:
    return {**tiny_spec(name=name), "stages": {"train": {"kind": "train", "config": {**NET, "epochs": 2}, "resources": resources}}}


def steps_of(run: Path) -> list[tuple[int, float]]:
    """(step, loss) of every step that was logged."""
    lines = [json.loads(line) for line in (run / "train" / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.fault("F42")
@pytest.mark.timeout(900)
def test_a_step_that_finds_too_little_memory_goes_on_with_smaller_micro_batches(
    tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, environment: dict[str, str], record_property: Record
) -> None:
    """The global batch stays the same: from the first step on that is bit for bit the run with such micro-batches. From a later
    step on the steps before were summed in another order: float32 sums of a few numbers differ by parts in 10^7, and Adam, which
    divides each gradient by its own size, passes that on; the losses of all steps stay equal to a part in a thousand."""
    spec = write_spec(two_epochs("halved", {"cpus": 1}))
    medgen("submit", spec, "--local", "-o", "stages.train.config.loop.micro_batch=2")
    halved = only_run(tmp_path)
    expected, losses = _last_tensors(halved), steps_of(halved)
    assert len(losses) > 6

    for failing_step in (1, 4):
        environment.update(MEDGEN_RUNS=str(tmp_path / f"runs{failing_step}"), MEDGEN_FAULT_LOG=str(tmp_path / f"fired{failing_step}"))
        environment["MEDGEN_FAULT"] = f"site=step,step={failing_step},attempt=0,action=oom"
        medgen("submit", spec, "--local")
        [run] = (tmp_path / f"runs{failing_step}").glob("halved-*")
        assert [line.split()[1] for line in fired(tmp_path / f"fired{failing_step}")] == ["oom"]
        ends = events(run, "task_ended")
        assert [(end["status"], end["cause_kind"]) for end in ends] == [("failed", "OOM"), ("done", None)], ends
        assert ends[0]["next"] == "will be tried again with micro-batches half as large, the global batch stays the same"
        assert "micro-batches 2 times smaller" in (run / "logs" / "train" / "s0" / "r0.a1.log").read_text()
        record_property("fired", ends[0]["cause"])
        record_property("recovery_seconds", ends[1]["seconds"])
        found = _last_tensors(run)
        assert found[0] == expected[0]
        assert _equal(found, expected) == (failing_step == 1), "summed in another order before the fourth step"
        assert [step for step, _ in steps_of(run)] == [step for step, _ in losses]
        assert [loss for _, loss in steps_of(run)] == pytest.approx([loss for _, loss in losses], rel=1e-3)


# --- F41: the loss is not finite -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault("F41")
@pytest.mark.timeout(900)
def test_nan_on_one_of_two_ranks_stops_both_and_is_never_saved(
    tmp_path: Path, medgen: Medgen, write_spec: WriteSpec, environment: dict[str, str], record_property: Record
) -> None:
    spec = write_spec(two_epochs("nan", {"processes": 2, "cpus": 2}))
    medgen("submit", spec, "--local")
    expected = _last_tensors(only_run(tmp_path))

    environment.update(MEDGEN_RUNS=str(tmp_path / "again"), MEDGEN_FAULT="site=step,rank=1,step=5,action=nan", MEDGEN_FAULT_LOG=str(tmp_path / "fired"))
    medgen("submit", spec, "--local", expect=1)
    [run] = (tmp_path / "again").glob("nan-*")
    record_property("fired", "; ".join(fired(tmp_path / "fired")))
    ends = events(run, "task_ended")
    assert [(end["status"], end["cause_kind"], end["again"]) for end in ends] == [("failed", "NAN", True)] * 2 + [("failed", "NAN", False)], "twice from the newest checkpoint"
    assert "the loss became nan between steps 5 and 5" in ends[0]["cause"]
    for attempt in range(3):  # rank 1 knew it by itself, it was not killed
        assert "the loss became nan" in (run / "logs" / "train" / "s0" / f"r1.a{attempt}.log").read_text()
    step, tensors = _last_tensors(run)
    assert step == 4 and all(torch.isfinite(tensor).all() for tensor in leaves(tensors) if tensor.is_floating_point())
    finding = json.loads(medgen("why", run, "--json", expect=1).stdout)["findings"][0]
    assert finding["cause"]["kind"] == "NAN" and finding["advice"]

    del environment["MEDGEN_FAULT"]
    medgen("submit", spec, "--local")
    assert _equal(_last_tensors(run), expected)


def leaves(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for child in children for tensor in leaves(child)]


# --- F43: the ranks cannot meet --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault("F43")
@pytest.mark.timeout(300)
def test_ranks_that_cannot_meet_say_where_they_tried(tmp_path: Path, write_spec: WriteSpec, environment: dict[str, str], record_property: Record) -> None:
    """A port that somebody else has, a port where nobody answers, a name that nobody knows: each by the verb that a job calls."""
    stages = {"train": {"kind": "train", "config": NET, "resources": {"processes": 2}}}
    spec = write_spec({**tiny_spec(name="meeting"), "stages": stages})
    with socket.socket() as taken, socket.socket() as silent:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        silent.bind(("127.0.0.1", 0))
        ports = [int(place.getsockname()[1]) for place in (taken, silent)]
        cases = {"taken": (0, "127.0.0.1", ports[0]), "silent": (1, "127.0.0.1", ports[1]), "unknown": (1, "no-such-node.invalid", ports[1])}
        processes, runs, began = {}, {}, time.monotonic()
        for name, (rank, address, port) in cases.items():
            runs[name] = create_run(spec, (), tmp_path / name)[0].root
            world = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": "0", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
            command = [sys.executable, "-m", "medgen", "train", str(runs[name])]
            processes[name] = subprocess.Popen(command, env={**environment, **world}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        said = {name: process.communicate(timeout=240)[0] for name, process in processes.items()}
        seconds = time.monotonic() - began
    for name, (rank, address, port) in cases.items():
        assert processes[name].returncode == 1 and "Traceback" not in said[name], said[name]
        outcome_file = runs[name] / "outcome" / "train.0.json"
        told = json.loads(outcome_file.read_text())["cause"] if rank == 0 else events(runs[name], "rank_failed")[0]["cause"]
        assert f"the ranks could not meet: rank {rank} on " in told and f"{address}:{port}" in told, told
        record_property("fired", told)
    assert dist.MEETING_SECONDS == 120 and seconds < 240, "two minutes, and what the interpreters need to start on a busy machine"


@pytest.mark.fault("F43")
@pytest.mark.timeout(60)
def test_a_job_script_passes_over_a_port_that_is_taken(tmp_path: Path, write_spec: WriteSpec, environment: dict[str, str], record_property: Record) -> None:
    """The lines of the script itself, run by bash: at each start the next free port."""
    stages = {"train": {"kind": "train", "config": NET, "resources": {"processes": 2}}}
    run, planned = create_run(write_spec({**tiny_spec(name="ports"), "stages": stages}), (), tmp_path / "runs")
    script = render_script(planned, planned.stage("train"), Chunk(1, 0), run.root, sys.executable).splitlines()
    lines = script[script.index("MASTER_ADDR=127.0.0.1") : script.index("export MASTER_ADDR MASTER_PORT") + 1]
    with socket.socket() as first:
        for job in range(4000, 4200):
            try:
                first.bind(("127.0.0.1", 10000 + job))
                break
            except OSError:
                continue
        first.listen()
        record_property("fired", f"port {10000 + job} is taken")
        found = subprocess.run(["bash", "-c", "\n".join([*lines, "echo $MASTER_PORT"])], env={**environment, "SLURM_JOB_ID": str(job)}, capture_output=True, text=True)
    assert int(found.stdout) > 10000 + job, found


# --- F45: the clock jumps --------------------------------------------------------------------------------------------

WRONG_CLOCK = """# time.time() of every Python process is wrong by as many seconds as $CLOCK_OFFSET_FILE says
import os, time
_right = time.time
def _wrong():
    with open(os.environ["CLOCK_OFFSET_FILE"]) as handle:
        return _right() + float(handle.read())
if "CLOCK_OFFSET_FILE" in os.environ:
    time.time = _wrong
"""
TWO_HOURS = 7200


@pytest.mark.fault("F45")
@pytest.mark.timeout(180)
def test_a_clock_that_jumps_forth_and_back_while_work_is_done(
    tmp_path: Path, write_spec: WriteSpec, medgen: Medgen, environment: dict[str, str], record_property: Record
) -> None:
    """Supervisor, task and watch see the jump; each in another time zone. Nothing is stalled or lost, and seconds stay seconds."""
    (tmp_path / "clock").mkdir()
    (tmp_path / "clock" / "sitecustomize.py").write_text(WRONG_CLOCK)
    offset, flag = tmp_path / "offset", tmp_path / "flag"
    offset.write_text("0")
    environment.update(CLOCK_OFFSET_FILE=str(offset), PYTHONPATH=f"{tmp_path / 'clock'}:{environment.get('PYTHONPATH', '')}", TZ="Pacific/Kiritimati")
    run = f"touch $MEDGEN_OUT/here; while [ ! -e {flag} ]; do sleep 0.1; done"
    spec = write_spec({"version": 1, "name": "clock", "stages": {"a": {"kind": "command", "run": run, "resources": {"cpus": 1}}}})
    began = time.monotonic()
    command = [sys.executable, "-m", "medgen", "submit", str(spec), "--local"]
    with subprocess.Popen(command, cwd=tmp_path, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as submit:
        try:
            for jump, zone in ((0, "UTC"), (TWO_HOURS, "America/St_Johns"), (-TWO_HOURS, "Asia/Kathmandu")):
                replace_text(offset, str(jump))
                seen = wait_for_heartbeat(tmp_path, time.time() + jump, submit)
                record_property("fired", f"a heartbeat {seen - time.time():+.0f} s from now")
                environment["TZ"] = zone
                [task] = json.loads(medgen("watch", "clock", "--once", "--json", expect=4).stdout)["stages"]
                assert task["word"] == "running", task
        finally:
            flag.touch()
        assert submit.wait(timeout=60) == 0, submit.stdout
    at_most = time.monotonic() - began
    run_folder = only_run(tmp_path)
    [ended] = events(run_folder, "task_ended")
    outcome = json.loads((run_folder / "outcome" / "a.0.json").read_text())
    used = json.loads(medgen("usage", "clock", "--json").stdout)
    for seconds in (ended["seconds"], outcome["ended"] - outcome["started"], used["stages"][0]["cpu_hours"] * 3600):
        assert 5 < seconds <= at_most, (seconds, at_most, ended, outcome, used)


def replace_text(path: Path, text: str) -> None:
    """Whoever reads meanwhile gets the old or the new one."""
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


def wait_for_heartbeat(folder: Path, about: float, submit: subprocess.Popen[str]) -> float:
    """The time in the first heartbeat that was written by this clock."""
    deadline = time.monotonic() + 60
    while True:
        for path in (folder / "runs").glob("*/hb/a.0.json"):
            seen = float(json.loads(path.read_text())["time"])
            if abs(seen - about) < 600:
                return seen
        assert submit.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.fault("F45")
@pytest.mark.timeout(180)
def test_job_and_people_in_different_time_zones(lab: Lab, record_property: Record) -> None:  # noqa: F811
    """The job runs fourteen hours ahead of who looks; its log, the events, the queue and the accounting agree on when and how long."""
    lab.site({**SITE, "setup": ["export TZ=Pacific/Kiritimati"]})
    lab.environment["TZ"] = "Pacific/Honolulu"  # a day behind it, at the same time of day
    began = time.time()
    lab.submit(lab.spec("zones", {"a": {"kind": "command", "run": "date +%z > $MEDGEN_OUT/zone; sleep 3; exit 1"}}))
    lab.wait("zones", 90)
    record_property("fired", "the job was at " + (lab.run("zones") / "a" / "made" / "00000" / "zone").read_text().strip())
    [started], [ended] = lab.events("zones", "task_started"), lab.events("zones", "task_ended")
    assert began <= started["time"] <= ended["time"] <= time.time() and 3 <= ended["seconds"] < 90
    finding = json.loads(lab.medgen("why", "zones", "--json", expect=1).stdout)["findings"][0]
    assert (finding["cause"]["kind"], finding["attempt"]) == ("USER", 0), finding
    lab.medgen("watch", "zones", "--once", expect=1)
    used = lab.slurm.wait_for(lambda: (found := json.loads(lab.medgen("usage", "zones", "--json").stdout))["source"] == "accounting" and found, 30)
    [stage] = used["stages"]
    assert 3 / 3600 <= stage["cpu_hours"] < 90 * 8 / 3600 and 0 <= stage["wait_seconds"] < 90, used


@pytest.mark.fault("F45")
@pytest.mark.parametrize(("zone", "moment"), [("Europe/Berlin", "2026-10-25T00:30:00+00:00"), ("America/New_York", "2026-03-08T06:30:00+00:00")])
def test_an_hour_in_which_the_clock_is_changed(zone: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Record) -> None:
    """A job that ran from half past two to half past two: an hour, by its log as by its events, wherever it is read."""
    began = datetime.fromisoformat(moment).timestamp()
    run, log = RunDir(tmp_path / "dst-1"), tmp_path / "dst-1" / "logs" / "train" / "s0"
    log.mkdir(parents=True)
    shown = []
    for attempt, seconds in enumerate((began, began + 3600)):
        stamp = subprocess.run(["date", f"--date=@{seconds:.0f}", "+%FT%T%z"], env={"TZ": zone}, capture_output=True, text=True, check=True).stdout.strip()
        shown.append(stamp)
        with (log / "batch.log").open("a") as batch:
            batch.write(f"medgen: train shard 0 attempt {attempt} on n1 at {stamp}\n")
        (log / f"r0.a{attempt}.log").touch()
    record_property("fired", " -> ".join(shown))
    assert int(shown[1][11:13]) - int(shown[0][11:13]) in (0, 2), "an hour by the clock on the wall is none, or two"
    for reader in (zone, "Pacific/Apia"):
        monkeypatch.setenv("TZ", reader)
        time.tzset()
        assert [item.started for item in all_tries(run, "train", 0, [])] == [began, began + 3600]
    monkeypatch.undo()
    time.tzset()


def shown_of_a_node(folder: Path, clock_seconds: float, beats: int) -> list[str]:
    """What a living watch shows of a job that runs on a node whose clock is so much ahead, at each of its heartbeats."""
    watched = test_watch_slurm.Lab(folder)
    watched.row("RUNNING", start=-900)
    watched.started(890 - clock_seconds)
    reader, words = Reader(watched.run, watched.said), []
    for number in range(beats):
        watched.beat(-clock_seconds, step=40 + number)
        os.utime(watched.run.heartbeat_file("train", 0))
        watched.said.asked = time.time()
        words.append(next(stage for stage in reader.read().stages if stage.name == "train").tasks[0].word)
    return words


@pytest.mark.fault("F45")
@pytest.mark.parametrize("clock_seconds", [-45, -600, 2 * 3600])
def test_a_node_whose_clock_is_ahead_or_behind_is_not_lost(tmp_path: Path, clock_seconds: float, record_property: Record) -> None:
    assert shown_of_a_node(tmp_path, clock_seconds, beats=3) == ["running"] * 3
    record_property("fired", f"heartbeats {clock_seconds:+} s from now")


@pytest.mark.fault("F45")
def test_seconds_of_an_attempt_hold_whatever_the_clocks_say(tmp_path: Path, record_property: Record) -> None:
    """Its end was told by a clock that is behind, or ahead, of the one that told its start."""
    run, _ = build(tmp_path, [{"name": "train", "kind": "train"}])
    now = time.time()
    for attempt, told_later in enumerate((100, -7200, 7200)):
        files.append_line(run.events_file, json.dumps({"time": now, "event": "task_started", "stage": "train", "shard": 0, "attempt": attempt, "devices": 1, "from_step": 0}))
        files.append_line(run.events_file, json.dumps({
            "time": now + told_later, "event": "task_ended", "stage": "train", "shard": 0, "attempt": attempt, "status": "failed", "rc": 1, "cause": "no", "seconds": 95, "next": "", "again": False,
        }))  # fmt: skip
    record_property("fired", "ends two hours before and after their starts")
    told = read_tries(run.events())["train", 0]
    assert [round(item.seconds(now)) for item in told] == [95, 95, 95]
