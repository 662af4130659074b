"""Texts as rows of ids of one length: cut before their end token, padded behind it."""

import pathlib
import sys
import threading
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from metacanvas_jax.types import InputError


class PaddedTokenizer:
    """`truncated` counts the texts that were longer than `size` tokens; the first one is said.

    `reader` is what the message calls the encoder, `pad` and `end` are its tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, reader: str, size: int, pad: str, end: str):
        self._tokenizer, self._reader, self._size = tokenizer, reader, size
        tokenizer.no_padding()
        tokenizer.no_truncation()
        padding, ending = (tokenizer.token_to_id(token) for token in (pad, end))
        if padding is None or ending is None:
            raise InputError(f'the tokenizer of {reader} lacks {pad} or {end}')
        self._pad, self._end = padding, ending
        if (empty := self._ids(''))[-1:] != [self._end]:
            raise InputError(f'the tokenizer of {reader} ends an empty text as {empty}, not {end}')
        self._lock = threading.Lock()
        self.truncated = 0

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def row(self, text: str) -> list[int]:
        ids = self._ids(text)
        if (over := len(ids) - self._size) <= 0:
            return ids
        with self._lock:
            self.truncated += 1
            first = self.truncated == 1
        if first:
            print(
                f'{self._reader} reads {self._size} tokens of a prompt; cut {over} off the end of '
                f'{text[:40]!r}..., and longer ones after it in silence',
                file=sys.stderr,
            )
        return [*ids[: self._size - 1], self._end]

    def batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (B, size) and true lengths."""
        rows = [self.row(text) for text in texts]
        ids_BU = np.full((len(rows), self._size), self._pad, np.int32)
        for i, row in enumerate(rows):
            ids_BU[i, : len(row)] = row
        return ids_BU, np.array([len(row) for row in rows], np.int32)


def t5_tokenizer(directory: str | pathlib.Path, *, reader: str, size: int) -> PaddedTokenizer:
    """From the tokenizer.json of a T5 or UMT5, to the letter."""
    path = pathlib.Path(directory) / 'tokenizer.json'
    if not path.is_file():
        raise InputError(f'no tokenizer.json in {directory}; {reader} wants that of its T5')
    tokenizer = Tokenizer.from_file(str(path))
    return PaddedTokenizer(tokenizer, reader=reader, size=size, pad='<pad>', end='</s>')
