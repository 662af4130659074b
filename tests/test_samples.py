"""Edits and videos in each form that they are published in, and what is refused."""

import concurrent.futures
import dataclasses
import functools
import io
import json
import pathlib
import re
import wave

import numpy as np
import pytest
from ml_collections import ConfigDict

from metacanvas_jax.data import kontext_sizes
from metacanvas_jax.data.captioned import Captioned, Clips
from metacanvas_jax.data.media import cover, encode_video
from metacanvas_jax.data.records import Record
from metacanvas_jax.data.samples import KINDS, find_samples
from metacanvas_jax.data.sources import SOURCES
from metacanvas_jax.types import InputError
from tests.test_captioned import picture, pixels, write_tar

KIND = {kind.name: kind for kind in KINDS}
COUNT, FPS, RATE = 6, 4.0, 8  # the run's rate, and that of the videos
CLIPS = Clips(frames=5, fps=FPS, short_clips='refuse')


def captioned(path: pathlib.Path, name: str, clips=CLIPS, *, columns=None, seed=0) -> Captioned:
    kind = KIND[name]
    return Captioned(
        find_samples(path, columns, kind),
        height=30,
        width=40,
        seed=seed,
        kind=kind,
        clips=clips if kind.video else None,
        references=2,
    )


def records(source: Captioned) -> list[Record]:
    return [source[i] for i in range(len(source))]


def drawn(record: Record) -> np.ndarray:
    assert record.pixels is not None
    return record.pixels


def same(left: Record, right: Record) -> bool:
    pairs = zip(vars(left).values(), vars(right).values(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs if a is not None)


# ------------------------------------------------------------ edits


def edit(i: int) -> dict:
    """Source and target differ in size, as HQ-Edit's do; the target's pixels stay as they are."""
    return dict(source=picture(100 + i, 44, 32), target=picture(i), words=f'edit {i}')


def omniedit(folder: pathlib.Path, edits: list[dict]) -> pathlib.Path:
    words = [[e['words'], f'or {e["words"]}'] for e in edits]
    return table(folder, edits, 'src_img', 'edited_img', edited_prompt_list=words, task=['x'])


def hq_edit(folder: pathlib.Path, edits: list[dict]) -> pathlib.Path:
    words = [e['words'] for e in edits]
    texts = dict(input=['a'], output=['b'], inverse_edit=['c'])
    return table(folder, edits, 'input_image', 'output_image', edit=words, **texts)


def table(folder, edits, source: str, target: str, **texts) -> pathlib.Path:
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    struct = pa.struct([('bytes', pa.binary()), ('path', pa.string())])

    def images(name: str):
        return pa.array([{'bytes': e[name], 'path': None} for e in edits], struct)

    columns = {k: v if len(v) == len(edits) else v * len(edits) for k, v in texts.items()}
    columns |= {source: images('source'), target: images('target')}
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / 'train-0.parquet', row_group_size=4)
    return folder


def metadata(edits: list[dict], start: int = 0) -> tuple[dict[str, bytes], bytes]:
    """Members of GPT-Image-Edit-1.5M, and what its json says of them."""
    files, told = {}, []
    for i, e in enumerate(edits, start):
        files |= {f'input/{i}.png': e['source'], f'output/{i}.png': e['target']}
        told.append(dict(id=str(i), input=f'input/{i}.png', output=f'output/{i}.png'))
        told[-1] |= dict(instruction=e['words'], task='add')
    return files, json.dumps(told).encode()


def gpt_tars(folder: pathlib.Path, edits: list[dict]) -> pathlib.Path:
    """The json in a tar, and in one beside the tar that its pictures are in."""
    (folder / 'metadata').mkdir(parents=True)
    files, told = metadata(edits[:2])
    files = {f'add/{name}': data for name, data in files.items()}
    write_tar(folder / 'a.tar', {**files, './add/metadata/a.json': told})
    files, told = metadata(edits[2:], 2)
    write_tar(folder / 'b.tar', files)
    (folder / 'metadata/b.json').write_bytes(told)
    return folder


def gpt_folders(folder: pathlib.Path, edits: list[dict]) -> pathlib.Path:
    files, told = metadata(edits)
    for name, data in {**files, 'metadata/c.json': told}.items():
        path = folder / 'omniedit/add' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def edit_lines(folder: pathlib.Path, edits: list[dict]) -> pathlib.Path:
    lines, members = [dict(task='t2i', prompt='no', target='x.png')], {}
    for i, e in enumerate(edits):
        members |= {f's/{i}': e['source'], f't/{i}': e['target']}
        line = dict(source=f'tar://a.tar#s/{i}', target=f'tar://a.tar#t/{i}', prompt=e['words'])
        lines.append(dict(line, task='edit'))
    folder.mkdir()
    write_tar(folder / 'a.tar', members)
    (folder / 'dataset.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    return folder


EDITS = (omniedit, hq_edit, gpt_tars, gpt_folders, edit_lines)


@pytest.mark.parametrize('write', EDITS)
def test_edits(tmp_path, write):
    """Source and target alike, of the same sample; at random as in order; two broken replaced."""
    folder = write(tmp_path / 'data', [edit(i) for i in range(COUNT)])
    found = records(captioned(folder, 'edit'))
    texts = {record.text.removeprefix('or '): record for record in found}
    assert texts.keys() == {f'edit {i}' for i in range(COUNT)}
    for i in range(COUNT):
        record = texts[f'edit {i}']
        np.testing.assert_array_equal(record.pixels, pixels(i)[None])
        source = cover(pixels(100 + i, 44, 32), 30, 40)
        np.testing.assert_array_equal(record.source, source[None])
    edits = [edit(i) for i in range(40)]
    edits[3]['source'], edits[7]['target'] = b'', edits[7]['target'][:-200]
    folder = write(tmp_path / 'broken', edits)
    want = captioned(folder, 'edit')
    first = records(want)
    assert {r.text.removeprefix('or ') for r in first} == {e['words'] for e in edits} - {
        'edit 3',
        'edit 7',
    }
    assert len(want.broken) == 2
    again = captioned(folder, 'edit')
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        others = list(pool.map(again.__getitem__, reversed(range(40))))[::-1]
    assert all(map(same, others, first))
    assert again.broken == want.broken


def test_one_of_several_instructions(tmp_path):
    """By seed and place."""
    folder = omniedit(tmp_path / 'data', [edit(i) for i in range(40)])
    texts = [[r.text for r in records(captioned(folder, 'edit', seed=s))] for s in (0, 0, 1)]
    assert texts[0] == texts[1]
    assert {text.startswith('or ') for text in texts[0]} == {True, False}
    chosen = [{text.rpartition(' ')[2]: text for text in run} for run in texts]
    assert chosen[0] != chosen[2]


def test_names_of_columns(tmp_path):
    folder = omniedit(tmp_path / 'data', [edit(0)])
    columns = dict(source='edited_img', target='src_img', instruction='task')
    [record] = records(captioned(folder, 'edit', columns=columns))
    assert record.text == 'x'
    np.testing.assert_array_equal(record.source, pixels(0)[None])
    for role, name in (('source', 'task'), ('instruction', 'src_img'), ('target', 'gone')):
        want = f'named {name!r} for config.data.columns.{role}; its columns are: edited_prompt_li'
        with pytest.raises(InputError, match=re.escape(want)):
            find_samples(folder, {role: name}, KIND['edit'])


# ------------------------------------------------------------ videos


def grey(i: int, frame: int) -> int:
    """Of a frame of video i: each is told from the others."""
    return 3 * frame + 2 * i


def video(i: int, frames: int = 20) -> bytes:
    shown = np.array([grey(i, frame) for frame in range(frames)], np.uint8)
    file = io.BytesIO()
    pixels = np.broadcast_to(shown[:, None, None, None], (frames, 32, 48, 3))
    encode_video(file, pixels, fps=RATE, comment='')
    return file.getvalue()


@pytest.fixture(scope='module')
def videos() -> list[bytes]:
    return [video(i) for i in range(COUNT)]


def tars(folder: pathlib.Path, videos: list[bytes]) -> pathlib.Path:
    folder.mkdir()
    members = {}
    for i, data in enumerate(videos):
        members |= {f'{i:04}.mp4': data, f'{i:04}.txt': b'video %d' % i, f'{i:04}.json': b'{}'}
    write_tar(folder / 'a.tar', members)
    return folder


def openvid(folder: pathlib.Path, videos: list[bytes]) -> pathlib.Path:
    """Videos in folders of their own, and rows whose videos were not fetched."""
    folder.mkdir()
    rows = ['video,caption,aesthetic score,fps', '900.mp4,"gone, for good",1,24']
    for i, data in enumerate(videos):
        (folder / f'part{i % 2}').mkdir(exist_ok=True)
        (folder / f'part{i % 2}/{i}.mp4').write_bytes(data)
        rows.append(f'{i}.mp4,video {i},1,24')
    (folder / 'OpenVid-1M.csv').write_text('\n'.join(rows) + '\n')
    return folder


def lines(folder: pathlib.Path, videos: list[bytes], task: str = 't2v', **more) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    told = []
    for i, data in enumerate(videos):
        (folder / f'{i}.mp4').write_bytes(data)
        told.append(dict(task=task, prompt=f'video {i}', target=f'{i}.mp4', **more))
    (folder / 'dataset.jsonl').write_text('\n'.join(map(json.dumps, told)))
    return folder


def begins(clip_FHWC: np.ndarray, i: int) -> int:
    """The frame that a clip of video i starts at; those after it are two apart, 4 of 8 a second."""
    shown = (clip_FHWC[:, 15, 20, 0].astype(float) - 2 * i) / 3
    start = round(shown[0])
    np.testing.assert_allclose(shown, start + 2 * np.arange(len(shown)), atol=0.8)
    return start


@pytest.mark.parametrize('write', [tars, openvid, lines])
def test_videos(tmp_path, write, videos, capsys):
    folder = write(tmp_path / 'data', videos)
    found = captioned(folder, 't2v')
    starts, first = set(), records(found)
    for record in first:
        assert drawn(record).shape == (5, 30, 40, 3)
        starts.add(begins(drawn(record), int(record.text.removeprefix('video '))))
    assert {record.text for record in first} == {f'video {i}' for i in range(COUNT)}
    assert starts <= set(range(11))  # nine of twenty frames
    assert len(starts) > 2
    again = captioned(folder, 't2v')
    assert all(same(again[i], first[i]) for i in reversed(range(COUNT)))
    other = captioned(folder, 't2v', seed=1)
    at = {r.text: begins(r.pixels, int(r.text[6:])) for r in records(other)}
    assert at != {r.text: begins(r.pixels, int(r.text[6:])) for r in first}
    assert ('1 of 7 rows have no file' in capsys.readouterr().err) == (write is openvid)


def test_broken_videos(tmp_path, videos, capsys):
    data = [*videos * 7]
    sound = io.BytesIO()
    with wave.open(sound, 'wb') as file:
        file.setparams((1, 2, 8000, 0, 'NONE', ''))
        file.writeframes(bytes(800))
    data[1], data[2], data[3] = sound.getvalue(), data[2][: len(data[2]) // 2], b'<html>gone'
    data[4] = video(4, frames=8)
    found = captioned(tars(tmp_path / 'data', data), 't2v')
    assert {record.text for record in records(found)} == {
        f'video {i}' for i in range(len(data)) if not 1 <= i <= 4
    }
    reasons = {name.rpartition('#')[2]: why for name, why in found.broken.items()}
    assert reasons.keys() == {'0001', '0002', '0003', '0004'}
    for name, words in {
        '0001': 'holds no video',
        '0002': 'cut off',
        '0003': 'looks like HTML',
        '0004': 'a clip has 4 frames, config.data.frames asks for 5',
    }.items():
        assert words in reasons[name]
        assert f'a.tar#{name}' in reasons[name]
    assert len(capsys.readouterr().err.splitlines()) == 4
    hold = captioned(tmp_path / 'data', 't2v', dataclasses.replace(CLIPS, short_clips='hold'))
    held = next(drawn(record) for record in records(hold) if record.text == 'video 4')
    np.testing.assert_array_equal(held[4], held[3])
    assert begins(held[:4], 4) == 0


def test_a_source_shows_the_same_moments(tmp_path, videos):
    folder = lines(tmp_path, videos, 'v2v', source='source.mp4')
    (folder / 'source.mp4').write_bytes(video(9, frames=16))
    found = records(captioned(folder, 'v2v'))
    starts = [begins(record.source, 9) for record in found]
    assert starts == [begins(record.pixels, int(record.text[6:])) for record in found]
    assert len(set(starts)) > 2
    assert max(starts) <= 7  # the shorter one decides
    assert {record.fps for record in found} == {FPS}


def test_references(tmp_path, videos):
    for i in range(3):
        (tmp_path / f'{i}.png').write_bytes(picture(i, 9, 7 + i))
    folder = lines(tmp_path, videos[:1], 'r2v', references=['0.png', '2.png'])
    [record] = records(captioned(folder, 'r2v'))
    for shown, i in zip(record.references, (0, 2), strict=True):
        np.testing.assert_array_equal(shown, pixels(i, 9, 7 + i))
    for names, message in (([], 'has 0 of 0 references'), (['0.png'] * 3, 'has 2 slots')):
        folder = lines(tmp_path, videos[:1], 'r2v', references=names)
        with pytest.raises(InputError, match=message):
            captioned(folder, 'r2v')[0]
    with pytest.raises(
        InputError, match=r'references are read from a dataset\.jsonl, not from \.t'
    ):
        find_samples(tars(tmp_path / 'tars', videos), None, KIND['r2v'])


# ------------------------------------------------------------ one run


def test_pictures_and_videos_of_one_run(tmp_path, videos):
    """Each from its own path, or from the common one."""
    common = lines(tmp_path / 'common', videos, 'i2v')
    edits = edit_lines(tmp_path / 'edits', [edit(0)])
    data = ConfigDict(dict(path=str(common), paths=dict(edit=str(edits), t2v=None), seed=0))
    data.update(height=30, width=40, frames=5, fps=FPS, short_clips='refuse', references=2)
    data.tasks = dict(edit=0.5, t2v=0.5)
    found = SOURCES['captioned'](data)
    assert found.keys() == {'edit', 't2v', 'i2v'}
    assert found['t2v'] is found['i2v']
    assert len(found['t2v']) == COUNT
    assert found['edit'][0].text == 'edit 0'
    data.paths.edit = None
    with pytest.raises(InputError, match=r'dataset\.jsonl has no line of task edit'):
        SOURCES['captioned'](data)
    data.path = None
    with pytest.raises(
        InputError, match=r'config\.data\.path is missing, or config\.data\.paths\.e'
    ):
        SOURCES['captioned'](data)
    data.paths.i2v = 'x'
    with pytest.raises(InputError, match="paths has 'i2v'; it takes t2i, edit, t2v, v2v, r2v"):
        SOURCES['captioned'](data)


# ------------------------------------------------------------ batches of one size


SHAPES = [(30, 60)] * 5 + [(60, 30)] * 3 + [(40, 40)] * 11 + [(80, 78)]
SIZES = {(30, 60): (24, 48), (60, 30): (48, 24), (40, 40): (32, 32), (80, 78): (32, 32)}


def shaped(i: int) -> dict:
    height, width = SHAPES[i]
    source, target = (picture(i + n, width, height) for n in (0, 100))
    return dict(source=source, target=target, words=f'edit {i}')


def unseen_sizes(folder: pathlib.Path, edits: list[dict]) -> pathlib.Path:
    """Columns that tell sizes are believed: those of three pictures are wrong, or empty."""
    sizes = [*SHAPES]
    sizes[0] = sizes[19]
    heights = [h for h, _ in sizes]
    told = dict(height=[*heights[:-1], None], width=[w for _, w in sizes])
    words = [e['words'] for e in edits]
    return table(folder, edits, 'src_img', 'edited_img', instruction=words, **told)


@pytest.fixture
def nearest(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    sizes = [*{*SIZES.values()}]
    monkeypatch.setattr(kontext_sizes, 'KONTEXT_SIZES', sizes)
    return functools.partial(kontext_sizes.context_size, multiple=4)


@pytest.mark.parametrize('write', [gpt_tars, edit_lines, unseen_sizes, hq_edit])
@pytest.mark.parametrize('batch', [1, 4])
def test_batches_of_one_size(tmp_path, write, batch, nearest):
    """Each the nearest; every record is there, and again in another run of the same seed."""
    edits = [shaped(i) for i in range(len(SHAPES))]
    folder, runs = write(tmp_path / 'data', edits), []
    for _ in range(2):  # the second one knows the sizes
        source = captioned(folder, 'edit')
        source.group(batch, nearest)
        assert len(source) == {1: 20, 4: 8 + 4 + 12}[batch]
        runs.append(records(source))
    assert len(list((tmp_path / 'cache').rglob('*.npy'))) == 1
    assert all(map(same, *runs))
    assert {record.text for record in runs[0]} == {e['words'] for e in edits}
    for start in range(0, len(runs[0]), batch):
        assert len({drawn(r).shape for r in runs[0][start : start + batch]}) == 1
    for record in runs[0]:
        i = int(record.text.removeprefix('edit '))
        wrong = write is unseen_sizes and i == 0
        size = (32, 32) if wrong else SIZES[SHAPES[i]]
        assert record.pixels.shape == record.source.shape == (1, *size, 3)
    seen = [i for record in runs[0] for i in [record.text]]
    assert seen != sorted(seen)


def test_broken_ones_are_replaced_by_such_of_their_size(tmp_path, nearest):
    """A header that cannot be read has no size: it is left out, and counted."""
    edits = [shaped(i) for i in range(len(SHAPES))]
    edits[1]['target'], edits[6]['target'] = b'', edits[6]['target'][:-50]
    edits[9]['source'] = b'x'
    edits[12]['source'] = picture(0, 80, 10)
    source = captioned(edit_lines(tmp_path / 'data', edits), 'edit')
    source.group(4, nearest)
    assert [name.split('#t/')[1] for name in source.broken] == ['9)', '12)']
    found = records(source)
    assert {record.text for record in found} == {
        f'edit {i}' for i in range(len(SHAPES)) if i not in (1, 6, 9, 12)
    }
    assert len(source.broken) == 4
    for start in range(0, len(found), 4):
        assert len({drawn(r).shape for r in found[start : start + 4]}) == 1
    videos = captioned(tars(tmp_path / 'videos', [b'']), 't2v')
    with pytest.raises(InputError, match=r'config\.data\.sizes is for pictures, not for t2v'):
        videos.group(4, nearest)


# ------------------------------------------------------------ refused in one line


@pytest.mark.parametrize(
    ('files', 'kind', 'message'),
    [
        ({'a.csv': 'video,caption\na.mp4,b\n'}, 't2v', 'of the 1 rows of .*a.csv none has its fil'),
        (
            {'a.csv': 'clip,caption\n'},
            't2v',
            r'no column of paths for .*video; .* are: clip \(text',
        ),
        ({'a.csv': 'video\n'}, 't2v', r'no column of texts for .*caption; its columns are: video'),
        ({'a.csv': '', 'b.csv': ''}, 't2v', 'holds a.csv and b.csv; give one of them'),
        ({'a.csv': '', 'metadata/b.json': ''}, 't2v', 'a.csv has no column of'),
        ({'a.tar': '', 'b.csv': ''}, 't2v', r'a\.tar is no tar'),  # a csv may be about tars
        ({'metadata/a.json': '[{"input": "a"}]'}, 'edit', "a.json: want .*KeyError\\('output'\\)"),
        ({'metadata/a.json': '{'}, 'edit', 'a.json: want a list of objects with input, output'),
        ({'metadata/a.json': '[]', 'a.csv': ''}, 'edit', 'a.csv has no column of'),
        ({}, 'edit', 'holds neither dataset.jsonl nor'),
        ({'metadata/a.json': ''}, 't2i', 'holds neither dataset.jsonl nor'),
        (
            {'dataset.jsonl': '{"task": "edit", "target": "a", "source": 3}'},
            'edit',
            'line 1: source wants to be a text',
        ),
        ({'dataset.jsonl': '{"task": "t2v", "target": "a"}'}, 'v2v', 'has no line of task v2v'),
    ],
)
def test_what_is_refused(tmp_path, files, kind, message):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        find_samples(tmp_path, None, KIND[kind])
    assert '\n' not in str(caught.value)


def test_tars_of_edits_that_are_refused(tmp_path):
    write_tar(tmp_path / 'a.tar', {'input/0.png': b'x'})
    with pytest.raises(
        InputError, match=r'wants metadata/NAME\.json that tells .* 1 \.tar files h'
    ):
        find_samples(tmp_path, None, KIND['edit'])
    write_tar(tmp_path / 'b.tar', {'input/0.png': b'y', 'metadata/b.json': b'[]'})
    with pytest.raises(
        InputError, match=r'b\.tar and .*a\.tar both hold input/0\.png; give each a'
    ):
        find_samples(tmp_path, None, KIND['edit'])
