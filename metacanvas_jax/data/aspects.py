"""Batches of one size out of pictures of many: aspect buckets (spec.md section 7.2)."""

import collections
import hashlib
import os
import pathlib
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from metacanvas_jax.data.media import picture_size
from metacanvas_jax.data.samples import Rows, Sample
from metacanvas_jax.types import InputError

Size = tuple[int, int]  # height, width


def in_blocks(order: Sequence[int], bucket: Mapping[int, Hashable], size: int) -> np.ndarray:
    """The order, but so that every `size` indices in a row are of one bucket.

    All are there; the last block of a bucket is filled up from its first ones.
    """
    queues: dict[Hashable, list[int]] = collections.defaultdict(list)
    members: dict[Hashable, list[int]] = collections.defaultdict(list)
    found: list[int] = []
    for index in order:
        queue = queues[bucket[index]]
        queue.append(index)
        members[bucket[index]].append(index)
        if len(queue) == size:
            found += queue
            queue.clear()
    for key, queue in queues.items():
        if queue:
            found += np.resize(queue + members[key], size).tolist()
    return np.array(found, np.int64)


def sizes_of(samples: Sequence[Sample], fingerprint: str) -> list[Size | str]:
    """Of the picture that is edited, or else drawn; or why it has none. From columns or headers.

    They are kept in the user's cache: of parquet without such columns all pictures must be read.
    """
    kept = _kept(fingerprint)
    known = np.load(kept) if kept.exists() else np.zeros((len(samples), 2), np.int32)
    found: list[Size | str] = [(int(height), int(width)) for height, width in known]
    todo = np.flatnonzero(known[:, 0] == 0).tolist()  # or broken: the reason is found again
    with ThreadPoolExecutor(16) as pool:
        for at, size in zip(todo, pool.map(lambda at: _size(samples, at), todo), strict=True):
            found[at] = size
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_name(f'.{os.getpid()}.{kept.name}')
        np.save(temporary, np.array([(0, 0) if isinstance(s, str) else s for s in found], np.int32))
        temporary.replace(kept)
    return found


def _kept(fingerprint: str) -> pathlib.Path:
    home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    name = hashlib.sha256(fingerprint.encode()).hexdigest()[:16]
    return pathlib.Path(home, 'metacanvas', 'sizes', f'{name}.npy')


def _size(samples: Sequence[Sample], at: int) -> Size | str:
    if isinstance(samples, Rows) and (told := samples.size(at)) is not None:
        return told
    sample = samples[at]
    place = sample.source or sample.target
    try:
        if place is None:
            raise InputError(f'{sample.name} has no picture')
        with place.open() as file:
            return picture_size(file, sample.name)
    except (InputError, OSError) as error:
        return str(error)
