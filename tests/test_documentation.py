"""The example in docs/diffusion.md of a strategy and a mode of one's own, run as it stands there."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import REPOSITORY, TINY_NET, tiny_spec


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
