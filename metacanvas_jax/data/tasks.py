"""Tasks end here: one row each, one function that turns records into a batch.

The model sees arrays and masks and cannot ask which task it is.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from metacanvas_jax.data.prompts import ChatTokenizer, make_prompts
from metacanvas_jax.mllm.config import QwenConfig
from metacanvas_jax.types import Batch, InputError, TextBatch, Visual


@dataclasses.dataclass(frozen=True)
class Task:
    """`template` is the MLLM's user turn (spec.md section 1.3)."""

    template: str

    def prompt(self, text: str) -> str:
        return self.template.replace('{}', text)


TASKS = {
    't2i': Task(template='Please generate image based on the following caption: {}'),
}


def check_tasks(names: Sequence[str]) -> None:
    if unknown := [name for name in names if name not in TASKS]:
        raise InputError(f'no task {unknown[0]!r}; there are: {", ".join(TASKS)}')


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Host-side settings of a run that its batches are made with."""

    tokenizer: ChatTokenizer
    mllm: QwenConfig
    buckets: tuple[int, ...]
    text_dropout: float = 0.0

    def prompts(self, chats):
        # A process sees its own rows only: several might choose several buckets for one batch.
        buckets = self.buckets if jax.process_count() == 1 else (max(self.buckets),)
        return make_prompts(chats, self.mllm, pad=self.tokenizer.pad, buckets=buckets)


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample of any task, as a source gives it: text, and what the VAE will see.

    `pixels` is (F, H, W, 3) uint8.
    """

    text: str
    pixels: np.ndarray


def diffusion_batch(task: str, records: Sequence[Record], lots, encoder: Encoder) -> Batch:
    """`lots` are uniform numbers, one a record: below `text_dropout` the text is taken away.

    That trains the unconditional branch of guidance; pictures in the prompt stay.
    """
    chats = []
    for record, lot in zip(records, lots, strict=True):
        text = '' if lot < encoder.text_dropout else record.text
        chats.append(encoder.tokenizer.chat(TASKS[task].prompt(text))[0])
    pixels = np.stack([record.pixels for record in records]).astype(np.float32) / 127.5 - 1
    # One latent frame for pictures: the count of latent frames is the VAE's to say, from F.
    clean_BT = np.zeros((len(records), 1), np.float32)
    return Batch(
        prompt=encoder.prompts(chats), visual=Visual(clean_BT=clean_BT), pixels_BFHWC=pixels
    )


def text_batch(task: str, records: Sequence, lots, encoder: Encoder) -> TextBatch:
    """Chats of (user, assistant); the loss is on the assistant's words and its end of sequence."""
    del task, lots
    chats, answers = zip(
        *(encoder.tokenizer.chat(record.user, record.assistant) for record in records), strict=True
    )
    prompt = encoder.prompts(chats)
    weight_BL = np.zeros(prompt.ids_BL.shape, np.float32)
    for row, (ids, answer) in enumerate(zip(chats, answers, strict=True)):
        weight_BL[row, len(ids) - answer : len(ids)] = 1
    return TextBatch(prompt=prompt, weight_BL=weight_BL)


# What a training objective is fed with.
BATCHES: Mapping[str, Callable] = {'flow': diffusion_batch, 'next_token': text_batch}
