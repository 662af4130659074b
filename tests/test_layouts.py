"""Benchmark folders: written as their evaluators read them, resumed, and what is amiss is named."""

import collections
import hashlib
import io
import json
import os
import pathlib
import re
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from metacanvas_jax import command
from metacanvas_jax.data.records import Record
from metacanvas_jax.evaluate.layouts import ASSETS, GenEval
from tests.test_bad_input import assert_one_line, script
from tests.test_resume import ROOT

SHIPPED = ASSETS / 'geneval'
LINES = (SHIPPED / 'evaluation_metadata.jsonl').read_text().splitlines()
PROMPTS = [json.loads(line)['prompt'] for line in LINES]
SEED = 7


def pixels(prompt: str, seed: int, index: int) -> np.ndarray:
    """What the fake model draws: it tells what it was asked."""
    key = (zlib.crc32(prompt.encode()), seed, index)
    return np.random.default_rng(key).integers(0, 256, (5, 7, 3), np.uint8)


class Pipe:
    """`stop` is the batch before which it is killed; `drawn` are the indices, in order."""

    def __init__(self, stop: int | None = None):
        self.drawn: list[int] = []
        self.batches, self.stop = 0, stop

    def frames(self, frames=None):
        return frames or 1

    def record(self, prompt, images=(), references=(), video=None):
        assert not images
        assert not references
        assert video is None
        return Record(prompt)

    def sample(self, records, *, indices, seed, **settings):
        assert settings.keys() == {'task', 'negative_prompt', 'frames', 'steps', 'guidance', 'size'}
        if self.batches == self.stop:
            raise KeyboardInterrupt
        self.batches += 1
        self.drawn += indices
        return [pixels(r.text, seed, i) for r, i in zip(records, indices, strict=True)]

    def decode(self, latents):
        return np.stack(latents)[:, None]  # one frame each


@pytest.fixture
def sample(monkeypatch, capfd):
    """Runs sample.py with the fake model, or with none: (exit code, stdout, stderr)."""

    def sample(*args: object, pipe: Pipe | None = None):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, 'argv', [str(ROOT / 'sample.py'), *map(str, args)])
        capfd.readouterr()
        with script('sample') as module, monkeypatch.context() as patch:
            patch.setattr(module, 'open_pipeline', lambda: pipe or pytest.fail('loads a model'))
            with pytest.raises(SystemExit) as caught:
                command.run(module.main)
        out, err = capfd.readouterr()
        return caught.value.code, out, err

    return sample


def draw(folder: pathlib.Path, *args: object) -> list[object]:
    return ['--checkpoint=any', '--prompts=geneval', f'--output={folder}', f'--seed={SEED}', *args]


def check(folder: pathlib.Path, *args: object) -> list[object]:
    return ['--check', '--prompts=geneval', f'--output={folder}', *args]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def as_geneval_reads(folder: pathlib.Path) -> list[tuple[pathlib.Path, dict]]:
    """(picture, metadata) of all that GenEval's evaluation/evaluate_images.py judges."""
    found = []
    for entry in os.listdir(folder):
        if not (folder / entry).is_dir() or not entry.isdigit():
            continue
        with open(folder / entry / 'metadata.jsonl') as file:
            metadata = json.load(file)
        for name in os.listdir(folder / entry / 'samples'):
            path = folder / entry / 'samples' / name
            if path.is_file() and re.match(r'\d+\.png', name):
                found.append((path, metadata))
    return found


# ---------------------------------------------------------------- what is written


def test_the_prompts_are_the_published_ones():
    def blob(name: str) -> str:
        """As git names the file in github.com/djghosh13/geneval."""
        data = (SHIPPED / name).read_bytes()
        return hashlib.sha1(b'blob %d\0' % len(data) + data).hexdigest()

    assert blob('evaluation_metadata.jsonl') == 'efc21c7e639cd45554a1e44fac87157211f16d51'
    assert blob('LICENSE') == '0f37bf7bb2898acd60102f4f28d74dfb48bb489d'
    assert 'Copyright (c) 2023 Dhruba Ghosh' in (SHIPPED / 'LICENSE').read_text()


def test_a_folder_as_geneval_reads_it(sample, tmp_path):
    pipe, folder = Pipe(), tmp_path / 'deep/out'
    code, out, _ = sample(*draw(folder, '--batch_size=100'), pipe=pipe)
    assert (code, out) == (0, '2212 pictures, 0 already there\n')
    assert pipe.drawn == list(range(2212))
    judged = as_geneval_reads(folder)
    tags = collections.Counter(metadata['tag'] for _, metadata in judged)
    want = dict(single_object=80, two_object=99, counting=80)
    want |= dict(colors=94, position=100, color_attr=100)
    assert tags == {tag: 4 * count for tag, count in want.items()}
    for path, metadata in judged:
        prompt, number = int(path.parts[-3]), int(path.stem)
        assert metadata == json.loads(LINES[prompt])
        assert 0 <= number < 4
        index = 4 * prompt + number
        with Image.open(path) as picture:
            told = dict(prompt=PROMPTS[prompt], seed=str(SEED), index=str(index))
            assert told.items() <= picture.info.items()
            np.testing.assert_array_equal(picture, pixels(PROMPTS[prompt], SEED, index))
    assert (folder / '00552/metadata.jsonl').read_bytes() == LINES[552].encode() + b'\n'
    assert (folder / '00552/samples/00003.png').is_file()
    assert len(contents(folder)) == 2212 + 553  # and nothing else
    told = f'{folder}: 2212 pictures, 553 lines; whole\n'
    assert sample(*check(folder)) == (0, told, '')
    # Whole: it is neither drawn nor is a model loaded.
    code, out, _ = sample(*draw(folder))
    assert (code, out) == (0, '2212 pictures, 2212 already there\n')
    code, out, _ = sample(*check(folder, '--num_images=3'))
    assert code == 1
    assert 'extra 00552/samples/00003.png\n' in out
    assert out.endswith('; 553 extra\n')


def test_killed_and_resumed(sample, tmp_path):
    """With other batches, by several processes: the same files, and whole ones are left alone."""
    one, args = tmp_path / 'one', ['--num_images=1']
    assert sample(*draw(one, *args), pipe=Pipe())[0] == 0
    want, folder = contents(one), tmp_path / 'many'
    pipe = Pipe(stop=3)
    code, _, err = sample(*draw(folder, *args, '--batch_size=50'), pipe=pipe)
    assert (code, err) == (130, 'interrupted\n')
    left = contents(folder)
    assert len(left) == 150
    assert left.items() <= want.items()
    cut, empty, wrong = (f'{i:05}/samples/00000.png' for i in (3, 4, 5))
    (folder / cut).write_bytes(want[cut][:-40])
    (folder / empty).write_bytes(b'')
    (folder / wrong).write_bytes(b'<html>')
    (folder / '00009/metadata.jsonl').write_text(LINES[8])
    (folder / '00009/samples/.00000.png.tmp').write_bytes(b'half')  # of a run that was killed
    (folder / '00009/samples/00000.png').unlink()
    kept = left.keys() - {cut, empty, wrong, '00009/samples/00000.png'}
    times = {name: (folder / name).stat().st_mtime_ns for name in kept}
    drawn, args = [], [*args, '--processes=3', '--batch_size=31']
    for process in (2, 0, 1):
        pipe = Pipe()
        code, out, _ = sample(*draw(folder, *args, f'--process={process}'), pipe=pipe)
        here = sum(int(name[:5]) % 3 == process for name in kept)
        total = len(range(process, 553, 3))
        assert (code, out) == (0, f'{total} pictures, {here} already there\n')
        assert {index % 3 for index in pipe.drawn} == {process}
        drawn += pipe.drawn
    assert sorted(drawn) == [3, 4, 5, 9, *range(150, 553)]
    assert contents(folder) == want
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == times


# ---------------------------------------------------------------- what is amiss


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """One picture a prompt; each test puts back what it breaks."""
    layout, folder = GenEval(1), tmp_path_factory.mktemp('geneval')
    file = io.BytesIO()
    Image.fromarray(pixels('', 0, 0)).save(file, 'PNG')
    for picture in layout.pictures(0):
        path = folder / picture.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file.getvalue())
    for name, line in layout.lines().items():
        (folder / name).write_text(line)
    assert not layout.faults(folder)
    return folder


PICTURE, LINE = '00017/samples/00000.png', '00017/metadata.jsonl'


def flip(data: bytes, kind: bytes) -> bytes:
    """One bit in the first chunk of a kind."""
    at = data.index(kind) + 4 + 9
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def checksum(data: bytes) -> bytes:
    """One bit in the checksum of the pixels, which themselves are whole."""
    at = data.index(b'IEND') - 5
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def noise(data: bytes) -> bytes:
    """No pixels, in a chunk that is whole."""
    chunk = b'IDAT' + bytes(range(100, 160))
    chunk = struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk))
    return data[:33] + chunk + data[-12:]


def jpeg(data: bytes) -> bytes:
    file = io.BytesIO()
    Image.open(io.BytesIO(data)).save(file, 'JPEG')
    return file.getvalue()


def reordered(data: bytes) -> bytes:
    return json.dumps(dict(reversed(json.loads(data).items())), indent=1).encode()


BROKEN = {
    'no picture': (PICTURE, None, ['missing']),
    'no bytes': (PICTURE, lambda data: b'', ['empty']),
    'half a picture': (PICTURE, lambda data: data[: len(data) // 2], ['unreadable']),
    'all but the last byte': (PICTURE, lambda data: data[:-1], ['unreadable']),
    'an end alone': (PICTURE, lambda data: data[-12:], ['unreadable']),
    'no pixels': (PICTURE, lambda data: data[:33] + data[-12:], ['unreadable']),
    'a pixel changed': (PICTURE, lambda data: flip(data, b'IDAT'), ['unreadable']),
    'the size changed': (PICTURE, lambda data: flip(data, b'IHDR'), ['unreadable']),
    'a checksum changed': (PICTURE, checksum, ['unreadable']),
    'noise for pixels': (PICTURE, noise, ['unreadable']),
    'a jpeg': (PICTURE, jpeg, ['unreadable']),
    'a web page': (PICTURE, lambda data: b'<!DOCTYPE html>', ['unreadable']),
    'no line': (LINE, None, ['missing']),
    'an empty line': (LINE, lambda data: b'', ['empty']),
    'half a line': (LINE, lambda data: data[:30], ['unreadable']),
    'two lines': (LINE, lambda data: data + b'\n' + data, ['unreadable']),
    'no text': (LINE, lambda data: b'\xff\xfe\xfd', ['unreadable']),
    'the line of another': (LINE, lambda data: LINES[18].encode(), ['wrong']),
    'a line in other words': (LINE, reordered, []),
    'one sample more': ('00017/samples/00001.png', lambda data: b'x', ['extra']),
    'a name of four digits': ('00017/samples/0000.png', lambda data: b'x', ['extra']),
    'half-written': ('00017/samples/.00000.png.tmp', lambda data: b'x', ['extra']),
    'a prompt more': ('00553', 'folder', ['extra']),
    'a note': ('seeds.json', lambda data: b'{}', ['extra']),
    'a note beside': ('00017/seeds.json', lambda data: b'{}', ['extra']),
    'a grid': ('00017/grid.png', lambda data: b'x', []),
    'a grid elsewhere': ('grid.png', lambda data: b'x', ['extra']),
}


@pytest.mark.parametrize(('name', 'change', 'kinds'), BROKEN.values(), ids=BROKEN)
def test_faults(whole, name, change, kinds):
    path = whole / name
    before = path.read_bytes() if path.exists() else None
    try:
        if change is None:
            path.unlink()
        elif change == 'folder':
            path.mkdir()
            (path / 'samples').mkdir()
        else:
            path.write_bytes(change(before))
        found = GenEval(1).faults(whole)
    finally:
        if before is not None:
            path.write_bytes(before)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    assert [(fault.kind, fault.path) for fault in found] == [(kind, name) for kind in kinds]


def test_a_folder_gone_and_what_is_said(sample, whole, tmp_path):
    folder = tmp_path / 'out'
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / '00100')
    (folder / '00007/samples/00000.png').unlink()
    (folder / '00007/samples/00000.png').mkdir()
    (folder / '00008/samples/00000.png').write_bytes(b'')
    (folder / 'note').touch()
    code, out, err = sample(*check(folder, '--num_images=1'))
    assert (code, err) == (1, '')
    assert out.splitlines() == [
        'missing 00007/samples/00000.png',
        'empty 00008/samples/00000.png',
        'missing 00100/samples/00000.png',
        'missing 00100/metadata.jsonl',
        'extra 00007/samples/00000.png',
        'extra note',
        f'{folder}: 553 pictures, 553 lines; 3 missing, 1 empty, 2 extra',
    ]
    code, out, _ = sample(*check(tmp_path / 'nowhere'))
    assert code == 1
    assert out.splitlines()[-1].endswith('2212 pictures, 553 lines; 2765 missing')
    assert not (tmp_path / 'nowhere').exists()


REFUSED = [
    (['--check', '--output=HERE/out', '--prompts=HERE/a.jsonl'], '--check wants --prompts of a be'),
    (['--check', '--output=HERE/out', '--prompt=a cat'], '--check wants .*benchmark: geneval'),
    (['--check', '--prompts=geneval'], '--output is missing'),
    (['--check', '--prompts=geneval', '--output=HERE/file'], 'file is a file; a benchmark wants a'),
    (draw(pathlib.Path('HERE/file')), 'file is a file; a benchmark wants a folder'),
    (draw(pathlib.Path('HERE'), '--process=1'), '--process 1 is not one of 1, from 0'),
    (draw(pathlib.Path('HERE'), '--process=-1', '--processes=2'), '--process -1 is not one of 2'),
    (draw(pathlib.Path('HERE'), '--num_images=0'), '--num_images must be at least 1, got 0'),
    (['--checkpoint=x', '--output=x', '--prompt=x', '--processes=2'], '--processes goes with'),
    (['--prompts=geneval', '--output=HERE/out'], 'give either --checkpoint or --config'),
    (draw(pathlib.Path('HERE'), '--latents=x.npy'), 'go with --prompt, not with --prompts'),
]


@pytest.mark.parametrize(('args', 'message'), REFUSED, ids=lambda value: str(value)[-40:])
def test_refused(sample, tmp_path, args, message):
    (tmp_path / 'file').touch()
    code, _, err = sample(*(str(word).replace('HERE', str(tmp_path)) for word in args))
    assert_one_line(code, err, message)
    assert contents(tmp_path) == {'file': b''}
