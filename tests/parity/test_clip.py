"""Our CLIP text model equals transformers' at random weights: layers, states, the pooled one."""

import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import convert
from metacanvas_jax.text_encoders.clip import Clip, end_of_text
from tests import published_encoders, tiny

EOS, SIZE = 60, 11  # the largest id, as in the published vocabulary
LENGTHS = np.array([11, 2, 6])


def ids() -> np.ndarray:
    """<bos> text <eos>, padded with further <eos>; one text has another special token in it."""
    found = np.random.default_rng(0).integers(3, EOS, (3, SIZE))
    found[:, 0] = 1
    found[np.arange(SIZE) >= LENGTHS[:, None] - 1] = EOS
    found[0, 4] = 2
    return found


@functools.cache
def theirs(eos: int = 2) -> Any:
    return published_encoders.clip(eos_token_id=eos)


@functools.cache
def ours(eos: int = 2) -> Clip:
    with tempfile.TemporaryDirectory() as folder:
        theirs(eos).save_pretrained(folder)
        model = convert.load('clip', folder)
    assert isinstance(model, Clip)
    return model


forward = jax.jit(lambda model, ids: model(ids))


def test_every_layer():
    """Each by itself, on what the reference's was given."""
    with torch.no_grad():
        states = theirs()(torch.tensor(ids()), output_hidden_states=True).hidden_states
    given = [state.numpy() for state in states]

    @jax.jit
    def run(model, given):
        layers = [jax.tree.map(lambda a, i=i: a[i], model.layers) for i in range(3)]
        return [layer(x) for layer, x in zip(layers, given, strict=True)]

    for found, expected in zip(run(ours(), given[:3]), given[1:], strict=True):
        assert tiny.error(found, expected) <= 1e-5


@pytest.mark.parametrize('eos', [2, EOS, 7])
def test_states_and_the_pooled_one(eos):
    """An id that no text has gives the first state, in the reference too."""
    tokens = ids()
    assert 7 not in tokens[1]
    with torch.no_grad():
        expected = theirs(eos)(torch.tensor(tokens))
    states, pooled = forward(ours(eos), tokens)
    assert tiny.error(states, expected.last_hidden_state) <= 1e-4
    assert tiny.error(pooled, expected.pooler_output) <= 1e-4
    if eos != 7:  # op by op: of one program the compiler makes either in its own way
        states, pooled = ours(eos)(tokens)
        np.testing.assert_array_equal(pooled, states[np.arange(3), LENGTHS - 1])


def test_the_end_of_a_text():
    """By the largest id where the config says 2, even where there is a 2; else by the first."""
    tokens = jnp.array([[1, 2, 9, 60, 60], [1, 60, 9, 2, 2]])
    assert end_of_text(tokens, 2).tolist() == [3, 1]
    assert end_of_text(tokens, 60).tolist() == [3, 1]
    assert end_of_text(tokens, 9).tolist() == [2, 2]


def test_no_token_sees_what_follows():
    tokens = ids()
    other = np.where(np.arange(SIZE) < LENGTHS[:, None], tokens, 5)
    (states, pooled), (others, again) = (forward(ours(), t) for t in (tokens, other))
    valid = np.arange(SIZE) < LENGTHS[:, None]
    np.testing.assert_array_equal(states[valid], others[valid])
    np.testing.assert_array_equal(pooled, again)
    short, _ = forward(ours(), tokens[:, :6])
    assert tiny.error(short, states[:, :6]) <= 1e-6
    with pytest.raises(AssertionError, match='CLIP reads 11 tokens, got 12'):
        ours()(np.zeros((1, 12), np.int32))


def test_in_bfloat16():
    """No further from fp32 than the reference."""
    with torch.no_grad():
        exact = theirs()(torch.tensor(ids())).pooler_output.numpy()
        half = published_encoders.clip().to(torch.bfloat16)
        reference = half(torch.tensor(ids())).pooler_output.float().numpy()
    make = lambda: Clip(ours().config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, _ = nnx.split(jax.eval_shape(make))
    model = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(ours())))
    _, pooled = forward(model, ids())
    assert pooled.dtype == jnp.bfloat16
    error, allowed = (np.sqrt(np.mean(np.square(x - exact))) for x in (pooled, reference))
    assert 1e-4 < error <= 1.5 * allowed
