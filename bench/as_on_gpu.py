"""Programs for CPUs as they would be for GPUs: the same arrays and messages, not the same values.

cuDNN's attention is a stand-in: like the kernel it holds no scores, only its result and one number
for each query; and like it, its forward is a primitive of the name by which rematerialisation keeps
what it made (layers/stack.py). Depthwise convolutions take all images of a batch at once.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from metacanvas_jax.layers import conv


def _forward(q_BSNE, k_BLGE, v_BLGE):
    """Every result depends on every argument, at the price of a few vectors."""
    groups = q_BSNE.shape[2] // k_BLGE.shape[2]
    k_B1NE, v_B1NE = (jnp.repeat(a.mean(1, keepdims=True), groups, 2) for a in (k_BLGE, v_BLGE))
    out_BSNE = q_BSNE * k_B1NE + v_B1NE
    return out_BSNE, (q_BSNE * k_B1NE).astype(jnp.float32).sum(-1)


def _backward(saved, g_BSNE):
    q_BSNE, k_BLGE, v_BLGE, out_BSNE, total_BSN = saved
    g = g_BSNE * (out_BSNE + total_BSN[..., None].astype(out_BSNE.dtype))
    groups = q_BSNE.shape[2] // k_BLGE.shape[2]

    def keys(g_BSNE, a_BLGE):
        g_B1NE = (g_BSNE * q_BSNE).mean(1, keepdims=True)
        return g_B1NE.reshape(*g_B1NE.shape[:2], -1, groups, g_B1NE.shape[3]).sum(3) + a_BLGE

    return g, keys(g, k_BLGE), keys(g_BSNE, v_BLGE)


forward_p = Primitive('dot_product_attention_fwd')
forward_p.multiple_results = True
forward_p.def_abstract_eval(
    lambda *avals: [ShapedArray(out.shape, out.dtype) for out in jax.eval_shape(_forward, *avals)]
)
mlir.register_lowering(forward_p, mlir.lower_fun(_forward, multiple_results=True))


@jax.custom_vjp
def fused(q_BSNE, k_BLGE, v_BLGE):
    return forward_p.bind(q_BSNE, k_BLGE, v_BLGE)[0]


def _saved(*qkv):
    out_BSNE, total_BSN = forward_p.bind(*qkv)
    return out_BSNE, (*qkv, out_BSNE, total_BSN)


fused.defvjp(_saved, _backward)


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    """What is traced inside is for GPUs, whether there is one or not."""
    with mock.patch.object(jax, 'default_backend', return_value='gpu'):
        yield


@contextlib.contextmanager
def as_on_gpu() -> Iterator[None]:
    """What is traced inside is for CPUs that do as GPUs would."""
    plain = jax.nn.dot_product_attention

    def attention(q, k, v, *, implementation=None, **options):
        if implementation == 'cudnn':
            return fused(q, k, v)
        return plain(q, k, v, implementation=implementation, **options)

    with (
        on_gpu(),
        mock.patch.object(jax.nn, 'dot_product_attention', attention),
        # In a loop over images, devices would gather the images of all.
        mock.patch.object(conv, '_by_images', conv._correlate),
        mock.patch.object(conv, '_gradients_by_images', conv._gradients),
    ):
        yield
