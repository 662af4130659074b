"""The model that a run starts from, and what a run made of it."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from metacanvas_jax.build import (
    COMPONENTS,
    DTYPES,
    PARTS,
    RANDOM,
    build_model,
    choose,
    find_part,
    weights_folder,
)
from metacanvas_jax.checkpoint import RunCheckpoints
from metacanvas_jax.train.state import abstract, split_model
from metacanvas_jax.train.trainable import trainable_filter
from metacanvas_jax.train.workdir import read_config
from metacanvas_jax.types import InputError
from metacanvas_jax.weights import comes_from_weights, match_weights, place_weights


def check_model(config: ConfigDict) -> nnx.filterlib.Filter:
    """Which parameters learn; refuses patterns and weights that do not fit, in no time."""
    wanted, trainable, frozen = _what_learns(config, functools.partial(build_model, config))
    _check_run_before(config, trainable, frozen)
    return wanted


def _what_learns(
    config: ConfigDict, make: Callable[[jax.Array], nnx.Module]
) -> tuple[nnx.filterlib.Filter, nnx.State, nnx.State]:
    """As a filter, and as shapes beside those of what is frozen."""
    model = jax.eval_shape(make, jax.random.key(0))
    for weights in _weights(config):
        match_weights(nnx.state(model), *weights.place, **weights.differ)
    wanted = trainable_filter(config.trainable, model)
    trainable, frozen = nnx.split_state(nnx.state(model), wanted, ...)
    _refuse_frozen_noise(config, trainable, frozen)
    return wanted, trainable, frozen


@dataclasses.dataclass(frozen=True)
class _Weights:
    """`place` is the folder and where its arrays stand in the model."""

    place: tuple[pathlib.Path, str]
    differ: dict[str, tuple[str, ...]]


def _weights(config: ConfigDict) -> list[_Weights]:
    """Those that a run starts from."""
    places, found = COMPONENTS[config.objective], []
    for name in config.weights:
        if (folder := weights_folder(config, name)) is None:
            continue
        place = folder, choose(places, name, 'config.weights')
        part = find_part(config, name) if name in PARTS else None
        differ = {} if part is None else dict(new=part.new, unused=part.unused)
        found.append(_Weights(place, differ))
    return found


def _refuse_frozen_noise(config: ConfigDict, trainable: nnx.State, frozen: nnx.State) -> None:
    """A part without weights must learn; for tests there is `random`."""
    for name, prefix in COMPONENTS[config.objective].items():
        learning, still = (
            any(comes_from_weights(path, prefix) for path, _ in nnx.to_flat_state(part))
            for part in (trainable, frozen)
        )
        if still and not learning and config.weights.get(name) is None:
            raise InputError(
                f'config.weights.{name} is missing, and nothing of it learns; give the folder of '
                'converted weights'
            )


def starting_model(config: ConfigDict, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model that a run starts from: initial values, with published weights over them."""
    make = jax.jit(functools.partial(build_model, config))  # so that it is traced once
    wanted, *shapes = _what_learns(config, make)
    shapes, weights = nnx.merge_state(*shapes), _weights(config)
    given = {path for w in weights for path in match_weights(shapes, *w.place, **w.differ).values()}
    graphdef, *parts = split_model(
        make,
        wanted,
        seed=config.seed,
        frozen_dtype=DTYPES[config.dtype],
        mesh=mesh,
        given=lambda path, _: path in given,
    )
    whole = nnx.merge_state(*parts)
    for w in weights:
        whole = place_weights(whole, *w.place, **w.differ)
    trainable, frozen = nnx.split_state(whole, wanted, ...)
    return graphdef, trainable, frozen


# ------------------------------------------------------------ the run before


def inherit(config: ConfigDict, trainable: nnx.State) -> nnx.State:
    """`trainable`, with what the run config.init_from learned in the place of initial values."""
    if (before := _run_before(config)) is None:
        return trainable
    learned = _learned(before)
    flat = nnx.to_flat_state(trainable)
    part = nnx.from_flat_state({path: value for path, value in flat if _dotted(path) in learned})
    return nnx.merge_state(trainable, trained(before, part, average=False))


def _check_run_before(config: ConfigDict, trainable: nnx.State, frozen: nnx.State) -> None:
    """All that it learned must be here, and learn on: then a checkpoint of this run holds all that
    differs from published weights.
    """
    if (before := _run_before(config)) is None:
        return
    other = read_config(before)
    for name in PARTS:
        theirs, ours = (c[name].kind if name in c else 'none' for c in (other, config))
        if theirs != ours:
            raise InputError(
                f'config.init_from {before} is a run of another system: config.{name}.kind is '
                f'{theirs} there, {ours} here'
            )
    here, still = (
        {_dotted(path): value.shape for path, value in nnx.to_flat_state(part)}
        for part in (trainable, frozen)
    )
    faults = []
    for name, spec in _learned(before).items():
        if name in still:
            faults.append(f'{name} learned there and is frozen here')
        elif name not in here:
            faults.append(f'{name} is unknown here')
        elif spec != (ours := f'float32[{",".join(map(str, here[name]))}]'):
            faults.append(f'{name} is {spec} there, {ours} here')
    if faults:
        more = f' and {len(faults) - 5} more' if len(faults) > 5 else ''
        raise InputError(
            f'config.init_from {before} does not fit this config: {"; ".join(faults[:5])}{more}'
        )


def _run_before(config: ConfigDict) -> pathlib.Path | None:
    """The run that this one goes on from; for tests there is `random`."""
    path = config.get('init_from', RANDOM)
    if path is None:
        raise InputError('config.init_from is missing; give the workdir of the stage before')
    return None if path == RANDOM else pathlib.Path(path).absolute()


def _learned(path: pathlib.Path) -> dict[str, str]:
    """{dotted name: dtype and shape}"""
    read_config(path)  # refuses what is no run
    folder, step = _checkpoints(path)
    with RunCheckpoints(folder, read_only=True) as checkpoints:
        saved = checkpoints.arrays(step)
    start = 'trainable.'
    return {
        name.removeprefix(start).removesuffix('.value'): spec
        for name, spec in saved.items()
        if name.startswith(start)
    }


def _dotted(path: tuple) -> str:
    return '.'.join(map(str, path))


# ------------------------------------------------------------ what a run made


def _checkpoints(path: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """Of a workdir, or of one of its steps."""
    if path.parent.name == 'checkpoints':
        return path.parent, int(path.name)
    return path / 'checkpoints', None


def trained(path: pathlib.Path, trainable: nnx.State, *, average: bool) -> nnx.State:
    """What a run learned; the averaged weights, where it kept them."""
    shapes = abstract(trainable)
    wanted = {'ema': shapes} if average else {'trainable': shapes}
    folder, step = _checkpoints(path)
    with RunCheckpoints(folder, read_only=True) as checkpoints:
        found = checkpoints.restore(wanted, step=step, partial=True)
    if found is None:
        raise InputError(f'no usable checkpoint in {folder}')
    (trained,) = found[1].values()
    return trained
