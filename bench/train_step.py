"""Bytes and collectives of a full-size train step, and forward, compiled and never run.

    python -m bench.train_step flux_edit wan_stage3:t2v ... [--devices 1 8] [--platform cuda]
        [--output=FILE.json]

SYSTEM:TASK is a row of SYSTEMS. Devices are not there: H200s with --platform=cuda, which wants the
CUDA wheels (pip install -e '.[cuda13]') and no GPU, or CPUs; in groups of eight over which
parameters are split (FSDP). CPUs are given the program that GPUs would be (as_on_gpu.py); still
their temporary bytes are an upper bound: they compute in fp32 what is bf16, gather it so too, fuse
less, and reduce gradients whole before each device takes its part.
"""

import argparse
import collections
import dataclasses
import functools
import os
import pathlib
import re
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from bench.as_on_gpu import as_on_gpu, on_gpu
from bench.record import record
from bench.systems import full_size, make_batch
from metacanvas_jax.build import DTYPES, build_model
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.sharding import BATCH_AXES, MESH_AXES
from metacanvas_jax.train.objective import OBJECTIVES
from metacanvas_jax.train.optim import OptimizerConfig, make_optimizer
from metacanvas_jax.train.state import split_model, start
from metacanvas_jax.train.step import make_train_step
from metacanvas_jax.train.trainable import trainable_filter
from metacanvas_jax.types import Batch

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ('jax', 'flax', 'optax')
FSDP, MOST = 8, 128  # devices of one machine, and of all

# SYSTEM:TASK -> samples for each device, the paper's; FLUX's and SANA's are one task
SYSTEMS = {
    'sana_t2i:t2i': 40,
    'flux_edit:edit': 1,
    'wan_stage3:t2i': 16,
    'wan_stage3:edit': 16,
    'wan_stage3:t2v': 1,
    'wan_stage3:i2v': 1,
    'wan_stage3:v2v': 1,
    'wan_stage3:r2v': 1,
}


# ------------------------------------------------------------ what is compiled


def mesh_of(devices: Sequence[Any]) -> Mesh:
    fsdp = min(len(devices), FSDP)
    shape, types = (len(devices) // fsdp, fsdp, 1), (AxisType.Auto,) * 3
    return Mesh(np.array(devices).reshape(shape), MESH_AXES, axis_types=types)


def placed(tree, where):
    put = lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
    return jax.tree.map(put, tree, where)


def split_over(tree, mesh: Mesh):
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return placed(tree, jax.tree.map(lambda _: sharding, tree))


@dataclasses.dataclass(frozen=True)
class Program:
    """Of a train step, or of a solver step's velocity: a function and its arguments as shapes."""

    function: Any
    arguments: tuple
    mesh: Mesh
    stacks: frozenset[tuple[int, ...]]  # shapes of the matrices that stand for all layers

    def compile(self, platform: str = 'cpu'):
        with jax.set_mesh(self.mesh):
            traced = self.function.trace(*self.arguments)
            return traced.lower(lowering_platforms=(platform,)).compile()


def programs(config: ConfigDict, batch: Batch, mesh: Mesh) -> dict[str, Program]:
    """Of a batch with its true rows; nothing is allocated."""
    make = functools.partial(build_model, config)
    graphdef, trainable, frozen = split_model(
        make,
        trainable_filter(config.trainable, jax.eval_shape(make, jax.random.key(0))),
        seed=0,
        frozen_dtype=DTYPES[config.dtype],
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
    batch, stacks = split_over(batch, mesh), layer_stacks((trainable, frozen))
    train = placed(state, found['where']), frozen, batch, jax.random.key(0)
    forward = jax.jit(lambda *args: nnx.merge(graphdef, *args[:2]).velocity(*args[2:]))
    half = lambda a: jax.ShapeDtypeStruct(a.shape, DTYPES[config.dtype], sharding=a.sharding)
    drawn = jax.tree.map(half, trainable), frozen
    inputs = jax.eval_shape(solver_inputs, nnx.merge(graphdef, *drawn), batch)
    return {
        'train': Program(step, train, mesh, stacks),
        'forward': Program(forward, (*drawn, *split_over(inputs, mesh)), mesh, stacks),
    }


def solver_inputs(model: MetaCanvas, batch: Batch) -> tuple:
    """What a step of the solver takes: latents, times, plan, and what is given beside them."""
    z = batch.latents_BTHWC
    z = model.encode(batch.pixels_BFHWC) if z is None else z
    B, T, H, W, _ = z.shape
    ones, visual = jnp.ones((B, T)), model.look(batch.visual)
    visual = dataclasses.replace(visual, guidance_B=ones[:, 0])
    return z, ones, model.plan(batch.texts, (T, H, W)), visual


# ------------------------------------------------------------ what is read off it


def layer_stacks(tree) -> frozenset[tuple[int, ...]]:
    """Whole shapes of the matrices of stacked layers, as their axes stand in any order."""
    found = set()
    for leaf in jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
        axes = leaf.get_metadata('axes', ()) if isinstance(leaf, nnx.Variable) else ()
        if len(leaf.shape) > len(axes) >= 2 and leaf.shape[0] > 1:
            found.add(_unordered(leaf.shape))
    return frozenset(found)


def _unordered(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


KINDS = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast'
COLLECTIVE = re.compile(rf'= (.*?) ({KINDS})(?:-start)?\(')
ARRAY = re.compile(r'([a-z]+(\d*)\w*)\[([\d,]*)\]')


@dataclasses.dataclass(frozen=True)
class Collective:
    kind: str
    array: str  # such as bf16[3072,14336]
    shape: tuple[int, ...]
    bytes: int  # of one result


def collectives(text: str) -> collections.Counter[Collective]:
    """In optimized HLO, and how often each stands there; one in a loop stands there once."""
    found = collections.Counter()
    for line in text.splitlines():
        if (match := COLLECTIVE.search(line)) is None:
            continue
        for array in ARRAY.finditer(match[1]):
            shape = tuple(map(int, filter(None, array[3].split(','))))
            size = int(np.prod(shape)) * max(int(array[2] or 8) // 8, 1)
            found[Collective(match[2], array[0], shape, size)] += 1
    return found


def whole_stacks(program: Program, text: str) -> list[str]:
    """Collectives after which each device holds a matrix of all layers at once."""
    return [
        f'{c.kind} {c.array}'
        for c in collectives(text)
        if c.kind != 'reduce-scatter' and _unordered(c.shape) in program.stacks
    ]


def measured(program: Program, platform: str) -> dict[str, Any]:
    """Gigabytes of each device, and what devices say to each other."""
    began = time.monotonic()
    compiled = program.compile(platform)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    sizes = {
        'arguments': memory.argument_size_in_bytes,
        'results_beside_arguments': memory.output_size_in_bytes - memory.alias_size_in_bytes,
        'temporary': memory.temp_size_in_bytes,
    }
    found: dict[str, Any] = {name: round(size / 1e9, 2) for name, size in sizes.items()}
    found['seconds_to_compile'] = round(time.monotonic() - began, 1)
    if program.mesh.size > 1:
        said = sorted(collectives(text).items(), key=lambda item: -item[0].bytes)
        found['of_whole_stacks'] = whole_stacks(program, text)
        found['collectives'] = [
            f'{count} {c.kind} {c.array} {c.bytes / 1e6:.3f} MB' for c, count in said
        ]
    print({name: value for name, value in found.items() if name != 'collectives'}, flush=True)
    return found


def devices_of(platform: str, count: int) -> Sequence[Any]:
    if platform == 'cpu':
        return jax.devices('cpu')[:count]
    machines, gpus = max(count // FSDP, 1), min(count, FSDP)
    topology = f'1x{machines}x{gpus}'  # groups of machines, machines, GPUs of each
    h200 = (ROOT / 'bench/h200.textproto').read_text()
    return topologies.get_topology_desc(
        'h200', platform, target_config=h200, topology=topology
    ).devices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('systems', nargs='+', metavar='SYSTEM:TASK', choices=SYSTEMS)
    parser.add_argument('--devices', type=int, nargs='+', default=[1, 8])
    parser.add_argument('--programs', nargs='+', default=['train', 'forward'])
    parser.add_argument('--platform', default='cpu', choices=('cpu', 'cuda'))
    parser.add_argument('--output', type=pathlib.Path)
    args = parser.parse_args()
    os.environ['JAX_SKIP_CUDA_CONSTRAINTS_CHECK'] = '1'  # that there is a GPU
    # Nothing is tuned without one, and the tiles that Triton starts from do not fit all products.
    os.environ['XLA_FLAGS'] = (
        f'{os.environ.get("XLA_FLAGS", "")} --xla_gpu_enable_triton_gemm=false'
    )
    jax.config.update('jax_num_cpu_devices', MOST)
    load = os.getloadavg()[0]
    for row in args.systems:
        name, task = row.split(':')
        path = args.output or ROOT / f'bench/results/step_{name}_{task}.json'
        config, rows = full_size(name), SYSTEMS[row]
        one = make_batch(config, task, 1)
        result: dict[str, Any] = {
            'what': f'configs/{name}.py at full size, task {task}, compiled and never run',
            'platform': args.platform,
            'samples_per_device': rows,
            'prompt_tokens': one.texts.mllm.ids_BL.shape[1] if one.texts.mllm else 0,
            'gigabytes_per_device': {},
        }
        for count in args.devices:
            grown = lambda a, n=rows * count: jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype)
            batch = jax.tree.map(grown, one)
            with as_on_gpu() if args.platform == 'cpu' else on_gpu():
                found = programs(config, batch, mesh_of(devices_of(args.platform, count)))
                result['gigabytes_per_device'][str(count)] = {
                    name: measured(found[name], args.platform) for name in args.programs
                }
            record(str(path), result, load=load, packages=PACKAGES)


if __name__ == '__main__':
    main()
