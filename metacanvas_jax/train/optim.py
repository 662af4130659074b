"""AdamW with linear warm-up, then constant (Tables 9, 13, 16), or with a cool-down at the end.

Muon (Jordan et al. 2024, with the scale of arXiv 2502.16982) is in none of the paper's recipes; the
quickstart, whose DiT is new, takes 600 steps with it instead of 1,600.
"""

import dataclasses
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from metacanvas_jax.build import choose
from metacanvas_jax.types import InputError

Factors = Sequence[tuple[str, float]]
HIDDEN = {'embed', 'mlp', 'heads', 'kv', 'rank'}  # logical axes of what Muon takes


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    kind: str
    lr: float
    matrix_lr: float  # Muon's, of matrices; all else learns with `lr`
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

    def __post_init__(self):
        choose(OPTIMIZERS, self.kind, 'config.optimizer.kind')
        if (self.kind == 'muon') != (self.matrix_lr > 0):
            raise InputError(
                f'config.optimizer.matrix_lr {self.matrix_lr} with kind {self.kind!r}: muon wants '
                'one above 0, and adamw none'
            )


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    warmup = optax.linear_schedule(config.warmup_lr, config.lr, config.warmup_steps)
    if not config.cooldown_steps:
        return warmup
    cooldown = optax.linear_schedule(config.lr, 0.0, config.cooldown_steps)
    return optax.join_schedules([warmup, cooldown], [steps - config.cooldown_steps])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        OPTIMIZERS[config.kind](config, steps),
        *([multiplied(config.factors)] if config.factors else []),
    )


def adamw(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )


def muon(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The momentum of each matrix between hidden widths is made orthogonal.

    AdamW does all else: biases, tables, convolutions, what leads in from channels or out to them.
    """
    rate = learning_rate(dataclasses.replace(config, lr=config.matrix_lr), steps)
    of_matrices = optax.chain(
        optax.trace(decay=0.95, nesterov=True),
        # An entry's root mean square becomes 0.2, about that of an update of Adam's.
        optax.stateless_with_tree_map(lambda u, _: orthogonal(u) * 0.2 * max(u.shape[-2:]) ** 0.5),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    of_rest = adamw(config, steps)

    def init(params: nnx.State):
        matrices, rest = nnx.split_state(params, _is_matrix, ...)
        return of_matrices.init(matrices), of_rest.init(rest)

    def update(updates: nnx.State, state, params: nnx.State):
        matrices, rest = nnx.split_state(updates, _is_matrix, ...)
        values, others = nnx.split_state(params, _is_matrix, ...)
        matrices, of_matrices_state = of_matrices.update(matrices, state[0], values)
        rest, of_rest_state = of_rest.update(rest, state[1], others)
        return nnx.merge_state(matrices, rest), (of_matrices_state, of_rest_state)

    return optax.GradientTransformation(init, update)


# config.optimizer.kind -> (config, steps) -> what an update is made by
OPTIMIZERS = {'adamw': adamw, 'muon': muon}


def _is_matrix(_, variable: nnx.Variable) -> bool:
    axes = variable.get_metadata('axes', ())
    return len(axes) == 2 and axes[0] in HIDDEN and axes[1] in {*HIDDEN, None}


def orthogonal(x: jax.Array) -> jax.Array:
    """(..., m, n) with singular values drawn to 0.7 to 1.2, by Jordan's Newton-Schulz iteration.

    Layer by layer: optax.contrib.muon takes a stack at once, which each device then gathers whole.
    """
    if x.ndim > 2:
        return jax.lax.map(orthogonal, x)
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T).T
    x = x / (jnp.linalg.norm(x) + 1e-8)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


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
