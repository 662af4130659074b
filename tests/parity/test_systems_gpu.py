"""On a GPU: a system in bf16, through cuDNN's attention, stays near itself in fp32 on the CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bench.side_by_side import drawn
from bench.systems import FULL_SIZE, make_batch, tiny
from bench.train_step import SYSTEMS, solver_inputs
from metacanvas_jax.build import build_model
from tests.tiny import error

TASKS = {name: next(row for row in SYSTEMS if row.startswith(name)) for name in FULL_SIZE}


@pytest.mark.gpu
@pytest.mark.parametrize('name', FULL_SIZE)
def test_velocity_in_bf16(name):
    """MLLM, connectors, canvas and DiT, at random weights; relative to the largest value."""
    config = tiny(name)
    batch = make_batch(config, TASKS[name].split(':')[1], 2)
    assert batch.pixels_BFHWC is not None
    noise = np.random.default_rng(0).normal(size=batch.pixels_BFHWC.shape).astype(np.float32)
    batch = batch.replace(pixels_BFHWC=noise)

    @jax.jit
    def velocity(model, batch):
        return model.velocity(*solver_inputs(model, batch))

    def run(dtype: str, device, weights):
        config.dtype = dtype
        model = jax.eval_shape(functools.partial(build_model, config), jax.random.key(0))
        graphdef, _ = nnx.split(model)
        weights = jax.tree.map(lambda a: a.astype(dtype), weights)
        args = jax.device_put((nnx.merge(graphdef, weights), batch), device)
        program = velocity.lower(*args).compile()
        return np.asarray(program(*args)), str(program.as_text())

    shapes = jax.eval_shape(functools.partial(build_model, config), jax.random.key(0))
    weights = drawn(nnx.state(shapes), 0.1)
    exact, _ = run('float32', jax.devices('cpu')[0], weights)
    found, text = run('bfloat16', jax.devices()[0], weights)
    assert found.dtype == jnp.float32
    assert 1e-5 < error(found, exact) <= 2e-2
    assert 'cudnn' in text
