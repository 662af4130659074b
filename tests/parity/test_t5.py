"""The encoders of T5 v1.1 and UMT5 equal transformers' at random weights."""

import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.t5.modeling_t5 import T5Attention

import convert
from metacanvas_jax.text_encoders.t5 import T5, bucket, spread
from metacanvas_jax.types import EncoderPrompt
from tests import published_encoders, tiny

KINDS = list(published_encoders.T5S)
# The last bucket begins at 20 tokens.
LENGTHS, SIZE = np.array([50, 7, 23]), 50
VALID = np.arange(SIZE) < LENGTHS[:, None]
IDS = np.random.default_rng(0).integers(3, 61, (3, SIZE))


@functools.cache
def theirs(kind: str) -> Any:
    return published_encoders.t5(kind)


@functools.cache
def ours(kind: str) -> T5:
    with tempfile.TemporaryDirectory() as folder:
        theirs(kind).save_pretrained(folder)
        model = convert.load(kind, folder)
    assert isinstance(model, T5)
    return model


def states(kind: str, ids=IDS, lengths=LENGTHS) -> np.ndarray:
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    with torch.no_grad():
        out = theirs(kind)(torch.tensor(ids), attention_mask=torch.tensor(mask).long())
    return out.last_hidden_state.numpy()


forward = jax.jit(lambda model, ids, length_B: model(ids, length_B))


# ------------------------------------------------------------ distances


@pytest.mark.parametrize(
    ('buckets', 'furthest'), [(32, 128), (8, 20), (4, 2), (32, 100), (20, 33), (64, 1000), (6, 9)]
)
def test_buckets_of_distances(buckets, furthest):
    """Far beyond the last one, too."""
    distances = np.arange(-3000, 3001)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(distances), bidirectional=True, num_buckets=buckets, max_distance=furthest
    ).tolist()
    assert [bucket(int(d), buckets, furthest) for d in distances] == expected
    assert len(set(expected)) <= buckets


def test_the_bias_of_a_query_and_a_key():
    """Rows are queries; a key that follows is in the upper half of the table."""
    table = tiny.normal(8, 3)
    rows = np.array([bucket(d, 8, 20) for d in range(-4, 5)])
    bias_NSL = spread(table, rows, 5)
    assert bias_NSL.shape == (3, 5, 5)
    for s, l in np.ndindex(5, 5):
        np.testing.assert_array_equal(bias_NSL[:, s, l], table[bucket(l - s, 8, 20)])
    assert bucket(1, 8, 20) == 5
    assert bucket(-1, 8, 20) == 1


# ------------------------------------------------------------ the encoder


@pytest.mark.parametrize('kind', KINDS)
def test_every_block(kind):
    """Each by itself, on what the reference's was given."""
    given, expected = [], []

    def hook(_, args, out):
        given.append(args[0].numpy())
        expected.append((out if torch.is_tensor(out) else out[0]).numpy())

    hooks = [block.register_forward_hook(hook) for block in theirs(kind).encoder.block]
    states(kind)
    for handle in hooks:
        handle.remove()
    assert len(given) == 3

    @jax.jit
    def run(model, given):
        rows = np.array([bucket(d, 8, 20) for d in range(1 - SIZE, SIZE)])
        tables = model.relative_attention_bias.tables()
        blocks = [jax.tree.map(lambda a, i=i: a[i], model.block) for i in range(3)]
        return [
            block(x, spread(table, rows, SIZE), LENGTHS)
            for block, x, table in zip(blocks, given, tables, strict=True)
        ]

    for found, want in zip(run(ours(kind), given), expected, strict=True):
        assert tiny.error(found[VALID], want[VALID]) <= 1e-5


@pytest.mark.parametrize('kind', KINDS)
def test_states(kind):
    """Of unequal lengths, and where padding is read as text: FLUX gives no mask."""
    found = forward(ours(kind), IDS, LENGTHS)
    assert tiny.error(found[VALID], states(kind)[VALID]) <= 1e-4
    assert not np.any(found[~VALID])
    whole = np.full(3, SIZE)
    assert tiny.error(forward(ours(kind), IDS, whole), states(kind, IDS, whole)) <= 1e-4
    for i, length in enumerate(LENGTHS):  # alone, without padding
        alone = states(kind, IDS[i : i + 1, :length], LENGTHS[i : i + 1])
        assert tiny.error(found[i, :length], alone[0]) <= 1e-4
    # Another padding changes no bit.
    other = forward(ours(kind), np.where(VALID, IDS, 5), LENGTHS)
    np.testing.assert_array_equal(found, other)


def test_blocks_of_umt5_have_their_own_biases():
    tables = {kind: ours(kind).relative_attention_bias.tables() for kind in KINDS}
    assert tables['t5'].shape == tables['umt5'].shape == (3, 8, 3)
    assert np.all(tables['t5'] == tables['t5'][0])
    assert np.all(tables['umt5'][0] != tables['umt5'][1])


def test_what_the_dit_gets():
    """Wan's: all of the padded row, zeros behind the text."""
    prompt = EncoderPrompt(
        ids_BU=IDS,
        length_B=LENGTHS,
        taken_BL=np.tile(np.arange(8), (3, 1)),
        context_length_B=np.full(3, 8),
    )
    found = jax.jit(lambda model, prompt: model.context(prompt))(ours('umt5'), prompt)
    context, length_B = found.states_BLD, found.length_B
    assert tiny.error(context[VALID[:, :8]], states('umt5')[:, :8][VALID[:, :8]]) <= 1e-4
    assert not np.any(context[1, 7])
    assert length_B.tolist() == [8, 8, 8]


@pytest.mark.parametrize('kind', KINDS)
def test_in_bfloat16(kind):
    """No further from fp32 than the reference, which has bf16 logits too."""
    exact = states(kind)[VALID]
    half = published_encoders.t5(kind).to(torch.bfloat16)
    with torch.no_grad():
        mask = torch.tensor(VALID).long()
        reference = half(torch.tensor(IDS), attention_mask=mask).last_hidden_state
    model = ours(kind)
    make = lambda: T5(model.config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, _ = nnx.split(jax.eval_shape(make))
    model = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.bfloat16), nnx.state(model)))
    found = forward(model, IDS, LENGTHS)
    assert found.dtype == jnp.bfloat16
    error, allowed = (
        np.sqrt(np.mean(np.square(x[VALID] - exact)))
        for x in (np.asarray(found, np.float32), reference.float().numpy())
    )
    assert 1e-4 < error <= 1.5 * allowed
