"""The job spec: every mistake is told with its place; a checked spec is complete."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medgen import document, spec, units
from medgen.errors import InputError
from medgen.spec_stages import CommandStage, TrainStage

REPOSITORY = Path(__file__).parent.parent

GOOD = """\
version: 1
name: good
data: {format: phantom, size: 32}
stages:
  train:
    kind: train
    config: {model: diffusion, mode: bravo}
    resources: {gpus: 1, time: 12h}
  images: {kind: generate, from: train, condition: test, count: 8, chunk: 4}
  evaluate: {kind: evaluate, of: images}
  report: {kind: report}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> spec.Spec:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return spec.load(path, overrides)


def test_a_good_spec_is_complete(tmp_path: Path) -> None:
    checked = load(tmp_path, GOOD)
    train = checked.stages["train"]
    assert isinstance(train, TrainStage)
    assert train.config["lr"] == 1e-4  # the resolved form holds the defaults
    assert train.resources.time == 720
    assert checked.data.channels == ["bravo", "t1_pre", "t1_gd"]


MISTAKES = [
    ("gpus: 1", "gpus_per_nodes: 1", "job.yaml:8:17: stages.train.resources.gpus_per_nodes: unknown key; did you mean 'gpus_per_node'?"),
    ("size: 32", "sise: 32", "job.yaml:3:25: data.sise: unknown key; did you mean 'size'?"),
    ("mode: bravo}", "mode: bravo, leaning: 1}", "stages.train.config.leaning: unknown key; the valid keys are: "),
    ("mode: bravo}", "mode: brava}", "job.yaml:7:32: stages.train.config.mode: unknown mode 'brava'; the modes are: seg, bravo, dual"),
    ("model: diffusion", "model: diffuson", "unknown model 'diffuson'; the models are: diffusion"),
    ("model: diffusion, ", "", "'model' is missing"),
    ("kind: report", "kind: rapport", "stages.report"),
    ("count: 8", "count: 0", "job.yaml:9:58: stages.images.count: input should be greater than or equal to 1, got 0"),
    ("count: 8", "count: many", "stages.images.count"),
    ("count: 8", "count: 8, shards: 3", "shards: 3 is more than the 2 chunks of 4 that make 8 images"),
    ("of: images", "of: image", "there is no stage 'image'; the stages are: train, images, evaluate, report"),
    ("of: images", "of: train", "train is a train stage; name a generate stage"),
    ("condition: test, ", "", "the model of train is conditioned on seg; add condition"),
    ("kind: report", "kind: report, needs: [report]", "the stages wait for each other: report -> report"),
    ("time: 12h", "time: 10:00:00", "job.yaml:8:32: stages.train.resources.time: YAML reads the unquoted 10:00:00 as a number of seconds"),
    ("mode: bravo}", "mode: bravo, lr: 1e-4}", "job.yaml:7:49: stages.train.config.lr: YAML reads 1e-4 as text; write 1.0e-4"),
    ("name: good", "name: good\nname: better", "job.yaml:3:1: name: the key stands twice"),
    ("size: 32", "size: 032", "octal"),
    ("format: phantom", "format: phantom, positive_only: yes", "write true, false"),
    ("version: 1", "version: 2", "job.yaml:1:1: version: this medgen reads version 1 of specs, got 2"),
    ("name: good", "name: go/od", "it names a folder"),
    ("size: 32}", "size: 33}", "needs data.size divisible by 4, got 33"),
    ("mode: bravo}", "mode: bravo, times: uniform}", "times has no effect with strategy ddpm"),
    ("mode: bravo}", "mode: bravo, strategy: rflow, timesteps: 10}", "timesteps has no effect with strategy rflow"),
    ("mode: bravo}", "mode: bravo, channels: [32, 64]}", "attention has 3 levels, channels has 2"),
    ("count: 8", "count: 8, sampling: {sampler: euler}", "sampler: 'euler' does not fit strategy ddpm; use one of: ddpm, ddim"),
    ("count: 8", "count: 8, sampling: {stps: 3}", "unknown key 'stps'"),
    ("count: 8", "count: 8, sampling: {eta: 0.5}", "eta has no effect with the ddpm sampler"),
    ("count: 8", "count: 8, checkpoint: best", "write last, last-<phase>, best-val or best-<metric>"),
    ("of: images", "of: images, metrics: [fid9]", "unknown metric 'fid9'"),
    ("gpus: 1", "gpus: 1, gpus_per_node: 1", "gpus and gpus_per_node both given"),
    ("gpus: 1", "gpus: 1, processes: 2", "processes is for runs without GPUs"),
    ("format: phantom", "format: nifti", "needs root"),
    ("format: phantom", "format: nifti, root: ${MEDGEN_NOT_SET_ANYWHERE}", "the environment variable MEDGEN_NOT_SET_ANYWHERE is not set"),
    ("stages:", "stages", "not valid YAML"),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES, ids=[new.replace("\n", " ") for _, new, _ in MISTAKES])
def test_a_mistake_is_told_with_its_place(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as caught:
        load(tmp_path, GOOD.replace(old, new, 1))
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "job.yaml")), "every message starts with the file"


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(tmp_path, GOOD.replace("size: 32", "sise: 32").replace("count: 8", "count: 0"))
    assert len(str(caught.value).splitlines()) == 2


def test_overrides_reach_configs_and_are_checked(tmp_path: Path) -> None:
    checked = load(tmp_path, GOOD, "stages.train.config.lr=3e-4", "data.size=64", "stages.images.sampling.steps=7")
    assert checked.stages["train"].config["lr"] == 3e-4  # type: ignore[union-attr]
    assert checked.data.size == 64
    with pytest.raises(InputError, match=r"-o stages.train.config.lrr=1: stages.train.config.lrr: unknown key; did you mean 'lr'"):
        load(tmp_path, GOOD, "stages.train.config.lrr=1")
    with pytest.raises(InputError, match=r"^-o stages.train.config.loop=\{micro_batch: 2, kept: 4\}: stages.train.config.loop.kept: unknown key; did you mean 'keep'\?$"):
        load(tmp_path, GOOD, "stages.train.config.loop={micro_batch: 2, kept: 4}")
    with pytest.raises(InputError, match="no stage 'trian'; the stages are: train"):
        load(tmp_path, GOOD, "stages.trian.config.lr=1")
    with pytest.raises(InputError, match=r"write NAME.SUBNAME=VALUE"):
        load(tmp_path, GOOD, "size")


def test_how_images_are_sampled_is_resolved(tmp_path: Path) -> None:
    """A later change of a default cannot reach this run, and what was chosen for the user can be read."""
    (sampling,) = (stage.sampling for stage in load(tmp_path, GOOD).stages.values() if stage.kind == "generate")
    assert sampling == {"sampler": "ddpm", "steps": 1000, "eta": 0.0, "time_shift": 1.0, "guidance": 1.0, "guidance_interval": [0.0, 1.0], "weights": "ema"}
    shorter = load(tmp_path, GOOD.replace("count: 8", "count: 8, sampling: {sampler: ddim, weights: raw}"))
    assert {"steps": 50, "weights": "raw"}.items() <= shorter.stages["images"].sampling.items()


def test_a_config_file_is_found_and_its_mistakes_name_it(tmp_path: Path) -> None:
    (tmp_path / "net.yaml").write_text("model: diffusion\nmode: bravo\nepohs: 3\n")
    text = GOOD.replace("{model: diffusion, mode: bravo}", "net.yaml")
    with pytest.raises(InputError, match=r"net.yaml:3:1: stages.train.config.epohs: unknown key; did you mean 'epochs'"):
        load(tmp_path, text)
    with pytest.raises(InputError, match=r"no such file: gone\.yaml"):
        load(tmp_path, text.replace("net.yaml", "gone.yaml"))


def test_a_cycle_of_conditions_is_refused(tmp_path: Path) -> None:
    text = GOOD.replace("mode: bravo", "mode: seg").replace("condition: test, ", "needs: [evaluate], ")
    with pytest.raises(InputError, match="wait for each other: images -> evaluate -> images"):
        load(tmp_path, text)


def test_missing_or_empty_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        spec.load(tmp_path / "nothing.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(InputError, match="the file is empty"):
        spec.load(tmp_path / "empty.yaml")


@pytest.mark.parametrize("path", sorted((REPOSITORY / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_jobs_people_copy_are_right(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEDGEN_GLIOMA", "MEDGEN_ADNI", "MEDGEN_NII", "MEDGEN_WEIGHTS", "DATA"):
        monkeypatch.setenv(name, "/data")
    assert spec.load(path).stages


@given(minutes=st.integers(1, 60 * 24 * 30))
def test_durations_in_every_spelling_agree(minutes: int) -> None:
    days, rest = divmod(minutes, 1440)
    hours, left = divmod(rest, 60)
    spellings = [f"{minutes}m", f"{days}-{hours:02}:{left:02}:00", f"{minutes // 60}:{left:02}:00"]
    if days and hours and left:
        spellings.append(f"{days}d{hours}h{left}m")
    assert {units.parse_minutes(text) for text in spellings} == {minutes}


@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_refused(text: str) -> None:
    try:
        assert units.parse_minutes(text) >= 1
    except ValueError as error:
        assert "not a duration" in str(error)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=8))
def test_any_yaml_is_parsed_or_refused_with_a_place(value: object) -> None:
    import yaml

    text = yaml.safe_dump({"key": value}, allow_unicode=True)
    try:
        parsed = document.parse(text, "job.yaml")
    except InputError as error:
        assert str(error).startswith("job.yaml")
    else:
        assert "key" in parsed.data


@pytest.mark.parametrize(
    ("text", "found"),
    [("sbatch $0", True), ("  sbatch --export=ALL,FOLD=$f \"$0\"", True), ("sbatch ${0}", True), ("# sbatch $0", False),
     ("sbatch other.sh", False), ("echo $0", False)],
)
def test_a_command_that_submits_itself_is_noticed(text: str, found: bool) -> None:
    stage = CommandStage(kind="command", run=text)
    assert (stage.submits_itself is not None) == found
