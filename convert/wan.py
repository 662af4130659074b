"""Wan's transformer, as diffusers publishes it and as Wan's own repository does.

Both have the same tensors under other names. The one norm of a block that has weights, in front of
the cross-attention, is `norm2` in diffusers and `norm3` in the native layout. A widened model's
input layer, [noisy | condition | mask], is two kernels of ours.
"""

import functools
from collections.abc import Mapping

from convert.family import Family, Layout, from_config
from convert.rules import Chain, Inverse, Join, Rearrange, Rule, linear
from metacanvas_jax.backbones.wan import Wan
from metacanvas_jax.backbones.wan_config import WanConfig, read_config

TABLE = Rearrange('1 n d -> n d')

DIFFUSERS = {
    'time_embedder/linear_1': 'condition_embedder.time_embedder.linear_1',
    'time_embedder/linear_2': 'condition_embedder.time_embedder.linear_2',
    'time_embedder/time_proj': 'condition_embedder.time_proj',
    'text_embedder/linear_1': 'condition_embedder.text_embedder.linear_1',
    'text_embedder/linear_2': 'condition_embedder.text_embedder.linear_2',
    'scale_shift_table': 'scale_shift_table',
    'proj_out': 'proj_out',
    'blocks/scale_shift_table': 'scale_shift_table',
    'blocks/attn1': 'attn1',
    'blocks/attn2': 'attn2',
    'to_q': 'to_q',
    'to_k': 'to_k',
    'to_v': 'to_v',
    'to_out': 'to_out.0',
    'blocks/norm2': 'norm2',
    'blocks/ffn/up': 'ffn.net.0.proj',
    'blocks/ffn/down': 'ffn.net.2',
}
NATIVE = {
    'time_embedder/linear_1': 'time_embedding.0',
    'time_embedder/linear_2': 'time_embedding.2',
    'time_embedder/time_proj': 'time_projection.1',
    'text_embedder/linear_1': 'text_embedding.0',
    'text_embedder/linear_2': 'text_embedding.2',
    'scale_shift_table': 'head.modulation',
    'proj_out': 'head.head',
    'blocks/scale_shift_table': 'modulation',
    'blocks/attn1': 'self_attn',
    'blocks/attn2': 'cross_attn',
    'to_q': 'q',
    'to_k': 'k',
    'to_v': 'v',
    'to_out': 'o',
    'blocks/norm2': 'norm3',
    'blocks/ffn/up': 'ffn.0',
    'blocks/ffn/down': 'ffn.2',
}


def _rules(names: Mapping[str, str], config: WanConfig) -> list[Rule]:
    """`names` are those of one layout, a block's below `blocks.{i}.`."""
    rules = [
        _input(config),
        Rule('patch_embedding/bias', 'patch_embedding.bias'),
        Rule('scale_shift_table', names['scale_shift_table'], TABLE),
        *linear('proj_out', names['proj_out']),
    ]
    for name in ('linear_1', 'linear_2', 'time_proj'):
        rules += linear(f'time_embedder/{name}', names[f'time_embedder/{name}'])
    for name in ('linear_1', 'linear_2'):
        rules += linear(f'text_embedder/{name}', names[f'text_embedder/{name}'])
    return [*rules, *_block(names)]


def _input(config: WanConfig) -> Rule:
    # Its stride is its kernel, so the convolution is a matmul over flattened patches.
    side = config.patch_size
    patches = Rearrange('c p q d -> (p q c) d', p=side, q=side)
    channels = Rearrange('d c 1 p q -> c p q d')
    kernel, published = 'patch_embedding/kernel', 'patch_embedding.weight'
    if not config.condition_channels:
        return Rule(kernel, published, Chain(channels, patches))
    cut = Inverse(Join(config.out_channels, config.condition_channels))
    ours = (kernel, 'condition_embedding/linear/kernel')
    return Rule(ours, published, Chain(channels, cut, patches))


def _block(names: Mapping[str, str]) -> list[Rule]:
    theirs = {ours: f'blocks.{{i}}.{name}' for ours, name in names.items()}
    table, norm = theirs['blocks/scale_shift_table'], theirs['blocks/norm2']
    rules = [
        Rule('blocks/scale_shift_table', table, TABLE),
        Rule('blocks/norm2/scale', f'{norm}.weight'),
        Rule('blocks/norm2/bias', f'{norm}.bias'),
        *linear('blocks/ffn/up', theirs['blocks/ffn/up']),
        *linear('blocks/ffn/down', theirs['blocks/ffn/down']),
    ]
    for attn in ('blocks/attn1', 'blocks/attn2'):
        for name in ('to_q', 'to_k', 'to_v', 'to_out'):
            rules += linear(f'{attn}/{name}', f'{theirs[attn]}.{names[name]}')
        for name in ('norm_q', 'norm_k'):
            rules += [Rule(f'{attn}/{name}/scale', f'{theirs[attn]}.{name}.weight')]
    return rules


FAMILY = Family(
    sizes=from_config(read_config),
    model=functools.partial(Wan, remat='full'),
    layouts={
        'diffusers': Layout(
            ('blocks.0.attn2.norm_k.weight', 'scale_shift_table'),
            functools.partial(_rules, DIFFUSERS),
            'diffusion_pytorch_model',
        ),
        'native': Layout(
            ('blocks.0.cross_attn.norm_k.weight',),
            functools.partial(_rules, NATIVE),
            'diffusion_pytorch_model',
            config=WanConfig.to_native_json,
        ),
    },
)
