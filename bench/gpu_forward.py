"""Time of one full-size DiT forward beside diffusers', eager and compiled, on one GPU in one run.

    python -m bench.gpu_forward sana_512 sana_1024 flux wan [--tiny] [--output=FILE.json]

bf16, random weights. Ours is a step's velocity as the solver calls it, of the base model and with a
canvas (P7b of the targets). Their attention is cuDNN's and flash attention; both are recorded, the
better one counts (P1 to P3). FLOPs are the closed forms, beside the ceiling of a matmul here.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from bench import side_by_side as bench
from bench import systems
from bench.train_step import solver_inputs
from metacanvas_jax.build import DTYPES, build_model, part_sizes
from metacanvas_jax.train.trainable import Path


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


def configure(case: Case, *, tiny: bool) -> ConfigDict:
    """The base model as published, with a canvas."""
    if tiny:
        config = systems.tiny(case.system)
    else:
        config = systems.full_size(case.system)
        config.prompt.buckets = (case.tokens,)
        if case.size is not None:
            config.data.size = case.size
    if case.system == 'wan_stage3':  # not widened yet, and with its text embedder
        sizes = config.backbone if tiny else config.backbone.changes
        sizes.update(in_channels=sizes.get('out_channels', 48), text_embedder='mlp')
    return config


def ours(config: ConfigDict, case: Case) -> tuple[dict[str, Any], tuple[int, ...], Any]:
    """Programs, and the shapes of latents and of the plan."""
    half = lambda a: jax.ShapeDtypeStruct(a.shape, DTYPES[config.dtype])
    model = jax.eval_shape(functools.partial(build_model, config), jax.random.key(0))
    model = jax.tree.map(half, model)
    inputs = jax.eval_shape(solver_inputs, model, systems.make_batch(config, case.task, case.batch))
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


def measured(name: str, *, tiny: bool, repeats: int) -> dict[str, Any]:
    case = CASES[name]
    config = configure(case, tiny=tiny)
    runs, latents, plan = ours(config, case)
    where, why = bench.torch_device(tiny=tiny)
    if where is not None:
        from bench import peers

        sizes: Any = part_sizes(config, 'backbone')
        pooled = None if plan.pooled_BD is None else plan.pooled_BD.shape[-1]
        inputs = peers.transformer_inputs(
            config.backbone.kind, latents, plan.context_BLD.shape, pooled, where
        )
        runs |= peers.forwards(peers.build(sizes.to_json(), where), inputs, where)
    seconds = bench.measure(runs, repeats)
    return {
        'latents': list(latents),
        'context': list(plan.context_BLD.shape),
        'peers': why,
        'seconds': seconds,
        'ratios': bench.ratios(seconds) | bench.ratios(seconds, 'ours with canvas'),
        'our_gigabytes': bench.most_bytes(),
        **bench.speed(case.tflop, seconds['ours'], tiny=tiny),
    }


if __name__ == '__main__':
    bench.run_cases(
        'gpu_forward',
        'one DiT forward, bf16, random weights, ours and theirs by turns',
        [*CASES],
        measured,
    )
