"""Latents and text features of a data set, computed once and read in place of its pictures.

FOLDER/KEY/key.json             all that the features depend on; KEY is its digest
FOLDER/KEY/negative.safetensors what the text encoder makes of a prompt that was dropped
FOLDER/KEY/000000.safetensors   SHARD records: latents, captions, and states end to end

A shard is whole or not there, so a cache that was interrupted goes on where it stopped.
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (safetensors reads bfloat16 only when this is imported first)
import numpy as np
import safetensors.numpy
from safetensors import safe_open

from metacanvas_jax.data.records import Record

SHARD = 256
NEGATIVE = 'negative.safetensors'


class FeatureCache:
    """Records by index, as the data set itself has them, with features and without pixels."""

    def __init__(self, folder: str | os.PathLike[str], key: Mapping[str, Any], count: int):
        text = json.dumps(key, indent=2, sort_keys=True)
        self.path = pathlib.Path(folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        self._count = count
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / 'key.json', lambda path: path.write_text(f'{text}\n', encoding='utf-8'))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        shard, captions = _open(self.path / f'{index // SHARD:06}.safetensors')
        row, states = index % SHARD, None
        if 'states' in shard.keys():  # noqa: SIM118  (it is no mapping)
            start, stop = shard.get_slice('start')[row : row + 2].tolist()
            states = shard.get_slice('states')[start:stop]
        return Record(captions[row], latents=shard.get_slice('latents')[row], states=states)

    def has_negative(self) -> bool:
        return (self.path / NEGATIVE).exists()

    def negative(self) -> np.ndarray:
        """States (L, D)."""
        return safetensors.numpy.load_file(self.path / NEGATIVE)['states']

    # ------------------------------------------------------------ to fill it

    def missing(self) -> list[range]:
        """The indices of each shard that is not there."""
        shards = [range(i, min(i + SHARD, self._count)) for i in range(0, self._count, SHARD)]
        return [shard for shard in shards if not self._shard(shard).exists()]

    def write(
        self,
        shard: range,
        captions: Sequence[str],
        latents_BTHWC: np.ndarray,
        states: Sequence[np.ndarray],
    ) -> None:
        """`states` are (L, D) each, of unequal lengths; none of a system without text encoder."""
        assert len(shard) == len(captions) == len(latents_BTHWC)
        assert len(states) in (0, len(shard))
        arrays = {'latents': latents_BTHWC}
        if states:
            arrays['states'] = np.concatenate(states)
            arrays['start'] = np.cumsum([0, *map(len, states)], dtype=np.int64)
        told = {'captions': json.dumps(list(captions))}
        _write(
            self._shard(shard),
            lambda path: safetensors.numpy.save_file(arrays, path, metadata=told),
        )

    def write_negative(self, states_LD: np.ndarray) -> None:
        _write(
            self.path / NEGATIVE,
            lambda path: safetensors.numpy.save_file({'states': states_LD}, path),
        )

    def _shard(self, shard: range) -> pathlib.Path:
        return self.path / f'{shard.start // SHARD:06}.safetensors'


@functools.lru_cache(maxsize=256)
def _open(path: pathlib.Path) -> tuple[Any, list[str]]:
    """A shard and its captions."""
    shard = safe_open(path, 'np')
    return shard, json.loads(shard.metadata()['captions'])


def _write(path: pathlib.Path, save) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f'.{os.getpid()}.{path.name}')
    save(temporary)
    temporary.replace(path)
