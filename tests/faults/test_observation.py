"""What watch says when Slurm's own answers are late, half, missing or about somebody else. On a real Slurm with shims before its commands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from slurm.test_submit import GRAPH, Lab, lab  # noqa: F401  (a fixture)
from slurm.test_watch import SMALL, WAITING, Watched

from medgen.rundir import RunDir
from medgen.watch import judge
from medgen.watch.poll import Patient
from medgen.watch.state import Reader, TaskState

Record = Callable[[str, object], None]
FORGETS = '"$real" "$@" | grep -v -e "|FAILED|" -e "|CANCELLED|" -e "|COMPLETED|" -e "|COMPLETING|" || true'


def killed_without_a_word(lab: Lab, name: str) -> Watched:  # noqa: F811
    """A run whose one job was killed so that it could tell nothing."""
    run = Watched(lab, name, {"only": {"kind": "command", "run": WAITING, "resources": SMALL}})
    lab.slurm.wait_for(lambda: lab.events(name, "task_started"))
    lab.slurm.run("scancel", "--signal=KILL", "--batch", run.job("only"))
    lab.wait(name)
    assert not lab.events(name, "task_ended")
    return run


def seen_at_once(run: Watched, monkeypatch: pytest.MonkeyPatch) -> TaskState:
    """What watch says of the task once it no longer waits for a late outcome."""
    for seconds in ("AWAITED_SECONDS", "BEAT_SECONDS"):
        monkeypatch.setattr(judge, seconds, 0)
    for variable in ("SLURM_CONF", "XDG_CACHE_HOME", "PATH"):
        monkeypatch.setenv(variable, run.lab.environment[variable])
    for path in (run.cache / "medgen").glob("*.json"):
        path.unlink()
    [task] = Reader(RunDir(run.lab.run(run.name)), Patient()).read().stages[0].tasks
    return task


@pytest.mark.fault("F30", "F32")
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_that_only_a_broken_accounting_could_explain(lab: Lab, monkeypatch: pytest.MonkeyPatch, record_property: Record) -> None:  # noqa: F811
    """squeue has forgotten it; sacct hangs, gives half a row, or the row of another who has its number now."""
    run = killed_without_a_word(lab, "forgotten")
    job = run.job("only")
    folder = lab.shim("squeue", FORGETS)
    unexplained = f"its job {job} has left Slurm's queue without an outcome"

    lab.shim("sacct", "echo hung >> $folder/asked; exec sleep 600")
    task = seen_at_once(run, monkeypatch)
    assert (task.word, task.cause) == ("interrupted", unexplained)
    assert (folder / "asked").read_text() == "hung\n"

    now = int(time.time())
    rows = {
        "half": f"{job}||0:0|{now - 60}|Unknown|{now - 60}|0||1|1|100M|00:00||||allocation",
        "foreign": f"{job}|COMPLETED|0:0|{now - 60}|{now}|{now - 60}|60||1|1|100M|00:10||n1|None|somebodys_job",
        "foreign failure": f"{job}|FAILED|3:0|{now - 60}|{now}|{now - 60}|60||1|1|100M|00:10||n1|None|medgen.other-0123456789.only.1.0",
    }
    for kind, row in rows.items():
        lab.shim("sacct", f"echo '{kind}' >> $folder/asked; echo '{row}'")
        task = seen_at_once(run, monkeypatch)
        assert (task.word, task.cause) == ("interrupted", unexplained), kind
    assert (folder / "asked").read_text().splitlines() == ["hung", *rows]
    record_property("fired", f"sacct: {', '.join(['hung', *rows])}")

    lab.unshim()
    run.go()
    began = time.monotonic()
    lab.submit(lab.folder / "forgotten.yaml")
    lab.wait("forgotten")
    lab.assert_done("forgotten")
    record_property("recovery_seconds", time.monotonic() - began)


@pytest.mark.fault("F30", "F32")
@pytest.mark.timeout(240)
def test_the_outcome_decides_whatever_slurm_says(lab: Lab, record_property: Record) -> None:  # noqa: F811
    """The number of the finished job belongs to somebody else's failed one, in squeue and in sacct, and then nobody knows it."""
    run = Watched(lab, "decided", {"a": {**GRAPH["a"], "resources": SMALL}})
    lab.wait("decided")
    lab.assert_done("decided")
    job, name = run.job("a"), lab.jobs("decided")[0]["name"]
    for text in (f"{job}|N/A|FAILED|NonZeroExitCode|1|2|0:10|1|n1|{name}", f"{job}|N/A|RUNNING|None|1|N/A|0:10|1|n1|medgen.other-0123456789.a.1.0"):
        folder = lab.shim("squeue", f"echo asked >> $folder/asked; echo '{text}'")
        lab.shim("sacct", f"echo '{job}|FAILED|1:0|1|2|1|60||1|1|100M|00:10||n1|None|{name}'")
        assert run.look(expect=0)["verdict"] == "done"
    lab.shim("squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; echo asked >> $folder/asked; exit 1')
    assert run.look(expect=0)["verdict"] == "done"
    record_property("fired", f"squeue lied {len((folder / 'asked').read_text().splitlines())} times")
    lab.unshim()
    assert "done already" in lab.submit(lab.folder / "decided.yaml").stdout


@pytest.mark.fault("F31")
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_squeue_that_takes_longer_than_watch_waits(lab: Lab, record_property: Record) -> None:  # noqa: F811
    """watch gives the last state and its age; submit waits longer and goes on."""
    run = Watched(lab, "late", {"only": {"kind": "command", "run": WAITING, "resources": SMALL}})
    run.until("only", "running")
    folder = lab.shim("squeue", 'echo >> $folder/late; sleep 20; exec "$real" "$@"')
    [kept] = (run.cache / "medgen").glob("queue-*.json")
    answer: dict[str, Any] = json.loads(kept.read_text())
    kept.write_text(json.dumps({**answer, "asked": answer["asked"] - 90, "tried": answer["tried"] - 90}))
    shown = lab.medgen("watch", "late", "--once", expect=4).stdout
    assert "running" in shown and "Slurm has not answered for" in shown
    assert (folder / "late").read_text() == "\n", "it was asked once"

    began = time.monotonic()
    assert "in the queue already" in lab.submit(lab.folder / "late.yaml").stdout
    calls = len((folder / "late").read_text().splitlines())
    record_property("fired", f"squeue took 20 s {calls} times")
    record_property("recovery_seconds", time.monotonic() - began)
    assert calls > 1
    lab.unshim()
    run.go()
    lab.wait("late")
    assert run.look(expect=0)["verdict"] == "done"
    assert len({row["id"] for row in lab.jobs("late")}) == 1
