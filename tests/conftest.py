"""Eight CPU devices, no network, a compile cache; `-m gpu` opens the GPU instead.

Most of the time goes into compiling programs that run once, so they are not optimized on a CPU, and
written by the emitters that are quick to compile (three times as fast).
"""

import getpass
import importlib.metadata
import os
import pathlib
import tempfile

import pytest

_DEVICES = '--xla_force_host_platform_device_count=8'
_QUICK = '--xla_cpu_use_fusion_emitters=false'
_VERSIONS = '-'.join(importlib.metadata.version(name) for name in ('jax', 'jaxlib'))


def _cache() -> pathlib.Path:
    path = pathlib.Path(tempfile.gettempdir(), f'metacanvas-tests-{getpass.getuser()}', _VERSIONS)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    path.mkdir(mode=0o700, exist_ok=True)
    return path


# Before anything imports jax.
if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES} {_QUICK}'.strip()
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ.setdefault('OMP_NUM_THREADS', '1')  # of torch: its tensors here are tiny
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_cache()))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')


def pytest_configure(config: pytest.Config) -> None:
    words = config.option.markexpr.replace('not gpu', '').split()
    if 'gpu' not in words:
        os.environ['JAX_PLATFORMS'] = 'cpu'
        os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker('gpu')]
    if marked and not _has_gpu():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason='no GPU here, or not asked for: pytest -m gpu'))


def _has_gpu() -> bool:
    import jax

    try:
        return bool(jax.devices('gpu'))
    except RuntimeError:
        return False
