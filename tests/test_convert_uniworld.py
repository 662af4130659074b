"""UniWorld-V1's projector as our context connector; what lies beside it is left."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy
import torch

import convert
from convert.checking import check_manifest
from convert.exporting import export_weights
from convert.importing import import_weights
from metacanvas_jax.canvas.context_connector import ContextConnector
from metacanvas_jax.types import InputError
from metacanvas_jax.weights import weight_shapes
from tests import published, tiny

MANIFEST = pathlib.Path(__file__).parent / 'manifests/uniworld_v1_connector.json'
PREFIX = 'denoise_tower.denoise_projector.'
MLP = torch.nn.Sequential(torch.nn.Linear(10, 18), torch.nn.SiLU(), torch.nn.Linear(18, 6))
STATE = {f'{PREFIX}{name}': tensor for name, tensor in MLP.state_dict().items()}
OTHERS = {
    'denoise_tower.vae_projector.0.weight': torch.zeros(3, 4),
    'denoise_tower.siglip_projector.2.bias': torch.zeros(3),
    'denoise_tower.denoiser.x_embedder.weight': torch.zeros(3, 4),
    'model.layers.0.self_attn.q_proj.bias': torch.zeros(3),
    'visual.blocks.0.mlp.gate_proj.weight': torch.zeros(3, 4),
    'lm_head.weight': torch.zeros(3, 4),
}


def test_the_published_checkpoint_fits():
    report, fits = check_manifest('uniworld_connector', str(MANIFEST))
    assert fits
    first, *left = report.splitlines()
    count = '12 tensors, 171678720 parameters, 0 unused, 0 unfilled, 0 misshapen'
    assert first == f'uniworld_v1_connector: {count}'
    assert [line.split(': ')[0] for line in left] == [
        f'4 tensors denoise_tower.{name}_projector.* are left' for name in ('vae', 'siglip')
    ]


@pytest.mark.parametrize('others', [{}, OTHERS], ids=['alone', 'whole'])
def test_there_and_back(tmp_path, others):
    """From the file of stage 1, and out of the whole checkpoint."""
    path = tmp_path / 'denoise_projector.bin'
    torch.save(STATE | others, path)
    import_weights('uniworld_connector', str(path), str(tmp_path / 'target'))
    assert weight_shapes(tmp_path / 'target') == {
        **{'up/kernel': (10, 18), 'up/bias': (18,)},
        **{'down/kernel': (18, 6), 'down/bias': (6,)},
    }
    export_weights('uniworld_connector', str(tmp_path / 'target'), str(tmp_path / 'back'))
    want = {name: tensor.numpy() for name, tensor in STATE.items()}
    published.same(published.tensors(tmp_path / 'back'), want)
    module = convert.load('uniworld_connector', str(path))
    assert isinstance(module, ContextConnector)
    states, length = tiny.normal(2, 5, 10), np.array([5, 3])
    context, length_B = module(states, length, None)
    with torch.no_grad():
        expected = MLP(torch.tensor(np.asarray(states)))
    assert tiny.error(context, expected) <= 1e-5
    assert length_B.tolist() == [5, 3]
    convert.export('uniworld_connector', module, tmp_path / 'module')
    published.same(published.tensors(tmp_path / 'module'), want)


def test_what_does_not_fit(tmp_path):
    third = {f'{PREFIX}4.weight': torch.zeros(6, 6)}  # a deeper one
    for state, words in (
        (STATE | third, f'1 unused: {PREFIX}4.weight'),
        ({k: v for k, v in STATE.items() if k != f'{PREFIX}2.bias'}, f'lacks {PREFIX}2.bias'),
        ({k: v for k, v in STATE.items() if k != f'{PREFIX}2.weight'}, 'is no uniworld_connector'),
    ):
        file = tmp_path / 'odd.safetensors'
        safetensors.numpy.save_file({name: a.numpy() for name, a in state.items()}, file)
        with pytest.raises(InputError, match=words):
            convert.load('uniworld_connector', str(file))


def test_the_manifest_s_sizes(tmp_path):
    config = json.loads(MANIFEST.read_text())['config']
    torch.save(STATE, tmp_path / 'x.bin')
    import_weights('uniworld_connector', str(tmp_path / 'x.bin'), str(tmp_path / 'target'))
    written = json.loads((tmp_path / 'target/config.json').read_text())
    assert written.keys() <= config.keys()
    assert (written['input_hidden_size'], written['output_hidden_size']) == (10, 6)
