"""ConfigDict -> frozen dataclasses -> modules. Here configs end: no module ever sees one."""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from metacanvas_jax.backbones import flux, sana, wan_config
from metacanvas_jax.backbones.base import Backbone
from metacanvas_jax.backbones.flux import Flux, FluxConfig
from metacanvas_jax.backbones.sana import Sana, SanaConfig
from metacanvas_jax.backbones.wan import Wan
from metacanvas_jax.backbones.wan_config import WanConfig
from metacanvas_jax.canvas.canvas_connector import Canvas, NoCanvas
from metacanvas_jax.canvas.config import CanvasConfig, ContextConfig
from metacanvas_jax.canvas.context_connector import Context, ContextConnector, EncoderText, NoText
from metacanvas_jax.canvas.queries import MetaQueries, NoQueries, QueryConfig
from metacanvas_jax.layers.linear import LoraConfig
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.mllm import config as mllm_presets
from metacanvas_jax.mllm.config import QwenConfig
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.text_encoders import clip, gemma2, t5
from metacanvas_jax.text_encoders.base import (
    CachedStates,
    StoredVector,
    VectorConfig,
    read_vector_config,
)
from metacanvas_jax.text_encoders.clip import Clip, ClipConfig
from metacanvas_jax.text_encoders.gemma2 import Gemma2, Gemma2Config
from metacanvas_jax.text_encoders.t5 import T5, T5Config
from metacanvas_jax.types import InputError
from metacanvas_jax.vae import dc_ae_config, flux_ae_config, wan_vae_config
from metacanvas_jax.vae.base import CachedConfig, CachedLatents
from metacanvas_jax.vae.dc_ae import DcAe
from metacanvas_jax.vae.dc_ae_config import DcAeConfig
from metacanvas_jax.vae.flux_ae import FluxAe
from metacanvas_jax.vae.flux_ae_config import FluxAeConfig
from metacanvas_jax.vae.pixel import PixelConfig, PixelVae
from metacanvas_jax.vae.wan_vae import WanVae
from metacanvas_jax.vae.wan_vae_config import WanVaeConfig

ASSETS = pathlib.Path(__file__).parent / 'assets'


@dataclasses.dataclass(frozen=True)
class Part:
    """A kind of module: its class, its sizes, and where sizes come from.

    A config's group spells the sizes out, or names a preset as `size`; with `size` None the
    config.json of the weights decides. `changes` in the group are made to either. What they add
    is `new`: parameters below these names begin as they are built where weights lack them. What
    they take away is `unused`, which weights may hold.
    """

    module: type[Any]
    sizes: Callable[..., Any]
    presets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read_config: Callable[[pathlib.Path], Any] | None = None
    new: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


MLLMS = {'qwen2_5_vl': Part(Qwen, QwenConfig, mllm_presets.PRESETS, mllm_presets.read_config)}
BACKBONES = {
    'sana': Part(Sana, SanaConfig, sana.PRESETS, sana.read_config),
    'flux': Part(Flux, FluxConfig, read_config=flux.read_config),
    'wan': Part(
        Wan,
        WanConfig,
        wan_config.PRESETS,
        wan_config.read_config,
        new=('condition_embedding/',),
        unused=('text_embedder/',),
    ),
}
VAES = {
    'pixel': Part(PixelVae, PixelConfig),
    'dc_ae': Part(DcAe, DcAeConfig, dc_ae_config.PRESETS, dc_ae_config.read_config),
    'flux_ae': Part(FluxAe, FluxAeConfig, read_config=flux_ae_config.read_config),
    'wan_vae': Part(WanVae, WanVaeConfig, wan_vae_config.PRESETS, wan_vae_config.read_config),
    'cached': Part(CachedLatents, CachedConfig),
}
TEXT_ENCODERS = {
    'gemma2': Part(Gemma2, Gemma2Config, gemma2.PRESETS, gemma2.read_config),
    't5': Part(T5, T5Config, read_config=t5.read_config),
    'umt5': Part(T5, T5Config, read_config=t5.read_config),
    'cached': Part(CachedStates, dict),
}
POOLED_ENCODERS = {
    'clip': Part(Clip, ClipConfig, read_config=clip.read_config),
    'stored': Part(StoredVector, VectorConfig, read_config=read_vector_config),
}
PARTS = {
    'mllm': MLLMS,
    'backbone': BACKBONES,
    'vae': VAES,
    'text_encoder': TEXT_ENCODERS,
    'pooled_encoder': POOLED_ENCODERS,
}
_SETTINGS = {  # what a group holds besides sizes
    *('kind', 'size', 'changes', 'remat', 'lora'),
    *('tokenizer', 'tokens', 'instruction', 'reads'),
}
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}

# config.objective -> {config.weights.NAME: where its parameters stand in the model}
COMPONENTS = {
    'flow': {
        'mllm': 'mllm/',
        'backbone': 'backbone/',
        'vae': 'vae/',
        'text_encoder': 'text_encoder/',
        'pooled_encoder': 'pooled_encoder/',
        'context_connector': 'context/text/',
    },
    'next_token': {'mllm': ''},
}


def choose(table: Mapping, key: str, name: str):
    if key not in table:
        raise InputError(f'{name} {key!r} is unknown; there are: {", ".join(table)}')
    return table[key]


RANDOM = 'random'  # as config.weights.NAME: initial values, on purpose


def shipped(name: str) -> pathlib.Path:
    """A folder, or the name of one that ships with the package, such as tiny_qwen."""
    asset = ASSETS / name
    return asset if asset.is_dir() else pathlib.Path(name)


def weights_folder(config: ConfigDict, name: str) -> pathlib.Path | None:
    """That of config.weights.NAME, where there is one."""
    folder = config.weights.get(name)
    return None if folder in (None, RANDOM) else shipped(folder)


# ---------------------------------------------------------------- sizes


def find_part(config: ConfigDict, name: str) -> Part:
    return choose(PARTS[name], config[name].kind, f'config.{name}.kind')


def part_sizes(config: ConfigDict, name: str) -> Any:
    """The sizes of config.NAME; the config.json of its weights, where it has some, must agree."""
    part, group, folder = find_part(config, name), config[name], weights_folder(config, name)
    found, changes = None, group.get('changes', {})
    if folder is not None and part.read_config is not None:
        found = dataclasses.replace(part.read_config(folder), **changes)
    if 'size' not in group:
        wanted = part.sizes(**{k: v for k, v in group.items() if k not in _SETTINGS})
    elif group.size is not None:
        preset = choose(part.presets, group.size, f'config.{name}.size')
        wanted = dataclasses.replace(preset, **changes)
    elif found is not None:
        return found
    else:
        raise InputError(
            f'config.weights.{name} is missing; give the folder of converted weights, or a '
            f'config.{name}.size: {", ".join(part.presets)}'
        )
    if getattr(found, 'vision', True) is None:  # text alone serves those who show no pictures
        wanted = dataclasses.replace(wanted, vision=None)
    if found is not None and found != wanted:
        ours, theirs = (dict(sorted(sizes.to_json().items())) for sizes in (wanted, found))
        differing = [f'{k}: {theirs[k]} there, {v} here' for k, v in ours.items() if theirs[k] != v]
        raise InputError(f'{folder} does not fit config.{name}: {"; ".join(differing)}')
    return wanted


def size_multiple(config: ConfigDict) -> int:
    """Pixels on a side of a token: the VAE's stride times the DiT's patch."""
    return part_sizes(config, 'vae').stride * part_sizes(config, 'backbone').patch_size


def check_size(config: ConfigDict, height: int, width: int) -> None:
    multiple = size_multiple(config)
    for name, size in (('height', height), ('width', width)):
        if size <= 0 or size % multiple:
            nearest = max(1, round(size / multiple)) * multiple
            raise InputError(f'{name} {size} is not a multiple of {multiple} (nearest: {nearest})')


def picture_size(config: ConfigDict) -> tuple[int, int]:
    """Rows and columns."""
    data = config.data
    return (data.height, data.width) if 'height' in data else (data.size, data.size)


# ---------------------------------------------------------------- modules


def _rngs(key: jax.Array, name: str) -> nnx.Rngs:
    """A part's initial values depend on its name alone, not on the parts built before it."""
    return nnx.Rngs(jax.random.fold_in(key, zlib.crc32(name.encode())))


def _lora(config: ConfigDict) -> LoraConfig | None:
    return LoraConfig(**config) if config.rank else None


def _dtype(config: ConfigDict) -> Any:
    return choose(DTYPES, config.dtype, 'config.dtype')


def build_part(config: ConfigDict, name: str, key: jax.Array, **settings) -> Any:
    module, sizes = find_part(config, name).module, part_sizes(config, name)
    return module(sizes, **settings, dtype=_dtype(config), rngs=_rngs(key, name))


def build_mllm(config: ConfigDict, key: jax.Array) -> Qwen:
    """The MLLM alone, as language model."""
    group = config.mllm
    return build_part(config, 'mllm', key, lora=_lora(group.lora), remat=group.remat)


def build_metacanvas(config: ConfigDict, key: jax.Array) -> MetaCanvas:
    """Figure 1; without config.mllm the base system alone."""
    mllm = build_mllm(config, key) if 'mllm' in config else None
    group = config.backbone
    adapts = {'lora': _lora(group.lora)} if group.get('lora') is not None else {}
    backbone = build_part(config, 'backbone', key, **adapts, remat=group.remat)
    vae = build_part(config, 'vae', key)
    if vae.channels != backbone.latent_channels:
        raise InputError(
            f'config.vae makes {vae.channels} latent channels, config.backbone takes '
            f'{backbone.latent_channels}'
        )
    pooled = build_part(config, 'pooled_encoder', key) if 'pooled_encoder' in config else None
    makes = None if pooled is None else pooled.width
    if makes != backbone.pooled_width:
        raise InputError(
            f'config.pooled_encoder makes a vector of width {makes}, config.backbone takes '
            f'{backbone.pooled_width}'
        )
    return MetaCanvas(
        mllm=mllm,
        text_encoder=build_part(config, 'text_encoder', key) if 'text_encoder' in config else None,
        pooled_encoder=pooled,
        context=_context(config, mllm, backbone, key),
        canvas=_canvas(config, mllm, backbone, key),
        backbone=backbone,
        vae=vae,
    )


def _context(config: ConfigDict, mllm: Qwen | None, backbone: Backbone, key) -> Context:
    rngs, width = _rngs(key, 'context'), backbone.context_width
    sizes = {k: v for k, v in config.context.items() if k != 'kind'}
    texts = {
        'mllm': lambda: ContextConnector(
            ContextConfig(**sizes), _width(mllm, 'context.kind'), width, rngs=rngs
        ),
        'encoder': EncoderText,
        'none': lambda: NoText(width),
    }
    queries = NoQueries()
    if config.get('queries') is not None:
        config_ = QueryConfig(**config.queries)
        queries = MetaQueries(config_, _width(mllm, 'queries'), width, rngs=_rngs(key, 'queries'))
    return Context(choose(texts, config.context.kind, 'config.context.kind')(), queries)


def _canvas(config: ConfigDict, mllm: Qwen | None, backbone: Backbone, key) -> Canvas | NoCanvas:
    if 'canvas' in config and config.canvas.fuse != 'none':
        width = _width(mllm, 'canvas')
        return Canvas(CanvasConfig(**config.canvas), width, backbone, rngs=_rngs(key, 'canvas'))
    if mllm is not None and config.mllm.lora.rank and config.get('queries') is None:
        raise InputError(
            f'config.mllm.lora.rank is {config.mllm.lora.rank} but config.canvas.fuse is none: the '
            'LoRA acts on canvas tokens only; set the rank to 0'
        )
    return NoCanvas()


def _width(mllm: Qwen | None, reader: str) -> int:
    if mllm is None:
        raise InputError(f'config.{reader} reads the MLLM, and there is no config.mllm')
    return mllm.config.hidden_size


# config.objective -> the model that it trains
MODELS = {'flow': build_metacanvas, 'next_token': build_mllm}


def build_model(config: ConfigDict, key: jax.Array) -> nnx.Module:
    return choose(MODELS, config.objective, 'config.objective')(config, key)
