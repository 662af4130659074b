"""SANA's transformer: published -> ours -> published, the same bits, and diffusers loads them."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import SanaTransformer2DModel

import convert
from convert.checking import check_manifest
from convert.exporting import export_weights
from convert.family import parameters
from convert.importing import import_weights
from metacanvas_jax.backbones.sana import read_config
from metacanvas_jax.types import InputError, Visual
from tests import published, published_sana, tiny

MANIFESTS = pathlib.Path(__file__).parent / 'manifests'
DTYPES = {'bfloat16': torch.bfloat16, 'float32': torch.float32}
CONFIGS = list(published_sana.CONFIGS)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Every config's published folder."""
    room = tmp_path_factory.mktemp('published')
    return {name: published_sana.save(room / str(i), name) for i, name in enumerate(CONFIGS)}


# ------------------------------------------------------------ there and back


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', CONFIGS)
def test_there_and_back(tmp_path, name, dtype):
    source = published_sana.save(tmp_path / 'source', name, dtype=DTYPES[dtype])
    told = import_weights('sana', str(source), str(tmp_path / 'target'))
    count = 73 + 12 * (name == '1.5')
    assert f'{count} tensors' in told
    assert told.endswith(dtype)
    export_weights('sana', str(tmp_path / 'target'), str(tmp_path / 'back'), limit=200_000)
    index = tmp_path / 'back/diffusion_pytorch_model.safetensors.index.json'
    assert len(set(json.loads(index.read_text())['weight_map'].values())) >= 2
    published.same(published.tensors(tmp_path / 'back'), published.tensors(source))
    configs = [(tmp_path / f / 'config.json').read_bytes() for f in ('source', 'back')]
    assert configs[0] == configs[1]


@pytest.mark.parametrize('name', CONFIGS)
def test_the_reference_loads_what_was_exported(folders, tmp_path, name):
    """From a module: the config.json is written by us."""
    module = convert.load('sana', str(folders[name]))
    convert.export('sana', module, tmp_path / 'back')
    published.same(published.tensors(tmp_path / 'back'), published.tensors(folders[name]))
    load: Any = SanaTransformer2DModel.from_pretrained
    model, info = load(tmp_path / 'back', output_loading_info=True)
    assert not any(info.values()), info
    for key, value in published_sana.reference(name).state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    for key, value in published_sana.CONFIGS[name].items():
        assert key == 'sample_size' or model.config[key] == value, key


@pytest.mark.parametrize('name', CONFIGS)
def test_converted_weights_make_the_reference_s_velocity(folders, name):
    module = convert.load('sana', str(folders[name]))
    z, context = tiny.normal(2, 1, 6, 10, 4), tiny.normal(2, 5, 24, seed=1)
    length, t = np.array([5, 2]), jnp.array([0.982, 0.249])
    with torch.no_grad():
        theirs = published_sana.reference(name)(
            torch.tensor(np.asarray(z))[:, 0].permute(0, 3, 1, 2),
            encoder_hidden_states=torch.tensor(np.asarray(context)),
            timestep=torch.tensor([982, 249]),
            encoder_attention_mask=torch.tensor(np.arange(5) < length[:, None]).float(),
        ).sample.permute(0, 2, 3, 1)

    @jax.jit
    def velocity(module):
        patches = module.patchify(z, Visual(clean_BT=jnp.zeros((2, 1))))
        return module.velocity(patches, t[:, None], context, length)

    assert tiny.error(velocity(module)[:, 0], theirs) <= 1e-4


def test_where_a_tensor_goes(folders):
    """Said once more by hand; a round trip would not notice."""
    theirs = published.tensors(folders['1.5'])
    ours = parameters(convert.load('sana', str(folders['1.5'])))
    for i in range(3):
        layer = f'transformer_blocks.{i}.'
        depth = theirs[f'{layer}ff.conv_depth.weight']
        assert depth.shape == (320, 1, 3, 3)
        for path, expected in {
            'attn1/to_k/kernel': theirs[f'{layer}attn1.to_k.weight'].T,
            'attn1/norm_q/scale': theirs[f'{layer}attn1.norm_q.weight'],
            'attn2/norm_k/scale': theirs[f'{layer}attn2.norm_k.weight'],
            'attn2/to_out/kernel': theirs[f'{layer}attn2.to_out.0.weight'].T,
            'ff/conv_depth/kernel': np.moveaxis(depth[:, 0], 0, 2),
            'ff/conv_point/kernel': theirs[f'{layer}ff.conv_point.weight'][:, :, 0, 0].T,
        }.items():
            np.testing.assert_array_equal(ours[f'transformer_blocks/{path}'][i], expected)
    embed = theirs['time_embed.emb.timestep_embedder.linear_2.weight']
    np.testing.assert_array_equal(ours['time_embed/linear_2/kernel'], embed.T)


# ------------------------------------------------------------ published checkpoints


@pytest.mark.parametrize(
    ('name', 'tensors', 'count'),
    [
        ('sana_1600m_512', 396, 1_604_462_752),
        ('sana_1600m_1024', 396, 1_604_462_752),
        ('sana1_5_1600m_1024', 476, 1_604_641_952),
    ],
)
def test_published_checkpoints_fit(name, tensors, count):
    report, fits = check_manifest('sana', str(MANIFESTS / f'{name}.json'))
    assert fits
    expected = f'{tensors} tensors, {count} parameters, 0 unused, 0 unfilled, 0 misshapen'
    assert report == f'{name}: {expected}'


def test_a_checkpoint_of_the_other_version(tmp_path):
    """The config of 1.5 with the tensors of 1.0, and the reverse."""
    old, new = (
        json.loads((MANIFESTS / f'{name}.json').read_text())
        for name in ('sana_1600m_1024', 'sana1_5_1600m_1024')
    )
    for config, tensors, problem in ((new, old, '0 unused, 4 unfilled'), (old, new, '80 unused')):
        path = tmp_path / 'odd.json'
        path.write_text(json.dumps({**tensors, 'config': config['config']}))
        report, fits = check_manifest('sana', str(path))
        assert not fits
        assert problem in report


# ------------------------------------------------------------ the older export

OLD = {
    'pos_embed.proj.weight': (64, 4, 1, 1),
    'adaln_single.linear.weight': (384, 64),
    'transformer_blocks.0.ff.inverted_conv.conv.weight': (320, 64, 1, 1),
    'transformer_blocks.0.ff.depth_conv.conv.weight': (320, 1, 3, 3),
    'transformer_blocks.0.ff.point_conv.conv.weight': (64, 160, 1, 1),
}


def test_the_older_export(folders, tmp_path):
    """Lies beside the shards under the name of a whole checkpoint: the index is followed."""
    folder = tmp_path / 'transformer'
    folder.mkdir()
    for file in folders['1.0'].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    lone = folder / 'diffusion_pytorch_model.safetensors'
    safetensors.numpy.save_file({k: np.zeros(v, np.float16) for k, v in OLD.items()}, lone)
    import_weights('sana', str(folder), str(tmp_path / 'a'))
    export_weights('sana', str(tmp_path / 'a'), str(tmp_path / 'back'))
    published.same(published.tensors(tmp_path / 'back'), published.tensors(folders['1.0']))
    with pytest.raises(InputError, match=r'older export of sana \(take the shards and their index'):
        import_weights('sana', str(lone), str(tmp_path / 'b'))
    for file in folder.glob('*-of-*'):
        file.unlink()
    (folder / f'{lone.name}.index.json').unlink()
    with pytest.raises(InputError, match='older export of sana') as caught:
        import_weights('sana', str(folder), str(tmp_path / 'b'))
    assert '\n' not in str(caught.value)


# ------------------------------------------------------------ config.json


def _published(name: str) -> dict[str, Any]:
    return json.loads((MANIFESTS / f'{name}.json').read_text())['config']


def _read(folder: pathlib.Path, values: Any):
    (folder / 'config.json').write_text(json.dumps(values))
    return read_config(folder)


def test_the_published_configs(tmp_path):
    for name, qk_norm in (
        ('sana_1600m_512', None),
        ('sana_1600m_1024', None),
        ('sana1_5_1600m_1024', 'rms_norm_across_heads'),
    ):
        config = _read(tmp_path, _published(name))
        assert (config.width, config.num_layers, config.caption_channels) == (2240, 20, 2304)
        assert config.qk_norm == qk_norm
        assert _read(tmp_path, config.to_json()) == config
        # Older files lack these, and say no number of output channels.
        for absent in ('qk_norm', 'interpolation_scale', 'guidance_embeds', 'out_channels'):
            values = _published(name)
            values.pop(absent, None)
            assert (_read(tmp_path, values) == config) == (absent != 'qk_norm' or not qk_norm)
        assert _read(tmp_path, _published(name) | {'out_channels': None}) == config


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(qk_norm='layer_norm'), "qk_norm 'layer_norm' is unknown; there are: None, 'rms_norm"),
        (dict(interpolation_scale=1.0), 'interpolation_scale is 1.0, only None is supported'),
        (dict(guidance_embeds=True), 'guidance_embeds is True, only False is supported'),
        (dict(timestep_scale=1000.0), 'timestep_scale is 1000.0, only 1.0 is'),
        (dict(norm_eps=1e-5), 'norm_eps is 1e-05, only 1e-06 is'),
        (dict(attention_bias=True), 'attention_bias is True'),
        (dict(norm_elementwise_affine=True), 'norm_elementwise_affine is True'),
        (dict(dropout=0.1), 'dropout is 0.1'),
        (dict(out_channels=64), 'out_channels is 64, only 32 is supported'),
        (dict(cross_attention_dim=2304), 'cross_attention_dim is 2304, only 2240 is'),
        (dict(cross_attention_head_dim=64), 'cross_attention_head_dim is 64, only 112 is'),
        (dict(num_cross_attention_heads=3), 'width 2240 is no multiple of num_cross_.* 3$'),
        (dict(num_layers=0), 'num_layers 0 is no positive integer'),
        (dict(num_layers='20'), "num_layers '20' is no positive integer"),
        (dict(rope_theta=1e4), 'rope_theta is unknown'),
        (dict(_class_name='SanaVideoTransformer3DModel'), "_class_name is 'SanaVideo"),
        (dict(a=1, dropout=0.5), 'a is unknown; dropout is 0.5'),
    ],
)
def test_a_config_that_is_refused(tmp_path, changes, words):
    with pytest.raises(InputError, match=words) as caught:
        _read(tmp_path, _published('sana1_5_1600m_1024') | changes)
    assert str(caught.value).startswith(f'{tmp_path}/config.json: ')
    assert '\n' not in str(caught.value)


def test_no_config(tmp_path):
    with pytest.raises(InputError, match=r'no config.json in .*; give the folder of a SANA'):
        read_config(tmp_path)
    values = _published('sana_1600m_512')
    del values['mlp_ratio']
    for odd, words in (({}, 'in_channels'), ([], 'TypeError'), (values, 'mlp_ratio')):
        with pytest.raises(InputError, match=f'is not the config of a SANA .*{words}'):
            _read(tmp_path, odd)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(InputError, match='is not the config of a SANA'):
        read_config(tmp_path)
