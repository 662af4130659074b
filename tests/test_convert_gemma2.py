"""Gemma-2: published weights -> ours -> published, in both layouts; its config.json."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Gemma2Config as TheirConfig
from transformers import Gemma2Model

import convert
from convert.checking import check_manifest
from convert.exporting import export_weights
from convert.importing import import_weights
from metacanvas_jax.sharding import partition_spec
from metacanvas_jax.text_encoders.gemma2 import FULL, SLIDING, Gemma2, read_config
from metacanvas_jax.types import InputError
from tests import published, tiny

MANIFEST = pathlib.Path(__file__).parent / 'manifests/gemma_2_2b_it.json'
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=10,
    query_pre_attn_scalar=7,
    attn_logit_softcapping=2.0,
    sliding_window=4,
)
LAYOUTS = {'sana': '', 'google': 'model.'}


def reference(dtype: torch.dtype = torch.float32, **changes) -> Gemma2Model:
    config = TheirConfig(**(SIZES | changes), attn_implementation='eager')
    model = Gemma2Model(config).to(dtype).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def save(folder: pathlib.Path, layout: str, **changes) -> pathlib.Path:
    """As its own library writes it, and renamed as google/gemma-2-2b-it is."""
    reference(**changes).save_pretrained(folder)
    if layout == 'sana':
        return folder
    return published.rewrite(
        folder,
        folder.with_name('google'),
        lambda tensors: {f'model.{name}': array for name, array in tensors.items()},
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', LAYOUTS)
def test_there_and_back(tmp_path, layout, dtype):
    source = save(tmp_path / 'sana', layout, dtype=dtype)
    names = published.tensors(source)
    assert all(name.startswith(LAYOUTS[layout] + 'layers.0') for name in names if '.0.' in name)
    told = import_weights('gemma2', str(source), str(tmp_path / 'target'))
    assert '35 tensors' in told
    export_weights('gemma2', str(tmp_path / 'target'), str(tmp_path / 'back'), layout=layout)
    published.same(published.tensors(tmp_path / 'back'), names)
    # The layout is chosen at export, whatever was imported.
    export_weights('gemma2', str(tmp_path / 'target'), str(tmp_path / 'plain'))
    published.same(
        published.tensors(tmp_path / 'plain'),
        {name.removeprefix('model.'): array for name, array in names.items()},
    )


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('types', [None, [FULL, FULL, SLIDING]])
def test_the_same_states(tmp_path, layout, types):
    module = convert.load('gemma2', str(save(tmp_path / 'sana', layout, layer_types=types)))
    ids, lengths = np.arange(26).reshape(2, 13) * 2, np.array([13, 8])
    valid = np.arange(13) < lengths[:, None]
    with torch.no_grad():
        theirs = reference(layer_types=types)(
            torch.tensor(ids), attention_mask=torch.tensor(valid).long()
        ).last_hidden_state.numpy()
    ours = jax.jit(lambda module, ids: module(ids))(module, ids)
    assert tiny.error(ours[valid], theirs[valid]) <= 1e-5


@pytest.mark.parametrize('types', [None, [FULL, FULL, SLIDING]])
def test_the_reference_loads_what_was_exported(tmp_path, types):
    """A module's own config.json, which says all that differs from transformers' defaults."""
    module = convert.load('gemma2', str(save(tmp_path / 'sana', 'sana', layer_types=types)))
    convert.export('gemma2', module, tmp_path / 'back')
    load: Any = Gemma2Model.from_pretrained
    model, info = load(tmp_path / 'back', output_loading_info=True)
    assert not any(info.values()), info
    want = reference(layer_types=types)
    for name, value in want.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for name in (*SIZES, 'layer_types', 'rope_parameters', 'rms_norm_eps', 'hidden_activation'):
        assert getattr(model.config, name) == getattr(want.config, name), name
    assert read_config(tmp_path / 'back') == module.config


@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_published_checkpoint_fits(tmp_path, layout):
    manifest = json.loads(MANIFEST.read_text())
    tensors = {LAYOUTS[layout] + name: shape for name, shape in manifest['tensors'].items()}
    path = tmp_path / 'gemma_2_2b_it.json'
    path.write_text(json.dumps(manifest | {'tensors': tensors}))
    report, fits = check_manifest('gemma2', str(path))
    assert fits
    count = '288 tensors, 2614341888 parameters'
    assert report == f'gemma_2_2b_it: {count}, 0 unused, 0 unfilled, 0 misshapen'


def test_the_published_size_is_traced_and_sharded(tmp_path):
    """Nothing is allocated; every dimension that lies on a mesh axis is divided by eight."""
    config = read_config(_written(tmp_path))
    make = lambda: Gemma2(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = jax.eval_shape(make)
    states = jax.eval_shape(lambda model, ids: model(ids), model, np.zeros((2, 600), np.int32))
    assert (states.shape, states.dtype) == ((2, 600, 2304), jnp.bfloat16)
    placed = set()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = '/'.join(map(str, path))
        for size, axis in zip(variable.shape, partition_spec(variable), strict=True):
            assert axis is None or size % 8 == 0, name
            placed |= {(name.removeprefix('layers/self_attn/').removesuffix('/kernel'), axis)}
    assert {('q_proj', 'tensor'), ('o_proj', 'fsdp'), ('embed_tokens', 'tensor')} <= placed


def test_a_head_is_one_too_many(tmp_path):
    manifest = json.loads(MANIFEST.read_text())
    manifest['tensors']['lm_head.weight'] = [256000, 2304]
    manifest['tensors']['layers.3.self_attn.k_proj.weight'] = [2048, 2304]
    (tmp_path / 'odd.json').write_text(json.dumps(manifest))
    report, fits = check_manifest('gemma2', str(tmp_path / 'odd.json'))
    assert not fits
    assert report.splitlines()[0].endswith('1 unused, 0 unfilled, 1 misshapen')


# ---------------------------------------------------------------- config.json


def _written(folder: pathlib.Path, **changes) -> pathlib.Path:
    values = json.loads(MANIFEST.read_text())['config'] | changes
    kept = {name: value for name, value in values.items() if value != 'left out'}
    (folder / 'config.json').write_text(json.dumps(kept))
    return folder


def test_the_published_config(tmp_path):
    config = read_config(_written(tmp_path))
    theirs = TheirConfig(**json.loads((tmp_path / 'config.json').read_text()))
    values = config.to_json()
    values['rope_parameters'] = dict(rope_type='default', rope_theta=values.pop('rope_theta'))
    for name in values.keys() - {'architectures'}:
        assert values[name] == getattr(theirs, name), name
    assert config.windows == (4096, np.iinfo(np.int32).max) * 13


def test_both_forms_of_rotary_settings(tmp_path):
    turns = dict(rope_type='default', rope_theta=5.0)
    assert read_config(_written(tmp_path, rope_theta='left out', rope_parameters=turns)) == (
        read_config(_written(tmp_path, rope_theta=5.0))
    )


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(model_type='gemma3_text'), "model_type is 'gemma3_text', only 'gemma2'"),
        (dict(hidden_activation='silu'), "hidden_activation is 'silu', only 'gelu_pytorch_tanh'"),
        (dict(attention_bias=True), 'attention_bias is True, only False'),
        (dict(use_bidirectional_attention=True), 'use_bidirectional_attention is True, only False'),
        (dict(rope_scaling=dict(factor=2.0)), 'rope_scaling is .* only None'),
        (
            dict(rope_parameters=dict(rope_type='yarn', rope_theta=1e4)),
            "rope_type is 'yarn', only 'default'",
        ),
        (dict(attn_logit_softcapping=None), 'attn_logit_softcapping is None, not a positive'),
        (dict(sliding_window=0), 'sliding_window is 0, not a positive'),
        (dict(rope_theta='left out'), 'rope_theta is None, not a positive'),
        (dict(head_dim=2.5), r'head_dim is 2\.5, not a positive'),
        (dict(head_dim=255), 'head_dim is 255, an odd number'),
        (dict(num_key_value_heads=3), 'num_attention_heads 8 is not a multiple of .* 3'),
        (dict(layer_types=[FULL]), r'layer_types are \[.*\]; want .* for 26 layers'),
        (dict(layer_types=['chunked_attention'] * 26), 'layer_types are'),
        (dict(quantization_config=dict(bits=4)), 'quantization_config is unknown'),
        (dict(head_dim='left out'), 'not the config of a Gemma-2 model: .*head_dim is missing'),
        (dict(num_hidden_layers='many'), 'is not the config of a Gemma-2 model'),
    ],
)
def test_a_config_that_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        read_config(_written(tmp_path, **changes))
    assert '\n' not in str(caught.value)
    assert str(tmp_path / 'config.json') in str(caught.value)


@pytest.mark.parametrize('text', ['', '[]', '{', '"gemma2"'])
def test_a_config_that_is_none(tmp_path, text):
    with pytest.raises(InputError, match=r'no config\.json in'):
        read_config(tmp_path)
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(InputError, match='is not the config of a Gemma-2 model'):
        read_config(tmp_path)
