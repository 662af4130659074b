"""The Wan2.2 VAE: a causal autoencoder of video, 4 x 16 x 16 pixels to one latent (2503.20314).

Names are those of diffusers' AutoencoderKLWan. A level is a row of residual blocks and a change of
size, beside a shortcut without parameters:
    down  x -> down(blocks(x)) + means of neighbouring channels of (time and space to depth of x)
    up    x -> up(blocks(x)) + depth to time and space of (x with every channel repeated)
A video goes through in chunks, see chunks.py; its first frame changes its size in space only. All
but the attention of the middle, which is that of each frame by itself, sees two frames back.
"""

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx

from metacanvas_jax.layers.attention import attend, merge_heads, split_heads
from metacanvas_jax.layers.conv import CausalConv, Conv, HalvingConv
from metacanvas_jax.layers.linear import Linear
from metacanvas_jax.layers.norm import LengthNorm
from metacanvas_jax.sharding import BATCH_AXES, constrain
from metacanvas_jax.types import InputError
from metacanvas_jax.vae.base import Vae
from metacanvas_jax.vae.chunks import Past, by_chunks
from metacanvas_jax.vae.wan_vae_config import TIME_STRIDE, Level, WanVaeConfig

# ------------------------------------------------------------ blocks


class ResBlock(nnx.Module):
    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.norm1 = LengthNorm(d_in)
        self.conv1 = CausalConv(d_in, d_out, size=3, rngs=rngs)
        self.norm2 = LengthNorm(d_out)
        self.conv2 = CausalConv(d_out, d_out, size=3, rngs=rngs)
        self.conv_shortcut = (
            Linear(d_in, d_out, ('channels', 'channels'), rngs=rngs) if d_in != d_out else None
        )

    def __call__(self, x_BFHWC: jax.Array, past: Past) -> jax.Array:
        y = self.conv1(past.before(jax.nn.silu(self.norm1(x_BFHWC)), 2))
        y = self.conv2(past.before(jax.nn.silu(self.norm2(y)), 2))
        return y + (x_BFHWC if self.conv_shortcut is None else self.conv_shortcut(x_BFHWC))


def make_blocks(d_in: int, d_out: int, blocks: int, rngs: nnx.Rngs) -> nnx.List:
    """No stack: they are few, and the first one may change the channels."""
    return nnx.List(ResBlock(d_out if i else d_in, d_out, rngs=rngs) for i in range(blocks))


def run_blocks(blocks, x_BFHWC: jax.Array, past: Past) -> jax.Array:
    x = constrain(x_BFHWC, BATCH_AXES, None, None, None, None)
    for block in blocks:
        x = block(x, past)
    return x


class Attention(nnx.Module):
    """One head over the places of a frame."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norm = LengthNorm(width)
        self.to_qkv = Linear(width, 3 * width, ('channels', 'channels'), rngs=rngs)
        self.proj = Linear(width, width, ('channels', 'channels'), rngs=rngs)

    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        B, _, H, _, _ = x_BFHWC.shape
        x_BSD = rearrange(self.norm(x_BFHWC), 'B F H W D -> (B F) (H W) D')
        qkv = (split_heads(a, 1) for a in jnp.split(self.to_qkv(x_BSD), 3, -1))
        y_BSD = self.proj(merge_heads(attend(*qkv)))
        return x_BFHWC + rearrange(y_BSD, '(B F) (H W) D -> B F H W D', B=B, H=H)


class MidBlock(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.resnets = make_blocks(width, width, 2, rngs)
        self.attentions = nnx.List([Attention(width, rngs=rngs)])

    def __call__(self, x_BFHWC: jax.Array, past: Past) -> jax.Array:
        x = self.attentions[0](self.resnets[0](x_BFHWC, past))
        return self.resnets[1](x, past)


# ------------------------------------------------------------ changes of size


def per_frame(layer, x_BFHWC: jax.Array) -> jax.Array:
    y = layer(rearrange(x_BFHWC, 'B F H W C -> (B F) H W C'))
    return rearrange(y, '(B F) H W C -> B F H W C', B=len(x_BFHWC))


class SpaceDown(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.resample = HalvingConv(width, width, rngs=rngs)

    def __call__(self, x_BFHWC: jax.Array, past: Past) -> jax.Array:
        del past
        return per_frame(self.resample, x_BFHWC)


class TimeSpaceDown(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.resample = HalvingConv(width, width, rngs=rngs)
        self.time_conv = CausalConv(width, width, size=1, step=2, rngs=rngs)

    def __call__(self, x_BFHWC: jax.Array, past: Past) -> jax.Array:
        x = past.before(per_frame(self.resample, x_BFHWC), 1)
        return x if past.first else self.time_conv(x)


class SameSize(nnx.Module):
    """Where the last level has no change of size."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        del width, rngs

    def __call__(self, x_BFHWC: jax.Array, past: Past) -> jax.Array:
        del past
        return x_BFHWC


def double_space(conv: Conv, x_BFHWC: jax.Array) -> jax.Array:
    return per_frame(conv, repeat(x_BFHWC, 'B F H W C -> B F (H p) (W q) C', p=2, q=2))


class SpaceUp(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.resample = Conv(width, width, size=3, stride=1, bias=True, rngs=rngs)

    def __call__(self, x_BFHWC: jax.Array, past: Past) -> jax.Array:
        del past
        return double_space(self.resample, x_BFHWC)


class TimeSpaceUp(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.resample = Conv(width, width, size=3, stride=1, bias=True, rngs=rngs)
        self.time_conv = CausalConv(width, 2 * width, size=1, rngs=rngs)

    def __call__(self, x_BFHWC: jax.Array, past: Past) -> jax.Array:
        return double_space(self.resample, self.double_time(x_BFHWC, past))

    def double_time(self, x_BFHWC: jax.Array, past: Past) -> jax.Array:
        """Not the first frame; to the ones after it, zeros are in its place."""
        if past.first:
            past.before(jnp.zeros_like(x_BFHWC), 2)
            return x_BFHWC
        y = self.time_conv(past.before(x_BFHWC, 2))
        return rearrange(y, 'B F H W (n C) -> B (F n) H W C', n=2)


# Level.factor, frames and pixels -> what changes the size
DOWN = {(1, 1): SameSize, (1, 2): SpaceDown, (2, 2): TimeSpaceDown}
UP = {(1, 2): SpaceUp, (2, 2): TimeSpaceUp}


def average_down(x_BFHWC: jax.Array, level: Level) -> jax.Array:
    """To depth, then means of neighbouring channels."""
    time, space = level.factor
    missing = -x_BFHWC.shape[1] % time  # zeros, where the first frame is alone
    x = jnp.pad(x_BFHWC, ((0, 0), (missing, 0), (0, 0), (0, 0), (0, 0)))
    pattern = 'B (F n) (H p) (W q) C -> B F H W (C n p q)'
    x = rearrange(x, pattern, n=time, p=space, q=space)
    return reduce(x, 'B F H W (D m) -> B F H W D', 'mean', D=level.d_out)


def duplicate_up(x_BFHWC: jax.Array, level: Level, past: Past) -> jax.Array:
    """Every channel several times in a row, then from depth; of the first frame the last one."""
    time, space = level.factor
    x = repeat(x_BFHWC, 'B F H W C -> B F H W (C m)', m=level.d_out * time * space**2 // level.d_in)
    pattern = 'B F H W (D n p q) -> B (F n) (H p) (W q) D'
    x = rearrange(x, pattern, n=time, p=space, q=space)
    return x[:, time - 1 :] if past.first else x


class DownBlock(nnx.Module):
    def __init__(self, level: Level, blocks: int, *, rngs: nnx.Rngs):
        self.resnets = make_blocks(level.d_in, level.d_out, blocks, rngs)
        self.downsampler = DOWN[level.factor](level.d_out, rngs=rngs)
        self.level = level

    def __call__(self, x_BFHWC: jax.Array, past: Past) -> jax.Array:
        x = self.downsampler(run_blocks(self.resnets, x_BFHWC, past), past)
        return x + average_down(x_BFHWC, self.level)


class UpBlock(nnx.Module):
    def __init__(self, level: Level, blocks: int, *, rngs: nnx.Rngs):
        self.resnets = make_blocks(level.d_in, level.d_out, blocks, rngs)
        self.upsampler = UP[level.factor](level.d_out, rngs=rngs)
        self.level = level

    def __call__(self, x_BFHWC: jax.Array, past: Past) -> jax.Array:
        x = self.upsampler(run_blocks(self.resnets, x_BFHWC, past), past)
        return x + duplicate_up(x_BFHWC, self.level, past)


class LastUpBlock(nnx.Module):
    """Without a change of size there is no shortcut either."""

    def __init__(self, level: Level, blocks: int, *, rngs: nnx.Rngs):
        self.resnets = make_blocks(level.d_in, level.d_out, blocks, rngs)

    def __call__(self, x_BFHWC: jax.Array, past: Past) -> jax.Array:
        return run_blocks(self.resnets, x_BFHWC, past)


# ------------------------------------------------------------ the whole


class Encoder(nnx.Module):
    """Squares of pixels -> means and log variances."""

    def __init__(self, config: WanVaeConfig, *, rngs: nnx.Rngs):
        levels, blocks = config.encoder_levels, config.num_res_blocks
        first, last = levels[0].d_in, levels[-1].d_out
        self.conv_in = CausalConv(config.pixel_channels, first, size=3, rngs=rngs)
        self.down_blocks = nnx.List(DownBlock(level, blocks, rngs=rngs) for level in levels)
        self.mid_block = MidBlock(last, rngs=rngs)
        self.norm_out = LengthNorm(last)
        self.conv_out = CausalConv(last, 2 * config.z_dim, size=3, rngs=rngs)

    def __call__(self, x_BFHWC: jax.Array, past: Past) -> jax.Array:
        x = self.conv_in(past.before(x_BFHWC, 2))
        for block in self.down_blocks:
            x = block(x, past)
        x = self.mid_block(x, past)
        return self.conv_out(past.before(jax.nn.silu(self.norm_out(x)), 2))


class Decoder(nnx.Module):
    """Latents -> squares of pixels."""

    def __init__(self, config: WanVaeConfig, *, rngs: nnx.Rngs):
        levels, blocks = config.decoder_levels, config.num_res_blocks + 1
        first, last = levels[0].d_in, levels[-1].d_out
        self.conv_in = CausalConv(config.z_dim, first, size=3, rngs=rngs)
        self.mid_block = MidBlock(first, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                *(UpBlock(level, blocks, rngs=rngs) for level in levels[:-1]),
                LastUpBlock(levels[-1], blocks, rngs=rngs),
            ]
        )
        self.norm_out = LengthNorm(last)
        self.conv_out = CausalConv(last, config.pixel_channels, size=3, rngs=rngs)

    def __call__(self, z_BTHWC: jax.Array, past: Past) -> jax.Array:
        x = self.mid_block(self.conv_in(past.before(z_BTHWC, 2)), past)
        for block in self.up_blocks:
            x = block(x, past)
        return self.conv_out(past.before(jax.nn.silu(self.norm_out(x)), 2))


class WanVae(Vae):
    """Videos of 4 n + 1 frames, and pictures (n = 0). Latents are the means of the posterior."""

    time_stride = TIME_STRIDE

    def __init__(self, config: WanVaeConfig, *, dtype, rngs: nnx.Rngs):
        z = config.z_dim
        self.config, self.dtype = config, dtype
        self.stride, self.channels = config.stride, z
        self.patch = config.patch_size
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = Linear(2 * z, 2 * z, ('channels', 'channels'), rngs=rngs)
        self.post_quant_conv = Linear(z, z, ('channels', 'channels'), rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, x_BFHWC):
        F, H, W = x_BFHWC.shape[1:4]
        if F % self.time_stride != 1 or H % self.stride or W % self.stride:
            raise InputError(
                f"Wan's VAE takes 4 n + 1 frames of multiples of {self.stride} pixels, "
                f'not {F} of {H} x {W}'
            )
        return by_chunks(self.encode_chunk, x_BFHWC, take=self.time_stride, give=1)

    def encode_chunk(self, x_BFHWC, past: Past) -> jax.Array:
        """The first frame, or a multiple of 4 frames."""
        # Trap: columns before rows, unlike anywhere else.
        pattern = 'B F (H p) (W q) C -> B F H W (C q p)'
        x = rearrange(x_BFHWC.astype(self.dtype), pattern, p=self.patch, q=self.patch)
        moments = self.quant_conv(self.encoder(x, past)).astype(jnp.float32)
        mean = jnp.asarray(self.config.latents_mean)
        return (moments[..., : self.channels] - mean) / jnp.asarray(self.config.latents_std)

    def decode(self, z_BTHWC):
        """Not cut to [-1, 1] as diffusers does it: tiles fade into each other first."""
        return by_chunks(self.decode_chunk, z_BTHWC, take=1, give=self.time_stride)

    def decode_chunk(self, z_BTHWC, past: Past) -> jax.Array:
        """The first latent frame, or any number of them."""
        mean, std = jnp.asarray(self.config.latents_mean), jnp.asarray(self.config.latents_std)
        z = (z_BTHWC.astype(jnp.float32) * std + mean).astype(self.dtype)
        x = self.decoder(self.post_quant_conv(z), past)
        pattern = 'B F H W (C q p) -> B F (H p) (W q) C'
        return rearrange(x.astype(jnp.float32), pattern, p=self.patch, q=self.patch)
