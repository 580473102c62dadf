"""The local backend with real scripts and processes: order, slots, retries, signals, kill -9, no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launch_stub
import pytest
from launch_stub import build, calls, events, wait_until

from medgen.errors import Exit, MedgenError
from medgen.launch import local
from medgen.launch.local import LocalBackend, cancel
from medgen.launch.processes import marked, start_ticks
from medgen.launch.supervisor import living_supervisor
from medgen.rundir import RunDir

CHAIN = [
    {"name": "train", "kind": "train"},
    {"name": "images", "kind": "generate", "tasks": 3, "needs": ["train"]},
    {"name": "collect_images", "kind": "collect", "needs": ["images"], "of": "images"},
    {"name": "report", "kind": "report", "needs": ["collect_images"]},
]


def backend(folder: Path, cpus: int = 2, gpus: int = 0) -> LocalBackend:
    return LocalBackend(cpus, gpus, python=launch_stub.interpreter(folder))


def start_supervisor(run: RunDir, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "supervise_stub.py"), str(run.root), launch_stub.interpreter(folder)],
        env={**os.environ, "PYTHONPATH": str(launch_stub.REPOSITORY)}, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_stages_run_in_order_and_a_second_submit_does_nothing(tmp_path: Path) -> None:
    run, plan = build(tmp_path, CHAIN)
    assert backend(tmp_path).submit(run, plan) == Exit.DONE
    assert [name for name, *_ in calls(run)] == ["train", "images", "images", "images", "collect_images", "report"]
    assert backend(tmp_path).submit(run, plan) == Exit.DONE
    assert len(calls(run)) == 6
    assert not marked(run.root)
    assert living_supervisor(run) is None


def test_only_what_is_missing_runs_again(tmp_path: Path) -> None:
    run, plan = build(tmp_path, CHAIN)
    backend(tmp_path).submit(run, plan)
    (run.shard("images", 1) / "image.bin").write_bytes(b"")  # another size: no longer what the outcome says
    assert backend(tmp_path).submit(run, plan) == Exit.DONE
    assert calls(run)[6:] == [("images", 1, 1, 0)]


def test_a_crash_is_tried_once_more_with_a_log_of_its_own(tmp_path: Path) -> None:
    run, plan = build(tmp_path, CHAIN[:1], {"train": {"crashes": 1}})
    assert backend(tmp_path).submit(run, plan) == Exit.DONE
    assert calls(run) == [("train", 0, 0, 0), ("train", 0, 1, 0)]
    ended = events(run, "task_ended")
    assert [event["status"] for event in ended] == ["failed", "done"]
    assert "exit code 1: ValueError: the stub was told to crash" in ended[0]["cause"]
    assert ended[0]["log"] == "logs/train/s0/r0.a0.log"
    assert run.log("train", 0, 0, 1).exists()


def test_a_stage_that_fails_for_good_stops_its_dependents_only(tmp_path: Path) -> None:
    stages = [*CHAIN, {"name": "other", "kind": "train"}]
    run, plan = build(tmp_path, stages, {"train": {"told_failures": 9}})
    assert backend(tmp_path).submit(run, plan) == Exit.FAILED
    assert {name for name, *_ in calls(run)} == {"train", "other"}
    assert "the stub cannot do it" in {event["cause"] for event in events(run, "task_ended")}
    assert [event["stage"] for event in events(run, "stage_blocked")] == ["images", "collect_images", "report"]
    assert sum(name == "train" for name, *_ in calls(run)) == 2


def test_wrong_input_is_never_tried_again(tmp_path: Path) -> None:
    run, plan = build(tmp_path, CHAIN[:1], {"train": {"told_failures": 9, "code": 2}})
    assert backend(tmp_path).submit(run, plan) == Exit.FAILED
    assert len(calls(run)) == 1


def test_exit_code_0_without_an_outcome_is_a_failure(tmp_path: Path) -> None:
    run, plan = build(tmp_path, CHAIN[:1], {"train": {"silent": True}})
    assert backend(tmp_path).submit(run, plan) == Exit.FAILED
    assert "no outcome that verifies" in events(run, "task_ended")[0]["cause"]


def test_collect_sends_one_shard_back(tmp_path: Path) -> None:
    run, plan = build(tmp_path, CHAIN, {"collect_images": {"send_back": 1, "of": "images"}})
    assert backend(tmp_path).submit(run, plan) == Exit.DONE
    assert [call[:2] for call in calls(run)[4:]] == [("collect_images", 0), ("images", 1), ("collect_images", 0), ("report", 0)]


def test_collect_sends_back_twice_at_most(tmp_path: Path) -> None:
    run, plan = build(tmp_path, CHAIN, {"collect_images": {"send_back": 9, "of": "images"}})
    assert backend(tmp_path).submit(run, plan) == Exit.FAILED
    assert sum(name == "collect_images" for name, *_ in calls(run)) == 3


def overlap(run: RunDir) -> int:
    """The largest number of tasks that ran at once."""
    changes = [(event["time"], 1) for event in events(run, "task_started")] + [(event["time"], -1) for event in events(run, "task_ended")]
    running, most = 0, 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most


@pytest.mark.parametrize(("parallel", "cpus", "threads", "expected"), [(4, 2, 1, 2), (1, 4, 1, 1), (4, 3, 2, 1), (4, 2, 64, 1)])
def test_slots_bound_what_runs_at_once(tmp_path: Path, parallel: int, cpus: int, threads: int, expected: int) -> None:
    stage = {"name": "images", "kind": "generate", "tasks": 4, "parallel": parallel, "threads": threads}
    run, plan = build(tmp_path, [stage], {"images": {"seconds": 0.3}})
    assert backend(tmp_path, cpus=cpus).submit(run, plan) == Exit.DONE
    assert overlap(run) == expected


def test_gpus_are_handed_out_by_index_and_hidden_from_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    stages = [{"name": "images", "kind": "generate", "tasks": 3, "gpus": 1}, {"name": "report", "kind": "report"}]
    wanted = {"env": ["CUDA_VISIBLE_DEVICES"], "seconds": 0.5}
    run, plan = build(tmp_path, stages, {"images": wanted, "report": wanted})
    assert backend(tmp_path, cpus=8, gpus=2).submit(run, plan) == Exit.DONE
    seen = [run.log("images", shard, 0, 0).read_text().split('"')[3] for shard in range(3)]
    assert sorted(seen[:2]) == ["4", "6"]
    assert seen[2] in ("4", "6")
    assert '"CUDA_VISIBLE_DEVICES": ""' in run.log("report", 0, 0, 0).read_text()


def test_ranks_see_the_environment_of_slurm_and_not_that_of_an_outer_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CPU_BIND", "quiet,mask_cpu:0x1")
    names = ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_CPU_BIND", "OMP_NUM_THREADS", "MASTER_ADDR", "SLURM_ARRAY_TASK_ID"]
    run, plan = build(tmp_path, [{"name": "train", "kind": "train", "ranks": 2}], {"train": {"env": names}})
    assert backend(tmp_path).submit(run, plan) == Exit.DONE
    text = run.log("train", 0, 1, 0).read_text()
    for part in ('"SLURM_PROCID": "1"', '"SLURM_NTASKS": "2"', '"SLURM_CPU_BIND": null', '"MASTER_ADDR": "127.0.0.1"', '"SLURM_ARRAY_TASK_ID": null'):
        assert part in text


def test_a_dead_rank_takes_the_hanging_one_with_it(tmp_path: Path) -> None:
    run, plan = build(tmp_path, [{"name": "train", "kind": "train", "ranks": 2}], {"train": {"crashes": 9, "crash_ranks": [1], "hanging_ranks": [0]}})
    started = time.monotonic()
    assert backend(tmp_path).submit(run, plan) == Exit.FAILED
    assert time.monotonic() - started < 20  # two tries, each over within seconds and not after 300
    assert events(run, "task_ended")[0]["rc"] == 1
    assert events(run, "task_ended")[0]["log"] == "logs/train/s0/r1.a0.log"
    assert not marked(run.root)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_tasks_save_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    run, plan = build(tmp_path, [{"name": "train", "kind": "train", "ranks": 2}], {"train": {"seconds": 60, "steps": 600, "child": True}})
    supervisor = start_supervisor(run, tmp_path)
    wait_until(lambda: len(calls(run)) == 2)
    time.sleep(0.2)
    os.killpg(supervisor.pid, number)
    assert supervisor.wait(15) == Exit.INTERRUPTED
    assert run.read_outcome("train", 0).cause == "stopped by SIGTERM"  # type: ignore[union-attr]
    [ended] = events(run, "task_ended")
    assert (ended["cause"], ended["next"]) == ("stopped", "waits for the next submit"), "the user sent no SIGTERM"
    assert not marked(run.root)
    (run.root / "behaviour.json").write_text("{}")
    assert backend(tmp_path).submit(run, plan) == Exit.DONE


def test_a_deaf_task_is_killed_after_the_grace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, plan = build(tmp_path, CHAIN[:1], {"train": {"seconds": 60, "steps": 600, "deaf": True}})
    monkeypatch.setattr(local, "SAVE_SECONDS", 1)
    one = backend(tmp_path)
    # asked to stop from inside the loop, as a signal handler would
    one.display = lambda: setattr(one, "stop_asked", len(calls(run)))
    started = time.monotonic()
    assert one.submit(run, plan) == Exit.INTERRUPTED
    assert time.monotonic() - started < 15
    assert not marked(run.root)


def test_a_second_signal_does_not_wait_for_saving(tmp_path: Path) -> None:
    run, _ = build(tmp_path, CHAIN[:1], {"train": {"seconds": 60, "steps": 600, "deaf": True}})
    supervisor = start_supervisor(run, tmp_path)
    wait_until(lambda: len(calls(run)) == 1)
    supervisor.send_signal(signal.SIGINT)
    wait_until(lambda: events(run, "stopping"))
    time.sleep(0.5)
    assert supervisor.poll() is None
    supervisor.send_signal(signal.SIGINT)
    assert supervisor.wait(5) == Exit.INTERRUPTED
    assert events(run, "task_ended")[-1]["cause"] == "stopped before it could save"
    assert not marked(run.root)


def test_kill_9_of_the_supervisor_leaves_nothing_and_the_run_goes_on(tmp_path: Path) -> None:
    run, plan = build(tmp_path, [{"name": "train", "kind": "train", "ranks": 2}], {"train": {"seconds": 60, "steps": 600, "child": True}})
    supervisor = start_supervisor(run, tmp_path)
    wait_until(lambda: len(calls(run)) == 2)
    ranks = [int(line.split()[-1]) for line in (run.root / "calls.txt").read_text().splitlines()]
    supervisor.kill()
    supervisor.wait()
    wait_until(lambda: not any(start_ticks(pid) for pid in ranks), 5)
    assert living_supervisor(run) is None
    (run.root / "behaviour.json").write_text("{}")
    assert backend(tmp_path).submit(run, plan) == Exit.DONE
    assert not marked(run.root)  # not even the children of the ranks
    assert [event["cause"] for event in events(run, "task_ended")] == ["its supervisor was killed, or the machine went down", None]
    assert events(run, "task_ended")[0]["cause_kind"] == "LOST"


def test_two_submits_at_once_run_everything_once(tmp_path: Path) -> None:
    run, _ = build(tmp_path, CHAIN, {"train": {"seconds": 1.5, "steps": 3}})
    both = [start_supervisor(run, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0] for process in both]
    assert sorted(process.returncode for process in both) == [Exit.DONE, 10]
    assert "already running here" in "".join(outputs)
    assert len(calls(run)) == 6


def test_cancel_stops_a_running_run(tmp_path: Path) -> None:
    run, _ = build(tmp_path, CHAIN[:1], {"train": {"seconds": 60, "steps": 600}})
    supervisor = start_supervisor(run, tmp_path)
    wait_until(lambda: len(calls(run)) == 1)
    assert "stopped" in cancel(run)
    assert supervisor.wait(10) == Exit.INTERRUPTED
    assert events(run, "cancelled")
    assert "nothing is running" in cancel(run)


def test_an_enclosing_failing_setup_line_fails_the_task(tmp_path: Path) -> None:
    import dataclasses

    run, plan = build(tmp_path, CHAIN[:1])
    assert backend(tmp_path).submit(run, dataclasses.replace(plan, stages=[dataclasses.replace(plan.stages[0], setup=["module-that-is-not-there load x"])])) == Exit.FAILED
    assert not calls(run)
    assert "exit code 127" in events(run, "task_ended")[0]["cause"]
    assert events(run, "task_ended")[0]["log"].endswith("batch.log")


def test_a_detached_run_outlives_the_session_that_started_it(tmp_path: Path) -> None:
    run, _ = build(tmp_path, [{"name": "train", "kind": "train"}], {"train": {"seconds": 3, "steps": 30}})
    run.code.mkdir()
    (run.code / "__main__.py").write_text(f"import runpy, sys; sys.argv.insert(0, ''); sys.path.insert(0, {str(launch_stub.REPOSITORY)!r}); runpy.run_path({launch_stub.__file__!r}, run_name='__main__')")
    program = f"from pathlib import Path; from medgen.launch.local import detach; from medgen.rundir import RunDir; print(detach(RunDir(Path({str(run.root)!r})), 2, 0))"
    starter = subprocess.Popen([sys.executable, "-c", program], cwd=launch_stub.REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True)
    told, _ = starter.communicate(timeout=30)
    assert "runs in the background" in told
    with pytest.raises(ProcessLookupError):  # nothing is left in its session for a hang-up to reach
        os.killpg(starter.pid, signal.SIGHUP)
    with pytest.raises(local.AlreadyRunning):
        local.detach(run, 2, 0)
    wait_until(lambda: living_supervisor(run) is None, 30)
    assert run.read_outcome("train", 0).status == "done"  # type: ignore[union-attr]


def test_a_file_that_cannot_be_read_is_not_told_as_one_that_cannot_be_written(tmp_path: Path) -> None:
    run, plan = build(tmp_path, CHAIN[:1])
    loop = run.root / "events.jsonl"
    loop.unlink(missing_ok=True)
    loop.symlink_to(loop)
    with pytest.raises(MedgenError, match=r"events\.jsonl: cannot be read, everything was stopped: .*chmod u\+r.*medgen fsck"):
        backend(tmp_path).submit(run, plan)
