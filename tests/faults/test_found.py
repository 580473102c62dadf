"""What the punisher has found, each made to happen again by itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_damage import masks_run  # noqa: F401  (a fixture)
from test_pipeline import Medgen, tree


@pytest.mark.fault("F37")
@pytest.mark.timeout(300)
def test_one_wrong_digit_in_a_manifest_is_never_published(masks_run: tuple[Path, Path], medgen: Medgen, record_property: Callable[[str, object], None]) -> None:  # noqa: F811
    """The images were all right, and so collect published a seed that none of them was made from."""
    spec, run = masks_run
    expected = tree(run / "masks" / "dataset")
    manifest = run / "masks" / "shards" / "00000" / "manifest.json"
    text, seed = manifest.read_text(), json.loads(manifest.read_text())["images"][3]["seed"]
    manifest.write_text(text.replace(f'"seed": {seed}', f'"seed": {seed ^ 1}'))
    assert manifest.read_text() != text
    record_property("fired", "one bit of a seed in the manifest of a shard")
    shutil.rmtree(run / "masks" / "dataset")
    (run / "outcome" / "collect_masks.0.json").unlink()
    refused = medgen("collect", run, "--stage", "collect_masks", expect=1)
    assert "shard 0: manifest.json does not match its sha256" in refused.stderr
    assert not (run / "masks" / "dataset").exists()
    medgen("submit", spec, "--local")
    assert tree(run / "masks" / "dataset") == expected


@pytest.mark.fault("F33")
@pytest.mark.timeout(60)
def test_a_full_disk_leaves_no_temporary_of_a_heartbeat(tmp_path: Path, private_mounts: list[str], record_property: Callable[[str, object], None]) -> None:
    program = f"""
from pathlib import Path
from medgen.rundir import Heartbeat, RunDir
run = RunDir(Path("{tmp_path}/disk/run-0123456789"))
(run.root / "hb").mkdir(parents=True)
with open("{tmp_path}/disk/filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(bytes(4096))
    except OSError:
        pass
try:
    run.write_heartbeat(Heartbeat("train", 0, 0, 1, 2, "steps", None, 0.0, "here", 1))
except OSError as error:
    print("refused", error.errno, sorted(path.name for path in (run.root / "hb").iterdir()))
"""
    (tmp_path / "disk").mkdir()
    (tmp_path / "program.py").write_text(program)
    mount = f"mount -t tmpfs -o size=1m none {tmp_path}/disk && exec {sys.executable} {tmp_path}/program.py"
    done = subprocess.run([*private_mounts, "bash", "-c", mount], capture_output=True, text=True)
    assert done.stdout.strip() == "refused 28 []", done.stdout + done.stderr
    record_property("fired", done.stdout.strip())
