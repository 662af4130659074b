"""The whole SanaPipeline of diffusers, through sample.py: latents and pictures from one noise."""

import json

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from PIL import Image
from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

from convert.importing import import_weights
from tests import published_sana, tiny
from tests.parity import test_dc_ae as dc_ae
from tests.test_bad_input import assert_one_line, run  # noqa: F401  (a fixture)
from tests.test_resume import finished
from tests.test_sana_prompts import gemma_tokenizer

HEIGHT, WIDTH, STRIDE = 64, 96, 4
PROMPTS = ['A red Circle left of a blue square ', '']
SCHEDULER = dict(published_sana.SCHEDULER, algorithm_type='dpmsolver++', solver_order=2)
GEMMA = dict(
    vocab_size=700,
    hidden_size=24,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=12,
    sliding_window=100,
)


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory) -> tuple[SanaPipeline, list[str]]:
    """Theirs, and the flags that give ours the same weights, each converted from its folder."""
    folder = tmp_path_factory.mktemp('sana')
    vae = dc_ae.theirs('small')
    sizes = published_sana.SIZES | dict(caption_channels=GEMMA['hidden_size'])
    channels = vae.config['latent_channels']
    sizes |= dict(in_channels=channels, out_channels=channels)
    transformer = published_sana.randomise(SanaTransformer2DModel(**sizes))
    encoder = Gemma2Model(Gemma2Config(**GEMMA, attn_implementation='eager')).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    (folder / 'tokenizer').mkdir()
    gemma_tokenizer().save(str(folder / 'tokenizer/tokenizer.json'))
    settings = dict(tokenizer_class='GemmaTokenizer', add_bos_token=True)
    (folder / 'tokenizer/tokenizer_config.json').write_text(json.dumps(settings))
    flags = []
    for name, module, component, weights in (
        ('transformer', transformer, 'sana', 'backbone'),
        ('vae', vae, 'dc_ae', 'vae'),
        ('text_encoder', encoder, 'gemma2', 'text_encoder'),
    ):
        module.save_pretrained(folder / name)
        import_weights(component, str(folder / name), str(folder / 'ours' / weights))
        flags.append(f'--config.weights.{weights}={folder / "ours" / weights}')
    pipe = SanaPipeline(
        GemmaTokenizer.from_pretrained(folder / 'tokenizer'),
        encoder,
        vae,
        transformer,
        DPMSolverMultistepScheduler(**SCHEDULER),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe, flags


def test_pictures_of_the_whole_pipeline(pipeline, tmp_path):
    """20 steps of DPM-Solver++ with guidance 4.5, in fp32."""
    pipe, flags = pipeline
    channels = pipe.vae.config.latent_channels
    shape = (2, HEIGHT // STRIDE, WIDTH // STRIDE, channels)
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    np.save(tmp_path / 'noise.npy', noise)
    finished(
        'sample.py',
        '--config=configs/base.py:sana',
        *flags,
        '--config.dtype=float32',
        f'--prompt={PROMPTS[0]}',
        f'--noise={tmp_path / "noise.npy"}',
        f'--height={HEIGHT}',
        f'--width={WIDTH}',
        f'--latents={tmp_path / "latents.npy"}',
        f'--output={tmp_path / "out.png"}',
    )
    theirs = {}
    for output in ('latent', 'np'):
        theirs[output] = pipe(
            prompt=[PROMPTS[0]] * 2,
            latents=torch.from_numpy(noise).permute(0, 3, 1, 2),
            height=HEIGHT,
            width=WIDTH,
            use_resolution_binning=False,
            output_type=output,
        )[0]
    latents = theirs['latent'].permute(0, 2, 3, 1).numpy()
    assert tiny.error(np.load(tmp_path / 'latents.npy'), latents) <= 1e-3
    assert not np.allclose(latents, noise, atol=0.1)
    for i in range(2):
        ours = np.asarray(Image.open(tmp_path / f'out_{i}.png'), int)
        want = (theirs['np'][i] * 255).round().astype(int)
        assert ours.shape == (HEIGHT, WIDTH, 3)
        assert np.abs(ours - want).max() <= 1
        assert want.std() > 5  # a picture, not one colour


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--height=66'], r'height 66 is not a multiple of 4 \(nearest: 64\)'),
        (['--image=HERE/a.png'], r'this system draws from text alone: give a prompt without image'),
        (['--canvas_map=map.png'], r'--canvas_map: this model has no canvas'),
        (['--task=describe'], r'this system has no MLLM to ask'),
    ],
)
def test_bad_input(pipeline, tmp_path, run, args, message):  # noqa: F811
    _, flags = pipeline
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    args = [word.replace('HERE', str(tmp_path)) for word in args]
    asked = ['--prompt=a cat', f'--output={tmp_path / "out.png"}', *args]
    code, stderr = run('sample', '--config=configs/base.py:sana', *flags, *asked)
    assert_one_line(code, stderr, message)
