"""Tasks end here: one row each, one function that turns records into a batch.

The model sees arrays and masks and cannot ask which task it is.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from metacanvas_jax.data.media import Media, see_image, see_video
from metacanvas_jax.data.prompts import ChatTokenizer, make_prompts
from metacanvas_jax.mllm.config import QwenConfig
from metacanvas_jax.mllm.windows import VisionBuckets
from metacanvas_jax.types import (
    Batch,
    EncoderPrompt,
    EncoderStates,
    InputError,
    Prompt,
    TextBatch,
    Texts,
    Visual,
)


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
    """Host side of the MLLM: chats and pictures to what it reads."""

    tokenizer: ChatTokenizer
    mllm: QwenConfig
    buckets: tuple[int, ...]  # prompt tokens
    vision_buckets: VisionBuckets
    min_pixels: int  # of a picture as the MLLM sees it
    max_pixels: int
    plan_tokens: int = 0  # the longest plan that the MLLM writes before it draws; 0: none

    max_text: int | None = None  # tokens of a prompt to draw from that the MLLM reads

    def chat(self, task: str, text: str, plan: str) -> list[int]:
        """A prompt to draw from: its response is the plan, or empty, as in the paper."""
        if self.max_text is not None:
            text = self.tokenizer.cut(text, self.max_text)
        return self.tokenizer.chat(TASKS[task].prompt(text), plan if self.plan_tokens else '')[0]

    def see(self, pictures: Sequence[np.ndarray]) -> list[Media]:
        """uint8 (H, W, 3) each."""
        return [see_image(picture, self.mllm, **self._limits()) for picture in pictures]

    def watch(self, frames_FHWC: np.ndarray, fps: float) -> Media:
        """uint8 frames, so many of them a second."""
        return see_video(frames_FHWC, self.mllm, fps=fps, **self._limits())

    def _limits(self) -> dict[str, int]:
        return dict(min_pixels=self.min_pixels, max_pixels=self.max_pixels)

    def prompts(self, chats, media: Sequence[Sequence[Media]] | None = None) -> Prompt:
        """`media` are what each chat shows; None where the task shows nothing."""
        return make_prompts(
            chats,
            self.mllm,
            pad=self.tokenizer.pad,
            buckets=_common(self.buckets),
            media=media,
            vision_buckets=VisionBuckets(
                pictures=_common(self.vision_buckets.pictures),
                windows=_common(self.vision_buckets.windows),
            ),
        )


class TextTokenizer(Protocol):
    """Host side of a text encoder, such as `data/sana_prompts.py`."""

    def prompt(self, text: str) -> Any: ...

    def negative(self, text: str) -> Any: ...

    def batch(self, rows: Sequence[Any]) -> EncoderPrompt: ...


@dataclasses.dataclass(frozen=True)
class Asked:
    """What one sample is to be; `negative` is what guidance steers away from."""

    text: str
    plan: str = ''
    negative: bool = False
    states: np.ndarray | None = None  # of the text encoder, where they are known


@dataclasses.dataclass(frozen=True)
class Readers:
    """Host side of all that reads prompts; None where a system lacks one."""

    mllm: Encoder | None
    text_encoder: TextTokenizer | None
    text_dropout: float = 0.0
    pooled_encoder: TextTokenizer | None = None

    def texts(self, task: str, asked: Sequence[Asked]) -> Texts:
        chats = None
        if self.mllm is not None:
            chats = self.mllm.prompts([self.mllm.chat(task, a.text, a.plan) for a in asked])
        pooled = _tokens(self.pooled_encoder, asked)
        return Texts(mllm=chats, encoder=self.tokens(asked), pooled=pooled)

    def tokens(self, asked: Sequence[Asked]) -> EncoderPrompt | EncoderStates | None:
        return _tokens(self.text_encoder, asked)


def _tokens(tokenizer: TextTokenizer | None, asked: Sequence[Asked]) -> EncoderPrompt | None:
    if tokenizer is None:
        return None
    rows = [(tokenizer.negative if a.negative else tokenizer.prompt)(a.text) for a in asked]
    return tokenizer.batch(rows)


@dataclasses.dataclass(frozen=True)
class CachedReaders(Readers):
    """Where the text encoder's states are stored: its work is done."""

    negative: np.ndarray | None = None  # states (L, D) of a prompt that was dropped
    size: int = 0  # tokens that the DiT gets

    def tokens(self, asked: Sequence[Asked]) -> EncoderStates | None:
        if self.negative is None:
            return None
        states = [self.negative if a.states is None else a.states for a in asked]
        states_BLD = np.zeros((len(states), self.size, states[0].shape[1]), states[0].dtype)
        for row, states_LD in enumerate(states):
            states_BLD[row, : len(states_LD)] = states_LD
        length_B = np.array([len(states_LD) for states_LD in states], np.int32)
        return EncoderStates(states_BLD=states_BLD, length_B=length_B)


def _common(buckets: tuple[int, ...]) -> tuple[int, ...]:
    """A process sees its own rows only: several might choose several buckets for one batch."""
    return buckets if jax.process_count() == 1 else (max(buckets),)


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample of any task, as a source gives it: text, and what the VAE will see.

    `pixels` is (F, H, W, 3) uint8; `plan` is what the MLLM could have said before it draws this.
    A feature cache gives what became of them instead: latents (T, H, W, C), and the states (L, D)
    of the text encoder.
    """

    text: str
    pixels: np.ndarray | None = None
    plan: str = ''
    latents: np.ndarray | None = None
    states: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class TextRecord:
    """One turn of a conversation, with uint8 (H, W, 3) pictures in front of the user's words."""

    user: str
    assistant: str
    pictures: tuple[np.ndarray, ...] = ()


def diffusion_batch(readers: Readers, task: str, records: Sequence[Record], lots) -> Batch:
    """`lots` are uniform numbers, one a record: below `text_dropout` the text is taken away.

    That trains the unconditional branch of guidance; pictures in the prompt stay.
    """
    asked = [
        Asked(record.text, record.plan, states=record.states)
        if lot >= readers.text_dropout
        else Asked('', negative=True)
        for record, lot in zip(records, lots, strict=True)
    ]
    pixels = [record.pixels for record in records if record.pixels is not None]
    latents = [record.latents for record in records if record.latents is not None]
    # One latent frame for pictures: the count of latent frames is the VAE's to say, from F.
    clean_BT = np.zeros((len(records), 1), np.float32)
    return Batch(
        texts=readers.texts(task, asked),
        visual=Visual(clean_BT=clean_BT),
        pixels_BFHWC=np.stack(pixels).astype(np.float32) / 127.5 - 1 if pixels else None,
        latents_BTHWC=np.stack(latents) if latents else None,
    )


def text_batch(encoder: Encoder, task: str, records: Sequence[TextRecord], lots) -> TextBatch:
    """The loss is on the assistant's words and its end of sequence.

    Either all records of a task show pictures, or none does.
    """
    del task, lots
    media = [encoder.see(record.pictures) for record in records]
    chats, answers = zip(
        *(
            encoder.tokenizer.chat(record.user, record.assistant, media=shown)
            for record, shown in zip(records, media, strict=True)
        ),
        strict=True,
    )
    prompt = encoder.prompts(chats, media if records[0].pictures else None)
    weight_BL = np.zeros(prompt.ids_BL.shape, np.float32)
    for row, (ids, answer) in enumerate(zip(chats, answers, strict=True)):
        weight_BL[row, len(ids) - answer : len(ids)] = 1
    return TextBatch(prompt=prompt, weight_BL=weight_BL)


# What a training objective is fed with.
BATCHES: Mapping[str, Callable] = {'flow': diffusion_batch, 'next_token': text_batch}
