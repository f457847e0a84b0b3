"""fb.py: losses against loops and exact MDPs, blocks, codes, weights, tasks, data and command line."""

import itertools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import fb

SMOKE = fb.CONFIGS["smoke"]
CLOSE = torch.testing.assert_close


def agent_and_batch(cfg, n=400):
    """An agent, its slow copy apart from it, and a batch of random transitions, of which some end."""
    s, next_s = torch.randn(2, n, 4)
    data = fb.Data(s, torch.rand(n, 3), next_s, (torch.rand(n) > 0.3).float(), next_s[:, :2], {})
    count = 1 + cfg.batch // cfg.codes + cfg.others
    index = torch.randperm(n)[: cfg.codes * count].view(cfg.codes, count)
    agent = fb.Agent(cfg, 4, 3)
    for p in agent.slow_forward.parameters():
        p += 0.1 * torch.randn_like(p)
    return agent, fb.gather(data, index, cfg)


# --- the loss


@pytest.mark.parametrize("others, groups", [(0, 1), (5, 1), (0, 2), (5, 2)])
def test_loss_is_a_loop_over_codes_transitions_and_next_states_in_both_layouts(others, groups):
    cfg = replace(SMOKE, groups=groups, codes=4, batch=12, others=others, ortho=0.7)
    agent, batch = agent_and_batch(cfg)
    z = fb.sample_z(agent.backward_map, batch.goal, cfg)
    f = agent.features(agent.forward_map, batch.s, batch.a, z)
    members = agent.features(agent.slow_forward, batch.next_s, torch.rand(4, 3, 3), z)
    slow = members.mean(0)
    squares, diagonal, products, norms = [], [], [], []
    for c, g in itertools.product(range(4), range(3)):
        met = batch.met[c % len(batch.met)]
        b, slow_b = (net(met[None], z[[c]])[0] for net in (agent.backward_map, agent.slow_backward))
        own = g if others else c * 3 + g
        assert torch.equal(met[own], batch.next_s[c, g, :2])
        diagonal.append((f[:, c, g] @ b[own]).sum())
        for j in range(len(met)):
            error = f[:, c, g] @ b[j] - cfg.discount * batch.live[c, g] * slow[c, g] @ slow_b[j]
            squares += [error.square().sum()] * (j != own)
            products += [(b[i] @ b[j]) ** 2 for i in range(j)]
            norms.append(b[j] @ b[j])
    mean = [torch.stack(x).mean() for x in (squares, diagonal, products, norms)]
    found = fb.representation_loss(agent, batch, members, z, cfg)
    CLOSE(found, mean[0] / 2 - mean[1] + 0.7 * (mean[2] / 2 - mean[3]))


def random_mdp():
    """Four equally likely next states of 8 states and 2 actions, their probabilities, their law rho."""
    following = torch.randint(8, (8, 2, 4))
    following[:, 0, 0] = torch.arange(8)  # all are reached
    rho = torch.bincount(following.flatten()).double() / following.numel()
    return following, torch.eye(8, dtype=torch.double)[following].mean(2), rho


def population(following, f, slow_f, b, policy, discount):
    """Eq. (1) over all transitions and all next states, without sampling noise: tables f (Z, 8, 2, d)."""
    number, next_s = torch.arange(64), following.flatten()
    s, a = number // 8, number // 4 % 2
    met = torch.cat([next_s[:, None], next_s.expand(64, -1)], 1)  # a row's own, then all
    own, gamma = torch.eye(1, 65).bool()[None], discount * torch.ones(64, 1).double()
    total = 0
    for mine, slow, greedy in zip(f, slow_f, policy, strict=True):
        target = torch.einsum("nd,njd->nj", slow[next_s, greedy[next_s]], b.detach()[met])
        m = torch.einsum("nd,njd->nj", mine[s, a], b[met])
        total += fb.fb_loss(m[None, :, None], target[:, None], gamma, own)
    return total


@pytest.mark.parametrize("discount", [0.8, 0.0])
def test_gradient_is_zero_at_the_exact_measure_and_at_its_indicator_where_all_ends(discount):
    following, step, rho = random_mdp()
    policy = torch.randint(2, (1, 8))
    chain = step[torch.arange(8), policy[0]]
    f = (step @ torch.linalg.inv(torch.eye(8) - discount * chain) / rho.sqrt())[None].requires_grad_()
    b = torch.diag(rho**-0.5).requires_grad_()
    loss = population(following, f, f.detach(), b, policy, discount)
    assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(loss, (f, b)))


def test_training_on_a_random_mdp_finds_value_iteration_s_values_and_policies():
    following, step, rho = random_mdp()
    reward = torch.randn(2, 8, dtype=torch.double)
    b, z = torch.diag(rho**-0.5), reward * rho.sqrt()  # z = E[r B]
    f = torch.zeros(2, 8, 2, 8, dtype=torch.double, requires_grad=True)
    slow, optimizer = f.detach().clone(), torch.optim.Adam([f], 0.1)
    for i in range(900):
        optimizer.param_groups[0]["lr"] = min(0.1, 20 * 0.99**i)
        policy = torch.einsum("zsad,zd->zsa", slow, z).argmax(-1)
        fb.descend(optimizer, population(following, f, slow, b, policy, 0.8))
        slow.lerp_(f.detach(), 0.2)
    q = torch.zeros(2, 8, 2, dtype=torch.double)
    for _ in range(200):
        q = torch.einsum("sat,zt->zsa", step, reward + 0.8 * q.amax(-1))
    found = torch.einsum("zsad,zd->zsa", f.detach(), z)
    assert (found - q).abs().max() < 1e-3 * q.abs().max() and torch.equal(found.argmax(-1), q.argmax(-1))


# --- blocks and codes


def backward_of(groups):
    return fb.Backward(2, replace(SMOKE, groups=groups, dim=8, width_b=32)).double()


def test_a_block_depends_on_directions_of_the_blocks_before_it_alone_and_has_its_own_norm():
    backward, s, z = backward_of(4), torch.randn(1, 5, 2).double(), torch.randn(1, 8).double()
    jacobian = torch.autograd.functional.jacobian(lambda z: backward(s, z).sum((0, 1)), z)[:, 0]
    blocks = jacobian.view(4, 2, 4, 2).abs().amax((1, 3))
    assert (blocks.triu() == 0).all() and (blocks > 1e-6).sum() == 6
    CLOSE(backward(s, z).view(5, 4, 2).norm(dim=-1), torch.full((5, 4), 2**0.5).double())
    CLOSE(backward(s, 7 * z), backward(s, z))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_code_is_the_fixed_point_of_its_encoding_scales_and_comes_back_from_its_reward(groups):
    backward, s, r = backward_of(groups), torch.randn(1, 40, 2).double(), torch.randn(3, 40).double()
    z = fb.encode(backward, s, r)
    CLOSE(z, torch.einsum("cj,cjd->cd", r, backward(s, z).expand(3, -1, -1)) / 40)
    CLOSE(fb.encode(backward, s, 5 * r), 5 * z)
    goal = torch.randn(3, 1, 2).double()
    code = fb.encode(backward, goal, torch.ones(3, 1).double())
    CLOSE(code, backward(goal, code)[:, 0])
    b = backward(s, z)[-1]
    reward = fb.decode(b, fb.covariance(b) @ torch.linalg.solve(b.mT @ b / 40, z[-1]))  # without its ridge
    CLOSE(fb.encode(backward, s, reward[None]), z[-1:])


# --- actors


def test_improved_weights_are_p_over_1_minus_p_and_each_code_counts_alike():
    p = torch.tensor([[0.7, 0.3], [0.5, 0.5]])
    weights = fb.advantage_weights(8 * p.log(), replace(SMOKE, beta=2.0, dim=16))
    CLOSE(weights, torch.tensor([[0.49, 0.09], [0.29, 0.29]]) / 0.58 / 2)
    one_hot = torch.tensor([[0.0, 1.0, 0.0]])
    CLOSE(fb.advantage_weights(900 * one_hot, SMOKE), one_hot, atol=1e-5, rtol=0)


def test_improved_weights_halve_the_bias_of_self_normalised_importance_sampling():
    x = torch.randn(100_000, 4)  # E[x e^x] / E[e^x] = 1
    weights = fb.advantage_weights(x, SMOKE)
    assert (weights * x).sum().item() == pytest.approx(0.748, abs=0.01)
    assert (x.softmax(-1) * x).sum(-1).mean().item() == pytest.approx(0.607, abs=0.01)


@pytest.mark.parametrize("method", ["fb", "single"])
@pytest.mark.parametrize("actor", ["td3", "aw"])
def test_an_actor_s_step_moves_the_actor_alone_and_a_hot_one_clones(method, actor):
    cfg = replace(SMOKE, method=method, codes=4, batch=16, beta=1e9)
    agent, batch = agent_and_batch(cfg)
    z = torch.randn(4, cfg.dim)
    clone = (batch.a - agent.mean(batch.s, z)).square().mean() / (2 * cfg.std**2)
    loss = fb.ACTOR_LOSS[actor](agent, batch, z, cfg)
    fb.descend(torch.optim.Adam(agent.actor.parameters()), loss)
    assert all((p.grad is not None) == name.startswith("actor.") for name, p in agent.named_parameters())
    if actor == "aw":
        CLOSE(loss, clone)


def test_agents_of_a_single_task_share_nothing_and_learn_td3_s_targets():
    cfg = replace(SMOKE, **fb.SINGLE | dict(batch=20))
    agent, batch = agent_and_batch(cfg)
    z, reward = torch.ones(4, 1), torch.randn(4, 5)
    slow = agent.features(agent.slow_forward, batch.next_s, torch.rand(4, 5, 3), z)
    q = agent.q(batch.s, batch.a[None], z)[:, 0]
    error = q - reward - cfg.discount * batch.live * slow[..., 0].amin(0)
    CLOSE(fb.critic_loss(agent, batch, slow, z, reward, cfg), 0.5 * error.square().sum() / 5)
    (gradient,) = torch.autograd.grad(q[1, 2].sum(), agent.forward_map.head[0].weight)
    assert gradient.abs().sum((1, 2)).count_nonzero() == 1


def test_a_reward_s_unit_changes_nothing_for_agents_of_a_single_task():
    cfg = replace(SMOKE, env="Hopper-v4", **fb.ROWS["TD3-AW"] | dict(codes=1))
    s, means = torch.randn(60, 4), []
    run = SimpleNamespace(device=s.device, steps=lambda n, **_: range(n), log=lambda *_, **__: None)
    for unit in (1, 1000):
        torch.manual_seed(0)
        agent, raw = fb.Agent(cfg, 4, 4), {"reward": unit * s[:, :1]}
        fb.learn(agent, fb.Data(s, s.tanh(), s + 1, torch.ones(60), s[:, :2], raw), cfg, run)
        means.append(agent.mean(s[None], torch.ones(1, 1)))
    CLOSE(*means)


def test_evaluation_sampling_plays_the_best_sample():
    agent = SimpleNamespace(mean=lambda s, z: s[..., :2], q=lambda s, a, z: -(a - 0.3).square().sum(-1)[None])
    obs, z = np.zeros((6, 4), np.float32), torch.zeros(2, 3)
    assert np.abs(fb.act(agent, z, replace(SMOKE, best_of=4000), obs) - 0.3).max() < 0.05


# --- the grid


def test_grid_measures_are_those_of_shortest_paths_and_no_features_without_z_beat_the_linear_bound():
    following, m = fb.grid_world(4, 0.9)
    CLOSE(m.sum(-1) / 16, torch.full((16, 80), 10.0))
    assert fb.reached(m[torch.arange(16), :, torch.arange(16)], following) == 1
    bound = fb.linear_bound(m, 5)
    assert all(fb.grid_error(fb.best_forward(b, m), b, m) > bound for b in torch.randn(9, 1, 16, 5))


# --- tasks


def test_the_point_mass_moves_as_in_dm_control():
    ours, physics = fb.PointMass(3, seed=0), common.DmControl("point_mass", "easy").env.physics
    ours.reset(1, None)
    with physics.reset_context():
        physics.set_state(ours.state[0, 1:])
    for force in np.random.default_rng(0).uniform(-1, 1, (20, 2)):
        ours.step(np.repeat(force[None] @ ours.thrusters, 3, 0))
        physics.set_control(force)
        physics.step(5)
    np.testing.assert_allclose(ours.state[0, 1:], physics.get_state(), atol=1e-10)


@pytest.mark.parametrize("domain", fb.DOMAINS)
def test_rewards_are_those_of_the_environment_computed_from_physics(domain):
    cfg = replace(SMOKE, env=domain)
    for k, task in enumerate(fb.task_names(cfg)):
        env = fb.make_env(cfg, task)
        env.reset(seed=0)
        env.action_space.seed(0)
        actions = np.stack([env.action_space.sample() for _ in range(4)])
        steps = [env.step(a) for a in actions]
        physics = torch.tensor(np.stack([step[4]["physics"] for step in steps]))
        found = fb.label({"physics": physics, "action": torch.from_numpy(actions)}, torch.arange(4), cfg)
        np.testing.assert_allclose(found[k], [step[1] for step in steps], atol=1e-5)


# --- the script


def table(folder):
    return json.loads((folder / "results.json").read_text())["table"]


def test_smoke_resumes_bitwise_reaches_goals_and_is_the_same_on_two_ranks(run_main, run_script, tmp_path):
    line, folder = ["--config", "smoke"], tmp_path / "out" / "fb-smoke-s0"
    run_main(fb, *line)
    before = table(folder)
    assert set(before) == set(fb.ROWS) and (folder / "fb.png").exists()
    for row in ("FB-AWARE", "TD3"):
        (folder / f"{row}-s0" / "result.json").unlink()
        shutil.rmtree(max((folder / f"{row}-s0").glob("step*")))
    run_main(fb, *line, "--resume")
    assert table(folder) == before
    assert "hours" in run_main(fb, *line, "--dry_run")[1]
    episode = next((folder / "data_point_mass-s0").glob("*.npz"))
    for task in ("goal:0.5,-0.5", f"demo:{episode}", "goal 2"):
        assert f"{task}: ends at" in run_main(fb, *line, "--task", task)[1]
    assert "2 numbers" in run_main(fb, *line, "--task", "goal:1")[2]
    run_script(ROOT / "fb.py", *line, "--rows", "FB", "FB-ARE", "--out", "two", ranks=2)
    assert table(tmp_path / "two" / "fb-smoke-s0") == {row: before[row] for row in ("FB", "FB-ARE")}


def test_a_domain_of_dm_control_is_collected_coded_and_acted_on(run_main, tmp_path):
    size = "--seeds 1 --ranks 1 --collect 2 --updates 100 --width 16 --batch 16 --prompt 50 --episodes 1"
    run_main(fb, "--config", "walker", *size.split(), "--rows", "FB-AWARE", "random actions")
    for cells in table(tmp_path / "out" / "fb-walker-s0").values():
        assert 0 < cells[0]["stand"] < 1000


def test_a_d4rl_file_is_learned_from_and_acted_on_in_gymnasium(run_main, tmp_path):
    rng, end = np.random.default_rng(0), np.arange(200) % 50 == 49
    fields = dict(observations=rng.uniform(size=(200, 11)), actions=rng.uniform(-1, 1, (200, 3)))
    fields |= dict(rewards=rng.uniform(size=200), terminals=end & False, timeouts=end)
    with h5py.File(tmp_path / "hopper.hdf5", "w") as file:
        file.update(fields)
    line = ["--config", "smoke", "--env", "Hopper-v4", "--data", "hopper.hdf5", "--seen", "0"]
    run_main(fb, *line, "--rows", "FB-AW", "TD3")
    reward, score = table(tmp_path / "out" / "fb-smoke-s0-hopper.hdf5")["TD3"][0].values()
    assert score == pytest.approx((reward + 20.27) / 32.5457)


@pytest.mark.parametrize(
    "words, line",
    [
        ("--config full", "folder of walker"),
        ("--data nowhere.hdf5", "not there"),
        ("--groups 3", "multiple of --groups"),
        ("--updates 19", "two --block"),
        ("--task goal:1,-1", "first run without --task"),
        ("--data . --env foo", "doesn't exist"),
        ("--data . --env walker", "(11, 3) numbers, in walker (24, 6)"),
        ("--data . --env Hopper-v4 --seen 12", "--seen at most the first"),
        ("--data . --env Hopper-v4", "no code"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_learned(words, line, run_main, tmp_path):
    none, file = np.zeros(9), tmp_path / "0.npz"
    np.savez(file, observation=np.ones((9, 11)), action=np.ones((9, 3)), reward=none, discount=none)
    code, _, err = run_main(fb, "--config", "smoke", "--rows", "FB", *words.split())
    assert code == 2 and line in err and not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_replays_an_update(run_main):
    assert run_main(fb, "--config", "smoke", "--rows", "FB-AWARE", "TD3-AW")[0] == 0
