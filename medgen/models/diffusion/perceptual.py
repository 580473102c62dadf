"""The perceptual loss: how different the predicted clean image looks from the real one, to a network that others have trained.

Used by model.py beside the mean squared error. The network is no part of the model: it is neither trained, averaged nor saved."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from medgen.models.diffusion.perceptual_settings import RADIMAGENET, PerceptualSettings
from medgen.models.diffusion.strategies import Strategy
from medgen.pretrained.perceptual import lpips_of, radimagenet_of

TOLERANCE = 1e-3  # of a clean image in [-1, 1]
TRIED = (0.1, 0.3, 0.5)  # quantiles of the training times at which a strategy of one's own is asked


class PerceptualLoss:
    """Of each sample: the distance of predicted and real image, averaged over the images of a sample.

    Raises InputError if the weights are missing, have changed since the spec was read, or are those of another network."""

    def __init__(self, settings: PerceptualSettings, strategy: Strategy, targets: tuple[str, ...], device: torch.device):
        """`targets`: the mode's, of which masks are left out: these networks know images."""
        self.weight = settings.weight
        self._snr_at_least, self._strategy = settings.snr_at_least, strategy
        self._images = [place for place, name in enumerate(targets) if name != "seg"]
        self._network = _network(settings.net, settings.file, settings.verified(), settings.key, device)

    def counted(self, times: Tensor) -> Tensor:
        """The places in a batch of the samples whose times [B] have enough signal, int64 [at most B]."""
        return (self._strategy.snr(times) >= self._snr_at_least).nonzero().flatten()

    def __call__(self, clean: Tensor, noisy: Tensor, prediction: Tensor, times: Tensor, counted: Tensor) -> Tensor:
        """float32 [B] from images [B, C, H, W] in [-1, 1], what the network predicted of the noisy ones, and their times [B].

        0 for samples that are not `counted`: nothing is computed of them, and their gradient is exactly 0. Call it outside of autocast."""
        distances = clean.new_zeros(len(clean))
        if len(counted) == 0:
            return distances
        predicted = self._strategy.clean(noisy[counted], prediction[counted].float(), times[counted])
        with torch.no_grad():
            real = self._seen(clean[counted])
        apart = (self._seen(predicted) - real).square().sum(dim=1).view(len(counted), -1)
        return distances.index_put((counted,), apart.mean(dim=1))

    def _seen(self, images: Tensor) -> Tensor:
        """Every image of every sample, gray, as a vector [B * images, d]."""
        seen: Tensor = self._network(images[:, self._images].flatten(0, 1).unsqueeze(1))
        return seen


@functools.cache
def _network(net: str, file: Path, sha256: str, key: str, device: torch.device) -> nn.Module:
    """Read once in a process; `sha256` is there because other contents are another network."""
    made = radimagenet_of(file, key) if net == RADIMAGENET else lpips_of(net, file, key)
    return made.requires_grad_(False).eval().to(device)


def why_not(strategy: Strategy) -> str | None:
    """Why the loss cannot be had with a strategy of one's own, in words; None if it can."""
    lacks = [name for name in ("clean", "snr") if getattr(type(strategy), name) is getattr(Strategy, name)]
    if lacks:
        return f"{type(strategy).__name__} does not define {' and '.join(lacks)}, from which the loss is computed; define it, or remove perceptual"
    try:
        off = _farthest_off(strategy)
    except Exception as error:  # whatever the user's class does
        return f"{type(strategy).__name__} fails when its clean is tried: {type(error).__name__}: {error}"
    if off > TOLERANCE:
        return (f"{type(strategy).__name__}.clean is off by {off:.2g} when it is given the very target of its own noised; "
                "mend it (an inherited clean belongs to the inherited noised), or remove perceptual")  # fmt: skip
    return None


def _farthest_off(strategy: Strategy) -> float:
    times = strategy.times(torch.tensor(TRIED))
    clean, noise = torch.tensor([-1.0, 0.2, 0.9]).view(-1, 1, 1, 1), torch.tensor([0.5, -1.3, 0.8]).view(-1, 1, 1, 1)
    noisy, target = strategy.noised(clean, noise, times)
    return float((strategy.clean(noisy, target, times) - clean).abs().max())
