"""Training from stored features is training from the pictures, and never loads what made them."""

import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import sana_t2i
from metacanvas_jax.build import build_model
from metacanvas_jax.caching import cached_readers, fill, from_cache, open_caches
from metacanvas_jax.data import feature_cache
from metacanvas_jax.data.tasks import Asked
from metacanvas_jax.text_encoders.gemma2 import Gemma2
from metacanvas_jax.train.preemption import Preemption
from metacanvas_jax.types import InputError
from metacanvas_jax.vae.dc_ae import DcAe
from tests import tiny
from tests.parity import test_dc_ae as dc_ae
from tests.test_bad_input import script
from tests.test_captioned import picture, shards
from tests.test_resume import arrays
from tests.test_sana_configs import shrink
from tests.test_sana_configs import tokenizer as tokenizer

BROKEN = {  # in one tar: damaged, empty, and without a caption
    '900.png': picture(1)[:-30],
    '900.txt': b'a caption',
    '901.png': b'',
    '901.txt': b'another',
    '902.png': picture(2),
}
STEPS = 40


@pytest.fixture(scope='module')
def tars(tmp_path_factory) -> pathlib.Path:
    return shards(tmp_path_factory.mktemp('data') / 'tars', **BROKEN)


def config_of(tars: pathlib.Path, tokenizer: pathlib.Path, cache: pathlib.Path | None):
    config = shrink(sana_t2i.get_config('text'), tokenizer)
    config.update(batch_size=8, steps=STEPS)
    config.vae = dict(kind='dc_ae', **dc_ae.CONFIGS['small'])
    config.vae.update(encoder_out_shortcut=True, decoder_in_shortcut=True)
    config.vae.update(decoder_conv_act_fn='relu')
    config.backbone.in_channels = dc_ae.SANA['latent_channels']
    config.data = ConfigDict(dict(sana_t2i.get_config().data))
    config.data.update(path=str(tars), size=16, threads=2, text_dropout=0.3)
    config.data.cache = cache if cache is None else str(cache)
    config.sample.every = 0
    config.log.every = 1
    return config


@pytest.fixture
def train(monkeypatch):
    with script('train') as module:
        monkeypatch.setattr(module, 'make_mesh', lambda **_: tiny.one_device())
        yield module


def losses(workdir: pathlib.Path) -> np.ndarray:
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return np.array([json.loads(line)['loss'] for line in lines])


def run(train, config: ConfigDict, workdir: pathlib.Path) -> np.ndarray:
    workdir.mkdir(exist_ok=True)
    train.train(config, workdir)
    return losses(workdir)


def never(*_, **__):
    raise AssertionError('an encoder was used')


def test_a_run_from_the_cache(train, tars, tokenizer, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(feature_cache, 'SHARD', 5)
    plain = run(train, config_of(tars, tokenizer, None), tmp_path / 'plain')
    told = capfd.readouterr().err
    assert told.count('broken sample') == 3
    for name in ('900', '901', '902'):
        assert f'#{name}' in told

    cached = config_of(tars, tokenizer, tmp_path / 'cache')
    cached.sample.every = 10
    with pytest.raises(InputError, match='no autoencoder to draw with; set it to 0'):
        train.check(cached)
    cached.sample.every = 0
    caches = open_caches(cached)
    fill(cached, caches, print)
    assert capfd.readouterr().out.count('shard') == 4
    assert not caches['t2i'].missing()

    monkeypatch.setattr(Gemma2, 'context', never)
    monkeypatch.setattr(DcAe, 'encode', never)
    stored = run(train, cached, tmp_path / 'stored')
    assert len(plain) == len(stored) == STEPS
    np.testing.assert_allclose(stored, plain, rtol=1e-5)

    requested = Preemption.requested
    monkeypatch.setattr(Preemption, 'requested', lambda self, step: step == 17)
    run(train, cached, tmp_path / 'stopped')
    monkeypatch.setattr(Preemption, 'requested', requested)
    resumed = run(train, cached, tmp_path / 'stopped')
    np.testing.assert_array_equal(resumed, stored)
    ours, theirs = arrays(tmp_path / 'stopped'), arrays(tmp_path / 'stored')
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []


def test_an_interrupted_cache_goes_on(tars, tokenizer, tmp_path, monkeypatch):
    """And another size, encoder or text is another cache."""
    monkeypatch.setattr(feature_cache, 'SHARD', 5)
    config = config_of(tars, tokenizer, tmp_path)
    caches = open_caches(config)
    fill(config, caches, print)
    cache = caches['t2i']
    whole = {path.name: path.read_bytes() for path in cache.path.iterdir()}
    (cache.path / '000001.safetensors').unlink()
    assert cache.missing() == [range(5, 10)]
    fill(config, open_caches(config), print)
    (cache.path / feature_cache.NEGATIVE).unlink()
    fill(config, open_caches(config), print)
    assert {path.name: path.read_bytes() for path in cache.path.iterdir()} == whole
    for name, value in (('size', 32), ('seed', 3)):
        other = config.copy_and_resolve_references()
        other.data[name] = value
        assert open_caches(other)['t2i'].path != cache.path
    other = config.copy_and_resolve_references()
    other.text_encoder.tokens = 9
    assert open_caches(other)['t2i'].path != cache.path


def test_a_system_without_a_text_encoder(tars, tokenizer, tmp_path):
    """MetaQuery in the place of the text: latents and captions alone are stored."""
    config = config_of(tars, tokenizer, tmp_path)
    del config.text_encoder, config.weights.text_encoder
    caches = open_caches(config)
    fill(config, caches, print)
    record = caches['t2i'][3]
    assert record.states is None
    assert record.latents is not None
    assert record.text
    assert cached_readers(config, caches).tokens([Asked(record.text)]) is None


def test_records_made_as_they_are_read_are_refused(tars, tokenizer, tmp_path):
    config = config_of(tars, tokenizer, tmp_path)
    config.data.source = 'shapes'
    with pytest.raises(InputError, match=r"records of source 'shapes' .* cannot be cached"):
        open_caches(config)
    config.data.tasks = dict(t2i=0.8, recon=0.2)
    with pytest.raises(InputError, match="keeps pictures and their captions; task 'recon' wants"):
        open_caches(config)


def test_names_of_nnx_parts_stay(tars, tokenizer, tmp_path):
    """A run from a cache has the parameters of the run without, but for the encoders."""
    config = config_of(tars, tokenizer, tmp_path)
    found = []
    for one in (config, from_cache(config)):
        model = jax.eval_shape(lambda one=one: build_model(one, jax.random.key(0)))
        paths = {'/'.join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
        found.append(paths)
    gone = found[0] - found[1]
    assert not found[1] - found[0]
    assert {path.split('/')[0] for path in gone} == {'vae', 'text_encoder'}
