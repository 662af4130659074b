"""FLUX's autoencoder of stride 8: convolutions, and attention at the lowest resolution.

Names are those of diffusers' AutoencoderKL. The encoder's result is a normal distribution of every
latent; latents are normalised to (z - shift) * scaling.
"""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from metacanvas_jax.layers.attention import attend_in_parts
from metacanvas_jax.layers.conv import Conv
from metacanvas_jax.layers.linear import Linear
from metacanvas_jax.layers.norm import GroupNorm
from metacanvas_jax.sharding import BATCH_AXES, constrain
from metacanvas_jax.types import InputError
from metacanvas_jax.vae.base import Vae
from metacanvas_jax.vae.flux_ae_config import FluxAeConfig

EPS = 1e-6


# ------------------------------------------------------------ blocks


class ResnetBlock(nnx.Module):
    """Twice norm, SiLU and convolution, beside a 1x1 shortcut where the channels change."""

    def __init__(self, d_in: int, d_out: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(d_in, groups, EPS)
        self.conv1 = Conv(d_in, d_out, size=3, stride=1, bias=True, rngs=rngs)
        self.norm2 = GroupNorm(d_out, groups, EPS)
        self.conv2 = Conv(d_out, d_out, size=3, stride=1, bias=True, rngs=rngs)
        self.conv_shortcut = (
            Linear(d_in, d_out, ('channels', 'channels'), rngs=rngs) if d_in != d_out else None
        )

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x_BHWC = constrain(x_BHWC, BATCH_AXES, None, None, None)
        y = self.conv1(jax.nn.silu(self.norm1(x_BHWC)))
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x_BHWC if self.conv_shortcut is None else self.conv_shortcut(x_BHWC))


class Attention(nnx.Module):
    """Every pixel attends to all others, with one head as wide as the channels."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(width, groups, EPS)
        self.to_q = Linear(width, width, ('channels', 'channels'), rngs=rngs)
        self.to_k = Linear(width, width, ('channels', 'channels'), rngs=rngs)
        self.to_v = Linear(width, width, ('channels', 'channels'), rngs=rngs)
        self.to_out = Linear(width, width, ('channels', 'channels'), rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y = rearrange(self.group_norm(x_BHWC), 'B H W C -> B (H W) 1 C')
        y = self.to_out(attend_in_parts(self.to_q(y), self.to_k(y), self.to_v(y)))
        return x_BHWC + y.reshape(x_BHWC.shape)


class MidBlock(nnx.Module):
    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs):
        self.resnets = nnx.List(ResnetBlock(width, width, groups, rngs=rngs) for _ in range(2))
        self.attention = Attention(width, groups, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        before, after = self.resnets
        return after(self.attention(before(x_BHWC)))


# ------------------------------------------------------------ between stages


class Downsample(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        # Zeros below and on the right only.
        self.conv = Conv(width, width, size=3, stride=2, pad=(0, 1), bias=True, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return self.conv(x_BHWC)


class Upsample(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.conv = Conv(width, width, size=3, stride=1, bias=True, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return self.conv(repeat(x_BHWC, 'B H W C -> B (H p) (W q) C', p=2, q=2))


class SameSize(nnx.Module):
    """After the last stage."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        del width, rngs

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return x_BHWC


class Stage(nnx.Module):
    """Blocks of one resolution, then the way to the next one.

    No stack: only the first block changes the channels, and the encoder has one more after it.
    """

    def __init__(self, d_in: int, d_out: int, layers: int, groups: int, resample, *, rngs):
        widths = [d_in, *[d_out] * (layers - 1)]
        self.resnets = nnx.List(ResnetBlock(w, d_out, groups, rngs=rngs) for w in widths)
        self.resample = resample(d_out, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x_BHWC = resnet(x_BHWC)
        return self.resample(x_BHWC)


def make_stages(widths, layers: int, groups: int, resample, *, rngs: nnx.Rngs):
    """Stages of these widths, and `resample` between them."""
    ways = [resample] * (len(widths) - 1) + [SameSize]
    return nnx.List(
        Stage(d_in, d_out, layers, groups, way, rngs=rngs)
        for d_in, d_out, way in zip((widths[0], *widths), widths, ways, strict=False)
    )


# ------------------------------------------------------------ the whole


class Encoder(nnx.Module):
    def __init__(self, config: FluxAeConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        layers, moments = config.layers_per_block, 2 * config.latent_channels
        self.conv_in = Conv(config.in_channels, widths[0], size=3, stride=1, bias=True, rngs=rngs)
        self.down_blocks = make_stages(widths, layers, groups, Downsample, rngs=rngs)
        self.mid_block = MidBlock(widths[-1], groups, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups, EPS)
        self.conv_out = Conv(widths[-1], moments, size=3, stride=1, bias=True, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x = self.conv_in(x_BHWC)
        for stage in self.down_blocks:
            x = stage(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Its stages have a block more than the encoder's."""

    def __init__(self, config: FluxAeConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        layers, latents = config.layers_per_block + 1, config.latent_channels
        self.conv_in = Conv(latents, widths[0], size=3, stride=1, bias=True, rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups, rngs=rngs)
        self.up_blocks = make_stages(widths, layers, groups, Upsample, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups, EPS)
        self.conv_out = Conv(
            widths[-1], config.out_channels, size=3, stride=1, bias=True, rngs=rngs
        )

    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(z_BHWC))
        for stage in self.up_blocks:
            x = stage(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class FluxAe(Vae):
    """Pictures only: one frame, one latent frame."""

    def __init__(self, config: FluxAeConfig, *, dtype, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.stride, self.channels = config.stride, config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def posterior(self, x_BFHWC) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the latents (B, T, H, W, C), before they are normalised."""
        F, H, W = x_BFHWC.shape[1:4]
        if F != 1 or H % self.stride or W % self.stride:
            raise InputError(
                f"FLUX's autoencoder takes single pictures of multiples of {self.stride} pixels, "
                f'not {F} of {H} x {W}'
            )
        moments = self.encoder(x_BFHWC[:, 0].astype(self.dtype))[:, None].astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, -1)
        return mean, jnp.clip(logvar, -30, 20)

    def normalise(self, z_BTHWC) -> jax.Array:
        return (z_BTHWC - self.config.shift_factor) * self.config.scaling_factor

    def encode(self, x_BFHWC):
        """The most likely latents."""
        return self.normalise(self.posterior(x_BFHWC)[0])

    def sample(self, x_BFHWC, key: jax.Array) -> jax.Array:
        """Latents drawn from the posterior: targets of training as UniWorld has them."""
        mean, logvar = self.posterior(x_BFHWC)
        noise = jax.random.normal(key, mean.shape)
        return self.normalise(mean + jnp.exp(0.5 * logvar) * noise)

    def decode(self, z_BTHWC):
        z_BHWC = rearrange(z_BTHWC, 'B 1 H W C -> B H W C')
        z_BHWC = z_BHWC / self.config.scaling_factor + self.config.shift_factor
        return self.decoder(z_BHWC.astype(self.dtype))[:, None].astype(jnp.float32)
