"""Tiny Wan2.2 VAEs as diffusers publishes them, and the native layout, with random weights."""

import functools
import pathlib
import re
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm

from metacanvas_jax.vae.wan_vae_config import PUBLISHED

# Encoder and decoder differ in width; every level but one changes its channels.
SIZES: dict[str, Any] = dict(
    base_dim=4,
    decoder_base_dim=6,
    z_dim=5,
    dim_mult=[1, 2, 4, 4],
    num_res_blocks=2,
    attn_scales=[],
    temperal_downsample=[False, True, True],
    dropout=0.0,
    latents_mean=[-0.4, 0.3, -0.1, 0.05, 0.7],
    latents_std=[0.5, 1.2, 0.8, 1.7, 0.4],
    is_residual=True,
    in_channels=12,
    out_channels=12,
    patch_size=2,
    scale_factor_temporal=4,
    scale_factor_spatial=16,
)
CONFIGS: dict[str, dict[str, Any]] = {
    'published': SIZES,
    # Other numbers wherever there may be others. The decoder's last change of size doubles time
    # and halves the channels: only then does it matter which of two frames a shortcut drops.
    'other': SIZES
    | dict(
        base_dim=6,
        decoder_base_dim=4,
        dim_mult=[2, 1, 2, 1],
        num_res_blocks=1,
        temperal_downsample=[True, False, True],
        in_channels=3,
        out_channels=3,
        patch_size=1,
        scale_factor_spatial=8,
    ),
    # For laws that hold whatever the sizes.
    'small': SIZES
    | dict(
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_spatial=8,
    ),
    # As wide in latents as the published one, whose statistics the native layout takes.
    'native': SIZES
    | dict(
        z_dim=48,
        base_dim=2,
        decoder_base_dim=3,
        latents_mean=list(PUBLISHED.latents_mean),
        latents_std=list(PUBLISHED.latents_std),
    ),
}


def randomise(module: torch.nn.Module, seed: int = 0) -> Any:
    """Every parameter is random: norms' of both signs, the others such that values keep size."""
    generator = torch.Generator().manual_seed(seed)
    gammas = {id(m.gamma) for m in module.modules() if isinstance(m, WanRMS_norm)}
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if id(parameter) in gammas:
                parameter.copy_(1 + noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(parameter[0].numel() ** -0.5 * noise)
    return module.eval()


@functools.cache
def reference(name: str) -> Any:
    return randomise(AutoencoderKLWan(**CONFIGS[name]))


def save(folder: pathlib.Path, name: str) -> pathlib.Path:
    reference(name).save_pretrained(folder)
    return folder


# diffusers' names -> Wan's own, of sizes with two residual blocks per level.
NATIVE = {
    r'quant_conv\.': r'conv1.',
    r'post_quant_conv\.': r'conv2.',
    r'(en|de)coder\.conv_in\.': r'\1coder.conv1.',
    r'(en|de)coder\.norm_out\.': r'\1coder.head.0.',
    r'(en|de)coder\.conv_out\.': r'\1coder.head.2.',
    r'(en|de)coder\.mid_block\.resnets\.0\.': r'\1coder.middle.0.',
    r'(en|de)coder\.mid_block\.attentions\.0\.': r'\1coder.middle.1.',
    r'(en|de)coder\.mid_block\.resnets\.1\.': r'\1coder.middle.2.',
    r'encoder\.down_blocks\.(.)\.resnets\.(.)\.': r'encoder.downsamples.\1.downsamples.\2.',
    r'encoder\.down_blocks\.(.)\.downsampler\.': r'encoder.downsamples.\1.downsamples.2.',
    r'decoder\.up_blocks\.(.)\.resnets\.(.)\.': r'decoder.upsamples.\1.upsamples.\2.',
    r'decoder\.up_blocks\.(.)\.upsampler\.': r'decoder.upsamples.\1.upsamples.3.',
}
RESIDUAL = {
    'norm1': 'residual.0',
    'conv1': 'residual.2',
    'norm2': 'residual.3',
    'conv2': 'residual.6',
    'conv_shortcut': 'shortcut',
}


def native(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same tensors under Wan's own names."""
    return {_native(name): tensor for name, tensor in tensors.items()}


def _native(name: str) -> str:
    (pattern,) = (pattern for pattern in NATIVE if re.match(pattern, name))
    renamed = re.sub(f'^{pattern}', NATIVE[pattern], name)
    if 'resnets' not in name:
        return renamed
    front, part, kind = renamed.rsplit('.', 2)
    return f'{front}.{RESIDUAL[part]}.{kind}'
