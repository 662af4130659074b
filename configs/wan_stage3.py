"""Stage 3 of 3 (Table 16): the canvas, and one model for six tasks.

    python train.py --config configs/wan_stage3.py --workdir runs/wan3 \
        --config.init_from=runs/wan2 --config.weights.mllm=DIR --config.weights.backbone=DIR \
        --config.weights.vae=DIR --config.data.paths.{t2i,edit,t2v,v2v,r2v}=DIR

All of the DiT learns, what wan_stage2.py learned with it, and from here on its input: 52 new
channels, at first zero, hold the source of an edit, or tell that a slot in front of the frames
holds a reference. New are canvas (3 keyframes of 11 x 20) and canvas connector, and a LoRA of rank
64 on the MLLM. 10k steps of 2048 pictures or 128 videos; i2v is drawn from t2v's, v2v and r2v want
videos with a source or with references.

Table 6: --config.canvas.keyframes=1, 3, 6, 11 or 31.
"""

from ml_collections import ConfigDict

from configs import wan_stage2


def get_config() -> ConfigDict:
    config = wan_stage2.get_config()
    config.steps = 10_000
    config.batch_size = 2048
    config.video_batch_size = 128
    config.trainable = ('context/.*', 'canvas/.*', 'backbone/.*', r'mllm/.*/lora/[ab]')
    config.mllm.lora.update(rank=64, alpha=64.0, dropout=0.05)
    config.prompt.update(buckets=(128, 256, 512, 768, 1024, 1280), pictures=(1, 4))
    config.canvas = dict(
        fuse='dit',
        time='adaln',
        align='transformer',
        positions='mrope',
        attention='causal',
        keyframes=3,
        grid=(11, 20),
        stride=2,
        frame_seconds=4 / 24,
        head_dim=128,
    )
    config.backbone.changes.in_channels = 48 + 48 + 4  # noisy, condition, mask
    config.optimizer.lr = 1e-5
    config.data.references = 4
    config.data.paths.update(edit=None, v2v=None, r2v=None)
    config.data.columns.update(source=None, target=None, instruction=None)
    config.data.tasks = dict(t2i=0.05, edit=0.15, t2v=0.15, i2v=0.15, v2v=0.25, r2v=0.25)
    return config
