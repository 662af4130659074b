"""Conversion of DC-AE: there and back, the published manifest, configs; outputs in parity/."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC
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
from metacanvas_jax.vae.dc_ae import DcAe
from metacanvas_jax.vae.dc_ae_config import DcAeConfig, read_config
from tests import published, tiny
from tests.parity.test_dc_ae import CONFIGS, theirs

MANIFEST = pathlib.Path(__file__).parent / 'manifests/dc_ae_f32c32.json'


@pytest.mark.parametrize('name', ['sana', 'imagenet', 'mixed'])
def test_there_and_back(tmp_path, name):
    """Also counts of batches, which no model computes with."""
    theirs(name).save_pretrained(tmp_path / 'source')
    import_weights('dc_ae', str(tmp_path / 'source'), str(tmp_path / 'target'))
    export_weights('dc_ae', str(tmp_path / 'target'), str(tmp_path / 'back'))
    expected = published.tensors(tmp_path / 'source')
    published.same(published.tensors(tmp_path / 'back'), expected)
    files = [tmp_path / folder / 'config.json' for folder in ('source', 'back')]
    assert files[0].read_bytes() == files[1].read_bytes()
    load: Any = AutoencoderDC.from_pretrained
    model, info = load(tmp_path / 'back', output_loading_info=True)
    assert not any(info.values()), info
    for key, value in theirs(name).state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_where_tensors_go(tmp_path):
    """Said once more by hand: a round trip would not notice."""
    theirs('sana').save_pretrained(tmp_path)
    ours = parameters(convert.load('dc_ae', str(tmp_path)))
    tensors = published.tensors(tmp_path)
    conv, first, last = (2, 3, 1, 0), 'encoder.down_blocks.0.1', 'encoder.down_blocks.3.1'
    for path, layer, name, axes in [
        ('encoder/conv_in/kernel', None, 'encoder.conv_in.weight', conv),
        ('encoder/down_blocks/0/blocks/conv2/kernel', 1, f'{first}.conv2.weight', conv),
        ('encoder/down_blocks/2/down/conv/bias', None, 'encoder.down_blocks.2.3.conv.bias', (0,)),
        ('encoder/last/attn/to_out/kernel', 1, f'{last}.attn.to_out.weight', (1, 0)),
        ('decoder/up_blocks/1/up/conv/bias', None, 'decoder.up_blocks.1.0.conv.bias', (0,)),
        ('decoder/up_blocks/1/blocks/norm/scale', 2, 'decoder.up_blocks.1.3.norm.weight', (0,)),
        ('decoder/first/conv_out_norm/bias', 0, 'decoder.up_blocks.3.0.conv_out.norm.bias', (0,)),
    ]:
        value = ours[path] if layer is None else ours[path][layer]
        np.testing.assert_array_equal(value, tensors[name].transpose(axes), path)


def test_a_module_is_exported(tmp_path):
    theirs('sana').save_pretrained(tmp_path / 'source')
    module = convert.load('dc_ae', str(tmp_path / 'source'))
    convert.export('dc_ae', module, tmp_path / 'back')
    published.same(published.tensors(tmp_path / 'back'), published.tensors(tmp_path / 'source'))
    assert read_config(tmp_path / 'back') == read_config(tmp_path / 'source')
    load: Any = AutoencoderDC.from_pretrained
    assert not any(load(tmp_path / 'back', output_loading_info=True)[1].values())


def test_its_names_tell_what_it_is():
    for name in CONFIGS:
        assert registry.looks_like(theirs(name).state_dict().keys()) == 'dc_ae (diffusers)'


# ------------------------------------------------------------ the published model


def _published(tmp_path, **changes) -> dict:
    values = json.loads(MANIFEST.read_text())['config'] | changes
    (tmp_path / 'config.json').write_text(json.dumps(values))
    return values


def test_the_published_checkpoint_fits():
    report, fits = check_manifest('dc_ae', str(MANIFEST))
    assert fits
    expected = '375 tensors, 312250275 parameters, 0 unused, 0 unfilled, 0 misshapen'
    assert report == f'dc_ae_f32c32: {expected}'


def test_the_published_model(tmp_path):
    """Its parameters and their sharding, and what it makes of a picture."""
    _published(tmp_path)
    config = read_config(tmp_path)
    vae = jax.eval_shape(lambda: DcAe(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert sum(a.size for a in parameters(vae).values()) == 312_250_275
    for _, variable in nnx.to_flat_state(nnx.state(vae)):
        assert set(variable.get_metadata('axes')) <= {*RULES, None}
        assert len(partition_spec(variable)) == variable.ndim
    assert (vae.stride, vae.channels, config.scaling_factor) == (32, 32, 0.41407)
    x = jax.ShapeDtypeStruct((2, 1, 512, 1024, 3), jnp.float32)
    z = jax.eval_shape(lambda vae, x: vae.encode(x), vae, x)
    assert (z.shape, z.dtype) == ((2, 1, 16, 32, 32), jnp.float32)
    y = jax.eval_shape(lambda vae, z: vae.decode(z), vae, z)
    assert (y.shape, y.dtype) == (x.shape, jnp.float32)


def test_it_is_built_from_a_config(tmp_path):
    """Sizes in the manner of backbones; the latents must be those of the DiT."""
    config = tiny.config()
    sizes = DcAeConfig(**_with_defaults('sana')).to_json()
    del sizes['_class_name']
    config.vae = dict(kind='dc_ae', **sizes)
    check_size(config, 16, 24)
    with pytest.raises(InputError, match='not a multiple of 8'):
        check_size(config, 16, 20)
    with pytest.raises(InputError, match='makes 4 latent channels'):
        jax.eval_shape(lambda: build_metacanvas(config, jax.random.key(0)))
    config.vae.latent_channels = config.backbone.in_channels
    config.vae.update(encoder_out_shortcut=False, decoder_in_shortcut=False)
    model = jax.eval_shape(lambda: build_metacanvas(config, jax.random.key(0)))
    assert isinstance(model.vae, DcAe)
    assert model.vae.channels == config.backbone.in_channels


# ------------------------------------------------------------ config.json


def _with_defaults(name: str) -> dict:
    return (
        dict(encoder_out_shortcut=True, decoder_in_shortcut=True, decoder_conv_act_fn='relu')
        | CONFIGS[name]
    )


def test_what_old_files_leave_unsaid_is_the_reference_s_default(tmp_path):
    values = _published(tmp_path)
    config = read_config(tmp_path)
    load: Any = AutoencoderDC.from_config
    reference = load(values | SMALL).config
    for name in ('encoder_out_shortcut', 'decoder_in_shortcut', 'decoder_conv_act_fn'):
        assert name not in values
        assert getattr(config, name) == reference[name]
    again = tmp_path / 'again'
    again.mkdir()
    (again / 'config.json').write_text(json.dumps(config.to_json()))
    assert read_config(again) == config


SMALL = {name: [1] * 6 for name in ('encoder_layers_per_block', 'decoder_layers_per_block')}
SMALL |= {f'{side}_block_out_channels': [32] * 6 for side in ('encoder', 'decoder')}


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(shift_factor=0.1), 'shift_factor is unknown'),
        (dict(_class_name='AutoencoderKL'), "_class_name is 'AutoencoderKL'"),
        (dict(upsample_block_type='nearest'), "'nearest' is unknown; there are: interpolate, "),
        (dict(downsample_block_type='conv'), "'conv' is unknown; there are: Conv, "),
        (dict(decoder_norm_types='layer_norm'), "'layer_norm' is unknown; there are: rms_norm, "),
        (dict(decoder_act_fns=['silu'] * 5 + ['gelu']), "'gelu' is unknown; there are: relu, silu"),
        (dict(decoder_conv_act_fn='mish'), "'mish' is unknown; there are: relu, silu"),
        (dict(encoder_block_types='DownBlock'), "'DownBlock' is unknown; there are: ResBlock, "),
        (dict(encoder_layers_per_block=[2, 0, 2, 3, 3, 3]), 'only the first stage may have none'),
        (dict(decoder_layers_per_block=[3, 3, 3, 3, 3, 0]), 'only the first stage may have none'),
        (dict(decoder_block_out_channels=[128, 256]), 'has 2 stages, encoder_block_out_ch.* has 6'),
        (dict(encoder_qkv_multiscales=[[], [], [], [4], [5], [5]]), 'must be odd'),
        (dict(encoder_qkv_multiscales=5), 'not iterable'),
    ],
)
def test_odd_configs_are_refused(tmp_path, changes, words):
    _published(tmp_path, **changes)
    with pytest.raises(InputError, match=words) as caught:
        read_config(tmp_path)
    assert 'config.json' in str(caught.value)


def test_missing_values_and_files_are_named(tmp_path):
    with pytest.raises(InputError, match=r'no config\.json in'):
        read_config(tmp_path)
    values = _published(tmp_path)
    del values['scaling_factor'], values['in_channels']
    (tmp_path / 'config.json').write_text(json.dumps(values))
    with pytest.raises(InputError, match='in_channels is missing; scaling_factor is missing'):
        read_config(tmp_path)
