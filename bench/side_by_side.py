"""What benches on a GPU share: ours and theirs by turns in one process, and what the GPU can do."""

import argparse
import functools
import importlib.util
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bench.record import record

RESULTS = pathlib.Path(__file__).parent / 'results'
PACKAGES = ('jax', 'flax', 'torch', 'diffusers', 'transformers')
Runs = Mapping[str, Callable[[], Any]]


def run_cases(
    name: str, what: str, cases: Sequence[str], measured: Callable[..., dict[str, Any]]
) -> None:
    """The command line of a bench: `measured(case, tiny=, repeats=)` of each case that it names.

    Written after every case: what is cut short leaves what it has.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument('cases', nargs='+', choices=cases)
    parser.add_argument('--tiny', action='store_true', help='in small, also on a CPU')
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--output', default=str(RESULTS / f'{name}.json'))
    args = parser.parse_args()
    load = os.getloadavg()[0]
    result: dict[str, Any] = {
        'what': what,
        'tiny': args.tiny,
        'device': device(tiny=args.tiny),
        'matmul_tflop_per_s': round(matmul_ceiling(tiny=args.tiny), 1),
        'cases': {},
    }
    for case in args.cases:
        result['cases'][case] = measured(case, tiny=args.tiny, repeats=args.repeats)
        record(args.output, result, load=load, packages=PACKAGES)


def speed(tflop: float, seconds: Any, *, tiny: bool) -> dict[str, float]:
    """Of the full size only."""
    ran = isinstance(seconds, dict) and not tiny
    return {'tflop_per_s': round(tflop / seconds['median_s'], 1)} if ran else {}


def device(*, tiny: bool) -> str:
    """What this runs on; without a GPU only `tiny` does, to see that it works."""
    # Two frameworks share the memory: neither may take all of it.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
    if not tiny and jax.default_backend() != 'gpu':
        sys.exit('no GPU here; --tiny runs the same in small on a CPU')
    return jax.devices()[0].device_kind


def torch_device(*, tiny: bool) -> tuple[str | None, str]:
    """Where the peers run, if they do; and else why not."""
    if missing := [name for name in ('torch', 'diffusers') if not importlib.util.find_spec(name)]:
        return None, f'no peers: {" and ".join(missing)} are not installed'
    import torch

    if torch.cuda.is_available():
        return 'cuda', 'peers on the same GPU'
    return ('cpu', 'peers on the same CPU') if tiny else (None, 'no peers: torch has no CUDA')


def measure(runs: Runs, repeats: int) -> dict[str, Any]:
    """Seconds of each, by turns after one run to warm up; of one that fails, why."""
    failed, seconds = {}, {name: [] for name in runs}
    for turn in range(1 + repeats):
        for name, run in runs.items():
            if name in failed:
                continue
            try:
                began = time.perf_counter()
                run()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
            except Exception as error:  # such as out of memory: the others count all the same
                failed[name] = f'{type(error).__name__}: {error}'[:300]
                print(name, failed[name], file=sys.stderr)
    return {name: failed.get(name) or summary(values) for name, values in seconds.items()}


def summary(seconds: list[float]) -> dict[str, float | int]:
    return {
        'median_s': statistics.median(seconds),
        'min_s': min(seconds),
        'max_s': max(seconds),
        'repeats': len(seconds),
    }


def ratios(found: Mapping[str, Any], ours: str = 'ours') -> dict[str, float]:
    """Median of `ours` over that of each of the others."""
    medians = {name: value['median_s'] for name, value in found.items() if isinstance(value, dict)}
    if ours not in medians:
        return {}
    others = {name: median for name, median in medians.items() if name != ours}
    return {f'{ours} / {name}': round(medians[ours] / other, 4) for name, other in others.items()}


def matmul_ceiling(*, tiny: bool) -> float:
    """TFLOP/s of a square matmul in bf16, of random numbers: zeros would be faster."""
    size = 256 if tiny else 8192
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), jnp.bfloat16)
    program = jax.jit(jnp.matmul)
    (found,) = measure({'matmul': lambda: program(a, b).block_until_ready()}, 10).values()
    return 2 * size**3 / found['median_s'] / 1e12


def drawn(tree, scale: float = 1.0):
    """Random numbers in the place of shapes: a GPU takes longer over these than over zeros."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
    arrays = [_draw(key, a.shape, a.dtype, scale) for key, a in zip(keys, leaves, strict=False)]
    return jax.block_until_ready(jax.tree.unflatten(structure, arrays))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))  # one program for all of a shape
def _draw(key, shape: tuple[int, ...], dtype, scale: float) -> jax.Array:
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    return scale * jax.random.normal(key, shape, dtype)


def most_bytes() -> float | None:
    """Gigabytes that our arrays have taken so far, at most."""
    found = jax.devices()[0].memory_stats()
    return round(found['peak_bytes_in_use'] / 1e9, 2) if found else None
