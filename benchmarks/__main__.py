"""Run every benchmark and write one JSON file with machine, versions and date."""

from __future__ import annotations

import json
import os
import platform
import sys
from datetime import date, datetime, timezone
from importlib.metadata import version
from pathlib import Path

from benchmarks import (
    cache,
    checkpoint_sharded,
    diffusion,
    dpwgan,
    evaluation,
    gate,
    loop,
    pacgan,
    planning,
    sdm,
    startup,
    submit_scale,
    watch_scale,
)

RESULTS = Path(__file__).parent / "results"
BENCHMARKS = {"startup": startup.run, "planning": planning.run, "cache": cache.run, "loop": loop.run,
              "submit": submit_scale.run, "watch": watch_scale.run, "checkpoint": checkpoint_sharded.run,
              "pacgan": pacgan.run, "diffusion": diffusion.run, "evaluation": evaluation.run, "gate": gate.run, "dpwgan": dpwgan.run, "sdm": sdm.run}


def machine() -> dict[str, object]:
    processors = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {"processor": processors[0] if processors else platform.processor(), "cores": len(os.sched_getaffinity(0)),
            "load_before": os.getloadavg()[0], "system": platform.platform(), "python": platform.python_version()}


def main() -> None:
    chosen = sys.argv[1:] or list(BENCHMARKS)
    record: dict[str, object] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {name: version(name) for name in ("torch", "torch-fidelity", "lpips", "monai", "numpy", "nibabel", "pydantic", "typer")},
    }
    for name in chosen:
        print(f"{name} ...", flush=True)
        record[name] = BENCHMARKS[name]()
        print(json.dumps(record[name], indent=1), flush=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{date.today().isoformat()}.json"
    previous = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**previous, **record}, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
