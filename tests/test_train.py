"""One step: what learns, what does not, and that no accident leaves a trace."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

from metacanvas_jax.data.loader import process_rows, task_of_step
from metacanvas_jax.data.records import Record
from metacanvas_jax.data.tasks import diffusion_batch
from metacanvas_jax.readers import build_readers
from metacanvas_jax.train.objective import OBJECTIVES
from metacanvas_jax.train.optim import OptimizerConfig, learning_rate, make_optimizer, orthogonal
from metacanvas_jax.train.state import split_model, start
from metacanvas_jax.train.step import make_train_step
from metacanvas_jax.train.trainable import parameter_sizes, trainable_filter, trainable_table
from metacanvas_jax.types import Batch, InputError, Visual
from tests import tiny

OPTIMIZER = OptimizerConfig(
    kind='adamw',
    lr=1e-2,
    matrix_lr=0.0,
    warmup_lr=1e-3,
    warmup_steps=4,
    cooldown_steps=0,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.0,
    clip=1.0,
    ema=0.0,
)

FLOW = OBJECTIVES['flow'](tiny.config())


def _batch(size: int, *, frames: int) -> Batch:
    """Noise to learn by heart: 2 x 3 latents for SANA, 4 x 6 for the video toy."""
    lengths = np.random.default_rng(0).integers(4, 10, size)
    return Batch(
        texts=tiny.texts(tuple(lengths)),
        visual=Visual(clean_BT=np.zeros((size, frames), np.float32)),
        pixels_BFHWC=np.asarray(jnp.tanh(tiny.normal(size, frames, 4, 6, 3))),
    )


# ------------------------------------------------------------ which leaves

PATTERNS = ('canvas/.*', 'context/.*', r'mllm/.*/lora/[ab]', 'backbone/.*d/kernel')


@functools.cache
def _make():
    return tiny.metacanvas(tiny.video, lora=tiny.LORA, keyframes=3)


def test_patterns_name_whole_paths_and_each_must_match():
    model = jax.eval_shape(lambda: _make()(nnx.Rngs(0)))
    sizes = parameter_sizes(model)
    wanted = trainable_filter(PATTERNS, model)
    _, trainable, _ = nnx.split(model, wanted, ...)
    names = {'/'.join(map(str, path)) for path in dict(nnx.to_flat_state(trainable))}
    assert names == {
        name
        for name in sizes
        if name.startswith(('canvas/', 'context/', 'backbone/embed/k', 'backbone/read/k'))
        or '/lora/' in name
    }
    assert 0 < len(names) < len(sizes)
    for pattern in ('canvas', 'read/kernel', 'canvas/fusion/gone/.*'):
        with pytest.raises(InputError, match='matches none'):
            trainable_filter((*PATTERNS, pattern), model)

    rows = [line.split() for line in trainable_table(PATTERNS, model).splitlines()[1:]]
    found = {pattern: (int(n), int(size.replace(',', ''))) for pattern, n, size in rows}
    assert [*found] == [*PATTERNS, '(frozen)']
    assert sum(n for n, _ in found.values()) == len(sizes)
    assert sum(size for _, size in found.values()) == sum(sizes.values())
    frozen = [size for name, size in sizes.items() if name not in names]
    assert found['(frozen)'] == (len(frozen), sum(frozen))


def test_the_first_pattern_counts():
    model = jax.eval_shape(lambda: _make()(nnx.Rngs(0)))
    rows = trainable_table(('canvas/tokens/.*', 'canvas/.*'), model).splitlines()
    assert rows[1].split()[1] == '1'
    inside = [name for name in parameter_sizes(model) if name.startswith('canvas/')]
    assert rows[2].split()[1] == str(len(inside) - 1)


def test_trainable_leaves_learn_and_frozen_ones_do_not():
    """From all the zeros of a new run; an output that starts at zero delays all by one step."""
    mesh = tiny.one_device()
    model = tiny.randomised(_make(), zero=(*tiny.PROJECTIONS, '/lora/b', 'proj_out'))
    wanted = trainable_filter((*PATTERNS, 'backbone/proj_out/.*'), model)
    batch = _batch(2, frames=5)
    graphdef, trainable, frozen = split_model(
        lambda _: model, wanted, seed=0, frozen_dtype=jnp.float32, mesh=mesh
    )
    before = {name: np.array(value) for name, value in tiny.named(model).items()}
    learning = {'/'.join(map(str, path)) for path in dict(nnx.to_flat_state(trainable))}
    tx = make_optimizer(OPTIMIZER, steps=100)
    state, where = start(trainable, tx, ema=False, mesh=mesh)
    step = make_train_step(graphdef, FLOW, tx, accumulate=1, ema_decay=0.0, where=where)
    moments = [a for a in jax.tree.leaves(state.opt_state) if a.ndim]
    assert sum(a.size for a in moments) == 2 * sum(before[name].size for name in learning)
    for _ in range(6):
        state, metrics = step(state, frozen, batch, jax.random.key(1))
        assert np.isfinite(metrics['loss'])
    after = tiny.named(nnx.merge(graphdef, state.trainable, frozen))
    changed = {name for name in before if np.any(before[name] != after[name])}
    assert changed == learning
    assert int(state.step) == 6


# ------------------------------------------------------------ the step, on a linear toy


def _toy_objective(model, batch, key):
    """Mean over rows, no randomness; a row of nan makes the gradient nan."""
    del key
    return jnp.mean(jnp.square(jnp.tanh(model(batch['x'])) - batch['y']))


@functools.cache
def _toy(*, accumulate: int = 1, ema: float = 0.0, adam: bool = False):
    mesh = tiny.one_device()
    graphdef, trainable, frozen = split_model(
        lambda key: nnx.Linear(4, 3, rngs=nnx.Rngs(key)),
        nnx.Any(nnx.Param),
        seed=0,
        frozen_dtype=jnp.bfloat16,
        mesh=mesh,
    )
    tx = make_optimizer(OPTIMIZER, steps=100) if adam else optax.sgd(1.0)
    step = make_train_step(
        graphdef,
        _toy_objective,
        tx,
        accumulate=accumulate,
        ema_decay=ema,
        where=start(trainable, tx, ema=ema > 0, mesh=mesh)[1],
    )

    def fresh():
        return start(jax.tree.map(jnp.copy, trainable), tx, ema=ema > 0, mesh=mesh)[0]

    return fresh, lambda state, batch: step(state, frozen, batch, jax.random.key(0))


BATCH = {'x': tiny.normal(8, 4), 'y': tiny.normal(8, 3, seed=1)}


def _flat(tree):
    return np.concatenate([np.ravel(a) for a in jax.tree.leaves(tree)])


@pytest.mark.parametrize('accumulate', [2, 4, 8])
def test_accumulated_gradients_equal_the_whole_batch(accumulate):
    fresh, whole = _toy()
    expected, metrics = whole(fresh(), BATCH)
    fresh, parts = _toy(accumulate=accumulate)
    found, found_metrics = parts(fresh(), BATCH)
    assert tiny.error(_flat(found.trainable), _flat(expected.trainable)) <= 1e-6
    np.testing.assert_allclose(found_metrics['loss'], metrics['loss'], rtol=1e-6)
    np.testing.assert_allclose(found_metrics['grad_norm'], metrics['grad_norm'], rtol=1e-6)
    moved = tiny.error(_flat(expected.trainable), _flat(fresh().trainable))
    assert moved > 1e-2


def test_parts_and_steps_draw_different_noise():
    """Each accumulated part and each step has its own key, from the run's."""
    mesh = tiny.one_device()
    graphdef, trainable, frozen = split_model(
        lambda key: nnx.Linear(1, 1, rngs=nnx.Rngs(key)),
        nnx.Any(nnx.Param),
        seed=0,
        frozen_dtype=jnp.float32,
        mesh=mesh,
    )
    tx = optax.sgd(0.0)

    def objective(model, batch, key):
        return jax.random.uniform(key) * batch['one'].sum() + 0 * model.kernel.sum()

    where = start(trainable, tx, ema=False, mesh=mesh)[1]
    step = make_train_step(graphdef, objective, tx, accumulate=2, ema_decay=0.0, where=where)

    def losses(*parts, seed=5):
        state, _ = start(jax.tree.map(jnp.copy, trainable), tx, ema=False, mesh=mesh)
        for part in parts:
            state, metrics = step(state, frozen, {'one': jnp.array(part)}, jax.random.key(seed))
            yield float(metrics['loss'])

    first, second = [1.0, 0.0], [0.0, 1.0]
    found = [*losses(first, first), *losses(second, second), *losses(first, seed=6)]
    assert len(set(found)) == 5
    assert [*losses(first)] == found[:1]


def test_average_forgets_its_start_then_decays():
    fresh, step = _toy(ema=0.2)
    state = fresh()
    average = _flat(state.ema)
    np.testing.assert_array_equal(average, _flat(state.trainable))
    for s in range(4):
        state, _ = step(state, BATCH)
        decay = min(0.2, (1 + s) / (10 + s))
        average = decay * average + (1 - decay) * _flat(state.trainable)
        np.testing.assert_allclose(_flat(state.ema), average, rtol=1e-5)
    assert min(0.2, 1 / 10) != min(0.2, 4 / 13)  # both branches were taken


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(bad):
    fresh, step = _toy(accumulate=2, ema=0.5, adam=True)
    state, metrics = step(fresh(), BATCH)
    assert metrics['skipped'] == 0
    before = jax.tree.map(np.array, state)
    poisoned = {**BATCH, 'y': BATCH['y'].at[3, 1].set(bad)}
    for count in (1, 2):
        state, metrics = step(state, poisoned)
        assert not np.isfinite(metrics['grad_norm'])
        assert metrics['skipped'] == state.skipped == count
    for name in ('trainable', 'opt_state', 'ema'):
        old, new = jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(state, name))
        for a, b in zip(old, new, strict=True):
            np.testing.assert_array_equal(a, b)
    assert state.step == 3
    state, metrics = step(state, BATCH)
    assert metrics['skipped'] == state.skipped == 0
    assert np.any(_flat(before.trainable) != _flat(state.trainable))


def test_learning_rate_warms_up_then_stays():
    rate = learning_rate(OPTIMIZER, steps=100)
    found = [float(rate(step)) for step in (0, 1, 2, 3, 4, 5, 1000)]
    np.testing.assert_allclose(found, [1e-3, 3.25e-3, 5.5e-3, 7.75e-3, 1e-2, 1e-2, 1e-2], rtol=1e-5)


def test_learning_rate_cools_down_in_the_last_steps():
    rate = learning_rate(dataclasses.replace(OPTIMIZER, cooldown_steps=10), steps=100)
    found = [float(rate(step)) for step in (0, 4, 90, 91, 95, 99, 100)]
    np.testing.assert_allclose(found, [1e-3, 1e-2, 1e-2, 9e-3, 5e-3, 1e-3, 0], rtol=1e-5)


def test_gradients_are_clipped_over_all_leaves_together():
    """The first Adam step has the size of the rate; its memory holds the clipped gradient."""
    tx = make_optimizer(OPTIMIZER, steps=100)
    params = {'a': jnp.zeros(3), 'b': jnp.zeros(4)}
    grads = {'a': jnp.full(3, 30.0), 'b': jnp.full(4, 40.0)}
    updates, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(_flat(updates), -1e-3, rtol=1e-4)
    norm = np.sqrt(3 * 30**2 + 4 * 40**2)
    mu = optax.tree.get(state, 'mu')
    np.testing.assert_allclose(_flat(mu), np.repeat([3 / norm, 4 / norm], [3, 4]), rtol=1e-5)


MUON = dataclasses.replace(OPTIMIZER, kind='muon', matrix_lr=0.05, weight_decay=0.1, clip=1e9)


def _leaves(seed: int) -> nnx.State:
    """Three layers of a matrix, one alone, and what is none: from channels, a table, a bias."""

    def leaf(*shape, axes):
        return nnx.Param(tiny.normal(*shape, seed=seed + len(shape)), axes=axes)

    return nnx.State(
        {
            'layers': {
                'kernel': leaf(3, 8, 20, axes=('embed', 'mlp')),
                'bias': leaf(3, 20, axes=('mlp',)),
                'table': leaf(3, 6, 8, axes=(None, 'embed')),
            },
            'out': {'kernel': leaf(20, 8, axes=('mlp', None))},
            'first': {'kernel': leaf(12, 8, axes=('channels', 'embed'))},
        }
    )


def _updates(config: OptimizerConfig, params: nnx.State, steps: int) -> dict:
    """Those of the last of some steps, of warm-up's first rates."""
    tx = make_optimizer(config, steps=100)
    state, updates = tx.init(params), None
    for step in range(steps):
        updates, state = tx.update(_leaves(10 * step + 10), state, params)
    return {'/'.join(path): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(updates)}


@pytest.mark.parametrize('shape', [(8, 20), (20, 8), (3, 8, 20)])
def test_orthogonal_is_that_of_optax(shape):
    """By the first step of its Muon, and by the polar factor."""
    x = tiny.normal(*shape)
    numbers = optax.contrib.MuonDimensionNumbers(-2, -1)
    theirs = optax.contrib.scale_by_muon(weight_dimension_numbers=numbers)
    expected, _ = theirs.update(x, theirs.init(x))
    found = np.asarray(orthogonal(x))
    assert tiny.error(found, expected) <= 1e-5
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    values = np.einsum('...ij,...ik,...jk->...j', u, found, vt)
    assert values.min() > 0.65
    assert values.max() < 1.25
    assert tiny.error((u * values[..., None, :]) @ vt, found) <= 1e-5


def test_muon_moves_matrices_along_their_orthogonal_momentum():
    params, steps = _leaves(0), 3
    rate = float(learning_rate(dataclasses.replace(MUON, lr=MUON.matrix_lr), 100)(steps - 1))
    found = _updates(MUON, params, steps)
    for block in ('layers', 'out'):
        value = np.asarray(params[block]['kernel'][...])
        momentum = np.zeros_like(value)
        for step in range(steps):
            gradient = np.asarray(_leaves(10 * step + 10)[block]['kernel'][...])
            momentum = 0.95 * momentum + gradient
        ahead = gradient + 0.95 * momentum  # Nesterov's
        expected = 0.2 * np.sqrt(20) * np.asarray(orthogonal(ahead)) + 0.1 * value
        assert tiny.error(found[f'{block}/kernel'], -rate * expected) <= 1e-5


def test_muon_leaves_to_adamw_what_is_no_matrix():
    params = _leaves(0)
    found, adamw = (
        _updates(config, params, 3)
        for config in (MUON, dataclasses.replace(MUON, kind='adamw', matrix_lr=0.0))
    )
    assert found.keys() == adamw.keys()
    same = {name for name in found if np.array_equal(found[name], adamw[name])}
    assert same == {'layers/bias', 'layers/table', 'first/kernel'}


@pytest.mark.parametrize(
    ('changes', 'match'),
    [
        (dict(kind='lion'), "config.optimizer.kind 'lion' is unknown; there are: adamw, muon"),
        (dict(kind='muon'), 'muon wants one above 0'),
        (dict(matrix_lr=0.1), "matrix_lr 0.1 with kind 'adamw'"),
    ],
)
def test_an_optimizer_that_does_not_add_up_is_refused(changes, match):
    with pytest.raises(InputError, match=match):
        dataclasses.replace(OPTIMIZER, **changes)


# ------------------------------------------------------------ tasks

STAGE_3 = dict(t2i=5, image_edit=15, t2v=15, i2v=15, video_edit=25, r2v=25)


@pytest.mark.parametrize('seed', range(3))
def test_tasks_come_in_the_shares_of_table_16(seed, monkeypatch):
    n = 10_000
    names = [task_of_step({**STAGE_3, 'reconstruct': 0}, seed, step) for step in range(n)]
    assert 'reconstruct' not in names
    for name, percent in STAGE_3.items():
        p = percent / 100
        for stretch in (names, names[:1000], names[7000:]):
            share = stretch.count(name) / len(stretch)
            assert abs(share - p) <= 3 * (p * (1 - p) / len(stretch)) ** 0.5
        assert abs(names.count(name) / n - p) <= 1e-3
    monkeypatch.setattr(jax, 'process_index', lambda: 3)
    assert [task_of_step(STAGE_3, seed, step) for step in range(50)] == names[:50]
    late = 10**12
    found = [task_of_step(STAGE_3, seed, late + step) for step in range(400)].count('t2i')
    assert abs(found - 20) <= 2  # no drift, however long a run


def test_orders_of_tasks_differ_by_seed():
    orders = {tuple(task_of_step(STAGE_3, seed, step) for step in range(50)) for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize('shares', [{'t2i': -1.0, 'i2v': 2.0}, {'t2i': 0.0}])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(InputError, match='wants positive shares'):
        task_of_step(shares, 0, 0)


def test_processes_take_the_rows_of_a_batch_once(monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: 8)
    monkeypatch.setattr(jax, 'process_count', lambda: 4)
    rows = []
    for index in range(4):
        monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
        rows += process_rows(32, 2)
    assert rows == list(range(32))
    with pytest.raises(InputError, match='nearest: 32'):
        process_rows(30, 2)


# ------------------------------------------------------------ overfit


def test_canvas_alone_tells_pictures_apart():
    """Eight pictures, no text: without a canvas nothing says which one is wanted."""
    batch = _batch(8, frames=1)
    key = jax.random.key(0)

    def final_loss(fuse: str) -> float:
        make = tiny.metacanvas(tiny.sana, fuse=fuse, stride=1)
        model = tiny.randomised(make, zero=(*tiny.PROJECTIONS, 'proj_out', 'context/'))
        wanted = lambda path, _: path[0] in ('canvas', 'backbone')
        graphdef, trainable, frozen = nnx.split(model, wanted, ...)
        tx = optax.adam(3e-3)

        def loss_of(trainable, key):
            return FLOW(nnx.merge(graphdef, trainable, frozen), batch, key)

        @jax.jit
        def train(carry):
            def step(carry, i):
                trainable, state = carry
                grads = jax.grad(loss_of)(trainable, jax.random.fold_in(key, i))
                updates, state = tx.update(grads, state, trainable)
                return (optax.apply_updates(trainable, updates), state), None

            return jax.lax.scan(step, carry, jnp.arange(150))[0]

        trainable, _ = train((trainable, tx.init(trainable)))
        losses = jax.jit(jax.vmap(loss_of, (None, 0)))(
            trainable, jax.random.split(jax.random.key(9), 8)
        )
        return float(losses.mean())

    assert final_loss('dit') < 0.9 * final_loss('none')


def test_dropped_text_keeps_the_template():
    """The unconditional prompt of guidance is the task's template around nothing."""
    config = tiny.config()
    config.data.text_dropout = 0.5
    readers = build_readers(config)
    records = [Record('a red circle', np.zeros((1, 8, 8, 3), np.uint8))] * 2
    batch = diffusion_batch(readers, 't2i', records, [0.4, 0.6])
    assert readers.mllm
    tokenizer = readers.mllm.tokenizer
    empty = tokenizer.chat('Please generate image based on the following caption: ')[0]
    full = tokenizer.chat('Please generate image based on the following caption: a red circle')[0]
    prompt = batch.texts.mllm
    assert prompt
    for row, ids in enumerate((empty, full)):
        assert prompt.length_B[row] == len(ids)
        np.testing.assert_array_equal(prompt.ids_BL[row, : len(ids)], ids)
    np.testing.assert_array_equal(batch.pixels_BFHWC, -1)
