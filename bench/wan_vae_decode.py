"""Time of the Wan2.2 VAE's decoder beside diffusers', on one CPU thread, in one run.

    python -m bench.wan_vae_decode [--divide=4] [--latents=3] [--side=6] [--repeats=5] [--core=1]
        [--output=FILE.json]

The published sizes with 1/divide of the channels, random weights in fp32 converted from diffusers'
own file, so both make the same video of a square. Its memory is in bench/vae_memory.py.
Runs alternate; the least time of each counts. CPU seconds are compared, which other processes on
the core disturb less than wall seconds.
"""

import argparse
import json
import os
import pathlib
import tempfile
from typing import Any

from bench.dc_ae_decode import measure
from bench.record import record

ROOT = pathlib.Path(__file__).parents[1]
MANIFEST = ROOT / 'tests/manifests/wan2_2_vae.json'
PACKAGES = ('jax', 'jaxlib', 'torch', 'diffusers')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--divide', type=int, default=4, help='the channels by this')
    parser.add_argument('--latents', type=int, default=3, help='latent frames')
    parser.add_argument('--side', type=int, default=6, help='latent rows and columns')
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--core', type=int, default=1)
    parser.add_argument('--output', default=str(ROOT / 'bench/results/wan_vae_decode.json'))
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})  # before the libraries count the cores

    import jax
    import numpy as np
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    import convert

    torch.set_num_threads(1)
    config = json.loads(MANIFEST.read_text())['config']
    for side in ('base_dim', 'decoder_base_dim'):
        config[side] //= args.divide
    torch.manual_seed(0)
    theirs: Any = AutoencoderKLWan.from_config(config)
    theirs.eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = convert.load('wan_vae', folder)
    shape = (1, args.latents, args.side, args.side, config['z_dim'])
    z = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    mean, std = (np.float32(config[f'latents_{of}']) for of in ('mean', 'std'))
    z_theirs = torch.tensor((z * std + mean).transpose(0, 4, 1, 2, 3))
    z_ours = jax.device_put(z)
    program = jax.jit(lambda vae, z: vae.decode(z)).lower(ours, z_ours).compile()

    def run_theirs() -> torch.Tensor:
        with torch.inference_mode():
            return theirs.decode(z_theirs).sample

    run_ours = lambda: program(ours, z_ours).block_until_ready()
    video = run_theirs().numpy().transpose(0, 2, 3, 4, 1)
    error = float(np.abs(np.clip(run_ours(), -1, 1) - video).max() / np.abs(video).max())
    load = os.getloadavg()[0]
    times = measure({'ours': run_ours, 'diffusers': run_theirs}, args.repeats)
    ratio = times['ours']['cpu_seconds'] / times['diffusers']['cpu_seconds']
    result = {
        'what': f'Wan2.2 VAE decode, {video.shape[1]} frames of {16 * args.side}^2, '
        f'1/{args.divide} of the channels, fp32, random weights, one thread',
        'relative_error': error,
        **times,
        'ours_over_diffusers': round(ratio, 3),
        'allowed': 1.2,
        'repeats': args.repeats,
    }
    record(args.output, result, load=load, packages=PACKAGES)


if __name__ == '__main__':
    main()
