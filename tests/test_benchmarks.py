"""Folders of the benchmarks of edited pictures and of videos, as their evaluators walk them."""

import collections
import hashlib
import io
import json
import os
import pathlib
import shutil
import tempfile

import av
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from metacanvas_jax.data.media import encode_video, read_image
from metacanvas_jax.data.records import Record
from metacanvas_jax.evaluate.benchmarks import BENCHMARKS, open_benchmark
from metacanvas_jax.evaluate.layouts import ASSETS, Layout
from metacanvas_jax.evaluate.picture_benchmarks import GEDIT_GROUPS, OMNICONTEXT_TASKS
from metacanvas_jax.evaluate.video_benchmarks import VBench, VBenchI2V
from metacanvas_jax.types import InputError
from tests.test_bad_input import assert_one_line
from tests.test_layouts import sample  # noqa: F401

SHIPPED = ASSETS / 'vbench'
T2V = json.loads((SHIPPED / 'VBench_full_info.json').read_text())
I2V = json.loads((SHIPPED / 'vbench2_i2v_full_info.json').read_text())
FRAMES, FPS = 9, 4  # seconds 0, 1, 2 at frames 0, 4, 8


def png(colour=0) -> bytes:
    file = io.BytesIO()
    Image.new('RGB', (4, 3), (colour, 10, 20)).save(file, 'PNG')
    return file.getvalue()


def mp4(frames=FRAMES, fps=FPS) -> bytes:
    """Frame i is of grey 20 i."""
    pixels = np.full((frames, 16, 16, 3), 1, np.uint8) * np.arange(0, 20 * frames, 20)[
        :, None, None, None
    ].astype(np.uint8)
    file = io.BytesIO()
    encode_video(file, pixels, fps=fps, comment='')
    return file.getvalue()


VIDEO = mp4()


def index_first(video: bytes) -> bytes:
    """The same packets behind the table of where they are, as files for the web have it."""
    with tempfile.TemporaryDirectory() as folder:
        target = f'{folder}/x.mp4'  # FFmpeg reads it again to move the table
        with (
            av.open(io.BytesIO(video)) as source,
            av.open(target, 'w', options={'movflags': 'faststart'}) as written,
        ):
            stream = written.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    written.mux(packet)
        return pathlib.Path(target).read_bytes()


def write(path: pathlib.Path, data: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def jsonl(path: pathlib.Path, rows) -> pathlib.Path:
    write(path, '\n'.join(map(json.dumps, rows)) + '\n')
    return path


def jpeg(path: pathlib.Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 6), (200, 30, 40)).save(path, 'JPEG')
    return path.name


def open_layout(name: str, data: object = None, **settings) -> Layout:
    chosen = {'samples': None, 'frames': FRAMES, 'fps': FPS, **settings}
    layout = open_benchmark(name if data is None else f'{name}={data}', **chosen)
    assert layout
    return layout


def fill(layout: Layout, folder: pathlib.Path) -> None:
    """As sample.py is to, with one picture and one video for all."""
    for picture in layout.pictures(7):
        for path in picture.paths:
            write(folder / path, VIDEO if path.endswith('.mp4') else png())
    for path, source in layout.sources().items():
        file = io.BytesIO()
        source.save(file)
        write(folder / path, file.getvalue())


def contents(folder: pathlib.Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob('*') if path.is_file()}


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The user's own copies, two prompts of each kind."""
    root = tmp_path_factory.mktemp('data')
    shown = jpeg(root / 'a.jpg')
    write(root / 'raw.png', png(50))
    write(root / 'clip.mp4', VIDEO)
    write(root / 'short.mp4', mp4(frames=3))
    gedit = [
        {
            'task_type': group,
            'key': f'{group}{i}',
            'instruction': f'{language} {i}',
            'instruction_language': language,
            'input_image': shown,
            'input_image_raw': 'raw.png' if i else None,
            'Intersection_exist': True,
        }
        for group in GEDIT_GROUPS
        for language in ('en', 'cn')
        for i in range(2)
    ]
    omni = [
        {
            'key': f'{i:03}',
            'task_type': task,
            'instruction': task,
            'input_images': [shown] * (1 + i),
        }
        for task in OMNICONTEXT_TASKS
        for i in range(2)
    ]
    basic = {
        f'{i}': {'id': f'animal/{i}.jpg', 'prompt': f'edit {i}', 'edit_type': 'add'}
        for i in range(3)
    }
    for row in basic.values():
        jpeg(root / row['id'])
    write(root / 'basic_edit.json', json.dumps(basic))
    edits = [
        {'id': name, 'prompt': 'p', 'video': video}
        for name, video in (('x', 'clip.mp4'), ('y', 'short.mp4'))
    ]
    for row in I2V:
        write(root / 'crop' / row['image_name'], b'')
    return {
        'gedit': jsonl(root / 'gedit.jsonl', gedit),
        'omnicontext': jsonl(root / 'omni.jsonl', omni),
        'omnicontext_video': root / 'omni.jsonl',
        'imgedit': root / 'basic_edit.json',
        'video_edits': jsonl(root / 'edits.jsonl', edits),
        'vbench_i2v': root / 'crop',
    }


# ---------------------------------------------------------------- what their evaluators look for


def test_shipped_prompts_are_the_published_ones():
    def blob(name: str) -> str:
        """As git names the file in github.com/Vchitect/VBench."""
        text = (SHIPPED / name).read_bytes()
        return hashlib.sha1(b'blob %d\0' % len(text) + text).hexdigest()

    assert blob('VBench_full_info.json') == 'a3a4f0968c1a15f19518903b98d7cca9ef9cbe5a'
    assert blob('vbench2_i2v_full_info.json') == '33c3e3f66b5a88534d2665001934ca5f5cfa76ca'
    assert blob('LICENSE') == 'f49a4e16e68b128803cc2dcea614603632b04eac'


def test_gedit(data, tmp_path):
    layout = open_layout('gedit', data['gedit'])
    fill(layout, tmp_path)
    for group in GEDIT_GROUPS:
        for i in range(2):
            save = f'{tmp_path}/fullset/{group}/en/{group}{i}'
            assert os.path.exists(f'{save}_SRCIMG.png')
            assert os.path.exists(f'{save}.png')
    assert len(contents(tmp_path)) == 11 * 2 * 2
    with Image.open(tmp_path / 'fullset/color_alter/en/color_alter1_SRCIMG.png') as picture:
        assert picture.format == 'PNG'
        np.testing.assert_array_equal(picture, read_image(data['gedit'].parent / 'a.jpg'))
    one, other = layout.pictures(7)[:2]
    assert [path.name for path in one.images + other.images] == ['a.jpg', 'raw.png']
    assert (one.prompt, one.index, other.index, one.seed) == ('en 0', 0, 1, 7)
    (tmp_path / 'gpt4o').mkdir()
    assert not layout.faults(tmp_path)
    assert layout.summary([]) == '22 pictures, 22 files beside them; whole'


def test_imgedit(data, tmp_path):
    layout = open_layout('imgedit', data['imgedit'])
    fill(layout, tmp_path)
    infos = json.loads(data['imgedit'].read_text())
    assert contents(tmp_path) == {f'{key}.png' for key in infos}
    for picture in layout.pictures(0):
        info = infos[picture.id]
        assert (picture.prompt, picture.images) == (
            info['prompt'],
            (data['imgedit'].parent / info['id'],),
        )
    write(tmp_path / 'result.json', '{}')
    assert not layout.faults(tmp_path)


def test_omnicontext(data, tmp_path):
    layout = open_layout('omnicontext', data['omnicontext'])
    fill(layout, tmp_path)
    for task in OMNICONTEXT_TASKS:
        for key in ('000', '001'):
            assert os.path.exists(os.path.join(tmp_path, 'fullset', task, f'{key}.png'))
    assert len(contents(tmp_path)) == 16
    assert [len(picture.images) for picture in layout.pictures(0)] == [1, 2] * 8
    (tmp_path / 'gpt4dot1/single_object').mkdir(parents=True)
    assert not layout.faults(tmp_path)


def test_omnicontext_video(data, tmp_path):
    layout = open_layout('omnicontext_video', data['omnicontext_video'])
    fill(layout, tmp_path)
    folder = 'fullset/scene_object'
    mine = {path for path in contents(tmp_path) if path.startswith(f'{folder}/')}
    assert mine == {f'{folder}/{key}.mp4' for key in ('000', '001')} | {
        f'{folder}/frames/{key}_{k}.png' for key in ('000', '001') for k in range(3)
    }
    assert list(layout.pictures(0)[0].stills.values()) == [0, 4, 8]
    assert not layout.faults(tmp_path)
    assert layout.summary([]) == '16 videos, 48 files beside them; whole'
    full = open_layout('omnicontext_video', data['omnicontext_video'], frames=None, fps=None)
    assert list(full.pictures(0)[0].stills.values()) == [0, 24, 48, 72, 96, 120]


def test_video_edits(data, tmp_path):
    layout = open_layout('video_edits', data['video_edits'])
    fill(layout, tmp_path)
    names = [f'{name}{kind}' for name in 'xy' for kind in ('', '_source')]
    assert contents(tmp_path) == {f'{name}.mp4' for name in names} | {
        f'frames/{name}_{k}.png' for name in names for k in range(3)
    }
    assert (tmp_path / 'x_source.mp4').read_bytes() == VIDEO
    for name, greys in (('x', (0, 80, 160)), ('y', (0, 40, 40))):  # the last frame of a short one
        for k, grey in enumerate(greys):
            with Image.open(tmp_path / f'frames/{name}_source_{k}.png') as picture:
                assert np.abs(np.asarray(picture).astype(int) - grey).max() <= 4
    assert [picture.video for picture in layout.pictures(0)] == [
        data['video_edits'].parent / name for name in ('clip.mp4', 'short.mp4')
    ]
    assert not layout.faults(tmp_path)


def test_vbench(tmp_path):
    layout = open_layout('vbench')
    pictures = layout.pictures(3)
    names = collections.Counter(picture.path for picture in pictures)
    assert max(names.values()) == 1
    wanted = set()
    for info in T2V:
        count = 25 if 'temporal_flickering' in info['dimension'] else 5
        wanted |= {f'{info["prompt_en"]}-{i!s}.mp4' for i in range(count)}
    assert names.keys() == wanted
    assert len(wanted) == 869 * 5 + 75 * 25
    assert max(len(name.encode()) for name in wanted) < 250  # a name, with .NAME.tmp around it
    assert len({picture.index for picture in pictures}) == len(pictures)
    fewer = {p.path: p.index for p in VBench(2, 2).pictures(3)}
    assert fewer.items() <= {p.path: p.index for p in pictures}.items()
    layout = VBench(1, 1)
    fill(layout, tmp_path)
    assert contents(tmp_path) == {f'{info["prompt_en"]}-0.mp4' for info in T2V}
    write(tmp_path / 'manifest.json', '{}')  # the evaluator might take its suffix for all videos'
    write(tmp_path / f'{T2V[0]["prompt_en"]}-1.mp4', VIDEO)
    assert collections.Counter(fault.kind for fault in layout.faults(tmp_path)) == {'extra': 2}


def test_vbench_i2v(data):
    layout = open_layout('vbench_i2v', data['vbench_i2v'], samples=2)
    pictures = layout.pictures(0)
    assert {p.path for p in pictures} == {f'{i["prompt_en"]}-{j}.mp4' for i in I2V for j in (0, 1)}
    assert [p.images for p in pictures[::2]] == [
        (data['vbench_i2v'] / i['image_name'],) for i in I2V
    ]
    assert len(VBenchI2V(data['vbench_i2v']).pictures(0)) == 5590
    assert not layout.lines()


# ---------------------------------------------------------------- what is amiss

BROKEN = {
    'no video': ('x.mp4', None, 'missing'),
    'no bytes': ('x.mp4', lambda b: b'', 'empty'),
    'half a video': ('x.mp4', lambda b: b[: len(b) // 2], 'unreadable'),
    'its index first': ('x.mp4', index_first, ''),
    'only its end cut off': ('x.mp4', lambda b: index_first(b)[:-20], 'unreadable'),
    'more of it cut off': ('x.mp4', lambda b: index_first(b)[:-90], 'unreadable'),
    'a web page': ('x.mp4', lambda b: b'<html>', 'unreadable'),
    'a picture': ('x.mp4', lambda b: png(), 'unreadable'),
    'a still gone': ('frames/x_2.png', None, 'missing'),
    'half a still': ('frames/x_2.png', lambda b: b[:-5], 'unreadable'),
    'a source gone': ('y_source.mp4', None, 'missing'),
    'a still of a source': ('frames/y_source_0.png', lambda b: b[:9], 'unreadable'),
    'a still more': ('frames/x_3.png', lambda b: png(), 'extra'),
    'half-written': ('.x.mp4.tmp', lambda b: b, 'extra'),
    'a video more': ('z.mp4', lambda b: VIDEO, 'extra'),
}


def test_faults(data, tmp_path):
    layout = open_layout('video_edits', data['video_edits'])
    fill(layout, tmp_path)
    for what, (name, change, kind) in BROKEN.items():
        path = tmp_path / name
        before = path.read_bytes() if path.exists() else None
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(before or b''))
        told = [(fault.kind, fault.path) for fault in layout.faults(tmp_path)]
        assert told == ([(kind, name)] if kind else []), what
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
    assert not layout.faults(tmp_path)
    shutil.rmtree(tmp_path / 'frames')
    assert layout.summary(layout.faults(tmp_path)) == '2 videos, 14 files beside them; 12 missing'


GEDIT = {
    'task_type': 'color_alter',
    'key': 'k',
    'instruction': 'i',
    'instruction_language': 'en',
    'input_image': 'raw.png',
}
EDIT = {'id': 'x', 'prompt': 'p', 'video': 'clip.mp4'}
REFUSED = [
    ('gedit', [], 'holds no prompt'),
    ('gedit', [GEDIT | {'task_type': 'color_change'}], "task_type 'color_change'; there are: back"),
    ('gedit', [GEDIT | {'instruction_language': 'cn'}], "whose language is 'en'"),
    ('gedit', [GEDIT | {'input_image': 'no.png'}], "names 'no.png', but there is no "),
    ('gedit', [GEDIT | {'input_image': None}], ":1 wants 'input_image', a str"),
    ('gedit', [GEDIT, GEDIT], 'two files would be fullset/color_alter/en/k.png'),
    ('gedit', [GEDIT, GEDIT | {'key': 'k_SRCIMG'}], 'two files would be .*k_SRCIMG.png'),
    ('gedit', [GEDIT | {'key': '../k'}], "'../k' is not a file name"),
    ('omnicontext', [{'key': 'k'}], "wants 'task_type'"),
    ('video_edits', [EDIT | {'video': 'raw.png'}], "names 'raw.png'; the sources are to be .mp4"),
    ('video_edits', [EDIT, EDIT | {'id': 'x_source'}], 'two files would be x_source.mp4'),
    ('video_edits', ['text'], ":1 wants 'id'"),
]


@pytest.mark.parametrize(('name', 'rows', 'message'), REFUSED, ids=lambda value: str(value)[-30:])
def test_data_that_is_refused(data, name, rows, message):
    file = jsonl(data['gedit'].parent / 'refused.jsonl', rows)
    with pytest.raises(InputError, match=message):
        open_layout(name, file).pictures(0)


def test_errors_of_the_caller_are_told(data, tmp_path):
    nothing = {'samples': None, 'frames': None, 'fps': None}
    assert open_benchmark('prompts.jsonl', **nothing) is None
    assert {name: type(open_layout(name, file)) for name, file in data.items()} == {
        name: BENCHMARKS[name] for name in data
    }
    for name, message in (
        ('gedit', 'gedit=FILE, your own copy'),
        ('vbench=x', 'vbench takes no file, got x'),
    ):
        with pytest.raises(InputError, match=message):
            open_benchmark(name, **nothing)
    with pytest.raises(InputError, match='one result of each prompt; leave out --num_images'):
        open_layout('gedit', data['gedit'], samples=2)
    with pytest.raises(InputError, match='at most 25 videos'):
        open_layout('vbench', samples=26).pictures(0)
    with pytest.raises(InputError, match=r'wants a picture .* of VBench-I2V'):
        open_layout('vbench_i2v', tmp_path).pictures(0)
    for name in ('gedit', 'imgedit'):
        with pytest.raises(InputError, match='no such file'):
            open_layout(name, tmp_path / 'nowhere').pictures(0)
    for text, message in (
        ('{', 'is not JSON'),
        ('[]', 'an object of keys'),
        ('{"1": {}}', 'id and'),
    ):
        write(tmp_path / 'b.json', text)
        with pytest.raises(InputError, match=message):
            open_layout('imgedit', tmp_path / 'b.json').pictures(0)


# ---------------------------------------------------------------- through sample.py


class Drawer:
    """Draws grey, and remembers what it was shown."""

    config = ConfigDict(dict(data=dict(fps=FPS)))

    def __init__(self):
        self.shown = []

    def frames(self, frames=None, task=None):
        return frames or 1

    def record(self, prompt, images=(), references=(), video=None):
        frames = 0 if video is None else len(video[0])
        self.shown.append((len(images), len(references), frames))
        return Record(prompt)

    def sample(self, records, *, frames, **settings):
        assert settings['task'] is None
        return [self.frames(frames)] * len(records)

    def decode(self, latents):
        return np.full((len(latents), latents[0], 16, 16, 3), 128, np.uint8)


@pytest.mark.parametrize(
    ('name', 'flags', 'shown'),
    [
        ('gedit', [], {(1, 0, 0)}),
        ('imgedit', [], {(1, 0, 0)}),
        ('omnicontext', [], {(1, 0, 0), (2, 0, 0)}),
        ('omnicontext_video', ['--frames=9', '--fps=4'], {(0, 1, 0), (0, 2, 0)}),
        ('video_edits', ['--frames=9', '--fps=4'], {(0, 0, 9), (0, 0, 3)}),
    ],
)
def test_sample_fills_a_folder(data, sample, tmp_path, name, flags, shown):  # noqa: F811
    drawer, out = Drawer(), tmp_path / 'out'
    ask = [f'--prompts={name}={data[name]}', f'--output={out}', *flags]
    code, _, stderr = sample('--checkpoint=any', *ask, pipe=drawer)
    assert code == 0, stderr
    assert {*drawer.shown} == shown
    code, told, _ = sample('--check', *ask)
    assert code == 0, told
    again = Drawer()
    assert sample('--checkpoint=any', *ask, pipe=again)[0] == 0
    assert not again.shown


def test_too_few_frames_for_the_stills(data, sample, tmp_path):  # noqa: F811
    ask = ['--checkpoint=any', f'--prompts=video_edits={data["video_edits"]}', '--fps=4']
    drawer = Drawer()
    drawer.decode = lambda latents: np.zeros((len(latents), 5, 16, 16, 3), np.uint8)
    code, _, stderr = sample(*ask, '--frames=9', f'--output={tmp_path}', pipe=drawer)
    assert_one_line(code, stderr, 'wants frame 8, and 5 are drawn; give --frames')


def test_lines_name_files_beside_their_own(data, sample, tmp_path):  # noqa: F811
    lines = [
        dict(prompt='a', image='a.jpg'),
        dict(prompt='b', references=['a.jpg', 'raw.png'], id='two'),
        dict(prompt='c', video='clip.mp4', seed=3),
        dict(prompt='d'),
    ]
    file = jsonl(data['gedit'].parent / 'prompts.jsonl', lines)
    drawer = Drawer()
    ask = ['--checkpoint=any', f'--prompts={file}', f'--output={tmp_path}', '--frames=5']
    code, _, stderr = sample(*ask, '--fps=4', pipe=drawer)
    assert code == 0, stderr
    assert drawer.shown == [(1, 0, 0), (0, 2, 0), (0, 0, 5), (0, 0, 0)]
    assert contents(tmp_path) == {'0.mp4', 'two.mp4', '2.mp4', '3.mp4'}
    (data['gedit'].parent / 'bad.jsonl').write_text('{"prompt": "a", "image": "none.png"}')
    ask[1] = f'--prompts={data["gedit"].parent / "bad.jsonl"}'
    code, _, stderr = sample(*ask, pipe=drawer)
    assert_one_line(code, stderr, r'none\.png')
