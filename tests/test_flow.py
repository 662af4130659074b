"""The straight path, its loss, the solver against diffusers, guidance, and the maps of App. I."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift, retrieve_timesteps

from metacanvas_jax.canvas.pca import pca_map
from metacanvas_jax.flow.guidance import guided
from metacanvas_jax.flow.loss import flow_loss
from metacanvas_jax.flow.path import frame_times, noised
from metacanvas_jax.flow.solver import SOLVERS, dpm_solver, euler
from metacanvas_jax.flow.times import (
    dpm_schedule,
    draw_times,
    dynamic_schedule,
    dynamic_shift,
    schedule,
)
from tests import published_flux, published_sana, tiny

SHAPE = (2, 3, 4, 5, 2)
Z, EPS = tiny.normal(*SHAPE), tiny.normal(*SHAPE, seed=1)


def test_time_runs_from_data_to_noise():
    for t, expected in ((0.0, Z), (1.0, EPS)):
        np.testing.assert_array_equal(noised(Z, EPS, jnp.full((2, 3), t))[0], expected)
    t_BT = jnp.array([[0.1, 0.4, 0.9], [0.0, 0.5, 1.0]])
    z_t, u = noised(Z, EPS, t_BT)
    np.testing.assert_array_equal(u, EPS - Z)
    for b in range(2):
        for f in range(3):
            expected = (1 - t_BT[b, f]) * Z[b, f] + t_BT[b, f] * EPS[b, f]
            np.testing.assert_allclose(z_t[b, f], expected, atol=1e-6)


def test_velocity_is_the_derivative_of_the_path():
    path = lambda t: noised(Z, EPS, jnp.full((2, 3), t))[0]
    _, tangent = jax.jvp(path, (jnp.array(0.3),), (jnp.array(1.0),))
    assert tiny.error(tangent, noised(Z, EPS, jnp.full((2, 3), 0.3))[1]) <= 1e-6


def test_clean_frames_are_at_time_zero():
    clean_BT = jnp.array([[1, 0, 0], [0, 0, 1]])
    found = frame_times(jnp.array([0.3, 0.8]), clean_BT)
    np.testing.assert_allclose(found, [[0, 0.3, 0.3], [0.8, 0.8, 0]])
    z_t, _ = noised(Z, EPS, found)
    np.testing.assert_array_equal(z_t[0, 0], Z[0, 0])
    np.testing.assert_array_equal(z_t[1, 2], Z[1, 2])


@pytest.mark.parametrize('shift', [1.0, 3.0])
def test_times_of_training_are_uniform_but_for_the_shift(shift):
    t = np.sort(np.asarray(draw_times(jax.random.key(0), 20_000, shift), np.float64))
    assert t[0] >= 0
    assert t[-1] < 1
    unshifted = t / (shift - (shift - 1) * t)
    distance = np.abs(unshifted - np.arange(1, 20_001) / 20_000).max()
    assert distance < 1.95 / 20_000**0.5  # Kolmogorov-Smirnov, one in a thousand


# ------------------------------------------------------------ loss


def test_loss_is_the_mean_over_noised_frames():
    v = tiny.normal(*SHAPE, seed=2)
    assert flow_loss(Z, Z, jnp.zeros((2, 3))) == 0
    expected = np.mean((np.asarray(v) - Z) ** 2)
    np.testing.assert_allclose(flow_loss(v, Z, jnp.zeros((2, 3))), expected, rtol=1e-6)

    clean_BT = jnp.array([[1, 0, 0], [1, 0, 1]])
    noisy = np.asarray(clean_BT) == 0
    expected = np.mean((np.asarray(v) - Z)[noisy] ** 2)
    np.testing.assert_allclose(flow_loss(v, Z, clean_BT), expected, rtol=1e-6)
    gradient = jax.grad(flow_loss)(v, Z, clean_BT)
    np.testing.assert_array_equal(np.asarray(gradient).any((2, 3, 4)), noisy)


def test_loss_does_not_depend_on_how_many_clean_frames_there_are():
    v, clean = tiny.normal(*SHAPE, seed=2), jnp.zeros((2, 3))
    more = [jnp.concatenate([7 * a[:, :2], a], 1) for a in (v, Z)]
    with_clean = flow_loss(*more, jnp.concatenate([jnp.ones((2, 2)), clean], 1))
    np.testing.assert_allclose(with_clean, flow_loss(v, Z, clean), rtol=1e-6)


# ------------------------------------------------------------ solver


def test_one_euler_step_along_a_straight_path_is_exact():
    found = euler(lambda z, t: EPS - Z, EPS, schedule(1, 1.0))
    assert tiny.error(found, Z) <= 1e-6


@pytest.mark.parametrize('shift', [1.0, 3.0, 5.0])
@pytest.mark.parametrize('steps', [1, 7, 28])
def test_euler_equals_diffusers(steps, shift):
    """Times, and a whole loop over a velocity that depends on z and on t."""
    A = 0.3 * np.random.default_rng(3).normal(size=(2, 2)).astype(np.float32)
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    times = schedule(steps, shift)
    np.testing.assert_allclose(times, scheduler.sigmas, atol=1e-6)

    z = torch.tensor(np.asarray(EPS))
    for t in scheduler.timesteps:
        velocity = z @ torch.tensor(A) + t / 1000
        z = scheduler.step(velocity, t, z).prev_sample
    found = jax.jit(lambda z: euler(lambda z, t: z @ A + t, z, times))(EPS)
    assert tiny.error(found, z) <= 1e-5


@pytest.mark.parametrize('tokens', [256, 1024, 1000, 4096, 4081, 8704])
@pytest.mark.parametrize('steps', [1, 2, 7, 28, 50])
def test_dynamic_times_are_those_of_flux(steps, tokens):
    """As FluxKontextPipeline asks its scheduler for them, to the last bit."""
    scheduler = FlowMatchEulerDiscreteScheduler(**published_flux.SCHEDULER)
    sigmas = np.linspace(1.0, 1 / steps, steps)
    retrieve_timesteps(scheduler, steps, 'cpu', sigmas=sigmas, mu=calculate_shift(tokens))
    assert dynamic_shift(tokens) == np.exp(calculate_shift(tokens))
    found = dynamic_schedule(steps, dynamic_shift(tokens))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, scheduler.sigmas)
    np.testing.assert_allclose(found, schedule(steps, dynamic_shift(tokens)), atol=1e-6)


def test_dynamic_shift_of_two_sizes():
    """spec.md section 6.2: 512 and 1024 pixels a side."""
    assert [round(dynamic_shift(n), 3) for n in (1024, 4096)] == [1.878, 3.158]


def test_more_steps_come_closer_to_the_flow():
    """dz/dt = z from t = 1 to 0 divides by e; Euler is of first order."""
    errors = [
        float(abs(euler(lambda z, t: z, 1.0, schedule(n, 1.0)) - np.exp(-1))) for n in (20, 40)
    ]
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.05)


@pytest.mark.parametrize('shift', [1.0, 3.0, 5.0])
@pytest.mark.parametrize('steps', [1, 2, 7, 14, 15, 20, 28, 50, 100])
def test_dpm_times_are_those_of_diffusers(steps, shift):
    scheduler = DPMSolverMultistepScheduler(**published_sana.SCHEDULER | dict(flow_shift=shift))
    scheduler.set_timesteps(steps)
    sigma, told = dpm_schedule(steps, shift)
    assert sigma.dtype == told.dtype == jnp.float32
    np.testing.assert_array_equal(sigma, scheduler.sigmas)
    np.testing.assert_array_equal(jnp.round(1000 * told), scheduler.timesteps)
    # A thousandth in fp32 times 1000 is the whole number, or the one next to it.
    theirs = scheduler.timesteps.numpy().astype(np.float32)
    assert (np.abs(1000 * told - theirs) <= np.spacing(theirs)).all()


def test_dpm_times_of_the_published_pipeline():
    sigma, told = dpm_schedule(20, 3.0)
    assert [round(1000 * float(t)) for t in np.asarray(told)[[0, 1, 2, 19]]] == [999, 982, 963, 136]
    assert float(sigma[0]) == pytest.approx(0.9997, abs=5e-5)


@pytest.mark.parametrize('shift', [1.0, 3.0])
@pytest.mark.parametrize('steps', [1, 2, 3, 14, 15, 20])
def test_dpm_solver_equals_diffusers(steps, shift):
    """A velocity that is not linear in z, and depends on the time that it is told."""
    A = 0.8 * np.random.default_rng(3).normal(size=(2, 2)).astype(np.float32)
    scheduler = DPMSolverMultistepScheduler(**published_sana.SCHEDULER | dict(flow_shift=shift))
    scheduler.set_timesteps(steps)
    z = torch.tensor(np.asarray(EPS))
    for t in scheduler.timesteps:
        velocity = torch.sin(3 * z @ torch.tensor(A)) + z * torch.cos(5 * t / 1000)
        z = scheduler.step(velocity, t, z).prev_sample
    assert z.abs().max() < 10
    velocity = lambda z, t: jnp.sin(3 * z @ A) + z * jnp.cos(5 * t)
    found = jax.jit(lambda z: dpm_solver(velocity, z, dpm_schedule(steps, shift)))(EPS)
    assert tiny.error(found, z) <= 1e-5


def test_dpm_solver_tells_the_model_whole_thousandths():
    """And moves along the sigmas: with v = t, told times alone decide the end."""
    sigma, told = dpm_schedule(2, 3.0)
    s, t = (np.asarray(a, np.float64) for a in (sigma, told))
    x_0 = 1 - s[0] * t[0]
    z = s[1] / s[0] + (1 - s[1] / s[0]) * x_0
    found = dpm_solver(lambda z, t: jnp.full_like(z, t), jnp.ones(1), (sigma, told))
    np.testing.assert_allclose(found, [z - s[1] * t[1]], atol=1e-6)


def test_dpm_solver_comes_closer_than_euler():
    """dz/dt = z along the same times; its first order alone is Euler's step."""
    sigma, _ = dpm_schedule(20, 1.0)
    z_1, exact = jnp.ones(()), np.exp(-float(sigma[0]))
    ours = dpm_solver(lambda z, t: z, z_1, (sigma, sigma[:-1]))
    eulers = euler(lambda z, t: z, z_1, sigma)
    assert 20 * abs(float(ours) - exact) < abs(float(eulers) - exact)


@pytest.mark.parametrize('name', SOLVERS)
def test_solvers_by_name(name):
    """One step along a straight path is exact; so are any number of them."""
    solver = SOLVERS[name]
    for steps in (1, 8):
        times = solver.times(steps, 3.0)
        start = jax.tree.leaves(times)[0][0]
        z = (1 - start) * Z + start * EPS
        found = jax.jit(lambda z, times: solver.solve(lambda z, t: EPS - Z, z, times))(z, times)
        assert tiny.error(found, Z) <= 1e-5


# ------------------------------------------------------------ guidance


def _toy(z, t, plan):
    return z * t + plan['a'][:, None] + plan['b'][:, None]


def test_guidance_extrapolates_from_the_negative():
    condition = {'a': jnp.array([1.0, 2.0]), 'b': jnp.array([0.5, -1.0])}
    negative = {'a': jnp.array([3.0, 5.0]), 'b': jnp.array([1.0, 1.0])}
    z, t = tiny.normal(2, 4), jnp.array(0.5)
    v_cond, v_neg = _toy(z, t, condition), _toy(z, t, negative)
    for scale, expected in (
        (1.0, v_cond),
        (0.0, v_neg),
        (4.5, v_neg + 4.5 * (v_cond - v_neg)),
    ):
        found = guided(_toy, condition, negative, scale)(z, t)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    same = guided(_toy, condition, condition, 7.0)(z, t)
    np.testing.assert_allclose(same, v_cond, atol=1e-6)


def test_each_branch_of_guidance_has_its_own_canvas():
    """A new canvas is the same (nothing) for all prompts, a trained one is not."""
    prompts = tiny.texts(seed=0), tiny.texts(seed=1)
    plan = jax.jit(lambda model, prompt: model.plan(prompt, (1, 4, 6)))
    new = tiny.randomised(tiny.metacanvas(tiny.sana))
    a, b = (plan(new, prompt).canvas for prompt in prompts)
    assert not np.any(a)
    assert not np.any(b)
    trained = tiny.perturbed(new, 'canvas/fusion/project')
    a, b = (plan(trained, prompt) for prompt in prompts)
    assert tiny.error(a.canvas, b.canvas) > 1e-2
    assert tiny.error(a.context_BLD, b.context_BLD) > 1e-2


# ------------------------------------------------------------ maps


def test_map_shows_the_three_main_directions():
    features = np.asarray(tiny.normal(6, 7, 16)) * np.linspace(3, 0.1, 16)
    found = pca_map(features)
    assert found.shape == (6, 7, 3)
    np.testing.assert_array_equal(found.min((0, 1)), [0, 0, 0])
    np.testing.assert_allclose(found.max((0, 1)), [1, 1, 1], atol=1e-6)

    x = features.reshape(42, 16) - features.reshape(42, 16).mean(0)
    _, vectors = np.linalg.eigh(x.T @ x)
    for n in range(3):
        direction = vectors[:, -1 - n]
        direction = direction * np.sign(direction[np.abs(direction).argmax()])
        scores = x @ direction
        expected = (scores - scores.min()) / np.ptp(scores)
        np.testing.assert_allclose(found[..., n].reshape(-1), expected, atol=1e-4)


def test_map_has_a_sign_and_no_origin():
    features = np.asarray(tiny.normal(5, 5, 8))
    found = pca_map(features)
    np.testing.assert_allclose(pca_map(-features), 1 - found, atol=1e-4)
    np.testing.assert_allclose(pca_map(10 * features + 3), found, atol=1e-4)


def test_map_of_little_or_nothing():
    assert not pca_map(np.ones((4, 5, 8))).any()
    one = pca_map(np.linspace(0, 1, 20).reshape(4, 5, 1))
    np.testing.assert_allclose(one[..., 0].reshape(-1), np.linspace(0, 1, 20), atol=1e-6)
    assert not one[..., 1:].any()
