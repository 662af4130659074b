"""Figure 1: an MLLM plans inside a diffusion model's latent space.

plan      prompt -> MLLM -> context (for the DiT's text interface) and canvas (for its latents)
look      pictures that are given -> their latents
velocity  noisy latents -> patchify -> + canvas -> DiT blocks -> velocity
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from metacanvas_jax.backbones.base import Backbone
from metacanvas_jax.canvas.canvas_connector import Canvas, NoCanvas
from metacanvas_jax.canvas.context_connector import Context
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.text_encoders.base import PooledEncoder, TextEncoder
from metacanvas_jax.types import Patches, Plan, Readings, Texts, Visual
from metacanvas_jax.vae.base import Vae


class MetaCanvas(nnx.Module):
    """Without an MLLM, and with a text encoder, it is a base system as published."""

    def __init__(
        self,
        mllm: Qwen | None,
        text_encoder: TextEncoder | None,
        pooled_encoder: PooledEncoder | None,
        context: Context,
        canvas: Canvas | NoCanvas,
        backbone: Backbone,
        vae: Vae,
    ):
        self.mllm, self.text_encoder, self.pooled_encoder = mllm, text_encoder, pooled_encoder
        self.context, self.canvas = context, canvas
        self.backbone, self.vae = backbone, vae

    def read(self, texts: Texts) -> Readings:
        """Nothing trainable feeds the readers, so no gradient enters them: the LoRA, the queries
        and the canvas learn through passes of their own over the K/V.
        """
        states_BLD = kv = encoder = pooled_BD = None
        if self.mllm is not None:
            assert texts.mllm
            states_BLD, kv = self.mllm.prefix(texts.mllm)
        if self.text_encoder is not None:
            encoder = self.text_encoder.context(texts.encoder)
        if self.pooled_encoder is not None:
            pooled_BD = self.pooled_encoder.pool(texts)
        readings = Readings(
            prompt=texts.mllm, states_BLD=states_BLD, kv=kv, encoder=encoder, pooled_BD=pooled_BD
        )
        return jax.lax.stop_gradient(readings)

    def plan(self, texts: Texts, latents: tuple[int, int, int], key=None) -> Plan:
        """Once per sample; `latents` is (T, H, W), `key` turns training's dropout on."""
        context_key, canvas_key = (None, None) if key is None else jax.random.split(key)
        readings = self.read(texts)
        context_BLD, context_length_B = self.context(self.mllm, readings, context_key)
        return Plan(
            context_BLD=context_BLD,
            context_length_B=context_length_B,
            canvas=self.canvas.draw(self.mllm, readings, self.backbone.grid(latents), canvas_key),
            pooled_BD=readings.pooled_BD,
        )

    def look(self, visual: Visual) -> Visual:
        """Once per sample: latents in the place of pixels; no gradient enters the VAE."""
        changes: dict[str, Any] = {}
        changes['context_images'] = tuple(map(self._look_at, visual.context_images))
        if (references := visual.references_BRHWC) is not None:
            pictures = self._look_at(rearrange(references, 'B R H W C -> (B R) H W C'))
            found = rearrange(pictures, '(B R) H W C -> B R H W C', B=len(references))
            changes['references_BRHWC'] = found
        if (condition := visual.condition_BTHWC) is not None:
            changes['condition_BTHWC'] = self.encode(condition)
        return dataclasses.replace(visual, **changes)

    def _look_at(self, x_BHWC) -> jax.Array:
        return self.encode(x_BHWC[:, None])[:, 0]

    def encode(self, x_BFHWC) -> jax.Array:
        """Pixels in [-1, 1] -> latents (B, T, H, W, C)."""
        return jax.lax.stop_gradient(self.vae.encode(jnp.asarray(x_BFHWC)))

    def patchify(self, z_BTHWC, plan: Plan, visual: Visual) -> Patches:
        visual = dataclasses.replace(visual, pooled_BD=plan.pooled_BD)
        return self.backbone.patchify(z_BTHWC, visual)

    def velocity(self, z_BTHWC, t_BT, plan: Plan, visual: Visual) -> jax.Array:
        """Once per solver step."""
        clean_BT = visual.clean_BT
        z_BTHWC = self.canvas.fusion.before_patchify(z_BTHWC, plan.canvas, clean_BT)
        patches = self.patchify(z_BTHWC, plan, visual)
        patches = self.canvas.fusion.after_patchify(patches, plan.canvas, t_BT, clean_BT)
        return self.backbone.velocity(patches, t_BT, plan.context_BLD, plan.context_length_B)
