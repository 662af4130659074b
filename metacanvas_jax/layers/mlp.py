"""Feed-forwards: two-layer MLP, SwiGLU, and SANA's Mix-FFN."""

import jax
from flax import nnx

from metacanvas_jax.layers.conv import DepthwiseConv
from metacanvas_jax.layers.linear import Linear, LoraConfig, xavier

ACTIVATIONS = {
    'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
    'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
    'silu': jax.nn.silu,
}


class Mlp(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(self, d_in, hidden, d_out, *, activation='gelu_tanh', init=xavier, rngs):
        self.up = Linear(d_in, hidden, ('embed', 'mlp'), init=init, rngs=rngs)
        self.down = Linear(hidden, d_out, ('mlp', 'embed'), init=init, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x)))


class SwiGlu(nnx.Module):
    """down(silu(gate x) * up x), as in Llama and Qwen (whose vision tower has biases)."""

    def __init__(self, width, hidden, *, lora: LoraConfig | None, bias=False, init, rngs):
        def linear(d_in, d_out, axes):
            return Linear(d_in, d_out, axes, bias=bias, lora=lora, init=init, rngs=rngs)

        self.gate_proj = linear(width, hidden, ('embed', 'mlp'))
        self.up_proj = linear(width, hidden, ('embed', 'mlp'))
        self.down_proj = linear(hidden, width, ('mlp', 'embed'))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))

    def adapted(self, x: jax.Array, keys) -> jax.Array:
        gate = jax.nn.silu(self.gate_proj.adapted(x, keys[0]))
        return self.down_proj.adapted(gate * self.up_proj.adapted(x, keys[1]), keys[2])


class GluMbConv(nnx.Module):
    """Mix-FFN: 1x1 up, SiLU, depthwise 3x3, a * SiLU(b), 1x1 down without bias (SANA).

    The SiLU comes before the depthwise convolution, and again on the gate half only.
    """

    def __init__(self, width: int, ratio: float, *, rngs: nnx.Rngs):
        hidden = int(ratio * width)
        self.conv_inverted = Linear(width, 2 * hidden, ('embed', 'mlp'), rngs=rngs)
        self.conv_depth = DepthwiseConv(2 * hidden, size=3, bias=True, rngs=rngs)
        self.conv_point = Linear(hidden, width, ('mlp', 'embed'), bias=False, rngs=rngs)

    def __call__(self, x_BhwD: jax.Array) -> jax.Array:
        x = self.conv_depth(jax.nn.silu(self.conv_inverted(x_BhwD)))
        a, b = jax.numpy.split(x, 2, -1)
        return self.conv_point(a * jax.nn.silu(b))
