"""A .jsonl file of what to draw, a line each; files that a line names are relative to it."""

import json
import pathlib

from metacanvas_jax.evaluate.layouts import Picture, given
from metacanvas_jax.types import InputError

# What a line of a file of prompts may hold -> its type
_FIELDS = {
    'prompt': str,
    'id': str | int,
    'seed': int,
    'image': str | list,
    'references': str | list,
    'video': str,
}


def read_prompts(file: pathlib.Path, seed: int) -> list[Picture]:
    """By index; `path` is the id, without a suffix. A seed that no line has is `seed`."""
    if not file.is_file():
        raise InputError(f'--prompts {file} does not exist')
    found = []
    for number, line in enumerate(file.read_text(encoding='utf-8').splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f'{file}:{number} is not JSON: {error}') from error
        if not isinstance(record, dict) or 'prompt' not in record:
            raise InputError(f'{file}:{number} wants an object with "prompt", got {line[:60]!r}')
        for name, value in record.items():
            if name not in _FIELDS:
                raise InputError(
                    f'{file}:{number}: {name!r} is unknown; legal are {", ".join(_FIELDS)}'
                )
            if not isinstance(value, _FIELDS[name]) or isinstance(value, bool):
                kind = getattr(_FIELDS[name], '__name__', _FIELDS[name])
                raise InputError(f'{file}:{number}: {name} wants {kind}, got {value!r}')
        name = str(record.get('id', len(found)))
        if '/' in name or name in ('.', '..'):
            raise InputError(f'{file}: id {name!r} is not a file name')
        found.append(
            Picture(
                id=name,
                prompt=record['prompt'],
                index=len(found),
                seed=record.get('seed', seed),
                path=name,
                images=_named(file, record.get('image', [])),
                references=_named(file, record.get('references', [])),
                video=_named(file, record['video'])[0] if 'video' in record else None,
            )
        )
    if not found:
        raise InputError(f'--prompts {file} holds no prompt')
    if len({picture.id for picture in found}) < len(found):
        raise InputError(f'{file}: two prompts have the same id')
    return found


def _named(file: pathlib.Path, names: str | list[str]) -> tuple[pathlib.Path, ...]:
    names = [names] if isinstance(names, str) else names
    return tuple(given(file, name) for name in names)
