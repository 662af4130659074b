"""Captioned pictures: the same records in any order and by any threads; broken ones are named."""

import concurrent.futures
import io
import json
import pathlib
import re
import sys
import tarfile

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from metacanvas_jax.data.captioned import BROKEN, Captioned
from metacanvas_jax.data.media import cover
from metacanvas_jax.data.places import Part, list_tar
from metacanvas_jax.data.samples import find_samples
from metacanvas_jax.data.sources import SOURCES
from metacanvas_jax.types import InputError


def picture(seed: int, width: int = 40, height: int = 30, kind: str = 'png') -> bytes:
    """Lossless, so that its pixels are known."""
    file = io.BytesIO()
    Image.fromarray(pixels(seed, width, height)).save(file, kind)
    return file.getvalue()


def pixels(seed: int, width: int = 40, height: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_tar(path: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
    with tarfile.open(path, 'w') as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def shards(folder: pathlib.Path, count: int = 12, **more: bytes) -> pathlib.Path:
    """Two tars: the members of a sample apart, long names, folders, files that belong to none."""
    folder.mkdir(exist_ok=True)
    names = [f'{i:03}' if i % 3 else f'{"long" * 40}/{i:03}' for i in range(count)]
    for half in range(2):
        mine = range(half, count, 2)
        members = {f'{names[i]}.png': picture(i) for i in mine}
        members |= {'README': b'about', 'stats.json': b'{}'}
        members |= {f'{names[i]}.txt': b'caption %d\n' % i for i in mine}
        write_tar(folder / f'{half}.tar', members | {k: v for k, v in more.items() if not half})
    return folder


def manifest(folder: pathlib.Path, count: int = 12) -> pathlib.Path:
    """A dataset.jsonl with pictures beside it and one in a tar; lines of other tasks between."""
    folder.mkdir(exist_ok=True)
    lines = []
    for i in range(count - 1):
        (folder / f'{i}.png').write_bytes(picture(i))
        lines += [dict(task='t2i', prompt=f'caption {i}', target=f'{i}.png', id=str(i)), '']
        lines += [dict(task='edit', prompt='make it red', target='nowhere.png')]
    last = count - 1
    write_tar(folder / 'more.tar', {f'in/{last}.png': picture(last)})
    target = f'tar://more.tar#in/{last}.png'
    lines += [dict(task='t2i', prompt=f'caption {last}', target=target)]
    text = '\n'.join(line and json.dumps(line) for line in lines)
    (folder / 'dataset.jsonl').write_text(text + '\n')
    return folder


def source(path: pathlib.Path, *, seed: int = 0) -> Captioned:
    """At the pictures' own size, so that their pixels are known."""
    return Captioned(find_samples(path), height=30, width=40, seed=seed)


def contents(records) -> dict[str, bytes]:
    return {record.text: record.pixels.tobytes() for record in records}


WANT = {f'caption {i}': pixels(i).tobytes() for i in range(12)}
FORMS = {'tars': shards, 'jsonl': manifest}


@pytest.mark.parametrize('form', FORMS)
def test_every_record_once_and_nothing_is_written(tmp_path, form):
    folder = FORMS[form](tmp_path / form)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    found = source(folder)
    records = [found[i] for i in range(len(found))]
    assert len(records) == 12
    assert {np.shape(record.pixels) for record in records} == {(1, 30, 40, 3)}
    assert contents(records) == WANT
    assert not found.broken
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize('form', FORMS)
def test_any_order_and_any_number_of_threads(tmp_path, form):
    """Also with broken samples, which are the same ones however they are met."""
    folder = FORMS[form](tmp_path / form)
    if form == 'tars':
        shards(folder, **{'bad.png': b'', 'bad.txt': b'empty', 'alone.png': picture(99)})
    else:
        (folder / '3.png').write_bytes(picture(3)[:-200])
        (folder / '7.png').unlink()
    want = source(folder)
    records = [want[i] for i in range(len(want))]
    assert len(want.broken) == 2
    backwards = source(folder)
    for i in reversed(range(len(want))):
        assert contents([backwards[i]]) == contents([records[i]])
    assert backwards.broken == want.broken
    for threads in (2, 7):
        other = source(folder)
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            again = list(pool.map(other.__getitem__, [*range(len(want))] * 3))
        assert [contents([r]) for r in again] == [contents([r]) for r in records] * 3
        assert other.broken == want.broken


def test_the_seed_shuffles(tmp_path, monkeypatch):
    folder = shards(tmp_path / 'tars')
    orders = [[source(folder, seed=seed)[i].text for i in range(12)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])
    listed = [sample.name for sample in find_samples(folder)]
    assert len(set(listed)) == 12
    found = list(folder.rglob('*.tar'))
    for order in (sorted(found), sorted(found)[::-1]):  # a disk may list them in any
        listing = lambda self, kind, order=order: [path for path in order if path.match(kind)]
        monkeypatch.setattr(pathlib.Path, 'rglob', listing)
        assert [sample.name for sample in find_samples(folder)] == listed


def test_broken_samples_are_counted_replaced_and_named_once(tmp_path, capsys):
    good = picture(50)
    bad = {
        'corrupt.png': good[:-300],
        'empty.png': b'',
        'html.png': b'<!DOCTYPE html><p>gone</p>',
        'silent.png': good,
        'blank.png': good,
        'latin.png': good,
        'unseen.txt': b'no picture',
    }
    captions = {'corrupt.txt': b'a', 'empty.txt': b'b', 'html.txt': b'c'}
    captions |= {'blank.txt': b' \n', 'latin.txt': b'caf\xe9'}
    folder = shards(tmp_path / 'tars', 100, **bad, **captions)
    found = source(folder)
    for _ in range(2):
        records = [found[i] for i in range(len(found))]
        assert len(records) == 107
        assert len(contents(records)) == 100
    reasons = {name.rpartition('#')[2]: why for name, why in found.broken.items()}
    assert reasons.keys() == {'corrupt', 'empty', 'html', 'silent', 'blank', 'latin', 'unseen'}
    for name, words in {
        'corrupt': 'cannot read',
        'empty': 'is empty',
        'html': 'it looks like HTML',
        'silent': 'has no caption',
        'blank': 'the caption of .* is empty',
        'latin': 'is no UTF-8',
        'unseen': 'has no picture',
    }.items():
        assert re.search(words, reasons[name]), reasons[name]
        assert f'0.tar#{name}' in reasons[name]
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 7
    assert told[0].startswith('broken sample 1 of 107, replaced: ')
    # The next whole one of the shuffled order stands in.
    order = np.random.default_rng(0).permutation(107)
    names = [sample.name for sample in find_samples(folder)]
    for i in range(107):
        at = i
        while names[order[at % 107]] in found.broken:
            at += 1
        assert contents([found[i]]) == contents([found[at % 107]])


def test_too_many_broken_samples(tmp_path):
    bad = {f'b{i}.png': b'' for i in range(11)} | {f'b{i}.txt': b'x' for i in range(11)}
    found = source(shards(tmp_path / 'many', 20, **bad))
    with pytest.raises(InputError, match=r'11 of 31 samples are broken; .*is empty; .*is empty'):
        [found[i] for i in range(31)]
    assert BROKEN * 300 > 11  # in a larger set so many are borne
    found = source(shards(tmp_path / 'few', 300, **bad))
    assert len(contents(found[i] for i in range(311))) == 300
    found = source(write_tar(tmp_path / 'all.tar', {'a.png': b'', 'a.txt': b'x'}))
    with pytest.raises(InputError, match=r'all 1 samples are broken; .*a is empty'):
        found[0]


# ---------------------------------------------------------------- what is refused


def test_a_tar_without_captions(tmp_path):
    members = {'0.jpg': b'x', '1.jpg': b'x', '0.json': b'{}', '0.cls.npy': b'x', 'README': b'x'}
    path = write_tar(tmp_path / 'a.tar', members)
    with pytest.raises(InputError) as caught:
        find_samples(path)
    want = r'a.tar wants NAME.txt beside NAME.jpg, .jpeg, .png, .webp; it holds .jpg (2), .json (1)'
    assert want in str(caught.value)
    assert '.cls.npy (1)' in str(caught.value)
    (tmp_path / 'folder').mkdir()
    write_tar(tmp_path / 'folder/a.tar', {'0.png': b'x', '0.txt': b'x'})
    write_tar(tmp_path / 'folder/b.tar', {'0.txt': b'x'})
    with pytest.raises(InputError, match=r'b\.tar wants .*; it holds \.txt \(1\)'):
        find_samples(tmp_path / 'folder')
    with pytest.raises(InputError, match='it holds nothing'):
        find_samples(write_tar(tmp_path / 'c.tar', {}))


def test_what_is_no_data(tmp_path):
    with pytest.raises(InputError, match='no such file or folder'):
        find_samples(tmp_path / 'none')
    with pytest.raises(
        InputError, match=r'holds neither dataset\.jsonl nor \.csv, \.tar or \.parquet files'
    ):
        find_samples(tmp_path)
    tar = shards(tmp_path / 'tars') / '0.tar'
    cut = tmp_path / 'cut.tar'
    cut.write_bytes(tar.read_bytes()[:20_000])
    with pytest.raises(InputError, match=r'cut\.tar is no tar that can be read in place'):
        find_samples(cut)
    with tarfile.open(tmp_path / 'a.tar.gz', 'w:gz') as packed:
        packed.add(tar)
    with pytest.raises(InputError, match=r'a\.tar\.gz is no tar that can be read in place'):
        find_samples(tmp_path / 'a.tar.gz')


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'pyarrow.parquet', None)  # as if it were not installed
    (tmp_path / 'a.parquet').touch()
    message = r"reading .*a\.parquet needs pyarrow: pip install 'metacanvas-jax\[data\]'"
    with pytest.raises(InputError, match=message):
        find_samples(tmp_path)
    (tmp_path / 'dataset.jsonl').write_text(
        '{"task": "t2i", "prompt": "a", "target": "parquet://a.parquet#0"}'
    )
    with pytest.raises(InputError, match=message):
        find_samples(tmp_path)


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        (b'{"task": "t2i"', 'line 2: want an object with task and target'),
        (b'[1]', 'line 2: want an object with task and target'),
        (b'{"task": "t2i", "prompt": "a"}', "line 2: want .*KeyError\\('target'\\)"),
        (b'{"task": "t2i", "prompt": 3, "target": "a"}', 'target and prompt want to be texts'),
        (b'\xff', 'cannot read .*utf-8'),
    ],
)
def test_lines_that_are_refused(tmp_path, line, message):
    first = b'{"task": "t2i", "prompt": "a", "target": "0.png"}\n'
    (tmp_path / 'dataset.jsonl').write_bytes(first + line)
    with pytest.raises(InputError, match=message):
        find_samples(tmp_path)
    (tmp_path / 'dataset.jsonl').write_bytes(b'{"task": "edit", "target": "0.png"}')
    with pytest.raises(InputError, match='has no line of task t2i'):
        find_samples(tmp_path / 'dataset.jsonl')


# ---------------------------------------------------------------- parts


def test_members_lie_where_the_list_says(tmp_path):
    folder = shards(tmp_path / 'tars')
    for path in folder.iterdir():
        members = list_tar(path)
        with tarfile.open(path) as tar:
            names = [member.name for member in tar if member.isreg()]
            assert list(members) == names
            for name in names:
                file = tar.extractfile(name)
                assert file is not None
                assert members[name].read() == file.read()
    (tmp_path / 'x').write_bytes(b'0123456789')
    assert Part(tmp_path / 'x', 2, 3).read() == b'234'
    assert Part(tmp_path / 'x').read() == b'0123456789'


@pytest.mark.parametrize('size', [(8, 8), (20, 10), (10, 21), (60, 50), (1, 1), (7, 3)])
@pytest.mark.parametrize('shape', [(30, 40), (40, 30), (31, 17)])
def test_cover(size, shape):
    """The middle of a picture, whose shape is kept: a ramp stays a ramp, centred."""
    H, W = shape
    rows, columns = np.indices(shape, np.float32)
    ramp = np.stack([rows * 6, columns * 6, 0 * rows], -1).astype(np.uint8)
    out = cover(ramp, *size).astype(float)
    assert out.shape == (*size, 3)
    scale = min(H / size[0], W / size[1])
    for axis, length in ((0, H), (1, W)):
        place = (np.arange(size[axis]) + 0.5 - size[axis] / 2) * scale + length / 2 - 0.5
        values = out[..., axis].mean(1 - axis)
        inner = (place > 2 * scale + 2) & (place < length - 3 - 2 * scale)
        np.testing.assert_allclose(values[inner], place[inner] * 6, atol=1)
    whole = pixels(3)
    np.testing.assert_array_equal(cover(whole, 30, 40), whole)


def test_as_a_source_of_a_run(tmp_path):
    folder = shards(tmp_path / 'tars')
    data = ConfigDict(dict(path=str(folder), size=16, seed=3, tasks=dict(recon=1.0)))
    found = SOURCES['captioned'](data)
    assert found.keys() == {'t2i', 'recon'}
    assert found['t2i'][5].pixels.shape == (1, 16, 16, 3)
    with pytest.raises(InputError, match=r'config\.data\.path is missing'):
        SOURCES['captioned'](ConfigDict(dict(size=16, seed=3, tasks=dict(t2i=1.0))))
