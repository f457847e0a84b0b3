"""rmc.py: the chain, its log-probability and losses, when to stop, replay, tasks and command line."""

import json
import math
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

import common
import rmc
from common import UserError

SMOKE = rmc.CONFIGS["smoke"]
DIST, close = torch.distributions, torch.testing.assert_close


def kernel_of(cfg, inputs=3, dims=2):
    """A kernel whose last layer is not close to zero, and its twin."""
    torch.manual_seed(1)
    kernel = rmc.Kernel(inputs, dims, replace(cfg, log_std=(-1.0, 1.0)))
    nn.init.normal_(kernel.net.last.weight, std=0.3)
    return kernel, rmc.twin(kernel)


def chain(cfg, length, seed=2, **settings):
    """A chain from one kernel, with its gradient of the summed actions and log-probs."""
    cfg = replace(cfg, **settings)
    kernel, frozen = kernel_of(cfg)
    state, start = torch.randn(5, 3), rmc.uniform(5, 2)
    torch.manual_seed(seed)
    actions, logp = rmc.unroll(kernel, frozen, state, start, length, cfg)
    grads = torch.autograd.grad(actions.sum() + logp.sum(), kernel.parameters(), allow_unused=True)
    return actions, logp, torch.cat([g.flatten() for g in grads if g is not None])


# --- the chain


@pytest.mark.parametrize("length, unbiased", [(1, False), (4, False), (4, True)])
def test_log_prob_is_a_double_loop_over_actions_and_kernels_and_of_one_step_sac_s(length, unbiased):
    raw, mean, log_std = (torch.randn(3, length, 2, dtype=torch.float64) for _ in range(3))
    found = rmc.mixture_logp(raw, mean, log_std, unbiased)
    for b in range(3):
        for i in range(length):
            others = [j for j in range(length) if not (unbiased and j == i)]
            table = [
                DIST.Normal(mean[b, j], log_std[b, j].exp()).log_prob(raw[b, i]).sum().exp() for j in others
            ]
            squash = (1 - raw[b, i].tanh() ** 2).log().sum()
            assert found[b, i].item() == pytest.approx(
                (sum(table) / len(others)).log().item() - squash.item()
            )


def test_frozen_steps_change_no_value_and_take_gradients_from_the_parameters_alone():
    whole, few, more = chain(SMOKE, 4, live=4), chain(SMOKE, 4, live=2), chain(SMOKE, 4, live=9)
    for i in (0, 1):
        assert torch.equal(whole[i], few[i])
    close(whole[2], more[2])  # B >= L is full autograd
    assert not torch.allclose(whole[2], few[2])


def test_the_twin_follows_an_optimizer_and_a_checkpoint():
    kernel, frozen = kernel_of(SMOKE)
    optimizer = torch.optim.Adam(kernel.parameters(), 0.1)
    sum(p.square().sum() for p in kernel.parameters()).backward()
    optimizer.step()
    kernel.load_state_dict({k: v + 1 for k, v in kernel.state_dict().items()})
    for mine, theirs in zip(kernel.parameters(), frozen.parameters(), strict=True):
        assert torch.equal(mine, theirs) and not theirs.requires_grad


class Line(nn.Module):
    """u = rho a + b + sigma eps, without the tanh when actions are small: gradients have a closed form."""

    def __init__(self, rho, live):
        super().__init__()
        self.rho, self.b = rho, torch.zeros(1, requires_grad=live)

    def forward(self, state, action):
        return self.rho * action.atanh() + self.b, torch.full_like(action, -20.0)


@pytest.mark.parametrize(
    "length, live, wanted", [(4, 1, 0.544), (4, 2, 1.034), (8, 2, 0.611), (8, 8, 2.03912), (64, 64, 2.44141)]
)
def test_gradient_of_a_linear_chain_has_its_closed_form(length, live, wanted):
    kernel, frozen = Line(0.6, True), Line(0.6, False)
    start = torch.zeros(1, 1, dtype=torch.float64)
    actions, _ = rmc.unroll(kernel, frozen, start, start, length, replace(SMOKE, live=live))
    actions.atanh().mean().backward()
    assert kernel.b.grad.item() == pytest.approx(wanted, abs=1e-3)


# --- losses


def test_pessimism_is_the_pair_loop_and_the_minimum_of_two():
    q = torch.randn(5, 3, 4, dtype=torch.float64)
    pairs = [(q[i] - q[j]).abs() for i in range(5) for j in range(5) if i != j]
    close(rmc.pessimism(q, 0.7), q.mean(0) - 0.7 * torch.stack(pairs).mean(0))
    close(rmc.pessimism(q[:2], 0.5), q[:2].amin(0))
    many = rmc.pessimism(torch.randn(500, 200), 1.0).mean().item()  # E|x - y| = 2 / sqrt(pi)
    assert many == pytest.approx(-2 / math.sqrt(math.pi), abs=0.02)


def test_temperature_rises_where_the_entropy_is_below_its_target():
    for logp, sign in ((2.0, -1), (0.0, 1), (1.0, 0)):
        log_alpha = torch.zeros((), requires_grad=True)
        logps = torch.full((4, 1), logp)
        rmc.temperature_loss(log_alpha, logps, -1.0, torch.ones(4)).backward()
        assert log_alpha.grad.sign() == sign


def test_rows_that_are_no_transition_are_left_out_of_critic_and_actor():
    q, y = torch.ones(2, 3), torch.arange(3.0)
    actor = rmc.actor_loss(q[..., None], y[:, None], 1, 0.5, y > 0)
    for loss in (rmc.critic_loss(q, y, y > 0), actor):
        assert loss.item() == pytest.approx(1 / 3)


def test_ensemble_members_are_separate_networks():
    nets = rmc.ResidualNet(3, 4, 2, 8)
    x = torch.randn(1, 6, 4).expand(3, -1, -1)
    for member in range(3):
        one = rmc.ResidualNet(1, 4, 2, 8)
        one.load_state_dict(
            {
                k: v[:, member : member + 1] if k == "left" else v[member : member + 1]
                for k, v in nets.state_dict().items()
            }
        )
        close(nets(x)[member], one(x[:1])[0])
    nets(x)[0].sum().backward()
    assert all(p.grad[1:].abs().max() == 0 for p in nets.parameters())


def test_projection_brings_the_spectral_norm_to_one():
    net = rmc.ResidualNet(2, 4, 2, 16)
    nn.init.normal_(net.block[0].weight)
    for _ in range(200):
        net.project()
    for layer in net.block:
        norms = torch.linalg.matrix_norm(layer.weight, 2)
        close(norms, torch.ones(2), atol=1e-3, rtol=0)


# --- when to stop


def reference_psrf(x):
    """The public code's R_k of (M, k, A): symmetrised."""
    k, means = x.shape[1], x.mean(1)
    within = torch.stack([torch.cov(chain.T) for chain in x]).mean(0)
    ratio = torch.linalg.solve(within, torch.cov(means.T))
    return ((k - 1) / k + torch.linalg.eigvalsh((ratio + ratio.T) / 2).max()).sqrt()


def test_psrf_is_gelman_and_rubin_s_and_affine_invariant_where_the_symmetrised_one_is_not():
    x = torch.randn(2, 16, 5, 3, dtype=torch.float64)
    one = x[0, :, :, :1]
    wanted = 4 / 5 + one.mean(1).var() / one.var(1).mean()
    close(rmc.psrf(one), wanted.sqrt(), rtol=1e-5, atol=0)
    T = torch.randn(3, 3, dtype=torch.float64)
    close(rmc.psrf(x @ T + 2), rmc.psrf(x), rtol=1e-4, atol=0)
    assert abs(reference_psrf(x[0] @ T) - reference_psrf(x[0])) > 0.01


def test_psrf_of_nan_or_of_a_point_is_no_traceback():
    assert rmc.psrf(torch.full((2, 4, 3, 2), torch.nan)).min() > 100
    assert torch.isfinite(rmc.psrf(torch.ones(2, 4, 3, 2))).all()


class AR(nn.Module):
    """Particles that keep rho of themselves, in the space of atanh."""

    def __init__(self, rho):
        super().__init__()
        self.rho = rho

    def forward(self, state, action):
        noise = 0.01 * math.sqrt(1 - self.rho**2)
        return self.rho * action.atanh(), torch.full_like(action, math.log(noise))


@pytest.mark.parametrize("rho, wanted", [(0.0, 2), (0.3, 5), (0.5, 11)])
def test_steps_grow_with_autocorrelation_as_computed_for_infinitely_many_chains(rho, wanted):
    start = (0.01 * torch.randn(20, 4000, 1)).tanh()
    _, steps = rmc.think(AR(rho), torch.zeros(20, 1), start, 0, SMOKE)
    assert steps.mean().item() == pytest.approx(wanted, abs=0.4)


def test_the_floor_of_independent_samples_rises_with_dimension():
    cfg = replace(SMOKE, particles=64)
    for dims, wanted in ((1, 2.1), (3, 2.6), (8, 4.6), (17, 7.2)):
        assert rmc.iid_steps(dims, cfg) == pytest.approx(wanted, abs=0.4)


def test_thinking_in_one_environment_ignores_the_others_and_stops_at_its_own_k():
    cfg = replace(SMOKE, particles=64)
    easy, hard = rmc.uniform(1, 64, 2) * 0.01, rmc.uniform(1, 64, 2) * 0.9
    results = []
    for other in (easy, hard):
        torch.manual_seed(0)
        results.append(rmc.think(AR(0.3), torch.zeros(2, 1), torch.cat([easy, other]), 0, cfg))
    assert torch.equal(results[0][0][0], results[1][0][0]) and results[0][1][0] == results[1][1][0]
    assert results[1][1][1] > results[1][1][0]
    assert (rmc.think(AR(0.0), torch.zeros(2, 1), torch.cat([easy, easy]), 5, cfg)[1] >= 5).all()


def test_average_steps_is_exact_in_floating_point():
    kbar = 4.0
    for t in range(2000):
        assert kbar == pytest.approx(7 - 3 * 0.99**t)
        kbar = rmc.average_steps(kbar, torch.tensor([7.0], dtype=torch.float64))
    assert math.ceil(kbar) == 7


# --- replay


@pytest.mark.parametrize("capacity", [40, 11])
def test_transitions_equal_slices_of_the_episodes_also_after_the_ring_has_wrapped(capacity):
    cfg = replace(SMOKE, nstep=3, stack=3, discount=0.9, batch=500)
    flag = torch.zeros(2, dtype=torch.bool)
    row = dict(frame=torch.zeros(2), action=torch.zeros(2, 1), reward=torch.zeros(2), age=flag.long())
    replay = common.Replay(capacity, **row, terminated=flag, done=flag)
    lengths, history, age, ended = (5, 7), [], np.zeros(2, int), np.zeros(2, bool)
    for t in range(30):
        done = ~ended & (age + 1 == lengths)
        facts = dict(frame=[t, 100 + t], action=[[t], [t]], reward=[t, -t], age=age)
        facts |= dict(terminated=done & [True, False], done=done)
        replay.add(
            **{k: torch.as_tensor(np.array(v))[None].to(replay.get_buffer(k).dtype) for k, v in facts.items()}
        )
        history.append((age.copy(), ended.copy(), done.copy()))
        age, ended = np.where(ended, 0, age + 1), done
    batch = rmc.sample(replay, cfg)
    assert batch.live.float().mean() > 0.6 and len(batch.obs[:, -1].unique()) > 9
    for k in range(500):
        last = int(batch.obs[k, -1])
        env, t = divmod(last, 100)
        begin = t - history[t][0][env]
        assert batch.obs[k].tolist() == [100 * env + max(t - j, begin) for j in (2, 1, 0)]
        assert bool(batch.live[k]) == (not history[t][1][env])
        if batch.live[k]:
            steps = next((i + 1 for i in range(3) if history[t + i][2][env]), 3)
            reward = sum(0.9**i * (t + i) * (-1) ** env for i in range(steps))
            over = history[t + steps - 1][2][env] and env == 0
            assert batch.reward[k].item() == pytest.approx(reward, rel=1e-5)
            assert batch.discount[k].item() == pytest.approx(0.0 if over else 0.9**steps)
            assert batch.next_obs[k, -1] == last + steps


# --- tasks


def test_the_best_policy_of_the_bandit_has_soft_value_zero_and_a_gaussian_misses_by_log_n():
    for kind, n in enumerate(rmc.MODES[:2]):
        obs = rmc.goal_observation(torch.tensor([kind]), torch.tensor([0.4]))[0]
        grid = torch.stack(torch.meshgrid(*[torch.linspace(-2, 2, 400)] * 2, indexing="ij"), -1)
        assert (rmc.goal_reward(obs, grid).exp().mean() * 16).item() == pytest.approx(1.0, abs=1e-2)
        one = rmc.goal_places(obs)[0]
        gaussian = DIST.Normal(one, rmc.SPREAD)
        a = gaussian.sample((20_000,))
        gap = (gaussian.log_prob(a).sum(-1) - rmc.goal_reward(obs, a)).mean().item()
        assert gap == pytest.approx(math.log(n), abs=0.06)


@pytest.mark.parametrize("env, words", [("CartPole-v1", "bounded Box"), ("dm:walker_fly", "no such task")])
def test_an_environment_that_does_not_fit_is_refused(env, words):
    with pytest.raises(UserError, match=words):
        replace(SMOKE, env=env).check()


def test_an_old_id_is_one_line_that_names_the_new_ones_before_anything_is_computed(run_script, tmp_path):
    done = run_script(ROOT / "rmc.py", "--env", "Hopper-v2", check=False)
    assert done.returncode == 2 and "Hopper-v4" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


class Wide(gymnasium.Env):
    """Bounds that differ by dimension, and an unbounded action."""

    def __init__(self, high=(1.0, 4.0)):
        self.action_space = gymnasium.spaces.Box(np.array([-2.0, 0.0]), np.array(high))
        self.observation_space = gymnasium.spaces.Dict(a=gymnasium.spaces.Box(-1, 1, (2,)))

    def reset(self, *, seed=None, options=None):
        return {"a": np.zeros(2, np.float32)}, {}

    def step(self, action):
        return {"a": np.float32(action)}, 0.0, False, False, {}


def test_bounds_of_each_dimension_are_mapped_and_unbounded_ones_refused():
    gymnasium.register("Wide-v0", Wide)
    env = rmc.make_env(replace(SMOKE, env="Wide-v0"))
    env.reset()
    assert env.step(np.array([1.0, -0.5]))[0].ravel().tolist() == pytest.approx([1.0, 1.0])
    gymnasium.register("Endless-v0", Wide, kwargs=dict(high=(1.0, np.inf)))
    with pytest.raises(UserError, match="bounded"):
        rmc.make_env(replace(SMOKE, env="Endless-v0"))


# --- the script


def test_smoke_runs_and_a_killed_run_resumes_to_the_same_numbers(run_script, tmp_path):
    words = ["--config", "smoke", "--rows", "SSPG", "tracking: bounded", "--save_every", "4"]
    run_script(ROOT / "rmc.py", *words)
    folder = tmp_path / "out" / "rmc-smoke-s0"
    first = json.loads((folder / "results.json").read_text())
    for cell in ("SSPG-s0", "tracking_bounded-s0"):
        (folder / cell / "result.json").unlink()
        (folder / cell / "step00000008" / ".metadata").unlink()
    run_script(ROOT / "rmc.py", *words, "--resume")
    again = json.loads((folder / "results.json").read_text())
    assert again["table"] == first["table"] and first["speed"]["SSPG"][0]["updates_per_s"] > 0


def test_two_ranks_deal_the_cells_and_find_what_one_does(run_script, tmp_path):
    words = ["--config", "smoke", "--rows", "tracking: unrestricted", "--seeds", "2"]
    run_script(ROOT / "rmc.py", *words, "--out", "one")
    run_script(ROOT / "rmc.py", *words, "--out", "two", ranks=2)
    tables = [
        json.loads((tmp_path / o / "rmc-smoke-s0/results.json").read_text())["table"] for o in ("one", "two")
    ]
    assert tables[0] == tables[1]


def test_pixels_run_through_the_same_loop(run_script, tmp_path):
    size = "--steps 6 --random_steps 2 --batch 4 --width 16 --particles 8 --pixels 21 --episodes 2 --seeds 1"
    words = f"--config pixels --env dm:cartpole_balance --rows SSPG --repeat 250 {size}"
    done = run_script(ROOT / "rmc.py", *words.split(), check=False)
    if "OpenGL" in done.stderr:
        pytest.skip("no OpenGL here")
    assert done.returncode == 0, done.stderr[-2000:]
    file = tmp_path / "out/rmc-pixels-s0-dm_cartpole_balance/results.json"  # named by its environment
    found = json.loads(file.read_text())["table"]["SSPG"][0]
    assert 0 <= found["return"] <= 1000


def test_dry_run_says_what_the_paper_s_setting_takes(run_script, tmp_path):
    done = run_script(ROOT / "rmc.py", "--config", "full", "--env", "Humanoid-v4", "--dry_run")
    assert "parameters" in done.stdout and "hours" in done.stdout and not (tmp_path / "out").exists()
