"""Wan's transformer: published -> ours -> published in both layouts, the same bits."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import WanTransformer3DModel
from flax import nnx

import convert
from convert.checking import check_manifest
from convert.exporting import export_weights
from convert.family import parameters
from convert.importing import import_weights
from convert.registry import find, looks_like
from metacanvas_jax.backbones.wan import Wan
from metacanvas_jax.backbones.wan_config import read_config
from metacanvas_jax.sharding import partition_spec
from metacanvas_jax.types import InputError, Visual
from tests import published, published_wan

MANIFESTS = pathlib.Path(__file__).parent / 'manifests'
DTYPES = {'bfloat16': torch.bfloat16, 'float32': torch.float32}
CONFIGS = list(published_wan.CONFIGS)

# diffusers -> native, in this order
NATIVE = {
    'condition_embedder.time_embedder.linear_1': 'time_embedding.0',
    'condition_embedder.time_embedder.linear_2': 'time_embedding.2',
    'condition_embedder.time_proj': 'time_projection.1',
    'condition_embedder.text_embedder.linear_1': 'text_embedding.0',
    'condition_embedder.text_embedder.linear_2': 'text_embedding.2',
    'attn1': 'self_attn',
    'attn2': 'cross_attn',
    'to_out.0': 'o',
    'to_': '',
    'norm2': 'norm3',
    'ffn.net.0.proj': 'ffn.0',
    'ffn.net.2': 'ffn.2',
    'proj_out': 'head.head',
    '.scale_shift_table': '.modulation',
    'scale_shift_table': 'head.modulation',
}


def native(name: str) -> str:
    for theirs, ours in NATIVE.items():
        name = name.replace(theirs, ours)
    return name


def native_config(name: str) -> dict[str, Any]:
    """As Wan's own repository writes it."""
    sizes = published_wan.CONFIGS[name]
    return {
        '_class_name': 'WanModel',
        '_diffusers_version': '0.33.0',
        'model_type': 'ti2v',
        'text_len': 512,
        'dim': sizes['num_attention_heads'] * sizes['attention_head_dim'],
        'num_heads': sizes['num_attention_heads'],
        'in_dim': sizes['in_channels'],
        'out_dim': sizes['out_channels'],
        'patch_size': list(sizes['patch_size']),
        **{name: sizes[name] for name in ('text_dim', 'freq_dim', 'ffn_dim', 'num_layers')},
    }


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Every config's published folder, and the narrow one's in the native layout."""
    room = tmp_path_factory.mktemp('published')
    found = {name: published_wan.save(room / str(i), name) for i, name in enumerate(CONFIGS)}
    found['native'] = room / 'native'
    found['native'].mkdir()
    tensors = {native(name): array for name, array in published.tensors(found['narrow']).items()}
    file = found['native'] / 'diffusion_pytorch_model.safetensors'
    safetensors.numpy.save_file(tensors, file)
    (found['native'] / 'config.json').write_text(json.dumps(native_config('narrow')))
    return found


# ------------------------------------------------------------ there and back


@pytest.mark.parametrize(
    ('name', 'dtype'), [*((name, 'float32') for name in CONFIGS), ('wide', 'bfloat16')]
)
def test_there_and_back(tmp_path, name, dtype):
    source = published_wan.save(tmp_path / 'source', name, dtype=DTYPES[dtype])
    told = import_weights('wan', str(source), str(tmp_path / 'target'))
    assert f'{15 + 27 * published_wan.CONFIGS[name]["num_layers"]} tensors' in told
    assert told.endswith(dtype)
    export_weights('wan', str(tmp_path / 'target'), str(tmp_path / 'back'), limit=100_000)
    index = tmp_path / 'back/diffusion_pytorch_model.safetensors.index.json'
    assert len(set(json.loads(index.read_text())['weight_map'].values())) >= 2
    published.same(published.tensors(tmp_path / 'back'), published.tensors(source))
    configs = [(tmp_path / f / 'config.json').read_bytes() for f in ('source', 'back')]
    assert configs[0] == configs[1]


def _loaded(folder: pathlib.Path) -> Any:
    """Strictly. Not by from_pretrained, which for this model wants another library, accelerate."""
    model: Any = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
    state = {name: torch.tensor(array) for name, array in published.tensors(folder).items()}
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize('name', CONFIGS)
def test_the_reference_loads_what_was_exported(folders, tmp_path, name):
    """From a module: the config.json is written by us."""
    module = convert.load('wan', str(folders[name]))
    convert.export('wan', module, tmp_path / 'back')
    published.same(published.tensors(tmp_path / 'back'), published.tensors(folders[name]))
    model = _loaded(tmp_path / 'back')
    for key, value in published_wan.reference(name).state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    for key, value in published_wan.CONFIGS[name].items():
        assert np.array_equal(model.config[key], value), key
    assert read_config(tmp_path / 'back') == module.config


def test_native_and_back(folders, tmp_path):
    """Native -> ours -> diffusers -> ours -> native; each with its own config.json."""
    roads = [
        (import_weights, 'native', 'a', {}),
        (export_weights, 'a', 'diffusers', {}),
        (import_weights, 'diffusers', 'b', {}),
        (export_weights, 'b', 'native again', dict(layout='native')),
        (export_weights, 'a', 'native copy', dict(layout='native')),
    ]
    place = lambda name: str(folders['native'] if name == 'native' else tmp_path / name)
    for run, source, target, words in roads:
        run('wan', place(source), place(target), **words)
    theirs = published.tensors(folders['native'])
    published.same(published.tensors(tmp_path / 'diffusers'), published.tensors(folders['narrow']))
    for name in ('native again', 'native copy'):
        published.same(published.tensors(tmp_path / name), theirs)
        assert read_config(tmp_path / name) == read_config(folders['narrow'])
    copy, source = (pathlib.Path(place(n), 'config.json') for n in ('native copy', 'native'))
    assert copy.read_bytes() == source.read_bytes()
    written = json.loads((tmp_path / 'native again/config.json').read_text())
    expected = native_config('narrow') | {'eps': 1e-6}
    del expected['text_len'], expected['_diffusers_version']
    assert written == expected
    model = _loaded(tmp_path / 'diffusers')
    for key, value in published_wan.reference('narrow').state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_where_a_tensor_goes(folders):
    """Said once more by hand; a round trip would not notice."""
    theirs = published.tensors(folders['wide'])
    ours = parameters(convert.load('wan', str(folders['wide'])))
    for i in range(3):
        layer = f'blocks.{i}.'
        for path, expected in {
            'attn1/to_k/kernel': theirs[f'{layer}attn1.to_k.weight'].T,
            'attn1/norm_q/scale': theirs[f'{layer}attn1.norm_q.weight'],
            'attn2/norm_k/scale': theirs[f'{layer}attn2.norm_k.weight'],
            'attn2/to_out/kernel': theirs[f'{layer}attn2.to_out.0.weight'].T,
            'norm2/scale': theirs[f'{layer}norm2.weight'],
            'norm2/bias': theirs[f'{layer}norm2.bias'],
            'ffn/up/kernel': theirs[f'{layer}ffn.net.0.proj.weight'].T,
            'ffn/down/bias': theirs[f'{layer}ffn.net.2.bias'],
            'scale_shift_table': theirs[f'{layer}scale_shift_table'][0],
        }.items():
            np.testing.assert_array_equal(ours[f'blocks/{path}'][i], expected)
    # Row, column and channel of a patch; the condition and the mask have columns of their own.
    kernel = theirs['patch_embedding.weight'][:, :, 0]
    for path, part in (
        ('patch_embedding/kernel', kernel[:, :5]),
        ('condition_embedding/linear/kernel', kernel[:, 5:]),
    ):
        np.testing.assert_array_equal(ours[path], part.transpose(2, 3, 1, 0).reshape(-1, 60))


# ------------------------------------------------------------ published checkpoints

PUBLISHED = {'diffusers': 'wan2_2_ti2v_5b', 'native': 'wan2_2_ti2v_5b_native'}


def _manifest(layout: str) -> dict[str, Any]:
    return json.loads((MANIFESTS / f'{PUBLISHED[layout]}.json').read_text())


@pytest.mark.parametrize('layout', PUBLISHED)
def test_published_checkpoints_fit(layout):
    report, fits = check_manifest('wan', str(MANIFESTS / f'{PUBLISHED[layout]}.json'))
    assert fits
    expected = '825 tensors, 4999787712 parameters, 0 unused, 0 unfilled, 0 misshapen'
    assert report == f'{PUBLISHED[layout]}: {expected}'
    assert looks_like(_manifest(layout)['tensors']) == f'wan ({layout})'


def test_the_layouts_differ_in_names_alone():
    """The names of this file's tiny native checkpoints are those of the published one."""
    renamed = {native(name): shape for name, shape in _manifest('diffusers')['tensors'].items()}
    assert renamed == _manifest('native')['tensors']


def _config(folder: pathlib.Path, **changes):
    (folder / 'config.json').write_text(json.dumps(_manifest('diffusers')['config'] | changes))
    return read_config(folder)


def _count(shapes: dict, part: str) -> int:
    return sum(shape.size for path, shape in shapes.items() if part in path)


def test_counts_of_the_stages(tmp_path):
    """Spec 5.3; nothing is allocated."""
    narrow = find('wan').parameters(_config(tmp_path))
    assert _count(narrow, '') == 4_999_787_712
    assert _count(narrow, 'blocks/attn2/') == 1_133_015_040
    assert _count(narrow, 'blocks/norm2/') == 184_320
    assert _count(narrow, 'text_embedder/') == 22_026_240
    wide = find('wan').parameters(_config(tmp_path, in_channels=100, condition_channels=52))
    new = wide.keys() - narrow.keys()
    assert sum(wide[path].size for path in new) == 638_976
    assert all('condition_embedding' in path for path in new)
    assert all(wide[path] == shape for path, shape in narrow.items())
    plain = find('wan').parameters(_config(tmp_path, text_embedder='none'))
    assert narrow.keys() - plain.keys() == {path for path in narrow if 'text_embedder' in path}


def test_the_published_size_is_traced_and_sharded(tmp_path):
    """A video of 121 frames at 704x1280 with a reference, as MetaCanvas has it (spec 1.6)."""
    changes = dict(in_channels=100, condition_channels=52, text_embedder='none')
    config = _config(tmp_path, **changes)
    make = lambda: Wan(config, remat='attention', dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = jax.eval_shape(make)
    assert (model.width, model.context_width, model.latent_channels) == (3072, 3072, 48)
    assert config.rotary_widths == (44, 42, 42)
    assert model.grid((31, 44, 80)) == (31, 22, 40)
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, jnp.float32)
    visual = Visual(
        clean_BT=shape(1, 31),
        references_BRHWC=shape(1, 1, 44, 80, 48),
        condition_BTHWC=shape(1, 31, 44, 80, 48),
        mask_BTHW4=shape(1, 31, 44, 80, 4),
    )
    patches = jax.eval_shape(
        lambda model, *args: model.patchify(*args), model, shape(1, 31, 44, 80, 48), visual
    )
    assert patches.target_BThwD.shape == (1, 31, 22, 40, 3072)
    assert patches.extra.shape == (1, 1, 22, 40, 3072)
    assert patches.target_BThwD.dtype == jnp.bfloat16
    velocity = jax.eval_shape(
        lambda model, *args: model.velocity(*args),
        model,
        patches,
        shape(1, 31),
        shape(1, 512, 3072),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    assert (velocity.shape, velocity.dtype) == ((1, 31, 44, 80, 48), jnp.float32)
    placed = set()
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = '/'.join(map(str, path))
        for size, axis in zip(variable.shape, partition_spec(variable), strict=True):
            assert axis is None or size % 8 == 0, name
            placed |= {(name.removesuffix('/kernel'), axis)}
    assert {('blocks/attn1/to_q', 'tensor'), ('blocks/ffn/up', 'fsdp')} <= placed


# ------------------------------------------------------------ config.json


def test_the_published_configs(tmp_path):
    config = _config(tmp_path)
    assert (config.width, config.num_layers, config.ffn_dim) == (3072, 30, 14336)
    assert (config.context_width, config.patch_size, config.in_channels) == (4096, 2, 48)
    (tmp_path / 'config.json').write_text(json.dumps(_manifest('native')['config']))
    assert read_config(tmp_path) == config
    for write in (config.to_json, config.to_native_json):
        (tmp_path / 'config.json').write_text(json.dumps(write()))
        assert read_config(tmp_path) == config
    for absent in ('patch_size', 'eps', 'freq_dim', 'text_dim', 'qk_norm', 'rope_max_seq_len'):
        values = _manifest('diffusers')['config']
        del values[absent]
        (tmp_path / 'config.json').write_text(json.dumps(values))
        assert read_config(tmp_path) == config
    assert _config(tmp_path, out_channels=None, rope_max_seq_len=4096) == config


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(added_kv_proj_dim=5120), 'added_kv_proj_dim is 5120, only None is supported'),
        (dict(image_dim=1280), 'image_dim is 1280, only None'),
        (dict(pos_embed_seq_len=514), 'pos_embed_seq_len is 514, only None'),
        (dict(qk_norm='rms_norm'), "qk_norm is 'rms_norm', only 'rms_norm_across_heads'"),
        (dict(cross_attn_norm=False), 'cross_attn_norm is False'),
        (dict(patch_size=[2, 2, 2]), r'patch_size is \[2, 2, 2\], only \[1, 2, 2\] is'),
        (dict(patch_size=[1, 2, 1]), r'patch_size is \[1, 2, 1\], only \[1, 1, 1\] is'),
        (dict(num_layers=0), 'num_layers 0 is no positive integer'),
        (dict(ffn_dim='14336'), "ffn_dim '14336' is no positive integer"),
        (dict(attention_head_dim=127), 'attention_head_dim 127 is odd'),
        (dict(in_channels=52), 'in_channels 52 is neither out_channels 48 nor 100, those of noisy'),
        # Wan2.2-I2V-A14B: [noisy | mask | condition]
        (dict(in_channels=36, out_channels=16), 'in_channels is 36 and out_channels 16; they may'),
        (dict(in_channels=100), 'in_channels is 100 and out_channels 48; they may differ only in'),
        (dict(condition_channels=52), 'in_channels is 48 and out_channels 48'),
        (dict(text_embedder='t5'), "text_embedder 't5' is unknown; there are: 'mlp', 'none'"),
        (dict(vace_layers=[0]), 'vace_layers is unknown'),
        (dict(_class_name='WanVACETransformer3DModel'), "_class_name is 'WanVACE"),
        (dict(a=1, image_dim=2), 'a is unknown; image_dim is 2'),
    ],
)
def test_a_config_that_is_refused(tmp_path, changes, words):
    with pytest.raises(InputError, match=words) as caught:
        _config(tmp_path, **changes)
    assert str(caught.value).startswith(f'{tmp_path}/config.json: ')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(model_type='i2v'), "model_type 'i2v' is not supported; there are: 't2v', 'ti2v'"),
        (dict(window_size=[8, 8]), r'window_size \[8, 8\] is not supported'),
        (dict(qk_norm=False), 'qk_norm False is not supported'),
        (dict(num_heads=7), 'dim 3072 is no multiple of num_heads 7'),
        (dict(in_dim=36), 'in_channels 36 is neither'),
        (dict(b=1), 'b is unknown'),
    ],
)
def test_a_native_config_that_is_refused(tmp_path, changes, words):
    (tmp_path / 'config.json').write_text(json.dumps(_manifest('native')['config'] | changes))
    with pytest.raises(InputError, match=words) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(f'{tmp_path}/config.json: ')


def test_no_config(tmp_path):
    with pytest.raises(InputError, match=r'no config.json in .*; give the folder of a Wan'):
        read_config(tmp_path)
    values = _manifest('diffusers')['config']
    del values['ffn_dim']
    for odd, words in (({}, 'in_channels'), ([], ''), (values, 'ffn_dim'), ({'patch_size': 2}, '')):
        (tmp_path / 'config.json').write_text(json.dumps(odd))
        with pytest.raises(InputError, match=f'is not the config of a Wan .*{words}'):
            read_config(tmp_path)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(InputError, match='is not the config of a Wan'):
        read_config(tmp_path)
