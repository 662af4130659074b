"""UMT5's encoder: as transformers publishes it, and Wan's own `models_t5_*.pth`.

Wan's file comes without config.json: that in its folder is the video model's.
"""

import functools
import pathlib
import re

from convert import t5
from convert.family import Family, Layout, from_config
from convert.rules import Rule, Shapes, linear
from metacanvas_jax.text_encoders.t5 import T5, T5Config
from metacanvas_jax.types import InputError


def _native_rules(config: T5Config) -> list[Rule]:
    del config
    ours, theirs = 'block', 'blocks.{i}'
    rules = [
        Rule('shared', 'token_embedding.weight'),
        Rule('relative_attention_bias/table', f'{theirs}.pos_embedding.embedding.weight'),
        Rule(f'{ours}/attention_norm/scale', f'{theirs}.norm1.weight'),
        Rule(f'{ours}/feed_forward_norm/scale', f'{theirs}.norm2.weight'),
        Rule('final_layer_norm/scale', 'norm.weight'),
    ]
    for name in ('q', 'k', 'v', 'o'):
        rules += linear(f'{ours}/attention/{name}', f'{theirs}.attn.{name}', bias=False)
    for mine, name in (('wi_0', 'gate.0'), ('wi_1', 'fc1'), ('wo', 'fc2')):
        rules += linear(f'{ours}/feed_forward/{mine}', f'{theirs}.ffn.{name}', bias=False)
    return rules


def _native_sizes(_: pathlib.Path, shapes: Shapes) -> T5Config:
    """What no shape tells are constants of Wan's code."""
    try:
        vocab, width = shapes['token_embedding.weight'].shape
        buckets, heads = shapes['blocks.0.pos_embedding.embedding.weight'].shape
        inner, hidden = (shapes[f'blocks.0.{n}.weight'].shape[0] for n in ('attn.q', 'ffn.fc1'))
        found = (re.match(r'blocks\.(\d+)\.', name) for name in shapes)
        return T5Config(
            model_type='umt5',
            vocab_size=vocab,
            d_model=width,
            d_kv=inner // heads,
            d_ff=hidden,
            num_layers=1 + max(int(match[1]) for match in found if match),
            num_heads=heads,
            relative_attention_num_buckets=buckets,
            relative_attention_max_distance=128,
            layer_norm_epsilon=1e-6,
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"this is no whole UMT5 of Wan's: {error!r}") from error


FAMILY = Family(
    sizes=from_config(functools.partial(t5.config_of, 'umt5')),
    model=T5,
    layouts={
        'transformers': Layout(
            ('encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight',),
            lambda config: t5.rules('{i}'),
            'model',
        ),
        'native': Layout(
            ('blocks.0.pos_embedding.embedding.weight',),
            _native_rules,
            'models_t5_umt5-xxl-enc-bf16',
            sizes=_native_sizes,
        ),
    },
)
