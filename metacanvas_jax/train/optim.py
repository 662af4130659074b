"""AdamW with linear warm-up, then constant (Tables 9, 13, 16), or with a cool-down at the end."""

import dataclasses

import optax


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
    )
