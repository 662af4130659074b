"""The quickstart's tiny Wan before it has a canvas, as stages 1 and 2 (Section 5.3) would leave it.

    python train.py --config configs/quickstart_wan.py --workdir runs/wan_pictures
    python train.py --config configs/quickstart_wan.py:clips --workdir runs/wan_clips \\
        --config.weights.backbone=runs/wan_pictures/weights/backbone \\
        --config.weights.context_connector=runs/wan_pictures/weights/context_connector
    python train.py --config configs/quickstart_wan.py:more_clips --workdir runs/wan_more \\
        --config.weights.backbone=runs/wan_clips/weights/backbone \\
        --config.weights.context_connector=runs/wan_clips/weights/context_connector
    python train.py --config configs/quickstart_wan.py:muon --workdir runs/wan_muon \\
        --config.weights.backbone=runs/wan_more/weights/backbone \\
        --config.weights.context_connector=runs/wan_more/weights/context_connector

What the paper starts from is a Wan that draws; so does configs/quickstart.py:wan. DiT and context
connector learn, first of pictures, then of all six tasks, with the MLLM's text interface alone. The
weights that ship as metacanvas_jax/assets/tiny_wan are what the last command wrote to
WORKDIR/weights; about 20, 30, 40 and 35 minutes on two CPU cores.
"""

from ml_collections import ConfigDict

from configs import quickstart


def pictures(config: ConfigDict) -> None:
    """From initial values: what things look like."""
    config.steps = 3500
    config.data.tasks = dict(t2i=0.5, edit=0.5)
    config.optimizer.update(lr=3e-3, cooldown_steps=500)


def clips(config: ConfigDict) -> None:
    """From what `pictures` wrote, with the MLLM that plans clips too."""
    config.steps = 3600
    config.data.tasks = dict(t2i=0.25, edit=0.2, t2v=0.15, i2v=0.1, v2v=0.15, r2v=0.15)
    config.weights.update(mllm='tiny_qwen_clips', backbone=None, context_connector=None)
    config.optimizer.update(lr=2e-3, cooldown_steps=2800)


def more_clips(config: ConfigDict) -> None:
    """From what `clips` wrote; a rate as high as before would first undo much of it."""
    clips(config)
    config.steps = 5000
    config.data.tasks = dict(t2i=0.2, edit=0.15, t2v=0.2, i2v=0.15, v2v=0.15, r2v=0.15)
    config.optimizer.update(lr=8e-4, cooldown_steps=4800)


def muon(config: ConfigDict) -> None:
    """From what `more_clips` wrote. Its rate undoes much at first, and comes to half the losses."""
    more_clips(config)
    config.steps = 4400
    config.optimizer.update(kind='muon', lr=1e-3, matrix_lr=3e-3, cooldown_steps=4350)


VARIANTS = {'pictures': pictures, 'clips': clips, 'more_clips': more_clips, 'muon': muon}


def get_config(variant: str = 'pictures') -> ConfigDict:
    config = quickstart.get_config('wan_no_canvas')
    config.weights = dict(mllm='tiny_qwen')
    config.optimizer.update(kind='adamw', matrix_lr=0.0, factors=())
    config.sample.every = 0
    config.evaluate.kind = 'export'
    VARIANTS[variant](config)
    return config
