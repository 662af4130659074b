"""Seconds and peak memory of `python -m convert import` and `export` at a real model's size.

    python -m bench.convert_import [--layers=15] [--folder=/tmp] [--output=FILE.json]

The checkpoint has the names and shapes of Qwen2.5-VL-3B with fewer language layers, and random
bits. A first import is killed half-way. Everything is written below a temporary folder and removed.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np

from bench.record import record
from convert.shards import Shards
from convert.source import open_source

ROOT = pathlib.Path(__file__).parents[1]
MANIFEST = ROOT / 'tests/manifests/qwen2_5_vl_3b.json'
PACKAGES = ('jax', 'flax', 'orbax-checkpoint', 'tensorstore', 'numpy', 'ml_dtypes')


def make_checkpoint(folder: pathlib.Path, layers: int) -> dict[str, jax.ShapeDtypeStruct]:
    manifest = json.loads(MANIFEST.read_text())
    prefix = 'model.layers.'
    shapes = {
        name: jax.ShapeDtypeStruct(tuple(shape), ml_dtypes.bfloat16)
        for name, shape in manifest['tensors'].items()
        if not name.startswith(prefix) or int(name[len(prefix) :].split('.')[0]) < layers
    }
    config = manifest['config'] | {'num_hidden_layers': layers}
    (folder / 'config.json').write_text(json.dumps(config))
    shards = Shards(folder, shapes, stem='model', limit=2 * 10**9)
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        bits = np.frombuffer(rng.bytes(2 * shape.size), ml_dtypes.bfloat16)
        shards.put(name, bits.reshape(shape.shape))
    shards.close()
    return shapes


def measure(*words: str) -> dict[str, float]:
    """Wall seconds, CPU seconds, and the peak of resident memory in GB of `python -m convert`."""
    began, before = time.monotonic(), os.times()
    process = subprocess.Popen([sys.executable, '-m', 'convert', *words], cwd=ROOT)
    peak = 0
    while process.poll() is None:
        # ru_maxrss would begin with what this process had when it forked.
        status = pathlib.Path(f'/proc/{process.pid}/status').read_text()
        peak = max([peak, *(int(s.split()[1]) for s in status.splitlines() if s[:6] == 'VmHWM:')])
        time.sleep(0.02)
    assert process.returncode == 0, words
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user
    return {
        'seconds': round(time.monotonic() - began, 2),
        'cpu_seconds': round(cpu - before.children_system, 2),
        'peak_rss_GB': round(peak * 1024 / 1e9, 3),
    }


def kill_half_way(words: list[str], target: pathlib.Path, size: int) -> int:
    """Kills an import once half of `size` is written; returns the bytes it left beside."""
    process = subprocess.Popen([sys.executable, '-m', 'convert', *words], cwd=ROOT)
    partial = target.with_name(f'.{target.name}.partial')
    while process.poll() is None and written(partial) < size / 2:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not target.exists()
    return written(partial)


def written(folder: pathlib.Path) -> int:
    return sum(f.stat().st_blocks * 512 for f in folder.rglob('*') if f.is_file())


def assert_equal(ours: pathlib.Path, theirs: pathlib.Path) -> None:
    a, b = open_source(str(ours)), open_source(str(theirs))
    assert a.tensors == b.tensors
    for name in a.tensors:
        assert a.read(name).tobytes() == b.read(name).tobytes(), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--layers', type=int, default=15)
    parser.add_argument('--folder', default=tempfile.gettempdir())
    parser.add_argument('--output', default=str(ROOT / 'bench/results/convert_import.json'))
    args = parser.parse_args()
    room = pathlib.Path(tempfile.mkdtemp(dir=args.folder, prefix='convert-import-'))
    try:
        source, target, back = (room / name for name in ('source', 'target', 'back'))
        source.mkdir()
        shapes = make_checkpoint(source, args.layers)
        sizes = [2 * shape.size for shape in shapes.values()]
        words = ['import', 'qwen2_5_vl', f'--source={source}', f'--target={target}']
        left = kill_half_way(words, target, sum(sizes))
        load = os.getloadavg()[0]
        imported = measure(*words)
        assert not list(room.glob('.*'))
        exported = measure('export', 'qwen2_5_vl', f'--source={target}', f'--target={back}')
        assert_equal(back, source)
    finally:
        shutil.rmtree(room)
    largest = max(sizes) / 1e9
    result = {
        'what': 'python -m convert import and export, Qwen2.5-VL-3B with fewer layers, random bf16',
        'checkpoint': {
            'layers': args.layers,
            'tensors': len(sizes),
            'GB': round(sum(sizes) / 1e9, 3),
            'largest_tensor_GB': round(largest, 3),
        },
        'import': imported | {'GB_per_s': round(sum(sizes) / 1e9 / imported['seconds'], 3)},
        'export': exported | {'GB_per_s': round(sum(sizes) / 1e9 / exported['seconds'], 3)},
        'allowed_peak_GB': round(largest + 0.5, 3),
        'killed_half_way': {'target': 'absent', 'left_beside_GB': round(left / 1e9, 3)},
        'exported_equals_source': 'every byte',
    }
    record(args.output, result, load=load, packages=PACKAGES)


if __name__ == '__main__':
    main()
