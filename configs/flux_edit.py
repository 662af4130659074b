"""Editing with FLUX.1-Kontext-dev: the paper's Section 5.2 (Tables 2 and 13).

    python train.py --config configs/flux_edit.py[:variant] --workdir DIR \
        --config.weights.mllm=DIR --config.weights.backbone=DIR --config.weights.vae=DIR \
        --config.weights.context_connector=DIR --config.weights.pooled_encoder=DIR \
        --config.data.path=DIR

data.path holds the parquet files of OmniEdit and HQ-Edit, in folders as they like, or
GPT-Image-Edit's tars or folders, or a dataset.jsonl. A step's pictures have one of the 17 sizes of
Kontext, each a program: that of the nearest shape.

A frozen Qwen2.5-VL-7B sees the source picture and the instruction; its states go through the MLP of
UniWorld-V1 into FLUX's frozen text input, in the place of T5's. A canvas of 32 x 32 is added to the
tokens of the target alone, at half their resolution; the source stands beside them as a context
image. CLIP's vector is that of the empty prompt, which `python -m convert pool` writes. 90k steps
of 64 edits of OmniEdit and HQ-Edit at a megapixel, on 64 A100: GEdit 6.00 becomes 7.67. The
embedded guidance is 1 in training and 3.5 in sampling, as the lineage (UniWorld-V1,
GPT-Image-Edit) has it; config.optimizer.factors makes new modules learn faster than the paper says.

Variants: `canvas` (default), `no_canvas` (the same through the text input alone).
"""

from ml_collections import ConfigDict

# Sec. 5.2 trains "the vision branch", which UniWorld-V1 takes to be this: the attention and the
# modulation of pictures; single blocks have one attention for pictures and text.
VISION_BRANCH = (
    r'backbone/transformer_blocks/attn/(to_q|to_k|to_v|to_out|norm_q|norm_k)/.*',
    r'backbone/transformer_blocks/norm1/.*',
    r'backbone/single_transformer_blocks/(attn|norm)/.*',
)


def canvas(config: ConfigDict) -> None:
    """The whole method."""


def no_canvas(config: ConfigDict) -> None:
    """The baseline: without canvas tokens the MLLM's LoRA would have nothing to act on."""
    config.canvas.fuse = 'none'
    config.mllm.lora.update(rank=0, alpha=0.0, dropout=0.0)
    config.trainable = (*VISION_BRANCH, 'context/.*')
    config.optimizer.factors = (('context/.*', 1.0),)


VARIANTS = {'canvas': canvas, 'no_canvas': no_canvas}


def get_config(variant: str = 'canvas') -> ConfigDict:
    config = ConfigDict()
    config.objective = 'flow'
    config.seed = 0
    config.steps = 90_000
    config.batch_size = 64
    config.accumulate = 1
    config.dtype = 'bfloat16'
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.weights = dict(
        mllm=None, backbone=None, vae=None, context_connector=None, pooled_encoder=None
    )
    config.trainable = (*VISION_BRANCH, 'context/.*', 'canvas/.*', r'mllm/.*/lora/[ab]')

    config.mllm = dict(
        kind='qwen2_5_vl',
        size='7b',
        remat='full',
        lora=dict(rank=64, alpha=64.0, dropout=0.05),
    )
    config.prompt = dict(
        tokenizer=None,
        buckets=(384, 512, 832),
        plan_tokens=0,
        max_text=512,
        pictures=(1,),
        windows=(16, 24, 32),
        min_pixels=448 * 448,  # 256 tokens, whatever the shape
        max_pixels=448 * 448,
    )
    config.pooled_encoder = dict(kind='stored', size=None)
    config.context = dict(kind='mllm', hidden=12288, activation='silu', dropout=0.0, skip=0)
    config.canvas = dict(
        fuse='dit',
        time='adaln',
        align='transformer',
        positions='mrope',
        attention='causal',
        keyframes=1,
        grid=(32, 32),
        stride=2,
        frame_seconds=0.0,
        head_dim=128,
    )
    # Kept whole, 57 layers of 8.7k tokens fit no GPU.
    config.backbone = dict(kind='flux', size=None, remat='attention')
    config.vae = dict(kind='flux_ae', size=None)
    config.flow = dict(train_shift=1.0, embedded_guidance=1.0)

    config.data = dict(
        source='captioned',
        path=None,
        cache=None,
        seed=0,
        size=1024,
        sizes='kontext',
        columns=dict(source=None, target=None, instruction=None),
        tasks=dict(edit=1.0),
        text_dropout=0.0,  # guidance is embedded: there is no unconditional branch to train
        threads=16,
        prefetch=8,
    )
    config.optimizer = dict(
        kind='adamw',
        lr=1e-6,
        matrix_lr=0.0,
        warmup_lr=1e-6,
        warmup_steps=0,
        cooldown_steps=0,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.0,
        clip=1.0,
        ema=0.0,
        factors=(('canvas/.*', 1.0), ('context/.*', 1.0)),
    )
    config.checkpoint = dict(every=1000, keep=2, keep_every=None)
    config.log = dict(every=50, tensorboard=False)
    config.sample = dict(
        every=0, solver='euler_dynamic', steps=28, guidance=1.0, embedded_guidance=3.5
    )
    config.evaluate = dict(kind='none')
    VARIANTS[variant](config)
    return config
