"""The Wan2.2 VAE equals diffusers' AutoencoderKLWan at random weights: blocks, chunks, tiles."""

import copy
import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanRMS_norm,
)
from einops import rearrange, reduce, repeat
from flax import nnx

import convert
from convert import registry
from metacanvas_jax.layers.norm import LengthNorm
from metacanvas_jax.types import InputError
from metacanvas_jax.vae.chunks import Past, by_chunks
from metacanvas_jax.vae.tiling import TiledVae, Tiles
from metacanvas_jax.vae.wan_vae import WanVae
from tests import published_wan_vae, tiny

FRAMES = (1, 5, 9, 17, 21)
SIZES = {'published': (3, 2), 'other': (1, 5)}  # in latents

# Programs are compiled for seconds and run for milliseconds: LLVM need not try hard.
quickly = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})
encode = quickly(lambda vae, x: vae.encode(x))
decode = quickly(lambda vae, z: vae.decode(z))


theirs = published_wan_vae.reference


@functools.cache
def ours(name: str) -> WanVae:
    with tempfile.TemporaryDirectory() as folder:
        theirs(name).save_pretrained(folder)
        model = convert.load('wan_vae', folder)
    assert isinstance(model, WanVae)
    return model


def channels_first(x) -> torch.Tensor:
    return torch.tensor(rearrange(np.asarray(x), 'B F H W C -> B C F H W'))


def channels_last(x: torch.Tensor) -> np.ndarray:
    return rearrange(x.detach().float().numpy(), 'B C F H W -> B F H W C')


def pixels(name: str, frames: int, size: tuple[int, int]) -> np.ndarray:
    stride = ours(name).stride
    return np.tanh(tiny.normal(2, frames, stride * size[0], stride * size[1], 3))


def latents(name: str, frames: int, size: tuple[int, int]) -> np.ndarray:
    """Not normalised, as diffusers takes them."""
    return np.asarray(tiny.normal(2, frames, *size, ours(name).channels))


def normalised(name: str, z: np.ndarray) -> np.ndarray:
    mean, std = (published_wan_vae.CONFIGS[name][f'latents_{of}'] for of in ('mean', 'std'))
    return ((z - np.array(mean)) / np.array(std)).astype(np.float32)


def encoded(reference, x) -> np.ndarray:
    with torch.no_grad():
        return channels_last(reference.encode(channels_first(x)).latent_dist.mean)


def decoded(reference, z) -> np.ndarray:
    with torch.no_grad():
        return channels_last(reference.decode(channels_first(z)).sample)


# ------------------------------------------------------------ blocks

BLOCKS = (
    WanResidualBlock,
    WanResidualDownBlock,
    WanResidualUpBlock,
    WanMidBlock,
    WanAttentionBlock,
    WanResample,
)


def traced(reference, run) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """{name: (input, output) of every chunk} of the blocks, while `run` runs."""
    found: dict[str, list] = {}

    def hook(name):
        def note(_, args, out):
            found.setdefault(name, []).append((channels_last(args[0]), channels_last(out)))

        return note

    handles = [
        block.register_forward_hook(hook(name))
        for name, block in reference.named_modules()
        if isinstance(block, BLOCKS)
    ]
    run()
    for handle in handles:
        handle.remove()
    return found


def block_of(vae: WanVae, name: str) -> Any:
    """Ours of the same name."""
    block: Any = vae
    for part in name.split('.'):
        block = block[int(part)] if part.isdigit() else getattr(block, part)
    return block


def in_turn(block, chunks) -> list[jax.Array]:
    """Each chunk with what the one before left."""
    left, outputs = (), []
    for x in chunks:
        past = Past(left)
        outputs.append(block(x, past))
        left = past.left
    return outputs


@pytest.mark.parametrize('side', ['encoder', 'decoder'])
def test_every_block(side):
    """Each by itself, on what the reference's was given: three chunks, so all kinds of caches."""
    reference, vae = theirs('published'), ours('published')
    if side == 'encoder':
        found = traced(reference, lambda: encoded(reference, pixels('published', 9, (3, 2))))
    else:
        found = traced(reference, lambda: decoded(reference, latents('published', 3, (3, 2))))
    assert len(found) == sum(isinstance(m, BLOCKS) for m in getattr(reference, side).modules())
    given = {key: [x for x, _ in calls] for key, calls in found.items()}

    @quickly  # one program is faster than many
    def run(vae, given):
        return {
            key: [block_of(vae, key)(x) for x in chunks]
            if 'attentions' in key
            else in_turn(block_of(vae, key), chunks)
            for key, chunks in given.items()
        }

    outputs = run(vae, given)
    for key, calls in found.items():
        assert len(calls) == 3
        for chunk, (_, expected) in enumerate(calls):
            assert tiny.error(outputs[key][chunk], expected) <= 1e-5, (key, chunk)


def test_norm_of_almost_nothing():
    x = np.float32(tiny.normal(5, 6)) * np.array([[0], [1e-14], [1e-12], [1e-3], [1]], np.float32)
    reference = WanRMS_norm(6, images=False)
    gamma = np.asarray(tiny.normal(6, seed=1))
    reference.gamma.data = torch.tensor(gamma)[:, None, None, None]
    norm = tiny.fill(LengthNorm(6), {'scale': gamma})
    expected = reference(channels_first(x[:, None, None, None]))
    np.testing.assert_allclose(norm(x), channels_last(expected)[:, 0, 0, 0], rtol=1e-5)
    assert float(jnp.abs(norm(x)[1]).max()) < 0.1


# ------------------------------------------------------------ the whole


@pytest.mark.parametrize('name', SIZES)
def test_encoder(name):
    """Means of the posterior, normalised; causal, so fewer frames make the first latents."""
    x = pixels(name, max(FRAMES), SIZES[name])
    found = encode(ours(name), x)
    assert found.shape == (2, 6, *SIZES[name], 5)
    assert found.dtype == jnp.float32
    alone = encode(ours(name), x[:, :1])
    for frames in FRAMES:
        expected = normalised(name, encoded(theirs(name), x[:, :frames]))
        assert tiny.error(found[:, : (frames + 3) // 4], expected) <= 1e-4, frames
        if frames == 1:
            assert tiny.error(alone, expected) <= 1e-4


@pytest.mark.parametrize('name', SIZES)
def test_decoder(name):
    z = latents(name, 6, SIZES[name])
    found = decode(ours(name), normalised(name, z))
    assert found.shape == pixels(name, 21, SIZES[name]).shape
    assert found.dtype == jnp.float32
    assert np.abs(found).max() > 1.1  # diffusers cuts to [-1, 1]; here tiles can fade first
    alone = decode(ours(name), normalised(name, z[:, :1]))
    for frames in FRAMES:
        expected = decoded(theirs(name), z[:, : (frames + 3) // 4])
        assert np.mean(np.abs(expected) == 1) < 0.3  # else errors would hide behind the cut
        assert tiny.error(jnp.clip(found[:, :frames], -1, 1), expected) <= 1e-4, frames
        if frames == 1:
            assert tiny.error(jnp.clip(alone, -1, 1), expected) <= 1e-4


def test_chunks_do_not_show():
    """All frames after the first one as one chunk: the same but for rounding."""
    vae = ours('small')
    x, z = pixels('small', 13, (2, 1)), latents('small', 4, (2, 1))

    @quickly
    def at_once(vae, x, z):
        return (
            by_chunks(vae.encode_chunk, x, take=12, give=3),
            by_chunks(vae.decode_chunk, z, take=3, give=12),
        )

    found = at_once(vae, x, z)
    assert tiny.error(encode(vae, x), found[0]) <= 1e-5
    assert tiny.error(decode(vae, z), found[1]) <= 1e-5


@pytest.mark.parametrize(('take', 'give'), [(4, 1), (1, 4), (2, 2)])
def test_chunks_of_any_causal_network(take, give):
    """Frames plus the one before, then fewer or more of them: x as of all frames at once."""
    x = tiny.normal(2, 1 + 3 * take, 3, 2, 1)

    def resize(y):
        y = reduce(y, 'B (F n) H W C -> B F H W C', 'mean', n=max(take // give, 1))
        return repeat(y, 'B F H W C -> B (F n) H W C', n=max(give // take, 1))

    def network(x, past):
        seen = past.before(x, 1)
        return x if past.first else resize(x + seen[:, :-1])

    y = x[:, 1:] + x[:, :-1]
    for chunks in range(4):
        found = by_chunks(network, x[:, : 1 + chunks * take], take=take, give=give)
        expected = jnp.concatenate([x[:, :1], resize(y[:, : chunks * take])], 1)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_in_bfloat16():
    """No further from fp32 than the reference, whose norms and softmax compute in fp32 too."""
    x, z = pixels('small', 5, (2, 3)), latents('small', 2, (2, 3))
    vae, reference = ours('small'), theirs('small')
    graphdef, _ = nnx.split(registry.find('wan_vae').abstract(vae.config, jnp.bfloat16))
    half = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(vae)))
    rounded = copy.deepcopy(reference).bfloat16()
    with torch.no_grad():
        z_rounded = rounded.encode(channels_first(x).bfloat16()).latent_dist.mean
        x_rounded = rounded.decode(channels_first(z).bfloat16()).sample
    for found, exact, allowed in (
        (encode(half, x), encoded(reference, x), channels_last(z_rounded)),
        (decode(half, normalised('small', z)), decoded(reference, z), channels_last(x_rounded)),
    ):
        assert found.dtype == jnp.float32
        if found.shape[-1] == 3:
            errors = [jnp.clip(found, -1, 1) - exact, allowed - exact]
        else:
            errors = [found - normalised('small', exact), normalised('small', allowed - exact)]
        error, most = (float(np.sqrt(np.mean(np.square(e)))) for e in errors)
        assert 1e-4 < error <= 1.5 * most


@pytest.mark.parametrize('shape', [(1, 4, 8, 8, 3), (1, 5, 8, 12, 3), (1, 1, 4, 8, 3)])
def test_other_videos_are_refused(shape):
    with pytest.raises(InputError, match='4 n \\+ 1 frames of multiples of 8 pixels, not'):
        ours('small').encode(jnp.zeros(shape))


# ------------------------------------------------------------ memory


def test_memory_does_not_grow_with_frames():
    """Beyond pixels and latents themselves: the scan writes into its result."""

    def temporary(function, *shape: int) -> int:
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        return function.lower(ours('small'), x).compile().memory_analysis().temp_size_in_bytes

    for function, shapes in (
        (decode, [(2, T, 6, 8, 5) for T in (9, 31)]),
        (encode, [(2, F, 48, 64, 3) for F in (33, 121)]),
    ):
        few, many = (temporary(function, *shape) for shape in shapes)
        assert many <= 1.15 * few


# ------------------------------------------------------------ tiles


def test_tiles():
    """Squares of pixels fade as one: 2 x 2 here. Their sizes do not divide those of the video."""
    tiles = Tiles(size=(32, 24), step=(24, 16))
    vae, reference = ours('small'), copy.deepcopy(theirs('small'))
    x, z = pixels('small', 5, (5, 7)), latents('small', 2, (5, 7))
    reference.enable_tiling(*tiles.size, *tiles.step)
    tiled = TiledVae(vae, tiles)
    pictures = decode(tiled, normalised('small', z))
    expected = decoded(reference, z)
    assert tiny.error(jnp.clip(pictures, -1, 1), expected) <= 1e-5
    # diffusers means squares when it encodes: the same numbers would be tiles twice as large.
    reference.enable_tiling(*(n // 2 for n in (*tiles.size, *tiles.step)))
    found = encode(tiled, x)
    assert tiny.error(found, normalised('small', encoded(reference, x))) <= 1e-5
    # Without tiles it is another video.
    assert tiny.error(encode(vae, x), found) > 0.01
    assert tiny.error(decode(vae, normalised('small', z)), pictures) > 0.01
