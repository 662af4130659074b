"""Text to image with SANA-1.6B from scratch: the paper's Section 5.1 (Table 9, Figure 4).

    python train.py --config configs/sana_t2i.py[:variant] --workdir DIR \
        --config.weights.mllm=DIR --config.weights.vae=DIR --config.weights.text_encoder=DIR \
        --config.data.path=DIR

The DiT reads captions through its own text encoder (Gemma-2); a frozen Qwen2.5-VL-3B draws the
canvas. 20k steps of 320 pictures of BLIP3o-60k at 512 x 512, a day on 8 A100. The folders of
weights are what `python -m convert import` wrote; data.path holds BLIP3o-60k's tars.

Variants, the curves of Figure 4: `canvas` (default, text and MetaCanvas), `canvas_only` (the text
encoder reads nothing), `text` (SANA as it is), `metaquery` (256 queries in the place of the text),
`text_metaquery` (both). Table 3 continues in sana_ablations.py.
"""

from ml_collections import ConfigDict

QUERIES = dict(count=256, attention='causal', head_dim=128, scale=5.5**0.5)


def canvas(config: ConfigDict) -> None:
    """Text and MetaCanvas."""


def canvas_only(config: ConfigDict) -> None:
    """MetaCanvas without text: SANA's text encoder reads the empty prompt (App. B.1)."""
    config.text_encoder.reads = 'nothing'


def text(config: ConfigDict) -> None:
    """The baseline: SANA as it is. Its MLLM is not even there."""
    config.canvas.fuse = 'none'
    config.trainable = ('backbone/.*',)
    del config.mllm, config.weights.mllm


def metaquery(config: ConfigDict) -> None:
    """Queries in the place of the text."""
    text_metaquery(config)
    config.context.kind = 'none'
    del config.text_encoder, config.weights.text_encoder


def text_metaquery(config: ConfigDict) -> None:
    """Queries beside the text."""
    config.canvas.fuse = 'none'
    config.queries = QUERIES
    config.trainable = ('backbone/.*', 'context/queries/.*')


VARIANTS = {
    'canvas': canvas,
    'canvas_only': canvas_only,
    'text': text,
    'metaquery': metaquery,
    'text_metaquery': text_metaquery,
}


def get_config(variant: str = 'canvas') -> ConfigDict:
    config = ConfigDict()
    config.objective = 'flow'
    config.seed = 0
    config.steps = 20_000
    config.batch_size = 320
    config.accumulate = 1
    config.dtype = 'bfloat16'
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.weights = dict(mllm=None, backbone=None, vae=None, text_encoder=None)
    config.trainable = ('backbone/.*', 'canvas/.*')

    config.mllm = dict(
        kind='qwen2_5_vl',
        size='3b',
        remat='full',
        lora=dict(rank=0, alpha=0.0, dropout=0.0),
    )
    config.prompt = dict(
        tokenizer=None,
        buckets=(128, 320),
        plan_tokens=0,
        max_text=256,
        pictures=(1,),
        windows=(16,),
        min_pixels=56 * 56,
        max_pixels=448 * 448,
    )
    config.text_encoder = dict(
        kind='gemma2',
        size='gemma_2_2b',
        tokenizer=None,
        tokens=300,
        instruction=True,
        reads='prompt',
    )
    config.context = dict(kind='encoder')
    config.canvas = dict(
        fuse='dit',
        time='adaln',
        align='transformer',
        positions='mrope',
        attention='causal',
        keyframes=1,
        grid=(16, 16),
        stride=1,
        frame_seconds=0.0,
        head_dim=128,
    )
    config.backbone = dict(
        kind='sana',
        size='sana_1600m',
        remat='full',
        lora=dict(rank=0, alpha=0.0, dropout=0.0),
    )
    config.vae = dict(kind='dc_ae', size='dc_ae_f32c32')
    config.flow = dict(train_shift=1.0)

    config.data = dict(
        source='captioned',
        path=None,
        cache=None,  # a folder: latents and text features are computed once and kept there
        seed=0,
        size=512,
        tasks=dict(t2i=1.0),
        text_dropout=0.1,
        threads=16,
        prefetch=8,
    )
    config.optimizer = dict(
        kind='adamw',
        lr=1e-4,
        matrix_lr=0.0,
        warmup_lr=1e-5,
        warmup_steps=300,
        cooldown_steps=0,
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,
        clip=1.0,
        ema=0.0,
    )
    config.checkpoint = dict(every=1000, keep=2, keep_every=None)
    config.log = dict(every=50, tensorboard=False)
    config.sample = dict(
        every=1000,
        count=12,
        prompts=(
            'a photo of a bench',
            'a photo of two clocks',
            'a photo of a purple suitcase',
            'a photo of a dog right of a teddy bear',
            'a photo of a red cake and a blue book',
            'a lighthouse on a cliff above a stormy sea, oil painting',
        ),
        solver='dpm++2m',
        steps=20,
        shift=3.0,
        guidance=4.5,
    )
    config.evaluate = dict(kind='none')
    VARIANTS[variant](config)
    return config
