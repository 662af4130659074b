"""Sizes of FLUX's autoencoder, always from a checkpoint's own config.json (AutoencoderKL)."""

import dataclasses
import pathlib
from typing import Any

from metacanvas_jax.config_json import check_fields, config_json, sizes_of
from metacanvas_jax.types import InputError


@dataclasses.dataclass(frozen=True)
class FluxAeConfig:
    """Under the names of the published config.json; the first width is that of whole pictures."""

    in_channels: int
    out_channels: int
    latent_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    scaling_factor: float
    shift_factor: float

    def __post_init__(self):
        object.__setattr__(self, 'block_out_channels', tuple(self.block_out_channels))
        sizes = [('block_out_channels', width) for width in self.block_out_channels]
        sizes += [
            (f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.type is int
        ]
        for name, value in sizes:
            if type(value) is not int or value < 1:
                raise InputError(f'{name} {value!r} is no positive integer')
        for name in ('scaling_factor', 'shift_factor'):
            if not isinstance(value := getattr(self, name), int | float):
                raise InputError(f'{name} is {value!r}, not a number')
        if any(width % self.norm_num_groups for width in self.block_out_channels):
            raise InputError(
                f'block_out_channels {self.block_out_channels} are no multiples of '
                f'norm_num_groups {self.norm_num_groups}'
            )

    @property
    def stride(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)

    def to_json(self) -> dict[str, Any]:
        """The published config.json, which diffusers reads too."""
        stages = len(self.block_out_channels)
        return {
            **_FIXED,
            **dataclasses.asdict(self),
            'block_out_channels': list(self.block_out_channels),
            'down_block_types': ['DownEncoderBlock2D'] * stages,
            'up_block_types': ['UpDecoderBlock2D'] * stages,
        }


_FIXED: dict[str, Any] = {
    '_class_name': 'AutoencoderKL',
    'act_fn': 'silu',
    'latents_mean': None,
    'latents_std': None,
    'mid_block_add_attention': True,
    'use_post_quant_conv': False,
    'use_quant_conv': False,
}
# What diffusers assumes where a file does not say it: older ones than FLUX's have these
# convolutions and no shift.
_UNSAID: dict[str, Any] = {
    **_FIXED,
    'use_post_quant_conv': True,
    'use_quant_conv': True,
    'shift_factor': None,
}
# What changes no number.
_IGNORED = {
    '_diffusers_version',
    '_name_or_path',
    'force_upcast',  # asks pipelines to leave fp16; the dtype to compute in is ours to choose
    'sample_size',  # of training, and of the tiles: vae/tiling.py has its own
}


def read_config(directory: str | pathlib.Path) -> FluxAeConfig:
    """From the config.json of an AutoencoderKL without quant convolutions."""
    with config_json(directory, "FLUX's autoencoder") as said:
        values = _UNSAID | said
        config = sizes_of(FluxAeConfig, values)
        check_fields(values, config.to_json(), _IGNORED)
    return config
