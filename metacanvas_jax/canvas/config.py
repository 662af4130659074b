"""The choices of the paper's Section 3 and of its ablations."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CanvasConfig:
    """One row of Tables 3, 6 and 10 (spec.md section 3.8).

    The canvas has `keyframes` x ceil(h / stride) x ceil(w / stride) tokens for an h x w token grid
    of the DiT; `grid` is the size of its table of parameters, resized where they differ.
    """

    fuse: str  # dit | add | latents | none
    time: str  # adaln | none; only 'dit' has a time
    align: str  # transformer | none
    positions: str  # mrope | text
    attention: str  # causal | bidirectional, among canvas tokens
    keyframes: int
    grid: tuple[int, int]
    stride: int
    frame_seconds: float  # between two latent frames, for the keyframes' absolute time
    head_dim: int  # of the vanilla block


@dataclasses.dataclass(frozen=True)
class ContextConfig:
    """The MLP between the MLLM's states and the DiT's text interface (App. D.1)."""

    hidden: int
    activation: str
    dropout: float
    skip: int  # tokens at the start of the prompt, alike in all prompts, that the DiT does not read
