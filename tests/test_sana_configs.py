"""The rows of the paper's Section 5.1 and Appendix B: their full sizes, and tiny runs of each."""

import functools
import json
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from configs import quickstart, sana_ablations, sana_lora, sana_t2i
from metacanvas_jax.backbones import sana
from metacanvas_jax.build import build_model
from metacanvas_jax.data.sources import SOURCES
from metacanvas_jax.data.tasks import BATCHES
from metacanvas_jax.flow.path import frame_times
from metacanvas_jax.loading import check_model
from metacanvas_jax.readers import READERS
from metacanvas_jax.text_encoders import gemma2
from metacanvas_jax.train.objective import OBJECTIVES
from metacanvas_jax.train.optim import OptimizerConfig, make_optimizer
from metacanvas_jax.train.state import split_model, start
from metacanvas_jax.train.step import make_train_step
from metacanvas_jax.train.trainable import parameter_sizes
from metacanvas_jax.types import InputError
from metacanvas_jax.vae import dc_ae_config
from tests import tiny
from tests.test_sana_prompts import gemma_tokenizer

MANIFESTS = pathlib.Path(__file__).parent / 'manifests'
DIT, CANVAS, QUERIES = 1_604_462_752, 154_048_000, 60_916_480
ROWS = {  # what learns at full size: spec.md sections 3.9, 4 and 5.1
    ('t2i', 'canvas'): (DIT, CANVAS),
    ('t2i', 'canvas_only'): (DIT, CANVAS),
    ('t2i', 'text'): (DIT,),
    ('t2i', 'metaquery'): (DIT, QUERIES),
    ('t2i', 'text_metaquery'): (DIT, QUERIES),
    ('ablations', 'full'): (DIT, CANVAS),
    ('ablations', 'no_timestep'): (DIT, CANVAS - 35_714_560),
    ('ablations', 'no_dit_block'): (DIT, 524_288 + 50_358_272 + 4_589_760),
    ('ablations', 'no_vanilla_block'): (DIT, 524_288 + 4_589_760),
    ('ablations', 'before_patchify'): (DIT, 524_288 + 2049 * 32),
    ('ablations', 'baseline'): (DIT,),
    ('lora', 'canvas'): (22_937_600, 261_710_848),
    ('lora', 'text_positions'): (22_937_600, 261_710_848),
    ('lora', 'mllm_lora'): (22_937_600, 261_710_848, 80_740_352),
}
# As far as a tiny run goes, these are others of the rows, or parts of them.
SAME = {('ablations', 'full'), ('ablations', 'baseline'), ('lora', 'canvas')}
SAME |= {('lora', 'text_positions'), ('t2i', 'text_metaquery')}
# And these train in test_sizes.py, or their fusions in test_fusion.py.
SAME |= {('ablations', 'no_dit_block'), ('ablations', 'no_vanilla_block')}
SAME |= {('ablations', 'no_timestep'), ('ablations', 'before_patchify')}
MODULES = {'t2i': sana_t2i, 'ablations': sana_ablations, 'lora': sana_lora}
STEPS = 20


def config_of(row: tuple[str, str]) -> ConfigDict:
    file, variant = row
    return MODULES[file].get_config(variant)


def matches(config: ConfigDict, name: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in config.trainable)


def abstract(config: ConfigDict):
    return jax.eval_shape(functools.partial(build_model, config), jax.random.key(0))


def test_every_variant_has_a_row():
    rows = {('t2i', v) for v in sana_t2i.VARIANTS} | {('lora', v) for v in sana_lora.VARIANTS}
    rows |= {('ablations', v) for v in (*sana_ablations.ROWS, 'baseline')}
    assert rows == set(ROWS)


@pytest.mark.parametrize('row', ROWS, ids='-'.join)
def test_full_size(row):
    config = config_of(row)
    model = abstract(config)
    sizes = parameter_sizes(model)
    for pattern, count in zip(config.trainable, ROWS[row], strict=True):
        assert sum(sizes[path] for path in sizes if re.fullmatch(pattern, path)) == count


def test_presets_are_the_published_sizes(tmp_path):
    """Those of the manifests' config.json."""
    for manifest, presets, name, read in (
        ('sana_1600m_512', sana.PRESETS, 'sana_1600m', sana.read_config),
        ('sana1_5_1600m_1024', sana.PRESETS, 'sana1.5_1600m', sana.read_config),
        ('dc_ae_f32c32', dc_ae_config.PRESETS, 'dc_ae_f32c32', dc_ae_config.read_config),
        ('gemma_2_2b_it', gemma2.PRESETS, 'gemma_2_2b', gemma2.read_config),
    ):
        folder = tmp_path / manifest
        folder.mkdir()
        values = json.loads((MANIFESTS / f'{manifest}.json').read_text())['config']
        (folder / 'config.json').write_text(json.dumps(values))
        assert read(folder) == presets[name], name


# ---------------------------------------------------------------- tiny runs


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('gemma')
    gemma_tokenizer().save(str(folder / 'tokenizer.json'))
    return folder


def shrink(config: ConfigDict, tokenizer: pathlib.Path) -> ConfigDict:
    """The same system, small, in the shapes world."""
    small = tiny.config()
    lora = config.backbone.lora
    lora.rank = min(lora.rank, 2)
    config.update(batch_size=4, dtype='float32', steps=STEPS)
    config.backbone = dict(small.backbone, caption_channels=32, num_layers=1, lora=lora)
    config.vae, config.data = small.vae, small.data
    config.data.text_dropout = 0.5
    config.weights = dict.fromkeys(config.weights, 'random')
    config.weights.backbone = None if lora.rank == 0 else 'random'
    if 'mllm' in config:
        config.mllm.update(size='tiny', remat='full')
        config.mllm.lora.rank = min(config.mllm.lora.rank, 2)
        config.prompt.update(tokenizer='tiny_qwen', buckets=(64,), max_text=16)
    if 'text_encoder' in config:
        sizes = dict(vocab_size=700, hidden_size=32, intermediate_size=48, num_hidden_layers=1)
        sizes |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=12)
        sizes |= dict(rms_norm_eps=1e-6, rope_theta=1e4, query_pre_attn_scalar=12.0)
        sizes |= dict(attn_logit_softcapping=50.0, sliding_window=8)
        config.text_encoder = dict(
            kind='gemma2',
            tokenizer=str(tokenizer),
            tokens=24,
            instruction=False,
            reads=config.text_encoder.reads,
            layer_types=('full_attention',),
            **sizes,
        )
    config.canvas.update(grid=(2, 2), head_dim=32)
    if 'queries' in config:
        config.queries.update(count=5, head_dim=32)
    config.optimizer = small.optimizer
    return config


@pytest.mark.parametrize('row', sorted(set(ROWS) - SAME), ids='-'.join)
def test_tiny_run(row, tokenizer):
    """Plain velocity at the start, 20 steps, and by the fifth all that shall learn has moved."""
    config = shrink(config_of(row), tokenizer)
    model = build_model(config, jax.random.key(1))
    pretrained = config.weights.backbone is not None
    if pretrained:  # the last projection of a DiT from scratch is zero
        kernel = tiny.normal(*model.backbone.proj_out.kernel.shape)
        model.backbone.proj_out.kernel[...] = 0.1 * kernel
    records = [SOURCES['shapes'](config.data)['t2i'][i] for i in range(4)]
    lots = np.array([0.9, 0.1, 0.8, 0.7])  # one of them without its text
    batch = BATCHES['flow'](READERS['flow'](config), 't2i', records, lots)
    if 'context/queries/.*' not in config.trainable:
        starts_as_the_plain_backbone(model, batch)

    wanted = check_model(config)
    graphdef, trainable, frozen = split_model(
        lambda _: model, wanted, seed=0, frozen_dtype=np.float32, mesh=tiny.one_device()
    )
    before = {name: np.array(value) for name, value in tiny.named(model).items()}
    tx = make_optimizer(OptimizerConfig(**config.optimizer), steps=STEPS)
    state, where = start(trainable, tx, ema=False, mesh=tiny.one_device())
    objective = OBJECTIVES['flow'](config)
    step = make_train_step(graphdef, objective, tx, accumulate=1, ema_decay=0, where=where)
    losses = []
    for count in range(1, STEPS + 1):
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        losses.append(float(metrics['loss']))
        if count == 5:
            after = tiny.named(nnx.merge(graphdef, state.trainable, frozen))
            moved = {name for name in before if np.any(before[name] != np.asarray(after[name]))}
            asked = {name for name in before if matches(config, name)}
            if row[1] == 'canvas_only':  # of one key, <bos>, attention takes all, whatever it is
                asked -= {name for name in asked if re.search('attn2/to_[qk]', name)}
            assert moved == asked
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def starts_as_the_plain_backbone(model, batch) -> None:
    z = model.vae.encode(batch.pixels_BFHWC)
    T, H, W = z.shape[1:4]
    plan = jax.jit(lambda model, texts: model.plan(texts, (T, H, W)))(model, batch.texts)
    clean_BT = batch.visual.clean_BT
    t_BT = frame_times(np.full(len(z), 0.3, np.float32), clean_BT)

    @jax.jit
    def inputs(model, plan):
        fusion = model.canvas.fusion
        latents = fusion.before_patchify(z, plan.canvas, clean_BT)
        patches = model.backbone.patchify(z, batch.visual)
        return latents, patches, fusion.after_patchify(patches, plan.canvas, t_BT, clean_BT)

    latents, plain, fused = inputs(model, plan)
    np.testing.assert_array_equal(latents, z)
    # The same bits go into the same function of the backbone.
    np.testing.assert_array_equal(fused.target_BThwD, plain.target_BThwD)


# ---------------------------------------------------------------- refusals


def test_frozen_parts_want_weights(tokenizer):
    config = sana_t2i.get_config()
    with pytest.raises(InputError, match=r'config\.weights\.mllm is missing, and nothing of it'):
        check_model(config)
    config = shrink(sana_lora.get_config(), tokenizer)
    config.weights.backbone = None
    with pytest.raises(InputError, match=r'config\.weights\.backbone is missing, and nothing'):
        check_model(config)


def test_queries_without_an_mllm():
    config = sana_t2i.get_config('text')
    config.queries = sana_t2i.QUERIES
    with pytest.raises(InputError, match=r'config\.queries reads the MLLM, and there is no'):
        abstract(config)


def test_defaults_of_the_quickstart_name_no_other_reader():
    config = quickstart.get_config()
    readers = READERS['flow'](config)
    assert readers.text_encoder is None
    assert readers.mllm is not None
