"""Large pictures through an autoencoder in overlapping tiles, as diffusers' tiled_decode does it.

A tile fades into the one above it, then into the one to its left, linearly over their overlap, in
steps of the squares of pixels that the autoencoder makes.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from metacanvas_jax.types import InputError
from metacanvas_jax.vae.base import Vae


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Height and width of a tile, and from one tile to the next, in pixels."""

    size: tuple[int, int]
    step: tuple[int, int]

    def in_latents(self, stride: int) -> 'Tiles':
        (height, width), (down, right) = self.size, self.step
        return Tiles((height // stride, width // stride), (down // stride, right // stride))


class TiledVae(Vae):
    """`vae` in the memory of one tile and the whole result; smaller pictures go through whole."""

    def __init__(self, vae: Vae, tiles: Tiles):
        for size, step in zip(tiles.size, tiles.step, strict=True):
            if not 0 < step <= size or size % vae.stride or step % vae.stride:
                raise InputError(
                    f'tiles of {size} pixels every {step}: want multiples of {vae.stride} that '
                    'leave no gap'
                )
        self.vae, self.tiles = vae, tiles
        self.stride, self.channels = vae.stride, vae.channels
        self.time_stride, self.patch = vae.time_stride, vae.patch

    def encode(self, x_BFHWC):
        latents = self.tiles.in_latents(self.stride)
        return _by_tiles(self.vae.encode, x_BFHWC, self.tiles, latents, patch=1)

    def decode(self, z_BTHWC):
        latents = self.tiles.in_latents(self.stride)
        return _by_tiles(self.vae.decode, z_BTHWC, latents, self.tiles, patch=self.patch)


def _by_tiles(
    function: Callable, x_BFHWC, source: Tiles, target: Tiles, *, patch: int
) -> jax.Array:
    """`source` are the tiles of x, `target` those of the result."""
    sides = x_BFHWC.shape[2:4]
    if all(side <= size for side, size in zip(sides, source.size, strict=True)):
        return function(x_BFHWC)
    down, right = (range(0, side, step) for side, step in zip(sides, source.step, strict=True))
    tiles = _run(function, x_BFHWC, source.size, list(itertools.product(down, right)))
    overlap = [size - step for size, step in zip(target.size, target.step, strict=True)]
    for i, j in tiles:
        if i:
            above = tiles[i - source.step[0], j]
            tiles[i, j] = _fade(above, tiles[i, j], overlap[0], axis=2, patch=patch)
        if j:
            left = tiles[i, j - source.step[1]]
            tiles[i, j] = _fade(left, tiles[i, j], overlap[1], axis=3, patch=patch)
    height, width = target.step
    rows = [[tiles[i, j][:, :, :height, :width] for j in right] for i in down]
    return jnp.concatenate([jnp.concatenate(row, 3) for row in rows], 2)


def _run(function: Callable, x_BFHWC, size, starts: list[tuple[int, int]]) -> dict:
    """{start: result}. Tiles of one shape are one loop: few programs, one tile at a time."""
    B, F, H, W, C = x_BFHWC.shape
    shapes = collections.defaultdict(list)
    for i, j in starts:
        shapes[min(size[0], H - i), min(size[1], W - j)].append((i, j))

    results = {}
    for (h, w), places in shapes.items():

        def tile(start, shape=(B, F, h, w, C)):
            return function(jax.lax.dynamic_slice(x_BFHWC, (0, 0, *start, 0), shape))

        results |= zip(places, jax.lax.map(tile, jnp.array(places)), strict=True)
    return {start: results[start] for start in starts}


def _fade(before, after, overlap: int, *, axis: int, patch: int) -> jax.Array:
    """`after`, whose first rows or columns come gradually out of the last ones of `before`."""
    overlap = min(before.shape[axis], after.shape[axis], overlap)
    last = jax.lax.slice_in_dim(before, before.shape[axis] - overlap, None, axis=axis)
    first, rest = jnp.split(after, [overlap], axis)
    place = jnp.arange(overlap) // patch * patch
    weight = (place / overlap).reshape(-1, *(1,) * (after.ndim - 1 - axis))
    return jnp.concatenate([last * (1 - weight) + first * weight, rest], axis)
