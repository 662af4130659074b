"""A MetaCanvas small enough to test laws on, with random parameters (spec.md section 11)."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from configs import quickstart
from metacanvas_jax.backbones.base import Backbone
from metacanvas_jax.backbones.sana import Sana, SanaConfig
from metacanvas_jax.canvas.canvas_connector import Canvas, NoCanvas
from metacanvas_jax.canvas.config import CanvasConfig, ContextConfig
from metacanvas_jax.canvas.context_connector import Context, ContextConnector
from metacanvas_jax.canvas.queries import NoQueries
from metacanvas_jax.data.prompts import make_prompts
from metacanvas_jax.layers.linear import Linear, LoraConfig
from metacanvas_jax.layers.patch import from_patches, to_patches
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.mllm.config import QwenConfig
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.sharding import MESH_AXES
from metacanvas_jax.types import Patches, Prompt, Texts
from metacanvas_jax.vae.pixel import PixelConfig, PixelVae

QWEN = QwenConfig(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(2, 3, 3),
    tie_word_embeddings=True,
    image_token_id=59,
    video_token_id=60,
    spatial_merge_size=2,
    tokens_per_second=2,
)
SANA = SanaConfig(
    in_channels=12,
    num_attention_heads=4,
    attention_head_dim=16,
    num_layers=2,
    num_cross_attention_heads=2,
    caption_channels=24,
    mlp_ratio=2.5,
    patch_size=1,
    qk_norm=None,
)
CANVAS = dict(
    fuse='dit',
    time='adaln',
    align='transformer',
    positions='mrope',
    attention='causal',
    keyframes=1,
    grid=(2, 3),
    stride=2,
    frame_seconds=0.25,
    head_dim=16,
)
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.5)
PAD = 58

# P1 and P2: the projections that are zero at the start of training.
PROJECTIONS = ('canvas/fusion/project/', 'canvas/fusion/out/')

# Table 3 downwards (it is cumulative), then the same switches one at a time, and Table 10.
ROWS = {
    'full': {},
    'no time': dict(time='none'),
    'no block': dict(fuse='add', time='none'),
    'no vanilla': dict(fuse='add', time='none', align='none'),
    'before patchify': dict(fuse='latents', time='none', align='none'),
    'baseline': dict(fuse='none'),
    'no vanilla alone': dict(align='none'),
    'text positions': dict(positions='text'),
}


class Video(Backbone):
    """A toy DiT for several latent frames: no frame sees another, every input matters."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.width, self.patch, self.latent_channels, self.context_width = 64, 2, 3, 24
        pixels = self.patch**2 * self.latent_channels
        self.embed = Linear(pixels, self.width, ('channels', 'embed'), rngs=rngs)
        self.read = Linear(self.context_width, self.width, ('embed', None), rngs=rngs)
        self.proj_out = Linear(self.width, pixels, ('embed', 'channels'), rngs=rngs)

    def patchify(self, z_BTHWC, visual):
        del visual
        return Patches(target_BThwD=self.embed(to_patches(z_BTHWC, self.patch)), extra=None)

    def velocity(self, patches, t_BT, context_BLD, context_length_B):
        last = context_BLD[jnp.arange(len(context_BLD)), context_length_B - 1]
        x = patches.target_BThwD * (1 + t_BT[:, :, None, None, None])
        x = jnp.tanh(x + self.read(last)[:, None, None, None])
        return from_patches(self.proj_out(x), self.patch)


def sana(rngs: nnx.Rngs) -> Sana:
    return Sana(SANA, remat='none', dtype=jnp.float32, rngs=rngs)


def video(rngs: nnx.Rngs) -> Video:
    return Video(rngs=rngs)


def qwen(rngs: nnx.Rngs, lora: LoraConfig | None = None, config: QwenConfig = QWEN) -> Qwen:
    return Qwen(config, lora, remat='none', dtype=jnp.float32, rngs=rngs)


def canvas_config(**changes) -> CanvasConfig:
    return CanvasConfig(**{**CANVAS, **changes})


def metacanvas(
    backbone: Callable[[nnx.Rngs], Backbone], *, lora: LoraConfig | None = None, **canvas
) -> Callable[[nnx.Rngs], MetaCanvas]:
    """How to build one; `canvas` are changes of CANVAS."""
    config = canvas_config(**canvas)
    context = ContextConfig(hidden=32, activation='gelu_tanh', dropout=0.0, skip=2)
    width = QWEN.hidden_size

    def make(rngs: nnx.Rngs) -> MetaCanvas:
        dit = backbone(rngs)
        none = config.fuse == 'none'
        return MetaCanvas(
            mllm=qwen(rngs, lora),
            text_encoder=None,
            pooled_encoder=None,
            context=Context(
                ContextConnector(context, width, dit.context_width, rngs=rngs), NoQueries()
            ),
            canvas=NoCanvas() if none else Canvas(config, width, dit, rngs=rngs),
            backbone=dit,
            vae=PixelVae(
                PixelConfig(stride=round((dit.latent_channels / 3) ** 0.5)),
                dtype=jnp.float32,
                rngs=rngs,
            ),
        )

    return make


def named(module: nnx.Module) -> dict[str, jax.Array]:
    """{slash-joined path: value} of every parameter."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {'/'.join(map(str, path)): variable.get_value() for path, variable in flat}


def fill(module: nnx.Module, arrays: Mapping[str, np.ndarray]) -> Any:
    """The module with these values: all of its parameters, no others, of its shapes."""
    graphdef, state = nnx.split(module)
    flat = {'/'.join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(state)}
    assert flat.keys() == arrays.keys(), flat.keys() ^ arrays.keys()
    filled = {}
    for name, (path, variable) in flat.items():
        assert arrays[name].shape == variable.shape, name
        filled[path] = variable.replace(jnp.asarray(arrays[name], jnp.float32))
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def randomised(make: Callable, *, seed: int = 0, zero: tuple[str, ...] = PROJECTIONS) -> Any:
    """A module with every parameter random, but those whose path contains one of `zero`.

    A parameter's values depend on its path and shape alone.
    """
    module = jax.eval_shape(lambda: make(nnx.Rngs(0)))

    def draw(name: str, shape) -> np.ndarray:
        if any(part in name for part in zero):
            return np.zeros(shape, np.float32)
        values = np.random.default_rng((seed, zlib.crc32(name.encode()))).normal(size=shape)
        if name.endswith('/scale'):
            return 1 + 0.1 * values
        small = name.endswith(('/bias', '/offset')) or len(shape) == 1
        return values * (0.1 if small else shape[-2] ** -0.5)

    return fill(module, {name: draw(name, a.shape) for name, a in named(module).items()})


def replaced(module, changes: Mapping[str, np.ndarray]) -> Any:
    """The module with some parameters exchanged."""
    old = {name: np.asarray(value) for name, value in named(module).items()}
    assert changes.keys() <= old.keys()
    return fill(module, {**old, **changes})


def perturbed(module, pattern: str, seed: int = 1) -> Any:
    """The module with noise on the parameters whose path contains `pattern`."""
    rng = np.random.default_rng(seed)
    found = {name: np.asarray(a) for name, a in named(module).items() if pattern in name}
    assert found, pattern
    return replaced(module, {name: a + 0.3 * rng.normal(size=a.shape) for name, a in found.items()})


def prompt(lengths=(5, 9), *, size: int = 12, seed: int = 0) -> Prompt:
    """Text prompts of unequal length; their ids do not depend on the padding."""
    rng = np.random.default_rng(seed)
    chats = [rng.integers(0, PAD, length).tolist() for length in lengths]
    return make_prompts(chats, QWEN, pad=PAD, buckets=(size,))


def texts(*args, **kwargs) -> Texts:
    """As `prompt`, for a MetaCanvas."""
    return Texts(mllm=prompt(*args, **kwargs))


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def error(ours, theirs) -> float:
    """max |a - b| / max |b|"""
    ours, theirs = (np.asarray(a, np.float64) for a in (ours, theirs))
    assert ours.shape == theirs.shape
    assert np.abs(theirs).max() > 0
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def one_device() -> Mesh:
    return jax.make_mesh(
        (1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def config(**canvas) -> ConfigDict:
    """The quickstart, with a smaller DiT; `canvas` are changes of its canvas."""
    config = quickstart.get_config()
    config.batch_size = 4
    config.prompt.buckets = (64,)
    config.context.hidden = 32
    config.canvas.update(grid=(2, 2), **canvas)
    if config.canvas.fuse == 'none':
        config.mllm.lora.rank = 0
    config.backbone.update(num_attention_heads=2, num_layers=2, num_cross_attention_heads=2)
    config.backbone.update(caption_channels=24)
    config.data.size = 8
    config.optimizer.warmup_steps = 1
    config.optimizer.ema = 0.0
    config.optimizer.weight_decay = 0.0  # what moves has had a gradient
    return config
