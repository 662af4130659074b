"""A checkpoint comes back bit by bit, on any mesh, or is refused."""

import functools
import os
import pathlib
import random
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from metacanvas_jax.checkpoint import RunCheckpoints
from metacanvas_jax.types import InputError


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array


@struct.dataclass
class Held:
    step: jax.Array
    pair: Pair


def _state(mesh: Mesh | None = None, scale: float = 1.0) -> dict[str, Any]:
    """What a run holds: nnx parameters in bf16 and fp32, optax moments, structs, a key."""
    model = nnx.Linear(16, 8, rngs=nnx.Rngs(0))
    model.kernel[...] = scale * jax.random.normal(jax.random.key(1), (16, 8))
    parameters = nnx.state(model, nnx.Param)
    moments = optax.adamw(1e-3).init(parameters)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters)
    pair = Pair(jnp.arange(8, dtype=jnp.int32), jnp.array([True, False] * 4))
    held = Held(step=jnp.int32(7), pair=pair)
    state = {'params': parameters, 'ema': half, 'opt': moments, 'held': held, 'gone': None}
    if mesh is None:
        return state

    def place(x):
        spec = PartitionSpec('a', 'b') if x.ndim == 2 else PartitionSpec()
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, state)


def _mesh(rows: int, columns: int) -> Mesh:
    return Mesh(np.array(jax.devices()[: rows * columns]).reshape(rows, columns), ('a', 'b'))


def _abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def _assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _saved(path, steps=(1, 2), mesh=None):
    with RunCheckpoints(path) as checkpoints:
        for step in steps:
            checkpoints.save(step, _state(mesh, scale=step), {'position': step})


def _restored(path, abstract):
    with RunCheckpoints(path) as checkpoints:
        return checkpoints.restore(abstract)


def test_round_trip(tmp_path):
    state, record = _state(), {'position': 12, 'digest': 'abc', 'mix': [0.5, 1e-3]}
    with RunCheckpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.restore(_abstract(state)) is None
        checkpoints.save(12, state, record)
        checkpoints.wait()
        assert checkpoints.latest() == 12
        restored = checkpoints.restore(_abstract(state))
    assert restored is not None
    assert (restored[0], restored[2]) == (12, record)
    _assert_equal(restored[1], state)


def test_typed_keys(tmp_path):
    state = {'key': jax.random.key(3)}
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        restored = checkpoints.restore(_abstract(state))
    assert restored is not None
    assert jax.random.bits(restored[1]['key']) == jax.random.bits(state['key'])


@pytest.mark.parametrize('shape', [(4, 2), (2, 4), (2, 2), (1, 2), (1, 1)])
@pytest.mark.parametrize('source', ['saved'])
def test_other_meshes(saved_on_8, shape, source):
    abstract = _abstract(_state(_mesh(*shape)))
    restored = _restored(saved_on_8, abstract)
    assert restored is not None
    _assert_equal(restored[1], _state(scale=1))
    kernel = jax.tree.leaves(restored[1]['params'])[1]
    assert kernel.sharding == NamedSharding(_mesh(*shape), PartitionSpec('a', 'b'))


@pytest.fixture(scope='module')
def saved_on_8(tmp_path_factory):
    path = tmp_path_factory.mktemp('saved_on_8')
    _saved(path, steps=(1,), mesh=_mesh(4, 2))
    return path


def test_a_save_outlives_donation(tmp_path):
    @functools.partial(jax.jit, donate_argnums=0)
    def train(x):
        return x * 1.5 + 1

    x = jnp.arange(1 << 20, dtype=jnp.float32)
    with RunCheckpoints(tmp_path) as checkpoints:
        for step in range(1, 4):
            checkpoints.save(step, {'x': x}, {})
            x = train(train(x))
        checkpoints.wait()
        restored = checkpoints.restore({'x': jax.ShapeDtypeStruct(x.shape, x.dtype)})
    assert restored is not None
    assert restored[0] == 3


def _data_files(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that hold arrays; those of metadata are small."""
    return sorted(file for file in path.glob('state/**/d/*') if file.stat().st_size > 200)


@pytest.mark.parametrize('seed', range(5))
def test_a_flipped_bit_is_noticed(tmp_path, capfd, seed):
    x = {'x': jax.random.normal(jax.random.key(seed), (256, 64)), 'y': jnp.ones(3)}
    with RunCheckpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, x, {})
    chance = random.Random(seed)
    file = max(_data_files(tmp_path / '2'), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[chance.randrange(1000, 60_000)] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    restored = _restored(tmp_path, _abstract(x))
    assert restored is not None
    assert restored[0] == 1
    _assert_equal(restored[1], x)
    assert 'digest mismatch in x (1 arrays); trying step 1' in capfd.readouterr().err


@pytest.mark.parametrize('seed', range(5))
def test_a_flipped_bit_never_passes(tmp_path, seed):
    """Anywhere, in metadata too: it does no harm, or an older step is used."""
    _saved(tmp_path)
    chance = random.Random(seed)
    file = chance.choice([file for file in (tmp_path / '2').rglob('*') if file.stat().st_size])
    if file.is_dir():
        file = next(inner for inner in file.rglob('*') if inner.is_file())
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    restored = _restored(tmp_path, _abstract(_state()))
    assert restored is not None
    _assert_equal(restored[1], _state(scale=restored[0]))


def test_a_changed_number_is_noticed(tmp_path, capfd):
    x = {'x': jnp.linspace(0, 1, 4096).reshape(64, 64)}
    with RunCheckpoints(tmp_path) as checkpoints:
        checkpoints.save(1, x, {})
        checkpoints.save(2, x, {'position': 2})
    record = tmp_path / '2/record/metadata'
    record.write_text(record.read_text().replace('"position": 2', '"position": 3'))
    assert (_restored(tmp_path, _abstract(x)) or [None])[0] == 1
    assert 'rejected: its record is damaged; trying step 1' in capfd.readouterr().err


def _truncate(path):
    for file in _data_files(path / '2'):  # all: Orbax may leave one behind that it does not read
        os.truncate(file, file.stat().st_size // 2)


def _delete(path):
    for file in _data_files(path / '2'):
        file.unlink()


def _stray(path):
    (path / '999').mkdir()


def _stray_with_file(path):
    (path / '999').mkdir()
    (path / '999' / 'notes.txt').write_text('mine')


def _orphan(path):
    (path / '3.orbax-checkpoint-tmp').mkdir()
    (path / 'folder').mkdir()


@pytest.mark.parametrize(
    ('harm', 'step', 'lines'),
    [(_truncate, 1, 1), (_delete, 1, 1), (_stray, 2, 1), (_stray_with_file, 2, 1), (_orphan, 2, 0)],
)
def test_harm_to_the_folder(tmp_path, capfd, harm, step, lines):
    _saved(tmp_path)
    harm(tmp_path)
    with RunCheckpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(_abstract(_state()))
        assert restored is not None
        assert restored[0] == step
        assert capfd.readouterr().err.count('rejected') == lines
        # The run goes on from there and may save the very step that was rejected.
        assert checkpoints.latest() == step
        for later in range(step + 1, 4):
            checkpoints.save(later, _state(scale=10 * later), {})
        checkpoints.wait()
        assert checkpoints.latest() == 3
    restored = _restored(tmp_path, _abstract(_state()))
    assert restored is not None
    _assert_equal(restored[1], _state(scale=30))


def test_nothing_usable(tmp_path, capfd):
    (tmp_path / '5').mkdir()
    assert _restored(tmp_path, _abstract(_state())) is None
    assert 'no older one left' in capfd.readouterr().err


def test_another_config(tmp_path):
    _saved(tmp_path, steps=(1,))
    other = _abstract(_state())
    other['held'] = Held(step=other['held'].step, pair=other['held'].pair._replace(left=None))
    other['ema'] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), other['ema']
    )
    with pytest.raises(InputError) as caught:
        _restored(tmp_path, other)
    message = str(caught.value)
    assert 'bfloat16[16,8] there, bfloat16[3,16,8] here' in message
    assert 'held.pair.left is int32[8] there, absent here' in message
    assert 'trained with another config' in message


def test_a_part_of_the_state(tmp_path):
    _saved(tmp_path, steps=(1,))
    state = _state()
    with RunCheckpoints(tmp_path, read_only=True) as checkpoints:
        restored = checkpoints.restore(_abstract({'ema': state['ema']}), partial=True)
        with pytest.raises(InputError, match='no checkpoint of step 4'):
            checkpoints.restore(_abstract(state), step=4)
    assert restored is not None
    _assert_equal(restored[1], {'ema': state['ema']})


def test_keep(tmp_path):
    x = {'x': jnp.ones(4)}
    with RunCheckpoints(tmp_path, keep=2, keep_every=3) as checkpoints:
        for step in range(1, 7):
            checkpoints.save(step, x, {})
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [3, 5, 6]
