"""Captioned pictures in parquet: rows at random, a row group read once, broken rows replaced."""

import concurrent.futures
import json
import pathlib
import re
import threading
import time

import numpy as np
import pytest
from ml_collections import ConfigDict

from metacanvas_jax.data import samples as samples_module
from metacanvas_jax.data.captioned import Captioned
from metacanvas_jax.data.parquet import Cell, Kept, Parquet
from metacanvas_jax.data.samples import Rows, find_samples
from metacanvas_jax.data.sources import SOURCES
from metacanvas_jax.types import InputError
from tests.test_captioned import WANT, contents, picture, source, write_tar

pa = pytest.importorskip('pyarrow')
pq = pytest.importorskip('pyarrow.parquet')

STRUCT = pa.struct([('bytes', pa.binary()), ('path', pa.string())])


def as_struct(data: list[bytes | None]):
    """As datasets has them."""
    return pa.array([{'bytes': some, 'path': f'{i}.png'} for i, some in enumerate(data)], STRUCT)


def write(path: pathlib.Path, *, group: int = 3, compression='snappy', **columns) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=group, compression=compression)
    return path


def captions(numbers):
    return [f'caption {i}' for i in numbers]


def shards(folder: pathlib.Path, form: str) -> pathlib.Path:
    """The twelve of WANT in two files, four row groups and one more that is empty."""
    for file, numbers in (('b/0.parquet', range(7)), ('a.parquet', range(7, 12))):
        data = [picture(i) for i in numbers]
        if form == 'struct':
            columns = dict(width=[40] * len(data), text=captions(numbers), image=as_struct(data))
        elif form == 'bytes':
            columns = dict(jpg=pa.array(data, pa.large_binary()), __key__=captions(numbers))
            columns['TXT'] = pa.array(captions(numbers)).dictionary_encode()
        else:  # one column of each kind under a name of a wrong type
            columns = dict(image=[0] * len(data), picture=data, caption=[['a']] * len(data))
            columns['prompt'] = pa.array(captions(numbers), pa.large_string())
        write(folder / file, **columns)
    table = pq.read_table(folder / 'a.parquet')
    with pq.ParquetWriter(folder / 'a.parquet', table.schema) as writer:
        for part in (table[:2], table[:0], table[2:]):
            writer.write_table(part)
    return folder


FORMS = ('struct', 'bytes', 'others')


def read(part) -> bytes:
    assert part is not None
    return part.open().read()


@pytest.mark.parametrize('form', FORMS)
def test_every_record_once_and_nothing_is_written(tmp_path, form):
    folder = shards(tmp_path / 'data', form)
    before = {path: path.read_bytes() for path in folder.rglob('*.parquet')}
    samples = find_samples(folder)
    names = [str(folder / 'a.parquet')] * 5 + [str(folder / 'b/0.parquet')] * 7
    rows = [*range(5), *range(7)]
    assert [s.name for s in samples] == [f'{n}#{i}' for n, i in zip(names, rows, strict=True)]
    told = [s.caption.texts() for s in samples if isinstance(s.caption, Cell)]
    assert told == [[text] for text in captions([*range(7, 12), *range(7)])]
    for bad in (-1, 12):
        with pytest.raises(IndexError):
            samples[bad]
    found = source(folder)
    assert contents(found[i] for i in range(len(found))) == WANT
    assert not found.broken
    assert {path: path.read_bytes() for path in folder.rglob('*.parquet')} == before
    one = find_samples(folder / 'a.parquet')
    assert [sample.name for sample in one] == [f'{folder}/a.parquet#{i}' for i in range(5)]


def broken(folder: pathlib.Path, count: int = 200) -> pathlib.Path:
    """Rows 10, 20, ... 70 are of no use."""
    data: list = [picture(i) for i in range(count)]
    texts: list = [f'caption {i}'.encode() for i in range(count)]
    data[10], data[20], data[30] = data[10][:-200], b'', b'<!DOCTYPE html>'
    texts[40], texts[50], texts[60] = None, b' \n', b'caf\xe9'
    images = [{'bytes': some, 'path': None} for some in data]
    images[70] = None
    images[80]['bytes'] = None
    text = pa.array(texts, pa.binary()).view(pa.string())  # which does not look at the bytes
    return write(folder / 'a.parquet', group=7, image=pa.array(images, STRUCT), caption=text).parent


REASONS = {
    10: 'cannot read',
    20: 'is empty',
    30: 'it looks like HTML',
    40: 'has no caption',
    50: 'the caption of .* is empty',
    60: 'cannot read .*utf-8',
    70: 'has no image',
    80: 'has no image',
}


def test_broken_rows_in_any_order_and_by_any_number_of_threads(tmp_path, capsys):
    folder = broken(tmp_path)
    want = source(folder)
    records = [contents([want[i]]) for i in range(len(want))]
    good = {f'caption {i}' for i in range(200) if i not in REASONS}
    assert {text for record in records for text in record} == good
    assert want.broken.keys() == {f'{folder}/a.parquet#{row}' for row in REASONS}
    for row, words in REASONS.items():
        reason = want.broken[f'{folder}/a.parquet#{row}']
        assert re.search(words, reason)
        assert f'a.parquet#{row}' in reason
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(REASONS)
    assert told[0].startswith('broken sample 1 of 200, replaced: ')
    backwards = source(folder)
    for i in reversed(range(len(want))):
        assert contents([backwards[i]]) == records[i]
    assert backwards.broken == want.broken
    for threads in (2, 7):
        other = source(folder)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            again = list(pool.map(other.__getitem__, [*range(len(want))] * 2))
        assert [contents([record]) for record in again] == records * 2
        assert other.broken == want.broken


def test_a_row_group_that_cannot_be_read(tmp_path):
    """Its rows are replaced, and no others."""
    data = [picture(i) for i in range(200)]
    path = write(tmp_path / 'a.parquet', group=5, image=data, caption=captions(range(200)))
    with pq.ParquetFile(path) as file:
        chunk = file.metadata.row_group(3).column(0)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
    with path.open('r+b') as file:
        file.seek(start)
        file.write(b'\xff' * 64)
    found = source(tmp_path)
    texts = {text for i in range(200) for text in contents([found[i]])}
    assert texts == set(captions(range(200))) - set(captions(range(15, 20)))
    assert found.broken.keys() == {f'{path}#{row}' for row in range(15, 20)}
    samples = find_samples(path)
    path.write_bytes(b'')  # after it was listed
    with pytest.raises(InputError, match=r'cannot read .*a\.parquet#0: '):
        read(samples[0].target)


# ---------------------------------------------------------------- what is read, and when


@pytest.fixture
def reads(monkeypatch):
    """(row group, column) of each read."""
    found: list[tuple[int, str]] = []
    real = pq.ParquetFile.read_row_group

    def read(self, group, columns, **options):
        time.sleep(0.002)  # long enough for others to come
        found.append((group, *columns))
        return real(self, group, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, 'read_row_group', read)
    return found


def number(i: int) -> bytes:
    return int(i).to_bytes(8, 'big')


def numbered(path: pathlib.Path, count: int, group: int) -> pathlib.Path:
    """Rows that hold their number: light ones, then heavy ones; a column more that is heavier."""
    data = [number(i) + b'x' * (100 if i >= count // 2 else 0) for i in range(count)]
    return write(
        path,
        group=group,
        compression='none',
        img=data,
        caption=captions(range(count)),
        other=[b'x' * 1000] * count,
    )


def test_each_row_group_is_read_once_an_epoch(tmp_path, reads, monkeypatch):
    """Also where memory holds only some of them; and their rows are well mixed."""
    path, count, group = numbered(tmp_path / 'a.parquet', 600, 10), 600, 10
    size = Parquet(path, Kept()).sizes('img')
    assert size.shape == (60,)
    assert 80 < size[0] < 500 < 1080 < size[-1] < 1500  # of this column alone
    room = 16 * int(size.max())
    monkeypatch.setattr(samples_module, 'WINDOW', room // 2)
    orders = []
    for seed in (0, 0, 1):
        samples = Rows([Parquet(path, Kept(room))], {})
        orders.append(samples.shuffled(np.random.default_rng(seed)))
        reads.clear()
        for index in orders[-1]:
            assert read(samples[index].target)[:8] == number(index)
        assert sorted(reads) == [(i, 'img') for i in range(60)]
    first, again, other = (order.tolist() for order in orders)
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(count))
    # Rows of a window come from eight groups or more in turn.
    groups = np.array(first) // group
    assert (np.diff(groups) == 0).mean() < 0.25
    assert len(set(groups[:40])) >= 6
    # A dataset of this size, all in one window, is shuffled as a whole.
    monkeypatch.undo()
    whole = Rows([Parquet(path, Kept())], {}).shuffled(np.random.default_rng(0))
    assert len(set(whole[:60] // group)) > 30


def test_the_order_is_that_of_the_dataset(tmp_path):
    folder = broken(tmp_path)
    samples = find_samples(folder)
    order = samples.shuffled(np.random.default_rng(5))
    found = Captioned(samples, height=30, width=40, seed=5)
    for i in (0, 3, 199):
        if order[i] not in REASONS:
            assert found[i].text == f'caption {order[i]}'


def test_threads_wait_for_one_read(tmp_path, reads):
    path = numbered(tmp_path / 'a.parquet', 64, 8)
    file = Parquet(path, Kept())
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        rows = [i for _ in range(4) for i in range(64)]
        values = list(pool.map(lambda row: file.cell(row, 'img'), rows))
    assert [value[:8] for value in values] == [number(i) for i in rows]
    assert sorted(reads) == [(i, 'img') for i in range(8)]


def test_what_is_kept():
    """The last ones asked for, up to a size; one larger than that alone; errors are not kept."""
    read: list[str] = []

    def get(kept: Kept, name: str, size: int = 1):
        return kept.get(name, size, lambda: read.append(name) or name.upper())

    kept = Kept(3)
    assert [get(kept, name) for name in 'abcab'] == list('ABCAB')
    assert read == list('abc')
    get(kept, 'd')  # c is the oldest
    assert [get(kept, name) for name in 'abd'] == list('ABD')
    assert read == list('abcd')
    get(kept, 'c')
    get(kept, 'a')
    assert read == list('abcdca')
    get(kept, 'large', 9)
    get(kept, 'large', 9)
    assert read[6:] == ['large']
    get(kept, 'b')
    get(kept, 'large', 9)
    assert read[6:] == ['large', 'b', 'large']
    failed = [0]

    def fail():
        failed[0] += 1
        raise OSError('gone')

    for _ in range(2):
        with pytest.raises(OSError, match='gone'):
            kept.get('e', 1, fail)
    assert failed == [2]
    assert kept.get('e', 1, lambda: 'back') == 'back'


def test_a_column_is_not_waited_for_by_those_of_others():
    kept, go = Kept(), threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        slow = pool.submit(kept.get, 'slow', 1, lambda: go.wait(10))
        while not kept._columns:
            time.sleep(0.001)
        assert kept.get('quick', 1, lambda: 'here') == 'here'
        assert not slow.done()
        go.set()
        assert slow.result()


# ---------------------------------------------------------------- dataset.jsonl


def test_rows_of_a_manifest(tmp_path):
    """In any order; rows that are not there count as broken."""
    write(tmp_path / 'in/a#b.parquet', image=as_struct([picture(i) for i in range(7)]))
    write(tmp_path / 'c.parquet', jpg=[picture(i) for i in range(7, 12)])
    places = [('in/a#b.parquet', i, i) for i in (6, 0, 3, 1, 2, 5, 4)]
    places += [('c.parquet', i, 7 + i) for i in range(5)]
    places += [('c.parquet', row, 99) for row in (5, '-1', 'x', '')]
    lines = [
        dict(task='t2i', prompt=f'caption {i}', target=f'parquet://{file}#{row}')
        for file, row, i in places
    ]
    (tmp_path / 'dataset.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    found = source(tmp_path)
    assert contents(found[i] for i in range(len(found))) == WANT
    assert len(found.broken) == 4
    assert all(reason.endswith('has no picture') for reason in found.broken.values())


# ---------------------------------------------------------------- names, and what is refused


def test_names_of_columns(tmp_path):
    data = [picture(i) for i in range(12)]
    columns = dict(image=data[::-1], mine=data, text=['no'] * 12, also=captions(range(12)))
    path = write(tmp_path / 'a.parquet', **columns)
    config = ConfigDict(dict(path=str(path), size=30, seed=0, tasks=dict(t2i=1.0)))
    config.columns = dict(picture='mine', caption='also')
    found = SOURCES['captioned'](config)['t2i']
    assert {record.text for record in (found[i] for i in range(12))} == set(captions(range(12)))
    named = Captioned(find_samples(path, config.columns), height=30, width=40, seed=0)
    assert contents(named[i] for i in range(12)) == WANT
    config.columns = dict(picture=None, caption='also')
    guessed = Captioned(find_samples(path, config.columns), height=30, width=40, seed=0)
    assert contents(guessed[i] for i in range(12)).keys() == WANT.keys()
    assert contents(guessed[i] for i in range(12)) != WANT
    (tmp_path / 'dataset.jsonl').write_text(
        '{"task": "t2i", "prompt": "caption 3", "target": "parquet://a.parquet#3"}'
    )
    samples = find_samples(tmp_path, dict(picture='mine'))
    assert read(samples[0].target) == data[3]
    config.columns = dict(picture='mine', text='also')
    with pytest.raises(InputError, match=r"columns has 'text'; it takes picture, caption"):
        SOURCES['captioned'](config)


@pytest.mark.parametrize(
    ('columns', 'message'),
    [
        ({}, r'no column of bytes, or of a struct with bytes for config\.data\.columns\.picture'),
        (dict(picture='img'), r"with bytes named 'img' for config\.data\.columns\.picture"),
        (dict(picture='url'), r"with bytes named 'url' for config\.data\.columns\.picture"),
        (dict(picture='raw'), r'no column of texts for config\.data\.columns\.caption'),
        (dict(picture='raw', caption='raw'), r"no column of texts named 'raw' for config"),
        (dict(picture='raw', caption='list'), r"no column of texts named 'list' for config"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, columns, message):
    write(tmp_path / 'a.parquet', url=['x'], raw=[b'x'], list=[['a', 'b']], image=[{'path': 'x'}])
    with pytest.raises(InputError, match=message) as caught:
        find_samples(tmp_path, columns)
    assert str(caught.value).startswith(f'{tmp_path}/a.parquet has no column of ')
    there = r'its columns are: url \(string\), raw \(binary\), list \(list<.*string>\), image \('
    assert re.search(there, str(caught.value))
    assert '\n' not in str(caught.value)


def test_what_is_no_parquet(tmp_path):
    whole = write(tmp_path / 'whole.parquet', image=[picture(0)] * 9, text=captions(range(9)))
    data = whole.read_bytes()
    for name, some, message in (
        ('garbage', b'no parquet at all, but long enough', 'magic bytes'),
        ('empty', b'', '0 bytes'),
        ('cut', data[:-20], 'magic bytes'),
        ('end', data[-100:], ''),
        ('lfs', b'version https://git-lfs.github.com/spec/v1\n', ''),
    ):
        path = tmp_path / name / 'a.parquet'
        path.parent.mkdir()
        path.write_bytes(some)
        with pytest.raises(InputError, match=f'cannot read {path}: .*{message}'):
            find_samples(path.parent)
    rows = pq.read_table(whole)[:0]
    pq.write_table(rows, tmp_path / 'none.parquet')
    with pytest.raises(InputError, match=r'none\.parquet has no rows'):
        find_samples(tmp_path / 'none.parquet')
    write_tar(tmp_path / 'a.tar', {'0.png': b'x', '0.txt': b'x'})
    with pytest.raises(InputError, match=r'holds 1 \.tar and 7 \.parquet files; give a folder of'):
        find_samples(tmp_path)
