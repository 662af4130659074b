"""Folders of weights: what a run exports, and what `convert import` writes, start a model."""

import os

import ml_dtypes
import numpy as np
import pytest

from metacanvas_jax.checkpoint import save_weights
from metacanvas_jax.types import InputError
from metacanvas_jax.weights import load_weights


def test_weights_round_trip(tmp_path):
    arrays = {
        'half': np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3).T,
        'scalar': np.array(2.5, np.float32),
        'many': np.arange(5),
    }
    for _ in range(2):  # into a new folder, then over an old one
        save_weights(tmp_path / 'deep/out', arrays, {'depth': 3})
    assert sorted(os.listdir(tmp_path / 'deep')) == ['out']
    assert sorted(os.listdir(tmp_path / 'deep/out')) == ['config.json', 'model.safetensors']
    loaded = load_weights(tmp_path / 'deep/out')
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


@pytest.mark.parametrize(
    ('data', 'message'),
    [
        (None, 'does not exist'),
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n', 'git-lfs pointer'),
        (b'<html>', 'has 6 bytes'),
        (b'\x04\0\0\0\0\0\0\0oops', 'not JSON'),
        (-3, r'has \d+ bytes, its header says \d+'),
    ],
)
def test_bad_weights(tmp_path, data, message):
    save_weights(tmp_path, {'x': np.ones(100, np.float32)}, {})
    file = tmp_path / 'model.safetensors'
    if data is None:
        file.unlink()
    elif isinstance(data, int):
        file.write_bytes(file.read_bytes()[:data])
    else:
        file.write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load_weights(tmp_path)
    assert str(file) in str(caught.value)
