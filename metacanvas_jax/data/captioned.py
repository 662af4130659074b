"""Captioned pictures as they are published: tars of webdataset, parquet, or a dataset.jsonl.

Tars hold NAME.jpg (or .jpeg, .png, .webp) and NAME.txt beside it, as BLIP3o-60k does. Their members
are listed once and then read where they lie; nothing is extracted. A parquet file has a column of
pictures and one of captions. A line of dataset.jsonl is
    {"task": "t2i", "prompt": "a red circle", "target": "pictures/0.png"}
with the target relative to the file, or tar://SHARD.tar#MEMBER, or parquet://FILE.parquet#ROW.
"""

import collections
import dataclasses
import functools
import hashlib
import io
import json
import pathlib
import sys
import tarfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from metacanvas_jax.data.media import cover, decode_image
from metacanvas_jax.data.parquet import KEPT, Cell, Kept, Parquet
from metacanvas_jax.data.records import Record
from metacanvas_jax.types import InputError

PICTURES = ('jpg', 'jpeg', 'png', 'webp')
CAPTION = 'txt'
MANIFEST = 'dataset.jsonl'
WINDOW = KEPT // 2  # bytes of pictures in parquet that are shuffled together
BROKEN = 0.05  # more of all samples than this: something is wrong with the data


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """Some bytes of a file; all of them without a size."""

    file: pathlib.Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        # Opened each time: no file is shared by threads, and shards may be many.
        with open(self.file, 'rb') as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    name: str
    picture: Part | Cell | None
    caption: Part | Cell | str | None


def find_samples(
    path: str | pathlib.Path, columns: Mapping[str, str | None] | None = None
) -> Sequence[Sample]:
    """In a tar, a parquet file, a dataset.jsonl, or a folder of such; always in the same order.

    `columns` may name those of parquet files: {'picture': name, 'caption': name}.
    """
    path, columns = pathlib.Path(path), columns or {}
    if not path.exists():
        raise InputError(f'no such file or folder: {path}')
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return list(_lines(path / MANIFEST, columns))
        tars, tables = (sorted(path.rglob(f'*.{kind}')) for kind in ('tar', 'parquet'))
        if not tars and not tables:
            raise InputError(f'{path} holds neither {MANIFEST} nor .tar or .parquet files')
        if tars and tables:
            raise InputError(
                f'{path} holds {len(tars)} .tar and {len(tables)} .parquet files; give a folder '
                'of one kind'
            )
    elif path.suffix == '.jsonl':
        return list(_lines(path, columns))
    else:
        tars, tables = ([], [path]) if path.suffix == '.parquet' else ([path], [])
    with ThreadPoolExecutor(min(16, len(tars) + len(tables))) as pool:
        if tables:
            kept = Kept()
            return Rows(pool.map(lambda table: Parquet(table, kept), tables), columns)
        return [sample for found in pool.map(_shard, tars) for sample in found]


def list_tar(path: pathlib.Path) -> dict[str, Part]:
    """{member: its place}; of two with one name the later counts, as in tar itself."""
    members = {}
    try:
        with tarfile.open(path, 'r:') as tar:
            for member in tar:
                if member.isreg():
                    members[member.name] = Part(path, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise InputError(f'{path} is no tar that can be read in place: {reason}') from error
    return members


def _shard(path: pathlib.Path) -> list[Sample]:
    groups: dict[str, dict[str, Part]] = {}
    kinds: collections.Counter[str] = collections.Counter()
    for member, part in list_tar(path).items():
        folder, _, file = member.rpartition('/')
        stem, _, kind = file.partition('.')
        groups.setdefault(f'{folder}/{stem}', {})[kind.lower()] = part
        kinds[kind.lower()] += 1
    if not kinds[CAPTION] or not any(kinds[kind] for kind in PICTURES):
        found = ', '.join(f'.{kind} ({n})' for kind, n in kinds.most_common()) or 'nothing'
        want = ', .'.join(PICTURES)
        raise InputError(f'{path} wants NAME.{CAPTION} beside NAME.{want}; it holds {found}')
    samples = (
        Sample(
            f'{path}#{name.removeprefix("/")}',
            next((parts[kind] for kind in PICTURES if kind in parts), None),
            parts.get(CAPTION),
        )
        for name, parts in groups.items()
    )
    return [sample for sample in samples if sample.picture or sample.caption]


class Rows(Sequence[Sample]):
    """Those of parquet files, which may be many: a sample is made when it is asked for."""

    def __init__(self, files: Iterable[Parquet], columns: Mapping[str, str | None]):
        self._files = [
            (file, file.column('picture', columns), file.column('caption', columns))
            for file in files
        ]
        self._ends = np.cumsum([len(file) for file, *_ in self._files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = int(np.searchsorted(self._ends, index, 'right'))
        file, picture, caption = self._files[at]
        row = int(index - self._ends[at]) + len(file)
        return Sample(f'{file.path}#{row}', Cell(file, row, picture), Cell(file, row, caption))

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Indices. Row groups in any order, then the rows of as many as memory holds at once.

        A row costs as much to read as its row group does: so each group is read once.
        """
        lengths = np.concatenate([file.lengths for file, *_ in self._files])
        sizes = np.concatenate([file.sizes(picture) for file, picture, _ in self._files])
        order = rng.permutation(len(lengths))
        starts = np.cumsum(lengths) - lengths
        rows = np.concatenate([starts[group] + np.arange(int(lengths[group])) for group in order])
        window = np.repeat(np.cumsum(sizes[order]) // WINDOW, lengths[order])
        return rows[np.lexsort((rng.random(len(rows)), window))]


def _lines(path: pathlib.Path, columns: Mapping[str, str | None]) -> Iterator[Sample]:
    """Lines of other tasks are for other sources."""
    kept = Kept()
    tar = functools.cache(list_tar)
    table = functools.cache(lambda file: Parquet(file, kept))
    count = 0
    try:
        lines = path.read_text(encoding='utf-8').split('\n')
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f'cannot read {path}: {error}') from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f'{path}, line {number}'
        try:
            values = json.loads(line)
            task, target = values['task'], values['target']
            caption = values.get('prompt')
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f'{where}: want an object with task and target: {error!r}') from error
        if task != 't2i':
            continue
        if not isinstance(target, str) or not isinstance(caption, str | None):
            raise InputError(f'{where}: target and prompt want to be texts')
        count += 1
        if target.startswith('tar://'):
            shard, _, member = target.removeprefix('tar://').partition('#')
            picture = tar(path.parent / shard).get(member)
        elif target.startswith('parquet://'):
            shard, _, row = target.removeprefix('parquet://').rpartition('#')
            file = table(path.parent / shard)
            there = row.isdecimal() and int(row) < len(file)
            picture = Cell(file, int(row), file.column('picture', columns)) if there else None
        else:
            picture = Part(path.parent / target)
        yield Sample(f'{where} ({target})', picture, caption)
    if not count:
        raise InputError(f'{path} has no line of task t2i')


class CaptionedPictures:
    """Records in an order shuffled by `seed`, all pictures resized and cropped to one size.

    A broken sample is replaced by the next one that is whole: what stands at an index depends on
    the data and the seed alone. `broken` are those met so far, {name: reason}, each said once.
    """

    def __init__(self, samples: Sequence[Sample], *, height: int, width: int, seed: int):
        if not samples:
            raise InputError('there are no captioned pictures')
        self._samples, self._size = samples, (height, width)
        rng = np.random.default_rng(seed)
        self._order = (
            samples.shuffled(rng) if isinstance(samples, Rows) else rng.permutation(len(samples))
        )
        self._lock = threading.Lock()
        self.broken: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Record:
        for step in range(len(self)):
            sample = self._samples[self._order[(index + step) % len(self)]]
            try:
                return self._read(sample)
            except (InputError, OSError) as error:
                self._note(sample.name, str(error))
        raise InputError(f'all {len(self)} samples are broken; {self._some()}')

    @property
    def fingerprint(self) -> str:
        """A digest of what stands at each index, and of the files that it lies in."""
        digest, files = hashlib.sha256(repr(self._size).encode()), set()
        for index in self._order:
            sample = self._samples[index]
            known = sample.caption if isinstance(sample.caption, str) else None
            digest.update(repr((sample.name, known)).encode())
            files |= {getattr(part, 'file', None) for part in (sample.picture, sample.caption)}
        paths = {getattr(file, 'path', file) for file in files if file is not None}
        for path in sorted(paths):
            stat = path.stat() if path.exists() else None
            digest.update(repr(stat and (path, stat.st_size, stat.st_mtime_ns)).encode())
        return digest.hexdigest()

    def _read(self, sample: Sample) -> Record:
        caption = sample.caption
        if caption is None:
            raise InputError(f'{sample.name} has no caption')
        if sample.picture is None:
            raise InputError(f'{sample.name} has no picture')
        if not isinstance(caption, str):
            try:
                caption = caption.read().decode()
            except UnicodeDecodeError as error:
                raise InputError(f'the caption of {sample.name} is no UTF-8') from error
        if not caption.strip():
            raise InputError(f'the caption of {sample.name} is empty')
        pixels = decode_image(io.BytesIO(sample.picture.read()), sample.name)
        return Record(text=caption.strip(), pixels=cover(pixels, *self._size)[None])

    def _note(self, name: str, reason: str) -> None:
        with self._lock:
            if name in self.broken:
                return
            self.broken[name] = reason
            count = len(self.broken)
        print(f'broken sample {count} of {len(self)}, replaced: {reason}', file=sys.stderr)
        if count > max(10, BROKEN * len(self)):
            raise InputError(f'{count} of {len(self)} samples are broken; {self._some()}')

    def _some(self) -> str:
        return '; '.join(list(self.broken.values())[:5])
