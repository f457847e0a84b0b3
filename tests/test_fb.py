"""fb.py: losses against loops and exact MDPs, blocks, codes, weights, tasks, data and command line."""

import json
import math
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
from common import UserError

SMOKE = fb.CONFIGS["smoke"]


def batch_of(cfg, n=400, terminal=0.3):
    """Random transitions and a batch of them, of as many codes as cfg says."""
    live = (torch.rand(n) > terminal).float()
    s, next_s = torch.randn(n, 4), torch.randn(n, 4)
    data = fb.Data(s, fb.noisy(torch.zeros(n, 3), 1.0), next_s, live, next_s[:, :2], {})
    index = torch.stack([torch.randperm(n)[: fb.index_shape(cfg)[1]] for _ in range(cfg.codes)])
    return data, fb.gather(data, index, cfg)


# --- the loss


@pytest.mark.parametrize("others, groups", [(0, 1), (5, 1), (0, 2), (5, 2)])
def test_loss_is_a_loop_over_codes_transitions_and_next_states_in_both_layouts(others, groups):
    cfg = replace(SMOKE, groups=groups, codes=4, batch=12, others=others, ortho=0.7)
    agent, (_, batch) = fb.Agent(cfg, 4, 3), batch_of(cfg)
    for p in agent.slow_forward.parameters():
        p.data += 0.1 * torch.randn_like(p)
    z = fb.sample_z(agent.backward_map, batch.goal, cfg)
    next_a = torch.rand(4, 3, 3)
    found = fb.representation_loss(agent, batch, next_a, z, cfg)
    f = agent.features(agent.forward_map, batch.s, batch.a, z)
    slow = agent.features(agent.slow_forward, batch.next_s, next_a, z).mean(0)
    squares, diagonal, off, norms = [], [], [], []
    for c in range(4):
        met = batch.met[c % len(batch.met)]
        b, slow_b = agent.backward_map(met[None], z[[c]])[0], agent.slow_backward(met[None], z[[c]])[0]
        for g in range(3):
            own = g if others else c * 3 + g
            assert torch.equal(met[own], batch.next_s[c, g, :2])
            diagonal.append((f[:, c, g] @ b[own]).sum())
            for j in range(len(met)):
                target = cfg.discount * batch.live[c, g] * slow[c, g] @ slow_b[j]
                squares += [(f[:, c, g] @ b[j] - target).square().sum()] * (j != own)
        norms.append(b.square().sum(-1).mean())
        off += [(b[i] @ b[j]) ** 2 for i in range(len(met)) for j in range(len(met)) if i != j]
    mean = [torch.stack(x).mean() for x in (squares, diagonal, off, norms)]
    torch.testing.assert_close(found, mean[0] / 2 - mean[1] + 0.7 * (mean[2] / 2 - mean[3]))


def random_mdp(states=8, actions=2, branches=4):
    """Next states of every state and action, equally likely: (S, A, branches), and the law of next states."""
    following = torch.randint(states, (states, actions, branches))
    following[:, 0, 0] = torch.arange(states)  # all are reached
    rho = torch.bincount(following.flatten(), minlength=states).double() / following.numel()
    return following, rho


def population(following, f, slow_f, b, policy, discount):
    """Eq. (1) over all transitions and all next states, without sampling noise: tables f (Z, S, A, d)."""
    s, a, _ = torch.meshgrid(*map(torch.arange, following.shape), indexing="ij")
    s, a, next_s = s.flatten(), a.flatten(), following.flatten()
    met = torch.cat([next_s[:, None], next_s.expand(len(next_s), -1)], 1)  # a row's own, then all
    own = torch.zeros_like(met, dtype=torch.bool)
    own[:, 0] = True
    losses = []
    for k in range(len(f)):
        target = torch.einsum("nd,njd->nj", slow_f[k, next_s, policy[k, next_s]], b[met].detach())
        m = torch.einsum("nd,njd->nj", f[k, s, a], b[met])
        losses.append(fb.fb_loss(m[None, :, None], target[:, None], discount[s, a, None], own[:, None]))
    return sum(losses)


@pytest.mark.parametrize("discount", [0.8, 0.0])
def test_gradient_is_zero_at_the_exact_measure_and_at_its_indicator_where_all_ends(discount):
    following, rho = random_mdp()
    step = torch.nn.functional.one_hot(following, 8).double().mean(2)
    policy = torch.randint(2, (1, 8))
    chain = step[torch.arange(8), policy[0]]
    exact = step @ torch.linalg.inv(torch.eye(8) - discount * chain)
    f = (exact / rho.sqrt())[None].requires_grad_()
    b = torch.diag(rho**-0.5).requires_grad_()
    gamma = torch.full((8, 2), discount, dtype=torch.double)
    loss = population(following, f, f.detach(), b.detach(), policy, gamma)
    loss_b = population(following, f.detach(), f.detach(), b, policy, gamma)
    for loss, table in ((loss, f), (loss_b, b)):
        assert torch.autograd.grad(loss, table)[0].abs().max() < 1e-12


def test_training_on_a_random_mdp_finds_value_iteration_s_values_and_policies():
    following, rho = random_mdp()
    step = torch.nn.functional.one_hot(following, 8).double().mean(2)
    reward = torch.randn(6, 8, dtype=torch.double)
    b, z = torch.diag(rho**-0.5), reward * rho.sqrt()  # z = E[r B]
    f = torch.zeros(6, 8, 2, 8, dtype=torch.double, requires_grad=True)
    slow, optimizer = f.detach().clone(), torch.optim.Adam([f], 0.1)
    gamma = torch.full((8, 2), 0.8, dtype=torch.double)
    for i in range(900):
        optimizer.param_groups[0]["lr"] = 0.1 if i < 500 else 0.1 * 0.98 ** (i - 500)
        policy = torch.einsum("zsad,zd->zsa", slow, z).argmax(-1)
        fb.descend(optimizer, population(following, f, slow, b, policy, gamma))
        slow.lerp_(f.detach(), 0.2)
    q = torch.zeros(6, 8, 2, dtype=torch.double)
    for _ in range(200):
        q = torch.einsum("sat,zt->zsa", step, reward + 0.8 * q.amax(-1))
    found = torch.einsum("zsad,zd->zsa", f.detach(), z)
    assert (found - q).abs().max() < 1e-3 * q.abs().max()
    assert torch.equal(found.argmax(-1), q.argmax(-1))


def test_ortho_loss_is_the_distance_of_the_covariance_from_the_identity():
    b = torch.randn(1, 6, 3, dtype=torch.double)
    twice = torch.cat([b, b], 1)  # pairs of independent draws: all but i = j, with i's twin
    all_pairs = (b[0] @ b[0].T).square().mean()
    diagonal = b.square().sum(-1).square().mean()
    off = (12 * 12 * all_pairs - 12 * diagonal) / (12 * 11)
    wanted = off / 2 - b.square().sum(-1).mean()
    torch.testing.assert_close(fb.ortho_loss(twice), wanted)
    covariance = b[0].T @ b[0] / 6
    exact = (covariance - torch.eye(3)).square().sum() / 2 - 1.5
    torch.testing.assert_close(all_pairs / 2 - b.square().sum(-1).mean(), exact)


# --- blocks and codes


def backward_of(groups, dim=8):
    return fb.Backward(2, replace(SMOKE, groups=groups, dim=dim, width_b=32)).double()


def test_a_block_depends_on_directions_of_the_blocks_before_it_alone_and_has_its_own_norm():
    backward, s = backward_of(4), torch.randn(1, 5, 2, dtype=torch.double)
    z = torch.randn(1, 8, dtype=torch.double)
    jacobian = torch.autograd.functional.jacobian(lambda z: backward(s, z)[0], z)[:, :, 0]  # (J, d, d)
    blocks = jacobian.unflatten(1, (4, 2)).unflatten(3, (4, 2)).abs().amax((0, 2, 4))
    assert (blocks.triu() == 0).all() and (blocks.tril(-1) + torch.ones(4, 4).triu() > 1e-6).all()
    b = backward(s, z)
    torch.testing.assert_close(b.unflatten(-1, (4, 2)).norm(dim=-1), torch.full((1, 5, 4), 2**0.5).double())
    torch.testing.assert_close(backward(s, 7 * z), b)


def test_shared_and_separate_states_give_the_same_features():
    backward, s, z = backward_of(2), torch.randn(1, 5, 2).double(), torch.randn(3, 8).double()
    torch.testing.assert_close(backward(s, z), backward(s.repeat(3, 1, 1), z))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_code_is_the_fixed_point_of_its_encoding_scales_and_comes_back_from_its_reward(groups):
    backward, s = backward_of(groups), torch.randn(1, 40, 2, dtype=torch.double)
    r = torch.randn(3, 40, dtype=torch.double)
    z = fb.encode(backward, s, r)
    torch.testing.assert_close(z, torch.einsum("cj,cjd->cd", r, backward(s, z).expand(3, -1, -1)) / 40)
    torch.testing.assert_close(fb.encode(backward, s, 5 * r), 5 * z)
    goal = torch.randn(3, 1, 2, dtype=torch.double)
    code = fb.encode(backward, goal, torch.ones(3, 1).double())
    torch.testing.assert_close(code, backward(goal, code)[:, 0] if groups > 1 else backward(goal, code)[:, 0])
    any_z = torch.randn(1, 8, dtype=torch.double)
    b = backward(s, any_z)[0]
    ridge = b.mT @ b / 40
    reward = fb.decode(b, (ridge + 1e-4 * torch.eye(8)) @ torch.linalg.solve(ridge, any_z[0]))
    torch.testing.assert_close(fb.encode(backward, s, reward[None]), any_z)


def test_training_codes_lie_on_the_sphere_and_are_goals_in_their_share():
    backward, goal = backward_of(2).float(), torch.randn(500, 1, 2)
    z = fb.sample_z(backward, goal, replace(SMOKE, dim=8, goal_ratio=0.3))
    torch.testing.assert_close(z.norm(dim=-1), torch.full((500,), 8**0.5))
    coded = (z - fb.encode(backward, goal, torch.ones(500, 1))).norm(dim=-1) < 1e-3
    assert coded.float().mean().item() == pytest.approx(0.3, abs=0.07)


# --- actors


def test_pessimism_is_the_minimum_of_two_the_mean_at_zero_and_harmless_for_one():
    q = torch.randn(3, 7)
    pairs = torch.stack([(q[i] - q[j]).abs() for i in range(3) for j in range(3) if i != j])
    torch.testing.assert_close(fb.pessimistic(q, 0.7), q.mean(0) - 0.7 * pairs.mean(0))
    torch.testing.assert_close(fb.pessimistic(q[:2], 0.5), q[:2].amin(0))
    assert torch.equal(fb.pessimistic(q[:1], 0.5), q[0])


def test_improved_weights_are_p_over_1_minus_p_and_each_code_counts_alike():
    p = torch.tensor([[0.7, 0.3], [0.5, 0.5]])
    weights = fb.advantage_weights(2 * p.log(), replace(SMOKE, beta=2.0))
    torch.testing.assert_close(weights[0], p[0] ** 2 / (p[0] ** 2).sum() / 2)
    torch.testing.assert_close(weights.sum(1), torch.full((2,), 0.5))
    sharp = fb.advantage_weights(torch.tensor([[0.0, 900.0, 0.0]]), SMOKE)
    torch.testing.assert_close(sharp, torch.tensor([[0.0, 1.0, 0.0]]), atol=1e-5, rtol=0)
    batch = fb.advantage_weights(p.log(), replace(SMOKE, per_code=False, improved=False))
    torch.testing.assert_close(batch, p / 2)


@pytest.mark.parametrize("n, plain, improved", [(4, 0.607, 0.748), (16, 0.867, 0.958)])
def test_improved_weights_halve_the_bias_of_self_normalised_importance_sampling(n, plain, improved):
    x = torch.randn(100_000, n)  # E[x e^x] / E[e^x] = 1
    for flag, wanted in ((False, plain), (True, improved)):
        weights = fb.advantage_weights(x, replace(SMOKE, beta=1.0, improved=flag)) * len(x)
        assert (weights * x).sum(1).mean().item() == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("method", ["fb", "single"])
@pytest.mark.parametrize("actor", ["td3", "aw"])
def test_an_actor_s_step_moves_the_actor_alone_and_a_cool_one_clones(method, actor):
    cfg = replace(SMOKE, method=method, actor=actor, codes=4, batch=16, beta=1e9)
    agent, (_, batch) = fb.Agent(cfg, 4, 3), batch_of(cfg)
    z = fb.sphere(torch.randn(4, cfg.dim))
    before = {name: p.clone() for name, p in agent.named_parameters()}
    loss = fb.ACTOR_LOSS[actor](agent, batch, z, cfg)
    fb.descend(torch.optim.Adam(agent.actor.parameters()), loss)
    moved = {name.split(".")[0] for name, p in agent.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"actor"}
    if actor == "aw":
        agent.load_state_dict(agent.state_dict() | before)
        clone = (batch.a - agent.mean(batch.s, z)).square().mean() / (2 * cfg.std**2)
        torch.testing.assert_close(loss, clone.detach())


def test_agents_of_a_single_task_share_nothing_and_learn_td3_s_targets():
    cfg = replace(SMOKE, **fb.SINGLE | dict(batch=20))
    agent, (_, batch) = fb.Agent(cfg, 4, 3), batch_of(cfg)
    z, reward, next_a = torch.ones(4, 1), torch.randn(4, 5), torch.rand(4, 5, 3)
    future = agent.features(agent.slow_forward, batch.next_s, next_a, z)[..., 0].amin(0)
    error = agent.q(batch.s, batch.a[None], z)[:, 0] - reward - cfg.discount * batch.live * future
    loss = fb.critic_loss(agent, batch, next_a, z, reward, cfg)
    torch.testing.assert_close(loss, 0.5 * error.square().sum() / 5)
    grads = torch.autograd.grad(agent.mean(batch.s, z)[2].sum(), list(agent.actor.parameters()))
    assert all((g.flatten(1).abs().sum(1) > 0).tolist() == [False, False, True, False] for g in grads)
    (g, *_) = torch.autograd.grad(
        agent.q(batch.s, batch.a[None], z)[1, 0, 2].sum(), agent.forward_map.left[0].weight
    )
    assert g.flatten(1).abs().sum(1).nonzero().flatten().tolist() == [6]


def test_evaluation_sampling_plays_the_best_sample():
    best = torch.tensor([0.3, -0.2])

    def q(s, a, z):
        return -(a - best).square().sum(-1)[None]

    agent = SimpleNamespace(mean=lambda s, z: s[..., :2], q=q)
    obs = np.zeros((6, 4), np.float32)
    action = fb.act(agent, torch.zeros(2, 3), replace(SMOKE, best_of=4000), obs)
    assert action.shape == (6, 2) and np.abs(action - best.numpy()).max() < 0.05
    assert not fb.act(agent, torch.zeros(2, 3), replace(SMOKE, best_of=1), obs).any()


# --- the grid


def test_grid_measures_are_those_of_shortest_paths():
    following, m = fb.grid_world(4, 0.9)
    torch.testing.assert_close(m.sum(-1) / 16, torch.full((16, 80), 10.0))
    q = m[torch.arange(16), :, torch.arange(16)]
    place = torch.stack([torch.arange(16) // 4, torch.arange(16) % 4], 1).float()
    steps = torch.cdist(place, place, 1)
    torch.testing.assert_close(q.view(16, 16, 5).amax(-1), 160 * 0.9 ** (steps - 1).clamp(min=0))
    assert fb.reached(q, following) == 1


def test_no_features_without_z_beat_the_linear_bound_which_the_best_ones_attain():
    _, m = fb.grid_world(4, 0.9)
    bound = fb.linear_bound(m, 5)
    for _ in range(5):
        b = torch.randn(1, 16, 5)
        assert fb.grid_error(fb.best_forward(b, m), b, m) > bound
    gram = (m.mT @ m / m.square().sum((1, 2), keepdim=True)).mean(0)
    b = 4 * torch.linalg.eigh(gram)[1][None, :, -5:]
    assert fb.grid_error(fb.best_forward(b, m), b, m).item() == pytest.approx(bound, abs=1e-4)


# --- tasks and data


def test_the_point_mass_moves_as_in_dm_control():
    ours, theirs = fb.PointMass(3, seed=0), common.DmControl("point_mass", "easy")
    ours.reset(1, None)
    physics = theirs.env.physics
    with physics.reset_context():
        physics.set_state(ours.state[0, 1:])
    for force in np.random.default_rng(0).uniform(-1, 1, (20, 2)):
        ours.step(np.repeat(force[None] @ ours.thrusters, 3, 0))
        for _ in range(5):
            physics.set_control(force)
            physics.step()
    np.testing.assert_allclose(ours.state[0, 1:], physics.get_state(), atol=1e-10)
    moved = ours.state.copy()
    off = np.linalg.svd(ours.thrusters)[2][-1]  # an action outside the plane
    ours.step(np.repeat(off[None], 3, 0))
    assert np.abs(ours.state[:, 3:]).max() < np.abs(moved[:, 3:]).max()


@pytest.mark.parametrize("domain", fb.DOMAINS)
def test_rewards_are_those_of_the_environment_computed_from_physics(domain):
    cfg = replace(SMOKE, env=domain)
    for k, task in enumerate(fb.task_names(cfg)):
        env = fb.DmTask(domain, task)
        env.reset(seed=0)
        actions = np.random.default_rng(0).uniform(-1, 1, (4, *env.action_space.shape)).astype(np.float32)
        steps = [env.step(a) for a in actions]
        physics = torch.tensor(np.stack([step[4]["physics"] for step in steps]))
        raw = {"physics": physics, "action": torch.from_numpy(actions)}
        found = fb.label(raw, torch.arange(4), cfg)[k]
        np.testing.assert_allclose(found, [step[1] for step in steps], atol=1e-5)


# --- the script


def table(folder):
    return json.loads((folder / "results.json").read_text())["table"]


def test_smoke_runs_resumes_bitwise_answers_prompts_and_is_the_same_on_two_ranks(
    run_main, run_script, tmp_path
):
    line = ["--config", "smoke"]
    assert run_main(fb, *line)[0] == 0
    folder = tmp_path / "out" / "fb-smoke-s0"
    before = table(folder)
    assert set(before) == set(fb.ROWS) and (folder / "fb.png").stat().st_size > 10_000
    for row in ("FB-AWARE", "TD3"):
        (folder / f"{row}-s0" / "result.json").unlink()
        shutil.rmtree(folder / f"{row}-s0" / "step00000002")
    run_main(fb, *line, "--resume")
    assert table(folder) == before
    episode = next((folder / "data_point_mass-s0").glob("*.npz"))
    for task in ("goal:0.5,-0.5", f"demo:{episode}", "goal 2"):
        code, out, _ = run_main(fb, *line, "--task", task)
        assert code == 0 and "ends at" in out
    for task, words in {
        "goal:1": "mat",
        "goal:a,b": "could not",
        "fly": "goal 3",
        "demo:no.npz": "No such",
    }.items():
        code, _, err = run_main(fb, *line, "--task", task)
        assert code == 2 and words in err and err.count("\n") == 1
    run_script(ROOT / "fb.py", *line, "--rows", "FB", "FB-ARE", "--out", "two", ranks=2)
    assert table(tmp_path / "two" / "fb-smoke-s0") == {row: before[row] for row in ("FB", "FB-ARE")}


def test_a_domain_of_dm_control_is_explored_coded_and_beaten_by_tasks_of_its_own(run_main, tmp_path):
    size = "--collect 2 --updates 20 --block 10 --width 16 --batch 16 --prompt 50 --episodes 1 --best_of 3"
    rows = ["--rows", "FB-AWARE", "random actions"]
    assert run_main(fb, "--config", "walker", "--seeds", "1", "--ranks", "1", *size.split(), *rows)[0] == 0
    found = table(tmp_path / "out" / "fb-walker-s0")
    assert all(0 < cells[0][task] < 1000 for cells in found.values() for task in ("stand", "walk", "run"))
    data = common.load_episodes(str(tmp_path / "out/fb-walker-s0/data_walker-s0"))
    assert data["physics"].shape == (1998, 18) and data["observation"].shape == (1998, 24)
    code, _, err = run_main(fb, "--config", "walker", "--task", "run", "--rows", "FB")
    assert code == 2 and "first run without --task" in err


def test_a_d4rl_file_is_learned_from_and_acted_on_in_gymnasium(run_main, tmp_path):
    rng, end = np.random.default_rng(0), np.arange(200) % 50 == 49
    with h5py.File(tmp_path / "hopper.hdf5", "w") as file:
        fields = dict(observations=rng.uniform(size=(200, 11)), actions=rng.uniform(-1, 1, (200, 3)))
        fields |= dict(rewards=rng.uniform(size=200), terminals=end & False, timeouts=end)
        for key, value in fields.items():
            file[key] = value
    line = [
        "--config",
        "smoke",
        "--env",
        "Hopper-v4",
        "--data",
        "hopper.hdf5",
        "--rows",
        "FB-AW",
        "TD3",
        "--codes",
        "1",
    ]
    assert run_main(fb, *line, "--seen", "0")[0] == 0


def test_what_makes_no_sense_or_is_missing_is_one_line_before_anything_is_computed(tmp_path):
    for words, wrong in {
        "multiple": dict(groups=3),
        "--batch": dict(codes=7),
        "not there": dict(data="nowhere.hdf5"),
        "ExORL": dict(env="Hopper-v4"),
        "must be finite": dict(lr=math.nan),
    }.items():
        with pytest.raises(UserError, match=words):
            replace(SMOKE, **wrong).check()
    with pytest.raises(UserError, match="walker"):
        fb.CONFIGS["full"].check()
    with pytest.raises(UserError, match="no physics"):
        fb.label({}, torch.arange(2), replace(SMOKE, env="walker"))
    np.savez(
        tmp_path / "a.npz",
        observation=np.zeros((3, 2)),
        action=np.full((3, 1), 2.0),
        reward=np.zeros(3),
        discount=np.ones(3),
    )
    with pytest.raises(UserError, match="beyond"):
        fb.load_data(replace(SMOKE, data=str(tmp_path)), None)


def test_the_dry_run_of_full_says_parameters_hours_and_what_is_missing(run_main):
    _, out, _ = run_main(fb, "--config", "full", "--dry_run")
    assert "parameters" in out and "hours" in out and "ExORL" in out


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_learns_what_eager_steps_learn(run_main, tmp_path):
    assert run_main(fb, "--config", "smoke", "--rows", "FB-AWARE", "TD3-AW")[0] == 0
