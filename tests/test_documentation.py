"""What the docs show is run as it stands there: a strategy and a mode of one's own, and the way of a cohort to a stack."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from conftest import REPOSITORY, TINY_NET, tiny_spec
from test_prepare import ADNI_HEADER, adni_rows, write_table

from medgen.data import stacks


def test_the_documented_strategy_and_mode_run(tmp_path: Path, medgen: Callable[..., subprocess.CompletedProcess[str]], write_spec: Callable[[dict[str, Any]], Path]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "diffusion.md").read_text(), flags=re.DOTALL)
    assert len(code.strip().splitlines()) <= 18
    (tmp_path / "mine.py").write_text(code)
    stages = {
        "train": {"kind": "train", "config": {**TINY_NET, "strategy": "mine:EarlyFlow", "mode": "mine:PreFromGd"}, "resources": {"cpus": 1}},
        "images": {"kind": "generate", "from": "train", "condition": "test", "count": 2, "sampling": {"steps": 2}},
    }
    spec = write_spec({**tiny_spec(name="mine"), "stages": stages})
    medgen("submit", spec, "--local")
    (run,) = (tmp_path / "runs").glob("mine-*")
    assert (run / "code" / "mine.py").is_file(), "the run keeps its own copy"
    assert sorted(path.name for path in (run / "images" / "dataset" / "images" / "000001").iterdir()) == ["seg.nii.gz", "t1_pre.nii.gz"]

    (tmp_path / "mine.py").write_text(code.replace("class PreFromGd(Mode)", "class PreFromGd"))
    refused = medgen("submit", spec, "--local", expect=2)
    assert "must be a subclass of medgen.models.diffusion.modes.Mode" in refused.stderr


def test_the_documented_way_of_a_cohort(tmp_path: Path, medgen: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    """The three commands of docs/prepare.md, one after the other, end in a stack that opens."""
    rows = [[*row, f"{row[0]}.nii.gz"] for row in adni_rows(2, {"AD": 30, "CN": 36})]
    write_table(tmp_path / "ADNI.csv", [*ADNI_HEADER, "path"], rows)
    for row in rows:
        volume = np.random.default_rng(len(row[0])).uniform(1, 9, (12, 14, 3)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / row[-1])
    block = re.findall(r"```sh\n(.*?)```", (REPOSITORY / "docs" / "prepare.md").read_text(), flags=re.DOTALL)[0]
    for line in block.strip().splitlines():
        medgen(*line.partition("#")[0].split()[1:])
    train, test = (stacks.open_stack(tmp_path / "ADNI" / side) for side in ("train", "test"))
    stacks.require_disjoint(train, test)
    stacks.require_subjects_of_every_class(train, 2)
    assert train.class_names == ("CN", "AD") and train.sizes[-1] == 128
