"""A script that submits itself again before its time limit becomes `segments`. Used by verb.py.

Only the whole pattern is taken: a trap, a handler that ends in `sbatch "$0"` with a counter, the work in the background."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from medgen.launch.importing.reading import Draft
from medgen.launch.importing.shell import Statement, split
from medgen.launch.importing.words import assignment, unquoted

SIGNAL = re.compile(r"(?:SIG)?(USR1|USR2|TERM|INT|HUP|10|12|15)", re.IGNORECASE)
NUMBERS = {"10": "USR1", "12": "USR2", "15": "TERM"}
FUNCTION = re.compile(r"(?:function[ \t]+)?(\w+)[ \t]*(?:\([ \t]*\))?[ \t\n]*\{[ \t]*(?:#.*)?\n(.*)\n[ \t]*\}[ \t]*", re.DOTALL)
KILL = re.compile(r'kill(?: -(?:s )?(?:SIG)?(\w+))? "?\$\{?(\w+)\}?"?')
WAIT = re.compile(r'wait "?\$\{?(\w+)\}?"?')
QUIET = re.compile(r"[ \t]*(2>[ \t]*/dev/null|&>[ \t]*/dev/null|>[ \t]*/dev/null 2>&1|\|\|[ \t]*(true|:))")
NEXT = re.compile(r'(\w+)=\$\(\([ \t]*\$?\{?(\w+)\}?[ \t]*\+[ \t]*1[ \t]*\)\)')
LIMIT = re.compile(
    r'if (?:\[\[?|\(\()[ \t]*"?\$?\{?(\w+)\}?"?[ \t]*(-ge|-gt|>=|>)[ \t]*"?\$?\{?(\w+)\}?"?[ \t]*(?:\]\]?|\)\))[ \t]*(?:;[ \t]*|\n[ \t]*)then\n(.*)\n[ \t]*fi', re.DOTALL
)  # fmt: skip
MARKER = re.compile(r'if \[\[? -[efs] ("[^"]+"|[^\s"]+) \]\]?(?:;[ \t]*|\n[ \t]*)then\n(.*)\n[ \t]*fi', re.DOTALL)
AGAIN = re.compile(r'sbatch(?:[ \t]+--export=(\S+))?[ \t]+(?:"?\$0"?|"?\$\{?BASH_SOURCE(?:\[0\]\})?"?|"?\$\{?\w+\}?"?)')
HANDED_ON = re.compile(r'(\w+)=("?)\$\{?(\w+)\}?\2')
ALWAYS_ENDS = re.compile(r"exit [01]")
STATE = "$MEDGEN_OUT/handed_on"


@dataclass(frozen=True)
class Chain:
    """What was understood. `saves_at`: the signal that lets the work save, None if none reaches it."""

    segments: int
    counter: str
    handed_on: tuple[str, ...]
    saves_at: str | None
    process: str | None  # the variable that holds the process number of the work
    handler: Statement
    trap: Statement


def lift_chain(draft: Draft) -> Draft:
    """`segments` in the place of the resubmission; unchanged, with hints, if any part of the pattern is not known."""
    submits = next((statement for statement in draft.body if re.search(r"(?<![\w-])sbatch(?![\w-])", _code(statement))), None)
    if submits is None:
        return draft
    chain, problem = _understand(draft)
    if chain is None:
        itself = re.search(r"sbatch[^\n]*(\$0|BASH_SOURCE)", submits.text)
        return draft.hint(submits.first, f"submits {'itself, but $0 is not this script any more' if itself else 'other jobs, unknown to medgen'}; {problem}")
    return _without_chain(draft, chain)


def _code(statement: Statement) -> str:
    """Its text, or nothing for a comment; lines of a function that are comments are left out."""
    if statement.kind in ("comment", "blank"):
        return ""
    return "\n".join(line for line in statement.lines if not line.lstrip().startswith(("#", "echo ")))


def _understand(draft: Draft) -> tuple[Chain | None, str]:
    """The chain, or None and what to do in words."""
    by_hand = "write segments: N and leave only the work, or stages with needs:"
    functions = {match.group(1): (statement, match.group(2)) for statement in draft.body if (match := FUNCTION.fullmatch(statement.text))}
    traps = [statement for statement in draft.body if statement.kind == "simple" and statement.commands and statement.commands[0][0] == "trap"]
    handlers = [(statement, unquoted(statement.commands[0][1])) for statement in traps if len(statement.commands[0]) >= 3]
    found = [(trap, *functions[name]) for trap, name in handlers if name in functions and "sbatch" in functions[name][1]]
    if len(found) != 1:
        return None, f"no trap with a function that submits again was recognised: {by_hand}"
    trap, handler, body = found[0]
    if sum(bool(re.search(r"\bsbatch\b", _code(statement))) for statement in draft.body) > 1:
        return None, f"it is submitted again in several places: {by_hand}"
    parts = _parts(body, handler.first + 1)
    if isinstance(parts, str):
        return None, f"the handler does more than this ({parts}): {by_hand}"
    maximum = _fixed_number(draft, parts["maximum"])
    if maximum is None:
        return None, f"{parts['maximum']} is not one fixed number: {by_hand}"
    if parts["compared"] != parts["next"] or parts["counter"] not in (name for name, _ in _pairs(parts["export"])):
        return None, f"the counter is not handed on: {by_hand}"
    pairs = _pairs(parts["export"])
    if any(name != value for name, value in pairs if name != parts["counter"]):
        return None, f"variables are handed on under other names: {by_hand}"
    handed_on = tuple(name for name, _ in pairs if name != parts["counter"])
    process = parts["process"] or None
    work = _work(draft, process)
    if process is not None and work is None:
        return None, f"the work in the background of {process} was not recognised: {by_hand}"
    if handed_on and work is None:
        return None, f"the work was not recognised: {by_hand}"
    timed = work is not None and work[0].tokens[0].text == "time"
    signal = NUMBERS.get(parts["signal"], parts["signal"])
    saves_at = signal if signal in ("USR1", "USR2", "INT", "HUP") and not timed else None
    segments = maximum if parts["comparison"] in ("-ge", ">=") else maximum + 1
    return Chain(segments, parts["counter"], handed_on, saves_at, process, handler, trap), ""


def _parts(body: str, first_line: int) -> dict[str, str] | str:
    """The handler step by step; the line that is none of the known ones, in words."""
    found = {"process": "", "signal": "", "marker": ""}
    order = []
    for statement in split(body, first_line):
        text = QUIET.sub("", statement.text.strip())
        if statement.kind in ("blank", "comment") or set(statement.called) == {"echo"}:
            continue
        if match := KILL.fullmatch(text):
            found |= {"signal": (match.group(1) or "TERM").upper(), "process": match.group(2)}
            order.append("kill")
        elif match := WAIT.fullmatch(text):
            order.append("wait")
        elif (match := MARKER.fullmatch(text)) and _only_leaves(match.group(2), "exit 0"):
            found["marker"] = match.group(1)
            order.append("marker")
        elif match := NEXT.fullmatch(text):
            found |= {"next": match.group(1), "counter": match.group(2)}
            order.append("next")
        elif (match := LIMIT.fullmatch(text)) and _only_leaves(match.group(4), "exit 0", "exit 1"):
            found |= {"compared": match.group(1), "comparison": match.group(2), "maximum": match.group(3)}
            order.append("limit")
        elif match := AGAIN.fullmatch(text):
            found["export"] = match.group(1) or ""
            order.append("again")
        elif ALWAYS_ENDS.fullmatch(text):
            order.append("exit")
        else:
            return f"line {statement.first}: {statement.text.strip().splitlines()[0]}"
    expected = [step for step in ("kill", "wait", "marker", "next", "limit", "again", "exit") if step in order]
    if order != expected or not {"next", "limit", "again", "exit"} <= set(order):
        return "its steps come in another order"
    return found


def _only_leaves(body: str, *endings: str) -> bool:
    """Nothing but prints, and an exit at the end."""
    statements = [statement for statement in split(body) if statement.kind not in ("blank", "comment")]
    return bool(statements) and statements[-1].text.strip() in endings and all(set(item.called) == {"echo"} for item in statements[:-1])


def _pairs(export: str) -> list[tuple[str, str]]:
    """NAME=$VALUE of `--export=ALL,NAME="${VALUE}",...`; something unknown in it gives a pair that fits nothing."""
    pairs = []
    for item in export.strip("\"'").split(","):
        match = HANDED_ON.fullmatch(item)
        if match:
            pairs.append((match.group(1), match.group(3)))
        elif item != "ALL":
            pairs.append((item, ""))
    return pairs


def _fixed_number(draft: Draft, name: str) -> int | None:
    """A number as it stands, or the one value that a variable of that name has."""
    if name.isdecimal():
        return int(name)
    values = []
    for statement in draft.body:
        for words in statement.commands:
            for word in words[1:] if words[0] in ("readonly", "export", "declare") else words:
                pair = assignment(word)
                if pair is not None and pair[0] == name:
                    values.append(re.sub(rf"\$\{{{name}:-(\d+)\}}", r"\1", unquoted(pair[1])))
    return int(values[0]) if len(values) == 1 and values[0].isdecimal() and int(values[0]) > 0 else None


def _work(draft: Draft, process: str | None) -> tuple[Statement, Statement, Statement] | None:
    """`command &`, `PID=$!`, `wait $PID`, one after another."""
    steps = [statement for statement in draft.body if statement.kind not in ("blank", "comment")]
    for work, number, wait in zip(steps, steps[1:], steps[2:], strict=False):
        in_background = work.kind == "simple" and work.operators[-1:] == ["&"] and work.text.rstrip().endswith("&") and len(work.commands) == 1
        if in_background and number.text.strip() == f"{process}=$!" and (match := WAIT.fullmatch(wait.text.strip())) and match.group(1) == process:
            return work, number, wait
    return None


def _without_chain(draft: Draft, chain: Chain) -> Draft:
    segments = f"segments: {chain.segments}"
    work = _work(draft, chain.process)
    if chain.saves_at is None:
        draft = draft.move(chain.handler, segments).move(chain.trap, segments)
    else:
        draft = _only_saving(draft, chain, segments)
    for directive in draft.directives:
        if directive.option == "signal":
            draft = draft.move_directive(directive, "medgen's own warning before the time limit")
    for statement in draft.body:
        if re.fullmatch(rf'{chain.counter}="?\$\{{{chain.counter}:-0\}}"?', statement.text.strip()):
            draft = draft.put(statement, f"{chain.counter}=${{SLURM_RESTART_COUNT:-0}}").moved_line(statement.first, statement.text, "Slurm counts the segments now")
    if work is not None and chain.saves_at is None:
        draft = _in_foreground(draft, *work)
    if work is not None and chain.handed_on:
        draft = _remembering(draft, chain.handed_on, work[0].first)
    return replace(draft, segments=chain.segments).understood(f"chain (lines {chain.handler.first}-{chain.handler.last}) -> {segments}")


def _in_foreground(draft: Draft, work: Statement, number: Statement, wait: Statement) -> Draft:
    """The plain command: no signal of the old trap reached the work, so nothing is lost with it."""
    where = "left out: the work runs in the foreground"
    draft = draft.move(number, where).move(wait, where).moved_line(work.last, work.lines[-1].strip(), "without the &")
    return draft.put(work, work.text.rstrip()[:-1].rstrip())


def _only_saving(draft: Draft, chain: Chain, segments: str) -> Draft:
    """The handler up to where it would submit: medgen sends it TERM, the work saves, and medgen starts the next segment."""
    handler = chain.handler
    inside = split("\n".join(handler.lines[1:-1]), handler.first + 1)
    gone = next(index for index, statement in enumerate(inside) if NEXT.fullmatch(statement.text.strip()))
    kept = [handler.lines[0], *(statement.text for statement in inside[:gone]), f"    exit 143  # medgen starts the next of {chain.segments} segments", "}"]
    for statement in inside[gone:]:
        if statement.kind != "blank":
            draft = draft.moved_line(statement.first, statement.text, segments)
    draft = draft.put(handler, "\n".join(kept))
    return draft.put(chain.trap, f"trap {chain.trap.commands[0][1]} TERM  # what medgen sends").moved_line(chain.trap.first, chain.trap.text, segments)


def _remembering(draft: Draft, names: tuple[str, ...], before_line: int) -> Draft:
    """What was handed on with `sbatch --export` is kept in a file of the run."""
    work = next(statement for statement in draft.body if statement.first == before_line)
    kept = f'[ -s "{STATE}" ] || declare -p {" ".join(names)} > "{STATE}" 2> /dev/null || true  # the same in every segment'
    draft = draft.put(work, f"{kept}\n{work.text}")
    return draft.first(f'if [ -s "{STATE}" ]; then . "{STATE}"; fi  # {", ".join(names)} of the first segment')
