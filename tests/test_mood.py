"""mood.py: equations against closed forms, networks against torch's own, data in their true formats."""

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
from torch import nn

import common
import mood
from common import UserError

SMOKE = mood.CONFIGS["smoke"]


# --- equations


@pytest.mark.parametrize("n", [1, 2, 5])
def test_pessimism_is_the_mean_minus_p_mean_pair_differences(n):
    q = torch.randn(n, 7)
    pairs = [abs(a - b) for a, b in itertools.permutations(q, 2)] or [torch.zeros(7)]
    torch.testing.assert_close(mood.pessimistic(q, 0.4), q.mean(0) - 0.4 * sum(pairs) / len(pairs))


# --- a tabular MDP: two states, two clusters of actions (a < 0, a > 0)

REWARD = torch.tensor([[0.0, 1.0], [2.0, 0.5]])  # state, cluster
FOLLOWS = torch.tensor([[0, 1], [1, 0]])


class Table(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))


class Tabular(nn.Module):
    """Stands in for Agent: Q and V are tables, the policy's mean one number a state."""

    def __init__(self, mean=(0.5, -0.5), value=False):
        super().__init__()
        self.critic, self.target, self.actor = Table(2, 2, 2), Table(2, 2, 2), Table(2)
        self.value = Table(2) if value else None
        self.actor.table.data = torch.atanh(torch.tensor(mean))

    def mean(self, s):
        return self.actor.table.tanh()[s[:, 0].long()][:, None]

    def v(self, s):
        return self.value.table[s[:, 0].long()]

    def q(self, s, a, target=False):
        return (self.target if target else self.critic).table[:, s[:, 0].long(), (a[:, 0] > 0).long()]


def every_row(live):
    """Every state and cluster once."""
    s, a = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    columns = s[:, None].float(), a[:, None] * 1.4 - 0.7, REWARD[s, a], FOLLOWS[s, a][:, None].float()
    return mood.Batch(*columns, torch.full((4,), live))


@pytest.mark.parametrize("algo", ["awac", "td3bc", "iql", "asac", "bc"])
@pytest.mark.parametrize("live", [0.0, 1.0])
def test_every_loss_is_its_closed_form_on_a_tabular_mdp(algo, live):
    agent, batch = Tabular(value=algo == "iql"), every_row(live)
    cfg = replace(mood.Config(), algo=algo, discount=0.9, beta=0.5, tau=0.25)
    noise = torch.tensor([[0.06, -0.2, 0.4, 1.8], [-0.8, 0.02, 0.04, -0.1]])[..., None]
    still = torch.optim.SGD(agent.parameters(), 0.0)  # losses at fixed tables
    q, target, mean = agent.critic.table.detach(), agent.target.table.clone(), agent.actor.table.tanh()
    losses = mood.update(agent, still, batch, batch, noise, cfg)
    y, clone, gain, q_pi, u = [], [], [], [], []
    for i, (s, a) in enumerate(itertools.product((0, 1), (0, 1))):
        t = FOLLOWS[s, a]
        drawn = mean[t] + noise[0, i, 0].clamp(-0.3, 0.3)
        value = agent.value.table[t] if agent.value else target[:, t, int(drawn > 0)].amin()
        y.append(REWARD[s, a] + 0.9 * live * value)
        q_pi.append(q[:, s, int(mean[s] + noise[1, i, 0] > 0)].amin())
        gain.append(q[:, s, a].mean() - q_pi[-1])
        clone.append(torch.distributions.Normal(mean[s], 0.2).log_prob(batch.a[i, 0]))
        u.append(target[:, s, a].amin() - agent.value.table[s] if agent.value else torch.zeros(()))
    y, clone, gain, q_pi, u = map(torch.stack, (y, clone, gain, q_pi, u))
    weight = (gain / 0.5).softmax(0) * 4 if algo in ("awac", "iql") else 1.0
    expected = {"actor_loss": -(weight * clone).mean()}
    if algo == "td3bc":
        errors = (mean[[0, 0, 1, 1]] - batch.a[:, 0]) ** 2
        expected["actor_loss"] = -q_pi.mean() + 0.4 * q_pi.abs().mean() * errors.mean()
    if algo != "bc":
        expected["critic_loss"] = ((q.flatten(1) - y) ** 2).sum() / 8
    if algo == "iql":
        expected["value_loss"] = (torch.where(u > 0, 0.7, 0.3) * u**2).mean()
    torch.testing.assert_close(losses, {k: expected[k].detach() for k in losses})
    torch.testing.assert_close(agent.target.table, target.lerp(q, 0.25))  # the targets move last


# --- networks


def test_the_modern_actor_is_a_residual_block_of_matrices_over_their_largest_singular_value():
    net, x = mood.network(1, 5, 2, 8, 1.3, modern=True), torch.randn(1, 4, 5)
    inner, outer = net[2].change[1], net[2].change[3]
    for layer in (inner, outer):
        nn.init.normal_(layer.parametrizations.weight.original)
    for _ in range(200):  # a power iteration each
        net(x)
    net.eval()
    h = net[0](x).relu()
    change = nn.functional.layer_norm(h, (8,))
    for layer, act in ((inner, torch.relu), (outer, torch.clone)):
        weight = layer.parametrizations.weight.original
        change = act(change @ (weight / torch.linalg.matrix_norm(weight, 2)).T)
    torch.testing.assert_close(net(x), net[3](h + change), rtol=1e-4, atol=1e-4)


# --- ASAC and acting


def test_rows_are_drawn_from_the_softmax_stratified():
    logits = torch.randn(3000, dtype=torch.float64) * 2
    rows = mood.weighted_rows(logits + 1e3, 20_000)
    counts, expected = torch.bincount(rows, minlength=3000), 20_000 * logits.softmax(0)
    assert ((counts >= expected.floor() - 1) & (counts <= expected.ceil() + 1)).all()


def test_evaluation_sampling_takes_the_best_sample_and_one_sample_is_the_mean():
    best, s = torch.tensor([0.3, -0.2]), torch.zeros(3, 4)
    agent = SimpleNamespace(mean=lambda s: s[:, :2], q=lambda s, a: -((a - best) ** 2).sum(-1)[None])
    assert torch.equal(mood.act(agent, s, mood.Config()), torch.zeros(3, 2))
    torch.manual_seed(5)
    samples = (0.2 * torch.randn(50, 3, 2)).clamp(-1, 1)
    nearest = (samples - best).norm(dim=-1).argmin(0)
    torch.manual_seed(5)
    assert torch.equal(mood.act(agent, s, mood.Config(es=50)), samples[nearest, range(3)])


# --- tasks


@pytest.mark.parametrize("domain", mood.DOMAINS)
def test_rewards_are_those_of_the_environment_computed_from_physics(domain):
    for task in mood.DOMAINS[domain]:
        env, states, rewards = mood.MoodEnv(f"{domain}_{task}", hold=4), [], []
        env.reset(seed=0)
        actions = np.random.default_rng(0).uniform(-1, 1, (5, *env.action_space.shape)).astype(np.float32)
        for action in actions:
            _, reward, *_, info = env.step(action)
            states.append(info["physics"])
            rewards.append(reward)
        found = mood.relabel(torch.tensor(np.stack(states)), torch.from_numpy(actions), f"{domain}_{task}")
        np.testing.assert_allclose(found[:, 0], rewards, atol=1e-5)


# --- data


def episode(steps=6, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {k: rng.uniform(-1, 1, (steps + 1, n)) for k, n in (("observation", 3), ("action", 2))}
    arrays |= {"reward": rng.uniform(size=(steps + 1, 1)), "physics": rng.uniform(size=(steps + 1, 4))}
    return arrays | {"discount": (np.arange(steps + 1) < steps)[:, None] * 1.0}


def d4rl(n=40, **more):
    rng, ends = np.random.default_rng(0), {k: np.zeros(n, bool) for k in ("terminals", "timeouts")}
    ends["terminals"][6], ends["timeouts"][25] = True, True
    fields = {"observations": rng.uniform(size=(n, 11)), "actions": rng.uniform(-1, 1, (n, 3))}
    return fields | {"rewards": rng.uniform(size=n)} | ends | more


def write(path, fields):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **fields)
        return
    with h5py.File(path, "w") as file:
        for k, v in fields.items():
            file.create_group(k) if v is None else file.create_dataset(k, data=v)


def test_row_t_of_an_exorl_file_belongs_to_the_step_from_t_minus_one(tmp_path):
    e = [episode(seed=0), episode(4, seed=1)]
    for k, x in enumerate(e):
        write(tmp_path / "buffer" / f"t_{k}_6.npz", x)
    data = common.load_episodes(str(tmp_path))
    assert data["episode"].tolist() == [0] * 6 + [1] * 4
    for key in ("action", "reward", "physics"):
        np.testing.assert_allclose(data[key], np.concatenate([x[key][1:] for x in e]), atol=1e-6)
    np.testing.assert_allclose(data["observation"][6:], e[1]["observation"][:-1], atol=1e-6)
    np.testing.assert_allclose(data["next_observation"][6:], e[1]["observation"][1:], atol=1e-6)
    assert data["terminated"][:, 0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 1]


def test_a_d4rl_file_gives_d4rls_own_transitions_and_late_timeouts_are_said(tmp_path, capsys):
    f, path = d4rl(), tmp_path / "hopper.hdf5"
    write(path, f)
    data, kept = common.load_episodes(str(path)), np.delete(np.arange(40), [25, 39])
    for name, key in (("observations", "observation"), ("actions", "action"), ("rewards", "reward")):
        np.testing.assert_allclose(data[key].squeeze(), f[name][kept], atol=1e-6)
    goes_on = data["terminated"][:, 0] == 0
    expected = f["observations"][kept + 1][goes_on]
    np.testing.assert_allclose(data["next_observation"][goes_on], expected, atol=1e-6)
    assert not capsys.readouterr().err
    jump = np.cumsum(np.full((40, 11), 0.15), 0) + 6 * (np.arange(40) >= 20)[:, None]
    write(path, f | {"observations": jump, "next_observations": jump + 0.15})
    assert len(common.load_episodes(str(path))["reward"]) == 40  # the steps before timeouts are known
    assert "are timeouts late?" in capsys.readouterr().err


E = episode()
BAD = {
    "a.npz": (E | {"observation": E["observation"][:-1]}, "must match exactly"),
    "b.npz": ({k: v[:1] for k, v in E.items()}, "no step"),
    "c.npz": (E | {"reward": np.full((7, 1), "x")}, "could not convert string"),
    "d.npz": (E | {"reward": E["reward"] * np.nan}, "not finite"),
    "e.npz": ({"observation": E["observation"]}, "action"),
    "f.npz": (None, "No data left"),
    "g.npz": (E | {"action": E["action"][:, :1]}, "widths"),
    "h.hdf5": (d4rl(rewards=None), "Accessing a group"),
    "i.hdf5": ({"observation": E["observation"]}, "observations"),
    "j.hdf5": (d4rl(actions=np.zeros((35, 3))), "out of bounds"),
    "k.hdf5": (None, "file signature not found"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_file_is_one_line_that_names_it(tmp_path, name):
    fields, words = BAD[name]
    path = tmp_path / name
    write(tmp_path / "_.npz", E)
    write(path, fields) if fields else path.touch()
    with pytest.raises(UserError, match=words) as error:
        common.load_episodes(str(path if path.suffix == ".hdf5" else tmp_path))
    assert f"{name}, episode " in str(error.value) and "\n" not in str(error.value)


def test_a_minari_set_is_flattened_with_its_achieved_goal_and_rescaled(monkeypatch):
    goal = {k: np.full((4, 2), i) for i, k in enumerate(("observation", "achieved_goal"))}
    sets = {"good": {"goal": goal, "a": np.zeros(4)}, "bad": {"a": np.zeros(3)}}
    more = dict(actions=np.array([[0.0], [4.0], [2.0]]), rewards=np.zeros(3), terminations=np.zeros(3))

    def load_dataset(name, download):
        episodes = [SimpleNamespace(observations=sets[name], **more)]
        box = SimpleNamespace(low=np.zeros(1), high=np.full(1, 4.0))
        return SimpleNamespace(action_space=box, iterate_episodes=lambda: episodes)

    monkeypatch.setattr("minari.load_dataset", load_dataset)
    data = common.load_episodes("minari:good")
    assert data["observation"][0].tolist() == [0, 1, 1, 0, 0]  # a, achieved_goal, observation
    assert data["action"][:, 0].tolist() == [-1, 1, 0]
    with pytest.raises(UserError, match="minari:bad, episode 0"):
        common.load_episodes("minari:bad")


# --- the script


def results(folder):
    return json.loads((folder / "results.json").read_text())["table"]


def test_rows_of_smoke_end_alike_when_resumed_and_on_two_ranks(run_main, run_script, tmp_path):
    line = ["--config", "smoke", "--seeds", "1", "--save_every", "1"]
    run_main(mood, *line)
    folder = tmp_path / "out" / "mood-smoke-s20"
    before = results(folder)
    assert set(before) == set(mood.ROWS)
    for row in ("mixture_ASAC", "mixture_IQL"):
        (folder / f"{row}-s20" / "result.json").unlink()
        shutil.rmtree(folder / f"{row}-s20" / "cheetah_run_backward" / "step00000002")
    run_main(mood, *line, "--resume")
    assert results(folder) == before
    run_script(ROOT / "mood.py", *line, "--rows", "behaviour", "mixture", "--out", "two", ranks=2)
    table = results(tmp_path / "two" / "mood-smoke-s20")
    assert table == {row: before[row] for row in ("behaviour", "mixture")}


def test_what_online_agents_collect_is_read_as_exorls(run_main, tmp_path):
    line = ["--config", "smoke", "--tasks", "walker_walk", "--data", "d", "--hold", "100", "--seeds", "1"]
    run_main(mood, *line, "--collect")
    run_main(mood, *line, "--rows", "behaviour", "target's data")
    table = results(tmp_path / "out" / "mood-smoke-s20-d")
    assert all(0 < cells[0]["return"] < 1000 for cells in table.values())


def test_a_d4rl_file_is_scored_in_gymnasium_between_random_and_expert(run_main, tmp_path):
    write(tmp_path / "hopper_medium-v2.hdf5", d4rl(200))
    line = ["--config", "smoke", "--data", "hopper_medium-v2.hdf5", "--rows"]
    run_main(mood, *line, "mixture, IQL")
    ((one, two),) = results(tmp_path / "out" / "mood-smoke-s20-hopper_medium-v2.hdf5").values()
    assert 0 < one["return"] < 5, "per cent of an expert"
    assert one["return"] != two["return"], "seeds share the data, not the agent"


def test_settings_that_make_no_sense_are_refused():
    several = dict(tasks=("cheetah_run", "cheetah_walk"), data="hopper.hdf5")
    for words, wrong in {
        "there are": dict(tasks=("cheetah_runn",)),
        "--beta and": dict(beta=0.0),
        "a divisor": dict(hold=3),
        "single data set": several,
    }.items():
        with pytest.raises(UserError, match=words):
            replace(SMOKE, **wrong).check()
    with pytest.raises(UserError, match="only halfcheetah"):
        mood.scoring("cheetah_run", "ant.hdf5", 1, 1)


def test_what_is_missing_is_said_before_anything_is_computed(tmp_path):
    def said(**more):
        return " ".join(mood.missing(replace(SMOKE, **more)))

    assert "--data FOLDER" in said(tasks=("walker_walk",)) and said(config="full")
    assert "no such file" in said(data="nowhere.hdf5")
    write(tmp_path / "cheetah" / "run" / "0_0_6.npz", E)
    both = dict(data=str(tmp_path), tasks=("cheetah_run", "cheetah_walk"))
    assert not said(**both) and "no agent's folder" in said(data=str(tmp_path), tasks=("walker_run",))


def test_the_dry_run_of_full_says_hours_and_memory(capsys):
    run = SimpleNamespace(print=print)
    mood.dry_run(replace(mood.CONFIGS["full"], tasks=("cheetah_run",), rows=("mixture",)), run)
    assert "GPU hours" in (text := capsys.readouterr().out) and "GB on the GPU" in text
