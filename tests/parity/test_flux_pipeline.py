"""The whole FluxKontextPipeline of diffusers, through sample.py: text to picture, and editing."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image
from transformers import CLIPTokenizer, T5Tokenizer

from convert.importing import import_weights
from metacanvas_jax.backbones.flux import picture_ids
from metacanvas_jax.data import kontext_sizes
from metacanvas_jax.flow.solver import SOLVERS
from metacanvas_jax.flow.times import dynamic_shift
from tests import published_encoders, published_flux, tiny
from tests.test_bad_input import assert_one_line, run  # noqa: F401  (a fixture)
from tests.test_encoder_prompts import CLIP_ROOM, T5_ROOM, clip_folder, t5_folder

STRIDE, STEPS, CHANNELS = 4, 28, 5
HEIGHT, WIDTH = 24, 16
PROMPT, NEGATIVE = 'A red Cat  left of a circle', 'a city'
PARTS = {  # what diffusers calls them: the component, and our config's name
    'transformer': ('flux', 'backbone'),
    'vae': ('flux_ae', 'vae'),
    'text_encoder_2': ('t5', 'text_encoder'),
    'text_encoder': ('clip', 'pooled_encoder'),
}


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory) -> tuple[Any, list[str]]:
    """Theirs, and the flags that give ours the same weights, each converted from its folder."""
    folder = tmp_path_factory.mktemp('flux')
    tokenizers = clip_folder(folder / 'tokenizer'), t5_folder(folder / 'tokenizer_2')
    sizes = dict(in_channels=4 * CHANNELS)
    sizes |= dict(pooled_projection_dim=published_encoders.CLIP['hidden_size'])
    transformer = published_flux.randomise(FluxTransformer2DModel(**published_flux.SIZES | sizes))
    with torch.no_grad():  # that it moves the latents
        transformer.proj_out.weight.mul_(100)
    modules = {
        'transformer': transformer,
        'vae': published_encoders.autoencoder('three stages'),
        'text_encoder_2': published_encoders.t5('t5'),
        'text_encoder': published_encoders.clip(vocab_size=517, max_position_embeddings=CLIP_ROOM),
    }
    flags = []
    for name, (component, weights) in PARTS.items():
        modules[name].save_pretrained(folder / name)
        import_weights(component, str(folder / name), str(folder / 'ours' / weights))
        flags.append(f'--config.weights.{weights}={folder / "ours" / weights}')
    pipe: Any = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**published_flux.SCHEDULER),
        tokenizer=CLIPTokenizer.from_pretrained(tokenizers[0]),
        tokenizer_2=T5Tokenizer.from_pretrained(tokenizers[1]),
        **modules,
    )
    pipe.set_progress_bar_config(disable=True)
    flags += [f'--config.text_encoder.tokens={T5_ROOM}']
    return pipe, [*flags, f'--config.pooled_encoder.tokens={CLIP_ROOM}', '--config.dtype=float32']


@pytest.mark.parametrize('task', ['text', 'edit'])
def test_pictures_of_the_whole_pipeline(pipeline, tmp_path, run, task, monkeypatch):  # noqa: F811
    """28 Euler steps in fp32: of text, steered away from another one; of a picture and text."""
    # A sixteenth of the sides; tests/test_kontext_sizes.py has the true sizes.
    sizes = [(height // 16, width // 16) for height, width in kontext_sizes.KONTEXT_SIZES]
    monkeypatch.setattr(kontext_sizes, 'KONTEXT_SIZES', sizes)
    theirs = [(width, height) for height, width in sizes]
    monkeypatch.setattr(pipeline_flux_kontext, 'PREFERRED_KONTEXT_RESOLUTIONS', theirs)
    pipe, flags = pipeline
    rng = np.random.default_rng(0)
    source = Image.fromarray(rng.integers(0, 256, (7, 10, 3), np.uint8)).resize((211, 145))
    source.save(tmp_path / 'source.png')
    batch, h, w = 2 if task == 'text' else 1, HEIGHT // STRIDE, WIDTH // STRIDE
    noise = rng.normal(size=(batch, h, w, CHANNELS)).astype(np.float32)
    np.save(tmp_path / 'noise.npy', noise)
    asked = {
        'text': ['--guidance=2.5', f'--negative_prompt={NEGATIVE}'],
        'edit': ['--task=edit', f'--image={tmp_path / "source.png"}'],
    }
    code, stderr = run(
        'sample',
        '--config=configs/base.py:flux',
        *flags,
        f'--prompt={PROMPT}',
        f'--noise={tmp_path / "noise.npy"}',
        f'--height={HEIGHT}',
        f'--width={WIDTH}',
        *asked[task],
        f'--latents={tmp_path / "latents.npy"}',
        f'--output={tmp_path / "out.png"}',
    )
    assert code == 0, stderr
    options: dict[str, Any] = dict(
        prompt=[PROMPT] * batch,
        height=HEIGHT,
        width=WIDTH,
        max_area=HEIGHT * WIDTH,
        max_sequence_length=T5_ROOM,
        latents=torch.cat([published_flux.pack(z) for z in noise]),
        output_type='latent',
    )
    grids = [(h // 2, w // 2)]
    if task == 'text':
        options |= dict(negative_prompt=[NEGATIVE] * batch, true_cfg_scale=2.5)
    else:
        options |= dict(image=source)
        grids.append((6, 9))  # of 52 x 78 pixels, of which whole tokens are left
    ids = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: ids.append(kwargs['img_ids']), with_kwargs=True
    )
    want = pipe(**options).images
    hook.remove()
    times = SOLVERS['euler_dynamic'].times(STEPS, dynamic_shift(h * w // 4))
    assert np.asarray(times).tobytes() == pipe.scheduler.sigmas.numpy().tobytes()
    assert np.array_equal(ids[0].numpy(), picture_ids(grids))

    ours = np.load(tmp_path / 'latents.npy').reshape(noise.shape)
    packed = np.concatenate([published_flux.pack(z).numpy() for z in ours])
    assert tiny.error(packed, want) <= 1e-4
    assert np.abs(ours - noise).max() > 0.5
    pictures = decoded(pipe, want)
    for i in range(batch):
        path = tmp_path / (f'out_{i}.png' if batch > 1 else 'out.png')
        picture = np.asarray(Image.open(path), int)
        assert picture.shape == (HEIGHT, WIDTH, 3)
        assert np.abs(picture - pictures[i]).max() <= 1
        assert picture.std() > 5  # not one colour


@torch.no_grad()
def decoded(pipe, packed) -> np.ndarray:
    """What the pipeline makes of its latents."""
    z = pipe._unpack_latents(packed, HEIGHT, WIDTH, pipe.vae_scale_factor)
    z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    pictures = pipe.image_processor.postprocess(pipe.vae.decode(z).sample, output_type='np')
    return (pictures * 255).round().astype(int)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--task=edit'], r'--task edit wants --image, the picture that --prompt is to change'),
        (['--config.weights.backbone=HERE/schnell'], r'this is FLUX.1-schnell, only FLUX.1-dev'),
        (['--config.weights.pooled_encoder=random'], r'config.weights.pooled_encoder is missing'),
    ],
)
def test_bad_input(pipeline, tmp_path, run, args, message):  # noqa: F811
    _, flags = pipeline
    (tmp_path / 'schnell').mkdir()
    values = published_flux.SIZES | dict(guidance_embeds=False)
    (tmp_path / 'schnell/config.json').write_text(json.dumps(values))
    asked = ['--prompt=a cat', f'--output={tmp_path / "out.png"}', *args]
    asked = [word.replace('HERE', str(tmp_path)) for word in asked]
    code, stderr = run('sample', '--config=configs/base.py:flux', *flags, *asked)
    assert_one_line(code, stderr, message)
