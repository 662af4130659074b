"""The stages of Wan, small, one after another, and one that stops and goes on."""

import dataclasses
import pathlib
import re
from typing import Any

import numpy as np
import pytest
from flax import nnx

from configs import wan_stage1, wan_stage2, wan_stage3
from metacanvas_jax.data.loader import task_of_step
from metacanvas_jax.data.sources import SOURCES
from metacanvas_jax.data.tasks import TASKS
from metacanvas_jax.loading import check_model, inherit, starting_model, trained
from metacanvas_jax.mllm.config import PRESETS
from metacanvas_jax.train.workdir import open_workdir
from metacanvas_jax.types import InputError
from tests import tiny, tiny_wan
from tests.test_bad_input import script
from tests.test_resume import metrics

STAGES = (wan_stage1, wan_stage2, wan_stage3)
# Few programs: what each task makes of its records stands in test_tasks.py.
SHARES = (dict(recon=1.0), dict(recon=0.4, t2v=0.6), dict(r2v=1.0))
NEW = 'backbone/condition_embedding/linear/kernel'


def values(state: nnx.State) -> dict[str, np.ndarray]:
    return {
        '/'.join(map(str, path)): np.array(value.get_value())
        for path, value in nnx.to_flat_state(state)
    }


@dataclasses.dataclass
class Run:
    """What a stage started from, as {name: value}, and where it is."""

    workdir: pathlib.Path
    before: dict[str, np.ndarray]
    frozen: Any = None
    trainable: Any = None

    @property
    def after(self) -> dict[str, np.ndarray]:
        return values(trained(self.workdir, self.trainable, average=False))


@pytest.fixture(scope='module')
def train():
    """train.py on one device, for clips of noise and a smaller MLLM; the programs are slow."""
    patch, vision = pytest.MonkeyPatch(), PRESETS['tiny'].vision
    assert vision
    vision = dataclasses.replace(vision, depth=2, hidden_size=32, num_heads=2, out_hidden_size=48)
    sizes = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=1, mrope_section=(4, 4, 4))
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1)
    nano = dataclasses.replace(PRESETS['tiny'], vision=vision, **sizes)
    patch.setitem(PRESETS, 'nano', nano)
    patch.setitem(SOURCES, 'clips', lambda data: dict.fromkeys(TASKS, tiny_wan.Clips()))
    with script('train') as module:
        patch.setattr(module, 'make_mesh', lambda **_: tiny.one_device())
        yield module
    patch.undo()


def config_of(stage: int, **changes):
    config = tiny_wan.shrink(STAGES[stage].get_config())
    config.mllm.size = 'nano'
    if 'canvas' in config:
        config.canvas.head_dim = 24
    config.data.source, config.data.tasks = 'clips', SHARES[stage]
    config.update(changes)
    return config


def run(train, stage: int, workdir: pathlib.Path, **changes) -> Run:
    config, made = config_of(stage, **changes), Run(workdir, {})

    def start(config, mesh):
        graphdef, trainable, frozen = starting_model(config, mesh)
        for part in (trainable, frozen):  # of a DiT that is not new, the last layer is not zero
            kernel = dict(nnx.to_flat_state(part)).get(('backbone', 'proj_out', 'kernel'))
            if kernel is not None:
                kernel[...] = 0.1 * tiny.normal(*kernel.shape)
        made.frozen, made.before = frozen, values(frozen)
        return graphdef, trainable, frozen

    def go_on(config, trainable):
        made.trainable = inherit(config, trainable)
        made.before |= values(made.trainable)
        return made.trainable

    with pytest.MonkeyPatch.context() as patch, open_workdir(workdir, config) as folder:
        patch.setattr(train, 'starting_model', start)
        patch.setattr(train, 'inherit', go_on)
        train.check(config)
        train.train(config, folder)
    return made


@pytest.fixture(scope='module')
def runs(train, tmp_path_factory) -> list[Run]:
    """30 steps each."""
    folder, made = tmp_path_factory.mktemp('stages'), []
    for stage in range(3):
        before = {'init_from': str(made[-1].workdir)} if made else {}
        made.append(run(train, stage, folder / str(stage), **before))
    return made


@pytest.mark.parametrize('stage', range(3))
def test_a_stage_trains_what_it_shall(stage, runs):
    made, after = runs[stage], runs[stage].after
    patterns = STAGES[stage].get_config().trainable
    asked = {n for n in made.before if any(re.fullmatch(p, n) for p in patterns)}
    assert after.keys() == asked
    assert [name for name in asked if not np.any(after[name] != made.before[name])] == []
    frozen = values(made.frozen)
    assert frozen.keys() == made.before.keys() - asked
    for name, value in frozen.items():
        np.testing.assert_array_equal(value, made.before[name], err_msg=name)
    *_, line = metrics(made.workdir)
    assert line['step'] == 30
    assert np.isfinite(line['loss'])
    assert [name for name in line if name.startswith('loss_')] == (
        ['loss_t2v'] if stage == 1 else []
    )
    assert line['skipped'] == 0


@pytest.mark.parametrize('stage', [1, 2])
def test_a_stage_goes_on_from_the_one_before(stage, runs):
    """What is new starts as it is built: the new channels at zero."""
    last, this = runs[stage - 1].after, runs[stage]
    assert last.keys() < this.after.keys()
    for name, value in last.items():
        np.testing.assert_array_equal(this.before[name], value, err_msg=name)
    assert (NEW in this.before) == (stage == 2)
    assert not np.any(this.before.get(NEW, 0))


def test_pictures_and_videos_resume_to_the_same_bits(runs, train, tmp_path):
    """Stopped between steps of either kind."""
    stop, config = 15, config_of(1)
    kinds = [task_of_step(SHARES[1], config.data.seed, step) for step in range(30)]
    assert set(kinds[:stop]) == set(kinds[stop:]) == {'recon', 't2v'}

    class Stop:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def requested(self, step: int) -> bool:
            return step == stop

    before = str(runs[0].workdir)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'Preemption', Stop)
        run(train, 1, tmp_path, init_from=before)
    assert [path.name for path in (tmp_path / 'checkpoints').iterdir()] == [str(stop)]
    again, whole = run(train, 1, tmp_path, init_from=before).after, runs[1].after
    lines = metrics(tmp_path)
    assert lines == metrics(runs[1].workdir)
    for line, task in zip(lines, kinds, strict=True):  # each has the loss of its task
        assert {n: line[n] for n in line if n.startswith('loss')} == dict.fromkeys(
            ('loss', f'loss_{task}'), line['loss']
        )
    assert again.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


# ---------------------------------------------------------------- refusals


def test_a_stage_wants_the_one_before(train, tmp_path):
    for given, message in (
        (None, 'config.init_from is missing; give the workdir of the stage before'),
        (tmp_path / 'gone', 'no such workdir or checkpoint: .*gone'),
        (tmp_path, 'is neither a workdir'),
    ):
        config = config_of(1)
        config.init_from = given if given is None else str(given)
        with pytest.raises(InputError, match=message):
            check_model(config)


def test_a_run_of_another_system_is_refused(runs, train, tmp_path):
    text = (runs[0].workdir / 'config.json').read_text()
    (tmp_path / 'config.json').write_text(text.replace('"kind": "wan"', '"kind": "sana"'))
    with pytest.raises(
        InputError, match=r'another system: config\.backbone\.kind is sana there, w'
    ):
        check_model(config_of(1, init_from=str(tmp_path)))
    config = config_of(1, init_from=str(runs[0].workdir))
    config.context.hidden = 24
    with pytest.raises(InputError, match=r'does not fit .*text\.down\.kernel is float32\[32,32\]'):
        check_model(config)
    # All that learned must learn on: of frozen leaves this run's checkpoints would know nothing.
    config = config_of(1, init_from=str(runs[1].workdir), trainable=('context/.*',))
    with pytest.raises(InputError, match=r'norm_q\.scale learned there and is frozen here'):
        check_model(config)
    config = config_of(1, init_from=str(runs[2].workdir), trainable=('context/.*', 'backbone/.*'))
    with pytest.raises(InputError, match=r'condition_embedding\.linear\.kernel is unknown here'):
        check_model(config)
