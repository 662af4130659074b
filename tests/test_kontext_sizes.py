"""The size that a context image is brought to is the one that diffusers' pipeline chooses."""

import dataclasses
import itertools
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux import pipeline_flux_kontext
from PIL import Image

from configs import base
from metacanvas_jax import build
from metacanvas_jax.data.kontext_sizes import (
    KONTEXT_SIZES,
    context_pixels,
    context_size,
    nearest_kontext_size,
)
from metacanvas_jax.data.records import Record
from metacanvas_jax.geometry import Geometry
from metacanvas_jax.types import InputError


class Stop(Exception):
    """What the pipeline would do next is of no interest."""


class Pipe(pipeline_flux_kontext.FluxKontextPipeline):
    """Up to the resize of its context image, of which it tells the size."""

    _execution_device: Any = 'cpu'

    def __init__(self):
        self.default_sample_size, self.vae_scale_factor, self.latent_channels = 128, 8, 16
        self.image_processor = types.SimpleNamespace(
            get_default_height_width=lambda image: image.shape[:2], resize=self.resize
        )

    def __setattr__(self, name, value):
        object.__setattr__(self, name, value)

    def check_inputs(self, *args, **kwargs): ...

    def encode_prompt(self, **kwargs):
        return torch.zeros(1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 3)

    def resize(self, image, height, width):
        raise Stop(height, width)


def test_the_pipeline_s_choice():
    pipe, rng = Pipe(), random.Random(0)
    sizes = [(rng.randint(16, 4000), rng.randint(16, 4000)) for _ in range(300)]
    sizes += [(1, 1000), (1000, 1), (7, 7), *KONTEXT_SIZES]
    # Halfway between two ratios.
    ratios = sorted(w / h for h, w in KONTEXT_SIZES)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(ratios)]
    sizes += [(10**7, round(10**7 * ratio) + i) for ratio in middles for i in (-3, 3)]
    for size in sizes:
        with pytest.raises(Stop) as told:
            pipe(image=np.broadcast_to(0, (*size, 3)), prompt='')
        assert nearest_kontext_size(*size) == told.value.args, size


def test_the_sizes():
    theirs = pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS
    assert {(h, w) for w, h in theirs} == set(KONTEXT_SIZES)
    assert len(KONTEXT_SIZES) == 17
    for size in KONTEXT_SIZES:
        assert nearest_kontext_size(*size) == size
        assert all(side % 16 == 0 for side in size)


def test_pixels_of_a_context_image():
    """As the pipeline's image processor brings them to that size, which it counts in tokens."""
    processor = VaeImageProcessor(vae_scale_factor=16)
    pixels = np.random.default_rng(0).integers(0, 256, (145, 211, 3), np.uint8)
    # 144 x 208 of them are whole tokens, of another ratio than all: 1.444, not 1.455.
    height, width = processor.get_default_height_width(Image.fromarray(pixels))
    size = nearest_kontext_size(height, width)
    assert context_size(145, 211, 16) == size == (832, 1248)
    assert context_size(145, 211, 64) == (832, 1216)
    # Halfway between 1.5 and 1.346 only whole tokens decide.
    assert context_size(128, 183, 16) != nearest_kontext_size(128, 183)
    image = processor.resize(Image.fromarray(pixels), *size)
    want = processor.preprocess(image, *size)[0].permute(1, 2, 0)
    np.testing.assert_allclose(context_pixels(pixels, 16), want, atol=1e-6)


def test_pictures_that_are_no_context_image():
    assert context_size(5, 12, 16) == (1024, 1024)  # smaller than a token
    assert context_size(100, 700, 16) == (672, 1568)
    with pytest.raises(InputError, match='of 100 x 701 pixels is longer than 7 to 1'):
        context_size(701, 100, 16)


def test_the_size_of_the_result(monkeypatch):
    """That of the picture to be edited, where none is asked for."""
    sizes = types.SimpleNamespace(stride=8, patch_size=2)
    monkeypatch.setattr(build, 'part_sizes', lambda config, name: sizes)
    geometry = Geometry(base.flux(), 8, 1, 16, takes_context=True)
    text = Record('')
    edit = Record('', source=np.zeros((1, 600, 400, 3)), references=(np.zeros((400, 600, 3)),))
    assert geometry.latents((None, None), None, text) == (1, 128, 128)
    assert geometry.latents((None, None), None, edit) == (1, 156, 104)
    assert geometry.latents((64, None), None, edit) == (1, 8, 104)
    assert geometry.latents((64, 32), None, edit) == (1, 8, 4)
    fixed = base.flux()
    del fixed.data.sizes
    one_size = dataclasses.replace(geometry, config=fixed)
    assert one_size.latents((None, None), None, edit) == (1, 128, 128)
    with pytest.raises(InputError, match='height 200 is not a multiple of 16'):
        geometry.latents((200, None), None, edit)
