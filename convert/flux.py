"""FLUX.1's transformer, dev and Kontext: as diffusers publishes it, and as Black Forest Labs do.

The lone file of Black Forest Labs (`bfl`) fuses q, k and v, in single blocks with the feed-forward
too, and has shift before scale in the last modulation.
"""

import functools
import json
import pathlib
import re
from typing import Any

from convert.family import Family, Layout, from_config
from convert.rules import TRANSPOSED, Chain, Inverse, Join, Rule, Shapes, SwapHalves, linear
from metacanvas_jax.backbones.flux import MLP_RATIO, SCHNELL, Flux, FluxConfig, read_config
from metacanvas_jax.types import InputError

DOUBLE, SINGLE = 'transformer_blocks', 'single_transformer_blocks'
EMBEDDERS = {'timestep': 'time_in', 'guidance': 'guidance_in', 'text': 'vector_in'}


# ------------------------------------------------------------ diffusers


def _diffusers(config: FluxConfig) -> list[Rule]:
    del config
    rules = [
        *linear('x_embedder', 'x_embedder'),
        *linear('context_embedder', 'context_embedder'),
        *linear('norm_out/linear', 'norm_out.linear'),
        *linear('proj_out', 'proj_out'),
    ]
    for name in EMBEDDERS:
        ours, theirs = (f'time_text_embed{dot}{name}_embedder' for dot in '/.')
        rules += linear(f'{ours}/up', f'{theirs}.linear_1')
        rules += linear(f'{ours}/down', f'{theirs}.linear_2')
    return [*rules, *_double(), *_single()]


def _double() -> list[Rule]:
    ours, theirs = DOUBLE, f'{DOUBLE}.{{i}}'
    rules = []
    for norm in ('norm1', 'norm1_context'):
        rules += linear(f'{ours}/{norm}/linear', f'{theirs}.{norm}.linear')
    for ff in ('ff', 'ff_context'):
        rules += linear(f'{ours}/{ff}/up', f'{theirs}.{ff}.net.0.proj')
        rules += linear(f'{ours}/{ff}/down', f'{theirs}.{ff}.net.2')
    for name in ('to_q', 'to_k', 'to_v', 'add_q_proj', 'add_k_proj', 'add_v_proj', 'to_add_out'):
        rules += linear(f'{ours}/attn/{name}', f'{theirs}.attn.{name}')
    rules += linear(f'{ours}/attn/to_out', f'{theirs}.attn.to_out.0')
    for norm in ('norm_q', 'norm_k', 'norm_added_q', 'norm_added_k'):
        rules += [Rule(f'{ours}/attn/{norm}/scale', f'{theirs}.attn.{norm}.weight')]
    return rules


def _single() -> list[Rule]:
    ours, theirs = SINGLE, f'{SINGLE}.{{i}}'
    rules = linear(f'{ours}/norm/linear', f'{theirs}.norm.linear')
    for name in ('proj_mlp', 'proj_out'):
        rules += linear(f'{ours}/{name}', f'{theirs}.{name}')
    for name in ('to_q', 'to_k', 'to_v'):
        rules += linear(f'{ours}/attn/{name}', f'{theirs}.attn.{name}')
    for norm in ('norm_q', 'norm_k'):
        rules += [Rule(f'{ours}/attn/{norm}/scale', f'{theirs}.attn.{norm}.weight')]
    return rules


# ------------------------------------------------------------ Black Forest Labs


def _bfl(config: FluxConfig) -> list[Rule]:
    rules = [
        *linear('x_embedder', 'img_in'),
        *linear('context_embedder', 'txt_in'),
        *linear('proj_out', 'final_layer.linear'),
    ]
    ours, theirs = 'norm_out/linear', 'final_layer.adaLN_modulation.1'
    rules += [
        Rule(f'{ours}/kernel', f'{theirs}.weight', Chain(SwapHalves(), TRANSPOSED)),
        Rule(f'{ours}/bias', f'{theirs}.bias', SwapHalves()),
    ]
    for mine, name in EMBEDDERS.items():
        rules += linear(f'time_text_embed/{mine}_embedder/up', f'{name}.in_layer')
        rules += linear(f'time_text_embed/{mine}_embedder/down', f'{name}.out_layer')
    return [*rules, *_bfl_double(config), *_bfl_single(config)]


def _bfl_double(config: FluxConfig) -> list[Rule]:
    D = config.width
    pictures = ('to_q', 'to_k', 'to_v'), ('norm_q', 'norm_k'), 'to_out'
    text = ('add_q_proj', 'add_k_proj', 'add_v_proj'), ('norm_added_q', 'norm_added_k')
    rules = []
    for stream, suffix, (qkv, norms, out) in (
        ('img', '', pictures),
        ('txt', '_context', (*text, 'to_add_out')),
    ):
        theirs, attn = f'double_blocks.{{i}}.{stream}', f'{DOUBLE}/attn'
        rules += _cut([f'{attn}/{name}' for name in qkv], f'{theirs}_attn.qkv', D, D, D)
        rules += _norms([f'{attn}/{name}' for name in norms], f'{theirs}_attn.norm')
        rules += linear(f'{attn}/{out}', f'{theirs}_attn.proj')
        rules += linear(f'{DOUBLE}/norm1{suffix}/linear', f'{theirs}_mod.lin')
        rules += linear(f'{DOUBLE}/ff{suffix}/up', f'{theirs}_mlp.0')
        rules += linear(f'{DOUBLE}/ff{suffix}/down', f'{theirs}_mlp.2')
    return rules


def _bfl_single(config: FluxConfig) -> list[Rule]:
    D, ours, theirs = config.width, SINGLE, 'single_blocks.{i}'
    inside = [f'{ours}/attn/to_{x}' for x in 'qkv'] + [f'{ours}/proj_mlp']
    return [
        *_cut(inside, f'{theirs}.linear1', D, D, D, MLP_RATIO * D),
        *_norms([f'{ours}/attn/norm_{x}' for x in 'qk'], f'{theirs}.norm'),
        *linear(f'{ours}/proj_out', f'{theirs}.linear2'),
        *linear(f'{ours}/norm/linear', f'{theirs}.modulation.lin'),
    ]


def _cut(ours: list[str], theirs: str, *lengths: int) -> list[Rule]:
    """One published Linear as several of ours."""
    cut = Inverse(Join(*lengths))
    kernels, biases = (tuple(f'{path}/{part}' for path in ours) for part in ('kernel', 'bias'))
    return [
        Rule(kernels, f'{theirs}.weight', Chain(cut, TRANSPOSED)),
        Rule(biases, f'{theirs}.bias', cut),
    ]


def _norms(ours: list[str], theirs: str) -> list[Rule]:
    names = ('query_norm', 'key_norm')
    pairs = zip(ours, names, strict=True)
    return [Rule(f'{path}/scale', f'{theirs}.{name}.scale') for path, name in pairs]


# ------------------------------------------------------------ sizes


def _bfl_sizes(folder: pathlib.Path, shapes: Shapes) -> FluxConfig:
    if 'guidance_in.in_layer.weight' not in shapes:
        raise InputError(f'{folder}: no guidance_in.in_layer.weight: {SCHNELL}')
    width, in_channels = shapes['img_in.weight'].shape
    (head_dim,) = shapes['double_blocks.0.img_attn.norm.query_norm.scale'].shape
    return FluxConfig(
        in_channels=in_channels,
        num_layers=_count('double_blocks', shapes),
        num_single_layers=_count('single_blocks', shapes),
        attention_head_dim=head_dim,
        num_attention_heads=width // head_dim,
        joint_attention_dim=shapes['txt_in.weight'].shape[1],
        pooled_projection_dim=shapes['vector_in.in_layer.weight'].shape[1],
        axes_dims_rope=_axes(folder / 'config.json'),
    )


def _axes(path: pathlib.Path) -> Any:
    """How the three rotary axes share a head, which shapes do not say.

    An export leaves a config.json beside its file. Without one it is as published.
    """
    try:
        values = json.loads(path.read_text(encoding='utf-8')) if path.is_file() else {}
        return tuple(values.get('axes_dims_rope') or values.get('axes_dim') or (16, 56, 56))
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f'{path} is not the config of a FLUX transformer: {error!r}') from error


def _count(blocks: str, shapes: Shapes) -> int:
    found = (re.match(rf'{blocks}\.(\d+)\.', name) for name in shapes)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


# Of FLUX.2 and Chroma, which share most names, neither has modulations in its blocks.
FAMILY = Family(
    sizes=from_config(read_config),
    model=functools.partial(Flux, remat='full'),
    layouts={
        'diffusers': Layout(
            (f'{SINGLE}.0.norm.linear.weight',), _diffusers, 'diffusion_pytorch_model'
        ),
        'bfl': Layout(('single_blocks.0.modulation.lin.weight',), _bfl, 'flux1', sizes=_bfl_sizes),
    },
)
