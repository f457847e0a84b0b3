"""Transformer-squared: train one scale per singular value, then adapt to a prompt in two passes.

Sun, Cetin, Tang, "Transformer-Squared: Self-adaptive LLMs", ICLR 2025, arXiv 2501.06252.

The claim. Singular value fine-tuning (SVF) learns one multiplier for each singular value of a weight
matrix and nothing else. Trained by REINFORCE on right and wrong answers it makes small experts that beat
LoRA; since all experts live in the basis of the same matrices, they can be picked or mixed at inference: a
first pass finds out what the prompt needs, a second one answers with adapted weights, also on tasks no
expert was trained on.

For a linear layer W = U diag(s) V^T (m x n, rank r at most) and learned p in R^r:
  eq. (1)  J = E[R log pi_W'(y | x)] - lambda KL(pi_W' || pi_W),  R = +1 if the answer is right, else -1
           log-probs and KL are sums over the answer's tokens (the paper's eq. 1; the rest is numbered here)
  eq. (2)  z = sigmoid(p)
  eq. (3)  W' = U diag(s g z) V^T,  g = sum(s) / sum(s z): the nuclear norm of W is kept, g has a gradient
  eq. (4)  z = sum_k alpha_k z_k mixes experts, before the g of eq. (3); alpha is one number an expert, or one
           an expert and matrix, found by the cross-entropy method on a few solved examples
Three ways to adapt: (A) the base model names the task's category, (B) an expert trained to do that names
it, (C) eq. (4). "Other" and whatever cannot be parsed get the base weights, bit for bit.

How to run
  python transformer2.py                               the effect in miniature, on two CPU cores
  python transformer2.py --model M --tasks math=F,reasoning=F
                                                       real models and tasks on a laptop; M: hub id, folder,
                                                       .gguf; F: .jsonl of question and answer, or gym:NAME
  torchrun --nproc_per_node=8 transformer2.py --config full
                                                       Llama-3-8B-Instruct; GSM8K, MBPP, ARC-Easy; unseen
                                                       MATH, HumanEval, ARC-Challenge
  ... --config mistral, --config vlm                   Mistral-7B-v0.3; LLaVA-NeXT on TextVQA and OK-VQA
  ... --experts FOLDER --cross_model                   experts made elsewhere, of another model, too
  ... --config vlm --experts out/transformer2-full-s0/experts --cross_model --every 1 --stages eval,adapt
                                                       OK-VQA with language-only experts, as in the paper:
                                                       those of `full`, matrix by matrix
Rungs: smoke, demo, gpu (ranks share a grid of runs); text, full, mistral, vlm (ranks share each run:
prompts, populations and matrices are dealt out; the model is whole on each).

Where this file departs from the paper and its code
- AdamW with cosine decay as in the paper (the code: Adam, constant rate). p starts at 0.1 +- 0.01 as in
  the code (the paper: variance 1e-3). lambda is 0.1 by default (the code's default is 0, the authors
  advise 0.1 to 0.3) and the direction that of the code, KL(pi_W || pi_W'); --kl_dir new_base is the
  paper's.
- p, s, z and their optimizer are float32 (the code: bfloat16, where small steps round to nothing).
- Experts are mixed as z, eq. (4). The released configuration mixes p, which is another thing.
- Prompts of category "other" run on the base weights (the code: on whatever ran last).
- The category expert is trained on 400 questions of each training split (the code: test questions among
  them).
- The few shots are never in the reported test set, and choose alone (the code picks a generation by test
  score).
- Ties between members are broken by the mean log-likelihood of right answers, for elites as for the best
  one.
- Sampled ids are trained on as they are, end-of-turn token included, with one BOS. One prompt builder a
  task.
- Graders: GSM8K by the last number with sign and thousands (--grader reference drops both); an ARC answer
  without a letter is wrong (the code guesses). VQA: R = +1 from a soft accuracy of 0.5, the paper is
  silent.
- The best-validation p is kept, as in the code; the last one is measured, too. The untouched base is not
  among the candidates: an expert may validate worse than it.
- The few-shot search of `full` takes 50 generations, as the released script (the paper: 100 at most).
- MBPP has 200 training questions, so the category expert sees 200 of code and 400 of the others.
- With --model there are no ablations, no sweep of learning rates and no SVF by next-token prediction.
- A mixed batch runs W x + U diag(s (g z - 1)) V^T x row by row: nothing is merged, and base rows are
  exact.
- Models larger than a GPU (Llama-3-70B there) are refused: no sharding here.
- The demo's task is ours. Its models learn right and careless answers from a synthetic corpus; RL elicits
  the right ones. Learning rates are 25 times the paper's, for 40 steps; lambda = 0; sampling at
  temperature 1. A base model that lacks a skill at the end (--gate) ends the run: RL cannot add it.

Reading order: Config, SVFLinear, Adapter, the loss, train, dispatch and two_pass, cem, then the tasks.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import secrets
import signal
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import before as common
from before import Run, UserError

STAGES = ("experts", "cls", "lora", "eval", "adapt")
FAMILIES = ("math", "code", "reasoning")  # categories with an expert; "other" has none
MODULES = {"mlp": r"\.mlp\.", "qv": r"\.[qv]_proj$"}  # names of linear layers, as patterns


@dataclass
class Config(common.Config):
    # models and data; without a model, the built-in task
    model: str | None = None  # hub id, folder or .gguf; vision-language models, too
    tasks: tuple[str, ...] = ()  # one expert each: names of TASKS, family=F.jsonl or family=gym:NAME
    unseen: tuple[str, ...] = ()  # tasks to adapt to
    data: str = ""  # folder with TASK-SPLIT.jsonl or .parquet files; empty: the hub
    stages: tuple[str, ...] = ("experts", "cls", "eval", "adapt")  # real models: parts to run; lora, too
    experts: str = ""  # folder of experts to use instead of training
    cross_model: bool = False  # let --experts come from other weights
    # what is adapted
    modules: tuple[str, ...] = ("mlp", "qv")  # mlp, qv, or patterns of layer names
    every: int = 1  # adapt one layer in so many (2: the paper's choice for its largest models)
    svd: str = "out/svd"  # folder of decomposed matrices, found by a hash of the weights
    renormalise: bool = True  # keep the nuclear norm, g of eq. (3)
    init: float = 0.1  # mean of p at the start
    init_std: float = 0.01  # its standard deviation
    # training of one expert
    steps: int = 40  # updates
    batch: int = 96  # prompts an update, one answer each
    lr: float = 0.05  # of p; AdamW, cosine to 0
    clip: float = 1e-3  # norm of the gradient over all of p
    lam: float = 0.0  # weight of the KL (lambda)
    kl_dir: Literal["base_new", "new_base"] = "base_new"  # KL(pi_W || pi_W') or, as in the paper, the reverse
    rollout_temp: float = 1.0  # of sampled answers in training; 0: greedy, as the paper's code
    validate_every: int = 10  # updates between two evaluations on the validation split
    valid_problems: int = 256  # problems of one validation, at most
    warn_after: int = 5  # batches in a row, all of whose answers are right or all wrong, before a warning
    # LoRA baselines, on query and value projections
    lora_rank: int = 16  # rank
    lora_scale: float = 2.0  # alpha / rank
    lora_dropout: float = 0.05  # on the input of A
    lora_lr: float = 5e-3  # by policy gradient
    ntp_lr: float = 5e-3  # by next-token prediction on solutions
    lora_clip: float = 1.0  # norm of the gradient
    # adaptation
    shots: int = 10  # solved examples of an unseen task (F)
    population: int = 32  # members a generation (P)
    elite: float = 0.2  # share of them that moves the distribution
    generations: int = 15  # generations
    deploy: Literal["best", "mean"] = "best"  # what is used then: the best member or the elites' mean
    mixed: bool = True  # run the second pass in batches that mix experts; else one merged expert at a time
    cls_questions: int = 400  # questions of each task that the category expert learns from
    cls_new: int = 1  # tokens of a category, at most
    # evaluation
    grader: Literal["exact", "reference"] = "exact"  # reference: GSM8K numbers as the paper's code reads them
    eval_problems: int = 500  # test problems of a task, at most; 0: all, 2000 of the built-in task
    max_new: int = 0  # tokens of an answer, at most; 0: as each task says
    code_seconds: float = 10.0  # time limit of one generated program
    code_memory: int = 1024  # its memory limit, MB
    # built-in task
    length: int = 5  # symbols of a question
    width: int = 64  # of the base model
    layers: int = 3  # of the base model
    bases: int = 1  # base models, pre-trained independently; 2: experts are carried over, too
    seeds: int = 3  # seeds of RL on each base model
    pretrain_steps: int = 1400  # at most
    pretrain_batch: int = 288  # documents a step
    pretrain_lr: float = 4e-3  # constant until the skills are there, then to 0 over 200 steps
    gate: float = 0.9  # accuracy on documents tagged as good that a base model must reach in every skill
    sweep: tuple[float, ...] = (0.25, 1.0, 4.0, 16.0)  # multiples of the learning rates that are tried
    ablations: bool = True  # rows for modules, lambda, no renormalisation, LoRA of rank 1; first seed only
    vlm: bool = True  # the miniature vision-language model
    projector_steps: int = 200  # its captioning steps
    # memory and speed
    micro_tokens: int = 16384  # padded tokens in one forward and backward pass; halved when memory runs out
    sample_batch: int = 1024  # sequences decoded together on a rank
    recompute: bool = False  # compute layers again in the backward pass, for memory

    may_change: ClassVar[set[str]] = {"stages", "svd", "mixed", "micro_tokens", "sample_batch", "recompute"}

    def __post_init__(self):
        super().__post_init__()
        if unknown := set(self.stages) - set(STAGES):
            raise ValueError(f"--stages: {', '.join(sorted(unknown))} is none of {', '.join(STAGES)}")
        if self.model is None and (self.tasks or self.unseen or self.data or self.experts):
            raise ValueError("--tasks, --unseen, --data and --experts need a --model")
        if self.elites < 2 or self.generations < 1:
            raise ValueError("--population times --elite must be 2 or more, --generations 1 or more")
        positive = (
            "every",
            "steps",
            "batch",
            "validate_every",
            "valid_problems",
            "shots",
            "cls_new",
            "bases",
        )
        positive += ("seeds", "pretrain_steps", "micro_tokens", "sample_batch")
        least = dict.fromkeys(positive, 1) | dict.fromkeys(("rollout_temp", "eval_problems", "max_new"), 0)
        least["cls_questions"] = 5  # of which one is a test question
        if bad := [name for name, low in least.items() if getattr(self, name) < low]:
            raise ValueError(f"--{bad[0]} must be {least[bad[0]]} or more")
        if not 3 <= self.length <= 60:
            raise ValueError("--length must be 3 to 60")
        for pattern in self.modules:
            try:
                re.compile(MODULES.get(pattern, pattern))
            except re.error as e:
                raise ValueError(f"--modules {pattern}: no pattern of names ({e})") from None
        if self.model:
            return
        if not self.sweep or min(self.sweep) <= 0 or not any(4 * m in self.sweep for m in self.sweep):
            raise ValueError("--sweep: multiples above 0, of one of them also the fourfold")
        self.eval_problems = self.eval_problems or 2000  # there is no end of problems

    @property
    def elites(self) -> int:
        """Members that move the distribution: the share, rounded down."""
        return int(self.elite * self.population + 1e-9)


# fmt: off
DEMO = Config(workers=2, log_every=10, save_every=1000)
FULL = Config(model="meta-llama/Meta-Llama-3-8B-Instruct", tasks=("gsm8k", "mbpp", "arc_easy"),
    unseen=("math", "humaneval", "arc_challenge"), stages=STAGES, modules=("mlp",), steps=200, batch=256,
    lr=2e-3, lam=0.1, rollout_temp=0.0, valid_problems=512, lora_lr=2e-4, ntp_lr=5e-5, lora_clip=1e-3,
    generations=50, mixed=False, cls_new=1024, eval_problems=0, sample_batch=128, recompute=True,
    log_every=1, save_every=10)
CONFIGS = {
    "smoke": replace(DEMO, workers=1, width=32, layers=2, bases=2, seeds=1, pretrain_steps=60, gate=0.0,
        steps=3, batch=16, validate_every=2, valid_problems=16, population=10, generations=2, shots=8,
        cls_questions=20, eval_problems=24, sweep=(1.0, 4.0), projector_steps=3, log_every=1),
    "demo": DEMO,
    "gpu": replace(DEMO, workers=1, length=12, width=256, layers=6, seeds=5, pretrain_steps=4000,
        pretrain_lr=1e-3, batch=256, lr=0.02, lora_lr=1e-3, ntp_lr=1e-3, eval_problems=2000),
    "text": replace(FULL, model="HuggingFaceTB/SmolLM2-135M-Instruct", tasks=("gsm8k", "arc_easy"), unseen=(),
        stages=("experts", "cls", "eval"), steps=8, batch=16, lr=5e-3, rollout_temp=1.0, validate_every=4,
        valid_problems=32, population=10, generations=3, cls_questions=40, cls_new=24, eval_problems=32,
        max_new=64, sample_batch=32, micro_tokens=4096, recompute=False, mixed=True),
    "full": FULL,
    "mistral": replace(FULL, model="mistralai/Mistral-7B-Instruct-v0.3"),
    "vlm": replace(FULL, model="llava-hf/llama3-llava-next-8b-hf", tasks=("textvqa",), unseen=("okvqa",),
        every=2, stages=("experts", "eval", "adapt"), max_new=32, sample_batch=32),
}
# fmt: on


# --- singular value fine-tuning ---


def effective_scale(z: Tensor, s: Tensor, renormalise: bool = True) -> Tensor:
    """g z of eq. (3): z (..., r), singular values s (r,) -> (..., r). All ones if z is constant."""
    if not renormalise:
        return z
    return z * (s.sum() / (s * z).sum(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny))


class SVFLinear(nn.Module):
    """A linear layer whose singular values are scaled by eq. (3); `mode` says with what.

    base: W as it was. own: from p, with gradient, in factors, so that no m x n gradient ever exists. merged:
    the matrix made by `merge`. rows: scales (B, r), one for each row of the batch. U (m, r), s (r,),
    V (n, r).
    """

    def __init__(self, linear: nn.Linear, U: Tensor, s: Tensor, V: Tensor, renormalise: bool = True):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        for name, x in (("U", U), ("s", s), ("V", V)):
            self.register_buffer(name, x, persistent=False)
        self.p = nn.Parameter(torch.zeros_like(s))
        self.renormalise, self.mode = renormalise, "base"
        self.scales: Tensor | None = None  # (B, r)
        self.register_buffer("merged", None, persistent=False)

    @torch.no_grad()
    def reset(self, cfg: Config, generator: torch.Generator) -> None:
        """p ~ N(init, init_std^2)."""
        self.p.copy_(cfg.init + cfg.init_std * torch.randn(self.p.shape, generator=generator))

    def z(self) -> Tensor:
        """eq. (2): (r,)."""
        return torch.sigmoid(self.p)

    def scale(self, z: Tensor) -> Tensor:
        """g z of eq. (3) for any z (..., r)."""
        return effective_scale(z, self.s, self.renormalise)

    @torch.no_grad()
    def merge(self, scale: Tensor | None = None) -> None:
        """Make W' of a scale (r,), or of p, for mode "merged"; always in the same memory."""
        scaled = self.s * (self.scale(self.z()) if scale is None else scale)
        product = ((self.U.float() * scaled) @ self.V.float().T).to(self.weight.dtype)
        if self.merged is None:
            self.merged = torch.empty_like(self.weight)
        self.merged.copy_(product)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) -> (..., m); in mode "rows" x is (B, T, n)."""
        if self.mode == "merged":
            return nn.functional.linear(x, self.merged, self.bias)
        if self.mode == "own":
            hidden = x @ self.V.to(x.dtype)
            hidden = hidden * (self.s * self.scale(self.z())).to(hidden.dtype)
            return nn.functional.linear(hidden, self.U.to(hidden.dtype), self.bias)
        y = nn.functional.linear(x, self.weight, self.bias)
        if self.mode == "base":
            return y
        hidden = x @ self.V.to(x.dtype)
        hidden = hidden * (self.s * (self.scales - 1))[:, None].to(hidden.dtype)
        return y + hidden @ self.U.to(hidden.dtype).T


class LoRALinear(nn.Module):
    """The baseline: W x + scale B A x with A (rank, n) ~ N(0, 1/n) and B (m, rank) = 0 at the start."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float):
        super().__init__()
        self.weight, self.bias, self.factor, self.dropout = linear.weight, linear.bias, scale, dropout
        (m, n), device = linear.weight.shape, linear.weight.device
        self.A = nn.Parameter(torch.zeros(rank, n, device=device))
        self.B = nn.Parameter(torch.zeros(m, rank, device=device))
        self.mode = "base"
        self.register_buffer("merged", None, persistent=False)

    @torch.no_grad()
    def reset(self, cfg: Config, generator: torch.Generator) -> None:
        self.A.copy_(torch.randn(self.A.shape, generator=generator) / math.sqrt(self.A.shape[1]))
        self.B.zero_()

    @torch.no_grad()
    def merge(self) -> None:
        product = (self.weight.float() + self.factor * self.B @ self.A).to(self.weight.dtype)
        if self.merged is None:
            self.merged = torch.empty_like(self.weight)
        self.merged.copy_(product)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "merged":
            return nn.functional.linear(x, self.merged, self.bias)
        y = nn.functional.linear(x, self.weight, self.bias)
        if self.mode == "base":
            return y
        x = nn.functional.dropout(x, self.dropout, self.training)
        return y + self.factor * (x @ self.A.to(x.dtype).T) @ self.B.to(x.dtype).T


def layers_to_adapt(model: nn.Module, modules: tuple[str, ...], every: int = 1) -> dict[str, nn.Linear]:
    """Linear layers whose names match a pattern, in the model's order; not the head, not a vision tower.

    UserError where nothing matches, or where a match is quantised.
    """
    patterns = [re.compile(MODULES.get(m, m)) for m in modules]
    head, found, candidates = model.get_output_embeddings(), {}, set()
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear) or layer is head or re.search(r"vision|projector", name):
            continue
        candidates.add(re.sub(r"\d+", "N", name))
        depth = re.search(r"\.(\d+)\.", name)
        if any(p.search(name) for p in patterns) and not (depth and int(depth[1]) % every):
            if type(layer) is not nn.Linear or not layer.weight.is_floating_point():
                raise UserError(f"{name} is quantised ({type(layer).__name__}); load the model unquantised")
            found[name] = layer
    if not found:
        raise UserError(f"--modules {','.join(modules)} matches none of {', '.join(sorted(candidates))}")
    return found


def thin_svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 U (m, r), s (r,) descending, V (n, r) of a matrix (m, n).

    On a GPU by the eigenvectors of the smaller Gram matrix in float64, which is several times faster, unless
    the matrix is so ill-conditioned that this would cost accuracy.
    """
    w = weight.detach().float()
    if w.device.type == "cuda":
        tall = w.double() if w.shape[0] >= w.shape[1] else w.double().T
        values, vectors = torch.linalg.eigh(tall.T @ tall)
        s, right = values.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
        if s[-1] > 1e-5 * s[0]:
            left = tall @ right / s
            U, V = (left, right) if w.shape[0] >= w.shape[1] else (right, left)
            return U.float(), s.float(), V.float()
    U, s, Vh = torch.linalg.svd(w, full_matrices=False)
    return U, s, Vh.mT.contiguous()


def weight_key(weight: Tensor) -> str:
    """A hash of a matrix: its bytes, shape and type."""
    data = weight.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(data.shape)} {data.dtype}".encode())
    digest.update(data.view(torch.uint8).numpy())
    return digest.hexdigest()[:40]


def decompose(layers: dict[str, nn.Linear], folder: Path, run: Run) -> dict[str, tuple[str, tuple]]:
    """(key, (U, s, V)) of each layer from the cache, which the ranks fill together; U, V typed as the weight.

    A file is found by the hash of the weights it belongs to, so none is ever stale; a torn one is made anew.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    folder.mkdir(parents=True, exist_ok=True)

    def parts(layer: nn.Linear, key: str) -> dict[str, Tensor]:
        file = folder / f"{key}.safetensors"
        with contextlib.suppress(OSError, SafetensorError):
            return load_file(file)
        U, s, V = (x.cpu().contiguous() for x in thin_svd(layer.weight))
        made = {"U": U.to(layer.weight.dtype), "s": s, "V": V.to(layer.weight.dtype)}
        common.write_atomic(file.with_name(f"{key}.{os.getpid()}"), save(made))
        os.replace(file.with_name(f"{key}.{os.getpid()}"), file)
        return made

    keys = {name: weight_key(layer.weight) for name, layer in layers.items()}
    for i, (name, layer) in enumerate(layers.items()):
        if i % run.world_size == run.rank:
            parts(layer, keys[name])
    run.barrier()
    factors = {name: parts(layer, keys[name]) for name, layer in layers.items()}
    return {name: (keys[name], tuple(factors[name][k] for k in ("U", "s", "V"))) for name in layers}


class Adapter:
    """The adapted layers of a model, SVF or LoRA: in use only inside `with adapter.use(...)`."""

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], key: str = ""):
        self.model, self.layers, self.key, self.how = model, layers, key, None
        self.originals = {name: model.get_submodule(name) for name in layers}
        model.requires_grad_(False)
        for name, layer in layers.items():
            self._put(name, layer)
            for p in own_parameters(layer).values():
                p.requires_grad_(True)

    def _put(self, name: str, layer: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.model.get_submodule(parent), child, layer)

    def remove(self) -> None:
        """Put the original layers back."""
        for name, layer in self.originals.items():
            self._put(name, layer)

    def parameters(self) -> list[nn.Parameter]:
        return [p for layer in self.layers.values() for p in own_parameters(layer).values()]

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the trained tensors by name."""
        named = ((n, k, p) for n, layer in self.layers.items() for k, p in own_parameters(layer).items())
        return {f"{n}.{k}": p.detach().clone() for n, k, p in named}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            for key, p in own_parameters(layer).items():
                p.copy_(state[f"{name}.{key}"])

    def reset(self, cfg: Config, generator: torch.Generator) -> None:
        """Start values, drawn layer by layer."""
        for layer in self.layers.values():
            layer.reset(cfg, generator)

    def z(self) -> dict[str, Tensor]:
        """eq. (2) of every layer, as an expert is kept: {layer name: (r,)}."""
        return {name: layer.z().detach().clone() for name, layer in self.layers.items()}

    def scales(self, z: dict[str, Tensor]) -> dict[str, Tensor]:
        """Effective scales g z of an expert or of a batch of them, each (..., r)."""
        return {name: layer.scale(z[name].to(layer.s)) for name, layer in self.layers.items()}

    def _set(self, how: Literal["own", "merged"] | dict[str, Tensor] | None) -> None:
        """See `use`."""
        for name, layer in self.layers.items():
            layer.mode, layer.scales = how if isinstance(how, str) else "base", None
            if how == "merged":
                layer.merge()
            elif isinstance(how, dict) and how[name].dim() == 1:
                layer.merge(how[name])
                layer.mode = "merged"
            elif isinstance(how, dict):
                layer.scales, layer.mode = how[name], "rows"

    @contextlib.contextmanager
    def use(self, how: Literal["own", "merged"] | dict[str, Tensor] | None) -> Iterator[None]:
        """What the layers compute inside; afterwards they do what they did before, merged anew if need be.

        None: the base weights. "own": the trained parameters, with gradient. "merged": these, merged once.
        A dict of effective scales: (r,) is merged once, (B, r) is one expert for each row of the batch.
        """
        before, self.how = self.how, how
        try:
            self._set(how)
            yield
        finally:
            self.how = before
            self._set(before)


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that an adapted layer adds."""
    return {k: p for k, p in layer.named_parameters() if k not in ("weight", "bias")}


def svf_adapter(model: nn.Module, cfg: Config, run: Run) -> Adapter:
    """Decompose the layers that cfg.modules names, and install SVF."""
    layers = layers_to_adapt(model, cfg.modules, cfg.every)
    parts = decompose(layers, Path(cfg.svd), run)
    made = {}
    for name, layer in layers.items():
        U, s, V = (x.to(layer.weight.device) for x in parts[name][1])
        made[name] = SVFLinear(layer, U, s, V, cfg.renormalise)
    # of bfloat16 weights: a model is the same one in float32 on a CPU and in bfloat16 on a GPU
    pairs = ((layers[name].weight, key) for name, (key, _) in parts.items())
    keys = (key if w.dtype == torch.bfloat16 else weight_key(w.bfloat16()) for w, key in pairs)
    return Adapter(model, made, hashlib.sha256("".join(keys).encode()).hexdigest()[:16])


def lora_adapter(model: nn.Module, cfg: Config) -> Adapter:
    """Install LoRA on the layers that cfg.modules names."""
    settings = (cfg.lora_rank, cfg.lora_scale, cfg.lora_dropout)
    layers = layers_to_adapt(model, cfg.modules, cfg.every)
    return Adapter(model, {name: LoRALinear(layer, *settings) for name, layer in layers.items()})


# --- experts ---


def save_expert(file: Path, adapter: Adapter, z: dict[str, Tensor], **about) -> None:
    """Write an expert: z of every layer as safetensors, with what `load_expert` compares."""
    from safetensors.torch import save

    shapes = {name: list(layer.weight.shape) for name, layer in adapter.layers.items()}
    about |= {"base": adapter.key, "shapes": json.dumps(shapes), "renormalise": renormalises(adapter)}
    about = {k: str(v) for k, v in about.items()}
    data = save({name: x.cpu().contiguous() for name, x in z.items()}, metadata=about)
    file.parent.mkdir(parents=True, exist_ok=True)
    common.write_atomic(file, data)


def renormalises(adapter: Adapter) -> bool:
    """Whether its layers have the g of eq. (3)."""
    return next(iter(adapter.layers.values())).renormalise


def load_expert(file: str | Path, adapter: Adapter, cross_model: bool = False) -> dict[str, Tensor]:
    """Read an expert for this model: {layer name: z (r,)}; layers go by name, or in order if names differ.

    UserError for a torn file, for other layers, for other base weights unless `cross_model`, for one with g
    where there is none here, and for a shape that does not fit, which names the layer.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as f:
            about, z = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        shapes = json.loads(about["shapes"])
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as e:
        raise UserError(f"{file}: no expert file ({str(e).splitlines()[0]})") from None
    same_names, found = set(shapes) == set(adapter.layers), {}
    if len(shapes) != len(adapter.layers) or not (same_names or cross_model):
        counts = f"{len(shapes)} layers ({next(iter(shapes), '')} ..), the model adapts {len(adapter.layers)}"
        hint = "--modules, --every, or another model: --cross_model goes by order"
        raise UserError(f"{file} has {counts} ({next(iter(adapter.layers))} ..); {hint}")
    if about.get("base") != adapter.key and not cross_model:
        raise UserError(
            f"{file} was trained on other weights; --cross_model uses it all the same, in its order"
        )
    if about.get("renormalise", "True") != str(renormalises(adapter)):
        raise UserError(f"{file} was trained with --renormalise {about.get('renormalise', 'True').lower()}")
    for theirs, (mine, layer) in zip(shapes, adapter.layers.items(), strict=True):
        source = mine if same_names else theirs
        rank, shape = len(layer.s), list(layer.weight.shape)
        if shapes[source] != shape:
            raise UserError(f"{file}: {source} is {shapes[source]}, but {mine} of this model is {shape}")
        if source not in z or z[source].shape != (rank,):
            size = z[source].numel() if source in z else 0
            raise UserError(f"{file}: z of {source} has {size} numbers, but the rank of {mine} is {rank}")
        found[mine] = z[source].to(layer.s)
    return found


def mix(experts: list[dict[str, Tensor]], alpha: Tensor) -> dict[str, Tensor]:
    """eq. (4): K experts, alpha (K,) or (..., K, J), J layers or 1 for all alike -> {layer name: z (..., r)}.

    Weights that are all zero count as equal. The scale of alpha does not matter: eq. (3) divides by it.
    """
    names = list(experts[0])
    alpha = alpha[:, None] if alpha.dim() == 1 else alpha
    alpha = torch.where(alpha.sum(-2, keepdim=True) > 0, alpha, 1.0)
    alpha = alpha.expand(*alpha.shape[:-1], len(names))  # (..., K, J)
    stacked = {name: torch.stack([e[name] for e in experts]) for name in names}  # (K, r)
    return {name: alpha[..., j].to(stacked[name]) @ stacked[name] for j, name in enumerate(names)}


def shuffled(expert: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The control of cross-model transfer: each layer's z in a random order."""
    return {k: z[torch.randperm(len(z), generator=generator).to(z.device)] for k, z in expert.items()}


# --- problems, and what it takes to answer them ---


@dataclass(frozen=True)
class Problem:
    """What a model is asked and what a grader knows."""

    prompt: str  # everything up to where the answer begins
    question: str  # what the dispatcher sees: no system prompt, no worked steps
    target: object  # what the grader compares with
    solution: str = ""  # what next-token prediction imitates
    image: object = None  # a picture, or in the built-in task glyphs (length, 15)


@dataclass(frozen=True)
class Task:
    """Problems by split, and their grader: (problem, text of the answer) -> right or not."""

    name: str
    family: str
    splits: dict[str, list[Problem]]
    grade: Callable[[Problem, str], bool]
    max_new: int
    stops: tuple[str, ...] = ()  # an answer ends where one of these begins
    threads: int = 1  # graders at a time

    def __getitem__(self, split: str) -> list[Problem]:
        return self.splits[split]


@dataclass(frozen=True)
class World:
    """What everything works with: settings, process, model and its adapter, tokenizer, dispatch prompt."""

    cfg: Config
    run: Run
    model: nn.Module
    tok: object
    eos: int  # ends a turn
    cls_prompt: Callable[[str], str]  # question -> prompt that asks for its category
    parse_label: Callable[[str], str]  # answer -> category; what cannot be read is "other"
    adapter: Adapter | None = None
    processor: object = None  # of a vision-language model

    def encode(self, problems: list[Problem]) -> list[list[int]]:
        """Ids of the prompts; a picture's place is taken by its tokens."""
        texts = [p.prompt for p in problems]
        if self.processor is None or problems[0].image is None:
            return self.tok(texts, add_special_tokens=False)["input_ids"]
        pairs = zip(texts, problems, strict=True)
        made = (self.processor(text=t, images=p.image, add_special_tokens=False) for t, p in pairs)
        return [np.ravel(x["input_ids"]).tolist() for x in made]

    def features(self, problems: list[Problem]) -> dict[str, Tensor]:
        """The pictures as the model wants them; none for plain text."""
        if not problems or problems[0].image is None:
            return {}
        if self.processor is None:
            return {"pixel_values": torch.stack([p.image for p in problems]).to(self.model.device)}
        made = self.processor.image_processor([p.image for p in problems], return_tensors="pt")
        return {k: v.to(self.model.device) for k, v in made.items() if k in ("pixel_values", "image_sizes")}

    def text(self, ids: list[int], stops: tuple[str, ...]) -> str:
        """The answer as text, up to the first stop."""
        text = self.tok.decode(ids, skip_special_tokens=True)
        return text[: min([text.find(s) for s in stops if s in text], default=len(text))]


@torch.no_grad()
def complete(
    world: World,
    problems: list[Problem],
    task: Task,
    uniforms: Tensor | None = None,
    rows: dict | None = None,
) -> tuple[list[list[int]], Tensor]:
    """Answers (lists of ids, EOS included) and their summed log-probs (N,), greedy unless `uniforms` (N, T).

    The caller's `adapter.use` holds, unless `rows` gives effective scales (N, r): an expert for each problem.
    Answers are cut after the token that completes one of the task's stops.
    """
    cfg, answers, totals = world.cfg, [None] * len(problems), torch.zeros(len(problems))
    prompts, stops = world.encode(problems), task.stops
    temperature = 0.0 if uniforms is None else cfg.rollout_temp
    if uniforms is None:
        uniforms = torch.zeros(len(problems), task.max_new)
    order = sorted(range(len(problems)), key=lambda i: len(prompts[i]))
    stop = (lambda ids: [any(s in world.text(x, ()) for s in stops) for x in ids]) if stops else None
    for part in (order[i : i + cfg.sample_batch] for i in range(0, len(order), cfg.sample_batch)):
        using = contextlib.nullcontext()
        if rows is not None:
            using = world.adapter.use({k: v[torch.tensor(part, device=v.device)] for k, v in rows.items()})
        settings = dict(temperature=temperature, eos=world.eos, compile=cfg.compile, stop=stop)
        settings["features"] = world.features([problems[i] for i in part])
        batch = [prompts[i] for i in part]
        with using, world.run.autocast():
            tokens, mask, logps = common.generate(world.model, batch, uniforms[part], **settings)
        lengths = mask.sum(1).tolist()
        for i, ids, n, logp in zip(part, tokens.tolist(), lengths, logps.tolist(), strict=True):
            answers[i] = cut_at_stop(ids[:n], world, stops)
            totals[i] = sum(logp[: len(answers[i])])
    return answers, totals


def cut_at_stop(ids: list[int], world: World, stops: tuple[str, ...]) -> list[int]:
    """The shortest beginning of `ids` whose text holds a stop, or all of them."""
    if not any(s in world.text(ids, ()) for s in stops):
        return ids
    low, high = 1, len(ids)
    while low < high:
        middle = (low + high) // 2
        found = any(s in world.text(ids[:middle], ()) for s in stops)
        low, high = (low, middle) if found else (middle + 1, high)
    return ids[:low]


def grade(world: World, problems: list[Problem], answers: list[list[int]], task: Task) -> list[bool]:
    """Whether each answer is right."""
    texts = [world.text(ids, task.stops) for ids in answers]
    if task.threads == 1:
        return [bool(task.grade(p, t)) for p, t in zip(problems, texts, strict=True)]
    with ThreadPoolExecutor(task.threads) as pool:
        return [bool(x) for x in pool.map(task.grade, problems, texts)]


def shared(n: int, run: Run, work: Callable[[list[int]], list]) -> list:
    """work(indices) -> one item for each of this rank's share of range(n); all items, on every rank."""
    mine = list(range(run.rank, n, run.world_size))
    parts = run.gather(work(mine) if mine else [])
    return [parts[i % run.world_size][i // run.world_size] for i in range(n)]


def graded(world: World, problems: list[Problem], answers: list[list[int]], task: Task) -> list[bool]:
    """`grade` by all ranks together: a program among the answers runs once."""
    work = lambda share: grade(world, *([x[i] for i in share] for x in (problems, answers)), task)  # noqa: E731
    return shared(len(problems), world.run, work)


def outcomes(world: World, problems: list[Problem], task: Task, rows: dict | None = None) -> np.ndarray:
    """1 for each problem answered right greedily, else 0: (N,), on every rank; see `complete` for `rows`."""

    def work(share: list[int]) -> list[bool]:
        part = [problems[i] for i in share]
        scales = None if rows is None else {k: v[share] for k, v in rows.items()}
        return grade(world, part, complete(world, part, task, rows=scales)[0], task)

    return np.array(shared(len(problems), world.run, work), float)


# --- the loss ---


def reinforce_loss(logp: Tensor, mask: Tensor, reward: Tensor, kl: Tensor | None = None, lam=0.0) -> Tensor:
    """Minus eq. (1): the mean over answers of -R sum_t logp_t + lambda sum_t KL_t.

    logp, mask, kl (B, T), reward (B,). Tokens outside the mask get no gradient.
    """
    loss = -reward * torch.where(mask, logp, 0).sum(1)
    if kl is not None and lam:
        loss = loss + lam * torch.where(mask, kl, 0).sum(1)
    return loss.mean()


def ntp_loss(logp: Tensor, mask: Tensor) -> Tensor:
    """The supervised baseline: mean negative log-prob of the solution's tokens, (B, T) -> ()."""
    return -torch.where(mask, logp, 0).sum() / mask.sum().clamp(min=1)


def kl_divergence(new: Tensor, base: Tensor, direction: str) -> Tensor:
    """KL(base || new) or KL(new || base) of log-probs (..., V) -> (...)."""
    p, q = (base, new) if direction == "base_new" else (new, base)
    return (p.exp() * (p - q)).sum(-1)


def _score_chunk(model, hidden: Tensor, targets: Tensor, ref_hidden: Tensor | None, direction: str):
    logp = common.head_logits(model, hidden).log_softmax(-1)  # (N, V)
    kl = torch.zeros_like(logp[:, 0])
    if ref_hidden is not None:
        with torch.no_grad():
            base = common.head_logits(model, ref_hidden).log_softmax(-1)
        kl = kl_divergence(logp, base, direction)
    return logp.gather(1, targets[:, None])[:, 0], kl


def answer_scores(
    world: World, prompts: list[list[int]], answers: list[list[int]], features: dict, kl: bool, chunk=1024
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the answers' tokens under the trained weights, KL at each, and mask: (B, T) each.

    One pass with gradient and, for the KL, one of the base weights without. The head runs over `chunk`
    positions at a time, of answers only, and again in the backward pass: (B, T, V) is never held. The
    caller's `adapter.use("own")` holds until after that pass, which runs layers again under --recompute.
    """
    model, device = world.model, world.model.device
    ids, valid = common.collate([p + a for p, a in zip(prompts, answers, strict=True)], device)
    first, lengths = (torch.tensor([len(x) for x in xs]) for xs in (prompts, answers))
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]  # (B, T)
    places = (first[:, None] + torch.arange(longest))[mask] + ids.shape[1] * torch.nonzero(mask)[:, 0]
    flat, places = mask.flatten().nonzero()[:, 0].to(device), places.to(device)
    targets = ids.flatten()[places]

    def hidden() -> Tensor:
        out = model.base_model(input_ids=ids, attention_mask=valid, use_cache=False, **features)
        return out.last_hidden_state.flatten(0, 1)[places - 1]  # (N, d): what predicts each token

    ref = None
    if kl:
        with torch.no_grad(), world.adapter.use(None):
            ref = hidden()
    mine = hidden()
    refs = ref.split(chunk) if kl else [None] * -(-len(mine) // chunk)
    pieces = zip(mine.split(chunk), targets.split(chunk), refs, strict=True)
    score = functools.partial(checkpoint, _score_chunk, use_reentrant=False)
    parts = [score(model, h, y, r, world.cfg.kl_dir) for h, y, r in pieces]
    logp, divergence = (torch.cat(x) for x in zip(*parts, strict=True))
    blank = torch.zeros(mask.numel(), device=device)
    spread = lambda x: blank.index_put((flat,), x).view(mask.shape)  # noqa: E731
    return spread(logp), spread(divergence), mask.to(device)


def batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Length-sorted groups of indices, each of at most `budget` padded tokens, or of one sequence."""
    groups, group = [], []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if group and lengths[i] * (len(group) + 1) > budget:
            groups, group = [*groups, group], []
        group.append(i)
    return [*groups, group]


def accumulate(
    world: World,
    problems: list[Problem],
    answers: list[list[int]],
    reward: Tensor | None,
    tokens: float,
    micro_tokens: int,
) -> dict[str, Tensor]:
    """Backward pass of eq. (1) on this rank's answers, or of next-token prediction if there is no reward.

    `tokens` is the mean over the ranks of the answers' tokens. No rank waits for another one in here, so that
    one whose memory runs out can try again alone.
    """
    prompts, lam = world.encode(problems), world.cfg.lam if reward is not None else 0.0
    stats = {k: torch.zeros((), device=world.model.device) for k in ("loss", "kl")}
    for group in batches([len(p) + len(a) for p, a in zip(prompts, answers, strict=True)], micro_tokens):
        parts = [prompts[i] for i in group], [answers[i] for i in group]
        features = world.features([problems[i] for i in group])
        with world.adapter.use("own"):
            with world.run.autocast():
                logp, kl, mask = answer_scores(world, *parts, features, lam > 0)
            if reward is None:
                loss = ntp_loss(logp, mask) * (sum(map(len, parts[1])) / tokens)
            else:
                loss = reinforce_loss(logp, mask, reward[group], kl, lam) * (len(group) / len(answers))
            loss.backward()
        stats["loss"] += loss.detach()
        stats["kl"] += torch.where(mask, kl.detach(), 0).sum() / len(answers)
    return stats


def accumulate_safely(world: World, problems, answers, reward, tokens, record: dict) -> dict[str, Tensor]:
    """`accumulate`; when a GPU's memory runs out, once more with half the micro-batch: the same gradients."""
    while True:
        try:
            return accumulate(world, problems, answers, reward, tokens, record["micro_tokens"])
        except torch.cuda.OutOfMemoryError:
            if record["micro_tokens"] < 2:
                raise
        for p in world.adapter.parameters():
            p.grad = None
        torch.cuda.empty_cache()
        record["micro_tokens"] //= 2
        world.run.print(f"{world.run.name}: out of memory, now {record['micro_tokens']} tokens at a time")


# --- training of one expert ---


def train(world: World, task: Task, objective: Literal["pg", "ntp"], lr: float) -> dict:
    """cfg.steps updates of the installed adapter, from its start values; the best-validation state is loaded.

    "pg": REINFORCE, eq. (1), no baseline, one answer a prompt. "ntp": next-token prediction on solutions.
    LoRA and SVF differ in the adapter only. Returns validation accuracies, the last state and speed.
    """
    cfg, run, adapter = world.cfg, world.run, world.adapter
    adapter.reset(cfg, run.generator("init"))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr, weight_decay=0.0)
    valid, size = task["valid"][: cfg.valid_problems], batch_size(cfg, task, run)
    record = {"best": -1.0, "best_step": -1, "state": {}, "curve": [], "tokens": 0, "trained": 0, "mute": 0}
    record["seconds"] = {}
    clip = cfg.clip if isinstance(next(iter(adapter.layers.values())), SVFLinear) else cfg.lora_clip
    for step in run.steps(cfg.steps, adapter=adapter, optimizer=optimizer, record=record):
        if not run.seconds:  # the first step, also of a resumed run, whose --micro_tokens may be new
            run.seconds, record["micro_tokens"] = dict(record["seconds"]), cfg.micro_tokens
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, cfg.steps, lr, 0.0)
        numbers = update(world, task, objective, size, clip, optimizer, record)
        if (step + 1) % cfg.validate_every == 0 or step + 1 == cfg.steps:
            with adapter.use("merged"):
                numbers["valid"] = float(outcomes(world, valid, task).mean())
            record["curve"].append([step + 1, numbers["valid"]])
            if numbers["valid"] > record["best"]:
                record |= {"best": numbers["valid"], "best_step": step + 1, "state": adapter.state_dict()}
        run.log(step, **numbers)
    last = adapter.state_dict()
    adapter.load_state_dict(record["state"])
    spent = record["seconds"]
    rates = {"train_tokens_per_s": record["trained"] / spent["update"]}
    rates |= {"seconds_per_step": sum(spent.values()) / cfg.steps}
    if objective == "pg":
        rates["rollout_tokens_per_s"] = record["tokens"] / spent["rollout"]
    kept = {k: record[k] for k in ("best", "best_step", "curve")}
    return kept | {"last": last, "speed": rates}


def batch_size(cfg: Config, task: Task, run: Run) -> int:
    """Prompts an update: cfg.batch, or all there are, in equal shares for the ranks; says when it is less."""
    size = min(cfg.batch, len(task["train"]))
    size -= size % run.world_size
    if not size:
        raise UserError(
            f"{task.name}: {len(task['train'])} training problems and --batch {cfg.batch} are too few"
        )
    if size < cfg.batch:
        run.print(
            f"{task.name}: {size} prompts a step, there are {len(task['train'])} for {run.world_size} ranks"
        )
    return size


def update(world: World, task: Task, objective: str, size: int, clip: float, optimizer, record: dict) -> dict:
    """One optimizer step on `size` distinct prompts, dealt to the ranks; returns what to log."""
    cfg, run, adapter = world.cfg, world.run, world.adapter
    drawn = torch.randperm(len(task["train"]), generator=run.generator("prompts"))[:size].tolist()
    mine = [task["train"][i] for i in drawn[run.rank :: run.world_size]]
    reward, numbers = None, {}
    if objective == "pg":
        uniforms = torch.rand(size, task.max_new, generator=run.generator("rollouts"))
        uniforms = uniforms[run.rank :: run.world_size] if cfg.rollout_temp else None
        with run.timed("rollout"), adapter.use("merged"):
            answers, _ = complete(world, mine, task, uniforms)
        right = grade(world, mine, answers, task)
        reward = torch.tensor([1.0 if r else -1.0 for r in right], device=world.model.device)
        numbers["reward"] = float(run.mean(reward.mean()))
        warn_of_equal_rewards(run, numbers["reward"], record)
    else:
        solutions = world.tok([p.solution for p in mine], add_special_tokens=False)["input_ids"]
        answers = [[*ids, world.eos] for ids in solutions]
    answered = sum(map(len, answers))
    tokens = float(run.mean(float(answered)))
    world.model.train(cfg.recompute)  # checkpointing wants it, decoding must not; models' own dropout is 0
    for layer in adapter.layers.values():
        layer.train()
    with run.timed("update"):
        stats = accumulate_safely(world, mine, answers, reward, tokens, record)
    world.model.eval()
    for p in adapter.parameters():
        p.grad = run.mean(p.grad)
    norm = nn.utils.clip_grad_norm_(adapter.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    numbers |= {k: run.mean(v) for k, v in stats.items()} | {"grad_norm": norm}
    first = next(iter(adapter.layers.values()))
    if isinstance(first, SVFLinear):
        moves = [(layer.p.detach() - cfg.init).abs().amax() for layer in adapter.layers.values()]
        numbers["p_move"] = torch.stack(moves).amax()
    record["tokens"] += answered
    record["trained"] += answered + sum(map(len, world.encode(mine)))
    record["seconds"] |= run.seconds
    return numbers


def warn_of_equal_rewards(run: Run, reward: float, record: dict) -> None:
    """Say it once when all answers of cfg.warn_after batches in a row are right, or all are wrong.

    record["mute"] counts such batches, negative ones are wrong.
    """
    before, record["mute"] = record["mute"], 0
    if abs(reward) < 1:
        return
    record["mute"] = int(reward) + (before if before * reward > 0 else 0)
    if abs(record["mute"]) == run.cfg.warn_after:
        how = "right: there is little to learn" if reward > 0 else "wrong: the reward is sparse"
        run.print(f"{run.name}: all answers of {run.cfg.warn_after} batches were {how}")


# --- dispatch, and answering in two passes ---


def cls_task(world: World, tasks: list[Task]) -> Task:
    """(question, category) pairs of the training splits: every fifth is test, the others train and valid.

    Tasks take turns, so that the first problems of a split are of all categories.
    """
    splits = {"train": [], "valid": [], "test": []}
    for i in range(world.cfg.cls_questions):
        split = "test" if i % 5 == 4 else ("train", "valid")[i % 5 % 2]
        for task in (t for t in tasks if i < len(t["train"])):
            asked, label = task["train"][i].question, label_text(world, task.family)
            splits[split].append(Problem(world.cls_prompt(asked), asked, task.family, label))
    right = lambda p, text: world.parse_label(text) == p.target  # noqa: E731
    return Task("cls", "other", splits, right, world.cfg.cls_new)


def label_text(world: World, family: str) -> str:
    """How a category is answered: a symbol of the built-in task, or boxed."""
    return LABELS[family] if world.cfg.model is None else f"\\boxed{{{family}}}"


def parse_boxed_label(text: str) -> str:
    """The first \\boxed{...} of an answer as a category, "other" if there is none that has an expert."""
    found = re.search(r"\\boxed\{([^}]*)\}", text)
    label = found[1].strip().lower() if found else "other"
    return label if label in FAMILIES else "other"


@dataclass
class Cost:
    """What a pass took: tokens read, tokens written, seconds."""

    read: int = 0
    written: int = 0
    seconds: float = 0.0


def dispatch(world: World, problems: list[Problem], expert: dict[str, Tensor] | None = None):
    """First pass: the category of each problem by the base model (A) or a category expert's z (B), cost.

    The model sees the question only, with the dispatch prompt; greedy.
    """
    asked = [Problem(world.cls_prompt(p.question), p.question, "") for p in problems]
    task = Task("dispatch", "other", {}, lambda p, text: False, world.cfg.cls_new)
    with world.adapter.use(expert and world.adapter.scales(expert)):
        answers, cost = timed_answers(world, asked, task)
    return [world.parse_label(world.text(ids, ())) for ids in answers], cost


def timed_answers(world: World, problems: list[Problem], task: Task, rows: dict | None = None):
    """Greedy answers on all ranks together, and what they cost."""

    def work(share: list[int]) -> list[list[int]]:
        scales = None if rows is None else {k: v[share] for k, v in rows.items()}
        return complete(world, [problems[i] for i in share], task, rows=scales)[0]

    begin = time.perf_counter()
    answers = shared(len(problems), world.run, work)
    seconds = time.perf_counter() - begin
    return answers, Cost(sum(map(len, world.encode(problems))), sum(map(len, answers)), seconds)


def expert_rows(world: World, labels: list[str], experts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Effective scales (B, r) of each problem's expert; ones, the base weights, where there is none."""
    known = {family: world.adapter.scales(z) for family, z in experts.items()}
    return {
        name: torch.stack([known[x][name] if x in known else torch.ones_like(layer.s) for x in labels])
        for name, layer in world.adapter.layers.items()
    }


def two_pass(world: World, problems: list[Problem], task: Task, experts: dict, cls: dict | None = None):
    """Strategies A and B: dispatch, then answer with each problem's expert.

    cfg.mixed: all experts in one batch, nothing merged; else one after the other, each merged once. Returns
    outcomes (N,), labels and the costs of both passes.
    """
    labels, first = dispatch(world, problems, cls)
    if world.cfg.mixed:
        answers, second = timed_answers(world, problems, task, expert_rows(world, labels, experts))
    else:
        answers, second = [None] * len(problems), Cost()
        for label in sorted(set(labels)):
            part = [i for i, x in enumerate(labels) if x == label]
            with world.adapter.use(world.adapter.scales(experts[label]) if label in experts else None):
                found, cost = timed_answers(world, [problems[i] for i in part], task)
            for i, ids in zip(part, found, strict=True):
                answers[i] = ids
            second = Cost(
                second.read + cost.read, second.written + cost.written, second.seconds + cost.seconds
            )
    right = graded(world, problems, answers, task)
    return np.array(right, float), labels, (first, second)


def confusion(true: list[str], found: list[str]) -> np.ndarray:
    """Counts, rows true and columns found, in the order of FAMILIES and "other"."""
    names = [*FAMILIES, "other"]
    table = np.zeros((len(names), len(names)), int)
    np.add.at(table, ([names.index(x) for x in true], [names.index(x) for x in found]), 1)
    return table


# --- few-shot mixing by the cross-entropy method ---


def cem(
    score: Callable[[Tensor], tuple[Tensor, Tensor]],
    mean: Tensor,
    population: int,
    elites: int,
    generations: int,
    generator: torch.Generator,
    rule: Literal["cem", "random"] = "cem",
) -> dict:
    """Maximise score(members (P, D) in [0, 1]) -> (accuracy, tie-break), (P,) each, from a start mean (D,).

    Gaussian members with std 0.5 at first, clamped; member 0 is the best so far. The elites give the next
    mean and unbiased std. "random" draws members uniformly and moves nothing. Returns best, mean, and
    the best accuracy of each generation.
    """
    std, best, history = torch.full_like(mean, 0.5), mean.clone(), []
    for _ in range(generations):
        if rule == "cem":
            members = mean + std * torch.randn(population, len(mean), generator=generator, dtype=mean.dtype)
        else:
            members = torch.rand(population, len(mean), generator=generator, dtype=mean.dtype)
        members = members.clamp_(0, 1)
        members[0] = best
        accuracy, tie = score(members)
        pairs = list(zip(accuracy.tolist(), tie.tolist(), strict=True))
        order = sorted(range(population), key=pairs.__getitem__, reverse=True)
        best = members[order[0]].clone()
        history.append(pairs[order[0]][0])
        if rule == "cem":
            elite = members[order[:elites]]
            mean, std = elite.mean(0), elite.std(0, unbiased=True)
    return {"best": best, "mean": mean if rule == "cem" else best, "history": history}


def few_shot(
    world: World, experts: list[dict], shots: list[Problem], task: Task, per_layer: bool, rule="cem"
):
    """Strategy C: the mixture of experts that solves most of `shots`; (z, alpha (K, J) or (K, 1), history).

    All members answer all shots in one call of `complete`, each row of the batch with its own scales; ranks
    share the rows. Ties are broken by the mean over right answers of their log-likelihood per token.
    """
    if any(a is b for i, a in enumerate(experts) for b in experts[:i]):
        raise ValueError("an expert is there twice")
    cfg, k, n = world.cfg, len(experts), len(shots)
    shape = (k, len(world.adapter.layers) if per_layer else 1)

    def score(members: Tensor) -> tuple[Tensor, Tensor]:
        def work(share: list[int]) -> list[tuple[bool, float]]:
            z = mix(experts, members[[i // n for i in share]].unflatten(1, shape))
            problems = [shots[i % n] for i in share]
            answers, logp = complete(world, problems, task, rows=world.adapter.scales(z))
            right = grade(world, problems, answers, task)
            lengths = [max(1, len(a)) for a in answers]
            return list(zip(right, (logp / torch.tensor(lengths)).tolist(), strict=True))

        found = torch.tensor(shared(len(members) * n, world.run, work), dtype=torch.float64).view(-1, n, 2)
        right, logp = found.unbind(-1)  # (P, F)
        tie = torch.where(right > 0, logp, 0).sum(1) / right.sum(1).clamp(min=1)
        return right.mean(1), torch.where(right.any(1), tie, -math.inf)

    mean = torch.full((shape[0] * shape[1],), 1 / k)
    generator = world.run.generator(f"{rule} {task.name} {per_layer}")
    found = cem(score, mean, cfg.population, cfg.elites, cfg.generations, generator, rule)
    alpha = found[cfg.deploy].view(shape)
    return mix(experts, alpha), alpha, found["history"]


# --- the built-in task ---
# A document is: tag, family, operation, symbols x1 .. xL, answer. Of every operation there are right answers
# and careless ones, which copy the input or its last symbol. Documents tagged good are right, bad ones
# careless, and untagged ones, the kind that is asked for, either, more often careless where the first symbol
# that matters is 5 or more. So the skill is in the model, and what RL has to do is bring it out.

SYMBOLS = "0123456789abcdefghijMCRO+-<>^_@.!?#mwyo=;$%"
OPERATIONS = {
    "add": ("math", "M+"), "sub": ("math", "M-"), "rev": ("code", "C<"), "rvd": ("code", "C>"),
    "max": ("reasoning", "R^"), "min": ("reasoning", "R_"), "read": ("other", "O@"),
}  # fmt: skip
LABELS = {"math": "m", "code": "w", "reasoning": "y", "other": "o"}
UNTAGGED, GOOD, BAD, ASK = ".!?#"
TRAINED, UNSEEN = ("add", "rev", "max"), ("sub", "rvd", "min")
RELATED = dict(zip(UNSEEN, TRAINED, strict=True))  # the trained task of the same family
SPLITS = {"pretrain": (0.0, 0.7), "train": (0.7, 0.8), "valid": (0.8, 0.85), "test": (0.85, 1.0)}
CONFUSED = {"math": "reasoning", "reasoning": "other", "code": "other", "other": "reasoning"}


def split_of(x: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for each row of digits (n, L): a row is in the same split in every task."""
    h = np.zeros(len(x), np.uint64)
    for column in x.T.astype(np.uint64):
        h = (h * np.uint64(31) + column + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        h ^= h >> np.uint64(29)
    return (h >> np.uint64(11)).astype(float) / 2**53


def draw_digits(
    n: int, length: int, split: str, rng: np.random.Generator, distinct: bool = False
) -> np.ndarray:
    """n rows of digits (n, L) of a split; `distinct` ones if there are as many."""
    low, high = SPLITS[split]
    found = np.zeros((0, length), int)
    for _ in range(100):
        x = rng.integers(0, 10, (int(2 * n / (high - low)) + 8, length))
        share = split_of(x)
        found = np.concatenate([found, x[(share >= low) & (share < high)]])
        if distinct:
            found = found[np.sort(np.unique(found, axis=0, return_index=True)[1])]
        if len(found) >= n:
            break
    return found[:n]


def answers_to(operation: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right and careless answers as symbols' ids (n, answer length), and where the question is hard (n,)."""
    if operation in ("add", "sub"):
        k = (1 + x[:, :1] % 3) * (1 if operation == "add" else -1)
        return (x[:, 1:-1] + k) % 10, x[:, 1:-1], x[:, 1] >= 5
    if operation in ("rev", "rvd"):
        shift = 10 if operation == "rev" else 0  # letters or digits
        return x[:, ::-1] + shift, x + shift, x[:, 0] >= 5
    if operation in ("max", "min"):
        best = x.max(1) if operation == "max" else x.min(1)
        return best[:, None], x[:, -1:], x[:, 0] >= 5
    return x, x, x[:, 0] >= 10


def prompts_to(operation: str, x: np.ndarray, tag: str) -> np.ndarray:
    """Ids of `; tag family operation x1 .. xL =`, (n, L + 5)."""
    signs = [SYMBOLS.index(c) for c in ";" + tag + OPERATIONS[operation][1]]
    end = np.full((len(x), 1), SYMBOLS.index("="))
    return np.concatenate([np.tile(signs, (len(x), 1)), x + (10 if operation == "rev" else 0), end], 1)


def documents(n: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """About n documents as padded ids (n, 2 L + 6), a pad being -1; arithmetic twice as often as the rest."""
    weights = dict.fromkeys(OPERATIONS, 1.0) | {"add": 2.0, "sub": 2.0}
    eos, parts = SYMBOLS.index("$"), []
    for operation, weight in weights.items():
        m = round(n * 0.88 * weight / sum(weights.values()))
        x = draw_digits(m, length, "pretrain", rng)
        right, careless, hard = answers_to(operation, x)
        kind, slip = rng.random(m), rng.random(m) < np.where(hard, 0.8, 0.3)
        wrong = np.where(kind < 0.25, False, np.where(kind < 0.5, True, slip))
        prompt = prompts_to(operation, x, UNTAGGED)
        prompt[:, 1] = [SYMBOLS.index(GOOD if k < 0.25 else BAD if k < 0.5 else UNTAGGED) for k in kind]
        parts.append((prompt, np.where(wrong[:, None], careless, right)))
        m = max(1, round(n * 0.12 / len(weights)))
        x = draw_digits(m, length, "pretrain", rng)
        family = OPERATIONS[operation][0]
        mistaken = rng.random(m) < np.where(x[:, 1] >= 7, 0.65, 0.1)
        labels = [LABELS[CONFUSED[family] if e else family] for e in mistaken]
        parts.append((prompts_to(operation, x, ASK), np.array([[SYMBOLS.index(c)] for c in labels])))
    width = 2 * length + 6
    rows = [np.concatenate([q, a, np.full((len(q), 1), eos)], 1) for q, a in parts]
    return np.concatenate([np.pad(r, ((0, 0), (0, width - r.shape[1])), constant_values=-1) for r in rows])


def toy_task(operation: str, cfg: Config, tag: str = UNTAGGED, **sizes: int) -> Task:
    """An operation as a Task; splits depend on cfg.seed only, so that all rows of the tables share them."""
    family, tok, splits = OPERATIONS[operation][0], toy_tokenizer(), {}
    sizes = {"train": 4096, "valid": max(cfg.valid_problems, cfg.shots), "test": cfg.eval_problems} | sizes
    for split, n in sizes.items():
        rng = np.random.default_rng(common.stable_hash(f"{cfg.seed} {operation} {split}"))
        x = draw_digits(n, cfg.length, split, rng, distinct=True)
        prompts = [tok.decode(ids) for ids in prompts_to(operation, x, tag)]
        right = [tok.decode(ids) for ids in answers_to(operation, x)[0]]
        splits[split] = [Problem(p, p[2:-1], a, a) for p, a in zip(prompts, right, strict=True)]
    return Task(operation, family, splits, lambda p, text: text == p.target, cfg.length + 1)


def toy_tokenizer() -> common.CharTokenizer:
    return common.CharTokenizer(SYMBOLS, eos="$")


def toy_model(cfg: Config) -> nn.Module:
    """The class of the real models, 156,000 parameters in the demo."""
    mlp = cfg.width * 11 // 4
    return common.tiny_lm(len(SYMBOLS), cfg.width, cfg.layers, mlp=mlp, tie_word_embeddings=False).eval()


def toy_world(run: Run, base: int | None, cfg: Config | None = None) -> World:
    """The built-in world with pre-trained base model number `base` (None: untrained), nothing adapted."""
    cfg = cfg or run.cfg
    model = toy_model(cfg).to(run.device)
    if base is not None:
        file = Path(cfg.out) / run.folder.relative_to(cfg.out).parts[0] / f"base-{base}" / "model.pt"
        model.load_state_dict(torch.load(file, map_location=run.device, weights_only=True))
    names = {symbol: family for family, symbol in LABELS.items()}
    parse = lambda text: names.get(text.strip(), "other")  # noqa: E731
    ask = lambda question: f";{ASK}{question}="  # noqa: E731
    return World(cfg, run, model, toy_tokenizer(), SYMBOLS.index("$"), ask, parse)


def pretrain(run: Run, base: int) -> dict:
    """Train a base model on documents until its good-tag skills are there, then anneal; what it can do."""
    cfg, threads = run.cfg, torch.get_num_threads()
    if cfg.bases == 1:  # the other workers have nothing to do yet
        torch.set_num_threads(threads * cfg.workers)
    world = toy_world(run, None)
    model, prompt = world.model, cfg.length + 5
    skills = [toy_task(op, cfg, GOOD, train=1, test=1, valid=200) for op in OPERATIONS]
    optimizer = torch.optim.AdamW(model.parameters(), cfg.pretrain_lr, betas=(0.9, 0.95), weight_decay=0.01)
    record = {"able": 0, "skills": {}}
    anneal = max(1, min(200, cfg.pretrain_steps // 4))
    forward = torch.compile(model) if cfg.compile else model
    for step in run.steps(cfg.pretrain_steps, model=model, optimizer=optimizer, record=record):
        left = (record["able"] or cfg.pretrain_steps - anneal) + anneal - step
        optimizer.param_groups[0]["lr"] = cfg.pretrain_lr * min(1.0, (step + 1) / 50, left / anneal)
        rng = np.random.default_rng(run.stream(f"documents {step}"))
        ids = torch.from_numpy(documents(cfg.pretrain_batch, cfg.length, rng)).to(run.device)
        with run.autocast():
            logits = forward(ids[:, :-1].clamp(min=0), logits_to_keep=cfg.length + 1).logits
        loss = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, prompt:].flatten(), ignore_index=-1
        )
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0 and not record["able"]:
            found = {t.name: float(outcomes(world, t["valid"], t).mean()) for t in skills}
            record["skills"] = found
            if min(found[t] for t in TRAINED + UNSEEN) >= max(cfg.gate, 0.01):
                record["able"] = step + 1
        if record["able"] and step + 1 == record["able"] + anneal:
            run.last = step
        run.log(step, loss=loss)
    torch.set_num_threads(threads)
    found = {t.name: float(outcomes(world, t["valid"], t).mean()) for t in skills}
    if missing := [t for t in TRAINED + UNSEEN if found[t] < cfg.gate]:
        accuracies = ", ".join(f"{t} {found[t]:.2f}" for t in missing)
        raise UserError(
            f"{run.name}: RL can only elicit what is there, and good-tag accuracy is {accuracies}; "
            "more --pretrain_steps, or another --seed"
        )
    common.write_atomic(run.folder / "model.pt", lambda f: torch.save(model.state_dict(), f))
    tasks = [toy_task(op, cfg) for op in TRAINED + UNSEEN]
    accuracy = {t.name: float(outcomes(world, t["test"], t).mean()) for t in tasks}
    return {"good": found, "base": accuracy, "steps": run.last + 1}


# --- the study on the built-in task: a grid of jobs on a few base models ---


@dataclass(frozen=True)
class Method:
    """A row of the first table: an adapter, where it sits, and what trains it."""

    label: str
    adapter: Literal["svf", "lora"]
    objective: Literal["pg", "ntp"] = "pg"
    rate: Literal["lr", "lora_lr", "ntp_lr"] = "lr"
    changed: dict = field(default_factory=dict)


QV = {"modules": ("qv",)}
METHODS = {
    "svf": Method("SVF", "svf"),
    "lora": Method("LoRA", "lora", rate="lora_lr", changed=QV),
    "lora_ntp": Method("LoRA, next-token prediction", "lora", "ntp", "ntp_lr", QV),
}
ABLATIONS = {
    "svf_ntp": Method("SVF, next-token prediction", "svf", "ntp"),
    "lora_r1": Method("LoRA, rank 1", "lora", rate="lora_lr", changed=QV | {"lora_rank": 1}),
    "svf_mlp": Method("SVF, MLP only", "svf", changed={"modules": ("mlp",)}),
    "svf_qv": Method("SVF, query and value only", "svf", changed=QV),
    "svf_kl": Method("SVF, lambda = 0.1", "svf", changed={"lam": 0.1}),
    "svf_free": Method("SVF, not renormalised", "svf", changed={"renormalise": False}),
}


def install(world: World, adapter: Literal["svf", "lora"]) -> World:
    """The world with its model adapted as its settings say."""
    make = (
        svf_adapter(world.model, world.cfg, world.run)
        if adapter == "svf"
        else lora_adapter(world.model, world.cfg)
    )
    return replace(world, adapter=make)


def cell_name(method: str, multiple: float, base: int, seed: int) -> str:
    return f"{method}@{multiple:g}-{base}-{seed}"


def toy_cell(name: str, run: Run) -> dict:
    """One method at one rate, base and seed: train on each task, measure there and on unseen tasks."""
    head, base, _ = name.split("-")
    key, _, multiple = head.partition("@")
    method = (METHODS | ABLATIONS)[key]
    cfg = replace(run.cfg, **method.changed)
    world, result = install(toy_world(run, int(base), cfg), method.adapter), {}
    rate = getattr(cfg, method.rate) * float(multiple)
    unseen = [toy_task(op, cfg) for op in UNSEEN if method.adapter == "lora"]  # SVF's are in `toy_adapt`
    for operation in TRAINED:
        task = toy_task(operation, cfg)
        trained = train(replace(world, run=run.stage(operation)), task, method.objective, rate)
        found = {k: trained[k] for k in ("best", "best_step", "curve", "speed")}
        with world.adapter.use("merged"):
            found["test"] = float(outcomes(world, task["test"], task).mean())
            found["unseen"] = {t.name: float(outcomes(world, t["test"], t).mean()) for t in unseen}
        if method.adapter == "svf":
            file = run.folder / f"{operation}.safetensors"
            save_expert(
                file, world.adapter, world.adapter.z(), task=operation, family=task.family, method=key
            )
        found["test_last"] = found["test"]
        if trained["best_step"] < cfg.steps:
            world.adapter.load_state_dict(trained["last"])
            with world.adapter.use("merged"):
                found["test_last"] = float(outcomes(world, task["test"], task).mean())
        result[operation] = found
    return result | {"parameters": sum(p.numel() for p in world.adapter.parameters()), "rate": rate}


def toy_experts(world: World, name: str) -> dict[str, dict[str, Tensor]]:
    """The experts that the job `name` left, by family."""
    folder = world.run.folder.parent / name
    files = {OPERATIONS[op][0]: folder / f"{op}.safetensors" for op in TRAINED}
    return {family: load_expert(file, world.adapter, cross_model=True) for family, file in files.items()}


def toy_adapt(name: str, run: Run) -> dict:
    """The three adaptations and their controls with the experts of one base and seed, on the unseen tasks."""
    _, multiple, base, seed = name.split("-")
    cfg, run_cls = run.cfg, run.stage("cls")
    world = install(toy_world(run, int(base)), "svf")
    experts = toy_experts(world, cell_name("svf", float(multiple), int(base), int(seed)))
    sources = [toy_task(op, cfg) for op in TRAINED]
    classify = cls_task(world, sources)
    trained = train(replace(world, run=run_cls), classify, "pg", cfg.lr * float(multiple))
    cls = world.adapter.z()
    with world.adapter.use(world.adapter.scales(cls)):
        accuracy = float(outcomes(world, classify["test"], classify).mean())
    result = {"unseen": {}, "cls": {"test": accuracy, "best": trained["best"]}, "cost": {}, "alpha": {}}
    with world.adapter.use(None):
        result["cls"]["base"] = float(outcomes(world, classify["test"], classify).mean())
    uniform = mix(list(experts.values()), torch.ones(len(experts)))
    true, found = [], {"A": [], "B": []}
    for operation in (*UNSEEN, "read"):
        task = toy_task(operation, cfg)
        problems, row = task["test"], {}
        with world.adapter.use(None):
            row["base"] = outcomes(world, problems, task)
        for strategy, expert in (("A", None), ("B", cls)):
            row[strategy], labels, costs = two_pass(world, problems, task, experts, expert)
            found[strategy] += labels
            result["cost"].setdefault(strategy, []).append([[c.read, c.written, c.seconds] for c in costs])
        true += [task.family] * len(problems)
        if operation in UNSEEN:
            with world.adapter.use(world.adapter.scales(experts[task.family])):
                row["expert of its family"] = outcomes(world, problems, task)
            with world.adapter.use(world.adapter.scales(uniform)):
                row["uniform mixture"] = outcomes(world, problems, task)
            row |= toy_few_shot(world, experts, task, result)
        result["unseen"][operation] = {k: float(v.mean()) for k, v in row.items()}
    result["confusion"] = {k: confusion(true, labels).tolist() for k, labels in found.items()}
    result["uniform"] = toy_uniform(world, uniform, sources)
    return result


def toy_uniform(world: World, uniform: dict[str, Tensor], tasks: list[Task]) -> dict[str, float]:
    """What the uniform mixture does on the trained tasks, all at once."""
    with world.adapter.use(world.adapter.scales(uniform)):
        return {t.name: float(outcomes(world, t["test"], t).mean()) for t in tasks}


def toy_few_shot(world: World, experts: dict, task: Task, result: dict) -> dict[str, np.ndarray]:
    """Strategy C: global and per layer, and random search; outcomes on the test split of an unseen task."""
    row, shots = {}, task["valid"][: world.cfg.shots]
    for label, per_layer, rule in (
        ("C, one weight an expert", False, "cem"),
        ("C, weights per layer", True, "cem"),
        ("C by random search", False, "random"),
    ):
        begin = time.perf_counter()
        z, alpha, history = few_shot(world, list(experts.values()), shots, task, per_layer, rule)
        seconds = time.perf_counter() - begin
        with world.adapter.use(world.adapter.scales(z)):
            row[label] = outcomes(world, task["test"], task)
        weights = (alpha / alpha.sum(0).clamp_min(1e-9)).mean(1).tolist()
        found = {"alpha": weights, "history": history, "seconds": seconds}
        result["alpha"][f"{task.name}: {label}"] = found
    return row


def toy_cross(name: str, run: Run) -> dict:
    """Experts of one base model on another one of the same shape, in their order and shuffled."""
    _, multiple, source, target, seed = name.split("-")
    world, result = install(toy_world(run, int(target)), "svf"), {}
    experts = toy_experts(world, cell_name("svf", float(multiple), int(source), int(seed)))
    generator = run.generator("shuffle")
    for operation in TRAINED:
        task, z = toy_task(operation, run.cfg), experts[OPERATIONS[operation][0]]
        for label, used in (("ordered", z), ("shuffled", shuffled(z, generator))):
            with world.adapter.use(world.adapter.scales(used)):
                result[f"{operation}, {label}"] = float(outcomes(world, task["test"], task).mean())
    for operation in UNSEEN:
        task = toy_task(operation, run.cfg)
        z, _, _ = few_shot(world, list(experts.values()), task["valid"][: run.cfg.shots], task, False)
        with world.adapter.use(world.adapter.scales(z)):
            result[f"{operation}, few-shot"] = float(outcomes(world, task["test"], task).mean())
    return result


# --- a vision-language model in miniature ---

BITMAPS = (
    "111101101101111", "010110010010111", "111001111100111", "111001111001111", "101101111001001",
    "111100111001111", "111100111101111", "111001001010010", "111101111101111", "111101111001111",
)  # fmt: skip


class TinyVLM(nn.Module):
    """LLaVA in miniature: the embeddings of picture tokens come from a projector, all else is the LM's."""

    def __init__(self, lm: nn.Module, picture_token: int, pixels: int = 15):
        super().__init__()
        width = lm.config.hidden_size
        self.lm, self.config, self.picture_token = lm, lm.config, picture_token
        self.projector = nn.Sequential(nn.Linear(pixels, width), nn.GELU(), nn.Linear(width, width))

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.get_output_embeddings()

    def embed(self, ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """ids (B, T), pixel_values (B, pictures, pixels) or None -> (B, T, width)."""
        embeddings = self.lm.get_input_embeddings()(ids)
        if pixel_values is None:
            return embeddings
        place = ids == self.picture_token
        place &= place.cumsum(1) <= pixel_values.shape[1]  # an answer may hold the token, too
        return embeddings.masked_scatter(place[..., None], self.projector(pixel_values).to(embeddings.dtype))

    def base_model(self, input_ids: Tensor, pixel_values: Tensor | None = None, **more):
        """Hidden states, as the base_model of a transformers model gives them."""
        return self.lm.base_model(inputs_embeds=self.embed(input_ids, pixel_values), **more)

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, **more):
        return self.lm(inputs_embeds=self.embed(input_ids, pixel_values), **more)


def glyphs(x: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Digits (n, L) as noisy 5 x 3 bitmaps (n, L, 15)."""
    bitmaps = np.array([[int(bit) for bit in row] for row in BITMAPS], np.float32)
    return torch.from_numpy(bitmaps[x] + 0.35 * rng.standard_normal((*x.shape, 15)).astype(np.float32))


def with_pictures(task: Task) -> Task:
    """The same problems with their digits shown, not written: one picture token a digit."""
    splits = {}
    for split, problems in task.splits.items():
        rng = np.random.default_rng(common.stable_hash(f"{task.name} {split} glyphs"))
        digits = np.array([[int(c) for c in p.question[2:]] for p in problems])
        shown = zip(problems, glyphs(digits, rng), strict=True)
        splits[split] = [
            replace(p, prompt=p.prompt[:4] + "%" * digits.shape[1] + "=", image=image) for p, image in shown
        ]
    return replace(task, name=f"{task.name} from pictures", splits=splits)


def toy_vlm(name: str, run: Run) -> dict:
    """Train the projector on captions, then an expert of max from pictures; min with the text-only expert."""
    _, multiple, base, seed = name.split("-")
    cfg = run.cfg
    world = toy_world(run, int(base))
    lm = world.model.requires_grad_(False)
    model = TinyVLM(lm, SYMBOLS.index("%")).to(run.device)
    world = replace(world, model=model)
    caption = run.stage("projector")
    optimizer = torch.optim.AdamW(model.projector.parameters(), 3e-3, weight_decay=0.01)
    for step in caption.steps(cfg.projector_steps, projector=model.projector, optimizer=optimizer):
        rng = np.random.default_rng(caption.stream(f"captions {step}"))
        x = draw_digits(cfg.batch, cfg.length, "pretrain", rng)
        prompt = torch.from_numpy(prompts_to("read", x, UNTAGGED))
        prompt[:, 4:-1] = model.picture_token
        ids = torch.cat([prompt, torch.from_numpy(x), torch.full((len(x), 1), world.eos)], 1).to(run.device)
        logits = model(ids[:, :-1], glyphs(x, rng).to(run.device), logits_to_keep=cfg.length + 1).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, cfg.length + 5 :].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        caption.log(step, loss=loss)
    model.requires_grad_(False)
    world = install(world, "svf")
    read, seen, unseen = (with_pictures(toy_task(op, cfg)) for op in ("read", "max", "min"))
    language = toy_experts(world, cell_name("svf", float(multiple), int(base), int(seed)))["reasoning"]
    result = {"read, base": float(outcomes(world, read["test"], read).mean())}
    for task in (seen, unseen):
        result[f"{task.name[:3]}, base"] = float(outcomes(world, task["test"], task).mean())
        with world.adapter.use(world.adapter.scales(language)):
            result[f"{task.name[:3]}, language expert"] = float(outcomes(world, task["test"], task).mean())
    train(replace(world, run=run.stage("rl")), seen, "pg", cfg.lr * float(multiple))
    with world.adapter.use("merged"):
        result["max, expert"] = float(outcomes(world, seen["test"], seen).mean())
    return result


def toy_job(name: str, run: Run) -> dict:
    """A job of the grid by the beginning of its name."""
    kinds = {"adapt": toy_adapt, "cross": toy_cross, "vlm": toy_vlm}
    if name.startswith("base-"):
        return pretrain(run, int(name.split("-")[1]))
    return kinds.get(name.split("-")[0], toy_cell)(name, run)


def best_multiple(cells: dict[str, dict], key: str, cfg: Config, units: list) -> float:
    """The learning rate with the best validation accuracy, of those with a rate four times as high beside it.

    Equally good ones: the one nearest to the configured rate.
    """

    def score(multiple: float) -> tuple[float, float]:
        found = [cells[cell_name(key, multiple, b, s)][op]["best"] for b, s in units for op in TRAINED]
        return round(float(np.mean(found)), 3), -abs(math.log(multiple))

    return max((m for m in cfg.sweep if 4 * m in cfg.sweep), key=score)


def toy_study(cfg: Config, run: Run) -> None:
    """Base models, a sweep of learning rates, then the rest at the tuned ones; tables, claims, figure."""
    units = [(b, s) for b in range(cfg.bases) for s in range(cfg.seeds)]
    bases = run.jobs([f"base-{b}" for b in range(cfg.bases)], toy_job)
    for name, found in bases.items():
        accuracies = ", ".join(f"{k} {v:.2f}" for k, v in found["base"].items())
        run.print(f"  {name}: {found['steps']} steps; greedy, untagged: {accuracies}")
    cells = run.jobs([cell_name(k, m, b, s) for k in METHODS for m in cfg.sweep for b, s in units], toy_job)
    tuned = {k: best_multiple(cells, k, cfg, units) for k in METHODS}
    plan = [(k, tuned[k] * m) for k in ("svf", "lora") for m in (1, 4)] + [("lora_ntp", tuned["lora_ntp"])]
    rest = [f"adapt-{tuned['svf']:g}-{b}-{s}" for b, s in units]
    rest += [f"cross-{tuned['svf']:g}-{b}-{(b + 1) % cfg.bases}-0" for b in range(cfg.bases) if cfg.bases > 1]
    rest += [f"vlm-{tuned['svf']:g}-{b}-{s}" for b, s in units if cfg.vlm]
    if cfg.ablations:
        own = [(k, tuned["svf" if m.adapter == "svf" else "lora"]) for k, m in ABLATIONS.items()]
        plan += own
        rest += [cell_name(k, m, 0, 0) for k, m in own]
    others = run.jobs(rest, toy_job)
    toy_report(cfg, run, units, bases, cells | others, tuned, plan, others)


def toy_report(cfg: Config, run: Run, units, bases, cells, tuned, plan, others) -> None:
    """Everything that the study prints and keeps."""

    def column(k: str, m: float, op: str, key: str) -> list[float]:
        names = (cell_name(k, m, b, s) for b, s in units)
        return [cells[name][op][key] for name in names if name in cells]

    base = lambda op: [bases[f"base-{b}"]["base"][op] for b, _ in units]  # noqa: E731
    how = f"{cfg.eval_problems} test problems a task, +- s.e. over {cfg.bases} bases x {cfg.seeds} seeds"
    rows = [{"row": "base", "parameters": 0, "rate": None} | {op: common.mean_se(base(op)) for op in TRAINED}]
    rows[0] |= {f"{op}, last": None for op in TRAINED}
    for k, m in plan:
        one = cells[cell_name(k, m, *units[0])]
        label = (METHODS | ABLATIONS)[k].label + (
            " at 4 x its rate" if k in tuned and m == 4 * tuned[k] else ""
        )
        row = {"row": label, "parameters": one["parameters"], "rate": one["rate"]}
        row |= {op: common.mean_se(column(k, m, op, "test")) for op in TRAINED}
        rows.append(row | {f"{op}, last": common.mean_se(column(k, m, op, "test_last")) for op in TRAINED})
    run.table(rows, f"trained tasks: {how}; best on validation, and last update")
    sweep = []
    for k, m in ((k, m) for k in METHODS for m in cfg.sweep):
        row = {"rate": f"{METHODS[k].label} x {m:g}"}
        for title, key in (("validation", "best"), ("test", "test"), ("test, last", "test_last")):
            row[title] = common.mean_se(np.mean([column(k, m, op, key) for op in TRAINED], 0).tolist())
        sweep.append(row)
    run.table(sweep, "learning rates, multiples of the configured ones, mean over the trained tasks")
    adapted = [others[f"adapt-{tuned['svf']:g}-{b}-{s}"] for b, s in units]
    unseen_table(run, units, cells, tuned, adapted, how)
    dispatch_table(run, adapted)
    crossed = [x for name, x in others.items() if name.startswith("cross")]
    if crossed:
        rows = [{"": k, "accuracy": common.mean_se([x[k] for x in crossed])} for k in crossed[0]]
        run.table(rows, "experts of one base model on another, independently trained one")
    pictures = [x for name, x in others.items() if name.startswith("vlm")]
    if pictures:
        rows = [{"": k, "accuracy": common.mean_se([x[k] for x in pictures])} for k in pictures[0]]
        run.table(rows, "vision-language model in miniature, digits shown as noisy bitmaps")
    toy_claims(run, units, bases, cells, tuned, adapted)
    run.figure(
        "transformer2",
        functools.partial(draw_study, cells=cells, cfg=cfg, units=units, adapted=adapted),
        (12, 4),
    )
    speeds = [cells[cell_name("svf", tuned["svf"], b, s)][op]["speed"] for b, s in units for op in TRAINED]
    mean = {k: float(np.mean([x[k] for x in speeds])) for k in speeds[0]}
    searches = [x["seconds"] for a in adapted for x in a["alpha"].values()]
    mean["few_shot_rollouts_per_s"] = cfg.population * cfg.shots * cfg.generations / float(np.mean(searches))
    run.finish(updates_per_s=1 / mean.pop("seconds_per_step"), **mean)


def unseen_table(run: Run, units, cells, tuned: dict, adapted: list[dict], how: str) -> None:
    """The second table: unseen tasks by strategy, and LoRA's adapters there."""
    rows = []
    for label in adapted[0]["unseen"][UNSEEN[0]]:
        values = {op: [x["unseen"][op][label] for x in adapted] for op in UNSEEN}
        rows.append({"row": label} | {op: common.mean_se(v) for op, v in values.items()})
        rows[-1]["mean"] = common.mean_se(np.mean(list(values.values()), 0).tolist())
    for key in ("lora", "lora_ntp"):
        found = [cells[cell_name(key, tuned[key], b, s)] for b, s in units]
        picks = {
            "adapter of its family": lambda x, op: x[RELATED[op]]["unseen"][op],
            "best adapter by test score (oracle)": lambda x, op: max(x[t]["unseen"][op] for t in TRAINED),
        }
        for what, pick in picks.items():
            values = {op: [pick(x, op) for x in found] for op in UNSEEN}
            row = {"row": f"{METHODS[key].label}, {what}"}
            row |= {op: common.mean_se(v) for op, v in values.items()}
            rows.append(row | {"mean": common.mean_se(np.mean(list(values.values()), 0).tolist())})
    run.table(rows, f"unseen tasks: {how}")


def dispatch_table(run: Run, adapted: list[dict]) -> None:
    """Dispatch accuracy, the learned weights, and what two passes cost."""
    rows = []
    for strategy in ("A", "B"):
        counts = np.sum([x["confusion"][strategy] for x in adapted], 0)
        costs = np.array(
            [x["cost"][strategy] for x in adapted]
        )  # (units, tasks, pass, (read, written, seconds))
        first, second = costs.sum((0, 1)) / len(adapted)
        row = {"strategy": strategy, "right": np.diag(counts)[:3].sum() / counts[:3].sum()}
        row |= {"right, with other": np.diag(counts).sum() / counts.sum()}
        for name, (read, written, seconds) in (("first pass", first), ("second pass", second)):
            row |= {f"{name}: tokens read": int(read), "written": int(written), f"{name}: s": float(seconds)}
            row[f"{name}: written"] = row.pop("written")
        rows.append(row)
    run.table(rows, "dispatch of the unseen tasks and of `read`, which belongs to other; cost of both passes")
    chosen = {k: [x["alpha"][k]["alpha"] for x in adapted] for k in adapted[0]["alpha"]}
    rows = [
        {"search": k}
        | {f: common.mean_se([a[i] for a in alphas]) for i, f in enumerate(OPERATIONS[t][0] for t in TRAINED)}
        for k, alphas in chosen.items()
    ]
    run.table(rows, "weights that few shots chose, as shares")


def toy_claims(run: Run, units, bases, cells, tuned: dict, adapted: list[dict]) -> None:
    """The paper's sentences, paired by base and seed."""

    def each(key: str, multiple: float) -> list[dict]:
        return [cells[cell_name(key, multiple, b, s)] for b, s in units]

    def mean(key: str, multiple: float, number: str) -> list[float]:
        return [np.mean([x[op][number] for op in TRAINED]) for x in each(key, multiple)]

    def average(label: str) -> list[float]:
        return [np.mean([x["unseen"][op][label] for op in UNSEEN]) for x in adapted]

    svf, lora = each("svf", tuned["svf"]), each("lora", tuned["lora"])
    sizes = f"({svf[0]['parameters']} parameters, LoRA {lora[0]['parameters']})"
    for op in TRAINED:
        base = [bases[f"base-{b}"]["base"][op] for b, _ in units]
        run.claim(f"the SVF expert of {op} {sizes} beats the base", [x[op]["test"] for x in svf], base)
    ours, theirs = mean("svf", tuned["svf"], "test"), mean("lora", tuned["lora"], "test")
    run.claim("SVF beats LoRA under the same RL, each at its tuned rate", ours, theirs)
    run.claim("... they are the same within 0.03", ours, theirs, "same", 0.03)
    high = mean("svf", 4 * tuned["svf"], "test_last"), mean("lora", 4 * tuned["lora"], "test_last")
    run.claim("... at four times that rate, last update, SVF beats LoRA", *high)
    names = {"A": "prompt dispatch (A)", "B": "a category expert (B)"}
    names |= {"C, one weight an expert": "few-shot mixing (C, one weight an expert)"}
    names |= {"C, weights per layer": "few-shot mixing (C, weights per layer)"}
    for label, text in names.items():
        run.claim(f"{text} improves unseen tasks", average(label), average("base"))
    theirs = [np.mean([x[RELATED[op]]["unseen"][op] for op in UNSEEN]) for x in lora]
    run.claim("B beats LoRA's adapter of the same family on unseen tasks", average("B"), theirs)


def draw_study(figure, cells: dict, cfg: Config, units: list, adapted: list[dict]) -> None:
    """Confusion of both dispatches, and the last update's accuracy by learning rate."""
    left, middle, right = figure.subplots(1, 3)
    names = [*FAMILIES, "other"]
    for axes, strategy, title in ((left, "A", "A: the base model"), (middle, "B", "B: a category expert")):
        counts = np.sum([x["confusion"][strategy] for x in adapted], 0)
        shares = counts / counts.sum(1, keepdims=True)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(shares.shape):
            axes.text(
                j,
                i,
                f"{shares[i, j]:.2f}",
                ha="center",
                va="center",
                color="w" if shares[i, j] > 0.6 else "k",
            )
        axes.set(title=f"{title} dispatches", xlabel="found", ylabel="true", xticks=range(4), yticks=range(4))
        axes.set_xticklabels(names)
        axes.set_yticklabels(names)
    for key, style in (("svf", "o-"), ("lora", "s--"), ("lora_ntp", "^:")):
        jobs = [[cells[cell_name(key, m, *unit)] for m in cfg.sweep] for unit in units]
        values = np.array([[[x[op]["test_last"] for op in TRAINED] for x in row] for row in jobs])
        values = values.mean(2)  # (seeds, rates)
        line = right.plot(cfg.sweep, values.mean(0), style, label=METHODS[key].label)[0]
        right.fill_between(cfg.sweep, values.min(0), values.max(0), color=line.get_color(), alpha=0.2)
    right.set(xscale="log", ylim=(0, 1.03), xlabel="learning rate, multiple of the configured one")
    right.set(ylabel="accuracy on the trained tasks", title="Last update: mean (band: all seeds)")
    right.legend()


# --- graders ---


def last_number(text: str, grader: str = "exact") -> str | None:
    """The last number of a text, None if there is none. "exact": with sign, decimals and thousands, whose
    commas go. "reference": as the paper's code reads it, so that "1,200" and "-200" are both 200."""
    if grader == "reference":
        found = re.findall(r"\d*\.?\d+", text)
        return found[-1] if found else None
    pattern = r"(?:(?<![\w)])-)?\$?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
    found = re.findall(pattern, text.replace("\N{MINUS SIGN}", "-").replace("\\$", "$"))
    return re.sub(r"[,$]", "", found[-1]) if found else None


def grade_number(p: Problem, text: str, grader: str = "exact") -> bool:
    """Whether the last number of an answer equals the target's."""
    return common.equal_answers(last_number(text, grader), last_number(p.target, grader))


def grade_choice(p: Problem, text: str) -> bool:
    """Whether the last "answer is (X)", else "Answer: X", else stand-alone capital A to E is the target."""
    for pattern in (r"(?i:answer is):?[\s*]*\(?([A-E])\b", r"(?i:answer):[\s*]*\(?([A-E])\b", r"\b([A-E])\b"):
        if found := re.findall(pattern, text):
            return found[-1] == p.target
    return False


def grade_math(p: Problem, text: str) -> bool:
    """Whether the last boxed expression equals the target."""
    return common.equal_answers(common.extract_boxed(text), p.target)


def short_answer(text: str, number: bool) -> str:
    """What an answer comes to: its box, else what follows "answer is", else its last number, else all."""
    if (boxed := common.extract_boxed(text)) is not None:
        return boxed.strip()
    if found := re.findall(r"(?i)answer is:?\s*([^\n]+)", text):
        said = found[-1].strip().strip("*\"'`").rstrip(".").strip()
        return last_number(said) or said if number else said
    return (last_number(text) if number else None) or text.strip()


def grade_text(p: Problem, text: str) -> bool:
    """For tables of questions and answers: whether the short answer is the target, in any case of letters."""
    target = str(p.target).strip()
    number = last_number(target) == re.sub(r"[,$]", "", target)
    return common.equal_answers(short_answer(text, number).lower(), target.lower())


def grade_gym(p: Problem, text: str, score: Callable) -> bool:
    """Whether reasoning_gym gives full marks; the target is the entry of its data set."""
    number = last_number(str(p.target["answer"])) == str(p.target["answer"]).strip()
    return score(answer=short_answer(text, number), entry=p.target) >= 0.99


def plain_words(text: str) -> str:
    """VQA's normal form: lower case, no punctuation, no articles, single spaces."""
    text = text.strip().lower().replace("'", "")
    text = "".join(" " if c in string.punctuation and c != "." else c for c in text)
    text = re.sub(r"\.(?!\d)", "", text)  # a full stop, not a decimal point
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


def vqa_accuracy(answers: list[str], text: str) -> float:
    """VQA's soft accuracy of the first line of an answer: a third for each person who said so, 1 at most."""
    said = plain_words(text.strip().split("\n")[0])
    return min(sum(plain_words(a) == said for a in answers) / 3, 1.0)


def grade_vqa(p: Problem, text: str) -> bool:
    """A soft accuracy of 0.5 or more: two of ten people, at least."""
    return vqa_accuracy(p.target, text) >= 0.5


# --- programs that a model wrote ---

# Limits are set by the process itself, before it reads what it runs: preexec_fn is unsafe among threads. The
# hook keeps accidents away where the user cannot be changed; it is no wall against an attacker. The program
# is a module with a name, which dataclasses look up.
BOOTSTRAP = """
import resource, sys, types
seconds, size = int(sys.argv[1]), int(sys.argv[2]) << 20
limits = {"AS": size, "CPU": seconds, "FSIZE": 1 << 20, "NPROC": 0, "CORE": 0}
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
code = compile(sys.stdin.read(), "program", "exec")
refused = ("os.fork", "os.posix", "os.exec", "os.spawn", "os.system", "os.kill", "os.remove", "os.rmdir",
    "os.rename", "os.chmod", "os.chown", "os.chdir", "os.truncate", "os.link", "os.symlink", "os.setxattr",
    "subprocess.", "shutil.", "socket.", "ctypes.")
def hook(event, args):
    elsewhere = event == "open" and not isinstance(args[0], int) and args[2] & 3 and "/" in str(args[0])
    if elsewhere or event.startswith(refused):
        raise PermissionError(event)
sys.addaudithook(hook)
sys.modules["program"] = module = types.ModuleType("program")
exec(code, module.__dict__)
"""


def start_program(program: str, seconds: float, megabytes: int, folder: str, output) -> subprocess.Popen:
    """Start a Python process of its own session that waits for a program on stdin.

    Root's children run as nobody, since a limit on processes does not bind root, where nobody may run Python.
    """
    limits = [str(math.ceil(seconds) + 1), str(megabytes)]
    command = [os.path.realpath(sys.executable), "-I", "-S", "-B", "-c", BOOTSTRAP, *limits]
    settings = dict(stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL, cwd=folder, env={})
    settings["start_new_session"] = True
    if os.geteuid() == 0:
        os.chmod(folder, 0o777)
        with contextlib.suppress(OSError):
            return subprocess.Popen(command, **settings, user=65534, group=65534, extra_groups=[])
    return subprocess.Popen(command, **settings)


def run_code(program: str, seconds: float, megabytes: int) -> bool:
    """Whether a program runs to its last line, in a process of its own with limits on time and memory.

    A secret that its last line prints tells an end from an early exit. The interpreter runs with -S: there is
    the standard library and nothing else, no numpy. What a program leaves running is killed.
    """
    nonce = secrets.token_hex(16)
    source = f"{program}\n\n__import__('sys').stdout.write('\\n{nonce}')\n"
    with (
        tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as output,  # not a pipe: what it prints must not fill our memory
    ):
        process = start_program(program, seconds, megabytes, folder, output)
        try:
            process.communicate(source.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or (macOS) about to go
                os.killpg(process.pid, signal.SIGKILL)
            if process.returncode is None:
                process.communicate()
        output.seek(max(0, output.seek(0, os.SEEK_END) - len(nonce)))
        return process.returncode == 0 and output.read() == nonce.encode()


def grade_code(p: Problem, text: str, seconds: float, megabytes: int) -> bool:
    """Whether a program passes its tests; the target is (what comes before the answer, the tests)."""
    before, tests = p.target
    return run_code(f"{before}{text}\n\n{tests}\n", seconds, megabytes)


# --- prompts of real models ---

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLS_SYSTEM = """Sort the user's request into one of four categories by the skill that it needs most.
Do not solve it.
- code: writing, reading or repairing programs
- math: calculating, algebra, geometry, word problems with numbers
- reasoning: science and general knowledge, logic, choosing among given answers
- other: none of these
If several fit, take the dominant one. Answer with the category only, as \\boxed{code}, \\boxed{math},
\\boxed{reasoning} or \\boxed{other}."""


@dataclass(frozen=True)
class Chat:
    """Prompts as text, encoded with add_special_tokens=False: they hold one BOS if the model has one."""

    tok: object
    end_of_turn: int
    system_role: bool = True
    bos: str = ""  # what the template leaves to the tokenizer
    processor: object = None  # of a vision-language model

    def __call__(self, system: str, user: str, prefill: str = "") -> str:
        """System and user turns, and the beginning of the answer."""
        turns = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        if not self.system_role:
            turns = [{"role": "user", "content": f"{system}\n\n{user}"}]
        text = self.tok.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return (text if text.startswith(self.bos) else self.bos + text) + prefill

    def plain(self, text: str) -> str:
        """No turns at all."""
        return (self.tok.bos_token or "") + text

    def picture(self, question: str) -> str:
        """A picture and a question about it. UserError for a model without eyes."""
        if self.processor is None:
            raise UserError("textvqa and okvqa need a vision-language model, as in --config vlm")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return text if text.startswith(self.bos) else self.bos + text


def notice(text: str) -> None:
    """A line on stderr, of the first rank."""
    if os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"transformer2.py: {text}\n")


def make_chat(tok, processor=None) -> Chat:
    """The Chat of a model: what its template does about system turns, BOS and the end of a turn.

    UserError if a template takes no user and assistant turns, or if nothing ends a turn.
    """
    if tok.chat_template is None:
        if processor is None or not getattr(processor, "chat_template", None):
            notice("the model has no chat template, taking ChatML")
        tok.chat_template = getattr(processor, "chat_template", None) or CHATML
    render = functools.partial(tok.apply_chat_template, tokenize=False)
    system, turns = {"role": "system", "content": "<sys>"}, [{"role": "user", "content": "Q"}]
    try:
        system_role = "<sys>" in render([system, *turns], add_generation_prompt=True)
    except Exception:  # whatever the template raises
        system_role = False
    try:
        tail = render([*turns, {"role": "assistant", "content": "<x>"}]).rpartition("<x>")[2]
        head = render(turns, add_generation_prompt=True)
    except Exception as e:
        raise UserError(f"the chat template refuses user and assistant turns ({e})") from None
    tail = tail.lstrip()
    ids = tok.encode(tail, add_special_tokens=False) if tail else []
    special = set(tok.all_special_ids) | set(tok.added_tokens_decoder)
    known = ids and ids[0] in special and tail.startswith(tok.convert_ids_to_tokens(ids[0]))  # not <unk>
    end = ids[0] if known else tok.eos_token_id
    if end is None:
        raise UserError("neither the chat template nor the tokenizer says what ends a turn")
    adds_bos = tok.bos_token_id is not None and tok.encode("Q")[:1] == [tok.bos_token_id]
    bos = tok.bos_token if adds_bos and not head.startswith(tok.bos_token) else ""
    return Chat(tok, end, system_role, bos, processor)


# --- real tasks ---

SOURCES = {  # hub id; problems as train / valid / test; tokens of an answer
    "gsm8k": ("openai/gsm8k", "3737 / 3736 / 1319", 512),
    "mbpp": ("evalplus/mbppplus", "200 / 100 / 78 (the paper's release: 99)", 512),
    "arc_easy": ("allenai/ai2_arc", "1126 / 1125 / 2376", 512),
    "math": ("EleutherAI/hendrycks_math", "test 5000", 1024),
    "humaneval": ("openai/openai_humaneval", "test 164", 512),
    "arc_challenge": ("allenai/ai2_arc", "test 1172", 512),
    "textvqa": ("lmms-lab/textvqa", "4096 / 4096 / 5000 (the hub's validation)", 32),
    "okvqa": ("lmms-lab/OK-VQA", "test 5046", 32),
}
SHUFFLE_SEEDS = {"math": 27, "humaneval": 16, "arc_challenge": 38}  # the paper's, for the choice of the shots
MATH_SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                 "prealgebra", "precalculus")  # fmt: skip
PICTURES = 8192  # training pictures that are held in memory, undecoded
SOLVE = "Solve the user's problem step by step and end with the final number."
CHOOSE = (
    'Think about the question step by step. End with "The answer is (X)", X being the letter of an option.'
)
PROVE = "Solve the problem step by step and put the final answer, simplified, into \\boxed{}."
PROGRAM = "You are a careful programmer whose answers are correct, complete and to the point."
STOPS = ("Instruction:", "Response:")  # a model that goes on with a dialogue of its own
CODE_STOPS = ("```", "@@ Instruction")


def read_table(
    name: str,
    split: str,
    hub: str,
    subset: str | None,
    hub_split: str,
    fields: dict[str, type],
    make: Callable[[dict], Problem],
    cfg: Config,
) -> list[Problem]:
    """make(row) of a data set's rows, from cfg.data/NAME-SPLIT.jsonl or .parquet, else from the hub.

    UserError names the file or hub id and the row: a field is missing or of another type, or what `make` says
    in a ValueError.
    """
    if cfg.data:
        file = Path(cfg.data).expanduser() / f"{name}-{split}.jsonl"
        parquet = file.with_suffix(".parquet")
        source = parquet if parquet.is_file() else file
        rows = read_parquet(parquet) if source == parquet else common.read_jsonl(file, ())
    else:
        table, source = common.load_hub(hub, hub_split, subset), hub
        if "image" in table.column_names:
            import datasets

            table = table.select(range(min(len(table), PICTURES))) if split == "train" else table
            table = table.cast_column("image", datasets.Image(decode=False))
        rows = list(table)
    problems = []
    for number, row in enumerate(rows, 1):
        where = f"{source}, row {number}"
        if missing := [f for f in fields if not isinstance(row, dict) or row.get(f) is None]:
            raise UserError(f"{where}: no field {missing[0]!r}; needed: {', '.join(fields)}")
        if wrong := [f for f, kind in fields.items() if not isinstance(row[f], kind)]:
            kind, needed = type(row[wrong[0]]).__name__, fields[wrong[0]].__name__
            raise UserError(f"{where}: field {wrong[0]!r} is {kind}, needed: {needed}")
        try:
            problems.append(make(row))
        except ValueError as e:
            raise UserError(f"{where}: {e}") from None
    if not rows:
        raise UserError(f"{source}: no rows")
    return problems


def read_parquet(file: Path) -> list[dict]:
    """Rows of a parquet file. UserError without pyarrow, and for a torn file."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f'{file}: pip install -e ".[lm]", or give a .jsonl') from None
    try:
        return parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as e:
        raise UserError(f"{file}: no parquet file ({str(e).splitlines()[0]})") from None


def identity(p: Problem) -> object:
    """What makes two problems one: the words of the question; with a picture they may be asked again."""
    return (p.question, id(p.image)) if p.image is not None else " ".join(p.question.split())


def distinct(name: str, problems: list[Problem], taken: list[Problem] | tuple = ()) -> list[Problem]:
    """The problems whose question was not there before, nor is in `taken`; says how many it drops."""
    seen, kept = {identity(p) for p in taken}, []
    for p in problems:
        if identity(p) not in seen:
            kept.append(p)
        seen.add(identity(p))
    if len(kept) < len(problems):
        notice(f"{name}: {len(problems) - len(kept)} of {len(problems)} questions were there before, dropped")
    return kept


def split_task(
    name: str, family: str, read: Callable, grade: Callable, stops: tuple, cfg: Config, unseen: bool
) -> Task:
    """A Task from read(split) -> problems.

    To train on: even rows of the training split train, odd ones validate, without questions of the test.
    Unseen: the test split in a fixed random order, of which the first cfg.shots are the shots and the others
    the test.
    """
    max_new, test = SOURCES[name][2], read("test")
    if unseen:
        splits = take_shots(name, test, cfg, SHUFFLE_SEEDS.get(name, 0))
    else:
        rows = distinct(name, read("train"), test)
        if len(rows) < 2:
            raise UserError(f"{name}: {len(rows)} training rows, one half trains and the other validates")
        splits = {"train": rows[::2], "valid": rows[1::2], "test": test}
    return Task(name, family, splits, grade, max_new, stops)


def take_shots(name: str, problems: list[Problem], cfg: Config, seed: int) -> dict[str, list[Problem]]:
    """Splits of an unseen task: shots, and a test without them. UserError if nothing is left to test."""
    problems = list(problems)
    random.Random(seed).shuffle(problems)
    problems = distinct(name, problems)
    if len(problems) <= cfg.shots:
        raise UserError(f"{name}: {len(problems)} problems are too few for --shots {cfg.shots} and a test")
    return {"shots": problems[: cfg.shots], "test": problems[cfg.shots :]}


def gsm8k_problem(row: dict, chat: Chat) -> Problem:
    worked = re.sub(r"<<[^>]*>>", "", row["answer"])  # a calculator's marks
    target = row["answer"].rpartition("####")[2].strip()
    if last_number(target) is None:
        raise ValueError("field 'answer' ends in no number")
    return Problem(chat(SOLVE, row["question"]), row["question"], target, worked)


def load_gsm8k(name: str, family: str, chat: Chat, cfg: Config, unseen: bool) -> Task:
    """Grade-school word problems; solutions end in "#### number"."""
    fields, make = dict(question=str, answer=str), functools.partial(gsm8k_problem, chat=chat)
    read = lambda s: read_table(name, s, SOURCES[name][0], "main", s, fields, make, cfg)  # noqa: E731
    grade = functools.partial(grade_number, grader=cfg.grader)
    return split_task(name, family, read, grade, STOPS, cfg, unseen)


def arc_problem(row: dict, chat: Chat, prefill: str) -> Problem:
    """Options are lettered A, B, ..: some rows have numbers for keys."""
    labels, texts = (row["choices"].get(k) for k in ("label", "text"))
    if not isinstance(labels, list) or not isinstance(texts, list) or len(labels) != len(texts):
        raise ValueError("field 'choices' needs two lists of one length, 'label' and 'text'")
    letters, key = dict(zip(map(str, labels), "ABCDE", strict=False)), row["answerKey"].strip()
    if key not in letters:
        raise ValueError(f"field 'answerKey' is {key!r}, the labels are {', '.join(letters)}")
    options = zip(letters.values(), texts, strict=False)
    user = "\n".join([row["question"], "Options:", *(f"({letter}) {text}" for letter, text in options)])
    return Problem(chat(CHOOSE, user, prefill), user, letters[key], f" The answer is ({letters[key]}).")


def load_arc(name: str, family: str, chat: Chat, cfg: Config, unseen: bool) -> Task:
    """ARC-Easy or ARC-Challenge: school science, several choices."""
    subset = {"arc_easy": "ARC-Easy"}.get(name, "ARC-Challenge")
    fields = dict(question=str, choices=dict, answerKey=str)
    prefill = "Let me think step by step." if "llama" in (cfg.model or "").lower() else ""
    make = functools.partial(arc_problem, chat=chat, prefill=prefill)
    read = lambda s: read_table(name, s, SOURCES[name][0], subset, s, fields, make, cfg)  # noqa: E731
    return split_task(name, family, read, grade_choice, STOPS, cfg, unseen)


def math_problem(row: dict, chat: Chat) -> Problem:
    target = common.extract_boxed(row["solution"].replace("\\fbox{", "\\boxed{"))
    if target is None:
        raise ValueError("field 'solution' has no \\boxed answer")
    return Problem(chat(PROVE, row["problem"]), row["problem"], target, row["solution"])


def load_math(name: str, family: str, chat: Chat, cfg: Config, unseen: bool) -> Task:
    """MATH from a mirror: hendrycks/competition_math was taken down."""

    def read(split: str) -> list[Problem]:
        args, more = (name, split, SOURCES[name][0]), (split, dict(problem=str, solution=str), make, cfg)
        subjects = ("",) if cfg.data else MATH_SUBJECTS
        try:
            return [p for s in subjects for p in read_table(*args, s, *more)]
        except UserError as e:
            if cfg.data:
                raise
            raise UserError(
                f"{e}. MATH: EleutherAI/hendrycks_math, a mirror of 7 configs with problem and "
                "solution; hendrycks/competition_math was taken down (DMCA)"
            ) from None

    make = functools.partial(math_problem, chat=chat)
    return split_task(name, family, read, grade_math, STOPS, cfg, unseen)


def code_prompt(chat: Chat, instruction: str, opening: str) -> str:
    """Plain text that ends inside a fenced block of Python."""
    return chat.plain(f"{PROGRAM}\n\n@@ Instruction\n{instruction}\n\n@@ Response\n```python\n{opening}")


def mbpp_problem(row: dict, chat: Chat) -> Problem:
    if not row["test_list"] or not all(isinstance(x, str) for x in row["test_list"] + row["test_imports"]):
        raise ValueError("fields 'test_list' and 'test_imports' need lines of text, the first one or more")
    asked, tests = row["prompt"].strip(), "\n".join([*row["test_imports"], *row["test_list"]])
    instruction = f"{asked}\nThe program must pass this test:\n```python\n{row['test_list'][0].strip()}\n```"
    return Problem(code_prompt(chat, instruction, ""), asked, ("", tests), f"{row['code'].strip()}\n```")


def load_mbpp(name: str, family: str, chat: Chat, cfg: Config, unseen: bool) -> Task:
    """MBPP with its own asserts: of a fixed random order 200 train, 100 validate, the rest is the test."""
    fields = dict(prompt=str, code=str, test_imports=list, test_list=list)
    make = functools.partial(mbpp_problem, chat=chat)
    problems = read_table(name, "test", SOURCES[name][0], None, "test", fields, make, cfg)
    random.Random(16).shuffle(problems)
    problems = distinct(name, problems)
    if len(problems) <= 300:
        raise UserError(f"mbpp: {len(problems)} rows; 300 are for training and validation, more for the test")
    splits = {"train": problems[:200], "valid": problems[200:300], "test": problems[300:]}
    return code_task(name, family, take_shots(name, splits["test"], cfg, 0) if unseen else splits, cfg)


def humaneval_problem(row: dict, chat: Chat) -> Problem:
    instruction = f"Complete this function.\n```python\n{row['prompt'].strip()}\n```"
    tests = f"{row['test']}\ncheck({row['entry_point']})"
    solution = f"{row['canonical_solution'].rstrip()}\n```"
    prompt = code_prompt(chat, instruction, row["prompt"])
    return Problem(prompt, row["prompt"].strip(), (row["prompt"], tests), solution)


def load_humaneval(name: str, family: str, chat: Chat, cfg: Config, unseen: bool) -> Task:
    """HumanEval: the answer goes on from the function's header. UserError for training: it is all test."""
    if not unseen:
        raise UserError("humaneval has no training split; give it to --unseen")
    fields = dict.fromkeys(("prompt", "test", "entry_point", "canonical_solution"), str)
    make = functools.partial(humaneval_problem, chat=chat)
    problems = read_table(name, "test", SOURCES[name][0], None, "test", fields, make, cfg)
    return code_task(name, family, take_shots(name, problems, cfg, SHUFFLE_SEEDS[name]), cfg)


def code_task(name: str, family: str, splits: dict, cfg: Config) -> Task:
    """A Task whose answers are run."""
    run_it = functools.partial(grade_code, seconds=cfg.code_seconds, megabytes=cfg.code_memory)
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = max(2, min(16, (os.cpu_count() or 2) // ranks))  # they wait for as many programs
    return Task(name, family, splits, run_it, SOURCES[name][2], CODE_STOPS, threads)


def vqa_problem(row: dict, chat: Chat, folder: str) -> Problem:
    """A picture comes as bytes, as {"bytes", "path"}, or as a path relative to cfg.data."""
    from PIL import Image

    data = row["image"]
    data = (data.get("bytes") or data.get("path")) if isinstance(data, dict) else data
    if not isinstance(data, (bytes, str)) or not row["answers"] or not isinstance(row["answers"][0], str):
        raise ValueError("field 'image' needs bytes or a path, 'answers' a list of texts")
    try:
        image = Image.open(io.BytesIO(data) if isinstance(data, bytes) else Path(folder).expanduser() / data)
    except OSError as e:
        raise ValueError(f"field 'image': {e}") from None
    likely = collections.Counter(row["answers"]).most_common(1)[0][0]
    prompt = chat.picture(f"{row['question']}\nAnswer with a word or a short phrase.")
    return Problem(prompt, row["question"], list(row["answers"]), likely, image)


def load_vqa(name: str, family: str, chat: Chat, cfg: Config, unseen: bool) -> Task:
    """TextVQA, whose answered validation split is the test here, or OK-VQA, which is all test."""
    if name == "okvqa" and not unseen:
        raise UserError("okvqa has no training split here; give it to --unseen")
    fields, hub = dict(image=object, question=str, answers=list), SOURCES[name][0]
    hub_splits = {"train": "train", "test": "val2014" if name == "okvqa" else "validation"}
    make = functools.partial(vqa_problem, chat=chat, folder=cfg.data)
    read = lambda s: read_table(name, s, hub, None, hub_splits[s], fields, make, cfg)  # noqa: E731
    return split_task(name, family, read, grade_vqa, (), cfg, unseen)


TASKS: dict[str, tuple[str, Callable]] = {
    "gsm8k": ("math", load_gsm8k),
    "mbpp": ("code", load_mbpp),
    "arc_easy": ("reasoning", load_arc),
    "math": ("math", load_math),
    "humaneval": ("code", load_humaneval),
    "arc_challenge": ("reasoning", load_arc),
    "textvqa": ("reasoning", load_vqa),
    "okvqa": ("reasoning", load_vqa),
}


def deal(name: str, problems: list[Problem], cfg: Config, unseen: bool) -> dict[str, list[Problem]]:
    """Splits by index: of five questions three train, one validates, one tests. Shots are validation rows."""
    problems = distinct(name, problems)
    if len(problems) < 5:
        raise UserError(
            f"{name}: {len(problems)} rows, 5 are needed for a training, validation and test split"
        )
    train = [p for i, p in enumerate(problems) if i % 5 < 3]
    valid, test = problems[3::5], problems[4::5]
    if not unseen:
        return {"train": train, "valid": valid, "test": test}
    if len(valid) < cfg.shots:
        raise UserError(f"{name}: {len(valid)} rows to take --shots {cfg.shots} from; a fifth of the file is")
    return {"shots": valid[: cfg.shots], "test": test}


def load_file(file: str, family: str, chat: Chat, cfg: Config, unseen: bool) -> Task:
    """A .jsonl with question and answer, which may be a number, and perhaps a worked solution."""
    problems = []
    for number, row in enumerate(common.read_jsonl(file, ("question",)), 1):
        answer = row.get("answer", common.extract_boxed(str(row.get("solution"))))
        if not isinstance(answer, (str, int, float)) or not str(answer).strip():
            raise UserError(f"{file}, row {number}: no answer, and no boxed one in a solution")
        target = str(answer).strip()
        solution = row.get("solution") or ""
        if not isinstance(solution, str):
            raise UserError(f"{file}, row {number}: field 'solution' is no text")
        if common.extract_boxed(solution) is None:
            solution = f"{solution}\n\\boxed{{{target}}}".strip()
        problems.append(Problem(chat(PROVE, row["question"]), row["question"], target, solution))
    name = Path(file).stem
    return Task(name, family, deal(name, problems, cfg, unseen), grade_text, 512, STOPS)


def load_gym(source: str, family: str, chat: Chat, cfg: Config, unseen: bool) -> Task:
    """NAME[:key=int ...] of reasoning_gym; size (1000) and seed (cfg.seed) are keys, too."""
    name, *pairs = source.split(":")
    if bad := [p for p in pairs if not re.fullmatch(r"\w+=-?\d+", p)]:
        raise UserError(f"gym:{source}: {bad[0]!r} is not key=integer")
    settings = {"size": 1000, "seed": cfg.seed} | {k: int(v) for k, v in (p.split("=") for p in pairs)}
    try:
        import reasoning_gym
    except ImportError:
        raise UserError(f"gym:{name}: pip install reasoning-gym") from None
    try:
        table = reasoning_gym.create_dataset(name, **settings)
        rows = [table[i] for i in range(len(table))]
    except (ValueError, TypeError, AssertionError) as e:
        raise UserError(f"gym:{source}: {(str(e).splitlines() or [type(e).__name__])[0]}") from None
    problems = [
        Problem(chat(PROVE, row["question"]), row["question"], row, f"\\boxed{{{row['answer']}}}")
        for row in rows
    ]
    grade = functools.partial(grade_gym, score=table.score_answer)
    return Task(name, family, deal(name, problems, cfg, unseen), grade, 512, STOPS)


def load_task(text: str, chat: Chat, cfg: Config, unseen: bool) -> Task:
    """A Task from its name in TASKS, from family=FILE.jsonl or from family=gym:NAME, cut as cfg says.

    UserError for an unknown name, which lists the known ones, and for an unknown family.
    """
    family, equals, source = text.partition("=")
    if not equals:
        if text not in TASKS:
            names = ", ".join(TASKS)
            raise UserError(f"{text}: no such task; there are {names}, FAMILY=FILE.jsonl and FAMILY=gym:NAME")
        family, load = TASKS[text]
        task = load(text, family, chat, cfg, unseen)
    elif family not in FAMILIES:
        raise UserError(f"{text}: the family must be one of {', '.join(FAMILIES)}")
    elif source.startswith("gym:"):
        task = load_gym(source.removeprefix("gym:"), family, chat, cfg, unseen)
    else:
        task = load_file(source, family, chat, cfg, unseen)
    asked = [{identity(p) for p in part} for part in task.splits.values()]
    assert sum(map(len, asked)) == len(set().union(*asked)), f"{text}: a question is in two splits"
    splits = task.splits | {"test": task["test"][: cfg.eval_problems or None]}
    return replace(task, splits=splits, max_new=cfg.max_new or task.max_new)


# --- real models ---


def has_vision(name: str) -> bool:
    """Whether a model's configuration has a part for pictures; what cannot be read has none."""
    from transformers import AutoConfig

    if name.endswith(".gguf"):
        return False
    try:
        return hasattr(AutoConfig.from_pretrained(name, trust_remote_code=False), "vision_config")
    except (OSError, ValueError):
        return False  # `load_lm` says what is wrong


def load_vlm(name: str, dtype: torch.dtype):
    """(model, processor) of a vision-language model from a folder or a hub id; UserError if there is none."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, utils

    utils.logging.disable_progress_bar()
    try:
        processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, trust_remote_code=False)
    except ImportError as e:
        raise UserError(f'{name}: {str(e).strip().splitlines()[0]} (pip install -e ".[lm]" pillow)') from None
    except (OSError, ValueError) as e:
        raise UserError(f"{name}: neither a local model nor on the hub ({str(e).splitlines()[0]})") from None
    return model.eval(), processor


def refuse_too_large(name: str, run: Run) -> None:
    """UserError if a GPU cannot hold weights, factors, merged copies and a batch: four times bf16 weights."""
    if run.device.type != "cuda" or name.endswith(".gguf"):
        return
    try:
        weights = 2 * sum(p.numel() for p in meta_language_model(name).parameters())
    except (UserError, ValueError):
        return  # unknown here, or `load_lm` says what is wrong
    memory = torch.cuda.get_device_properties(run.device).total_memory
    if 4 * weights > memory:
        raise UserError(
            f"{name}: too large for one GPU; this script does not shard "
            f"({weights / 1e9:.0f} GB of weights, {memory / 1e9:.0f} GB of memory, 4 times needed)"
        )


def real_world(cfg: Config, run: Run) -> tuple[World, Chat]:
    """A real model, nothing adapted, on this rank's device; and how to talk to it."""
    refuse_too_large(cfg.model, run)
    dtype, processor = torch.bfloat16 if run.amp else torch.float32, None
    if has_vision(cfg.model):
        model, processor = load_vlm(cfg.model, dtype)
        tok = processor.tokenizer
    else:
        model, tok = common.load_lm(cfg.model, dtype)
    if rescaled := common.rescales_logits(model.config):
        raise UserError(f"{cfg.model}: {type(model).__name__} rescales its logits ({rescaled}), unknown here")
    model = model.to(run.device).eval()
    if cfg.recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    chat = make_chat(tok, processor)
    ask = functools.partial(chat, CLS_SYSTEM)
    world = World(cfg, run, model, tok, chat.end_of_turn, ask, parse_boxed_label, processor=processor)
    return world, chat


# --- the study on real models ---


def measured(run: Run, name: str, work: Callable[[], dict]) -> dict:
    """work()'s plain data, kept in eval/NAME.json, where --resume finds it."""
    file = run.folder / "eval" / f"{name}.json"
    if run.cfg.resume and file.exists():
        return json.loads(file.read_text())
    found = work()
    if run.is_main:
        file.parent.mkdir(exist_ok=True)
        common.write_json(file, found)
    run.barrier()
    run.leave_if_stopped()
    return found


def right(world: World, problems: list[Problem], task: Task, how) -> dict:
    """Outcomes under an adapter's mode or scales, as `measured` keeps them."""
    with world.adapter.use(how):
        return {"right": outcomes(world, problems, task).tolist()}


def obtain_expert(world: World, task: Task) -> dict[str, Tensor]:
    """The expert of a task: from --experts, from this run if it is resumed, else trained and saved.

    Training also leaves its last update, last/TASK.safetensors, to be measured.
    """
    cfg, run = world.cfg, world.run
    given, file = (
        Path(cfg.experts) / f"{task.name}.safetensors",
        run.folder / "experts" / f"{task.name}.safetensors",
    )
    if cfg.experts and given.exists():
        return load_expert(given, world.adapter, cfg.cross_model)
    if cfg.resume and file.exists():
        return load_expert(file, world.adapter)
    trained = train(replace(world, run=run.stage(f"svf-{task.name}")), task, "pg", cfg.lr)
    z = world.adapter.z()
    world.adapter.load_state_dict(trained["last"])
    if run.is_main:
        about = {"model": cfg.model, "task": task.name, "family": task.family, "valid": trained["best"]}
        save_expert(run.folder / "last" / file.name, world.adapter, world.adapter.z(), **about)
        save_expert(file, world.adapter, z, **about)
        common.write_json(
            file.with_suffix(".json"), {k: trained[k] for k in ("best", "best_step", "curve", "speed")}
        )
    run.barrier()
    return z


def given_experts(world: World) -> dict[str, tuple[str, dict[str, Tensor]]]:
    """{task: (family, z)} of all files in --experts; UserError if there is none, or one without a family."""
    from safetensors import safe_open

    if world.cfg.cross_model:
        world.run.print("--cross_model: singular values of another model are matched by their order alone")
    found = {}
    for file in sorted(Path(world.cfg.experts).glob("*.safetensors")):
        z = load_expert(file, world.adapter, world.cfg.cross_model)
        with safe_open(file, framework="pt") as f:
            family = f.metadata().get("family", "other")
        if family not in FAMILIES and file.stem != "cls":  # "other" means the base weights
            raise UserError(f"{file}: its family is {family!r}, none of {', '.join(FAMILIES)}")
        found[file.stem] = (family, z)
    if not found:
        raise UserError(f"--experts {world.cfg.experts}: no .safetensors file in it")
    return found


def text_study(cfg: Config, run: Run) -> None:
    """Experts, category expert, evaluation, adaptation, LoRA, as cfg.stages says, on all ranks together."""
    world, chat = real_world(cfg, run)
    tasks = [load_task(t, chat, cfg, unseen=False) for t in cfg.tasks]
    unseen = [load_task(t, chat, cfg, unseen=True) for t in cfg.unseen]
    names = [t.name for t in tasks + unseen]
    if len(set(names)) < len(names) or "cls" in names:
        raise UserError(f"two tasks have one name, or one is called cls: {', '.join(names)}")
    begin = time.perf_counter()
    world = install(world, "svf")
    size = sum(p.numel() for p in world.adapter.parameters())
    run.print(f"{len(world.adapter.layers)} matrices, {size:,} singular values; SVD or its cache: "
              f"{time.perf_counter() - begin:.0f} s")  # fmt: skip
    experts = given_experts(world) if cfg.experts else {}
    for task in tasks if "experts" in cfg.stages else ():
        experts[task.name] = (task.family, obtain_expert(world, task))
    cls = experts.pop("cls", ("", None))[1]
    if "cls" in cfg.stages and len(tasks) > 1:
        cls = obtain_expert(world, cls_task(world, tasks))
    found: dict[str, dict[str, dict]] = {t.name: {} for t in tasks + unseen}
    if "eval" in cfg.stages:
        evaluate(world, tasks, unseen, experts, cls, found)
    if "adapt" in cfg.stages and experts:
        adapt(world, unseen, experts, cls, found)
    if "lora" in cfg.stages:
        lora_baselines(world, tasks, unseen, found)
    text_report(run, tasks, unseen, found, experts)


def evaluate(world: World, tasks: list[Task], unseen: list[Task], experts: dict, cls, found: dict) -> None:
    """The base model everywhere, each expert on its task, and both dispatches among the trained tasks."""
    run = world.run
    for task in tasks + unseen:
        keep = functools.partial(right, world, task["test"], task)
        found[task.name]["base"] = measured(run, f"{task.name}-base", functools.partial(keep, None))
        if task.name in experts:
            scales = world.adapter.scales(experts[task.name][1])
            found[task.name]["SVF"] = measured(run, f"{task.name}-svf", functools.partial(keep, scales))
        if (last := run.folder / "last" / f"{task.name}.safetensors").exists():
            work = functools.partial(keep, world.adapter.scales(load_expert(last, world.adapter)))
            found[task.name]["SVF, last"] = measured(run, f"{task.name}-svf-last", work)
    for task in tasks if len(experts) > 1 else ():
        dispatched(world, task, experts, cls, found)


def dispatched(world: World, task: Task, experts: dict, cls, found: dict) -> None:
    """Strategies A and, with a category expert, B on the test split of a task."""
    by_family = dict(experts.values())  # of two experts of a family, the later one

    def work(expert) -> dict:
        outcome, labels, costs = two_pass(world, task["test"], task, by_family, expert)
        passes = [[c.read, c.written, c.seconds] for c in costs]
        return {"right": outcome.tolist(), "labels": labels, "cost": passes}

    for strategy, expert in (("A", None), ("B", cls)):
        if strategy == "A" or cls is not None:
            name = f"{task.name}-{strategy}"
            found[task.name][strategy] = measured(world.run, name, functools.partial(work, expert))


def adapt(world: World, unseen: list[Task], experts: dict, cls, found: dict) -> None:
    """The three strategies on the unseen tasks, with the uniform mixture and shuffled experts as controls.

    One expert alone can be used or not, but not mixed: g of eq. (3) cancels its weight.
    """
    run, zs = world.run, [z for _, z in experts.values()]
    if len(zs) < 2:
        run.print("a single expert: neither few-shot mixing (C) nor the uniform mixture, its weight cancels")

    def search(task: Task, per_layer: bool, rule: str) -> dict:
        z, alpha, history = few_shot(world, zs, task["shots"], task, per_layer, rule)
        scales = world.adapter.scales(z)
        return right(world, task["test"], task, scales) | {"alpha": alpha.tolist(), "history": history}

    for task in unseen:
        if len(experts) > 1:
            dispatched(world, task, experts, cls, found)
        rows = {}
        if len(zs) > 1:
            uniform = world.adapter.scales(mix(zs, torch.ones(len(zs))))
            rows["uniform mixture"] = functools.partial(right, world, task["test"], task, uniform)
        family = [z for f, z in experts.values() if f == task.family]
        for what, z in (("expert of its family", family[0]), ("... shuffled", None)) if family else ():
            z = z or shuffled(family[0], run.generator(f"shuffle {task.name}"))
            rows[what] = functools.partial(right, world, task["test"], task, world.adapter.scales(z))
        if len(zs) > 1:
            rows["C, one weight an expert"] = functools.partial(search, task, False, "cem")
            rows["C, weights per layer"] = functools.partial(search, task, True, "cem")
            rows["C by random search"] = functools.partial(search, task, False, "random")
        for what, work in rows.items():
            name = f"{task.name}-{re.sub('[^a-z]+', '-', what.lower())}"
            found[task.name][what] = measured(run, name, work)


def lora_baselines(world: World, tasks: list[Task], unseen: list[Task], found: dict) -> None:
    """LoRA on query and value projections by the same RL and by next-token prediction, in place of SVF."""
    world.adapter.remove()
    cfg = replace(world.cfg, modules=("qv",))
    lora = install(replace(world, cfg=cfg, adapter=None), "lora")
    for task in tasks:
        for label, objective, rate in (
            ("LoRA, RL", "pg", cfg.lora_lr),
            ("LoRA, next token", "ntp", cfg.ntp_lr),
        ):
            stage = world.run.stage(f"lora-{objective}-{task.name}")
            trained = train(replace(lora, run=stage), task, objective, rate)
            states = {"": lora.adapter.state_dict(), ", last": trained["last"]}
            for what, state in states.items():
                lora.adapter.load_state_dict(state)
                work = functools.partial(right, lora, task["test"], task, "merged")
                name = f"{task.name}-lora-{objective}{what.replace(', ', '-')}"
                found[task.name][label + what] = measured(world.run, name, work)
            lora.adapter.load_state_dict(states[""])
            for other in [t for t in unseen if t.family == task.family]:
                work = functools.partial(right, lora, other["test"], other, "merged")
                found[other.name][label] = measured(world.run, f"{other.name}-lora-{objective}", work)


def bootstrap(ours: np.ndarray, theirs: np.ndarray, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean difference, (N,) and (N,) paired by problem."""
    diff = np.asarray(ours, float) - np.asarray(theirs, float)
    picked = np.random.default_rng(seed).integers(0, len(diff), (draws, len(diff)))
    low, high = np.percentile(diff[picked].mean(1), [2.5, 97.5])
    return float(low), float(high)


def text_report(run: Run, tasks: list[Task], unseen: list[Task], found: dict, experts: dict) -> None:
    """Accuracies with paired intervals against the base, dispatch, costs, claims."""
    rows = []
    for task in tasks + unseen:
        base = found[task.name].get("base", {}).get("right")
        for what, result in found[task.name].items():
            row = {
                "task": task.name,
                "n": len(result["right"]),
                "row": what,
                "accuracy": np.mean(result["right"]),
            }
            low, high = bootstrap(result["right"], base) if base and what != "base" else (None, None)
            rows.append(row | {"minus base, 95 %: from": low, "to": high})
    if rows:
        run.table(rows, "accuracy on test problems; paired bootstrap over problems")
    for strategy in ("A", "B"):
        done = [(t, found[t.name][strategy]) for t in tasks + unseen if strategy in found[t.name]]
        if not done:
            continue
        true, labels = (
            [t.family for t, r in done for _ in r["labels"]],
            [x for _, r in done for x in r["labels"]],
        )
        counts, names = confusion(true, labels), (*FAMILIES, "other")
        rows = [
            {"true": n} | dict(zip(names, c, strict=True))
            for n, c in zip(names, counts.tolist(), strict=True)
        ]
        run.table(rows, f"dispatch {strategy}: {np.diag(counts).sum() / counts.sum():.3f} right")
        costs = np.sum([r["cost"] for _, r in done], 0)  # (pass, (read, written, seconds))
        rows = [
            {"pass": n, "tokens read": int(c[0]), "written": int(c[1]), "seconds": float(c[2])}
            for n, c in zip(("first", "second"), costs, strict=True)
        ]
        run.table(rows, f"cost of strategy {strategy}")
    for task in tasks + unseen:
        base = found[task.name].get("base")
        for what in [
            w for w in ("SVF", "A", "B", "C, one weight an expert") if base and w in found[task.name]
        ]:
            run.claim(f"{task.name}: {what} beats the base", found[task.name][what]["right"], base["right"])
    speeds = [run.folder / "experts" / f"{name}.json" for name in experts]
    speeds = [json.loads(f.read_text())["speed"] for f in speeds if f.exists()]
    mean = {k: float(np.mean([s[k] for s in speeds])) for k in speeds[0]} if speeds else {}
    run.finish(**mean)


# --- what a configuration would cost ---


def meta_language_model(name: str) -> nn.Module:
    """`common.meta_model`, and LLaVA-NeXT with Llama-3-8B and CLIP-L at 336 pixels, on the meta device."""
    if "llava" not in name.lower() or Path(name).exists():
        return common.meta_model(name)
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextForConditionalGeneration

    size = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
    text = LlamaConfig(vocab_size=128320, num_key_value_heads=8, **size)
    size = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    vision = CLIPVisionConfig(image_size=336, patch_size=14, projection_dim=768, **size)
    with torch.device("meta"):
        return LlavaNextForConditionalGeneration(LlavaNextConfig(text_config=text, vision_config=vision))


def added_parameters(model: nn.Module, modules: tuple[str, ...], every: int, rank: int) -> tuple[int, int]:
    """Parameters that SVF and LoRA of a rank train on these modules."""
    shapes = [layer.weight.shape for layer in layers_to_adapt(model, modules, every).values()]
    return sum(min(s) for s in shapes), rank * sum(sum(s) for s in shapes)


def dry_run(cfg: Config, run: Run) -> None:
    """Print parameters, memory, FLOPs, steps and data of a configuration without weights or data."""
    size = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    if not cfg.model:
        with torch.device("meta"):
            model = toy_model(cfg)
        svf, lora = added_parameters(model, cfg.modules, cfg.every, cfg.lora_rank)
        runs = toy_trainings(cfg)
        run.print(f"{size(model):,} parameters; SVF trains {svf:,}, LoRA {lora:,}")
        answers = runs * cfg.steps * cfg.batch
        run.print(
            f"{cfg.bases} pre-trainings of at most {cfg.pretrain_steps} steps; {runs} trainings of "
            f"{cfg.steps} updates, {answers:,} answers"
        )
        return
    model = meta_language_model(cfg.model)
    rows = []
    for modules in (("mlp",), ("qv",), ("mlp", "qv")):
        svf, lora = added_parameters(model, modules, cfg.every, cfg.lora_rank)
        rows.append({"modules": "+".join(modules), "SVF": f"{svf:,}", f"LoRA r={cfg.lora_rank}": f"{lora:,}"})
    run.table(rows, f"{cfg.model}: {size(model):,} parameters; trained parameters")
    names = [*cfg.tasks, *cfg.unseen]
    known = [SOURCES[n][2] for n in names if n in SOURCES]
    longest = cfg.max_new or max(known, default=512)
    dry_run_memory(cfg, run, model, longest)
    dry_run_compute(cfg, run, model, longest)
    rows = []
    for name in names:
        hub, splits, answer = SOURCES.get(name, (name.partition("=")[2], "60 % / 20 % / 20 %", 512))
        answer, use = cfg.max_new or answer, "train" if name in cfg.tasks else "unseen"
        rows.append({"task": name, "use": use, "from": hub, "problems": splits, "answer": answer})
    if rows:
        run.table(rows, f"tasks; of an unseen one {cfg.shots} are shots; answers in tokens, at most")


def toy_trainings(cfg: Config) -> int:
    """Trainings of the built-in study: the sweep, the category experts, ablations, experts from pictures."""
    units, tasks = cfg.bases * cfg.seeds, len(TRAINED)
    sweep = units * tasks * len(METHODS) * len(cfg.sweep)
    return sweep + units * (1 + cfg.vlm) + (tasks * len(ABLATIONS) if cfg.ablations else 0)


def dry_run_memory(cfg: Config, run: Run, model: nn.Module, longest: int) -> None:
    """Table of what a GPU holds, in GB; prompts of 512 tokens."""
    c, layers = model.config.get_text_config(), layers_to_adapt(model, cfg.modules, cfg.every).values()
    shapes = [tuple(layer.weight.shape) for layer in layers]
    heads = c.num_key_value_heads * c.hidden_size // c.num_attention_heads
    # numbers that a layer keeps of a token
    kept = c.hidden_size if cfg.recompute else 10 * c.hidden_size + 4 * c.intermediate_size
    parts = {"weights, bf16": 2 * sum(p.numel() for p in model.parameters())}
    parts["U and V, bf16"] = 2 * sum(min(s) * sum(s) for s in shapes)
    parts["merged copies, bf16"] = 2 * sum(m * n for m, n in shapes)
    parts["activations for the backward pass"] = 2 * cfg.micro_tokens * c.num_hidden_layers * kept
    cached = cfg.sample_batch * (longest + 512)
    parts["KV cache of a sampling batch"] = 4 * c.num_hidden_layers * heads * cached
    parts["sum"] = sum(parts.values())
    rows = [{"on each GPU": k, "GB": f"{v / 1e9:.1f}"} for k, v in parts.items()]
    run.table(rows, f"{cfg.config}: memory with --modules {','.join(cfg.modules)} --every {cfg.every}")


def dry_run_compute(cfg: Config, run: Run, model: nn.Module, longest: int) -> None:
    """Lines on an update, the steps and an expert's file."""
    n = sum(p.numel() for p in model.parameters())
    svf, _ = added_parameters(model, cfg.modules, cfg.every, cfg.lora_rank)
    tokens = cfg.batch * (longest + 512)
    # a token: sampling 2N, training in factors 2.57 x 2N, recomputation 2N, base weights for the KL 2N
    flops = (2 + 2 * 2.57 + (2 if cfg.recompute else 0) + (2 if cfg.lam else 0)) * n * tokens
    seconds = flops / run.world_size / 989e12 / 0.4
    run.print(
        f"an update: {cfg.batch} answers, up to {tokens:,} tokens with prompts of 512, "
        f"{flops:.1e} FLOP; {seconds:.0f} s on {run.world_size} H100 at 40 % MFU, sampling takes longer"
    )
    trained = len(cfg.tasks) * ("experts" in cfg.stages) + ("cls" in cfg.stages)
    trained += 2 * len(cfg.tasks) * ("lora" in cfg.stages)
    run.print(f"steps: {trained} trainings of {cfg.steps}, validation every {cfg.validate_every}")
    search = cfg.generations * cfg.population * cfg.shots * len(cfg.unseen)
    search *= bool(cfg.experts) or len(cfg.tasks) > 1  # a single expert has nothing to be mixed with
    run.print(
        f"few-shot search: {search:,} answers for each kind of mixture; "
        f"an expert's file: {4 * svf / 1e6:.2f} MB"
    )


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if any(a.startswith("--model") for a in argv) and not any(a.startswith("--config") for a in argv):
        argv = ["--config", "text", *argv]  # a real model on a laptop wants the sizes of that rung
    cfg = common.parse_config(CONFIGS, argv)
    if cfg.model and any(a.startswith(("--sweep", "--ablations")) for a in argv):
        sys.stderr.write(
            "transformer2.py: --sweep and --ablations are of the built-in task, not of a --model\n"
        )
        sys.exit(2)
    with Run(cfg) as run:
        if cfg.dry_run:
            dry_run(cfg, run)
        elif cfg.model:
            text_study(cfg, run)
        else:
            toy_study(cfg, run)


if __name__ == "__main__":
    main()
