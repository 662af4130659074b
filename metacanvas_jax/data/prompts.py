"""Prompts: Qwen's chat template, token ids and MRoPE positions, on the host.

    <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n
    <|im_start|>user\n{MEDIA}{USER}<|im_end|>\n
    <|im_start|>assistant\n{RESPONSE}<|im_end|>            then the canvas tokens

MEDIA is <|vision_start|><|image_pad|>...<|vision_end|> for each picture, with <|video_pad|> for a
video; a pad token stands for each vision token. The last prompt token is always the end of sequence
(Sec. 3.2), also with an empty response.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from metacanvas_jax.data.media import Media
from metacanvas_jax.mllm.config import QwenConfig
from metacanvas_jax.mllm.positions import prefix_positions
from metacanvas_jax.mllm.windows import VisionBuckets, pack
from metacanvas_jax.types import InputError, Prompt

SYSTEM = 'You are a helpful assistant.'


class ChatTokenizer:
    """What users type stays text: `<|im_end|>` in it is spelled out, never a special token."""

    def __init__(self, directory: str | pathlib.Path):
        path = pathlib.Path(directory) / 'tokenizer.json'
        if not path.is_file():
            raise InputError(f'no tokenizer.json in {directory}')
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if missing := [token for token in _SPECIAL if token not in vocabulary]:
            raise InputError(f"{path} lacks Qwen's special tokens {missing}")
        self.start, self.end, self.pad, *vision = (vocabulary[token] for token in _SPECIAL)
        self._vision_start, self._vision_end, self._image, self._video = vision

    def text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def cut(self, text: str, size: int) -> str:
        """The start of a text that is longer than `size` tokens."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return text if len(offsets) <= size else text[: offsets[size - 1][1]]

    def _turn(self, role: str, text: str) -> list[int]:
        return [self.start, *self.text(f'{role}\n{text}'), self.end]

    def _shown(self, user: str, media: Sequence[Media]) -> list[int]:
        ids = [self.start, *self.text('user\n')]
        for medium in media:
            pad = self._image if medium.seconds_per_grid is None else self._video
            ids += [self._vision_start, *[pad] * medium.tokens, self._vision_end]
        return [*ids, *self.text(user), self.end]

    def chat(
        self, user: str, response: str = '', *, media: Sequence[Media] = ()
    ) -> tuple[list[int], int]:
        """Ids up to the end of sequence, and how many of them are the response and its end."""
        newline = self.text('\n')
        turn = self._shown(user, media) if media else self._turn('user', user)
        asked = [*self._turn('system', SYSTEM), *newline, *turn, *newline]
        answer = self._turn('assistant', response)
        header = 1 + len(self.text('assistant\n'))
        return asked + answer, len(answer) - header


_SPECIAL = ('<|im_start|>', '<|im_end|>', '<|endoftext|>')
_SPECIAL += ('<|vision_start|>', '<|vision_end|>', '<|image_pad|>', '<|video_pad|>')


def make_prompts(
    chats: Sequence[Sequence[int]],
    config: QwenConfig,
    *,
    pad: int,
    buckets: Sequence[int],
    rule: str = 'legacy',
    media: Sequence[Sequence[Media]] | None = None,
    vision_buckets: VisionBuckets | None = None,
) -> Prompt:
    """Chats of unequal length as one right-padded Prompt of the smallest bucket that holds them.

    `media` are what each chat shows, in its order. None makes the program for text alone, empty
    lists the one for pictures too: a batch of one process has the program of all others.
    """
    longest = max(map(len, chats))
    size = next((bucket for bucket in sorted(buckets) if bucket >= longest), None)
    if size is None:
        raise InputError(
            f'a prompt has {longest} tokens, the largest bucket holds {max(buckets)}; '
            'shorten it or add a bucket to config.prompt.buckets'
        )
    ids_BL = np.full((len(chats), size), pad, np.int32)
    positions_B3L = np.zeros((len(chats), 3, size), np.int32)
    start_B = np.zeros(len(chats), np.int32)
    for row, (ids, shown) in enumerate(zip(chats, media or [()] * len(chats), strict=True)):
        ids_BL[row, : len(ids)] = ids
        videos = [(m.grid, m.seconds_per_grid) for m in shown if m.seconds_per_grid is not None]
        positions, start_B[row] = prefix_positions(
            ids,
            config,
            image_grids=[m.grid for m in shown if m.seconds_per_grid is None],
            video_grids=[grid for grid, _ in videos],
            seconds_per_grid=[seconds for _, seconds in videos],
            rule=rule,
        )
        positions_B3L[row, :, : len(ids)] = positions
    vision = None
    if media is not None:
        assert vision_buckets
        vision = pack(
            [[(m.patches, m.grid) for m in shown] for shown in media],
            ids_BL,
            config,
            vision_buckets,
        )
    return Prompt(
        ids_BL=ids_BL,
        positions_B3L=positions_B3L,
        length_B=np.array([len(ids) for ids in chats], np.int32),
        start_B=start_B,
        vision=vision,
    )
