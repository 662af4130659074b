"""Time of SANA's DiT block, and of its depthwise convolution, beside torch's in one run.

    python -m bench.sana_block [--tokens=16] [--width=2240] [--output=FILE.json]

One thread, pinned to one core; fp32; ours and theirs by turns. The block reads a square of tokens
and 300 words; the convolution has the size that it has in the block and in the canvas connector.
Times are CPU seconds, in which other work on the machine does not count, and ratios are of the
fastest runs.
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
WORDS = 300
# Before jax and torch count the cores.
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers.models.transformers.sana_transformer import SanaTransformerBlock  # noqa: E402
from flax import nnx  # noqa: E402

from bench.record import record  # noqa: E402
from metacanvas_jax.backbones.sana import SanaBlock, SanaConfig  # noqa: E402
from metacanvas_jax.layers.conv import depthwise_conv  # noqa: E402

Runs = Mapping[str, Callable[[], Any]]


def block(tokens: int, width: int) -> Runs:
    """One forward of a block of SANA 1.5, one picture."""
    rng = np.random.default_rng(0)
    shapes = {'x': (1, tokens, tokens, width), 'time': (1, 6, width), 'text': (1, WORDS, width)}
    inputs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    heads, cross_heads = width // 32, width // 112
    qk_norm = 'rms_norm_across_heads'
    config = SanaConfig(
        in_channels=32,
        num_attention_heads=heads,
        attention_head_dim=32,
        num_layers=1,
        num_cross_attention_heads=cross_heads,
        caption_channels=2304,
        mlp_ratio=2.5,
        patch_size=1,
        qk_norm=qk_norm,
    )
    mine = SanaBlock(config, None, rngs=nnx.Rngs(0))
    program = jax.jit(lambda block, x, time, text: block(x, time, text, jnp.array([WORDS])))
    arrays = [jnp.asarray(a) for a in inputs.values()]
    theirs = SanaTransformerBlock(
        width,
        heads,
        32,
        num_cross_attention_heads=cross_heads,
        cross_attention_head_dim=112,
        cross_attention_dim=width,
        attention_bias=False,
        qk_norm=qk_norm,
    ).eval()
    x, time, text = (torch.tensor(a) for a in inputs.values())
    x, time = x.flatten(1, 2), time.flatten(1)
    words = dict(encoder_hidden_states=text, encoder_attention_mask=torch.zeros(1, 1, WORDS))

    def run_theirs():
        with torch.no_grad():
            theirs(x, timestep=time, height=tokens, width=tokens, **words)

    return {
        'ours': lambda: jax.block_until_ready(program(mine, *arrays)),
        'torch': run_theirs,
    }


def depthwise(batch: int, tokens: int, channels: int) -> tuple[Runs, Runs]:
    """The 3x3 convolution of the Mix-FFN: forward, and gradient of input and kernel."""
    rng = np.random.default_rng(0)
    x, g = rng.normal(size=(2, batch, tokens, tokens, channels)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, channels)).astype(np.float32)
    forward = jax.jit(depthwise_conv)
    backward = jax.jit(lambda x, kernel, g: jax.vjp(depthwise_conv, x, kernel)[1](g))
    arrays = [jnp.asarray(a) for a in (x, kernel, g)]
    # As torch wants its pictures.
    their_x, their_g = (torch.tensor(a).permute(0, 3, 1, 2).contiguous() for a in (x, g))
    their_kernel = torch.tensor(kernel).permute(2, 0, 1)[:, None].contiguous()
    their_x.requires_grad_()
    their_kernel.requires_grad_()

    def convolve():
        return torch.nn.functional.conv2d(their_x, their_kernel, padding=1, groups=channels)

    def run_theirs():
        with torch.no_grad():
            convolve()

    out = convolve()
    return (
        {'ours': lambda: jax.block_until_ready(forward(*arrays[:2])), 'torch': run_theirs},
        {
            'ours': lambda: jax.block_until_ready(backward(*arrays)),
            'torch': lambda: torch.autograd.grad(
                out, (their_x, their_kernel), their_g, retain_graph=True
            ),
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
    parser.add_argument('--width', type=int, default=2240)
    parser.add_argument('--batch', type=int, default=2, help='pictures of the convolution')
    parser.add_argument('--repeats', type=int, default=8)
    parser.add_argument('--output', default=str(ROOT / 'bench/results/sana_block.json'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    channels = int(2 * 2.5 * args.width)
    forward, backward = depthwise(args.batch, args.tokens, channels)
    result = {
        'what': "SANA 1.5's block and its depthwise convolution beside torch's, fp32, one thread",
        'times': 'CPU time of the process',
        'block': {
            'tokens': args.tokens**2,
            'width': args.width,
            'words': WORDS,
            'forward': measure(block(args.tokens, args.width), args.repeats),
            'wanted_ratio': 1.0,
        },
        'depthwise': {
            'shape': [args.batch, args.tokens, args.tokens, channels],
            'forward': measure(forward, args.repeats),
            'wanted_ratio': 6.0,
            'gradient': measure(backward, args.repeats),
            'wanted_ms': 1000,
        },
        'repeats': args.repeats,
    }
    record(args.output, result, load=load, packages=PACKAGES)


if __name__ == '__main__':
    main()
