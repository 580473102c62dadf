"""The shape of the package: imports go one way, the login node never loads torch, commands and links in the docs work."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PACKAGE = REPOSITORY / "medgen"

# each may import what stands before it: spec -> plan -> launch -> train -> ... -> report, and the services they share
ORDER = [
    "errors", "stop", "world", "activity", "lifeline", "fault", "files", "csv_files", "cardiac", "commits", "room", "names", "weights", "redact", "units", "sbatch_options", "document", "rng", "roc", "captions", "as_written", "spec_base", "pretrained", "dp", "models", "spec_accept", "spec_data", "spec_evaluate", "spec_utility", "spec_stages", "spec", "site", "rundir", "watchdog", "plan", "planning", "data", "launch", "dist", "device", "context", "acceleration", "sharded", "checkpoint",
    "published", "importing",
    "task", "alone", "previews", "train_log", "records", "training", "validation", "resume", "ahead", "rehearsal", "health", "lr_curve", "search_pictures", "lr_search", "train", "find_lr", "collected", "shards", "gate", "conditions", "exports", "generate", "generator", "command", "evaluate", "features", "utility", "structure", "collect", "report", "prepare", "classify", "two_folders", "step_search", "step_measure", "find_steps", "price", "watch", "fsck", "checks", "cli", "__main__",
]


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> set[str]:
    """medgen modules that a file imports when it is loaded or run; not those for type checking only."""
    tree = ast.parse(path.read_text())
    type_checking = {
        id(inner) for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in type_checking:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "medgen":
            found |= {alias.name for alias in node.names if alias.name != "__version__"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("medgen."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("medgen.")}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    module = module_of(path)
    if module == "__init__":
        assert not imports_of(path)
        return
    assert module in ORDER, f"say in ORDER where {module} belongs"
    later = {name for name in imports_of(path) if ORDER.index(name) > ORDER.index(module)}
    assert not later, f"{path} imports from later steps: {later}"


def test_every_module_says_what_it_is() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_a_wheel_holds_every_module() -> None:
    """setup.cfg finds packages by their __init__.py: a folder without one is in a clone and in no installation."""
    assert [folder for folder in {path.parent for path in PACKAGE.rglob("*.py")} if not (folder / "__init__.py").is_file()] == []


HEAVY = ("torch", "monai", "nibabel", "pydicom", "pandas", "matplotlib", "scipy", "skimage", "sklearn")


@pytest.mark.parametrize("arguments", [["--help"], ["prepare", "split", "--help"], ["submit", "jobs/demo.yaml", "--dry-run"], ["ls"], ["fsck", "tests"], ["submit", "jobs/demo.yaml", "--dry-run", "--json"]])
def test_the_login_node_loads_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    code = f"import sys; sys.argv = ['medgen', *{arguments!r}]\n" \
           "import atexit\n" \
           f"atexit.register(lambda: print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules]))\n" \
           "from medgen.cli import main; main()"
    environment = {**os.environ, "MEDGEN_RUNS": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "HEAVY []", done.stdout[-500:] + done.stderr


def test_the_documented_exit_codes_are_the_real_ones() -> None:
    from medgen import cli
    from medgen.errors import Exit

    for name, words in (("DONE", "0 done"), ("FAILED", "1 a stage failed"), ("BAD_INPUT", "2 wrong input"),
                        ("INTERRUPTED", "3 interrupted"), ("UNFINISHED", "4 not finished yet")):
        assert words in cli.EPILOG and words.startswith(str(int(Exit[name])))


def pages() -> list[Path]:
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_links_in_the_docs_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", page.read_text()):
        link = target[0] or target[1]
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


@pytest.mark.parametrize("page", pages(), ids=lambda path: path.name)
def test_commands_in_the_docs_exist(page: Path) -> None:
    """Every `medgen ...` line in a code block names a verb, options and files that exist."""
    blocks = "\n".join(re.findall(r"```(?:sh|bash|console)?\n(.*?)```", page.read_text(), flags=re.DOTALL))
    for line in re.findall(r"^(?:\$ )?(medgen [^#\n]+|make [a-z]+)", blocks, flags=re.MULTILINE):
        words = line.split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE), line
            continue
        if words[1].startswith("-"):
            continue
        verb = words[1:3] if words[1] in ("prepare", "weights") else words[1:2]
        shown = subprocess.run([sys.executable, "-m", "medgen", *verb, "--help"], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
        assert shown.returncode == 0, f"{page.name}: {line}"
        for option in [word.split("=")[0] for word in words[2:] if word.startswith("--")]:
            assert option in shown.stdout, f"{page.name}: {line}: {option}"
        for word in words[2:]:
            if word.startswith(("jobs/", "configs/", "cluster/")):
                assert (REPOSITORY / word).exists(), f"{page.name}: {line}"
