"""A published config.json: read whole, and refused where it says what is not built here."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping, Set
from typing import Any, TypeVar

from metacanvas_jax.types import InputError

T = TypeVar('T')


@contextlib.contextmanager
def config_json(directory: str | pathlib.Path, what: str) -> Iterator[dict[str, Any]]:
    """The fields of the file; what its reader raises names the file in one line."""
    path = pathlib.Path(directory) / 'config.json'
    if not path.is_file():
        raise InputError(f'no config.json in {directory}; give the folder of {what}')
    try:
        yield json.loads(path.read_text(encoding='utf-8'))
    except InputError as error:
        raise InputError(f'{path}: {error}') from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f'{path} is not the config of {what}: {error!r}') from error


def sizes_of(kind: type[T], values: Mapping[str, Any]) -> T:
    """A dataclass of the fields that have its own fields' names."""
    names = [field.name for field in dataclasses.fields(kind)]  # pyright: ignore
    if missing := [f'{name} is missing' for name in names if name not in values]:
        raise ValueError('; '.join(missing))
    return kind(**{name: values[name] for name in names})


def check_fields(
    values: Mapping[str, Any],
    supported: Mapping[str, Any],
    ignored: Set[str],
    faults: tuple[str, ...] = (),
) -> None:
    """Every field says what is supported, or changes no number; all faults in one report."""
    found = [
        f'{name} is {values[name]!r}, only {value!r} is supported'
        for name, value in supported.items()
        if values.get(name, value) != value
    ]
    found += [f'{name} is unknown' for name in values.keys() - supported.keys() - ignored]
    if found := sorted([*found, *faults]):
        raise InputError('; '.join(found))
