"""The networks whose features are compared, each with the input that it takes. Loaded by by_class.py, run by features.py.

An extractor owns all that happens to an image before the network: the resize (float, antialiased), the range, and gray to three channels."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medgen import weights
from medgen.data.resize import resize_images
from medgen.errors import InputError
from medgen.evaluate import encoder
from medgen.evaluate.encoder import TrainingImages
from medgen.pretrained.folding import folded
from medgen.pretrained.layout import fill, other_layout
from medgen.spec_evaluate import (
    INCEPTION_SHA256,
    Dinov2Extractor,
    EncoderExtractor,
    InceptionExtractor,
    RandomConvExtractor,
    ResNet50Extractor,
    TorchScriptExtractor,
)

if TYPE_CHECKING:
    import torch

INCEPTION_PIXELS = 299
PHOTOGRAPH_PIXELS = 224  # what dinov2, swav, resnet50 and radimagenet were trained or tested with
PHOTOGRAPH_MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue in [0, 1]
PHOTOGRAPH_SPREAD = (0.229, 0.224, 0.225)
ENCODER_PIXELS = 64
RANDOM_CONV_PIXELS = 128
RANDOM_CONV_WIDTHS = (16, 32, 64, 96, 32)
RANDOM_CONV_GAIN = 2.6  # features of brain slices then have a root mean square near 1, where the cubic kernel of KID is not a line
RANDOM_CONV_GRID = 4
RANDOM_CONV_SEED = b"medgen random_conv 1"
SHOWN_DIGITS = 12  # of a sha256, in names


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
        """What the network sees of gray images [n,H,W] or colour images [n,3,H,W] in [0,1], the window of the data.

        Gray is given three times; nothing is rounded to 8 bits."""
        import torch

        low, high = self.value_range
        square = resize_images(images.reshape(-1, *images.shape[-2:]), self.size)
        resized = torch.from_numpy(low + (high - low) * square).reshape(len(images), -1, self.size, self.size)
        return resized.expand(-1, 3, -1, -1).contiguous()


def load(asked: dict[str, Any], training: TrainingImages | None) -> Extractor:
    """The extractor of an evaluate stage, from its settings in the plan; `training` is what `encoder` learns from.

    Raises InputError for weights that are missing or others, and for `encoder` without training slices."""
    match asked["kind"]:
        case "inception":
            return _inception(InceptionExtractor.model_validate(asked))
        case "dinov2":
            return _dinov2(Dinov2Extractor.model_validate(asked))
        case "swav" | "resnet50" | "radimagenet":
            return _resnet50(ResNet50Extractor.model_validate(asked))
        case "torchscript":
            return _torchscript(TorchScriptExtractor.model_validate(asked))
        case "encoder":
            return _encoder(EncoderExtractor.model_validate(asked), training)
        case _:
            return random_conv(RandomConvExtractor.model_validate(asked))


def _inception(asked: InceptionExtractor) -> Extractor:
    """The blocks of torch-fidelity's network one after the other: its own forward takes only 8-bit images, and resizes them itself."""
    import torch

    from medgen.pretrained import torchvision_operators

    digest = asked.verified()
    torchvision_operators.make_importable()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # read here, as tensors only: torch-fidelity would run whatever code the file holds, and download one if it got no file
    buffer = io.BytesIO()
    torch.save(weights.tensors(asked.file, "extractor"), buffer)
    buffer.seek(0)
    try:
        whole = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        raise other_layout(asked.file, "torch-fidelity's InceptionV3", asked.key, str(error)) from None
    blocks = [block for name, block in whole.named_children() if name != "fc"]
    network = folded(torch.nn.Sequential(*blocks, torch.nn.Flatten()))
    # the graph computes (x - 128) / 128 of 0..255
    name = f"InceptionV3 of torch-fidelity, 2048 pooled features, {_file_words(digest, INCEPTION_PIXELS)}"
    return Extractor(name, INCEPTION_PIXELS, (-1.0, 127 / 128), network, digest == INCEPTION_SHA256)


def _dinov2(asked: Dinov2Extractor) -> Extractor:
    import torch

    from medgen.evaluate.vision_transformer import SHAPES, VisionTransformer

    digest = asked.verified()
    shape = SHAPES[asked.arch]
    network = VisionTransformer(shape)
    found = {name: value for name, value in weights.tensors(asked.file, "extractor").items() if name != "mask_token"}  # of training only
    fill(network, found, asked.file, f"the ViT {asked.arch} of DINOv2", asked.key)
    name = f"DINOv2 {asked.arch}, {shape.width} features (normalised class token), {_file_words(digest, PHOTOGRAPH_PIXELS)}, mean and spread of ImageNet"
    return Extractor(name, PHOTOGRAPH_PIXELS, (0.0, 1.0), torch.nn.Sequential(_standardised(), folded(network)).eval())


def _resnet50(asked: ResNet50Extractor) -> Extractor:
    """Three trainings of one network, each with the input that its authors used."""
    import torch

    from medgen.pretrained import resnet50

    digest = asked.verified()
    maps = resnet50.feature_maps(asked.kind, asked.file, asked.key)
    network = torch.nn.Sequential(maps, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    name = f"{resnet50.LAYOUTS[asked.kind][0]}, 2048 pooled features, {_file_words(digest, PHOTOGRAPH_PIXELS)}"
    if asked.kind == "radimagenet":  # (image - 127.5) * 2 / 255 in pytorch_example.ipynb of its authors
        return Extractor(f"{name} in [-1, 1]", PHOTOGRAPH_PIXELS, (-1.0, 1.0), network)
    return Extractor(f"{name}, mean and spread of ImageNet", PHOTOGRAPH_PIXELS, (0.0, 1.0), torch.nn.Sequential(_standardised(), network).eval())


def _standardised() -> torch.nn.Module:
    import torch

    class Standardised(torch.nn.Module):
        mean: torch.Tensor
        spread: torch.Tensor

        """[n, 3, h, w] in [0, 1] with the mean and spread of photographs taken off."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.tensor(PHOTOGRAPH_MEAN).view(3, 1, 1))
            self.register_buffer("spread", torch.tensor(PHOTOGRAPH_SPREAD).view(3, 1, 1))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return (images - self.mean) / self.spread

    return Standardised()


def _file_words(digest: str, size: int) -> str:
    return f"sha256 {digest[:SHOWN_DIGITS]}, antialiased bilinear to {size} px in float"


def _encoder(asked: EncoderExtractor, training: TrainingImages | None) -> Extractor:
    if training is None:
        raise InputError("extractor: encoder learns from the real training slices, and there are none here; give the data a train split, "
                         "or write extractor: random_conv, which needs none")  # fmt: skip
    size = asked.size if asked.size is not None else min(ENCODER_PIXELS, training.size)
    if size > training.size:
        raise InputError(f"extractor.size: {size} px, but the data have {training.size}; the encoder cannot see more than there is")
    found = encoder.trained(training, encoder.Settings(size, asked.steps, asked.width))
    name = (f"encoder {encoder.VERSION} (trained without labels on {training.count} real training slices, {asked.steps} steps), {found.features} features, "
            f"{_file_words(found.sha256, size)}")  # fmt: skip
    return Extractor(name, size, (0.0, 1.0), found.network)


def _torchscript(asked: TorchScriptExtractor) -> Extractor:
    import torch

    digest = asked.verified()
    try:
        network = torch.jit.load(str(asked.file), map_location="cpu").eval()
    except RuntimeError as error:
        raise InputError(f"extractor: {asked.file} is no TorchScript file: {str(error).splitlines()[0]}") from None
    low, high = asked.range
    name = f"TorchScript {asked.file.name}, {_file_words(digest, asked.size)} in [{low:g}, {high:g}]"
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
