"""The stages of Wan, small, on clips of noise."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from metacanvas_jax.data.records import Record
from tests import tiny

HEIGHT, WIDTH, FRAMES = 8, 12, 5


@dataclasses.dataclass(frozen=True)
class Clips:
    """Records that any task can be made from; none is as large as it shall be."""

    frames: int = FRAMES

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Record:
        rng = np.random.default_rng(index)

        def noise(*shape: int) -> np.ndarray:
            return rng.integers(0, 256, (*shape, 3), np.uint8)

        return Record(
            text=f'a {"red" if index % 2 else "blue"} circle',
            pixels=noise(self.frames, 10, 14),
            source=noise(self.frames, 9, 13),
            fps=12.0,
            references=tuple(noise(7, 5 + slot) for slot in range(1 + index % 2)),
        )


def shrink(config: ConfigDict) -> ConfigDict:
    """The same system, whose autoencoder takes pixels as they are: a latent frame a frame."""
    config.update(batch_size=8, dtype='float32', steps=30, mesh=dict(data=-1, fsdp=1, tensor=1))
    config.weights = dict.fromkeys(config.weights, 'random')
    config.mllm.update(size='tiny', remat='full')
    config.mllm.lora.update(rank=min(config.mllm.lora.rank, 2), dropout=0.0)
    config.prompt.update(tokenizer='tiny_qwen', buckets=(64,), max_text=16)
    config.prompt.update(pictures=(1, 4), windows=(1,), side=32)
    config.prompt.update(min_pixels=32 * 32, max_pixels=32 * 32)
    config.context.hidden = 32
    wide = 'in_channels' in config.backbone.changes
    config.backbone = dict(
        kind='wan',
        remat='full',
        in_channels=28 if wide else 12,
        out_channels=12,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        ffn_dim=48,
        freq_dim=32,
        text_dim=8,
        patch_size=2,
        eps=1e-6,
        text_embedder='none',
    )
    config.vae = dict(kind='pixel', stride=2)
    config.data.update(height=HEIGHT, width=WIDTH, text_dropout=0.5, threads=1)
    if 'frames' in config.data:
        config.data.frames = FRAMES
        config.video_batch_size = 8
    if 'references' in config.data:
        config.data.references = 2
    if 'canvas' in config:
        config.canvas.update(grid=(1, 2), head_dim=32)
    config.optimizer = tiny.config().optimizer
    config.checkpoint.every = 30
    config.log.every = 30
    return config
