"""Time of Wan's DiT block beside diffusers' in one run, at a quarter of its width.

    python -m bench.wan_block [--heads=6] [--grid=5,8,12] [--output=FILE.json]

One thread, pinned to one core; fp32; ours and theirs by turns. The first latent frame is given, so
that the reference wants a time for every token, where ours has one for every frame. Times are CPU
seconds, in which other work on the machine does not count, and the ratio is of the fastest runs.
"""

import argparse
import os
import pathlib

from bench.sana_block import Runs, measure  # before jax: it pins the process to one core

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from flax import nnx

from bench.record import record
from metacanvas_jax.backbones.wan import THETA, WanBlock
from metacanvas_jax.backbones.wan_config import WanConfig
from metacanvas_jax.layers.rope import grid_rotary

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ('jax', 'flax', 'torch', 'diffusers', 'numpy')
WORDS, HEAD = 512, 128


def block(heads: int, grid: tuple[int, int, int]) -> Runs:
    """One forward, one video of `grid` tokens."""
    (T, h, w), D = grid, heads * HEAD
    config = WanConfig(
        in_channels=48,
        out_channels=48,
        num_attention_heads=heads,
        attention_head_dim=HEAD,
        num_layers=1,
        ffn_dim=14 * D // 3,
        freq_dim=256,
        text_dim=4096,
        patch_size=2,
        eps=1e-6,
        text_embedder='mlp',
    )
    rng = np.random.default_rng(0)
    shapes = ((1, T, h * w, D), (1, T, 6, D), (1, WORDS, D))
    x, time, text = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    mine = WanBlock(config, rngs=nnx.Rngs(0))

    @jax.jit
    def program(block, x, time, text):
        rotary = grid_rotary(grid, config.rotary_widths, THETA)
        return block(x, time, rotary, text, jnp.array([WORDS]))

    arrays = [jnp.asarray(a) for a in (x, time, text)]
    theirs = WanTransformerBlock(D, config.ffn_dim, heads, cross_attn_norm=True).eval()
    rotary = WanRotaryPosEmbed(HEAD, (1, 1, 1), 1024)(torch.zeros(1, 1, *grid))
    their_x, their_text = torch.tensor(x).flatten(1, 2), torch.tensor(text)
    their_time = torch.tensor(time).repeat_interleave(h * w, 1)

    def run_theirs():
        with torch.no_grad():
            theirs(their_x, their_text, their_time, rotary)

    return {
        'ours': lambda: jax.block_until_ready(program(mine, *arrays)),
        'torch': run_theirs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--heads', type=int, default=6, help='of 128; 24 in TI2V-5B')
    parser.add_argument('--grid', default='5,8,12', help='frames, rows and columns of tokens')
    parser.add_argument('--repeats', type=int, default=8)
    parser.add_argument('--output', default=str(ROOT / 'bench/results/wan_block.json'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    T, h, w = (int(side) for side in args.grid.split(','))
    result = {
        'what': "Wan's block beside diffusers', fp32, one thread",
        'times': 'CPU time of the process',
        'block': {
            'tokens': T * h * w,
            'width': args.heads * HEAD,
            'words': WORDS,
            'forward': measure(block(args.heads, (T, h, w)), args.repeats),
            'wanted_ratio': 1.0,
        },
        'repeats': args.repeats,
    }
    record(args.output, result, load=load, packages=PACKAGES)


if __name__ == '__main__':
    main()
