"""Slurm's reasons and states in words a person understands. Pure; called by judge.py, queue_view.py and why.py.

A reason that is not known here is shown as Slurm writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from medgen.launch.slurm import AccountingRow, QueueRow

HELD_STATES = ("REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
SUSPENDED_STATES = ("SUSPENDED", "STOPPED")
WAITING_STATES = ("PENDING", "REQUEUED", "REQUEUE_FED", "CONFIGURING", "POWER_UP_NODE", *HELD_STATES)

# keys as Slurm's, without spaces and underscores, in small letters
WORDS = {
    "none": "",
    "priority": "other jobs come first",
    "resources": "next in line, waits for free nodes or GPUs",
    "dependency": "waits for what it needs",
    "dependencyneversatisfied": "what it needs has failed, so it will never start",
    "begintime": "Slurm makes it wait a moment before it starts",
    "schedulingdefer": "the scheduler is busy",
    "jobarraytasklimit": "as many shards as it may run at once are running",
    "jobhelduser": "held",
    "jobheldadmin": "held by an administrator",
    "jobholdmaxrequeue": "held: it was started again too often",
    "maxrequeue": "held: it was started again too often",
    "launchfailedrequeuedheld": "held: its node could not start it",
    "launchfailedlimitexceededrequeuedheld": "held: its nodes could not start it several times",
    "jobrequeuedinheldstate": "held after it was taken back",
    "nodesrequiredforjobaredown": "the nodes it could use are down, drained or kept for higher priority",
    "reqnodenotavail": "the nodes it asks for are not available: maintenance, down or reserved",
    "nodedown": "a node it needs is down",
    "badconstraints": "no node has what it asks for",
    "partitiondown": "its partition is down",
    "partitioninactive": "its partition takes no jobs now",
    "partitiontimelimit": "asks for more time than its partition gives",
    "partitionnodelimit": "asks for more nodes than its partition gives",
    "partitionconfig": "asks for what its partition does not give",
    "accountnotallowed": "its account may not use this partition",
    "qosnotallowed": "its QOS may not be used in this partition",
    "invalidaccount": "its account is not valid",
    "invalidqos": "its QOS is not valid",
    "qosusagethreshold": "its QOS has used up what it may",
    "licenses": "waits for a licence",
    "reservation": "waits for its reservation",
    "reservationdeleted": "its reservation was removed",
    "cleaning": "its last attempt is still being cleaned up",
    "prolog": "its node is being prepared",
    "waitingforscheduling": "has just been queued",
    "frontenddown": "Slurm's front end is down",
    "systemfailure": "Slurm has a failure",
    "burstbufferresources": "waits for room in the burst buffer",
    "burstbufferstagein": "its data are being brought in",
    "powernotavail": "waits for power",
    "deadline": "it cannot end before its deadline",
    "jobarraytaskthrottle": "as many shards as it may run at once are running",
}
# QOSMaxGRESPerUser, AssocGrpCpuLimit, AssocGrpGRESRunMinutes, QOSMaxSubmitJobPerUserLimit, MaxMemPerAccount, ...
LIMIT = re.compile(
    r"(?P<whose>qos|assoc)?(?P<kind>grp|max|min)(?P<what>submitjobs?|jobs?|gres|tres|cpu|mem|memory|nodes?|wall|billing|energy|bb|licenses?|arrays?)"
    r"(?P<time>run)?(?:duration)?(?P<hours>minutes)?(?:per(?P<each>user|account|job|node))?(?:run)?(?P<hours_behind>minutes)?(?:per(?:user|account|job))?(?:limit)?"
)
LIMITED = {
    "submitjob": "queued jobs", "submitjobs": "queued jobs", "job": "running jobs", "jobs": "running jobs", "gres": "GPUs", "tres": "resources", "cpu": "CPUs", "mem": "memory",
    "memory": "memory", "node": "nodes", "nodes": "nodes", "wall": "time", "billing": "billed resources", "energy": "energy", "bb": "burst buffer",
    "license": "licences", "licenses": "licences", "array": "array elements", "arrays": "array elements",
}  # fmt: skip


def reason_in_words(reason: str) -> str:
    """Why a job waits; "" where nothing is in the way."""
    bare = re.split(r"[,:(]", reason.strip("() "), maxsplit=1)[0]
    key = re.sub(r"[ _]", "", bare).lower()
    if key in WORDS:
        return WORDS[key]
    match = LIMIT.fullmatch(key)
    if match is None:
        return reason
    whose = {"qos": "the QOS", "assoc": "your account"}.get(match["whose"] or "", "the site")
    what = LIMITED[match["what"]]
    if match["kind"] == "min":
        return f"asks for fewer {what} than {whose} wants"
    if match["each"] == "job":
        return f"asks for more {what} than {whose} allows"
    if match["hours"] or match["hours_behind"]:
        what = f"hours of {what}"
    each = f" per {match['each']}" if match["each"] in ("user", "account", "node") else ""
    return f"the limit of {whose} on {what}{each} is reached"


@dataclass(frozen=True)
class Ending:
    """How Slurm says a job ended that told nothing itself. `end`: unix seconds."""

    word: Literal["failed", "interrupted"]
    text: str
    end: float | None


def ending_in_accounting(row: AccountingRow) -> Ending:
    used, asked = row.max_rss_mebibytes, row.requested_mem_mebibytes
    if row.state == "OUT_OF_MEMORY" or (row.state == "FAILED" and used is not None and asked is not None and used > asked):
        amounts = f": {_gibibytes(used)} of {_gibibytes(asked)}" if used is not None and asked is not None and used > asked else ""
        return Ending("failed", f"killed, because it used more memory than it had asked for{amounts}", row.end)
    if row.state == "FAILED":
        how = f"was killed by signal {row.signal}" if row.signal else f"ended with exit code {row.exit_code}"
        return Ending("failed", f"its job {how} and left no outcome", row.end)
    return _ending(row.state, row.node_list, row.end)


def ending_in_queue(row: QueueRow) -> Ending:
    return _ending(row.state, row.nodes, row.end)


def _ending(state: str, nodes: str, end: float | None) -> Ending:
    node = f"its node {nodes}" if nodes else "its node"
    failed = {
        "COMPLETED": "its job ended with exit code 0, but left no outcome",
        "FAILED": "its job failed and left no outcome",
        "OUT_OF_MEMORY": "killed, because it used more memory than it had asked for",
        "DEADLINE": "its deadline passed",
    }
    if state in failed:
        return Ending("failed", failed[state], end)
    interrupted = {
        "TIMEOUT": "Slurm ended it at its time limit",
        "NODE_FAIL": f"{node} failed",
        "BOOT_FAIL": f"{node} did not start",
        "PREEMPTED": "a job of higher priority took its place",
        "CANCELLED": "it was cancelled",
    }
    return Ending("interrupted", interrupted.get(state, f"Slurm says {state}"), end)


def _gibibytes(mebibytes: float) -> str:
    return f"{mebibytes / 1024:.1f} GiB" if mebibytes >= 1024 else f"{mebibytes:.0f} MiB"
