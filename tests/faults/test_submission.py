"""Faults around sbatch on a real Slurm: killed submits, lost replies, chains of jobs, odd places to submit from, code that changes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_NET
from slurm.test_submit import EVERY_TASK_ONCE, GRAPH, SITE, Lab, lab  # noqa: F401  (a fixture)

from medgen import files
from medgen.launch import snapshot

Record = Callable[[str, object], None]
LOST_REPLY = '"$real" "$@"; echo "$*" >> $folder/lost; echo "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation" >&2; exit 1'
WAITING = 'for _ in $(seq 600); do [ -e "$MEDGEN_RUN/go" ] && break; sleep 0.2; done'
# one task that three jobs may do, and what needs it
CHAIN: dict[str, Any] = {
    "a": {"kind": "command", "segments": 3, "run": f"{WAITING}; echo start >> $MEDGEN_OUT/starts", "resources": {"time": "10m", "mem": "100M"}},
    "b": {"kind": "command", "needs": ["a"], "run": "cat $MEDGEN_RUN/a/made/00000/starts > $MEDGEN_OUT/seen", "resources": {"time": "5m", "mem": "100M"}},
}
CHAIN_ONCE = Counter({"a.0-1": 1, "a.0-2": 1, "a.0-3": 1, "b.0": 1})


@contextmanager
def armed(lab: Lab, fault: str) -> Iterator[Path]:  # noqa: F811
    """Yields the file that gets a line when the fault happens."""
    log = lab.folder / "faults.log"
    lab.environment.update(MEDGEN_FAULT=fault, MEDGEN_FAULT_LOG=str(log))
    try:
        yield log
    finally:
        del lab.environment["MEDGEN_FAULT"], lab.environment["MEDGEN_FAULT_LOG"]


def killed_submit(lab: Lab, spec: Path, fault: str) -> str:  # noqa: F811
    """What the fault told when it killed a submit."""
    with armed(lab, f"{fault},action=kill9") as log:
        before = log.read_text() if log.exists() else ""
        lab.submit(spec, expect=-9)
        return log.read_text().removeprefix(before).strip()


def assert_nothing_runs(lab: Lab, name: str, jobs: int) -> None:  # noqa: F811
    assert len({row["id"] for row in lab.jobs(name)}) == jobs
    assert {row["state"] for row in lab.jobs(name)} == {"PENDING"}
    assert not lab.events(name, "task_started")


def chain_jobs(lab: Lab, name: str) -> Counter[str]:  # noqa: F811
    """`stage.offset-segment` -> how many jobs were ever made of it."""
    return Counter(".".join(row["name"].split(".")[2::2][:2]) for row in lab.jobs(name))


def alive_in_order(lab: Lab, name: str) -> list[dict[str, str]]:  # noqa: F811
    return sorted(lab.alive(name), key=lambda row: int(row["id"]))


def go(lab: Lab, name: str) -> None:  # noqa: F811
    (lab.run(name) / "go").touch()


def assert_completed_by_the_next(lab: Lab, spec: Path, record_property: Record) -> None:  # noqa: F811
    killed_at = time.monotonic()
    lab.submit(spec)
    lab.wait("killed")
    lab.assert_done("killed")
    record_property("recovery_seconds", time.monotonic() - killed_at)
    assert lab.tasks("killed") == EVERY_TASK_ONCE


# --- killed submits --------------------------------------------------------------------------------------------------


@pytest.mark.fault("F20", "F22")
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_submits_that_are_killed_one_after_the_other_each_add_one_job(lab: Lab, record_property: Record) -> None:  # noqa: F811
    spec = lab.spec("killed", GRAPH)
    fired = []
    for jobs in (1, 2, 3):
        fired.append(killed_submit(lab, spec, "site=submit.after_sbatch,nth=1"))
        assert_nothing_runs(lab, "killed", jobs)
    assert all(line.startswith("submit.after_sbatch kill9") for line in fired)
    record_property("fired", "; ".join(fired))
    assert_completed_by_the_next(lab, spec, record_property)


@pytest.mark.fault("F20", "F22")
@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("site", "call"), [("submit.before_record", 1), ("submit.after_sbatch", 2), ("submit.before_record", 3)])
def test_a_submit_that_is_killed_at_any_sbatch_is_completed_by_the_next(lab: Lab, site: str, call: int, record_property: Record) -> None:  # noqa: F811
    spec = lab.spec("killed", GRAPH)
    record_property("fired", killed_submit(lab, spec, f"site={site},nth={call}"))
    assert_nothing_runs(lab, "killed", call)
    assert len(lab.events("killed", "job_submitted")) == call - 1
    assert_completed_by_the_next(lab, spec, record_property)


# --- a chain of jobs for one task ------------------------------------------------------------------------------------


@pytest.mark.fault("F19", "F20", "F22")
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_chain_is_queued_once_in_order_over_a_kill_and_lost_replies(lab: Lab, record_property: Record) -> None:  # noqa: F811
    lab.site({**SITE, "restart": "chain"})
    spec = lab.spec("chain", CHAIN)
    shown = lab.submit(spec, "--dry-run").stdout
    assert "a.0.sh (3 times, each waits for the one before)" in shown
    told = killed_submit(lab, spec, "site=submit.before_record,nth=2")
    assert_nothing_runs(lab, "chain", 2)
    folder = lab.shim("sbatch", LOST_REPLY)
    lab.submit(spec)
    lab.unshim()
    lost = (folder / "lost").read_text().splitlines()
    assert len(lost) == 2, "what is missing, and nothing else"
    record_property("fired", f"{told}; {len(lost)} lost replies")
    assert chain_jobs(lab, "chain") == CHAIN_ONCE

    lab.submit(spec)
    assert chain_jobs(lab, "chain") == CHAIN_ONCE, "nothing is missing any more"
    rows = alive_in_order(lab, "chain")
    assert [row["name"].split(".")[4] for row in rows] == ["0-1", "0-2", "0-3", "0"]
    assert [re.sub(r"\(.*?\)", "", row["dependency"]) for row in rows[1:]] == [f"afterany:{rows[0]['id']}", f"afterany:{rows[1]['id']}", f"afterok:{rows[2]['id']}"]
    for row in rows:
        kept = lab.slurm.run("scontrol", "write", "batch_script", row["id"], "-").stdout
        submission = row["name"].split(".")[3]
        assert kept.rstrip("\n").replace(f".{submission}.0.", ".1.0.", 1) in shown, "the first submit made two of them, the second the others"

    lab.slurm.wait_for(lambda: lab.events("chain", "task_started"))
    state = json.loads(lab.medgen("watch", "chain", "--once", "--json", expect=4).stdout)
    assert [(stage["name"], [task["word"] for task in stage["tasks"]]) for stage in state["stages"]] == [("a", ["running"]), ("b", ["queued"])]
    assert state["stages"][0]["tasks"][0]["job"] == rows[0]["id"], "the job of the chain that runs"
    go(lab, "chain")
    lab.wait("chain")
    lab.assert_done("chain")
    assert (lab.run("chain") / "b" / "made" / "00000" / "seen").read_text() == "start\n", "the later jobs of the chain had nothing to do"
    assert {row["state"] for row in lab.jobs("chain")} == {"COMPLETED"}
    assert "done already" in lab.submit(spec).stdout
    assert chain_jobs(lab, "chain") == CHAIN_ONCE


@pytest.mark.fault("F15")
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_cancel_ends_a_whole_chain_and_submit_queues_it_anew(lab: Lab, record_property: Record) -> None:  # noqa: F811
    lab.site({**SITE, "restart": "chain"})
    spec = lab.spec("ended", CHAIN)
    lab.submit(spec)
    lab.slurm.wait_for(lambda: lab.events("ended", "task_started"))
    began = time.monotonic()
    said = lab.medgen("cancel", "ended").stdout
    record_property("recovery_seconds", time.monotonic() - began)
    assert "2 tasks taken out of the queue" in said
    record_property("fired", said.strip())
    assert not lab.alive("ended")
    [end] = lab.events("ended", "task_ended")
    assert (end["status"], end["cause_kind"], end["again"]) == ("interrupted", "CANCELLED", False)
    assert len(lab.events("ended", "task_started")) == 1, "no later job of the chain took it up"
    lab.submit(spec)
    assert [row["name"].split(".")[4] for row in alive_in_order(lab, "ended")] == ["0-1", "0-2", "0-3", "0"]
    go(lab, "ended")
    lab.wait("ended")
    lab.assert_done("ended")


@pytest.mark.fault("F1")
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_next_job_of_a_chain_goes_on_after_a_limit_that_nobody_heeded(lab: Lab, record_property: Record) -> None:  # noqa: F811
    """The command takes no notice of the warning: Slurm ends the job, and that is no failure as long as the chain goes on."""
    lab.site({**SITE, "restart": "chain"})
    run = "echo start >> $MEDGEN_OUT/starts; [ $(wc -l < $MEDGEN_OUT/starts) -gt 1 ] || { trap '' USR2 TERM; sleep 300; }"
    lab.submit(lab.spec("limit", {"a": {**CHAIN["a"], "run": run, "resources": {"time": "1m", "mem": "100M"}}, "b": CHAIN["b"]}))
    lab.wait("limit", 300)
    lab.assert_done("limit")
    states = {row["name"].split(".")[2] + row["name"].split(".")[4]: row["state"] for row in lab.jobs("limit")}
    assert states == {"a0-1": "TIMEOUT", "a0-2": "COMPLETED", "a0-3": "COMPLETED", "b0": "COMPLETED"}
    record_property("fired", "Slurm says TIMEOUT of the first job of the chain")
    ends = lab.events("limit", "task_ended")
    assert [(end["stage"], end["status"]) for end in ends] == [("a", "interrupted"), ("a", "done"), ("b", "done")]
    assert (ends[0]["cause_kind"], ends[0]["next"]) in [
        ("TIMEOUT", "the next job of its chain goes on from what it saved (2 left)"),
        ("TIMEOUT", "goes on from what it saved"),  # the script itself was killed before it could tell: the next job tells it
    ]
    if ends[0]["cause_kind"] == "TIMEOUT":
        record_property("recovery_seconds", lab.events("limit", "task_started")[1]["time"] - ends[0]["time"])


@pytest.mark.fault("F26")
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_chain_that_was_given_up_is_queued_anew_before_its_last_jobs_start(lab: Lab, record_property: Record) -> None:  # noqa: F811
    """They may wait for days for free nodes, only to say that there is nothing to do for them."""
    lab.site({**SITE, "restart": "chain"})
    flag = lab.folder / "repaired"
    spec = lab.spec("anew", {**CHAIN, "a": {**CHAIN["a"], "run": f"[ -e {flag} ] || exit 7; echo start >> $MEDGEN_OUT/starts"}})
    lab.submit(spec)
    waiting = [row["id"] for row in lab.alive("anew") if row["name"].split(".")[4] in ("0-2", "0-3")]
    lab.slurm.run("scontrol", "hold", ",".join(waiting))  # as good as no free node
    lab.slurm.wait_for(lambda: [end for end in lab.events("anew", "task_ended") if not end["again"]], 120)
    failed = lab.events("anew", "task_ended")[-1]
    assert failed["status"] == "failed" and "exit code 7" in failed["cause"]
    record_property("fired", f"attempt {failed['attempt']}: {failed['cause']}; {failed['next']}")
    lab.slurm.wait_for(lambda: {row["id"] for row in lab.alive("anew") if ".a." in row["name"]} == set(waiting))
    flag.touch()
    repaired = time.monotonic()
    assert "a  1 task" in lab.submit(spec).stdout
    lab.wait("anew")
    lab.assert_done("anew")
    record_property("recovery_seconds", time.monotonic() - repaired)
    assert {row["state"] for row in lab.jobs("anew") if row["id"] in waiting} == {"CANCELLED"}
    assert chain_jobs(lab, "anew") == Counter({"a.0-1": 2, "a.0-2": 2, "a.0-3": 2, "b.0": 2})


@pytest.mark.fault("F24")
@pytest.mark.timeout(120)
def test_each_job_of_a_chain_counts_against_the_limit_of_a_user(lab: Lab, record_property: Record) -> None:  # noqa: F811
    """The quality of service called small takes eight jobs."""
    stages = {**CHAIN, "a": {**CHAIN["a"], "segments": 8}}
    lab.site({**SITE, "restart": "chain", "qos": "small"})
    said = lab.submit(lab.spec("counted", stages), expect=2).stderr
    assert "needs at least 9 jobs in the queue" in said and "takes 8 of one user" in said
    record_property("fired", said.splitlines()[-1])
    assert not (lab.folder / "runs").exists()
    lab.submit(lab.spec("counted", {**stages, "a": {**CHAIN["a"], "segments": 7}}), "--dry-run")


# --- where it is submitted from, and what becomes of the code ----------------------------------------------------------


@pytest.mark.fault("F25")
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_submit_from_a_step_of_an_array_job_queues_what_a_login_node_would(lab: Lab, record_property: Record) -> None:  # noqa: F811
    spec = lab.spec("inside", {"a": {"kind": "command", "run": "env > $MEDGEN_OUT/env; ulimit -l > $MEDGEN_OUT/locked; nproc > $MEDGEN_OUT/cpus", "resources": {"time": "5m", "mem": "150M", "cpus": 1}}})
    submit = [sys.executable, "-m", "medgen", "submit", str(spec), "--site", str(lab.folder / "lab.yaml")]
    outer = lab.folder / "outer.env"
    script = lab.folder / "outer.sh"
    script.write_text(f"#!/bin/bash\nsrun --cpu-bind=cores bash -c 'env > {outer}; exec \"$@\"' step {' '.join(submit)}\n")
    options = ["--wait", "--job-name=outer", "--array=3", "--cpus-per-task=2", "--mem=300M", "--gres=gpu:2", "--time=3", f"--output={lab.folder}/outer.log"]
    done = subprocess.run(["sbatch", *options, str(script)], cwd=lab.folder, env=lab.environment, capture_output=True, text=True, timeout=180)
    said = (lab.folder / "outer.log").read_text()
    assert done.returncode == 0, done.stderr + said
    assert "this is inside job" in said
    around = {line.partition("=")[0] for line in outer.read_text().splitlines()}
    assert {"SLURM_ARRAY_TASK_ID", "SLURM_STEP_ID", "SLURM_CPU_BIND", "SLURM_MEM_PER_NODE", "SLURM_CPUS_PER_TASK"} <= around
    record_property("fired", "sbatch --array, srun, medgen submit")

    lab.wait("inside")
    lab.assert_done("inside")
    inside = lab.run("inside")
    kept = lab.slurm.run("scontrol", "write", "batch_script", lab.jobs("inside")[0]["id"], "-").stdout
    shutil.move(inside, lab.folder / "first")
    assert kept.rstrip("\n") in lab.submit(spec, "--dry-run").stdout
    lab.submit(spec)
    lab.slurm.wait_for(lambda: lab.outcome("inside", "a"))
    ours = {"SLURM_JOB_ID", "SLURM_JOBID", "SLURM_NODELIST", "SLURM_JOB_NODELIST", "SLURMD_NODENAME", "SLURM_TASK_PID", "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME"}
    seen = []
    for folder in (lab.folder / "first", inside):
        made = folder / "a" / "made" / "00000"
        variables = dict(line.partition("=")[::2] for line in (made / "env").read_text().splitlines() if line.startswith(("SLURM", "SBATCH", "CUDA", "OMP")))
        seen.append(({name: value for name, value in variables.items() if name not in ours and "TMP" not in name}, (made / "locked").read_text(), (made / "cpus").read_text()))
    assert seen[0] == seen[1]


@pytest.mark.fault("F28")
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_set_up_that_fails_starts_no_rank_and_keeps_nothing_waiting(lab: Lab, record_property: Record) -> None:  # noqa: F811
    stages = {
        "train": {"kind": "train", "config": {**TINY_NET, "strategy": "ddpm", "mode": "bravo"}, "resources": {"gpus": 1, "time": "10m", "mem": "3G"}},
        "report": {"kind": "report", "resources": {"mem": "1G"}},
    }
    lab.site({**SITE, "setup": ["module load cuda/99.9"]})
    spec = lab.spec("setup", stages, data={"format": "phantom", "patients": 6, "size": 16, "positive_only": True, "every": 2})
    lab.submit(spec)
    lab.wait("setup")
    text = (lab.run("setup") / "logs" / "train" / "s0" / "batch.log").read_text()
    assert text.count("medgen: set-up failed with exit code 127: module load cuda/99.9") == 1, "and it is not tried again"
    record_property("fired", "set-up failed with exit code 127: module load cuda/99.9")
    states = {row["name"].split(".")[2]: (row["state"], row["id"]) for row in lab.jobs("setup")}
    assert (states["train"][0], states["report"][0]) == ("FAILED", "CANCELLED")
    assert not lab.events("setup", "task_started")
    job = states["train"][1]
    steps = lab.slurm.wait_for(lambda: lab.slurm.run("sacct", "-nP", "-j", job, "-o", "JobID").stdout.split())
    assert f"{job}.0" not in steps, "no rank had a GPU"
    found = json.loads(lab.medgen("why", "setup", "--json", expect=1).stdout)["findings"]
    kinds = {finding["stage"]: finding["cause"]["kind"] for finding in found}
    assert kinds == {"train": "SETUP", "report": "DEPENDENCY"}
    assert any("module load cuda/99.9" in finding["cause"]["detail"] for finding in found)


@pytest.mark.fault("F29")
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_code_that_is_edited_while_its_job_waits_changes_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch, record_property: Record) -> None:  # noqa: F811
    mine = lab.folder / "mine.py"
    mine.write_text("from medgen.models.diffusion.strategies import RFlow\n\n\nclass Early(RFlow):\n    def times(self, uniform):\n        return uniform**2\n")
    stages = {
        "gate": {"kind": "command", "run": WAITING, "resources": {"time": "5m", "mem": "100M"}},
        "train": {"kind": "train", "needs": ["gate"], "config": {**TINY_NET, "strategy": "mine:Early", "mode": "seg"}, "resources": {"cpus": 1, "time": "10m", "mem": "3G"}},
    }
    lab.submit(lab.spec("edited", stages, data={"format": "phantom", "patients": 6, "size": 16, "positive_only": True, "every": 2}))
    assert [row["state"] for row in lab.jobs("edited") if ".train." in row["name"]] == ["PENDING"]
    mine.write_text("raise RuntimeError('edited')\n")
    record_property("fired", "mine.py raises while the job that uses it is pending")
    go(lab, "edited")
    lab.wait("edited")
    lab.assert_done("edited")
    code = lab.run("edited") / "code"
    monkeypatch.setattr(snapshot, "PACKAGE", code / "medgen")
    ran = snapshot.code_sha256([code / "mine.py"])
    assert ran == files.read_json(lab.run("edited") / "manifest.json")["code_sha256"]
