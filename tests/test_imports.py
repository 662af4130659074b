"""The picture of the package, enforced: a row imports only rows below it, never a neighbour."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = 'metacanvas_jax'
ROWS = [
    {'types'},
    {'sharding', 'config_json'},
    {'layers'},
    {'mllm', 'text_encoders', 'backbones', 'vae', 'flow'},
    {'canvas'},
    {'metacanvas'},
    {'data'},
    {'build', 'weights'},
    {'readers', 'train', 'checkpoint', 'evaluate', 'command', 'describe'},
    {'loading', 'caching', 'geometry'},
    {'pipeline', 'dry_run'},
]
RANK = {name: rank for rank, names in enumerate(ROWS) for name in names}
FORBIDDEN = {'utils', 'common', 'helpers'}
LONGEST = 400


def imported(path: pathlib.Path, module: str) -> Iterator[str]:
    """Dotted names which the file at `path`, known as `module`, imports; relative ones resolved."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = module if path.name == '__init__.py' else module.rpartition('.')[0]
            up = package.split('.')[: len(package.split('.')) - node.level + 1]
            base = (
                '.'.join([*up, node.module] if node.module else up) if node.level else node.module
            )
            yield from (f'{base}.{alias.name}' for alias in node.names)


def _module(path: pathlib.Path, root: pathlib.Path) -> str:
    parts = path.relative_to(root).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def broken(root: pathlib.Path) -> Iterator[str]:
    """Every breach of the rules in the tree at `root`, one line each."""
    for path in sorted((root / PACKAGE).rglob('*.py')):
        module = _module(path, root)
        if module == PACKAGE:
            continue  # the front door may name anything
        me = module.split('.')[1]
        if me not in RANK:
            yield f'{module} has no row; add it to ROWS'
            continue
        for name in imported(path, module):
            if name == PACKAGE or name.split('.')[0] in ('configs', 'train', 'sample', 'tests'):
                yield f'{module} may not import {name}'
            if not name.startswith(PACKAGE + '.'):
                continue
            other = name.split('.')[1]
            if other == me:
                continue
            if other not in RANK or RANK[other] >= RANK[me]:
                yield f'{module} may not import {name}'
            elif me == 'canvas' and other == 'backbones' and name.split('.')[2:3] != ['base']:
                yield f'{module} may import backbones.base only, not {name}'
    for path in sorted((root / 'configs').rglob('*.py')):
        for name in imported(path, _module(path, root)):
            if name.split('.')[0] not in ('configs', 'ml_collections'):
                yield f'{_module(path, root)} may not import {name}'


def misfits(root: pathlib.Path) -> Iterator[str]:
    """Files that are too long or named after nothing."""
    for top in (PACKAGE, 'configs', 'convert'):
        for path in sorted((root / top).rglob('*.py')):
            if path.stem in FORBIDDEN or path.parent.name in FORBIDDEN:
                yield f'{path.relative_to(root)} is named after nothing'
            if (lines := len(path.read_text().splitlines())) > LONGEST:
                yield f'{path.relative_to(root)} has {lines} lines, more than {LONGEST}'


def test_imports_point_down():
    assert not list(broken(ROOT))


def test_files_are_short_and_named():
    assert not list(misfits(ROOT))


def _plant(root: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ('file', 'text'),
    [
        ('layers/norm.py', 'from metacanvas_jax.backbones import sana'),
        ('layers/norm.py', 'def f():\n    import metacanvas_jax.metacanvas'),
        ('layers/norm.py', 'from metacanvas_jax import build'),
        ('layers/norm.py', 'from ..data import loader'),
        ('layers/norm.py', 'import metacanvas_jax'),
        ('types.py', 'from metacanvas_jax.sharding import RULES'),
        ('types.py', 'from . import sharding'),
        ('mllm/qwen.py', 'from metacanvas_jax.vae.base import VAE'),
        ('canvas/fusion.py', 'from metacanvas_jax.backbones.sana import Sana'),
        ('canvas/fusion.py', 'from metacanvas_jax.backbones import wan'),
        ('data/loader.py', 'from metacanvas_jax import build'),
        ('train/step.py', 'from metacanvas_jax import checkpoint'),
        ('pipeline.py', 'import train'),
        ('somewhere.py', ''),
        ('../configs/quickstart.py', 'import jax'),
        ('../configs/quickstart.py', 'from metacanvas_jax import build'),
    ],
)
def test_a_breach_is_found(tmp_path, file, text):
    root = _plant(tmp_path, {f'{PACKAGE}/__init__.py': '', f'{PACKAGE}/{file}': text})
    assert len(list(broken(root))) == 1


def test_what_is_allowed(tmp_path):
    files = {
        '__init__.py': 'from metacanvas_jax.pipeline import load',
        'layers/norm.py': 'import jax\nfrom ..types import Batch\nfrom . import linear',
        'layers/linear.py': '',
        'canvas/fusion.py': 'from metacanvas_jax.backbones.base import Backbone',
        'canvas/tokens.py': 'from metacanvas_jax.backbones import base',
        'data/loader.py': 'from metacanvas_jax import metacanvas, types',
        'build.py': 'from metacanvas_jax.data import loader\nfrom .canvas import fusion',
        'train/step.py': 'from metacanvas_jax import build\nfrom metacanvas_jax.train import state',
        '../configs/a.py': 'from configs import b\nfrom ml_collections import ConfigDict',
    }
    root = _plant(tmp_path, {f'{PACKAGE}/{name}': text for name, text in files.items()})
    assert not list(broken(root))


def test_a_misfit_is_found(tmp_path):
    files = {
        f'{PACKAGE}/utils.py': '',
        f'{PACKAGE}/data/helpers/text.py': '',
        f'{PACKAGE}/build.py': 'x = 1\n' * (LONGEST + 1),
        f'{PACKAGE}/types.py': 'x = 1\n' * LONGEST,
    }
    assert len(list(misfits(_plant(tmp_path, files)))) == 3
