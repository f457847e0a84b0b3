"""Our inner loops beside those of the papers' public code, on the same work: python tests/bench.py NAME DIR

NAME mood: DIR is algorithms/offline of a checkout of CORL. Sizes are CORL's: observations of 17, actions of
6, batch 256, two critics, hidden layers 256x2, for AWAC too (CORL's third is taken out). NAME rmc: DIR is
sspg_dmc of markov-chain-reasoning; an update of encoder, critics, actor and temperature from pixels at the
paper's sizes, batch 32, chains of 4 steps. NAME transformer2: DIR is a checkout of self-adaptive-llms; a
REINFORCE step with KL on given answers, 16 of 64 tokens after prompts of 64, on the MLPs of a Llama of width
256 and 4 layers; theirs goes answer by answer, by dense gradients. Medians of several intervals, in turn, so
that slow minutes hit all alike.
"""

import contextlib
import importlib.util
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from gymnasium.spaces import Box

import common
import mood
import rmc
import transformer2

OBS, ACTIONS, ROWS = 17, 6, 100_000


def median_rates(steps: dict[str, Callable[[], object]], device, rounds=7, seconds=1.5) -> dict[str, float]:
    """Calls a second of each step; the first round warms up."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rates = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            sync()
            begin, calls = time.perf_counter(), 0
            while time.perf_counter() - begin < seconds:
                step()
                calls += 1
            sync()
            rates[name].append(calls / (time.perf_counter() - begin))
    return {name: statistics.median(r[1:]) for name, r in rates.items()}


def corl_step(folder: Path, name: str, data: mood.Batch, device) -> Callable:
    """One update of CORL's file, with empty modules in place of d4rl, gym, pyrallis and wandb."""
    for package in ("d4rl", "gym", "pyrallis", "wandb"):
        sys.modules[package] = mock.MagicMock()
    sys.modules["pyrallis"].wrap = lambda: lambda function: function
    if not (folder / f"{name}.py").is_file():
        sys.exit(f"bench.py: no {folder / name}.py; give CORL's folder algorithms/offline")
    spec = importlib.util.spec_from_file_location(f"corl_{name}", folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    buffer = module.ReplayBuffer(OBS, ACTIONS, ROWS, str(device))
    arrays = dict(observations=data.s, actions=data.a, rewards=data.reward, next_observations=data.next_s)
    arrays = {k: v.cpu().numpy() for k, v in arrays.items()}
    with contextlib.redirect_stdout(None):
        buffer.load_d4rl_dataset(arrays | {"terminals": (1 - data.live).cpu().numpy()})
    if name == "iql":
        nets = module.GaussianPolicy(OBS, ACTIONS, 1.0), module.TwinQ(OBS, ACTIONS), module.ValueFunction(OBS)
    else:
        nets = [kind(OBS, ACTIONS, 256) for kind in (module.Actor, module.Critic, module.Critic)]
        for net in [nets[0]._mlp, *(critic._mlp for critic in nets[1:])]:
            del net[4:6]
    pairs = [x for net in nets for x in (net.to(device), torch.optim.Adam(net.parameters(), lr=3e-4))]
    if name == "iql":
        train = module.ImplicitQLearning(1.0, *pairs, device=str(device)).train
    else:
        train = module.AdvantageWeightedActorCritic(*pairs).update
    return lambda: train(buffer.sample(256))


def our_step(name: str, data: mood.Batch, device) -> Callable:
    """One update of ours, as in mood.train_task."""
    sizes = dict(small_actor=256, small_critic=256, batch=256)
    cfg = replace(mood.CONFIGS["demo"], algo=name, **sizes)
    agent = mood.Agent(cfg, OBS, ACTIONS).to(device)
    optimizer = mood.adam(agent, cfg)

    def iterate(index, noise):
        batch = mood.Batch(*(column[index] for column in data))
        return mood.update(agent, optimizer, batch, batch, noise, cfg)

    iterate, queue = common.graphed(iterate), []

    def step():
        if not queue:
            index = torch.randint(ROWS, (cfg.block, cfg.batch), device=device)
            noise = 0.2 * torch.randn(cfg.block, 2, cfg.batch, ACTIONS, device=device)
            queue.extend(zip(index, noise, strict=True))
        iterate(*queue.pop())

    return step


def bench_rmc(folder: Path, run: common.Run, batch: int = 32, dims: int = 12):
    """rmc.update beside SSPG.update of the public PyTorch code; both get a ready batch."""
    for name in ("omegaconf", "skimage", "skimage.util", "skimage.util.shape"):
        sys.modules[name] = mock.MagicMock()  # imported there, not used here
    sys.path.insert(0, str(folder))
    from drqsac import GPCritic
    from drqsac_fsres import ReasoningStochasticActor
    from drqsac_fsres_ada import SSPG
    from drqv2 import Encoder
    from fsres_ada_utils import StepsUpdater

    StepsUpdater.__init__.__defaults__ = (0.99, "cpu")
    torch.manual_seed(0)
    encoder = Encoder((9, 84, 84))
    actor = ReasoningStochasticActor(encoder, (dims,), 50, 1024, -10, 2)
    critic = GPCritic(2, encoder, (dims,), 50, 1024, 0.75)
    shared = dict(training_steps=4, target_steps=4, exploration_steps=4, test_steps=4, num_chains=64)
    shared |= dict(training_chain_init="rb_action", target_chain_init="rb_action", training_chain_mode="all")
    shared |= dict(target_chain_mode="last", exploration_chain_mode="last", deterministic_test_sampling=True)
    shared |= dict(
        training_chain_perturb=False, training_chain_perturb_prob=0, training_chain_perturb_coeff=1
    )
    shared |= dict(encoder=encoder, actor=actor, critic=critic, obs_shape=(9, 84, 84), action_shape=(dims,))
    shared |= dict(device="cpu", lr=1e-4, feature_dim=50, hidden_dim=1024, critic_target_tau=0.01)
    shared |= dict(num_expl_steps=0, update_every_steps=1, init_temperature=0.1, target_entropy=-1.0)
    shared |= dict(per_dim_target_entropy=True, nstep=3, discount=0.99, nstep_entropy_correction=False)
    kinds = ("gelman_rubin", 16, 1.1, "mean_floor", "mean_ceil", "mean_ceil")
    with contextlib.redirect_stdout(None):
        reference = SSPG(*kinds, use_tb=False, chain_backprop=2, **shared)

    generator = np.random.default_rng(0)
    obs, following = (generator.integers(0, 256, (batch, 9, 84, 84), dtype=np.uint8) for _ in range(2))
    action = generator.uniform(-1, 1, (batch, dims)).astype(np.float32)
    reward, discount = np.ones((batch, 1), np.float32), np.full((batch, 1), 0.97, np.float32)
    stream = itertools.repeat((obs, action, reward, discount, following))

    cfg = replace(rmc.CONFIGS["pixels"], batch=batch)
    spaces = SimpleNamespace(
        single_observation_space=Box(0, 255, (3, 3, 84, 84), np.uint8),
        single_action_space=Box(-1.0, 1.0, (dims,)),
    )
    agent = rmc.Agent(cfg, spaces, torch.device("cpu"))
    optimizer = torch.optim.Adam(agent.parameters(), cfg.lr, fused=True)
    frames, next_frames = (torch.as_tensor(x).unflatten(1, (3, 3)) for x in (obs, following))
    columns = [torch.as_tensor(x) for x in (action, reward[:, 0], discount[:, 0])]
    row = rmc.Batch(frames, *columns, next_frames, torch.ones(batch))

    entropy = torch.tensor(-float(dims))
    steps = {"ours": lambda: rmc.update(agent, optimizer, row, 4, True, entropy, cfg)}
    report("rmc", median_rates(steps | {"theirs": lambda: reference.update(stream, 0)}, run.device))


def bench_transformer2(folder: Path, run: common.Run, answers: int = 16, length: int = 64, steps: int = 4):
    """Steps of transformer2.train_expert beside Reinforce.step_optimization; both get ready answers."""
    for name in ("fishfarm", "hydra", "omegaconf", "vllm"):
        sys.modules[name] = mock.MagicMock()  # imported there, not used here
    sys.path.insert(0, str(folder))
    import optim_modules
    from policy.base import Policy

    tokenizer = common.CharTokenizer(transformer2.SYMBOLS, eos="$")
    ours, theirs = (common.tiny_lm(len(transformer2.SYMBOLS), 256, 4).eval() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    chance = np.random.default_rng(0)
    texts = ["".join(chance.choice([*"0123456789"], 2 * length)) for _ in range(answers)]
    problem = transformer2.Problem("", "", "", str.__eq__)
    episodes = []
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        episodes.append(transformer2.Episode(problem, ids[:length], ids[length:], "", len(episodes) % 2, 0.0))

    layers = {k: transformer2.SVFLinear(x) for k, x in transformer2.matrices(ours, ("mlp",)).items()}
    world = transformer2.World(ours, tokenizer, [0], transformer2.Adapter(ours, layers), run)
    task, size = (
        transformer2.Task("x", "math", [problem] * answers, [problem], []),
        dict(steps=steps, batch=answers),
    )
    run.cfg = replace(transformer2.CONFIGS["demo"], **size, lam=0.1, valid_every=99, micro=8, save_every=99)

    def our_steps():
        run.folder = Path(tempfile.mkdtemp())
        with mock.patch.object(transformer2, "rollout", lambda *args: [*episodes]):
            transformer2.train_expert(task, world, run)

    base, details = dict(theirs.named_parameters()), [{"output": text[length:]} for text in texts]
    factors = {}
    for name, weight in base.items():
        if "mlp" in name:
            U, S, V = torch.svd(weight.detach())
            factors |= {f"{name}.U": U, f"{name}.S": S, f"{name}.V": V}
    original = {k: v.detach().clone() for k, v in base.items() if "mlp" in k}
    policy = Policy(base, "cpu", 0.1)
    reinforce = optim_modules.Reinforce(policy, "cpu", 1e-3, 2e-3, False, None, 0.1)
    loader = SimpleNamespace(
        get_prompt=lambda tokenizer, data, i, model_id: texts[i][:length],
        get_rewards=lambda res: [1.0 if i % 2 else -1.0 for i in range(answers)],
    )
    evaluator = SimpleNamespace(evaluate=lambda *args, **more: SimpleNamespace(sample_details=details))
    given = dict(model_id="", model=theirs, tokenizer=tokenizer, policy=policy, task_loader=loader)
    given |= dict(batch_ix=range(answers), train_data=None, train_eval=evaluator, base_params=base)
    given |= dict(decomposed_params=factors, original_model_params=original, metrics_to_log=mock.MagicMock())
    given |= dict(vllm_model=mock.MagicMock())

    def their_steps():
        for _ in range(steps):
            reinforce.step_optimization(**given)
            reinforce.update(policy)
            theirs.zero_grad()

    quiet = (
        mock.patch.object(optim_modules, "load_hf_params_to_vllm"),
        mock.patch("torch.Tensor.cuda", lambda x: x),
    )
    with quiet[0], quiet[1], contextlib.redirect_stdout(io.StringIO()):
        rates = median_rates({"ours": our_steps, "theirs": their_steps}, run.device, rounds=3)
    report("transformer2", {name: steps * rate for name, rate in rates.items()})


def bench_mood(folder: Path, run: common.Run):
    """mood.update beside CORL's."""
    g = torch.Generator().manual_seed(0)
    widths = ((ROWS, OBS), (ROWS, ACTIONS), (ROWS,), (ROWS, OBS))
    s, a, reward, next_s = (torch.randn(*width, generator=g).to(run.device) for width in widths)
    data = mood.Batch(s, a.tanh(), reward, next_s, torch.ones_like(reward))
    for name in ("iql", "awac"):
        steps = {
            "ours": our_step(name, data, run.device),
            "theirs": corl_step(folder, name, data, run.device),
        }
        report(name, median_rates(steps, run.device))


def report(name: str, rates: dict[str, float]):
    ours, theirs = rates["ours"], rates["theirs"]
    print(f"{name}: {ours:.2f} updates a second, theirs {theirs:.2f}: {ours / theirs:.2f} x")


if __name__ == "__main__":
    benches = {"mood": bench_mood, "rmc": bench_rmc, "transformer2": bench_transformer2}
    if len(sys.argv) != 3 or sys.argv[1] not in benches:
        sys.exit(f"python tests/bench.py {'|'.join(benches)} DIR")
    here = common.Run(common.Config())  # for its device, its precision and oneDNN's products
    benches[sys.argv[1]](Path(sys.argv[2]), here)
