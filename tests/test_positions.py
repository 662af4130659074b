"""Position ids: the golden vectors of spec.md section 2.5, and transformers as the reference."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from metacanvas_jax.data.prompts import make_prompts
from metacanvas_jax.layers import rope
from metacanvas_jax.mllm.positions import (
    TEXT_RULES,
    canvas_positions,
    keyframe_ids,
    mrope_angles,
    prefix_positions,
    text_positions,
)
from metacanvas_jax.types import InputError
from tests import tiny

IMAGE, VIDEO = tiny.QWEN.image_token_id, tiny.QWEN.video_token_id


def _ids(*blocks: tuple[int, int]) -> list[int]:
    return [token for token, count in blocks for _ in range(count)]


@pytest.mark.parametrize('rule', TEXT_RULES)
def test_golden_picture_between_texts_then_canvas(rule):
    ids = _ids((1, 5), (IMAGE, 6), (2, 4))
    positions, start = prefix_positions(ids, tiny.QWEN, image_grids=[(1, 4, 6)], rule=rule)
    text = [0, 1, 2, 3, 4], [8, 9, 10, 11]
    np.testing.assert_array_equal(positions[0], [*text[0], *[5] * 6, *text[1]])
    np.testing.assert_array_equal(positions[1], [*text[0], 5, 5, 5, 6, 6, 6, *text[1]])
    np.testing.assert_array_equal(positions[2], [*text[0], 5, 6, 7, 5, 6, 7, *text[1]])
    assert start == 12

    t, h, w = canvas_positions(jnp.array([start]), [0], 2, 3)[0]
    np.testing.assert_array_equal(t, [12] * 6)
    np.testing.assert_array_equal(h, [12, 12, 12, 13, 13, 13])
    np.testing.assert_array_equal(w, [12, 13, 14, 12, 13, 14])

    t, h, w = canvas_positions(jnp.array([start]), [0, 2, 4], 2, 3)[0]
    np.testing.assert_array_equal(t, np.repeat([12, 14, 16], 6))
    np.testing.assert_array_equal(h, np.tile([12, 12, 12, 13, 13, 13], 3))
    np.testing.assert_array_equal(w, np.tile([12, 13, 14], 6))


def test_golden_text_after_a_long_video():
    ids = _ids((1, 3), (VIDEO, 20 * 4), (2, 1))
    place = dict(video_grids=[(20, 4, 4)], seconds_per_grid=[1.0])
    legacy, _ = prefix_positions(ids, tiny.QWEN, rule='legacy', **place)
    hf5, start = prefix_positions(ids, tiny.QWEN, rule='hf5', **place)
    np.testing.assert_array_equal(legacy[:, -1], [42] * 3)
    np.testing.assert_array_equal(hf5[:, -1], [5] * 3)
    np.testing.assert_array_equal(legacy[:, :-1], hf5[:, :-1])
    np.testing.assert_array_equal(legacy[0, 3:-1:4], 3 + 2 * np.arange(20))
    assert start == 42  # the video's own ids reach 41, whatever the text's rule


def test_canvas_starts_after_the_largest_id_of_any_axis():
    """A video at the end of a prompt reaches further in time than in space."""
    positions, start = prefix_positions(
        _ids((1, 3), (VIDEO, 8)), tiny.QWEN, video_grids=[(8, 2, 2)], seconds_per_grid=[2.0]
    )
    assert start == positions.max() + 1 == 3 + 7 * 4 + 1


@pytest.mark.parametrize(
    ('keyframes', 'frames', 'expected'),
    [
        (1, 31, [0]),
        (3, 31, [0, 5, 10]),
        (6, 31, [0, 2, 4, 6, 8, 10]),
        (11, 31, range(11)),
        (31, 31, np.arange(31) // 3),
        (1, 1, [0]),
    ],
)
def test_keyframes_lie_at_absolute_time(keyframes, frames, expected):
    """121 frames at 24 per second, 4 of them in a latent frame; Qwen counts 2 ids a second."""
    found = keyframe_ids(keyframes, frames, frame_seconds=4 / 24, tokens_per_second=2)
    np.testing.assert_array_equal(found, list(expected))


def test_rows_of_a_batch_start_where_their_prompts_end():
    chats = [[1] * 5, [1] * 9]
    prompt = make_prompts(chats, tiny.QWEN, pad=tiny.PAD, buckets=(12, 40))
    np.testing.assert_array_equal(prompt.start_B, [5, 9])
    np.testing.assert_array_equal(prompt.length_B, [5, 9])
    assert prompt.ids_BL.shape == (2, 12)
    np.testing.assert_array_equal(prompt.positions_B3L[1, :, :9], np.tile(np.arange(9), (3, 1)))
    found = canvas_positions(prompt.start_B, [0, 3], 2, 2)
    alone = [canvas_positions(np.array([s]), [0, 3], 2, 2)[0] for s in (5, 9)]
    np.testing.assert_array_equal(found, alone)
    np.testing.assert_array_equal(found[1] - found[0], np.full((3, 8), 4))


def test_flat_canvas_is_numbered_like_text():
    found = text_positions(jnp.array([12, 3]), [0, 5], 2, 3)
    np.testing.assert_array_equal(found, [[s + np.arange(12)] * 3 for s in (12, 3)])


# ------------------------------------------------------------ transformers


def _reference(ids, images, videos, seconds):
    config = types.SimpleNamespace(vision_config=tiny.QWEN)
    model = types.SimpleNamespace(config=config)
    model.get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids.__get__(model)
    ids = np.asarray(ids)
    kinds = np.where(ids == IMAGE, 1, np.where(ids == VIDEO, 2, 0))
    positions, delta = Qwen2_5_VLModel.get_rope_index(
        model,
        torch.tensor(ids)[None],
        torch.tensor(kinds)[None],
        image_grid_thw=torch.tensor(images).reshape(-1, 3),
        video_grid_thw=torch.tensor(videos).reshape(-1, 3),
        second_per_grid_ts=torch.tensor(seconds),
    )
    return positions[:, 0].numpy(), int(delta) + len(ids)


@pytest.mark.parametrize('seed', range(20))
def test_mixtures_equal_transformers(seed):
    """Text, pictures and videos in any order; a text token stands between two vision blocks."""
    rng = np.random.default_rng(seed)
    ids, images, videos, seconds = [], [], [], []
    for _ in range(rng.integers(1, 6)):
        ids += rng.integers(0, tiny.PAD, rng.integers(1, 7)).tolist()
        kind = rng.integers(3)
        h, w = (int(n) for n in rng.integers(1, 6, 2))
        if kind == 1:
            images.append((1, 2 * h, 2 * w))
            ids += [IMAGE] * (h * w)
        elif kind == 2:
            t = int(rng.integers(1, 5))
            videos.append((t, 2 * h, 2 * w))
            seconds.append(float(rng.choice([0.25, 0.375, 0.5, 1.0, 1.5])))
            ids += [VIDEO] * (t * h * w)
    ours, start = prefix_positions(
        ids,
        tiny.QWEN,
        image_grids=images,
        video_grids=videos,
        seconds_per_grid=seconds,
        rule='hf5',
    )
    theirs, their_start = _reference(ids, images, videos, seconds)
    np.testing.assert_array_equal(ours, theirs)
    assert start == their_start

    # The older rule differs only after a video that is longer in time than in space.
    if all(
        int((t - 1) * s * tiny.QWEN.tokens_per_second) < max(h, w) // 2
        for (t, h, w), s in zip(videos, seconds, strict=True)
    ):
        legacy, _ = prefix_positions(
            ids, tiny.QWEN, image_grids=images, video_grids=videos, seconds_per_grid=seconds
        )
        np.testing.assert_array_equal(legacy, ours)


@pytest.mark.parametrize(
    ('ids', 'grids', 'words'),
    [
        (_ids((1, 2), (IMAGE, 4)), [], 'more vision blocks'),
        (_ids((1, 2), (IMAGE, 4)), [(1, 4, 6)], 'has 6 tokens, its text and grids make 8'),
    ],
)
def test_grids_that_do_not_fit_are_refused(ids, grids, words):
    with pytest.raises(InputError, match=words):
        prefix_positions(ids, tiny.QWEN, image_grids=grids)


# ------------------------------------------------------------ rotary angles


def test_equal_axes_are_ordinary_rope():
    position = np.random.default_rng(0).integers(0, 2000, (2, 7))
    three = np.broadcast_to(position[:, None], (2, 3, 7))
    ordinary = rope.angles(position, tiny.QWEN.head_dim, tiny.QWEN.rope_theta)
    np.testing.assert_array_equal(mrope_angles(three, tiny.QWEN), ordinary)


@pytest.mark.parametrize(('axis', 'first', 'last'), [(0, 0, 16), (1, 16, 40), (2, 40, 64)])
def test_each_axis_turns_its_own_frequencies(axis, first, last):
    config = dataclasses.replace(
        tiny.QWEN, hidden_size=128 * tiny.QWEN.num_attention_heads, mrope_section=(16, 24, 24)
    )
    positions = np.zeros((1, 3, 1), np.int32)
    positions[0, axis] = 5
    found = np.asarray(mrope_angles(positions, config)[0, 0])
    expected = np.zeros(64)
    expected[first:last] = 5 * 1e6 ** (-2 * np.arange(first, last) / 128)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
