"""Our language model equals transformers' Qwen2.5-VL at random weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from metacanvas_jax.mllm.positions import prefix_positions
from tests import tiny

# 1e6 turns the later frequencies of a short prompt by next to nothing; 1e2 puts all of them to use.
QWEN = dataclasses.replace(tiny.QWEN, rope_theta=1e2)


@functools.cache
def _theirs(*, tied: bool = True, kv_heads: int = 2):
    """A tiny reference whose every parameter is random, and its config in our words."""
    ours = dataclasses.replace(QWEN, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    values = ours.to_json()
    vision = dict(depth=1, hidden_size=16, num_heads=2, intermediate_size=16, out_hidden_size=64)
    values['vision_config'] |= vision | dict(fullatt_block_indexes=[0])
    values |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=tiny.PAD)
    text = {k: v for k, v in values.items() if k not in ('vision_config', 'model_type')}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=values['vision_config'],
        tie_word_embeddings=tied,
        attn_implementation='eager',
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = name.endswith('norm.weight')
            scale = 0.1 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(is_norm + scale * noise)
    rope = model.model.language_model.rotary_emb
    assert float(rope.inv_freq[1]) == pytest.approx(QWEN.rope_theta ** (-1 / 8))
    return model, ours


@functools.cache
def _ours(**changes):
    reference, config = _theirs(**changes)
    weights = {name: p.detach().numpy() for name, p in reference.named_parameters()}

    def get(name: str) -> np.ndarray:
        value = weights[name]
        return value.T if value.ndim == 2 and 'embed_tokens' not in name else value

    arrays = {}
    for ours in tiny.named(jax.eval_shape(lambda: tiny.qwen(nnx.Rngs(0), None, config))):
        name = ours.removeprefix('language/').replace('/', '.')
        for suffix in ('.kernel', '.scale'):
            name = name.removesuffix(suffix)
        name = name if name.endswith('.bias') else f'{name}.weight'
        if name.startswith('layers.'):
            theirs = (
                name.replace('layers.', f'model.language_model.layers.{i}.') for i in range(2)
            )
            arrays[ours] = np.stack([get(name) for name in theirs])
        else:
            prefix = '' if name.startswith('lm_head') else 'model.language_model.'
            arrays[ours] = get(prefix + name)
    return tiny.fill(tiny.qwen(nnx.Rngs(0), None, config), arrays)


@jax.jit
def _forward(model, x_BLD, positions_B3L, length_B):
    states, _ = model.language.prefix(x_BLD, positions_B3L, length_B)
    return states, model.language.logits(states)


def _compare(x, positions_B3L, length_B, **changes):
    """Hidden states after the last norm and logits, at tokens that are no padding."""
    reference, _ = _theirs(**changes)
    valid = np.arange(x.shape[1]) < np.asarray(length_B)[:, None]
    with torch.no_grad():
        theirs = reference.model.language_model(
            inputs_embeds=torch.tensor(np.asarray(x)),
            position_ids=torch.tensor(np.asarray(positions_B3L)).permute(1, 0, 2).long(),
            attention_mask=torch.tensor(valid).long(),
        ).last_hidden_state
        their_logits = reference.lm_head(theirs)
    states, logits = _forward(_ours(**changes), x, positions_B3L, jnp.asarray(length_B))
    assert tiny.error(states[valid], theirs.numpy()[valid]) <= 1e-5
    assert tiny.error(logits[valid], their_logits.numpy()[valid]) <= 1e-5
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize('tied', [True, False])
def test_text_of_unequal_length(tied):
    """Ids through our embedding table; the shorter prompt is padded on the right."""
    prompt = tiny.prompt()
    reference, _ = _theirs(tied=tied)
    head, table = reference.lm_head.weight, reference.model.language_model.embed_tokens.weight
    assert (head is table) == tied
    assert ('language/lm_head/kernel' in tiny.named(_ours(tied=tied))) != tied
    x = _ours(tied=tied).language.embed(prompt.ids_BL)
    np.testing.assert_array_equal(x, table.detach().numpy()[prompt.ids_BL])
    _compare(x, prompt.positions_B3L, prompt.length_B, tied=tied)


@pytest.mark.parametrize('kv_heads', [1, 2, 4])
def test_grouped_query_heads(kv_heads):
    prompt = tiny.prompt()
    x = tiny.normal(2, 12, 64)
    _compare(x, prompt.positions_B3L, prompt.length_B, kv_heads=kv_heads)


def test_picture_inside_a_prompt():
    """Vision tokens come as embeddings, with a time, a row and a column each."""
    ids = [3, 4, 5] + [QWEN.image_token_id] * 6 + [6, 7] + [QWEN.video_token_id] * 8 + [8]
    positions, _ = prefix_positions(
        ids, QWEN, image_grids=[(1, 4, 6)], video_grids=[(2, 4, 4)], seconds_per_grid=[1.5]
    )
    x = 2 * tiny.normal(1, len(ids), 64, seed=4)
    _compare(x, positions[None], [len(ids)])
    states, _ = _forward(_ours(), x, positions[None], jnp.array([len(ids)]))
    flat = np.tile(np.arange(len(ids), dtype=np.int32), (1, 3, 1))
    other, _ = _forward(_ours(), x, flat, jnp.array([len(ids)]))
    assert tiny.error(other, states) > 1e-2  # the ids mattered
