"""FLUX's prompts: what CLIP and T5 read of a text.

    CLIP   <|startoftext|>{prompt}<|endoftext|>      77 tokens; the DiT gets the pooled state
    T5     {prompt}</s><pad><pad>...                512 tokens; the DiT gets all states

Nothing is cleaned. Ids and states are those of diffusers' FluxPipeline and FluxKontextPipeline.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from transformers import CLIPTokenizer

from metacanvas_jax.data.padded_tokenizer import PaddedTokenizer, t5_tokenizer
from metacanvas_jax.types import EncoderPrompt, InputError

CLIP_SIZE, T5_SIZE = 77, 512


class FluxTokenizer:
    """Texts that are too long are cut and counted, by either."""

    def __init__(
        self,
        clip: str | pathlib.Path,
        t5: str | pathlib.Path,
        *,
        clip_size: int = CLIP_SIZE,
        t5_size: int = T5_SIZE,
    ):
        self.clip = clip_tokenizer(clip, size=clip_size)
        self.t5 = t5_tokenizer(t5, reader='FLUX by its T5', size=t5_size)

    def batch(self, texts: Sequence[str]) -> tuple[EncoderPrompt, EncoderPrompt]:
        """What CLIP reads, and what T5 reads."""
        ids_BU, length_B = self.clip.batch(texts)
        clip = EncoderPrompt(ids_BU, length_B, _all(ids_BU), length_B)
        ids_BU, _ = self.t5.batch(texts)
        # Trap: FLUX masks nothing. T5 reads the padding as text, and so does the DiT.
        whole_B = np.full(len(ids_BU), ids_BU.shape[1], np.int32)
        return clip, EncoderPrompt(ids_BU, whole_B, _all(ids_BU), whole_B)


def _all(ids_BU: np.ndarray) -> np.ndarray:
    return np.broadcast_to(np.arange(ids_BU.shape[1], dtype=np.int32), ids_BU.shape)


def clip_tokenizer(directory: str | pathlib.Path, *, size: int) -> PaddedTokenizer:
    """FLUX publishes vocab.json and merges.txt, of which transformers makes a tokenizer."""
    folder = pathlib.Path(directory)
    wanted = (['tokenizer.json'], ['vocab.json', 'merges.txt'])
    if not any(all((folder / name).is_file() for name in names) for names in wanted):
        raise InputError(f'no tokenizer.json and no vocab.json with merges.txt in {directory}')
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return PaddedTokenizer(
        tokenizer.backend_tokenizer,
        reader='FLUX by its CLIP',
        size=size,
        pad=str(tokenizer.pad_token),
        end=str(tokenizer.eos_token),
    )
