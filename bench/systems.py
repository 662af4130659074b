"""The paper's systems for benches: at full size without any weights, or tiny; and their batches.

Sizes are those of the published config.json files. Batches are made by the host's own code, of
empty pictures and a prompt of as many tokens as captions have.
"""

import dataclasses
import json
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import flux_edit, quickstart, sana_t2i, wan_stage3
from metacanvas_jax.build import find_part
from metacanvas_jax.data.records import Record
from metacanvas_jax.data.tasks import TASKS, Readers, diffusion_batch
from metacanvas_jax.metacanvas import MetaCanvas
from metacanvas_jax.mllm.config import PRESETS
from metacanvas_jax.readers import build_readers
from metacanvas_jax.types import Batch, EncoderPrompt

ROOT = pathlib.Path(__file__).parents[1]
TOKENS = 150  # of a caption
FULL_SIZE = {
    'sana_t2i': sana_t2i.get_config,
    'flux_edit': flux_edit.get_config,
    'wan_stage3': wan_stage3.get_config,
}


def full_size(name: str) -> ConfigDict:
    config = FULL_SIZE[name]()
    if name == 'flux_edit':  # of which no preset is in the package
        _spell_out(config, 'backbone', 'flux1_kontext_dev')
        _spell_out(config, 'vae', 'flux_vae')
        config.pooled_encoder = dict(kind='stored', width=768)
    config.weights = dict.fromkeys(config.weights, 'random')
    config.prompt.tokenizer = 'tiny_qwen'
    return config


def _spell_out(config: ConfigDict, name: str, manifest: str) -> None:
    """The sizes of a published config.json in the place of `size`."""
    published = json.loads((ROOT / f'tests/manifests/{manifest}.json').read_text())['config']
    read_config = find_part(config, name).read_config
    assert read_config
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, 'config.json').write_text(json.dumps(published))
        sizes = read_config(pathlib.Path(folder))
    del config[name].size
    config[name].update(dataclasses.asdict(sizes))


def tiny(name: str) -> ConfigDict:
    """The same system, that a CPU runs in seconds: to see that a bench works."""
    if name == 'wan_stage3':
        from tests.tiny_wan import shrink

        config = shrink(wan_stage3.get_config())
        config.backbone.num_layers = 3
        return config
    config = quickstart.get_config({'sana_t2i': 'sana', 'flux_edit': 'flux'}[name])
    config.prompt.plan_tokens, config.context.skip = 0, 0
    config.weights.mllm = 'random'
    return config


def without_canvas(config: ConfigDict) -> ConfigDict:
    """The baseline: the MLLM speaks through the text interface alone, so its LoRA is gone too."""
    config = config.copy_and_resolve_references()
    config.canvas.fuse = 'none'
    config.mllm.lora.update(rank=0, alpha=0.0, dropout=0.0)
    stays = lambda pattern: not pattern.startswith(('canvas/', 'mllm/'))
    config.trainable = tuple(filter(stays, config.trainable))
    factors = config.optimizer.get('factors', ())
    config.optimizer.factors = tuple(row for row in factors if stays(row[0]))
    return config


# ------------------------------------------------------------ batches


class Words:
    """Stands where a text encoder's tokenizer is not at hand: a row of ids, full to the end."""

    def __init__(self, size: int):
        self.size = size

    def prompt(self, text: str) -> str:
        return text

    negative = prompt

    def batch(self, rows) -> EncoderPrompt:
        shape = len(rows), self.size
        taken_BL = np.broadcast_to(np.arange(self.size, dtype=np.int32), shape)
        full_B = np.full(len(rows), self.size, np.int32)
        return EncoderPrompt(np.ones(shape, np.int32), full_B, taken_BL, full_B)


def make_readers(config: ConfigDict) -> Readers:
    """With the vocabulary that ships; its tokens are of any size of model."""
    encoder = None
    if 'text_encoder' in config:
        encoder = Words(config.text_encoder.tokens)
        config = config.copy_and_resolve_references()
        del config.text_encoder
    readers, tokens = build_readers(config), PRESETS['tiny']
    assert readers.mllm
    ids = dict(image_token_id=tokens.image_token_id, video_token_id=tokens.video_token_id)
    mllm = dataclasses.replace(readers.mllm, mllm=dataclasses.replace(readers.mllm.mllm, **ids))
    return dataclasses.replace(readers, mllm=mllm, text_encoder=encoder, text_dropout=0.0)


def make_batch(config: ConfigDict, task: str, rows: int) -> Batch:
    """Of one task, on the host."""
    readers = make_readers(config)
    row, bucket = TASKS[task], readers.visuals.bucket
    picture = np.zeros((bucket.height, bucket.width, 3), np.uint8)
    video = np.broadcast_to(picture, (bucket.frames if row.video else 1, *picture.shape))
    shown: dict[str, dict[str, Any]] = {
        'source': dict(source=video, fps=24.0),
        'references': dict(references=(picture,) * bucket.references),
    }
    words = min(TOKENS, max(config.prompt.buckets) // 4) // 2
    record = Record('red circle ' * words, pixels=video, **shown.get(str(row.given), {}))
    return diffusion_batch(readers, task, [record] * rows, [1.0] * rows)


def with_latents(batch: Batch, model: MetaCanvas) -> Batch:
    """As from a feature cache, with noise for targets."""
    latents = jax.eval_shape(MetaCanvas.encode, model, batch.pixels_BFHWC)
    z = np.random.default_rng(0).normal(size=latents.shape).astype(np.float32)
    return dataclasses.replace(batch, pixels_BFHWC=None, latents_BTHWC=z)
