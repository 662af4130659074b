"""CLIP's text model: published weights -> ours -> published, with the prefix and without."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import CLIPTextModel, CLIPTokenizer

import convert
from convert import registry
from convert.checking import check_manifest
from convert.exporting import export_weights
from convert.family import parameters
from convert.importing import import_weights
from convert.pooling import pool_empty
from metacanvas_jax.sharding import partition_spec
from metacanvas_jax.text_encoders.base import VectorConfig, read_vector_config
from metacanvas_jax.text_encoders.clip import Clip, read_config
from metacanvas_jax.types import InputError
from metacanvas_jax.weights import weight_shapes
from tests import published, published_encoders, tiny
from tests.test_encoder_prompts import CLIP_ROOM, clip_folder

MANIFEST = pathlib.Path(__file__).parent / 'manifests/clip_l.json'
PREFIXES = {'transformers': 'text_model.', 'transformers_5': ''}


def save(folder: pathlib.Path, layout: str, dtype: torch.dtype = torch.float32) -> pathlib.Path:
    """A new model as transformers 5 writes it, and with the names of the published one."""
    published_encoders.clip().to(dtype).save_pretrained(folder)
    if layout == 'transformers_5':
        return folder
    return published.rewrite(
        folder,
        folder.with_name('prefixed'),
        lambda tensors: {f'text_model.{name}': array for name, array in tensors.items()},
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('layout', PREFIXES)
def test_there_and_back(tmp_path, layout, dtype):
    source = save(tmp_path / 'source', layout, dtype)
    names = published.tensors(source)
    assert registry.looks_like(names) == f'clip ({layout})'
    told = import_weights('clip', str(source), str(tmp_path / 'target'))
    assert '52 tensors' in told
    export_weights('clip', str(tmp_path / 'target'), str(tmp_path / 'back'), layout=layout)
    published.same(published.tensors(tmp_path / 'back'), names)
    # The layout is chosen at export, whatever was imported.
    export_weights('clip', str(tmp_path / 'target'), str(tmp_path / 'default'))
    bare = {name.removeprefix('text_model.'): array for name, array in names.items()}
    published.same(
        published.tensors(tmp_path / 'default'), {f'text_model.{n}': a for n, a in bare.items()}
    )


@pytest.mark.parametrize('layout', PREFIXES)
def test_the_reference_loads_what_was_exported(tmp_path, layout):
    """A module's own config.json, which says all that differs from transformers' defaults."""
    source = save(tmp_path / 'source', layout)
    module = convert.load('clip', str(source))
    convert.export('clip', module, tmp_path / 'back', layout=layout)
    load: Any = CLIPTextModel.from_pretrained
    model, info = load(tmp_path / 'back', output_loading_info=True)
    assert not any(info.values()), info
    want = published_encoders.clip()
    for name, value in want.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert isinstance(module, Clip)
    for name in module.config.to_json().keys() - {'architectures'}:
        assert getattr(model.config, name) == getattr(want.config, name), name
    assert read_config(tmp_path / 'back') == module.config


def test_where_tensors_go(tmp_path):
    """Said once more by hand: a round trip would not notice."""
    source = save(tmp_path / 'source', 'transformers_5')
    ours, theirs = parameters(convert.load('clip', str(source))), published.tensors(source)
    for i in range(3):
        for path, name in {
            'self_attn/k_proj/kernel': 'self_attn.k_proj.weight',
            'self_attn/out_proj/kernel': 'self_attn.out_proj.weight',
            'mlp/down/kernel': 'mlp.fc2.weight',
            'layer_norm2/scale': 'layer_norm2.weight',
            'mlp/up/bias': 'mlp.fc1.bias',
        }.items():
            value = theirs[f'encoder.layers.{i}.{name}'].T
            np.testing.assert_array_equal(ours[f'layers/{path}'][i], value, path)
    places = theirs['embeddings.position_embedding.weight']
    np.testing.assert_array_equal(ours['position_embedding'], places)


# ------------------------------------------------------------ the published model


@pytest.mark.parametrize('layout', PREFIXES)
def test_the_published_checkpoint_fits(tmp_path, layout):
    manifest = json.loads(MANIFEST.read_text())
    tensors = {
        PREFIXES[layout] + name.removeprefix('text_model.'): shape
        for name, shape in manifest['tensors'].items()
    }
    path = tmp_path / 'clip_l.json'
    path.write_text(json.dumps(manifest | {'tensors': tensors}))
    report, fits = check_manifest('clip', str(path))
    assert fits
    count = '196 tensors, 123060480 parameters'
    assert report == f'clip_l: {count}, 0 unused, 0 unfilled, 0 misshapen'


def _written(folder: pathlib.Path, **changes) -> pathlib.Path:
    values = json.loads(MANIFEST.read_text())['config'] | changes
    kept = {name: value for name, value in values.items() if value != 'left out'}
    (folder / 'config.json').write_text(json.dumps(kept))
    return folder


def test_the_published_size_is_traced_and_sharded(tmp_path):
    """Nothing is allocated; every dimension that lies on a mesh axis is divided by four."""
    config = read_config(_written(tmp_path))
    assert config.eos_token_id == 2
    model = jax.eval_shape(lambda: Clip(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    ids = np.zeros((2, 77), np.int32)
    states, pooled = jax.eval_shape(lambda model, ids: model(ids), model, ids)
    assert (states.shape, states.dtype) == ((2, 77, 768), jnp.bfloat16)
    assert (pooled.shape, pooled.dtype) == ((2, 768), jnp.bfloat16)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        for size, axis in zip(variable.shape, partition_spec(variable), strict=True):
            assert axis is None or size % 4 == 0, path


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(model_type='siglip_text_model'), "model_type is 'siglip_text_model', only 'clip_"),
        (dict(hidden_act='gelu'), "hidden_act is 'gelu', only 'quick_gelu' is supported"),
        (dict(num_attention_heads=7), 'hidden_size 768 is no multiple of num_attention_heads 7'),
        (dict(eos_token_id=[2, 3]), r'eos_token_id \[2, 3\] is no positive integer'),
        (dict(num_hidden_layers=0), 'num_hidden_layers 0 is no positive integer'),
        (dict(quantization_config=dict(bits=4)), 'quantization_config is unknown'),
        (dict(vocab_size='left out'), "is not the config of a CLIP .* KeyError.'vocab_size'"),
    ],
)
def test_a_config_that_is_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        read_config(_written(tmp_path, **changes))
    assert str(caught.value).startswith(f'{tmp_path}/config.json')
    assert '\n' not in str(caught.value)


def test_no_config(tmp_path):
    with pytest.raises(InputError, match=r'no config\.json in .*; give the folder of a CLIP'):
        read_config(tmp_path)
    for text in ('', '[]', '{'):
        (tmp_path / 'config.json').write_text(text)
        with pytest.raises(InputError, match='is not the config of a CLIP text model'):
            read_config(tmp_path)


def test_the_vector_of_the_empty_prompt(tmp_path):
    """`pool` leaves of CLIP what a system needs that never asks it anything else."""
    clip = published_encoders.clip(vocab_size=517, max_position_embeddings=CLIP_ROOM)
    clip.save_pretrained(tmp_path / 'text_encoder')
    source, target = str(tmp_path / 'text_encoder'), str(tmp_path / 'target')
    with pytest.raises(InputError, match=r'has no tokenizer in it or beside it; give --tokenizer'):
        pool_empty(source, target)
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder(tmp_path / 'tokenizer'))
    assert 'the vector of the empty prompt, 24 values' in pool_empty(source, target)
    with pytest.raises(InputError, match='exists already'):
        pool_empty(source, target)
    ids = tokenizer('', padding='max_length', max_length=CLIP_ROOM, return_tensors='pt').input_ids
    with torch.no_grad():
        want = clip(ids).pooler_output[0]
    (found,) = published.tensors(tmp_path / 'target').values()
    assert tiny.error(found, want) <= 1e-5
    assert read_vector_config(target) == VectorConfig(24)
    assert weight_shapes(target) == {'vector': (24,)}
