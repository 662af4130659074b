"""DC-AE equals diffusers' AutoencoderDC at random weights: blocks, halves, tiles."""

import copy
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import (
    DCDownBlock2d,
    DCUpBlock2d,
    EfficientViTBlock,
    ResBlock,
)
from diffusers.models.normalization import RMSNorm
from einops import rearrange
from flax import nnx

import convert
from metacanvas_jax.types import InputError
from metacanvas_jax.vae.dc_ae import DcAe
from metacanvas_jax.vae.pixel import PixelConfig, PixelVae
from metacanvas_jax.vae.tiling import TiledVae, Tiles
from tests import tiny

# SANA's in small: two stages of convolutions, two of attention.
SANA = dict(
    in_channels=3,
    latent_channels=4,
    attention_head_dim=8,
    encoder_block_types=('ResBlock', 'ResBlock', 'EfficientViTBlock', 'EfficientViTBlock'),
    decoder_block_types=('ResBlock', 'ResBlock', 'EfficientViTBlock', 'EfficientViTBlock'),
    encoder_block_out_channels=(8, 16, 16, 32),
    decoder_block_out_channels=(8, 16, 32, 32),
    encoder_layers_per_block=(2, 1, 3, 2),
    decoder_layers_per_block=(1, 3, 2, 2),
    encoder_qkv_multiscales=((), (), (5,), (5,)),
    decoder_qkv_multiscales=((), (), (5,), (5,)),
    upsample_block_type='interpolate',
    downsample_block_type='Conv',
    decoder_norm_types='rms_norm',
    decoder_act_fns='silu',
    scaling_factor=0.41407,
)
CONFIGS = {
    'sana': SANA,
    # The models for ImageNet: conv_in and conv_out change the size, the decoder has batch norms.
    'imagenet': SANA
    | dict(
        encoder_layers_per_block=(0, 2, 1, 2),
        decoder_layers_per_block=(0, 1, 2, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
        upsample_block_type='pixel_shuffle',
        downsample_block_type='pixel_unshuffle',
        decoder_norm_types=('batch_norm', 'batch_norm', 'rms_norm', 'rms_norm'),
        decoder_act_fns=('relu', 'relu', 'silu', 'silu'),
    ),
    # No attention; one string for all stages.
    'convolutions': SANA
    | dict(
        encoder_block_types='ResBlock',
        decoder_block_types='ResBlock',
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        decoder_conv_act_fn='silu',
        scaling_factor=1.0,
    ),
    # What no checkpoint has together: several scales, batch norms in the attention.
    'mixed': SANA
    | dict(
        attention_head_dim=12,  # divides none of the widths
        encoder_layers_per_block=(0, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (3, 5), (7,)),
        decoder_qkv_multiscales=((), (), (), (5, 3)),
        downsample_block_type='pixel_unshuffle',
        decoder_norm_types='batch_norm',
        decoder_act_fns='relu',
    ),
}
# For laws that hold whatever the blocks.
CONFIGS['small'] = SANA | dict(
    encoder_block_types='ResBlock',
    decoder_block_types='ResBlock',
    encoder_block_out_channels=(4, 8, 8),
    decoder_block_out_channels=(4, 8, 8),
    encoder_layers_per_block=(1, 1, 1),
    decoder_layers_per_block=(1, 1, 1),
    encoder_qkv_multiscales=((), (), ()),
    decoder_qkv_multiscales=((), (), ()),
)
# In latents; a head's width of tokens or less is diffusers' other way to attend.
SIZES = {
    'sana': [(1, 1), (3, 5)],
    'imagenet': [(4, 3)],
    'convolutions': [(3, 5)],
    'mixed': [(2, 3)],
}
CASES = [(name, size) for name in SIZES for size in SIZES[name]]


@functools.cache
def theirs(name: str) -> AutoencoderDC:
    model = AutoencoderDC(**CONFIGS[name]).eval()
    generator = torch.Generator().manual_seed(0)
    norms = (RMSNorm, torch.nn.BatchNorm2d)
    scales = {id(m.weight) for m in model.modules() if isinstance(m, norms)}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            noise = torch.randn(tensor.shape, generator=generator)
            if id(tensor) in scales:
                tensor.copy_(1 + 0.3 * noise)
            elif tensor.ndim == 1:
                tensor.copy_(0.3 * noise)
            elif tensor.ndim > 1:
                tensor.copy_(tensor[0].numel() ** -0.5 * noise)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_var is not None
                module.running_var.abs_().add_(0.5)
                module.register_buffer('num_batches_tracked', torch.tensor(7))
    return model


@functools.cache
def ours(name: str) -> DcAe:
    with tempfile.TemporaryDirectory() as folder:
        theirs(name).save_pretrained(folder)
        model = convert.load('dc_ae', folder)
    assert isinstance(model, DcAe)
    return model


def channels_first(x) -> torch.Tensor:
    return torch.tensor(rearrange(np.asarray(x), 'B H W C -> B C H W'))


def channels_last(x: torch.Tensor) -> np.ndarray:
    return rearrange(x.detach().numpy(), 'B C H W -> B H W C')


def pixels(size: tuple[int, int], batch: int = 2) -> jax.Array:
    return jnp.tanh(tiny.normal(batch, *(8 * n for n in size), 3))


encode = jax.jit(lambda vae, x: vae.encode(x))
decode = jax.jit(lambda vae, z: vae.decode(z))


# ------------------------------------------------------------ blocks


def traced(module: torch.nn.Module, x) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name: (input, output)} of the blocks inside `module`."""
    kinds = (ResBlock, EfficientViTBlock, DCDownBlock2d, DCUpBlock2d)
    found = {}

    def hook(name):
        return lambda _, args, out: found.update({name: (*map(channels_last, (*args, out)),)})

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


def encoder_blocks(vae: DcAe):
    """{their name: our block}; a block of a stack is a slice of it."""
    stages, encoder = vae.config.encoder_stages, vae.encoder
    first = int(not stages[0].layers)
    if first:
        yield 'conv_in', encoder.conv_in
    for number, ours in enumerate(encoder.down_blocks, first):
        yield from slices(ours.blocks, f'down_blocks.{number}', 0, stages[number].layers)
        yield f'down_blocks.{number}.{stages[number].layers}', ours.leave
    number = len(stages) - 1
    yield from slices(encoder.last, f'down_blocks.{number}', 0, stages[number].layers)


def decoder_blocks(vae: DcAe):
    stages, decoder = vae.config.decoder_stages, vae.decoder
    first = int(not stages[0].layers)
    if first:
        yield 'conv_out', decoder.conv_out
    for number, ours in enumerate(decoder.up_blocks, first):
        yield f'up_blocks.{number}.0', ours.enter
        yield from slices(ours.blocks, f'up_blocks.{number}', 1, stages[number].layers)
    number = len(stages) - 1
    yield from slices(decoder.first, f'up_blocks.{number}', 0, stages[number].layers)


def slices(blocks, prefix: str, start: int, layers: int):
    for i in range(layers):
        yield f'{prefix}.{start + i}', jax.tree.map(lambda a, i=i: a[i], blocks)


@pytest.mark.parametrize(('name', 'size'), CASES)
def test_every_block(name, size):
    """Each by itself, on what the reference's was given."""
    for blocks, half, x in (
        (encoder_blocks, theirs(name).encoder, pixels(size)),
        (decoder_blocks, theirs(name).decoder, tiny.normal(2, *size, 4)),
    ):
        found = traced(half, x)
        given = {key: inputs for key, (inputs, _) in found.items()}
        outputs = jax.jit(  # one program is faster than many
            lambda vae, given, blocks=blocks: {k: block(given[k]) for k, block in blocks(vae)}
        )(ours(name), given)
        assert outputs.keys() == found.keys()
        for key, (_, expected) in found.items():
            assert tiny.error(outputs[key], expected) <= 1e-5, key


# ------------------------------------------------------------ the whole


@pytest.mark.parametrize(('name', 'size'), CASES)
def test_encoder_and_decoder(name, size):
    """Latents are normalised; pictures that are not square."""
    x = pixels(size)
    factor = CONFIGS[name]['scaling_factor']
    with torch.no_grad():
        z = theirs(name).encode(channels_first(x)).latent
        y = theirs(name).decode(z).sample
    found = encode(ours(name), x[:, None])
    assert found.shape == (2, 1, *size, 4)
    error = tiny.error(found[:, 0], factor * channels_last(z))
    assert error <= 1e-4
    pictures = decode(ours(name), factor * channels_last(z)[:, None])
    back = tiny.error(pictures[:, 0], channels_last(y))
    assert back <= 1e-4


def test_in_bfloat16():
    """No further from fp32 than the reference, whose norms and attention compute in fp32 too."""
    x, vae, reference = pixels((3, 5)), ours('sana'), theirs('sana')
    graphdef, _ = nnx.split(DcAe(vae.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    half = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(vae)))
    with torch.no_grad():
        exact = channels_last(reference.encode(channels_first(x)).latent)
        reference = copy.deepcopy(reference).bfloat16()
        rounded = channels_last(reference.encode(channels_first(x).bfloat16()).latent.float())
    found = encode(half, x[:, None])
    assert found.dtype == jnp.float32
    error, allowed = (
        np.sqrt(np.mean(np.square(z - exact))) / exact.std()
        for z in (found[:, 0] / vae.config.scaling_factor, rounded)
    )
    assert 1e-4 < error <= 1.5 * allowed


@pytest.mark.parametrize('shape', [(1, 2, 8, 8, 3), (1, 1, 8, 12, 3)])
def test_other_pictures_are_refused(shape):
    with pytest.raises(InputError, match='single pictures of multiples of 8'):
        ours('sana').encode(jnp.zeros(shape))


# ------------------------------------------------------------ tiles

# For pictures of 40 x 28 pixels and a stride of 4.
TILES = {
    'square': Tiles(size=(16, 16), step=(12, 12)),
    'rectangle': Tiles(size=(12, 24), step=(8, 8)),  # three tiles over each other
    'no overlap': Tiles(size=(8, 12), step=(8, 12)),
    'one row': Tiles(size=(40, 8), step=(32, 4)),
}
LARGE = jnp.tanh(tiny.normal(2, 40, 28, 3))


@pytest.mark.parametrize('tiles', TILES.values(), ids=TILES)
def test_tiles(tiles):
    """Their sizes do not divide the picture's; the last tiles are smaller."""
    vae, factor, reference = ours('small'), 0.41407, copy.deepcopy(theirs('small'))
    reference.enable_tiling(*tiles.size, *tiles.step)
    with torch.no_grad():
        z = channels_last(reference.encode(channels_first(LARGE)).latent)
        y = channels_last(reference.decode(channels_first(z)).sample)
    tiled = TiledVae(vae, tiles)
    found = encode(tiled, LARGE[:, None])[:, 0] / factor
    assert tiny.error(found, z) <= 1e-5
    pictures = decode(tiled, factor * z[:, None])[:, 0]
    assert tiny.error(pictures, y) <= 1e-5
    # Without tiles it is another picture.
    assert tiny.error(encode(vae, LARGE[:, None])[:, 0] / factor, z) > 0.01


@pytest.mark.parametrize('tiles', TILES.values(), ids=TILES)
def test_tiles_of_a_local_autoencoder_leave_no_seam(tiles):
    """It sees nothing beyond a latent, so tiles must put every one of them in its place."""
    vae = PixelVae(PixelConfig(stride=4), dtype=jnp.float32, rngs=nnx.Rngs(0))
    tiled = TiledVae(vae, tiles)
    z = encode(tiled, LARGE[:, None])
    assert tiny.error(z, encode(vae, LARGE[:, None])) <= 1e-6
    assert tiny.error(decode(tiled, z), LARGE[:, None]) <= 1e-6


def test_a_small_picture_is_one_tile():
    """Even where a second one would begin."""
    vae = TiledVae(ours('small'), Tiles(size=(40, 28), step=(32, 20)))
    x = LARGE[:, None]
    np.testing.assert_array_equal(encode(vae, x), encode(ours('small'), x))


@pytest.mark.parametrize(
    ('size', 'step'), [((32, 32), (40, 24)), ((36, 34), (24, 24)), ((32, 32), (24, 10))]
)
def test_odd_tiles_are_refused(size, step):
    with pytest.raises(InputError, match='multiples of 4 that leave no gap'):
        TiledVae(ours('small'), Tiles(size=size, step=step))
