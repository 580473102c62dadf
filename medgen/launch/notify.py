"""Tells people that a run has ended or that a task has failed for good: webhook and command. Called by attempt.py.

Mail is Slurm's own business (--mail-user). A message that cannot be sent is an event, never a failure."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import urllib.request

from medgen.launch.after import Verdict
from medgen.plan import Plan, PlannedStage
from medgen.rundir import RunDir

PATIENCE_SECONDS = 20


def tell_people(run: RunDir, plan: Plan, stage: PlannedStage, shard: int, verdict: Verdict) -> None:
    """After a task that is not started again: `fail` if it is not done, `end` if it was the last one of the run."""
    kinds: list[str] = plan.place.notify["on"]
    where = stage.name if len(stage.tasks) == 1 else f"{stage.name} shard {shard}"
    if verdict.status != "done" and "fail" in kinds:
        _send(run, plan, "fail", f"{plan.run_id}: {where} {verdict.status}: {verdict.cause}; {verdict.words}")
    if verdict.status == "done" and "end" in kinds and _is_last(run, plan, stage):
        _send(run, plan, "end", f"{plan.run_id}: everything is done")


def _is_last(run: RunDir, plan: Plan, stage: PlannedStage) -> bool:
    """True if nothing waits for this stage and everything is done."""
    if any(stage.name in other.needs for other in plan.stages):
        return False
    return all(run.is_done(task.stage, task.shard, task.hash) for item in plan.stages for task in item.tasks)


def _send(run: RunDir, plan: Plan, event: str, text: str) -> None:
    problems = []
    if plan.place.notify["command"] is not None:
        problems.append(_command(run, plan.place.notify["command"], event, text))
    if plan.place.notify["webhook"] is not None:
        problems.append(_webhook(plan.place.notify["webhook"], event, text))
    if problems:
        run.event("notified", what=event, problems=[problem for problem in problems if problem])


def _command(run: RunDir, command: str, event: str, text: str) -> str | None:
    environment = {**os.environ, "MEDGEN_RUN": str(run.root), "MEDGEN_EVENT": event, "MEDGEN_TEXT": text}
    try:
        subprocess.run(["bash", "-c", command], env=environment, timeout=PATIENCE_SECONDS, check=True, stdin=subprocess.DEVNULL)
    except (OSError, ValueError, subprocess.SubprocessError) as error:  # ValueError: a NUL in the cause
        return f"command: {type(error).__name__}"
    return None


def _webhook(variable: str, event: str, text: str) -> str | None:
    """POST {"text": ...}, which Slack, Mattermost and Teams understand. The address is never told."""
    address = os.environ.get(variable)
    if not address:
        return f"webhook: the variable {variable} is not set in the job; put it into the site's secrets file"
    if not address.lower().startswith(("https://", "http://")):
        return f"webhook: the variable {variable} holds no http address"
    try:
        request = urllib.request.Request(address, json.dumps({"text": text, "event": event}).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS):
            return None
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"webhook: {type(error).__name__}"
