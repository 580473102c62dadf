"""A slurmctld that is killed forgets what it did in its last seconds: what submit makes of a release that was lost."""

from __future__ import annotations

import time

import pytest

from .test_submit import Lab, lab  # noqa: F401  (a fixture)

STAGES = {"a": {"kind": "command", "run": "echo a > $MEDGEN_OUT/a", "resources": {"slurm": ["--begin=now+1hour"]}}}
CONTROLLER = 'case "$*" in *config*) "$real" "$@" | sed "s/^BOOT_TIME .*/BOOT_TIME = $(cat $folder/started)/" ;; *) exec "$real" "$@" ;; esac'


@pytest.mark.parametrize(("started_after_seconds", "reason"), [(5, "BeginTime"), (-60, "JobHeldUser")])
def test_a_hold_is_medgens_own_only_if_slurm_was_started_after_the_release(lab: Lab, started_after_seconds: int, reason: str) -> None:  # noqa: F811
    """Else a person has put the job on hold, and it stays."""
    spec = lab.spec("forgotten", STAGES)
    lab.submit(spec)
    [job] = lab.jobs("forgotten")
    lab.slurm.wait_for(lambda: lab.jobs("forgotten")[0]["reason"] == "BeginTime", 60)
    lab.slurm.run("scontrol", "uhold", job["id"])
    lab.slurm.wait_for(lambda: lab.jobs("forgotten")[0]["reason"] == "JobHeldUser", 60)
    started = lab.events("forgotten", "jobs_released")[-1]["time"] + started_after_seconds
    folder = lab.shim("scontrol", CONTROLLER)
    (folder / "started").write_text(time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(started)))
    lab.submit(spec)
    lab.slurm.wait_for(lambda: lab.jobs("forgotten")[0]["reason"] == reason, 60)
    assert [row["id"] for row in lab.jobs("forgotten")] == [job["id"]]
