"""The clipped sum of per_record.py for a critic of convolutions and leaky ReLUs, at about the cost of an ordinary update. Used by model.py.

Such a critic is linear between its kinks. With a_0 the image, z_l = W_l * a_(l-1) + b_l and a_l = m_l z_l (m_l: 1 or the slope, by the sign
of z_l) and the score w . a_L, the chain rule gives what every layer's weight needs: a pair of an input and an output gradient.

    score at an image        u_L = m_L w,  u_(l-1) = m_(l-1) (W_l^T * u_l)                pairs (a_(l-1), u_l)
    its gradient             v = W_1^T * u_1
    penalty (|v| - 1)^2      t_0 = 2 (|v| - 1) v / |v|,  t_l = m_l (W_l * t_(l-1))        pairs (t_(l-1), u_l)

The last line holds because v is linear in each W_l and the masks have no derivative: so a penalty costs one pass forward more, without the
biases, and its pairs share u_l with the score of the mixed image. A record's gradient of W_l is the sum over all positions of its 3k pairs
of their outer products, U^T A. Its norm comes either of that matrix, or of |U^T A|^2 = <U U^T, A A^T>, which is cheaper for few positions
and many channels (Goodfellow, 2015, arXiv:1510.01799; for convolutions Bu et al., NeurIPS 2022); the sum over records then of scaled pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from medgen.models.dpwgan.cross_record import with_random_weights
from medgen.models.dpwgan.records import (
    NORM_EPSILON,
    ClippedSum,
    Records,
    RecordTerms,
    clip_factors,
    empty_sum,
    joined_terms,
)

FORMED_COST = 100  # multiplications that take the time of writing and reading one number of a record's own gradient
GRAM_COST = 2  # of a multiplication in float64, which products of all pairs of positions need: what cancels there is the square of a norm
PROBES = 2
AGREE = 1e-9  # of scores with those of the chain, relative: rounding of float64


@runtime_checkable
class LeakyChain(Protocol):
    """A critic that says what it is made of: flatten(leaky(convolution(...))) through the linear layer `score`, and nothing else."""

    convolutions: Sequence[nn.Conv2d]  # a ModuleList
    score: nn.Linear
    slope: float
    image_shape: tuple[int, int, int]  # C, H, W


def supports(critic: nn.Module) -> str | None:
    """Why this critic is none that `clipped_sum` is right for, or None. Also measures: it must score images as its layers say."""
    if not isinstance(critic, LeakyChain):
        return f"{type(critic).__name__} does not have the attributes convolutions, score, slope and image_shape"
    for number, layer in enumerate(critic.convolutions):
        if not isinstance(layer, nn.Conv2d):
            return f"convolutions[{number}] is {layer}, not a Conv2d"
        if layer.groups != 1 or layer.dilation != (1, 1) or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return f"convolutions[{number}] is {layer}: only one group, no dilation and numbers of zeros as padding are known here"
    if not isinstance(critic.score, nn.Linear) or critic.score.out_features != 1:
        return f"score is {critic.score}, not a Linear with one output"
    if not 0 <= critic.slope <= 1:
        return f"slope is {critic.slope}, not between 0 and 1"
    if other := {name for name, _ in critic.named_parameters()} - _known_names(critic):
        return f"its parameters {', '.join(sorted(other))} are in neither convolutions nor score"
    if shared := _known_names(critic) - {name for name, _ in critic.named_parameters()}:
        return f"its parameters {', '.join(sorted(shared))} stand in two places"
    return _measured_problem(critic)


def _known_names(critic: LeakyChain) -> set[str]:
    layers = {"score": critic.score, **{f"convolutions.{number}": layer for number, layer in enumerate(critic.convolutions)}}
    return {f"{prefix}.{name}" for prefix, layer in layers.items() for name, _ in layer.named_parameters()}


def _measured_problem(critic: nn.Module) -> str | None:
    generator = torch.Generator().manual_seed(0)
    probe = with_random_weights(critic, generator)
    assert isinstance(probe, LeakyChain)
    images = torch.randn((PROBES, *probe.image_shape), generator=generator, dtype=torch.float64)
    with torch.no_grad():
        found = probe(images)
        expected = probe.score(_activations(probe, images)[-1].flatten(1)).flatten()
    if found.shape != expected.shape or (found - expected).norm() > AGREE * expected.norm():
        return f"{type(critic).__name__} scores images unlike its convolutions, leaky ReLUs of slope {critic.slope} and linear layer do"
    return None


@torch.no_grad()
def clipped_sum(critic: nn.Module, records: Records, penalty: float, clip_norm: float | None, chunk: int) -> ClippedSum:
    """The same as per_record.clipped_sum, for critics that this module `supports`."""
    assert isinstance(critic, LeakyChain) and chunk > 0, chunk
    if not len(records):
        return empty_sum(critic, records)
    sums: dict[str, Tensor] = {}
    norms, terms = [], []
    for part in records.split(chunk):
        passes = _passes(critic, part, penalty)
        terms.append(passes.terms)
        gradients = _gradients(critic, passes, part)
        squares = torch.stack([gradient.squared_norms() for gradient in gradients.values()]).sum(dim=0).clamp(min=0)  # rounding of a 0 may be below it
        norms.append(squares.sqrt().to(part.real.dtype))
        factors = clip_factors(norms[-1], clip_norm)
        for name, gradient in gradients.items():
            with _all_digits():
                scaled = gradient.scaled_sum(factors)
            sums[name] = sums[name].add_(scaled) if name in sums else scaled
    shaped = {name: _as_parameter(sums[name], parameter) for name, parameter in critic.named_parameters() if parameter.requires_grad}
    return ClippedSum(shaped, torch.cat(norms), joined_terms(terms))


@contextmanager
def _all_digits() -> Iterator[None]:
    """Products of GPUs with all 24 bits: what is rounded after the norms were known may be longer than they say."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)


# the passes


@dataclass(frozen=True)
class Passes:
    """Of n records with k slices: 3nk images, first all real, then all fake, then all mixed ones, each kind record by record.

    inputs: of every convolution, [3nk, C, H, W], and last of the linear layer; of mixed images the tangents t instead.
    outputs: u of every convolution, [3nk, C, H, W], times the weight of the image's score in its record's loss."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    terms: RecordTerms


def _passes(critic: LeakyChain, records: Records, penalty: float) -> Passes:
    shape = records.mix.shape  # n, k
    images = torch.cat([kind.flatten(0, 1) for kind in (records.real, records.fake, records.mixed())])
    inputs = _activations(critic, images.contiguous(memory_format=torch.channels_last))
    of_real, of_fake, _ = critic.score(inputs[-1].flatten(1)).view(3, *shape).mean(dim=2)
    outputs = _output_gradients(critic, inputs, _shares(records))
    slopes = _input_gradient(critic.convolutions[0], images.shape[1:], _of_mixed(outputs[0]))
    lengths = (slopes.flatten(1).square().sum(dim=1) + NORM_EPSILON).sqrt()
    pulls = 2 * penalty / records.slices * (lengths - 1) / lengths
    _put_tangents(critic, inputs, pulls.view(-1, 1, 1, 1) * slopes)
    excess = (lengths - 1).square().view(shape).mean(dim=1)
    return Passes(inputs, outputs, RecordTerms(of_real, of_fake, excess, of_fake - of_real + penalty * excess))


def _of_mixed(images: Tensor) -> Tensor:
    return images.tensor_split(3)[2]


def _shares(records: Records) -> Tensor:
    """The weight of every image's score in its record's loss, [3nk]; of mixed images it is in the tangents."""
    return records.mix.new_tensor([-1 / records.slices, 1 / records.slices, 1]).repeat_interleave(records.mix.numel())


def _activations(critic: LeakyChain, images: Tensor) -> list[Tensor]:
    """The input of every layer."""
    inputs = [images]
    for layer in critic.convolutions:
        inputs.append(functional.leaky_relu(layer(inputs[-1]), critic.slope))
    return inputs


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    """Rows and columns of zeros on each side."""
    assert not isinstance(layer.padding, str), layer
    rows, columns = layer.padding
    return rows, columns


def _kinked(critic: LeakyChain, values: Tensor, activations: Tensor) -> Tensor:
    """values times the derivative of the leaky ReLU that gave `activations`."""
    kinked: Tensor = torch.ops.aten.leaky_relu_backward(values, activations, critic.slope, True)
    return kinked


def _input_gradient(layer: nn.Conv2d, shape: torch.Size, outputs: Tensor) -> Tensor:
    """shape: of one input."""
    found: Tensor = conv2d_input((len(outputs), *shape), layer.weight, outputs, layer.stride, _padding(layer))
    return found


def _output_gradients(critic: LeakyChain, inputs: list[Tensor], shares: Tensor) -> list[Tensor]:
    behind = shares.view(-1, 1, 1, 1) * critic.score.weight.view(inputs[-1].shape[1:])
    found = [_kinked(critic, behind, inputs[-1])]
    for layer, activations in zip(reversed(critic.convolutions[1:]), inputs[-2:0:-1], strict=True):
        behind = _input_gradient(layer, activations.shape[1:], found[-1])
        found.append(_kinked(critic, behind, activations))
    return found[::-1]


def _put_tangents(critic: LeakyChain, inputs: list[Tensor], tangents: Tensor) -> None:
    """In the place of mixed images' inputs, after what these said of the kinks."""
    for number, layer in enumerate(critic.convolutions):
        _of_mixed(inputs[number]).copy_(tangents)
        moved = functional.conv2d(tangents, layer.weight, None, layer.stride, _padding(layer))
        tangents = _kinked(critic, moved, _of_mixed(inputs[number + 1]))
    _of_mixed(inputs[-1]).copy_(tangents)


# the gradients of each record


@dataclass(frozen=True)
class Formed:
    """Of one parameter, written down: [n, rows, columns]."""

    matrices: Tensor

    def squared_norms(self) -> Tensor:
        """[n], float64. By rows first: a sum of millions of squares in float32 would be off by more than rounding."""
        return torch.linalg.vector_norm(self.matrices, dim=2).double().square().sum(dim=1)

    def scaled_sum(self, factors: Tensor) -> Tensor:
        matrices = self.matrices.flatten(1)
        matrices[factors == 0] = 0  # what is not finite stays so when it is multiplied by 0
        return (factors @ matrices).view(self.matrices.shape[1:])


@dataclass(frozen=True)
class Factored:
    """Of one weight, as outputs^T inputs: [n, positions, rows] and [n, positions, columns]."""

    outputs: Tensor
    inputs: Tensor

    def squared_norms(self) -> Tensor:
        """[n], float64: terms that cancel are of the size of the squares, and a norm that is too small would break the bound."""
        outputs, inputs = self.outputs.double(), self.inputs.double()
        return ((outputs @ outputs.mT) * (inputs @ inputs.mT)).sum(dim=(1, 2))

    def scaled_sum(self, factors: Tensor) -> Tensor:
        self.outputs[factors == 0] = 0
        self.inputs[factors == 0] = 0
        outputs = self.outputs * factors[:, None, None]
        return outputs.flatten(0, 1).T @ self.inputs.flatten(0, 1)


def _gradients(critic: LeakyChain, passes: Passes, records: Records) -> dict[str, Formed | Factored]:
    n, k = records.mix.shape
    gradients: dict[str, Formed | Factored] = {}
    for number, layer in enumerate(critic.convolutions):
        inputs, outputs = ([kind.unflatten(0, (n, k)) for kind in values.tensor_split(3)] for values in (passes.inputs[number], passes.outputs[number]))
        if layer.weight.requires_grad:
            gradients[f"convolutions.{number}.weight"] = _of_weight(layer, inputs, outputs)
        if layer.bias is not None and layer.bias.requires_grad:
            biases = (outputs[0] + outputs[1]).sum(dim=(1, 3, 4))  # the penalty does not depend on them
            gradients[f"convolutions.{number}.bias"] = Formed(biases[:, None])
    if critic.score.weight.requires_grad:
        seen = passes.inputs[-1].flatten(1) * _shares(records)[:, None]
        gradients["score.weight"] = Formed(seen.view(3, n, k, -1).sum(dim=(0, 2))[:, None])
    if critic.score.bias is not None and critic.score.bias.requires_grad:  # real and fake images have as much of it
        gradients["score.bias"] = Formed(records.mix.new_zeros((n, 1, 1)))
    return gradients


def _of_weight(layer: nn.Conv2d, inputs: list[Tensor], outputs: list[Tensor]) -> Formed | Factored:
    """Of real, fake and mixed images, [n, k, C, H, W] each; the cheaper of both forms."""
    rows = [kind.movedim(2, -1).flatten(1, 3) for kind in outputs]  # [n, kHW, C]
    positions, size = 3 * rows[0].shape[1], layer.weight.numel()
    gram_cost = GRAM_COST * positions**2 * (layer.out_channels + size // layer.out_channels)
    if gram_cost < FORMED_COST * size:
        return Factored(torch.cat(rows, dim=1), torch.cat([_columns(layer, kind) for kind in inputs], dim=1))
    matrices = rows[0].mT @ _columns(layer, inputs[0])
    for kind in (1, 2):
        matrices.baddbmm_(rows[kind].mT, _columns(layer, inputs[kind]))
    return Formed(matrices)


def _columns(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """[n, k, C, H, W] to what every output position sees, [n, k times positions, kernel height * kernel width * C]."""
    (height, width), (down, right), (vertical, horizontal) = layer.kernel_size, layer.stride, _padding(layer)
    last = functional.pad(images.movedim(2, -1), (0, 0, horizontal, horizontal, vertical, vertical))
    patches = last.unfold(2, height, down).unfold(3, width, right)  # [n, k, rows, columns, C, height, width]
    return patches.movedim(4, -1).flatten(4).flatten(1, 3)


def _as_parameter(matrix: Tensor, parameter: Tensor) -> Tensor:
    """What stands in columns as `_columns` has it, in the parameter's shape."""
    if parameter.dim() == 4:
        outputs, inputs, height, width = parameter.shape
        return matrix.view(outputs, height, width, inputs).permute(0, 3, 1, 2).contiguous()
    return matrix.view(parameter.shape)
