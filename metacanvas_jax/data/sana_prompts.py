"""SANA's prompts: what Gemma-2 reads, and which of its states the DiT gets (SANA, Sec. 3.1).

    <bos>{INSTRUCTION}{prompt}      a prompt to draw from
    <bos>{prompt}                   what guidance draws away from, as a rule the empty text

All of it is read, with room for `size` tokens of the prompt; the DiT gets the state of <bos> and
the last `size` - 1 of the padded row, which are those of the prompt. Ids, lengths and states are
those of diffusers' SanaPipeline, by default without its `clean_caption`.
"""

import dataclasses
import pathlib
import sys
import threading
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from metacanvas_jax.types import EncoderPrompt, InputError

SIZE = 300

# The published one, to the letter: SANA is trained with it.
INSTRUCTION = '\n'.join(
    [
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual "
        'descriptions suitable for image generation. Evaluate the level of detail in the user '
        'prompt:',
        '- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, '
        'textures, and spatial relationships to create vivid and concrete scenes.',
        '- If the prompt is already detailed, refine and enhance the existing details slightly '
        'without overcomplicating.',
        'Here are examples of how to transform or refine prompts:',
        '- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round '
        'shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red '
        'flowers.',
        '- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, '
        'featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a '
        'double-decker bus passing by towering glass skyscrapers.',
        'Please generate only the enhanced description for the prompt below and avoid including '
        'any additional commentary or evaluations:',
        'User Prompt: ',
    ]
)


@dataclasses.dataclass(frozen=True)
class Row:
    """The ids of one prompt, and to how many they are padded before the last ones are taken."""

    ids: list[int]
    room: int


class SanaTokenizer:
    """`truncated` counts the prompts that were longer than their room; the first one is said."""

    def __init__(
        self, directory: str | pathlib.Path, *, size: int = SIZE, instruction: str = INSTRUCTION
    ):
        path = pathlib.Path(directory) / 'tokenizer.json'
        if not path.is_file():
            raise InputError(f'no tokenizer.json in {directory}')
        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        pad, start = (self._tokenizer.token_to_id(token) for token in ('<pad>', '<bos>'))
        if pad is None or start is None:
            raise InputError(f"{path} lacks Gemma's <pad> or <bos>")
        if (empty := self._ids('')) != [start]:
            raise InputError(f'{path} makes {empty} of an empty text, not <bos> alone ([{start}])')
        self._pad, self._size, self._instruction = pad, size, instruction
        # Less 2: <bos>, for which `size` has room already, and the last space, which melts into the
        # first word of the prompt.
        self._room = len(self._ids(instruction)) - 2 + size if instruction else size
        self._lock = threading.Lock()
        self.truncated = 0

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def prompt(self, text: str) -> Row:
        return self._row(text, self._instruction, self._room)

    def negative(self, text: str = '') -> Row:
        return self._row(text, '', self._size)

    def _row(self, text: str, instruction: str, room: int) -> Row:
        ids = self._ids(instruction + text.lower().strip())
        if (over := len(ids) - room) > 0:
            with self._lock:
                self.truncated += 1
                first = self.truncated == 1
            if first:
                print(
                    f'SANA reads {self._size} tokens of a prompt; cut {over} off the end of '
                    f'{text[:40]!r}..., and longer ones after it in silence',
                    file=sys.stderr,
                )
        return Row(ids[:room], room)

    def batch(self, rows: Sequence[Row]) -> EncoderPrompt:
        """Rows of either kind, so that one program serves both sides of guidance, and dropout."""
        ids_BU = np.full((len(rows), max(self._room, self._size)), self._pad, np.int32)
        taken_BL = np.zeros((len(rows), self._size), np.int32)  # the first of all is <bos>
        for i, row in enumerate(rows):
            ids_BU[i, : len(row.ids)] = row.ids
            taken_BL[i, 1:] = np.arange(row.room - self._size + 1, row.room)
        length_B = np.array([len(row.ids) for row in rows], np.int32)
        return EncoderPrompt(
            ids_BU=ids_BU,
            length_B=length_B,
            taken_BL=taken_BL,
            context_length_B=(taken_BL < length_B[:, None]).sum(1, dtype=np.int32),
        )


class NoWords(SanaTokenizer):
    """Every prompt is read as the empty one: the paper's canvas without text (App. B.1)."""

    def prompt(self, text: str) -> Row:
        del text
        return self.negative()

    def negative(self, text: str = '') -> Row:
        del text
        return super().negative()


# config.text_encoder.reads -> class
READS = {'prompt': SanaTokenizer, 'nothing': NoWords}
