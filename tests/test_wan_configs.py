"""Table 16, column by column: full sizes, values and shares."""

import functools
import re

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import wan_stage1, wan_stage2, wan_stage3
from metacanvas_jax.build import build_model
from metacanvas_jax.data.loader import task_of_step
from metacanvas_jax.train.trainable import parameter_sizes

STAGES = (wan_stage1, wan_stage2, wan_stage3)
DIT, TEXT_EMBEDDER, NEW_CHANNELS = 4_999_787_712, 22_026_240, 638_976
CONTEXT, CROSS, NORM = 81_804_288, 1_133_015_040, 184_320
LEARNS = (  # at full size, pattern by pattern: spec.md sections 2.7, 3.9, 4 and 5.3
    (CONTEXT,),
    (CONTEXT, CROSS, NORM),
    (CONTEXT, 352_595_456, DIT - TEXT_EMBEDDER + NEW_CHANNELS, 161_480_704),
)
TABLE_16 = (
    dict(t2i=80, recon=20),
    dict(t2i=16, recon=4, t2v=80),
    dict(t2i=5, edit=15, t2v=15, i2v=15, v2v=25, r2v=25),
)
VALUES = (  # steps, lr, pictures, videos, size, frames
    (100_000, 1e-3, 4096, None, (480, 832), 1),
    (15_000, 2e-5, 4096, 384, (704, 1280), 121),
    (10_000, 1e-5, 2048, 128, (704, 1280), 121),
)


def abstract(config: ConfigDict):
    return jax.eval_shape(functools.partial(build_model, config), jax.random.key(0))


@pytest.mark.parametrize('stage', range(3))
def test_full_size(stage):
    config = STAGES[stage].get_config()
    sizes = parameter_sizes(abstract(config))
    backbone = sum(size for path, size in sizes.items() if path.startswith('backbone/'))
    assert backbone == DIT - TEXT_EMBEDDER + (NEW_CHANNELS if stage == 2 else 0)
    for pattern, count in zip(config.trainable, LEARNS[stage], strict=True):
        assert sum(sizes[path] for path in sizes if re.fullmatch(pattern, path)) == count
    data = config.data
    found = (config.steps, config.optimizer.lr, config.batch_size, config.get('video_batch_size'))
    found += ((data.height, data.width), data.get('frames', 1))
    assert found == VALUES[stage]


@pytest.mark.parametrize('keyframes', [1, 3, 6, 11, 31])
def test_keyframes_of_table_6(keyframes):
    config = wan_stage3.get_config()
    config.canvas.keyframes = keyframes
    sizes = parameter_sizes(abstract(config))
    assert sizes['canvas/tokens/table'] == keyframes * 11 * 20 * 3584


@pytest.mark.parametrize('stage', range(3))
def test_shares(stage):
    shares, n = STAGES[stage].get_config().data.tasks, 10_000
    found = [task_of_step(shares, seed, step) for seed in range(1) for step in range(n)]
    assert set(found) == set(TABLE_16[stage])
    for task, percent in TABLE_16[stage].items():
        assert abs(found.count(task) / n - percent / 100) <= 1e-3, task
    assert np.isclose(sum(shares.values()), 1)
