"""mood.py: equations against closed forms, stacked seeds against separate runs, loaders on true formats."""

import itertools
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

import before as common
import mood
from before import UserError
from mood import Config

SMALL = replace(
    mood.CONFIGS["smoke"], batch=16, updates=40, actor="s8x2", critic="s8x2", samples=1, decay=False
)


@pytest.fixture
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def transitions(n=200, obs=3, actions=2, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    reward, live = normal(n), (normal(n) > -1).to(dtype)
    episode = torch.arange(n) // 20
    rows = normal(n, obs), normal(n, actions).tanh(), reward, normal(n, obs), live
    return mood.Transitions(*rows, episode % 2, episode, ("a", "b"))


# --- equations


def brute_pessimistic(q, p):
    n = len(q)
    pairs = [abs(q[i] - q[j]) for i, j in itertools.permutations(range(n), 2)]
    return sum(q) / n - p * (sum(pairs) / (n * (n - 1)) if n > 1 else 0)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_pessimism_is_the_mean_minus_p_mean_pair_differences(n):
    q = torch.randn(2, n, 7, dtype=torch.float64)
    for p in (0.0, 0.5, 0.9):
        expected = [[brute_pessimistic(q[s, :, b].tolist(), p) for b in range(7)] for s in range(2)]
        torch.testing.assert_close(mood.pessimistic(q, p), torch.tensor(expected, dtype=torch.float64))
    shifted = mood.pessimistic(q[:, torch.randperm(n)] + 3, 0.5)
    torch.testing.assert_close(shifted, mood.pessimistic(q, 0.5) + 3)


def test_pessimism_of_two_members_at_one_half_is_their_minimum_to_the_bit():
    q = torch.randn(3, 2, 50)
    assert torch.equal(mood.pessimistic(q, 0.5), q.amin(1))


def test_advantage_weights_are_a_softmax_with_mean_one():
    a = torch.randn(2, 6)
    w = mood.advantage_weights(a, 0.3)
    torch.testing.assert_close(w, (a / 0.3).exp() / (a / 0.3).exp().mean(1, keepdim=True))
    torch.testing.assert_close(w.mean(1), torch.ones(2))
    torch.testing.assert_close(mood.advantage_weights(a + 5, 0.3), w)
    torch.testing.assert_close(mood.advantage_weights(a, 1e6), torch.ones(2, 6), atol=1e-5, rtol=0)
    one_hot = nn.functional.one_hot(a.argmax(1), 6).float() * 6
    torch.testing.assert_close(mood.advantage_weights(a, 1e-6), one_hot)
    assert mood.advantage_weights(torch.tensor([[1e6, -1e6]]), 0.1).isfinite().all()


def test_exponential_weights_are_clipped_at_100():
    w = mood.advantage_weights(torch.tensor([[0.0, 1.0, 1e6]]), 1 / 3, "exp")
    torch.testing.assert_close(w, torch.tensor([[1.0, math.exp(3), 100.0]]))


def test_weights_times_the_batch_change_an_adam_step_only_through_epsilon():
    x = torch.randn(8, 3)
    ends = []
    for scale in (1.0, 8.0):
        p = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.Adam([p], 0.1, eps=1e-12)
        for _ in range(5):
            optimizer.zero_grad()
            (scale * (x @ p).softmax(0) * (x @ p) ** 2).mean().backward()
            optimizer.step()
        ends.append(p.detach())
    torch.testing.assert_close(*ends)


def test_log_prob_is_torchs_normal_averaged_over_action_dimensions():
    mean, a = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3) * 2 - 1
    ours = mood.log_prob(mean, a, 0.2)
    torch.testing.assert_close(ours, torch.distributions.Normal(mean, 0.2).log_prob(a).mean(-1))
    (gradient,) = torch.autograd.grad(ours.sum(), mean)
    torch.testing.assert_close(gradient, (a - mean) / (3 * 0.2**2))


def test_squashed_samples_stay_in_bounds_and_pass_no_gradient_outside():
    mean = torch.tensor([0.95, 0.0, -0.99], requires_grad=True)
    a = mood.squash(mean, torch.tensor([0.5, 0.5, 0.001]))
    assert a.tolist() == pytest.approx([1.0, 0.5, -0.989])
    assert torch.autograd.grad(a.sum(), mean)[0].tolist() == [0.0, 1.0, 1.0]
    clipped = mood.squash(torch.zeros(1000), torch.randn(1000), 0.3)
    assert clipped.abs().max() == pytest.approx(0.3)
    noise = 0.2 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    share = (mood.squash(torch.tensor(0.95), noise) == 1).double().mean()
    assert share == pytest.approx(torch.distributions.Normal(0, 1).cdf(torch.tensor(-0.25)).item(), abs=4e-3)


def test_expectile_loss_weighs_the_sign_and_is_minimal_at_the_expectile_of_a_coin():
    u = torch.tensor([-2.0, 3.0])
    torch.testing.assert_close(mood.expectile_loss(u, 0.7), torch.tensor([0.3 * 4, 0.7 * 9]))
    torch.testing.assert_close(mood.expectile_loss(u, 0.5), 0.5 * u**2)
    v, coin = torch.linspace(0, 1, 1001), torch.tensor([0.0, 1.0])
    for kappa in (0.1, 0.5, 0.9):
        loss = mood.expectile_loss(coin[:, None] - v, kappa).mean(0)
        assert v[loss.argmin()].item() == pytest.approx(kappa, abs=2e-3)


def test_td3bc_loss_weighs_cloning_with_the_size_of_q():
    q, a, action = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    loss = mood.td3bc_loss(q, a, action, 0.4)
    for s in range(2):
        mse = ((a[s] - action[s]) ** 2).sum() / 15
        expected = -q[s].mean() + 0.4 * q[s].abs().mean() * mse
        torch.testing.assert_close(loss[s], expected)
    (gradient,) = torch.autograd.grad(loss.sum(), q)  # none through |Q|
    torch.testing.assert_close(gradient, torch.full((2, 5), -0.2))


# --- a tabular MDP: two states, two clusters of actions (a < 0, a > 0)

REWARD = torch.tensor([[0.0, 1.0], [2.0, 0.5]], dtype=torch.float64)  # state, cluster
FOLLOWS = torch.tensor([[0, 1], [1, 0]])


class Tabular(nn.Module):
    """Stands in for Agent: Q is a table, the policy's mean one number a state."""

    def __init__(self, members=2, mean=(0.5, -0.5)):
        super().__init__()
        g = torch.Generator().manual_seed(1)
        self.critic, self.actor, self.v = nn.Module(), nn.Module(), nn.Module()
        self.critic.table = nn.Parameter(torch.randn(members, 2, 2, generator=g, dtype=torch.float64))
        self.actor.raw = nn.Parameter(torch.atanh(torch.tensor(mean, dtype=torch.float64)))
        self.v.table = nn.Parameter(torch.randn(2, generator=g, dtype=torch.float64))
        self.target = nn.Module()
        self.target.table = nn.Parameter(torch.randn(members, 2, 2, generator=g, dtype=torch.float64), False)
        self.calls = []

    def mean(self, s):
        return self.actor.raw.tanh()[s[..., 0].long()][..., None]

    def value(self, s):
        return self.v.table[s[..., 0].long()][..., None]

    def q(self, s, a, target=False):
        table = (self.target if target else self.critic).table
        return table[:, s[..., 0].long(), (a[..., 0] > 0).long()].transpose(0, 1)

    def optimizers(self, rate=0.0, kind=torch.optim.SGD):
        nets = {"actor": self.actor, "critic": self.critic, "value": self.v}
        return {k: kind(n.parameters(), rate) for k, n in nets.items()}


def tabular_batch(live=1.0):
    """Every state and cluster once."""
    s, a = torch.tensor([0.0, 0, 1, 1], dtype=torch.float64), torch.tensor([-0.7, 0.7, -0.7, 0.7]).double()
    si, ai = s.long(), (a > 0).long()
    batch = {"obs": s[None, :, None], "action": a[None, :, None], "reward": REWARD[si, ai][None]}
    return batch | {
        "next": FOLLOWS[si, ai].double()[None, :, None],
        "live": torch.full((1, 4), live).double(),
    }


def settings(**more):
    return replace(Config(), discount=0.9, beta=0.5, critics=2, normalize=False, tau=0.25, **more)


@pytest.mark.parametrize("algo", ["awac", "td3bc", "iql", "asac", "bc"])
@pytest.mark.parametrize("live", [0.0, 1.0])
def test_every_loss_is_its_closed_form_on_a_tabular_mdp(algo, live):
    cfg, agent, batch = settings(algo=algo), Tabular(), tabular_batch(live)
    noise = torch.tensor([0.3, -1, 2, 9, -4, 0.1, 0.2, -0.5]).double().view(2, 1, 4, 1)
    q, target = agent.critic.table.detach(), agent.target.table.clone()
    v, mean = agent.v.table.detach(), agent.actor.raw.detach().tanh()
    out = mood.update(agent, agent.optimizers(), batch, batch, noise, cfg)  # rate 0: losses at fixed tables
    rows = [(0, 0), (0, 1), (1, 0), (1, 1)]
    y, clone, gains, q_pi = [], [], [], []
    for i, (s, a) in enumerate(rows):
        t = FOLLOWS[s, a].item()
        drawn = mean[t] + max(-0.3, min(0.3, 0.2 * noise[0, 0, i, 0].item()))
        value = min(target[:, t, int(drawn > 0)]) if algo != "iql" else v[t]
        y.append(REWARD[s, a] + 0.9 * live * value)
        free = mean[s] + 0.2 * noise[1, 0, i, 0].item()
        q_pi.append(min(q[:, s, int(free > 0)]))
        gains.append(q[:, s, a].mean() - q_pi[-1])
        action = batch["action"][0, i, 0]
        clone.append(-((action - mean[s]) ** 2) / 0.08 - math.log(0.2 * math.sqrt(2 * math.pi)))
    if algo != "bc":
        critic = 0.5 * sum((q[n, s, a] - y[i]) ** 2 for i, (s, a) in enumerate(rows) for n in range(2)) / 4
        assert out["critic_loss"].item() == pytest.approx(critic.item(), rel=1e-12)
    if algo == "iql":
        u = [min(target[:, s, a]) - v[s] for s, a in rows]
        expected = sum((0.7 if x > 0 else 0.3) * x**2 for x in u) / 4
        assert out["value_loss"].item() == pytest.approx(expected.item(), rel=1e-12)
    if algo == "td3bc":
        q_pi = torch.stack(q_pi)
        mse = sum((batch["action"][0, i, 0] - mean[s]) ** 2 for i, (s, _) in enumerate(rows)) / 4
        expected = -q_pi.mean() + 0.4 * q_pi.abs().mean() * mse
    else:
        weight = torch.ones(4) if algo in ("bc", "asac") else (torch.stack(gains) / 0.5).softmax(0) * 4
        expected = -sum(w * c for w, c in zip(weight, clone, strict=True)) / 4
    assert out["actor_loss"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_iqls_value_advantage_is_the_target_minimum_minus_the_value_before_its_step():
    cfg, agent, batch = settings(algo="iql", iql_advantage="value", weights="exp"), Tabular(), tabular_batch()
    v, target = agent.v.table.detach().clone(), agent.target.table.clone()
    out = mood.update(agent, agent.optimizers(0.5), batch, batch, torch.zeros(2, 1, 4, 1).double(), cfg)
    gain = torch.tensor([min(target[:, s, a]) - v[s] for s in (0, 1) for a in (0, 1)])
    torch.testing.assert_close(out["weight"][0], (gain / 0.5).exp().clamp(max=100))


def test_iqls_critic_bootstraps_from_the_value_after_its_step():
    cfg, agent, batch = settings(algo="iql"), Tabular(), tabular_batch()
    q = agent.critic.table.detach().clone()
    optimizers = agent.optimizers(0.5)
    optimizers["critic"], optimizers["actor"] = (
        torch.optim.SGD(o.param_groups[0]["params"], 0.0) for o in (optimizers["critic"], optimizers["actor"])
    )
    out = mood.update(agent, optimizers, batch, batch, torch.zeros(2, 1, 4, 1).double(), cfg)
    y = batch["reward"][0] + 0.9 * agent.v.table.detach()[batch["next"][0, :, 0].long()]
    expected = 0.5 * ((q.flatten(1) - y) ** 2).sum(0).mean()
    assert out["critic_loss"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_advantage_sees_the_critic_after_its_step_and_the_target_moves_last():
    cfg, agent, batch = settings(algo="awac"), Tabular(), tabular_batch()
    before = agent.target.table.clone()
    noise = torch.zeros(2, 1, 4, 1).double()
    out = mood.update(agent, agent.optimizers(0.3), batch, batch, noise, cfg)
    q = agent.critic.table.detach()  # stepped; means .5 and -.5 choose clusters 1 and 0
    gain = torch.stack([q[:, s, a].mean() - q[:, s, (1, 0)[s]].amin() for s in (0, 1) for a in (0, 1)])
    torch.testing.assert_close(out["weight"][0], (gain / 0.5).softmax(0) * 4)
    torch.testing.assert_close(agent.target.table, before.lerp(q, 0.25))


def exact_q(policy):
    """Q of a policy (state -> cluster) by a linear solve."""
    p, r = torch.zeros(4, 4).double(), REWARD.flatten()
    for s, a in itertools.product((0, 1), (0, 1)):
        t = FOLLOWS[s, a].item()
        p[2 * s + a, 2 * t + policy[t]] = 1
    return torch.linalg.solve(torch.eye(4).double() - 0.9 * p, r).view(2, 2)


def test_the_critic_converges_to_q_of_its_policy():
    cfg, agent, batch = settings(algo="awac", pessimism=0.0), Tabular(), tabular_batch()
    optimizers = agent.optimizers(0.5)
    optimizers["actor"] = torch.optim.SGD(agent.actor.parameters(), 0.0)
    for _ in range(3000):
        mood.update(agent, optimizers, batch, batch, torch.zeros(2, 1, 4, 1).double(), cfg)
    torch.testing.assert_close(agent.critic.table.mean(0).detach(), exact_q((1, 0)), atol=1e-6, rtol=0)


def test_a_small_temperature_finds_the_optimal_cluster_and_a_high_expectile_the_best_value():
    best = max(itertools.product((0, 1), (0, 1)), key=lambda p: sum(exact_q(p)[s, p[s]] for s in (0, 1)))
    cfg, agent, batch = replace(settings(algo="awac"), beta=0.1), Tabular(mean=(0.1, 0.1)), tabular_batch()
    optimizers = agent.optimizers(0.1, torch.optim.Adam)
    g = torch.Generator().manual_seed(0)
    for _ in range(1500):
        noise = torch.randn(2, 1, 4, 1, generator=g, dtype=torch.float64)
        mood.update(agent, optimizers, batch, batch, noise, cfg)
    assert tuple((agent.actor.raw > 0).long().tolist()) == best
    cfg, agent = settings(algo="iql", expectile=0.999), Tabular()
    optimizers = agent.optimizers(0.05, torch.optim.Adam)
    for _ in range(3000):
        mood.update(agent, optimizers, batch, batch, torch.zeros(2, 1, 4, 1).double(), cfg)
    optimum = exact_q(best).amax(1)
    torch.testing.assert_close(agent.v.table.detach(), optimum, atol=0.05, rtol=0.01)


def test_the_targets_reach_a_fixed_critic_geometrically():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    with torch.no_grad():
        for p, value in ((source.weight, 1.0), (source.bias, 1.0), (target.weight, 0.0), (target.bias, 0.0)):
            p.fill_(value)
    for _ in range(7):
        common.soft_update(target, source, 0.1)
    torch.testing.assert_close(target.weight, torch.full((2, 3), 1 - 0.9**7))


def test_no_gradient_reaches_targets_critics_or_data_through_the_actor_loss():
    learner = mood.Learner(replace(SMALL, algo="td3bc", seeds=1), [0], [transitions()])
    before = [p.detach().clone() for p in learner.agent.target.parameters()]
    learner.cfg = replace(learner.cfg, tau=0.0)
    critic = [p.detach().clone() for p in learner.agent.critic.parameters()]
    learner.optimizers["critic"].param_groups[0]["lr"] = 0.0
    learner.draw(0)
    learner.iteration()
    assert all(map(torch.equal, before, learner.agent.target.parameters()))
    assert all(map(torch.equal, critic, learner.agent.critic.parameters()))


# --- networks


def own_linear(layer, member, spectral=False):
    linear = nn.Linear(layer.weight.shape[1], layer.weight.shape[2])
    with torch.no_grad():
        linear.weight.copy_(layer.weight[member].T)
        linear.bias.copy_(layer.bias[member, 0])
    if not spectral:
        return linear
    linear = torch.nn.utils.spectral_norm(linear)
    linear.weight_u.copy_(layer.u[member])
    linear.weight_v.copy_(layer.v[member])
    return linear


@pytest.mark.parametrize("size", ["s8x2", "s8x1", "m8x2"])
def test_stacked_networks_equal_separate_torch_networks(size, doubles):
    net = mood.network(size, 6, 3, 2).double()
    for layer in net.modules():
        if isinstance(layer, common.EnsembleLinear):
            layer.orthogonal_(1.3, [torch.Generator().manual_seed(i) for i in range(3)])
            nn.init.normal_(layer.bias)
    x = torch.randn(3, 5, 3)  # three seeds, each serves two members
    out = net(x)
    net[0].weight.grad = None
    out.square().sum().backward()
    for member in range(6):
        h, first = x[member // 2], None
        for layer in net:
            if isinstance(layer, mood.Block):
                inner, outer = (own_linear(y, member, True).eval() for y in (layer.inner, layer.outer))
                h = h + outer(inner(nn.functional.layer_norm(h, h.shape[-1:])).relu())
            elif isinstance(layer, nn.ReLU):
                h = h.relu()
            else:
                linear = own_linear(layer, member)
                first, h = first or linear, linear(h)
        torch.testing.assert_close(out[member].detach(), h.detach())
        h.square().sum().backward()  # members do not touch each other's gradients
        torch.testing.assert_close(net[0].weight.grad[member], first.weight.grad.T)


def test_a_spectral_layer_is_torchs_spectral_norm_over_five_steps(doubles):
    layer = mood.SpectralLinear(2, 4, 4).double()
    layer.orthogonal_(1.5, [torch.Generator().manual_seed(i) for i in range(2)])
    with torch.no_grad():
        layer.weight.add_(0.3 * torch.randn_like(layer.weight))
    theirs = [own_linear(layer, i, True) for i in range(2)]
    ours_optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    their_optimizer = torch.optim.SGD([p for m in theirs for p in m.parameters()], 0.1)
    for _ in range(5):
        x = torch.randn(2, 3, 4)
        for optimizer in (ours_optimizer, their_optimizer):
            optimizer.zero_grad()
        out, expected = layer(x), torch.stack([m(x[i]) for i, m in enumerate(theirs)])
        torch.testing.assert_close(out, expected)
        out.pow(3).sum().backward()
        expected.pow(3).sum().backward()
        ours_optimizer.step()
        their_optimizer.step()
        for i, m in enumerate(theirs):
            torch.testing.assert_close(layer.weight[i].T, m.weight_orig)
            torch.testing.assert_close(layer.u[i], m.weight_u)
    u = layer.u.clone()
    layer.eval()(x)
    assert torch.equal(u, layer.u)


@pytest.mark.parametrize("gain", [1.0, math.sqrt(2)])
def test_a_fresh_square_spectral_layer_has_sigma_equal_to_its_gain(gain, doubles):
    layer = mood.SpectralLinear(3, 8, 8).double()
    layer.orthogonal_(gain, [torch.Generator().manual_seed(0)])
    w = layer.matrices()
    torch.testing.assert_close(w @ w.mT, torch.eye(8).expand(3, 8, 8))
    torch.testing.assert_close(layer.weight / w, torch.full_like(w, gain))


def test_a_block_whose_outer_matrix_adds_nothing_is_the_identity():
    block = mood.Block(2, 8)
    for layer in (block.inner, block.outer):
        layer.orthogonal_(1.0, [torch.Generator().manual_seed(0)])
    block.outer.matrices = lambda: torch.zeros(2, 8, 8)
    x = torch.randn(2, 4, 8)
    assert torch.equal(block(x), x)


def test_the_modern_actor_of_the_paper_has_2132998_parameters():
    with torch.device("meta"):
        net = mood.network("m1024x1", 1, 24, 6)
    assert sum(p.numel() for p in net.parameters()) == 2_132_998


def test_fresh_networks_are_orthogonal_with_the_papers_gains_also_at_the_output():
    agent = mood.Agent(replace(SMALL, algo="iql"), [0, 1], 3, 2)
    for net, gain in ((agent.actor, 1.0), (agent.critic, math.sqrt(2)), (agent.value, math.sqrt(2))):
        for layer in net:
            if isinstance(layer, common.EnsembleLinear):
                for w in layer.weight:
                    small = w.T @ w if w.shape[0] >= w.shape[1] else w @ w.T
                    torch.testing.assert_close(small, gain**2 * torch.eye(len(small)), atol=1e-5, rtol=1e-5)
                assert not layer.bias.any()


# --- stacked seeds


@pytest.mark.parametrize("algo", ["bc", "td3bc", "awac", "iql", "asac"])
@pytest.mark.parametrize("actor", ["s8x2", "m8x1"])
def test_stacked_seeds_equal_separate_runs_to_the_bit_in_float64(algo, actor, doubles):
    cfg = replace(
        SMALL,
        algo=algo,
        actor=actor,
        critic="m8x1" if actor == "m8x1" else "s8x2",
        critics=3,
        normalize=True,
        samples=2,
    )
    data = [transitions(seed=s, n=200 + 20 * s, dtype=torch.float64) for s in range(3)]
    together = mood.Learner(replace(cfg, seeds=3), [4, 5, 6], data)
    alone = [mood.Learner(replace(cfg, seeds=1), [4 + i], [data[i]]) for i in range(3)]
    for step in range(40):
        out = together.step(step)
        for i, learner in enumerate(alone):
            single = learner.step(step)
            assert all(out[k][i].item() == pytest.approx(single[k][0].item(), rel=1e-12) for k in out)
    for i, learner in enumerate(alone):
        for (name, p), q in zip(together.agent.named_parameters(), learner.agent.parameters(), strict=True):
            assert torch.equal(p.view(3, -1)[i], q.view(1, -1)[0]), name


def test_seeds_that_share_one_data_set_train_as_with_copies_of_it():
    shared = mood.Learner(replace(SMALL, seeds=2), [0, 1], [transitions()])
    copies = mood.Learner(replace(SMALL, seeds=2), [0, 1], [transitions(), transitions()])
    for step in range(5):
        a, b = shared.step(step), copies.step(step)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("change", [{"algo": "asac"}, {"algo": "iql", "actor": "m8x1", "critic": "m8x1"}])
def test_a_diverged_seed_is_set_aside_and_the_others_do_not_notice(change):
    cfg = replace(SMALL, seeds=2, **change)
    one, two = (mood.Learner(cfg, [0, 1], [transitions()]) for _ in range(2))
    with torch.no_grad():
        one.agent.critic[0].weight[:2] = math.nan  # both members of the first seed
    for step in range(6):
        one.step(step)
        two.step(step)
        if step in (2, 4):
            one.retire(0, step)
    states = one.state_dict() | {k: o.state_dict()["state"] for k, o in one.optimizers.items()}
    assert all(x.isfinite().all() for _, x in common.flat_tensors(states))
    assert torch.equal(one.agent.actor[0].weight[1], two.agent.actor[0].weight[1])
    assert torch.equal(one.agent.critic[0].weight[2:], two.agent.critic[0].weight[2:])
    assert one.diverged.tolist() == [2, -1]


def test_a_run_with_a_diverged_seed_reports_the_others(run_script, tmp_path):
    done = run_script(ROOT / "mood.py", *TINY, "--lr", "1e18", "--updates", "30")
    arms = [row for row in result_of(tmp_path)["table"] if "actor parameters" in row]
    assert all(row["diverged"] == 2 and row["reset 1"] is None for row in arms)
    assert "diverged at update" in done.stdout and not result_of(tmp_path)["claims"]


def test_constant_weights_make_awac_behaviour_cloning(monkeypatch):
    awac = mood.Learner(replace(SMALL, algo="awac", seeds=2), [0, 1], [transitions()])
    bc = mood.Learner(replace(SMALL, algo="bc", seeds=2), [0, 1], [transitions()])
    monkeypatch.setattr(mood, "advantage_weights", lambda gain, *_: torch.ones_like(gain))
    for step in range(50):
        awac.draw(step)
        bc.chunk = -2  # the same rows, whatever the number of noise draws
        bc.index.copy_(awac.index)
        awac.iteration()
        bc.iteration()
    assert all(map(torch.equal, awac.agent.actor.parameters(), bc.agent.actor.parameters()))


# --- the sampler and ASAC


def filled(logits):
    sampler = mood.LogSampler([len(row) for row in logits])
    for i, row in enumerate(logits):
        sampler.logits[i].view(-1)[: len(row)] = torch.as_tensor(row)
    sampler.mass.copy_(sampler.logits.double().logsumexp(-1))
    return sampler


@pytest.mark.parametrize("shift", [0.0, 1e3, -1e3])
def test_the_sampler_draws_from_the_softmax_stratified(shift):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3000, generator=g) * 2
    sampler, p, draws = filled([logits + shift, logits.flip(0) + shift]), logits.double().softmax(0), 20_000
    rows = sampler.sample(torch.rand(2, draws, generator=g))
    counts = torch.bincount(rows[0], minlength=3000)
    assert ((counts >= (draws * p).floor() - 1) & (counts <= (draws * p).ceil() + 1)).all()
    counts = torch.bincount(rows[1], minlength=3000).flip(0)
    assert ((counts >= (draws * p).floor() - 1) & (counts <= (draws * p).ceil() + 1)).all()


def test_the_sampler_never_draws_padding_also_when_one_row_dominates():
    sampler = filled([torch.tensor([0.0] * 1029 + [60.0]), torch.zeros(1500)])
    u = torch.tensor([0.1, 0.5, 1 - 2**-24]).repeat(2, 1)
    rows = sampler.sample(u)
    assert rows[0].tolist() == [1029] * 3 and rows[1].max() < 1500
    assert mood.LogSampler([5]).sample(torch.full((1, 1000), 1 - 2**-24)).max() == 4


def test_an_update_sets_rows_and_masses_and_of_duplicates_the_last_counts():
    for draws in (6, 5000):  # fewer and more rows than blocks
        sampler = filled([torch.zeros(8000)])
        index = torch.randint(8000, (1, draws), generator=torch.Generator().manual_seed(0))
        index[0, -1] = index[0, 0]
        values = torch.randn(1, draws)
        expected = torch.zeros(8000)
        for i, v in zip(index[0].tolist(), values[0], strict=True):
            expected[i] = v
        for _ in range(2):
            sampler.update(index, values)
            torch.testing.assert_close(sampler.logits.view(-1)[:8000], expected)
            torch.testing.assert_close(sampler.mass, sampler.logits.double().logsumexp(-1))
    sampler.update(torch.tensor([[expected.argmax()]]), torch.tensor([[-50.0]]))  # the maximum falls
    torch.testing.assert_close(sampler.mass, sampler.logits.double().logsumexp(-1))


def test_asacs_expected_gradient_is_the_weighted_one_and_batch_awacs_is_biased():
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, 0.0]).double()
    actions, mean = torch.tensor([-0.9, -0.2, 0.1, 0.5, 0.8]).double(), torch.tensor(0.2).double()
    score = (actions - mean) / 0.04  # d log pi / d mean
    truth = (logits.softmax(0) * score).sum()
    sampler = filled([logits.float()])
    rows = sampler.sample(torch.rand(1, 20_000, generator=torch.Generator().manual_seed(0)))
    assert score[rows[0]].mean().item() == pytest.approx(truth.item(), rel=1e-3)
    biases = []
    for size in (2, 4, 8):
        batches = torch.tensor(list(itertools.product(range(5), repeat=size)))
        weights = mood.advantage_weights(logits[batches], 1.0)
        biases.append(((weights * score[batches]).mean(1).mean() - truth).abs().item())
    assert biases[0] > biases[1] > biases[2] > 0
    assert biases[2] / biases[1] == pytest.approx(0.5, abs=0.15)  # falls as 1 / B


def test_asac_writes_the_updated_agents_advantages_for_both_batches():
    cfg = replace(SMALL, algo="asac", seeds=2, beta=0.5, samples=2)
    learner = mood.Learner(cfg, [0, 1], [transitions()])
    for step in range(3):
        learner.step(step)
    learner.draw(3)
    drawn = learner.sampler.sample(learner.uniform)
    learner.iteration()
    rows = torch.cat([learner.index, drawn], 1)
    with torch.no_grad():
        batch = learner.batch(rows)
        noise = torch.cat([learner.noise[1:3], learner.noise[3:]], 2) * cfg.std
        gain = mood.advantage(
            learner.agent, batch["obs"], batch["action"], learner.agent.mean(batch["obs"]), noise, cfg
        )
    for s in range(2):
        expected = dict(zip(rows[s].tolist(), (gain[s] / 0.5).tolist(), strict=True))
        for i, value in expected.items():
            assert learner.sampler.logits[s].view(-1)[i].item() == pytest.approx(value, abs=1e-5)


# --- acting


class Quadratic:
    """A critic -|a - best|^2 and a policy around zero."""

    best = torch.tensor([0.3, -0.2])

    def mean(self, s):
        return torch.zeros(*s.shape[:2], 2)

    def q(self, s, a, target=False):
        return -((a - self.best) ** 2).sum(-1)[:, None]


def test_evaluation_sampling_takes_the_best_sample_and_one_sample_is_the_mean():
    agent, cfg = Quadratic(), replace(Config(), std=0.2)
    s, noise = torch.zeros(2, 3, 4), torch.randn(2, 3, 50, 2)
    assert torch.equal(mood.act(agent, s, 1, None, cfg), torch.zeros(2, 3, 2))
    values = []
    for count in (2, 10, 50):
        a = mood.act(agent, s, count, noise[:, :, :count], cfg)
        values.append(agent.q(s, a)[:, 0])
        for i, j in itertools.product(range(2), range(3)):
            options = (0.2 * noise[i, j, :count]).clamp(-1, 1)
            best = max(options, key=lambda x: -((x - agent.best) ** 2).sum().item())
            assert torch.equal(a[i, j], best)
    assert (values[1] >= values[0]).all() and (values[2] >= values[1]).all()


# --- environment


@pytest.fixture(scope="module")
def suite_cheetah():
    return mood.TestbedEnv("cheetah", "run_backward")


def test_the_fast_cheetah_is_dm_controls(suite_cheetah):
    fast = mood.Cheetah(2, "run_backward")
    ours, _ = fast.reset(seed=3)
    theirs, info = suite_cheetah.reset(seed=3)
    np.testing.assert_allclose(ours[0], theirs, atol=1e-6)
    np.testing.assert_allclose(fast.physics()[0], info["physics"], atol=1e-9)
    rng = np.random.default_rng(0)
    for _ in range(60):
        a = rng.uniform(-1, 1, 6)
        ours, reward, *_ = fast.step(np.stack([a, -a]))
        theirs, expected, *_, info = suite_cheetah.step(a)
        np.testing.assert_allclose(ours[0], theirs, atol=1e-5)
        assert reward[0] == pytest.approx(expected, abs=1e-9)


def test_open_loop_rollouts_equal_stepping_with_fresh_velocity_sensors():
    env = mood.Cheetah(3)
    env.reset(seed=0)
    start, controls = env.physics(), np.random.default_rng(1).uniform(-1, 1, (3, 20, 6))
    physics, velocity = env.open_loop(start, controls)
    env.reset(options={"physics": start})
    for t in range(20):
        env.step(controls[:, t])
        np.testing.assert_allclose(env.physics(), physics[:, t + 1], atol=1e-9)
        np.testing.assert_allclose([d.sensordata[env.sensor] for d in env.datas], velocity[:, t], atol=1e-9)


def test_an_episode_lasts_a_thousand_physics_steps_whatever_the_repeat():
    for repeat, decisions in ((1, 1000), (300, 4)):
        env, steps, over = mood.Cheetah(1, "walk", repeat), 0, False
        env.reset(seed=0)
        while not over:
            _, _, terminated, (over,), _ = env.step(np.zeros((1, 6)))
            steps += 1
        assert steps == decisions and not terminated.any()


@pytest.mark.parametrize("domain", mood.DOMAINS)
def test_stored_physics_reproduce_every_tasks_reward(domain):
    env = mood.TestbedEnv(domain, mood.DOMAINS[domain][-1])
    env.reset(seed=0)
    rng, states, rewards = np.random.default_rng(0), [], []
    actions = rng.uniform(-1, 1, (6, *env.action_space.shape))
    for action in actions:
        *_, info = env.step(action)
        states.append(info["physics"])
        rewards.append(info["rewards"])
    for k, task in enumerate(mood.DOMAINS[domain]):
        np.testing.assert_allclose(
            mood.relabel(np.stack(states), actions, domain, task), np.stack(rewards)[:, k], atol=1e-5
        )
    assert np.all(np.stack(rewards) >= 0) and np.all(np.stack(rewards) <= 1)


def test_rewards_of_the_testbeds_own_tasks_are_their_formulas():
    assert mood.cheetah_reward(np.array([-3.0, 5.0, 20.0]), "run").tolist() == [0.0, 0.5, 1.0]
    assert mood.cheetah_reward(np.array([-1.0, 5.0]), "walk_backward").tolist() == [0.5, 0.0]
    assert [mood.tolerance_up(x, 1, 1, 0.5) for x in (2.0, 1.0, 0.5, 0.0, -1.0, -2.0)] == [
        1,
        1,
        0.75,
        0.5,
        0,
        0,
    ]
    env = mood.TestbedEnv("walker", "spin")
    env.reset(seed=0)
    for _ in range(5):
        env.step(np.ones(6))
    physics = env.env.physics
    spin = mood.walker_spin(physics)
    momentum = np.zeros(3)  # about the centre of mass, summed over bodies by hand
    m, d = physics.model, physics.data
    torso = m.name2id("torso", "body")
    bodies = [b for b in range(m.nbody) if m.body_rootid[b] == torso]
    mass = m.body_mass[bodies]
    velocity = np.zeros((len(bodies), 6))
    import mujoco

    for k, b in enumerate(bodies):
        mujoco.mj_objectVelocity(m.ptr, d.ptr, mujoco.mjtObj.mjOBJ_BODY, b, velocity[k], 0)
    linear = velocity[:, 3:]  # of the centres of mass
    com, mean = (
        (mass[:, None] * d.xipos[bodies]).sum(0) / mass.sum(),
        (mass[:, None] * linear).sum(0) / mass.sum(),
    )
    for k, b in enumerate(bodies):
        rotation = d.ximat[b].reshape(3, 3)
        inertia = rotation @ np.diag(m.body_inertia[b]) @ rotation.T
        momentum += mass[k] * np.cross(d.xipos[b] - com, linear[k] - mean) + inertia @ velocity[k, :3]
    assert spin == pytest.approx(float(np.clip(momentum[1] / 10, 0, 1)), abs=1e-6)


# --- data


def episodes(count=3, steps=5, obs=4, actions=2, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "observation": rng.standard_normal((count, steps + 1, obs)).astype(np.float32),
        "action": rng.uniform(-1, 1, (count, steps + 1, actions)).astype(np.float32),
        "reward": rng.uniform(0, 1, (count, steps + 1, 1)).astype(np.float32),
        "terminated": rng.uniform(0, 1, (count, steps + 1, 1)) > 0.8,
        "physics": rng.standard_normal((count, steps + 1, 6)),
    }


def hdf5(path, fields):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        for k, v in fields.items():
            file[k] = v
    return path


def test_row_t_of_a_mood_file_belongs_to_the_step_from_t_minus_one(tmp_path):
    e = episodes()
    data = mood.load_data(str(hdf5(tmp_path / "mixed__cheetah_run.hdf5", e)), "mixed__cheetah_run")
    assert len(data) == 15
    for i, (k, t) in enumerate(itertools.product(range(3), range(5))):
        np.testing.assert_array_equal(data.obs[i], e["observation"][k, t])
        np.testing.assert_array_equal(data.next[i], e["observation"][k, t + 1])
        np.testing.assert_array_equal(data.action[i], e["action"][k, t + 1])
        assert data.reward[i] == e["reward"][k, t + 1, 0]
        assert data.live[i] == 1 - e["terminated"][k, t + 1, 0]
        assert data.episode[i] == k
        np.testing.assert_array_equal(data.physics[i], e["physics"][k, t + 1])


def d4rl_fields(n=40, seed=0, **more):
    rng = np.random.default_rng(seed)
    terminals, timeouts = np.zeros(n, bool), np.zeros(n, bool)
    terminals[[6, 20]], timeouts[[12, 25]] = True, True
    obs = rng.standard_normal((n, 11)).astype(np.float32)
    fields = {"observations": obs, "actions": rng.uniform(-1, 1, (n, 3)).astype(np.float32)}
    fields |= {
        "rewards": rng.standard_normal(n).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
    }
    return fields | {"infos/qpos": obs[:, :5], "metadata/algorithm": np.bytes_("SAC")} | more


def brute_qlearning_dataset(f, limit=1000):
    """What D4RL's own function does, row by row."""
    out, step = [], 0
    for i in range(len(f["rewards"]) - 1):
        final = bool(f["timeouts"][i]) if "timeouts" in f else step == limit - 1
        if final:
            step = 0
            continue
        step = 0 if f["terminals"][i] else step + 1
        out.append(
            (
                f["observations"][i],
                f["actions"][i],
                f["rewards"][i],
                f["observations"][i + 1],
                f["terminals"][i],
            )
        )
    return out


@pytest.mark.parametrize("with_timeouts", [True, False])
def test_a_d4rl_file_gives_d4rls_own_transitions(tmp_path, with_timeouts):
    fields = d4rl_fields(2100)
    if not with_timeouts:
        del fields["timeouts"]
    data = mood.load_data(str(hdf5(tmp_path / "hopper_medium-v2.hdf5", fields)), "")
    expected = brute_qlearning_dataset(fields)
    assert len(data) == len(expected)
    for i, (obs, action, reward, following, terminal) in enumerate(expected):
        np.testing.assert_array_equal(data.obs[i], obs)
        np.testing.assert_array_equal(data.action[i], action)
        np.testing.assert_array_equal(data.next[i], following)
        assert data.reward[i] == reward and data.live[i] == 1 - terminal
    assert data.episode[0] == 0 and data.episode.diff().unique().tolist() == [0, 1]


def test_next_observations_of_a_d4rl_file_are_used_and_antmaze_rewards_are_shifted(tmp_path):
    follows = np.random.default_rng(1).standard_normal((40, 11)).astype(np.float32)
    fields = d4rl_fields(next_observations=follows)
    data = mood.load_data(str(hdf5(tmp_path / "antmaze-umaze-v2.hdf5", fields)), "")
    kept = [i for i in range(39) if not fields["timeouts"][i]]
    np.testing.assert_array_equal(data.next, follows[kept])
    np.testing.assert_allclose(data.reward, fields["rewards"][kept] - 1, atol=1e-6)


def test_d4rl_scores_are_0_for_random_and_100_for_expert():
    for name, (low, high) in mood.REFERENCE_RETURNS.items():
        assert mood.normalized_score(np.array([low, high]), f"{name}-medium-v2").tolist() == pytest.approx(
            [0, 100]
        )
    assert mood.normalized_score(np.array([3234.3]), "hopper_medium_replay-v2") == pytest.approx(100)
    assert mood.normalized_score(np.array([321.0]), "cheetah_run") == 321
    assert mood.d4rl_name("Ant_maze_u-maze_noisy_multistart_False.hdf5") == "antmaze"


def test_a_minari_data_set_is_read_with_its_truncations(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    import gymnasium

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    env, buffers, rng = gymnasium.make("Pendulum-v1", max_episode_steps=7), [], np.random.default_rng(0)
    for seed in range(3):
        episode = minari.data_collector.EpisodeBuffer(
            id=seed, observations=[env.reset(seed=seed)[0]], actions=[]
        )
        for _ in range(7):
            action = rng.uniform(-1, 1, 1).astype(np.float32)
            obs, reward, terminated, truncated, _ = env.step(action)
            for name, value in (("observations", obs), ("actions", action), ("rewards", reward)):
                getattr(episode, name).append(value)
            episode.terminations.append(terminated)
            episode.truncations.append(truncated)
        buffers.append(episode)
    about = {"algorithm_name": "x", "author": "x", "author_email": "x@x.x", "code_permalink": "x"}
    made = minari.create_dataset_from_buffers("pendulum/test-v0", buffers, env, **about)
    data = mood.load_data("minari:pendulum/test-v0", "")
    assert len(data) == 21 and data.live.all()  # a time limit is not terminal
    episode = next(iter(made.iterate_episodes()))
    np.testing.assert_allclose(data.obs[:7], episode.observations[:-1], atol=1e-6)
    np.testing.assert_allclose(data.next[:7], episode.observations[1:], atol=1e-6)
    np.testing.assert_allclose(data.action[:7], episode.actions, atol=1e-6)
    np.testing.assert_allclose(data.reward[:7], episode.rewards, atol=1e-5)
    assert data.episode.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    with pytest.raises(UserError, match="no/such-v0"):
        mood.load_data("minari:no/such-v0", "")


def test_exorl_episodes_are_relabelled_from_their_physics(tmp_path):
    env = mood.TestbedEnv("cheetah", "run_backward")
    expected = {}
    for source, seeds in (("proto", (0, 1)), ("rnd", (2,))):
        folder = tmp_path / "cheetah" / source / "buffer"
        folder.mkdir(parents=True)
        for k, seed in enumerate(seeds):
            obs, info = env.reset(seed=seed)
            rows = [(obs, np.zeros(6, np.float32), 0.0, 1.0, info["physics"])]
            for t in range(4):
                action = np.full(6, -0.5 + 0.3 * t, np.float32)
                obs, reward, *_, info = env.step(action)
                rows.append((obs, action, reward, 0.0 if t == 3 else 1.0, info["physics"]))
            columns = [np.stack(x) for x in zip(*rows, strict=True)]
            names = ("observation", "action", "reward", "discount", "physics")
            arrays = dict(zip(names, columns, strict=True))
            expected[source, k] = arrays["reward"][1:].copy()
            arrays["reward"] = np.full((5, 1), 9.0)  # another task's: must not be used
            arrays["discount"] = arrays["discount"][:, None]
            np.savez(folder / f"20200101T00000{k}_{k}_4.npz", **arrays)
    with pytest.raises(UserError, match="--repeat 1"):
        mood.load_data(str(tmp_path), "cheetah_run_backward", 4)
    data = mood.load_data(str(tmp_path), "cheetah_run_backward")
    assert data.sources == ("proto", "rnd") and data.source.tolist() == [0] * 8 + [1] * 4
    np.testing.assert_allclose(data.reward, np.concatenate(list(expected.values())), atol=1e-5)
    assert data.live.tolist() == [1, 1, 1, 0] * 3 and data.episode.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"terminated": None}, "no field terminated"),
        ({"action": np.zeros((3, 5, 2))}, r"action has shape \(3, 5, 2\)"),
        ({"observation": np.zeros((3, 6, 4)), "reward": np.zeros((2, 6))}, r"reward has shape \(2, 6\)"),
    ],
)
def test_a_broken_mood_file_is_one_line_that_names_the_field(tmp_path, change, words):
    fields = {k: v for k, v in (episodes() | change).items() if v is not None}
    with pytest.raises(UserError, match=words):
        mood.load_data(str(hdf5(tmp_path / "x.hdf5", fields)), "")


def test_files_that_are_no_data_are_one_line_that_names_them(tmp_path):
    pytest.importorskip("h5py")
    (tmp_path / "a.hdf5").write_bytes(b"not hdf5")
    with pytest.raises(UserError, match=r"a\.hdf5"):
        mood.load_data(str(tmp_path / "a.hdf5"), "")
    (tmp_path / "cheetah" / "x").mkdir(parents=True)
    with pytest.raises(UserError, match="--collect"):
        mood.load_data(str(tmp_path), "cheetah_run")
    (tmp_path / "cheetah" / "x" / "b.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match=r"b\.npz"):
        mood.load_data(str(tmp_path), "cheetah_run")


def test_validation_refuses_what_cannot_be_trained_on_and_warns_of_the_rest():
    good = transitions()
    assert any("next observation" in note for note in mood.validate(good, "x", False))
    bad = replace(good, obs=good.obs.clone())
    bad.obs[17, 1] = math.nan
    with pytest.raises(UserError, match="obs of transition 17"):
        mood.validate(bad, "x", False)
    loud = replace(good, action=good.action * 3)
    with pytest.raises(UserError, match="--clip_actions"):
        mood.validate(replace(loud, action=loud.action.clone()), "x", False)
    mood.validate(loud, "x", True)
    assert loud.action.abs().max() == 1
    with pytest.raises(UserError, match="terminal"):
        mood.validate(replace(good, live=torch.zeros(200)), "x", False)
    assert "constant" in mood.validate(replace(good, reward=torch.ones(200)), "x", False)[0]


def test_mixtures_are_unions_of_sources_and_same_rows_are_among_the_mixed_ones():
    sources = ("rnd", "run", "walk")
    assert mood.split_sources("same", "run", sources) == ["run"]
    assert mood.split_sources("cross", "run", sources) == ["walk"]
    assert mood.split_sources("mixed", "run", sources) == ["run", "walk"]
    assert mood.split_sources("mixed+rnd", "run", sources) == ["run", "walk", "rnd"]
    with pytest.raises(UserError, match="no source spin"):
        mood.split_sources("same", "spin", sources)
    with pytest.raises(UserError, match="only the source run"):
        mood.split_sources("cross", "run", ["run"])
    data = transitions()
    same, rest = data.select(["a"]).held_out(0.2)
    mixed, _ = data.select(["a", "b"]).held_out(0.2)
    assert len(same) + len(rest) == 100 and len(rest) == 20
    assert torch.equal(mixed.rows(mixed.source == 0).obs, same.obs)
    assert not set(rest.episode.tolist()) & set(same.episode.tolist())
    whole, nothing = data.rows(data.episode == 0).held_out(0.9)  # the only episode is trained on
    assert len(whole) == 20 and len(nothing) == 0


# --- whole runs


def result_of(folder, name="mood-smoke-s0"):
    return json.loads((folder / "out" / name / "results.json").read_text())


TINY = [
    "--config",
    "smoke",
    "--updates",
    "6",
    "--more_rows",
    "asac",
    "--rows",
    "baseline,big_actor",
    "--collect_steps",
    "24",
]


def test_smoke_runs_every_row_and_leaves_claims_and_speed(run_script, tmp_path):
    done = run_script(ROOT / "mood.py", "--config", "smoke")
    result = result_of(tmp_path)
    assert {"updates_per_s", "collected_transitions_per_s"} <= set(result["speed"])
    arms = [row for row in result["table"] if "actor parameters" in row]
    assert len(arms) == 2 * 2 + 7 and all(row["imitation_error"] for row in arms)
    assert {c["text"][:11] for c in result["claims"]} >= {"adding data", "on the mixt"}
    assert "what adding data does" in done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One process from beginning to end: its run folder."""
    out = tmp_path_factory.mktemp("whole")
    mood.main([*TINY, "--out", str(out), "--save_every", "4"])
    return out / "mood-smoke-s0"


def test_two_ranks_with_two_workers_each_give_what_one_process_gives(run_script, tmp_path, whole):
    run_script(ROOT / "mood.py", *TINY, "--save_every", "4", "--workers", "2", ranks=2)
    assert result_of(tmp_path)["table"] == json.loads((whole / "results.json").read_text())["table"]


def test_a_resumed_run_ends_with_the_weights_of_one_never_stopped(tmp_path, whole):
    job, folder = "cheetah_run_backward/mixed+rnd/asac", tmp_path / "mood-smoke-s0"
    shutil.copytree(whole, folder)  # as if killed after step 4 of a job
    (folder / job / "checkpoint.previous.pt").replace(folder / job / "checkpoint.pt")
    assert torch.load(folder / job / "checkpoint.pt", weights_only=True)["step"] == 4
    (folder / job / "result.json").unlink()
    (folder / "cheetah_run_backward/same/baseline/result.json").unlink()  # and one during its evaluation
    mood.main([*TINY, "--out", str(tmp_path), "--save_every", "4", "--resume"])
    a, b = (torch.load(f / job / "checkpoint.pt", weights_only=True)["state"] for f in (whole, folder))
    a, b = dict(common.flat_tensors(a)), dict(common.flat_tensors(b))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    tables = [json.loads((f / "results.json").read_text())["table"] for f in (whole, folder)]
    assert tables[0] == tables[1]


def test_collect_builds_a_folder_that_data_reads_and_a_second_run_keeps(tmp_path, capsys):
    line = ["--config", "smoke", "--collect", "--data", str(tmp_path / "d"), "--collect_steps", "24"]
    line += ["--out", str(tmp_path)]
    mood.main(line)
    source, first = tmp_path / "d" / "cheetah" / "run", capsys.readouterr().out
    before = (source / "index.json").stat().st_mtime_ns
    mood.main(line)
    assert "d: complete" in capsys.readouterr().out and "complete" not in first
    assert (source / "index.json").stat().st_mtime_ns == before
    data = mood.load_data(str(tmp_path / "d"), "cheetah_walk", 4)
    assert sorted(data.sources) == ["rnd", "run", "run_backward", "walk", "walk_backward"]
    with np.load(source / "00000.npz") as shard:
        assert shard["reward_walk"].shape == (10, 7) and shard["observation"].shape == (10, 7, 17)
        assert not shard["action"][:, 0].any() and not shard["reward_walk"][:, 0].any()
        np.testing.assert_allclose(shard["observation"], shard["physics"][..., 1:], rtol=1e-6)
    with pytest.raises(SystemExit):
        mood.main([*line, "--gait_generations", "3"])
    assert "other values of gait_generations" in capsys.readouterr().err
    with pytest.raises(UserError, match="collected with --repeat 4"):
        mood.load_data(str(tmp_path / "d"), "cheetah_walk", 2)
    (source / "00000.npz").write_bytes((source / "00000.npz").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"00000\.npz is missing or broken"):
        mood.load_data(str(tmp_path / "d"), "cheetah_walk", 4)
    (source / "index.json").unlink()
    with pytest.raises(UserError, match="--collect has not ended"):
        mood.load_data(str(tmp_path / "d"), "cheetah_walk", 4)


def test_online_agents_fill_a_folder_for_another_domain_and_resume_to_the_same_bytes(run_script, tmp_path):
    line = [
        "--config",
        "smoke",
        "--collect",
        "--collect_with",
        "td3",
        "--tasks",
        "walker_walk",
        "--data",
        "d",
    ]
    line += [
        "--collect_episodes",
        "6",
        "--collect_envs",
        "2",
        "--collect_steps",
        "16",
        "--collect_net",
        "s8x2",
    ]
    run_script(ROOT / "mood.py", *line)
    folder = tmp_path / "d" / "walker"
    files = {p: p.read_bytes() for p in sorted(folder.glob("*/*"))}
    assert {p.parent.name for p in files} == {*mood.DOMAINS["walker"], "rnd"} and len(files) == 5 * 4
    data = mood.load_data(str(tmp_path / "d"), "walker_spin", 4)
    assert len(data) == 5 * 3 * 2 * 4 and data.live.all() and data.physics.shape[1] == 18
    stage = tmp_path / "out" / "mood-smoke-s0" / "collect" / "walker" / "rnd"
    (stage / "checkpoint.previous.pt").replace(stage / "checkpoint.pt")  # as if killed in the last round
    (stage / "result.json").unlink()
    for p in (folder / "rnd").glob("*"):
        if p.name != "00000.npz" and p.name != "00001.npz":
            p.unlink()
    run_script(ROOT / "mood.py", *line, "--resume")
    assert {p: p.read_bytes() for p in sorted(folder.glob("*/*"))} == files


def test_a_d4rl_file_is_trained_on_and_scored_in_gymnasium(run_script, tmp_path):
    hdf5(tmp_path / "hopper_medium-v2.hdf5", d4rl_fields(200))
    line = ["--config", "smoke", "--rows", "iql", "--more_rows", "", "--updates", "4", "--eval_every", "2"]
    run_script(ROOT / "mood.py", *line, "--data", "hopper_medium-v2.hdf5", "--log_every", "1")
    (row,) = result_of(tmp_path)["table"]
    assert row["task"] == "hopper_medium-v2" and row["data"] == "all"
    assert abs(float(row["reset 1"].split()[0])) < 5  # per cent of an expert, not a return
    curve = tmp_path / "out" / "mood-smoke-s0" / "hopper_medium-v2" / "all" / "iql" / "metrics.jsonl"
    seen = [json.loads(x) for x in curve.read_text().splitlines()]
    assert [("return reset 4" in x) for x in seen] == [False, True, False, True]
    hdf5(tmp_path / "halfcheetah.hdf5", d4rl_fields(50))
    wrong = run_script(ROOT / "mood.py", *line, "--data", "halfcheetah.hdf5", check=False)
    assert wrong.returncode == 2 and "11 numbers" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--actor", "big"], "--actor big: write s256x2"),
        (["--rows", "bigactor"], "the nearest is big_actor"),
        (["--splits", "mix"], "the nearest is mixed"),
        (["--beta", "0"], "--beta"),
        (["--critics", "0"], "--critics must be 1 or more"),
        (["--tasks", "cheetah_runn"], "the nearest is cheetah_run"),
        (["--data", "nowhere"], "no data in nowhere/cheetah"),
        (["--tau", "7"], "--tau must be in [0, 1]"),
        (["--collect_steps", "2"], "--collect_steps must be from --repeat"),
        (["--config", "full"], "--data FOLDER"),
        (["--tasks", "walker_walk"], "--collect_with td3"),
    ],
)
def test_bad_input_is_one_clear_line(line, words, run_script):
    done = run_script(ROOT / "mood.py", *line, check=False)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.strip().splitlines()) == 1, (
        done.stderr
    )


def test_the_dry_run_of_full_prints_the_whole_grid(capsys):
    mood.main(["--config", "full", "--dry_run"])
    out = capsys.readouterr().out
    jobs = 15 * (4 * len(mood.FULL) + len(mood.ROWS) - len(mood.FULL))
    assert (
        f"{jobs} jobs of 5 seeds and 2000000 updates" in out
        and out.count("baseline") == 4
        and "humanoid" in out
    )


def test_the_grid_names_every_arm_once():
    jobs = mood.grid(mood.CONFIGS["demo"])
    assert len(jobs) == len(set(jobs))
    assert {j.split("/")[2] for j in jobs} == {*mood.CONFIGS["demo"].rows, *mood.CONFIGS["demo"].more_rows}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_gives_the_updates_of_eager_code():
    data = [transitions()]
    for algo in ("awac", "iql", "asac", "td3bc"):
        cfg = replace(SMALL, algo=algo, seeds=2)
        eager = mood.Learner(cfg, [0, 1], data, "cuda")
        graph = mood.Learner(cfg, [0, 1], data, "cuda")
        graph.iterate = mood.graphed(graph.iteration)
        for step in range(20):
            a, b = eager.step(step), graph.step(step)
        for k in a:
            torch.testing.assert_close(a[k], b[k])


# --- what mutations of the code got past the tests above


def test_the_advantage_averages_the_pessimistic_values_of_k_samples():
    cfg, agent, batch = settings(algo="awac"), Tabular(), tabular_batch()
    s, a, noise = batch["obs"], batch["action"], torch.randn(3, 1, 4, 1).double() * 2
    gain = mood.advantage(agent, s, a, agent.mean(s), noise, cfg)
    values = torch.stack([agent.q(s, mood.squash(agent.mean(s), n)).amin(1) for n in noise])
    torch.testing.assert_close(gain, agent.q(s, a).mean(1) - values.mean(0))


@pytest.mark.parametrize("algo", ["awac", "asac"])
def test_the_advantage_clip_bounds_weights_and_logits(algo):
    learner = mood.Learner(
        replace(SMALL, algo=algo, seeds=1, advantage_clip=-100.0, beta=0.5), [0], [transitions()]
    )
    if algo == "asac":
        learner.step(0)
        assert learner.sampler.logits[learner.sampler.logits > -1e29].min() == -200
    else:
        noise = torch.zeros_like(learner.noise)
        learner.draw(0)
        batch = learner.batch(learner.index)
        out = mood.update(learner.agent, learner.optimizers, batch, batch, noise, learner.cfg)
        assert torch.equal(out["weight"], torch.ones(1, 16))


class ByState(Quadratic):
    """Two critics; the best action and their dispute depend on the state, the target knows nothing."""

    def mean(self, s):
        return torch.zeros(*s.shape[:2], 1)

    def q(self, s, a, target=False):
        a, s = a[..., 0], s[..., 0]
        up = -((a - s) ** 2)
        return torch.stack([up, up - 0.1 * (a > 0.25)] if not target else [0 * up] * 2, 1)


def test_evaluation_sampling_asks_the_pessimistic_online_critic_about_its_own_state():
    s = torch.tensor([[[-0.3], [0.1], [0.5]]])
    noise = torch.tensor([-0.3, 0.1, 0.2, 0.5]).view(1, 1, 4, 1).expand(1, 3, 4, 1)
    a = mood.act(ByState(), s, 4, noise, replace(mood.Config(), std=1.0))
    assert a.flatten().tolist() == pytest.approx([-0.3, 0.1, 0.2])


def test_policies_and_targets_see_normalised_observations_seed_by_seed():
    data = [transitions(seed=i) for i in range(2)]
    for i, d in enumerate(data):
        d.obs, d.next = 3 * d.obs + 5 + i, 2 * d.next - 4
    learner = mood.Learner(replace(SMALL, algo="bc", seeds=2, episodes=3), [0, 1], data)
    index = torch.arange(10).expand(2, 10)
    seen, batch, stats = [], learner.batch(index), [(d.obs.mean(0), d.obs.std(0) + 1e-3) for d in data]
    for i, (m, s) in enumerate(stats):
        torch.testing.assert_close(batch["obs"][i], (data[i].obs[:10] - m) / s)
        torch.testing.assert_close(batch["next"][i], (data[i].next[:10] - m) / s)
    obs, rewards = torch.randn(6, 3), np.arange(6.0)

    class Envs:
        num_envs, single_action_space = 6, SimpleNamespace(shape=(2,))

        def reset(self, seed, options):
            seen.append(options)
            return obs.numpy(), {}

        def step(self, actions):
            seen.append(actions)
            return obs.numpy(), rewards, np.ones(6, bool), np.zeros(6, bool), {}

    returns = mood.evaluate(learner, Envs(), 1, 0, {"physics": 7})
    assert returns.tolist() == [[0, 1, 2], [3, 4, 5]] and seen[0] == {"physics": 7}
    expected = torch.stack([(obs[3 * i : 3 * i + 3] - m) / s for i, (m, s) in enumerate(stats)])
    torch.testing.assert_close(torch.as_tensor(seen[1]), learner.agent.mean(expected).flatten(0, 1).detach())
    errors = mood.imitation_error(learner, data)
    for i, (m, s) in enumerate(stats):
        mean = learner.agent.mean(((data[i].obs - m) / s).expand(2, -1, -1))[i]
        assert errors[i] == pytest.approx(((mean - data[i].action) ** 2).mean().item(), rel=1e-5)


def test_the_rate_falls_over_the_second_half():
    learner, rates = mood.Learner(replace(SMALL, decay=True, updates=40, lr=1.0), [0, 1], [transitions()]), []
    for step in (0, 20, 30, 39):
        learner.step(step)
        rates.append(learner.optimizers["actor"].param_groups[0]["lr"])
    assert rates == pytest.approx([1, 1, 0.5, 0.05])


def test_each_seed_has_its_own_start_and_numbers_chunk_by_chunk():
    learner = mood.Learner(replace(SMALL, seeds=2), [0, 1], [transitions()])
    assert not torch.equal(*learner.agent.actor[0].weight)
    drawn = []
    for step in (0, mood.CHUNK):
        learner.draw(step)
        drawn += [learner.index[0].clone(), learner.index[1].clone()]
    assert len({tuple(x.tolist()) for x in drawn}) == 4


def test_weights_are_counted_for_the_sources_of_each_seeds_own_data():
    a = transitions()
    data = [replace(a, source=torch.zeros(200).long()), replace(a, source=torch.ones(200).long())]
    learner = mood.Learner(replace(SMALL, seeds=2, algo="bc"), [0, 1], data)
    learner.step(0)
    assert learner.source_weight.tolist() == [[16, 0], [0, 16]]


def test_asacs_actor_learns_from_the_rows_that_were_drawn_by_their_logits():
    learner = mood.Learner(replace(SMALL, algo="asac", seeds=1), [0], [transitions()])
    learner.sampler.update(torch.tensor([[3]]), torch.tensor([[60.0]]))
    learner.draw(0)
    row, mean = learner.batch(torch.tensor([[3]])), learner.agent.mean
    expected = -mood.log_prob(mean(row["obs"]), row["action"], learner.cfg.std).item()
    assert learner.iteration()["actor_loss"].item() == pytest.approx(expected, rel=1e-5)


def test_a_layer_norm_has_a_scale_and_a_shift():
    norm, x = mood.EnsembleLayerNorm(2, 4), torch.randn(2, 5, 4)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    for i in range(2):
        own = torch.nn.functional.layer_norm(x[i], (4,), norm.weight[i, 0], norm.bias[i, 0])
        torch.testing.assert_close(norm(x)[i], own)


def test_the_last_episodes_are_held_out_and_mid_starts_are_late_states_of_each_seeds_own():
    data = transitions()
    _, rest = data.held_out(0.2)
    assert rest.episode.unique().tolist() == [8, 9]
    sets = [replace(data, physics=np.stack([np.full(200, i), np.arange(200) % 20], 1)) for i in (0.0, 1.0)]
    starts = mood.evaluation_starts(replace(SMALL, seeds=2, episodes=50), "cheetah_run", sets)
    seeds, place = starts["mid"][1]["physics"].T
    assert seeds.tolist() == [0] * 50 + [1] * 50 and place.min() >= 9.5 and place.max() == 19


def jobs(values):
    """{job: result} of {(split, row): (returns of each seed, errors of each seed)}."""
    names = ("reset 1", "reset 4", "mid 1", "mid 4")
    job = lambda r, e: {"returns": dict.fromkeys(names, r), "imitation_error": e}  # noqa: E731
    return {f"cheetah_run_backward/{s}/{r}": job(*v) for (s, r), v in values.items()}


def test_claims_compare_the_right_rows_in_the_right_direction_and_leave_diverged_pairs_out():
    cfg = replace(
        mood.CONFIGS["smoke"], seeds=3, rows=mood.BETAS, more_rows=("bc", "bc_big_actor", "big_critic")
    )
    level = {"baseline": 1, "big_actor": 5, "low_beta": 2, "low_beta_big_actor": 7, "high_beta": 0}
    level |= {"high_beta_big_actor": 6, "big_critic": 3, "bc": 1, "bc_big_actor": 2}
    values = {("mixed+rnd", r): ([x, x + 1, None], [1 / (1 + x)] * 3) for r, x in level.items()}
    values["same", "baseline"] = [9, None, 9], [0.1] * 3
    seen = []
    run = SimpleNamespace(claim=lambda *x: seen.append((x[0], x[1].tolist(), x[2].tolist(), x[3])))
    mood.claims(cfg, run, mood.Results(cfg, jobs(values)))
    at = " from resets"
    assert seen[0] == (f"adding data lowers the small actor's return{at}", [1], [9], "lower")
    assert seen[1] == (f"on the mixture a larger actor returns more{at}", [5, 6], [1, 2], "higher")
    assert seen[2][1:] == ([5, 6], [3, 4], "higher")  # a larger critic
    assert seen[3][1:] == ([7, 8], [2, 3], "higher")  # each size at its best temperature
    swings = [np.array([9.0, 1.0, 1.0]), np.array([2.0, 2.0, 5.0])]  # a seed must not pick for itself
    assert mood.picked(swings).tolist() == [2.0, 1.0, 1.0]
    assert [x[3] for x in seen[-2:]] == ["lower"] * 2 and seen[-2][1] == pytest.approx([1 / 6] * 3)


def test_what_adding_data_does_is_wide_minus_narrow():
    cfg = replace(mood.CONFIGS["smoke"], seeds=2, rows=("baseline",), more_rows=())
    found = jobs(
        {("same", "baseline"): ([5.0, 6.0], [0.1] * 2), ("mixed+rnd", "baseline"): ([2.0, 4.0], [0.1] * 2)}
    )
    for job in found.values():
        job |= {"notes": [], "parameters": 1, "weight": {}, "diverged": [-1, -1]}
    tables = []
    run = SimpleNamespace(print=lambda *_: 0, table=lambda lines, *_: tables.append(lines))
    mood.report(cfg, run, found)
    assert tables[1][0]["reset 1"] == "-2.5 +- 0.5"
    assert mood.mean_and_error(np.array([1.0, 3.0, math.nan])) == "2 +- 1"


def test_rows_change_what_their_names_say():
    changes, beta = mood.row_changes(mood.Config(beta=0.3)), 0.3
    assert changes["low_beta"]["beta"] == changes["low_beta_big_actor"]["beta"] == pytest.approx(beta / 3)
    assert changes["high_beta"]["beta"] == changes["high_beta_big_actor"]["beta"] == pytest.approx(beta * 3)
    assert all(("actor" in c) == ("actor" in r.replace("modern", "big")) for r, c in changes.items())


def test_a_gait_folder_holds_mean_rewards_of_every_task_from_its_physics(tmp_path):
    cfg, env = replace(mood.CONFIGS["smoke"], repeat=4, collect_steps=24), mood.Cheetah(4)
    env.reset(seed=0)
    shard = mood.gait_episodes(env, np.zeros(19) + 0.5, env.physics(), np.random.default_rng(0), cfg)
    mood.write_shard(tmp_path / "cheetah" / "run" / "00000.npz", shard)
    mood.write_index(tmp_path / "cheetah" / "run", 1, cfg)
    for task in ("walk", "run_backward"):
        data = mood.load_data(str(tmp_path), f"cheetah_{task}", 4)
        env = mood.Cheetah(10, task, 4)
        env.reset(options={"physics": shard["physics"][:, 0]})
        for t in range(6):
            obs, total, *_ = env.step(shard["action"][:, t + 1])
            np.testing.assert_allclose(data.next.view(10, 6, 17)[:, t], obs, atol=1e-3)
            np.testing.assert_allclose(data.reward.view(10, 6)[:, t], total / 4, atol=1e-4)


def test_held_actions_report_mean_rewards_and_return_their_sum():
    slow, fast = mood.TestbedEnv("cheetah", "walk", 4), mood.TestbedEnv("cheetah", "walk")
    for env in (slow, fast):
        env.reset(seed=0)
    rewards = np.stack([fast.step(np.ones(6))[4]["rewards"] for _ in range(4)])
    _, total, _, _, info = slow.step(np.ones(6))
    np.testing.assert_allclose(info["rewards"], rewards.mean(0), atol=1e-9)
    assert total == pytest.approx(rewards[:, 1].sum()) and total > 0


def test_evolution_finds_a_faster_gait_and_time_is_in_seconds():
    cfg, env = (
        replace(mood.CONFIGS["smoke"], gait_generations=6, gait_population=32, repeat=4),
        mood.Cheetah(8),
    )
    env.reset(seed=0)
    start = env.physics()
    mean = mood.evolve_gait(env, "run", start, np.random.default_rng(0), cfg)
    controls = lambda x: mood.gait(x[None].repeat(8, 0), 100, 4).repeat(4, 1)  # noqa: E731
    speed = lambda x: env.open_loop(start, controls(x))[1].mean()  # noqa: E731
    assert speed(mean) > speed(np.zeros(19)) + 0.3
    x = np.random.default_rng(0).standard_normal((2, 19))
    np.testing.assert_allclose(mood.gait(x, 5, 4), mood.gait(x, 20, 1)[:, ::4], atol=1e-12)
    x = np.eye(19)[[7]] * 0.5  # one joint, amplitude 0.6, frequency 2 Hz
    assert mood.gait(x, 50, 1)[0, :, 0] == pytest.approx(0.6 * np.sin(4 * np.pi * 0.01 * np.arange(50)))


def test_novelty_is_high_for_states_that_were_not_seen():
    torch.manual_seed(0)
    novelty, seen = mood.Novelty(3, torch.device("cpu"), 1e-3), torch.randn(1, 64, 3) + 4
    for _ in range(200):
        novelty(seen)
    assert novelty(seen).mean() < 0.5 * novelty(torch.cat([seen, seen + 3], 1))[0, 64:].mean()


def test_an_online_agent_is_trained_on_what_its_environments_did(tmp_path, monkeypatch):
    adds, counts, update = [], [], mood.update
    monkeypatch.setattr(
        common.Replay, "add", lambda self, _add=common.Replay.add, **x: (adds.append(x), _add(self, **x))
    )
    monkeypatch.setattr(mood, "update", lambda *x: (counts.append(x[2]["reward"]), update(*x))[1])
    argv = "--config smoke --collect --collect_with td3 --tasks walker_spin --collect_episodes 4"
    argv += (
        f" --collect_envs 2 --collect_steps 16 --collect_net s8x2 --data {tmp_path / 'd'} --out {tmp_path}"
    )
    mood.main(argv.split())
    assert len(counts) == 5 * 4 * 2 * 0.5  # sources x steps of the second round x environments x rate
    data = mood.load_data(str(tmp_path / "d"), "walker_spin", 4)
    mine = data.select(["spin"])
    found = {k: np.stack([x[k] for x in adds[24:32]]) for k in adds[0]}  # sources: stand, walk, run, spin
    for name in ("obs", "action", "next", "reward", "live"):
        want = getattr(mine, name).view(2, 2, 4, -1).transpose(1, 2).reshape(8, 2, -1)
        np.testing.assert_allclose(found[name].reshape(8, 2, -1), want, atol=1e-6)
    assert mine.reward.any()
    theirs = {r for x in adds[32:] for r in x["reward"].tolist()}  # rnd learns from novelty instead
    assert not theirs & set(counts[-1].flatten().tolist())


def test_a_discount_of_zero_terminates_and_is_no_truncation():
    env = common.dm_control_env("cartpole", "swingup")
    env.reset(seed=0)
    env.env.task.get_termination = lambda physics: 0.0
    assert env.step(np.zeros(1))[2:4] == (True, False)


def test_a_seed_whose_q_grows_beyond_the_limit_is_set_aside(tmp_path):
    cfg = replace(SMALL, seeds=2, updates=3, log_every=1, out=str(tmp_path))
    learner = mood.Learner(cfg, [0, 1], [transitions()])
    assert learner.limit == pytest.approx(10 * float(transitions().reward.abs().max()) / 0.05)
    with torch.no_grad():
        learner.agent.critic[-1].bias[2:] = learner.limit * 1.1  # members of the second seed
    with common.Run(cfg) as run:
        mood.fit(learner, None, {}, run)
    assert learner.diverged.tolist() == [-1, 0]


def test_an_index_names_its_own_shards_and_no_stale_ones(tmp_path):
    cfg = mood.CONFIGS["smoke"]
    for name in ("00000.npz", "00007.npz"):
        mood.write_shard(tmp_path / name, {"x": np.zeros(3)})
    mood.write_index(tmp_path, 1, cfg)
    assert [f.name for f in mood.verified(tmp_path)[0]] == ["00000.npz"] and mood.complete(tmp_path, cfg)


def test_physics_of_another_length_is_refused(tmp_path):
    fields = episodes() | {"physics": np.zeros((2, 6, 4))}
    with pytest.raises(UserError, match="physics has shape"):
        mood.load_data(str(hdf5(tmp_path / "x.hdf5", fields)), "")
    with pytest.raises(UserError, match="no such file"):
        mood.load_data(str(tmp_path / "hopper_medium-v2.hdf5"), "")


def test_a_spectral_layer_may_run_twice_before_the_backward_pass(doubles):
    layer = mood.SpectralLinear(1, 4, 4).double()
    layer.orthogonal_(1.0, [torch.Generator().manual_seed(0)])
    x = torch.randn(1, 3, 4)
    (layer(x) + layer(2 * x)).sum().backward()
    assert layer.weight.grad.isfinite().all()


def test_the_clip_also_bounds_iqls_own_advantage():
    cfg = settings(algo="iql", iql_advantage="value", advantage_clip=-100.0)
    agent, batch = Tabular(), tabular_batch()
    out = mood.update(agent, agent.optimizers(), batch, batch, torch.zeros(2, 1, 4, 1).double(), cfg)
    assert torch.equal(out["weight"], torch.ones(1, 4).double())
