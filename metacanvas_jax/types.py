"""What the rooms of this package hand to each other, and the legend of axis letters.

    B  samples in a batch          T  latent frames (1 for pictures)    C  latent or pixel channels
    L  prompt tokens (padded)      H  latent or pixel rows              D  width of a module
    M  canvas tokens (K h w)       W  latent or pixel columns           N  attention heads (query)
    K  canvas keyframes            h  rows of the token grid            E  width of one head
    S  tokens of a DiT             w  columns of the token grid         G  key/value heads
    3  the MRoPE axes t, h, w      F  pixel frames                      R  references; LoRA's rank
    I  pictures in a prompt        V  windows of a picture              P  patches of a window
    J  vision tokens of a prompt   X  values of a patch
    b  rows of a table of biases, one for each range of distances between tokens (T5)
    U  tokens that a base system's own text encoder reads, of whose states the DiT gets L

A name ends in the letters of its axes: `z_BTHWC` are latents, `t_BT` one time per latent frame.
Times run from 0 (clean) to 1 (noise) everywhere.
"""

from typing import Any

import jax
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray


class InputError(ValueError):
    """The user's input is at fault; commands print it as one line and exit with code 2."""


@struct.dataclass
class Vision:
    """The pictures of a prompt, cut into windows of patches by `mllm/windows.py`.

    A video is one picture per temporal patch. All axes are padded to a bucket.
    """

    patches_BIVPX: Array
    place_BIVP2: Array  # row and column of each patch in its picture
    length_BIV: Array  # patches in each window; the slots after them are padding
    token_BL: Array  # the vision token at each prompt position, -1 where there is text


@struct.dataclass
class Prompt:
    """What the MLLM reads, right-padded; made on the host by `data/prompts.py`."""

    ids_BL: Array
    positions_B3L: Array
    length_B: Array  # true prompt lengths
    start_B: Array  # first free position: 1 + the largest id of any axis (spec: s)
    vision: Vision | None = None  # None: text alone, another program


@struct.dataclass
class EncoderPrompt:
    """What a base system's own text encoder reads, right-padded, and which states the DiT gets.

    Made on the host, such as by `data/sana_prompts.py`.
    """

    ids_BU: Array
    length_B: Array  # true lengths
    taken_BL: Array  # the tokens whose states the DiT gets, in order
    context_length_B: Array  # how many of those are no padding


@struct.dataclass
class EncoderStates:
    """What such an encoder made of a prompt: the states that the DiT gets, right-padded."""

    states_BLD: Array
    length_B: Array


@struct.dataclass
class Texts:
    """The same prompts as each of a system's readers takes them; None for one that it lacks."""

    mllm: Prompt | None
    encoder: EncoderPrompt | EncoderStates | None = None
    pooled: EncoderPrompt | None = None  # CLIP's, of which FLUX takes one vector


@struct.dataclass
class Readings:
    """What the frozen readers made of `Texts`: no gradient enters them."""

    prompt: Prompt | None  # the MLLM's
    states_BLD: Array | None
    kv: Any  # of every layer of the MLLM
    encoder: EncoderStates | None
    pooled_BD: Array | None = None


@struct.dataclass
class Visual:
    """What the DiT sees besides noise and the plan; tasks differ in data, never in program.

    Its pictures are pixels in [-1, 1] as a batch holds them, and latents after `MetaCanvas.look`.
    """

    clean_BT: Array  # 1 where a latent frame is given (time 0, not in the loss), else 0
    # FLUX alone, which wants the last two: (B, H, W, C) of pictures, each of its own size; the
    # guidance that was distilled into it; CLIP's vector of the prompt, which the plan holds.
    context_images: tuple[Array, ...] = ()
    guidance_B: Array | None = None
    pooled_BD: Array | None = None
    # Wan's: reference pictures, one for each slot in front of the frames; a source
    # video, and 1 where one of the 4 pixel frames of a latent frame shall be kept as it is.
    references_BRHWC: Array | None = None
    condition_BTHWC: Array | None = None
    mask_BTHW4: Array | None = None  # none: zeros, which is also what no condition is


@struct.dataclass
class Plan:
    """What the MLLM hands to the DiT: made once per sample, used at every solver step (Fig. 1)."""

    context_BLD: Array
    context_length_B: Array
    canvas: Array | None  # what the fusion's `prepare` returned
    pooled_BD: Array | None = None  # the prompt as one vector, for FLUX


@struct.dataclass
class Patches:
    """Token grids of a DiT; the canvas may touch `target` only (Sec. 3.4)."""

    target_BThwD: Array
    extra: Any  # reference frames, context images: the backbone's own affair


@struct.dataclass
class Batch:
    """One training step of the diffusion objective: pixels in [-1, 1], or their latents."""

    texts: Texts
    visual: Visual
    pixels_BFHWC: Array | None
    latents_BTHWC: Array | None = None


@struct.dataclass
class TextBatch:
    """One training step of the next-token objective; weight 1 on the tokens to be learned."""

    prompt: Prompt
    weight_BL: Array
