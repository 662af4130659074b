"""Time of FLUX's double and single DiT blocks beside diffusers' in one run.

    python -m bench.flux_block [--tokens=16] [--heads=24] [--output=FILE.json]

One thread, pinned to one core; fp32; ours and theirs by turns. The blocks read a square of tokens
and 128 words. Times are CPU seconds, in which other work on the machine does not count, and ratios
are of the fastest runs.
"""

import argparse
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ('jax', 'flax', 'torch', 'diffusers', 'numpy')
WORDS = 128
AXES = (16, 56, 56)
HEAD_DIM = sum(AXES)
# Before jax and torch count the cores.
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers.models.transformers import transformer_flux  # noqa: E402
from flax import nnx  # noqa: E402

from bench.record import record  # noqa: E402
from metacanvas_jax.backbones import flux  # noqa: E402

Runs = Mapping[str, Callable[[], Any]]


def blocks(tokens: int, heads: int) -> tuple[Runs, Runs]:
    """One forward of a double and of a single block, one picture."""
    width, S = heads * HEAD_DIM, tokens**2
    rng = np.random.default_rng(0)
    shapes = {'x': (1, S, width), 'text': (1, WORDS, width), 'time': (1, width)}
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    config = flux.FluxConfig(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=heads,
        joint_attention_dim=4096,
        pooled_projection_dim=768,
        axes_dims_rope=AXES,
    )
    where, length = flux.rotation([(tokens, tokens)], WORDS, AXES), jnp.array([S + WORDS])
    x, text, time = (jnp.asarray(a) for a in inputs.values())
    joined = jnp.concatenate([x, text], 1)
    run = jax.jit(lambda block, *args: block(*args, where, length))
    double = flux.DoubleStreamBlock(config, rngs=nnx.Rngs(0))
    single = flux.SingleStreamBlock(config, rngs=nnx.Rngs(0))

    their_double = transformer_flux.FluxTransformerBlock(width, heads, HEAD_DIM).eval()
    their_single = transformer_flux.FluxSingleTransformerBlock(width, heads, HEAD_DIM).eval()
    names = ('hidden_states', 'encoder_hidden_states', 'temb')
    given: dict[str, Any] = dict(zip(names, map(torch.tensor, inputs.values()), strict=True))
    rows = torch.cartesian_prod(*map(torch.arange, (1, tokens, tokens)))
    ids = torch.cat([torch.zeros(WORDS, 3), rows])
    given['image_rotary_emb'] = transformer_flux.FluxPosEmbed(10000, list(AXES))(ids)

    def theirs(block):
        def call():
            with torch.no_grad():
                block(**given)

        return call

    return (
        {
            'ours': lambda: jax.block_until_ready(run(double, x, text, time)),
            'torch': theirs(their_double),
        },
        {
            'ours': lambda: jax.block_until_ready(run(single, joined, time)),
            'torch': theirs(their_single),
        },
    )


def measure(runs: Runs, repeats: int) -> dict[str, Any]:
    seconds = {name: [] for name in runs}
    for run in runs.values():
        run()  # compiles
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    found: dict[str, Any] = {
        name: {
            'min_ms': round(1e3 * min(values), 2),
            'median_ms': round(1e3 * statistics.median(values), 2),
        }
        for name, values in seconds.items()
    }
    return found | {'ratio': round(min(seconds['ours']) / min(seconds['torch']), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--tokens', type=int, default=16, help='rows and columns')
    parser.add_argument('--heads', type=int, default=24)
    parser.add_argument('--repeats', type=int, default=8)
    parser.add_argument('--output', default=str(ROOT / 'bench/results/flux_block.json'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    double, single = blocks(args.tokens, args.heads)
    result = {
        'what': "FLUX's double and single blocks beside diffusers', fp32, one thread",
        'times': 'CPU time of the process',
        'tokens': args.tokens**2,
        'words': WORDS,
        'width': args.heads * HEAD_DIM,
        'double': measure(double, args.repeats),
        'single': measure(single, args.repeats),
        'wanted_ratio': 1.0,
        'repeats': args.repeats,
    }
    record(args.output, result, load=load, packages=PACKAGES)


if __name__ == '__main__':
    main()
