"""Text to image with the published SANA-1.6B and a LoRA on it: the paper's Appendix B.4 (Table 8).

    python train.py --config configs/sana_lora.py[:variant] --workdir DIR \
        --config.weights.mllm=DIR --config.weights.backbone=DIR --config.weights.vae=DIR \
        --config.weights.text_encoder=DIR --config.data.path=DIR

Qwen2.5-VL-7B draws the canvas; the DiT learns through a LoRA of rank 32 on its attentions, the rest
as Table 9 (sana_t2i.py).

Variants: `canvas` (default, 0.86 on GenEval), `text_positions` (Table 10: without MRoPE, 0.85),
`mllm_lora` (App. B.5: a LoRA of rank 32 on the MLLM too, 0.87).
"""

from ml_collections import ConfigDict

from configs import sana_t2i


def canvas(config: ConfigDict) -> None:
    """Text and MetaCanvas."""


def text_positions(config: ConfigDict) -> None:
    """Table 10: canvas tokens are numbered like text."""
    config.canvas.positions = 'text'


def mllm_lora(config: ConfigDict) -> None:
    """Appendix B.5: canvas tokens go through the MLLM with a LoRA of their own."""
    config.mllm.lora.update(rank=32, alpha=32.0, dropout=0.05)
    config.trainable += (r'mllm/.*/lora/[ab]',)


VARIANTS = {'canvas': canvas, 'text_positions': text_positions, 'mllm_lora': mllm_lora}


def get_config(variant: str = 'canvas') -> ConfigDict:
    config = sana_t2i.get_config()
    config.mllm.size = '7b'
    config.backbone.lora.update(rank=32, alpha=32.0)
    config.trainable = (r'backbone/.*/lora/[ab]', 'canvas/.*')
    VARIANTS[variant](config)
    return config
