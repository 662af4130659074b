"""Published weights -> ours -> published: the same bits, and a reference that loads them."""

import hashlib
import json
import pathlib
import signal
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from flax import traverse_util
from transformers import Qwen2_5_VLForConditionalGeneration

import convert
from convert import target
from convert.checking import check_manifest
from convert.exporting import export_weights
from convert.family import parameters
from convert.importing import import_weights
from metacanvas_jax.build import shipped
from metacanvas_jax.mllm.positions import prefix_positions
from metacanvas_jax.types import InputError
from metacanvas_jax.weights import load_weights
from tests import published
from tests import tiny as tiny_models

ROOT = pathlib.Path(__file__).parents[1]
MANIFESTS = pathlib.Path(__file__).parent / 'manifests'
QWEN = 'qwen2_5_vl'
BITS = {'bfloat16': torch.bfloat16, 'float32': torch.float32}


@pytest.fixture(scope='module')
def tied(tmp_path_factory):
    return published.save(tmp_path_factory.mktemp('published') / 'tied')


@pytest.fixture(scope='module')
def imported(tied, tmp_path_factory):
    folder = tmp_path_factory.mktemp('imported') / 'target'
    import_weights(QWEN, str(tied), str(folder))
    return folder


def arrays(folder: pathlib.Path) -> dict[str, Any]:
    """The parameters of a target, as anyone's Orbax restores them."""
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(folder / 'params')
    return dict(traverse_util.flatten_dict(tree, sep='/'))


# ------------------------------------------------------------ there and back


@pytest.mark.parametrize('dtype', BITS)
@pytest.mark.parametrize('is_tied', [True, False])
@pytest.mark.parametrize('piece', [target.PIECE, 1000])
def test_there_and_back(tmp_path, monkeypatch, dtype, is_tied, piece):
    """Also with parameters written layer by layer and some rows at a time."""
    monkeypatch.setattr(target, 'PIECE', piece)
    source = published.save(tmp_path / 'source', tied=is_tied, dtype=BITS[dtype])
    told = import_weights(QWEN, str(source), str(tmp_path / 'target'))
    count = 68 if is_tied else 69
    assert f'{count} tensors' in told
    assert told.endswith(dtype)
    export_weights(QWEN, str(tmp_path / 'target'), str(tmp_path / 'back'), limit=100_000)
    assert len(list((tmp_path / 'back').glob('*.safetensors'))) >= 3
    published.same(published.tensors(tmp_path / 'back'), published.tensors(source))
    config, back = (
        json.loads((tmp_path / f / 'config.json').read_text()) for f in ('source', 'back')
    )
    assert config == back


def test_the_reference_loads_what_was_exported(tied, imported, tmp_path):
    export_weights(QWEN, str(imported), str(tmp_path / 'back'), limit=100_000)
    load: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained
    model, info = load(tmp_path / 'back', output_loading_info=True)
    assert not any(info.values()), info
    for name, value in published.reference(tied=True).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_the_target_is_an_orbax_tree_of_our_parameters(tied, imported):
    """Where a tensor goes, said once more by hand; a round trip would not notice."""
    ours, theirs = arrays(imported), published.tensors(tied)
    assert ours.keys() == parameters(convert.load(QWEN, str(tied))).keys()
    for i in range(3):
        layer = f'model.layers.{i}.'
        for name in ('self_attn/q_proj', 'self_attn/o_proj', 'mlp/down_proj'):
            kernel = ours[f'language/layers/{name}/kernel'][i]
            np.testing.assert_array_equal(
                kernel, theirs[f'{layer}{name.replace("/", ".")}.weight'].T
            )
        np.testing.assert_array_equal(
            ours['language/layers/self_attn/k_proj/bias'][i],
            theirs[f'{layer}self_attn.k_proj.bias'],
        )
    patches = theirs['visual.patch_embed.proj.weight']
    assert patches.shape == (32, 3, 2, 4, 4)
    np.testing.assert_array_equal(ours['vision/patch_embed/kernel'], patches.reshape(32, -1).T)
    np.testing.assert_array_equal(
        ours['language/embed_tokens'], theirs['model.embed_tokens.weight']
    )
    np.testing.assert_array_equal(
        ours['vision/merger/fc2/kernel'], theirs['visual.merger.mlp.2.weight'].T
    )


@pytest.mark.parametrize('is_tied', [True, False])
def test_converted_weights_make_the_reference_s_logits(tmp_path, is_tied):
    source = published.save(tmp_path / 'source', tied=is_tied)
    module = convert.load(QWEN, str(source))
    ids = np.arange(3, 15)
    positions, _ = prefix_positions(list(ids), module.config)
    with torch.no_grad():
        theirs = published.reference(tied=is_tied)(torch.tensor(ids)[None]).logits

    @jax.jit
    def logits(module, ids_BL, positions_B3L):
        x = module.language.embed(ids_BL).astype(jnp.float32)
        return module.language.logits(module.language.prefix(x, positions_B3L, jnp.array([12]))[0])

    ours = logits(module, ids[None], positions[None])
    assert tiny_models.error(ours, theirs.numpy()) <= 1e-5


# ------------------------------------------------------------ forms of a source


def _in_memory_names(tensors):
    old = {'visual.': 'model.visual.', 'model.': 'model.language_model.'}

    def renamed(name):
        prefix = next((p for p in old if name.startswith(p)), None)
        return name if prefix is None else old[prefix] + name.removeprefix(prefix)

    return {renamed(name): array for name, array in tensors.items()}


def _pth(folder, target):
    target.mkdir()
    state = {name: torch.tensor(a) for name, a in published.tensors(folder).items()}
    torch.save(state, target / 'weights.pth')
    (target / 'config.json').write_bytes((folder / 'config.json').read_bytes())
    return target


def _one_file(folder, target):
    return published.rewrite(folder, target, lambda tensors: tensors)


def _no_index(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        if not file.name.endswith('index.json'):
            (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    ('form', 'file'),
    [
        (lambda folder, target: published.rewrite(folder, target, lambda t: t), ''),
        (
            lambda folder, target: published.rewrite(folder, target, lambda t: t),
            'model.safetensors',
        ),
        (lambda folder, target: published.rewrite(folder, target, _in_memory_names), ''),
        (lambda folder, target: folder, 'model.safetensors.index.json'),
        (_no_index, ''),
        (_pth, ''),
        (_pth, 'weights.pth'),
    ],
)
def test_forms_of_a_source(tied, imported, tmp_path, form, file):
    source = form(tied, tmp_path / 'source') / file
    import_weights(QWEN, str(source), str(tmp_path / 'target'))
    published.same(arrays(tmp_path / 'target'), arrays(imported))


def test_a_pth_in_bfloat16(tmp_path):
    source = published.save(tmp_path / 'source', dtype=torch.bfloat16)
    import_weights(QWEN, str(source), str(tmp_path / 'a'))
    (tmp_path / 'pth').mkdir()
    torch.save(
        {
            name: torch.tensor(a.view(np.uint16)).view(torch.bfloat16)
            for name, a in published.tensors(source).items()
        },
        tmp_path / 'pth/weights.bin',
    )
    (tmp_path / 'pth/config.json').write_bytes((source / 'config.json').read_bytes())
    import_weights(QWEN, str(tmp_path / 'pth'), str(tmp_path / 'b'))
    published.same(arrays(tmp_path / 'b'), arrays(tmp_path / 'a'))


def test_dtype(tied, imported, tmp_path):
    import_weights(QWEN, str(tied), str(tmp_path / 'half'), dtype='bfloat16')
    whole, half = arrays(imported), arrays(tmp_path / 'half')
    published.same(half, {k: a.astype(ml_dtypes.bfloat16) for k, a in whole.items()})
    value = torch.tensor(whole['language/norm/scale']).to(torch.bfloat16).view(torch.uint16)
    np.testing.assert_array_equal(half['language/norm/scale'].view(np.uint16), value.numpy())
    source = published.save(tmp_path / 'source', dtype=torch.bfloat16)
    import_weights(QWEN, str(source), str(tmp_path / 'more'), dtype='float32')
    bits = {k: a.astype(np.float32) for k, a in parameters(convert.load(QWEN, str(source))).items()}
    published.same(arrays(tmp_path / 'more'), bits)


def test_norms_in_fp32_among_bf16(tmp_path):
    """Whole parameters of another dtype stay as they are; a stack of two dtypes is a question."""
    half = published.save(tmp_path / 'half', dtype=torch.bfloat16)

    def widen(names):
        return lambda tensors: {
            name: a.astype(np.float32) if any(n in name for n in names) else a
            for name, a in tensors.items()
        }

    source = published.rewrite(half, tmp_path / 'norms', widen(['layernorm']))
    import_weights(QWEN, str(source), str(tmp_path / 'a'))
    assert arrays(tmp_path / 'a')['language/layers/input_layernorm/scale'].dtype == np.float32
    export_weights(QWEN, str(tmp_path / 'a'), str(tmp_path / 'back'))
    published.same(published.tensors(tmp_path / 'back'), published.tensors(source))
    source = published.rewrite(half, tmp_path / 'one', widen(['model.layers.1.input_layernorm']))
    with pytest.raises(InputError, match='is in bfloat16 and float32 on disk; give --dtype'):
        import_weights(QWEN, str(source), str(tmp_path / 'b'))
    import_weights(QWEN, str(source), str(tmp_path / 'b'), dtype='float32')


# ------------------------------------------------------------ what else a target holds


def test_the_record_of_a_conversion(tied, imported):
    record = json.loads((imported / 'conversion.json').read_text())
    assert (record['component'], record['source']) == (QWEN, str(tied))
    assert record['dtype'] == 'float32'
    files = sorted(tied.glob('*.safetensors'))
    assert record['files'] == [
        {
            'name': file.name,
            'size': file.stat().st_size,
            'sha256': hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files
    ]
    assert (imported / 'config.json').read_bytes() == (tied / 'config.json').read_bytes()
    assert not list(imported.parent.glob('.*'))


@pytest.mark.parametrize('where', ['given', 'tied', 'tokenizer', 'nowhere'])
def test_the_tokenizer(tied, tmp_path, where):
    source = tmp_path / ('text_encoder' if where == 'tokenizer' else 'tied')
    source.symlink_to(tied) if where != 'tied' else _no_index(tied, source)
    folder = source if where == 'tied' else tmp_path / where
    folder.mkdir(exist_ok=True)
    if where != 'nowhere':
        (folder / 'tokenizer.json').write_text('{}')
    given = str(folder) if where == 'given' else None
    import_weights(QWEN, str(source), str(tmp_path / 'out'), tokenizer=given)
    assert (tmp_path / 'out/tokenizer.json').exists() == (where != 'nowhere')
    export_weights(QWEN, str(tmp_path / 'out'), str(tmp_path / 'back'))
    assert (tmp_path / 'back/tokenizer.json').exists() == (where != 'nowhere')


# ------------------------------------------------------------ modules


def test_a_module_there_and_back(tied, tmp_path):
    module = convert.load(QWEN, str(tied))
    assert {leaf.device.platform for leaf in parameters(module).values()} == {'cpu'}
    convert.export(QWEN, module, tmp_path / 'back')
    published.same(published.tensors(tmp_path / 'back'), published.tensors(tied))
    again = convert.load(QWEN, str(tmp_path / 'back'))
    assert again.config == module.config


def test_the_shipped_weights_are_exported(tmp_path):
    folder = shipped('tiny_qwen')
    export_weights(QWEN, str(folder), str(tmp_path / 'out'))
    ours, theirs = load_weights(folder), published.tensors(tmp_path / 'out')
    np.testing.assert_array_equal(
        theirs['model.layers.2.mlp.up_proj.weight'], ours['language/layers/mlp/up_proj/kernel'][2].T
    )
    assert sum(a.size for a in theirs.values()) == sum(a.size for a in ours.values())
    assert (tmp_path / 'out/tokenizer.json').exists()


# ------------------------------------------------------------ check


@pytest.mark.parametrize(
    ('name', 'tensors', 'count'),
    [('qwen2_5_vl_3b', 824, 3_754_622_976), ('qwen2_5_vl_7b', 729, 8_292_166_656)],
)
def test_published_checkpoints_fit(name, tensors, count):
    report, fits = check_manifest(QWEN, str(MANIFESTS / f'{name}.json'))
    assert fits
    expected = f'{tensors} tensors, {count} parameters, 0 unused, 0 unfilled, 0 misshapen'
    assert report == f'{name}: {expected}'


def test_a_checkpoint_that_does_not_fit(tmp_path):
    manifest = json.loads((MANIFESTS / 'qwen2_5_vl_3b.json').read_text())
    tensors = manifest['tensors']
    del tensors['model.layers.7.mlp.up_proj.weight']
    tensors['model.layers.36.input_layernorm.weight'] = [2048]
    tensors['lm_head.weight'] = [151936, 2048]  # the head is tied
    tensors['visual.merger.mlp.0.weight'] = [5120, 5121]
    tensors['visual.patch_embed.proj.weight'] = [1280, 1176]
    path = tmp_path / 'odd.json'
    path.write_text(json.dumps(manifest))
    report, fits = check_manifest(QWEN, str(path))
    assert not fits
    assert report.splitlines()[0].endswith('2 unused, 1 unfilled, 2 misshapen')
    assert 'mlp/up_proj/kernel lacks model.layers.7.mlp.up_proj.weight' in report
    assert '  model.layers.36.input_layernorm.weight\n' in report
    assert 'merger.mlp.0.weight (5120, 5121) makes (5121, 5120)' in report
    assert 'vision/patch_embed/kernel wants (1176, 1280)' in report


# ------------------------------------------------------------ whole or not at all

KILLED = """
import os, signal, sys
from convert import importing, target
put = target.Writer.put
def killed(self, path, *rest):
    put(self, path, *rest)
    if path == 'language/layers/mlp/up_proj/kernel':
        os.kill(os.getpid(), signal.SIGKILL)
target.Writer.put = killed
importing.import_weights('qwen2_5_vl', *sys.argv[1:])
"""


def test_killed_half_way(tied, imported, tmp_path):
    command = [sys.executable, '-c', KILLED, str(tied), str(tmp_path / 'out')]
    done = subprocess.run(command, cwd=ROOT, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / 'out').exists()
    left = list(tmp_path.iterdir())
    assert [path.name for path in left] == ['.out.partial']
    assert (left[0] / 'params').is_dir()
    import_weights(QWEN, str(tied), str(tmp_path / 'out'))
    assert list(tmp_path.iterdir()) == [tmp_path / 'out']
    published.same(arrays(tmp_path / 'out'), arrays(imported))


def test_an_error_half_way_leaves_nothing(tied, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError('No space left on device')

    monkeypatch.setattr(target.Writer, 'put', fails)
    with pytest.raises(OSError, match='No space'):
        import_weights(QWEN, str(tied), str(tmp_path / 'out'))
    assert not list(tmp_path.iterdir())


def test_two_at_once(tied, tmp_path):
    with target.new_folder(tmp_path / 'out'), pytest.raises(InputError, match='another process'):
        import_weights(QWEN, str(tied), str(tmp_path / 'out'))


def test_too_little_room(tied, tmp_path, monkeypatch):
    monkeypatch.setattr(target.shutil, 'disk_usage', lambda _: type('', (), {'free': 1000}))
    with pytest.raises(InputError, match='GB free, want'):
        import_weights(QWEN, str(tied), str(tmp_path / 'out'))
    assert not list(tmp_path.iterdir())
