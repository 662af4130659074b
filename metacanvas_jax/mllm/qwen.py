"""Qwen2.5-VL as MetaCanvas uses it: a prompt in, states and K/V out."""

import jax
import jax.numpy as jnp
from flax import nnx

from metacanvas_jax.layers.linear import LoraConfig
from metacanvas_jax.mllm.config import QwenConfig
from metacanvas_jax.mllm.language import LanguageModel
from metacanvas_jax.mllm.vision import VisionTower
from metacanvas_jax.types import Prompt


class Qwen(nnx.Module):
    def __init__(
        self, config: QwenConfig, lora: LoraConfig | None, *, remat: str, dtype, rngs: nnx.Rngs
    ):
        self.config = config
        self.language = LanguageModel(config, lora, remat=remat, dtype=dtype, rngs=rngs)
        sizes = config.vision
        self.vision = (
            VisionTower(config, sizes, remat=remat, dtype=dtype, rngs=rngs) if sizes else None
        )

    def embed(self, prompt: Prompt) -> jax.Array:
        """Text and pictures as the language model takes them, (B, L, D)."""
        x_BLD = self.language.embed(prompt.ids_BL)
        if prompt.vision is None:
            return x_BLD
        assert self.vision, 'a prompt with pictures for an MLLM without a vision tower'
        token_BL1 = jnp.asarray(prompt.vision.token_BL)[..., None]
        tokens_BJD = self.vision(prompt.vision)
        seen_BLD = jnp.take_along_axis(tokens_BJD, jnp.maximum(token_BL1, 0), 1)
        return jnp.where(token_BL1 < 0, x_BLD, seen_BLD)

    def prefix(self, prompt: Prompt):
        """Final states (B, L, D) of the prompt and the K/V of every layer."""
        return self.language.prefix(self.embed(prompt), prompt.positions_B3L, prompt.length_B)
