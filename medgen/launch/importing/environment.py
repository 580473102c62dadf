"""Modules, conda, virtual environments and fixed variables move from the script into `setup` and `env`. Used by verb.py.

A line moves only if nothing that stays behind it could tell the difference; otherwise it stays in `run`, which is always right."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import PurePath

from medgen.launch.importing.reading import Draft
from medgen.launch.importing.shell import Lost, Statement, everything_called
from medgen.launch.importing.words import assignment, literal, names_in

SUBMIT_FOLDER = re.compile(r'"?\$(SLURM_SUBMIT_DIR|\{SLURM_SUBMIT_DIR(:-\.|:-\$PWD)?\})/?"?')
PRINTS = {"echo", "printf", "date", "hostname", "nvidia-smi", "pwd", "whoami", "uptime", "free", "df", "lscpu", "nproc", "env", "printenv", "which", "type"}
LOOKS = {"cat", "ls", "head", "tail", "wc", "du", "squeue", "sacct", "seff", "scontrol", "tree", "stat"}
KEYWORDS = {"if", "fi", "for", "select", "while", "until", "done", "case", "esac", "{", "}", "[[", "function"}
# what neither reads nor changes what modules and conda change
NEUTRAL = PRINTS | LOOKS | KEYWORDS | {
    ":", "[", "basename", "cd", "chmod", "cp", "cut", "declare", "dirname", "exit", "export", "false", "find", "grep", "id", "ln", "mkdir", "mktemp",
    "mv", "readlink", "readonly", "realpath", "rm", "rsync", "sed", "seq", "set", "shift", "shopt", "sleep", "sort", "tar", "test", "touch", "tr", "trap",
    "true", "typeset", "ulimit", "umask", "uniq", "unset", "awk", "kill", "wait", "git", "]]", "local",
}  # fmt: skip
# variables that modules, conda and virtual environments set: their order against those lines counts
MANAGED = re.compile(r"(PATH|_HOME|_ROOT|_DIR|FLAGS|_PREFIX|_INC|_LIB)$|^(LD_|CONDA|CUDA_|EB|VIRTUAL_ENV|PYTHON|CC$|CXX$|FC$|MPI|I_MPI|OMPI|MKL|OMP_|PS1)")
INHERITED = re.compile(r"^(PATH|MANPATH|MODULEPATH|LD_LIBRARY_PATH|LIBRARY_PATH|CPATH|PYTHONPATH|CONDA_\w+|VIRTUAL_ENV)$")  # assigned is exported
KEPT_FOR_MEDGEN = ("MEDGEN_", "SLURM_", "SBATCH_")
ASSIGNED = re.compile(r"([A-Za-z_]\w*)(?:\[[^]]*\])?\+?=|\$\{(\w+):?=|\b(?:for|read|select|unset)\s+(?:-\w+\s+)*([\w \t]+)")
DEACTIVATION = {"deactivate", "conda", "mamba", "micromamba", "source", "module"}


def lift_environment(draft: Draft) -> Draft:
    """Every lift of this module, in the order that lets each see what the one before left."""
    draft = _without_ending(_without_submit_folder(draft))
    return _with_env(draft if draft.login else _with_setup(draft))


def keep_exit_code(draft: Draft) -> Draft:
    """A failure of the work must not be hidden by what is only printed after it."""
    if _stops_at_errors(draft):
        return draft
    draft = _tell_unnoticed(draft)
    tail = _tail(draft)
    work = [statement for statement in draft.body[: len(draft.body) - len(tail)] if statement.kind not in ("blank", "comment")]
    if not work or not any(statement.kind == "simple" for statement in tail):
        return draft
    last, prints = work[-1], "\n".join(statement.text for statement in tail)
    if "$?" in prints or "exit" in last.called or last.kind == "opaque":
        return draft.hint(last.last, "what comes after this line decides the exit code, so a failure may count as done; end with exit and the right code")
    kept = assignment(last.tokens[0].text) if last.kind == "simple" and len(last.tokens) == 1 else None
    name = kept[0] if kept is not None and kept[1] in ("$?", '"$?"') else None
    end = next(statement for statement in reversed(tail) if statement.kind != "blank")
    if name is None:
        name = "exit_code_of_work"
        draft = draft.put(last, f"{last.text}\n{name}=$?")
    draft = draft.put(end, f'{end.text}\nexit "${name}"  # what is printed last does not hide a failure')
    return draft.understood(f"exit code of line {last.first} kept")


def _tell_unnoticed(draft: Draft) -> Draft:
    """Only the last exit code counts: which programs fail without being noticed."""
    statements = [statement for statement in draft.body if statement.kind not in ("blank", "comment", "opaque") and statement.first]
    programs = [statement for statement in statements if not set(statement.called) <= NEUTRAL and not _only_looks(statement) and not _checks_itself(statement)]
    if not programs or "$?" in draft.run:
        return draft
    after = [statement for statement in statements[statements.index(programs[-1]) + 1 :] if not _only_prints(statement)]
    unnoticed = [f"{statement.first}" for statement in (programs if after else programs[:-1])]
    if not unnoticed:
        return draft
    lines = f"line{'s' * (len(unnoticed) > 1)} {', '.join(unnoticed[:6])}{', ...' if len(unnoticed) > 6 else ''}"
    return draft.hint(after[-1].first if after else programs[-1].first, f"only this decides the exit code: a failure in {lines} goes unnoticed; begin run with set -e if it should not")


def _checks_itself(statement: Statement) -> bool:
    """Its failure is dealt with: `... || exit`, a condition, the environment, or work in the background that is waited for."""
    return statement.kind == "compound" or bool({"||", "&"} & set(statement.operators)) or all(_is_environment(words) for words in statement.commands)


def _tail(draft: Draft) -> list[Statement]:
    """The end of the script that only prints."""
    count = 0
    for statement in reversed(draft.body):
        if statement.kind not in ("blank", "comment") and not _only_prints(statement):
            break
        count += 1
    return list(draft.body[len(draft.body) - count :])


def _only_prints(statement: Statement) -> bool:
    called = set(statement.called)
    return statement.kind == "simple" and bool(called) and called <= PRINTS | LOOKS and not set(statement.operators) & {">", ">>", "&", "||"}


def _stops_at_errors(draft: Draft) -> bool:
    for statement in draft.body:
        for words in statement.commands:
            if words[0] == "set" and any(re.fullmatch(r"-\w*e\w*|errexit", word) for word in words[1:]):
                return True
    return False


def _without_submit_folder(draft: Draft) -> Draft:
    """`cd $SLURM_SUBMIT_DIR`: run begins there, and elsewhere than on Slurm the variable is not set."""
    for statement in draft.body:
        if "cd" in statement.called and statement.kind == "simple" and statement.commands[:1] and statement.commands[0][:1] == ["cd"]:
            first, *others = statement.commands
            harmless = all(words[0] in ("exit", "true") for words in others) and set(statement.operators) <= {"||"}
            if len(first) == 2 and SUBMIT_FOLDER.fullmatch(first[1]) and harmless:
                return _with_submit_folder(draft.move(statement, "left out: run begins in the folder of submit"))
        if {"cd", "pushd"} & set(statement.called) or statement.kind == "opaque":
            break
    return _with_submit_folder(draft)


def _with_submit_folder(draft: Draft) -> Draft:
    """Where the script still asks for the folder, it is told also without Slurm."""
    asking = [statement for statement in draft.body if statement.kind not in ("blank", "comment") and "SLURM_SUBMIT_DIR" in statement.text]
    told = any(statement.first == 0 for statement in asking)  # that line came with --chdir
    return draft.first('export SLURM_SUBMIT_DIR="${SLURM_SUBMIT_DIR:-$PWD}"') if asking and not told else draft


def _without_ending(draft: Draft) -> Draft:
    """`conda deactivate` at the end: the shell ends anyway, and its exit code would stand for that of the work."""
    for statement in reversed(draft.body):
        if statement.kind in ("blank", "comment") or _only_prints(statement):
            continue
        if statement.kind == "simple" and statement.commands and all(_leaves_environment(words) for words in statement.commands):
            draft = draft.move(statement, "left out: the shell ends anyway, and this hid the exit code of the work")
            continue
        break
    return draft


def _leaves_environment(words: list[str]) -> bool:
    return words == ["deactivate"] or (words[0] in DEACTIVATION and words[1:2] in (["deactivate"], ["purge"], ["unload"]))


def _with_setup(draft: Draft) -> Draft:
    modules: list[str] = []
    others: list[str] = []
    before: list[Statement] = []
    for statement in draft.body:
        if _sets_up(statement) and _independent(statement, before):
            draft = replace(draft.move(statement, "setup"), setup=(*draft.setup, *_setup_lines(statement)))
            for words in statement.commands:
                modules += [word for word in words[2:] if not word.startswith("-")] if words[0] in ("module", "ml") and words[1:2] in (["load"], ["add"]) else []
                others += _environment_names(words)
            continue
        if not _neutral(statement, before):
            break
        before.append(statement)
    if modules:
        draft = draft.understood(f"{len(modules)} module{'s' * (len(modules) != 1)}")
    for words_of_environment in others:
        draft = draft.understood(words_of_environment)
    return draft


def _sets_up(statement: Statement) -> bool:
    if statement.kind != "simple" or not statement.commands or set(statement.operators) - {"&&", ";", "||", ">", ">>", "&>", ">&"}:
        return False
    alternatives = "||" in statement.operators
    return all(_is_environment(words) or (alternatives and words in (["true"], [":"])) for words in statement.commands)


def _is_environment(words: list[str]) -> bool:
    if words[0] in ("module", "ml"):
        return True
    if words[0] in ("conda", "mamba", "micromamba"):
        return words[1:2] in (["activate"], ["deactivate"])
    if words[0] in ("source", ".") and len(words) > 1:
        name = PurePath(words[1].strip("\"'")).name
        return name in ("activate", "conda.sh", "mamba.sh") or (words[1] in ("activate", "deactivate"))
    return words[0] == "eval" and len(words) == 2 and bool(re.fullmatch(r'"?\$\([\w./-]*(conda|mamba|micromamba) \'?shell\.?\'?[\w. \'-]*\)"?', words[1]))


def _environment_names(words: list[str]) -> list[str]:
    """How to tell of it: `conda AIS4900`, `venv ~/envs/x`."""
    if words[0] in ("conda", "mamba", "micromamba") and words[1] == "activate":
        return [f"conda {words[-1] if len(words) > 2 else 'base'}"]
    if words[0] in ("source", ".") and PurePath(words[1].strip("\"'")).name == "activate":
        named = words[1] == "activate"
        return [f"conda {words[2]}"] if named and len(words) > 2 else [f"venv {PurePath(words[1].strip(chr(34))).parent.parent}"]
    return []


def _setup_lines(statement: Statement) -> list[str]:
    """One line per command where one must follow the other: in `a && b` bash would go on after a failing a."""
    if set(statement.operators) <= {"&&", ";"}:
        return [" ".join(words) for words in statement.commands]
    return [re.sub(r"\\\n\s*", "", statement.text).strip()]


def _independent(statement: Statement, before: Iterable[Statement]) -> bool:
    """Nothing that stays in `run` before this line makes what the line uses."""
    earlier = list(before)
    used = names_in(statement.text)
    relative = any(re.match(r"(?![/~$\"'-])[^=]*/", word) for words in statement.commands for word in words[1:] if words[0] in ("source", ".", "conda"))
    if relative and any({"cd", "pushd"} & set(item.called) for item in earlier):
        return False
    return not any(used & _assigned(item.text) for item in earlier if item.kind not in ("comment", "blank"))


def _assigned(text: str) -> set[str]:
    names: set[str] = set()
    for match in ASSIGNED.finditer(text):
        names |= set((match.group(1) or match.group(2) or match.group(3)).split())
    return names


def _neutral(statement: Statement, before: Iterable[Statement]) -> bool:
    """The lines that set up an environment may come before this one as well as after it."""
    if statement.kind in ("blank", "comment"):
        return True
    try:
        called = everything_called(statement.text)
    except Lost:
        return False
    if not called <= NEUTRAL:
        return _only_looks(statement)
    if statement.kind == "compound" and not statement.called:
        return True  # it only defines a function
    own = {name for item in before for name in _assigned(item.text)} | _assigned(statement.text)
    read = set(re.findall(r"\$\{?([A-Za-z_]\w*)", statement.text)) - own
    if any(MANAGED.search(name) and not name.startswith("SLURM_") for name in read) and not _only_prints(statement):
        return False
    return not any((MANAGED if "export" in called else INHERITED).search(name) for name in _assigned(statement.text))


def _only_looks(statement: Statement) -> bool:
    """`python -c "import torch; print(...)"`: code that imports and prints and does nothing else."""
    if statement.kind != "simple" or len(statement.commands) != 1 or statement.operators:
        return False
    words = statement.commands[0]
    code = literal(words[2]) if len(words) == 3 and words[0] in ("python", "python3") and words[1] == "-c" else None
    if code is None:
        return False
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError):
        return False
    return all(isinstance(node, ast.Import | ast.ImportFrom) or _prints(node) for node in body)


def _prints(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name) and node.value.func.id == "print"


def _with_env(draft: Draft) -> Draft:
    """`export NAME=value` whose value is always the same, and that nothing before or elsewhere touches."""
    whole = "\n".join([*draft.setup, *(statement.text for statement in draft.body if statement.kind not in ("comment", "blank"))])
    before: list[Statement] = []
    for statement in draft.body:
        pairs = _exported(statement)
        free = all(_alone(name, statement, whole, before) and not (draft.setup and MANAGED.search(name)) for name, _ in pairs)
        if pairs and free:
            draft = replace(draft.move(statement, "env"), env=(*draft.env, *pairs))
            continue
        if not _neutral(statement, before):
            break
        before.append(statement)
    return draft


def _exported(statement: Statement) -> list[tuple[str, str]]:
    if statement.kind != "simple" or statement.operators or len(statement.commands) != 1 or statement.commands[0][0] != "export":
        return []
    pairs = []
    for word in statement.commands[0][1:]:
        given = assignment(word)
        value = literal(given[1]) if given is not None else None
        if given is None or value is None or given[0].startswith(KEPT_FOR_MEDGEN):
            return []
        pairs.append((given[0], value))
    return pairs


def _alone(name: str, statement: Statement, whole: str, before: list[Statement]) -> bool:
    """The variable is set here only, and no line before this one uses it."""
    mentioned = re.compile(rf"(?<![A-Za-z0-9_]){name}(?![A-Za-z0-9_])")
    others = whole.replace(statement.text, "", 1)
    if name in _assigned(others) or re.search(rf"(?<![\w$]){name}=", others):
        return False
    return not any(mentioned.search(item.text) for item in before if item.kind not in ("comment", "blank"))
