"""AdamW with linear warm-up, then constant (Tables 9, 13, 16), or with a cool-down at the end."""

import dataclasses
import re
from collections.abc import Sequence

import jax
import optax
from flax import nnx

from metacanvas_jax.types import InputError

Factors = Sequence[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    lr: float
    warmup_lr: float  # where the warm-up starts
    warmup_steps: int
    cooldown_steps: int  # the last ones, in which it falls to zero; 0: constant to the end
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip: float  # of the global norm over trainable leaves
    ema: float  # decay of the average that is sampled from; 0 keeps none
    # (pattern of whole paths, what the learning rate is multiplied by there); the first one counts.
    factors: Factors = ()


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    warmup = optax.linear_schedule(config.warmup_lr, config.lr, config.warmup_steps)
    if not config.cooldown_steps:
        return warmup
    cooldown = optax.linear_schedule(config.lr, 0.0, config.cooldown_steps)
    return optax.join_schedules([warmup, cooldown], [steps - config.cooldown_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
        *([multiplied(config.factors)] if config.factors else []),
    )


def multiplied(factors: Factors) -> optax.GradientTransformation:
    """Updates times the factor of their path. Each pattern must match something."""

    def init(params: nnx.State) -> optax.EmptyState:
        names = ['/'.join(map(str, path)) for path, _ in nnx.to_flat_state(params)]
        for pattern, _ in factors:
            if not any(re.fullmatch(pattern, name) for name in names):
                raise InputError(
                    f'config.optimizer.factors: pattern {pattern!r} matches none of the '
                    f'{len(names)} parameters that learn, such as {", ".join(names[:3])}'
                )
        return optax.EmptyState()

    def update(updates: nnx.State, state, params=None):
        del params
        return nnx.from_flat_state(
            {
                path: jax.tree.map(lambda u: u * factor_of(factors, path), value)  # noqa: B023
                for path, value in nnx.to_flat_state(updates)
            }
        ), state

    return optax.GradientTransformation(init, update)


def factor_of(factors: Factors, path: tuple) -> float:
    name = '/'.join(map(str, path))
    return next((factor for pattern, factor in factors if re.fullmatch(pattern, name)), 1.0)
