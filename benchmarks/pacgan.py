"""What a training step of PACGAN costs, at every size: medgen's `Model.step` beside the published mathematics written plainly.

The plain side is written twice: with one pass of the critic for each term of the losses, and with one for each kind of image. Both draw fakes with
a graph, blend a new size at full resolution, classify real images in the generator's loss (no gradient comes of it) and compute the critic's
gradients in the generator's update to throw them away. All sides must agree, or nothing is measured: losses and gradients in float64 (in float32 a
leaky ReLU near zero may fall to either side, and gradients jump by more than rounding), and the losses of what is measured. CPU seconds of one
thread, sides taken in turns: others on the machine cost waiting time, which does not count. With a GPU: bf16 beside float32."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medgen.context import Context
from medgen.dist import ALONE, Ranks
from medgen.models.base import Batch, DataShape
from medgen.models.pacgan.config import Config
from medgen.models.pacgan.model import FIRST_ALPHA, Model
from medgen.models.pacgan.networks import Critic, EqualizedConv2d, Generator

THREADS = 1
MOMENTS = {"fading_in": 0.25, "grown": 0.75}  # shares of a phase; with fade_share 0.5 the new layers count half, and wholly
BATCHES = {4: 32, 8: 16, 16: 4, 32: 4, 64: 4, 128: 4, 256: 4}  # on a CPU smaller than published from 8 px on, for the time it takes
CHANNELS = {128: 128, 256: 128}  # in_channels, smaller than published for the same reason
PUBLISHED_CHANNELS = 512
ROUNDS = {4: 5, 8: 3, 16: 3, 32: 2, 64: 2, 128: 3, 256: 3}
AGREE_FLOAT64 = 1e-6  # largest relative difference of a loss, and of a network's gradients by their norm; medgen adds losses up in float32
AGREE = 1e-4  # of a loss of the measured network, in float32
NARROW = 64  # in_channels of the network that is compared in float64
AGREE_BF16 = 0.1  # of a loss of bf16 to that of float32, relative to the largest term
WANTED = 1.2

Judge = Callable[[Critic, Tensor, int, float], tuple[Tensor, Tensor]]


# the published mathematics, plainly


def convolved(layer: EqualizedConv2d, x: Tensor) -> Tensor:
    outputs, inputs, kernel, _ = layer.weight.shape
    padding = 1 if kernel == 3 else 0
    return functional.conv2d(x * math.sqrt(2 / (kernel * kernel * inputs)), layer.weight, padding=padding) + layer.bias.view(1, outputs, 1, 1)


def leaky(x: Tensor) -> Tensor:
    return functional.leaky_relu(x, 0.2)


def normalized(x: Tensor) -> Tensor:
    return x / torch.sqrt((x**2).mean(dim=1, keepdim=True) + 1e-8)


def made(generator: Generator, latent: Tensor, labels: Tensor, step: int, alpha: float) -> Tensor:
    x = normalized(torch.cat([latent, generator.embedding(labels)], dim=1)[:, :, None, None])
    x = normalized(leaky(convolved(generator.start_conv, leaky(generator.start(x)))))
    if step == 0:
        return torch.tanh(convolved(generator.to_image[0], x))
    for block in generator.blocks[:step]:
        larger = functional.interpolate(x, scale_factor=2, mode="nearest")
        x = normalized(leaky(convolved(block.second, normalized(leaky(convolved(block.first, larger))))))
    return torch.tanh(alpha * convolved(generator.to_image[step], x) + (1 - alpha) * convolved(generator.to_image[step - 1], larger))


def judged(critic: Critic, images: Tensor, step: int, alpha: float) -> tuple[Tensor, Tensor]:
    """Scores and logits."""
    x = leaky(convolved(critic.from_image[step], images))
    for level in range(step, 0, -1):
        block = critic.blocks[level - 1]
        x = functional.avg_pool2d(leaky(convolved(block.second, leaky(convolved(block.first, x)))), 2)
        if level == step:
            smaller = leaky(convolved(critic.from_image[step - 1], functional.avg_pool2d(images, 2)))
            x = alpha * x + (1 - alpha) * smaller
    assert critic.std_group is not None
    groups = x.view(-1, critic.std_group, *x.shape[1:])
    differences = groups.std(dim=1).mean(dim=(1, 2, 3)).repeat_interleave(critic.std_group)
    x = torch.cat([x, differences.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], dim=1)
    x = leaky(convolved(critic.end_pool, leaky(convolved(critic.end_conv, x))))
    return convolved(critic.score, x).flatten(), convolved(critic.class_logits, convolved(critic.class_hidden, x)).flatten(1)


def judged_term_by_term(critic: Critic, images: Tensor, step: int, alpha: float) -> tuple[Tensor, Tensor]:
    return judged(critic, images, step, alpha)[0], judged(critic, images, step, alpha)[1]


JUDGES: dict[str, Judge] = {"a_pass_per_term": judged_term_by_term, "a_pass_per_image": judged}


@dataclass
class Plain:
    """Networks of their own, the published losses, two Adams."""

    model: Model  # for its networks and weights alone
    judge: Judge
    step: int
    alpha: float

    def __post_init__(self) -> None:
        self.critic, self.generator, self.config = self.model.critic, self.model.generator, self.model.config
        self.of_critic, self.of_generator = (torch.optim.Adam(network.parameters(), self.config.lr, self.config.betas) for network in (self.critic, self.generator))

    def critic_terms(self, real: Tensor, labels: Tensor, latent: Tensor, mix: Tensor) -> dict[str, Tensor]:
        fake = made(self.generator, latent, labels, self.step, self.alpha)
        of_real, of_fake = self.judge(self.critic, real, self.step, self.alpha), self.judge(self.critic, fake.detach(), self.step, self.alpha)
        share = mix.view(-1, 1, 1, 1)
        mixed = (share * real + (1 - share) * fake).detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(judged(self.critic, mixed, self.step, self.alpha)[0].sum(), mixed, create_graph=True)
        terms = {"real_score": of_real[0].mean(), "fake_score": of_fake[0].mean(), "real_class": functional.cross_entropy(of_real[1], labels),
                 "fake_class": functional.cross_entropy(of_fake[1], labels), "penalty": ((gradient.flatten(1).norm(dim=1) - 1) ** 2).mean(),
                 "drift": (of_real[0] ** 2).mean()}  # fmt: skip
        loss = (-terms["real_score"] + terms["fake_score"] + self.config.aimed_class * terms["real_class"] + self.config.other_class * terms["fake_class"]
                + self.config.penalty * terms["penalty"] + self.config.drift * terms["drift"])  # fmt: skip
        return {"loss": loss, **terms}

    def generator_terms(self, real: Tensor, labels: Tensor, latent: Tensor) -> dict[str, Tensor]:
        """`constant`: the classification of real images, part of the published loss."""
        fake = made(self.generator, latent, labels, self.step, self.alpha)
        score, logits = self.judge(self.critic, fake, self.step, self.alpha)
        constant = self.config.other_class * functional.cross_entropy(judged(self.critic, real, self.step, self.alpha)[1], labels)
        error = functional.cross_entropy(logits, labels)
        return {"loss": -score.mean() + self.config.aimed_class * error + constant, "score": score.mean(), "class": error, "constant": constant}

    def train(self, real: Tensor, labels: Tensor) -> None:
        for _ in range(self.config.critic_iterations[self.step]):
            terms = self.critic_terms(real, labels, torch.randn(len(real), self.config.latent), torch.rand(len(real)))
            self.of_critic.zero_grad()
            terms["loss"].backward()
            self.of_critic.step()
        terms = self.generator_terms(real, labels, torch.randn(len(real), self.config.latent))
        self.of_generator.zero_grad()
        terms["loss"].backward()
        self.of_generator.step()


# do all sides say the same?


@dataclass
class Recorded:
    """What one update was about to do: the weights of both networks, and the gradients of one of them."""

    critic: dict[str, Tensor]
    generator: dict[str, Tensor]
    gradients: list[Tensor]


@dataclass
class Recorder(Context):
    """medgen's own context, which also keeps what each update starts from."""

    model: Model
    updates: list[Recorded] = field(default_factory=list)

    def __post_init__(self) -> None:
        Context.__init__(self, ALONE, "fp32", None)

    def reduce_gradients(self, parameters: list[nn.Parameter]) -> None:
        super().reduce_gradients(parameters)
        critic, generator = (copy.deepcopy(network.state_dict()) for network in (self.model.critic, self.model.generator))
        self.updates.append(Recorded(critic, generator, _gradients(parameters)))


def _gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone() for parameter in parameters]


@dataclass(frozen=True)
class Differences:
    """Largest of one step, relative."""

    losses: float
    gradients: float


def differences(model: Model, judge: Judge, batch: Batch, level: int, progress: float) -> Differences:
    """Every update starts from the same weights on both sides."""
    model, other = copy.deepcopy(model), copy.deepcopy(model)
    recorder = Recorder(model)
    recorder.phase, recorder.phase_progress = level, progress
    report = model.step(batch, recorder)
    plain = Plain(other, judge, level, alpha_of(progress, level))
    labels, real, latents = batch.labels, batch.channels["image"] * 2 - 1, (model.config.latent,)
    assert labels is not None
    losses, gradients = [], []
    for number, update in enumerate(recorder.updates):
        plain.critic.load_state_dict(update.critic)
        plain.generator.load_state_dict(update.generator)
        player, network = ("generator", plain.generator) if number == len(recorder.updates) - 1 else ("critic", plain.critic)
        network.zero_grad(set_to_none=True)
        if player == "critic":
            terms = plain.critic_terms(real, labels, batch.normal(f"latent/{number}", latents), batch.uniform(f"mix/{number}"))
        else:
            terms = plain.generator_terms(real, labels, batch.normal("latent/generator", latents))
            terms["loss"] = terms["loss"] - terms.pop("constant")
        terms["loss"].backward()
        found = _gradients(list(network.parameters()))
        gradients.append(_norm([a - b for a, b in zip(found, update.gradients, strict=True)]) / _norm(update.gradients))
        if number >= len(recorder.updates) - 2:  # the report is of the last update of each
            losses += [_relative(terms[name].item(), report.scalars[f"{player}_{name}"].item()) for name in terms]
    return Differences(max(losses), max(gradients))


def largest_difference(model: Model, batch: Batch, level: int, progress: float) -> float:
    """Of losses, in the measured network; of all in a narrow one in float64. Ends the benchmark if they do not agree."""
    narrow = made_model(NARROW)
    for parameter in (*narrow.critic.parameters(), *narrow.generator.parameters()):
        parameter.data = parameter.data.double()
    doubles = Batch({"image": batch.channels["image"].double()}, batch.positions, batch.seed, labels=batch.labels)
    exact = [differences(narrow, judge, doubles, level, progress) for judge in JUDGES.values()]
    worst = max(max(item.losses, item.gradients) for item in exact)
    in_float32 = differences(model, judged, batch, level, progress).losses
    if not (worst < AGREE_FLOAT64 and in_float32 < AGREE):
        raise SystemExit(f"{4 * 2**level} px: the sides differ by {worst:.2g} in float64 (allowed {AGREE_FLOAT64:g}), their losses in float32 by {in_float32:.2g} "
                         f"(allowed {AGREE:g}): a ratio of times would mean nothing")  # fmt: skip
    return worst


def _norm(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors))


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / max(1.0, abs(reference))


# measuring


def made_model(in_channels: int) -> Model:
    config = Config.model_validate({"in_channels": in_channels})
    torch.manual_seed(0)
    return Model(config, DataShape(("image",), config.sizes[-1], ("CN", "AD")))


def alpha_of(progress: float, level: int) -> float:
    return min(1.0, FIRST_ALPHA + progress / 0.5) if level else 1.0


def batch_of(size: int, count: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(size)
    images = torch.rand((count, 1, size, size), generator=generator).to(device)
    return Batch({"image": images}, list(range(count)), 1, labels=(torch.arange(count) % 2).to(device))


def in_turns(sides: dict[str, Callable[[], object]], rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            start = clock()
            side()
            seconds[name].append(clock() - start)
    return {name: median(values[1:]) for name, values in seconds.items()}


def compared_on_cpu(model: Model, level: int, size: int, progress: float) -> dict[str, Any]:
    batch = batch_of(size, BATCHES[size], torch.device("cpu"))
    difference = largest_difference(model, batch, level, progress)
    context = Context(ALONE, "fp32", None)
    context.phase, context.phase_progress = level, progress
    real, labels = batch.channels["image"] * 2 - 1, batch.labels
    assert labels is not None
    plain = {name: Plain(copy.deepcopy(model), judge, level, alpha_of(progress, level)) for name, judge in JUDGES.items()}
    own = copy.deepcopy(model)
    sides: dict[str, Callable[[], object]] = {"medgen": lambda: own.step(batch, context)}
    for name, side in plain.items():
        sides[name] = lambda side=side: side.train(real, labels)
    seconds = in_turns(sides, ROUNDS[size], time.process_time)
    return {"in_channels": model.config.in_channels, "batch": len(batch), "published_batch": model.config.batch_sizes[level],
            "largest_difference_float64": float(f"{difference:.1e}"), "cpu_seconds": {name: round(value, 3) for name, value in seconds.items()},
            "faster_by": {name: round(seconds[name] / seconds["medgen"], 2) for name in plain}}  # fmt: skip


def compared_on_gpu(model: Model, level: int, size: int, progress: float) -> dict[str, Any]:
    """medgen's step in bf16 beside float32, at the published batch size; first one step of each from the same weights for their losses."""
    device = torch.device("cuda", 0)
    batch = batch_of(size, model.config.batch_sizes[level], device)
    steps, losses = {}, {}
    for precision in ("fp32", "bf16"):
        context = Context(Ranks(0, 1, 0, device), precision, None)
        context.phase, context.phase_progress = level, progress
        own = copy.deepcopy(model)
        for network in own.modules().values():
            network.to(device)
        losses[precision] = {name: value.item() for name, value in own.step(batch, context).scalars.items()}
        steps[precision] = lambda own=own, context=context: own.step(batch, context)
    scale = max(abs(value) for value in losses["fp32"].values())
    difference = max(abs(losses["bf16"][name] - value) for name, value in losses["fp32"].items()) / scale
    if not difference < AGREE_BF16:
        raise SystemExit(f"{size} px: losses in bf16 differ from float32 by {difference:.2g} of the largest (allowed {AGREE_BF16:g})")

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    seconds = in_turns(steps, 10, clock)
    return {"batch": len(batch), "largest_difference": float(f"{difference:.1e}"), "milliseconds": {name: round(1000 * value, 2) for name, value in seconds.items()},
            "bf16_faster_by": round(seconds["fp32"] / seconds["bf16"], 2)}  # fmt: skip


def every_size(compared: Callable[[Model, int, int, float], dict[str, Any]], channels: dict[int, int]) -> Iterator[tuple[str, dict[str, Any]]]:
    for level, size in enumerate(Config.model_validate({}).sizes):
        model = made_model(channels.get(size, PUBLISHED_CHANNELS))
        for moment, progress in MOMENTS.items():
            if level or moment == "grown":  # the first size does not fade in
                found = compared(model, level, size, progress)
                print(f"{size} px, {moment}: {found}", flush=True)
                yield f"{size}px_{moment}", found


def run() -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    record: dict[str, Any] = {"step": "updates of the critic, each with a penalty (one; two from 128 px on), and one of the generator", "threads": THREADS,
                              "load_average_before": os.getloadavg(), "wanted_faster_by": WANTED}  # fmt: skip
    record["cpu_float32"] = dict(every_size(compared_on_cpu, CHANNELS))
    record["load_average_after"] = os.getloadavg()
    record["gpu_bf16"] = dict(every_size(compared_on_gpu, {})) if torch.cuda.is_available() else "no GPU here"
    torch.set_num_threads(threads)
    return record
