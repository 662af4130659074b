"""CLIP's text model: `text_model.*` as published, without the prefix as transformers 5 makes it.

transformers 5 has no prefix in memory; it writes back the one that it read, and none for a new
model. The image model and the projections of a whole CLIP are not ours.
"""

from convert.family import Family, Layout, from_config
from convert.rules import Rule, linear
from metacanvas_jax.text_encoders.clip import Clip, read_config


def _rules(prefix: str) -> list[Rule]:
    ours, theirs = 'layers', f'{prefix}encoder.layers.{{i}}'
    rules = [
        Rule('token_embedding', f'{prefix}embeddings.token_embedding.weight'),
        Rule('position_embedding', f'{prefix}embeddings.position_embedding.weight'),
        *_norm('final_layer_norm', f'{prefix}final_layer_norm'),
        *linear(f'{ours}/mlp/up', f'{theirs}.mlp.fc1'),
        *linear(f'{ours}/mlp/down', f'{theirs}.mlp.fc2'),
    ]
    for name in ('layer_norm1', 'layer_norm2'):
        rules += _norm(f'{ours}/{name}', f'{theirs}.{name}')
    for name in ('q_proj', 'k_proj', 'v_proj', 'out_proj'):
        rules += linear(f'{ours}/self_attn/{name}', f'{theirs}.self_attn.{name}')
    return rules


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f'{ours}/scale', f'{theirs}.weight'), Rule(f'{ours}/bias', f'{theirs}.bias')]


def _layout(prefix: str) -> Layout:
    names = ('embeddings.token_embedding.weight', 'embeddings.position_embedding.weight')
    signs = tuple(prefix + name for name in names)
    return Layout(signs, lambda config: _rules(prefix), 'model')


FAMILY = Family(
    sizes=from_config(read_config),
    model=Clip,
    layouts={'transformers': _layout('text_model.'), 'transformers_5': _layout('')},
)
