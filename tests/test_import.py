"""Hand-written sbatch scripts become specs that ask Slurm for the same and do the same, and no line of them is lost."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import unavailable
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medgen import planning, spec
from medgen.errors import InputError
from medgen.launch.importing import run_import
from medgen.launch.importing.directives import DirectiveError, read_header
from medgen.launch.importing.items import array_items
from medgen.launch.importing.portable import duration
from medgen.launch.importing.shell import split
from medgen.launch.importing.words import literal
from medgen.launch.script import render_script, whole_stage
from medgen.sbatch_options import minutes
from medgen.site import Site
from medgen.spec_base import Resources

EXAMPLES = Path(__file__).parent / "imported"
SLURM_SITE = Site(name="test", scheduler="slurm", cpus=8, gpus=1)
PROPERTY = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
Medgen = Callable[..., subprocess.CompletedProcess[str]]


def example(name: str) -> Path:
    return EXAMPLES / f"{name}.slurm"


def script(tmp_path: Path, text: str | bytes, name: str = "job.slurm") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def imported(tmp_path: Path, *scripts: Path | str, portable: bool = False) -> Any:
    """The stage `main` of the one spec that the scripts (paths, or one text) become."""
    paths = [script(tmp_path, item) if isinstance(item, str) else item for item in scripts]
    out = tmp_path / "out" / "spec.yaml"
    out.unlink(missing_ok=True)
    (out.parent / "imported_site.yaml").unlink(missing_ok=True)
    run_import(paths, out, portable)
    return spec.load(out).stages["main"]


def header(tmp_path: Path) -> list[str]:
    """The directives of the script that the imported spec gives."""
    made = planning.make_plan(spec.load(tmp_path / "out" / "spec.yaml"), SLURM_SITE)
    text = render_script(made, made.stages[0], whole_stage(made.stages[0], 1), tmp_path / "runs" / made.run_id, "/usr/bin/python3")
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


# ----- what sbatch reads


def effective(*lines: str) -> list[tuple[str, str | None]]:
    return [(item.option, item.value) for item in read_header(["#!/bin/bash", *lines, "true"]).effective]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("#SBATCH --time=10:00", [("time", "10:00")]),
        ("#SBATCH --time 10:00  # ten minutes", [("time", "10:00")]),
        ("#SBATCH\t-t10:00\t-N1", [("time", "10:00"), ("nodes", "1")]),
        ("#SBATCH -J name -n 4", [("job-name", "name"), ("ntasks", "4")]),
        ("#SBATCH -sn 4", [("oversubscribe", None), ("ntasks", "4")]),
        ('#SBATCH --constraint="a100|h100"', [("constraint", "a100|h100")]),
        ("#SBATCH --comment='it is # not a comment'", [("comment", "it is # not a comment")]),
        ('#SBATCH --comment="a \\" b"', [("comment", 'a " b')]),
        ("#SBATCH --comment=cut#here --mem=1G", [("comment", "cut")]),
        ("#SBATCH--mem=1G", [("mem", "1G")]),
        ("#SBATCH --part=GPUQ", [("partition", "GPUQ")]),
        ("#SBATCH --exclusive --nice=5", [("exclusive", None), ("nice", "5")]),
        ("#SBATCH --something-new=7", [("something-new", "7")]),
        ("##SBATCH --mem=1G", []),
        (" #SBATCH --mem=1G", []),
        ("#SBATCH # nothing", []),
    ],
)
def test_a_directive_is_read_as_sbatch_reads_it(line: str, expected: list[tuple[str, str | None]]) -> None:
    assert effective(line) == expected


def test_the_last_of_several_counts_and_all_of_mail_type() -> None:
    lines = ["#SBATCH -t 5 --requeue", "#SBATCH --mail-type=END", "#SBATCH --time=7 --no-requeue", "#SBATCH --mail-type=FAIL"]
    assert effective(*lines) == [("mail-type", "END"), ("time", "7"), ("no-requeue", None), ("mail-type", "FAIL")]


def test_directives_behind_the_first_command_do_not_count() -> None:
    found = read_header(["#!/bin/bash", "", "# words", "#SBATCH --mem=1G", "  # words", "cd /tmp", "#SBATCH --mem=2G"])
    assert [item.value for item in found.effective] == ["1G"]
    assert (found.command_line, found.late) == (6, [7])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('#SBATCH --job-name="open', "never closed"),
        ("#SBATCH --job-name = x", "no option"),
        ("#SBATCH --mem", "needs a value"),
        ("#SBATCH --nod=1", "--nodefile, --nodelist, --nodes"),
        ("#SBATCH -Z 3", "no option -Z"),
        ("#SBATCH --hold=yes", "takes no value"),
        ("#SBATCH : --mem=1G", "':'"),
        ("#SBATCH hetjob", "hetjob"),
        ("#PBS -l nodes=2", "#PBS"),
        ("#BSUB -n 2", "#BSUB"),
        ("#SLURM --mem=1G", "#SLURM"),
    ],
)
def test_what_sbatch_refuses_is_refused_with_its_line(tmp_path: Path, line: str, words: str) -> None:
    with pytest.raises(InputError, match=f"job.slurm:2: .*{re.escape(words)}"):
        imported(tmp_path, f"#!/bin/bash\n{line}\ntrue\n")


# values that sbatch takes without asking a cluster
OPTIONS: dict[str, tuple[str | None, list[str | None]]] = {
    "time": ("t", ["30", "10:00", "0-12:00:00", "3-00", "1-12:30", "12:00:00"]), "nodes": ("N", ["1", "2", "1-3"]), "ntasks-per-node": (None, ["1", "4"]),
    "cpus-per-task": ("c", ["1", "8", "12"]), "mem": (None, ["64G", "4000", "500M", "2g"]), "gres": (None, ["gpu:1", "gpu:a100:2"]),
    "constraint": ("C", ["gpu80g", "a100|h100", "[a|b]&c"]), "partition": ("p", ["GPUQ", "GPUQ,CPUQ"]), "account": ("A", ["share-lab"]),
    "qos": ("q", ["normal"]), "exclude": ("x", ["n1", "idun-06-[01-07]"]), "mail-type": (None, ["ALL", "END,FAIL"]), "mail-user": (None, ["a@b.org"]),
    "comment": (None, ["one", "two words", "a # b", "it's", 'say "x"', "back\\slash", "${USER}", "é"]), "signal": (None, ["B:USR1@120", "TERM@60"]),
    "requeue": (None, [None]), "no-requeue": (None, [None]), "exclusive": (None, [None, "user"]), "oversubscribe": ("s", [None]),
    "nice": (None, [None, "100"]), "begin": ("b", ["2030-01-01T00:00:00"]), "dependency": ("d", ["singleton", "afterok:17"]), "wckey": (None, ["key"]),
    "kill-on-invalid-dep": (None, ["yes", "no"]), "export": (None, ["ALL", "NONE", "ALL,A=1"]), "job-name": ("J", ["x", "a name", "exp1+"]),
    "output": ("o", ["logs/%j.out"]), "gpus-per-node": (None, ["2"]), "tmp": (None, ["10G"]), "switches": (None, ["1", "2@10"]), "licenses": ("L", ["matlab:2"]),
    "reservation": (None, ["maintenance"]), "use-min-nodes": (None, [None]), "threads-per-core": (None, ["1"]), "overcommit": ("O", [None]),
}  # fmt: skip
JOINED = {"exclusive", "nice"}  # no blank before their value
MEDGENS_OWN = {"job-name", "output", "error", "open-mode", "hold", "parsable", "verbose", "array", "wait", "test-only"}
ADDING = {"mail-type", "kill-on-invalid-dep", "signal", "switches"}  # every mention counts, the others replace each other
SETTING = {"no-requeue": "requeue", "exclusive": "oversubscribe"}


def quoted(value: str) -> st.SearchStrategy[str]:
    double = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    single = [f"'{value}'"] if "'" not in value and "\\" not in value else []
    bare = [value] if re.fullmatch(r"[^\s#\"'\\]+", value) else []
    return st.sampled_from([double, *single, *bare])


@st.composite
def written_option(draw: st.DrawFn) -> tuple[str, str | None, str]:
    """(option, value, one way to write it)."""
    option = draw(st.sampled_from(sorted(OPTIONS)))
    letter, values = OPTIONS[option]
    value = draw(st.sampled_from(values))
    if value is None:
        return option, None, f"-{letter}" if letter and draw(st.booleans()) else f"--{option}"
    text = draw(quoted(value))
    ways = [f"--{option}={text}"] + ([] if option in JOINED else [f"--{option} {text}", f"--{option}\t{text}"])
    ways += [f"-{letter}{text}", f"-{letter} {text}"] if letter else []
    return option, value, draw(st.sampled_from(ways))


@st.composite
def written_header(draw: st.DrawFn) -> tuple[list[str], dict[str, list[str | None]]]:
    """Lines with directives, and the values that count for each setting."""
    lines, expected = [], dict[str, list[str | None]]()
    for options in draw(st.lists(st.lists(written_option(), min_size=1, max_size=3), max_size=8)):
        lines += draw(st.lists(st.sampled_from(["", "# words", "##SBATCH --time=1", " #SBATCH --mem=9G", "#SBATCH", "#SBATCH  # 1"]), max_size=1))
        blank = draw(st.sampled_from([" ", "\t", "   "]))
        comment = draw(st.sampled_from(["", "  # a comment", " #x --mem=1G"]))
        lines.append(f"#SBATCH{blank}{blank.join(text for _, _, text in options)}{comment}")
        for option, value, _ in options:
            setting = SETTING.get(option, option)
            expected[setting] = [*(expected.get(setting, []) if option in ADDING else []), value if value is not None else f"--{option}"]
    return lines, expected


@given(written_header())
@settings(PROPERTY, max_examples=80)
def test_every_effective_directive_comes_through(tmp_path: Path, written: tuple[list[str], dict[str, list[str | None]]]) -> None:
    """Script -> spec -> script: the same settings, word for word and in the same order."""
    lines, expected = written
    stage = imported(tmp_path, "\n".join(["#!/bin/bash", *lines, "true", "#SBATCH --mem=77G", ""]))
    shown = [line for line in header(tmp_path) if line in stage.resources.slurm]
    assert shown == stage.resources.slurm
    found: dict[str, list[str | None]] = {}
    for item in read_header([f"#SBATCH {line}" for line in header(tmp_path)]).effective:
        found.setdefault(SETTING.get(item.option, item.option), []).append(item.value if item.value is not None else f"--{item.option}")
    wanted = {setting: values for setting, values in expected.items() if setting not in MEDGENS_OWN}
    assert {setting: found.get(setting) for setting in wanted} == wanted


@pytest.fixture
def defined(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """What sbatch itself says it read in a script (`sbatch -v` tells before it looks for a cluster); an empty answer: refused."""
    if shutil.which("sbatch") is None:
        unavailable("no sbatch to compare with")
    folder = tmp_path_factory.mktemp("sbatch")
    conf = folder / "slurm.conf"
    conf.write_text("ClusterName=none\nSlurmctldHost=localhost\nSlurmctldPort=1\nAuthType=auth/none\nMessageTimeout=1\nNodeName=n1\nPartitionName=p Nodes=n1\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))} | {"SLURM_CONF": str(conf)}

    def ask(text: str) -> dict[str, str]:
        path = script(folder, text, "asked.sh")
        answer = subprocess.run(["sbatch", "-v", path], env=environment, cwd=folder, capture_output=True, text=True, errors="replace", timeout=60)
        told = re.findall(r"^sbatch: ([a-z-]+) +: (.*)$", answer.stderr, flags=re.MULTILINE)
        return {SETTING.get(option, option): value for option, value in told}  # it shows a setting under every name that was used

    return ask


@given(written_header())
@settings(PROPERTY, max_examples=80)
def test_sbatch_itself_reads_the_same(tmp_path: Path, defined: Callable[[str], dict[str, str]], written: tuple[list[str], Any]) -> None:
    text = "\n".join(["#!/bin/bash", *written[0], "true", "#SBATCH --mem=77G", ""])
    before = defined(text)
    assert before, f"sbatch refused the script of the test:\n{text}"
    imported(tmp_path, text)
    after = defined("\n".join(["#!/bin/bash", *(f"#SBATCH {line}" for line in header(tmp_path)), "true", ""]))
    assert {key: after.get(key) for key in before if key not in MEDGENS_OWN} == {key: value for key, value in before.items() if key not in MEDGENS_OWN}


@pytest.mark.parametrize("text", ["--mem=4G a --time=1", "--job-name=a\\ b", '-J "" --mem=1G', "--nosuch", "--mem=1G -- --time=1", "--comment='x", ": --mem=1G"])
def test_what_is_refused_here_is_refused_by_sbatch(defined: Callable[[str], dict[str, str]], text: str) -> None:
    lines = ["#!/bin/bash", f"#SBATCH {text}", "true", ""]
    try:
        options = [item.option for item in read_header(lines).effective]
    except DirectiveError:
        options = []
    if "nosuch" not in options:  # it may be an option of a newer Slurm
        assert not options
    assert not defined("\n".join(lines))


@given(st.text(st.sampled_from("m=1 \t\"'\\#ab:\x0b"), max_size=25))
@settings(PROPERTY, max_examples=200)
def test_words_are_cut_as_sbatch_cuts_them(defined: Callable[[str], dict[str, str]], noise: str) -> None:
    """Any text behind a comment's value: both read the same, or both refuse."""
    lines = ["#!/bin/bash", f"#SBATCH --comment=x{noise}", "#SBATCH --time=3", "true", ""]
    try:
        found = {item.option: item.value for item in read_header(lines).effective}
    except DirectiveError:
        found = {}
    told = defined("\n".join(lines))
    assert told.get("comment") == found.get("comment")
    assert ("time" in told) == ("time" in found)


# ----- the text for bash


def test_the_examples_are_cut_where_bash_would_cut_them() -> None:
    """Every statement is valid by itself, so none is cut in the middle; together they are the file."""
    for path in EXAMPLES.iterdir():
        text = path.read_text()
        statements = split(text)
        assert "\n".join(statement.text for statement in statements) == text
        for statement in statements:
            assert statement.kind != "opaque", f"{path.name}:{statement.first}"
            checked = subprocess.run(["bash", "-n"], input=statement.text + "\n", capture_output=True, text=True)
            assert checked.returncode == 0, f"{path.name}:{statement.first}: {checked.stderr}"


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("a \\\n  b\nc", ["simple", "simple"]),
        ("a &&\n\n b", ["simple"]),
        ("f() {\n  a\n}\nf", ["compound", "simple"]),
        ("function f\n{\n a; }", ["compound"]),
        ("cat <<-'E' | b\n\tx ' \"\n\tE\nc", ["simple", "simple"]),
        ("x=(1 # ) '\n 2)\necho", ["simple", "simple"]),
        ("case $x in\n a|b) c;;\n (d) e ;;\nesac", ["compound"]),
        ("for ((i=0; i<3; i++)); do a; done", ["compound"]),
        ("if [[ $a =~ ^(b|c)$ && d > e ]]; then f; fi", ["compound"]),
        ("x=$(a \"$(b ')')\" # it's\n)\nc", ["simple", "simple"]),
        ("echo ${x:-\"}\"} `a \\` b`; c", ["simple"]),
        ("(( x > 3 )) && a\n( b\n c )", ["compound", "compound"]),
        ("a 'b", ["opaque"]),
        ("if a; then\nb", ["opaque"]),
        ("a )\nb", ["opaque"]),
        ("# only words\n\n", ["comment", "blank", "blank"]),
    ],
)
def test_statements_end_where_they_should(text: str, kinds: list[str]) -> None:
    assert [statement.kind for statement in split(text)] == kinds


@pytest.mark.parametrize(("word", "value"), [("a", "a"), ("'a b'\"c\"", "a bc"), ('"a\\"b"', 'a"b'), ("a\\ b", "a b"), ("$a", None), ('"$a"', None), ("*.x", None), ("{a,b}", None), ("~/x", None)])
def test_only_words_that_always_mean_the_same_are_literal(word: str, value: str | None) -> None:
    assert literal(word) == value
    if value is not None:
        assert subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, text=True).stdout == value


# ----- nothing is lost

BLOCKS = [
    "module purge", "module load Anaconda3/2024.02-1 && module load CUDA", "conda activate $ENV_NAME", 'source "$HOME/envs/x/bin/activate"', "conda deactivate",
    "export A=1 B='two words'", "export PATH=$HOME/bin:$PATH", "export HF_HOME=/work/hf", 'cd "${SLURM_SUBMIT_DIR}"', "cd /tmp", "set -euo pipefail", "nvidia-smi",
    'python -c "import torch; print(1)"', "X=$(date +%s)", "FOLD=${FOLD:-3}", "python train.py --fold $FOLD \\\n    --epochs 3", "echo done", "exit 0",
    "# a comment: with 'quotes", "#SBATCH --mem=3G", "for x in a b c; do\n    echo $x\n    python one.py $x\ndone", "for f in *.txt; do\n  cat $f\ndone",
    "if [ -f x ]; then\n    python a.py\nelse\n    exit 3\nfi", "run() {\n    python b.py \"$@\"\n}", "cat <<'E' > x.py\nimport os\n\n#SBATCH --nodes=3\nE",
    "python - <<E\nprint('$X')\nE", 'sbatch --export=ALL,N=2 "$0"', "handle() {\n    kill $PID\n    exit 0\n}\ntrap handle USR1", "python c.py &\nPID=$!\nwait $PID",
    "ulimit -n 4096; umask 022", "case $1 in\n  a) echo a ;;\nesac", ": \"${BASE:=/x}\"\nexport BASE", "trap 'rm -f tmp' EXIT", "srun python d.py || exit 4",
]  # fmt: skip


def lost(text: str, path: Path) -> list[str]:
    """Lines of the script, without directives and empty ones, that stand nowhere in the file of the spec."""
    written = path.read_text()
    run = spec.load(path).stages["main"].run  # type: ignore[union-attr]
    places = {line.strip() for line in run.splitlines()} | {re.sub(r"^# +(line \d+: )?|  -> .*$", "", line) for line in written.splitlines() if line.startswith("#")}
    head = read_header(text.splitlines())
    return [
        line for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and number not in head.directive_lines and line.strip() not in places
    ]  # fmt: skip


@given(st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=12), st.sampled_from(["#!/bin/sh", "#!/bin/bash -eu", "#!/usr/bin/env bash"]))
@settings(PROPERTY, max_examples=80)
def test_every_line_stands_somewhere(tmp_path: Path, blocks: list[str], shebang: str) -> None:
    text = "\n".join([shebang, "#SBATCH --time=1 --job-name=x", "##SBATCH --mem=1G", "true", *blocks, ""])
    imported(tmp_path, text)
    assert lost(text, tmp_path / "out" / "spec.yaml") == []


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.slurm")), ids=lambda path: path.stem)
def test_every_line_of_the_examples_stands_somewhere(tmp_path: Path, path: Path) -> None:
    imported(tmp_path, path)
    assert lost(path.read_text(), tmp_path / "out" / "spec.yaml") == []


@given(st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=60))
@settings(PROPERTY, max_examples=100)
def test_any_text_survives_the_yaml(tmp_path: Path, text: str) -> None:
    """Control characters, tabs, other line separators, ${NAME}: `run` is what bash would have read."""
    written = f"#!/bin/bash\n: <<'THE END'\n{text} ${{HOME_OF_NOBODY}}\nTHE END\n"
    assert imported(tmp_path, written).run == written.removeprefix("#!/bin/bash\n")


@given(st.lists(st.sampled_from([*"\n\n\t  ;|&()<>{}[]$'\"`\\#=!*~", "if ", "then\n", "fi", "for x in a b; do\n", "done", "case ", "esac", "<<E\n", "E\n", "$(", "((", "a", "b=1"]), max_size=30))
@settings(PROPERTY, max_examples=120)
def test_no_text_is_too_odd(tmp_path: Path, pieces: list[str]) -> None:
    """Whatever stands in a script, valid or not: it is cut and put together again without a loss."""
    text = "".join(["#!/bin/bash\ntrue\n", *pieces, "\n"])
    assert "\n".join(statement.text for statement in split(text)) == text
    imported(tmp_path, text)
    assert lost(text, tmp_path / "out" / "spec.yaml") == []


# ----- what is understood


def test_a_plain_script(tmp_path: Path) -> None:
    told = run_import([example("train_plain")], tmp_path)
    assert told.startswith(f"{tmp_path}/train_plain.yaml: 14 directives, 1 module, conda imaging; kept verbatim: lines ")
    stage: Any = spec.load(tmp_path / "train_plain.yaml").stages["main"]
    assert stage.resources.setup == ["module purge", "module load Anaconda3/2024.02-1", "conda activate imaging"]
    assert stage.env == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert stage.run.rstrip().endswith("training.name=unet_bravo_"), "the exit code is that of the work"
    assert "--gres=gpu:1" in stage.resources.slurm
    assert not any("job-name" in line or "output" in line for line in stage.resources.slurm)


def test_a_chain_becomes_segments_of_the_plain_command(tmp_path: Path) -> None:
    stage = imported(tmp_path, example("train_chain"))
    assert stage.segments == 20
    assert "sbatch --export" not in stage.run and "trap" not in stage.run and "&\n" not in stage.run
    assert "time python -m project.train --config-name=volumes \\\n" in stage.run
    assert not any("signal" in line for line in stage.resources.slurm)


def test_a_program_that_saves_at_a_signal_keeps_its_signal(tmp_path: Path) -> None:
    stage = imported(tmp_path, example("train_chain_saving"))
    assert stage.segments == 6, "the counter goes to 5, and the sixth is refused"
    assert 'kill -s USR1 "$WORKER"' in stage.run and "trap again TERM" in stage.run and "sbatch" not in stage.run


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("    exit 0\n}", "    rm -rf results\n    exit 0\n}"),
        ('NEXT_COUNT -ge "$CHAIN_MAX"', 'NEXT_COUNT -ge "$OTHER"'),
        ("CHAIN_MAX=10", "CHAIN_MAX=$1"),
        ("CHAIN_COUNT=${NEXT_COUNT}", "COUNT=${NEXT_COUNT}"),
        ("kill $PID", "kill $OTHER"),
        ("trap handle_timeout SIGUSR1", "trap handle_timeout SIGUSR1\nsbatch next.slurm"),
        ('sbatch --export=ALL,CHAIN_COUNT=${NEXT_COUNT} "$0"', 'sbatch --export=ALL,CHAIN_COUNT=${NEXT_COUNT},A="$B" "$0"'),
    ],
)
def test_a_chain_with_a_difference_stays_as_it_is_and_is_told(tmp_path: Path, old: str, new: str) -> None:
    text = example("generate_chain").read_text()
    changed = text.replace(old, new) if old in text else text.replace("$NEXT_COUNT\" -ge \"$CHAIN_MAX", "$NEXT_COUNT\" -ge \"$OTHER")
    assert changed != text
    stage = imported(tmp_path, changed)
    assert stage.segments == 1 and "sbatch" in stage.run and "--signal=B:SIGUSR1@120" in stage.resources.slurm
    assert "# To check:" in (tmp_path / "out" / "spec.yaml").read_text()


def test_resubmission_of_another_kind_is_told(tmp_path: Path) -> None:
    told = run_import([example("resubmit_at_end")], tmp_path)
    assert "check line 12: submits itself, but $0 is not this script any more" in told


def test_an_array_becomes_items(tmp_path: Path) -> None:
    stage = imported(tmp_path, example("array"))
    assert (stage.foreach, stage.parallel) == (["1", "4", "7", "10"], 2)
    assert "export SLURM_ARRAY_TASK_ID=$MEDGEN_ITEM" in stage.run and "export SLURM_ARRAY_TASK_MAX=10" in stage.run


@pytest.mark.parametrize(("text", "expected"), [("0-3", ([0, 1, 2, 3], None)), ("5,1,3-4%2", ([1, 3, 4, 5], 2)), ("[0-10:5]", ([0, 5, 10], None))])
def test_array_ids(text: str, expected: tuple[list[int], int | None]) -> None:
    assert array_items(text) == expected


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-5%0", "1-5:0", "1,,2", "0-99999999"])
def test_array_ids_that_slurm_refuses(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"job.slurm:2: not a"):
        imported(tmp_path, f"#!/bin/bash\n#SBATCH --array='{text or ' '}'\ntrue\n")


def test_a_loop_becomes_items_one_at_a_time(tmp_path: Path) -> None:
    stage = imported(tmp_path, example("eval_loop"))
    assert (stage.foreach, stage.parallel) == (["flow_1000", "ddpm_500", "wavelet x0"], 1)
    assert 'MODEL="$MEDGEN_ITEM"\necho "=== $MODEL ==="' in stage.run and "done" not in stage.run


@pytest.mark.parametrize(
    ("loop", "before"),
    [
        ("for x in a b; do\n  python e.py $x >> all.csv\ndone", ""),
        ("for x in a b; do\n  N=$((N + 1))\n  python e.py $x $N\ndone", ""),
        ("for x in a b; do\n  OUT+=\" $x\"\n  python e.py $x\ndone", ""),
        ("for x in a b; do\n  python e.py $x &\ndone\nwait", ""),
        ("for x in a b; do\n  python e.py $x || break\ndone", ""),
        ("for x in *.pt; do\n  python e.py $x\ndone", ""),
        ("for x in $LIST; do\n  python e.py $x\ndone", ""),
        ("for x in a a; do\n  python e.py $x\ndone", ""),
        ("for x in a b; do\n  python e.py $x\ndone\npython merge.py", ""),
        ("for x in a b; do\n  python e.py $x\ndone | tee log", ""),
        ("for x in a b; do\n  python e.py\ndone", ""),
        ("for x in a b; do\n  python e.py $x\ndone", "python prepare.py"),
        ("for x in a b; do\n  python e.py $x $STAMP\ndone", "STAMP=$(date +%s)"),
        ("for x in a b; do\n  python e.py $x\ndone\necho last $x", ""),
    ],
)
def test_a_loop_whose_rounds_may_need_each_other_stays(tmp_path: Path, loop: str, before: str) -> None:
    stage = imported(tmp_path, f"#!/bin/bash\n#SBATCH --time=1\n{before}\n{loop}\n")
    assert stage.foreach == [] and loop.removesuffix("\necho last $x") in stage.run


def test_a_number_given_by_hand_becomes_the_one_item(tmp_path: Path) -> None:
    told = run_import([example("fold")], tmp_path / "out" / "spec.yaml")
    stage: Any = spec.load(tmp_path / "out" / "spec.yaml").stages["main"]
    assert stage.foreach == ["0"] and 'FOLD="$MEDGEN_ITEM"' in stage.run
    assert "foreach holds the default, add the others" in told
    assert list(stage.env) == ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"]


def test_scripts_that_differ_in_a_few_words_become_one_stage(tmp_path: Path) -> None:
    told = run_import([example(f"base_256_{number}") for number in (1, 2, 3, 4)], tmp_path)
    assert "4 scripts -> foreach: 4" in told
    stage: Any = spec.load(tmp_path / "base_256.yaml").stages["main"]
    assert stage.foreach == ["0 1000", "1000 3000", "3000 5000", "5000 7000"]


WORDS = st.text(st.sampled_from("abz019_."), min_size=1, max_size=6)


@given(st.lists(st.tuples(WORDS, WORDS), min_size=2, max_size=4, unique=True))
@settings(PROPERTY, max_examples=40)
def test_an_item_gives_its_script_s_command(tmp_path: Path, values: list[tuple[str, str]]) -> None:
    """Each item of a family calls the programs with the very words of its script; what is no family is not made one."""
    template = "#!/bin/bash\n#SBATCH --time=1\nNAME=\"run {}\"\nprintf '<%s>' call --first={} --name \"$NAME\" -x{}y " + "word " * 40 + "\n"
    texts = [template.format(a, b, a) for a, b in values]
    shutil.rmtree(tmp_path / "family", ignore_errors=True)
    (tmp_path / "family").mkdir()
    run_import([script(tmp_path / "family", text, f"part_{number}.slurm") for number, text in enumerate(texts)], tmp_path / "family")
    wanted = sorted(subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=True).stdout for text in texts)
    found = []
    for path in (tmp_path / "family").glob("*.yaml"):
        stage: Any = spec.load(path).stages["main"]
        for item in stage.foreach or [""]:
            found.append(subprocess.run(["bash", "-c", stage.run], env={**os.environ, "MEDGEN_ITEM": item}, capture_output=True, text=True, check=True).stdout)
    assert sorted(found) == wanted


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("python a.py 'x 1'", "python a.py 'x 2'"),
        ("python a.py $A1 x", "python a.py $A2 x"),
        ("cat <<'E'\nvalue 1\nE", "cat <<'E'\nvalue 2\nE"),
        ("python a.py\nA1=3", "python a.py\nA2=3"),
        ("python1 a", "python2 a"),
    ],
)
def test_what_bash_could_not_put_together_is_no_family(tmp_path: Path, first: str, second: str) -> None:
    padding = "echo " + "word " * 60
    for number, text in enumerate((first, second)):
        script(tmp_path, f"#!/bin/bash\n#SBATCH --time=1\n{padding}\n{text}\n", f"p{number}.slurm")
    run_import([tmp_path / "p0.slurm", tmp_path / "p1.slurm"], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["p0.yaml", "p1.yaml"]


def test_other_resources_are_another_spec(tmp_path: Path) -> None:
    text = example("base_256_1").read_text()
    paths = [script(tmp_path, text, "a.slurm"), script(tmp_path, text.replace("32G", "64G").replace("1000", "2000"), "b.slurm")]
    run_import(paths, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.yaml", "b.yaml"]


def test_a_wrapper_that_tries_the_fast_gpus_first_becomes_prefer(tmp_path: Path) -> None:
    stage = imported(tmp_path, EXAMPLES / "submit_prefer_fast.sh", example("train_chain"))
    assert stage.resources.gpu.prefer == "h100"
    lines = header(tmp_path)
    assert "--prefer=h100" in lines and '--constraint="a100|h100"' in lines
    with pytest.raises(InputError, match="name that script too"):
        run_import([EXAMPLES / "submit_prefer_fast.sh"], tmp_path / "other")


@pytest.mark.parametrize(
    "before",
    ["python prepare.py", "source settings.sh", "export PATH=/opt/x:$PATH", "ENV=imaging", "eval $COMMAND", "X=$(python where.py)", "PATH=/x:$PATH", "exec > log"],
)
def test_an_environment_that_something_before_it_may_change_stays(tmp_path: Path, before: str) -> None:
    stage = imported(tmp_path, f"#!/bin/bash\n#SBATCH --time=1\n{before}\nmodule load Anaconda3\nconda activate ${{ENV}}\npython a.py\n")
    assert "conda activate ${ENV}" not in stage.resources.setup
    assert stage.run.index("conda activate ${ENV}") > stage.run.index(before)


@pytest.mark.parametrize(
    "text",
    [
        "export A=$B\npython a.py", "export A=$(date)\npython a.py", "python a.py\nexport A=1\npython b.py", "echo $A\nexport A=1", "export A=1\npython a.py\nexport A=2",
        "A=3\nexport A=1", "export A", "export MEDGEN_ITEM=3", "module load x\nexport CUDA_HOME=/opt", "if true; then\n  export A=1\nfi", "export A=1 && python b.py",
    ],
)  # fmt: skip
def test_a_variable_whose_order_counts_stays(tmp_path: Path, text: str) -> None:
    stage = imported(tmp_path, f"#!/bin/bash\n#SBATCH --time=1\n{text}\n")
    assert stage.env == {}
    assert "export" in stage.run


def test_a_script_without_directives_asks_for_what_slurm_gives(tmp_path: Path) -> None:
    told = run_import([script(tmp_path, "#!/bin/bash\n#SBATCH --job-name=x\ntrue\n")], tmp_path / "out" / "spec.yaml")
    assert "no time limit" in told
    assert [line for line in header(tmp_path) if line.startswith(("--cpus-per-task", "--nodes"))] == ["--nodes=1", "--cpus-per-task=1"]


def test_a_login_shell_and_settings_of_the_first_line_are_kept(tmp_path: Path) -> None:
    stage = imported(tmp_path, example("login_shell"))
    assert ". /etc/profile" in stage.run and stage.resources.setup == []
    assert "cd 'work place' || exit" in stage.run
    assert imported(tmp_path, example("odd_header")).run.startswith("set -e  # from #!/bin/bash -e\n")


def test_the_head_of_the_file_tells_what_did_not_count(tmp_path: Path) -> None:
    told = run_import([example("odd_header")], tmp_path)
    text = (tmp_path / "odd_header.yaml").read_text()
    assert "#   line 2: #SBATCH -t 10:00  -> did not count: line 8 says --time=20:00" in text
    assert "#   line 4: ##SBATCH --mem=64G  -> was commented out" in text
    assert '-> name: odd-header (letters, digits, _ and - only)' in text
    assert "check line 12: sbatch ignores it: line 11 is a command" in told


# ----- what it does


STUB = """#!/bin/bash
# stands in for a program: writes down how it was called
words=("${0##*/}" "$@")
if [ "$1" = - ]; then words+=("$(cat)"); fi
if [ "$1" = -c ] || [ "$1" = load ] || [ "$1" = purge ] || [ "$1" = activate ]; then where=; else where="in $PWD with $PYTORCH_ALLOC_CONF,$HF_HUB_OFFLINE,$nnUNet_raw,$VENV"; fi
printf '%q ' "${words[@]}" >> "$CALLS"; echo "$where" >> "$CALLS"
"""
DATE = """#!/bin/bash
case "$1" in *Y%m%d-*) echo 20300101-000000 ;; *) PATH=${PATH#*:} exec /usr/bin/date "$@" ;; esac
"""


@pytest.fixture
def stubs(tmp_path: Path, environment: dict[str, str]) -> Callable[[], list[str]]:
    """Programs that only write down how they are called; returns the calls so far and forgets them."""
    calls, folder, home = tmp_path / "calls", tmp_path / "stubs", tmp_path / "home"
    folder.mkdir()
    for name in ("python", "conda", "module", "nnUNetv2_train", "sbatch"):
        script(folder, STUB, name).chmod(0o755)
    script(folder, DATE, "date").chmod(0o755)
    for name in ("eval", "ddp"):
        (home / "envs" / name / "bin").mkdir(parents=True)
        script(home / "envs" / name / "bin", f"export VENV={name}\n", "activate")
    script(home, f"PATH={folder}:$PATH\n", ".bash_profile")
    (tmp_path / "work place").mkdir()
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "HOME": str(home), "USER": "someone"}

    def read() -> list[str]:
        text = calls.read_text() if calls.exists() else ""
        calls.write_text("")
        return [line for line in text.splitlines() if not line.startswith("conda deactivate")]

    return read


def run_by_hand(path: Path, folder: Path, environment: dict[str, str], **variables: str) -> int:
    """As Slurm would start it, in bash."""
    slurm = {"SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", **variables}
    if "--chdir" in path.read_text():
        slurm["SLURM_SUBMIT_DIR"], folder = str(folder / "work place"), folder / "work place"
    shell = ["bash", "-l"] if "bash -l" in path.read_text() else ["bash"]
    return subprocess.run([*shell, path], cwd=folder, env={**environment, **slurm}, capture_output=True, timeout=60, stdin=subprocess.DEVNULL).returncode


@pytest.mark.parametrize("name", ["train_plain", "train_chain", "train_chain_saving", "generate_chain", "fold", "eval_loop", "functions", "embedded_python", "login_shell", "odd_header"])
def test_the_stage_calls_what_the_script_called(name: str, tmp_path: Path, environment: dict[str, str], medgen: Medgen, stubs: Callable[[], list[str]]) -> None:
    """The same programs with the same words, from the same folder, in the same environment and order."""
    run_by_hand(example(name), tmp_path, environment)
    by_hand = stubs()
    assert by_hand or name == "odd_header"
    run_import([example(name)], tmp_path / "spec.yaml")
    medgen("submit", "spec.yaml", "--local")
    assert stubs() == by_hand


ACTIONS = [
    "export A=1", "export A=2 B='two words'", "export B=$A", "A=plain", "unset B", 'prog one "$A" "$B"', "prog two > out.txt", "python -c 'import os; print(1)'", "cd inside", "cd ..",
    'cd "$SLURM_SUBMIT_DIR"', 'source "$HOME/envs/eval/bin/activate"', 'WHICH=ddp\nsource "$HOME/envs/$WHICH/bin/activate"', "export PATH_OF_NOTHING=x", 'export PATH="$HOME/other:$PATH"',
    "FOLD=${FOLD:-4}", 'prog fold "$FOLD"', "false", "echo done", "deactivate", "for x in a 'b c'; do\n    prog loop $x \"$A\"\ndone", "for x in 1 2; do\n    A=$x\n    prog loop \"$A\" \"$x\"\ndone",
    "if [ -n \"$A\" ]; then\n    prog has\nfi", "run() { prog inside \"$1\" \"$B\"; }", "run 3 2> /dev/null", "X=$(prog quiet)", "prog back &\nPID=$!\nwait $PID", "prog three || exit 5", "exit 0",
]  # fmt: skip


@given(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=8))
@settings(PROPERTY, max_examples=60)
def test_any_mixture_of_lines_does_the_same(tmp_path: Path, actions: list[str]) -> None:
    """The programs are called as by the script: same words, order, folder and variables; lines may move, their effects may not."""
    home, calls = tmp_path / "home", tmp_path / "calls"
    if not home.exists():
        for name in ("eval", "ddp"):
            (home / "envs" / name / "bin").mkdir(parents=True)
            script(home / "envs" / name / "bin", f"export VENV={name}\ndeactivate() {{ unset VENV; }}\n", "activate")
        (home / "bin").mkdir()
        script(home / "bin", '#!/bin/bash\necho "$* in ${PWD##*/} with $A,$B,$VENV,$PATH_OF_NOTHING" >> "$CALLS"\n', "prog").chmod(0o755)
        (tmp_path / "inside").mkdir()
    text = "\n".join(["#!/bin/bash", "echo start", *actions, "prog last", ""])
    environment = {"PATH": f"{home}/bin:/usr/bin:/bin", "HOME": str(home), "CALLS": str(calls)}

    def called(bash: str, **variables: str) -> list[str]:
        calls.write_text("")
        subprocess.run(["bash", "-c", bash, "main"], cwd=tmp_path, env={**environment, **variables}, capture_output=True, timeout=60)
        return calls.read_text().splitlines()

    stage = imported(tmp_path, text)
    prepared = "\n".join(["set -e", *stage.resources.setup, "set +e", stage.run])
    found = [line for item in stage.foreach or [""] for line in called(prepared, **stage.env, MEDGEN_ITEM=item)]
    assert found == called(text, SLURM_SUBMIT_DIR=str(tmp_path))


def test_each_item_of_an_array_calls_what_its_task_called(tmp_path: Path, environment: dict[str, str], medgen: Medgen, stubs: Callable[[], list[str]]) -> None:
    for task in ("1", "4", "7", "10"):
        run_by_hand(example("array"), tmp_path, environment, SLURM_ARRAY_TASK_ID=task, SLURM_ARRAY_TASK_COUNT="4", SLURM_ARRAY_TASK_MAX="10")
    by_hand = stubs()
    run_import([example("array")], tmp_path / "spec.yaml")
    medgen("submit", "spec.yaml", "--local")
    assert sorted(stubs()) == sorted(by_hand)


def test_each_item_of_a_family_calls_what_its_script_called(tmp_path: Path, environment: dict[str, str], medgen: Medgen, stubs: Callable[[], list[str]]) -> None:
    paths = [example(f"base_256_{number}") for number in (1, 2, 3, 4)]
    for path in paths:
        run_by_hand(path, tmp_path, environment)
    by_hand = [line for line in stubs() if line.startswith("python")]
    run_import(paths, tmp_path / "spec.yaml")
    medgen("submit", "spec.yaml", "--local")
    assert sorted(line for line in stubs() if line.startswith("python")) == sorted(by_hand)


@pytest.mark.parametrize("name", ["train_plain", "fold"])
def test_a_failure_is_not_hidden_by_what_comes_after(name: str, tmp_path: Path, environment: dict[str, str], medgen: Medgen, stubs: Callable[[], list[str]]) -> None:
    stubs()
    for program in ("python", "nnUNetv2_train"):
        script(tmp_path / "stubs", "#!/bin/bash\nexit 3\n", program).chmod(0o755)
    assert run_by_hand(example(name), tmp_path, environment) == 0, "that is what the script did"
    run_import([example(name)], tmp_path / "spec.yaml")
    medgen("submit", "spec.yaml", "--local", expect=1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("python a.py\npython b.py\n", "line 3: only this decides the exit code: a failure in line 2 goes"), ("python a.py\ngit clean\n", "line 3: only this decides"),
        ("set -e\npython a.py\npython b.py\n", None), ("python a.py || exit 3\npython b.py\n", None), ("nvidia-smi\nX=1\npython b.py\n", None),
        ("python a.py\nif [ -f x ]; then echo done; fi\n", "line 3: only this decides"), ("python a.py\nCODE=$?\nrm tmp\nexit $CODE\n", None),
    ],
)  # fmt: skip
def test_failures_that_nobody_would_notice_are_told(tmp_path: Path, text: str, told: str | None) -> None:
    imported(tmp_path, f"#!/bin/bash\n{text}")
    head = (tmp_path / "out" / "spec.yaml").read_text()
    assert (told in head) if told else ("decides the exit code" not in head)


def test_the_folder_of_a_chain_stays_the_same_in_every_segment(tmp_path: Path, environment: dict[str, str], stubs: Callable[[], list[str]]) -> None:
    stage = imported(tmp_path, example("train_chain"))
    (tmp_path / "made").mkdir()
    variables = {**environment, "MEDGEN_OUT": str(tmp_path / "made"), "STORE": str(tmp_path / "store")}
    for stamp in ("first", "second"):
        script(tmp_path / "stubs", f"#!/bin/bash\necho {stamp}\n", "date").chmod(0o755)
        subprocess.run(["bash", "-c", stage.run, "main"], cwd=tmp_path, env=variables, check=True, capture_output=True)
        (tmp_path / "store" / "runs" / "flow_1000_first").mkdir(parents=True, exist_ok=True)
        (tmp_path / "store" / "runs" / "flow_1000_first" / "checkpoint_latest.pt").write_text("weights")
    first, second = (line for line in stubs() if "project.train" in line)
    assert "run.dir=" in first and "flow_1000_first" in first and "resume_from" not in first
    assert "flow_1000_first" in second and "flow_1000_second" not in second and "resume_from" in second


def test_the_program_gets_its_signal_and_is_waited_for(tmp_path: Path, environment: dict[str, str], stubs: Callable[[], list[str]]) -> None:
    """TERM, which medgen sends before the time limit, reaches the program as the USR1 of the old trap."""
    program = "#!/bin/bash\ntrap 'echo saved >> \"$CALLS\"; exit 0' USR1\necho ready >> \"$CALLS\"\nwhile :; do sleep 0.05; done\n"
    script(tmp_path / "stubs", program, "python").chmod(0o755)
    stage = imported(tmp_path, example("train_chain_saving"))
    running = subprocess.Popen(["bash", "-c", stage.run, "main"], cwd=tmp_path, env=environment)
    calls = tmp_path / "calls"
    while not (calls.exists() and calls.read_text() == "ready\n"):
        assert running.poll() is None
        time.sleep(0.02)
    running.terminate()
    assert running.wait(timeout=60) == 143, "not done: there is another segment"
    assert stubs() == ["ready", "saved"]


# ----- other words for the same


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30), ("30:30", 31), ("1:30:00", 90), ("1-12", 2160), ("1-12:30", 2190), ("3-00:00:00", 4320), ("0-00:00:01", 1), ("0", None),
        ("UNLIMITED", None), ("1:2:3:4", None),
    ],
)  # fmt: skip
def test_time_limits_are_read_as_slurm_reads_them(text: str, expected: int | None) -> None:
    assert minutes(text) == expected
    if expected is not None:
        assert Resources.model_validate({"time": duration(expected)}).time == expected


def test_portable_resources_and_a_site_beside_the_specs(tmp_path: Path, medgen: Medgen) -> None:
    told = run_import([example("train_plain"), example("train_chain"), example("fold")], tmp_path / "jobs", portable=True)
    stage: Any = spec.load(tmp_path / "jobs" / "train_chain.yaml").stages["main"]
    assert (stage.resources.gpus, stage.resources.cpus, stage.resources.mem, stage.resources.time) == (1, 8, 48 * 1024, 720)
    assert stage.resources.gpu.any_of == ["a100", "h100"]
    assert stage.resources.slurm == ["--exclude=node-06-02"], "only one of the three says so"
    assert f"submit with --site {tmp_path / 'jobs' / 'imported_site.yaml'}" in told
    shown = medgen("submit", "jobs/train_chain.yaml", "--dry-run", "--site", "jobs/imported_site.yaml").stdout
    for line in ("--partition=GPUQ", "--account=share-lab", "--time=720", "--cpus-per-task=8", "--gres=gpu:1", "--mem=49152M", "--constraint=a100|h100"):
        assert re.search(rf'^#SBATCH {re.escape(line.split("=")[0])}="?{re.escape(line.split("=", 1)[1])}"?$', shown, flags=re.MULTILINE), line


def test_several_tasks_stay_on_their_one_node(tmp_path: Path) -> None:
    stage = imported(tmp_path, "#!/bin/bash\n#SBATCH -N 1 --ntasks=4 --cpus-per-task=2 --time=5\ntrue\n", portable=True)
    assert stage.resources.slurm == ["-N 1", "--ntasks=4", "--cpus-per-task=2"]
    assert {"-N 1", "--ntasks=4", "--cpus-per-task=2", "--time=5"} <= set(header(tmp_path))
    assert not any(line.startswith(("--nodes", "--ntasks-per-node")) for line in header(tmp_path))


@given(written_header())
@settings(PROPERTY, max_examples=40)
def test_portable_words_ask_sbatch_for_the_same(tmp_path: Path, defined: Callable[[str], dict[str, str]], written: tuple[list[str], Any]) -> None:
    text = "\n".join(["#!/bin/bash", *written[0], "true", ""])
    before = defined(text)
    run_import([script(tmp_path, text)], fresh := _fresh(tmp_path), portable=True)
    site = Site.model_validate(_yaml(fresh / "imported_site.yaml"))
    made = planning.make_plan(spec.load(fresh / "job.yaml"), site)
    rendered = render_script(made, made.stages[0], whole_stage(made.stages[0], 1), tmp_path, "/usr/bin/python3")
    after = defined(rendered)
    same = {"time", "mem", "nodes", "gres", "constraint", "partition", "account", "qos", "reservation", "mail-user"} & set(before)
    assert {key: _amount(key, after.get(key, "")) for key in same} == {key: _amount(key, before[key]) for key in same}


def _fresh(tmp_path: Path) -> Path:
    folder = tmp_path / "portable"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _yaml(path: Path) -> Any:
    import yaml

    return yaml.safe_load(path.read_text())


def _amount(option: str, value: str) -> object:
    """Memory in mebibytes; one node also where nothing is said, for one task needs no more."""
    if option == "nodes":
        return value or "1"
    if option == "mem" and (match := re.fullmatch(r"(\d+)([MG])?", value)):
        return int(match.group(1)) * (1024 if match.group(2) == "G" else 1)
    return value


# ----- what is wrong


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"), (b" \n\n", "the file is empty"), (b"\x7fELF\0\0", "binary data"), (b"#!/bin/bash\n#SBATCH --time=1\n# words\n", "no command"),
        (b"#!/usr/bin/env python3\nprint(1)\n", "written for python3"), (b"#!/bin/tcsh\nls\n", "written for /bin/tcsh"), (b"x" * (4 * 2**20 + 1), "4 MiB"),
    ],
)  # fmt: skip
def test_wrong_files_are_told(tmp_path: Path, content: bytes, words: str) -> None:
    with pytest.raises(InputError, match=f"job.slurm.*{words}"):
        run_import([script(tmp_path, content)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_problem_is_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    good, bad = script(tmp_path, "#!/bin/bash\ntrue\n", "good.slurm"), script(tmp_path, "#!/bin/bash\n#SBATCH x\ntrue\n", "bad.slurm")
    with pytest.raises(InputError) as told:
        run_import([good, tmp_path / "missing.slurm", tmp_path, bad], tmp_path / "out")
    assert [line.partition(": ")[2].split()[0] for line in str(told.value).splitlines()] == ["no", "a", "'x'"]
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="no script given"):
        run_import([], tmp_path / "out")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = script(tmp_path, "#!/bin/bash\ntrue\n")
    run_import([path], tmp_path / "out")
    (tmp_path / "out" / "job.yaml").write_text("mine")
    with pytest.raises(InputError, match="exists and is not overwritten"):
        run_import([path], tmp_path / "out")
    assert (tmp_path / "out" / "job.yaml").read_text() == "mine"
    (tmp_path / "other").mkdir()
    same_name = script(tmp_path / "other", "#!/bin/bash\nfalse\n")
    with pytest.raises(InputError, match="would be made from two files"):
        run_import([path, same_name], tmp_path / "new")
    with pytest.raises(InputError, match="one file for 2 specs"):
        run_import([path, same_name], tmp_path / "one.yaml")
    with pytest.raises(InputError, match="not a folder"):
        run_import([path], path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"#!/bin/bash\r\n#SBATCH --time=3\r\necho a\r\n", "lines end as on Windows"), (b"\xef\xbb\xbf#!/bin/bash\n#SBATCH --time=3\necho a\n", "byte order mark"),
        (b"#SBATCH --time=3\necho a\n", "no #! line"), (b"#!/bin/bash\n#SBATCH --time=3\n# caf\xe9\necho a\n", "line 3: not UTF-8"),
    ],
)  # fmt: skip
def test_files_that_sbatch_dislikes_are_read_as_they_were_meant(tmp_path: Path, defined: Callable[[str], dict[str, str]], content: bytes, words: str) -> None:
    told = run_import([script(tmp_path, content)], tmp_path / "out" / "spec.yaml")
    assert words in told
    stage: Any = spec.load(tmp_path / "out" / "spec.yaml").stages["main"]
    assert stage.resources.slurm == ["--time=3"] and stage.run.endswith("echo a\n")


def test_what_bash_itself_refuses_is_kept_and_told(tmp_path: Path) -> None:
    told = run_import([script(tmp_path, "#!/bin/bash\nmodule load x\nif true; then\n  echo 1\n")], tmp_path)
    assert "bash finds an error in it" in told and "could not be followed" in told
    assert "module load x\nif true; then" in spec.load(tmp_path / "job.yaml").stages["main"].run  # type: ignore[union-attr]


def test_a_dry_run_shows_the_directives_word_for_word(tmp_path: Path, medgen: Medgen) -> None:
    run_import([example("train_chain")], tmp_path)
    stage: Any = spec.load(tmp_path / "train_chain.yaml").stages["main"]
    (tmp_path / "site.yaml").write_text("{name: test, scheduler: slurm, cpus: 8, gpus: 1}\n")
    shown = [line.removeprefix("#SBATCH ") for line in medgen("submit", "train_chain.yaml", "--dry-run", "--site", "site.yaml").stdout.splitlines()]
    assert [line for line in shown if line in stage.resources.slurm] == stage.resources.slurm
    assert shlex.split(stage.resources.slurm[7]) == ["--constraint=a100|h100"]
