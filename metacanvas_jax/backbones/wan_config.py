"""Sizes of Wan's transformers, always from a checkpoint's own config.json (spec.md section 0)."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from metacanvas_jax.config_json import check_fields, config_json, sizes_of
from metacanvas_jax.types import InputError

MASK_CHANNELS = 4  # the pixel frames of a latent frame

# config.text_embedder -> how wide the context comes: as the states of Wan's own text encoder, or
# from MetaCanvas' connector, which takes the place of the text embedder.
CONTEXT_WIDTHS = {'mlp': lambda config: config.text_dim, 'none': lambda config: config.width}


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Under the names of the published config.json, but for `patch_size` and `text_embedder`."""

    in_channels: int  # out_channels, or once widened 2 out_channels + 4
    out_channels: int  # of the latents
    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    ffn_dim: int
    freq_dim: int
    text_dim: int
    patch_size: int  # of rows and columns; in time it is 1
    eps: float
    text_embedder: str  # a key of CONTEXT_WIDTHS

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise InputError(f'{field.name} {value!r} is no positive integer')
        for name in ('attention_head_dim', 'freq_dim'):
            if getattr(self, name) % 2:
                raise InputError(f'{name} {getattr(self, name)} is odd')
        if self.text_embedder not in CONTEXT_WIDTHS:
            names = ', '.join(map(repr, CONTEXT_WIDTHS))
            raise InputError(f'text_embedder {self.text_embedder!r} is unknown; there are: {names}')
        if self.condition_channels not in (0, wide := self.out_channels + MASK_CHANNELS):
            raise InputError(
                f'in_channels {self.in_channels} is neither out_channels {self.out_channels} nor '
                f'{self.out_channels + wide}, those of noisy latents, condition and mask'
            )

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def context_width(self) -> int:
        return CONTEXT_WIDTHS[self.text_embedder](self)

    @property
    def condition_channels(self) -> int:
        return self.in_channels - self.out_channels

    @property
    def rotary_widths(self) -> tuple[int, int, int]:
        """How many channels of a head tell the place in time, rows and columns."""
        third = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * third, third, third

    def to_json(self) -> dict[str, Any]:
        """The published config.json, which diffusers reads too."""
        p = self.patch_size
        values = {**_FIXED, **dataclasses.asdict(self), 'patch_size': [1, p, p]}
        # What diffusers does not know stands there only where it says something.
        if self.text_embedder == _PUBLISHED['text_embedder']:
            del values['text_embedder']
        if self.condition_channels:
            values['condition_channels'] = self.condition_channels
        return values

    def to_native_json(self) -> dict[str, Any]:
        """The config.json of Wan's own repository."""
        values = {
            name: value for name, value in self.to_json().items() if name not in (*_FIXED, *_HEADS)
        }
        names = {theirs: ours for ours, theirs in _NATIVE.items()}
        return {
            '_class_name': 'WanModel',
            'model_type': 'ti2v',
            'dim': self.width,
            'num_heads': self.num_attention_heads,
            **{names.get(name, name): value for name, value in values.items()},
        }


PRESETS = {
    'ti2v_5b': WanConfig(
        in_channels=48,
        out_channels=48,
        num_attention_heads=24,
        attention_head_dim=128,
        num_layers=30,
        ffn_dim=14336,
        freq_dim=256,
        text_dim=4096,
        patch_size=2,
        eps=1e-6,
        text_embedder='mlp',
    ),
}

# What all published models have, and diffusers assumes where a config.json does not say it.
_FIXED = {
    '_class_name': 'WanTransformer3DModel',
    'added_kv_proj_dim': None,  # attention to a picture's CLIP states: Wan2.1's pictures to video
    'cross_attn_norm': True,
    'image_dim': None,
    'pos_embed_seq_len': None,  # of those states
    'qk_norm': 'rms_norm_across_heads',
}
# What else is assumed.
_PUBLISHED = {
    'freq_dim': 256,
    'text_dim': 4096,
    'eps': 1e-6,
    'patch_size': [1, 2, 2],
    'text_embedder': 'mlp',
    'condition_channels': 0,
}
# What changes no number.
_IGNORED = {
    '_diffusers_version',
    '_name_or_path',
    'rope_max_seq_len',  # the length of a table; our angles are those of the grid
    'text_len',  # to which Wan's own pipeline pads: here the caller's choice
}
# Wan's own words -> diffusers'.
_NATIVE = {'in_dim': 'in_channels', 'out_dim': 'out_channels'}
_HEADS = ('num_attention_heads', 'attention_head_dim')


def read_config(directory: str | pathlib.Path) -> WanConfig:
    """From the config.json of a transformer as diffusers, or Wan's own repository, publishes it."""
    with config_json(directory, 'a Wan transformer') as said:
        values = {**_PUBLISHED, **_in_diffusers_words(said)}
        values['out_channels'] = values.get('out_channels') or values['in_channels']
        config = sizes_of(WanConfig, {**values, 'patch_size': values['patch_size'][-1]})
        if config.condition_channels != values['condition_channels']:
            # Wan's models for pictures to video have another order: [noisy | mask | condition].
            raise InputError(
                f'in_channels is {config.in_channels} and out_channels {config.out_channels}; '
                'they may differ only in what this package has widened'
            )
        said_anew = config.to_json()
        unsaid = _PUBLISHED.keys() - said_anew.keys()
        check_fields(values, said_anew, _IGNORED | unsaid)
    return config


def _in_diffusers_words(values: Mapping[str, Any]) -> Mapping[str, Any]:
    if values.get('_class_name') != 'WanModel':
        return values
    values = {_NATIVE.get(name, name): value for name, value in values.items()}
    fixed = dict(model_type=('t2v', 'ti2v'), window_size=([-1, -1],), qk_norm=(True,))
    for name, supported in fixed.items():
        if (value := values.pop(name, supported[0])) not in supported:
            names = ', '.join(map(repr, supported))
            raise InputError(f'{name} {value!r} is not supported; there are: {names}')
    heads, dim = values.pop('num_heads'), values.pop('dim')
    if dim % heads:
        raise InputError(f'dim {dim} is no multiple of num_heads {heads}')
    own = {
        '_class_name': _FIXED['_class_name'],
        **dict(zip(_HEADS, (heads, dim // heads), strict=True)),
    }
    return values | own
