"""The encoder of T5 v1.1: `shared` and `encoder.*` as transformers publishes it.

Its biases of distances are those of the first block, which all blocks use. Whole T5 checkpoints
hold a decoder too, for which we have no use.
"""

import functools
import pathlib

from convert.family import Family, Layout, from_config
from convert.rules import Rule, linear
from metacanvas_jax.text_encoders.t5 import T5, T5Config, read_config
from metacanvas_jax.types import InputError


def rules(bias: str) -> list[Rule]:
    """`bias` is the block that holds the biases of distances: {i} where each has its own."""
    ours, theirs = 'block', 'encoder.block.{i}.layer'
    table = f'encoder.block.{bias}.layer.0.SelfAttention.relative_attention_bias.weight'
    found = [
        Rule('shared', 'shared.weight'),
        Rule('relative_attention_bias/table', table),
        Rule(f'{ours}/attention_norm/scale', f'{theirs}.0.layer_norm.weight'),
        Rule(f'{ours}/feed_forward_norm/scale', f'{theirs}.1.layer_norm.weight'),
        Rule('final_layer_norm/scale', 'encoder.final_layer_norm.weight'),
    ]
    for name in ('q', 'k', 'v', 'o'):
        found += linear(f'{ours}/attention/{name}', f'{theirs}.0.SelfAttention.{name}', bias=False)
    for name in ('wi_0', 'wi_1', 'wo'):
        part = f'{theirs}.1.DenseReluDense.{name}'
        found += linear(f'{ours}/feed_forward/{name}', part, bias=False)
    return found


def config_of(kind: str, folder: pathlib.Path) -> T5Config:
    config = read_config(folder)
    if config.model_type != kind:
        raise InputError(f'{folder}/config.json is that of a {config.model_type}, not of a {kind}')
    return config


FAMILY = Family(
    sizes=from_config(functools.partial(config_of, 't5')),
    model=T5,
    layouts={
        'transformers': Layout(
            ('encoder.block.0.layer.0.SelfAttention.q.weight',), lambda config: rules('0'), 'model'
        )
    },
)
