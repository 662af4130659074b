"""Folders of weights: what a run exports, and what `convert import` writes, start a model."""

import os
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx

import convert
from configs import quickstart
from convert.family import parameters
from convert.importing import import_weights
from metacanvas_jax.checkpoint import save_weights
from metacanvas_jax.loading import starting_model
from metacanvas_jax.mllm.config import read_config
from metacanvas_jax.sharding import make_mesh, shardings
from metacanvas_jax.train.state import start
from metacanvas_jax.types import InputError
from metacanvas_jax.weights import load_weights, match_weights, place_weights, weight_shapes
from tests import published, tiny
from tests.test_bad_input import script


def test_weights_round_trip(tmp_path):
    arrays = {
        'half': np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3).T,
        'scalar': np.array(2.5, np.float32),
        'many': np.arange(5),
    }
    for _ in range(2):  # into a new folder, then over an old one
        save_weights(tmp_path / 'deep/out', arrays, {'depth': 3})
    assert sorted(os.listdir(tmp_path / 'deep')) == ['out']
    assert sorted(os.listdir(tmp_path / 'deep/out')) == ['config.json', 'model.safetensors']
    loaded = load_weights(tmp_path / 'deep/out')
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (None, 'does not exist'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n', 'git-lfs pointer'),
        (b'<html>', 'has 6 bytes'),
        (b'\x04\0\0\0\0\0\0\0oops', 'not JSON'),
        (-3, r'has \d+ bytes, its header says \d+'),
    ],
)
def test_bad_weights(tmp_path, data, message):
    save_weights(tmp_path, {'x': np.ones(100, np.float32)}, {})
    file = tmp_path / 'model.safetensors'
    if data is None:
        file.unlink()
    elif isinstance(data, int):
        file.write_bytes(file.read_bytes()[:data])
    else:
        file.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_weights(tmp_path)
    assert str(file) in str(caught.value)


# ------------------------------------------------------------ a target of convert


@pytest.fixture(scope='module')
def target(tmp_path_factory):
    room = tmp_path_factory.mktemp('weights')
    source = published.save(room / 'published', tied=False)
    import_weights('qwen2_5_vl', str(source), str(room / 'target'))
    return room / 'target'


def _abstract(folder, mesh_shape=(8, 1, 1), dtype=jnp.float32, lora=None) -> nnx.State:
    """The parameters of a model around the MLLM, in shapes, types and places."""
    config = read_config(folder)
    make = lambda: nnx.Dict(mllm=tiny.qwen(nnx.Rngs(0), lora, config))
    state = nnx.state(jax.eval_shape(make))
    where = shardings(state, make_mesh(*mesh_shape))
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, dtype, sharding=place), state, where
    )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('mesh', [(8, 1, 1), (1, 2, 4), (2, 4, 1)])
def test_a_target_is_restored_where_it_belongs(target, mesh, dtype):
    state = place_weights(_abstract(target, mesh, dtype), target, 'mllm/')
    module = convert.load('qwen2_5_vl', str(target.parent / 'published'))
    values = parameters(module)
    flat = dict(nnx.to_flat_state(state))
    wanted = dict(nnx.to_flat_state(_abstract(target, mesh, dtype)))
    assert {'/'.join(path) for path in flat} == {f'mllm/{name}' for name in values}
    for path, leaf in flat.items():
        array, value = leaf.get_value(), values['/'.join(path[1:])]
        assert array.sharding == wanted[path].get_value().sharding
        assert array.dtype == dtype
        np.testing.assert_array_equal(array, value.astype(dtype))


def test_zeros_are_no_loss(target, tmp_path):
    """TensorStore leaves pieces of zeros out, if it may; Orbax then takes them for lost."""
    zeros = lambda arrays: {name: np.zeros_like(array) for name, array in arrays.items()}
    source = published.rewrite(target.parent / 'published', tmp_path / 'zeros', zeros)
    import_weights('qwen2_5_vl', str(source), str(tmp_path / 'target'))
    state = place_weights(_abstract(target), tmp_path / 'target', 'mllm/')
    assert not any(leaf.get_value().any() for _, leaf in nnx.to_flat_state(state))


def test_the_lora_is_left_alone(target):
    state = place_weights(_abstract(target, lora=tiny.LORA), target, 'mllm/')
    flat = {'/'.join(path): leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    left = {name for name, value in flat.items() if isinstance(value, jax.ShapeDtypeStruct)}
    assert left == {name for name in flat if '/lora/' in name}
    assert left


def test_another_model_is_refused(target):
    state = _abstract(target)
    flat = dict(nnx.to_flat_state(state))
    head = ('mllm', 'language', 'lm_head', 'kernel')
    norm = ('mllm', 'language', 'norm', 'scale')
    flat[norm] = flat[norm].replace(jax.ShapeDtypeStruct((65,), jnp.float32))
    flat[('mllm', 'language', 'extra')] = flat.pop(head)
    with pytest.raises(InputError, match='does not fit this config') as caught:
        match_weights(nnx.from_flat_state(flat), target, 'mllm/')
    message = str(caught.value)
    assert 'language/norm/scale is (64,) there, (65,) here' in message
    assert 'language/extra is missing there' in message
    assert 'language/lm_head/kernel is unknown here' in message


@pytest.mark.parametrize('harm', ['flip', 'delete', 'truncate'])
def test_a_damaged_target(target, tmp_path, harm):
    """Orbax alone would restore the flipped bit."""
    folder = tmp_path / 'target'
    shutil.copytree(target, folder)
    chunks = (folder / 'params/language.layers.mlp.up_proj.kernel/c').rglob('*')
    (file,) = (path for path in chunks if path.is_file())
    data = bytearray(file.read_bytes())
    data[1234] ^= 4
    if harm == 'delete':
        file.unlink()
    else:
        file.write_bytes(data if harm == 'flip' else data[:-1])
    with pytest.raises(InputError, match=r'params is damaged, convert it again') as caught:
        place_weights(_abstract(target), folder, 'mllm/')
    assert '\n' not in str(caught.value)


def test_no_orbax_tree(tmp_path):
    (tmp_path / 'params').mkdir()
    with pytest.raises(InputError, match='params is no Orbax checkpoint'):
        weight_shapes(tmp_path)


def test_a_run_starts_from_either(target, tmp_path):
    """The same parameters as a run would export them, and as they were converted."""
    module = convert.load('qwen2_5_vl', str(target.parent / 'published'))
    arrays = {name: np.asarray(value) for name, value in parameters(module).items()}
    save_weights(tmp_path / 'exported', arrays, module.config.to_json())
    mesh = make_mesh()
    states = []
    for folder in (tmp_path / 'exported', target):
        config = quickstart.get_config()
        config.weights.mllm = str(folder)
        config.mllm.size = None
        _, trainable, frozen = starting_model(config, mesh)
        states.append({**dict(nnx.to_flat_state(trainable)), **dict(nnx.to_flat_state(frozen))})
    ours, theirs = states
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.get_value().sharding == theirs[path].get_value().sharding
        np.testing.assert_array_equal(leaf.get_value(), theirs[path].get_value())
        if path[0] == 'mllm' and 'lora' not in path:
            np.testing.assert_array_equal(leaf.get_value(), arrays['/'.join(path[1:])])


def test_a_system_starts_from_what_another_learned(tmp_path):
    """A folder for each part that learns, in bf16."""
    config = tiny.config(fuse='none')
    config.weights.mllm = 'random'
    config.trainable = ('context/.*', 'backbone/.*')
    mesh, parts = make_mesh(), {'backbone': 'backbone/', 'context_connector': 'context/text/'}
    _, trainable, _ = starting_model(config, mesh)
    random = np.random.default_rng(0)
    learned = jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape), a.dtype), trainable)
    with script('train') as train:
        state, _ = start(learned, optax.identity(), ema=False, mesh=mesh)
        train.export_weights(config, state, tmp_path)
        whole = nnx.merge_state(learned, nnx.State({'canvas': {'tokens': nnx.Param(jnp.ones(2))}}))
        with pytest.raises(InputError, match='canvas/tokens learned too'):
            train.export_weights(config, state.replace(trainable=whole), tmp_path / 'other')
    assert not (tmp_path / 'other').exists()
    assert sorted(os.listdir(tmp_path / 'weights')) == sorted(parts)
    for name in parts:
        config.weights[name] = str(tmp_path / 'weights' / name)
    config.seed = 1
    _, again, _ = starting_model(config, mesh)
    flat = dict(nnx.to_flat_state(again))
    for path, value in nnx.to_flat_state(learned):
        half = np.asarray(value.get_value().astype(jnp.bfloat16), np.float32)
        np.testing.assert_array_equal(flat[path].get_value(), half)
