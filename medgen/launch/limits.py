"""What a cluster allows: asked of Slurm once per submit, together with the site profile. Called by submit.py."""

from __future__ import annotations

import getpass
import re
import shutil

from medgen.launch import slurm
from medgen.launch.fit import Limits
from medgen.launch.slurm import SlurmError
from medgen.site import Site

VERSION = re.compile(r"(\d+)\.(\d+)")


def read_limits(site: Site) -> tuple[Limits, list[str]]:
    """Limits, and notes about what could not be asked. Without Slurm's commands (a dry run elsewhere): the profile alone."""
    if shutil.which("sbatch") is None:
        return Limits(array=site.limits.array, submitted=site.limits.submitted), ["no sbatch here: the cluster's own limits are not known"]
    try:
        config = slurm.config()
    except SlurmError as error:  # a dry run may go on; submit itself will stop at its first question
        return Limits(array=site.limits.array, submitted=site.limits.submitted), [f"{error}: the cluster's own limits are not known"]
    version = VERSION.search(config.get("SLURM_VERSION", ""))
    array = _least(int(config["MaxArraySize"]) if config.get("MaxArraySize", "").isdecimal() else None, site.limits.array)
    submitted = _least(_submit_limit(site) if config.get("AccountingStorageEnforce", "none") != "none" else None, site.limits.submitted)
    return Limits((int(version[1]), int(version[2])) if version else None, array, submitted), []


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _submit_limit(site: Site) -> int | None:
    """Of the association and of the QOS that jobs will have; None if accounting does not tell."""
    user = getpass.getuser()
    where = [f"user={user}", *([f"account={site.account}"] if site.account else [])]
    try:
        rows = _table(["sacctmgr", "-nP", "show", "assoc", *where, "format=maxsubmitjobs,defaultqos,qos"], 3)
        qos = {name: _number(limit) for name, limit in _table(["sacctmgr", "-nP", "show", "qos", "format=name,maxsubmitjobsperuser"], 2)}
    except SlurmError:
        return None
    limits = []
    for limit, default, allowed in rows:
        limits.append(_number(limit))
        name = site.qos or default or (allowed if "," not in allowed else "normal")
        limits.append(qos.get(name))
    return _least(*limits)


def _table(arguments: list[str], columns: int) -> list[list[str]]:
    """Lines that are no rows, such as a warning, are left out."""
    rows = [line.split("|") for line in slurm.query(arguments).splitlines()]
    return [row for row in rows if len(row) == columns]


def _number(text: str) -> int | None:
    return int(text) if text.isdecimal() else None
