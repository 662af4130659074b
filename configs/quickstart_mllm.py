"""The quickstart's tiny Qwen2.5-VL, trained as a language model of the shapes world.

    python train.py --config configs/quickstart_mllm.py --workdir runs/quickstart_mllm

Captions to plans of pictures, questions and edits, about layouts and about pictures. It reads of
all pairs of colours and shapes, and sees no held-out one. The weights that ship with the package as
metacanvas_jax/assets/tiny_qwen are what this wrote to WORKDIR/weights.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.objective = 'next_token'
    config.steps = 3500
    config.batch_size = 32
    config.checkpoint.every = 200
    config.weights.mllm = None
    config.trainable = ('.*',)
    config.prompt.buckets = (64, 80, 96)
    config.data.source = 'shapes_text'
    config.data.tasks = dict(layout=0.45, dialogue=0.15, picture=0.4)
    config.optimizer.lr = 1.5e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.cooldown_steps = 1800
    config.optimizer.ema = 0.995
    config.sample.every = 0
    config.evaluate.kind = 'export'
    for group in ('context', 'canvas', 'backbone', 'vae', 'flow'):
        del config[group]
    return config
