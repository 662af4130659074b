"""Gemma-2's body: `layers.*` as in SANA's text_encoder, `model.layers.*` as Google publishes it.

Neither has an `lm_head`: it is tied, and an encoder of text wants none.
"""

from convert.family import Family, Layout, from_config
from convert.rules import Rule, linear
from metacanvas_jax.text_encoders.gemma2 import Gemma2, read_config


def _rules(prefix: str) -> list[Rule]:
    ours, theirs = 'layers', f'{prefix}layers.{{i}}'
    rules = [
        Rule('embed_tokens', f'{prefix}embed_tokens.weight'),
        Rule('norm/offset', f'{prefix}norm.weight'),
    ]
    for part in ('input', 'post_attention', 'pre_feedforward', 'post_feedforward'):
        rules += [Rule(f'{ours}/{part}_layernorm/offset', f'{theirs}.{part}_layernorm.weight')]
    for name in ('q_proj', 'k_proj', 'v_proj', 'o_proj'):
        rules += linear(f'{ours}/self_attn/{name}', f'{theirs}.self_attn.{name}', bias=False)
    for name in ('gate_proj', 'up_proj', 'down_proj'):
        rules += linear(f'{ours}/mlp/{name}', f'{theirs}.mlp.{name}', bias=False)
    return rules


def _layout(prefix: str) -> Layout:
    # Gemma 1 lacks this norm. Gemma 3 has it; its config is refused.
    signs = (f'{prefix}layers.0.pre_feedforward_layernorm.weight',)
    return Layout(signs, lambda config: _rules(prefix), 'model')


FAMILY = Family(
    sizes=from_config(read_config),
    model=Gemma2,
    layouts={'sana': _layout(''), 'google': _layout('model.')},
)
