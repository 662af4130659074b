"""The whole pipelines of Wan2.2-TI2V-5B, through sample.py: text, and a first frame, to video."""

import json
import types
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import (
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.wan import pipeline_wan_i2v
from PIL import Image
from transformers import T5Tokenizer

from configs import base
from convert.importing import import_weights
from tests import published_encoders, published_wan, published_wan_vae, tiny
from tests.test_bad_input import assert_one_line, run  # noqa: F401  (a fixture)
from tests.test_encoder_prompts import t5_folder
from tests.test_resume import finished

HEIGHT, WIDTH, FRAMES, STEPS = 32, 48, 9, 20
LATENTS = (3, 4, 6, 5)  # (T, H, W, C): a frame in 4, a pixel in 8 x 8
PROMPT = 'A red Circle  moves\nright'


@pytest.fixture(scope='module')
def published(tmp_path_factory) -> tuple[dict[str, Any], list[str]]:
    """Theirs, and the flags that give ours the same weights, each converted from its folder."""
    folder = tmp_path_factory.mktemp('wan')
    tokenizer = t5_folder(folder / 'tokenizer')
    encoder = published_encoders.t5('umt5')
    sizes = published_wan.SIZES | dict(text_dim=encoder.config.d_model)
    parts = {
        'transformer': published_wan.randomise(WanTransformer3DModel(**sizes)),
        'vae': published_wan_vae.reference('small'),
        'text_encoder': encoder,
    }
    flags = []
    for name, component, weights in (
        ('transformer', 'wan', 'backbone'),
        ('vae', 'wan_vae', 'vae'),
        ('text_encoder', 'umt5', 'text_encoder'),
    ):
        parts[name].save_pretrained(folder / name)
        import_weights(component, str(folder / name), str(folder / 'ours' / weights))
        flags.append(f'--config.weights.{weights}={folder / "ours" / weights}')
    parts['tokenizer'] = T5Tokenizer.from_pretrained(tokenizer)
    parts['scheduler'] = UniPCMultistepScheduler(**published_wan.SCHEDULER)
    return parts, flags


@pytest.mark.parametrize('task', ['text', 'first frame'])
def test_videos_of_the_whole_pipeline(published, tmp_path, task, monkeypatch):
    """20 steps of UniPC with guidance 5 and the published negative prompt, in fp32."""
    # Not installed; this pipeline wants it for texts in a wrong encoding.
    ftfy = types.SimpleNamespace(fix_text=lambda text: text)
    monkeypatch.setattr(pipeline_wan_i2v, 'ftfy', ftfy, raising=False)
    parts, flags = published
    rng = np.random.default_rng(0)
    noise = rng.normal(size=LATENTS).astype(np.float32)
    np.save(tmp_path / 'noise.npy', noise)
    picture = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / 'first.png')
    finished(
        'sample.py',
        '--config=configs/base.py:wan',
        *flags,
        '--config.dtype=float32',
        '--config.text_encoder.tokens=20',
        f'--prompt={PROMPT}',
        *([f'--image={tmp_path / "first.png"}'] if task == 'first frame' else []),
        f'--noise={tmp_path / "noise.npy"}',
        f'--height={HEIGHT}',
        f'--width={WIDTH}',
        f'--frames={FRAMES}',
        f'--steps={STEPS}',
        f'--latents={tmp_path / "latents.npy"}',
        f'--output={tmp_path / "out.mp4"}',
    )
    asked: dict[str, Any] = dict(
        prompt=PROMPT,
        negative_prompt=base.WAN_NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        max_sequence_length=20,
        latents=torch.from_numpy(noise).permute(3, 0, 1, 2)[None],
        output_type='latent',
    )
    if task == 'text':
        pipe = WanPipeline(**parts, expand_timesteps=True)
    else:
        pipe = WanImageToVideoPipeline(
            **parts, image_encoder=None, image_processor=None, expand_timesteps=True
        )
        asked['image'] = Image.fromarray(picture)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(**asked).frames[0].permute(1, 2, 3, 0).numpy()
    ours = np.load(tmp_path / 'latents.npy')
    assert tiny.error(ours, theirs) <= 1e-3
    assert not np.allclose(ours, noise, atol=0.1)
    with av.open(str(tmp_path / 'out.mp4')) as video:
        frames = [frame.to_ndarray(format='rgb24') for frame in video.decode(video=0)]
        told = json.loads(video.metadata['comment'])
        assert video.streams.video[0].average_rate == 24
    assert np.shape(frames) == (FRAMES, HEIGHT, WIDTH, 3)
    assert (told['prompt'], told['seed']) == (PROMPT, 0)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (['--frames=8'], r'frames 8 is not 1 more than a multiple of 4 \(nearest: 5\)'),
        (['--height=40'], r'height 40 is not a multiple of 16 \(nearest: (32|48)\)'),
        (['--frames=1', '--image=HERE/a.png'], r'a picture has no first frame; ask for several'),
        (['--video=a.mp4'], r'--video goes with --task describe'),
    ],
)
def test_bad_input(published, tmp_path, run, args, message):  # noqa: F811
    _, flags = published
    Image.new('RGB', (8, 8)).save(tmp_path / 'a.png')
    asked = ['--prompt=a cat', f'--output={tmp_path / "out.mp4"}', '--height=32', '--width=48']
    asked += [word.replace('HERE', str(tmp_path)) for word in args]
    code, stderr = run('sample', '--config=configs/base.py:wan', *flags, *asked)
    assert_one_line(code, stderr, message)
