"""Conversion of FLUX's autoencoder: both layouts there and back, the manifests, configs."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from diffusers import AutoencoderKL
from flax import nnx

import convert
from convert import registry
from convert.checking import check_manifest
from convert.exporting import export_weights
from convert.family import parameters
from convert.importing import import_weights
from metacanvas_jax.build import build_metacanvas
from metacanvas_jax.sharding import RULES, partition_spec
from metacanvas_jax.types import InputError
from metacanvas_jax.vae.flux_ae import FluxAe
from metacanvas_jax.vae.flux_ae_config import FluxAeConfig, read_config
from tests import published, published_encoders, tiny

MANIFESTS = pathlib.Path(__file__).parent / 'manifests'


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    room = tmp_path_factory.mktemp('published')
    for name in published_encoders.AES:
        published_encoders.autoencoder(name).save_pretrained(room / name)
    return {name: room / name for name in published_encoders.AES}


# ------------------------------------------------------------ there and back


@pytest.mark.parametrize('name', published_encoders.AES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_there_and_back(tmp_path, name, dtype):
    source, target, back = (tmp_path / name for name in ('source', 'target', 'back'))
    model = published_encoders.autoencoder(name).to(dtype)
    model.save_pretrained(source)
    import_weights('flux_ae', str(source), str(target))
    export_weights('flux_ae', str(target), str(back))
    published.same(published.tensors(back), published.tensors(source))
    assert (back / 'config.json').read_bytes() == (source / 'config.json').read_bytes()
    load: Any = AutoencoderKL.from_pretrained
    loaded, info = load(back, torch_dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def renamed(name: str, last: int) -> str:
    """diffusers' name of a tensor as Black Forest Labs', said once more by hand."""
    for theirs, bfl in (
        ('mid_block.resnets.0', 'mid.block_1'),
        ('mid_block.resnets.1', 'mid.block_2'),
        ('mid_block.attentions.0.group_norm', 'mid.attn_1.norm'),
        ('mid_block.attentions.0.to_out.0', 'mid.attn_1.proj_out'),
        ('mid_block.attentions.0.to_', 'mid.attn_1.'),
        ('downsamplers.0', 'downsample'),
        ('upsamplers.0', 'upsample'),
        ('conv_norm_out', 'norm_out'),
        ('conv_shortcut', 'nin_shortcut'),
        ('down_blocks', 'down'),
        *((f'up_blocks.{i}', f'up.{last - i}') for i in range(last + 1)),
        ('resnets', 'block'),
    ):
        name = name.replace(theirs, bfl)
    return name


def test_the_other_layout(folders, tmp_path):
    """diffusers -> ours -> BFL's single file, without config.json -> ours -> diffusers."""
    source, paths = folders['bfl'], [str(tmp_path / str(i)) for i in range(4)]
    import_weights('flux_ae', str(source), paths[0])
    export_weights('flux_ae', paths[0], paths[1], layout='bfl')
    found = published.tensors(pathlib.Path(paths[1]))
    want = {}
    for name, array in published.tensors(source).items():
        square = 'mid_block.attentions' in name and array.ndim == 2
        want[renamed(name, 1)] = array[..., None, None] if square else array
    published.same(found, want)
    # Beside it lies what is not its own: another model's config.json.
    alone = tmp_path / 'alone'
    alone.mkdir()
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in want.items()},
        alone / 'ae.safetensors',
    )
    (alone / 'config.json').write_text('{"_class_name": "FluxTransformer2DModel"}')
    import_weights('flux_ae', str(alone / 'ae.safetensors'), paths[2])
    assert read_config(paths[2]) == read_config(source)
    export_weights('flux_ae', paths[2], paths[3])
    published.same(published.tensors(pathlib.Path(paths[3])), published.tensors(source))
    load: Any = AutoencoderKL.from_pretrained
    assert not any(load(paths[3], output_loading_info=True)[1].values())
    module = convert.load('flux_ae', str(alone))
    published.same(parameters(module), parameters(convert.load('flux_ae', str(source))))


def test_where_tensors_go(folders):
    """Said once more by hand: a round trip would not notice."""
    ours = parameters(convert.load('flux_ae', str(folders['three stages'])))
    tensors = published.tensors(folders['three stages'])
    conv, up, mid = (2, 3, 1, 0), 'decoder.up_blocks.2', 'encoder.mid_block'
    for path, name, axes in [
        ('encoder/conv_in/kernel', 'encoder.conv_in.weight', conv),
        ('decoder/up_blocks/2/resnets/1/conv2/kernel', f'{up}.resnets.1.conv2.weight', conv),
        ('decoder/up_blocks/0/resample/conv/bias', 'decoder.up_blocks.0.upsamplers.0.conv.bias', 0),
        ('encoder/mid_block/attention/to_k/kernel', f'{mid}.attentions.0.to_k.weight', (1, 0)),
        ('encoder/mid_block/resnets/1/norm2/scale', f'{mid}.resnets.1.norm2.weight', 0),
    ]:
        value = tensors[name].transpose(axes) if axes else tensors[name]
        np.testing.assert_array_equal(ours[path], value, path)
    shortcut = tensors[f'{up}.resnets.0.conv_shortcut.weight'][:, :, 0, 0]
    kernel = ours['decoder/up_blocks/2/resnets/0/conv_shortcut/kernel']
    np.testing.assert_array_equal(kernel, shortcut.T)


def test_a_module_is_exported(folders, tmp_path):
    source = folders['three stages']
    convert.export('flux_ae', convert.load('flux_ae', str(source)), tmp_path / 'back')
    published.same(published.tensors(tmp_path / 'back'), published.tensors(source))
    assert read_config(tmp_path / 'back') == read_config(source)
    load: Any = AutoencoderKL.from_pretrained
    assert not any(load(tmp_path / 'back', output_loading_info=True)[1].values())


def test_a_file_that_lacks_a_part(folders, tmp_path):
    names = [renamed(name, 1) for name in published.tensors(folders['bfl'])]
    assert registry.looks_like(names) == 'flux_ae (bfl)'
    assert registry.looks_like(published.tensors(folders['bfl'])) == 'flux_ae (diffusers)'
    path = tmp_path / 'odd.json'
    tensors = json.loads((MANIFESTS / 'flux_ae_bfl.json').read_text())['tensors']
    for lost in ('encoder.conv_in.weight', 'decoder.conv_out.weight'):
        path.write_text(
            json.dumps({'config': {}, 'tensors': {k: v for k, v in tensors.items() if k != lost}})
        )
        with pytest.raises(InputError, match=f"no whole autoencoder of FLUX's: KeyError.'{lost}'"):
            check_manifest('flux_ae', str(path))


# ------------------------------------------------------------ the published model


@pytest.mark.parametrize('name', ['flux_vae', 'flux_ae_bfl'])
def test_the_published_checkpoint_fits(name):
    report, fits = check_manifest('flux_ae', str(MANIFESTS / f'{name}.json'))
    assert fits
    expected = '244 tensors, 83819683 parameters, 0 unused, 0 unfilled, 0 misshapen'
    assert report == f'{name}: {expected}'


def _published(folder: pathlib.Path, **changes) -> pathlib.Path:
    values = json.loads((MANIFESTS / 'flux_vae.json').read_text())['config'] | changes
    kept = {name: value for name, value in values.items() if value != 'left out'}
    (folder / 'config.json').write_text(json.dumps(kept))
    return folder


def test_the_published_model(tmp_path):
    """Its parameters and their sharding, and what it makes of a picture."""
    config = read_config(_published(tmp_path))
    vae = jax.eval_shape(lambda: FluxAe(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert sum(a.size for a in parameters(vae).values()) == 83_819_683
    for _, variable in nnx.to_flat_state(nnx.state(vae)):
        assert set(variable.get_metadata('axes')) <= {*RULES, None}
        assert len(partition_spec(variable)) == variable.ndim
    assert (vae.stride, vae.channels) == (8, 16)
    assert (config.scaling_factor, config.shift_factor) == (0.3611, 0.1159)
    x = jax.ShapeDtypeStruct((2, 1, 1024, 768, 3), jnp.float32)
    z = jax.eval_shape(lambda vae, x: vae.encode(x), vae, x)
    assert (z.shape, z.dtype) == ((2, 1, 128, 96, 16), jnp.float32)
    y = jax.eval_shape(lambda vae, z: vae.decode(z), vae, z)
    assert (y.shape, y.dtype) == (x.shape, jnp.float32)


def test_it_is_built_from_a_config():
    config = tiny.config()
    sizes = {f: published_encoders.AE[f] for f in FluxAeConfig.__dataclass_fields__}
    config.vae = dict(kind='flux_ae', **sizes)
    config.backbone.in_channels = 5
    model = jax.eval_shape(lambda: build_metacanvas(config, jax.random.key(0)))
    assert isinstance(model.vae, FluxAe)


# ------------------------------------------------------------ config.json


def test_the_config_is_the_reference_s(tmp_path):
    config = read_config(_published(tmp_path))
    values = json.loads((tmp_path / 'config.json').read_text())
    ours = config.to_json()
    assert ours.items() <= values.items()
    unread = {'_diffusers_version', 'force_upcast', 'sample_size'}
    assert values.keys() - ours.keys() == unread
    (tmp_path / 'config.json').write_text(json.dumps(ours))
    assert read_config(tmp_path) == config


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        # Stable Diffusion's: diffusers assumes the convolutions where nothing is said.
        (dict(use_quant_conv='left out'), 'use_quant_conv is True, only False is supported'),
        (dict(use_post_quant_conv='left out'), 'use_post_quant_conv is True, only False'),
        (dict(shift_factor=None), 'shift_factor is None, not a number'),
        (dict(shift_factor='left out'), 'shift_factor is None, not a number'),
        (dict(latents_mean=[0.0] * 16), 'latents_mean is .* only None'),
        (dict(mid_block_add_attention=False), 'mid_block_add_attention is False, only True'),
        (dict(act_fn='gelu'), "act_fn is 'gelu', only 'silu'"),
        (dict(down_block_types=['AttnDownEncoderBlock2D'] * 4), 'down_block_types is'),
        (dict(up_block_types=['UpDecoderBlock2D'] * 3), 'up_block_types is'),
        (dict(_class_name='AutoencoderDC'), "_class_name is 'AutoencoderDC'"),
        (dict(norm_num_groups=48), 'are no multiples of norm_num_groups 48'),
        (dict(layers_per_block=0), 'layers_per_block 0 is no positive integer'),
        (dict(block_out_channels=[128, 2.5]), r'block_out_channels 2\.5 is no positive integer'),
        (dict(patch_size=2), 'patch_size is unknown'),
        (dict(latent_channels='left out'), 'is not the config of .*latent_channels is missing'),
    ],
)
def test_a_config_that_is_refused(tmp_path, changes, words):
    with pytest.raises(InputError, match=words) as caught:
        read_config(_published(tmp_path, **changes))
    assert str(caught.value).startswith(f'{tmp_path}/config.json')
    assert '\n' not in str(caught.value)


def test_no_config(tmp_path):
    with pytest.raises(InputError, match=r"no config\.json in .*; give the folder of FLUX's"):
        read_config(tmp_path)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(InputError, match="is not the config of FLUX's autoencoder"):
        read_config(tmp_path)
