"""Memory of the Wan2.2 VAE's decoder, at 33 and at 121 frames: it shall not grow with frames.

    python -m bench.vae_memory [--divide=4] [--side=8] [--output=FILE.json]

Planned is what XLA wants beyond arguments and pixels, at 704 x 1280 in bf16 and at the size that is
measured. Measured is the most resident memory while one video is decoded, each in a process of its
own: 1/divide of the channels, `side` latent rows and columns, random weights in fp32; less what was
resident before, and less the pixels.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.record import record
from metacanvas_jax.vae.wan_vae import WanVae
from metacanvas_jax.vae.wan_vae_config import PUBLISHED

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ('jax', 'jaxlib', 'flax')
FRAMES = (33, 121)
ALLOWED = 1.15


def compiled(frames: int, size: tuple[int, int], *, divide: int, dtype):
    """The program; shapes of parameters and of so many latent rows and columns."""
    widths = {name: getattr(PUBLISHED, name) // divide for name in ('base_dim', 'decoder_base_dim')}
    config = dataclasses.replace(PUBLISHED, **widths)
    vae = jax.eval_shape(lambda: WanVae(config, dtype=dtype, rngs=nnx.Rngs(0)))
    vae = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype), vae)
    z = jax.ShapeDtypeStruct((1, (frames + 3) // 4, *size, vae.channels), jnp.float32)
    return jax.jit(lambda vae, z: vae.decode(z)).lower(vae, z).compile(), vae, z


def planned(size: tuple[int, int], **settings: Any) -> list[float]:
    """Gigabytes for few and for many frames."""
    programs = (compiled(frames, size, **settings)[0] for frames in FRAMES)
    plans: list[Any] = [program.memory_analysis() for program in programs]
    return [plan.temp_size_in_bytes / 1e9 for plan in plans]


def decode(frames: int, side: int, divide: int) -> dict[str, float]:
    """In this process, which shall be young: gigabytes."""
    program, *shapes = compiled(frames, (side, side), divide=divide, dtype=jnp.float32)
    draw = lambda a: 0.02 * jax.random.normal(jax.random.key(0), a.shape, a.dtype)
    vae, z = jax.block_until_ready(jax.jit(lambda: jax.tree.map(draw, tuple(shapes)))())
    pathlib.Path('/proc/self/clear_refs').write_text('5')  # the most so far is forgotten
    before = _resident('VmRSS')
    video = jax.block_until_ready(program(vae, z))
    return {'beside_pixels': _resident('VmHWM') - before - video.nbytes / 1e9}


def _resident(field: str) -> float:
    status = pathlib.Path('/proc/self/status').read_text()
    (kilobytes,) = re.findall(rf'{field}:\s*(\d+) kB', status)
    return 1024 * int(kilobytes) / 1e9


def measured(side: int, divide: int) -> list[float]:
    found = []
    for frames in FRAMES:
        call = f'import bench.vae_memory as b, json; print(json.dumps(b.decode({frames}, {side}, '
        process = [sys.executable, '-c', call + f'{divide})))']
        out = subprocess.run(process, check=True, capture_output=True, text=True, cwd=ROOT).stdout
        found.append(json.loads(out)['beside_pixels'])
    return found


def compared(gigabytes: list[float]) -> dict[str, Any]:
    few, many = gigabytes
    rounded = {str(n): round(gb, 3) for n, gb in zip(FRAMES, gigabytes, strict=True)}
    return {'gigabytes_of_frames': rounded, 'ratio': round(many / few, 3), 'allowed': ALLOWED}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--divide', type=int, default=4, help='the channels by this')
    parser.add_argument('--side', type=int, default=8, help='latent rows and columns')
    parser.add_argument('--output', default=str(ROOT / 'bench/results/vae_memory.json'))
    args = parser.parse_args()
    load, small = os.getloadavg()[0], (args.side, args.side)
    result = {
        'what': "the Wan2.2 VAE's decoder at random weights: memory beyond arguments and pixels",
        f'measured at {16 * args.side}^2 pixels, 1/{args.divide} of the channels, fp32': compared(
            measured(args.side, args.divide)
        ),
        'planned for that': compared(planned(small, divide=args.divide, dtype=jnp.float32)),
        'planned at 704 x 1280, all channels, bf16': compared(
            planned((44, 80), divide=1, dtype=jnp.bfloat16)
        ),
    }
    record(args.output, result, load=load, packages=PACKAGES)


if __name__ == '__main__':
    main()
