"""Two passes are one causal forward in which the prompt knows nothing of the canvas."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from metacanvas_jax.canvas.config import ContextConfig
from metacanvas_jax.canvas.context_connector import ContextConnector
from metacanvas_jax.canvas.tokens import canvas_mask
from metacanvas_jax.mllm.config import PRESETS, read_config
from metacanvas_jax.mllm.positions import canvas_positions
from metacanvas_jax.mllm.qwen import Qwen
from tests import tiny


@pytest.fixture
def optimized():
    """As users run it: a bound of rounding alone."""
    jax.config.update('jax_disable_most_optimizations', False)
    jax.clear_caches()  # which do not know of it
    yield
    jax.config.update('jax_disable_most_optimizations', True)
    jax.clear_caches()


H, W = 2, 3
M = H * W
LINEARS = [f'self_attn/{name}_proj' for name in 'qkvo']
LINEARS += [f'mlp/{name}_proj' for name in ('gate', 'up', 'down')]


@functools.cache
def _model(lora=tiny.LORA):
    """Every parameter random, the LoRA's second factor too."""
    return tiny.randomised(lambda rngs: tiny.qwen(rngs, lora))


@functools.cache
def _mask(attention: str):
    return np.asarray(canvas_mask(tiny.canvas_config(attention=attention), M))


TOKENS = tiny.normal(2, M, 64, seed=3)
prefix = jax.jit(lambda model, prompt: model.prefix(prompt))


@jax.jit
def canvas(model, prompt, tokens, mask, key=None):
    _, kv = model.prefix(prompt)
    positions = canvas_positions(prompt.start_B, [0], H, W)
    return model.language.canvas(tokens, positions, kv, prompt.length_B, mask, key)


# ------------------------------------------------------------ the prompt is alone


def test_prefix_is_the_same_bits_whatever_the_lora():
    prompt = tiny.prompt()
    states, kv = prefix(_model(), prompt)
    for other in (_model(None), tiny.perturbed(_model(), 'lora')):
        for ours, theirs in zip((states, *kv), jax.tree.leaves(prefix(other, prompt)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    before = canvas(_model(), prompt, TOKENS, _mask('causal'))
    after = canvas(tiny.perturbed(_model(), 'lora'), prompt, TOKENS, _mask('causal'))
    assert tiny.error(after, before) > 1e-2  # the change was not idle


def test_context_is_the_same_bits_whatever_the_canvas():
    """Through the whole plan: values and number of canvas tokens, and the LoRA on them."""
    prompt = tiny.texts()
    make = tiny.metacanvas(tiny.video, lora=tiny.LORA, keyframes=3)
    model = tiny.randomised(make, zero=())
    plan = jax.jit(lambda model, prompt: model.plan(prompt, (5, 8, 12)))
    before = plan(model, prompt)
    for name in ('canvas/tokens', 'lora'):
        after = plan(tiny.perturbed(model, name), prompt)
        np.testing.assert_array_equal(after.context_BLD, before.context_BLD)
        assert tiny.error(after.canvas, before.canvas) > 1e-3
    fewer = tiny.randomised(tiny.metacanvas(tiny.video, lora=tiny.LORA, keyframes=1), zero=())
    none = tiny.randomised(tiny.metacanvas(tiny.video, fuse='none'))
    for other in (fewer, none):
        np.testing.assert_array_equal(plan(other, prompt).context_BLD, before.context_BLD)


def test_context_leaves_out_what_all_prompts_begin_with():
    model, prompt = tiny.randomised(tiny.metacanvas(tiny.video, fuse='none')), tiny.prompt()
    states, _ = prefix(model.mllm, prompt)
    plan = model.plan(tiny.texts(), (1, 4, 4))
    connector = model.context.text
    skip = connector.skip
    assert skip > 0
    np.testing.assert_array_equal(plan.context_length_B, prompt.length_B - skip)
    expected = connector.down(jax.nn.gelu(connector.up(states[:, skip:])))
    assert tiny.error(plan.context_BLD, expected) <= 1e-5


def test_padding_changes_no_draw_of_the_dropout():
    """Meshes pad their batches otherwise, and must learn as one."""
    config = ContextConfig(hidden=32, activation='silu', dropout=0.3, skip=2)
    connector = ContextConnector(config, 16, 8, rngs=nnx.Rngs(0))
    states, length = tiny.normal(3, 9, 16), jnp.array([9, 7, 4])
    padded = jnp.pad(states, ((0, 0), (0, 5), (0, 0)))
    key = jax.random.key(0)
    short, _ = connector(states, length, key)
    long, _ = connector(padded, length, key)
    np.testing.assert_allclose(long[:, : short.shape[1]], short, rtol=1e-6, atol=1e-6)
    assert tiny.error(short, connector(states, length, None)[0]) > 1e-2


# ------------------------------------------------------------ one pass


def _rms(x, scale):
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + tiny.QWEN.rms_norm_eps) * scale


def _rotate(x_SNE, positions_3S):
    """Pairs (j, j + 8); frequencies 0-1 turn with t, 2-4 with h, 5-7 with w."""
    frequency = tiny.QWEN.rope_theta ** (-np.arange(8) / 8)
    angle = positions_3S[[0, 0, 1, 1, 1, 2, 2, 2]].T * frequency
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x_SNE[..., :8], x_SNE[..., 8:]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def _one_pass(model, x_SD, positions_3S, mask_SS, gate_S):
    """The concatenated, unpadded sequence of one sample; the LoRA is gated per token (numpy)."""
    values = {name: np.asarray(value, np.float64) for name, value in tiny.named(model).items()}
    scale = tiny.LORA.alpha / tiny.LORA.rank

    def layer(x, i):
        def get(name):
            return values[f'language/layers/{name}'][i]

        def linear(name, x):
            y = x @ get(f'{name}/kernel')
            if f'language/layers/{name}/bias' in values:
                y = y + get(f'{name}/bias')
            return y + gate_S[:, None] * (x @ get(f'{name}/lora/a') @ get(f'{name}/lora/b')) * scale

        y = _rms(x, get('input_layernorm/scale'))
        q, k, v = (linear(f'self_attn/{n}_proj', y).reshape(len(y), -1, 16) for n in 'qkv')
        q, k = _rotate(q, positions_3S), _rotate(k, positions_3S)
        k, v = (np.repeat(a, 2, 1) for a in (k, v))  # two query heads to each key head
        weight = np.exp(np.einsum('sne,lne->nsl', q, k) / 4) * mask_SS
        out = np.einsum('nsl,lne->sne', weight / weight.sum(-1, keepdims=True), v)
        x = x + linear('self_attn/o_proj', out.reshape(len(y), -1))
        y = _rms(x, get('post_attention_layernorm/scale'))
        gate = linear('mlp/gate_proj', y)
        return x + linear('mlp/down_proj', gate / (1 + np.exp(-gate)) * linear('mlp/up_proj', y))

    x_SD = np.asarray(x_SD, np.float64)
    for i in range(tiny.QWEN.num_hidden_layers):
        x_SD = layer(x_SD, i)
    return _rms(x_SD, values['language/norm/scale'])


@pytest.mark.parametrize('attention', ['causal', 'bidirectional'])
def test_two_passes_equal_one_gated_pass(attention):
    model, prompt = _model(), tiny.prompt()
    found = canvas(model, prompt, TOKENS, _mask(attention))
    states, _ = prefix(model, prompt)
    positions = np.asarray(canvas_positions(prompt.start_B, [0], H, W))
    for row, L in enumerate(prompt.length_B):
        x = jnp.concatenate([model.language.embed(prompt.ids_BL[row, :L]), TOKENS[row]])
        ids = np.concatenate([prompt.positions_B3L[row, :, :L], positions[row]], 1)
        mask = np.tril(np.ones((L + M, L + M), bool))
        mask[L:, L:] |= attention == 'bidirectional'
        expected = _one_pass(model, x, ids, mask, np.arange(L + M) >= L)
        assert tiny.error(found[row], expected[L:]) <= 1e-5
        assert tiny.error(states[row, :L], expected[:L]) <= 1e-5


@pytest.mark.usefixtures('optimized')
def test_padding_on_the_right_changes_nothing():
    model = _model()
    short, long = (tiny.prompt(size=size) for size in (12, 17))
    assert (
        tiny.error(
            canvas(model, long, TOKENS, _mask('causal')),
            canvas(model, short, TOKENS, _mask('causal')),
        )
        <= 1e-6
    )
    (a, _), (b, _) = prefix(model, long), prefix(model, short)
    for row, L in enumerate(short.length_B):
        assert tiny.error(a[row, :L], b[row, :L]) <= 1e-6
    ids = np.where(np.arange(12) < short.length_B[:, None], short.ids_BL, 7)
    other = canvas(model, short.replace(ids_BL=ids), TOKENS, _mask('causal'))
    np.testing.assert_array_equal(other, canvas(model, short, TOKENS, _mask('causal')))


# ------------------------------------------------------------ the LoRA


def _without_second_factor(model):
    values = tiny.named(model)
    return tiny.replaced(
        model, {n: np.zeros(a.shape) for n, a in values.items() if n.endswith('/lora/b')}
    )


def test_lora_is_built_with_a_second_factor_of_zero():
    built = tiny.named(tiny.qwen(nnx.Rngs(0), tiny.LORA))
    first, second = ([a for n, a in built.items() if n.endswith(f'/lora/{f}')] for f in 'ab')
    assert len(first) == len(second) == 7
    assert all(np.all(a != 0) for a in first)
    assert not any(np.any(a) for a in second)


def test_lora_starts_as_the_base_model():
    prompt, mask = tiny.prompt(), _mask('causal')
    start = canvas(_without_second_factor(_model()), prompt, TOKENS, mask)
    base = canvas(_model(None), prompt, TOKENS, mask)
    assert tiny.error(start, base) <= 1e-6
    assert tiny.error(canvas(_model(), prompt, TOKENS, mask), base) > 1e-2


def test_lora_has_seven_targets_and_each_acts():
    prompt, mask = tiny.prompt(), _mask('causal')
    off = _without_second_factor(_model())
    base = canvas(off, prompt, TOKENS, mask)
    names = {n.removesuffix('/lora/b') for n in tiny.named(off) if n.endswith('/lora/b')}
    assert names == {f'language/layers/{name}' for name in LINEARS}
    for name in names:
        one = {f'{name}/lora/b': np.asarray(tiny.named(_model())[f'{name}/lora/b'])}
        assert tiny.error(canvas(tiny.replaced(off, one), prompt, TOKENS, mask), base) > 1e-4


def test_canvas_without_lora_is_more_prompt():
    """Appended as ordinary tokens, with the same ids, in one causal forward."""
    model, prompt = _model(None), tiny.prompt(lengths=(9, 9), size=9)
    x = jnp.concatenate([model.language.embed(prompt.ids_BL), TOKENS], 1)
    positions = canvas_positions(prompt.start_B, [0], H, W)
    positions = jnp.concatenate([prompt.positions_B3L, positions], -1)
    plain, _ = jax.jit(lambda model, *args: model.language.prefix(*args))(
        model, x, positions, prompt.length_B + M
    )
    found = canvas(model, prompt, TOKENS, _mask('causal'))
    assert tiny.error(found, plain[:, 9:]) <= 1e-5


def test_lora_dropout_acts_only_with_a_key():
    prompt, mask = tiny.prompt(), _mask('causal')
    without = dataclasses.replace(tiny.LORA, dropout=0.0)
    evaluated = canvas(_model(), prompt, TOKENS, mask)
    np.testing.assert_array_equal(evaluated, canvas(_model(without), prompt, TOKENS, mask))
    a, b = (canvas(_model(), prompt, TOKENS, mask, jax.random.key(n)) for n in range(2))
    assert tiny.error(a, evaluated) > 1e-2
    assert tiny.error(a, b) > 1e-2
    # It drops what the LoRA reads, and nothing else.
    off = _without_second_factor(_model())
    dropped = canvas(off, prompt, TOKENS, mask, jax.random.key(0))
    assert tiny.error(dropped, canvas(off, prompt, TOKENS, mask)) <= 1e-6


# ------------------------------------------------------------ who sees whom


@pytest.mark.parametrize('attention', ['causal', 'bidirectional'])
def test_a_canvas_token_reaches_only_those_that_see_it(attention):
    model, prompt, mask = _model(), tiny.prompt(), _mask(attention)
    before = np.asarray(canvas(model, prompt, TOKENS, mask))
    for n in range(M):
        after = canvas(model, prompt, TOKENS.at[:, n].add(1.0), mask)
        changed = (np.asarray(after) != before).any(-1)
        expected = np.arange(M) >= n if attention == 'causal' else np.ones(M, bool)
        np.testing.assert_array_equal(changed, [expected] * 2)


def test_every_canvas_token_sees_every_prompt_token():
    model, prompt, mask = _model(), tiny.prompt(), _mask('causal')
    before = np.asarray(canvas(model, prompt, TOKENS, mask))
    for n in range(int(prompt.length_B.max())):
        ids = prompt.ids_BL.copy()
        ids[:, n] = (ids[:, n] + 1) % tiny.PAD
        after = np.asarray(canvas(model, prompt.replace(ids_BL=ids), TOKENS, mask))
        seen = n < prompt.length_B  # the shorter prompt ends earlier
        np.testing.assert_array_equal((after != before).any(-1), np.tile(seen[:, None], (1, M)))


# ------------------------------------------------------------ who learns


def test_gradient_enters_the_canvas_pass_alone():
    """Canvas tokens and all LoRA leaves learn; the prompt's own parameters get exactly nothing."""
    make = tiny.metacanvas(tiny.video, lora=tiny.LORA, keyframes=3)
    model, texts = tiny.randomised(make, zero=()), tiny.texts()

    @jax.jit
    @jax.grad
    def gradients(model, share):
        plan = model.plan(texts, (5, 8, 12))
        return share * jnp.sum(jnp.sin(plan.canvas)) + jnp.sum(jnp.sin(plan.context_BLD))

    found = tiny.named(gradients(model, 1.0))
    learning = [name for name in found if '/lora/' in name] + ['canvas/tokens/table']
    assert len(learning) == 2 * len(LINEARS) + 1
    for name in learning:
        by_layer = np.asarray(found[name]).reshape(found[name].shape[0], -1)
        assert np.abs(by_layer).max(1).min() > 0, name
    assert not np.any(found['mllm/language/embed_tokens'])

    for name, gradient in tiny.named(gradients(model, 0.0)).items():
        assert bool(np.any(gradient)) == name.startswith('context/'), name


def test_initial_values_follow_the_config(tmp_path):
    """And weights of other initial values are of the same model."""
    preset = PRESETS['tiny']
    vision = dataclasses.replace(preset.tower, initializer_range=0.2)
    wide = dataclasses.replace(preset, initializer_range=0.3, vision=vision)
    (tmp_path / 'config.json').write_text(json.dumps(wide.to_json()))
    found = read_config(tmp_path)
    assert found == preset
    model = Qwen(found, None, remat='full', dtype=jnp.float32, rngs=nnx.Rngs(0))
    language, tower = model.language, model.vision
    assert tower
    for scale, kernel in (
        (0.3, language.embed_tokens),
        (0.3, language.layers.self_attn.q_proj.kernel),
        (0.3, language.layers.mlp.down_proj.kernel),
        (0.2, tower.patch_embed.kernel),
        (0.2, tower.blocks.attn.qkv.kernel),
        (0.2, tower.blocks.mlp.up_proj.kernel),
        (0.2, tower.merger.fc1.kernel),
    ):
        assert np.std(kernel[...]) == pytest.approx(scale, rel=0.03)
