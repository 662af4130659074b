"""Our Wan equals diffusers' at random weights: blocks, times, texts, references, sampling."""

import dataclasses
import functools
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from flax import nnx

import convert
from metacanvas_jax.backbones.wan import THETA, Wan, widen
from metacanvas_jax.flow.given import holding, impose
from metacanvas_jax.flow.guidance import guided
from metacanvas_jax.flow.solver import SOLVERS
from metacanvas_jax.layers.rope import grid_rotary
from metacanvas_jax.types import InputError, Visual
from tests import published, published_wan, tiny

CHANNELS, WORDS, TEXT = 5, 7, published_wan.SIZES['text_dim']
T, H, W = 3, 6, 10  # no two alike, 3 rows and 5 columns of tokens
Z, CONTEXT = tiny.normal(2, T, H, W, CHANNELS), tiny.normal(2, WORDS, TEXT, seed=1)
FULL = np.array([WORDS, WORDS])


@functools.cache
def _theirs(name: str):
    return published_wan.reference(name)


@functools.cache
def _ours(name: str):
    """Through the files; tests/test_convert_wan.py says by hand what goes where."""
    with tempfile.TemporaryDirectory() as folder:
        return convert.load('wan', str(published_wan.save(pathlib.Path(folder), name)))


def _torch(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x))


def _their_velocity(name: str, x_BTHWC, timesteps, context_BLD) -> torch.Tensor:
    """`timesteps` in 0..1000: (B,), or (B, T), which the reference wants for every token."""
    timesteps = torch.as_tensor(np.asarray(timesteps, np.float32))
    if timesteps.ndim == 2:
        p = _theirs(name).config.patch_size[1]
        tokens = (x_BTHWC.shape[2] // p) * (x_BTHWC.shape[3] // p)
        timesteps = timesteps.repeat_interleave(tokens, 1)
    out = _theirs(name)(_torch(x_BTHWC).permute(0, 4, 1, 2, 3), timesteps, _torch(context_BLD))
    return out.sample.permute(0, 2, 3, 4, 1)


@jax.jit
def velocity(model, z_BTHWC, t_BT, context_BLD, context_length_B, visual):
    return model.velocity(model.patchify(z_BTHWC, visual), t_BT, context_BLD, context_length_B)


def _velocity(model, z_BTHWC, timesteps_BT, context_BLD=CONTEXT, length_B=FULL, **visual):
    t_BT = jnp.broadcast_to(jnp.asarray(timesteps_BT, jnp.float32) / 1000, z_BTHWC.shape[:2])
    seen = Visual(clean_BT=jnp.zeros(z_BTHWC.shape[:2]), **visual)
    return velocity(model, z_BTHWC, t_BT, context_BLD, length_B, seen)


# ------------------------------------------------------------ places


@pytest.mark.parametrize('width', [128, 20, 16])
def test_rotary_tables(width):
    """Far out too, where angles in fp32 would be too coarse."""
    third = 2 * (width // 6)
    theirs = WanRotaryPosEmbed(width, (1, 2, 2), 1024)(torch.zeros(1, 1, 2, 2046, 6))
    found = grid_rotary((2, 1023, 3), (width - 2 * third, third, third), THETA)
    for table, expected in zip(found, theirs, strict=True):
        np.testing.assert_allclose(table.repeat(2, 1), expected[0, :, 0], rtol=0, atol=1e-7)


# ------------------------------------------------------------ times


@torch.no_grad()
def test_one_time_for_all_frames():
    """That of the reference for pictures and for text to video; whole numbers among them."""
    for timesteps in ([200.0, 900.5], [999, 95], [0, 1]):
        expected = _their_velocity('narrow', Z, timesteps, CONTEXT)
        found = _velocity(_ours('narrow'), Z, np.array(timesteps)[:, None])
        assert found.dtype == jnp.float32
        assert tiny.error(found, expected) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    'timesteps', [[[0, 937, 937], [412, 412, 412]], [[3, 500, 999], [0, 0, 7]]]
)
def test_a_time_for_each_frame(timesteps):
    """The reference gets them for every token (I15)."""
    expected = _their_velocity('narrow', Z, timesteps, CONTEXT)
    assert tiny.error(_velocity(_ours('narrow'), Z, timesteps), expected) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize('name', ['narrow', 'patches of 1'])
def test_pictures(name):
    z = Z[:, :1, :4]
    expected = _their_velocity(name, z, [750, 250], CONTEXT)
    assert tiny.error(_velocity(_ours(name), z, [[750], [250]]), expected) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize('timesteps', [[982, 17], [[0, 982, 982], [17, 17, 0]]])
def test_every_block_of_the_whole(timesteps):
    """Each on what the reference's block was given."""
    seen, hooks = [], []
    for block in _theirs('narrow').blocks:
        hooks += [block.register_forward_hook(lambda _, args, out: seen.append((*args, out)))]
    _their_velocity('narrow', Z, timesteps, CONTEXT)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3
    model = _ours('narrow')
    rotary = grid_rotary((T, 3, 5), model.config.rotary_widths, THETA)
    run = jax.jit(lambda block, *args: block(*args))
    for i, (x, context, time, _, out) in enumerate(seen):
        block = jax.tree.map(lambda a, i=i: a[i], model.blocks)
        time = time[:, None, None] if time.ndim == 3 else time.unflatten(1, (T, 15))
        time = jnp.broadcast_to(time[:, :, 0].numpy(), (2, T, 6, 60))
        found = run(block, x.numpy().reshape(2, T, 15, 60), time, rotary, context.numpy(), FULL)
        assert tiny.error(found.reshape(out.shape), out) <= 1e-5


# ------------------------------------------------------------ texts


@torch.no_grad()
def test_texts_of_unequal_length():
    """As the reference computes each alone; what stands behind an end is never read."""
    timesteps, lengths = np.array([[0, 900, 900], [300, 300, 300]]), np.array([7, 3])
    found = _velocity(_ours('narrow'), Z, timesteps, length_B=lengths)
    for b, length in enumerate(lengths):
        one = slice(b, b + 1)
        expected = _their_velocity('narrow', Z[one], timesteps[one], CONTEXT[one, :length])
        assert tiny.error(found[one], expected) <= 1e-4
    other = CONTEXT.at[1, 3:].set(9.0)
    np.testing.assert_array_equal(
        _velocity(_ours('narrow'), Z, timesteps, other, length_B=lengths), found
    )


@torch.no_grad()
def test_context_at_the_width_of_the_dit():
    """Without a text embedder: what the reference's gives, given."""
    model, width = _without_text_embedder(_ours('narrow')), 60
    assert (model.context_width, _ours('narrow').context_width) == (width, TEXT)
    embedded = _theirs('narrow').condition_embedder.text_embedder(_torch(CONTEXT)).numpy()
    expected = _their_velocity('narrow', Z, [400, 800], CONTEXT)
    found = _velocity(model, Z, [[400], [800]], embedded)
    assert tiny.error(found, expected) <= 1e-4


def _without_text_embedder(model: Wan) -> Wan:
    config = dataclasses.replace(model.config, text_embedder='none')
    make = lambda: Wan(config, remat='full', dtype=jnp.float32, rngs=nnx.Rngs(0))
    arrays = {k: v for k, v in tiny.named(model).items() if not k.startswith('text_embedder/')}
    return tiny.fill(jax.eval_shape(make), arrays)


# ------------------------------------------------------------ references and conditions

REFERENCES = tiny.normal(2, 2, H, W, CHANNELS, seed=3)
CONDITION = tiny.normal(2, T, H, W, CHANNELS, seed=4)
MASK = jnp.asarray(np.random.default_rng(5).integers(0, 2, (2, T, H, W, 4)), jnp.float32)
TIMES = np.array([[0, 700, 700], [130, 130, 130]])


def _channels(z, condition, mask):
    return np.concatenate([np.asarray(a) for a in (z, condition, mask)], -1)


@torch.no_grad()
@pytest.mark.parametrize('references', [0, 2])
def test_conditions_and_references(references):
    """[noisy | condition | mask] in channels, clean slots in front; their velocity is cut off."""
    z_ref = REFERENCES[:, :references]
    slots = _channels(z_ref, z_ref, np.ones((*z_ref.shape[:-1], 4)))
    for condition, mask in ((CONDITION, MASK), (CONDITION, None), (None, None)):
        shape = Z.shape[:-1]
        y = np.zeros((*shape, CHANNELS)) if condition is None else condition
        m = np.zeros((*shape, 4)) if mask is None else mask
        x = np.concatenate([slots, _channels(Z, y, m)], 1).astype(np.float32)
        timesteps = np.pad(TIMES, ((0, 0), (references, 0)))
        expected = _their_velocity('wide', x, timesteps, CONTEXT)[:, references:]
        visual = dict(condition_BTHWC=condition, mask_BTHW4=mask)
        if references:
            visual |= dict(references_BRHWC=z_ref)
        found = _velocity(_ours('wide'), Z, TIMES, **visual)
        assert found.shape == Z.shape
        assert tiny.error(found, expected) <= 1e-4


def test_a_widened_model_says_what_it_said():
    """I2, to the bit, for any condition and mask."""
    narrow = _ours('narrow')
    wide = widen(narrow)
    assert wide.config == _ours('wide').config
    assert narrow.config.in_channels == CHANNELS
    for path, value in tiny.named(narrow).items():
        assert tiny.named(wide)[path] is value
    expected = _velocity(narrow, Z, TIMES)
    for mask in (MASK, None):
        found = _velocity(wide, Z, TIMES, condition_BTHWC=1e3 * CONDITION, mask_BTHW4=mask)
        np.testing.assert_array_equal(found, expected)
    # And it can learn to look.
    gradient = jax.grad(
        lambda wide: _velocity(wide, Z, TIMES, condition_BTHWC=CONDITION, mask_BTHW4=MASK).sum()
    )(wide)
    assert np.all(np.any(tiny.named(gradient)['condition_embedding/linear/kernel'], 1))


def test_a_narrow_model_sees_no_conditions():
    for visual in (dict(condition_BTHWC=CONDITION), dict(references_BRHWC=REFERENCES)):
        with pytest.raises(InputError, match=r'a Wan of 5 input channels .*; widen it first'):
            _velocity(_ours('narrow'), Z, TIMES, **visual)


# ------------------------------------------------------------ learning and sampling


def test_gradients():
    """Of every parameter."""
    theirs, model = _theirs('wide'), _ours('wide')
    weight = np.asarray(tiny.normal(*Z.shape, seed=6))
    x = _channels(Z, CONDITION, MASK)
    loss = (_their_velocity('wide', x, TIMES, CONTEXT) * torch.tensor(weight)).sum()
    names, parameters = zip(*theirs.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    visual = dict(condition_BTHWC=CONDITION, mask_BTHW4=MASK)
    found = jax.grad(lambda model: (_velocity(model, Z, TIMES, **visual) * weight).sum())(model)
    with tempfile.TemporaryDirectory() as folder:
        convert.export('wan', found, pathlib.Path(folder, 'gradients'))
        ours = published.tensors(pathlib.Path(folder, 'gradients'))
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert tiny.error(ours[name], gradient) <= 1e-4, name


def test_sampling():
    """Guided UniPC from a given first frame, as in diffusers; the whole of ours one program."""
    z_1, first = (
        tiny.normal(1, T, H, W, CHANNELS, seed=7),
        tiny.normal(1, 1, H, W, CHANNELS, seed=8),
    )
    clean_BT, given = jnp.array([[1.0, 0, 0]]), jnp.pad(first, ((0, 0), (0, T - 1), *[(0, 0)] * 3))
    scheduler = UniPCMultistepScheduler(**published_wan.SCHEDULER)
    scheduler.set_timesteps(8)
    z = _torch(z_1)
    with torch.no_grad():
        for t in scheduler.timesteps:
            seen = torch.cat([_torch(first), z[:, 1:]], 1)
            negative, positive = (
                _their_velocity('narrow', seen, [[0, t, t]], CONTEXT[b : b + 1]) for b in (1, 0)
            )
            v = negative + 4.5 * (positive - negative)
            z = scheduler.step(v, t, z, return_dict=False)[0]
        z = torch.cat([_torch(first), z[:, 1:]], 1)

    @jax.jit
    def sample(model, z_1):
        def plain(z, t_BT, context):
            patches = model.patchify(z, Visual(clean_BT=clean_BT))
            return model.velocity(patches, t_BT, context, jnp.full(len(z), WORDS))

        solver, velocity = SOLVERS['unipc'], holding(plain, given, clean_BT)
        velocity = guided(velocity, CONTEXT[:1], CONTEXT[1:], 4.5)
        z = solver.solve(velocity, impose(z_1, given, clean_BT), solver.times(8, 5.0))
        return impose(z, given, clean_BT)

    found = sample(_ours('narrow'), z_1)
    assert tiny.error(found, z) <= 1e-4
    np.testing.assert_array_equal(found[:, :1], first)
