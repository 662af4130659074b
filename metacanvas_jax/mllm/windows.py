"""Where patches lie: pictures cut into the windows that the vision tower attends in.

Patches come as Qwen's processors order them: temporal patch, then squares of merge x merge patches
in raster order, then the patches of a square. A window is a square of squares; those at the right
and bottom edges are smaller when it does not divide the grid. Each window gets P slots, its patches
first: P = (window_size / patch_size)^2, rounded down to whole squares.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from einops import rearrange

from metacanvas_jax.mllm.config import QwenConfig
from metacanvas_jax.mllm.positions import Grid
from metacanvas_jax.types import InputError, Vision


@dataclasses.dataclass(frozen=True)
class VisionBuckets:
    """Sizes that programs are compiled for: pictures in a prompt, windows in a picture."""

    pictures: tuple[int, ...]
    windows: tuple[int, ...]


def picture_windows(rows: int, columns: int, config: QwenConfig) -> np.ndarray:
    """(V, P) index of the patch in each slot of a picture of so many patches; -1 in empty slots."""
    merge = config.spatial_merge_size
    side = config.tower.window_size // merge // config.tower.patch_size
    h, w = rows // merge, columns // merge
    squares = np.full((-(-h // side) * side, -(-w // side) * side), -1)
    squares[:h, :w] = np.arange(h * w).reshape(h, w)
    squares = rearrange(squares, '(a i) (b j) -> (a b) (i j)', i=side, j=side)
    squares = np.take_along_axis(squares, np.argsort(squares < 0, -1, kind='stable'), -1)[..., None]
    patches = np.where(squares < 0, -1, squares * merge**2 + np.arange(merge**2))
    return rearrange(patches, 'V Q m -> V (Q m)')


def patch_places(rows: int, columns: int, merge: int) -> np.ndarray:
    """(patches, 2) row and column of each patch of a picture."""
    return rearrange(
        np.indices((rows, columns)), 'z (h a) (w b) -> (h w a b) z', a=merge, b=merge
    ).astype(np.int32)


def pack(
    samples: Sequence[Sequence[tuple[np.ndarray, Grid]]],
    ids_BL: np.ndarray,
    config: QwenConfig,
    buckets: VisionBuckets,
) -> Vision:
    """(patches, grid) of the pictures and videos in each prompt, in the order of their tokens."""
    merge = config.spatial_merge_size
    layouts = {
        grid[1:]: picture_windows(*grid[1:], config) for media in samples for _, grid in media
    }
    I = _smallest(  # noqa: E741
        max(sum(grid[0] for _, grid in media) for media in samples),
        buckets.pictures,
        'a prompt has {} pictures (a video has one per two frames), the largest bucket holds {}; '
        'show fewer or raise config.prompt.pictures',
    )
    largest = max(layouts, key=lambda size: len(layouts[size]), default=None)
    V = _smallest(
        len(layouts[largest]) if largest else 0,
        buckets.windows,
        f'a picture of {largest} patches has {{}} windows, the largest bucket holds {{}}; '
        'lower config.prompt.max_pixels or raise config.prompt.windows',
    )
    B, side = len(samples), config.tower.window_size // merge // config.tower.patch_size
    P, X = (side * merge) ** 2, config.tower.patch_values
    patches_BIVPX = np.zeros((B, I, V, P, X), np.float32)
    place_BIVP2 = np.zeros((B, I, V, P, 2), np.int32)
    length_BIV = np.zeros((B, I, V), np.int32)
    token_BL = np.full(ids_BL.shape, -1, np.int32)
    for row, media in enumerate(samples):
        picture, tokens = 0, []
        for patches, grid in media:
            index_VP = layouts[grid[1:]]
            slot = np.nonzero(index_VP >= 0)
            index = index_VP[slot]
            # The window and slot of each square's first patch, squares in raster order.
            window, place = (axis[np.argsort(index)][:: merge**2] for axis in slot)
            places = patch_places(*grid[1:], merge)
            for frame in patches.reshape(grid[0], -1, X):
                patches_BIVPX[row, picture][slot] = frame[index]
                place_BIVP2[row, picture][slot] = places[index]
                length_BIV[row, picture, : len(index_VP)] = (index_VP >= 0).sum(-1)
                tokens.append(((picture * V + window) * P + place) // merge**2)
                picture += 1
        (seen,) = np.isin(ids_BL[row], (config.image_token_id, config.video_token_id)).nonzero()
        token_BL[row, seen] = np.concatenate([np.empty(0, np.int32), *tokens])
    return Vision(
        patches_BIVPX=patches_BIVPX,
        place_BIVP2=place_BIVP2,
        length_BIV=length_BIV,
        token_BL=token_BL,
    )


def _smallest(need: int, buckets: Sequence[int], message: str) -> int:
    """The smallest bucket that holds `need`."""
    size = next((bucket for bucket in sorted(buckets) if bucket >= need), None)
    if size is None:
        raise InputError(message.format(need, max(buckets)))
    return size
