"""What cannot be converted is refused in one line with exit code 2, and leaves nothing behind."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
import torch

from convert.registry import FAMILIES
from tests import published

ROOT = pathlib.Path(__file__).parents[1]

# Runs the command line once for each line of JSON on stdin, in one process: starting takes long.
DRIVER = """
import contextlib, io, json, sys, traceback
from absl import flags
from convert.__main__ import main
from metacanvas_jax import command
for line in sys.stdin:
    words, rest = json.loads(line)
    sys.argv = ['convert', *rest]
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command.run(lambda: main(words))
        except SystemExit as exit:
            code = exit.code
        except Exception:
            traceback.print_exc()
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
    for name in list(flags.FLAGS):
        flags.FLAGS[name].unparse()
"""


def run(*commands: str) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of `python -m convert WORDS`, for each of them."""
    lines = []
    for text in commands:
        words = text.split()
        first = next((i for i, word in enumerate(words) if word.startswith('-')), len(words))
        lines.append(json.dumps([words[:first], words[first:]]))
    done = subprocess.run(
        [sys.executable, '-c', DRIVER],
        input='\n'.join(lines),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, 'HF_HUB_OFFLINE': '1'},
        timeout=300,
        check=True,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


class Evil:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


@pytest.fixture(scope='module')
def room(tmp_path_factory):
    """A folder of bad checkpoints, by name."""
    room = tmp_path_factory.mktemp('room')
    good = published.save(room / 'good')
    config = (good / 'config.json').read_bytes()

    def copy(name: str) -> pathlib.Path:
        (room / name).mkdir()
        for file in good.iterdir():
            (room / name / file.name).write_bytes(file.read_bytes())
        return room / name

    def one(name: str, arrays: dict[str, np.ndarray]) -> pathlib.Path:
        (room / name).mkdir()
        safetensors.numpy.save_file(arrays, room / name / 'model.safetensors')
        (room / name / 'config.json').write_bytes(config)
        return room / name

    shard = next(good.glob('*-00002-of-*.safetensors')).name
    (copy('missing_shard') / shard).unlink()
    file = copy('truncated') / shard
    os.truncate(file, file.stat().st_size - 100)
    pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n'
    (copy('pointer') / shard).write_text(pointer)
    (copy('pointer_index') / 'model.safetensors.index.json').write_text(pointer)
    for name, change in {
        'elsewhere': lambda places: places.update(x='../good/model.safetensors'),
        'astray': lambda places: places.update({'model.norm.bias': shard}),
    }.items():
        index = copy(name) / 'model.safetensors.index.json'
        values = json.loads(index.read_text())
        change(values['weight_map'])
        index.write_text(json.dumps(values))
    (copy('no_config') / 'config.json').unlink()
    file = copy('shallow') / 'config.json'
    file.write_text(file.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    twice = copy('twice')
    (twice / 'model.safetensors.index.json').unlink()
    (twice / 'copy.safetensors').write_bytes((twice / shard).read_bytes())

    names = published.tensors(good)
    file = one('fp8', {}) / 'model.safetensors'
    header = json.dumps({'w': {'dtype': 'F8_E4M3', 'shape': [4], 'data_offsets': [0, 4]}}).encode()
    file.write_bytes(len(header).to_bytes(8, 'little') + header + b'\0' * 4)
    one('wrong_family', {'single_blocks.0.modulation.lin.weight': np.zeros((3, 1), np.float32)})
    (room / 'empty').mkdir()
    (room / 'pipeline/transformer').mkdir(parents=True)
    (room / 'pipeline/transformer/a.safetensors').touch()

    for name in ('evil', 'cut', 'nested', 'two'):
        (room / name).mkdir()
        (room / name / 'config.json').write_bytes(config)
    torch.save({'model.norm.weight': Evil(room / 'harm')}, room / 'evil/weights.pth')
    state = {name: torch.tensor(array) for name, array in names.items()}
    torch.save(state, room / 'cut/weights.pth')
    os.truncate(room / 'cut/weights.pth', 9000)
    torch.save({'state_dict': state}, room / 'nested/weights.pth')
    for name in ('a.pth', 'b.pth'):
        torch.save(state, room / 'two' / name)
    (room / 'notes.txt').write_text('mine')
    (room / 'taken').mkdir()
    return room


# The source, what else is on the command line, and the message.
SOURCES = [
    ('missing_shard', '', r'index.json names model-00002-of-.*, not in its folder \(\d+ of 68'),
    ('truncated', '', r'truncated/model-00002-of-\S+ has \d+ bytes, its header says \d+; downl'),
    ('pointer', '', r'pointer/model-00002\S+ is a git-lfs pointer of \d+ bytes'),
    ('pointer_index', '', 'index.json is a git-lfs pointer'),
    ('elsewhere', '', "names '../good/model.safetensors', which is not a file beside it"),
    ('astray', '', 'looks for model.norm.bias in model-00002.*, which does not hold it'),
    ('no_config', '', 'no config.json in'),
    ('shallow', '', r'12 unused: model.layers.2.\S+; .* \.\.\.'),
    ('twice', '', r'is in \S+ and in model-00002\S+; give the file you mean'),
    ('fp8', '', 'w in .*fp8/model.safetensors is F8_E4M3: an fp8 checkpoint.*bf16'),
    ('wrong_family', '', r'is no qwen2_5_vl: its names are those of flux \(bfl\)'),
    ('empty', '', 'empty holds no .safetensors and no .pth$'),
    ('pipeline', '', 'no .pth; give one of its folders transformer'),
    ('evil', '', 'evil/weights.pth holds more than tensors and is refused'),
    ('cut', '', r'cut/weights.pth \(9000 bytes\) is no whole torch file'),
    ('nested', '', 'is no plain state dict'),
    ('two', '', 'holds several checkpoints, give one of the files: a.pth, b.pth'),
    ('notes.txt', '', 'is neither a folder nor a .safetensors or .pth file'),
    ('nowhere', '', 'no such file or folder: .*/nowhere$'),
    ('good', '--dtype=float16', "--dtype 'float16' is unknown; there are: bfloat16, float32"),
    ('good', '--tokenizer=tests', '--tokenizer tests holds no tokenizer'),
    ('good', '--layout=native', 'import takes no --layout'),
    ('good', '--target={room}/taken', 'taken exists already; remove it, or give another folder'),
    ('good', '--target={room}/notes.txt/out', 'cannot write .*Not a directory'),
]
COMMANDS = [
    ('', "unknown command ''; there are: list, import, export, check, pool"),
    ('chekc qwen2_5_vl', "unknown command 'chekc'"),
    ('import', "want import COMPONENT and flags, got 'import'"),
    ('list qwen2_5_vl', 'want list and flags'),
    ('check flux2 --manifest=x.json', "component 'flux2' is unknown; there are: qwen2_5_vl"),
    ('check qwen2_5_vl', 'check wants either --source or --manifest'),
    ('check qwen2_5_vl --manifest=x.json', 'cannot read x.json: No such file'),
    ('check qwen2_5_vl --manifest=pyproject.toml', 'is no manifest of a checkpoint'),
    ('import qwen2_5_vl --source=x', '--target is missing'),
    ('export qwen2_5_vl --source={room}/nowhere --target=x', 'no such folder: '),
    ('export qwen2_5_vl --source={room}/good --target={room}/x', 'good does not fit its config'),
    ('export qwen2_5_vl --source=x --target=y --layout=native', "has no layout 'native'"),
    ('import qwen2_5_vl --source=owner/name --target=x', 'no such file or folder: owner/name; nor'),
    ('import qwen2_5_vl --sauce=x --target=y', 'unknown flag --sauce; did you mean --source?'),
]


@pytest.fixture(scope='module')
def results(room):
    commands = [
        f'import qwen2_5_vl --source={room}/{source} --target={room}/out {more}'
        for source, more, _ in SOURCES
    ] + [command for command, _ in COMMANDS]
    before = sorted(room.rglob('*'))
    found = run(*(command.replace('{room}', str(room)) for command in commands))
    assert sorted(room.rglob('*')) == before
    return found


@pytest.mark.parametrize('i', range(len(SOURCES) + len(COMMANDS)))
def test_one_line(results, i):
    message = SOURCES[i][2] if i < len(SOURCES) else COMMANDS[i - len(SOURCES)][1]
    code, out, err = results[i]
    assert (code, out) == (2, ''), err
    assert err.startswith('error: ')
    assert err.count('\n') == 1
    assert re.search(message, err.strip()), err


def test_the_commands(room, tmp_path):
    manifest = 'tests/manifests/qwen2_5_vl_3b.json'
    odd = json.loads((ROOT / manifest).read_text())
    odd['tensors'].popitem()
    (tmp_path / 'odd.json').write_text(json.dumps(odd))
    good, target, back = room / 'good', tmp_path / 'target', tmp_path / 'back'
    listed, fits, odd, source, imported, exported = run(
        'list',
        f'check qwen2_5_vl --manifest={manifest}',
        f'check qwen2_5_vl --manifest={tmp_path}/odd.json',
        f'check qwen2_5_vl --source={good}',
        f'import qwen2_5_vl --source={good} --target={target} --dtype=float32',
        f'export qwen2_5_vl --source={target} --target={back} --layout=transformers',
    )
    families = [f'{name}: {", ".join(family.layouts)}' for name, family in FAMILIES.items()]
    assert listed == (0, '\n'.join(families) + '\n', '')
    assert families[0] == 'qwen2_5_vl: transformers, transformers_5'
    expected = '824 tensors, 3754622976 parameters, 0 unused, 0 unfilled, 0 misshapen\n'
    assert fits == (0, f'qwen2_5_vl_3b: {expected}', '')
    assert odd[0] == 1
    assert '1 unfilled' in odd[1]
    assert source[0] == 0
    assert source[1].startswith('good: 68 tensors')
    assert (imported[0], exported[0]) == (0, 0)
    published.same(published.tensors(back), published.tensors(good))
