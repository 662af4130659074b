"""DC-AE: a picture autoencoder of stride 32 and more, with linear attention (arXiv 2410.10733).

Names are those of diffusers' AutoencoderDC. A stage is a stack of equal blocks; between stages the
size halves and the channels grow, or back, beside a shortcut without parameters:
    down  x -> conv(x) + means of neighbouring channels of (space to depth of x)
    up    x -> conv(x) + depth to space of (x with every channel repeated)
"""

import jax
import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx

from metacanvas_jax.layers.attention import linear_attention, merge_heads
from metacanvas_jax.layers.conv import Conv, DepthwiseConv
from metacanvas_jax.layers.linear import Linear, xavier
from metacanvas_jax.layers.mlp import GluMbConv
from metacanvas_jax.layers.norm import BiasedRmsNorm, FrozenBatchNorm
from metacanvas_jax.layers.stack import fold, stack
from metacanvas_jax.sharding import BATCH_AXES, constrain
from metacanvas_jax.types import InputError
from metacanvas_jax.vae.base import Vae
from metacanvas_jax.vae.dc_ae_config import DcAeConfig, Stage

NORMS = {'rms_norm': BiasedRmsNorm, 'batch_norm': FrozenBatchNorm}
ACTIVATIONS = {'relu': jax.nn.relu, 'silu': jax.nn.silu}
EPS = 1e-5
EXPANSION = 4  # of the feed-forward


# ------------------------------------------------------------ blocks


class ResBlock(nnx.Module):
    def __init__(self, stage: Stage, *, rngs: nnx.Rngs):
        C = stage.channels
        self.conv1 = Conv(C, C, size=3, stride=1, bias=True, rngs=rngs)
        self.conv2 = Conv(C, C, size=3, stride=1, bias=False, rngs=rngs)
        self.norm = NORMS[stage.norm](C, EPS)
        self.activation = stage.activation

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        y = self.conv2(ACTIVATIONS[self.activation](self.conv1(x_BHWC)))
        return x_BHWC + self.norm(y)


class MultiscaleProjection(nnx.Module):
    """q, k and v of a neighbourhood: depthwise, then 1x1 within groups of one head's width."""

    def __init__(self, width: int, head_dim: int, *, size: int, rngs: nnx.Rngs):
        self.proj_in = DepthwiseConv(width, size=size, bias=False, rngs=rngs)
        kernel = xavier(rngs.params(), (width // head_dim, head_dim, head_dim))
        self.proj_out = nnx.Param(kernel, axes=('heads', None, None))

    def __call__(self, x_BHWD: jax.Array) -> jax.Array:
        kernel_NEe = self.proj_out[...].astype(x_BHWD.dtype)
        x = rearrange(self.proj_in(x_BHWD), 'B H W (N E) -> B H W N E', N=len(kernel_NEe))
        y = jnp.einsum('BHWNE,NEe->BHWNe', x, kernel_NEe)
        return rearrange(y, 'B H W N e -> B H W (N e)')


class MultiscaleLinearAttention(nnx.Module):
    def __init__(self, stage: Stage, *, rngs: nnx.Rngs):
        C, E = stage.channels, stage.head_dim
        width = C // E * E
        self.to_q = Linear(C, width, ('embed', 'heads'), bias=False, rngs=rngs)
        self.to_k = Linear(C, width, ('embed', 'heads'), bias=False, rngs=rngs)
        self.to_v = Linear(C, width, ('embed', 'heads'), bias=False, rngs=rngs)
        self.to_qkv_multiscale = nnx.List(
            MultiscaleProjection(3 * width, E, size=size, rngs=rngs) for size in stage.scales
        )
        joined = (1 + len(stage.scales)) * width
        self.to_out = Linear(joined, C, ('heads', 'embed'), bias=False, rngs=rngs)
        self.norm_out = NORMS[stage.norm](C, EPS)
        self.head_dim = E

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        qkv = jnp.concatenate([f(x_BHWC) for f in (self.to_q, self.to_k, self.to_v)], -1)
        scales = jnp.concatenate([qkv, *(scale(qkv) for scale in self.to_qkv_multiscale)], -1)
        # Trap: a head is 3 E channels in a row of (all q, all k, all v), so q, k and v of the first
        # heads all come from to_q. The published weights were trained that way.
        heads = rearrange(scales, 'B H W (N n E) -> n B (H W) N E', n=3, E=self.head_dim)
        # diffusers computes small pictures as (q k^T) v: equal but for rounding.
        y = merge_heads(linear_attention(*heads))
        y = self.to_out(rearrange(y, 'B (H W) D -> B H W D', W=x_BHWC.shape[2]))
        return x_BHWC + self.norm_out(y)


class EfficientViTBlock(nnx.Module):
    def __init__(self, stage: Stage, *, rngs: nnx.Rngs):
        self.attn = MultiscaleLinearAttention(stage, rngs=rngs)
        self.conv_out = GluMbConv(stage.channels, EXPANSION, rngs=rngs)
        self.conv_out_norm = BiasedRmsNorm(stage.channels, EPS)  # this one whatever stage.norm

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x = self.attn(x_BHWC)
        return x + self.conv_out_norm(self.conv_out(x))


BLOCKS = {'ResBlock': ResBlock, 'EfficientViTBlock': EfficientViTBlock}


def make_blocks(stage: Stage, rngs: nnx.Rngs):
    return stack(lambda rngs: BLOCKS[stage.block](stage, rngs=rngs), stage.layers, rngs)


def run_blocks(blocks, x_BHWC: jax.Array) -> jax.Array:
    x_BHWC = constrain(x_BHWC, BATCH_AXES, None, None, None)
    return fold(blocks, x_BHWC, lambda block, x: block(x), remat='none')


# ------------------------------------------------------------ between stages


def to_depth(x_BHWC):
    """torch's pixel_unshuffle."""
    return rearrange(x_BHWC, 'B (H p) (W q) C -> B H W (C p q)', p=2, q=2)


def to_space(x_BHWC):
    """torch's pixel_shuffle."""
    return rearrange(x_BHWC, 'B H W (C p q) -> B (H p) (W q) C', p=2, q=2)


def average_channels(x_BHWC, channels: int):
    """Means of neighbouring channels."""
    return reduce(x_BHWC, 'B H W (C n) -> B H W C', 'mean', C=channels)


def repeat_channels(x_BHWC, channels: int):
    """Every channel several times in a row."""
    return repeat(x_BHWC, 'B H W C -> B H W (C n)', n=channels // x_BHWC.shape[-1])


def no_channels(x_BHWC, channels: int):
    """Where a config asks for no shortcut."""
    del x_BHWC, channels
    return 0


class StridedDown(nnx.Module):
    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.conv = Conv(d_in, d_out, size=3, stride=2, bias=True, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return self.conv(x_BHWC)


class UnshuffleDown(nnx.Module):
    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.conv = Conv(d_in, d_out // 4, size=3, stride=1, bias=True, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return to_depth(self.conv(x_BHWC))


class NearestUp(nnx.Module):
    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.conv = Conv(d_in, d_out, size=3, stride=1, bias=True, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return self.conv(repeat(x_BHWC, 'B H W C -> B (H p) (W q) C', p=2, q=2))


class ShuffleUp(nnx.Module):
    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.conv = Conv(d_in, 4 * d_out, size=3, stride=1, bias=True, rngs=rngs)

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return to_space(self.conv(x_BHWC))


DOWN = {'Conv': StridedDown, 'pixel_unshuffle': UnshuffleDown}
UP = {'interpolate': NearestUp, 'pixel_shuffle': ShuffleUp}


class DownStage(nnx.Module):
    """The blocks of a stage, then the way to the next one, which has `d_out` channels."""

    def __init__(self, stage: Stage, d_out: int, kind: str, *, rngs: nnx.Rngs):
        self.blocks = make_blocks(stage, rngs)
        self.down = DOWN[kind](stage.channels, d_out, rngs=rngs)
        self.d_out = d_out

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return self.leave(run_blocks(self.blocks, x_BHWC))

    def leave(self, x_BHWC: jax.Array) -> jax.Array:
        return self.down(x_BHWC) + average_channels(to_depth(x_BHWC), self.d_out)


class UpStage(nnx.Module):
    """The way from the stage before, which has `d_in` channels, then the blocks of a stage."""

    def __init__(self, d_in: int, stage: Stage, kind: str, *, rngs: nnx.Rngs):
        self.up = UP[kind](d_in, stage.channels, rngs=rngs)
        self.blocks = make_blocks(stage, rngs)
        self.channels = stage.channels

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        return run_blocks(self.blocks, self.enter(x_BHWC))

    def enter(self, x_BHWC: jax.Array) -> jax.Array:
        return self.up(x_BHWC) + to_space(repeat_channels(x_BHWC, 4 * self.channels))


# ------------------------------------------------------------ the whole


class Encoder(nnx.Module):
    def __init__(self, config: DcAeConfig, *, rngs: nnx.Rngs):
        *stages, last = occupied(config.encoder_stages)
        kind, wide = config.downsample_block_type, [s.channels for s in (*stages, last)]
        self.conv_in = (
            Conv(config.in_channels, wide[0], size=3, stride=1, bias=True, rngs=rngs)
            if config.encoder_layers_per_block[0]
            else DOWN[kind](config.in_channels, wide[0], rngs=rngs)
        )
        self.down_blocks = nnx.List(
            DownStage(stage, d_out, kind, rngs=rngs)
            for stage, d_out in zip(stages, wide[1:], strict=True)
        )
        self.last = make_blocks(last, rngs)
        self.channels = config.latent_channels
        self.conv_out = Conv(last.channels, self.channels, size=3, stride=1, bias=True, rngs=rngs)
        self.shortcut = average_channels if config.encoder_out_shortcut else no_channels

    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x = self.conv_in(x_BHWC)
        for stage in self.down_blocks:
            x = stage(x)
        x = run_blocks(self.last, x)
        return self.conv_out(x) + self.shortcut(x, self.channels)


class Decoder(nnx.Module):
    def __init__(self, config: DcAeConfig, *, rngs: nnx.Rngs):
        *stages, first = occupied(config.decoder_stages)
        kind, wide = config.upsample_block_type, [s.channels for s in (*stages, first)]
        self.channels = first.channels
        self.conv_in = Conv(
            config.latent_channels, self.channels, size=3, stride=1, bias=True, rngs=rngs
        )
        self.shortcut = repeat_channels if config.decoder_in_shortcut else no_channels
        self.first = make_blocks(first, rngs)
        self.up_blocks = nnx.List(  # as published: the last one comes first
            UpStage(d_in, stage, kind, rngs=rngs)
            for stage, d_in in zip(stages, wide[1:], strict=True)
        )
        self.norm_out = BiasedRmsNorm(wide[0], EPS)
        self.activation = config.decoder_conv_act_fn
        self.conv_out = (
            Conv(wide[0], config.in_channels, size=3, stride=1, bias=True, rngs=rngs)
            if config.decoder_layers_per_block[0]
            else UP[kind](wide[0], config.in_channels, rngs=rngs)
        )

    def __call__(self, z_BHWC: jax.Array) -> jax.Array:
        x = self.conv_in(z_BHWC) + self.shortcut(z_BHWC, self.channels)
        x = run_blocks(self.first, x)
        for stage in reversed(self.up_blocks):
            x = stage(x)
        return self.conv_out(ACTIVATIONS[self.activation](self.norm_out(x)))


def occupied(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Without an empty first stage: then conv_in, or conv_out, changes the size."""
    return stages[not stages[0].layers :]


class DcAe(Vae):
    """Pictures only: one frame, one latent frame."""

    def __init__(self, config: DcAeConfig, *, dtype, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.stride, self.channels = config.stride, config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, x_BFHWC):
        F, H, W = x_BFHWC.shape[1:4]
        if F != 1 or H % self.stride or W % self.stride:
            raise InputError(
                f'DC-AE takes single pictures of multiples of {self.stride} pixels, '
                f'not {F} of {H} x {W}'
            )
        z_BHWC = self.encoder(x_BFHWC[:, 0].astype(self.dtype))
        return z_BHWC[:, None].astype(jnp.float32) * self.config.scaling_factor

    def decode(self, z_BTHWC):
        z_BHWC = rearrange(z_BTHWC, 'B 1 H W C -> B H W C') / self.config.scaling_factor
        return self.decoder(z_BHWC.astype(self.dtype))[:, None].astype(jnp.float32)
