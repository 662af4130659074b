"""Flags and configs: what is accepted, and one clear line for what is not."""

import os
import subprocess
import sys
import textwrap

import jax
import pytest
from absl import flags

from metacanvas_jax import command
from metacanvas_jax.types import InputError

CONFIG = """
    from ml_collections import ConfigDict, config_dict

    def get_config(variant='sana'):
        if variant not in ('sana', 'flux'):
            raise ValueError(f'unknown variant {variant!r}; there are sana, flux')
        return ConfigDict({
            'backbone': variant, 'steps': 100, 'ema': False, 'size': (32, 32), 'note': None,
            'names': ('a', 'b'), 'limit': config_dict.placeholder(int),
            'optimizer': {'lr': 1e-3, 'betas': (0.9, 0.95)}, 'layers': ((1, 2), (3, 4)),
        }).lock()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with two configs as the current one, and flags as before anything was parsed."""
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs/quick.py').write_text(textwrap.dedent(CONFIG))
    (tmp_path / 'configs/fixed.py').write_text(
        'from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({"a": 1})\n'
    )
    (tmp_path / 'configs/table.py').write_text('def get_config(name): return {"x": 1}[name]\n')
    (tmp_path / 'configs/other.py').write_text('x = 1\n')
    monkeypatch.chdir(tmp_path)
    command.define_config()
    saved = flags.FLAGS.flag_values_dict()
    yield tmp_path
    for name in saved:
        flags.FLAGS[name].unparse()
    flags.FLAGS.unparse_flags()


def _run(monkeypatch, capsys, *args, main=None):
    """(exit code, config or None, stderr) of a command with these arguments."""
    seen = []
    monkeypatch.setattr(sys, 'argv', ['train.py', *args])
    for name in ('config', 'override', 'debug'):
        flags.FLAGS[name].unparse()
    with pytest.raises(SystemExit) as caught:
        command.run(main or (lambda: seen.append(command.config_from_flags())))
    return caught.value.code, seen[0] if seen else None, capsys.readouterr().err


def test_a_config_with_overrides(folder, monkeypatch, capsys):
    args = [
        '--config.steps=7',
        '--config',
        'configs/quick.py:flux',
        '--config.optimizer.lr',
        '3',
        '--config.optimizer.betas=(0, .5)',
        '--config.ema',
        '--config.size=64,48',
        '--config.note=runs/a=b',
        '--config.limit=5',
        "--config.names=('c',)",
        '--config.layers=()',
    ]
    code, config, err = _run(monkeypatch, capsys, *args)
    assert (code, err) == (0, '')
    assert config is not None
    assert config.to_dict() == {
        'backbone': 'flux',
        'steps': 7,
        'ema': True,
        'size': (64, 48),
        'note': 'runs/a=b',
        'names': ('c',),
        'limit': 5,
        'optimizer': {'lr': 3.0, 'betas': (0.0, 0.5)},
        'layers': (),
    }
    assert isinstance(config.optimizer.lr, float)
    assert config.is_locked


def test_without_a_variant(folder, monkeypatch, capsys):
    _, config, _ = _run(monkeypatch, capsys, '--config=configs/quick.py', '--config.limit=None')
    assert config is not None
    assert (config.backbone, config.limit) == ('sana', None)


QUICK = '--config=configs/quick.py'


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        ([], '--config is missing; give one of: configs/fixed.py, configs/other.py, configs/quick'),
        (['--config=nope.py'], 'config file not found: nope.py; there are: configs/fixed.py, '),
        (['--config=configs/quick'], 'config file not found: configs/quick; there are: '),
        (['--config=configs/other.py'], 'configs/other.py is no config: it defines no get_config'),
        ([f'{QUICK}:wan'], "configs/quick.py: unknown variant 'wan'; there are sana, flux"),
        (['--config=configs/table.py'], 'configs/table.py wants a variant; give --config=configs/'),
        (['--config=configs/table.py:y'], "configs/table.py: no variant 'y'"),
        (['--config=configs/fixed.py:y'], "configs/fixed.py has no variants, got 'y'"),
        ([QUICK, '--config.lrr=1'], "config has no key 'lrr'; did you mean 'optimizer.lr'?"),
        ([QUICK, '--config.optimizer.beta=1'], "did you mean 'optimizer.betas'?"),
        ([QUICK, '--config.optimiser.lr=1'], "did you mean 'optimizer.lr'?"),
        ([QUICK, '--config.steps.x=1'], "config has no key 'steps.x'; did you mean 'steps'?"),
        ([QUICK, '--config.qqqqq=1'], "config has no key 'qqqqq'; it has backbone, "),
        ([QUICK, '--config.steps=abc'], "config.steps wants an int, got 'abc'"),
        ([QUICK, '--config.steps=1.5'], "config.steps wants an int, got '1.5'"),
        ([QUICK, '--config.steps'], "config.steps wants an int, got 'true'"),
        ([QUICK, '--config.limit=x'], "config.limit wants an int, got 'x'"),
        ([QUICK, '--config.optimizer.lr=fast'], "config.optimizer.lr wants a float, got 'fast'"),
        ([QUICK, '--config.ema=maybe'], "config.ema wants true or false, got 'maybe'"),
        ([QUICK, '--config.size=8'], "config.size wants a tuple such as (32, 32), got '8'"),
        ([QUICK, '--config.size=8,x'], "config.size wants a tuple such as (32, 32), got '8,x'"),
        ([QUICK, '--config.size=8,.5'], 'config.size wants a tuple such as (32, 32), got (8, 0.5)'),
        (
            [QUICK, '--config.optimizer=1'],
            'is a group of entries; set one of config.optimizer.betas',
        ),
        (['--confg=x'], 'unknown flag --confg; did you mean --config?'),
        (['--zzzzzzz=1'], 'unknown flag --zzzzzzz; --help lists the flags'),
        (['--debug=maybe'], '--debug=maybe'),
        ([QUICK, 'stray'], "unexpected argument 'stray'; flags are written --name=value"),
        (['--config'], 'config'),
    ],
)
def test_bad_input_is_one_line(folder, monkeypatch, capsys, args, message):
    code, _, err = _run(monkeypatch, capsys, *args)
    assert code == 2
    assert message in err
    assert err.startswith('error: ')
    assert err.count('\n') == 1


def _raising(error):
    def main():
        raise error

    return main


def test_exit_codes(folder, monkeypatch, capsys):
    code, _, err = _run(monkeypatch, capsys, main=_raising(InputError('one\n  two')))
    assert (code, err) == (2, 'error: one two\n')
    code, _, err = _run(monkeypatch, capsys, '--debug', main=_raising(InputError('one')))
    assert code == 2
    assert 'Traceback' in err
    code, _, err = _run(monkeypatch, capsys, main=_raising(KeyboardInterrupt()))
    assert (code, err) == (130, 'interrupted\n')
    with pytest.raises(ZeroDivisionError):
        _run(monkeypatch, capsys, main=_raising(ZeroDivisionError()))


def test_compilation_cache(tmp_path, monkeypatch):
    old = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    try:
        monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', 'mine')
        command.compilation_cache()
        assert jax.config.jax_compilation_cache_dir == old  # type: ignore[attr-defined]
        monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
        command.compilation_cache('none')
        assert jax.config.jax_compilation_cache_dir == old  # type: ignore[attr-defined]
        command.compilation_cache()
        where = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        assert where == str(tmp_path / 'metacanvas/jax')
    finally:
        jax.config.update('jax_compilation_cache_dir', old)


def test_as_a_script(folder):
    script = folder / 'go.py'
    script.write_text(
        '"""What it does."""\n'
        'from absl import flags\n'
        'from metacanvas_jax import command\n'
        'command.define_config()\n'
        'flags.DEFINE_string("workdir", None, "Where the run lives.", required=True)\n'
        'command.run(lambda: print(command.config_from_flags().steps))\n'
    )
    root = os.path.dirname(os.path.dirname(command.__file__))
    environment = {**os.environ, 'PYTHONPATH': root}

    def go(*args):
        return subprocess.run(
            [sys.executable, str(script), *args],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )

    done = go('--help')
    assert done.returncode == 0
    for words in ('What it does.', '--workdir', '--config', '--[no]debug', 'configs/quick.py'):
        assert words in done.stdout
    done = go('--config=configs/quick.py')
    assert (done.returncode, done.stderr) == (2, 'error: --workdir is missing\n')
    done = go('--config=configs/quick.py', '--workdir=x', '--config.steps=3')
    assert (done.returncode, done.stdout, done.stderr) == (0, '3\n', '')
