"""The size that a context image is brought to is the one that diffusers' pipeline chooses."""

import itertools
import random
import types
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_kontext

from metacanvas_jax.data.kontext_sizes import KONTEXT_SIZES, nearest_kontext_size


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
