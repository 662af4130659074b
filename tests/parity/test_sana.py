"""Our SANA, its parts, its sampler and the canvas block equal diffusers' at random weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.models.normalization import AdaLayerNormSingle as TheirAdaLayerNormSingle
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock
from flax import nnx

from metacanvas_jax.backbones.sana import QK_NORMS, Sana, SanaBlock, SanaConfig
from metacanvas_jax.canvas.fusion import CanvasBlock
from metacanvas_jax.flow.guidance import guided
from metacanvas_jax.flow.solver import SOLVERS
from metacanvas_jax.layers.timestep import AdaLayerNormSingle, sinusoid
from metacanvas_jax.types import Visual
from tests import published_sana, tiny

# ours -> theirs, where the names differ
NAMES = {
    'patch_embed': 'patch_embed.proj',
    'caption_projection.up': 'caption_projection.linear_1',
    'caption_projection.down': 'caption_projection.linear_2',
    'time_embed.linear_1': 'time_embed.emb.timestep_embedder.linear_1',
    'time_embed.linear_2': 'time_embed.emb.timestep_embedder.linear_2',
    'linear_1': 'emb.timestep_embedder.linear_1',
    'linear_2': 'emb.timestep_embedder.linear_2',
}


def _filled(make, theirs: torch.nn.Module, *, prefix: str = '', spare: tuple[str, ...] = ()):
    """Ours with their weights: linears transposed, convolutions channels last, layers stacked.

    Every one of theirs is used, but those that start with one of `spare`; `prefix` stands before
    the names of their attention.
    """
    weights = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    used = set()

    def find(name: str) -> np.ndarray:
        module, _, kind = name.rpartition('.')
        module = NAMES.get(module, module)
        if module.endswith('to_out'):
            module += '.0'
        their_kind = {'kernel': 'weight', 'scale': 'weight'}.get(kind, kind)
        full = '.'.join(filter(None, (module, their_kind)))
        if prefix and full.startswith('to_'):
            full = prefix + full
        value = weights[full]
        used.add(full)
        if kind != 'kernel':
            return value
        if value.ndim == 4 and full.startswith('patch_embed'):
            return value.transpose(2, 3, 1, 0).reshape(-1, len(value))  # (p q C) -> D
        if 'conv_depth' in full:
            return value[:, 0].transpose(1, 2, 0)
        return value.reshape(len(value), -1).T

    module = jax.eval_shape(lambda: make(nnx.Rngs(0)))
    arrays = {}
    for path, shape in tiny.named(module).items():
        name = path.replace('/', '.')
        if name.startswith('transformer_blocks.'):
            layers = (
                name.replace('transformer_blocks', f'transformer_blocks.{i}')
                for i in range(shape.shape[0])
            )
            arrays[path] = np.stack([find(layer) for layer in layers])
        else:
            arrays[path] = find(name)
    left = {name for name in weights if name not in used and not name.startswith(spare)}
    assert not left, left
    return tiny.fill(module, arrays)


def _torch(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x))


def _bias(length_B, size: int) -> torch.Tensor:
    """diffusers' mask of padding: an additive bias."""
    valid = np.arange(size) < np.asarray(length_B)[:, None]
    return torch.tensor(np.where(valid, 0, -10000.0), dtype=torch.float32)[:, None]


@functools.cache
def _their_block(qk_norm: str | None):
    block = SanaTransformerBlock(
        dim=64,
        num_attention_heads=2,
        attention_head_dim=32,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        attention_bias=False,
        mlp_ratio=2.5,
        qk_norm=qk_norm,
    )
    return published_sana.randomise(block)


# Small enough for the epsilon of the norms to be seen.
X, TIME = 0.01 * tiny.normal(2, 3, 5, 64), tiny.normal(2, 6, 64, seed=1)
CONTEXT, LENGTH = tiny.normal(2, 7, 64, seed=2), np.array([4, 7])
BLOCK = SanaConfig(
    in_channels=1,
    num_attention_heads=2,
    attention_head_dim=32,
    num_layers=1,
    num_cross_attention_heads=4,
    caption_channels=1,
    mlp_ratio=2.5,
    patch_size=1,
    qk_norm=None,
)


@pytest.mark.parametrize('qk_norm', QK_NORMS)
def test_block(qk_norm):
    config = dataclasses.replace(BLOCK, qk_norm=qk_norm)
    block = _filled(lambda rngs: SanaBlock(config, None, rngs=rngs), _their_block(qk_norm))
    with torch.no_grad():
        theirs = _their_block(qk_norm)(
            _torch(X).reshape(2, 15, 64),
            encoder_hidden_states=_torch(CONTEXT),
            encoder_attention_mask=_bias(LENGTH, 7),
            timestep=_torch(TIME).reshape(2, -1),
            height=3,
            width=5,
        )
    found = jax.jit(lambda *args: block(*args))(X, TIME, CONTEXT, LENGTH)
    assert tiny.error(found.reshape(2, 15, 64), theirs) <= 1e-5


def test_canvas_block_is_the_block_without_cross_attention():
    """The second norm stays (spec.md section 3.3)."""
    theirs = published_sana.randomise(_their_block(None), seed=3)
    with torch.no_grad():
        for parameter in theirs.attn2.to_out.parameters():
            parameter.zero_()
        expected = theirs(
            _torch(X).reshape(2, 15, 64),
            encoder_hidden_states=_torch(CONTEXT),
            timestep=_torch(TIME).reshape(2, -1),
            height=3,
            width=5,
        )
    block = _filled(
        lambda rngs: CanvasBlock(64, rngs=rngs), theirs, prefix='attn1.', spare=('attn2.',)
    )
    found = jax.jit(lambda *args: block(*args))(X, TIME)
    assert tiny.error(found.reshape(2, 15, 64), expected) <= 1e-5
    _their_block.cache_clear()


def test_time_embedding():
    """Ours takes 0..1, theirs 0..1000; six modulations and the embedding itself."""
    theirs = published_sana.randomise(TheirAdaLayerNormSingle(64))
    ours = _filled(lambda rngs: AdaLayerNormSingle(64, rngs=rngs), theirs)
    t = np.array([0.0, 0.001, 0.25, 0.5, 0.999, 1.0], np.float32)
    with torch.no_grad():
        expected, embedding = theirs(torch.tensor(1000 * t), hidden_dtype=torch.float32)
        sines = theirs.emb.time_proj(torch.tensor(1000 * t))
    found, found_embedding = ours(jnp.asarray(t), jnp.float32)
    # In fp32 an angle of 1000 is known to 6e-5, whoever computes it.
    distance = np.abs(sinusoid(1000 * jnp.asarray(t)) - sines.numpy()).max(1)
    assert (distance <= np.spacing(1000 * t) + 2e-7).all()
    assert tiny.error(found.reshape(6, -1), expected) <= 1e-5
    assert tiny.error(found_embedding, embedding) <= 1e-5


# ------------------------------------------------------------ the whole model

Z, CAPTION = tiny.normal(2, 1, 4, 6, 4), tiny.normal(2, 7, 24, seed=1)  # neither is square


FIELDS = [field.name for field in dataclasses.fields(SanaConfig)]
CONFIGS = {
    name: SanaConfig(**{field: sizes.get(field) for field in FIELDS})
    for name, sizes in published_sana.CONFIGS.items()
}


def _make(name: str):
    return lambda rngs: Sana(CONFIGS[name], remat='none', dtype=jnp.float32, rngs=rngs)


@functools.cache
def _whole(name: str):
    theirs = published_sana.reference(name)
    return _filled(_make(name), theirs), theirs


def _their_velocity(theirs, z_B1HWC, timesteps_B, caption_BLD, length_B) -> np.ndarray:
    mask = np.arange(caption_BLD.shape[1]) < np.asarray(length_B)[:, None]
    out = theirs(
        _torch(z_B1HWC[:, 0]).permute(0, 3, 1, 2),
        encoder_hidden_states=_torch(caption_BLD),
        timestep=torch.as_tensor(timesteps_B),
        encoder_attention_mask=torch.tensor(mask).float(),
    )
    return out.sample.permute(0, 2, 3, 1)[:, None]


@jax.jit
def velocity(model, z_B1HWC, t_B, caption_BLD, length_B):
    patches = model.patchify(z_B1HWC, Visual(clean_BT=jnp.zeros((len(z_B1HWC), 1))))
    return model.velocity(patches, t_B[:, None], caption_BLD, length_B)


@pytest.mark.parametrize('name', CONFIGS)
def test_whole_model(name):
    """A time for each sample, the whole numbers that the sampler tells among them."""
    model, theirs = _whole(name)
    for timesteps in ([200.0, 900.5], [999, 136], [0, 1]):
        t = jnp.asarray(timesteps) / 1000
        with torch.no_grad():
            expected = _their_velocity(theirs, Z, timesteps, CAPTION, LENGTH)
        found = velocity(model, Z, t, CAPTION, LENGTH)
        assert tiny.error(found, expected) <= 1e-4
        assert found.dtype == jnp.float32
        # What stands behind a caption's end is never read.
        other = velocity(model, Z, t, CAPTION.at[0, 4:].set(9.0), LENGTH)
        np.testing.assert_array_equal(other, found)


@pytest.mark.parametrize('name', CONFIGS)
def test_every_block_of_the_whole(name):
    """Each on what the reference's block was given."""
    model, theirs = _whole(name)
    seen, hooks = [], []
    for block in theirs.transformer_blocks:
        hooks += [block.register_forward_hook(lambda _, args, out: seen.append((*args, out)))]
    with torch.no_grad():
        _their_velocity(theirs, Z, [982, 17], CAPTION, LENGTH)
    for hook in hooks:
        hook.remove()
    assert len(seen) == 3
    run = jax.jit(lambda block, *args: block(*args))
    for i, (x, _, context, _, time, h, w, out) in enumerate(seen):
        block = jax.tree.map(lambda a, i=i: a[i], model.transformer_blocks)
        x_BhwD = x.numpy().reshape(2, h, w, -1)
        found = run(block, x_BhwD, time.numpy().reshape(2, 6, -1), context.numpy(), LENGTH)
        assert tiny.error(found.reshape(out.shape), out) <= 1e-5


@pytest.mark.parametrize('name', ['1.0', '1.5'])
def test_gradients(name):
    """Of every parameter."""
    model, theirs = _whole.__wrapped__(name)
    weight = np.asarray(tiny.normal(*Z.shape, seed=5))
    their_v = _their_velocity(theirs, Z, [750, 250], CAPTION, LENGTH)
    (their_v * torch.tensor(weight)).sum().backward()
    t = jnp.array([0.75, 0.25])
    loss = lambda model: (velocity(model, Z, t, CAPTION, LENGTH) * weight).sum()
    found = tiny.named(jax.jit(jax.grad(loss))(model))
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    expected = tiny.named(_filled(_make(name), theirs))
    if name == '1.0':  # softmax does not see it: noise
        size = np.abs(expected['transformer_blocks/attn2/to_q/bias']).max()
        for gradients in (found, expected):
            noise = gradients.pop('transformer_blocks/attn2/to_k/bias')
            assert np.abs(noise).max() <= 1e-5 * size
    for path, gradient in found.items():
        assert tiny.error(gradient, expected[path]) <= 1e-4, path


@pytest.mark.parametrize('name', ['1.0', '1.5'])
def test_sampling(name):
    """20 steps of guided DPM-Solver++ as in SanaPipeline, the whole of ours one program."""
    model, theirs = _whole(name)
    z_1, empty = tiny.normal(1, 1, 4, 6, 4, seed=7), tiny.normal(1, 7, 24, seed=8)
    pair = np.concatenate([empty, CAPTION[:1]])
    scheduler = DPMSolverMultistepScheduler(**published_sana.SCHEDULER)
    scheduler.set_timesteps(20)
    z = _torch(z_1)
    with torch.no_grad():
        for t in scheduler.timesteps:
            timesteps = t.expand(2) * theirs.config.timestep_scale
            both = _their_velocity(theirs, torch.cat([z, z]), timesteps, pair, [2, 4])
            negative, positive = both.chunk(2)
            v = negative + 4.5 * (positive - negative)
            z = scheduler.step(v, t, z, return_dict=False)[0]

    @jax.jit
    def sample(model, z_1):
        def plain(z, t, plan):
            return velocity(model, z, jnp.full(len(z), t), *plan)

        plans = (CAPTION[:1], jnp.array([4])), (empty, jnp.array([2]))
        solver = SOLVERS['dpm++2m']
        return solver.solve(guided(plain, *plans, 4.5), z_1, solver.times(20, 3.0))

    assert tiny.error(sample(model, z_1), z) <= 1e-4
