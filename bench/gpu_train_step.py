"""Time and memory of one full-size train step on one GPU, with and without canvas, and in torch.

    python -m bench.gpu_train_step wan wan_plain wan_torch flux flux_plain sana [--tiny]
        [--output=FILE.json]

The whole of it: MLLM, connectors, DiT, gradient, AdamW on fp32 masters; targets are latents, as a
feature cache gives them; random weights. A case wants most of a GPU's memory, so each runs in a
process of its own: `python -m bench.gpu` does that, and compares them (P5, P6, P7, P10). `plain` is
without canvas tokens. `wan_torch` is diffusers' DiT alone in eager mode, all blocks checkpointed.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import side_by_side as bench
from bench import systems
from bench.train_step import mesh_of, programs
from metacanvas_jax.build import build_model, part_sizes


@dataclasses.dataclass(frozen=True)
class Case:
    system: str
    task: str
    samples: int
    tflop: float  # three times the DiT's forward; less of FLUX learns, so that is its upper bound
    canvas: bool = True
    torch: bool = False


WAN, FLUX = 3 * 517.01, 3 * 165.458
CASES = {
    'wan': Case('wan_stage3', 't2v', 1, WAN),
    'wan_plain': Case('wan_stage3', 't2v', 1, WAN, canvas=False),
    'wan_torch': Case('wan_stage3', 't2v', 1, WAN, canvas=False, torch=True),
    'flux': Case('flux_edit', 'edit', 1, FLUX),
    'flux_plain': Case('flux_edit', 'edit', 1, FLUX, canvas=False),
    'sana': Case('sana_t2i', 't2i', 40, 3 * 40 * 0.8366),
    'sana_plain': Case('sana_t2i', 't2i', 40, 3 * 40 * 0.8366, canvas=False),
}


def ours(case: Case, config) -> tuple[bench.Runs, dict[str, Any]]:
    """The step, whose state stays on the device; what XLA planned for it."""
    model: Any = jax.eval_shape(lambda key: build_model(config, key), jax.random.key(0))
    batch = systems.make_batch(config, case.task, case.samples)
    batch = systems.with_latents(batch, model)
    program = programs(config, batch, mesh_of(jax.devices()[:1]))['train']
    state, frozen, where, key = program.arguments
    began = time.monotonic()
    with jax.set_mesh(program.mesh):
        compiled = program.function.lower(*program.arguments).compile()
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    planned = memory.argument_size_in_bytes + memory.temp_size_in_bytes + results
    said = {
        'seconds_to_compile': round(time.monotonic() - began, 1),
        'planned_gigabytes': round(planned / 1e9, 2),
    }
    zeros = jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state))()
    trainable = bench.drawn(state.trainable, 0.02)
    batch = jax.tree.map(lambda a, place: jax.device_put(a, place.sharding), batch, where)
    held = [dataclasses.replace(zeros, trainable=trainable), bench.drawn(frozen, 0.02)]

    def run() -> None:
        held[0], metrics = compiled(*held, batch, key)
        assert np.isfinite(float(metrics['loss']))

    return {'ours': run}, said


def theirs(case: Case, config, where: str) -> bench.Runs:
    from bench import peers

    kind, sizes = config.backbone.kind, part_sizes(config, 'backbone')
    sizes = dataclasses.replace(sizes, in_channels=sizes.out_channels, text_embedder='mlp')
    visual = systems.make_readers(config).visuals.bucket
    vae: Any = jax.eval_shape(lambda key: build_model(config, key), jax.random.key(0)).vae
    T, H, W = visual.latent_frames, visual.height // vae.stride, visual.width // vae.stride
    latents, context = (1, T, H, W, vae.channels), (1, 512, sizes.text_dim)
    return {'torch': peers.training_step(sizes.to_json(), kind, latents, context, where)}


def measured(name: str, *, tiny: bool, repeats: int) -> dict[str, Any]:
    case = CASES[name]
    config = (systems.tiny if tiny else systems.full_size)(case.system)
    if tiny:
        case = dataclasses.replace(case, samples=2)
    if not case.canvas:
        config = systems.without_canvas(config)
    said: dict[str, Any] = {}
    if case.torch:
        where, why = bench.torch_device(tiny=tiny)
        if where is None:
            return {'peers': why}
        runs = theirs(case, config, where)
    else:
        runs, said = ours(case, config)
    (seconds,) = bench.measure(runs, repeats).values()
    most = bench.most_bytes()
    if case.torch:
        from bench import peers

        most = peers.most_bytes(where)
    speed = bench.speed(case.tflop, seconds, tiny=tiny)
    return {'samples': case.samples, 'seconds': seconds, 'most_gigabytes': most, **said, **speed}


if __name__ == '__main__':
    bench.run_cases('gpu_train_step', 'one train step, random weights', [*CASES], measured)
