"""Fixtures shared by all tests: a specification to start from, and the command line as a user runs it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest

pytest_plugins = ["faults.plugin"]
REPOSITORY = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # started in the background: what tests start would not hear Ctrl-C either
    signal.signal(signal.SIGINT, signal.default_int_handler)

TINY_NET: dict[str, Any] = {
    "model": "diffusion", "epochs": 1, "batch_size": 8, "channels": [8, 16], "attention": [False, True], "head_channels": 8,
    "warmup_epochs": 0.5, "lr": 1.0e-3, "ema": {"beta": 0.9, "update_after_step": 1, "update_every": 1},
    "loop": {"log_steps": 1, "preview_images": 2, "validate_epochs": 1.0},
}


def tiny_spec(**changes: Any) -> dict[str, Any]:
    """A complete job over six phantoms of 16 px: seconds per stage."""
    spec: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "data": {"format": "phantom", "patients": 6, "size": 16, "positive_only": True, "every": 2},
        "stages": {
            "train_seg": {"kind": "train", "config": {**TINY_NET, "strategy": "rflow", "mode": "seg"}, "resources": {"cpus": 1}},
            "train_bravo": {"kind": "train", "config": {**TINY_NET, "strategy": "ddpm", "mode": "bravo"}, "resources": {"cpus": 1}},
            # an untrained model's masks are noise: take them all
            "masks": {"kind": "generate", "from": "train_seg", "count": 14, "chunk": 2, "sampling": {"steps": 2},
                      "accept": {"min_pixels": 0, "max_fraction": 1.0}},
            "images": {"kind": "generate", "from": "train_bravo", "condition": "masks", "count": 14, "chunk": 2,
                       "sampling": {"sampler": "ddim", "steps": 2}},
            "evaluate": {"kind": "evaluate", "of": "images", "metrics": ["ms_ssim_diversity", "swd"]},
            "report": {"kind": "report"},
        },
    }
    spec.update(changes)
    return spec


def unavailable(what: str) -> NoReturn:
    """This machine cannot run a test: said loudly, and a failure where CI=true, because there it should."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"could not run: {what}")
    pytest.skip(what)


@pytest.fixture
def private_mounts() -> list[str]:
    """The start of a command that may mount small or read-only disks seen by nobody else."""
    prefix = ["unshare", "-rm"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        unavailable("this machine lets nobody mount a small disk (unshare -rm)")
    return prefix


@pytest.fixture
def glioma() -> Path:
    """Real volumes: $MEDGEN_GLIOMA, or shared/data/glioma beside the checkout."""
    folder = Path(os.environ.get("MEDGEN_GLIOMA", REPOSITORY.parent / "shared" / "data" / "glioma"))
    if not folder.is_dir():
        unavailable(f"no real data at {folder}; set MEDGEN_GLIOMA")
    return folder


@pytest.fixture
def sunnybrook() -> Path:
    """Real cine slices with contours: $MEDGEN_SUNNYBROOK, or shared/data/scd_cardiac beside the checkout."""
    folder = Path(os.environ.get("MEDGEN_SUNNYBROOK", REPOSITORY.parent / "shared" / "data" / "scd_cardiac"))
    if not folder.is_dir():
        unavailable(f"no real data at {folder}; set MEDGEN_SUNNYBROOK")
    return folder


@pytest.fixture
def idrid() -> Path:
    """Real fundus photographs with masks: $MEDGEN_IDRID, or shared/data/idrid beside the checkout."""
    folder = Path(os.environ.get("MEDGEN_IDRID", REPOSITORY.parent / "shared" / "data" / "idrid"))
    if not folder.is_dir():
        unavailable(f"no real data at {folder}; set MEDGEN_IDRID")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One slice cache per test process: phantoms are drawn once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def write_spec(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    def write(spec: dict[str, Any]) -> Path:
        import yaml

        path = tmp_path / f"{spec['name']}.yaml"
        path.write_text(yaml.safe_dump(spec, sort_keys=False))
        return path

    return write


@pytest.fixture
def environment(tmp_path: Path, cache: Path) -> dict[str, str]:
    """What a user's shell holds, with runs and cache in temporary folders."""
    return {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "home_cache"), "MEDGEN_RUNS": str(tmp_path / "runs"), "MEDGEN_CACHE": str(cache), "OMP_NUM_THREADS": "1", "COLUMNS": "140"}


@pytest.fixture
def medgen(tmp_path: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command line in an empty folder and check its exit code."""

    def run(*arguments: object, expect: int = 0, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "medgen", *(str(argument) for argument in arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == expect, f"{' '.join(command)}\nexit {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert expect in (0, 1, 3, 4) or "Traceback" not in done.stderr, done.stderr
        return done

    return run
