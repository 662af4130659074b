"""Sizes of Qwen2.5-VL, always from a checkpoint's own config.json (spec.md section 0)."""

import dataclasses
import pathlib

from metacanvas_jax.config_json import config_json, sizes_of
from metacanvas_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower's sizes, under the names of the published config.json."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    window_size: int  # pixels
    fullatt_block_indexes: tuple[int, ...]  # blocks that see a whole picture, not a window
    initializer_range: float = dataclasses.field(default=0.02, compare=False)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Values of one flattened patch, in the order channel, frame, row, column."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """The language model's sizes, under the names of the published config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    spatial_merge_size: int
    tokens_per_second: float
    vision: VisionConfig | None = None  # None: weights for text alone
    # Of training from scratch; weights of another one fit all the same.
    initializer_range: float = dataclasses.field(default=0.02, compare=False)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def tower(self) -> VisionConfig:
        """The vision tower's sizes, asked for when there is something to see."""
        if self.vision is None:
            raise InputError('the weights of this MLLM are for text alone: it sees no pictures')
        return self.vision

    def to_json(self) -> dict:
        """The published flat layout, which transformers reads too."""
        values = dataclasses.asdict(self)
        section = values.pop('mrope_section')
        vision = {key: values.pop(key) for key in ('spatial_merge_size', 'tokens_per_second')}
        if (sizes := values.pop('vision')) is not None:
            sizes['fullatt_block_indexes'] = list(sizes['fullatt_block_indexes'])
            vision |= sizes | {'hidden_act': 'silu'}
        scaling = {'type': 'mrope', 'mrope_section': list(section)}
        return {
            'model_type': 'qwen2_5_vl',
            **values,
            'rope_scaling': scaling,
            'vision_config': vision,
        }


def read_config(directory: str | pathlib.Path) -> QwenConfig:
    """From config.json: the published flat layout, or transformers 5's nested `text_config`."""
    with config_json(directory, 'a Qwen2.5-VL model') as values:
        text = {**values, **values.get('text_config', {})}
        rope = text.get('rope_parameters') or text.get('rope_scaling') or {}
        vision = values['vision_config']
        found = {
            **{'initializer_range': 0.02, 'rope_theta': 1e6, **text, **rope},
            'mrope_section': tuple(rope['mrope_section']),
            'spatial_merge_size': vision['spatial_merge_size'],
            'tokens_per_second': vision['tokens_per_second'],
            'vision': _vision(vision) if 'depth' in vision else None,
        }
        return sizes_of(QwenConfig, {**found, 'rope_theta': float(found['rope_theta'])})


def _vision(values: dict) -> VisionConfig:
    if (activation := values.get('hidden_act', 'silu')) != 'silu':
        raise ValueError(f'vision_config.hidden_act is {activation!r}, not silu')
    # The published files say in_chans, transformers says in_channels.
    values = {'in_channels': values.get('in_chans', 3), 'initializer_range': 0.02, **values}
    values['fullatt_block_indexes'] = tuple(values['fullatt_block_indexes'])
    return sizes_of(VisionConfig, values)


_VISION = VisionConfig(
    depth=32,
    hidden_size=1280,
    num_heads=16,
    intermediate_size=3420,
    out_hidden_size=2048,
    in_channels=3,
    patch_size=14,
    temporal_patch_size=2,
    window_size=112,
    fullatt_block_indexes=(7, 15, 23, 31),
)
_QWEN = QwenConfig(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(16, 24, 24),
    tie_word_embeddings=True,
    image_token_id=151655,
    video_token_id=151656,
    spatial_merge_size=2,
    tokens_per_second=2,
    vision=_VISION,
)

# For tracing full-size configs without weights; with weights their config.json must agree.
PRESETS = {
    '3b': _QWEN,
    '7b': dataclasses.replace(
        _QWEN,
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        vision=dataclasses.replace(_VISION, out_hidden_size=3584),
    ),
    # The quickstart's: the same architecture with a vocabulary of the shapes world, whose pictures
    # it sees at 64 x 64 pixels: 16 tokens, four windows.
    'tiny': dataclasses.replace(
        _QWEN,
        vocab_size=507,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        mrope_section=(4, 6, 6),
        initializer_range=0.06,  # near 1 / sqrt(width): twice as few steps to learn to look up
        image_token_id=505,
        video_token_id=506,
        vision=VisionConfig(
            depth=4,
            hidden_size=96,
            num_heads=4,
            intermediate_size=192,
            out_hidden_size=192,
            in_channels=3,
            patch_size=8,
            temporal_patch_size=2,
            window_size=32,
            fullatt_block_indexes=(1, 3),
            initializer_range=0.06,
        ),
    ),
}
# It has read, and not yet seen.
PRESETS['tiny_text'] = dataclasses.replace(PRESETS['tiny'], vision=None)
