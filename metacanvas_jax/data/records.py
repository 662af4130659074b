"""What sources give: one sample, before a task makes something of it."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample of any task: text, what shall become of it, and what it is made from.

    `pixels` and `source` are frames (F, H, W, 3), one of them for a picture; the first frame and
    the references are (H, W, 3); all uint8, of any size. `plan` is what the MLLM could have said
    before it draws this. A feature cache gives what became of pixels and text instead: latents
    (T, H, W, C), and the states (L, D) of the text encoder.
    """

    text: str
    pixels: np.ndarray | None = None
    plan: str = ''
    latents: np.ndarray | None = None
    states: np.ndarray | None = None
    source: np.ndarray | None = None
    fps: float | None = None  # of the source
    first: np.ndarray | None = None  # of a video that is yet to be made
    references: tuple[np.ndarray, ...] = ()


@dataclasses.dataclass(frozen=True)
class TextRecord:
    """One turn of a conversation, with uint8 (H, W, 3) pictures in front of the user's words."""

    user: str
    assistant: str
    pictures: tuple[np.ndarray, ...] = ()
