"""ConfigDict -> frozen dataclasses -> modules. Here configs end: no module ever sees one."""

import dataclasses
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from metacanvas_jax.backbones.sana import Sana, SanaConfig
from metacanvas_jax.canvas.canvas_connector import Canvas, NoCanvas
from metacanvas_jax.canvas.config import CanvasConfig, ContextConfig
from metacanvas_jax.canvas.context_connector import ContextConnector
from metacanvas_jax.data.prompts import ChatTokenizer
from metacanvas_jax.data.tasks import Encoder
from metacanvas_jax.layers.linear import LoraConfig
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.mllm.config import PRESETS, QwenConfig, read_config
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.mllm.windows import VisionBuckets
from metacanvas_jax.types import InputError
from metacanvas_jax.vae.dc_ae import DcAe
from metacanvas_jax.vae.dc_ae_config import DcAeConfig
from metacanvas_jax.vae.pixel import PixelConfig, PixelVae
from metacanvas_jax.vae.wan_vae import WanVae
from metacanvas_jax.vae.wan_vae_config import WanVaeConfig

ASSETS = pathlib.Path(__file__).parent / 'assets'

BACKBONES = {'sana': (Sana, SanaConfig)}
VAES = {
    'pixel': (PixelVae, PixelConfig),
    'dc_ae': (DcAe, DcAeConfig),
    'wan_vae': (WanVae, WanVaeConfig),
}
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}

# config.objective -> {config.weights.NAME: where its parameters stand in the model}
COMPONENTS = {
    'flow': {
        'mllm': 'mllm/',
        'backbone': 'backbone/',
        'vae': 'vae/',
        'context_connector': 'context/',
    },
    'next_token': {'mllm': ''},
}


def choose(table: Mapping, key: str, name: str):
    if key not in table:
        raise InputError(f'{name} {key!r} is unknown; there are: {", ".join(table)}')
    return table[key]


def weights_folder(name: str) -> pathlib.Path:
    """A folder of weights, or the name of one that ships with the package, such as tiny_qwen."""
    shipped = ASSETS / name
    return shipped if shipped.is_dir() else pathlib.Path(name)


def mllm_config(config: ConfigDict) -> QwenConfig:
    """The preset; the config.json of weights, where there are some, must agree with it.

    Without a size the weights alone decide.
    """
    if config.mllm.size is None:
        if config.weights.mllm is None:
            raise InputError('config.weights.mllm is missing; give the folder of converted weights')
        return read_config(weights_folder(config.weights.mllm))
    preset = choose(PRESETS, config.mllm.size, 'config.mllm.size')
    if (folder := config.weights.mllm) is None:
        return preset
    found = read_config(weights_folder(folder))
    if found.vision is None:  # weights for text alone serve those who show no pictures
        preset = dataclasses.replace(preset, vision=None)
    if found != preset:
        ours, theirs = (dict(sorted(c.to_json().items())) for c in (preset, found))
        differing = [f'{k}: {theirs[k]} there, {v} here' for k, v in ours.items() if theirs[k] != v]
        raise InputError(f'{folder} is not of size {config.mllm.size!r}: {"; ".join(differing)}')
    return preset


def vae_config(config: ConfigDict) -> Any:
    """The autoencoder's sizes; all of them have a `stride`."""
    _, dataclass = choose(VAES, config.vae.kind, 'config.vae.kind')
    return dataclass(**{k: v for k, v in config.vae.items() if k != 'kind'})


def build_encoder(config: ConfigDict) -> Encoder:
    folder = config.prompt.tokenizer or config.weights.mllm  # converted weights hold their own
    if folder is None:
        raise InputError('config.prompt.tokenizer is missing; give a folder with tokenizer.json')
    folder = weights_folder(folder)
    return Encoder(
        tokenizer=ChatTokenizer(folder),
        mllm=mllm_config(config),
        buckets=tuple(config.prompt.buckets),
        vision_buckets=VisionBuckets(
            pictures=tuple(config.prompt.pictures), windows=tuple(config.prompt.windows)
        ),
        min_pixels=config.prompt.min_pixels,
        max_pixels=config.prompt.max_pixels,
        text_dropout=config.data.text_dropout,
        plan_tokens=config.prompt.plan_tokens,
    )


def _rngs(key: jax.Array, name: str) -> nnx.Rngs:
    """A part's initial values depend on its name alone, not on the parts built before it."""
    return nnx.Rngs(jax.random.fold_in(key, zlib.crc32(name.encode())))


def _lora(config: ConfigDict) -> LoraConfig | None:
    return LoraConfig(**config) if config.rank else None


def build_mllm(config: ConfigDict, key: jax.Array) -> Qwen:
    """The MLLM alone, as language model."""
    return Qwen(
        mllm_config(config),
        _lora(config.mllm.lora),
        remat=config.mllm.remat,
        dtype=choose(DTYPES, config.dtype, 'config.dtype'),
        rngs=_rngs(key, 'mllm'),
    )


def build_metacanvas(config: ConfigDict, key: jax.Array) -> MetaCanvas:
    """Figure 1."""
    dtype = choose(DTYPES, config.dtype, 'config.dtype')
    has_canvas = config.canvas.fuse != 'none'
    if not has_canvas and config.mllm.lora.rank:
        raise InputError(
            f'config.mllm.lora.rank is {config.mllm.lora.rank} but config.canvas.fuse is none: the '
            'LoRA acts on canvas tokens only; set the rank to 0'
        )
    mllm = build_mllm(config, key)
    width = mllm.config.hidden_size
    cls, dataclass = choose(BACKBONES, config.backbone.kind, 'config.backbone.kind')
    sizes = {k: v for k, v in config.backbone.items() if k not in ('kind', 'remat')}
    backbone = cls(
        dataclass(**sizes), remat=config.backbone.remat, dtype=dtype, rngs=_rngs(key, 'backbone')
    )
    canvas = CanvasConfig(**config.canvas)
    cls, _ = choose(VAES, config.vae.kind, 'config.vae.kind')
    vae = cls(vae_config(config), dtype=dtype, rngs=_rngs(key, 'vae'))
    if vae.channels != backbone.latent_channels:
        raise InputError(
            f'config.vae makes {vae.channels} latent channels, config.backbone takes '
            f'{backbone.latent_channels}'
        )
    return MetaCanvas(
        mllm=mllm,
        context=ContextConnector(
            ContextConfig(**config.context),
            width,
            backbone.context_width,
            rngs=_rngs(key, 'context'),
        ),
        canvas=Canvas(canvas, width, backbone, rngs=_rngs(key, 'canvas'))
        if has_canvas
        else NoCanvas(),
        backbone=backbone,
        vae=vae,
    )


# config.objective -> the model that it trains
MODELS = {'flow': build_metacanvas, 'next_token': build_mllm}


def build_model(config: ConfigDict, key: jax.Array) -> nnx.Module:
    return choose(MODELS, config.objective, 'config.objective')(config, key)


def check_size(config: ConfigDict, height: int, width: int) -> None:
    """Pixels must be multiples of the VAE's stride times the DiT's patch."""
    multiple = vae_config(config).stride * config.backbone.patch_size
    for name, size in (('height', height), ('width', width)):
        if size <= 0 or size % multiple:
            nearest = max(1, round(size / multiple)) * multiple
            raise InputError(f'{name} {size} is not a multiple of {multiple} (nearest: {nearest})')
