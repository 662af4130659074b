"""On a GPU: bf16 through cuDNN's attention stays near transformers in fp32 on the CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from metacanvas_jax.mllm.qwen import Qwen
from tests import tiny
from tests.parity import test_qwen_vision as vision


@pytest.mark.gpu
def test_whole_model_in_bf16():
    """Text, pictures and a video in one batch; the last states, relative to their norm."""
    prompt, theirs, _ = vision._batch(tuple(vision.ROWS))
    with torch.no_grad():
        reference = vision._theirs().model(**theirs).last_hidden_state.numpy()
    half = Qwen(vision._config(), None, remat='full', dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    ours = {name: value.astype(jnp.bfloat16) for name, value in tiny.named(vision._ours()).items()}
    program = jax.jit(lambda model, prompt: model.prefix(prompt)[0])
    compiled = program.lower(tiny.fill(half, ours), prompt).compile()
    states = np.asarray(compiled(tiny.fill(half, ours), prompt), np.float32)
    valid = vision._valid(prompt)
    assert tiny.error(states[valid], reference[valid]) <= 2e-2
    assert 'cudnn' in str(compiled.as_text())
