"""Samples of data sets as they are published, found where they lie; nothing is unpacked.

tar      NAME.jpg (.jpeg, .png, .webp) or NAME.mp4 (.webm, .mov, .mkv), and NAME.txt beside it, as
         in webdataset and BLIP3o-60k
parquet  columns of pictures and texts: a picture and its caption; OmniEdit's or HQ-Edit's source,
         instruction and target
csv      columns of files, which lie anywhere below the csv's own folder, and of texts: OpenVid-1M
json     metadata/NAME.json of GPT-Image-Edit-1.5M: objects with instruction, input and output. Its
         folders are read, and tars as if they were unpacked where they lie
jsonl    lines of a dataset.jsonl, of all tasks:
             {"task": "t2i", "prompt": "a red circle", "target": "pictures/0.png"}
         edit and v2v have a "source" too, r2v a list of "references". Files are relative to the
         dataset.jsonl, or tar://SHARD.tar#MEMBER, or parquet://FILE.parquet#ROW
"""

import collections
import csv
import dataclasses
import functools
import json
import pathlib
import posixpath
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from metacanvas_jax.data.columns import TEXTS, find_column
from metacanvas_jax.data.parquet import KEPT, Cell, Kept, Parquet
from metacanvas_jax.data.places import Part, Place, list_tar
from metacanvas_jax.types import InputError

MANIFEST = 'dataset.jsonl'
PICTURES = ('jpg', 'jpeg', 'png', 'webp')
VIDEOS = ('mp4', 'webm', 'mov', 'mkv')
CAPTION = 'txt'
WINDOW = KEPT // 2  # bytes of pictures in parquet that are shuffled together

Columns = Mapping[str, str | None]  # config.data.columns: {role: name}


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    name: str
    target: Place | None
    caption: Place | str | None
    source: Place | None = None
    references: tuple[Place | None, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """Tasks that are drawn from the same samples; the first one names it."""

    tasks: tuple[str, ...]
    roles: Mapping[str, str]  # field of a sample -> role of its column
    video: bool = False
    references: bool = False

    @property
    def name(self) -> str:
        return self.tasks[0]

    @property
    def suffixes(self) -> tuple[str, ...]:
        return VIDEOS if self.video else PICTURES


_EDIT = {'target': 'target', 'source': 'source', 'caption': 'instruction'}
_VIDEO = {'target': 'video', 'caption': 'caption'}
PICTURE = Kind(('t2i', 'recon'), {'target': 'picture', 'caption': 'caption'})
KINDS = (
    PICTURE,
    Kind(('edit',), _EDIT),
    Kind(('t2v', 'i2v'), _VIDEO, video=True),
    Kind(('v2v',), _EDIT, video=True),
    Kind(('r2v',), _VIDEO, video=True, references=True),
)


def find_samples(
    path: str | pathlib.Path, columns: Columns | None = None, kind: Kind = PICTURE
) -> Sequence[Sample]:
    """In a file or a folder of such, always in the same order; `columns` may name those of tables.

    A folder holds a dataset.jsonl, or at any depth files of one form.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise InputError(f'no such file or folder: {path}')
    form, files = _form(path, kind)
    if kind.references and form != 'jsonl':
        raise InputError(f'{path}: references are read from a {MANIFEST}, not from .{form}')
    with ThreadPoolExecutor(min(16, len(files))) as pool:
        return _READERS[form](files, columns or {}, kind, pool)


def _form(path: pathlib.Path, kind: Kind) -> tuple[str, list[pathlib.Path]]:
    """How its samples lie there, and the files to begin with."""
    if not path.is_dir():
        forms = {path.suffix[1:]: [path]} if path.suffix in ('.jsonl', '.csv', '.parquet') else {}
        forms = forms or {'tar': [path]}
    elif (path / MANIFEST).is_file():
        forms = {'jsonl': [path / MANIFEST]}
    else:
        forms = _below(path, 'tar', 'parquet') or _below(path, 'csv')
    if 'source' in kind.roles and not forms.keys() - {'tar'}:
        told = sorted(path.rglob('metadata/*.json')) if path.is_dir() else []
        if files := forms.pop('tar', []) + told:
            forms['json'] = files
    if not forms:
        raise InputError(f'{path} holds neither {MANIFEST} nor .csv, .tar or .parquet files')
    if len(forms) > 1:
        found = ' and '.join(f'{len(files)} .{form}' for form, files in forms.items())
        raise InputError(f'{path} holds {found} files; give a folder of one kind')
    return next(iter(forms.items()))


def _below(folder: pathlib.Path, *forms: str) -> dict[str, list[pathlib.Path]]:
    found = {form: sorted(folder.rglob(f'*.{form}')) for form in forms}
    return {form: files for form, files in found.items() if files}


# ------------------------------------------------------------ tar


def _shards(tars: Sequence[pathlib.Path], columns: Columns, kind: Kind, pool) -> list[Sample]:
    del columns
    return [sample for found in pool.map(lambda tar: _shard(tar, kind), tars) for sample in found]


def _shard(path: pathlib.Path, kind: Kind) -> list[Sample]:
    groups: dict[str, dict[str, Part]] = {}
    kinds: collections.Counter[str] = collections.Counter()
    for member, part in list_tar(path).items():
        folder, _, file = member.rpartition('/')
        stem, _, suffix = file.partition('.')
        groups.setdefault(f'{folder}/{stem}', {})[suffix.lower()] = part
        kinds[suffix.lower()] += 1
    if not kinds[CAPTION] or not any(kinds[suffix] for suffix in kind.suffixes):
        found = ', '.join(f'.{suffix} ({n})' for suffix, n in kinds.most_common()) or 'nothing'
        want = ', .'.join(kind.suffixes)
        raise InputError(f'{path} wants NAME.{CAPTION} beside NAME.{want}; it holds {found}')
    samples = (
        Sample(
            f'{path}#{name.removeprefix("/")}',
            next((parts[suffix] for suffix in kind.suffixes if suffix in parts), None),
            parts.get(CAPTION),
        )
        for name, parts in groups.items()
    )
    return [sample for sample in samples if sample.target or sample.caption]


# ------------------------------------------------------------ parquet


class Rows(Sequence[Sample]):
    """Those of parquet files, which may be many: a sample is made when it is asked for."""

    def __init__(self, files: Iterable[Parquet], columns: Columns, kind: Kind = PICTURE):
        self._files = [
            (file, {field: file.column(role, columns) for field, role in kind.roles.items()})
            for file in files
        ]
        self._ends = np.cumsum([len(file) for file, _ in self._files])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = int(np.searchsorted(self._ends, index, 'right'))
        file, names = self._files[at]
        row = int(index - self._ends[at]) + len(file)
        cells: dict[str, Any] = {field: Cell(file, row, name) for field, name in names.items()}
        return Sample(f'{file.path}#{row}', **cells)

    def size(self, index: int) -> tuple[int, int] | None:
        """Height and width of its picture, where columns tell them."""
        at = int(np.searchsorted(self._ends, index, 'right'))
        file, _ = self._files[at]
        if (sizes := file.picture_sizes) is None:
            return None
        height, width = sizes[index - self._ends[at] + len(file)].tolist()
        return (height, width) if height > 0 and width > 0 else None

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """Indices. Row groups in any order, then the rows of as many as memory holds at once.

        A row costs as much to read as its row group does: so each group is read once.
        """
        lengths = np.concatenate([file.lengths for file, _ in self._files])
        sizes = np.concatenate([self._media(file, names) for file, names in self._files])
        order = rng.permutation(len(lengths))
        starts = np.cumsum(lengths) - lengths
        rows = np.concatenate([starts[group] + np.arange(int(lengths[group])) for group in order])
        window = np.repeat(np.cumsum(sizes[order]) // WINDOW, lengths[order])
        return rows[np.lexsort((rng.random(len(rows)), window))]

    @staticmethod
    def _media(file: Parquet, names: Mapping[str, str]) -> np.ndarray:
        """Bytes of the pictures of each row group."""
        return np.sum([file.sizes(name) for field, name in names.items() if field != 'caption'], 0)


def _rows(tables: Sequence[pathlib.Path], columns: Columns, kind: Kind, pool) -> Rows:
    kept = Kept()
    return Rows(pool.map(lambda table: Parquet(table, kept), tables), columns, kind)


# ------------------------------------------------------------ csv


def _tables(tables: Sequence[pathlib.Path], columns: Columns, kind: Kind, pool) -> list[Sample]:
    del pool
    if len(tables) > 1:
        names = ' and '.join(table.name for table in tables)
        raise InputError(f'{tables[0].parent} holds {names}; give one of them')
    path, absent = tables[0], 0
    there = _files_below(path.parent, kind.suffixes)
    samples = []
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            rows = csv.DictReader(file)
            held = dict.fromkeys(rows.fieldnames or (), 'text')
            names = {
                field: find_column(role, columns, held, path, 'texts' if role in TEXTS else 'paths')
                for field, role in kind.roles.items()
            }
            for row in rows:
                cells = {field: row[name] or '' for field, name in names.items()}
                caption = cells.pop('caption')
                found: dict[str, Any] = {
                    field: there.get(posixpath.normpath(cell)) for field, cell in cells.items()
                }
                if None in found.values():
                    absent += 1
                    continue
                samples.append(Sample(f'{path}, line {rows.line_num}', caption=caption, **found))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f'cannot read {path}: {error}') from error
    if not samples:
        raise InputError(
            f'of the {absent} rows of {path} none has its files below {path.parent}; they are '
            f'looked for by name, with .{", .".join(kind.suffixes)}'
        )
    if absent:  # such as of the parts of a large set that were not fetched
        print(f'{path}: {absent} of {absent + len(samples)} rows have no file', file=sys.stderr)
    return samples


def _files_below(folder: pathlib.Path, suffixes: Sequence[str]) -> dict[str, Part]:
    """By path from there, and by name where that is enough."""
    files = [path for path in folder.rglob('*') if path.suffix[1:].lower() in suffixes]
    count = collections.Counter(path.name for path in files)
    named = {path.name: Part(path) for path in files if count[path.name] == 1}
    return named | {path.relative_to(folder).as_posix(): Part(path) for path in files}


# ------------------------------------------------------------ metadata/NAME.json


def _told(files: Sequence[pathlib.Path], columns: Columns, kind: Kind, pool) -> list[Sample]:
    """A tar counts as unpacked where it lies."""
    del columns
    tars = [path for path in files if path.suffix != '.json']
    members: dict[str, Part] = {}
    for tar, found in zip(tars, pool.map(list_tar, tars), strict=True):
        for member, part in found.items():
            path = posixpath.normpath(f'{tar.parent}/{member}')
            if path in members:
                raise InputError(
                    f'{tar} and {members[path].file} both hold {member}; give each a folder'
                )
            members[path] = part
    notes = {path: part for path, part in members.items() if _is_note(path)}
    notes |= {str(path): Part(path) for path in files if path.suffix == '.json'}
    if not notes:
        raise InputError(
            f'{files[0].parent} wants metadata/NAME.json that tells the input, output and '
            f'instruction of each sample; its {len(tars)} .tar files hold none'
        )

    def place(folder: str, name: str) -> Part:
        path = posixpath.normpath(f'{folder}/{name}')
        return members.get(path) or Part(pathlib.Path(path))

    samples = []
    for path, note in sorted(notes.items()):
        folder = posixpath.dirname(posixpath.dirname(path))
        try:
            for value in json.loads(note.read()):
                source, target = (place(folder, value[name]) for name in ('input', 'output'))
                name = f'{path} ({value["output"]})'
                samples.append(Sample(name, target, value['instruction'], source))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{path}: want a list of objects with input, output and instruction: {error!r}'
            ) from error
    return samples


def _is_note(path: str) -> bool:
    folder, name = posixpath.split(path)
    return name.endswith('.json') and posixpath.basename(folder) == 'metadata'


# ------------------------------------------------------------ dataset.jsonl


def _lines(manifests: Sequence[pathlib.Path], columns: Columns, kind: Kind, pool) -> list[Sample]:
    del pool
    return list(_lines_of(manifests[0], columns, kind))


def _lines_of(path: pathlib.Path, columns: Columns, kind: Kind) -> Iterator[Sample]:
    """Lines of other tasks are for other sources."""
    kept = Kept()
    tar = functools.cache(list_tar)
    table = functools.cache(lambda file: Parquet(file, kept))

    def place(text: str | None, role: str) -> Place | None:
        if text is None:
            return None
        if text.startswith('tar://'):
            shard, _, member = text.removeprefix('tar://').partition('#')
            return tar(path.parent / shard).get(member)
        if text.startswith('parquet://'):
            shard, _, row = text.removeprefix('parquet://').rpartition('#')
            file = table(path.parent / shard)
            there = row.isdecimal() and int(row) < len(file)
            return Cell(file, int(row), file.column(role, columns)) if there else None
        return Part(path.parent / text)

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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f'{where}: want an object with task and target: {error!r}') from error
        if task not in kind.tasks:
            continue
        caption, source = values.get('prompt'), values.get('source')
        references = values.get('references', [])
        if not isinstance(target, str) or not isinstance(caption, str | None):
            raise InputError(f'{where}: target and prompt want to be texts')
        if not isinstance(source, str | None) or not isinstance(references, list):
            raise InputError(f'{where}: source wants to be a text, references a list of texts')
        count += 1
        yield Sample(
            f'{where} ({target})',
            place(target, kind.roles['target']),
            caption,
            place(source, 'source'),
            tuple(place(text, 'picture') for text in references),
        )
    if not count:
        raise InputError(f'{path} has no line of task {" or ".join(kind.tasks)}')


_READERS: Mapping[str, Callable[..., Sequence[Sample]]] = {
    'jsonl': _lines,
    'csv': _tables,
    'tar': _shards,
    'parquet': _rows,
    'json': _told,
}
