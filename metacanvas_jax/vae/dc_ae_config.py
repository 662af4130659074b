"""Sizes of a DC-AE, always from a checkpoint's own config.json (diffusers' AutoencoderDC)."""

import dataclasses
import pathlib
from typing import Any

from metacanvas_jax.config_json import check_fields, config_json, sizes_of
from metacanvas_jax.types import InputError

_BLOCKS, _ACTIVATIONS = ('ResBlock', 'EfficientViTBlock'), ('relu', 'silu')

# What the published checkpoints choose from; dc_ae.py has a table for each.
KINDS = {
    'encoder_block_types': _BLOCKS,
    'decoder_block_types': _BLOCKS,
    'decoder_norm_types': ('rms_norm', 'batch_norm'),
    'decoder_act_fns': _ACTIVATIONS,
    'decoder_conv_act_fn': _ACTIVATIONS,
    'upsample_block_type': ('interpolate', 'pixel_shuffle'),
    'downsample_block_type': ('Conv', 'pixel_unshuffle'),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """Equal blocks at one resolution."""

    block: str
    channels: int
    layers: int
    head_dim: int
    scales: tuple[int, ...]  # kernel sizes of the attention's further scales
    norm: str
    activation: str


@dataclasses.dataclass(frozen=True)
class DcAeConfig:
    """Under the names of the published config.json; stage 0 is that of the whole picture."""

    in_channels: int
    latent_channels: int
    attention_head_dim: int
    encoder_block_types: tuple[str, ...]
    decoder_block_types: tuple[str, ...]
    encoder_block_out_channels: tuple[int, ...]
    decoder_block_out_channels: tuple[int, ...]
    encoder_layers_per_block: tuple[int, ...]
    decoder_layers_per_block: tuple[int, ...]
    encoder_qkv_multiscales: tuple[tuple[int, ...], ...]
    decoder_qkv_multiscales: tuple[tuple[int, ...], ...]
    upsample_block_type: str
    downsample_block_type: str
    decoder_norm_types: tuple[str, ...]
    decoder_act_fns: tuple[str, ...]
    encoder_out_shortcut: bool
    decoder_in_shortcut: bool
    decoder_conv_act_fn: str
    scaling_factor: float

    def __post_init__(self):
        stages = len(self.encoder_block_out_channels)
        for field in dataclasses.fields(self):
            if field.type not in (int, float, bool, str):
                value = _per_stage(field.name, getattr(self, field.name), stages)
                object.__setattr__(self, field.name, value)
        for name, known in KINDS.items():
            value = getattr(self, name)
            for kind in (value,) if isinstance(value, str) else value:
                if kind not in known:
                    known = ', '.join(known)
                    raise InputError(f'{name} {kind!r} is unknown; there are: {known}')
        for stage in (*self.encoder_stages[1:], *self.decoder_stages[1:]):
            if stage.layers < 1:
                raise InputError('layers_per_block: only the first stage may have none')
        for stage in (*self.encoder_stages, *self.decoder_stages):
            if any(size % 2 == 0 for size in stage.scales):
                raise InputError(f'qkv_multiscales {stage.scales}: kernel sizes must be odd')

    @property
    def stride(self) -> int:
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    @property
    def encoder_stages(self) -> tuple[Stage, ...]:
        stages = len(self.encoder_block_out_channels)
        return self._stages('encoder', ('rms_norm',) * stages, ('silu',) * stages)

    @property
    def decoder_stages(self) -> tuple[Stage, ...]:
        return self._stages('decoder', self.decoder_norm_types, self.decoder_act_fns)

    def _stages(self, side: str, norms, activations) -> tuple[Stage, ...]:
        names = ('block_types', 'block_out_channels', 'layers_per_block', 'qkv_multiscales')
        columns = (getattr(self, f'{side}_{name}') for name in names)
        return tuple(
            Stage(block, channels, layers, self.attention_head_dim, scales, norm, activation)
            for block, channels, layers, scales, norm, activation in zip(
                *columns, norms, activations, strict=True
            )
        )

    def to_json(self) -> dict:
        return {'_class_name': 'AutoencoderDC', **dataclasses.asdict(self)}


def _per_stage(name: str, value: Any, stages: int) -> tuple:
    """As a tuple; diffusers lets one string stand for all stages."""
    value = (value,) * stages if isinstance(value, str) else value
    value = tuple(tuple(v) if isinstance(v, list | tuple) else v for v in value)
    if len(value) != stages:
        want = f'encoder_block_out_channels has {stages}'
        raise InputError(f'{name} has {len(value)} stages, {want}')
    return value


# What diffusers 0.32 did, whose files do not say so.
_UNSAID: dict[str, Any] = dict(
    encoder_out_shortcut=True, decoder_in_shortcut=True, decoder_conv_act_fn='relu'
)


_FIXED = {'_class_name': 'AutoencoderDC'}
_IGNORED = {'_diffusers_version', '_name_or_path'}


def read_config(directory: str | pathlib.Path) -> DcAeConfig:
    """From the config.json of an AutoencoderDC."""
    with config_json(directory, 'a DC-AE') as said:
        values = _UNSAID | said
        config = sizes_of(DcAeConfig, values)
        check_fields(values, _FIXED, _IGNORED | dataclasses.asdict(config).keys())
    return config


_CHANNELS = (128, 256, 512, 512, 1024, 1024)
_KINDS = ('ResBlock',) * 3 + ('EfficientViTBlock',) * 3
_SCALES = ((),) * 3 + ((5,),) * 3
PRESETS = {
    'dc_ae_f32c32': DcAeConfig(  # that of SANA
        in_channels=3,
        latent_channels=32,
        attention_head_dim=32,
        encoder_block_types=_KINDS,
        decoder_block_types=_KINDS,
        encoder_block_out_channels=_CHANNELS,
        decoder_block_out_channels=_CHANNELS,
        encoder_layers_per_block=(2, 2, 2, 3, 3, 3),
        decoder_layers_per_block=(3,) * 6,
        encoder_qkv_multiscales=_SCALES,
        decoder_qkv_multiscales=_SCALES,
        upsample_block_type='interpolate',
        downsample_block_type='Conv',
        decoder_norm_types=('rms_norm',) * 6,
        decoder_act_fns=('silu',) * 6,
        encoder_out_shortcut=True,
        decoder_in_shortcut=True,
        decoder_conv_act_fn='relu',
        scaling_factor=0.41407,
    )
}
