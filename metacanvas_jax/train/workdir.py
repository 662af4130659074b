"""The folder of a run: its lock, its config and the versions it was made with."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any, BinaryIO

import jax
from ml_collections import ConfigDict

from metacanvas_jax.types import InputError

FREE = ('steps', 'mesh', 'log', 'checkpoint', 'evaluate')
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy')


@contextlib.contextmanager
def open_workdir(
    path: str | os.PathLike[str], config: ConfigDict, *, free: tuple[str, ...] = FREE
) -> Iterator[pathlib.Path]:
    """Creates and locks the workdir; a resumed run may differ in the entries `free` only."""
    path = pathlib.Path(path).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise InputError(f'cannot create workdir {path}: {error.strerror}') from error
    if jax.process_index() != 0:
        yield path
        return
    with (path / '.lock').open('a+', encoding='utf-8') as lock:
        _acquire(lock, path)
        try:
            text = to_json(config)
            if (path / 'config.json').exists():
                _compare(path, json.loads(text), free)
            write_text(path / 'config.json', text)
            write_text(path / 'versions.json', json.dumps(_versions(), indent=2) + '\n')
            yield path
        finally:
            # The file stays: removing it would let two later runs lock two different files.
            lock.truncate(0)


def read_config(path: str | os.PathLike[str]) -> ConfigDict:
    """The config of a workdir, given the workdir or one of its checkpoint steps; locked."""
    path = pathlib.Path(path).absolute()
    if not path.exists():
        raise InputError(f'no such workdir or checkpoint: {path}')
    home = path.parents[1] if path.parent.name == 'checkpoints' and path.is_dir() else path
    file = home / 'config.json'
    if not file.is_file():
        raise InputError(
            f'{path} is neither a workdir (no config.json in it) '
            'nor a step of one (WORKDIR/checkpoints/N)'
        )
    try:
        tree = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as error:
        raise InputError(f'{file} is not valid JSON: {error}') from error
    if not isinstance(tree, dict):
        raise InputError(f'{file} is no config: want a JSON object, got {type(tree).__name__}')
    return ConfigDict(_tuples(tree)).lock()


def to_json(config: ConfigDict) -> str:
    """The config as JSON in a stable order; JSON has no tuples, `read_config` makes them again."""
    tree = config.to_dict()
    for key, value in _flat(tree).items():
        try:
            json.dumps(value)
        except TypeError as error:
            raise InputError(f'config.{key} cannot be written as JSON: {value!r}') from error
    return json.dumps(tree, indent=2, sort_keys=True) + '\n'


def write(path: pathlib.Path, save: Callable[[BinaryIO], Any]) -> None:
    """Writes `path` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.tmp')
    with temporary.open('wb') as file:
        save(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_text(path: pathlib.Path, text: str) -> None:
    write(path, lambda file: file.write(text.encode()))


def _acquire(lock: IO[str], path: pathlib.Path) -> None:
    """flock, not the existence of a file: the lock of a killed run dies with its process."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        owner = lock.read().strip() or 'another process'
        raise InputError(
            f'workdir {path} is in use by {owner}; wait for that run or give another --workdir'
        ) from error
    except OSError as error:  # some network file systems know no locks
        print(f'workdir {path} cannot be locked: {error.strerror}', file=sys.stderr)
    lock.truncate(0)
    lock.write(f'pid {os.getpid()} on {socket.gethostname()}\n')
    lock.flush()


def _compare(path: pathlib.Path, new: dict[str, Any], free: tuple[str, ...]) -> None:
    old_flat = _flat(json.loads(to_json(read_config(path))))
    new_flat = _flat(new)
    absent = '(absent)'
    differing = [
        f'{key}: {old_flat.get(key, absent)!r} there, {new_flat.get(key, absent)!r} now'
        for key in sorted(old_flat.keys() | new_flat.keys())
        if old_flat.get(key, absent) != new_flat.get(key, absent)
        and not any(key == name or key.startswith(f'{name}.') for name in free)
    ]
    if differing:
        more = f' and {len(differing) - 5} more' if len(differing) > 5 else ''
        raise InputError(
            f'workdir {path} was started with another config ({"; ".join(differing[:5])}{more}); '
            'give another --workdir, or the config of that run'
        )


def _flat(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            result |= _flat(value, f'{prefix}{key}.')
        else:
            result[f'{prefix}{key}'] = value
    return result


def _tuples(tree: Any) -> Any:
    """Every list as a tuple: configs hold no lists, and a tuple cannot be changed in place."""
    if isinstance(tree, dict):
        return {key: _tuples(value) for key, value in tree.items()}
    return tuple(_tuples(item) for item in tree) if isinstance(tree, list) else tree


def _versions() -> dict[str, Any]:
    devices = jax.devices()
    return {
        'python': platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
        'platform': platform.platform(),
        'device': devices[0].device_kind,
        'devices': len(devices),
        'processes': jax.process_count(),
        'commit': _commit(),
    }


def _commit() -> str | None:
    root = pathlib.Path(__file__).parents[2]
    if not (root / '.git').exists():
        return None
    command = ['git', '-C', str(root), 'rev-parse', 'HEAD']
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
