"""UniWorld-V1's MLP from the MLLM's states to FLUX's text, where our context connector starts.

It lies in a file of its own, stage1/denoise_projector.bin, and in the whole checkpoint beside other
parts, which are left. Its type is called mlp2x_gelu but its activation is SiLU.
"""

import dataclasses
import pathlib
from typing import Any

from flax import nnx

from convert.family import Family, Layout
from convert.rules import Rule, Shapes, linear
from metacanvas_jax.canvas.config import ContextConfig
from metacanvas_jax.canvas.context_connector import ContextConnector
from metacanvas_jax.types import InputError

PREFIX = 'denoise_tower.denoise_projector.'


@dataclasses.dataclass(frozen=True)
class Sizes:
    input_hidden_size: int
    hidden: int  # three times the output's in the published one
    output_hidden_size: int

    def to_json(self) -> dict[str, Any]:
        """UniWorld's names; it derives `hidden`."""
        return {
            'denoise_projector_type': 'mlp2x_gelu',
            'input_hidden_size': self.input_hidden_size,
            'output_hidden_size': self.output_hidden_size,
        }


def _rules(sizes: Sizes) -> list[Rule]:
    del sizes
    return [*linear('up', f'{PREFIX}0'), *linear('down', f'{PREFIX}2')]


def _sizes(_: pathlib.Path, shapes: Shapes) -> Sizes:
    try:
        hidden, d_in = shapes[f'{PREFIX}0.weight'].shape
        return Sizes(d_in, hidden, shapes[f'{PREFIX}2.weight'].shape[0])
    except (KeyError, ValueError) as error:
        raise InputError(f"this is no whole projector of UniWorld's: {error!r}") from error


def _own_sizes(folder: pathlib.Path, shapes: Shapes) -> Sizes:
    del folder
    try:
        (d_in, hidden), (_, d_out) = (shapes[f'{n}/kernel'].shape for n in ('up', 'down'))
        return Sizes(d_in, hidden, d_out)
    except (KeyError, ValueError) as error:
        raise InputError(f'these are no weights of a context connector: {error!r}') from error


def _model(sizes: Sizes, *, dtype: Any, rngs: nnx.Rngs) -> ContextConnector:
    del dtype  # that of its input
    config = ContextConfig(hidden=sizes.hidden, activation='silu', dropout=0.0, skip=0)
    d_in, d_out = sizes.input_hidden_size, sizes.output_hidden_size
    return ContextConnector(config, d_in, d_out, rngs=rngs)


def _sizes_of(module: nnx.Module) -> Sizes:
    assert isinstance(module, ContextConnector), type(module)
    (d_in, hidden), d_out = module.up.kernel.shape, module.down.kernel.shape[1]
    return Sizes(d_in, hidden, d_out)


_LEFT = {
    'denoise_tower.vae_projector.': 'it puts latents of pictures into the text; ours go into the '
    'DiT as tokens',
    'denoise_tower.siglip_projector.': 'it puts features of SigLIP into the text; the MLLM alone '
    'reads pictures here',
    'denoise_tower.denoiser.': 'a FLUX.1 transformer; take that of FLUX.1-Kontext-dev',
    'visual.': 'of Qwen2.5-VL; take Qwen2.5-VL-7B-Instruct',
    'model.': 'of Qwen2.5-VL; take Qwen2.5-VL-7B-Instruct',
    'lm_head.': 'of Qwen2.5-VL; take Qwen2.5-VL-7B-Instruct',
}

FAMILY = Family(
    sizes=_own_sizes,
    sizes_of=_sizes_of,
    model=_model,
    layouts={
        'uniworld': Layout(
            (f'{PREFIX}0.weight', f'{PREFIX}2.weight'),
            _rules,
            'denoise_projector',
            sizes=_sizes,
            left=_LEFT,
        )
    },
)
