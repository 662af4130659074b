"""UniPC against diffusers' scheduler as WanPipeline configures it, and given frames."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler

from metacanvas_jax.flow.given import holding, impose
from metacanvas_jax.flow.guidance import guided
from metacanvas_jax.flow.solver import SOLVERS
from metacanvas_jax.flow.unipc import unipc, unipc_schedule
from tests import published_wan, tiny

SHAPE = (2, 3, 4, 5, 2)
Z, EPS = tiny.normal(*SHAPE), tiny.normal(*SHAPE, seed=1)
A = 0.8 * np.random.default_rng(3).normal(size=(2, 2)).astype(np.float32)


def _theirs(steps: int, shift: float) -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(**published_wan.SCHEDULER | dict(flow_shift=shift))
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize('shift', [1.0, 3.0, 5.0])
@pytest.mark.parametrize('steps', [1, 2, 7, 20, 40, 50, 100, 1000])
def test_times_are_those_of_diffusers(steps, shift):
    scheduler, times = _theirs(steps, shift), unipc_schedule(steps, shift)
    assert times.sigma.dtype == times.told.dtype == jnp.float32
    np.testing.assert_array_equal(times.sigma, scheduler.sigmas)
    np.testing.assert_array_equal(jnp.round(1000 * times.told), scheduler.timesteps)
    # A thousandth in fp32 times 1000 is the whole number, or the one next to it.
    theirs = scheduler.timesteps.numpy().astype(np.float32)
    assert (np.abs(1000 * times.told - theirs) <= np.spacing(theirs)).all()


def test_times_of_the_published_pipeline():
    told = 1000 * np.asarray(unipc_schedule(50, 5.0).told)
    assert [round(float(t)) for t in told[[0, 1, 2, 49]]] == [999, 995, 991, 96]


@pytest.mark.parametrize('shift', [1.0, 5.0])
@pytest.mark.parametrize('steps', [1, 2, 3, 4, 7, 20, 50])
def test_unipc_equals_diffusers(steps, shift):
    """A velocity that is not linear in z, and depends on the time that it is told."""
    scheduler = _theirs(steps, shift)
    z = torch.tensor(np.asarray(EPS))
    for t in scheduler.timesteps:
        velocity = torch.sin(3 * z @ torch.tensor(A)) + z * torch.cos(5 * t / 1000)
        z = scheduler.step(velocity, t, z).prev_sample
    assert z.abs().max() < 10
    velocity = lambda z, t: jnp.sin(3 * z @ A) + z * jnp.cos(5 * t)
    found = jax.jit(lambda z: unipc(velocity, z, unipc_schedule(steps, shift)))(EPS)
    assert tiny.error(found, z) <= 1e-5


# ------------------------------------------------------------ given frames

CLEAN = jnp.array([[1, 0, 0], [1, 0, 1]])
GIVEN = jnp.where(CLEAN[:, :, None, None, None] > 0, tiny.normal(*SHAPE, seed=2), jnp.nan)
B = tiny.normal(3, 3, seed=4)


def _mixing(np_, z_BTHWC, t_BT, mix):
    """Every frame's velocity depends on all frames and on their times."""
    mixed = np_.einsum('sT,BTHWC->BsHWC', mix, z_BTHWC * np_.cos(5 * t_BT)[..., None, None, None])
    return np_.sin(2 * z_BTHWC @ (torch.tensor(A) if np_ is torch else A)) + 0.3 * mixed


def test_given_frames_as_in_diffusers():
    """The loop of WanImageToVideoPipeline, with guidance."""
    scheduler, z = _theirs(12, 5.0), torch.tensor(np.asarray(EPS))
    clean = torch.tensor(np.asarray(CLEAN)[:, :, None, None, None]) > 0
    given, mix = torch.tensor(np.asarray(GIVEN)), torch.tensor(np.asarray(B))
    for t in scheduler.timesteps:
        seen = torch.where(clean, given, z)
        t_BT = torch.where(clean, 0, t)[:, :, 0, 0, 0] / 1000
        condition, negative = (_mixing(torch, seen, t_BT, sign * mix) for sign in (1, -1))
        z = scheduler.step(negative + 1.5 * (condition - negative), t, z).prev_sample
    z = torch.where(clean, given, z)

    @jax.jit
    def sample(z_1):
        plain = lambda z, t_BT, plan: _mixing(jnp, z, t_BT, plan[0, 0, 0] * B)
        plans = (sign * jnp.ones((2, 1, 1)) for sign in (1.0, -1.0))
        velocity = lambda z, t_BT, plan: jnp.concatenate(
            [plain(*half) for half in zip(*(jnp.split(a, 2) for a in (z, t_BT, plan)), strict=True)]
        )
        held = guided(holding(velocity, GIVEN, CLEAN), *plans, 1.5)
        z = unipc(held, impose(z_1, GIVEN, CLEAN), unipc_schedule(12, 5.0))
        return impose(z, GIVEN, CLEAN)

    found = sample(EPS)
    assert tiny.error(found, z) <= 1e-5
    np.testing.assert_array_equal(
        np.asarray(found)[clean[..., 0, 0, 0]], given[clean[..., 0, 0, 0]]
    )


@pytest.mark.parametrize('name', SOLVERS)
def test_no_solver_moves_given_frames(name):
    """Even before the last `impose`, but for rounding; and the velocity sees them to the bit."""
    seen = []

    def velocity(z, t_BT):
        jax.debug.callback(lambda z, t_BT: seen.append((z, t_BT)), z, t_BT)
        return _mixing(jnp, z, t_BT, B)

    solver = SOLVERS[name]
    z_1, times = impose(EPS, GIVEN, CLEAN), solver.times(6, 5.0)
    z = jax.jit(lambda z_1: solver.solve(holding(velocity, GIVEN, CLEAN), z_1, times))(z_1)
    jax.effects_barrier()
    clean = np.asarray(CLEAN) > 0
    assert tiny.error(np.asarray(z)[clean], np.asarray(GIVEN)[clean]) <= 1e-6
    assert len(seen) == 6
    for z, t_BT in seen:
        np.testing.assert_array_equal(z[clean], GIVEN[clean])
        np.testing.assert_array_equal(t_BT[clean], 0)
        assert (t_BT[~clean] == t_BT[0, 1]).all()
        assert t_BT[0, 1] > 0


def test_given_frames_are_imposed_on_whatever_a_solver_holds():
    """On each copy of the batch; and their velocity is 0."""
    seen, z = [], jnp.concatenate([EPS, 2 * EPS])
    v = holding(lambda z, t_BT: seen.append((z, t_BT)) or z + 1, GIVEN, CLEAN)(z, 0.5)
    clean = np.concatenate([CLEAN, CLEAN]) > 0
    given = np.concatenate([GIVEN, GIVEN])
    ((z_seen, t_BT),) = seen
    np.testing.assert_array_equal(np.asarray(z_seen)[clean], given[clean])
    np.testing.assert_array_equal(np.asarray(z_seen)[~clean], np.asarray(z)[~clean])
    np.testing.assert_array_equal(t_BT, np.where(clean, 0, 0.5))
    np.testing.assert_array_equal(np.asarray(v)[clean], 0)
    np.testing.assert_array_equal(np.asarray(v)[~clean], np.asarray(z + 1)[~clean])
