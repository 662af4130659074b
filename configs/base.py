"""The unmodified base systems, as published: what the paper's tables compare with.

    python sample.py --config configs/base.py:qwen --config.weights.mllm=DIR \\
        --task describe --image FILE --prompt TEXT
    python sample.py --config configs/base.py:sana --config.weights.backbone=DIR \\
        --config.weights.vae=DIR --config.weights.text_encoder=DIR --prompt TEXT --output FILE.png

    python sample.py --config configs/base.py:wan ... --prompt TEXT [--image FILE] \\
        --output FILE.mp4
    python sample.py --config configs/base.py:flux ... --config.weights.pooled_encoder=DIR \\
        --prompt TEXT [--image FILE] --output FILE.png

Each DIR is what `python -m convert import` wrote; it says how large the model is.
"""

from ml_collections import ConfigDict


def qwen() -> ConfigDict:
    """Qwen2.5-VL-3B or -7B: answers questions about pictures and videos."""
    config = ConfigDict()
    config.objective = 'next_token'
    config.seed = 0
    config.dtype = 'bfloat16'
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.weights = dict(mllm=None)
    config.trainable = ()
    config.mllm = dict(
        kind='qwen2_5_vl',
        size=None,
        remat='none',
        lora=dict(rank=0, alpha=0.0, dropout=0.0),
    )
    config.prompt = dict(
        tokenizer=None,
        buckets=(256, 512, 1024, 2048, 4096, 8192),
        plan_tokens=0,
        max_text=None,
        pictures=(1, 2, 4, 8),
        windows=(16, 64, 128, 256),
        min_pixels=56 * 56,
        max_pixels=1280 * 28 * 28,
    )
    config.data = dict(text_dropout=0.0)
    return config


def sana() -> ConfigDict:
    """SANA 1.0 or 1.5, text to picture: Gemma-2, 20 steps of DPM-Solver++, guidance 4.5.

    For the model of 512 pixels: --config.data.size=512.
    """
    config = ConfigDict()
    config.objective = 'flow'
    config.seed = 0
    config.dtype = 'bfloat16'
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.weights = dict(backbone=None, vae=None, text_encoder=None)
    config.trainable = ()
    config.text_encoder = dict(
        kind='gemma2', size=None, tokenizer=None, tokens=300, instruction=True, reads='prompt'
    )
    config.context = dict(kind='encoder')
    config.backbone = dict(
        kind='sana', size=None, remat='none', lora=dict(rank=0, alpha=0.0, dropout=0.0)
    )
    config.vae = dict(kind='dc_ae', size=None)
    config.data = dict(size=1024, text_dropout=0.0)
    config.sample = dict(solver='dpm++2m', steps=20, shift=3.0, guidance=4.5)
    return config


# Of Wan's own shared_config.py; its commas are wide.
# ruff: noqa: RUF001
WAN_NEGATIVE = (
    '色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，'
    '丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，'
    '杂乱的背景，三条腿，背景人很多，倒着走'
)


def wan() -> ConfigDict:
    """Wan2.2-TI2V-5B, text (and with --image its first frame) to video: UMT5, 50 steps of UniPC."""
    config = ConfigDict()
    config.objective = 'flow'
    config.seed = 0
    config.dtype = 'bfloat16'
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.weights = dict(backbone=None, vae=None, text_encoder=None)
    config.trainable = ()
    config.text_encoder = dict(kind='umt5', size=None, tokenizer=None, tokens=512)
    config.context = dict(kind='encoder')
    config.backbone = dict(kind='wan', size=None, remat='none')
    config.vae = dict(kind='wan_vae', size=None)
    config.data = dict(height=704, width=1280, frames=121, fps=24.0, text_dropout=0.0)
    config.sample = dict(
        solver='unipc', steps=50, shift=5.0, guidance=5.0, negative_prompt=WAN_NEGATIVE
    )
    return config


def flux() -> ConfigDict:
    """FLUX.1-Kontext-dev (or dev), text to picture, or with --image that one edited.

    T5 and CLIP, 28 Euler steps along times that depend on the size, and the guidance that was
    distilled into the model: --config.sample.embedded_guidance. Beside it stands --guidance with a
    --negative_prompt, which diffusers calls true CFG.
    """
    config = ConfigDict()
    config.objective = 'flow'
    config.seed = 0
    config.dtype = 'bfloat16'
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.weights = dict(backbone=None, vae=None, text_encoder=None, pooled_encoder=None)
    config.trainable = ()
    config.text_encoder = dict(kind='t5', size=None, tokenizer=None, tokens=512)
    config.pooled_encoder = dict(kind='clip', size=None, tokenizer=None, tokens=77)
    config.context = dict(kind='encoder')
    config.backbone = dict(kind='flux', size=None, remat='none')
    config.vae = dict(kind='flux_ae', size=None)
    config.data = dict(size=1024, sizes='kontext', text_dropout=0.0)
    config.sample = dict(solver='euler_dynamic', steps=28, guidance=1.0, embedded_guidance=3.5)
    return config


VARIANTS = {'qwen': qwen, 'sana': sana, 'wan': wan, 'flux': flux}


def get_config(variant: str) -> ConfigDict:
    return VARIANTS[variant]()
