"""Our inner loops beside those of the papers' public code, on the same work: python tests/bench.py NAME [DIR]

mood: DIR is algorithms/offline of a checkout of CORL. Sizes are CORL's: observations of 17, actions of 6,
batch 256, two critics, hidden layers 256x2, for AWAC too (CORL's third is taken out).
rmc: DIR is sspg_dmc of markov-chain-reasoning; an update of encoder, critics, actor and temperature from
pixels at the paper's sizes, batch 32, chains of 4 steps.
fb: DIR is a checkout of metamotivo; 20 updates of FB with a z for each of 128 transitions, sizes of walker's,
z of 50, hidden layers of 256.
hyperbolic_rl: layer (A) for 2048 points of 32 dimensions and 16 outputs, forward and backward, and the demo's
PPO update, beside a layer that makes each z of eq. (3) as the public code does.
t2l: DIR is src of text-to-lora; a frozen model forward and backward with an adapter for each of 8 samples of
128 tokens.
diffusion_lm: a token of 15 evaluations, beside what the public code computes in each, written from formulas.
namm: DIR is a model; prefill and decoding of 3,072 tokens with the full cache, NAMM, our H2O and kvpress's
ObservedAttentionPress, which is like H2O (pip install kvpress --no-deps; cachetools, fire). One pass.
transformer2: DIR is a checkout of self-adaptive-llms; one REINFORCE step at equal sizes.
sudoku_bench: DIR is src of Sudoku-Bench; multi-step replies that fill the boards of mini_48, read and judged.

Medians of seven intervals (fb: five, namm: one), in turn, so that slow minutes hit all alike.
"""

import contextlib
import functools
import importlib.util
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from gymnasium.spaces import Box
from transformers import DynamicCache

import common
import diffusion_lm
import fb
import hyperbolic_rl
import mood
import namm
import rmc
import sudoku_bench
import t2l
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


class ExplicitLayer(hyperbolic_rl.HyperplaneLayer):
    """Eq. (3) with all z = -p (+) x, (B, outputs, n), and the rescaling by 1 - |p|^2 and back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = hyperbolic_rl.mobius_add(-self.offset, x[:, None])
        shrink = 1 - self.offset.square().sum(-1, keepdim=True)
        normal = self.weight * shrink
        norm = normal.norm(dim=-1)
        along = (z * normal).sum(-1)
        return 2 / shrink[:, 0] * norm * torch.asinh(2 * along / ((1 - z.square().sum(-1)) * norm)) / 2


def bench_hyperbolic_rl(folder: Path, run: common.Run):
    """The layer and the update in both ways, from the same weights."""
    x = hyperbolic_rl.expmap0(torch.randn(2048, 32, device=run.device) / 6).requires_grad_()
    layers = {"ours": hyperbolic_rl.HyperplaneLayer(32, 16), "theirs": ExplicitLayer(32, 16)}
    layers["theirs"].load_state_dict(layers["ours"].state_dict())
    torch.testing.assert_close(*(layer.to(run.device)(x) for layer in layers.values()), rtol=1e-3, atol=1e-5)
    steps = {name: lambda layer=layer: layer(x).sum().backward() for name, layer in layers.items()}
    report("layer (A)", median_rates(steps, run.device))

    cfg = replace(hyperbolic_rl.DEMO, **hyperbolic_rl.ROWS["S-RYM"])
    envs = hyperbolic_rl.make_envs(cfg, cfg.envs, slice(None), train=True)
    size, updates = cfg.envs * cfg.rollout // cfg.minibatches, {}
    obs = torch.as_tensor(envs.reset(seed=0)[0]).repeat(size // cfg.envs, 1, 1, 1).to(run.device)
    zero = torch.zeros(size, device=run.device)
    batch = hyperbolic_rl.Batch(obs, zero.long(), zero, zero, torch.randn_like(zero), zero)
    for name, layer in layers.items():
        net = hyperbolic_rl.Net(envs, cfg).to(run.device)
        net.tails[0].last = type(layer)(cfg.features, sum(net.sizes[0])).to(run.device)
        optimizer = hyperbolic_rl.RiemannianAdam(net.parameters(), cfg.lr, fused=True)

        def update(net=net, optimizer=optimizer):
            loss, _ = hyperbolic_rl.ppo_loss(*net(batch.obs), batch, cfg)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        updates[name] = update
    report(f"PPO update of {size} steps", median_rates(updates, run.device))


def bench_fb(folder: Path, run: common.Run, obs=24, actions=6, dim=50, width=256, batch=128, count=20):
    """fb.learn beside FBAgent.update, both drawing their transitions from memory on the device."""
    sys.path.insert(0, str(folder))
    with contextlib.redirect_stdout(None):
        from metamotivo.fb import FBAgent, FBAgentConfig

        theirs = FBAgentConfig()
        theirs.model.obs_dim, theirs.model.action_dim, theirs.model.norm_obs = obs, actions, False
        theirs.model.device, theirs.model.archi.z_dim = str(run.device), dim
        for part in (theirs.model.archi.f, theirs.model.archi.b, theirs.model.archi.actor):
            part.hidden_dim = width
        theirs.train.batch_size, theirs.train.discount = batch, 0.98
        reference = FBAgent(**asdict(theirs))
    s, a, next_s = (torch.randn(ROWS, n, device=run.device) for n in (obs, actions, obs))
    data = fb.Data(s, a.tanh(), next_s, torch.ones(ROWS, device=run.device), next_s, {})

    def sample(n):
        i = torch.randint(ROWS, (n,), device=run.device)
        following = {"observation": next_s[i], "terminated": torch.zeros(n, 1, dtype=bool, device=run.device)}
        return {"observation": s[i], "action": data.a[i], "next": following}

    sizes = dict(dim=dim, width=width, width_b=width, batch=batch, codes=batch, updates=count, block=count)
    cfg = replace(fb.Config(), others=0, **sizes)
    agent = fb.Agent(cfg, obs, actions).to(run.device)
    loop = SimpleNamespace(device=run.device, steps=lambda n, **_: range(n), log=lambda *_, **__: None)
    buffer = {"train": SimpleNamespace(sample=sample)}
    steps = {"ours": lambda: fb.learn(agent, data, cfg, loop)}
    steps["theirs"] = lambda: [reference.update(buffer, 0) for _ in range(count)]
    rates = median_rates(steps, run.device, rounds=5)
    report("fb", {name: count * rate for name, rate in rates.items()})


def self_adaptive_step(folder: Path, model, tokenizer, texts: list[str], length: int) -> Callable:
    """Reinforce.step_optimization and .update of the public code on ready answers, every other one right.

    Packages that are imported but not used here are empty, and so is the copy of the weights into vLLM.
    """
    for package in ("fishfarm", "hydra", "omegaconf", "vllm"):
        sys.modules[package] = mock.MagicMock()
    sys.path.insert(0, str(folder))
    import optim_modules
    from policy.base import Policy

    base, factors = model.state_dict(), {}
    original = {k: v.clone() for k, v in base.items() if "mlp" in k}
    for name, weight in original.items():
        U, S, V = torch.svd(weight)
        factors |= {f"{name}.U": U, f"{name}.S": S, f"{name}.V": V}
    rewards = [2.0 * (i % 2) - 1 for i in range(len(texts))]
    loader = SimpleNamespace(
        get_prompt=lambda tokenizer, data, i, model_id: texts[i][:length], get_rewards=lambda res: rewards
    )
    details = SimpleNamespace(sample_details=[{"output": text[length:]} for text in texts])
    evaluator = SimpleNamespace(evaluate=lambda *args, **more: details)
    optim_modules.load_hf_params_to_vllm = mock.MagicMock()
    torch.Tensor.cuda = lambda x: x  # load_base_params asks for it
    with contextlib.redirect_stdout(None):
        policy = Policy(base, "cpu", 0.1)
    reinforce = optim_modules.Reinforce(policy, "cpu", 1e-3, 2e-3, False, None, 0.1)
    given = dict(model_id="", model=model, tokenizer=tokenizer, policy=policy, task_loader=loader)
    given |= dict(batch_ix=range(len(texts)), train_data=None, train_eval=evaluator, base_params=base)
    given |= dict(decomposed_params=factors, original_model_params=original)
    given |= dict(metrics_to_log=mock.MagicMock(), vllm_model=mock.MagicMock())

    def step():
        with contextlib.redirect_stdout(None):
            reinforce.step_optimization(**given)
        reinforce.update(policy)
        model.zero_grad()

    return step


def bench_transformer2(folder: Path, run: common.Run, answers: int = 16, length: int = 64, steps: int = 8):
    """Steps of transformer2.train_expert beside the public code's, on the same prompts and ready answers."""
    tokenizer = common.CharTokenizer(transformer2.SYMBOLS, eos="$")
    ours, theirs = (common.tiny_lm(len(transformer2.SYMBOLS), 256, 4).eval() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    chance = np.random.default_rng(0)
    texts = ["".join(chance.choice([*"0123456789"], 2 * length)) for _ in range(answers)]
    their_step = self_adaptive_step(folder, theirs, tokenizer, texts, length)

    problem, episodes = transformer2.Problem("", "", "", str.__eq__), []
    for i, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        episodes.append(transformer2.Episode(problem, ids[:length], ids[length:], "", i % 2, 0.0))
    layers = {k: transformer2.SVFLinear(x) for k, x in transformer2.matrices(ours, ("mlp",)).items()}
    world = transformer2.World(ours, tokenizer, [0], transformer2.Adapter(ours, layers), run)
    task = transformer2.Task("x", "math", [problem] * answers, [problem], [])
    size = dict(steps=steps, batch=answers, lam=0.1, valid_every=99, micro=8, save_every=99)
    run.cfg = replace(transformer2.CONFIGS["demo"], **size)

    def our_steps():
        run.folder = Path(tempfile.mkdtemp())
        with mock.patch.object(transformer2, "rollout", lambda *args: [*episodes]):
            transformer2.train_expert(task, world, run)

    def their_steps():
        for _ in range(steps):
            their_step()

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


class RebuildingDecoder(diffusion_lm.Decoder):
    """Builds vocabulary and modulations anew in each evaluation, and evaluates the path at t = 0, too."""

    def f(self, x, t, label, context):
        self.table = self.path.embed(torch.arange(len(self.table), device=x.device))
        condition = self.path.condition(torch.full_like(x[..., 0], t), label)
        return diffusion_lm.lm_head(self.lm, self.path.merge(x, condition, context))


def bench_diffusion_lm(folder: Path, run: common.Run, vocabulary: int = 32_000, rows: int = 8):
    """A token for eight prompts of 256 tokens; the LM is small, the path has the paper's sizes."""
    cfg = replace(diffusion_lm.CONFIGS["full"], solver="midpoint", evals=15)
    lm = common.tiny_lm(vocabulary, 512, 4, heads=8).to(run.device).eval().requires_grad_(False)
    path = diffusion_lm.DiffusionPath(lm, cfg).to(run.device)
    ids = torch.randint(vocabulary, (rows, 256), device=run.device)
    last = torch.full((rows, 1), 255, device=run.device)
    with torch.no_grad():
        context = diffusion_lm.look(lm, diffusion_lm.Batch(ids, last, last, last > 0, 0 * last))
    steps = {}
    for name, kind in (("ours", diffusion_lm.Decoder), ("theirs", RebuildingDecoder)):
        steps[name] = functools.partial(kind(lm, path, cfg).solve, context, 0 * last, 1.0)
    report("diffusion_lm", median_rates(steps, run.device))


def bench_t2l(folder: Path, run: common.Run, samples: int = 8, length: int = 128):
    """Base._adapt beside add_lora_hooks of the public code, which repeats A and B for every token."""
    sys.modules["hyper_llm_modulator.utils"] = SimpleNamespace(get_layers=lambda lm: lm.model.layers)
    sys.path.insert(0, str(folder))
    from hyper_llm_modulator.hooks import add_lora_hooks

    cfg = replace(t2l.CONFIGS["demo"], rank=8)
    tokenizer = SimpleNamespace(chat_template="x", apply_chat_template=lambda *_, **__: "<prompt>")
    base, theirs = (t2l.Base(common.tiny_lm(64, 256, 4), tokenizer, "", cfg) for _ in range(2))
    adapters = (0.01 * torch.randn(samples, base.form.parameters)).requires_grad_()
    for path, (A, B) in theirs.form.split(adapters).items():
        place = path.rpartition(".")[2], int(path.split(".")[2])
        add_lora_hooks(theirs.lm, [place[0]], [place[1]], A.mT, B, cfg.alpha / cfg.rank**0.5, 0.0, True)
    ids = torch.randint(64, (samples, length))

    def ours():
        base.factors = base.form.split(adapters)
        base.lm(ids).logits.sum().backward()

    steps = {"ours": ours, "theirs": lambda: theirs.lm(ids).logits.sum().backward(retain_graph=True)}
    report("t2l", median_rates(steps, run.device))


def bench_sudoku_bench(folder: Path, run: common.Run):
    """A game by the reading `ref` beside the board and the actions of the public code."""
    for name in ("anthropic", "google", "google.genai"):
        sys.modules[name] = mock.MagicMock()  # imported there, not used here
    sys.path.insert(0, str(folder))
    from eval.run import extract_actions_from_response
    from sudoku_ds import SudokuAction, SudokuBoard

    games = []
    for p in sudoku_bench.load_puzzles(str(sudoku_bench.MINI_48), 0):
        cells = zip(sudoku_bench.names(sudoku_bench.square(p.n)), p.givens, p.solution, strict=True)
        lines = "\n".join(f"{cell}: {digit}" for cell, given, digit in cells if given == ".")
        games.append((p, f"<ANSWER>\n{lines}\n</ANSWER>"))

    def theirs():
        for p, reply in games:
            board = SudokuBoard.from_ascii(p.givens, p.n, p.n)
            for r, c, digit in extract_actions_from_response(reply):
                tokens = ["<vl>", f"<value{digit}>", f"<r{r}>", f"<c{c}>"]
                board.execute_action(SudokuAction.from_tokens(tokens))

    def ours():
        for p, reply in games:
            sudoku_bench.Game(p, "multi_step", "ref", p.givens).take(reply)

    report("sudoku_bench", median_rates({"ours": ours, "theirs": theirs}, run.device, rounds=3))


def press(lm, cache: DynamicCache, keep: float) -> list:
    """Hooks by which kvpress keeps that share of the tokens, those of most attention, after a prompt."""
    from kvpress import ObservedAttentionPress

    observed = ObservedAttentionPress(1 - keep)

    def hook(module, args, kwargs, output):
        more = {"past_key_values": cache, "cache_position": kwargs["position_ids"][0]}  # older transformers'
        return observed.forward_hook(module, args, kwargs | more, output)

    return [x.self_attn.register_forward_hook(hook, with_kwargs=True) for x in lm.model.layers]


@torch.inference_mode()
def bench_namm(model: Path, run: common.Run, length=3072, new=32, cap=512):
    """Tokens a second and megabytes of keys and values with four caches of one model."""
    lm = common.load_lm(str(model))[0].to(run.device)
    ids = torch.randint(lm.config.vocab_size, (1, length), device=run.device)
    memory = namm.Policy("namm", 512, cap, "bam", torch.zeros(1, 4172), torch.ones(2, namm.BINS))
    ours = {"NAMM": memory, "H2O": namm.Policy("h2o", 512, cap)}
    for name in ("full cache", "NAMM", "H2O", "kvpress"):
        lm.set_attn_implementation("namm" if name in ours else "eager" if name == "kvpress" else "sdpa")
        cache = namm.Memory(ours[name], lm) if name in ours else DynamicCache()
        hooks, seconds = press(lm, cache, cap / length) if name == "kvpress" else [], []
        parts = ids.split(512 if name in ours else length, 1)
        for tokens in (parts, ids[:, :new].split(1, 1)):
            begin, at = time.perf_counter(), 0 if tokens is parts else length
            for part in tokens:
                place = torch.arange(at, at + part.shape[1], device=run.device)[None]
                lm(part, cache=cache, position_ids=place, logits_to_keep=1)
                at += part.shape[1]
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        for hook in hooks:
            hook.remove()
        held = [layer.store if name in ours else vars(layer) for layer in cache.layers]
        size = sum(x.nbytes for h in held for k, x in h.items() if k in ("k", "v", "keys", "values")) / 1e6
        print(
            f"{name}: reads {length / seconds[0]:.0f}, writes {new / seconds[1]:.1f} a second, {size:.1f} MB"
        )


def report(name: str, rates: dict[str, float]):
    ours, theirs = rates["ours"], rates["theirs"]
    print(f"{name}: {ours:.2f} a second, theirs {theirs:.2f}: {ours / theirs:.2f} x")


if __name__ == "__main__":
    benches = {name.removeprefix("bench_"): f for name, f in globals().items() if name.startswith("bench_")}
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in benches:
        sys.exit(f"python tests/bench.py NAME [DIR]; NAME: {', '.join(benches)}")
    here = common.Run(common.Config())  # for its device, its precision and oneDNN's products
    benches[sys.argv[1]](Path(sys.argv[-1]), here)
