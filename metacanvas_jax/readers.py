"""ConfigDict -> the host side of all that reads prompts and pictures."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from metacanvas_jax.build import (
    choose,
    find_part,
    part_sizes,
    picture_size,
    shipped,
    weights_folder,
)
from metacanvas_jax.data import visuals
from metacanvas_jax.data.flux_prompts import FluxClipTokenizer, FluxT5Tokenizer
from metacanvas_jax.data.prompts import ChatTokenizer
from metacanvas_jax.data.sana_prompts import READS
from metacanvas_jax.data.tasks import Encoder, Readers, TextTokenizer
from metacanvas_jax.data.visuals import Bucket, Visuals
from metacanvas_jax.data.wan_prompts import WanTokenizer
from metacanvas_jax.mllm.windows import VisionBuckets
from metacanvas_jax.types import InputError


def build_encoder(config: ConfigDict) -> Encoder:
    return Encoder(
        tokenizer=ChatTokenizer(_tokenizer(config, 'prompt', 'mllm')),
        mllm=part_sizes(config, 'mllm'),
        buckets=tuple(config.prompt.buckets),
        vision_buckets=VisionBuckets(
            pictures=tuple(config.prompt.pictures), windows=tuple(config.prompt.windows)
        ),
        min_pixels=config.prompt.min_pixels,
        max_pixels=config.prompt.max_pixels,
        plan_tokens=config.prompt.plan_tokens,
        max_text=config.prompt.max_text,
        side=config.prompt.get('side'),
    )


def _sana_tokenizer(group: ConfigDict, folder: pathlib.Path) -> TextTokenizer:
    kind = choose(READS, group.reads, 'config.text_encoder.reads')
    options = {} if group.instruction else {'instruction': ''}
    return kind(folder, size=group.tokens, **options)


# config.text_encoder.kind -> its host side
TEXT_TOKENIZERS = {
    'gemma2': _sana_tokenizer,
    't5': lambda group, folder: FluxT5Tokenizer(folder, size=group.tokens),
    'umt5': lambda group, folder: WanTokenizer(folder, size=group.tokens),
}
# config.pooled_encoder.kind -> the same; what is not here reads nothing
POOLED_TOKENIZERS: Mapping[str, Callable[..., Any]] = {
    'clip': lambda group, folder: FluxClipTokenizer(folder, size=group.tokens),
}


def build_text_tokenizer(config: ConfigDict) -> TextTokenizer:
    folder = _tokenizer(config, 'text_encoder', 'text_encoder')
    return TEXT_TOKENIZERS[config.text_encoder.kind](config.text_encoder, folder)


def build_pooled_tokenizer(config: ConfigDict) -> TextTokenizer | None:
    group = config.get('pooled_encoder')
    if group is None or group.kind not in POOLED_TOKENIZERS:
        return None
    folder = _tokenizer(config, 'pooled_encoder', 'pooled_encoder')
    return POOLED_TOKENIZERS[group.kind](group, folder)


def _tokenizer(config: ConfigDict, group: str, name: str) -> pathlib.Path:
    """Converted weights hold their own."""
    if (given := config[group].tokenizer) is not None:
        return shipped(given)
    if (folder := weights_folder(config, name)) is None:
        raise InputError(f'config.{group}.tokenizer is missing; give a folder with tokenizer.json')
    return folder


def build_visuals(config: ConfigDict) -> Visuals:
    data, (height, width) = config.data, picture_size(config)
    frames = data.get('frames', 1)
    bucket = Bucket(
        height=height,
        width=width,
        frames=frames,
        latent_frames=visuals.latent_frames(frames, find_part(config, 'vae').module.time_stride),
        references=data.get('references', 0),
        short_clips=data.get('short_clips', 'refuse'),
        as_given=data.get('sizes') == 'kontext',
    )
    choose(visuals.SHORT_CLIPS, bucket.short_clips, 'config.data.short_clips')
    sizes = part_sizes(config, 'backbone')
    return Visuals(bucket, visuals.ENTRANCES[config.backbone.kind](sizes))


def build_readers(config: ConfigDict) -> Readers:
    return Readers(
        mllm=build_encoder(config) if 'mllm' in config else None,
        text_encoder=build_text_tokenizer(config) if 'text_encoder' in config else None,
        visuals=build_visuals(config),
        text_dropout=config.data.text_dropout,
        pooled_encoder=build_pooled_tokenizer(config),
    )


# config.objective -> what makes its batches
READERS = {'flow': build_readers, 'next_token': build_encoder}
