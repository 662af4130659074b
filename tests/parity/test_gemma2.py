"""Our Gemma-2 equals transformers' at random weights: its attention, every layer, the whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Gemma2Config as TheirConfig
from transformers import Gemma2Model
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm, eager_attention_forward

from metacanvas_jax.layers import rope
from metacanvas_jax.layers.attention import attend_capped
from metacanvas_jax.layers.norm import OffsetRmsNorm
from metacanvas_jax.text_encoders.gemma2 import FULL, SLIDING, Gemma2, Gemma2Config
from tests import tiny

WINDOW = 5
LENGTHS, SIZE = np.array([4, 17, 11]), 19  # below, far and a little above the window; padding
SIZES = dict(
    vocab_size=61,
    hidden_size=40,
    intermediate_size=56,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=14,  # neither 40 / 4 nor a square
    rms_norm_eps=1e-6,
    query_pre_attn_scalar=9,
    attn_logit_softcapping=1.5,  # low enough to bend these logits
    sliding_window=WINDOW,
)
ALTERNATING = (SLIDING, FULL) * 2


def _config(types=ALTERNATING, **changes) -> Gemma2Config:
    # 1e4 turns the later frequencies of a short prompt by next to nothing.
    return Gemma2Config(**{**SIZES, 'rope_theta': 1e2, 'layer_types': types, **changes})


@functools.cache
def _theirs(types=ALTERNATING, kv_heads: int = 2) -> Gemma2Model:
    """Every parameter is random; the norms' too, whose offsets are zero at init."""
    config = TheirConfig(
        **{**SIZES, 'num_key_value_heads': kv_heads},
        rope_parameters=dict(rope_type='default', rope_theta=1e2),
        layer_types=list(types),
        attn_implementation='eager',
    )
    model = Gemma2Model(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


@functools.cache
def _ours(types=ALTERNATING, kv_heads: int = 2) -> Gemma2:
    weights = {k: p.detach().numpy() for k, p in _theirs(types, kv_heads).named_parameters()}
    make = lambda: Gemma2(
        _config(types, num_key_value_heads=kv_heads), dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    arrays = {}
    for path in tiny.named(module := jax.eval_shape(make)):
        stem, _, kind = path.replace('/', '.').rpartition('.')
        name = f'{stem}.weight' if stem else f'{kind}.weight'
        names = [name.replace('layers', f'layers.{i}') for i in range(4)]
        found = [weights.pop(n) for n in (names if path.startswith('layers/') else [name])]
        found = [a.T if kind == 'kernel' else a for a in found]
        arrays[path] = np.stack(found) if path.startswith('layers/') else found[0]
    assert not weights, weights.keys()
    return tiny.fill(module, arrays)


def _ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, SIZES['vocab_size'], (len(LENGTHS), SIZE))


VALID = np.arange(SIZE) < LENGTHS[:, None]


def _run_theirs(model) -> tuple[list[np.ndarray], np.ndarray]:
    """What goes into each layer, and out of the last, and the states."""
    seen = []
    hooks = [
        layer.register_forward_hook(
            lambda layer, args, kwargs, out: seen.append((kwargs | {'x': args})['x'][0]),
            with_kwargs=True,
        )
        for layer in model.layers
    ]
    hooks.append(model.layers[-1].register_forward_hook(lambda layer, args, out: seen.append(out)))
    with torch.no_grad():
        mask = torch.tensor(VALID).long()
        states = model(torch.tensor(_ids()), attention_mask=mask).last_hidden_state
    for hook in hooks:
        hook.remove()
    return [x.numpy() for x in seen], states.numpy()


forward = jax.jit(lambda model, ids_BL: model(ids_BL))


# ---------------------------------------------------------------- the whole


@pytest.mark.parametrize(
    ('types', 'kv_heads'),
    [
        (ALTERNATING, 2),
        ((FULL, FULL, SLIDING, SLIDING), 1),
        ((SLIDING,) * 4, 4),
    ],
)
def test_the_whole(types, kv_heads):
    _, theirs = _run_theirs(_theirs(types, kv_heads))
    ours = forward(_ours(types, kv_heads), _ids())
    assert ours.dtype == jnp.float32
    assert tiny.error(ours[VALID], theirs[VALID]) <= 1e-5


def test_embeddings():
    ids = _ids()
    with torch.no_grad():
        theirs = _theirs().embed_tokens(torch.tensor(ids)).numpy()
    assert tiny.error(_ours().embed(ids), theirs) <= 1e-7


@pytest.mark.parametrize('i', range(4))
def test_every_layer(i):
    """Each from the reference's own input: no error hides behind the norms that follow."""
    seen, _ = _run_theirs(_theirs())
    back = np.arange(SIZE)[:, None] - np.arange(SIZE)
    window = WINDOW if ALTERNATING[i] == SLIDING else SIZE
    mask = (back >= 0) & (back < window) & VALID[:, None]
    layer = jax.tree.map(lambda a: a[i], _ours().layers)
    angles = rope.angles(jnp.arange(SIZE)[None], SIZES['head_dim'], 1e2)
    ours = layer(jnp.asarray(seen[i]), angles, mask)
    assert tiny.error(ours[VALID], seen[i + 1][VALID]) <= 1e-5


def test_padding_changes_nothing():
    model, ids = _ours(), _ids()
    whole = forward(model, ids)
    other = forward(model, np.where(VALID, ids, 7))
    np.testing.assert_array_equal(whole[VALID], other[VALID])
    for row, length in enumerate(LENGTHS):
        alone = forward(model, ids[row : row + 1, :length])
        assert tiny.error(whole[row, :length], alone[0]) <= 1e-6


@pytest.mark.parametrize('types', [(SLIDING,), (FULL,)])
def test_a_token_outside_the_window_is_not_seen(types):
    """One layer: position WINDOW sees 1 .. WINDOW, and 0 only where the layer sees all."""
    make = lambda rngs: Gemma2(_config(types, num_hidden_layers=1), dtype=jnp.float32, rngs=rngs)
    model, ids = tiny.randomised(make), np.arange(SIZE)[None]
    changed = np.where(ids == 0, 9, ids)
    a, b = (forward(model, x) for x in (ids, changed))
    moved = np.abs(np.asarray(a - b)).max(-1)[0] > 0
    assert moved[:WINDOW].all()
    assert moved[WINDOW:].any() == (types == (FULL,))


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize(('heads', 'kv_heads'), [(4, 2), (3, 1), (3, 3)])
@pytest.mark.parametrize('cap', [0.7, 50.0])
@pytest.mark.parametrize('window', [3, 100])
def test_attention_with_caps_and_windows(heads, kv_heads, cap, window):
    S, E, scale = 11, 6, 0.37
    q, k, v = (tiny.normal(2, S, n, E, seed=s) for s, n in enumerate((heads, kv_heads, kv_heads)))
    back = np.arange(S)[:, None] - np.arange(S)
    valid = np.arange(S) < np.array([7, 11])[:, None]
    mask = (back >= 0) & (back < window) & valid[:, None]
    module = torch.nn.Module()
    module.num_key_value_groups = heads // kv_heads
    heads_first = (torch.tensor(np.asarray(a)).transpose(1, 2) for a in (q, k, v))
    bias = torch.tensor(np.where(mask, 0, np.finfo(np.float32).min))[:, None].float()
    theirs, _ = eager_attention_forward(module, *heads_first, bias, scaling=scale, softcap=cap)
    ours = attend_capped(q, k, v, scale=scale, cap=cap, mask_BSL=mask)
    assert tiny.error(ours[valid], theirs.numpy()[valid]) <= 1e-5


def test_a_row_that_sees_nothing_is_finite():
    q = tiny.normal(1, 3, 2, 4)
    out = attend_capped(q, q, q, scale=1.0, cap=1.0, mask_BSL=np.zeros((1, 3, 3), bool))
    assert np.isfinite(out).all()


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_norm(dtype):
    """In bf16 to the bit: the reference rounds once, after the weight."""
    x, offset = 3 * tiny.normal(5, 40), 0.5 * tiny.normal(40, seed=1)
    norm = tiny.fill(OffsetRmsNorm(40, 1e-6), {'offset': np.asarray(offset)})
    theirs = Gemma2RMSNorm(40, 1e-6)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(np.asarray(offset)))
        want = theirs(torch.tensor(np.asarray(x)).to(getattr(torch, dtype))).float().numpy()
    got = norm(x.astype(dtype))
    assert got.dtype == dtype
    tolerance = 1e-6 if dtype == 'float32' else 0
    assert tiny.error(got, want) <= tolerance


# ---------------------------------------------------------------- bf16


def test_in_bf16():
    """As near to fp32 as the reference in bf16 is."""
    _, exact = _run_theirs(_theirs())
    half = Gemma2Model(_theirs().config).to(torch.bfloat16).eval()
    half.load_state_dict({k: p.to(torch.bfloat16) for k, p in _theirs().state_dict().items()})
    with torch.no_grad():
        mask = torch.tensor(VALID).long()
        theirs = half(torch.tensor(_ids()), attention_mask=mask).last_hidden_state.float().numpy()
    arrays = {k: np.asarray(a) for k, a in tiny.named(_ours()).items()}
    model = tiny.fill(Gemma2(_config(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), arrays)
    ours = forward(model, _ids())
    assert ours.dtype == jnp.bfloat16
    reference = tiny.error(theirs[VALID], exact[VALID])
    assert reference > 1e-4
    assert tiny.error(ours[VALID], exact[VALID]) <= 1.5 * reference


def test_the_factor_of_embeddings_is_rounded():
    """To the bit what transformers does: sqrt(4608) = 67.88 is 68 in bf16."""
    sizes = SIZES | dict(hidden_size=4608, intermediate_size=2, num_hidden_layers=1)
    config = _config((FULL,), **sizes)
    model = Gemma2(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    theirs = Gemma2Model(TheirConfig(**sizes)).to(torch.bfloat16).embed_tokens
    table = np.array(model.embed_tokens[...])
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(table))
        want = theirs(torch.tensor(_ids())).float().numpy()
    ours = model.embed(_ids())
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours.astype(jnp.float32), want)
