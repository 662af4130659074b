"""Figure 1: an MLLM plans inside a diffusion model's latent space.

plan      prompt -> MLLM -> context (for the DiT's text interface) and canvas (for its latents)
velocity  noisy latents -> patchify -> + canvas -> DiT blocks -> velocity
"""

import jax
from flax import nnx

from metacanvas_jax.backbones.base import Backbone
from metacanvas_jax.canvas.canvas_connector import Canvas, NoCanvas
from metacanvas_jax.canvas.context_connector import ContextConnector
from metacanvas_jax.mllm.qwen import Qwen
from metacanvas_jax.types import Plan, Prompt, Visual
from metacanvas_jax.vae.base import Vae


class MetaCanvas(nnx.Module):
    def __init__(
        self,
        mllm: Qwen,
        context: ContextConnector,
        canvas: Canvas | NoCanvas,
        backbone: Backbone,
        vae: Vae,
    ):
        self.mllm, self.context, self.canvas = mllm, context, canvas
        self.backbone, self.vae = backbone, vae

    def plan(self, prompt: Prompt, latents: tuple[int, int, int], key=None) -> Plan:
        """Once per sample; `latents` is (T, H, W), `key` turns training's dropout on.

        Nothing trainable feeds the prefix, so no gradient enters it: the LoRA and the canvas learn
        through the canvas pass alone.
        """
        context_key, canvas_key = (None, None) if key is None else jax.random.split(key)
        states_BLD, kv = jax.lax.stop_gradient(self.mllm.prefix(prompt))
        context_BLD, context_length_B = self.context(states_BLD, prompt.length_B, context_key)
        return Plan(
            context_BLD=context_BLD,
            context_length_B=context_length_B,
            canvas=self.canvas.draw(self.mllm, prompt, kv, self.backbone.grid(latents), canvas_key),
        )

    def velocity(self, z_BTHWC, t_BT, plan: Plan, visual: Visual) -> jax.Array:
        """Once per solver step."""
        clean_BT = visual.clean_BT
        z_BTHWC = self.canvas.fusion.before_patchify(z_BTHWC, plan.canvas, clean_BT)
        patches = self.backbone.patchify(z_BTHWC, visual)
        patches = self.canvas.fusion.after_patchify(patches, plan.canvas, t_BT, clean_BT)
        return self.backbone.velocity(patches, t_BT, plan.context_BLD, plan.context_length_B)
