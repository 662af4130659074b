"""The quickstart's tiny Qwen2.5-VL, trained as a language model of the shapes world.

    python train.py --config configs/quickstart_mllm.py --workdir runs/quickstart_mllm

Captions to plans of pictures, questions about layouts, edits of layouts, and what is where; a
quarter of an hour on one CPU core. It reads of all pairs of colours and shapes, as a large MLLM
has. The weights that ship as metacanvas_jax/assets/tiny_qwen are what this wrote to
WORKDIR/weights.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.objective = 'next_token'
    config.steps = 2400
    config.batch_size = 32
    config.checkpoint.every = 200
    config.weights.mllm = None
    config.mllm.size = 'tiny_text'
    config.trainable = ('.*',)
    config.prompt.buckets = (64, 72)
    config.data.source = 'shapes_text'
    config.data.tasks = dict(layout=0.4, dialogue=0.6)
    config.optimizer.lr = 1.5e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.cooldown_steps = 1200
    config.optimizer.ema = 0.995
    config.sample.every = 0
    config.evaluate.kind = 'export'
    for group in ('context', 'canvas', 'backbone', 'vae', 'flow'):
        del config[group]
    return config
