"""Time of the autoencoders beside diffusers', on one GPU in one run (P8 of the targets).

    python -m bench.gpu_vae dc_ae_512 dc_ae_1024 flux_decode flux_encode wan [--tiny]
        [--output=FILE.json]

bf16, random weights of the published sizes; theirs eager, pictures channels last.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench import side_by_side as bench
from bench.systems import full_size
from metacanvas_jax.build import find_part, part_sizes


@dataclasses.dataclass(frozen=True)
class Case:
    system: str
    latents: tuple[int, int, int]  # T, H, W
    tflop: float
    encode: bool = False


CASES = {
    'dc_ae_512': Case('sana_t2i', (1, 16, 16), 2.092),
    'dc_ae_1024': Case('sana_t2i', (1, 32, 32), 8.369),
    'flux_decode': Case('flux_edit', (1, 128, 128), 10.472),
    'flux_encode': Case('flux_edit', (1, 128, 128), 4.883, encode=True),
    'wan': Case('wan_stage3', (31, 44, 80), 2011.1),
}


def _shrink(sizes: Any) -> Any:
    """A quarter of Wan's and an eighth of FLUX's channels, and DC-AE as it is."""
    if hasattr(sizes, 'base_dim'):
        return dataclasses.replace(sizes, base_dim=16, decoder_base_dim=16, num_res_blocks=1)
    if hasattr(sizes, 'block_out_channels'):
        return dataclasses.replace(sizes, block_out_channels=(32, 32, 64, 64))
    return sizes


def ours(module: Callable, sizes: Any, case: Case, latents: tuple[int, ...]) -> bench.Runs:
    make = lambda key: module(sizes, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=key))
    vae = jax.eval_shape(make, jax.random.key(0))
    half = lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16)
    vae = bench.drawn(jax.tree.map(half, vae), 0.02)
    program = jax.jit(lambda vae, x: vae.encode(x) if case.encode else vae.decode(x))
    T, H, W = latents[1:4]
    frames = (1, vae.stride * H, vae.stride * W, 3)
    assert T == 1 or not case.encode
    x = jax.ShapeDtypeStruct((1, *frames) if case.encode else latents, jnp.float32)
    x = bench.drawn(x)
    return {'ours': lambda: program(vae, x).block_until_ready()}


def measured(name: str, *, tiny: bool, repeats: int) -> dict[str, Any]:
    case = CASES[name]
    config = full_size(case.system)
    module, sizes = find_part(config, 'vae').module, part_sizes(config, 'vae')
    T, H, W = case.latents
    if tiny:
        sizes, T, H, W = _shrink(sizes), min(T, 2), 1, 2
    channels = jax.eval_shape(lambda: module(sizes, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))).channels
    latents = 1, T, H, W, channels
    runs = dict(ours(module, sizes, case, latents))
    where, why = bench.torch_device(tiny=tiny)
    if where is not None:
        from bench import peers

        theirs = peers.autoencoder(sizes.to_json(), latents, where, encode=case.encode)
        runs['diffusers eager'] = theirs
    seconds = bench.measure(runs, repeats)
    return {
        'latents': list(latents),
        'peers': why,
        'seconds': seconds,
        'ratios': bench.ratios(seconds),
        'our_gigabytes': bench.most_bytes(),
        **bench.speed(case.tflop, seconds['ours'], tiny=tiny),
    }


if __name__ == '__main__':
    bench.run_cases(
        'gpu_vae',
        'one pass of an autoencoder, bf16, random weights, ours and theirs by turns',
        [*CASES],
        measured,
    )
