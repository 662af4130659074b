"""Bad input ends with exit code 2 and one line, and leaves nothing behind."""

import contextlib
import fcntl
import importlib
import json
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from metacanvas_jax import command
from metacanvas_jax.build import part_sizes
from metacanvas_jax.checkpoint import save_weights
from tests.test_resume import CONFIG, ROOT, config_file, environment, uninterrupted
from tests.test_resume import command as command_line


@contextlib.contextmanager
def script(name: str):
    """train.py or sample.py as a module, its flags defined only for as long as it is used."""
    before = set(flags.FLAGS)
    module = importlib.import_module(name)
    # Kept on the module: pytest knows this file by another name than those who import from it.
    new = {key: flags.FLAGS[key] for key in set(flags.FLAGS) - before}
    own = vars(module).setdefault('_own_flags', new)
    for key, flag in own.items():
        if key not in flags.FLAGS:
            flags.FLAGS[key] = flag
    command.define_config()
    try:
        yield module
    finally:
        for key in list(flags.FLAGS):
            flags.FLAGS[key].unparse()
        for key in own:
            delattr(flags.FLAGS, key)
        flags.FLAGS.unparse_flags()


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs train.py or sample.py in this process: (exit code, stderr)."""

    def run(name: str, *args: object):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, 'argv', [str(ROOT / f'{name}.py'), *map(str, args)])
        capfd.readouterr()
        with script(name) as module, pytest.raises(SystemExit) as caught:
            command.run(module.main)
        return caught.value.code, capfd.readouterr().err

    return run


@pytest.fixture
def tiny(tmp_path_factory):
    return f'--config={config_file(tmp_path_factory)}'


def assert_one_line(code: int, stderr: str, message: str) -> None:
    assert code == 2, stderr
    assert stderr.startswith('error: ')
    assert stderr.count('\n') == 1
    assert stderr.endswith('\n')
    assert re.search(message, stderr), stderr


BATCH = 'config.batch_size 12 is not divided by 8 devices x 1 accumulated parts; nearest: 16'
TRAIN = [
    (None, [], '--config is missing; give one of: .*quickstart.py'),
    ('nope.py', [], 'config file not found: nope.py; there are: .*quickstart.py'),
    ('', ['--config.backbone.num_layer=1'], "'backbone.num_layer'; did you mean 'backbone.num_l"),
    ('', ['--config.steps=many'], "config.steps wants an int, got 'many'"),
    ('', ['--config.steps=0'], 'config.steps must be at least 1, got 0'),
    ('', ['--config.log.every=0'], 'config.log.every must be at least 1, got 0'),
    (
        '',
        ["--config.trainable=('backbon/.*',)"],
        "pattern 'backbon/.*' matches none of .* backbone",
    ),
    ('', ['--config.batch_size=12'], BATCH),
    ('', ['--config.mesh.fsdp=3'], 'fsdp=3 tensor=1 does not fit 8 devices'),
    ('', ['--config.data.size=30'], r'height 30 is not a multiple of 4 \(nearest: 32\)'),
    (
        '',
        ['--config.data.source=shape'],
        "config.data.source 'shape' is unknown; there are: captioned, shapes",
    ),
    ('', ['--config.objective=flo'], "config.objective 'flo' is unknown; there are: flow, next_"),
    ('', ['--config.prompt.buckets=9,16'], r'a prompt has \d+ tokens, the largest bucket holds 16'),
    ('', ['--config.prompt.tokenizer=/nowhere'], 'no tokenizer.json in /nowhere'),
    ('', ['--config.weights.mllm=/nowhere'], 'no config.json in /nowhere'),
    (
        '',
        ['--config.weights.mllm=tiny_qwen', '--config.mllm.size=3b'],
        'does not fit config.mllm: hidden_si',
    ),
]


@pytest.mark.parametrize(('config', 'args', 'message'), TRAIN, ids=lambda value: str(value)[:40])
def test_train(run, tiny, tmp_path, config, args, message):
    workdir = tmp_path / 'run'
    given = {None: [], '': [tiny]}.get(config, [f'--config={config}'])
    code, stderr = run('train', *given, f'--workdir={workdir}', *args)
    assert_one_line(code, stderr, message)
    assert not workdir.exists()


@pytest.mark.parametrize('broken', ['missing', 'smaller', 'unknown', 'absent', 'truncated'])
def test_weights_that_do_not_fit(run, tiny, tmp_path, broken, tmp_path_factory):
    config = command.load_config(tiny.removeprefix('--config='))
    sizes = part_sizes(config, 'mllm').to_json()
    folder = tmp_path / 'weights'
    arrays = {'language/norm/scale': np.ones(192, np.float32)}
    message = 'does not fit this config: .* is missing there'
    if broken == 'smaller':
        arrays = {'language/norm/scale': np.ones(7, np.float32)}
        message = r'norm/scale is \(7,\) there, \(192,\) here'
    save_weights(folder, arrays, sizes)
    file = folder / 'model.safetensors'
    if broken == 'unknown':
        (folder / 'config.json').write_text('{"hidden_size": 1}')
        message = 'config.json is not the config of a Qwen2.5-VL model'
    elif broken == 'absent':
        file.unlink()
        message = 'no weights: .*model.safetensors does not exist'
    elif broken == 'truncated':
        file.write_bytes(file.read_bytes()[:-9])
        message = 'model.safetensors has .* its header says'
    workdir = tmp_path / 'run'
    code, stderr = run('train', tiny, f'--workdir={workdir}', f'--config.weights.mllm={folder}')
    assert_one_line(code, stderr, message)
    assert not workdir.exists()


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob('*') if path.is_file() and path.name != '.lock']
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def workdir(tmp_path, tmp_path_factory):
    """A trained run of one's own."""
    source = uninterrupted(tmp_path_factory)
    return pathlib.Path(shutil.copytree(source, tmp_path / 'trained'))


def test_another_config_in_a_workdir(run, tiny, workdir):
    before = contents(workdir)
    code, stderr = run('train', tiny, f'--workdir={workdir}', '--config.backbone.num_layers=2')
    assert_one_line(code, stderr, r'with another config \(backbone.num_layers: 1 there, 2 now\)')
    assert contents(workdir) == before


def test_a_workdir_in_use(run, tiny, workdir):
    before = contents(workdir)
    with (workdir / '.lock').open('a+') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, stderr = run('train', tiny, f'--workdir={workdir}')
    assert_one_line(code, stderr, f'workdir {workdir} is in use by ')
    assert contents(workdir) == before


ASK = ['--checkpoint=HERE/trained', '--output=HERE/out.png']
ONE = [*ASK, '--prompt=a circle']
FILE = [*ASK, '--prompts=HERE/prompts.jsonl']
SAMPLE = [
    (ASK, '', 'give either --prompt or --prompts'),
    ([*FILE, '--prompt=a circle'], '', 'give either --prompt or --prompts'),
    ([*ONE, '--task=t3i'], '', "--task 't3i' is unknown; there are: t2i"),
    ([*ONE, '--num_images=0'], '', '--num_images must be at least 1, got 0'),
    ([*ONE, '--guidance=strong'], '', 'guidance'),
    ([*ONE, '--noise=HERE/none.npy'], '', '--noise .*none.npy does not exist'),
    ([*ONE, '--noise=HERE/prompts.jsonl'], 'text', '--noise .*prompts.jsonl is not a .npy array'),
    ([*ONE, '--noise=HERE/flat.npy'], '', r'flat.npy has shape \(4,\), want \(H, W, C\) of a pic'),
    (
        [*FILE, '--image=HERE/a.png'],
        '{"prompt": "x"}',
        '--image, --reference and --video go with --prompt',
    ),
    ([*FILE, '--noise=HERE/flat.npy'], '{"prompt": "x"}', 'go with --prompt, not with --prompts'),
    (FILE, None, '--prompts .*prompts.jsonl does not exist'),
    ([*ASK, '--prompts=geneva'], None, '--prompts geneva does not exist'),
    (FILE, '', '--prompts .*prompts.jsonl holds no prompt'),
    (FILE, '\n \n', '--prompts .*prompts.jsonl holds no prompt'),
    (FILE, '{"prompt": "x"}\n{', 'prompts.jsonl:2 is not JSON'),
    (FILE, '{"promt": "x"}', 'prompts.jsonl:1 wants an object with "prompt"'),
    (FILE, '{"prompt": "x", "sed": 1}', "prompts.jsonl:1: 'sed' is unknown; legal are prompt, id"),
    (FILE, '{"prompt": "x", "seed": "one"}', "prompts.jsonl:1: seed wants int, got 'one'"),
    (FILE, '{"prompt": "x", "id": "a"}\n{"prompt": "y", "id": "a"}', 'the same id'),
    (FILE, '{"prompt": "x", "id": "../a"}', "id '../a' is not a file name"),
    (
        [*ASK, f'--prompt={" ".join(["a red circle"] * 40)}'],
        '',
        r'a prompt has \d+ tokens, the largest bucket holds 96',
    ),
    ([*ONE, '--height=30'], '', r'height 30 is not a multiple of 4 \(nearest: 32\)'),
    (
        [*ONE, '--noise=HERE/small.npy'],
        '',
        r'the noise has shape \(2, 2, 3\), this size wants \(8, 8, 48\)',
    ),
    (['--checkpoint=HERE/no', *ONE[1:]], '', 'no such workdir or checkpoint: .*/no'),
    (['--checkpoint=HERE', *ONE[1:]], '', r'is neither a workdir \(no config.json in it\) nor'),
    (['--checkpoint=HERE/trained/checkpoints/999', *ONE[1:]], '', 'checkpoint.*999'),
]


@pytest.mark.parametrize(('args', 'prompts', 'message'), SAMPLE, ids=lambda value: str(value)[-40:])
def test_sample(run, workdir, tmp_path, args, prompts, message):
    if prompts is not None:
        (tmp_path / 'prompts.jsonl').write_text(prompts)
    np.save(tmp_path / 'flat.npy', np.zeros(4, np.float32))
    np.save(tmp_path / 'small.npy', np.zeros((2, 2, 3), np.float32))
    before = contents(tmp_path)
    code, stderr = run('sample', *(word.replace('HERE', str(tmp_path)) for word in args))
    assert_one_line(code, stderr, message)
    assert contents(tmp_path) == before


def test_no_canvas_no_map(run, tmp_path):
    every = "config.weights = dict.fromkeys(('mllm', 'backbone', 'context'), 'random')"
    (tmp_path / 'drawn.py').write_text(CONFIG.replace('return', f'{every}\n    return'))
    ask = [f'--output={tmp_path}/out.png', '--prompt=x', f'--canvas_map={tmp_path}/map.png']
    code, stderr = run('sample', f'--config={tmp_path}/drawn.py:no_canvas', *ask)
    message = r'--canvas_map: this model has no canvas \(config.canvas.fuse is none\)'
    assert_one_line(code, stderr, message)
    assert contents(tmp_path).keys() == {'drawn.py'}


def process(name: str, *args: object, devices: int = 1) -> tuple[int, str]:
    done = subprocess.run(
        command_line(f'{name}.py', *args),
        env=environment(devices),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


def test_processes_of_their_own(tmp_path, workdir, tiny):
    """What only a whole process shows: required flags, and warnings of libraries on stderr."""
    assert_one_line(*process('train', tiny), '--workdir is missing')
    assert_one_line(*process('sample', '--output=x', '--prompt=x'), 'either --checkpoint or')
    ask = [f'--checkpoint={workdir}', f'--output={tmp_path}/out.png']
    before = contents(tmp_path)
    # A config.json that is not that of the checkpoint beside it.
    config = json.loads((workdir / 'config.json').read_text())
    config['context']['hidden'] = 16
    (workdir / 'config.json').write_text(json.dumps(config))
    message = r'holds another model than this config makes: .*context.* is float32\['
    assert_one_line(*process('sample', *ask, '--prompt=x'), message)
    (workdir / 'config.json').write_bytes(before['trained/config.json'])
    assert contents(tmp_path) == before
