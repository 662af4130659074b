"""AdamW with linear warm-up, then constant (Tables 9, 13, 16)."""

import dataclasses

import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    lr: float
    warmup_lr: float  # where the warm-up starts
    warmup_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip: float  # of the global norm over trainable leaves
    ema: float  # decay of the average that is sampled from; 0 keeps none


def learning_rate(config: OptimizerConfig) -> optax.Schedule:
    return optax.linear_schedule(config.warmup_lr, config.lr, config.warmup_steps)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            learning_rate(config),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )
