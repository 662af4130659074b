"""Tiny FLUX transformers as diffusers publishes them, with random weights."""

import pathlib
from typing import Any

import torch
from diffusers import FluxTransformer2DModel

SIZES: dict[str, Any] = dict(
    patch_size=1,
    in_channels=16,
    num_layers=2,
    num_single_layers=3,
    attention_head_dim=16,
    num_attention_heads=4,
    joint_attention_dim=24,
    pooled_projection_dim=20,
    guidance_embeds=True,
    axes_dims_rope=(4, 6, 6),
)
# The scheduler_config.json of dev and Kontext, but for what diffusers assumes.
SCHEDULER: dict[str, Any] = dict(shift=3.0, use_dynamic_shifting=True)

# What is added to the residual stream stays small, or no test would see the epsilon of the norms;
# so do q and k.
SMALL = (
    *('x_embedder', 'context_embedder', 'to_q', 'to_k', 'add_q_proj', 'add_k_proj', 'to_out'),
    *('to_add_out', 'ff.net.2', 'ff_context.net.2', 'proj_out'),
)


def randomise(module: torch.nn.Module, seed: int = 0) -> Any:
    """Every parameter is random, the norms' of both signs; values keep their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = 'norm_' in name and 'linear' not in name
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 10
            parameter.copy_(1 + noise if norm else fan_in**-0.5 * noise)
            if any(part in name for part in SMALL):
                parameter.mul_(0.01)
    return module.eval()


def reference(dtype: torch.dtype = torch.float32) -> Any:
    return randomise(FluxTransformer2DModel(**SIZES)).to(dtype)


def save(folder: pathlib.Path, *, dtype: torch.dtype = torch.float32) -> pathlib.Path:
    """In several shards with an index, as the large ones."""
    model = reference(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size // 3)
    assert len(list(folder.glob('*.safetensors'))) >= 3
    return folder


def pack(z_HWC) -> torch.Tensor:
    """One picture's latents as the pipeline packs them: (1, h w, 4 C)."""
    z = torch.as_tensor(z_HWC).permute(2, 0, 1)
    C, H, W = z.shape
    z = z.reshape(C, H // 2, 2, W // 2, 2).permute(1, 3, 0, 2, 4)
    return z.reshape(1, H * W // 4, 4 * C)


def picture_ids(index: int, h: int, w: int) -> torch.Tensor:
    """(h w, 3): index, row and column of each token."""
    return torch.tensor([(index, i, j) for i in range(h) for j in range(w)]).float()


def velocity(model, z_HWC, t, guidance, pooled_D, text_LD, context=()) -> torch.Tensor:
    """Of one picture, as FluxKontextPipeline calls the model; `context` are more latents."""
    pictures = [torch.tensor(z) for z in (z_HWC, *context)]
    ids = [picture_ids(i, z.shape[0] // 2, z.shape[1] // 2) for i, z in enumerate(pictures)]
    out = model(
        hidden_states=torch.cat([pack(z) for z in pictures], 1),
        encoder_hidden_states=torch.tensor(text_LD)[None],
        pooled_projections=torch.tensor(pooled_D)[None],
        timestep=torch.tensor([t], dtype=torch.float32),
        guidance=torch.tensor([guidance], dtype=torch.float32),
        img_ids=torch.cat(ids),
        txt_ids=torch.zeros(len(text_LD), 3),
    ).sample
    H, W, C = z_HWC.shape
    v = out[0, : H * W // 4].reshape(H // 2, W // 2, C, 2, 2)
    return v.permute(0, 3, 1, 4, 2).reshape(H, W, C)
