"""The model that a run starts from, and what a run made of it."""

import functools
import pathlib

import jax
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from metacanvas_jax.build import COMPONENTS, DTYPES, build_model, choose, weights_folder
from metacanvas_jax.checkpoint import RunCheckpoints
from metacanvas_jax.train.state import abstract, split_model
from metacanvas_jax.train.trainable import trainable_filter
from metacanvas_jax.types import InputError
from metacanvas_jax.weights import comes_from_weights, match_weights, place_weights


def check_model(config: ConfigDict) -> nnx.filterlib.Filter:
    """Which parameters learn; refuses patterns and weights that do not fit, in no time."""
    model = jax.eval_shape(functools.partial(build_model, config), jax.random.key(0))
    for prefix, folder in _weights(config):
        match_weights(nnx.state(model), folder, prefix)
    wanted = trainable_filter(config.trainable, model)
    _refuse_frozen_noise(config, nnx.state(model), wanted)
    return wanted


def _weights(config: ConfigDict) -> list[tuple[str, pathlib.Path]]:
    """(where in the model, the folder) of the weights that a run starts from."""
    places = COMPONENTS[config.objective]
    given = [(name, weights_folder(config, name)) for name in config.weights]
    return [(choose(places, name, 'config.weights'), folder) for name, folder in given if folder]


def _refuse_frozen_noise(config: ConfigDict, state: nnx.State, wanted) -> None:
    """A part without weights must learn; for tests there is `random`."""
    trainable, frozen = (
        [path for path, _ in nnx.to_flat_state(part)]
        for part in nnx.split_state(state, wanted, ...)
    )
    for name, prefix in COMPONENTS[config.objective].items():
        learning, still = (
            any(comes_from_weights(path, prefix) for path in paths) for paths in (trainable, frozen)
        )
        if still and not learning and config.weights.get(name) is None:
            raise InputError(
                f'config.weights.{name} is missing, and nothing of it learns; give the folder of '
                'converted weights'
            )


def starting_model(config: ConfigDict, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """The model that a run starts from: initial values, with published weights over them."""
    make = functools.partial(build_model, config)
    wanted = check_model(config)
    weights = _weights(config)
    graphdef, *parts = split_model(
        make,
        wanted,
        seed=config.seed,
        frozen_dtype=DTYPES[config.dtype],
        mesh=mesh,
        given=lambda path, _: any(comes_from_weights(path, prefix) for prefix, _ in weights),
    )
    whole = nnx.merge_state(*parts)
    for prefix, folder in weights:
        whole = place_weights(whole, folder, prefix)
    trainable, frozen = nnx.split_state(whole, wanted, ...)
    return graphdef, trainable, frozen


def trained(path: pathlib.Path, trainable: nnx.State, *, average: bool) -> nnx.State:
    """What a run learned; the averaged weights, where it kept them."""
    is_step = path.parent.name == 'checkpoints'
    shapes = abstract(trainable)
    wanted = {'ema': shapes} if average else {'trainable': shapes}
    folder = path.parent if is_step else path / 'checkpoints'
    with RunCheckpoints(folder, read_only=True) as checkpoints:
        found = checkpoints.restore(wanted, step=int(path.name) if is_step else None, partial=True)
    if found is None:
        raise InputError(f'no usable checkpoint in {folder}')
    (trained,) = found[1].values()
    return trained
