"""All benchmarks by name, as --prompts names them: geneval, or gedit=FILE of your own data."""

import dataclasses
import pathlib
from collections.abc import Mapping

from metacanvas_jax.evaluate.layouts import GenEval, Layout
from metacanvas_jax.evaluate.picture_benchmarks import GEdit, ImgEdit, OmniContext
from metacanvas_jax.evaluate.video_benchmarks import (
    OmniContextVideo,
    VBench,
    VBenchI2V,
    VideoEdits,
)
from metacanvas_jax.types import InputError

BENCHMARKS: Mapping[str, type[Layout]] = {
    'geneval': GenEval,
    'gedit': GEdit,
    'imgedit': ImgEdit,
    'omnicontext': OmniContext,
    'vbench': VBench,
    'vbench_i2v': VBenchI2V,
    'omnicontext_video': OmniContextVideo,
    'video_edits': VideoEdits,
}


def open_benchmark(
    prompts: str, *, samples: int | None, frames: int | None, fps: float | None
) -> Layout | None:
    """The layout that --prompts names, or None of anything else; None leaves a layout's default."""
    name, _, data = prompts.partition('=')
    if name not in BENCHMARKS:
        return None
    takes = {field.name for field in dataclasses.fields(BENCHMARKS[name])}
    if ('data' in takes) != bool(data):
        raise InputError(
            f'--prompts {name} wants {name}=FILE, your own copy of its data'
            if 'data' in takes
            else f'--prompts {name} takes no file, got {data}'
        )
    if samples is not None and 'samples' not in takes:
        raise InputError(f'{name} has one result of each prompt; leave out --num_images')
    settings = {'samples': samples, 'frames': frames, 'fps': fps}
    chosen = {key: value for key, value in settings.items() if value is not None and key in takes}
    if data:
        chosen['data'] = pathlib.Path(data)
    return BENCHMARKS[name](**chosen)
