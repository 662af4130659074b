"""Bytes of the full-size train step and forward of configs/flux_edit.py, compiled, never run.

    python -m bench.flux_step [--devices 1 8] [--output=FILE.json]

One edit of a megapixel for each of so many devices (FSDP), on at most 8 CPUs that are not there.
Arguments and results are what every machine has. Temporary bytes are the CPU compiler's, an upper
bound: it computes bf16 matmuls in fp32, and its attention keeps all scores of a layer.
"""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import tempfile
import time
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from bench.record import record
from configs import flux_edit
from metacanvas_jax.build import build_model
from metacanvas_jax.sharding import BATCH_AXES, MESH_AXES
from metacanvas_jax.train.objective import OBJECTIVES
from metacanvas_jax.train.optim import OptimizerConfig, make_optimizer
from metacanvas_jax.train.state import split_model, start
from metacanvas_jax.train.step import make_train_step
from metacanvas_jax.train.trainable import trainable_filter
from metacanvas_jax.types import Batch, Prompt, Texts, Vision, Visual

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ('jax', 'flax', 'optax')
SIDE, WORDS, WINDOWS, PATCHES, VALUES = 1024, 512, 16, 64, 1176  # 448 x 448 pixels for the MLLM


def full_size(folder: pathlib.Path) -> ConfigDict:
    """Of the published config.json files; no weights are needed."""
    config = flux_edit.get_config()
    published = {
        name: json.loads((ROOT / f'tests/manifests/{manifest}.json').read_text())['config']
        for name, manifest in (('backbone', 'flux1_kontext_dev'), ('vae', 'flux_vae'))
    }
    for name, values in {**published, 'pooled_encoder': {'width': 768}}.items():
        (folder / name).mkdir()
        (folder / name / 'config.json').write_text(json.dumps(values))
        config.weights[name] = str(folder / name)
    config.weights.update(mllm='random', context_connector='random')
    return config


def edits(batch: int) -> Batch:
    """Shapes of so many."""
    i32, f32 = np.int32, np.float32

    def array(dtype, *shape: int) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), dtype)

    vision = Vision(
        patches_BIVPX=array(f32, 1, WINDOWS, PATCHES, VALUES),
        place_BIVP2=array(i32, 1, WINDOWS, PATCHES, 2),
        length_BIV=array(i32, 1, WINDOWS),
        token_BL=array(i32, WORDS),
    )
    prompt = Prompt(array(i32, WORDS), array(i32, 3, WORDS), array(i32), array(i32), vision)
    visual = Visual(clean_BT=array(f32, 1), context_images=(array(f32, SIDE, SIDE, 3),))
    return Batch(Texts(mllm=prompt), visual, pixels_BFHWC=array(f32, 1, SIDE, SIDE, 3))


def placed(tree, where):
    put = lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
    return jax.tree.map(put, tree, where)


def split_over(tree, mesh: Mesh):
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return placed(tree, jax.tree.map(lambda _: sharding, tree))


def measured(lowered, began: float) -> dict[str, float]:
    """Gigabytes of each device."""
    memory = lowered.compile().memory_analysis()
    sizes = {
        'arguments': memory.argument_size_in_bytes,
        'results_beside_arguments': memory.output_size_in_bytes - memory.alias_size_in_bytes,
        'temporary_at_most': memory.temp_size_in_bytes,
    }
    found = {name: round(size / 1e9, 2) for name, size in sizes.items()}
    found['seconds_to_compile'] = round(time.monotonic() - began, 1)
    print(found, flush=True)
    return found


def compiled(config: ConfigDict, devices: int) -> dict[str, Any]:
    began = time.monotonic()
    types, shape = (AxisType.Auto,) * 3, (1, devices, 1)
    mesh = jax.make_mesh(shape, MESH_AXES, axis_types=types, devices=jax.devices()[:devices])
    make = functools.partial(build_model, config)
    graphdef, trainable, frozen = split_model(
        make,
        trainable_filter(config.trainable, jax.eval_shape(make, jax.random.key(0))),
        seed=0,
        frozen_dtype=jnp.bfloat16,
        mesh=mesh,
        given=True,  # so that all of it stays shapes
    )
    tx, found = make_optimizer(OptimizerConfig(**config.optimizer), config.steps), {}

    def begin(trainable):
        state, found['where'] = start(trainable, tx, ema=False, mesh=mesh)
        return state

    state = jax.eval_shape(begin, trainable)
    step = make_train_step(
        graphdef, OBJECTIVES['flow'](config), tx, accumulate=1, ema_decay=0, where=found['where']
    )
    batch, key = split_over(edits(devices), mesh), jax.random.key(0)
    with jax.set_mesh(mesh):
        train = step.lower(placed(state, found['where']), frozen, batch, key)
        result = {'train': measured(train, began)}
        began = time.monotonic()
        forward = jax.jit(lambda *args: nnx.merge(graphdef, *args[:2]).velocity(*args[2:]))
        result['forward'] = measured(
            forward.lower(*sampler(graphdef, trainable, frozen, batch, mesh)), began
        )
    return result


def sampler(graphdef, trainable, frozen, batch: Batch, mesh: Mesh) -> tuple:
    """What one step of the solver takes: bf16 parameters, latents, times, plan, context image."""
    half = lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16, sharding=a.sharding)
    trainable = jax.tree.map(half, trainable)

    def inputs(trainable, frozen, batch):
        model = nnx.merge(graphdef, trainable, frozen)
        z = model.vae.encode(batch.pixels_BFHWC)
        ones = jnp.ones(z.shape[:2])
        visual = dataclasses.replace(model.look(batch.visual), guidance_B=ones[:, 0])
        return z, ones, model.plan(batch.texts, z.shape[1:4]), visual

    shapes = jax.eval_shape(inputs, trainable, frozen, batch)
    return trainable, frozen, *split_over(shapes, mesh)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--devices', type=int, nargs='+', default=[1, 8])
    parser.add_argument('--output', default=str(ROOT / 'bench/results/flux_step.json'))
    args = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        config = full_size(pathlib.Path(folder))
        result = {
            'what': 'configs/flux_edit.py at full size, compiled for CPU devices, never run',
            'batch_per_device': 1,
            'tokens': {'target': 4096, 'context image': 4096, 'prompt': WORDS, 'canvas': 1024},
            'gigabytes_per_device': {n: compiled(config, n) for n in args.devices},
        }
    record(args.output, result, load=load, packages=PACKAGES)


if __name__ == '__main__':
    main()
