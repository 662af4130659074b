"""Time of DC-AE's decoder beside diffusers', on one CPU thread, in one run.

    python -m bench.dc_ae_decode [--latent=4] [--repeats=8] [--core=1] [--output=FILE.json]

The published sizes with random weights in fp32, converted from diffusers' own file, so both make
the same picture of one square latent. Runs alternate; the least time of each counts. CPU seconds
are compared, which other processes on the core disturb less than wall seconds.
"""

import argparse
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

from bench.record import record

ROOT = pathlib.Path(__file__).parents[1]
MANIFEST = ROOT / 'tests/manifests/dc_ae_f32c32.json'
PACKAGES = ('jax', 'jaxlib', 'torch', 'diffusers')


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """The least CPU and wall seconds of each, in turns."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            found[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: {
            'cpu_seconds': round(min(cpu for cpu, _ in times), 4),
            'wall_seconds': round(min(wall for _, wall in times), 4),
        }
        for name, times in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--latent', type=int, default=4, help='rows and columns')
    parser.add_argument('--repeats', type=int, default=8)
    parser.add_argument('--core', type=int, default=1)
    parser.add_argument('--output', default=str(ROOT / 'bench/results/dc_ae_decode.json'))
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})  # before the libraries count the cores

    import jax
    import numpy as np
    import torch
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

    import convert

    torch.set_num_threads(1)
    config = json.loads(MANIFEST.read_text())['config']
    torch.manual_seed(0)
    theirs: Any = AutoencoderDC.from_config(config)
    theirs.eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = convert.load('dc_ae', folder)
    factor = config['scaling_factor']
    z = np.random.default_rng(0).normal(size=(1, 32, args.latent, args.latent))
    z_theirs = torch.tensor(z.astype(np.float32))
    z_ours = jax.device_put(np.float32(factor * z.transpose(0, 2, 3, 1)[:, None]))
    program = jax.jit(lambda vae, z: vae.decode(z)).lower(ours, z_ours).compile()

    def run_theirs() -> torch.Tensor:
        with torch.inference_mode():
            return theirs.decoder(z_theirs)

    run_ours = lambda: program(ours, z_ours).block_until_ready()
    picture = run_theirs().numpy().transpose(0, 2, 3, 1)
    error = float(np.abs(run_ours()[:, 0] - picture).max() / np.abs(picture).max())
    load = os.getloadavg()[0]
    times = measure({'ours': run_ours, 'diffusers': run_theirs}, args.repeats)
    ratio = times['ours']['cpu_seconds'] / times['diffusers']['cpu_seconds']
    result = {
        'what': f'DC-AE f32c32 decode, latent {args.latent}^2, fp32, random weights, one thread',
        'relative_error': error,
        **times,
        'ours_over_diffusers': round(ratio, 3),
        'allowed': 1.2,
        'repeats': args.repeats,
    }
    record(args.output, result, load=load, packages=PACKAGES)


if __name__ == '__main__':
    main()
