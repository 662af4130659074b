"""The quickstart's tiny Qwen2.5-VL: first a language model of the shapes world, then it sees.

    python train.py --config configs/quickstart_mllm.py --workdir runs/words
    python train.py --config configs/quickstart_mllm.py:eyes --workdir runs/eyes \\
        --config.weights.mllm=runs/words/weights
    python train.py --config configs/quickstart_mllm.py:answers --workdir runs/answers \\
        --config.weights.mllm=runs/eyes/weights
    python train.py --config configs/quickstart_mllm.py:relations --workdir runs/relations \\
        --config.weights.mllm=runs/answers/weights
    python train.py --config configs/quickstart_mllm.py:clips --workdir runs/clips \\
        --config.weights.mllm=runs/relations/weights

Captions to plans of pictures, questions about layouts and edits of them, in words; then the same of
pictures; then mostly questions; then those that it still mistakes; then plans of clips. It reads of
all pairs of colours and shapes, as a large MLLM has, and sees those of the train split. The weights
that ship as metacanvas_jax/assets/tiny_qwen are what the fourth command wrote to WORKDIR/weights,
and tiny_qwen_clips, which plans for configs/quickstart.py:wan, what the fifth one did; 20 to 30
minutes each on two CPU cores. (The first two were run at be3c584, where answers did not yet repeat
their questions.)
"""

from ml_collections import ConfigDict

from configs import quickstart


def words(config: ConfigDict) -> None:
    """From initial values; the eyes stay as they are."""
    config.steps = 4000
    config.data.tasks = dict(layout=0.35, dialogue=0.65)
    config.optimizer.cooldown_steps = 2000


def eyes(config: ConfigDict) -> None:
    """From what `words` wrote; words go on, lest they are forgotten."""
    config.steps = 4000
    config.data.tasks = dict(layout=0.2, dialogue=0.2, picture=0.6)
    config.optimizer.cooldown_steps = 2000


def answers(config: ConfigDict) -> None:
    """From what `eyes` wrote; questions need more than their share of the pictures' texts."""
    config.steps = 3000
    config.data.tasks = dict(layout=0.1, dialogue=0.2, picture=0.2, picture_question=0.5)
    config.optimizer.cooldown_steps = 1500


def relations(config: ConfigDict) -> None:
    """From what `answers` wrote; what it still mistakes."""
    config.steps = 2000
    config.data.tasks = dict(
        layout=0.1, dialogue=0.1, picture=0.1, picture_question=0.3, picture_relation=0.4
    )
    config.optimizer.cooldown_steps = 1000


def clips(config: ConfigDict) -> None:
    """From what `relations` wrote: plans of all that a Wan draws, from texts and what they show."""
    config.steps = 1600
    config.data.update(size=24, frames=5, fps=4.0)
    config.data.tasks = dict(t2i=0.1, edit=0.2, t2v=0.1, i2v=0.2, v2v=0.2, r2v=0.2)
    config.prompt.pictures = (1, 2, 3, 4)
    config.optimizer.cooldown_steps = 1400


VARIANTS = {
    'words': words,
    'eyes': eyes,
    'answers': answers,
    'relations': relations,
    'clips': clips,
}


def get_config(variant: str = 'words') -> ConfigDict:
    config = quickstart.get_config()
    config.objective = 'next_token'
    config.batch_size = 32
    config.checkpoint.every = 200
    config.weights.mllm = None
    config.mllm.size = 'tiny'
    config.trainable = ('.*',)
    config.prompt.buckets = (56, 72, 96, 128)
    config.data.source = 'shapes_text'
    config.optimizer.update(kind='adamw', lr=1.5e-3, matrix_lr=0.0)
    config.optimizer.update(warmup_steps=100, weight_decay=0.0, ema=0.995)
    config.sample.every = 0
    config.evaluate.kind = 'export'
    for group in ('context', 'canvas', 'backbone', 'vae', 'flow'):
        del config[group]
    VARIANTS[variant](config)
    return config
