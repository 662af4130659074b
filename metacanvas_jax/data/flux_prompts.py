"""FLUX's prompts: what CLIP and T5 read of a text.

    CLIP   <|startoftext|>{prompt}<|endoftext|>      77 tokens; the DiT gets the pooled state
    T5     {prompt}</s><pad><pad>...                512 tokens; the DiT gets all states

Nothing is cleaned. Ids and states are those of diffusers' FluxPipeline and FluxKontextPipeline.
"""

import pathlib
from collections.abc import Sequence

import numpy as np

from metacanvas_jax.data.padded_tokenizer import PaddedTokenizer, t5_tokenizer
from metacanvas_jax.types import EncoderPrompt, InputError

CLIP_SIZE, T5_SIZE = 77, 512


class FluxT5Tokenizer:
    """Texts that are too long are cut and counted."""

    def __init__(self, directory: str | pathlib.Path, *, size: int = T5_SIZE):
        self.t5 = t5_tokenizer(directory, reader='FLUX by its T5', size=size)

    def prompt(self, text: str) -> str:
        return text

    def negative(self, text: str) -> str:
        """Read as any other."""
        return text

    def batch(self, texts: Sequence[str]) -> EncoderPrompt:
        ids_BU, _ = self.t5.batch(texts)
        # Trap: FLUX masks nothing. T5 reads the padding as text, and so does the DiT.
        whole_B = np.full(len(ids_BU), ids_BU.shape[1], np.int32)
        return EncoderPrompt(ids_BU, whole_B, _all(ids_BU), whole_B)


class FluxClipTokenizer:
    """Texts that are too long are cut and counted."""

    def __init__(self, directory: str | pathlib.Path, *, size: int = CLIP_SIZE):
        self.clip = clip_tokenizer(directory, size=size)

    def prompt(self, text: str) -> str:
        return text

    def negative(self, text: str) -> str:
        """Read as any other."""
        return text

    def batch(self, texts: Sequence[str]) -> EncoderPrompt:
        ids_BU, length_B = self.clip.batch(texts)
        return EncoderPrompt(ids_BU, length_B, _all(ids_BU), length_B)


def _all(ids_BU: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(ids_BU.shape[1], dtype=np.int32), ids_BU.shape)


def clip_tokenizer(directory: str | pathlib.Path, *, size: int) -> PaddedTokenizer:
    """FLUX publishes vocab.json and merges.txt, of which transformers makes a tokenizer."""
    folder = pathlib.Path(directory)
    wanted = (['tokenizer.json'], ['vocab.json', 'merges.txt'])
    if not any(all((folder / name).is_file() for name in names) for names in wanted):
        raise InputError(f'no tokenizer.json and no vocab.json with merges.txt in {directory}')
    from transformers import CLIPTokenizer  # takes a second, of every command without FLUX too

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return PaddedTokenizer(
        tokenizer.backend_tokenizer,
        reader='FLUX by its CLIP',
        size=size,
        pad=str(tokenizer.pad_token),
        end=str(tokenizer.eos_token),
    )
