"""What train.py and sample.py share at the edge: flags, the config and its overrides, exit codes.

A config file is Python and is executed; `--config` must only ever name a file you trust.
"""

import ast
import difflib
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from metacanvas_jax.types import InputError

FLAGS = flags.FLAGS

flags.DEFINE_bool(name='debug', default=False, help='Show the traceback of an input error.')


def run(main: Callable[[], Any]) -> NoReturn:
    """Parses the flags and calls `main`; exit code 0 done, 2 bad input, 130 interrupted."""
    debug = '--debug' in sys.argv
    logging.set_verbosity(logging.ERROR)  # Orbax warns of what is meant, such as read-only folders
    try:
        _parse(sys.argv)
        main()
    except (InputError, flags.Error) as error:
        if debug:
            traceback.print_exc()
        print('error:', ' '.join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def define_config() -> None:
    """Defines `--config FILE.py[:variant]`; `--config.key=value` overrides one of its entries."""
    if 'config' not in FLAGS:
        flags.DEFINE_string(
            'config', None, 'FILE.py[:variant]; --config.key=value overrides an entry of it.'
        )
        # `run` rewrites --config.key=value into this one, so that absl keeps all the state.
        flags.DEFINE_multi_string('override', [], 'key=value, the same as --config.key=value.')


def config_from_flags() -> ConfigDict:
    """The config that `--config` names, overrides applied, locked."""
    if FLAGS.config is None:
        raise InputError(f'--config is missing; give one of: {_config_files()}')
    config = load_config(FLAGS.config)
    for text in FLAGS.override:
        override(config, *text.split('=', 1))
    return config.lock()


def compilation_cache(setting: str | None = None) -> None:
    """Keeps compiled programs on disk, in the directory `setting`; 'none' keeps none."""
    if setting == 'none' or 'JAX_COMPILATION_CACHE_DIR' in os.environ:
        return
    home = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
    where = pathlib.Path(setting) if setting else pathlib.Path(home, 'metacanvas', 'jax')
    jax.config.update('jax_compilation_cache_dir', str(where))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


# ---------------------------------------------------------------- flags


def _parse(argv: list[str]) -> None:
    if '--help' in argv or '-h' in argv:
        title = sys.modules['__main__'].__doc__ or ''
        print(title.strip(), FLAGS.main_module_help().strip(), sep='\n\n')
        print(FLAGS.module_help(sys.modules[__name__]).strip())
        if 'config' in FLAGS:
            print(f'\nconfigs: {_config_files()}')
        sys.exit(0)
    try:
        rest = FLAGS(_rewrite(argv))
    except flags.UnrecognizedFlagError as error:
        near = difflib.get_close_matches(error.flagname, list(FLAGS), n=1)
        hint = f'; did you mean --{near[0]}?' if near else '; --help lists the flags'
        raise InputError(f'unknown flag --{error.flagname}{hint}') from error
    except flags.Error as error:
        if missing := re.search(r'flag --(\w+)=None: .*must have a value', str(error)):
            raise InputError(f'--{missing[1]} is missing') from error
        raise
    if len(rest) > 1:
        raise InputError(f'unexpected argument {rest[1]!r}; flags are written --name=value')


def _rewrite(argv: list[str]) -> list[str]:
    """`--config.key=value` and `--config.key value` become `--override=key=value`."""
    result, rest = [], list(argv)
    while rest:
        token = rest.pop(0)
        if token == '--':
            return [*result, token, *rest]
        if not (match := re.match(r'--?config\.([^=]*)(=.*)?$', token, re.DOTALL)):
            result.append(token)
            continue
        key, value = match[1], match[2]
        if value is None:
            # A key alone is a switch: --config.ema reads as --config.ema=true.
            value = '=true' if not rest or rest[0].startswith('--') else f'={rest.pop(0)}'
        result.append(f'--override={key}{value}')
    return result


# ---------------------------------------------------------------- configs


def load_config(name: str) -> ConfigDict:
    """`FILE.py` or `FILE.py:variant` -> what its `get_config` returns."""
    match = re.match(r'(.*?\.py)(?::(.*))?$', name, re.DOTALL)
    if match is None or not pathlib.Path(match[1]).is_file():
        file = match[1] if match else name
        raise InputError(f'config file not found: {file}; there are: {_config_files()}')
    file, variant = match[1], match[2]
    spec = importlib.util.spec_from_file_location(f'config_{pathlib.Path(file).stem}', file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, 'get_config'):
        raise InputError(f'{file} is no config: it defines no get_config()')
    return _call(module.get_config, file, variant)


def _call(get_config: Callable[..., Any], file: str, variant: str | None) -> ConfigDict:
    parameters = list(inspect.signature(get_config).parameters.values())
    if variant is not None and not parameters:
        raise InputError(f'{file} has no variants, got {variant!r}; give --config={file}')
    if variant is None and parameters and parameters[0].default is inspect.Parameter.empty:
        raise InputError(f'{file} wants a variant; give --config={file}:VARIANT')
    try:
        config = get_config() if variant is None else get_config(variant)
    except (KeyError, ValueError) as error:
        if isinstance(error, KeyError) and error.args != (variant,):
            raise  # a bug in the file, not a wrong variant
        reason = f'no variant {variant!r}' if isinstance(error, KeyError) else error
        raise InputError(f'{file}: {reason}') from error
    return ConfigDict(config) if isinstance(config, dict) else config


def _config_files() -> str:
    root = pathlib.Path(sys.argv[0]).resolve().parent
    folder = pathlib.Path('configs') if pathlib.Path('configs').is_dir() else root / 'configs'
    files = (path for path in folder.glob('*.py') if path.stem != '__init__')
    return ', '.join(sorted(map(str, files))) or 'no file in configs/'


def leaves(config: Any, prefix: str = '') -> Iterator[str]:
    """Dotted names of all entries that are no groups."""
    for key in config:
        if isinstance(config[key], ConfigDict):
            yield from leaves(config[key], f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}'


def override(config: ConfigDict, key: str, text: str) -> None:
    """Sets the entry with the dotted name `key` to `text`, read as the type the entry has."""
    group: Any = config
    path = key.split('.')
    for name in path[:-1]:
        if not isinstance(group, ConfigDict) or name not in group:
            raise InputError(_unknown(config, key))
        group = group[name]
    last = path[-1]
    if not isinstance(group, ConfigDict) or last not in group:
        raise InputError(_unknown(config, key))
    if isinstance(group[last], ConfigDict):
        inside = ', '.join(leaves(group[last], f'config.{key}.'))
        raise InputError(f'config.{key} is a group of entries; set one of {inside}')
    with group.unlocked():
        group[last] = _convert(f'config.{key}', text, group.get_type(last), group[last])


def _unknown(config: ConfigDict, key: str) -> str:
    """The nearest entry by its whole name or by the last part of it."""

    def likeness(name: str) -> float:
        pairs = (key, name), (key.rpartition('.')[2], name.rpartition('.')[2])
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    names = list(leaves(config))
    best = max(names, key=likeness, default='')
    if names and likeness(best) >= 0.6:
        return f'config has no key {key!r}; did you mean {best!r}?'
    return f'config has no key {key!r}; it has {", ".join(config)}'


def _convert(name: str, text: str, kind: type, default: Any) -> Any:
    if text == 'None' and (default is None or kind is str):
        return None  # no weights, say
    if kind is str:
        return text
    if kind is bool:
        if text.lower() in ('true', '1', 'false', '0'):
            return text.lower() in ('true', '1')
        raise InputError(f'{name} wants true or false, got {text!r}')
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError as error:
            article = 'an' if kind is int else 'a'
            raise InputError(f'{name} wants {article} {kind.__name__}, got {text!r}') from error
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError) as error:
        if kind is type(None):
            return text  # without a default any word is a string, such as a directory
        raise InputError(f'{name} wants {_example(default)}, got {text!r}') from error
    if kind in (tuple, list) and isinstance(value, tuple | list):
        return _like(name, kind(value), default)
    if kind is type(None) or isinstance(value, kind):
        return value
    raise InputError(f'{name} wants {_example(default)}, got {text!r}')


def _like(name: str, value: Any, default: Any) -> Any:
    """`value` with its numbers as floats where those of `default` are; other types must agree."""
    kinds = {type(item) for item in default}
    if kinds == {float}:
        value = type(value)(float(item) if type(item) is int else item for item in value)
    if len(kinds) == 1 and any(type(item) not in kinds for item in value):
        raise InputError(f'{name} wants {_example(default)}, got {value!r}')
    return value


def _example(default: Any) -> str:
    return f'a {type(default).__name__} such as {default!r}'
