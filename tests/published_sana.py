"""Tiny SANA transformers as diffusers publishes them, with random weights."""

import pathlib
from typing import Any

import torch
from diffusers import SanaTransformer2DModel

SIZES: dict[str, Any] = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=3,
    num_cross_attention_heads=2,
    cross_attention_head_dim=32,
    cross_attention_dim=64,
    caption_channels=24,
    mlp_ratio=2.5,
    patch_size=1,
    sample_size=8,
)
CONFIGS = {
    '1.0': SIZES,
    '1.5': SIZES | dict(qk_norm='rms_norm_across_heads'),
    'patches of 2': SIZES | dict(patch_size=2),
}

# The scheduler_config.json of all of them, but for what diffusers assumes.
SCHEDULER: dict[str, Any] = dict(
    use_flow_sigmas=True, flow_shift=3.0, prediction_type='flow_prediction'
)


def randomise(module: torch.nn.Module, seed: int = 0) -> Any:
    """Every parameter is random: the norms' around one, the others such that values keep size.

    But what goes into a norm is small: else no test would see the norm's epsilon.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(module.named_parameters())
    small = ['patch_embed', 'caption_projection.linear_2']
    if any('norm_q' in name for name in parameters):
        small += ['to_q', 'to_k']
    with torch.no_grad():
        for name, parameter in parameters.items():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            norm = 'norm' in name  # of both signs: q's and k's then differ, through the ReLU
            parameter.copy_(1 + noise if norm else fan_in**-0.5 * noise)
            if any(part in name for part in small):
                parameter.mul_(0.01)
    return module.eval()


def reference(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return randomise(SanaTransformer2DModel(**CONFIGS[name])).to(dtype)


def save(folder: pathlib.Path, name: str, *, dtype: torch.dtype = torch.float32) -> pathlib.Path:
    """In several shards with an index, as the large ones."""
    model = reference(name, dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 3)
    assert len(list(folder.glob('*.safetensors'))) >= 3
    return folder
