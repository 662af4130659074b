"""Our FLUX, its parts and its sampler equal diffusers' at random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift
from flax import nnx

from metacanvas_jax.backbones.flux import Flux, FluxConfig, rotation
from metacanvas_jax.flow.solver import SOLVERS
from metacanvas_jax.flow.times import dynamic_shift
from metacanvas_jax.layers.rope import rotate_pairs
from metacanvas_jax.types import Visual
from tests import published_flux, tiny

CONFIG = FluxConfig(
    **{k: v for k, v in published_flux.SIZES.items() if k not in ('patch_size', 'guidance_embeds')}
)
# ours -> theirs, where the names differ
NAMES = {
    'ff.up': 'ff.net.0.proj',
    'ff.down': 'ff.net.2',
    'ff_context.up': 'ff_context.net.0.proj',
    'ff_context.down': 'ff_context.net.2',
    'attn.to_out': 'attn.to_out.0',
    'embedder.up': 'embedder.linear_1',
    'embedder.down': 'embedder.linear_2',
}
STACKS = ('single_transformer_blocks.', 'transformer_blocks.')


def _filled(theirs: torch.nn.Module) -> Flux:
    """Ours with their weights, every one of them used."""
    weights = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    used = set()

    def find(name: str) -> np.ndarray:
        module, _, kind = name.rpartition('.')
        for mine, their in NAMES.items():
            if module.endswith(mine):
                module = module.removesuffix(mine) + their
        full = f'{module}.{ {"kernel": "weight", "scale": "weight"}.get(kind, kind) }'
        used.add(full)
        return weights[full].T if kind == 'kernel' else weights[full]

    make = lambda: Flux(CONFIG, remat='none', dtype=jnp.float32, rngs=nnx.Rngs(0))
    module = jax.eval_shape(make)
    arrays = {}
    for path, shape in tiny.named(module).items():
        name = path.replace('/', '.')
        prefix = next((p for p in STACKS if name.startswith(p)), None)
        if prefix is None:
            arrays[path] = find(name)
        else:
            layers = (f'{prefix}{i}.{name.removeprefix(prefix)}' for i in range(shape.shape[0]))
            arrays[path] = np.stack([find(layer) for layer in layers])
    assert used == weights.keys(), used ^ weights.keys()
    return tiny.fill(module, arrays)


@pytest.fixture(scope='module')
def theirs():
    return published_flux.reference()


@pytest.fixture(scope='module')
def ours(theirs):
    return _filled(theirs)


def _layer(blocks, i: int):
    return jax.tree.map(lambda a: a[i], blocks)


# ------------------------------------------------------------ positions


def test_rotation_is_that_of_the_reference():
    """To the last bit, for positions that no fp32 angle gives: of rows and columns up to 97."""
    grids, text, axes = [(3, 97), (98, 2), (5, 4)], 7, (16, 56, 56)
    cos, sin = rotation(grids, text, axes)
    ids = [published_flux.picture_ids(i, h, w) for i, (h, w) in enumerate(grids)]
    their_cos, their_sin = FluxPosEmbed(10000, list(axes))(torch.cat([*ids, torch.zeros(7, 3)]))
    np.testing.assert_array_equal(cos.repeat(2, 1), their_cos)
    np.testing.assert_array_equal(sin.repeat(2, 1), their_sin)
    assert (cos.dtype, sin.dtype) == (np.float32, np.float32)
    np.testing.assert_array_equal(cos[-text:], 1)
    np.testing.assert_array_equal(sin[-text:], 0)


def test_pairs_turn():
    """By their angle, and nothing else of them changes."""
    x = np.asarray(tiny.normal(2, 5, 3, 8), np.float64)
    angle = np.random.default_rng(0).normal(size=(5, 4))
    cos, sin = (np.asarray(f(angle), np.float32) for f in (np.cos, np.sin))
    found = rotate_pairs(jnp.asarray(x, jnp.float32), cos, sin)
    turned = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
    assert tiny.error(found[..., ::2], turned.real) <= 1e-6
    assert tiny.error(found[..., 1::2], turned.imag) <= 1e-6
    assert rotate_pairs(jnp.asarray(x, jnp.bfloat16), cos, sin).dtype == jnp.bfloat16


# ------------------------------------------------------------ the whole model

# Nothing is square, the pictures have sizes of their own, and the captions unequal lengths.
Z = tiny.normal(2, 1, 6, 10, 4)
CONTEXT = {
    'dev': (),
    'Kontext': (tiny.normal(2, 8, 4, 4, seed=1),),
    'two context images': (tiny.normal(2, 8, 4, 4, seed=1), tiny.normal(2, 2, 6, 4, seed=2)),
}
TEXT, LENGTH = tiny.normal(2, 7, 24, seed=3), np.array([4, 7])
POOLED, GUIDANCE = tiny.normal(2, 20, seed=4), jnp.array([3.5, 1.0])
TIME = jnp.array([0.2, 0.9005])


def _visual(context=()) -> Visual:
    return Visual(
        clean_BT=jnp.zeros((2, 1)), context_images=context, guidance_B=GUIDANCE, pooled_BD=POOLED
    )


@jax.jit
def velocity(model, z, t_B, visual, text_BLD, length_B):
    return model.velocity(model.patchify(z, visual), t_B[:, None], text_BLD, length_B)


def _theirs(model, z, t_B, context=()) -> torch.Tensor:
    """Sample by sample, each with its own text and no padding."""
    samples = []
    for b, length in enumerate(LENGTH):
        given = (np.asarray(a)[b] for a in (GUIDANCE, POOLED))
        text, pictures = np.asarray(TEXT)[b, :length], [np.asarray(c)[b] for c in context]
        samples.append(
            published_flux.velocity(
                model, np.asarray(z)[b, 0], float(t_B[b]), *given, text, pictures
            )
        )
    return torch.stack(samples)[:, None]


@pytest.mark.parametrize('name', CONTEXT)
def test_whole_model(ours, theirs, name):
    visual = _visual(CONTEXT[name])
    for times in (TIME, jnp.array([1.0, 0.0])):
        with torch.no_grad():
            expected = _theirs(theirs, Z, times, CONTEXT[name])
        found = velocity(ours, Z, times, visual, TEXT, LENGTH)
        assert tiny.error(found, expected) <= 1e-4
        assert found.dtype == jnp.float32
    # What stands behind a caption's end is never read.
    other = velocity(ours, Z, times, visual, TEXT.at[0, 4:].set(9.0), LENGTH)
    np.testing.assert_array_equal(other, found)
    # Everything else is.
    changes = {
        'text': dict(text_BLD=TEXT.at[0, 3].add(1)),
        'guidance': dict(visual=visual.replace(guidance_B=GUIDANCE + 0.1)),
        'pooled': dict(visual=visual.replace(pooled_BD=POOLED.at[:, 3].add(1))),
        'time': dict(t_B=times * 0.99),
    }
    for i, z in enumerate(CONTEXT[name]):
        images = [*CONTEXT[name][:i], z.at[:, -1, -1].add(1), *CONTEXT[name][i + 1 :]]
        changes[f'picture {i}'] = dict(visual=visual.replace(context_images=tuple(images)))
    plain = dict(t_B=times, visual=visual, text_BLD=TEXT, length_B=LENGTH)
    for what, change in changes.items():
        given = {**plain, **change}
        assert tiny.error(velocity(ours, Z, *given.values()), found) > 1e-6, what


def test_every_block_of_the_whole(ours, theirs):
    """Each on what the reference's block was given, where no text is padded."""
    seen = {'double': [], 'single': []}
    hooks = []
    for kind, blocks in zip(
        seen, (theirs.transformer_blocks, theirs.single_transformer_blocks), strict=True
    ):
        keep = lambda _, args, given, out, kind=kind: seen[kind].append((given, args, out))
        hooks += [block.register_forward_hook(keep, with_kwargs=True) for block in blocks]
    context = [np.asarray(c)[0] for c in CONTEXT['two context images']]
    given = (np.asarray(a)[1] for a in (GUIDANCE, POOLED, TEXT))
    with torch.no_grad():
        published_flux.velocity(theirs, np.asarray(Z)[0, 0], 0.7, *given, context)
    for hook in hooks:
        hook.remove()
    where = rotation([(3, 5), (4, 2), (1, 3)], 7, CONFIG.axes_dims_rope)
    S = 15 + 8 + 3
    length_B = jnp.array([S + 7])
    run = jax.jit(lambda block, *args: block(*args, where, length_B))
    assert [len(calls) for calls in seen.values()] == [2, 3]
    for i, (args, _, (their_text, their_x)) in enumerate(seen['double']):
        names = ('hidden_states', 'encoder_hidden_states', 'temb')
        x, text = run(_layer(ours.transformer_blocks, i), *(args[n].numpy() for n in names))
        assert tiny.error(x, their_x) <= 1e-5
        assert tiny.error(text, their_text) <= 1e-5
    for i, (args, _, (their_text, their_x)) in enumerate(seen['single']):
        names = ('hidden_states', 'encoder_hidden_states')
        joined = np.concatenate([args[n].numpy() for n in names], 1)
        x = run(_layer(ours.single_transformer_blocks, i), joined, args['temb'].numpy())
        assert tiny.error(x[:, :S], their_x) <= 1e-5
        assert tiny.error(x[:, S:], their_text) <= 1e-5


def test_time_guidance_and_prompt_as_one_vector(ours, theirs):
    """Ours takes 0..1 and the guidance as it is said; theirs is told 1000 times of both."""
    t = jnp.array([0.0, 0.001, 0.25, 0.5, 0.999, 1.0])
    guidance = jnp.array([1.0, 2.5, 3.5, 4.0, 5.5, 7.0])
    pooled = tiny.normal(6, 20, seed=5)
    with torch.no_grad():
        given = (torch.tensor(np.asarray(a)) for a in (1000 * t, 1000 * guidance, pooled))
        expected = theirs.time_text_embed(*given)
    found = ours.time_text_embed(t, guidance, pooled, jnp.float32)
    assert tiny.error(found, expected) <= 1e-5


def test_gradients(ours, theirs):
    """Of every parameter."""
    context, weight = CONTEXT['Kontext'], np.asarray(tiny.normal(*Z.shape, seed=5))
    their_v = _theirs(theirs, Z, TIME, context)
    (their_v * torch.tensor(weight)).sum().backward()
    kept = {name: p.data for name, p in theirs.named_parameters()}
    visual = _visual(context)
    loss = lambda model: (velocity(model, Z, TIME, visual, TEXT, LENGTH) * weight).sum()
    found = tiny.named(jax.jit(jax.grad(loss))(ours))
    for parameter in theirs.parameters():
        parameter.data, parameter.grad = parameter.grad, None
    expected = tiny.named(_filled(theirs))
    for name, parameter in theirs.named_parameters():
        parameter.data = kept[name]
    worst = {path: tiny.error(gradient, expected[path]) for path, gradient in found.items()}
    assert max(worst.values()) <= 1e-4, sorted(worst.items(), key=lambda item: -item[1])[:5]


# ------------------------------------------------------------ the canvas


def test_the_canvas_touches_the_target_alone():
    """A new one changes no bit of the velocity; a trained one no token of the context images."""
    backbone = lambda rngs: Flux(CONFIG, remat='none', dtype=jnp.float32, rngs=rngs)
    new = tiny.randomised(tiny.metacanvas(backbone, lora=tiny.LORA, stride=1))
    visual = _visual(CONTEXT['Kontext'])

    @jax.jit
    def run(model):
        plan = model.plan(tiny.texts(), (1, 6, 10))
        plain = model.backbone.patchify(Z, visual)
        fused = model.canvas.fusion.after_patchify(
            plain, plan.canvas, TIME[:, None], visual.clean_BT
        )
        read = lambda patches: model.backbone.velocity(
            patches, TIME[:, None], plan.context_BLD, plan.context_length_B
        )
        return plain, fused, jax.lax.map(read, jax.tree.map(lambda *a: jnp.stack(a), plain, fused))

    for trained in (False, True):
        model = tiny.perturbed(new, 'canvas/fusion/') if trained else new
        plain, fused, velocities = run(model)
        assert trained == bool(np.any(fused.target_BThwD != plain.target_BThwD))
        assert trained == bool(np.any(velocities[0] != velocities[1]))
        jax.tree.map(np.testing.assert_array_equal, fused.extra, plain.extra)
        assert len(jax.tree.leaves(plain.extra)) == 3


# ------------------------------------------------------------ sampling


def test_sampling(ours, theirs):
    """28 steps as in FluxKontextPipeline, the whole of ours one program."""
    context, z_1 = CONTEXT['Kontext'], tiny.normal(2, 1, 6, 10, 4, seed=7)
    scheduler = FlowMatchEulerDiscreteScheduler(**published_flux.SCHEDULER)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28), mu=calculate_shift(15))
    z = torch.tensor(np.asarray(z_1))
    with torch.no_grad():
        for t in scheduler.timesteps:
            v = _theirs(theirs, z, np.full(2, t / 1000), context)
            z = scheduler.step(v, t, z, return_dict=False)[0]

    @jax.jit
    def sample(model, z_1, visual):
        patches = lambda z: model.patchify(z, visual)
        plain = lambda z, t: model.velocity(patches(z), jnp.full((2, 1), t), TEXT, LENGTH)
        solver = SOLVERS['euler_dynamic']
        return solver.solve(plain, z_1, solver.times(28, dynamic_shift(15)))

    found = sample(ours, z_1, _visual(context))
    moved = np.asarray(found) - np.asarray(z_1)
    assert tiny.error(moved, z.numpy() - np.asarray(z_1)) <= 1e-4
