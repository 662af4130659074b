"""What a run writes: its state, by Orbax behind one door, and its weights as safetensors.

Orbax survives a kill at any moment, but restores flipped bits without a word and believes any
folder that is named with a number. So a digest of every array is kept beside the state, and
`restore` walks from the newest step down to the first one that verifies.
"""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from metacanvas_jax.types import InputError
from metacanvas_jax.weights import hush


class RunCheckpoints:
    """The checkpoints of a run: an array tree and a JSON record per step, saved asynchronously."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        keep_every: int | None = None,
        read_only: bool = False,
    ) -> None:
        self._directory = pathlib.Path(directory).absolute()
        self._read_only = read_only
        self._rejected: set[int] = set()
        if read_only and not self._directory.is_dir():
            raise InputError(f'no checkpoints: {self._directory} does not exist')
        if read_only:
            options = ocp.CheckpointManagerOptions(
                read_only=True, create=False, save_interval_steps=0
            )
        else:
            options = ocp.CheckpointManagerOptions(
                max_to_keep=keep, keep_period=keep_every, cleanup_tmp_directories=True
            )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Returns once the arrays are copied: the caller may donate them. `record` is JSON."""
        self._set_rejected_aside()
        flat = _flat(state)
        digests = _digests(flat)
        arrays = {
            name: {'spec': _spec(array), 'digest': digests[name]} for name, array in flat.items()
        }
        self._warn_if_full(sum(array.nbytes for array in flat.values()))
        body = {'arrays': arrays, 'record': record}
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(flat),
            record=ocp.args.JsonSave({**body, 'sha256': _sha256(body)}),
        )
        # force: a stray folder with a larger number must not make Orbax skip this step.
        self._manager.save(step, args=args, force=True)

    def restore(
        self, abstract: Any, *, step: int | None = None, partial: bool = False
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest step that verifies, as (step, state, record); None where there is none.

        `abstract` is the tree of ShapeDtypeStruct with shardings; with `partial` it may be a part
        of the saved tree. `step` asks for that one and no other.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if step is not None and step not in steps:
            raise InputError(
                f'no checkpoint of step {step} in {self._directory}; there are {steps}'
            )
        wanted = [step] if step is not None else steps
        for i, candidate in enumerate(wanted):
            try:
                state, record = self._restore_one(candidate, abstract, partial=partial)
            except _RejectedError as error:
                self._rejected.add(candidate)
                instead = f'trying step {wanted[i + 1]}' if wanted[i + 1 :] else 'no older one left'
                if jax.process_index() == 0:
                    where = self._directory / str(candidate)
                    print(f'checkpoint {where} rejected: {error}; {instead}', file=sys.stderr)
            else:
                return candidate, state, record
        return None

    def arrays(self, step: int | None = None) -> dict[str, str]:
        """{dotted path: dtype and shape} of what the newest step holds, or that one."""
        step = self.latest() if step is None else step
        if step not in self._manager.all_steps():
            raise InputError(f'no checkpoint of step {step} in {self._directory}')
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        try:
            body = _attempt(lambda: dict(self._manager.restore(step, args=args)['record']))
        except _RejectedError as error:
            raise InputError(f'{self._directory / str(step)} is damaged: {error}') from error
        return {name: entry['spec'] for name, entry in body['arrays'].items()}

    def latest(self) -> int | None:
        """The newest step that looks complete; only `restore` tells whether it verifies."""
        found = [
            step
            for step in self._manager.all_steps()
            if step not in self._rejected and (self._directory / f'{step}/record/metadata').exists()
        ]
        return max(found, default=None)

    def wait(self) -> None:
        """Returns when the last save is on the disk; raises what went wrong there."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> 'RunCheckpoints':
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _restore_one(
        self, step: int, abstract: Any, *, partial: bool
    ) -> tuple[Any, dict[str, Any]]:
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        body = _attempt(lambda: dict(self._manager.restore(step, args=args)['record']))
        if body.pop('sha256', None) != _sha256(body):
            raise _RejectedError('its record is damaged')
        saved = body['arrays']
        target = {name: _placed(leaf) for name, leaf in _flat(abstract).items()}
        if different := _differences(saved, target, partial=partial):
            more = f' and {len(different) - 5} more' if len(different) > 5 else ''
            raise InputError(
                f'{self._directory / str(step)} holds another model than this config makes: '
                f'{"; ".join(different[:5])}{more}; this workdir was trained with another config, '
                'give that one or another --workdir'
            )
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                item=target, restore_args=restore_args, partial_restore=partial
            )
        )
        flat = _attempt(lambda: self._manager.restore(step, args=args)['state'])
        digests = _digests(flat)
        if flipped := [name for name in flat if digests[name] != saved[name]['digest']]:
            raise _RejectedError(f'digest mismatch in {flipped[0]} ({len(flipped)} arrays)')
        leaves = [flat[name] for name in target]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), body['record']

    def _set_rejected_aside(self) -> None:
        """Rejected steps get out of the way of new ones, under a name that Orbax does not read."""
        if not self._rejected:
            return
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            for step in self._rejected:
                old = self._directory / str(step)
                if old.exists():
                    aside = tempfile.mkdtemp(prefix=f'rejected-{step}-', dir=self._directory)
                    old.rename(pathlib.Path(aside, str(step)))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices('rejected checkpoints are set aside')
        self._manager.reload()
        self._rejected = set()

    def _warn_if_full(self, size: int) -> None:
        free = shutil.disk_usage(self._directory).free
        if free < 1.1 * size and jax.process_index() == 0:
            print(
                f'checkpoint: {free / 1e9:.1f} GB free in {self._directory}, '
                f'the state takes {size / 1e9:.1f} GB',
                file=sys.stderr,
            )


class _RejectedError(Exception):
    """A step that cannot be used; an older one may be."""


def _attempt(read: Any) -> Any:
    """`read()`; whatever goes wrong on any process rejects the step on all of them."""
    result, reason = None, ''
    try:
        result = read()
    except Exception as error:
        if 'RESOURCE_EXHAUSTED' in str(error):  # the device is full, the file is not to blame
            raise
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = f'{type(error).__name__}: {first[:160]}'
    if jax.process_count() > 1:
        fine = multihost_utils.process_allgather(np.array(not reason))
        reason = reason or ('' if fine.all() else 'unreadable on another process')
    if reason:
        hush()
        raise _RejectedError(reason)
    return result


# ---------------------------------------------------------------- trees and digests


def _flat(tree: Any) -> dict[str, Any]:
    """{dotted path: leaf}; the same for dicts, tuples, dataclasses and nnx states."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {jax.tree_util.keystr(path, simple=True, separator='.'): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), 'two leaves of the state have the same path'
    return flat


def _spec(leaf: Any) -> str:
    return f'{leaf.dtype}[{",".join(map(str, leaf.shape))}]'


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    where = getattr(leaf, 'sharding', None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _differences(saved: dict[str, Any], target: dict[str, Any], *, partial: bool) -> list[str]:
    absent = 'absent'
    ours = {name: _spec(leaf) for name, leaf in target.items()}
    theirs = {name: entry['spec'] for name, entry in saved.items() if name in ours or not partial}
    return [
        f'{name} is {theirs.get(name, absent)} there, {ours.get(name, absent)} here'
        for name in [*ours, *(name for name in theirs if name not in ours)]
        if theirs.get(name) != ours.get(name)
    ]


def _sha256(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest(x: jax.Array) -> jax.Array:
    """Sum of the bits mod 2^32: as integers add in any order, the sharding does not matter."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jnp.sum(jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32), dtype=jnp.uint32)


@functools.lru_cache
def _digest_program(where: NamedSharding | None) -> Any:
    # One program for all arrays of a mesh: hundreds of small ones would take long to compile.
    return jax.jit(lambda arrays: jnp.stack([_digest(x) for x in arrays]), out_shardings=where)


def _digests(flat: Mapping[str, jax.Array]) -> dict[str, int]:
    groups: dict[Any, list[str]] = {}
    for name, array in flat.items():
        where = array.sharding
        mesh = where.mesh if isinstance(where, NamedSharding) else frozenset(where.device_set)
        groups.setdefault(mesh, []).append(name)
    result: dict[str, int] = {}
    for mesh, names in groups.items():
        where = None if isinstance(mesh, frozenset) else NamedSharding(mesh, PartitionSpec())
        sums = np.asarray(_digest_program(where)([flat[name] for name in names]))
        result |= {name: int(value) for name, value in zip(names, sums, strict=True)}
    return result


# ---------------------------------------------------------------- weights


def save_weights(
    directory: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], config: dict[str, Any]
) -> None:
    """Writes model.safetensors and config.json; a new directory appears whole or not at all."""
    directory = pathlib.Path(directory).absolute()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f'.{directory.name}-') as name:
        temporary = pathlib.Path(name, directory.name)
        temporary.mkdir()
        # safetensors writes the buffer as it lies: transposed views must be made contiguous.
        dense = {key: np.asarray(array, order='C') for key, array in arrays.items()}
        safetensors.numpy.save_file(dense, temporary / 'model.safetensors')
        (temporary / 'model.safetensors').chmod(0o644)  # it writes files that others cannot read
        text = json.dumps(config, indent=2, sort_keys=True) + '\n'
        (temporary / 'config.json').write_text(text, encoding='utf-8')
        if not directory.exists():
            temporary.rename(directory)
            return
        for file in ('model.safetensors', 'config.json'):
            os.replace(temporary / file, directory / file)
