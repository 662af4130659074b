"""Interpolation of the canvas in space (as torch does it) and in time (as its keyframes ask)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from metacanvas_jax.canvas.fusion import AddFusion
from metacanvas_jax.canvas.tokens import CanvasTokens, canvas_grid
from metacanvas_jax.layers.resize import resize, spread_keyframes, temporal_weights
from tests import tiny

SIZES = [
    ((11, 20), (22, 40)),  # the paper's Wan canvas
    ((16, 16), (16, 16)),
    ((3, 5), (7, 11)),
    ((5, 7), (4, 3)),  # shrinking, odd
    ((8, 8), (3, 13)),
    ((1, 4), (3, 1)),
]


@pytest.mark.parametrize(('old', 'new'), SIZES)
def test_space_equals_torch(old, new):
    x = tiny.normal(2, *old, 3)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(np.asarray(x)).permute(0, 3, 1, 2),
        size=new,
        mode='bilinear',
        align_corners=False,
        antialias=False,
    ).permute(0, 2, 3, 1)
    assert tiny.error(resize(x, *new), theirs) <= 1e-6


def test_space_keeps_what_it_need_not_change():
    x = tiny.normal(2, 5, 7, 3)
    np.testing.assert_array_equal(resize(x, 5, 7), x)
    field = jnp.full((1, 5, 7, 2), 0.7)
    assert tiny.error(resize(field, 9, 4), jnp.full((1, 9, 4, 2), 0.7)) <= 1e-6


@pytest.mark.parametrize('keyframes', [1, 2, 3, 6, 7, 11, 31])
@pytest.mark.parametrize('frames', [1, 2, 5, 31])
def test_time_weights_are_a_partition_of_one(frames, keyframes):
    weights = temporal_weights(frames, keyframes)
    assert weights.shape == (frames, keyframes)
    assert weights.min() >= 0
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    assert ((weights > 0).sum(1) <= 2).all()


@pytest.mark.parametrize('keyframes', [1, 3, 6, 11, 31])
def test_keyframes_are_reproduced_exactly(keyframes):
    """The paper's counts all lie on latent frames of its 121 pixel frames."""
    x = tiny.normal(1, keyframes, 2, 3, 4)
    spread = spread_keyframes(x, 31)
    assert spread.shape == (1, 31, 2, 3, 4)
    if keyframes == 1:
        np.testing.assert_array_equal(spread, np.repeat(x, 31, 1))
    else:
        np.testing.assert_array_equal(spread[:, :: 30 // (keyframes - 1)], x)


def test_time_matrix_of_as_many_keyframes_is_the_identity():
    for count in (2, 5, 31):
        np.testing.assert_array_equal(temporal_weights(count, count), np.eye(count))


@pytest.mark.parametrize(('frames', 'keyframes'), [(31, 3), (31, 6), (9, 4), (4, 9)])
def test_a_ramp_in_time_stays_a_ramp(frames, keyframes):
    ramp = np.linspace(2, 5, keyframes, dtype=np.float32).reshape(1, -1, 1, 1, 1)
    found = spread_keyframes(jnp.asarray(ramp), frames).reshape(-1)
    assert tiny.error(found, np.linspace(2, 5, frames)) <= 1e-6


def test_one_frame_takes_keyframe_zero():
    x = tiny.normal(2, 3, 2, 2, 4)
    np.testing.assert_array_equal(spread_keyframes(x, 1), x[:, :1])


def test_projection_and_interpolation_commute():
    """Both are linear and the weights sum to one, so the bias survives too."""
    fusion = tiny.randomised(
        lambda rngs: AddFusion(tiny.canvas_config(), 64, tiny.video(rngs), rngs=rngs), zero=()
    )
    canvas, grid = tiny.normal(2, 3, 2, 3, 64), (5, 4, 6)
    late = fusion.project(spread_keyframes(resize(canvas, 4, 6), 5))
    assert tiny.error(jax.jit(lambda c: fusion.prepare(c, grid))(canvas), late) <= 1e-5


# ------------------------------------------------------------ the table of canvas tokens


@pytest.mark.parametrize(
    ('stride', 'grid', 'expected'),
    [
        (1, (1, 16, 16), (1, 16, 16)),
        (2, (31, 22, 40), (3, 11, 20)),
        (2, (31, 15, 26), (3, 8, 13)),  # rounded up
        (2, (1, 22, 40), (1, 11, 20)),  # a picture takes keyframe 0 only
    ],
)
def test_canvas_follows_the_token_grid(stride, grid, expected):
    assert canvas_grid(tiny.canvas_config(keyframes=3, stride=stride), grid) == expected


def test_token_table_at_its_own_and_at_other_sizes():
    config = tiny.canvas_config(keyframes=3, grid=(4, 5))
    tokens = CanvasTokens(config, 8, rngs=nnx.Rngs(0))
    table = np.asarray(tokens.table[...])
    at_home = np.asarray(tokens(2, 3, 4, 5))
    np.testing.assert_array_equal(at_home, np.stack([table.reshape(-1, 8)] * 2))
    np.testing.assert_array_equal(tokens(1, 1, 4, 5), at_home[:1, :20])
    smaller = np.asarray(tokens(1, 3, 2, 3)).reshape(3, 2, 3, 8)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(table).permute(0, 3, 1, 2), size=(2, 3), mode='bilinear'
    ).permute(0, 2, 3, 1)
    assert tiny.error(smaller, theirs) <= 1e-6
