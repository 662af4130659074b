"""Wan2.2-TI2V-5B with an MLLM for its text encoder, stage 1 of 3: alignment (Table 16).

    python train.py --config configs/wan_stage1.py --workdir runs/wan1 \
        --config.weights.mllm=DIR --config.weights.backbone=DIR --config.weights.vae=DIR \
        --config.data.path=DIR

Qwen2.5-VL-7B takes the place of UMT5; a new MLP between it and the DiT is all that learns. Pictures
only: four of five steps draw from captions, the fifth draws what the MLLM sees. 100k steps of 4096
pictures at 480 x 832 on 128 A100. The folders of weights are what `python -m convert import`
wrote; data.path holds captioned pictures, data.paths.NAME those of task NAME where they are
elsewhere. wan_stage2.py goes on from here.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.objective = 'flow'
    config.seed = 0
    config.steps = 100_000
    config.batch_size = 4096
    config.accumulate = 1
    config.dtype = 'bfloat16'
    config.mesh = dict(data=-1, fsdp=8, tensor=1)
    config.weights = dict(mllm=None, backbone=None, vae=None)
    config.trainable = ('context/.*',)

    config.mllm = dict(
        kind='qwen2_5_vl',
        size='7b',
        remat='full',
        lora=dict(rank=0, alpha=0.0, dropout=0.0),
    )
    config.prompt = dict(
        tokenizer=None,
        buckets=(128, 256, 768),
        plan_tokens=0,
        max_text=512,
        pictures=(1,),
        windows=(9,),
        min_pixels=336 * 336,
        max_pixels=336 * 336,
        side=336,  # 144 tokens
    )
    config.context = dict(kind='mllm', hidden=4 * 3072, activation='gelu_tanh', dropout=0.1, skip=0)
    config.backbone = dict(
        kind='wan', size='ti2v_5b', changes=dict(text_embedder='none'), remat='attention'
    )
    config.vae = dict(kind='wan_vae', size='wan2.2')
    config.flow = dict(train_shift=1.0)

    config.data = dict(
        source='captioned',
        path=None,
        paths=dict(t2i=None),
        columns=dict(picture=None, caption=None),
        cache=None,
        seed=0,
        height=480,
        width=832,
        tasks=dict(t2i=0.8, recon=0.2),
        text_dropout=0.1,
        threads=16,
        prefetch=4,
    )
    config.optimizer = dict(
        kind='adamw',
        lr=1e-3,
        matrix_lr=0.0,
        warmup_lr=0.0,
        warmup_steps=100,
        cooldown_steps=0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip=1.0,
        ema=0.0,
    )
    config.checkpoint = dict(every=1000, keep=2, keep_every=None)
    config.log = dict(every=20, tensorboard=False)
    config.sample = dict(
        every=0,
        count=12,
        prompts=(),
        solver='unipc',
        steps=50,
        shift=5.0,
        guidance=5.0,
        temperature=0.0,
    )
    config.evaluate = dict(kind='none')
    return config
