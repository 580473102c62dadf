"""What a run is made of, kept in its folder: a copy of the code and the facts in manifest.json. Called by submit.py."""

from __future__ import annotations

import getpass
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from medgen import __version__, files, redact
from medgen.errors import InputError
from medgen.rundir import RunDir

PACKAGE = Path(__file__).parent.parent
ENTRY = '"""Runs the copy of medgen beside this file, whatever the current folder holds."""\n\nfrom medgen.__main__ import main\n\nmain()\n'
USER_CODE_KEYS = ("strategy", "mode")  # config keys that may name a user's own class as pkg.mod:Name
CODE_SUFFIXES = {".py", ".yaml", ".yml", ".json", ".toml", ".html", ".css", ".txt", ".sh", ".typed"}
LARGEST_FILE_BYTES = 2**20  # a user's package may lie beside data: larger files are no code
CODE_FACTS = ("code_sha256", "medgen", "python", "packages", "git")  # of the manifest: what changes when new code is taken
DISTRIBUTIONS = (
    "torch", "monai", "numpy", "nibabel", "pandas", "scikit-image", "ema-pytorch", "einops", "matplotlib", "submitit",
    "pydantic", "PyYAML", "filelock", "rich", "typer", "jinja2", "tensorboard",
)  # fmt: skip


def code_files(folder: Path) -> Iterator[Path]:
    """The files of a package that are code, in a fixed order."""
    for here, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name != "__pycache__" and not name.startswith("."))
        for name in sorted(names):
            path = Path(here, name)
            if path.suffix in CODE_SUFFIXES and path.stat().st_size <= LARGEST_FILE_BYTES:
                yield path


def user_packages(configs: list[dict[str, Any]]) -> list[Path]:
    """Top-level packages or modules that configs name as `pkg.mod:Name`, unless they are installed ones.

    Raises InputError when a named module cannot be found from the current folder."""
    found: dict[str, Path] = {}
    for config in configs:
        for value in [config[key] for key in USER_CODE_KEYS if key in config]:
            if isinstance(value, str) and ":" in value:
                top = value.partition(":")[0].partition(".")[0]
                found[top] = _locate(top, value)
    return [path for top, path in found.items() if top != "medgen" and not _is_installed(path)]


def _locate(top: str, value: str) -> Path:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    spec = importlib.util.find_spec(top)
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).resolve()
    raise InputError(f"{value}: no module {top!r} in {Path.cwd()} or among the installed packages; start medgen from its folder")


def _is_installed(path: Path) -> bool:
    names = ("purelib", "platlib", "stdlib")
    return any(path.is_relative_to(Path(sysconfig.get_paths()[name]).resolve()) for name in names)


def copy_code(target: Path, packages: list[Path]) -> None:
    """Copy medgen and the user's packages into `target` in one move."""
    with files.folder_in_one_move(target) as folder:
        (folder / "__main__.py").write_text(ENTRY)
        for package in [PACKAGE, *packages]:
            if package.is_file():
                shutil.copyfile(package, folder / package.name)
                continue
            for path in code_files(package):
                copy = folder / package.name / path.relative_to(package)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


def code_sha256(packages: list[Path]) -> str:
    """One hash over names and contents of medgen and the user's packages."""
    return _sha256_of([PACKAGE, *packages])


def copied_sha256(code: Path, names: list[str]) -> str:
    """`code_sha256` of a copy: `names` are the user's packages in it, folders or files. Raises OSError if it cannot be read."""
    return _sha256_of([code / PACKAGE.name, *(code / name for name in names)])


def _sha256_of(packages: list[Path]) -> str:
    listing = []
    for package in packages:
        paths = [package] if package.is_file() else code_files(package)
        listing += [[str(path.relative_to(package.parent)), files.sha256_file(path)] for path in paths]
    return files.sha256_json(listing)


def set_code_aside(run: RunDir) -> Path:
    """Move a damaged copy out of the way, for people to look at; returns where to."""
    target = run.code.with_name(f"code.bad.{int(time.time())}")
    run.code.rename(target)
    return target


def promised_code(run: RunDir) -> str | None:
    """The hash of the run's copy of the code: of its manifest or, if that is lost, of its events."""
    facts = read_manifest(run)
    if facts is not None:
        return str(facts["code_sha256"])
    told = [event["code_sha256"] for event in run.events() if "code_sha256" in event]
    return told[-1] if told and isinstance(told[-1], str) else None


def read_manifest(run: RunDir) -> dict[str, Any] | None:
    """manifest.json, or None if it is missing or is not one."""
    try:
        facts = files.read_json(run.manifest)
        whole = isinstance(facts["code_sha256"], str) and isinstance(facts["folder"], str)
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return facts if whole else None


def manifest(site: str, code_hash: str, spec_path: Path) -> dict[str, Any]:
    """Who made the run, when, where and with what; nothing here imports the packages it names."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "user": _user(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "site": site,
        "command": redact.arguments(sys.argv),
        "folder": str(Path.cwd()),
        "spec_file": str(spec_path.absolute()),
        "python": platform.python_version(),
        "medgen": __version__,
        "packages": {name: version for name in DISTRIBUTIONS if (version := _version(name)) is not None},
        "code_sha256": code_hash,
        "git": {"medgen": git_state(PACKAGE), "folder": git_state(Path.cwd())},
    }


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without this uid in /etc/passwd
        return str(os.getuid())


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, whether files differ from it, and the hash of that difference; None outside a git checkout."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain") or ""
    patch = _git(folder, "diff", "HEAD", "--binary") or ""
    dirty = bool(changes.strip())
    return {
        "commit": commit.strip(),
        "dirty": dirty,
        "patch_sha256": files.sha256_bytes(patch.encode()) if dirty else None,
        "changed_files": [line[3:] for line in changes.splitlines()][:50],
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout if answer.returncode == 0 else None
