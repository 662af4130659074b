"""Stage 2 of 3 (Table 16): the resolution of the base model, and its videos.

    python train.py --config configs/wan_stage2.py --workdir runs/wan2 \
        --config.init_from=runs/wan1 --config.weights.mllm=DIR --config.weights.backbone=DIR \
        --config.weights.vae=DIR --config.data.paths.t2i=DIR --config.data.paths.t2v=DIR

What wan_stage1.py learned, and the DiT's cross-attention with its norm, learn on. 15k steps at
704 x 1280: four of five are of 384 videos (121 frames, 24 a second), the others of 4096 pictures.
Videos are tars, OpenVid-1M's csv with its files, or lines of a dataset.jsonl; those that are
shorter than that are broken, or with --config.data.short_clips=hold stand still at their end.
"""

from ml_collections import ConfigDict

from configs import wan_stage1


def get_config() -> ConfigDict:
    config = wan_stage1.get_config()
    config.init_from = None
    config.steps = 15_000
    config.video_batch_size = 384
    config.trainable += ('backbone/blocks/attn2/.*', 'backbone/blocks/norm2/.*')
    config.optimizer.lr = 2e-5
    config.data.update(height=704, width=1280, frames=121, fps=24.0, short_clips='refuse')
    config.data.paths.t2v = None
    config.data.columns.video = None
    config.data.tasks = dict(t2i=0.16, recon=0.04, t2v=0.8)
    return config
