"""The columns of published tables, such as parquet and csv: which one plays which role."""

import pathlib
from collections.abc import Callable, Mapping

from metacanvas_jax.types import InputError

# role: the names that published sets have it under, in any case; the first one there is taken.
NAMES = {
    'picture': ('image', 'jpg', 'jpeg', 'png', 'webp', 'img', 'picture', 'image_bytes'),
    'caption': ('caption', 'txt', 'text', 'prompt', 'description', 'long_caption'),
    'video': ('video', 'mp4', 'video_path', 'file_name', 'path'),
    # Those of an edit: OmniEdit's, HQ-Edit's and others'.
    'source': ('src_img', 'input_image', 'source_image', 'source_img', 'original_image', 'source'),
    'target': (
        'edited_img',
        'output_image',
        'edited_image',
        'target_image',
        'target_img',
        'target',
    ),
    'instruction': ('edited_prompt_list', 'edit', 'instruction', 'edit_prompt', 'prompt'),
}
TEXTS = ('caption', 'instruction')


def find_column(
    role: str,
    names: Mapping[str, str | None],
    columns: Mapping[str, str],
    path: pathlib.Path,
    what: str,
    fits: Callable[[str], bool] = lambda name: True,
) -> str:
    """The column of a file for a role: the one that `names` says, else the usual one.

    `columns` are those there are, and what each holds.
    """
    given = names.get(role)
    if given is None:
        found = [name for usual in NAMES[role] for name in columns if name.lower() == usual]
    else:
        found = [name for name in columns if name == given]
    for name in found:
        if fits(name):
            return name
    wants = f'no column of {what}' + (f' named {given!r}' if given is not None else '')
    there = ', '.join(f'{name} ({kind})' for name, kind in columns.items())
    raise InputError(f'{path} has {wants} for config.data.columns.{role}; its columns are: {there}')
