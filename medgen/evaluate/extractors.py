"""The networks whose features are compared, each with the input that it takes. Loaded by by_class.py, run by features.py.

An extractor owns all that happens to an image before the network: the resize (float, antialiased), the range, and gray to three channels."""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medgen.data.resize import resize_images
from medgen.errors import InputError
from medgen.spec_evaluate import INCEPTION_SHA256, InceptionExtractor, RandomConvExtractor, TorchScriptExtractor

if TYPE_CHECKING:
    import torch

INCEPTION_PIXELS = 299
RANDOM_CONV_PIXELS = 128
RANDOM_CONV_WIDTHS = (16, 32, 64, 96, 32)
RANDOM_CONV_GAIN = 2.6  # features of brain slices then have a root mean square near 1, where the cubic kernel of KID is not a line
RANDOM_CONV_GRID = 4
RANDOM_CONV_SEED = b"medgen random_conv 1"


@dataclass(frozen=True)
class Extractor:
    """`name` is part of the protocol of every score made with it: two names are two metrics.

    `network` takes float32 [n, 3, size, size] whose values lie in `value_range`, and returns [n, d]. `published_inception`:
    it is the network of the FID, with its published weights."""

    name: str
    size: int
    value_range: tuple[float, float]
    network: torch.nn.Module
    published_inception: bool = False

    def prepared(self, images: np.ndarray) -> torch.Tensor:
        """What the network sees of gray images [n,H,W] in [0,1], the window of the data. Nothing is rounded to 8 bits."""
        import torch

        low, high = self.value_range
        resized = torch.from_numpy(low + (high - low) * resize_images(images, self.size))
        return resized[:, None].expand(-1, 3, -1, -1).contiguous()


def load(asked: dict[str, Any]) -> Extractor:
    """The extractor of an evaluate stage, from its settings in the plan. Raises InputError for weights that are missing or others."""
    match asked["kind"]:
        case "inception":
            return _inception(InceptionExtractor.model_validate(asked))
        case "torchscript":
            return _torchscript(TorchScriptExtractor.model_validate(asked))
        case _:
            return random_conv(RandomConvExtractor.model_validate(asked))


def _inception(asked: InceptionExtractor) -> Extractor:
    """The blocks of torch-fidelity's network one after the other: its own forward takes only 8-bit images, and resizes them itself."""
    import torch

    from medgen.evaluate import torchvision_operators

    digest = asked.verified()
    torchvision_operators.make_importable()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # read here, as tensors only: torch-fidelity would run whatever code the file holds, and download one if it got no file
    buffer = io.BytesIO()
    try:
        torch.save(torch.load(asked.file, map_location="cpu", weights_only=True), buffer)
        buffer.seek(0)
        whole = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=buffer)
    except pickle.UnpicklingError:  # its words advise to run the code
        raise InputError(f"extractor: {asked.file} does not hold the weights of torch-fidelity's InceptionV3, but other objects than tensors") from None
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, TypeError, AttributeError) as error:
        raise InputError(f"extractor: {asked.file} does not hold the weights of torch-fidelity's InceptionV3: {str(error).splitlines()[0]}") from None
    blocks = [block for name, block in whole.named_children() if name != "fc"]
    network = torch.nn.Sequential(*blocks, torch.nn.Flatten()).eval()
    # the graph computes (x - 128) / 128 of 0..255
    name = f"InceptionV3 of torch-fidelity, 2048 pooled features, sha256 {digest[:12]}, antialiased bilinear to {INCEPTION_PIXELS} px in float"
    return Extractor(name, INCEPTION_PIXELS, (-1.0, 127 / 128), network, digest == INCEPTION_SHA256)


def _torchscript(asked: TorchScriptExtractor) -> Extractor:
    import torch

    digest = asked.verified()
    try:
        network = torch.jit.load(str(asked.file), map_location="cpu").eval()
    except RuntimeError as error:
        raise InputError(f"extractor: {asked.file} is no TorchScript file: {str(error).splitlines()[0]}") from None
    low, high = asked.range
    name = f"TorchScript {asked.file.name}, sha256 {digest[:12]}, antialiased bilinear to {asked.size} px in [{low:g}, {high:g}]"
    return Extractor(name, asked.size, asked.range, network)


def random_conv(asked: RandomConvExtractor) -> Extractor:
    """Five 3x3 convolutions with ReLU and pooling. Features: the mean of every channel after each, and the last on a 4x4 grid.

    The weights are the bytes of a hash, so that no version of any library changes them; the first layer sees no flat brightness."""
    import torch

    class RandomConv(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.from_numpy(weight), requires_grad=False) for weight in _random_weights())

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            found, maps = [], images
            for weight in self.weights:
                maps = torch.relu(torch.nn.functional.conv2d(torch.nn.functional.pad(maps, (1, 1, 1, 1), mode="reflect"), weight))
                found.append(maps.mean((2, 3)))
                maps = torch.nn.functional.avg_pool2d(maps, 2)
            return torch.cat([*found, torch.nn.functional.adaptive_avg_pool2d(maps, RANDOM_CONV_GRID).flatten(1)], dim=1)

    name = f"random_conv 1 (fixed random network of medgen, no trained weights), antialiased bilinear to {RANDOM_CONV_PIXELS} px"
    return Extractor(name, RANDOM_CONV_PIXELS, (0.0, 1.0), RandomConv().eval())


def _random_weights() -> list[np.ndarray]:
    """float32 [out, in, 3, 3] of every layer; each filter has the same norm."""
    shapes = [(after, before, 3, 3) for before, after in zip((3, *RANDOM_CONV_WIDTHS), RANDOM_CONV_WIDTHS, strict=False)]
    stream = hashlib.shake_256(RANDOM_CONV_SEED).digest(sum(int(np.prod(shape)) for shape in shapes))
    drawn = np.frombuffer(stream, dtype=np.uint8).astype(np.float64) - 127.5
    layers = []
    for number, shape in enumerate(shapes):
        taken, drawn = drawn[: np.prod(shape)].reshape(shape), drawn[np.prod(shape) :]
        if number == 0:
            taken = taken - taken.mean(axis=(2, 3), keepdims=True)
        norms = np.sqrt((taken**2).sum(axis=(1, 2, 3), keepdims=True))
        layers.append((RANDOM_CONV_GAIN * taken / norms).astype(np.float32))
    return layers
