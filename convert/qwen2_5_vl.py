"""Qwen2.5-VL: `visual.*`, `model.*`, and `lm_head.weight` where the head is not tied.

transformers 5 calls the same tensors `model.visual.*` and `model.language_model.*` in memory. It
writes the published names, but files with its own names exist.
"""

import functools

from convert.family import Family, Layout, from_config
from convert.rules import Rearrange, Rule, linear
from metacanvas_jax.mllm.config import QwenConfig, VisionConfig, read_config
from metacanvas_jax.mllm.qwen import Qwen


def _rules(config: QwenConfig, text: str, vision: str) -> list[Rule]:
    return [*_language(text), *(_vision(config.vision, vision) if config.vision else [])]


def _language(prefix: str) -> list[Rule]:
    ours, theirs = 'language/layers', f'{prefix}layers.{{i}}'
    rules = [
        Rule('language/embed_tokens', f'{prefix}embed_tokens.weight'),
        Rule('language/norm/scale', f'{prefix}norm.weight'),
        *linear('language/lm_head', 'lm_head', bias=False),
        *linear(f'{ours}/self_attn/o_proj', f'{theirs}.self_attn.o_proj', bias=False),
    ]
    for name in ('input_layernorm', 'post_attention_layernorm'):
        rules += [Rule(f'{ours}/{name}/scale', f'{theirs}.{name}.weight')]
    for name in ('q_proj', 'k_proj', 'v_proj'):
        rules += linear(f'{ours}/self_attn/{name}', f'{theirs}.self_attn.{name}')
    for name in ('gate_proj', 'up_proj', 'down_proj'):
        rules += linear(f'{ours}/mlp/{name}', f'{theirs}.mlp.{name}', bias=False)
    return rules


def _vision(config: VisionConfig, prefix: str) -> list[Rule]:
    ours, theirs = 'vision/blocks', f'{prefix}blocks.{{i}}'
    # Its stride is its kernel, so the Conv3d is a matmul over flattened patches.
    time, side = config.temporal_patch_size, config.patch_size
    patches = Rearrange('o c t h w -> (c t h w) o', t=time, h=side, w=side)
    rules = [
        Rule('vision/patch_embed/kernel', f'{prefix}patch_embed.proj.weight', patches),
        Rule('vision/merger/ln_q/scale', f'{prefix}merger.ln_q.weight'),
        *linear('vision/merger/fc1', f'{prefix}merger.mlp.0'),
        *linear('vision/merger/fc2', f'{prefix}merger.mlp.2'),
        *linear(f'{ours}/attn/qkv', f'{theirs}.attn.qkv'),
        *linear(f'{ours}/attn/proj', f'{theirs}.attn.proj'),
    ]
    for name in ('norm1', 'norm2'):
        rules += [Rule(f'{ours}/{name}/scale', f'{theirs}.{name}.weight')]
    for name in ('gate_proj', 'up_proj', 'down_proj'):
        rules += linear(f'{ours}/mlp/{name}', f'{theirs}.mlp.{name}')
    return rules


def _layout(text: str, vision: str) -> Layout:
    # Qwen2-VL has all but the gate.
    signs = (f'{text}layers.0.self_attn.q_proj.bias', f'{vision}blocks.0.mlp.gate_proj.weight')
    return Layout(signs, lambda config: _rules(config, text, vision), 'model')


FAMILY = Family(
    sizes=from_config(read_config),
    model=functools.partial(Qwen, lora=None, remat='full'),
    layouts={
        'transformers': _layout('model.', 'visual.'),
        'transformers_5': _layout('model.language_model.', 'model.visual.'),
    },
)
