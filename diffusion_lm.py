"""Diffusion finetuning of a language model (L2D): let a frozen model spend several steps on each token.

Cetin, Zhao, Tang, "Large Language Models to Diffusion Finetuning", ICML 2025, arXiv 2501.15781.

The claim. A language model (LM) already is a one-step diffusion model, at time 0. A path of its own layers,
beside the frozen ones, reads the LM's keys and values and a noisy embedding of the NEXT token; trained by
cross entropy, it lets every token be decoded by integrating an ODE. Accuracy rises with the evaluations T
spent on a token, an adaptive solver spends more on harder ones, guidance specialises, and T = 1 is the LM.

Token y, its frozen embedding e_y in R^d; c: tokens so far; f: logits of the next token; sigma: noise
  eq. (1)  x_t = t x_1 + (1 - t) x_0,   x_1 = V_y,  x_0 ~ N(0, sigma^2 I)                          corruption
  eq. (2)  V_y = sqrt(d_f) u_y / |u_y|,  u_y = W_v e_y + b_v                       the diffusion vocabulary
  eq. (3)  loss = -E log softmax f(x_t, t, c)_y,   t ~ U[0, 1];  t and x_0 drawn for each token on its own
  eq. (4)  dx/dt = (x_hat - x) / (1 - t),  x_hat: V_y of y ~ p (sampled, argmax), or sum_y p_y V_y (averaged)
           for a fixed x_hat exactly x_t' = x_t + (t' - t) / (1 - t) (x_hat - x_t)
  eq. (5)  h <- h + r1 O'(Attn(RoPE(Q' z), K_l, V_l)),  z = RMS(h) (gamma1 + m1) + s1;  K, V: the frozen LM's
           h <- h + r2 MLP'(RMS(h) (gamma2 + m2) + s2);  m, s, r = head_l(tau(t)); primes: LoRA, or copies
  eq. (6)  f = LM's norm and head of (h_LM + w(t) h),  w(t) = W(tau(t)) - W(tau(0)) in R^d:  w(0) = 0
  eq. (7)  x_hat = g x_hat(class) + (1 - g) x_hat(no class)                       classifier-free guidance

How to run
  python diffusion_lm.py                                        the effect in miniature, on two CPU cores
  python diffusion_lm.py --config text --model M --data F       a real model: hub id, folder, .gguf; F: .jsonl
  torchrun --nproc_per_node=8 diffusion_lm.py --config full     Llama-3.2-1B-Instruct on SmolTalk, the paper's
  ... --config full --model Qwen/Qwen2.5-7B-Instruct --rank 0 --micro 1   full copies, not LoRA: FSDP2

Departures from the paper and its code
- w is a vector and sits before the LM's last norm; rank 32 (its parameter counts need both); eq. (7) has the
  sign that makes g = 1 the conditional model. All from the code, as are t (not times 1000) and all inits.
- The adaptive solver takes steps of eq. (4)'s exact form, with t, step size and count for each sample. The
  code's has one step size a batch and a jump to zero velocity at t = 1, which costs 49 evaluations even where
  the prediction never changes. It integrates the averaged x_hat: sampled ones are no field.
- Diffusion tokens stand at label positions only; examples are drawn with replacement; the loss is divided
  once; all weights decay. Masks come from lengths, never from a pad id. One chat template everywhere.
- t = 0 is the LM's own logits, so it costs nothing; it counts as an evaluation. T: evaluations a token.
- Answers beyond --context are cut, not dropped. Prompts and graders are lm-eval's, code is sampled once a
  problem; classes by benchmark. Rows of the vocabulary beyond the tokenizer's are not masked.
- The demo's task is ours (see `duplicates`). Its LM ties its embeddings, as Llama-3.2-1B does; untied, paths
  learn far more slowly. sigma / sqrt(d_f) is 1, not 4; LoRA takes all layers. Tuned on seeds from 100 on.

Reading order: Config, ROWS, DiffusionPath, corrupt, the solvers, Decoder, fit, train.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import common
from common import Claim, Run, UserError


@dataclass
class Config(common.Config):
    # model and data
    model: str = "tiny"  # hub id, folder or .gguf of a Llama or Qwen2; tiny: trained here
    data: str = "duplicates"  # or a .jsonl, folder or hub id; rows have messages, or question and solution
    subsets: tuple[str, ...] = ()  # of the data, each with a class of its own
    holdout: int = 1000  # examples for evaluation: of each length, or the last rows of the data
    context: int = 2048  # tokens of a conversation, at most
    bench: tuple[str, ...] = ()  # lm-eval tasks
    # the demo
    lengths: tuple[Literal[4, 8, 12, 16], ...] = (8, 12, 16)  # words in the lists of the evaluation
    base_steps: int = 2300  # of the LM's pre-training
    base_batch: int = 64  # lists a step of it
    # diffusion path
    method: Literal["L2D", "base", "LoRA", "full"] = "L2D"  # what is trained: the path, nothing, the LM
    rank: int = 0  # of the path's LoRA; 0: full copies of the LM's layers
    size: int = 32  # of diffusion embeddings (d_f)
    sigma: float = 32**0.5  # of the noise
    hidden: int = 64  # features of t, condition, and every hidden layer around the path (C, F)
    blind: bool = False  # control: noise of the same variance instead of x_t
    conditional: bool = False  # the path knows the class
    # training
    steps: int = 1400  # optimizer steps
    batch: int = 32  # examples a step, over all ranks
    micro: int = 128  # examples in one forward and backward pass
    draws: int = 8  # of t and x_0 for each token
    lr: float = 7e-3  # AdamW, peak; warm-up in a tenth of the steps, 100 at most, then linear to 1 %
    baseline_layers: tuple[str, ...] = ("_proj",)  # that LoRA, the baseline, adapts: ends of their names
    # decoding
    solver: Literal["euler", "midpoint", "adaptive"] = "euler"  # of eq. (4); adaptive: with averages
    evals: int = 16  # evaluations of f a token (T); 1: the LM; odd for midpoint; adaptive finds its own
    tol: float = 0.1  # error a step of the adaptive solver, rms of an embedding
    x_hat: Literal["sample", "argmax", "average"] = "sample"  # prediction that the ODE moves to
    cooling: bool = False  # x_hat at temperature 1 - t (end of the stage), not 1
    guidance: float = 1.0  # weight of the class (g)
    bayes: bool = False  # control: f is the exact posterior under the LM's own p(y | c)
    max_new: int = 0  # tokens to write for a held-out prompt, and in benchmarks; 0: none

    def check(self):
        super().check()
        wrong = {
            "--data duplicates goes with --model tiny": (self.model == "tiny") != (self.data == "duplicates"),
            f"--batch {self.batch} must be a multiple of the ranks": (
                self.share == "run" and self.batch % int(os.environ.get("WORLD_SIZE", self.ranks))
            ),
            f"--method {self.method} goes with --evals 1": self.method != "L2D" and self.evals > 1,
            f"--evals {self.evals}: midpoint needs an odd number, such as {self.evals + 1}": (
                self.solver == "midpoint" and not self.evals % 2
            ),
            "--solver adaptive goes with --x_hat average, without --bayes": (
                self.solver == "adaptive" and (self.bayes or self.x_hat != "average")
            ),
            "--guidance needs --conditional": self.guidance != 1 and not self.conditional,
            "--bench needs a --model, and --max_new": (
                self.bench and (self.model == "tiny" or not self.max_new)
            ),
        }
        for text, found in wrong.items():
            if found:
                raise UserError(text)


DEMO = Config(log_every=50, save_every=700)
FULL = replace(
    DEMO,
    rows=("base", "LoRA", "full finetuning", "T = 15, midpoint", "adaptive", "classes: g = 3"),
    share="run",
    model="meta-llama/Llama-3.2-1B-Instruct",
    data="HuggingFaceTB/smoltalk",
    subsets=(
        "self-oss-instruct",
        "metamathqa-50k",
        "numina-cot-100k",
        "openhermes-100k",
        "smol-magpie-ultra",
    ),
    holdout=256,
    bench=("gsm8k", "hendrycks_math", "mmlu_generative", "mmlu_pro", "humaneval_instruct", "mbpp_instruct"),
    rank=32,
    size=256,
    sigma=64.0,
    hidden=256,
    steps=27_884,
    batch=32,
    micro=4,
    draws=1,
    lr=1e-4,
    baseline_layers=("q_proj", "v_proj"),
    x_hat="argmax",
    max_new=256,
)
CONFIGS = {
    "smoke": replace(DEMO, holdout=16, base_steps=6, steps=6, batch=16, micro=8),
    "demo": replace(DEMO, seed=10, seeds=5, ranks=2),
    "gpu": replace(DEMO, ranks=4, seeds=4, base_steps=4000, steps=3000, holdout=20_000),
    "text": replace(
        FULL,
        rows=("base", "T = 1", "T = 4", "T = 16"),
        model="",
        data="",
        subsets=(),
        holdout=4,
        context=256,
        bench=(),
        steps=20,
        batch=4,
        max_new=24,
        log_every=1,
    ),
    "full": FULL,
}

# a row of the table is the settings that it changes: the difference of two rows is an idea of the paper
ROWS = {
    "base": dict(method="base", evals=1),
    "LoRA": dict(method="LoRA", evals=1),
    "full finetuning": dict(method="full", evals=1),
}
ROWS |= {f"T = {evals}": dict(evals=evals) for evals in (1, 2, 4, 8, 16)}
ROWS |= {
    "T = 15, midpoint": dict(solver="midpoint", evals=15),
    "T = 16, cooling": dict(cooling=True),
    "blind path": dict(blind=True),
    "Bayes control": dict(bayes=True),
    "adaptive": dict(solver="adaptive", x_hat="average"),
}
ROWS |= {f"adaptive, lists of {n}": ROWS["adaptive"] | dict(lengths=(n,)) for n in (4, 16)}
ROWS |= {f"classes: g = {g}": dict(conditional=True, guidance=float(g)) for g in (0, 1, 3)}
CLAIMS = [
    Claim("sampled accuracy rises from T = 1 to 4", "sampled", "T = 4", "T = 1"),
    Claim("sampled accuracy rises from T = 4 to 16", "sampled", "T = 16", "T = 4"),
    Claim(
        "the adaptive solver spends more on longer lists",
        "evaluations",
        "adaptive, lists of 16",
        "adaptive, lists of 4",
    ),
    Claim("guidance raises the accuracy of a class", "greedy", "classes: g = 3", "classes: g = 1"),
]
CLAIMS += [
    Claim(f"at T = 16 it is above: {rival}", "sampled", "T = 16", rival)
    for rival in ("LoRA", "full finetuning", "blind path")
]


# --- data ---


@dataclass(frozen=True)
class Batch:
    """Examples and their diffusion tokens, one at each place whose next token is a label: K, with padding."""

    ids: Tensor  # (B, T), right-padded
    places: Tensor  # (B, K)
    targets: Tensor  # (B, K) next tokens
    mask: Tensor  # (B, K) false for padding
    label: Tensor  # (B, K) classes
    t: Tensor = None  # (B, K) times
    x0: Tensor = None  # (B, K, d_f) noise

    def each(self, change: Callable) -> Batch:
        return Batch(**{name: change(x) for name, x in vars(self).items() if x is not None})


LENGTHS, LONGEST = (4, 8, 12, 16), 16
WORDS, WHICH, NONE, BLANK = 256, 256, 257, 260  # words, question, answers none, once, twice, what fills up
ALPHABET = "".join(chr(0x4E00 + i) for i in range(WORDS)) + "?012."  # a word is a character


def duplicates(count: int, lengths: tuple, both: bool, chance=None) -> Batch:
    """Lists of distinct words but for one that occurs twice, in a random order with blanks; then WHICH.

    The answer is the word that occurs twice, the label its topic: is it even or odd? With `both` a word of
    the other topic occurs twice as well, so that the label decides.
    """
    rand = partial(torch.rand, generator=chance)
    pairs = rand(count, WORDS // 2).topk(LONGEST).indices  # of words 2 i and 2 i + 1
    topic = (rand(count, LONGEST) < (0.5 if both else rand(count, 1))).long()  # a list has a main topic
    topic[:, 1] = 1 - topic[:, 0]
    words = 2 * pairs + topic
    repeated = [0, 0, 1, 1, *range(2, 14)] if both else [0, 0, *range(1, 15)]
    n = torch.tensor(lengths)[(rand(count, 1) * len(lengths)).long()]
    ids = words[:, repeated].masked_fill(torch.arange(LONGEST) >= n, BLANK)
    ids = F.pad(ids.gather(1, rand(count, LONGEST).argsort(1)), (0, 1), value=WHICH)
    return Batch(ids, torch.full_like(n, LONGEST), words[:, :1], n > 0, topic[:, :1])


def how_often(batch: Batch, share: float) -> Batch:
    """The same lists; a share of them ends with a word w instead, and the answer is how often w occurs."""
    ids, twice, kind = batch.ids, batch.targets, torch.rand(batch.targets.shape)
    listed = ids.gather(1, (torch.rand(ids.shape) * (ids < WORDS)).argmax(1, keepdim=True))
    other = torch.where(kind < 0.85, listed, torch.randint(WORDS, twice.shape))
    word = torch.where(kind < 0.4, twice, other)
    asked, often = torch.rand(twice.shape) < share, (ids == word).sum(1, keepdim=True)
    ids = torch.cat([ids[:, :-1], torch.where(asked, word, WHICH)], 1)
    return replace(batch, ids=ids, targets=torch.where(asked, NONE + often, twice))


CLASSES = {"metamathqa-50k": 0, "numina-cot-100k": 0, "math": 0, "self-oss-instruct": 1, "coding": 1}
NOBODY = 3  # the label without a class; class 2: all else
DROPPED = {"advice-seeking", "brainstorming", "creative-writing", "editing", "planning", "role-playing"}


def load_conversations(cfg: Config) -> list:
    """An example for each answer in the rows of all subsets: the turns up to it, and its class.

    Rows with a turn that has no text are left out; UserError if they are more than one in twenty.
    """
    found, bad = [], 0
    for subset in cfg.subsets or (None,):
        for row in common.load_rows(cfg.data, subset=subset):
            turns = row.get("messages") or [
                {"role": "user", "content": row.get("question")},
                {"role": "assistant", "content": row.get("solution")},
            ]
            kind, empty = row.get("category") or subset, not all(turn.get("content") for turn in turns)
            bad += empty
            for i, turn in enumerate(turns if kind not in DROPPED and not empty else []):
                if turn.get("role") == "assistant":
                    found.append((turns[: i + 1], CLASSES.get(kind, 2)))
    if 20 * bad > len(found):
        raise UserError(f"{cfg.data}: {bad} rows lack messages, question or solution")
    return found


def conversations(examples: list, tokenizer, context: int) -> Batch:
    """Examples of load_conversations, cut at `context`; labels are the answer and its end of turn."""

    def encode(turns, opened):
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=opened, tokenize=False)
        return tokenizer.encode(text if opened else text.rstrip("\n"), add_special_tokens=False)[:context]

    rows, places = [], []
    for turns, _ in examples:
        rows.append(encode(turns, False))
        places.append(range(len(encode(turns[:-1], True)) - 1, len(rows[-1]) - 1))
    ids, _ = common.collate(rows, "cpu")
    places, mask = common.collate(places, "cpu")
    label = torch.tensor([kind for _, kind in examples])[:, None].expand_as(places)
    return Batch(ids, places, ids.gather(1, places + 1), mask, label)


def open_data(cfg: Config, tokenizer, run: Run) -> tuple:
    """batch_of(step), and batches to evaluate on."""
    if cfg.data == "duplicates":
        chance = run.generator("test")
        tests = [duplicates(cfg.holdout, (n,), cfg.conditional, chance) for n in cfg.lengths]
        return lambda step: duplicates(cfg.batch, LENGTHS, cfg.conditional), tests
    examples = load_conversations(cfg)
    held, examples = examples[-cfg.holdout :], examples[: -cfg.holdout]

    def batch_of(step):
        chosen = [examples[i] for i in torch.randint(len(examples), (cfg.batch,)).tolist()]
        return conversations(chosen, tokenizer, cfg.context)

    return batch_of, [conversations([example], tokenizer, cfg.context) for example in held]


# --- the frozen language model: the main path ---


class Context(NamedTuple):
    """What diffusion tokens read of the main path: B sequences of T tokens, K diffusion tokens in each."""

    kv: list  # keys (after RoPE) and values of each layer, (B, heads, T, d_head)
    hidden: Tensor  # (B, K, d) at the tokens' places, before the last norm
    position: Tensor  # (B, K) for RoPE
    visible: Tensor  # (B, K, T) keys up to the token's own place
    logits: Tensor = None  # (B, K, |V|) the LM's own: f at t = 0


def main_path(lm, ids: Tensor, cache, **where) -> tuple:
    """Run the LM on ids (B, T) after what `cache` holds -> all keys and values, pre-norm states (B, T, d).

    Keys that several heads share are repeated here, once a token and not in each evaluation.
    """
    caught, config = [], lm.config
    hook = lm.base_model.norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    lm.base_model(input_ids=ids, cache=cache, use_cache=True, **where)
    hook.remove()
    heads = config.num_attention_heads // config.num_key_value_heads
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    return [tuple(x.repeat_interleave(heads, 1) for x in pair) for pair in pairs], caught[0]


def look(lm, batch: Batch) -> Context:
    """The context of all diffusion tokens of a batch, in one pass."""
    kv, hidden = main_path(lm, batch.ids, transformers.DynamicCache(config=lm.config))
    visible = torch.arange(batch.ids.shape[1], device=hidden.device) <= batch.places[..., None]
    return Context(kv, hidden.take_along_dim(batch.places[..., None], 1), batch.places, visible)


def lm_head(lm, hidden: Tensor) -> Tensor:
    """The LM's last norm and head: (..., d) -> fp32 (..., |V|)."""
    return lm.lm_head(lm.base_model.norm(hidden)).float()


def token_losses(lm, hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross entropies (B, K) of pre-norm states (B, K, d)."""
    logits = lm_head(lm, hidden).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)


def checksum(lm) -> str:
    """Of all weights."""
    digest = hashlib.sha256()
    for p in lm.parameters():
        digest.update(p.detach().cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


RANK = 32  # of the LoRA baseline


class LoRA(nn.Module):
    """A frozen linear layer, not ours to save, plus B A: A ~ N(0, 1 / r^2), B = 0, alpha = r."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = (linear,)  # a tuple hides it from parameters()
        self.A = nn.Parameter(torch.randn(rank, linear.in_features) / rank)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear[0](x) + F.linear(F.linear(x, self.A), self.B)


class Finetuned(nn.Module):
    """The baselines: the LM itself, with LoRA or whole, trained on the same labels."""

    def __init__(self, lm, cfg: Config):
        super().__init__()
        self.lm = lm.requires_grad_(cfg.method == "full")
        for name, layer in list(lm.named_modules()):
            if cfg.method == "LoRA" and name.endswith(cfg.baseline_layers):
                lm.set_submodule(name, LoRA(layer, RANK))

    def forward(self, batch: Batch) -> Tensor:
        return token_losses(self.lm, look(self.lm, batch).hidden, batch.targets)


# --- the diffusion path ---


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, outputs))


class Block(nn.Module):
    """Eq. (5): a layer of the path; own weights, or LoRA, for all but keys and values."""

    def __init__(self, layer, cfg: Config):
        super().__init__()
        self.layer = (layer,)
        for name in ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name, None) or getattr(layer.self_attn, name)
            own = LoRA(linear, cfg.rank) if cfg.rank else copy.deepcopy(linear).float().requires_grad_(True)
            self.add_module(name, own)

    def forward(self, h: Tensor, modulation: Tensor, kv: tuple, rope: tuple, visible: Tensor) -> Tensor:
        layer = self.layer[0]
        m1, s1, r1, m2, s2, r2 = modulation.chunk(6, -1)
        q = self.q_proj(modulated_norm(layer.input_layernorm, h, m1, s1))
        h = h + r1 * self.o_proj(attend(q, *kv, rope, visible))
        z = modulated_norm(layer.post_attention_layernorm, h, m2, s2)
        return h + r2 * self.down_proj(F.silu(self.gate_proj(z)) * self.up_proj(z))


def modulated_norm(norm, h: Tensor, m: Tensor, s: Tensor) -> Tensor:
    """RMS norm whose frozen weight is moved by m, and its result by s; all (B, K, d)."""
    return F.rms_norm(h, h.shape[-1:], eps=norm.variance_epsilon) * (norm.weight + m) + s


def attend(q: Tensor, keys: Tensor, values: Tensor, rope: tuple, visible: Tensor) -> Tensor:
    """Queries (B, K, d) before RoPE on the LM's keys and values (B, heads, T, d_head) -> (B, K, d)."""
    cos, sin = (x[:, :, None] for x in rope)
    q = q.unflatten(-1, (-1, keys.shape[3]))  # (B, K, heads, d_head)
    a, b = q.chunk(2, -1)
    q = (q * cos + torch.cat([-b, a], -1) * sin).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, keys, values, visible[:, None])
    return out.transpose(1, 2).flatten(2)


class DiffusionPath(nn.Module):
    """All that is trained; the LM is only read."""

    def __init__(self, lm, cfg: Config):
        super().__init__()
        self.lm, self.cfg = (lm,), cfg
        d, hidden = lm.config.hidden_size, cfg.hidden
        self.blocks = nn.ModuleList()  # the first list: FSDP shards by its items
        self.heads = nn.ModuleList(mlp(hidden, hidden, 6 * d) for _ in lm.base_model.layers)
        self.weight = mlp(hidden, hidden, d)  # W
        self.embedding = nn.Linear(d, cfg.size)  # W_v, b_v
        self.reader, self.time = mlp(cfg.size, hidden, d), mlp(hidden, hidden, hidden)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        for head in (*self.heads, self.weight):  # at first the path adds nothing
            nn.init.zeros_(head[2].weight)
        nn.init.normal_(self.time[0].weight, std=0.02)
        nn.init.normal_(self.time[2].weight, std=0.02)
        if cfg.conditional:
            self.label = nn.Embedding(NOBODY + 1, hidden)
            nn.init.normal_(self.label.weight, std=0.02)
        self.blocks.extend(Block(layer, cfg) for layer in lm.base_model.layers)

    @torch.autocast("cuda", enabled=False)
    def embed(self, tokens: Tensor) -> Tensor:
        """Eq. (2): tokens (...) -> fp32 (..., d_f), of norm sqrt(d_f)."""
        e = self.lm[0].get_input_embeddings()(tokens)
        return self.cfg.size**0.5 * F.normalize(self.embedding(e.float()), dim=-1)

    def tau(self, t: Tensor, label: Tensor) -> Tensor:
        """Times and classes (...) -> (..., C)."""
        half = self.cfg.hidden // 2
        angle = t[..., None] * 10_000.0 ** (-torch.arange(half, device=t.device) / half)
        tau = self.time(torch.cat([angle.cos(), angle.sin()], -1))
        return tau + self.label(label) if self.cfg.conditional else tau

    @torch.autocast("cuda", enabled=False)
    def condition(self, t: Tensor, label: Tensor) -> Tensor:
        """All that depends on time and class alone: (...) twice -> (..., 1 + d + 6 d L).

        The standard deviation of a coordinate of x_t, w, which is 0 at t = 0 to the bit, and each layer's
        modulations.
        """
        tau, start = self.tau(t, label), self.tau(t.new_zeros(()), label)
        weight = (t > 0)[..., None] * (self.weight(tau) - self.weight(start))  # eq. (6)
        scale = ((1 - t).square() * self.cfg.sigma**2 + t.square()).sqrt()
        return torch.cat([scale[..., None], weight, *(head(tau) for head in self.heads)], -1)

    def merge(self, x: Tensor, condition: Tensor, context: Context) -> Tensor:
        """Eqs. (5), (6): noisy tokens (B, K, d_f) -> what the LM's last norm and head turn to logits."""
        hidden, d = context.hidden, context.hidden.shape[-1]
        scale, weight, modulations = condition.tensor_split([1, 1 + d], -1)
        rope = self.lm[0].base_model.rotary_emb(hidden, context.position)
        h = self.reader(torch.normal(0 * x) if self.cfg.blind else x / scale)
        for block, modulation, kv in zip(self.blocks, modulations.split(6 * d, -1), context.kv, strict=True):
            h = block(h, modulation, kv, rope, context.visible)
        return (hidden + weight * h).to(hidden.dtype)

    def forward(self, batch: Batch) -> Tensor:
        """Eq. (3): losses of the diffusion tokens (B, K)."""
        lm = self.lm[0]
        with torch.no_grad():
            context = look(lm, batch)
        x = corrupt(self.embed(batch.targets), batch.x0, batch.t)
        h = self.merge(x, self.condition(batch.t, batch.label), context)
        return token_losses(lm, h, batch.targets)


def corrupt(x1: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Eq. (1): (..., d_f) twice, times (...)."""
    return t[..., None] * x1 + (1 - t[..., None]) * x0


DROP = 0.2  # chance that a token's class is dropped


def with_noise(batch: Batch, cfg: Config) -> Batch:
    """`draws` copies of each diffusion token; t, x_0 and whether the class is dropped are drawn for each."""
    columns = (batch.places, batch.targets, batch.mask, batch.label)
    places, targets, mask, label = (x.repeat(1, cfg.draws) for x in columns)
    t, keep = torch.rand(2, *label.shape, device=label.device)
    label = torch.where(keep < DROP, NOBODY, label)
    x0 = cfg.sigma * torch.randn(*label.shape, cfg.size, device=label.device)
    return Batch(batch.ids, places, targets, mask, label, t, x0)


# --- solvers of eq. (4): predict(x, t, end of the stage) -> x_hat ---


def euler(predict: Callable, x: Tensor, times: list) -> Tensor:
    """One prediction an interval; exact while it does not change."""
    for t, end in pairwise(times):
        x = x.lerp(predict(x, t, end), (end - t) / (1 - t))
    return x


def midpoint(predict: Callable, x: Tensor, times: list) -> Tensor:
    """Two predictions an interval; the velocity of the second, halfway, moves x all the way."""
    for t, end in pairwise(times):
        middle = (t + end) / 2
        half = x.lerp(predict(x, t, middle), (middle - t) / (1 - t))
        x = x + (end - t) / (1 - middle) * (predict(half, middle, end) - half)
    return x


def adaptive(predict: Callable, x: Tensor, tol: float) -> tuple:
    """x (B, K, d_f) -> x at t = 1, and predictions (B, K): each sample has its own times, steps and count.

    A step moves by the mean of the predictions at its two ends, in eq. (4)'s exact form; its error is how far
    that is from Euler's step. predict(x, t, end) gets t (B, K), and finished samples until all are.
    """
    t = torch.zeros_like(x[..., :1])
    h, count = t + 0.05, t[..., 0] + 1
    x_hat = predict(x, t[..., 0], t)
    while (t < 1).any():
        end = (t + h).clamp(max=1)
        share = ((end - t) / (1 - t)).nan_to_num()  # 0 where t is 1
        ahead = predict(x.lerp(x_hat, share), end[..., 0], end)
        error = share / 2 * (ahead - x_hat).square().mean(-1, keepdim=True).sqrt()
        good = ~(error > tol) | (h <= 1e-3)
        count += t[..., 0] < 1
        x = torch.where(good, x.lerp((x_hat + ahead) / 2, share), x)
        x_hat, t = torch.where(good, ahead, x_hat), torch.where(good, end, t)
        h = h * (0.9 * (tol / error).sqrt()).clamp(0.2, 10)
    return x, count


def draw_token(logits: Tensor, temperature: float) -> Tensor:
    """Sample (...) from logits (..., |V|) by the inverse CDF; temperature 0 is the argmax."""
    if temperature == 0:
        return logits.argmax(-1)
    cdf = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.double)
    picked = torch.rand_like(cdf[..., :1]) * cdf[..., -1:]
    return torch.searchsorted(cdf, picked, right=True)[..., 0]


def to_embedding(logits: Tensor, table: Tensor, kind: str, temperature: float) -> Tensor:
    """x_hat (..., d_f) of logits (..., |V|) and the diffusion vocabulary (|V|, d_f)."""
    if kind == "average":
        return (logits.softmax(-1) @ table).float()
    return table[draw_token(logits, 0.0 if kind == "argmax" else temperature)]


def bayes_logits(logits: Tensor, x: Tensor, t: float, table: Tensor, sigma: float) -> Tensor:
    """log p(y | c) + log N(x; t V_y, (1 - t)^2 sigma^2) up to a constant, since all |V_y| are alike."""
    return logits.log_softmax(-1) + t * x @ table.mT / (max(1 - t, 1e-3) * sigma) ** 2


class Decoder:
    """The LM and a path, or the LM alone, and what decoding needs to compute only once."""

    @torch.no_grad()
    def __init__(self, lm, path: nn.Module, cfg: Config):
        self.lm, self.path, self.cfg = lm, path, cfg
        if cfg.method != "L2D":
            return
        self.table = path.embed(torch.arange(lm.config.vocab_size, device=lm.device))
        classes = torch.arange(NOBODY + 1, device=lm.device)
        self.tabulated = cache(lambda t: path.condition(t + 0.0 * classes, classes))

    def f(self, x: Tensor, t: float | Tensor, label: Tensor, context: Context) -> Tensor:
        """Eq. (6): logits at a time t of the grid, or at times (B, K); those of t = 0 are there already."""
        if not torch.as_tensor(t).any():
            return context.logits
        if self.cfg.bayes:
            return bayes_logits(context.logits, x, t, self.table, self.cfg.sigma)
        condition = self.tabulated(t)[label] if isinstance(t, float) else self.path.condition(t, label)
        return lm_head(self.lm, self.path.merge(x, condition, context))

    @torch.no_grad()
    def solve(self, context: Context, label: Tensor, temperature: float) -> tuple:
        """Next tokens (B, K) and evaluations (B, K) for classes (B, K), at a temperature for all draws."""
        cfg = self.cfg
        weighted = [(cfg.guidance, label)]  # eq. (7): a weight for each class
        if cfg.guidance != 1:
            weighted.append((1 - cfg.guidance, torch.full_like(label, NOBODY)))
        context = context._replace(logits=lm_head(self.lm, context.hidden))

        def predict(x, t, end):
            heat = temperature * (1 - end * cfg.cooling)
            return sum(
                g * to_embedding(self.f(x, t, kind, context), self.table, cfg.x_hat, heat)
                for g, kind in weighted
            )

        x = cfg.sigma * torch.randn(*label.shape, cfg.size, device=label.device)
        points = (cfg.evals + 1) // 2 if cfg.solver == "midpoint" else cfg.evals
        times = torch.linspace(0, 1, points, dtype=torch.double).tolist()
        count = torch.full_like(x[..., 0], cfg.evals - 1)
        if cfg.solver == "adaptive" and cfg.evals > 1:
            x, count = adaptive(predict, x, cfg.tol)
        elif cfg.solver == "midpoint":
            x = midpoint(predict, x, times)
        else:
            x = euler(predict, x, times)
        logits = self.f(x, times[-1], label, context)
        return draw_token(logits, temperature), count * len(weighted) + 1


@torch.no_grad()
def generate(
    decoder: Decoder, prompts: list, new: int, ends: list[int], kind: int, temperature: float
) -> Tensor:
    """Answers (B, at most `new`) to lists of ids, of class `kind`; ends[0] follows after any of `ends`.

    The main path runs once a token, however many evaluations the solver takes.
    """
    lm = decoder.lm
    ids, mask = (x.flip(1) for x in common.collate([p[::-1] for p in prompts], lm.device))  # left-padded
    label = torch.full_like(ids[:, :1], kind)
    cache, written, ended = transformers.DynamicCache(config=lm.config), [], label < 0
    while len(written) < new and not ended.all():
        position = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        kv, hidden = main_path(lm, ids, cache, attention_mask=mask.long(), position_ids=position)
        context = Context(kv, hidden[:, -1:], position[:, -1:], mask[:, None])
        ids = decoder.solve(context, label, temperature)[0].masked_fill(ended, ends[0])
        written.append(ids)
        mask = F.pad(mask, (0, 1), value=True)
        ended |= torch.isin(ids, torch.tensor(ends, device=lm.device))
    return torch.cat(written, 1)


# --- training ---


def size(model: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def fit(model: nn.Module, batch_of: Callable, steps: int, cfg: Config, run: Run):
    """Train in place what needs a gradient in `model`, whose forward gives the losses of a batch's labels."""
    full_precision = copy.copy(run)
    full_precision.amp = False  # t, tau and the vocabulary need float32; autocast rounds the rest
    parallel = full_precision.shard(model) if size(model) > 1e9 else run.wrap(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), cfg.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    for step in run.steps(steps, model=model, optimizer=optimizer):
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min((step + 1) / min(100, steps / 10), 1 - 0.99 * step / steps)
        batch = batch_of(step).each(lambda x: x.to(run.device))
        if isinstance(model, DiffusionPath):
            batch = with_noise(batch, cfg)
        share = batch.mask.sum() / run.world_size  # labels of a rank: gradients are averaged
        total, mine = 0.0, torch.arange(run.rank, len(batch.ids), run.world_size)
        for rows in mine.split(cfg.micro):
            part = batch.each(itemgetter(rows))
            with run.autocast():
                loss = (parallel(part) * part.mask).sum() / share  # eq. (3)
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        run.log(step, loss=total)


def load(base: str, cfg: Config, run: Run) -> tuple:
    """The LM, frozen, on the device, its tokenizer, and what this row trains: path or LM."""
    dtype = torch.bfloat16 if run.amp and cfg.method != "full" else torch.float32
    lm, tokenizer = common.load_lm(base, dtype)
    lm.to(run.device).requires_grad_(False)
    model = DiffusionPath(lm, cfg) if cfg.method == "L2D" else Finetuned(lm, cfg)
    return lm, tokenizer, model.to(run.device)


def make_tiny():
    """The demo's LM: one layer, too narrow to find a word in a list, but not to count one.

    Embeddings are tied, so a state whose logits favour a word also asks the keys for it.
    """
    return common.tiny_lm(
        len(ALPHABET),
        24,
        1,
        heads=1,
        intermediate_size=48,
        initializer_range=24**-0.5,
        tie_word_embeddings=True,
    )


def make_base(run: Run):
    """Pre-train the demo's LM; 30 % of the questions are WHICH."""
    cfg = run.cfg
    lm = make_tiny().to(run.device)

    def batch_of(step):
        return how_often(duplicates(cfg.base_batch, LENGTHS, False), 0.7)

    fit(Finetuned(lm, replace(cfg, method="full")), batch_of, cfg.base_steps, cfg, run)
    lm.should_save_on_this_rank = lambda _: True  # not on the first of all ranks alone: another may be here
    lm.save_pretrained(run.folder / "model")
    common.CharTokenizer(ALPHABET, eos=".").save_pretrained(run.folder / "model")


def learn(base: str, run: Run):
    """Train the path, or a baseline; the last checkpoint keeps it."""
    cfg = run.cfg
    lm, tokenizer, model = load(base, cfg, run)
    before = checksum(lm)
    fit(model, open_data(cfg, tokenizer, run)[0], cfg.steps, cfg, run)
    if cfg.method == "L2D":
        run.print(f"checksum of the LM: {before} before training, {checksum(lm)} after")


def train(cfg: Config, run: Run) -> dict:
    """One cell of the table: base, path or baseline, and how it decodes."""
    base = str(run.once("language model", make_base) / "model") if cfg.model == "tiny" else cfg.model
    learned = cfg.method != "base" and run.once(
        f"{cfg.method} blind={cfg.blind} classes={cfg.conditional}", partial(learn, base)
    )
    lm, tokenizer, model = load(base, cfg, run)  # only now: training holds a copy of its own
    if learned:
        dcp.load({"model": model}, checkpoint_id=max(learned.glob("step*")), no_dist=run.world_size == 1)
    decoder = Decoder(lm, model, cfg)
    tests = open_data(cfg, tokenizer, run)[1]
    with run.autocast():
        if cfg.max_new:
            prompt = tests[0].ids[0, : 1 + sum(tests[0].places[0, :1])].tolist()
            answer = generate(decoder, [prompt], cfg.max_new, common.end_ids(lm, tokenizer), 0, 0.0)[0]
            run.print(f"{run.folder.name}: {tokenizer.decode(answer)!r}")
        return evaluate(decoder, tests, cfg, run) | benchmarks(decoder, tokenizer, cfg, run)


# --- evaluation ---


@torch.no_grad()
def evaluate(decoder: Decoder, tests: list, cfg: Config, run: Run) -> dict:
    """Accuracy of the next token after true ones: `sampled` at temperature 1 and `greedy` at 0, x_hat, too.

    With it evaluations a token; tokens a second in run.speed.
    """
    found = {}
    for name, temperature in dict(greedy=0.0, sampled=1.0).items():
        torch.manual_seed(cfg.seed)  # pairs rows
        sums, begin = torch.zeros(3, device=run.device), time.time()
        for batch in tests[run.rank :: run.world_size]:
            batch = batch.each(lambda x: x.to(run.device))
            token, count = decoder.solve(look(decoder.lm, batch), batch.label, temperature)
            columns = torch.stack([token == batch.targets, count, batch.mask])
            sums += (columns * batch.mask).sum((1, 2))
        right, evaluations, tokens = run.mean(sums).tolist()
        found |= {name: right / tokens, "evaluations": evaluations / tokens}
        run.speed["tokens_per_s"] = tokens / (time.time() - begin)
    return found


BENCH_CLASSES = {"gsm8k": 0, "hendrycks_math": 0, "humaneval_instruct": 1, "mbpp_instruct": 1}  # 2: any other


def benchmarks(decoder: Decoder, tokenizer, cfg: Config, run: Run) -> dict:
    """lm-eval's tasks, five examples as turns of the chat (code: lm-eval's own), decoded at temperature 1."""
    if not cfg.bench:
        return {}
    hf = common.need("lm_eval.models.huggingface", "lm")
    ends, kind = common.end_ids(decoder.lm, tokenizer), 2

    class Ours(hf.HFLM):
        def _model_generate(self, context, attention_mask, **settings):
            prompts = [row[seen].tolist() for row, seen in zip(context, attention_mask.bool(), strict=True)]
            return torch.cat([context, generate(decoder, prompts, cfg.max_new, ends, kind, 1.0)], 1)

    lm, found = Ours(pretrained=decoder.lm, tokenizer=tokenizer, batch_size=8), {}
    for task in cfg.bench:
        kind = BENCH_CLASSES.get(task, 2)
        more = dict(num_fewshot=5, fewshot_as_multiturn=True)
        if kind == 1:
            more = dict(confirm_run_unsafe_code=True)
        scores = common.benchmark(
            lm, tokenizer, [task], run=run, gen_kwargs=dict(max_gen_toks=cfg.max_new), **more
        )
        values = (x for name, x in scores.get(task, {}).items() if name.startswith(("exact_match,", "pass")))
        found[task] = next(values, math.nan)
    return found


# --- figure, sizes without weights, main ---


def draw(figure, table: dict):
    """Left: sampled accuracy over T, a line a seed; right: of each row, a dot a seed."""
    left, right = figure.subplots(1, 2)
    ladder = {ROWS[row]["evals"]: cells for row, cells in table.items() if list(ROWS[row]) == ["evals"]}
    left.semilogx(list(ladder), [[cell["sampled"] for cell in cells] for cells in ladder.values()], "o-")
    left.set(xlabel="evaluations a token", ylabel="sampled accuracy")
    for row, cells in table.items():
        right.plot([cell["sampled"] for cell in cells], [row] * len(cells), "o")
    right.invert_yaxis()


SIZES = {
    "meta-llama/Llama-3.2-1B-Instruct": (2048, 8192, 16, 32, 8, 128256, True),
    "meta-llama/Llama-3.1-8B-Instruct": (4096, 14336, 32, 32, 8, 128256, False),
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False),
}
FIELDS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
FIELDS += ["num_key_value_heads", "vocab_size", "tie_word_embeddings"]


def read_config(name: str):
    """The LM's transformers config from its files or the hub; None if there is none."""
    if name == "tiny":
        return make_tiny().config
    path, more = name, {}
    if name.endswith(".gguf"):
        path, more = Path(name).parent, {"gguf_file": Path(name).name}
    with contextlib.suppress(OSError, ValueError):
        config = transformers.AutoConfig.from_pretrained(path, **more)
        if config.model_type not in ("llama", "qwen2"):
            raise UserError(f"--model {name}: a {config.model_type}; the path is made for llama and qwen2")
        return config


def check_inputs(cfg: Config):
    """UserError for what a real model needs and is not there or cannot be used."""
    if cfg.model == "tiny":
        return
    if read_config(cfg.model) is None:
        raise UserError(f"--model {cfg.model!r}: neither here nor on the hub (hub id, folder or .gguf)")
    if len(load_conversations(cfg)) <= cfg.holdout:
        raise UserError(f"{cfg.data}: --holdout {cfg.holdout} leaves no answer to train on")
    if 1 in map(BENCH_CLASSES.get, cfg.bench) and "HF_ALLOW_CODE_EVAL" not in os.environ:
        raise UserError("--bench: some tasks run what the model wrote; HF_ALLOW_CODE_EVAL=1 allows it")
    if cfg.bench:
        common.need("lm_eval", "lm")


def dry_run(cfg: Config, run: Run):
    """Print exact parameter counts, memory, hours at 40 % of an H100's peak if all texts had full length."""
    config = read_config(cfg.model)
    if cfg.model in SIZES and config is None:
        sizes = dict(zip(FIELDS, SIZES[cfg.model], strict=True))
        config = transformers.AutoConfig.for_model("qwen2" if "Qwen" in cfg.model else "llama", **sizes)
    if config:
        with torch.device("meta"):
            lm = transformers.AutoModelForCausalLM.from_config(config)
            n = size(lm)
            lm.requires_grad_(False)
            path, copies = size(DiffusionPath(lm, cfg)), size(DiffusionPath(lm, replace(cfg, rank=0)))
            lora = size(Finetuned(lm, replace(cfg, method="LoRA")))
        hours = cfg.steps * cfg.batch * cfg.context * 6 * n / 3600 / (0.4 * 989e12)  # 2 N main path, 4 N path
        run.print(
            f"{cfg.model}: {n:,} parameters; path {path:,} ({copies:,} as full copies); LoRA {lora:,}\n"
            f"{(2 * n + 16 * path) / 1e9:.0f} GB of weights and AdamW; {hours:.1f} GPU hours for the path"
        )
    try:
        check_inputs(cfg)
    except UserError as e:
        run.print(f"missing: {e}")


def main():
    cfg = common.parse_config(CONFIGS)
    with Run(cfg, "" if cfg.model == "tiny" else cfg.model) as run:
        if cfg.dry_run:
            return dry_run(cfg, run)
        check_inputs(cfg)
        table = run.grid(ROWS, train)
        run.check(CLAIMS, table)
        run.figure(draw, table, size=(9, 5))


if __name__ == "__main__":
    main()
