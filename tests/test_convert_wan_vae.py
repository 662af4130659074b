"""The Wan2.2 VAE: both layouts there and back, the published manifests, configs."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from flax import nnx

import convert
from convert import registry
from convert.checking import check_manifest
from convert.exporting import export_weights
from convert.family import parameters
from convert.importing import import_weights
from metacanvas_jax.build import build_metacanvas, check_size
from metacanvas_jax.sharding import RULES, partition_spec
from metacanvas_jax.types import InputError
from metacanvas_jax.vae.wan_vae import WanVae
from metacanvas_jax.vae.wan_vae_config import PUBLISHED, WanVaeConfig, read_config
from tests import published, published_wan_vae, tiny

MANIFESTS = pathlib.Path(__file__).parent / 'manifests'

load: Any = AutoencoderKLWan.from_pretrained


def same_state(found: Any, expected: Any) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


# ------------------------------------------------------------ there and back


@pytest.mark.parametrize('name', ['published', 'other'])
def test_there_and_back(tmp_path, name):
    """Through files; and from a module, whose config.json is written by us."""
    source = published_wan_vae.save(tmp_path / 'source', name)
    import_weights('wan_vae', str(source), str(tmp_path / 'target'))
    export_weights('wan_vae', str(tmp_path / 'target'), str(tmp_path / 'back'))
    convert.export('wan_vae', convert.load('wan_vae', str(source)), tmp_path / 'module')
    for back in ('back', 'module'):
        published.same(published.tensors(tmp_path / back), published.tensors(source))
        model, info = load(tmp_path / back, output_loading_info=True)
        assert not any(info.values()), info
        same_state(model, published_wan_vae.reference(name))
        for key, value in published_wan_vae.CONFIGS[name].items():
            assert model.config[key] == value, key
    configs = [(tmp_path / folder / 'config.json').read_bytes() for folder in ('source', 'back')]
    assert configs[0] == configs[1]
    assert read_config(tmp_path / 'module') == read_config(source)


def test_through_the_native_layout(tmp_path):
    """A .pth file -> ours -> diffusers -> ours -> native: the same bits all the way."""
    reference = published_wan_vae.reference('native')
    tensors = published_wan_vae.native(reference.state_dict())
    assert registry.looks_like(tensors) == 'wan_vae (native)'
    torch.save(tensors, tmp_path / 'Wan2.2_VAE.pth')
    # As in its repository: that of the transformer, which lies beside it.
    (tmp_path / 'config.json').write_text('{"_class_name": "WanModel", "dim": 3072}')
    import_weights('wan_vae', str(tmp_path / 'Wan2.2_VAE.pth'), str(tmp_path / 'a'))
    assert read_config(tmp_path / 'a').latents_std == PUBLISHED.latents_std
    export_weights('wan_vae', str(tmp_path / 'a'), str(tmp_path / 'diffusers'))
    same_state(load(tmp_path / 'diffusers'), reference)
    import_weights('wan_vae', str(tmp_path / 'diffusers'), str(tmp_path / 'b'))
    assert read_config(tmp_path / 'b') == read_config(tmp_path / 'a')
    export_weights('wan_vae', str(tmp_path / 'b'), str(tmp_path / 'native'), layout='native')
    back = safetensors.numpy.load_file(tmp_path / 'native/Wan2.2_VAE.safetensors')
    published.same(back, {name: tensor.numpy() for name, tensor in tensors.items()})


def test_native_names_are_those_of_diffusers_own_converter():
    """It knows Wan2.1 only: the same names but for those inside levels."""
    tensors = published_wan_vae.reference('native').state_dict()
    alike = {name: t for name, t in tensors.items() if '_blocks.' not in name}
    assert len(alike) == 48
    found = convert_wan_vae_to_diffusers(published_wan_vae.native(alike))
    assert found.keys() == alike.keys()
    assert all(found[name] is tensor for name, tensor in alike.items())


def test_native_names_are_the_published_ones():
    """Those inside levels too, with the shapes that they have there."""
    manifests = [
        json.loads((MANIFESTS / f'wan2_2_vae{s}.json').read_text()) for s in ('', '_native')
    ]
    theirs, native = (manifest['tensors'] for manifest in manifests)
    assert published_wan_vae.native(theirs) == native


def test_where_tensors_go(tmp_path):
    """Said once more by hand: a round trip would not notice."""
    source = published_wan_vae.save(tmp_path, 'published')
    ours, theirs = parameters(convert.load('wan_vae', str(source))), published.tensors(source)
    video, picture = (2, 3, 4, 1, 0), (2, 3, 1, 0)
    for path, name, axes in [
        ('encoder/conv_in/kernel', 'encoder.conv_in.weight', video),
        (
            'encoder/down_blocks/1/downsampler/resample/kernel',
            'encoder.down_blocks.1.downsampler.resample.1.weight',
            picture,
        ),
        (
            'decoder/up_blocks/0/upsampler/time_conv/kernel',
            'decoder.up_blocks.0.upsampler.time_conv.weight',
            video,
        ),
    ]:
        np.testing.assert_array_equal(ours[path], theirs[name].transpose(axes), path)
    for path, name in [
        ('quant_conv/kernel', 'quant_conv.weight'),
        (
            'decoder/mid_block/attentions/0/to_qkv/kernel',
            'decoder.mid_block.attentions.0.to_qkv.weight',
        ),
        (
            'decoder/up_blocks/2/resnets/0/conv_shortcut/kernel',
            'decoder.up_blocks.2.resnets.0.conv_shortcut.weight',
        ),
        ('decoder/up_blocks/3/resnets/2/norm2/scale', 'decoder.up_blocks.3.resnets.2.norm2.gamma'),
        ('encoder/mid_block/attentions/0/norm/scale', 'encoder.mid_block.attentions.0.norm.gamma'),
    ]:
        tensor = theirs[name]
        np.testing.assert_array_equal(
            ours[path], tensor.reshape(tensor.shape[:2] if 'kernel' in path else -1).T, path
        )


WAN2_1 = {
    'encoder.down_blocks.0.norm1.gamma': 'the VAE of Wan2.1 (diffusers)',
    'encoder.downsamples.0.residual.0.gamma': 'the VAE of Wan2.1 (native)',
}


@pytest.mark.parametrize('name', WAN2_1)
def test_the_older_one_is_named(name):
    with pytest.raises(InputError, match='its names are those of the VAE of Wan2') as caught:
        registry.find_layout('wan_vae', {name, 'decoder.middle.1.to_qkv.weight'}, 'here')
    assert WAN2_1[name] in str(caught.value)


# ------------------------------------------------------------ the published model


def _config() -> dict[str, Any]:
    return json.loads((MANIFESTS / 'wan2_2_vae.json').read_text())['config']


def _read(folder: pathlib.Path, values: Any) -> WanVaeConfig:
    (folder / 'config.json').write_text(json.dumps(values))
    return read_config(folder)


@pytest.mark.parametrize('name', ['wan2_2_vae', 'wan2_2_vae_native'])
def test_published_checkpoints_fit(name):
    report, fits = check_manifest('wan_vae', str(MANIFESTS / f'{name}.json'))
    assert fits
    expected = '196 tensors, 704688668 parameters, 0 unused, 0 unfilled, 0 misshapen'
    assert report == f'{name}: {expected}'


def test_the_published_model(tmp_path):
    """Its parameters and their sharding, and what it makes of the paper's videos."""
    assert _read(tmp_path, _config()) == PUBLISHED
    vae = jax.eval_shape(lambda: WanVae(PUBLISHED, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert sum(a.size for a in parameters(vae).values()) == 704_688_668
    for _, variable in nnx.to_flat_state(nnx.state(vae)):
        assert set(variable.get_metadata('axes')) <= {*RULES, None}
        assert len(partition_spec(variable)) == variable.ndim
    assert (vae.stride, vae.time_stride, vae.channels) == (16, 4, 48)
    x = jax.ShapeDtypeStruct((1, 121, 704, 1280, 3), jnp.float32)
    z = jax.eval_shape(lambda vae, x: vae.encode(x), vae, x)
    assert (z.shape, z.dtype) == ((1, 31, 44, 80, 48), jnp.float32)
    y = jax.eval_shape(lambda vae, z: vae.decode(z), vae, z)
    assert (y.shape, y.dtype) == (x.shape, jnp.float32)


def test_it_is_built_from_a_config():
    """Sizes in the manner of backbones."""
    config = tiny.config()
    names = WanVaeConfig.__dataclass_fields__
    sizes = {k: v for k, v in published_wan_vae.SIZES.items() if k in names}
    config.vae = dict(kind='wan_vae', **sizes)
    check_size(config, 16, 32)
    with pytest.raises(InputError, match='not a multiple of 16'):
        check_size(config, 16, 24)
    with pytest.raises(InputError, match='makes 5 latent channels'):
        jax.eval_shape(lambda: build_metacanvas(config, jax.random.key(0)))
    z = config.backbone.in_channels
    config.vae.update(z_dim=z, latents_mean=(0.0,) * z, latents_std=(1.0,) * z)
    model = jax.eval_shape(lambda: build_metacanvas(config, jax.random.key(0)))
    assert isinstance(model.vae, WanVae)


# ------------------------------------------------------------ config.json


def test_what_a_file_leaves_unsaid_is_the_reference_s_default(tmp_path):
    """It is that of Wan2.1, so little may be left out."""
    values = published_wan_vae.CONFIGS['other'] | {'_class_name': 'AutoencoderKLWan'}
    expected = _read(tmp_path, values)
    assert _read(tmp_path, expected.to_json()) == expected
    for name in ('in_channels', 'out_channels', 'patch_size', 'scale_factor_spatial', 'dropout'):
        assert _read(tmp_path, {k: v for k, v in values.items() if k != name}) == expected
    with pytest.raises(InputError, match=r'is the VAE of Wan2\.1'):
        _read(tmp_path, {k: v for k, v in values.items() if k != 'is_residual'})
    values['decoder_base_dim'] = None
    assert _read(tmp_path, values).decoder_base_dim == values['base_dim']


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(is_residual=False), r'is the VAE of Wan2\.1 \(is_residual is false\); only that of'),
        (dict(_class_name='AutoencoderKL'), "_class_name is 'AutoencoderKL', only"),
        (dict(attn_scales=[0.5]), r'attn_scales is \[0.5\], only \[\] is supported'),
        (dict(dropout=0.1), 'dropout is 0.1, only 0.0 is'),
        (dict(in_channels=3), 'in_channels is 3, only 12 is'),
        (dict(out_channels=3), 'out_channels is 3, only 12 is'),
        (dict(patch_size=None), 'in_channels is 12, only 3 is'),
        (dict(scale_factor_temporal=8), 'scale_factor_temporal is 8, only 4 is'),
        (dict(scale_factor_spatial=8), 'scale_factor_spatial is 8, only 16 is'),
        (dict(temperal_downsample=[True] * 3), 'want 3 booleans, two of them true'),
        (dict(temperal_downsample=[True, True]), 'want 3 booleans, two of them true'),
        (dict(temperal_downsample=[0, 2, 0]), 'want 3 booleans, two of them true'),
        (dict(latents_mean=[0.0]), 'latents_mean has 1 values, z_dim is 48'),
        (dict(latents_std=[0.0] * 48), 'positive deviations'),
        (dict(z_dim=0), 'z_dim 0: want positive integers'),
        (dict(base_dim='160'), "base_dim '160': want positive integers"),
        (dict(dim_mult=[1, 2, 4, 4.0]), r'dim_mult .*: want positive integers'),
        (dict(dim_mult=[1, 2, 4, 5]), 'shortcut cannot make 800 channels'),
        (dict(dim_mult=[1, 1, 20, 1]), 'shortcut cannot make 3200 channels'),
        (dict(dim_mult=[1, 3, 1, 1]), 'shortcut cannot make 480 channels'),
        (dict(dim_mult=[1, 1, 8, 4]), 'shortcut cannot take 2048 channels'),
        (dict(shift_factor=0.1, dropout=0.1), 'dropout is 0.1, .*; shift_factor is unknown'),
    ],
)
def test_odd_configs_are_refused(tmp_path, changes, words):
    with pytest.raises(InputError, match=words) as caught:
        _read(tmp_path, _config() | changes)
    assert str(caught.value).startswith(f'{tmp_path}/config.json: ')
    assert '\n' not in str(caught.value)


def test_missing_values_and_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r'no config\.json in .*; give the folder of a Wan2.2 VAE'):
        read_config(tmp_path)
    values = _config()
    del values['z_dim']
    for odd, words in ((values, 'z_dim'), ([], 'TypeError'), (_config() | {'dim_mult': 4}, 'iter')):
        with pytest.raises(InputError, match=rf'is not the config of a Wan2\.2 VAE: .*{words}'):
            _read(tmp_path, odd)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(InputError, match=r'is not the config of a Wan2\.2 VAE'):
        read_config(tmp_path)
