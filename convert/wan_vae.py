"""The Wan2.2 VAE, as diffusers publishes it and as Wan does: the same tensors in other names.

A level of the native layout is one Sequential of its residual blocks and the change of size, and a
residual block one of (norm, SiLU, convolution, norm, SiLU, dropout, convolution).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator

from convert.family import Family, Layout, from_config
from convert.rules import Op, Rearrange, Rule, Shapes
from metacanvas_jax.vae.wan_vae import WanVae
from metacanvas_jax.vae.wan_vae_config import PUBLISHED, WanVaeConfig, read_config


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer: our path, and its names in the two layouts."""

    kind: Callable[[str, str], list[Rule]]
    ours: str
    diffusers: str
    native: str


def _layer(op: Op) -> Callable[[str, str], list[Rule]]:
    def rules(ours: str, theirs: str) -> list[Rule]:
        kernel = Rule(f'{ours}/kernel', f'{theirs}.weight', op)
        return [kernel, Rule(f'{ours}/bias', f'{theirs}.bias')]

    return rules


def _norm(op: Op) -> Callable[[str, str], list[Rule]]:
    return lambda ours, theirs: [Rule(f'{ours}/scale', f'{theirs}.gamma', op)]


# Of videos; those of pictures have one axis less.
CONV3 = _layer(Rearrange('o i t h w -> t h w i o'))
CONV2 = _layer(Rearrange('o i h w -> h w i o'))
POINT3 = _layer(Rearrange('o i 1 1 1 -> i o'))
POINT2 = _layer(Rearrange('o i 1 1 -> i o'))
NORM3 = _norm(Rearrange('c 1 1 1 -> c'))
NORM2 = _norm(Rearrange('c 1 1 -> c'))


def _rows(config: WanVaeConfig) -> Iterator[Row]:
    yield Row(POINT3, 'quant_conv', 'quant_conv', 'conv1')
    yield Row(POINT3, 'post_quant_conv', 'post_quant_conv', 'conv2')
    for side in ('encoder', 'decoder'):
        yield Row(CONV3, f'{side}/conv_in', f'{side}.conv_in', f'{side}.conv1')
        yield from _middle(f'{side}/mid_block', f'{side}.mid_block', f'{side}.middle')
        yield Row(NORM3, f'{side}/norm_out', f'{side}.norm_out', f'{side}.head.0')
        yield Row(CONV3, f'{side}/conv_out', f'{side}.conv_out', f'{side}.head.2')
    for side, way, blocks in (
        ('encoder', 'down', config.num_res_blocks),
        ('decoder', 'up', config.num_res_blocks + 1),
    ):
        for i in range(len(config.dim_mult)):
            level = f'{side}/{way}_blocks/{i}'
            diffusers = f'{side}.{way}_blocks.{i}'
            native = f'{side}.{way}samples.{i}.{way}samples'
            for j in range(blocks):
                names = f'{level}/resnets/{j}', f'{diffusers}.resnets.{j}', f'{native}.{j}'
                yield from _resnet(*names)
            names = f'{level}/{way}sampler', f'{diffusers}.{way}sampler', f'{native}.{blocks}'
            yield from _resample(*names)


def _resnet(ours: str, diffusers: str, native: str) -> Iterator[Row]:
    yield Row(NORM3, f'{ours}/norm1', f'{diffusers}.norm1', f'{native}.residual.0')
    yield Row(CONV3, f'{ours}/conv1', f'{diffusers}.conv1', f'{native}.residual.2')
    yield Row(NORM3, f'{ours}/norm2', f'{diffusers}.norm2', f'{native}.residual.3')
    yield Row(CONV3, f'{ours}/conv2', f'{diffusers}.conv2', f'{native}.residual.6')
    name = 'conv_shortcut'  # where the channels change
    yield Row(POINT3, f'{ours}/{name}', f'{diffusers}.{name}', f'{native}.shortcut')


def _resample(ours: str, diffusers: str, native: str) -> Iterator[Row]:
    yield Row(CONV2, f'{ours}/resample', f'{diffusers}.resample.1', f'{native}.resample.1')
    yield Row(CONV3, f'{ours}/time_conv', f'{diffusers}.time_conv', f'{native}.time_conv')


def _middle(ours: str, diffusers: str, native: str) -> Iterator[Row]:
    for i in range(2):
        yield from _resnet(f'{ours}/resnets/{i}', f'{diffusers}.resnets.{i}', f'{native}.{2 * i}')
    ours, diffusers, native = f'{ours}/attentions/0', f'{diffusers}.attentions.0', f'{native}.1'
    for kind, name in ((NORM2, 'norm'), (POINT2, 'to_qkv'), (POINT2, 'proj')):
        yield Row(kind, f'{ours}/{name}', f'{diffusers}.{name}', f'{native}.{name}')


def _diffusers(config: WanVaeConfig) -> list[Rule]:
    return [rule for row in _rows(config) for rule in row.kind(row.ours, row.diffusers)]


def _native(config: WanVaeConfig) -> list[Rule]:
    return [rule for row in _rows(config) for rule in row.kind(row.ours, row.native)]


SIGN = 'encoder.downsamples.0.downsamples.0.residual.0.gamma'  # that of Wan2.1 has no levels


def _native_sizes(_: pathlib.Path, shapes: Shapes) -> WanVaeConfig:
    """A native file has no config.json; one that lies beside it is the transformer's."""
    widths = {name: shapes[sign].shape[0] for name, sign in _WIDTHS.items() if sign in shapes}
    return dataclasses.replace(PUBLISHED, **widths)


_WIDTHS = {'base_dim': 'encoder.conv1.weight', 'decoder_base_dim': 'decoder.head.0.gamma'}


FAMILY = Family(
    sizes=from_config(read_config),
    model=WanVae,
    layouts={
        'diffusers': Layout(
            ('encoder.down_blocks.0.resnets.0.norm1.gamma',), _diffusers, 'diffusion_pytorch_model'
        ),
        'native': Layout((SIGN,), _native, 'Wan2.2_VAE', sizes=_native_sizes),
    },
)
