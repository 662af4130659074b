"""Tiny Wan transformers as diffusers publishes them, with random weights."""

import json
import pathlib
from typing import Any

import torch
from diffusers import WanTransformer3DModel

SIZES: dict[str, Any] = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=3,
    attention_head_dim=20,  # of which 8 for time, 6 for rows, 6 for columns
    in_channels=5,
    out_channels=5,
    text_dim=28,
    freq_dim=32,
    ffn_dim=88,
    num_layers=3,
)
CONFIGS = {
    'narrow': SIZES,
    'wide': SIZES | dict(in_channels=14),  # [5 noisy | 5 condition | 4 mask]
    'patches of 1': SIZES | dict(patch_size=(1, 1, 1), num_layers=2, eps=1e-4),
}

# The scheduler_config.json of TI2V-5B, but for what diffusers assumes.
SCHEDULER: dict[str, Any] = dict(
    use_flow_sigmas=True, flow_shift=5.0, prediction_type='flow_prediction'
)


def randomise(module: torch.nn.Module, seed: int = 0) -> Any:
    """Every parameter is random: the norms' around one, the others such that values keep size.

    But what goes into a norm is small: else no test would see the norm's epsilon.
    """
    generator = torch.Generator().manual_seed(seed)
    small = ('patch_embedding', 'to_q', 'to_k')
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            fan_in = 100 if name.endswith('table') else fan_in
            scale = 'norm' in name and name.endswith('weight')  # of both signs
            parameter.copy_(1 + noise if scale else fan_in**-0.5 * noise)
            if any(part in name for part in small):
                parameter.mul_(0.01)
    return module.eval()


def reference(name: str) -> Any:
    return randomise(WanTransformer3DModel(**CONFIGS[name]))


def save(folder: pathlib.Path, name: str, *, dtype: torch.dtype = torch.float32) -> pathlib.Path:
    """In several shards with an index, as the large ones."""
    model = reference(name).to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 3)
    assert len(list(folder.glob('*.safetensors'))) >= 3
    if name == 'wide':  # diffusers does not know what its channels are
        path = folder / 'config.json'
        values = json.loads(path.read_text()) | {'condition_channels': 9}
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + '\n')
    return folder
