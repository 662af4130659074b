"""Converts published weights into ours and back.

python -m convert list
python -m convert import COMPONENT --source DIR_OR_FILE_OR_HUB_NAME --target DIR
                         [--dtype bfloat16|float32] [--tokenizer DIR]
python -m convert export COMPONENT --source DIR --target DIR [--layout NAME]
python -m convert check COMPONENT (--source DIR_OR_FILE | --manifest FILE.json)
python -m convert pool --source DIR_OR_HUB_NAME --target DIR [--tokenizer DIR]
                         CLIP's vector of the empty prompt, as configs/flux_edit.py takes it
"""

import functools
import itertools
import sys

import jax
from absl import flags

from convert.checking import check_manifest, check_source
from convert.exporting import export_weights
from convert.importing import import_weights
from convert.pooling import pool_empty
from convert.registry import FAMILIES, find
from metacanvas_jax.command import run
from metacanvas_jax.types import InputError

FLAGS = flags.FLAGS
flags.DEFINE_string('source', None, 'The weights to read.')
flags.DEFINE_string('target', None, 'The folder to write; it must not exist.')
flags.DEFINE_string('dtype', None, 'Of the parameters; left out: as on disk.')
flags.DEFINE_string('tokenizer', None, "The tokenizer's folder, where the source has none.")
flags.DEFINE_string('layout', None, 'How to name exported tensors; left out: as published.')
flags.DEFINE_string('manifest', None, 'Names and shapes of a checkpoint, and its config.')

_TAKES = {
    'list': (),
    'import': ('source', 'target', 'dtype', 'tokenizer'),
    'export': ('source', 'target', 'layout'),
    'check': ('source', 'manifest'),
    'pool': ('source', 'target', 'tokenizer'),
}
_ALONE = ('list', 'pool')  # commands without a component


def main(words: list[str]) -> None:
    jax.config.update('jax_platforms', 'cpu')  # shapes and host memory: leave the GPU to others
    verb, component = _read(words)
    given = {name for name in itertools.chain(*_TAKES.values()) if FLAGS[name].value is not None}
    if beyond := given - set(_TAKES[verb]):
        raise InputError(f'{verb} takes no --{min(beyond)}')
    if verb == 'list':
        for name, family in FAMILIES.items():
            print(f'{name}: {", ".join(family.layouts)}')
    elif verb == 'pool':
        print(pool_empty(_need('source'), _need('target'), tokenizer=FLAGS.tokenizer))
    elif verb == 'import':
        source, target = _need('source'), _need('target')
        options = {'dtype': FLAGS.dtype, 'tokenizer': FLAGS.tokenizer}
        print(import_weights(component, source, target, **options))
    elif verb == 'export':
        print(export_weights(component, _need('source'), _need('target'), layout=FLAGS.layout))
    else:
        if (FLAGS.source is None) == (FLAGS.manifest is None):
            raise InputError('check wants either --source or --manifest')
        if FLAGS.manifest is not None:
            report, fits = check_manifest(component, FLAGS.manifest)
        else:
            report, fits = check_source(component, FLAGS.source)
        print(report)
        sys.exit(0 if fits else 1)


def _read(words: list[str]) -> tuple[str, str]:
    """The command and the component."""
    verb = words[0] if words else ''
    if verb not in _TAKES:
        raise InputError(f'unknown command {verb!r}; there are: {", ".join(_TAKES)}')
    count = 1 if verb in _ALONE else 2
    if len(words) != count:
        want = verb if verb in _ALONE else f'{verb} COMPONENT'
        raise InputError(f'want {want} and flags, got {" ".join(words)!r}')
    if verb not in _ALONE:
        find(words[-1])
    return verb, words[-1]


def _need(name: str) -> str:
    value: str | None = FLAGS[name].value
    if value is None:
        raise InputError(f'--{name} is missing')
    return value


if __name__ == '__main__':
    # absl takes flags only.
    before = list(itertools.takewhile(lambda word: not word.startswith('-'), sys.argv[1:]))
    del sys.argv[1 : 1 + len(before)]
    run(functools.partial(main, before))
