"""Published weights: `medgen weights` through the command line, on files made in the published layouts; what every later use refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_spec
from made_weights import made, saved

from medgen import weights
from medgen.errors import InputError
from medgen.files import sha256_file
from medgen.spec_evaluate import Dinov2Extractor, InceptionExtractor, ResNet50Extractor

Medgen = Callable[..., Any]


@pytest.fixture
def folder(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    environment["MEDGEN_WEIGHTS"] = str(tmp_path / "weights")
    monkeypatch.setenv("MEDGEN_WEIGHTS", environment["MEDGEN_WEIGHTS"])
    return tmp_path / "weights"


def file_of(name: str, path: Path, seed: str = "") -> Path:
    """The tensors that an entry is recognised by, and one more."""
    return saved(path, {"other": made(f"other{seed}", (3,)), **{key: made(key, shape) for key, shape in weights.REGISTRY[name].holds.items()}})


def states(medgen: Medgen, verb: str, code: int = 0) -> dict[str, dict[str, str]]:
    return {entry["name"]: entry for entry in json.loads(medgen("weights", verb, "--json", expect=code).stdout)}


def test_a_file_is_recognised_copied_and_recorded(medgen: Medgen, folder: Path, tmp_path: Path) -> None:
    fetched = file_of("dinov2_vits14", tmp_path / "from the web.pth")
    told = medgen("weights", "add", fetched).stdout
    there = folder / "dinov2_vits14_pretrain.pth"
    assert f"dinov2_vits14 for extractor: dinov2: {there}, sha256 {sha256_file(fetched)}" in told
    assert there.read_bytes() == fetched.read_bytes()
    assert json.loads(there.with_name(f"{there.name}.json").read_text())["sha256"] == sha256_file(fetched)
    listed = states(medgen, "list")
    assert listed["dinov2_vits14"]["state"] == "there" and listed["dinov2_vits14"]["sha256"] == sha256_file(fetched)
    assert {entry["state"] for name, entry in listed.items() if name != "dinov2_vits14"} == {"missing"}
    assert medgen("weights", "verify").returncode == 0


def test_what_changed_is_found_and_refused_until_it_is_added_again(medgen: Medgen, folder: Path, tmp_path: Path) -> None:
    weights.add(file_of("dinov2_vits14", tmp_path / "one.pth"), None)
    there = folder / "dinov2_vits14_pretrain.pth"
    content = bytearray(there.read_bytes())
    content[len(content) // 2] ^= 1
    there.write_bytes(content)
    assert states(medgen, "list")["dinov2_vits14"]["state"] == "there", "the size is the same, and list reads no file"
    assert states(medgen, "verify", code=1)["dinov2_vits14"]["state"] == "changed"
    told = medgen("weights", "verify", expect=1).stdout
    assert f"Changed, and refused by every job: {there}. Fetch again, then: medgen weights add FILE" in told
    with pytest.raises(InputError, match=r"and was recorded with [0-9a-f]{64} \(dinov2_vits14_pretrain\.pth\.json\); copy it again"):
        Dinov2Extractor.model_validate({"kind": "dinov2", "file": str(there)}).verified()
    there.write_bytes(content[:-9])
    assert states(medgen, "list")["dinov2_vits14"]["state"] == "changed", "a copy that broke off has another size"
    weights.add(file_of("dinov2_vits14", tmp_path / "two.pth", "2"), "dinov2_vits14")
    assert states(medgen, "verify")["dinov2_vits14"]["state"] == "there"
    there.with_name(f"{there.name}.json").write_text("{}")
    assert "not a record of `medgen weights add`; add the file again" in medgen("weights", "list", expect=2).stderr


def test_a_file_that_was_only_copied_there_is_used_and_said_to_be_unrecorded(medgen: Medgen, folder: Path) -> None:
    folder.mkdir()
    there = file_of("swav", folder / "swav_800ep_pretrain.pth.tar")
    assert f"Not recorded: nobody would notice if they changed. medgen weights add {there}" in medgen("weights", "list").stdout
    assert weights.add(there, None).file == there
    assert states(medgen, "list")["swav"]["state"] == "there"


@pytest.mark.parametrize(
    ("name", "claimed", "message"),
    [
        ("inception", None, "the published weights-inception-2015-12-05-6726825d.pth begins with 6726825d; fetch it again from https://github.com/toshas"),
        ("squeezenet", None, "the published squeezenet1_1-b8a52dc0.pth begins with b8a52dc0"),
        ("swav", "radimagenet", "is not radimagenet: it does not hold backbone.7.2.conv3.weight [2048, 512, 1, 1]; it looks like swav"),
        ("swav", "imagenet", "--name imagenet: no such weights; the names are: inception, dinov2_vits14"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_claims_is_not_added(name: str, claimed: str | None, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        weights.add(file_of(name, tmp_path / "file.pth"), claimed)
    assert message in str(caught.value)
    assert not folder.exists()


def test_files_without_known_tensors_are_refused(medgen: Medgen, folder: Path, tmp_path: Path) -> None:
    for content, message in (({"a.weight": torch.zeros(2)}, "holds none of the weights that medgen knows (its first tensor is a.weight)"),
                             ({"a": "text"}, "holds no tensors by name"), (Path("x"), "holds other objects than tensors")):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(InputError) as caught:
            weights.add(tmp_path / "file.pth", None)
        assert message in str(caught.value)
    assert "no such file" in medgen("weights", "add", tmp_path / "none.pth", expect=2).stderr


def test_every_entry_is_recognised_as_itself_alone(tmp_path: Path) -> None:
    for name in weights.REGISTRY:
        if name not in ("vgg16", "alexnet"):  # their last layers are large, and like squeezenet's in kind
            assert weights._recognised(file_of(name, tmp_path / "file.pth"), None).name == name


def test_the_table_fits_into_both_widths_and_addresses_stay_whole(medgen: Medgen, folder: Path, environment: dict[str, str]) -> None:
    folder.mkdir()
    file_of("swav", folder / weights.REGISTRY["swav"].file_name)  # not recorded, the longest word
    told = medgen("weights", "list").stdout.splitlines()
    table = told[2 : told.index("", 2)]
    assert len(table) == 1 + len(weights.REGISTRY) and max(map(len, table)) <= 80
    for name, entry in weights.REGISTRY.items():
        assert any(line.endswith(entry.source) for line in told) == (name != "swav")
    assert "encoder or random_conv" in told[-1]
    del environment["MEDGEN_WEIGHTS"]
    assert "export MEDGEN_WEIGHTS=<a folder that jobs can read>" in medgen("weights", "list").stdout and "alexnet" in medgen("weights", "list").stdout
    assert "export MEDGEN_WEIGHTS=<a folder that jobs can read>" in medgen("weights", "verify", expect=2).stderr


def test_weights_of_lpips_and_of_networks_are_looked_for_at_submit(medgen: Medgen, folder: Path, write_spec: Callable[[dict[str, Any]], Path]) -> None:
    for change, file, key in (({"metrics": ["lpips"], "lpips": "alex"}, "alexnet-owt-7be5be79.pth", "lpips"),
                              ({"metrics": ["kid"], "extractor": "dinov2"}, "dinov2_vits14_pretrain.pth", "extractor")):
        written = tiny_spec()
        written["stages"]["evaluate"] = {"kind": "evaluate", "of": "images", **change}
        told = medgen("submit", write_spec(written), "--local", expect=2).stderr
        assert f"{key}: {folder / file}: No such file or directory; weights are never downloaded (docs/weights.md): put there {file} from https://" in told
        assert "what needs no weights: extractor: encoder or random_conv" in told


def test_other_weights_of_a_known_layout_need_their_own_hash(tmp_path: Path) -> None:
    file = file_of("inception", tmp_path / "own.pth")
    with pytest.raises(InputError, match=f"expected {weights.INCEPTION_SHA256}; copy the file again, or write its own sha256"):
        InceptionExtractor.model_validate({"kind": "inception", "file": str(file)}).verified()
    assert InceptionExtractor.model_validate({"kind": "inception", "file": str(file), "sha256": sha256_file(file)}).verified() == sha256_file(file)


def test_another_network_is_told_by_its_tensors_and_no_code_of_the_file_is_run(tmp_path: Path) -> None:
    file = tmp_path / "ResNet50.pt"
    asked = {"kind": "radimagenet", "file": str(file)}
    for form in (True, False):  # of torch since 1.6, and before
        torch.save({"backbone.7.2.conv3.weight": torch.zeros(1)}, file, _use_new_zipfile_serialization=form)
        assert ResNet50Extractor.model_validate(asked).verified() == sha256_file(file)
        torch.save({"layer4.2.conv3.weight": torch.zeros(1), "code": Path("x")}, file, _use_new_zipfile_serialization=form)
        with pytest.raises(InputError, match=r"does not hold the weights of radimagenet: there is no backbone\.7\.2\.conv3\.weight in it\. Fetch ResNet50\.pt from"):
            ResNet50Extractor.model_validate(asked).verified()
    for content in (b"", b"<html>Not found</html>", file.read_bytes()[:60]):
        file.write_bytes(content)
        with pytest.raises(InputError, match="is no file of tensors; it was cut short, or is something else"):
            ResNet50Extractor.model_validate(asked).verified()
