"""A site profile: what a machine or cluster offers. Read by plan.py and launch/; one YAML per site in cluster/."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from medgen import document
from medgen.errors import InputError

SITE_VARIABLE = "MEDGEN_SITE"


class Site(BaseModel):
    """`cpus` and `gpus` are what the local backend may use at once; `setup` lines run at the start of every job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "local"
    cpus: int = Field(default_factory=lambda: len(os.sched_getaffinity(0)), ge=1)
    gpus: int = Field(default_factory=lambda: count_gpus(), ge=0)
    setup: list[str] = []


def count_gpus() -> int:
    """GPUs this process may use, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([item for item in visible.split(",") if item.strip() not in ("", "-1")])
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def load(name: str | None) -> Site:
    """The profile `name`: a path, or a file in ./cluster or in the package's cluster folder. None: $MEDGEN_SITE, else this machine."""
    chosen = name or os.environ.get(SITE_VARIABLE)
    if chosen is None:
        return Site()
    folders = [Path.cwd() / "cluster", Path(__file__).parent.parent / "cluster"]
    candidates = [Path(chosen), *(folder / f"{chosen}.yaml" for folder in folders)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
        raise InputError(f"no site profile {chosen!r}; known here: {', '.join(known) or 'none'}; or give a path")
    return document.check(Site, document.load(found))
