"""hyperbolic_rl.py: the ball beside geoopt, layer (A), delta, mazes, PPO, Rainbow, command line."""

import copy
import functools
import itertools
import json
from dataclasses import replace

import geoopt
import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.sparse.csgraph import shortest_path
from torch import nn

import common
import hyperbolic_rl as hrl
from common import UserError

SMOKE = hrl.CONFIGS["smoke"]
BALL = geoopt.PoincareBallExact(c=1.0)
randn = functools.partial(torch.randn, dtype=torch.float64)
close = torch.testing.assert_close
RUN = common.Run(common.Config(device="cpu"))


def points(*shape, size=0.9):
    x = randn(*shape)
    return x / x.norm(dim=-1, keepdim=True) * torch.rand(*shape[:-1], 1, dtype=torch.float64) * size


def layer(count=5, n=4):
    return points(count, n), randn(count, n)


def explicit(x, p, w):
    """Eq. (3) with every z written out, the way the public code computes it: (B, n), (O, n) -> (B, O)."""
    z = hrl.mobius_add(-p, x[:, None])
    norm = w.norm(dim=-1)
    return norm * torch.asinh(2 * (z * w).sum(-1) / ((1 - z.square().sum(-1)) * norm))


# --- the ball


def test_mobius_addition_cancels_from_the_left_and_is_geoopt_s():
    x, y = points(2, 50, 4)
    close(hrl.mobius_add(-x, hrl.mobius_add(x, y)), y)
    close(hrl.mobius_add(x, y), BALL.mobius_add(x, y))


def test_exponential_maps_and_transport_are_geoopt_s_and_norms_are_half_distances():
    (p, q), v = points(2, 50, 4), randn(50, 4)
    close(BALL.dist0(hrl.expmap0(v)), 2 * v.norm(dim=1))
    close(BALL.logmap0(hrl.expmap0(v)), v)
    close(hrl.expmap(p, 0.1 * v), BALL.expmap(p, 0.1 * v))
    close(hrl.transport(p, q, v), BALL.transp(p, q, v))
    assert hrl.expmap0(torch.full((1, 3), 1e9)).norm().item() == pytest.approx(1 - 4e-3)


def test_one_matrix_product_equals_the_explicit_formula_and_passes_gradcheck():
    x, (p, w) = points(20, 4), layer()
    close(hrl.hyperplane_scores(x, p, w), explicit(x, p, w), rtol=1e-10, atol=1e-10)
    inputs = [t.requires_grad_() for t in (points(3, 4), *layer())]
    assert torch.autograd.gradcheck(hrl.hyperplane_scores, inputs)


def test_scores_are_signed_distances_to_the_hyperplane_times_the_normal_s_length():
    x, (p, w) = points(20, 4), layer()
    distance = BALL.dist2plane(x[:, None], p, w, signed=True) * w.norm(dim=1)
    close(hrl.hyperplane_scores(x, p, w), distance)
    close(hrl.hyperplane_scores(x, p, -w), -distance)


def test_near_the_origin_the_layer_is_linear_with_twice_the_weight():
    v, (p, w) = randn(9, 4), layer()
    close(hrl.hyperplane_scores(hrl.expmap0(1e-6 * v), 0 * p, w) / 1e-6, 2 * v @ w.T)


def test_layer_a_is_the_hyperboloid_s_with_normal_and_offset_of_the_same_hyperplane():
    """|x_r| = sinh 2|v|; p and w become z along w + 2 s p, of length |w|, and r = asinh(2 s / |w|)."""
    v, (p, w) = 0.3 * randn(9, 4), layer()
    norm = 2 * v.norm(dim=1, keepdim=True)
    lifted = torch.cat([norm.cosh(), norm.sinh() * 2 * v / norm], 1)
    s = (p * w).sum(1) / (1 - p.square().sum(1))
    z, length = w + 2 * s[:, None] * p, w.norm(dim=1)
    z = z / z.norm(dim=1, keepdim=True) * length[:, None]
    found = hrl.hyperboloid_scores(lifted, torch.asinh(2 * s / length), z)
    close(found, hrl.hyperplane_scores(hrl.expmap0(v), p, w), rtol=1e-6, atol=1e-6)


def test_normals_start_at_the_paper_s_deviation():
    assert hrl.HyperplaneLayer(32, 5000).weight.std().item() == pytest.approx(
        0.001768, rel=0.02
    )  # .01 / sqrt 32


def test_hyper_plus_plus_gates_features_that_are_scaled_already():
    place, one = hrl.ToHyperboloid(8), torch.ones(8)
    gate = place.scale(0.2692642 * one).sigmoid()  # tanh 1 / sqrt 8
    close(place(one)[:1].acosh().float(), 1.3950736 * gate)  # tanh 1 atanh .95


def test_riemannian_adam_is_geoopt_s():
    start, target = points(6, 3, size=0.5), points(6, 3)
    ours, theirs = hrl.BallPoints(start.clone()), geoopt.ManifoldParameter(start.clone(), manifold=BALL)
    optimizers = hrl.RiemannianAdam([ours], lr=0.05), geoopt.optim.RiemannianAdam([theirs], lr=0.05)
    for _ in range(30):
        for optimizer, p in zip(optimizers, (ours, theirs), strict=True):
            optimizer.zero_grad()
            (p - target).square().sum().backward()
            optimizer.step()
    close(ours.data, theirs.data, rtol=1e-4, atol=1e-4)


def test_no_riemannian_step_leaves_the_ball():
    p = hrl.BallPoints(torch.zeros(5, 3))
    optimizer = hrl.RiemannianAdam([p], lr=1.0)
    for _ in range(1000):
        p.grad = torch.randn(5, 3)
        optimizer.step()
        assert p.norm(dim=1).max() < 1


# --- delta


def test_delta_is_zero_for_trees_one_for_the_square_and_the_brute_force_elsewhere():
    tree, random = np.zeros((30, 30)), np.random.default_rng(0)
    for child in range(1, 30):
        tree[child, random.integers(child)] = 1 + child % 3
    assert hrl.relative_delta(torch.tensor(shortest_path(tree, directed=False))).item() < 1e-6
    square = torch.tensor([[0, 1, 2, 1], [1, 0, 1, 2], [2, 1, 0, 1], [1, 2, 1, 0.0]])
    assert hrl.relative_delta(square).item() == 1
    x = randn(8, 3)
    d = torch.cdist(x, x)
    a = (d[0][:, None] + d[0] - d) / 2
    delta = max(min(a[i, k], a[k, j]) - a[i, j] for i, j, k in itertools.product(range(8), repeat=3))
    close(hrl.relative_delta(d, bases=1, chunk=3), 2 * delta / d.max())


# --- encoder


def test_somebody_s_agent_becomes_hyperbolic_in_three_lines():
    theirs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(200, 16))
    agent = nn.Sequential(hrl.srym(theirs), hrl.HyperplaneLayer(16, 5))
    optimizer = hrl.RiemannianAdam(agent.parameters(), lr=1e-2)
    x, y, losses = torch.rand(64, 3, 7, 7), torch.randint(5, (64,)), []
    for _ in range(60):
        losses.append(nn.functional.cross_entropy(agent(x), y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0] and 0 < agent[1].offset.norm(dim=1).max() < 1


def test_spectral_norms_are_one_and_linear_encoders_shrink_distances_by_sqrt_n():
    encoder = hrl.srym(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 16)))
    for _ in range(50):
        encoder(torch.randn(2, 20))
    norms = [torch.linalg.matrix_norm(encoder[0][i].weight, 2).item() for i in (0, 2)]
    assert norms == pytest.approx([1, 1], abs=0.02)
    x, y = torch.randn(2, 100, 20)
    apart = BALL.logmap0(encoder(x)) - BALL.logmap0(encoder(y))
    assert (apart.norm(dim=1) <= 1.02 / 4 * (x - y).norm(dim=1)).all()


def test_acting_changes_no_buffer():
    envs = hrl.make_envs(SMOKE, 8, slice(None), train=True)
    net, (obs, _) = hrl.Net(envs, SMOKE), envs.reset(seed=0)
    before = copy.deepcopy(net.state_dict())
    hrl.play(net, envs, obs, torch.randn(4, 8, 4), RUN)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# --- PPO


def test_gae_is_the_discounted_sum_of_errors_up_to_the_episode_s_end():
    reward, value, done = torch.randn(6, 1), torch.randn(7, 1), torch.rand(6, 1) < 0.3
    live = 1 - done.float()
    error, found = reward + 0.9 * live * value[1:] - value[:-1], hrl.gae(reward, value, done, 0.9, 0.8)
    for t in range(6):
        wanted = sum(0.72 ** (k - t) * live[t:k].prod() * error[k, 0] for k in range(t, 6))
        close(found[t, 0], wanted)


def test_rewards_are_scaled_by_the_standard_deviation_of_all_returns_so_far():
    moments, before, seen, last = torch.zeros(3, dtype=torch.float64), torch.zeros(2), [], np.zeros(2)
    for _ in range(3):
        reward, done = torch.randn(5, 2), torch.rand(5, 2) < 0.3
        for r, end in zip(reward.numpy(), done.numpy(), strict=True):
            seen.append(r + 0.9 * last)
            last = seen[-1] * ~end
        found = hrl.scaled(reward, done, before, moments, 0.9, RUN)
        close(found, reward / np.std(seen), rtol=1e-4, atol=1e-5)


def test_the_loss_at_ratio_one_has_the_policy_gradient_and_clips_values():
    logits, action, advantage = torch.randn(6, 3, requires_grad=True), torch.randint(3, (6,)), torch.randn(6)
    logp, zero = logits.log_softmax(1)[torch.arange(6), action], torch.zeros(6)
    batch = hrl.Batch(None, action, logp.detach(), zero, advantage, zero)
    loss, _ = hrl.ppo_loss(logits, zero[:, None], batch, replace(SMOKE, entropy_coef=0.0))
    found, wanted = (torch.autograd.grad(x, logits)[0] for x in (loss, -(advantage * logp).mean()))
    close(found, wanted)
    assert hrl.value_loss(zero[:, None] + 1, batch, SMOKE).item() == 0.5  # the clipped value is no excuse


def test_hl_gauss_sums_to_one_and_its_mean_is_the_target_also_at_the_ends():
    cfg, target = replace(SMOKE, bins=51), torch.tensor([-99.0, -3.3, 0.0, 7.77, 99.0])
    probs = hrl.hl_gauss(target, hrl.bin_edges(cfg, target.device))
    close(probs.sum(1), torch.ones(5))
    close(hrl.value_of(probs.log(), cfg), target.clamp(-10, 10), atol=20 / 51, rtol=0)


# --- Rainbow


def test_projection_keeps_mass_and_mean_and_shares_an_atom_between_its_neighbours():
    atoms, probs = torch.linspace(-2, 2, 9), torch.rand(3, 9).softmax(1)
    reward, discount = torch.tensor([0.3, 9.0, -0.2]), torch.tensor([0.8, 0.9, 0.0])
    found = hrl.project(probs, reward, discount, atoms)
    moved = (reward[:, None] + discount[:, None] * atoms).clamp(-2, 2)
    close(found @ atoms, (probs * moved).sum(1))
    close(found.sum(1), torch.ones(3))
    assert found[2].nonzero().ravel().tolist() == [3, 4]


def test_transitions_stop_at_an_episode_s_end_and_follow_the_priorities():
    t, zero = torch.arange(10), torch.zeros(())
    row = dict(obs=zero, action=zero.long(), reward=zero, done=zero.bool(), priority=zero)
    replay = common.Replay(10, **row)
    replay.add(obs=t.float(), action=t, reward=t.float(), done=t == 4, priority=t.float() % 2)
    batch = hrl.sample(replay, replace(SMOKE, nstep=3, discount=0.5, batch=4000))
    found = {row: facts for row, *facts in zip(*(x.tolist() for x in (batch.rows, *batch[4:])), strict=True)}
    assert found == {1: [2.75, 0.125, 4], 3: [5, 0, 6], 5: [9.75, 0.125, 8]}
    close(batch.probability, torch.ones(4000) / 3)


# --- tasks


def test_mazes_are_trees_and_can_be_won_in_time():
    levels, again = (hrl.make_levels([7, 1], 40, 4) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(levels, again, strict=True))
    rooms = [9 * row + column for row in (1, 3, 5, 7) for column in (1, 3, 5, 7)]
    for wall, places in zip(levels.wall, levels.places, strict=True):
        graph = np.zeros((99, 99))
        for room, move in itertools.product(rooms, (-9, 1, 9, -1)):
            graph[room, room + 2 * move] = not wall[room + move]
        far = shortest_path(graph)[places]
        assert graph.sum() == 2 * 15 and np.isfinite(far[:, rooms]).all()  # edges = rooms - 1
        assert far[0, places[1]] + far[1, places[2]] <= 2 * 15


def test_environments_step_as_a_scalar_one_does():
    levels = hrl.make_levels([1, 0], 9, 3)
    envs = hrl.TreasureTree(levels, 4, slice(None), 12)
    envs.reset(seed=5)
    age, stage, place = 0, 0, envs.place[3]
    for action in np.random.default_rng(0).integers(0, 4, (900, 4)):
        level, move = envs.level[3], (-7, 1, 7, -1)[action[3]]
        obs, reward, done, *_ = envs.step(action)
        place += 0 if levels.wall[level, place + move] else 2 * move
        reached = place == levels.places[level, stage + 1]
        assert reward[3] == (reached and (0.5, 1)[stage])
        age, stage = age + 1, stage + reached
        assert done[3] == (stage == 2 or age == 12)
        if done[3]:
            age, stage, place = 0, 0, envs.place[3]
        assert tuple(obs[3].reshape(3, -1)[:, place]) == hrl.AGENT


def test_procgen_is_a_vector_environment():
    pytest.importorskip("procgen")
    envs = hrl.make_envs(replace(SMOKE, env="procgen:bigfish"), 3, slice(None), train=True)
    first, again = (envs.reset(seed=1)[0].copy() for _ in range(2))
    assert first.shape == (3, 3, 64, 64) and np.array_equal(first, again)
    assert envs.step(np.zeros(3, int))[1].shape == (3,)


# --- the script


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(env="procgen:pong"), "starpilot"),
        (dict(env="atari:bigfish"), "bigfish"),
        (dict(env="Pendulum-v1"), "procgen:GAME"),
        (dict(cells=1), "--cells"),
    ],
)
def test_bad_settings_are_one_line(change, words):
    if "procgen" in change.get("env", ""):
        pytest.importorskip("procgen")
    with pytest.raises(UserError, match=words):
        replace(SMOKE, **change).check()


def read(folder):
    return json.loads((folder / "results.json").read_text())["table"]


def test_smoke_runs_and_a_killed_run_resumes_to_the_same_numbers(run_script, tmp_path):
    words = ["--config", "smoke", "--rows", "S-RYM", "Hyper++", "--steps", "4", "--save_every", "2"]
    run_script(ROOT / "hyperbolic_rl.py", *words)
    folder = tmp_path / "out" / "hyperbolic_rl-smoke-s0"
    first = read(folder)
    for cell in ("S-RYM-s0", "Hyper++-s0"):
        (folder / cell / "result.json").unlink()
        (folder / cell / "step00000004" / ".metadata").unlink()
    run_script(ROOT / "hyperbolic_rl.py", *words, "--resume")
    again = read(folder)
    for row, (cell,) in first.items():
        assert again[row] == [cell | {"learn_us": again[row][0]["learn_us"]}]


def test_two_ranks_with_half_of_the_environments_each_equal_one(run_script, tmp_path):
    words = ["--config", "smoke", "--rows", "S-RYM", "--share", "run", "--envs", "64"]
    run_script(ROOT / "hyperbolic_rl.py", *words, "--out", "one")
    run_script(ROOT / "hyperbolic_rl.py", *words, "--out", "two", ranks=2)
    one, two = (read(tmp_path / out / "hyperbolic_rl-smoke-s0")["S-RYM"][0] for out in ("one", "two"))
    for metric in ("test", "train", "entropy", "gradient"):
        assert one[metric] == pytest.approx(two[metric], rel=1e-5, abs=1e-5), metric


def test_rainbow_runs_on_a_real_rom_and_its_evaluation_clips_no_reward(run_script, tmp_path):
    words = "--config atari --env atari:ms_pacman --seeds 1 --rows S-RYM --steps 60 --warmup 40 --nstep 3"
    words += " --episodes 1 --eval_every 99 --log_every 1"
    run_script(ROOT / "hyperbolic_rl.py", *words.split())
    folder = tmp_path / "out" / "hyperbolic_rl-atari-s0-ms_pacman"
    assert read(folder)["S-RYM"][0]["train"] in range(50, 5000, 10)  # a dot is worth 10
    assert "loss" in (folder / "S-RYM-s0" / "metrics.jsonl").read_text().splitlines()[-1]
