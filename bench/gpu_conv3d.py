"""Time of three ways to write the Wan2.2 VAE's causal convolution, beside torch's, on one GPU.

    python -m bench.gpu_conv3d level_0 level_1 level_2 level_3 [--tiny] [--output=FILE.json]

3 x 3 x 3, bf16, one chunk of a decoded 704 x 1280 video with the two frames before it: `three` are
convolutions of pictures, summed (layers/conv.py has these); `one` is a convolution of pictures with
three frames as channels; `volume` is XLA's own in three dimensions, channels first as it likes it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from bench import side_by_side as bench
from metacanvas_jax.layers.conv import centred, convolve


@dataclasses.dataclass(frozen=True)
class Case:
    """Of the decoder's levels: frames of a chunk, rows, columns, channels in and out."""

    frames: int
    height: int
    width: int
    d_in: int
    d_out: int


CASES = {
    'level_0': Case(1, 44, 80, 1024, 1024),
    'level_1': Case(2, 88, 160, 1024, 1024),
    'level_2': Case(4, 176, 320, 512, 512),
    'level_3': Case(4, 352, 640, 256, 256),
}


def three(x_FHWC, kernel_3kkCD):
    frames = len(x_FHWC) - 2
    parts = [
        convolve(x_FHWC[k : k + frames], kernel_3kkCD[k], stride=1, padding=centred(3))
        for k in range(3)
    ]
    return sum(parts[1:], start=parts[0])


def one(x_FHWC, kernel_3kkCD):
    frames = len(x_FHWC) - 2
    x = jnp.concatenate([x_FHWC[k : k + frames] for k in range(3)], -1)
    kernel = rearrange(kernel_3kkCD, 'n k l C D -> k l (n C) D')
    return convolve(x, kernel, stride=1, padding=centred(3))


def volume(x_CFHW, kernel_DC3kk):
    return jax.lax.conv_general_dilated(
        x_CFHW[None], kernel_DC3kk, (1, 1, 1), [(0, 0), *centred(3)]
    )[0]


def measured(name: str, *, tiny: bool, repeats: int) -> dict[str, Any]:
    case = CASES[name]
    if tiny:
        case = Case(case.frames, 4, 6, 8, 8)
    shapes = (
        (case.frames + 2, case.height, case.width, case.d_in),
        (3, 3, 3, case.d_in, case.d_out),
    )
    x, kernel = bench.drawn([jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes])
    volumes = rearrange(x, 'F H W C -> C F H W'), rearrange(kernel, 'n k l C D -> D C n k l')
    programs = {
        'three': (jax.jit(three), (x, kernel)),
        'one': (jax.jit(one), (x, kernel)),
        'volume': (jax.jit(volume), volumes),
    }
    results = [np.asarray(program(*args), np.float32) for program, args in list(programs.values())]
    results[2] = rearrange(results[2], 'D F H W -> F H W D')
    error = max(float(np.abs(r - results[0]).max() / np.abs(results[0]).max()) for r in results)
    assert error < 0.05, error  # they are the same but for rounding

    def ours(program, args):
        return lambda: program(*args).block_until_ready()

    runs = {key: ours(*value) for key, value in programs.items()}
    where, why = bench.torch_device(tiny=tiny)
    if where is not None:
        from bench import peers

        runs['torch conv3d'] = peers.conv3d(volumes[0].shape, volumes[1].shape, where)
    seconds = bench.measure(runs, repeats)
    tflop = 2e-12 * results[0].size * 27 * case.d_in
    return {
        'shape': list(shapes[0]),
        'channels_out': case.d_out,
        'peers': why,
        'relative_error': error,
        'seconds': seconds,
        'ratios': bench.ratios(seconds, 'three'),
        **bench.speed(tflop, seconds['three'], tiny=tiny),
    }


if __name__ == '__main__':
    bench.run_cases(
        'gpu_conv3d', 'a causal 3 x 3 x 3 convolution, bf16, in three ways', [*CASES], measured
    )
