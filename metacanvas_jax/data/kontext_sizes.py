"""The sizes, of about a megapixel each, on which FLUX.1-Kontext was trained (arXiv 2506.15742).

The pipeline brings a context image to the one of the nearest aspect ratio.
"""

import numpy as np
from PIL import Image

from metacanvas_jax.types import InputError

KONTEXT_SIZES = (  # height, width
    *((1568, 672), (1504, 688), (1456, 720), (1392, 752), (1328, 800), (1248, 832), (1184, 880)),
    *((1104, 944), (1024, 1024), (944, 1104)),
    *((880, 1184), (832, 1248), (800, 1328), (752, 1392), (720, 1456), (688, 1504), (672, 1568)),
)


def nearest_kontext_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) whose ratio is the nearest; of two as near, the narrower."""
    ratio = width / height
    return min(KONTEXT_SIZES, key=lambda size: (abs(ratio - size[1] / size[0]), size[1]))


ASPECT = 7  # three times as long as the longest of them: more would be squeezed beyond recognition


def context_size(height: int, width: int, multiple: int) -> tuple[int, int]:
    """What a picture of this size is brought to; whole tokens are of `multiple` pixels."""
    if max(height, width) > ASPECT * min(height, width):
        raise InputError(
            f'a context image of {width} x {height} pixels is longer than {ASPECT} to 1; crop it'
        )
    # The pipeline takes the ratio of the largest part that is made of whole tokens.
    whole = (max(side - side % multiple, multiple) for side in (height, width))
    height, width = nearest_kontext_size(*whole)
    return height - height % multiple, width - width % multiple


def context_pixels(pixels_HWC: np.ndarray, multiple: int) -> np.ndarray:
    """A uint8 picture at its `context_size`, in [-1, 1]."""
    height, width = context_size(pixels_HWC.shape[0], pixels_HWC.shape[1], multiple)
    image = Image.fromarray(pixels_HWC).resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(image, np.float32) / 127.5 - 1
