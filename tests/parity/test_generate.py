"""Greedy generation equals transformers' `generate` token by token; sampling is what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from metacanvas_jax.mllm.generate import generate, greedy, nucleus
from tests import tiny
from tests.parity import test_qwen_vision as vision
from tests.parity.test_qwen_language import QWEN, _ours, _theirs

NEW = 64
LENGTHS = (5, 12, 1, 9)


@functools.partial(jax.jit, static_argnames=('choose', 'max_new_tokens', 'stop', 'pad'))
def _generate(model, prompt, keys, **options):
    return generate(model, prompt, keys, **options)


def _run(prompt, *, stop=(), choose=greedy, new=NEW, seed=0, tied=True):
    keys = jax.vmap(jax.random.key)(jnp.arange(len(prompt.ids_BL)) + seed)
    ids, length = _generate(
        _ours(tied=tied),
        prompt,
        keys,
        choose=choose,
        max_new_tokens=new,
        stop=stop,
        pad=tiny.PAD,
    )
    return np.asarray(ids), np.asarray(length)


def _prompt(rows=(0, 1, 2, 3)):
    rng = np.random.default_rng(5)
    chats = [rng.integers(0, 58, length).tolist() for length in LENGTHS]
    return tiny.make_prompts([chats[row] for row in rows], QWEN, pad=tiny.PAD, buckets=(12, 16))


@functools.cache
def _reference(tied: bool):
    """transformers, one prompt at a time, without a stop."""
    model, _ = _theirs(tied=tied)
    prompt, rows = _prompt(), []
    for ids, length in zip(prompt.ids_BL, prompt.length_B, strict=True):
        out = model.generate(
            input_ids=torch.tensor(ids[None, :length]).long(),
            attention_mask=torch.ones(1, length, dtype=torch.long),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
        )
        rows.append(out[0, length:].numpy())
    return np.stack(rows)


@pytest.mark.parametrize('tied', [True, False])
def test_greedy_equals_transformers(tied):
    """A batch of unequal prompts against one call of `generate` each."""
    ids, length = _run(_prompt(), tied=tied)
    assert len(np.unique(ids)) > 10  # no model that repeats one token
    np.testing.assert_array_equal(ids, _reference(tied))
    np.testing.assert_array_equal(length, NEW)


def _row(ids_L, media) -> dict:
    """One prompt as the reference takes it."""
    kinds = np.where(ids_L == vision.IMAGE, 1, np.where(ids_L == vision.VIDEO, 2, 0))
    found = dict(
        input_ids=torch.tensor(ids_L[None]).long(),
        attention_mask=torch.ones(1, len(ids_L), dtype=torch.long),
        mm_token_type_ids=torch.tensor(kinds[None]),
    )
    for name, kind in (('', None), ('_videos', 'video')):
        shown = [m for m in media if (m.seconds_per_grid is None) == (kind is None)]
        if shown:
            found[f'pixel_values{name}'] = torch.tensor(np.concatenate([m.patches for m in shown]))
            found[f'{kind or "image"}_grid_thw'] = torch.tensor([m.grid for m in shown])
        if shown and kind:
            seconds = [m.seconds_per_grid for m in shown]
            found['second_per_grid_ts'] = torch.tensor(seconds)
    return found


def test_greedy_equals_transformers_with_pictures():
    """One batch: no picture, one, three of different sizes, a video."""
    rows = ('text', 'image', 'three images', 'video')
    prompt, _, media = vision._batch(rows)
    keys = jax.random.split(jax.random.key(0), len(rows))
    ids, _ = _generate(
        vision._ours(), prompt, keys, choose=greedy, max_new_tokens=NEW, stop=(), pad=tiny.PAD
    )
    for row, length in enumerate(prompt.length_B):
        theirs = _row(prompt.ids_BL[row, :length], media[row])
        free = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None)
        out = vision._theirs().generate(**theirs, **free)
        np.testing.assert_array_equal(ids[row], out[0, length:].numpy())


def test_a_row_ends_at_its_first_stop_token():
    free = _reference(True)
    stop = int(free[1, 20])
    ids, length = _run(_prompt(), stop=(stop, 57))
    for row in range(len(LENGTHS)):
        found = np.flatnonzero(np.isin(free[row], (stop, 57)))
        end = found[0] + 1 if len(found) else NEW
        assert length[row] == end
        np.testing.assert_array_equal(ids[row, :end], free[row, :end])
        assert (ids[row, end:] == tiny.PAD).all()
    assert length[1] <= 21


def test_what_else_is_in_the_batch_changes_no_answer():
    choose = nucleus(1.5, 0.9)
    together, _ = _run(_prompt(), choose=choose, new=16)
    alone, _ = _run(_prompt([2]), choose=choose, new=16, seed=2)
    np.testing.assert_array_equal(together[2], alone[0])


def test_nucleus_keeps_the_fewest_tokens_that_hold_the_share():
    share = np.array([0.05, 0.4, 0.3, 0.25])
    keys = jax.random.split(jax.random.key(0), 4000)
    logits = jnp.broadcast_to(jnp.log(share), (4000, 4))

    def drawn(temperature, top_p):
        return np.bincount(nucleus(temperature, top_p)(logits, keys), minlength=4) / 4000

    np.testing.assert_allclose(drawn(1.0, 1.0), share, atol=0.03)
    np.testing.assert_allclose(
        drawn(1.0, 0.71), [0, 0.4 / 0.95, 0.3 / 0.95, 0.25 / 0.95], atol=0.03
    )
    np.testing.assert_allclose(drawn(1.0, 0.69), [0, 4 / 7, 3 / 7, 0], atol=0.03)
    np.testing.assert_allclose(drawn(1.0, 0.01), [0, 1, 0, 0])
    cold = share**2 / (share**2).sum()
    np.testing.assert_allclose(drawn(0.5, 1.0), cold, atol=0.03)
