"""Fills a feature cache (data/feature_cache.py), so that training never loads what filled it."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from metacanvas_jax.build import DTYPES, build_part, choose, part_sizes, weights_folder
from metacanvas_jax.data.feature_cache import SHARD, FeatureCache
from metacanvas_jax.data.sources import SOURCES
from metacanvas_jax.data.tasks import Asked, CachedReaders, Readers
from metacanvas_jax.readers import (
    build_encoder,
    build_pooled_tokenizer,
    build_text_tokenizer,
    build_visuals,
)
from metacanvas_jax.sharding import MESH_AXES
from metacanvas_jax.train.state import split_model
from metacanvas_jax.types import InputError
from metacanvas_jax.weights import comes_from_weights, fingerprint, place_weights

PARTS = ('vae', 'text_encoder')
BATCH = 16  # records that are encoded at once


def open_caches(config: ConfigDict) -> dict[str, FeatureCache]:
    """{task: its cache} in the folder config.data.cache, whole or not."""
    sources = choose(SOURCES, config.data.source, 'config.data.source')(config.data)
    if others := [name for name in config.data.tasks if name != 't2i']:
        raise InputError(
            f'config.data.cache keeps pictures and their captions; task {others[0]!r} wants more: '
            'leave it None'
        )
    return {task: _open(config, task, sources[task]) for task in config.data.tasks}


def _open(config: ConfigDict, task: str, source: Any) -> FeatureCache:
    if not hasattr(source, 'fingerprint'):
        raise InputError(
            f'config.data.cache: records of source {config.data.source!r} are made as they are '
            'read and cannot be cached; leave it None'
        )
    key: dict[str, Any] = {'data': source.fingerprint, 'task': task, 'dtype': config.dtype}
    for name in PARTS:
        if name in config:
            folder = weights_folder(config, name)
            weights = f'seed {config.seed}' if folder is None else fingerprint(folder)
            key[name] = {'sizes': repr(part_sizes(config, name)), 'weights': weights}
    if 'text_encoder' in config:
        reads = ('tokens', 'instruction', 'reads')
        key['text'] = {k: config.text_encoder[k] for k in reads if k in config.text_encoder}
    return FeatureCache(config.data.cache, key, len(source))


def from_cache(config: ConfigDict) -> ConfigDict:
    """The system without what its caches stand for."""
    vae = jax.eval_shape(lambda: build_part(config, 'vae', jax.random.key(0)))
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.vae = dict(kind='cached', stride=vae.stride, channels=vae.channels)
        if 'text_encoder' in config:
            config.text_encoder = dict(kind='cached', tokens=config.text_encoder.tokens)
        config.weights.update({name: None for name in PARTS if name in config.weights})
    return config


def cached_readers(config: ConfigDict, caches: Mapping[str, FeatureCache]) -> CachedReaders:
    reads = 'text_encoder' in config
    return CachedReaders(
        mllm=build_encoder(config) if 'mllm' in config else None,
        text_encoder=None,
        visuals=build_visuals(config),
        text_dropout=config.data.text_dropout,
        pooled_encoder=build_pooled_tokenizer(config),
        negative=next(iter(caches.values())).negative() if reads else None,
        size=config.text_encoder.tokens if reads else 0,
    )


class _Encoders(nnx.Module):
    def __init__(self, config: ConfigDict, key: jax.Array):
        self.vae = build_part(config, 'vae', key)
        reads = 'text_encoder' in config
        self.text_encoder = build_part(config, 'text_encoder', key) if reads else None

    def __call__(self, pixels, tokens):
        """Latents, and the text encoder's states."""
        encoder = self.text_encoder
        return self.vae.encode(pixels), None if encoder is None else encoder.context(tokens)


def fill(config: ConfigDict, caches: Mapping[str, FeatureCache], show: Callable) -> None:
    """Every process encodes some of the missing shards, on its first device."""
    sources = choose(SOURCES, config.data.source, 'config.data.source')(config.data)
    todo = [(task, shard) for task, cache in caches.items() for shard in cache.missing()]
    mine = todo[jax.process_index() :: jax.process_count()]
    reads = 'text_encoder' in config
    silent = [task for task, cache in caches.items() if reads and not cache.has_negative()]
    if mine or silent:
        show(f'features: {len(todo)} shards of {SHARD} records are missing in {config.data.cache}')
        encode = _encoder(config)
        for task in silent:
            nothing = np.zeros_like(sources[task][0].pixels)
            caches[task].write_negative(encode([nothing], [Asked('', negative=True)])[1][0])
        for done, (task, shard) in enumerate(mine, start=1):
            with ThreadPoolExecutor(config.data.threads) as pool:
                records = list(pool.map(sources[task].__getitem__, shard))
            asked = [Asked(record.text) for record in records]
            latents, states = encode([record.pixels for record in records], asked)
            caches[task].write(shard, [record.text for record in records], latents, states)
            show(f'features: shard {done}/{len(mine)}')
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices('features')


def _encoder(config: ConfigDict) -> Callable:
    """(pixels, what is asked) -> latents (B, T, H, W, C) and states (L, D) of each."""
    device = jax.local_devices()[:1]
    mesh = jax.make_mesh((1, 1, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=device)
    model = _load(config, mesh)
    tokenizer = build_text_tokenizer(config) if 'text_encoder' in config else None
    readers = Readers(mllm=None, text_encoder=tokenizer, visuals=build_visuals(config))
    program = jax.jit(lambda model, pixels, tokens: model(pixels, tokens))

    def encode(pixels: Sequence[np.ndarray], asked: Sequence[Asked]):
        latents, states = [], []
        for start in range(0, len(asked), BATCH):
            rows = np.minimum(np.arange(start, start + BATCH), len(asked) - 1)  # one shape for all
            count = min(BATCH, len(asked) - start)
            x = np.stack([pixels[row] for row in rows]).astype(np.float32) / 127.5 - 1
            z, found = program(model, x, readers.tokens([asked[row] for row in rows]))
            latents.append(np.asarray(z)[:count])
            if found is not None:
                lengths = np.asarray(found.length_B)[:count]
                kept = np.asarray(found.states_BLD)
                states += [kept[row, :length] for row, length in enumerate(lengths)]
        return np.concatenate(latents), states

    return encode


def _load(config: ConfigDict, mesh: Mesh) -> _Encoders:
    folders = {name: weights_folder(config, name) for name in PARTS if name in config}
    given = {f'{name}/': folder for name, folder in folders.items() if folder is not None}
    graphdef, _, state = split_model(
        lambda key: _Encoders(config, key),
        nnx.Nothing(),
        seed=config.seed,
        frozen_dtype=DTYPES[config.dtype],
        mesh=mesh,
        given=lambda path, _: any(comes_from_weights(path, prefix) for prefix in given),
    )
    for prefix, folder in given.items():
        state = place_weights(state, folder, prefix)
    return nnx.merge(graphdef, state)
