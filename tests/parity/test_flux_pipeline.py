"""The whole FluxKontextPipeline of diffusers, through sample.py: text to picture, and editing."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from transformers import CLIPTokenizer, T5Tokenizer

from convert.importing import import_weights
from metacanvas_jax.backbones.flux import picture_ids
from metacanvas_jax.flow.solver import SOLVERS
from tests import published_encoders, published_flux, tiny
from tests.test_bad_input import assert_one_line, run  # noqa: F401  (a fixture)
from tests.test_encoder_prompts import CLIP_ROOM, T5_ROOM, clip_folder, t5_folder
from tests.test_resume import finished

STRIDE, STEPS = 32, 28
HEIGHT, WIDTH = 192, 128
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
    sizes = dict(pooled_projection_dim=published_encoders.CLIP['hidden_size'])
    transformer = published_flux.randomise(FluxTransformer2DModel(**published_flux.SIZES | sizes))
    with torch.no_grad():  # that it moves the latents
        transformer.proj_out.weight.mul_(100)
    widths = (4, 4, 4, 4, 8, 8)  # of so many stages that a context image is a few hundred tokens
    sizes = dict(block_out_channels=widths, latent_channels=4, norm_num_groups=2)
    vae: Any = AutoencoderKL(
        down_block_types=('DownEncoderBlock2D',) * len(widths),
        up_block_types=('UpDecoderBlock2D',) * len(widths),
        **published_encoders.AE | sizes | dict(layers_per_block=1),
    )
    modules = {
        'transformer': transformer,
        'vae': published_encoders.randomise(vae),
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
def test_pictures_of_the_whole_pipeline(pipeline, tmp_path, task):
    """28 Euler steps in fp32: of text with a negative prompt, of a picture as published."""
    pipe, flags = pipeline
    rng = np.random.default_rng(0)
    source = Image.fromarray(rng.integers(0, 256, (7, 10, 3), np.uint8)).resize((211, 145))
    source.save(tmp_path / 'source.png')
    height, width = (832, 1216) if task == 'edit' else (HEIGHT, WIDTH)
    h, w = height // STRIDE, width // STRIDE
    noise = rng.normal(size=(2, h, w, 4)).astype(np.float32)
    np.save(tmp_path / 'noise.npy', noise)
    asked = {
        'text': [
            *(f'--height={HEIGHT}', f'--width={WIDTH}'),
            *('--guidance=2.5', f'--negative_prompt={NEGATIVE}'),
        ],
        'edit': ['--task=edit', f'--image={tmp_path / "source.png"}'],
    }
    finished(
        'sample.py',
        '--config=configs/base.py:flux',
        *flags,
        f'--prompt={PROMPT}',
        f'--noise={tmp_path / "noise.npy"}',
        *asked[task],
        f'--latents={tmp_path / "latents.npy"}',
        f'--output={tmp_path / "out.png"}',
    )
    grids = [(h // 2, w // 2)]
    options: dict[str, Any] = dict(
        prompt=[PROMPT] * 2,
        height=height,
        width=width,
        max_area=height * width,
        max_sequence_length=T5_ROOM,
        latents=torch.cat([published_flux.pack(z) for z in noise]),
    )
    if task == 'text':
        options |= dict(negative_prompt=[NEGATIVE] * 2, true_cfg_scale=2.5)
    else:
        options |= dict(image=source)
        grids.append((13, 19))  # of 832 x 1248, whose width is cut to whole tokens
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs['img_ids']), with_kwargs=True
    )
    theirs = {output: pipe(**options, output_type=output).images for output in ('latent', 'np')}
    hook.remove()
    tokens = h * w // 4
    solver = SOLVERS['euler_dynamic']
    times = solver.times(STEPS, solver.shift(tokens))
    assert np.asarray(times).tobytes() == pipe.scheduler.sigmas.numpy().tobytes()
    assert np.array_equal(seen[0].numpy(), picture_ids(grids))
    want = theirs['latent'].numpy()
    ours = np.load(tmp_path / 'latents.npy')
    packed = np.concatenate([published_flux.pack(z).numpy() for z in ours])
    print(task, 'latents', tiny.error(packed, want))
    assert tiny.error(packed, want) <= 1e-3
    assert not np.allclose(ours, noise, atol=0.1)
    for i in range(2):
        picture = np.asarray(Image.open(tmp_path / f'out_{i}.png'), int)
        want = (theirs['np'][i] * 255).round().astype(int)
        assert picture.shape == (height, width, 3)
        assert np.abs(picture - want).max() <= 1
        assert want.std() > 5  # a picture, not one colour
