"""Time of one full-size DiT forward beside diffusers', eager and compiled, on one GPU in one run.

    python -m bench.gpu_forward sana_512 sana_1024 flux wan [--tiny] [--output=FILE.json]

bf16, random weights. Ours is a step's velocity as the solver calls it, of the base model and with a
canvas (P7b of the targets). Their attention is cuDNN's and flash attention; both are recorded, the
better one counts (P1 to P3). FLOPs are the closed forms, beside the ceiling of a matmul here.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from bench import side_by_side as bench
from bench.record import record
from bench.systems import full_size, make_batch, tiny
from bench.train_step import solver_inputs
from metacanvas_jax.build import DTYPES, build_model, part_sizes
from metacanvas_jax.train.trainable import Path

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Case:
    system: str
    task: str
    batch: int
    tokens: int  # of text
    tflop: float  # of the base model
    size: int | None = None  # of pictures, where there are several


CASES = {
    # Two samples: guidance.
    'sana_512': Case('sana_t2i', 't2i', 2, 300, 2 * 0.8366, 512),
    'sana_1024': Case('sana_t2i', 't2i', 2, 300, 2 * 2.9667, 1024),
    'flux': Case('flux_edit', 'edit', 1, 512, 165.458),
    'wan': Case('wan_stage3', 't2v', 1, 512, 517.01),
}


def configure(case: Case, *, small: bool) -> ConfigDict:
    """The base model as published, with a canvas."""
    if small:
        config = tiny(case.system)
    else:
        config = full_size(case.system)
        config.prompt.buckets = (case.tokens,)
        if case.size is not None:
            config.data.size = case.size
    if case.system == 'wan_stage3':  # not widened yet, and with its text embedder
        sizes = config.backbone if small else config.backbone.changes
        sizes.update(in_channels=sizes.get('out_channels', 48), text_embedder='mlp')
    return config


def ours(config: ConfigDict, case: Case) -> tuple[dict[str, Any], tuple[int, ...], Any]:
    """Programs, and the shapes of latents and of the plan."""
    half = lambda a: jax.ShapeDtypeStruct(a.shape, DTYPES[config.dtype])
    model = jax.eval_shape(functools.partial(build_model, config), jax.random.key(0))
    model = jax.tree.map(half, model)
    inputs = jax.eval_shape(solver_inputs, model, make_batch(config, case.task, case.batch))
    z, t, plan, visual = inputs
    graphdef, *parts = nnx.split(model, Path('backbone/.*'), Path('canvas/fusion/.*'), ...)
    backbone, absent_fusion, absent = parts
    shapes = z.shape, plan
    backbone, fusion = (bench.drawn(part, 0.02) for part in (backbone, absent_fusion))
    z, plan, visual = (bench.drawn(part) for part in (z, plan, visual))
    plan = dataclasses.replace(
        plan, context_length_B=jnp.full(len(z), plan.context_BLD.shape[1], jnp.int32)
    )
    visual = dataclasses.replace(visual, clean_BT=jnp.zeros(t.shape))
    t = jnp.full(t.shape, 0.5)

    @jax.jit
    def with_canvas(backbone, fusion, *args):
        return nnx.merge(graphdef, backbone, fusion, absent).velocity(*args)

    @jax.jit
    def plain(backbone, z, t, plan, visual):
        model = nnx.merge(graphdef, backbone, absent_fusion, absent)
        patches = model.patchify(z, plan, visual)
        return model.backbone.velocity(patches, t, plan.context_BLD, plan.context_length_B)

    args = z, t, plan, visual
    runs = {
        'ours': lambda: plain(backbone, *args).block_until_ready(),
        'ours with canvas': lambda: with_canvas(backbone, fusion, *args).block_until_ready(),
    }
    return runs, *shapes


def measured(name: str, *, small: bool, repeats: int) -> dict[str, Any]:
    case = CASES[name]
    config = configure(case, small=small)
    runs, latents, plan = ours(config, case)
    where, why = bench.torch_device(tiny=small)
    if where is not None:
        from bench import peers

        sizes: Any = part_sizes(config, 'backbone')
        pooled = None if plan.pooled_BD is None else plan.pooled_BD.shape[-1]
        inputs = peers.transformer_inputs(
            config.backbone.kind, latents, plan.context_BLD.shape, pooled, where
        )
        runs |= peers.forwards(peers.build(sizes.to_json(), where), inputs, where)
    seconds = bench.measure(runs, repeats)
    found: dict[str, Any] = {
        'latents': list(latents),
        'context': list(plan.context_BLD.shape),
        'peers': why,
        'seconds': seconds,
        'ratios': bench.ratios(seconds) | bench.ratios(seconds, 'ours with canvas'),
        'our_gigabytes': bench.most_bytes(),
    }
    if not small and isinstance(seconds['ours'], dict):
        found['tflop_per_s'] = round(case.tflop / seconds['ours']['median_s'], 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('cases', nargs='+', choices=CASES)
    parser.add_argument('--tiny', action='store_true')
    parser.add_argument('--repeats', type=int, default=20)
    parser.add_argument('--output', default=str(ROOT / 'bench/results/gpu_forward.json'))
    args = parser.parse_args()
    load = os.getloadavg()[0]
    result: dict[str, Any] = {
        'what': 'one DiT forward, bf16, random weights, ours and theirs by turns',
        'tiny': args.tiny,
        'device': bench.device(tiny=args.tiny),
        'matmul_tflop_per_s': round(bench.matmul_ceiling(tiny=args.tiny), 1),
        'cases': {},
    }
    for name in args.cases:
        result['cases'][name] = measured(name, small=args.tiny, repeats=args.repeats)
        record(args.output, result, load=load, packages=bench.PACKAGES)


if __name__ == '__main__':
    main()
