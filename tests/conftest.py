"""Shared by all tests: one thread, no network, and helpers that run a script as a user would."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import common
import rlt

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def one_thread_a_fixed_seed_and_no_gpu(request, monkeypatch):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if "cuda" not in request.node.name:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def run_script(tmp_path):
    """run_script(*arguments, ranks=0) starts a command in tmp_path, with ranks under torchrun; no GPU unless asked."""

    def start(*arguments, ranks: int = 0, check: bool = True, gpu: bool = False):
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        )
        command = [sys.executable, *launcher, *map(str, arguments)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        }
        environment |= {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert not check or done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    return start


@pytest.fixture
def run_main(tmp_path, monkeypatch, capsys):
    """run_main(module, *arguments) -> (exit code, stdout, stderr): main() in this process, in tmp_path."""

    def start(module, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        code = 0
        try:
            module.main()
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return start


def bpe(corpus, size=400, **special):
    """A byte-level BPE with offsets and ChatML, trained on `corpus`: small, and true to the real ones.

    Qwen's pre-tokenizer: punctuation takes newlines after it along, so `|>` and a blank line can merge.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), in_bytes])
    tok.decoder = decoders.ByteLevel()
    names, alphabet = ["<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=names, initial_alphabet=alphabet)
    tok.train_from_iterator(corpus, trainer)
    ends = dict(eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, **ends, **special)
    fast.chat_template = rlt.CHAT
    return fast


@pytest.fixture(scope="session")
def bpe_tokenizer():
    tags = re.findall(r"<.*?>", " ".join(piece for prompt in rlt.TEXT for piece in prompt.answer))
    words = "We add the two numbers: 12 plus 30 is 42. So the answer is 42, naïve café 日本語. "
    return bpe([f"{tag}\n\n{words}\n\n" for tag in tags] * 20)


@pytest.fixture
def text_files(tmp_path, bpe_tokenizer):
    """A tiny Llama with a BPE tokenizer in a folder, and problems: `full` in miniature."""
    torch.manual_seed(0)
    common.tiny_lm(len(bpe_tokenizer), 32, 2, context=2048, intermediate_size=48).save_pretrained(
        tmp_path / "lm"
    )
    bpe_tokenizer.save_pretrained(tmp_path / "lm")
    rows = [
        {"question": f"What is {i} plus 30?", "solution": rf"It is \boxed{{{i + 30}}}."} for i in range(9)
    ]
    rows = [r | {"reasoning_trace": f"We add. It is {i + 30}."} if i % 2 else r for i, r in enumerate(rows)]
    rows.append({"question": "long " * 900, "solution": "1"})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    size = {
        "config": "text",
        "teacher": "lm",
        "data": "p.jsonl",
        "max_new": 12,
        "updates": 2,
        "context": 1900,
    }
    size |= {"holdout": 2, "eval_new": 12, "distil_steps": 2, "warmup_steps": 2, "traces": 5}
    return [word for key, value in size.items() for word in (f"--{key}", str(value))]


@pytest.fixture
def words_task(tmp_path, monkeypatch):
    """`common.benchmark` gets one task, words: answers to "777?" are 777, to "7?" 7, four times each."""
    rows = [{"question": f"{answer}?", "answer": answer} for answer in ("777", "7") * 4]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = dict(task="words", dataset_path="json", dataset_kwargs={"data_files": f"{tmp_path}/words.jsonl"})
    task |= dict(test_split="train", doc_to_text="{{question}}", doc_to_target="{{answer}}")
    task |= dict(output_type="generate_until", metric_list=[{"metric": "exact_match"}])
    (tmp_path / "words.yaml").write_text(json.dumps(task))
    monkeypatch.setattr(common, "benchmark", partial(common.benchmark, folder=str(tmp_path)))
