"""Qwen2.5-VL as MetaCanvas uses it: a prompt in, states and K/V out."""

from flax import nnx

from metacanvas_jax.layers.linear import LoraConfig
from metacanvas_jax.mllm.config import QwenConfig
from metacanvas_jax.mllm.language import LanguageModel
from metacanvas_jax.types import Prompt


class Qwen(nnx.Module):
    def __init__(
        self, config: QwenConfig, lora: LoraConfig | None, *, remat: str, dtype, rngs: nnx.Rngs
    ):
        self.config = config
        self.language = LanguageModel(config, lora, remat=remat, dtype=dtype, rngs=rngs)

    def prefix(self, prompt: Prompt):
        """Final states (B, L, D) of the prompt and the K/V of every layer."""
        x_BLD = self.language.embed(prompt.ids_BL)
        return self.language.prefix(x_BLD, prompt.positions_B3L, prompt.length_B)
