"""SANA's transformer: 1.0 and 1.5, as diffusers publishes them."""

import functools

from convert.family import Family, Layout, from_config
from convert.rules import Rearrange, Rule, linear
from metacanvas_jax.backbones.sana import Sana, SanaConfig, read_config

POINTWISE = Rearrange('o i 1 1 -> i o')  # a 1x1 convolution is our Linear
DEPTHWISE = Rearrange('c 1 h w -> h w c')


def _rules(config: SanaConfig) -> list[Rule]:
    # Its stride is its kernel, so the convolution is a matmul over flattened patches.
    side = config.patch_size
    patches = Rearrange('o c h w -> (h w c) o', h=side, w=side)
    rules = [
        Rule('patch_embed/kernel', 'patch_embed.proj.weight', patches),
        Rule('patch_embed/bias', 'patch_embed.proj.bias'),
        *linear('time_embed/linear', 'time_embed.linear'),
        *linear('caption_projection/up', 'caption_projection.linear_1'),
        *linear('caption_projection/down', 'caption_projection.linear_2'),
        Rule('caption_norm/scale', 'caption_norm.weight'),
        Rule('scale_shift_table', 'scale_shift_table'),
        *linear('proj_out', 'proj_out'),
    ]
    for name in ('linear_1', 'linear_2'):
        rules += linear(f'time_embed/{name}', f'time_embed.emb.timestep_embedder.{name}')
    return [*rules, *_block()]


def _block() -> list[Rule]:
    ours, theirs = 'transformer_blocks', 'transformer_blocks.{i}'
    rules = [
        Rule(f'{ours}/scale_shift_table', f'{theirs}.scale_shift_table'),
        Rule(f'{ours}/ff/conv_inverted/kernel', f'{theirs}.ff.conv_inverted.weight', POINTWISE),
        Rule(f'{ours}/ff/conv_inverted/bias', f'{theirs}.ff.conv_inverted.bias'),
        Rule(f'{ours}/ff/conv_depth/kernel', f'{theirs}.ff.conv_depth.weight', DEPTHWISE),
        Rule(f'{ours}/ff/conv_depth/bias', f'{theirs}.ff.conv_depth.bias'),
        Rule(f'{ours}/ff/conv_point/kernel', f'{theirs}.ff.conv_point.weight', POINTWISE),
    ]
    for attn, bias in (('attn1', False), ('attn2', True)):
        for name in ('to_q', 'to_k', 'to_v'):
            rules += linear(f'{ours}/{attn}/{name}', f'{theirs}.{attn}.{name}', bias=bias)
        rules += linear(f'{ours}/{attn}/to_out', f'{theirs}.{attn}.to_out.0')
        for name in ('norm_q', 'norm_k'):  # SANA 1.5
            rules += [Rule(f'{ours}/{attn}/{name}/scale', f'{theirs}.{attn}.{name}.weight')]
    return rules


# SANA-Video has no patch_embed. SANA-Sprint and ControlNets are told by their config.json.
_SIGNS = ('transformer_blocks.0.ff.conv_inverted.weight', 'patch_embed.proj.weight')

FAMILY = Family(
    sizes=from_config(read_config),
    model=functools.partial(Sana, remat='full'),
    layouts={'diffusers': Layout(_SIGNS, _rules, 'diffusion_pytorch_model')},
)
