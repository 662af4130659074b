"""T5 and UMT5: published weights -> ours -> published; Wan's own file; their config.json."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import convert
from convert import registry
from convert.checking import check_manifest
from convert.exporting import export_weights
from convert.family import parameters
from convert.importing import import_weights
from metacanvas_jax.sharding import partition_spec
from metacanvas_jax.text_encoders.t5 import T5, read_config
from metacanvas_jax.types import InputError
from tests import published, published_encoders

MANIFESTS = pathlib.Path(__file__).parent / 'manifests'
KINDS = {'t5': ('t5_xxl', 30), 'umt5': ('umt5_xxl', 32)}  # the manifest, and tensors of a tiny one


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('kind', KINDS)
def test_there_and_back(tmp_path, kind, dtype):
    source, target, back = (tmp_path / name for name in ('source', 'target', 'back'))
    published_encoders.t5(kind).to(dtype).save_pretrained(source)
    names = published.tensors(source)
    assert registry.looks_like(names) == f'{kind} (transformers)'
    assert f'{KINDS[kind][1]} tensors' in import_weights(kind, str(source), str(target))
    export_weights(kind, str(target), str(back))
    published.same(published.tensors(back), names)
    assert (back / 'config.json').read_bytes() == (source / 'config.json').read_bytes()


@pytest.mark.parametrize('kind', KINDS)
def test_the_reference_loads_what_was_exported(tmp_path, kind):
    """A module's own config.json, which says all that differs from transformers' defaults."""
    published_encoders.t5(kind).save_pretrained(tmp_path / 'source')
    module = convert.load(kind, str(tmp_path / 'source'))
    convert.export(kind, module, tmp_path / 'back')
    load: Any = published_encoders.T5S[kind][0].from_pretrained
    model, info = load(tmp_path / 'back', output_loading_info=True)
    assert not any(info.values()), info
    want = published_encoders.t5(kind)
    for name, value in want.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert isinstance(module, T5)
    for name in module.config.to_json().keys() - {'architectures'}:
        assert getattr(model.config, name) == getattr(want.config, name), name
    assert read_config(tmp_path / 'back') == module.config


def native(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """transformers' tensors of a UMT5 under Wan's names, said once more by hand."""
    found = {}
    for name, array in tensors.items():
        for theirs, wan in (
            ('shared.', 'token_embedding.'),
            ('encoder.final_layer_norm', 'norm'),
            ('encoder.block.', 'blocks.'),
            ('layer.0.SelfAttention.relative_attention_bias', 'pos_embedding.embedding'),
            ('layer.0.SelfAttention', 'attn'),
            ('layer.0.layer_norm', 'norm1'),
            ('layer.1.layer_norm', 'norm2'),
            ('layer.1.DenseReluDense.wi_0', 'ffn.gate.0'),
            ('layer.1.DenseReluDense.wi_1', 'ffn.fc1'),
            ('layer.1.DenseReluDense.wo', 'ffn.fc2'),
        ):
            name = name.replace(theirs, wan)
        found[name] = torch.tensor(array)
    return found


def test_wan_s_own_file(tmp_path):
    """native .pth -> ours -> transformers -> ours -> native, the same bits."""
    # Wan's code has these, whatever the file.
    constants = dict(relative_attention_max_distance=128, layer_norm_epsilon=1e-6)
    published_encoders.t5('umt5', **constants).save_pretrained(tmp_path / 'source')
    tensors = published.tensors(tmp_path / 'source')
    state = native(tensors)
    (tmp_path / 'wan').mkdir()
    path = tmp_path / 'wan/models_t5_umt5-xxl-enc-bf16.pth'
    torch.save(state, path)
    (tmp_path / 'wan/config.json').write_text('{"_class_name": "WanModel", "dim": 3072}')
    import_weights('umt5', str(path), str(tmp_path / 'target'))
    assert read_config(tmp_path / 'target') == read_config(tmp_path / 'source')
    export_weights('umt5', str(tmp_path / 'target'), str(tmp_path / 'back'))
    published.same(published.tensors(tmp_path / 'back'), tensors)
    load: Any = published_encoders.T5S['umt5'][0].from_pretrained
    assert not any(load(tmp_path / 'back', output_loading_info=True)[1].values())
    import_weights('umt5', str(tmp_path / 'back'), str(tmp_path / 'again'))
    export_weights('umt5', str(tmp_path / 'again'), str(tmp_path / 'wan_again'), layout='native')
    published.same(
        published.tensors(tmp_path / 'wan_again'), {n: a.numpy() for n, a in state.items()}
    )
    assert registry.looks_like(state) == 'umt5 (native)'
    module = convert.load('umt5', str(path))
    published.same(parameters(module), parameters(convert.load('umt5', str(tmp_path / 'source'))))


@pytest.mark.parametrize('kind', KINDS)
def test_where_tensors_go(tmp_path, kind):
    """Said once more by hand: a round trip would not notice."""
    published_encoders.t5(kind).save_pretrained(tmp_path)
    ours, theirs = parameters(convert.load(kind, str(tmp_path))), published.tensors(tmp_path)
    for i in range(3):
        layer = f'encoder.block.{i}.layer'
        for path, name in {
            'attention/k/kernel': '0.SelfAttention.k.weight',
            'attention/o/kernel': '0.SelfAttention.o.weight',
            'attention_norm/scale': '0.layer_norm.weight',
            'feed_forward/wi_0/kernel': '1.DenseReluDense.wi_0.weight',
            'feed_forward/wo/kernel': '1.DenseReluDense.wo.weight',
            'feed_forward_norm/scale': '1.layer_norm.weight',
        }.items():
            value = theirs[f'{layer}.{name}'].T
            np.testing.assert_array_equal(ours[f'block/{path}'][i], value, path)
        if kind == 'umt5' or i == 0:
            table = theirs[f'{layer}.0.SelfAttention.relative_attention_bias.weight']
            found = ours['relative_attention_bias/table']
            np.testing.assert_array_equal(found[i] if kind == 'umt5' else found, table)


def test_one_is_not_the_other(tmp_path):
    """UMT5 has all of T5's names; T5 lacks the other blocks' biases."""
    for kind in KINDS:
        published_encoders.t5(kind).save_pretrained(tmp_path / kind)
    with pytest.raises(InputError, match=r'config.json is that of a umt5, not of a t5'):
        convert.load('t5', str(tmp_path / 'umt5'))
    with pytest.raises(InputError, match=r'is no umt5: its names are those of t5 \(transformers'):
        convert.load('umt5', str(tmp_path / 't5'))


# ------------------------------------------------------------ the published models


@pytest.mark.parametrize(
    ('kind', 'name', 'count'),
    [
        ('t5', 't5_xxl', '219 tensors, 4762310656 parameters'),
        ('umt5', 'umt5_xxl', '242 tensors, 5680910336 parameters'),
        ('umt5', 'umt5_xxl_native', '242 tensors, 5680910336 parameters'),
    ],
)
def test_the_published_checkpoints_fit(kind, name, count):
    report, fits = check_manifest(kind, str(MANIFESTS / f'{name}.json'))
    assert fits
    assert report == f'{name}: {count}, 0 unused, 0 unfilled, 0 misshapen'


def test_a_decoder_is_too_much(tmp_path):
    manifest = json.loads((MANIFESTS / 't5_xxl.json').read_text())
    manifest['tensors']['decoder.final_layer_norm.weight'] = [4096]
    (tmp_path / 'odd.json').write_text(json.dumps(manifest))
    report, fits = check_manifest('t5', str(tmp_path / 'odd.json'))
    assert not fits
    assert '1 unused' in report


def _written(folder: pathlib.Path, kind: str = 't5', **changes) -> pathlib.Path:
    manifest = json.loads((MANIFESTS / f'{KINDS[kind][0]}.json').read_text())
    values = manifest['config'] | changes
    kept = {name: value for name, value in values.items() if value != 'left out'}
    (folder / 'config.json').write_text(json.dumps(kept))
    return folder


@pytest.mark.parametrize('kind', KINDS)
def test_the_published_size_is_traced_and_sharded(tmp_path, kind):
    """Nothing is allocated; every dimension that lies on a mesh axis is divided by eight."""
    config = read_config(_written(tmp_path, kind))
    model = jax.eval_shape(lambda: T5(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    ids, length = np.zeros((2, 512), np.int32), np.array([512, 3])
    states = jax.eval_shape(lambda model, *args: model(*args), model, ids, length)
    assert (states.shape, states.dtype) == ((2, 512, 4096), jnp.bfloat16)
    placed = set()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        for size, axis in zip(variable.shape, partition_spec(variable), strict=True):
            assert axis is None or size % 8 == 0, path
            placed |= {(path[-1], axis), (path[-2:], axis)}
    assert {('shared', 'tensor'), ('table', 'tensor'), (('wo', 'kernel'), 'fsdp')} <= placed


def test_what_is_left_unsaid_is_the_reference_s_default(tmp_path):
    said = read_config(_written(tmp_path))
    unsaid = ('relative_attention_num_buckets', 'relative_attention_max_distance')
    unsaid += ('layer_norm_epsilon', 'dense_act_fn', 'is_gated_act')
    assert read_config(_written(tmp_path, **dict.fromkeys(unsaid, 'left out'))) == said
    read_config(_written(tmp_path, 'umt5', feed_forward_proj='left out'))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(model_type='mt5'), "model_type 'mt5' is unknown; there are: t5, umt5"),
        (dict(feed_forward_proj='relu'), "feed_forward_proj is 'relu', only 'gated-gelu' is"),
        (dict(feed_forward_proj='left out'), "feed_forward_proj is 'relu', only 'gated-gelu'"),
        (dict(dense_act_fn='silu'), "dense_act_fn is 'silu', only 'gelu_new'"),
        (dict(is_decoder=True), 'is_decoder is True, only False'),
        (dict(num_heads=0), 'num_heads 0 is no positive integer'),
        (dict(relative_attention_num_buckets=2), 'want 4 or more, and a distance above a quarter'),
        (
            dict(relative_attention_max_distance=8),
            '32 relative_attention_num_buckets for a .* of 8',
        ),
        (dict(quantization_config=dict(bits=4)), 'quantization_config is unknown'),
        (dict(d_kv='left out'), 'is not the config of a T5: .*d_kv is missing'),
    ],
)
def test_a_config_that_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        read_config(_written(tmp_path, **changes))
    assert str(caught.value).startswith(f'{tmp_path}/config.json')
    assert '\n' not in str(caught.value)


def test_no_config(tmp_path):
    with pytest.raises(InputError, match=r'no config\.json in .*; give the folder of a T5'):
        read_config(tmp_path)
    for text in ('', '[]', '{'):
        (tmp_path / 'config.json').write_text(text)
        with pytest.raises(InputError, match='is not the config of a T5'):
            read_config(tmp_path)
