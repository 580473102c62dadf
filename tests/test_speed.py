"""What makes training faster or smaller changes no result: compiling, activations computed twice, fitted micro-batches, batches read ahead."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_NET, tiny_spec
from test_models import CPU, SIZE, VARIANTS, assert_same, context, make, state_of, train, training_batch
from torch import Tensor, nn

from medgen import device, models
from medgen.acceleration import compile_networks, recompute_activations, try_compiled
from medgen.ahead import batches
from medgen.errors import InputError, MedgenError
from medgen.models.base import Batch, Model
from medgen.rehearsal import even_part, largest_part, without_trace

Medgen = Callable[..., subprocess.CompletedProcess[str]]
WriteSpec = Callable[[dict[str, Any]], Path]
GIB = 2**30
MIXED = 0.03  # of a loss in bf16 beside the same in float32, of the largest; a loss rounded to bf16 itself was once 15 % too low

# what a device can do


@pytest.mark.parametrize(("capability", "bf16", "tf32", "compiled"), [
    (None, False, False, False), ((6, 1), False, False, False), ((7, 0), False, False, True), ((7, 5), False, False, True), ((8, 0), True, True, True), ((9, 0), True, True, True),
])  # fmt: skip
def test_defaults_follow_what_the_device_can_do(capability: device.Capability, bf16: bool, tf32: bool, compiled: bool) -> None:
    kind = "cpu" if capability is None else "cuda"
    assert device.uses_bf16("auto", kind, capability) is bf16
    assert device.uses_tf32("auto", capability) is tf32
    assert device.compiles("auto", capability, steps=438_500) is compiled
    assert not device.compiles("auto", capability, steps=500), "so few never earn it back"
    assert device.reads_ahead("auto", kind) is (kind == "cuda")
    assert not device.uses_bf16("fp32", kind, capability) and not device.uses_tf32("fp32", capability), "fp32 is what was asked for"
    assert device.compiles(True, capability, 1) and not device.compiles(False, capability, 438_500)
    assert device.reads_ahead(True, kind) and not device.reads_ahead(False, kind)
    if not bf16:
        with pytest.raises(InputError, match="no bf16 units; write auto or fp32"):
            device.uses_bf16("bf16", kind, capability)


def test_tf32_is_set_both_for_products_and_convolutions() -> None:
    try:
        for on in (True, False):
            device.set_tf32(on)
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (("high", True) if on else ("highest", False))
    finally:
        device.set_tf32(False)


# precision


def moved_from_zero(model: Model) -> None:
    """Networks whose last layer begins at 0 predict 0 at first, in any precision."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules().values():
        for weight in module.parameters():
            weight.data += 0.03 * torch.randn(weight.shape, generator=generator)


@pytest.mark.parametrize(("family", "name"), VARIANTS)
def test_losses_in_mixed_precision_are_float32_and_near_those_without(family: str, name: str) -> None:
    """A CPU computes bf16's numbers slowly and rightly, so a user may not ask for it there and a test may."""
    curves = []
    for bf16 in (False, True):
        config, model = make(family, name)
        moved_from_zero(model)
        where = context(len(model.phases()))
        where.use_bf16 = bf16
        curve = []
        for where.step in range(2):
            scalars = model.step(training_batch(config, where.step), where).scalars
            assert all(value.dtype in (torch.float32, torch.float64) for value in scalars.values()), "a loss rounded to bf16 is too low"
            curve.append(float(scalars["loss"]))
        curves.append(curve)
    exact, mixed = curves
    assert mixed != exact, "bf16 rounds"
    largest = max(map(abs, exact))
    assert max(abs(one - other) for one, other in zip(exact, mixed, strict=True)) < MIXED * largest, curves


def test_fused_attention_computes_what_attention_is() -> None:
    _, model = make("diffusion", "ddpm_bravo")
    attentions = [module for module in model.modules()["network"].modules() if hasattr(module, "use_flash_attention")]
    assert attentions and all(module.use_flash_attention for module in attentions)
    images = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)).transpose(1, 2)
    for attention in attentions:
        width = attention.to_q.in_features
        images = torch.randn(2, 10, width, generator=torch.Generator().manual_seed(0))
        queries, keys, values = (layer(images) for layer in (attention.to_q, attention.to_k, attention.to_v))
        assert attention.num_heads * attention.dim_head == width
        heads = [part.view(2, 10, attention.num_heads, -1).transpose(1, 2) for part in (queries, keys, values)]
        weights = (heads[0] @ heads[1].transpose(2, 3) / attention.dim_head**0.5).softmax(dim=-1)
        expected = attention.out_proj((weights @ heads[2]).transpose(1, 2).reshape(2, 10, width))
        torch.testing.assert_close(attention(images), expected)


# activations computed twice


class SavedBytes:
    """What the backward pass is kept for, tensor by tensor; each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def __enter__(self) -> SavedBytes:
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._hooks.__exit__(*problem)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


def test_activations_computed_twice_change_nothing_but_memory() -> None:
    kinds: set[str] = set()
    for family, name in VARIANTS:
        if "blocks" not in models.config_class(family).offers:
            continue
        kind = type(make(family, name)[1].blocks()[0]).__name__
        if kind not in kinds:
            _compare_kept_and_computed_twice(family, name)
        kinds.add(kind)
    assert kinds


def _compare_kept_and_computed_twice(family: str, name: str) -> None:
    states, kept = [], []
    for twice in (False, True):
        config, model = make(family, name)
        if twice:
            recompute_activations(model.blocks())
        train(model, config, range(2))
        with SavedBytes() as saved:
            train(model, config, range(2, 3))
        states.append(state_of(model))
        kept.append(saved.total)
    assert_same(*states)
    assert kept[1] < 0.6 * kept[0], (family, name, kept)


# compiling


class Small(nn.Module):
    """A network of two blocks that compiles in a second."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 8)) for _ in range(2))

    def forward(self, numbers: Tensor) -> Tensor:
        for block in self.blocks:
            numbers = numbers + block(numbers)
        return numbers


def curve(network: nn.Module, bf16: bool = False) -> list[float]:
    """Losses of 20 steps that learn to turn signs."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True)
    numbers, losses = torch.randn(64, 8, generator=torch.Generator().manual_seed(1)), []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            predicted = network(numbers)
        loss = (predicted.float() + numbers).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def small() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_compiled_and_eager_learn_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bf16: bool, twice: bool) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    plain, fast = small(), small()
    names = list(fast.state_dict())
    if twice:
        recompute_activations(fast.blocks)
    compile_networks([fast], tmp_path, backend="aot_eager")
    expected, found = curve(plain, bf16), curve(fast, bf16)
    assert expected[-1] < 0.5 * expected[0]
    assert found == pytest.approx(expected, rel=5e-3 if bf16 else 1e-5)
    assert list(fast.state_dict()) == names


@pytest.mark.slow
def test_the_real_compiler_and_eager_learn_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    plain, fast = small(), small()
    recompute_activations(fast.blocks)
    compiled = compile_networks([fast], tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", os.environ["TORCHINDUCTOR_CACHE_DIR"])  # so that it is forgotten at the end
    assert try_compiled(compiled, lambda: fast(torch.ones(64, 8)).sum().backward(), lambda well: well).startswith("compiled in")
    fast.zero_grad()
    assert list((tmp_path / "compiled").iterdir()), "kept for the next attempt"
    assert curve(fast) == pytest.approx(curve(plain), rel=1e-4)


RANK = """
import sys
from pathlib import Path
from test_speed import curve, small
from medgen import dist
from medgen.acceleration import compile_networks, recompute_activations
from medgen.context import Context

with dist.joined_ranks(threads=1) as ranks:
    curves = []
    for fast in (False, True):
        network = small()
        if fast:
            recompute_activations(network.blocks)
            compile_networks([network], Path(sys.argv[1]), backend="aot_eager")
            network(__import__("torch").ones(64, 8)).sum().backward()  # alone, as in a rehearsal
            network.zero_grad()
        curves.append(curve(Context(ranks, "fp32", None).parallel(network)))
    assert max(abs(one - other) / one for one, other in zip(*curves)) < 1e-5, curves
    print("alike")
"""


@pytest.mark.slow
def test_two_ranks_with_compiled_networks_learn_alike(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path)], env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
             for rank in range(2)]  # fmt: skip
    assert [rank.communicate(timeout=400)[0].strip() for rank in ranks] == ["alike", "alike"]


def test_where_the_compiler_fails_all_goes_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no code for this machine\nand a long story")

    plain, fast = small(), small()
    compiled = compile_networks([fast], tmp_path, backend=broken)
    said = try_compiled(compiled, lambda: curve(fast), lambda well: well)
    assert said.startswith("not compiled, slower and otherwise the same: ") and "\n" not in said and "no code for this machine" in said
    assert curve(fast) == curve(plain)
    other = compile_networks([small()], tmp_path, backend="eager")
    assert try_compiled(other, lambda: None, lambda well: False).endswith("another rank could not"), "all ranks do alike"


# micro-batches that fit


class MadeMemory:
    """Of a device where a step takes a fixed part and so much per sample, or what `surprise` says of it."""

    def __init__(self, limit_gib: float, fixed_gib: float, per_sample_gib: float, surprise: dict[int, float] | None = None):
        self.limit_bytes, self.fixed, self.per_sample, self.surprise = int(limit_gib * GIB), fixed_gib, per_sample_gib, surprise or {}
        self.tried: list[int] = []

    def step(self, samples: int) -> None:
        self.tried.append(samples)
        if self.bytes_of(samples) > self.limit_bytes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def bytes_of(self, samples: int) -> int:
        return int(self.surprise.get(samples, self.fixed + samples * self.per_sample) * GIB)

    def measured(self, work: Callable[[], None]) -> int:
        work()
        return self.bytes_of(self.tried[-1])

    def limit(self) -> int:
        return self.limit_bytes


@pytest.mark.parametrize(("share", "multiple", "memory", "samples"), [
    (16, 1, MadeMemory(80, 2, 1), 16),  # all of it
    (16, 1, MadeMemory(12, 2, 1), 8),  # 8.8 would fit; two parts of eight
    (16, 1, MadeMemory(7, 2, 1), 4),  # 4.3
    (16, 4, MadeMemory(14, 2, 1), 8),  # 10.6, of which 8 stay together
    (15, 1, MadeMemory(12, 2, 1), 8),  # 8 and 7
    (16, 1, MadeMemory(3.5, 2, 1), 1),  # the second sample does not fit
    (1, 1, MadeMemory(3, 2, 1), 1),
    (64, 1, MadeMemory(40, 2, 1, {32: 60.0}), 16),  # measured, 34 would fit; 32 did not when tried
])  # fmt: skip
def test_the_largest_part_that_fits(share: int, multiple: int, memory: MadeMemory, samples: int) -> None:
    fit = largest_part(share, multiple, memory.step, memory)
    assert fit.samples == samples, fit
    assert memory.bytes_of(fit.samples) <= memory.limit_bytes
    assert len(memory.tried) <= 4, "a step to warm up, two that are measured, one try"


def test_not_even_one_sample_fits() -> None:
    memory = MadeMemory(2.5, 2, 1)
    with pytest.raises(MedgenError, match=r"not even 1 sample fit: CUDA out of memory.*take a GPU with more memory, a smaller network, or loop.checkpoint_activations"):
        largest_part(8, 1, memory.step, memory)


def test_parts_are_even() -> None:
    for share in range(1, 40):
        for most in range(1, 40):
            part = even_part(share, most, 1)
            assert part <= max(most, 1) and -(-share // part) == -(-share // min(most, share)), (share, most, part)


@pytest.mark.parametrize("family", models.families())
@pytest.mark.parametrize("begun", [False, True])
def test_a_rehearsal_leaves_no_trace_even_if_memory_runs_out(family: str, begun: bool) -> None:
    name = next(iter(models.config_class(family).examples()))
    config, model = make(family, name)
    if begun:
        train(model, config, range(2))
    before, generator = copy.deepcopy(state_of(model)), torch.get_rng_state()
    trained = [parameter.requires_grad for module in model.modules().values() for parameter in module.parameters()]
    with without_trace(model, CPU):
        train(model, config, range(5, 6))
    with pytest.raises(torch.OutOfMemoryError), without_trace(model, CPU):
        train(model, config, range(5, 6))
        torch.rand(3)
        _run_out_of_memory_in_backward(model, config)
    assert_same(before, state_of(model))
    assert torch.equal(generator, torch.get_rng_state())
    parameters = [parameter for module in model.modules().values() for parameter in module.parameters()]
    assert [parameter.requires_grad for parameter in parameters] == trained and all(parameter.grad is None for parameter in parameters)
    _, undisturbed = make(family, name)
    if begun:
        train(undisturbed, config, range(2))
    assert train(model, config, range(2, 4)) == train(undisturbed, config, range(2, 4))


def _run_out_of_memory_in_backward(model: Model, config: Any) -> None:
    def full(gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    parameters = [parameter for module in model.modules().values() for parameter in module.parameters() if parameter.requires_grad]
    hooks = [parameter.register_hook(full) for parameter in parameters[:4]]
    try:
        train(model, config, range(6, 7))
    finally:
        for hook in hooks:
            hook.remove()


# batches read ahead


def read(step: int) -> Batch:
    if step == 5:
        raise OSError("the disk is gone")
    images = torch.full((4, 1, SIZE, SIZE), float(step))
    return Batch({"bravo": images}, list(range(4 * step, 4 * step + 4)), seed=3, labels=torch.arange(4))


def seen(ahead: bool) -> list[list[Tensor]]:
    found = []
    with batches(read, CPU, ahead) as made:
        for step in range(4):
            batch = made.of(step, step + 1)
            parts = list(batch.split(3))
            found.append([batch.channels["bravo"], *(part.normal("noise", (1, 2)) for part in parts), batch.normal(f"only/{step}", (3,)), batch.uniform("time")])
            made.learn(batch)
            assert step < 2 or not ahead or ("noise", (1, 2)) in batch.drawn, "it was drawn ahead"
        if ahead:
            assert any(thread.name.startswith("medgen-ahead") for thread in threading.enumerate())
    assert not any(thread.name.startswith("medgen-ahead") for thread in threading.enumerate())
    return found


def test_what_is_read_ahead_is_the_same() -> None:
    for alone, ahead in zip(seen(False), seen(True), strict=True):
        assert_same(alone, ahead)


def test_what_reading_ahead_has_met_is_raised_at_its_step_and_the_thread_ends() -> None:
    with batches(read, CPU, True) as made:
        made.of(4, 5)
        with pytest.raises(OSError, match="the disk is gone"):
            made.of(5, 6)
    with pytest.raises(KeyError), batches(read, CPU, True) as made:
        made.of(0, 1)
        raise KeyError("the training")
    assert not any(thread.name.startswith("medgen-ahead") for thread in threading.enumerate())


# all together, as a user has them


def test_two_ranks_with_every_option_train_as_two_without(tmp_path: Path, medgen: Medgen, write_spec: WriteSpec) -> None:
    found = []
    options = {"checkpoint_activations": True, "read_ahead": True, "micro_batch": "auto"}
    for name, more in (("plain", {}), ("options", options)):
        config = {**TINY_NET, "mode": "bravo", "epochs": 3, "loop": {"log_steps": 1, "preview_images": 0, **more}}
        stage = {"kind": "train", "config": config, "resources": {"cpus": 1, "processes": 2}}
        medgen("submit", write_spec({**tiny_spec(name=name), "stages": {"train": stage}}), "--local")
        [run] = (tmp_path / "runs").glob(f"{name}-*")
        newest = sorted((run / "train" / "ckpt").glob("step-*"))[-1]
        found.append({path.name: torch.load(path, weights_only=True) for path in newest.glob("*.pt")})
    assert_same(*found)
    facts = json.loads((run / "outcome" / "train.0.json").read_text())["facts"]
    assert facts["accelerated"] == {"main": {"micro_batch": 4}}
    assert "micro-batches of 4 samples: the whole share, since there is no GPU" in (run / "logs" / "train" / "s0" / "r0.a0.log").read_text()


@pytest.mark.parametrize(("family", "changes", "words"), [
    ("pacgan", {"loop": {"checkpoint_activations": True}}, "loop.checkpoint_activations has no effect: this family names no blocks"),
    ("pacgan", {"loop": {"compile": True}}, "loop.compile has no effect: this family's networks are not compiled; remove it"),
    ("pacgan", {"loop": {"micro_batch": "auto"}, "std_group": None}, "loop.micro_batch: auto would make the training depend on the GPU"),
    ("diffusion", {"loop": {"micro_batch": "all"}}, "micro_batch"),
    ("diffusion", {"loop": {"micro_batch": 0}}, "micro_batch"),
])  # fmt: skip
def test_what_cannot_work_is_refused(family: str, changes: dict[str, Any], words: str) -> None:
    config = models.config_class(family)
    with pytest.raises(ValueError, match=words):
        config.model_validate({**next(iter(config.examples().values())), **changes})
