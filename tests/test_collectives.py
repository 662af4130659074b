"""What devices say to each other: nothing gathers all of a stack, and autoencoders are silent."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bench.as_on_gpu import as_on_gpu
from bench.systems import make_batch, tiny, without_canvas
from bench.train_step import (
    Program,
    collectives,
    mesh_of,
    placed,
    programs,
    split_over,
    whole_stacks,
)
from metacanvas_jax.layers.attention import attend
from metacanvas_jax.mllm.config import PRESETS
from metacanvas_jax.sharding import make_mesh, shardings
from metacanvas_jax.vae.wan_vae import WanVae
from metacanvas_jax.vae.wan_vae_config import PUBLISHED


@pytest.fixture(scope='module')
def step() -> Program:
    """Of Wan's stage 3 on eight devices, small: three layers, split over all of them (FSDP).

    Without the canvas, and with its blocks alone learning, it compiles in seconds.
    """
    patch = pytest.MonkeyPatch()
    sizes = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, mrope_section=(4, 4, 4))
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, vision=None)
    patch.setitem(PRESETS, 'tiny', dataclasses.replace(PRESETS['tiny'], **sizes))
    config = without_canvas(tiny('wan_stage3'))
    config.update(dtype='bfloat16', trainable=('backbone/blocks/.*',))
    with as_on_gpu():
        found = programs(config, make_batch(config, 't2v', 8), mesh_of(jax.devices()))['train']
    patch.undo()
    return found


def test_no_device_holds_all_layers(step):
    text = step.compile().as_text()
    found = collectives(text)
    # One layer of the feed-forward, and what is gathered in general, is there.
    assert any(c.kind == 'all-gather' and sorted(c.shape) == [32, 48] for c in found)
    assert (3, 32, 48) in step.stacks
    assert not whole_stacks(step, text)


@pytest.mark.parametrize('spec', [P('fsdp'), P(None, 'fsdp'), P(None, None, 'fsdp')])
def test_a_gathered_stack_is_found(step, spec):
    """However it was split, and whichever way its axes lie afterwards."""
    split, whole = NamedSharding(step.mesh, spec), NamedSharding(step.mesh, P())
    gather = jax.jit(lambda w: 2 * w.transpose(0, 2, 1), out_shardings=whole)
    w = jax.ShapeDtypeStruct((8, 32, 48), np.float32, sharding=split)
    gathers = Program(gather, (w,), step.mesh, frozenset({(8, 32, 48)}))
    (said,) = whole_stacks(gathers, gathers.compile().as_text())
    assert said.startswith('all-gather f32[8,')
    assert not whole_stacks(step, gathers.compile().as_text())


@pytest.mark.parametrize(
    ('rows', 'groups', 'spec'),
    [
        (8, 4, P(('data', 'fsdp'), None, ('tensor',), None)),
        (8, 3, P(('data', 'fsdp'), None, None, None)),
        (3, 4, P(None, None, ('tensor',), None)),
    ],
)
def test_queries_keys_and_values_lie_alike(rows, groups, spec):
    """cuDNN's attention refuses them otherwise; of a context, the compiler chose other places."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    q = jax.ShapeDtypeStruct((rows, 6, 12, 8), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((rows, 4, groups, 8), jnp.bfloat16)
    with as_on_gpu(), jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(attend)(q, k, k).jaxpr
    pinned = [e.params['sharding'].spec for e in jaxpr.eqns if 'sharding' in e.primitive.name]
    assert pinned == [spec] * 3


def test_an_autoencoder_is_silent(step):
    """Each device encodes its own videos with the whole of it, which is small."""
    sizes = dict(base_dim=8, decoder_base_dim=8, num_res_blocks=1)
    config = dataclasses.replace(PUBLISHED, **sizes)
    make = lambda key: WanVae(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(params=key))
    vae = jax.eval_shape(make, jax.random.key(0))
    graphdef, state = nnx.split(vae)
    x = jax.ShapeDtypeStruct((8, 5, 32, 32, 3), jnp.float32)
    encode = jax.jit(lambda state, x: nnx.merge(graphdef, state).encode(x))
    given = placed(state, shardings(state, step.mesh)), split_over(x, step.mesh)
    with as_on_gpu():
        text = Program(encode, given, step.mesh, frozenset()).compile().as_text()
    assert not collectives(text)


def test_what_is_read():
    """Of CPUs and GPUs, alone and combined, with the bytes of each."""
    text = """
      %a = bf16[3,16]{1,0} all-gather(bf16[3,2]{1,0} %x), channel_id=1
      %b = (f32[4]{0}, bf16[2,2]{1,0}) all-reduce(%y, %z), to_apply=%add
      ROOT %c = (f32[3,2]{1,0}, f32[3,16]{1,0}) all-gather-start(%x), channel_id=2
      %d = f32[3,16]{1,0} all-gather-done(%c)
      %e = pred[] all-to-all(%x)
      %f = f32[3,16]{1,0} fusion(%all-gather.1), kind=kLoop
    """
    found = [(c.kind, c.array, c.bytes) for c in collectives(text).elements()]
    assert found == [
        ('all-gather', 'bf16[3,16]', 96),
        ('all-reduce', 'f32[4]', 16),
        ('all-reduce', 'bf16[2,2]', 8),
        ('all-gather', 'f32[3,2]', 24),
        ('all-gather', 'f32[3,16]', 192),
        ('all-to-all', 'pred[]', 1),
    ]
