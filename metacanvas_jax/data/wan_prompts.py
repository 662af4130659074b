"""Wan's prompts: what UMT5 reads of a text.

    {prompt}</s>            cut to 512 tokens; the DiT gets all 512 states, zeros behind the text

Ids and states are those of diffusers' WanPipeline with its text of 512 tokens.
"""

import html
import pathlib
import re
from collections.abc import Sequence

import numpy as np

from metacanvas_jax.data.padded_tokenizer import t5_tokenizer
from metacanvas_jax.types import EncoderPrompt

SIZE = 512

_STRAIGHT = str.maketrans(dict.fromkeys('\u02bc\u2018\u2019\u201a\u201b', "'"))
_STRAIGHT |= str.maketrans(dict.fromkeys('\u201c\u201d\u201e\u201f', '"'))


def clean(text: str) -> str:
    """Entities of HTML (twice, as escaped text is) become letters, white space single spaces.

    WanPipeline runs ftfy first where it is installed. Of its repairs the one that good text meets
    is made here, straight quotes. The others are not: text in the wrong encoding, terminal escapes,
    control characters; ligatures and wide letters, which UMT5's tokenizer folds by itself.
    """
    text = html.unescape(html.unescape(text.translate(_STRAIGHT)))
    return re.sub(r'\s+', ' ', text).strip()


class WanTokenizer:
    """Texts that are too long are cut and counted."""

    def __init__(self, directory: str | pathlib.Path, *, size: int = SIZE):
        self.umt5 = t5_tokenizer(directory, reader='Wan by its UMT5', size=size)

    def prompt(self, text: str) -> str:
        return text

    def negative(self, text: str) -> str:
        """Read as any other."""
        return text

    def batch(self, texts: Sequence[str]) -> EncoderPrompt:
        ids_BU, length_B = self.umt5.batch([clean(text) for text in texts])
        taken_BL = np.broadcast_to(np.arange(ids_BU.shape[1], dtype=np.int32), ids_BU.shape)
        # The encoder masks padding and leaves zeros there. The DiT masks nothing.
        whole_B = np.full(len(ids_BU), ids_BU.shape[1], np.int32)
        return EncoderPrompt(ids_BU, length_B, taken_BL, whole_B)
