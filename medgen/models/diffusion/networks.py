"""The network that a diffusion config asks for, called as network(images [N, C, H, W], time [N] float32 in 0..1000). Built by model.py.

Everything here is for 2D images; a place that counts on it says so."""

from __future__ import annotations

from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn

from medgen.models.base import count_parameters
from medgen.models.diffusion.config import Config
from medgen.models.diffusion.dit import DiT
from medgen.models.diffusion.network_settings import norm_groups


class UNet(DiffusionModelUNet):
    """MONAI's U-Net, called positionally. It has no dropout without cross-attention, so there is no key for one."""

    def forward(self, images: Tensor, time: Tensor) -> Tensor:
        return super().forward(images, timesteps=time)

    @property
    def blocks(self) -> list[nn.Module]:
        """What can be computed again in the backward pass, in order."""
        return [*self.down_blocks, self.middle_block, *self.up_blocks]


def build_network(config: Config, channels_in: int, channels_out: int, size: int) -> UNet | DiT:
    """With initial weights from the global generator; what it returns is as large as its images [N, channels_out, H, W]."""
    if config.dit is not None:
        return DiT(config.dit, channels_in, channels_out, size)
    channels, attention, res_blocks, head_channels = config.unet_levels
    return UNet(
        spatial_dims=2,
        in_channels=channels_in,
        out_channels=channels_out,
        channels=channels,
        attention_levels=attention,
        num_res_blocks=res_blocks,
        num_head_channels=[head or 1 for head in head_channels],  # no number is read where a level does not attend
        norm_num_groups=norm_groups(channels),
        use_flash_attention=True,  # PyTorch's fused attention: the same numbers without the [pixels, pixels] matrix in memory
    )


def describe_network(config: Config, network: nn.Module, size: int) -> str:
    """Its kind, what it is made of and how many parameters it has, for the log."""
    parameters = f"{count_parameters(network):,} parameters"
    if config.dit is not None:
        shape = config.dit
        return (
            f"DiT of {shape.depth} blocks, width {shape.width}, {shape.heads} heads{' with normed queries and keys' if shape.qk_norm else ''}, "
            f"{shape.tokens(size):,} tokens of {shape.patch} x {shape.patch} px, {parameters}"
        )
    channels, attention, res_blocks, _ = config.unet_levels
    attends = ", ".join(str(level + 1) for level, attends in enumerate(attention) if attends) or "the middle only"
    return f"U-Net {'-'.join(map(str, channels))}, residual blocks {'-'.join(map(str, res_blocks))}, attention at {attends}, {parameters}"
