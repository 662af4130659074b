"""Our SANA, its parts and the canvas block equal diffusers' at random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.normalization import AdaLayerNormSingle as TheirAdaLayerNormSingle
from diffusers.models.transformers.sana_transformer import (
    SanaTransformer2DModel,
    SanaTransformerBlock,
)
from flax import nnx

from metacanvas_jax.backbones.sana import Sana, SanaBlock, SanaConfig
from metacanvas_jax.canvas.fusion import CanvasBlock
from metacanvas_jax.layers.timestep import AdaLayerNormSingle, sinusoid
from metacanvas_jax.types import Visual
from tests import tiny


def _random(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.copy_((name == 'caption_norm.weight') + fan_in**-0.5 * noise)
    return module.eval()


# ours -> theirs, where the names differ
NAMES = {
    'patch_embed': 'patch_embed.proj',
    'caption_projection.up': 'caption_projection.linear_1',
    'caption_projection.down': 'caption_projection.linear_2',
    'time_embed.linear_1': 'time_embed.emb.timestep_embedder.linear_1',
    'time_embed.linear_2': 'time_embed.emb.timestep_embedder.linear_2',
    'linear_1': 'emb.timestep_embedder.linear_1',
    'linear_2': 'emb.timestep_embedder.linear_2',
    'caption_norm.scale': 'caption_norm.weight',
}


def _filled(make, theirs: torch.nn.Module, *, prefix: str = '', spare: tuple[str, ...] = ()):
    """Ours with their weights: linears transposed, convolutions channels last, layers stacked.

    Every one of theirs is used, but those that start with one of `spare`; `prefix` stands before
    the names of their attention.
    """
    weights = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    used = set()

    def find(name: str) -> np.ndarray:
        module, _, kind = name.rpartition('.')
        module = NAMES.get(module, module)
        if module.endswith('to_out'):
            module += '.0'
        full = NAMES.get(name) or '.'.join(filter(None, (module, kind.replace('kernel', 'weight'))))
        if prefix and full.startswith('to_'):
            full = prefix + full
        value = weights[full]
        used.add(full)
        if kind != 'kernel':
            return value
        if value.ndim == 4 and full.startswith('patch_embed'):
            return value.transpose(2, 3, 1, 0).reshape(-1, len(value))  # (p q C) -> D
        if 'conv_depth' in full:
            return value[:, 0].transpose(1, 2, 0)
        return value.reshape(len(value), -1).T

    module = jax.eval_shape(lambda: make(nnx.Rngs(0)))
    arrays = {}
    for path, shape in tiny.named(module).items():
        name = path.replace('/', '.')
        if name.startswith('transformer_blocks.'):
            layers = (
                name.replace('transformer_blocks', f'transformer_blocks.{i}')
                for i in range(shape.shape[0])
            )
            arrays[path] = np.stack([find(layer) for layer in layers])
        else:
            arrays[path] = find(name)
    left = {name for name in weights if name not in used and not name.startswith(spare)}
    assert not left, left
    return tiny.fill(module, arrays)


def _torch(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x))


def _bias(length_B, size: int) -> torch.Tensor:
    """diffusers' mask of padding: an additive bias."""
    valid = np.arange(size) < np.asarray(length_B)[:, None]
    return torch.tensor(np.where(valid, 0, -10000.0), dtype=torch.float32)[:, None]


@functools.cache
def _their_block():
    block = SanaTransformerBlock(
        dim=64,
        num_attention_heads=2,
        attention_head_dim=32,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        attention_bias=False,
        mlp_ratio=2.5,
    )
    return _random(block)


X, TIME = tiny.normal(2, 3, 5, 64), tiny.normal(2, 6, 64, seed=1)
CONTEXT, LENGTH = tiny.normal(2, 7, 64, seed=2), np.array([4, 7])


def test_block():
    config = SanaConfig(
        in_channels=1,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=1,
        num_cross_attention_heads=4,
        caption_channels=1,
        mlp_ratio=2.5,
        patch_size=1,
    )
    block = _filled(lambda rngs: SanaBlock(config, rngs=rngs), _their_block())
    with torch.no_grad():
        theirs = _their_block()(
            _torch(X).reshape(2, 15, 64),
            encoder_hidden_states=_torch(CONTEXT),
            encoder_attention_mask=_bias(LENGTH, 7),
            timestep=_torch(TIME).reshape(2, -1),
            height=3,
            width=5,
        )
    found = jax.jit(lambda *args: block(*args))(X, TIME, CONTEXT, LENGTH)
    assert tiny.error(found.reshape(2, 15, 64), theirs) <= 1e-5


def test_canvas_block_is_the_block_without_cross_attention():
    """The second norm stays (spec.md section 3.3)."""
    theirs = _random(_their_block(), seed=3)
    with torch.no_grad():
        for parameter in theirs.attn2.to_out.parameters():
            parameter.zero_()
        expected = theirs(
            _torch(X).reshape(2, 15, 64),
            encoder_hidden_states=_torch(CONTEXT),
            timestep=_torch(TIME).reshape(2, -1),
            height=3,
            width=5,
        )
    block = _filled(
        lambda rngs: CanvasBlock(64, rngs=rngs), theirs, prefix='attn1.', spare=('attn2.',)
    )
    found = jax.jit(lambda *args: block(*args))(X, TIME)
    assert tiny.error(found.reshape(2, 15, 64), expected) <= 1e-5
    _their_block.cache_clear()


def test_time_embedding():
    """Ours takes 0..1, theirs 0..1000; six modulations and the embedding itself."""
    theirs = _random(TheirAdaLayerNormSingle(64))
    ours = _filled(lambda rngs: AdaLayerNormSingle(64, rngs=rngs), theirs)
    t = np.array([0.0, 0.001, 0.25, 0.5, 0.999, 1.0], np.float32)
    with torch.no_grad():
        expected, embedding = theirs(torch.tensor(1000 * t), hidden_dtype=torch.float32)
        sines = theirs.emb.time_proj(torch.tensor(1000 * t))
    found, found_embedding = ours(jnp.asarray(t), jnp.float32)
    # In fp32 an angle of 1000 is known to 6e-5, whoever computes it.
    distance = np.abs(sinusoid(1000 * jnp.asarray(t)) - sines.numpy()).max(1)
    assert (distance <= np.spacing(1000 * t) + 2e-7).all()
    assert tiny.error(found.reshape(6, -1), expected) <= 1e-5
    assert tiny.error(found_embedding, embedding) <= 1e-5


@pytest.mark.parametrize('patch', [1, 2])
def test_whole_model(patch):
    """Latents that are not square, captions of unequal length, a time for each sample."""
    config = SanaConfig(
        in_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=3,
        num_cross_attention_heads=2,
        caption_channels=24,
        mlp_ratio=2.5,
        patch_size=patch,
    )
    theirs = SanaTransformer2DModel(
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
        patch_size=patch,
        sample_size=8,
    )
    theirs = _random(theirs)
    model = _filled(lambda rngs: Sana(config, remat='all', dtype=jnp.float32, rngs=rngs), theirs)
    z, context = tiny.normal(2, 1, 4, 6, 4), tiny.normal(2, 7, 24, seed=1)
    t = jnp.array([0.2, 0.9])
    with torch.no_grad():
        expected = theirs(
            _torch(z[:, 0]).permute(0, 3, 1, 2),
            encoder_hidden_states=_torch(context),
            timestep=_torch(1000 * t),
            encoder_attention_mask=torch.tensor(np.arange(7) < LENGTH[:, None]).float(),
        ).sample.permute(0, 2, 3, 1)

    @jax.jit
    def velocity(model, context):
        patches = model.patchify(z, Visual(clean_BT=jnp.zeros((2, 1))))
        return model.velocity(patches, t[:, None], context, LENGTH)

    found = velocity(model, context)
    assert tiny.error(found[:, 0], expected) <= 1e-4
    assert found.dtype == jnp.float32
    # What stands behind a caption's end is never read.
    np.testing.assert_array_equal(velocity(model, context.at[0, 4:].set(9.0)), found)
