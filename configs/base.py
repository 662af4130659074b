"""The unmodified base systems, as published: what the paper's tables compare with.

    python sample.py --config configs/base.py:qwen --config.weights.mllm=DIR \\
        --task describe --image FILE --prompt TEXT

DIR is what `python -m convert import qwen2_5_vl` wrote; it says how large the model is.
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
    config.mllm = dict(size=None, remat='none', lora=dict(rank=0, alpha=0.0, dropout=0.0))
    config.prompt = dict(
        tokenizer=None,
        buckets=(256, 512, 1024, 2048, 4096, 8192),
        plan_tokens=0,
        pictures=(1, 2, 4, 8),
        windows=(16, 64, 128, 256),
        min_pixels=56 * 56,
        max_pixels=1280 * 28 * 28,
    )
    config.data = dict(text_dropout=0.0)
    return config


VARIANTS = {'qwen': qwen}


def get_config(variant: str) -> ConfigDict:
    return VARIANTS[variant]()
