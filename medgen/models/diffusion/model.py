"""The diffusion model: a MONAI U-Net trained by a strategy in a mode. Built by train.py and generate.py."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from ema_pytorch import EMA
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from medgen import rng
from medgen.models.base import (
    BINS,
    Batch,
    DataShape,
    Given,
    Phase,
    SampleNoise,
    StepContext,
    StepReport,
    count_parameters,
    joined,
)
from medgen.models.base import Model as Family
from medgen.models.diffusion.config import Config, SamplingSettings
from medgen.models.diffusion.strategies import make_strategy
from medgen.models.guard import SpikeGuard
from medgen.models.settings import Settings

# Quantiles of the training times at which an image is denoised to ask whether it was trained on: much noise drowns what is
# known of one image, none leaves nothing to guess (Carlini et al., USENIX Security 2023, arXiv:2301.13188, section 5.2)
ATTACK_TIMES = (0.1, 0.2, 0.3, 0.4)
ATTACK_NOISES = 1
WARMUP_START = 0.1  # the learning rate begins at this share of its full value


class UNet(DiffusionModelUNet):
    """MONAI's U-Net, called positionally as (images [N, C, H, W], time [N])."""

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        return super().forward(images, timesteps=time)

    def blocks(self) -> list[nn.Module]:
        return [*self.down_blocks, self.middle_block, *self.up_blocks]


class Model(Family):
    """Strategy x mode over one U-Net, with an exponential moving average of its weights."""

    def __init__(self, config: Config, shape: DataShape):
        self.config = config
        self.mode = config.mode_class
        self.strategy = make_strategy(config)
        self.image_shape = (len(self.mode.targets), shape.size, shape.size)
        self.shape = shape
        self.network = UNet(
            spatial_dims=2,
            in_channels=len(self.mode.targets) + len(self.mode.conditions),
            out_channels=len(self.mode.targets),
            channels=config.channels,
            attention_levels=config.attention,
            num_res_blocks=config.res_blocks,
            num_head_channels=config.head_channels,
            norm_num_groups=math.gcd(32, *config.channels),
            use_flash_attention=True,  # PyTorch's fused attention: the same numbers without the [pixels, pixels] matrix in memory
        )
        self.ema = EMA(
            self.network,
            beta=config.ema.beta,
            update_after_step=config.ema.update_after_step,
            update_every=config.ema.update_every,
            include_online_model=False,
            use_foreach=True,
        )
        self.guard = SpikeGuard(config.loop)

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network, "ema": self.ema, "guard": self.guard}

    def blocks(self) -> list[nn.Module]:
        return self.network.blocks()

    def compiled_networks(self) -> list[nn.Module]:
        return [self.network]

    @cached_property
    def optimizer(self) -> torch.optim.AdamW:
        # ema-pytorch reads its counters every step: on the CPU that does not wait for the GPU
        self.ema.step, self.ema.initted = self.ema.step.cpu(), self.ema.initted.cpu()
        # fused: one pass over the weights instead of a dozen, four times faster on the CPU
        return torch.optim.AdamW(self.network.parameters(), lr=self.config.lr, weight_decay=self.config.weight_decay, fused=True)

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"network": self.optimizer}

    def phases(self) -> list[Phase]:
        return [Phase("main", self.config.epochs, self.config.batch_size, self.shape.size)]

    def step(self, batch: Batch, context: StepContext) -> StepReport:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, context.step / context.steps_per_epoch)
        network = context.parallel(self.network)
        losses, constants, fractions = [], [], []
        for part, share in context.micro_batches(batch, network):
            with context.autocast():
                loss, constant, fraction = self._losses(network, part)
            (loss.mean() * share).backward()
            losses.append(loss.detach())
            constants.append(constant)
            fractions.append(fraction)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        allowed = self.guard.allows(norm, context)
        if allowed:
            self.optimizer.step()
            self.ema.update()
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.cat(losses)
        scalars = {"loss": loss.mean(), "grad_norm": norm, "lr": torch.tensor(self.optimizer.param_groups[0]["lr"]), "skipped": torch.tensor(float(not allowed))}
        if context.step >= self.config.warmup_epochs * context.steps_per_epoch:
            scalars["constant_loss"] = torch.cat(constants).mean()
        return StepReport(scalars, self._binned(loss, torch.cat(fractions)))

    def validate(self, batch: Batch, context: StepContext) -> StepReport:
        with context.autocast():
            loss, _, fraction = self._losses(self.ema.ema_model, batch)
        return StepReport({"loss": loss.mean()}, self._binned(loss, fraction))

    def _losses(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squared error of each sample [B] in float32, that of predicting a constant [B], and its time as a fraction [B]."""
        times = self.strategy.times(batch.uniform("time"))
        error, constant = self._errors(network, batch.channels, batch.normal("noise", self.image_shape), times)
        return error, constant, self.strategy.time_fraction(times)

    def _errors(self, network: nn.Module, channels: dict[str, Tensor], noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error of what is predicted from each noised sample [B] in float32, and that of predicting one number per channel [B]."""
        noisy, target = self.strategy.noised(joined(channels, self.mode.targets), noise, times)
        prediction = network(self._network_input(noisy, channels), self.strategy.network_time(times))
        constant = target.mean(dim=(0, 2, 3), keepdim=True)
        return (prediction.float() - target).square().mean(dim=(1, 2, 3)), (constant - target).square().mean(dim=(1, 2, 3))

    def _binned(self, loss: Tensor, fraction: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {"loss_t": ((fraction * BINS).long().clamp(0, BINS - 1), loss)}

    def _network_input(self, noisy: Tensor, channels: dict[str, Tensor]) -> Tensor:
        if not self.mode.conditions:
            return noisy
        return torch.cat([noisy, joined(channels, self.mode.conditions)], dim=1)

    @torch.no_grad()
    def sample(self, noise: SampleNoise, given: Given, settings: Settings) -> dict[str, Tensor]:
        assert isinstance(settings, SamplingSettings)
        network = self.ema.ema_model.eval()

        def predict(images: Tensor, time: Tensor) -> Tensor:
            prediction: Tensor = network(self._network_input(images, given.channels), time)
            return prediction

        images = self.strategy.sample(predict, noise, self.image_shape, settings)
        images = ((images + 1) / 2).clamp(0, 1)
        by_name = {name: images[:, place : place + 1] for place, name in enumerate(self.mode.targets)}
        if "seg" in by_name:
            by_name["seg"] = (by_name["seg"] > 0.5).float()
        return by_name

    @torch.no_grad()
    def attack_scores(self, batch: Batch) -> Tensor:
        """Minus the error at a few noise levels, with the same noises for every image: what differs is the images."""
        network, errors = self.ema.ema_model.eval(), torch.zeros(len(batch), device=batch.device)
        for number in range(ATTACK_NOISES):
            noise = rng.normal_per_sample(self.image_shape, 0, "attack", [(number,)]).to(batch.device).expand(len(batch), -1, -1, -1)
            for level in ATTACK_TIMES:
                times = self.strategy.times(torch.full((len(batch),), level, device=batch.device))
                errors += self._errors(network, batch.channels, noise, times)[0]
        return -errors / (ATTACK_NOISES * len(ATTACK_TIMES))

    def describe(self, total_steps: int) -> list[str]:
        config = self.config
        return [
            f"{config.strategy} x {config.mode}: {', '.join(self.mode.conditions) or 'noise'} -> {', '.join(self.mode.targets)}, "
            f"U-Net {'-'.join(map(str, config.channels))}, {count_parameters(self.network):,} parameters",
            ema_horizon(config, total_steps),
        ]


def learning_rate(config: Config, epoch: float) -> float:
    """Linear warm-up from 0.1 x lr, then a cosine to lr_min at the last epoch; `epoch` may be fractional."""
    if epoch < config.warmup_epochs:
        return config.lr * (WARMUP_START + (1 - WARMUP_START) * epoch / config.warmup_epochs)
    progress = min(1.0, (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs))
    return config.lr_min + (config.lr - config.lr_min) * (1 + math.cos(math.pi * progress)) / 2


def ema_horizon(config: Config, total_steps: int) -> str:
    """What the average really covers at the end: beta is a ceiling that short runs never reach."""
    updates = max(0, total_steps - config.ema.update_after_step - 1)
    if updates == 0:
        return f"EMA: a copy of the weights, renewed every {config.ema.update_every} steps, since averaging starts after step {config.ema.update_after_step}"
    decay = min(config.ema.beta, 1 - (1 + updates) ** (-2 / 3))
    horizon = config.ema.update_every / (1 - decay)
    return (
        f"EMA: decay {decay:.5f} every {config.ema.update_every} steps at the end of {total_steps:,} steps "
        f"(ceiling {config.ema.beta:g}), so it averages about the last {horizon:,.0f} steps"
    )
