"""The peers: diffusers' models at our sizes and with random weights, and inputs of ours' shapes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {'cudnn': SDPBackend.CUDNN_ATTENTION, 'flash': SDPBackend.FLASH_ATTENTION}
CPU = {'cpu': SDPBackend.MATH}


@contextlib.contextmanager
def _made_as(device: str, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(sizes: dict[str, Any], device: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Of the class that a config.json names."""
    with _made_as(device, dtype):
        model = getattr(diffusers, sizes['_class_name']).from_config(sizes)
    return model.to(dtype).eval()


def transformer_inputs(
    kind: str, latents: tuple[int, ...], context: tuple[int, ...], pooled: int | None, device: str
) -> dict[str, torch.Tensor]:
    """`latents` (B, T, H, W, C) and `context` (B, L, D) are the shapes of ours."""
    with _made_as(device, torch.bfloat16):
        return INPUTS[kind](latents, context, pooled)


def _sana(latents, context, pooled):
    B, _, H, W, C = latents
    return dict(
        hidden_states=torch.randn(B, C, H, W),
        encoder_hidden_states=torch.randn(context),
        encoder_attention_mask=torch.ones(context[:2]),
        timestep=torch.full((B,), 500.0),
    )


def _flux(latents, context, pooled):
    """Target and one context image of the same size."""
    B, _, H, W, C = latents
    h, w = H // 2, W // 2
    ids = torch.cartesian_prod(*map(torch.arange, (2, h, w))).bfloat16()
    return dict(
        hidden_states=torch.randn(B, 2 * h * w, 4 * C),
        encoder_hidden_states=torch.randn(context),
        pooled_projections=torch.randn(B, pooled),
        timestep=torch.full((B,), 0.5),
        guidance=torch.full((B,), 3.5),
        img_ids=ids,
        txt_ids=torch.zeros(context[1], 3),
    )


def _wan(latents, context, pooled):
    """One time for all frames, which is less work than TI2V's own pipeline makes of it."""
    B, T, H, W, C = latents
    return dict(
        hidden_states=torch.randn(B, C, T, H, W),
        encoder_hidden_states=torch.randn(context),
        timestep=torch.full((B,), 500.0),
    )


INPUTS: dict[str, Callable] = {'sana': _sana, 'flux': _flux, 'wan': _wan}


def synchronize(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def forwards(model, inputs: dict[str, torch.Tensor], device: str) -> dict[str, Callable[[], None]]:
    """Eager with each of the fused attentions, and compiled block by block with each."""

    def run(backend: SDPBackend, *, compiled: bool):
        def call() -> None:
            # MATH stands behind: a mask is more than flash attention takes.
            with torch.inference_mode(), sdpa_kernel([backend, SDPBackend.MATH], set_priority=True):
                torch.compiler.set_stance('default' if compiled else 'force_eager')
                model(**inputs, return_dict=False)
            synchronize(device)

        return call

    backends = BACKENDS if device == 'cuda' else CPU
    runs = {f'eager {name}': run(backend, compiled=False) for name, backend in backends.items()}
    if device == 'cuda':  # on a CPU it takes minutes
        model.compile_repeated_blocks(fullgraph=True)
        runs |= {f'compiled {name}': run(at, compiled=True) for name, at in backends.items()}
    return {f'diffusers {name}': call for name, call in runs.items()}


def autoencoder(sizes: dict[str, Any], latents: tuple[int, ...], device: str, *, encode: bool):
    """One run of an autoencoder, in its better layout; `latents` are (B, T, H, W, C)."""
    model = build(sizes, device)
    B, T, H, W, C = latents
    video = sizes['_class_name'] == 'AutoencoderKLWan'
    if not video:
        model = model.to(memory_format=torch.channels_last)
    with _made_as(device, torch.bfloat16):
        if encode:
            stride = 2 ** (len(sizes['block_out_channels']) - 1)
            x = torch.randn(B, 3, stride * H, stride * W)
        else:
            x = torch.randn(B, C, T, H, W) if video else torch.randn(B, C, H, W)
    if not video:
        x = x.contiguous(memory_format=torch.channels_last)
    method = model.encode if encode else model.decode

    def call() -> None:
        with torch.inference_mode():
            method(x, return_dict=False)
        synchronize(device)

    return call


def conv3d(x: tuple[int, ...], kernel: tuple[int, ...], device: str):
    """Of shapes (C, F, H, W) and (D, C, 3, 3, 3), as AutoencoderKLWan runs it."""
    with _made_as(device, torch.bfloat16):
        arrays = torch.randn(1, *x), torch.randn(kernel)

    def call() -> None:
        with torch.inference_mode():
            torch.nn.functional.conv3d(*arrays, padding=(0, 1, 1))
        synchronize(device)

    return call


def training_step(sizes: dict[str, Any], kind: str, latents, context, device: str):
    """All of a transformer in fp32, matmuls in bf16, checkpointed blocks, fused AdamW."""
    model = build(sizes, device, torch.float32).train()
    model.enable_gradient_checkpointing()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    inputs = transformer_inputs(kind, latents, context, None, device)
    target = torch.randn_like(inputs['hidden_states'], dtype=torch.float32)

    def call() -> None:
        with (
            torch.autocast(device, torch.bfloat16),
            sdpa_kernel([*BACKENDS.values(), *CPU.values()]),
        ):
            (found,) = model(**inputs, return_dict=False)
        torch.nn.functional.mse_loss(found.float(), target).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        synchronize(device)

    return call


def most_bytes(device: str) -> float | None:
    return round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == 'cuda' else None
