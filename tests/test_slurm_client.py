"""What Slurm's commands print is understood in every version, and calling them is never a trap. No Slurm needed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medgen.launch import slurm
from medgen.launch.slurm import NodeSet, Partition, QueueRow

RECORDED = Path(__file__).parent / "slurm_recorded"


def recorded(name: str) -> str:
    return (RECORDED / f"{name}.txt").read_text()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Put a command of a few lines of bash first on PATH; returns the folder it may write into."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("THERE", str(tmp_path))

    def make(name: str, lines: str) -> Path:
        (folder / name).write_text(f"#!/bin/bash\necho x >> $THERE/calls\n{lines}\n")
        (folder / name).chmod(0o755)
        return tmp_path

    return make


def calls(folder: Path) -> int:
    return len((folder / "calls").read_text().split())


# --- the queue -------------------------------------------------------------------------------------------------------


def test_the_queue_of_a_real_22_05() -> None:
    rows = slurm.parse_queue(recorded("squeue-22.05"))
    by_job = {(row.job_id, row.array_task): row for row in rows}
    assert len(rows) == len(by_job) == 45 + 30
    assert by_job[75, None] == QueueRow(
        75, None, "RUNNING", "None", 1795271392, 1795273192, 118, 1795271392, "n1", "medgen.bravo_full-0a1b2c3d4e.train_seg.1.0"
    )
    assert [task for job, task in by_job if job == 77] == list(range(0, 89, 2))  # one line for all of them
    assert by_job[78, None].reason == "JobHeldUser"
    assert by_job[88, None].reason == "job requeued in held state"
    assert by_job[80, None].start is None
    assert {row.state for row in rows} == {"CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "PENDING", "RUNNING", "SUSPENDED", "TIMEOUT"}
    assert all(row.name.startswith("medgen.") for row in rows)


def test_the_queue_of_other_versions() -> None:
    old = {row.job_id: row for row in slurm.parse_queue(recorded("squeue-20.11"))}
    assert old[8005].reason == "ReqNodeNotAvail, UnavailableNodes:gpu-[05-08]"
    assert 8007 not in old
    assert [row.elapsed_seconds for row in slurm.parse_queue(recorded("squeue-20.11")) if row.array_task == 17] == [93784]
    newer = slurm.parse_queue(recorded("squeue-23.11"), "medgen.rflow-00ff00ff00.")
    assert [row.array_task for row in newer if row.state == "PENDING"] == [0, 4, 8, 12, 16, *range(20, 32), *range(40, 100, 3)]
    assert {row.state for row in newer} == {"CONFIGURING", "PENDING", "REQUEUE_HOLD", "OUT_OF_MEMORY", "STAGE_OUT"}
    newest = {row.job_id: row for row in slurm.parse_queue(recorded("squeue-24.11"))}
    assert newest[412].nodes == "n[1-3,7]"
    assert newest[412].elapsed_seconds == 3 * 86400 - 1


def test_only_what_cannot_change_any_more_is_terminal() -> None:
    rows = [row for name in ("20.11", "22.05", "23.11", "24.11") for row in slurm.parse_queue(recorded(f"squeue-{name}"))]
    going_on = {row.state for row in rows} - slurm.TERMINAL_STATES
    assert going_on == {"RUNNING", "PENDING", "COMPLETING", "SUSPENDED", "CONFIGURING", "REQUEUE_HOLD", "STAGE_OUT", "POWER_UP_NODE", "SPECIAL_EXIT"}
    assert "A_STATE_OF_NEXT_YEAR" not in slurm.TERMINAL_STATES
    assert "REQUEUED" not in slurm.TERMINAL_STATES


def test_lines_that_are_no_rows_do_no_harm() -> None:
    text = "squeue: warning: something\n\n1|2|3\nx|N/A|RUNNING|None|N/A|N/A|0:00|N/A||medgen.a-0.b.1.0\n" + recorded("squeue-24.11")
    assert len(slurm.parse_queue(text)) == 5


@given(st.sets(st.integers(0, 20000), min_size=1, max_size=40), st.integers(1, 99), st.booleans())
def test_array_expressions(numbers: set[int], limit: int, brackets: bool) -> None:
    """Written as Slurm does: runs as a-b, a `%limit` behind, brackets in sacct and none in squeue."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) + f"%{limit}"
    assert slurm.expand_tasks(f"[{text}]" if brackets else text) == sorted(numbers)


@given(st.integers(0, 500), st.integers(1, 60), st.integers(1, 50))
def test_stepped_array_expressions(first: int, count: int, step: int) -> None:
    numbers = list(range(first, first + count * step, step))
    assert slurm.expand_tasks(f"{first}-{numbers[-1]}:{step}%3") == numbers


@given(st.sets(st.integers(0, 5000), min_size=20, max_size=60), st.integers(3, 60))
def test_a_truncated_expression_invents_nothing(numbers: set[int], length: int) -> None:
    text = ",".join(str(number) for number in sorted(numbers))
    assert set(slurm.expand_tasks(f"[{text[:length]}...]")) <= numbers | {None}


@given(st.text(max_size=60))
def test_no_expression_is_a_trap(text: str) -> None:
    """Garbage and huge ranges must not take the memory of a login node."""
    assert len(slurm.expand_tasks(text)) >= 1


@pytest.mark.parametrize(("text", "numbers"), [("N/A", [None]), ("", [None]), ("7", [7]), ("[1-89:44]", [1, 45, 89]), ("1,3,5-9...", [1, 3]), ("9-1", [None]), ("0-999999999999", [None])])
def test_single_expressions(text: str, numbers: list[int | None]) -> None:
    assert slurm.expand_tasks(text) == numbers


# --- the accounting --------------------------------------------------------------------------------------------------


def test_the_accounting_of_a_real_22_05() -> None:
    rows = {(row.job_id, row.array_task): row for row in slurm.parse_accounting(recorded("sacct-22.05"))}
    seg = rows[75, None]
    assert (seg.state, seg.gpus, seg.cpus, seg.nodes, seg.node_list, seg.end, seg.elapsed_seconds > 0) == ("RUNNING", 2, 2, 1, "n1", None, True)
    assert (rows[76, 1].state, rows[76, 1].exit_code, rows[76, 1].max_rss_mebibytes) == ("FAILED", 1, pytest.approx(3176 / 1024, abs=0.001))
    oom = rows[89, None]
    assert (oom.exit_code, oom.requested_mem_mebibytes, oom.total_cpu_seconds) == (9, 20, 0.658)
    assert oom.max_rss_mebibytes == pytest.approx(218296 / 1024, abs=0.001)  # of its step, not of the batch shell
    assert (rows[86, None].state, rows[86, None].start, rows[86, None].node_list) == ("CANCELLED", None, "")
    assert rows[85, None].state == "TIMEOUT"
    assert rows[80, None].reason == "Dependency"
    assert [task for job, task in rows if job == 77] == list(range(0, 89, 2))
    assert rows[83, None].name == "someone|elses job"


def test_lives_before_a_requeue() -> None:
    lives = [row for row in slurm.parse_accounting(recorded("sacct-22.05-duplicates")) if row.job_id == 101]
    assert [(row.state, row.gpus, row.elapsed_seconds) for row in lives] == [("PREEMPTED", 4, 9), ("NODE_FAIL", 4, 3), ("CANCELLED", 4, 43)]
    assert [row.max_rss_mebibytes for row in lives] == [pytest.approx(4712 / 1024, abs=0.001), None, pytest.approx(4664 / 1024, abs=0.001)]  # each with its own steps
    assert [row.state for row in slurm.parse_accounting(recorded("sacct-22.05")) if row.job_id == 101] == ["CANCELLED"]


def test_the_accounting_of_other_versions() -> None:
    old = {(row.job_id, row.array_task): row for row in slurm.parse_accounting(recorded("sacct-20.11"))}
    assert (old[8001, None].gpus, old[8001, None].requested_mem_mebibytes) == (8, 2 * 180 * 1024)  # per node
    assert (old[8002, 16].signal, old[8002, 16].requested_mem_mebibytes) == (125, 8 * 4000)  # per CPU
    assert old[8002, 16].max_rss_mebibytes == pytest.approx(32767992 / 1024)
    assert (old[8004, None].state, old[8004, None].total_cpu_seconds) == ("TIMEOUT", 3 * 86400 + 19 * 3600 + 12 * 60 + 1)
    assert old[8010, None].state == "CANCELLED"
    half = old[8011, None]
    assert half.state not in slurm.TERMINAL_STATES
    assert half.name == "allocation"
    newer = slurm.parse_accounting(recorded("sacct-23.11"))
    assert [row.gpus for row in newer] == [1, 2, 2, 2]
    assert newer[0].max_rss_mebibytes == pytest.approx(66998016 / 1024)
    newest = slurm.parse_accounting(recorded("sacct-24.11"))
    assert [(row.job_id, row.array_task, row.state, row.exit_code, row.signal) for row in newest] == [
        (412, None, "DEADLINE", 0, 0), (413, 7, "FAILED", 137, 0), (414, None, "BOOT_FAIL", 0, 1),
    ]  # fmt: skip
    assert (newest[0].cpus, newest[0].requested_mem_mebibytes) == (2048, None)


def test_many_ids_are_asked_for_in_pieces(stand_in: Callable[[str, str], Path]) -> None:
    folder = stand_in("sacct", 'printf "%s\\n" "$*" >> $THERE/arguments')
    slurm.accounting(range(1, 2502), time.time())
    lines = (folder / "arguments").read_text().splitlines()
    assert len(lines) == 3
    assert all(len(line) < 100_000 and "--json" not in line and " -D" not in line for line in lines)
    slurm.accounting([1], 0.0, duplicates=True)
    assert (folder / "arguments").read_text().splitlines()[-1].endswith(" -D")
    slurm.accounting([], 0.0)
    assert calls(folder) == 4


# --- the cluster -----------------------------------------------------------------------------------------------------


def test_partitions() -> None:
    gpuq, low, down = slurm.parse_partitions(recorded("sinfo-22.05"))
    assert gpuq == Partition("GPUQ", True, True, 7 * 24 * 60, (NodeSet(1, 8, 8000, 4, ("a100", "gpu40g")), NodeSet(1, 8, 8000, 4, ("h100", "gpu80g"))))
    assert (low.is_default, low.time_limit_minutes) == (False, None)
    assert (down.is_up, down.time_limit_minutes) == (False, 30)
    old = slurm.parse_partitions(recorded("sinfo-20.11"))
    assert [node_set.gpus for partition in old for node_set in partition.node_sets] == [4, 4, 0]
    assert old[0].node_sets[1].features == ()
    newest = slurm.parse_partitions(recorded("sinfo-24.11"))
    assert [[node_set.gpus for node_set in partition.node_sets] for partition in newest] == [[4], [7], []]
    assert not newest[2].is_up


def test_config() -> None:
    known = slurm.parse_config(recorded("config-22.05"))
    assert (known["MaxArraySize"], known["ClusterName"], known["AuthInfo"]) == ("20001", "lab", "socket=/run/lab/munge/sock,cred_expire=5")


@pytest.mark.parametrize(("text", "seconds"), [("0:00", 0), ("59:59", 3599), ("1:00:00", 3600), ("1-02:03:04", 93784), ("00:01.250", 1.25), ("INVALID", None), ("UNLIMITED", None), ("", None)])
def test_durations(text: str, seconds: float | None) -> None:
    assert slurm.parse_elapsed(text) == seconds


@given(st.integers(1, 2**31))
def test_times_in_both_formats(seconds: int) -> None:
    assert slurm.parse_time(str(seconds)) == seconds
    local = datetime.fromtimestamp(seconds)
    if local.fold == 0:  # the hour that comes twice in autumn has no way back
        assert slurm.parse_time(local.strftime("%Y-%m-%dT%H:%M:%S")) == seconds


@pytest.mark.parametrize("text", ["N/A", "NONE", "None", "Unknown", "", "0", "tomorrow", "2026-13-45T00:00:00"])
def test_no_time(text: str) -> None:
    assert slurm.parse_time(text) is None


# --- calling ---------------------------------------------------------------------------------------------------------


def test_a_missing_command_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(slurm.SlurmMissing, match=r"squeue: .* not on PATH; .* login node"):
        slurm.queue()


def test_the_commands_see_no_enclosing_job_and_no_habits(stand_in: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SQUEUE_FORMAT", "SACCT_FORMAT", "SLURM_CLUSTERS", "SLURM_JOB_ID", "SLURM_CPU_BIND", "SBATCH_PARTITION", "SLURM_TIME_FORMAT"):
        monkeypatch.setenv(name, "relative")
    monkeypatch.setenv("SLURM_CONF", "/somewhere/slurm.conf")
    monkeypatch.setenv("LC_ALL", "nb_NO.UTF-8")
    folder = stand_in("squeue", "env > $THERE/environment")
    slurm.queue()
    seen = dict(line.split("=", 1) for line in (folder / "environment").read_text().splitlines() if line.startswith(("S", "LC")) and "=" in line)
    shell = {name: value for name, value in seen.items() if name not in ("SHLVL", "SHELL", "SSL_CERT_FILE")}
    expected = {"SLURM_CONF": "/somewhere/slurm.conf", "SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0", "LC_ALL": "C"}
    assert {name: value for name, value in shell.items() if name.startswith(("SLURM", "SQ", "SA", "SB", "LC_ALL"))} == expected


def test_a_given_environment_is_used_as_it_is(stand_in: Callable[[str, str], Path]) -> None:
    stand_in("sbatch", 'echo "$LC_ALL$SLURM_TIME_FORMAT$MINE"')
    assert slurm.call(["sbatch"], environment={"PATH": os.environ["PATH"], "THERE": os.environ["THERE"], "MINE": "yes"}).stdout == "yes\n"


@pytest.mark.parametrize("words", ["Socket timed out on send/recv operation", "Unable to contact slurm controller (connect failure)", "x: Connection refused"])
def test_passing_troubles_are_tried_again(stand_in: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setattr(slurm, "PAUSE_SECONDS", 0.01)
    folder = stand_in("squeue", f'[ "$(wc -l < $THERE/calls)" -lt 3 ] && {{ echo "slurm_load_jobs error: {words}" >&2; exit 1; }}; cat {RECORDED}/squeue-24.11.txt')
    assert len(slurm.queue()) == 5
    assert calls(folder) == 3


def test_tries_end(stand_in: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "PAUSE_SECONDS", 0.01)
    folder = stand_in("squeue", 'echo "Socket timed out" >&2; exit 1')
    with pytest.raises(slurm.SlurmError, match=r"squeue .*exit code 1: Socket timed out$"):
        slurm.queue()
    assert calls(folder) == 3


def test_other_failures_are_not_repeated(stand_in: Callable[[str, str], Path]) -> None:
    folder = stand_in("sacct", 'echo "Slurm accounting storage is disabled" >&2; exit 1')
    with pytest.raises(slurm.SlurmError, match="accounting storage is disabled"):
        slurm.accounting([1], 0.0)
    assert calls(folder) == 1


def test_what_does_not_answer_is_killed_with_all_it_started(stand_in: Callable[[str, str], Path]) -> None:
    folder = stand_in("squeue", 'sleep 300 & echo $! > $THERE/child; wait')
    began = time.monotonic()
    with pytest.raises(slurm.SlurmTimeout, match="did not answer within 1 s"):
        slurm.query(["squeue"], 1)
    assert time.monotonic() - began < 30
    assert calls(folder) == 1
    child = int((folder / "child").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and " Z " not in Path(f"/proc/{child}/stat").read_text():
        assert time.monotonic() < deadline, "its child lives on"
        time.sleep(0.05)


def test_a_job_that_has_ended_needs_no_cancelling(stand_in: Callable[[str, str], Path]) -> None:
    folder = stand_in("scancel", 'echo "$@" >> $THERE/arguments; echo "scancel: error: Kill job error on job id 7: Invalid job id specified" >&2; exit 1')
    slurm.cancel([7, "8_3"])
    slurm.signal_steps([7], "USR2")
    assert (folder / "arguments").read_text().splitlines() == ["--quiet 7 8_3", "--quiet --signal=USR2 7"]
    stand_in("scancel", 'echo "Invalid job id specified" >&2; echo "Access/permission denied" >&2; exit 1')
    with pytest.raises(slurm.SlurmError, match="permission denied"):
        slurm.cancel([7, 8])
    stand_in("scontrol", 'echo "$@" >> $THERE/arguments; echo "Job has already finished for job 4" >&2; echo "slurm_suspend error: Job has already finished" >&2; exit 1')
    slurm.release([4, 5])
    assert (folder / "arguments").read_text().splitlines()[-1] == "release 4,5"


def test_bytes_that_are_no_text_do_no_harm(stand_in: Callable[[str, str], Path]) -> None:
    stand_in("squeue", r"printf '1|N/A|RUNNING|None|N/A|N/A|0:01|N/A|n\xff1|medgen.a-0.b.1.0\n'")
    assert [row.state for row in slurm.queue()] == ["RUNNING"]
