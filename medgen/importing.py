"""What `medgen import` is given, and who reads it: sbatch scripts, or a published system's config.json and weights. Called by cli.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medgen.errors import InputError
from medgen.launch.importing import run_import as import_scripts
from medgen.launch.importing.verb import NewFile, target_of, write_all
from medgen.published.job import Job, job_of, summary
from medgen.published.options import read_options

CONFIG, WEIGHTS = (".json",), (".pt", ".pth")


def run_import(paths: Sequence[Path], out: Path | None, portable: bool, size: int | None) -> str:
    """Write what the files become, and return what there is to say of it, in lines. Raises InputError; then nothing is written."""
    configs = [path for path in paths if path.suffix.lower() in CONFIG]
    weights = [path for path in paths if path.suffix.lower() in WEIGHTS]
    others = [path for path in paths if path not in configs and path not in weights]
    if others and (configs or weights):
        raise InputError(f"{others[0]}: scripts, and files of a published system ({(configs + weights)[0]}), are imported apart; call medgen import for each")
    if portable and not others:
        raise InputError("--portable is about the directives of sbatch scripts; remove it")
    if size is not None and not weights:
        raise InputError(f"--size {size} is about weights (generator_best.pt and discriminator_best.pt); remove it")
    if weights:
        return "\n".join(_import_weights(weights, configs, size, out))
    return _import_configs(configs, out) if configs else import_scripts(paths, out, portable)


def _import_weights(weights: Sequence[Path], configs: Sequence[Path], size: int | None, out: Path | None) -> list[str]:
    if len(weights) != 2 or len(configs) > 1:
        given = f"{len(weights)} file{'s' * (len(weights) != 1)} of weights" + (f" and {len(configs)} configurations" if len(configs) > 1 else "")
        raise InputError(f"{weights[0]}: {given}; give one generator_best.pt, the discriminator_best.pt of the same folder, and at most their config.json")
    if out is not None and out.suffix in (".yaml", ".yml"):
        raise InputError(f"--out {out}: weights become a folder; name one")
    from medgen.published.weights import import_weights

    return import_weights(weights, read_options(configs[0]) if configs else None, size, out)


def _import_configs(paths: Sequence[Path], out: Path | None) -> str:
    """A spec for each."""
    folder, name = target_of(out, len(paths))
    new = []
    for path in paths:
        job, text = job_of(read_options(path))
        target = folder / (name or f"{job.name}.yaml")
        new.append(NewFile(target, text, _told(target, job)))
    return write_all(new)


def _told(target: Path, job: Job) -> list[str]:
    notes = [("check", note) for note in job.notes] + [("left out", note) for note in job.left_out]
    lines = [line for word, note in notes for line in f"  {word} {note.option}: {note.text}".replace("\n", "\n    ").split("\n")]
    return [f"{target}: {summary(job)}", *lines, f"  then: medgen submit {target} --dry-run"]
