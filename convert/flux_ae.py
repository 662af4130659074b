"""FLUX's autoencoder: diffusers' AutoencoderKL, and Black Forest Labs' own `ae.safetensors`.

The latter counts the decoder's stages from the other end, has the projections of its attention as
1x1 convolutions, and comes without config.json.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

from convert.family import Family, Layout, from_config
from convert.rules import TRANSPOSED, Op, Rearrange, Rule, Shapes
from metacanvas_jax.types import InputError
from metacanvas_jax.vae.flux_ae import FluxAe
from metacanvas_jax.vae.flux_ae_config import FluxAeConfig, read_config

CONV = Rearrange('o i h w -> h w i o')
POINTWISE = Rearrange('o i 1 1 -> i o')


@dataclasses.dataclass(frozen=True)
class Names:
    """What a layout calls its parts."""

    down: str
    up: str
    place: Callable[[int, int], int]  # of one of the decoder's stages, (number, last) -> number
    block: str
    shortcut: str
    downsample: str
    upsample: str
    middle: tuple[str, str, str]
    attention: tuple[str, ...]  # norm, q, k, v, output
    projection: Op
    norm_out: str


DIFFUSERS = Names(
    down='down_blocks',
    up='up_blocks',
    place=lambda number, last: number,
    block='resnets',
    shortcut='conv_shortcut',
    downsample='downsamplers.0.conv',
    upsample='upsamplers.0.conv',
    middle=('mid_block.resnets.0', 'mid_block.attentions.0', 'mid_block.resnets.1'),
    attention=('group_norm', 'to_q', 'to_k', 'to_v', 'to_out.0'),
    projection=TRANSPOSED,
    norm_out='conv_norm_out',
)
BFL = Names(
    down='down',
    up='up',
    place=lambda number, last: last - number,
    block='block',
    shortcut='nin_shortcut',
    downsample='downsample.conv',
    upsample='upsample.conv',
    middle=('mid.block_1', 'mid.attn_1', 'mid.block_2'),
    attention=('norm', 'q', 'k', 'v', 'proj_out'),
    projection=POINTWISE,
    norm_out='norm_out',
)


def _rules(names: Names, config: FluxAeConfig) -> list[Rule]:
    rules, last = [], len(config.block_out_channels) - 1
    for i in range(last + 1):
        layers, place = config.layers_per_block, names.place(i, last)
        down = (f'encoder/down_blocks/{i}', f'encoder.{names.down}.{i}')
        up = (f'decoder/up_blocks/{i}', f'decoder.{names.up}.{place}')
        rules += _stage(names, *down, layers, names.downsample)
        rules += _stage(names, *up, layers + 1, names.upsample)
    for half in ('encoder', 'decoder'):
        before, attention, after = (f'{half}.{name}' for name in names.middle)
        rules += _resnet(names, f'{half}/mid_block/resnets/0', before)
        rules += _attention(names, f'{half}/mid_block/attention', attention)
        rules += _resnet(names, f'{half}/mid_block/resnets/1', after)
        rules += _layer(f'{half}/conv_in', f'{half}.conv_in', CONV)
        rules += _norm(f'{half}/conv_norm_out', f'{half}.{names.norm_out}')
        rules += _layer(f'{half}/conv_out', f'{half}.conv_out', CONV)
    return rules


def _stage(names: Names, ours: str, theirs: str, layers: int, resample: str) -> list[Rule]:
    rules = _layer(f'{ours}/resample/conv', f'{theirs}.{resample}', CONV)
    for i in range(layers):
        rules += _resnet(names, f'{ours}/resnets/{i}', f'{theirs}.{names.block}.{i}')
    return rules


def _resnet(names: Names, ours: str, theirs: str) -> list[Rule]:
    rules = _layer(f'{ours}/conv_shortcut', f'{theirs}.{names.shortcut}', POINTWISE)
    for i in (1, 2):
        rules += _norm(f'{ours}/norm{i}', f'{theirs}.norm{i}')
        rules += _layer(f'{ours}/conv{i}', f'{theirs}.conv{i}', CONV)
    return rules


def _attention(names: Names, ours: str, theirs: str) -> list[Rule]:
    norm, *projections = names.attention
    rules = _norm(f'{ours}/group_norm', f'{theirs}.{norm}')
    for mine, name in zip(('to_q', 'to_k', 'to_v', 'to_out'), projections, strict=True):
        rules += _layer(f'{ours}/{mine}', f'{theirs}.{name}', names.projection)
    return rules


def _layer(ours: str, theirs: str, layout: Op) -> list[Rule]:
    kernel = Rule(f'{ours}/kernel', f'{theirs}.weight', layout)
    return [kernel, Rule(f'{ours}/bias', f'{theirs}.bias')]


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f'{ours}/scale', f'{theirs}.weight'), Rule(f'{ours}/bias', f'{theirs}.bias')]


def _bfl_sizes(_: pathlib.Path, shapes: Shapes) -> FluxAeConfig:
    """What no shape tells are constants of Black Forest Labs' code, the same for all FLUX.1."""
    try:
        blocks = [n for n in shapes if n.startswith('encoder.down.') and n.endswith('conv1.weight')]
        stages = max(int(name.split('.')[2]) for name in blocks) + 1
        first = [f'encoder.down.{i}.block.0.conv1.weight' for i in range(stages)]
        return FluxAeConfig(
            in_channels=shapes['encoder.conv_in.weight'].shape[1],
            out_channels=shapes['decoder.conv_out.weight'].shape[0],
            latent_channels=shapes['decoder.conv_in.weight'].shape[1],
            block_out_channels=tuple(shapes[name].shape[0] for name in first),
            layers_per_block=sum(name.startswith('encoder.down.0.') for name in blocks),
            norm_num_groups=32,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"this is no whole autoencoder of FLUX's: {error!r}") from error


FAMILY = Family(
    sizes=from_config(read_config),
    model=FluxAe,
    layouts={
        # Stable Diffusion's have these names too, and more; their config.json is refused.
        'diffusers': Layout(
            ('encoder.down_blocks.0.resnets.0.norm1.weight',),
            functools.partial(_rules, DIFFUSERS),
            'diffusion_pytorch_model',
        ),
        'bfl': Layout(
            ('encoder.down.0.block.0.norm1.weight',),
            functools.partial(_rules, BFL),
            'ae',
            sizes=_bfl_sizes,
        ),
    },
)
