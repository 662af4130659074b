"""DC-AE as diffusers publishes it: `encoder.*` and `decoder.*` of an AutoencoderDC.

A stage is a Sequential of its blocks, and of the convolution to the next stage (encoder: at the
end) or from the one before (decoder: at the start). A table has rules for every kind of block and
norm; those whose parameters a model lacks are passed over.
"""

from convert.family import Family, Layout, from_config
from convert.rules import Rearrange, Rule, linear
from metacanvas_jax.vae.dc_ae import DcAe
from metacanvas_jax.vae.dc_ae_config import DcAeConfig, Stage, read_config

CONV = Rearrange('o i h w -> h w i o')
POINTWISE = Rearrange('o i 1 1 -> i o')
DEPTHWISE = Rearrange('o 1 h w -> h w o')


def _rules(config: DcAeConfig) -> list[Rule]:
    return [*_encoder(config), *_decoder(config)]


def _encoder(config: DcAeConfig) -> list[Rule]:
    stages = config.encoder_stages
    first, last = int(not stages[0].layers), len(stages) - 1
    rules = [
        *_conv('encoder/conv_in', 'encoder.conv_in'),
        *_conv('encoder/conv_in/conv', 'encoder.conv_in.conv'),
        *_conv('encoder/conv_out', 'encoder.conv_out'),
        *_blocks(stages[last], 'encoder/last', f'encoder.down_blocks.{last}.{{i}}'),
    ]
    for number, stage in enumerate(stages[first:last], first):
        ours, theirs = f'encoder/down_blocks/{number - first}', f'encoder.down_blocks.{number}'
        rules += _blocks(stage, f'{ours}/blocks', f'{theirs}.{{i}}')
        rules += _conv(f'{ours}/down/conv', f'{theirs}.{stage.layers}.conv')
    return rules


def _decoder(config: DcAeConfig) -> list[Rule]:
    stages = config.decoder_stages
    first, last = int(not stages[0].layers), len(stages) - 1
    rules = [
        *_conv('decoder/conv_in', 'decoder.conv_in'),
        *_blocks(stages[last], 'decoder/first', f'decoder.up_blocks.{last}.{{i}}'),
        *_norm('decoder/norm_out', 'decoder.norm_out'),
        *_conv('decoder/conv_out', 'decoder.conv_out'),
        *_conv('decoder/conv_out/conv', 'decoder.conv_out.conv'),
    ]
    for number, stage in enumerate(stages[first:last], first):
        ours, theirs = f'decoder/up_blocks/{number - first}', f'decoder.up_blocks.{number}'
        rules += _conv(f'{ours}/up/conv', f'{theirs}.0.conv')
        rules += _blocks(stage, f'{ours}/blocks', f'{theirs}.{{i+1}}')
    return rules


def _blocks(stage: Stage, ours: str, theirs: str) -> list[Rule]:
    return [*_res(ours, theirs), *_vit(stage, ours, theirs)]


def _res(ours: str, theirs: str) -> list[Rule]:
    return [
        *_conv(f'{ours}/conv1', f'{theirs}.conv1'),
        *_conv(f'{ours}/conv2', f'{theirs}.conv2'),
        *_norm(f'{ours}/norm', f'{theirs}.norm'),
    ]


def _vit(stage: Stage, ours: str, theirs: str) -> list[Rule]:
    attn, ff, ff_theirs = f'{ours}/attn', f'{ours}/conv_out', f'{theirs}.conv_out'
    rules = [
        *_conv(f'{ff}/conv_inverted', f'{ff_theirs}.conv_inverted', POINTWISE),
        *_conv(f'{ff}/conv_depth', f'{ff_theirs}.conv_depth', DEPTHWISE),
        *_conv(f'{ff}/conv_point', f'{ff_theirs}.conv_point', POINTWISE),
        *_norm(f'{ours}/conv_out_norm', f'{ff_theirs}.norm'),
        *_norm(f'{attn}/norm_out', f'{theirs}.attn.norm_out'),
    ]
    for name in ('to_q', 'to_k', 'to_v', 'to_out'):
        rules += linear(f'{attn}/{name}', f'{theirs}.attn.{name}', bias=False)
    groups = Rearrange('(n o) i 1 1 -> n i o', n=3 * (stage.channels // stage.head_dim))
    for number in range(len(stage.scales)):
        name = f'{theirs}.attn.to_qkv_multiscale.{number}'
        scale = f'{attn}/to_qkv_multiscale/{number}'
        rules += _conv(f'{scale}/proj_in', f'{name}.proj_in', DEPTHWISE)
        rules += [Rule(f'{scale}/proj_out', f'{name}.proj_out.weight', groups)]
    return rules


def _conv(ours: str, theirs: str, layout: Rearrange = CONV) -> list[Rule]:
    kernel = Rule(f'{ours}/kernel', f'{theirs}.weight', layout)
    return [kernel, Rule(f'{ours}/bias', f'{theirs}.bias')]


def _norm(ours: str, theirs: str) -> list[Rule]:
    names = {'scale': 'weight', 'bias': 'bias'}
    names |= {'mean': 'running_mean', 'var': 'running_var', 'count': 'num_batches_tracked'}
    return [Rule(f'{ours}/{mine}', f'{theirs}.{name}') for mine, name in names.items()]


FAMILY = Family(
    sizes=from_config(read_config),
    model=DcAe,
    layouts={
        # The upsampling of the second stage: there is one where there are three.
        'diffusers': Layout(
            ('decoder.up_blocks.1.0.conv.weight',), _rules, 'diffusion_pytorch_model'
        )
    },
)
