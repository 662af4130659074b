"""Sizes of a Wan2.2 VAE, from a checkpoint's own config.json (diffusers' AutoencoderKLWan)."""

import dataclasses
import math
import pathlib
from typing import Any

from metacanvas_jax.config_json import check_fields, config_json, sizes_of
from metacanvas_jax.types import InputError

TIME_STRIDE = 4  # of all Wan VAEs: their chunks have this many frames


@dataclasses.dataclass(frozen=True)
class Level:
    """Equal resolution; on its way out it shrinks, or grows, by `factor` in time and in space."""

    d_in: int
    d_out: int
    factor: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class WanVaeConfig:
    """Under the names of the published config.json."""

    base_dim: int
    decoder_base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temperal_downsample: tuple[bool, ...]
    patch_size: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is not int:
                object.__setattr__(self, field.name, tuple(value))
            if any(
                type(n) is not int or n < 1
                for n in ((value,) if field.type is int else value)
                if field.type in (int, tuple[int, ...])
            ):
                raise InputError(f'{field.name} {value!r}: want positive integers')
        halvings, times = len(self.dim_mult) - 1, self.temperal_downsample
        if len(times) != halvings or 2 ** sum(times) != TIME_STRIDE or {*times} - {False, True}:
            raise InputError(
                f'temperal_downsample {[*times]!r}: want {halvings} booleans, two of them true'
            )
        for name in ('latents_mean', 'latents_std'):
            values = getattr(self, name)
            if len(values) != self.z_dim:
                raise InputError(f'{name} has {len(values)} values, z_dim is {self.z_dim}')
            if not all(math.isfinite(v) for v in values) or min(self.latents_std) <= 0:
                raise InputError(f'{name}: want finite numbers, and positive deviations')
        for level in self.encoder_levels:
            if level.d_in * _places(level) % level.d_out:
                raise InputError(f'{level}: its shortcut cannot make {level.d_out} channels')
        for level in self.decoder_levels[:-1]:
            if level.d_out * _places(level) % level.d_in:
                raise InputError(f'{level}: its shortcut cannot take {level.d_in} channels')

    @property
    def stride(self) -> int:
        return self.patch_size * 2 ** (len(self.dim_mult) - 1)

    @property
    def time_stride(self) -> int:
        return TIME_STRIDE

    @property
    def pixel_channels(self) -> int:
        """Of the squares of pixels that the first layer reads and the last one makes."""
        return 3 * self.patch_size**2

    @property
    def encoder_levels(self) -> tuple[Level, ...]:
        wide = [self.base_dim * n for n in (1, *self.dim_mult)]
        return _levels(wide, self.temperal_downsample)

    @property
    def decoder_levels(self) -> tuple[Level, ...]:
        wide = [self.decoder_base_dim * n for n in (self.dim_mult[-1], *self.dim_mult[::-1])]
        return _levels(wide, self.temperal_downsample[::-1])

    def to_json(self) -> dict[str, Any]:
        """The published config.json, which diffusers reads too."""
        values = dataclasses.asdict(self) | {
            'in_channels': self.pixel_channels,
            'out_channels': self.pixel_channels,
            'scale_factor_spatial': self.stride,
        }
        return _FIXED | {k: [*v] if isinstance(v, tuple) else v for k, v in values.items()}


def _levels(wide: list[int], times: tuple[bool, ...]) -> tuple[Level, ...]:
    """The last one keeps its size."""
    factors = [*((2 if time else 1, 2) for time in times), (1, 1)]
    return tuple(map(Level, wide[:-1], wide[1:], factors))


def _places(level: Level) -> int:
    time, space = level.factor
    return time * space * space


# The latents of Wan2.2-TI2V-5B, from vae/config.json of Wan-AI/Wan2.2-TI2V-5B-Diffusers. They stand
# in the code of the native repository too (wan/modules/vae2_2.py), not in its Wan2.2_VAE.pth.
# fmt: off
_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813,
    0.0891, 0.157, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108,
    -0.2158, 0.2502, -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.123, -0.0313,
    -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.052, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944,
    0.3573, -0.0548, -0.1681, -0.0667,
)
_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.499, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.06, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on
PUBLISHED = WanVaeConfig(
    base_dim=160,
    decoder_base_dim=256,
    z_dim=48,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    temperal_downsample=(False, True, True),
    patch_size=2,
    latents_mean=_MEAN,
    latents_std=_STD,
)

PRESETS = {'wan2.2': PUBLISHED}

# What the published model has, and its maths here.
_FIXED: dict[str, Any] = {
    '_class_name': 'AutoencoderKLWan',
    'attn_scales': [],
    'dropout': 0.0,
    'is_residual': True,
    'scale_factor_temporal': TIME_STRIDE,
}
# What diffusers assumes where a file does not say it: Wan2.1's.
_UNSAID: dict[str, Any] = dict(
    decoder_base_dim=None,
    in_channels=3,
    out_channels=3,
    is_residual=False,
    patch_size=None,
    scale_factor_spatial=8,
)
# What changes no number.
_IGNORED = {
    '_diffusers_version',
    '_name_or_path',
    'clip_output',  # no AutoencoderKLWan reads it
}


def read_config(directory: str | pathlib.Path) -> WanVaeConfig:
    """From the config.json of an AutoencoderKLWan."""
    with config_json(directory, 'a Wan2.2 VAE') as said:
        values = _UNSAID | said
        wan = values.get('_class_name', 'AutoencoderKLWan') == 'AutoencoderKLWan'
        if wan and not values['is_residual']:
            raise InputError(
                'is the VAE of Wan2.1 (is_residual is false); only that of Wan2.2-TI2V-5B is '
                'supported'
            )
        values['decoder_base_dim'] = values['decoder_base_dim'] or values['base_dim']
        values['patch_size'] = values['patch_size'] or 1
        config = sizes_of(WanVaeConfig, values)
        check_fields(values, config.to_json(), _IGNORED)
    return config
