"""`medgen import`: reads scripts, writes a spec beside each other, says what it understood. Called by medgen/importing.py."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medgen import document, files, spec
from medgen.errors import InputError
from medgen.launch.importing.chains import lift_chain
from medgen.launch.importing.environment import keep_exit_code, lift_environment
from medgen.launch.importing.families import join_families
from medgen.launch.importing.hints import add_hints, kept_lines
from medgen.launch.importing.items import lift_items
from medgen.launch.importing.portable import Portable, site_of, to_portable, word_for_word
from medgen.launch.importing.reading import Draft, ScriptError, read_script
from medgen.launch.importing.writing import spec_text, yaml_text

DEFAULT_FOLDER = Path("jobs")
SITE_FILE = "imported_site.yaml"
BASH_SECONDS = 10
FEATURE_OF_WRAPPER = re.compile(r"--constraint=(?:\\*[\"'])?([A-Za-z][\w.-]*)")


@dataclass(frozen=True)
class NewFile:
    """What will be written where, and what to say of it."""

    path: Path
    text: str
    told: list[str]


def run_import(paths: Sequence[Path], out: Path | None = None, portable: bool = False) -> str:
    """Write a job spec for every script (one for scripts that differ only in a few words) and return what was understood, in lines.

    `out`: the folder for the specs, or the name of the only one if it ends in .yaml; None: jobs/. `portable`: resources as keys
    of the spec and a site profile beside it, instead of the directives word for word. Nothing is written unless all of it can be:
    raises InputError for files that are no job scripts, that sbatch would refuse, and for specs that exist already."""
    drafts = _drafts(paths)
    site: dict[str, Any] = {}
    parts = [word_for_word(draft) for draft in drafts]
    if portable:
        site, parts = site_of([to_portable(draft) for draft in drafts])
    folder, name = target_of(out, len(parts))
    new = [_new_spec(part, folder / (name or f"{part.draft.path.stem}.yaml")) for part in parts]
    if site:
        path = folder / SITE_FILE
        new.append(NewFile(path, yaml_text(site, "The cluster of the imported scripts, in their words."), [f"{path}: their cluster; submit with --site {path}"]))
    return write_all(new)


def _drafts(paths: Sequence[Path]) -> list[Draft]:
    """Every script with all lines where they belong. Raises InputError that names the problems of all files at once."""
    if not paths:
        raise InputError("no script given; name the files to import")
    problems: list[str] = []
    drafts: list[Draft] = []
    preferred: str | None = None
    for path in paths:
        try:
            if (feature := _preferred_by_wrapper(path)) is not None:
                preferred = feature
            else:
                drafts.append(_with_lifts(read_script(path)))
        except ScriptError as error:
            problems.append(str(error))
    if preferred is not None and not drafts and not problems:
        problems.append(f"{paths[0]}: submits another script, {preferred} first; name that script too")
    if problems:
        raise InputError("\n".join(problems))
    if preferred is not None:
        drafts = [replace(draft, prefer=preferred).understood(f"prefers {preferred}") for draft in drafts]
    return [_finished(draft) for draft in join_families(drafts)]


def _preferred_by_wrapper(path: Path) -> str | None:
    """The GPU that a script tries to get first for a script it submits, cancelling and submitting again if it waits too long."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError):
        return None  # told when it is read as a job script
    if re.search(r"^#SBATCH", text, flags=re.MULTILINE) or not all(re.search(rf"\b{word}\b", text) for word in ("sbatch", "scancel", "squeue")):
        return None
    match = FEATURE_OF_WRAPPER.search(text)
    return match.group(1) if match else None


def _with_lifts(draft: Draft) -> Draft:
    """Unchanged where bash would not take the result, which is so if it does not take the script either."""
    lifted = lift_chain(lift_environment(draft))
    if (problem := _bash_problem(lifted.run)) is None:
        return lifted
    return draft.hint(None, f"bash finds an error in it ({problem}); kept as it stands")


def _finished(draft: Draft) -> Draft:
    try:
        return add_hints(keep_exit_code(draft if draft.foreach else lift_items(draft)))
    except ScriptError as error:
        raise InputError(str(error)) from None


def _bash_problem(text: str) -> str | None:
    """What bash says to a text that is not valid; None if it is, or where there is no bash to ask."""
    try:
        asked = subprocess.run(["bash", "-n"], input=text.encode(), capture_output=True, timeout=BASH_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    answer = asked.stderr.decode(errors="replace").strip().splitlines()
    return (answer or ["no reason given"])[0].removeprefix("bash: ") if asked.returncode else None


def target_of(out: Path | None, count: int) -> tuple[Path, str | None]:
    """The folder, and the name of the only spec if one was given."""
    if out is not None and out.suffix in (".yaml", ".yml"):
        if count > 1:
            raise InputError(f"{out}: one file for {count} specs; give a folder")
        return out.parent, out.name
    folder = out if out is not None else DEFAULT_FOLDER
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; give one, or a name that ends in .yaml")
    return folder, None


def _new_spec(part: Portable, path: Path) -> NewFile:
    draft = part.draft
    text = spec_text(draft, part.resources)
    spec.check(document.parse(text, str(path), spec.BASH_KEYS))  # what medgen itself would refuse is not written
    kept = kept_lines(draft)
    told = [f"{path}: {', '.join(draft.summary)}" + (f"; kept verbatim: {kept}" if kept else "")]
    return NewFile(path, text, told + [f"  check {f'line {note.line}' if note.line else draft.path.name}: {note.text}" for note in draft.hints])


def write_all(new: Sequence[NewFile]) -> str:
    """All of them or none; returns what to say of them, in lines. Raises InputError if one is there already or would be written twice."""
    paths = [item.path for item in new]
    problems = [f"{path}: exists and is not overwritten; remove it, or choose another folder with --out" for path in paths if path.exists()]
    problems += [f"{path}: would be made from two files; import them into different folders with --out" for path in dict.fromkeys(paths) if paths.count(path) > 1]
    if problems:
        raise InputError("\n".join(problems))
    for item in new:
        files.write_text(item.path, item.text)
    return "\n".join(line for item in new for line in item.told)
