"""FLUX's transformer: two published layouts <-> ours, the same bits, and diffusers loads them."""

import dataclasses
import inspect
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from flax import nnx

import convert
from convert.checking import check_manifest
from convert.exporting import export_weights
from convert.family import parameters
from convert.importing import import_weights
from metacanvas_jax.backbones.flux import Flux, FluxConfig, read_config
from metacanvas_jax.sharding import partition_spec
from metacanvas_jax.train.trainable import parameter_sizes, trainable_filter, trainable_table
from metacanvas_jax.types import InputError, Visual
from tests import published, published_flux, tiny

MANIFESTS = pathlib.Path(__file__).parent / 'manifests'
NAMES = ('flux1_dev', 'flux1_kontext_dev', 'flux1_dev_bfl', 'flux1_kontext_dev_bfl')
DTYPES = {'bfloat16': torch.bfloat16, 'float32': torch.float32}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return published_flux.save(tmp_path_factory.mktemp('published') / 'flux')


@pytest.fixture(scope='module')
def lone(tmp_path_factory, folder):
    """The same model as Black Forest Labs would publish it."""
    room = tmp_path_factory.mktemp('lone')
    convert.export('flux', convert.load('flux', str(folder)), room / 'bfl', layout='bfl')
    return room / 'bfl'


# ------------------------------------------------------------ there and back


@pytest.mark.parametrize('dtype', DTYPES)
def test_there_and_back(tmp_path, dtype):
    """diffusers -> ours -> bfl -> ours -> diffusers, every step through files."""
    source = published_flux.save(tmp_path / 'source', dtype=DTYPES[dtype])
    told = import_weights('flux', str(source), str(tmp_path / 'a'))
    assert '126 tensors' in told
    assert told.endswith(dtype)
    export_weights('flux', str(tmp_path / 'a'), str(tmp_path / 'bfl'), layout='bfl', limit=9)
    (file,) = (tmp_path / 'bfl').glob('*.safetensors*')  # one, whatever the limit of shards
    told = import_weights('flux', str(file), str(tmp_path / 'b'))
    assert '92 tensors' in told
    assert read_config(tmp_path / 'b') == read_config(source)
    export_weights('flux', str(tmp_path / 'b'), str(tmp_path / 'back'), limit=200_000)
    assert len(list((tmp_path / 'back').glob('*-of-*.safetensors'))) >= 2
    published.same(published.tensors(tmp_path / 'back'), published.tensors(source))
    configs = [(tmp_path / name / 'config.json').read_bytes() for name in ('source', 'a', 'bfl')]
    assert configs[0] == configs[1] == configs[2]


def test_the_reference_loads_what_was_exported(folder, tmp_path):
    """From a module: the config.json is written by us."""
    convert.export('flux', convert.load('flux', str(folder)), tmp_path / 'back')
    published.same(published.tensors(tmp_path / 'back'), published.tensors(folder))
    load: Any = FluxTransformer2DModel.from_pretrained
    model, info = load(tmp_path / 'back', output_loading_info=True)
    assert not any(info.values()), info
    for key, value in published_flux.reference().state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    for key, value in published_flux.SIZES.items():
        found = model.config[key]
        assert (tuple(found) if isinstance(found, list) else found) == value, key


def test_the_reference_reads_the_lone_file(folder, lone):
    """diffusers has a conversion of its own, of models as wide as the published ones."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    assert source.count('inner_dim = 3072') == 1
    scope = dict(vars(single_file_utils))
    exec(source.replace('inner_dim = 3072', 'inner_dim = 64'), scope)
    state = safetensors.torch.load_file(lone / 'flux1.safetensors')
    name = 'convert_flux_transformer_checkpoint_to_diffusers'
    theirs = {key: value.numpy() for key, value in scope[name](state).items()}
    published.same(theirs, published.tensors(folder))


def test_converted_weights_make_the_reference_s_velocity(folder, lone):
    """Those of either layout."""
    z, text = tiny.normal(1, 1, 6, 8, 4), tiny.normal(1, 5, 24, seed=1)
    pooled, guidance, t = tiny.normal(1, 20, seed=2), jnp.array([2.5]), jnp.array([[0.4]])
    context = tiny.normal(1, 4, 10, 4, seed=3)
    given = (np.asarray(a)[0] for a in (pooled, text))
    with torch.no_grad():
        theirs = published_flux.velocity(
            published_flux.reference(),
            np.asarray(z)[0, 0],
            0.4,
            2.5,
            *given,
            [np.asarray(context)[0]],
        )
    visual = Visual(
        clean_BT=jnp.zeros((1, 1)), context_images=(context,), guidance_B=guidance, pooled_BD=pooled
    )

    @jax.jit
    def velocity(module):
        return module.velocity(module.patchify(z, visual), t, text, jnp.array([5]))

    for where in (folder, lone):
        found = velocity(convert.load('flux', str(where)))
        assert tiny.error(found[0, 0], theirs) <= 1e-4


def test_where_a_tensor_goes(folder, lone):
    """Said once more by hand; a round trip would not notice."""
    theirs, fused = published.tensors(folder), published.tensors(lone)
    ours = parameters(convert.load('flux', str(folder)))
    D = 64
    for i in range(2):
        double, bfl = f'transformer_blocks.{i}.', f'double_blocks.{i}.'
        for path, name in {
            'attn/to_k/kernel': 'attn.to_k.weight',
            'attn/add_v_proj/kernel': 'attn.add_v_proj.weight',
            'attn/to_out/kernel': 'attn.to_out.0.weight',
            'attn/norm_added_k/scale': 'attn.norm_added_k.weight',
            'norm1_context/linear/bias': 'norm1_context.linear.bias',
            'ff_context/up/kernel': 'ff_context.net.0.proj.weight',
        }.items():
            found = ours[f'transformer_blocks/{path}'][i]
            np.testing.assert_array_equal(found, theirs[double + name].T)
        for name, part in {
            'attn.add_k_proj.weight': fused[f'{bfl}txt_attn.qkv.weight'][D : 2 * D],
            'attn.to_v.bias': fused[f'{bfl}img_attn.qkv.bias'][2 * D :],
            'attn.norm_added_q.weight': fused[f'{bfl}txt_attn.norm.query_norm.scale'],
            'attn.norm_k.weight': fused[f'{bfl}img_attn.norm.key_norm.scale'],
            'ff_context.net.2.weight': fused[f'{bfl}txt_mlp.2.weight'],
            'norm1.linear.weight': fused[f'{bfl}img_mod.lin.weight'],
        }.items():
            np.testing.assert_array_equal(theirs[double + name], part)
    for i in range(3):
        single, bfl = f'single_transformer_blocks.{i}.', f'single_blocks.{i}.'
        both = fused[f'{bfl}linear1.weight']
        np.testing.assert_array_equal(theirs[f'{single}attn.to_k.weight'], both[D : 2 * D])
        np.testing.assert_array_equal(theirs[f'{single}proj_mlp.weight'], both[3 * D :])
        path = 'single_transformer_blocks/proj_mlp/kernel'
        np.testing.assert_array_equal(ours[path][i], both[3 * D :].T)
    last = fused['final_layer.adaLN_modulation.1.bias']
    np.testing.assert_array_equal(ours['norm_out/linear/bias'], np.roll(last, D))
    np.testing.assert_array_equal(ours['norm_out/linear/bias'], theirs['norm_out.linear.bias'])


# ------------------------------------------------------------ published checkpoints


@pytest.mark.parametrize('name', NAMES)
def test_published_checkpoints_fit(name):
    report, fits = check_manifest('flux', str(MANIFESTS / f'{name}.json'))
    assert fits
    count = f'{780 if name.endswith("bfl") else 1160} tensors, 11901408320 parameters'
    assert report == f'{name}: {count}, 0 unused, 0 unfilled, 0 misshapen'


def _manifest(name: str) -> dict[str, Any]:
    return json.loads((MANIFESTS / f'{name}.json').read_text())


@pytest.fixture(scope='module')
def full(tmp_path_factory):
    """FLUX.1 at its size; nothing is allocated."""
    config = _read(tmp_path_factory.mktemp('full'), _manifest('flux1_kontext_dev')['config'])
    return jax.eval_shape(lambda: Flux(config, remat='full', dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))


# spec.md section 5.2: what the experiment on editing trains, and its alternatives.
IMAGE_ATTENTION = [
    r'transformer_blocks/attn/(to_q|to_k|to_v|to_out|norm_q|norm_k)/.*',
    r'transformer_blocks/norm1/.*',
]
SINGLE_ATTENTION = [
    r'single_transformer_blocks/attn/.*',
    r'single_transformer_blocks/norm/.*',
]
FEED_FORWARD = [r'transformer_blocks/ff/.*']
TRAINABLE = {
    'uniworld, double blocks': (IMAGE_ATTENTION, 1_793_653_504),
    'uniworld, single blocks': (SINGLE_ATTENTION, 2_152_388_096),
    'uniworld': (IMAGE_ATTENTION + SINGLE_ATTENTION, 3_946_041_600),
    'double image stream': (IMAGE_ATTENTION + FEED_FORWARD, 3_228_397_312),
    'ff': (FEED_FORWARD, 1_434_743_808),
    'all': (['.*'], 11_901_408_320),
}


@pytest.mark.parametrize('name', TRAINABLE)
def test_what_is_trained_is_named_by_paths(full, name):
    patterns, count = TRAINABLE[name]
    trainable_filter(patterns, full)  # every pattern matches something
    rows = [line.split() for line in trainable_table(patterns, full).splitlines()[1:-1]]
    assert sum(int(row[-1].replace(',', '')) for row in rows) == count
    assert sum(parameter_sizes(full).values()) == 11_901_408_320


def test_the_published_size_is_traced_and_sharded(full):
    """Every dimension that lies on a mesh axis is divided by eight."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    visual = Visual(
        clean_BT=struct(2, 1),
        context_images=(struct(2, 102, 170, 16), struct(2, 128, 128, 16)),
        guidance_B=struct(2),
        pooled_BD=struct(2, 768),
    )
    velocity = lambda model, z, visual, t, text, length: model.velocity(
        model.patchify(z, visual), t, text, length
    )
    z, t, text = struct(2, 1, 128, 136, 16), struct(2, 1), struct(2, 512, 4096)
    out = jax.eval_shape(velocity, full, z, visual, t, text, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert (out.shape, out.dtype) == (z.shape, jnp.float32)
    assert full.grid((1, 128, 136)) == (1, 64, 68)
    assert (full.latent_channels, full.context_width, full.width) == (16, 4096, 3072)
    placed = set()
    for path, variable in nnx.to_flat_state(nnx.state(full, nnx.Param)):
        name = '/'.join(map(str, path))
        for size, axis in zip(variable.shape, partition_spec(variable), strict=True):
            assert axis is None or size % 8 == 0, name
            placed |= {(path[-2], axis)}
    assert {('to_q', 'tensor'), ('to_add_out', 'fsdp'), ('proj_mlp', 'tensor')} <= placed


def test_a_lone_file_of_schnell(lone, tmp_path):
    """Which has no embedding of guidance; and one whose head is not shared as published."""
    arrays = published.tensors(lone)
    kept = {name: a for name, a in arrays.items() if not name.startswith('guidance_in')}
    for name, tensors in (('schnell', kept), ('dev', arrays)):
        (tmp_path / name).mkdir()
        safetensors.numpy.save_file(tensors, tmp_path / name / 'flux1.safetensors')
    with pytest.raises(InputError, match=r'no guidance_in.*: this is FLUX.1-schnell, only'):
        convert.load('flux', str(tmp_path / 'schnell'))
    with pytest.raises(InputError, match=r'axes_dims_rope \[16, 56, 56\] sum to 128, .* is 16$'):
        convert.load('flux', str(tmp_path / 'dev'))
    (tmp_path / 'dev/config.json').write_text(json.dumps({'axes_dim': [4, 6, 6]}))
    assert convert.load('flux', str(tmp_path / 'dev')).config == read_config(lone)
    (tmp_path / 'dev/config.json').write_text('[]')
    with pytest.raises(InputError, match='is not the config of a FLUX transformer'):
        convert.load('flux', str(tmp_path / 'dev'))


# ------------------------------------------------------------ config.json


def _read(folder: pathlib.Path, values: Any) -> FluxConfig:
    (folder / 'config.json').write_text(json.dumps(values))
    return read_config(folder)


def test_the_published_configs(tmp_path):
    for name in NAMES[:2]:
        values = _manifest(name)['config']
        config = _read(tmp_path, values)
        assert (config.width, config.num_layers, config.num_single_layers) == (3072, 19, 38)
        assert config.axes_dims_rope == (16, 56, 56)
        assert config.to_json() == values
        assert _read(tmp_path, values | {'out_channels': 64}) == config
        # The oldest file lacks these.
        old = {k: v for k, v in values.items() if k not in ('axes_dims_rope', 'out_channels')}
        old |= {'_diffusers_version': '0.30.0.dev0', '_name_or_path': '../flux-dev/transformer'}
        assert _read(tmp_path, old) == config
    native = _manifest('flux1_dev_bfl')['config']
    assert tuple(native['axes_dim']) == config.axes_dims_rope
    assert (native['hidden_size'], native['depth']) == (config.width, config.num_layers)


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        (dict(guidance_embeds=False), 'guidance_embeds is False: this is FLUX.1-schnell, only'),
        (dict(guidance_embeds=None), 'guidance_embeds is None: this is FLUX.1-schnell'),
        (dict(in_channels=384, out_channels=64), 'out_channels is 64, only None is supported'),
        (dict(in_channels=66), 'in_channels 66 is no multiple of 4'),
        (dict(patch_size=2), 'patch_size is 2, only 1 is supported'),
        (dict(axes_dims_rope=[16, 56]), r'axes_dims_rope \[16, 56\] are not three even numbers'),
        (dict(axes_dims_rope=[15, 57, 56]), r'axes_dims_rope \[15, 57, 56\] are not three even'),
        (dict(axes_dims_rope=[32, 32, 32]), 'sum to 96, attention_head_dim is 128'),
        (dict(num_single_layers=0), 'num_single_layers 0 is no positive integer'),
        (dict(num_attention_heads='24'), "num_attention_heads '24' is no positive integer"),
        (dict(_class_name='ChromaTransformer2DModel'), "_class_name is 'Chroma"),
        (dict(theta=1e4, mlp_ratio=4), 'mlp_ratio is unknown; theta is unknown'),
    ],
)
def test_a_config_that_is_refused(tmp_path, changes, words):
    with pytest.raises(InputError, match=words) as caught:
        _read(tmp_path, _manifest('flux1_dev')['config'] | changes)
    assert str(caught.value).startswith(f'{tmp_path}/config.json: ')
    assert '\n' not in str(caught.value)


def test_no_config(tmp_path):
    with pytest.raises(InputError, match=r'no config.json in .*; give the folder of a FLUX'):
        read_config(tmp_path)
    values = _manifest('flux1_dev')['config']
    del values['num_layers']
    odd_axes = values | {'num_layers': 19, 'axes_dims_rope': 128}
    for odd, words in (({}, 'in_channels'), ([], 'TypeError'), (values, 'num_layers')):
        with pytest.raises(InputError, match=f'is not the config of a FLUX .*{words}'):
            _read(tmp_path, odd)
    with pytest.raises(InputError, match=r'is not the config of a FLUX .*TypeError'):
        _read(tmp_path, odd_axes)
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(InputError, match='is not the config of a FLUX'):
        read_config(tmp_path)


def test_every_size_counts():
    """None of the config's fields is forgotten when it is written."""
    config = FluxConfig(8, 1, 2, 12, 3, 5, 7, (2, 4, 6))
    written = config.to_json() | {'axes_dims_rope': (2, 4, 6)}
    assert dataclasses.asdict(config).items() <= written.items()
