"""FLUX's autoencoder equals diffusers' AutoencoderKL at random weights: blocks, halves, tiles."""

import copy
import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from einops import rearrange
from flax import nnx

import convert
from metacanvas_jax.layers.attention import attend, attend_in_parts
from metacanvas_jax.layers.norm import GroupNorm
from metacanvas_jax.types import InputError
from metacanvas_jax.vae.flux_ae import FluxAe
from metacanvas_jax.vae.tiling import TiledVae, Tiles
from tests import published_encoders, tiny

CASES = [('three stages', (3, 5)), ('bfl', (5, 3))]  # in latents


@functools.cache
def theirs(name: str) -> Any:
    return published_encoders.autoencoder(name)


@functools.cache
def ours(name: str) -> FluxAe:
    with tempfile.TemporaryDirectory() as folder:
        theirs(name).save_pretrained(folder)
        model = convert.load('flux_ae', folder)
    assert isinstance(model, FluxAe)
    return model


def channels_first(x) -> torch.Tensor:
    return torch.tensor(rearrange(np.asarray(x), 'B H W C -> B C H W'))


def channels_last(x: torch.Tensor) -> np.ndarray:
    return rearrange(x.detach().numpy(), 'B C H W -> B H W C')


def pixels(name: str, size: tuple[int, int], batch: int = 2) -> jax.Array:
    return jnp.tanh(tiny.normal(batch, *(ours(name).stride * n for n in size), 3))


KEY = jax.random.key(0)
decode = jax.jit(lambda vae, z: vae.decode(z))


@jax.jit
def encode(vae, x_BHWC):
    """Mean, log-variance, latents, drawn latents: one program, whose encoders XLA makes one."""
    x = x_BHWC[:, None]
    found = (*vae.posterior(x), vae.encode(x), vae.sample(x, KEY))
    return [a[:, 0] for a in found]


# ------------------------------------------------------------ blocks


def traced(module: torch.nn.Module, x) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name: (input, output)} of the blocks inside `module`."""
    kinds = (ResnetBlock2D, Attention, Downsample2D, Upsample2D)
    found = {}

    def hook(name):
        return lambda _, args, out: found.update(
            {name: (channels_last(args[0]), channels_last(out))}
        )

    handles = [
        block.register_forward_hook(hook(name))
        for name, block in module.named_modules()
        if isinstance(block, kinds)
    ]
    with torch.no_grad():
        module(channels_first(x))
    for handle in handles:
        handle.remove()
    return found


def blocks(half: Any, side: str, way: str):
    """{their name: our block}."""
    for i, stage in enumerate(getattr(half, f'{side}_blocks')):
        for j, resnet in enumerate(stage.resnets):
            yield f'{side}_blocks.{i}.resnets.{j}', resnet
        yield f'{side}_blocks.{i}.{way}samplers.0', stage.resample
    for j, resnet in enumerate(half.mid_block.resnets):
        yield f'mid_block.resnets.{j}', resnet
    yield 'mid_block.attentions.0', half.mid_block.attention


@pytest.mark.parametrize(('name', 'size'), CASES)
def test_every_block(name, size):
    """Each by itself, on what the reference's was given."""
    for side, half, x in (
        ('down', 'encoder', pixels(name, size)),
        ('up', 'decoder', tiny.normal(2, *size, 5)),
    ):
        found = traced(getattr(theirs(name), half), x)
        given = {key: inputs for key, (inputs, _) in found.items()}
        outputs = jax.jit(  # one program is faster than many
            lambda vae, given, side=side, half=half: {
                key: block(given[key])
                for key, block in blocks(getattr(vae, half), side, side)
                if key in given  # nothing comes after the last stage
            }
        )(ours(name), given)
        assert outputs.keys() == found.keys()
        for key, (_, expected) in found.items():
            assert tiny.error(outputs[key], expected) <= 1e-5, key


def test_group_norm_of_large_means():
    """Where E[x^2] - E[x]^2 would have no digit left."""
    x = 1e3 + tiny.normal(2, 5, 3, 12)
    reference = torch.nn.GroupNorm(4, 12, 1e-6)
    with torch.no_grad():
        expected = channels_last(reference.double()(channels_first(x).double()))
    found = GroupNorm(12, 4, 1e-6)(x)
    assert tiny.error(found, expected) <= 1e-4  # x itself is rounded to 3e-5
    assert GroupNorm(12, 4, 1e-6)(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize('most', [4, 9, 100])
def test_attention_in_parts(most):
    """Also where the last part is smaller."""
    q, k, v = (tiny.normal(2, 9, 1, 8, seed=i) for i in range(3))
    assert tiny.error(attend_in_parts(q, k, v, most=most), attend(q, k, v)) <= 1e-6


# ------------------------------------------------------------ the whole


@pytest.mark.parametrize(('name', 'size'), CASES)
def test_encoder_and_decoder(name, size):
    """Latents are normalised; pictures that are not square."""
    x, vae, config = pixels(name, size), ours(name), published_encoders.AES[name]
    with torch.no_grad():
        expected = theirs(name).encode(channels_first(x)).latent_dist
        y = theirs(name).decode(expected.mode()).sample
    mean, logvar, latents, _ = encode(vae, x)
    assert tiny.error(mean, channels_last(expected.mean)) <= 1e-4
    assert tiny.error(logvar, channels_last(expected.logvar)) <= 1e-4
    z = (channels_last(expected.mode()) - config['shift_factor']) * config['scaling_factor']
    assert z.shape == (2, *size, 5)
    assert tiny.error(latents, z) <= 1e-4
    assert tiny.error(decode(vae, z[:, None])[:, 0], channels_last(y)) <= 1e-4


def test_latents_are_drawn():
    """Around the mean, as wide as the posterior says; its log-variance is kept within bounds."""
    vae, reference = ours('three stages'), copy.deepcopy(theirs('three stages'))
    bias = np.array(tiny.named(vae)['encoder/conv_out/bias'])
    bias[5:] += [60, -60, 0, 1, -1]  # of the log-variances
    with torch.no_grad():
        reference.encoder.conv_out.bias.copy_(torch.tensor(bias))
    vae = tiny.replaced(vae, {'encoder/conv_out/bias': bias})
    x = pixels('three stages', (3, 5))
    with torch.no_grad():
        expected = reference.encode(channels_first(x)).latent_dist
    mean, std = channels_last(expected.mean), channels_last(expected.std)
    assert std.max() == pytest.approx(np.exp(10))
    *_, drawn = encode(vae, x)
    noise = jax.random.normal(KEY, (2, 1, 3, 5, 5))[:, 0]
    for c in range(5):  # their sizes differ by far
        z = (mean + std * noise)[..., c]
        assert tiny.error(drawn[..., c] / 0.3611 + 0.1159, z) <= 1e-4, c


def test_in_bfloat16():
    """No further from fp32 than the reference."""
    name = 'three stages'
    x, vae, reference = pixels(name, (3, 5)), ours(name), theirs(name)
    make = lambda: FluxAe(vae.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, _ = nnx.split(jax.eval_shape(make))
    half = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(vae)))
    with torch.no_grad():
        exact = channels_last(reference.encode(channels_first(x)).latent_dist.mean)
        reference = copy.deepcopy(reference).bfloat16()
        rounded = reference.encode(channels_first(x).bfloat16()).latent_dist.mean.float()
    found = encode(half, x)[0]
    assert found.dtype == jnp.float32
    error, allowed = (
        np.sqrt(np.mean(np.square(z - exact))) / exact.std()
        for z in (found, channels_last(rounded))
    )
    assert 1e-4 < error <= 1.5 * allowed


@pytest.mark.parametrize('shape', [(1, 2, 8, 8, 3), (1, 1, 8, 10, 3)])
def test_other_pictures_are_refused(shape):
    with pytest.raises(InputError, match='single pictures of multiples of 4'):
        ours('three stages').encode(jnp.zeros(shape))


# ------------------------------------------------------------ tiles


def test_tiles():
    """Those of diffusers, whose steps are three quarters of a tile; the last ones are smaller."""
    vae, reference = ours('three stages'), copy.deepcopy(theirs('three stages'))
    reference.enable_tiling()
    reference.tile_sample_min_size, reference.tile_latent_min_size = 16, 4
    # Tall, and wide: more than one tile both ways would be four programs instead of two.
    x, z = jnp.tanh(tiny.normal(2, 28, 12, 3)), tiny.normal(2, 3, 7, 5)
    with torch.no_grad():
        mean = channels_last(reference.encode(channels_first(x)).latent_dist.mean)
        y = channels_last(reference.decode(channels_first(z)).sample)
    tiled = TiledVae(vae, Tiles(size=(16, 16), step=(12, 12)))
    latents = jax.jit(lambda vae, x: vae.encode(x))(tiled, x[:, None])[:, 0]
    assert tiny.error(latents, (mean - 0.1159) * 0.3611) <= 1e-5
    pictures = decode(tiled, (z[:, None] - 0.1159) * 0.3611)[:, 0]
    assert tiny.error(pictures, y) <= 1e-5
