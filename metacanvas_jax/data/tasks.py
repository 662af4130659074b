"""Tasks end here: one row each, one function that turns records into a batch.

The model sees arrays and masks and cannot ask which task it is.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from metacanvas_jax.data.media import Media, see_image, see_video, spread, square
from metacanvas_jax.data.prompts import ChatTokenizer, make_prompts
from metacanvas_jax.data.records import Record, TextRecord
from metacanvas_jax.data.visuals import Visuals, to_float
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
    """A row of spec.md section 1.2: what the MLLM sees, what the DiT is given besides noise.

    `template` is the user's turn (section 1.3), behind what is `seen`. Both names are of what a
    record holds; a `clip` is a source that moves.
    """

    template: str
    seen: str | None = None  # first | source | clip | references
    given: str | None = None  # first | source | references
    video: bool = False

    def prompt(self, text: str) -> str:
        return self.template.replace('{}', text)


_CAPTION = 'based on the following caption: {}'
TASKS = {
    't2i': Task(f'Please generate image {_CAPTION}'),
    # The DiT is given nothing: what it must draw comes through the MLLM alone.
    'recon': Task('\nPlease reconstruct the given image.', 'first'),
    'edit': Task('\n{}', 'source', 'source'),
    't2v': Task(f'Please generate video {_CAPTION}', video=True),
    'i2v': Task(
        f'\nPlease animate the given image into a video {_CAPTION}', 'first', 'first', video=True
    ),
    'v2v': Task('\n{}', 'clip', 'source', video=True),
    'r2v': Task('\n{}', 'references', 'references', video=True),
}

# Task.seen or given -> whether a record lacks it, and what it then wants
_WANTED: Mapping[str, tuple[Callable[[Record], bool], str]] = {
    'first': (lambda record: record.first is None, 'a first frame'),
    'source': (lambda record: record.source is None, 'a source to edit'),
    'clip': (lambda record: record.fps is None, 'the frames per second of its source'),
    'references': (lambda record: not record.references, 'references'),
}


def find_task(record: Record, *, moves: bool) -> str:
    """What a record to draw from asks for, by what it shows."""
    if record.source is not None:
        return 'v2v' if moves else 'edit'
    if record.references:
        return 'r2v'
    if record.first is not None:
        return 'i2v'
    return 't2v' if moves else 't2i'


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
    side: int | None = None  # of the squares that pictures to draw from become; None: shape kept
    frames: int = 8  # that it sees of a video to draw from

    def chat(self, task: str, text: str, plan: str, shown: Sequence[Media] = ()) -> list[int]:
        """A prompt to draw from: its response is the plan, or empty, as in the paper."""
        if self.max_text is not None:
            text = self.tokenizer.cut(text, self.max_text)
        response = plan if self.plan_tokens else ''
        return self.tokenizer.chat(TASKS[task].prompt(text), response, media=shown)[0]

    def show(self, task: str, record: Record) -> list[Media]:
        """What of a record the MLLM sees in front of such a prompt."""
        seen = TASKS[task].seen
        return [] if seen is None else _SHOW[seen](self, record)

    def squares(self, pictures: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return pictures if self.side is None else [square(p, self.side) for p in pictures]

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


def _show_clip(encoder: Encoder, record: Record) -> list[Media]:
    assert record.source is not None
    assert record.fps is not None
    total = len(record.source)
    at = spread(total, encoder.frames)
    frames = np.stack(encoder.squares([*record.source[at]]))
    return [encoder.watch(frames, record.fps * len(at) / total)]


# Task.seen -> media
_SHOW: Mapping[str, Callable[[Encoder, Any], list[Media]]] = {
    'first': lambda encoder, record: encoder.see(encoder.squares([record.first])),
    'source': lambda encoder, record: encoder.see(encoder.squares(record.source)),
    'clip': _show_clip,
    'references': lambda encoder, record: encoder.see(encoder.squares(record.references)),
}


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
    shown: Sequence[Media] = ()  # what the MLLM sees; without text too


@dataclasses.dataclass(frozen=True)
class Readers:
    """Host side of all that reads prompts; None where a system lacks one."""

    mllm: Encoder | None
    text_encoder: TextTokenizer | None
    visuals: Visuals
    text_dropout: float = 0.0
    pooled_encoder: TextTokenizer | None = None

    def tasks(self) -> list[str]:
        """Those that the DiT has a way in for."""
        moves = self.visuals.bucket.frames > 1
        ways = self.visuals.entrances
        return [
            name for name, task in TASKS.items() if task.given in ways and (moves or not task.video)
        ]

    def fit(self, name: str, record: Record) -> Record:
        """The record as all shall see it; refuses one that lacks what the task wants."""
        check_tasks([name])
        if name not in self.tasks():
            raise InputError(f'this system has no task {name!r}; it has: {", ".join(self.tasks())}')
        task, bucket = TASKS[name], self.visuals.bucket
        record = bucket.fit(record, bucket.frames if task.video else 1)
        for field in filter(None, (task.given, task.seen)):
            lacks, what = _WANTED[field]
            if lacks(record):
                raise InputError(f'task {name!r} wants {what}; none is given')
        return record

    def show(self, name: str, record: Record) -> Sequence[Media]:
        return () if self.mllm is None else self.mllm.show(name, record)

    def visual(self, name: str, records: Sequence[Record]) -> Visual:
        """Of records that fit."""
        task = TASKS[name]
        frames = self.visuals.bucket.latent_frames if task.video else 1
        return self.visuals.see(task.given, records, frames)

    def texts(self, task: str, asked: Sequence[Asked]) -> Texts:
        chats, encoder = None, self.mllm
        if encoder is not None:
            media = [a.shown for a in asked]
            chats = encoder.prompts(
                [encoder.chat(task, a.text, a.plan, a.shown) for a in asked],
                None if TASKS[task].seen is None else media,
            )
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


def diffusion_batch(readers: Readers, task: str, records: Sequence[Record], lots) -> Batch:
    """`lots` are uniform numbers, one a record: below `text_dropout` the text is taken away.

    That trains the unconditional branch of guidance; pictures in the prompt stay.
    """
    records = [readers.fit(task, record) for record in records]
    asked = [
        Asked(record.text, record.plan, states=record.states, shown=readers.show(task, record))
        if lot >= readers.text_dropout
        else Asked('', negative=True, shown=readers.show(task, record))
        for record, lot in zip(records, lots, strict=True)
    ]
    pixels = [record.pixels for record in records if record.pixels is not None]
    latents = [record.latents for record in records if record.latents is not None]
    return Batch(
        texts=readers.texts(task, asked),
        visual=readers.visual(task, records),
        pixels_BFHWC=to_float(pixels) if pixels else None,
        latents_BTHWC=np.stack(latents) if latents else None,
    )


def text_batch(
    encoder: Encoder, task: str, records: Sequence[TextRecord | Record], lots
) -> TextBatch:
    """The loss is on the assistant's words and its end of sequence.

    Of what could be drawn, the assistant's words are the plan. Either all records of a task show
    something, or none does.
    """
    del lots
    users, assistants, media = zip(
        *(_turn(encoder, task, record) for record in records), strict=True
    )
    chats, answers = zip(
        *(
            encoder.tokenizer.chat(user, assistant, media=shown)
            for user, assistant, shown in zip(users, assistants, media, strict=True)
        ),
        strict=True,
    )
    prompt = encoder.prompts(chats, media if media[0] else None)
    weight_BL = np.zeros(prompt.ids_BL.shape, np.float32)
    for row, (ids, answer) in enumerate(zip(chats, answers, strict=True)):
        weight_BL[row, len(ids) - answer : len(ids)] = 1
    return TextBatch(prompt=prompt, weight_BL=weight_BL)


def _turn(encoder: Encoder, task: str, record: TextRecord | Record) -> tuple[str, str, list[Media]]:
    """(user, assistant, what is shown)"""
    if isinstance(record, TextRecord):
        return record.user, record.assistant, encoder.see(record.pictures)
    return TASKS[task].prompt(record.text), record.plan, encoder.show(task, record)


# What a training objective is fed with.
BATCHES: Mapping[str, Callable] = {'flow': diffusion_batch, 'next_token': text_batch}
