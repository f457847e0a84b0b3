"""common.py: command line, grid, checkpoints, claims, and the helpers for language models and RL."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import example
import gymnasium
import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import common
from common import Claim, Run, UserError

EXAMPLE = ROOT / "tests" / "example.py"
TABLE = "out/example-smoke-s0/results.json"


# --- command line


def test_any_field_can_be_set_on_top_of_a_config():
    words = [
        "--config",
        "smoke",
        "--lr",
        "-1e-3",
        "--rows",
        "mixup",
        "no_mixup",
        "--seed=7",
        "--resume",
        "--device",
        "cpu",
    ]
    with pytest.raises(SystemExit):  # a negative rate makes no sense
        common.parse_config(example.CONFIGS, words)
    words[3] = "1e-4"
    cfg = common.parse_config(example.CONFIGS, words)
    found = (cfg.config, cfg.lr, cfg.rows, cfg.seed, cfg.steps, cfg.resume)
    assert found == ("smoke", 1e-4, ("mixup", "no_mixup"), 7, 10, True)
    assert common.parse_config(example.CONFIGS, []).config == "demo"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--batchh 3", ["--batchh", "--batch"]),
        ("--batch three", ["--batch", "three"]),
        ("--share all", ["grid", "run"]),
        ("--config dem", ["dem", "demo"]),
        ("--batch 0", ["--batch 0", "at least 1"]),
        ("--lr nan", ["--lr nan", "finite"]),
        ("--noise -1", ["--noise -1", "at least 0"]),
        ("--device cuda", ["--device cuda"]),
    ],
)
def test_a_bad_argument_ends_with_exit_code_2_and_says_which(line, words, capsys):
    if "cuda" in line and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as end:
        common.parse_config(example.CONFIGS, line.split())
    message = capsys.readouterr().err
    assert end.value.code == 2 and all(w in message for w in words), message


def test_help_shows_every_field_with_its_comment(capsys):
    with pytest.raises(SystemExit):
        common.parse_config(example.CONFIGS, ["--help"])
    text = capsys.readouterr().out
    assert (
        "--classes INT" in text and "regions of the sphere" in text and "torchrun sets it otherwise" in text
    )


# --- a whole script: grid, ranks, resume


def results(folder, name=TABLE):
    return json.loads((Path(folder) / name).read_text())


def test_smoke_leaves_a_table_and_a_second_run_skips_what_is_finished(run_script, tmp_path):
    run_script(EXAMPLE, "--config", "smoke")
    first = results(tmp_path)
    assert {"script", "config", "seed", "world_size", "device", "seconds", "table", "claims", "speed"} == set(
        first
    )
    assert [len(cells) for cells in first["table"].values()] == [2, 2, 2] and len(first["claims"]) == 2
    cell = tmp_path / "out/example-smoke-s0/mixup-s0/result.json"
    made = json.loads(cell.read_text())
    made["metrics"]["test"] = 0.123  # a cell that is made again would lose this
    cell.write_text(json.dumps(made))
    done = run_script(EXAMPLE, "--config", "smoke", "--resume", "--rows", "mixup", "--seeds", "3")
    table = results(tmp_path)["table"]
    assert table["mixup"][0]["test"] == 0.123 and len(table["mixup"]) == 3 and list(table) == ["mixup"]
    assert "mixup-s2" in done.stdout and "mixup-s1:" not in done.stdout
    changed = run_script(EXAMPLE, "--config", "smoke", "--resume", "--width", "8", check=False)
    assert changed.returncode == 2 and "width" in changed.stderr
    again = run_script(EXAMPLE, "--config", "smoke", check=False)
    assert again.returncode == 2 and "--resume" in again.stderr and results(tmp_path)["table"] == table
    bad = run_script(EXAMPLE, "--config", "smoke", "--rows", "mixupp", check=False)
    diverged = run_script(EXAMPLE, "--config", "smoke", "--lr", "1e30", "--out", "other", check=False)
    assert bad.returncode == diverged.returncode == 2 and "'mixupp'" in bad.stderr
    assert "loss is" in diverged.stderr and "step" in diverged.stderr and "Traceback" not in diverged.stderr


def test_one_rank_is_two_ranks_however_they_are_started(run_script, tmp_path):
    tables = {}
    for name, words, ranks in (
        ("one", [], 0),
        ("cells", ["--ranks", "2"], 0),
        ("torchrun", [], 2),
        ("together", ["--share", "run"], 2),
    ):
        run_script(EXAMPLE, "--config", "smoke", "--rows", "mixup", "--out", name, *words, ranks=ranks)
        tables[name] = results(tmp_path, f"{name}/example-smoke-s0/results.json")["table"]
    assert tables["one"] == tables["cells"] == tables["torchrun"]
    for ours, theirs in zip(tables["one"]["mixup"], tables["together"]["mixup"], strict=True):
        assert ours == pytest.approx(theirs, abs=2e-3)  # float error may flip one point of ten thousand


def test_a_killed_run_resumes_bit_identically_and_a_torn_checkpoint_falls_back(tmp_path):
    words = [
        sys.executable,
        str(EXAMPLE),
        "--config",
        "smoke",
        "--rows",
        "mixup",
        "--seeds",
        "1",
        "--steps",
        "600",
    ]
    words += ["--save_every", "20", "--log_every", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start = lambda out, *more: subprocess.Popen(  # noqa: E731
        [*words, "--out", out, *more], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert start("whole").wait(timeout=120) == 0
    cell = tmp_path / "killed" / "example-smoke-s0" / "mixup-s0"
    for attempt in range(2):
        process = start("killed", *(["--resume"] if attempt else []))
        lines = random.Random(attempt).randint(60, 200) + 200 * attempt
        while process.poll() is None:
            file = cell / "metrics.jsonl"
            if file.exists() and file.read_text().count("\n") >= lines:
                process.send_signal(signal.SIGKILL)
            time.sleep(0.005)
        assert process.wait() == -signal.SIGKILL
    newest = sorted(cell.glob("step*/.metadata"))[-1].parent
    for file in newest.glob("*.distcp"):
        file.write_bytes(file.read_bytes()[:50])
    text, _ = start("killed", "--resume").communicate(timeout=120)
    assert "torn" in text
    whole = tmp_path / "whole" / "example-smoke-s0" / "mixup-s0"
    assert (cell / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    ours, theirs = (json.loads((c / "result.json").read_text())["metrics"] for c in (cell, whole))
    assert ours == theirs
    for file in [f for c in cell.glob("step*") for f in c.glob("*.distcp")]:
        file.write_bytes(b"")
    (cell / "result.json").unlink()
    process = subprocess.run(
        [*words, "--out", "killed", "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 2 and "no checkpoint" in process.stderr and "Traceback" not in process.stderr


def test_once_makes_a_thing_once_a_seed_and_leaves_the_caller_its_randomness(tmp_path):
    made, drawn = [], []
    cfg = replace(example.CONFIGS["smoke"], out=str(tmp_path), seeds=2)

    def train(cfg, run):
        def make(child):
            made.append((child.folder.name, torch.rand(()).item()))
            (child.folder / "base").write_text(str(cfg.seed))

        folder = run.once("base", make)
        drawn.append(torch.rand(()).item())
        return {"seed": float((folder / "base").read_text())}

    with Run(cfg) as run:
        table = run.grid({"a": {}, "b": {}}, train)
    assert table == {"a": [{"seed": 0.0}, {"seed": 1.0}], "b": [{"seed": 0.0}, {"seed": 1.0}]}
    assert len(made) == 2 and drawn[:2] == drawn[2:] and drawn[0] != drawn[1]


def test_an_optimizer_resumes_although_some_parameters_never_had_gradients(tmp_path):
    run = Run(replace(example.CONFIGS["smoke"], out=str(tmp_path), save_every=1))
    weights = []
    for total in (4, 2, 4):  # the third goes on from the second, in another folder than the first
        torch.manual_seed(0)
        run.folder = tmp_path / ("whole" if not weights else "cut")
        model = torch.nn.ModuleList(torch.nn.Linear(2, 1) for _ in range(2))
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        for step in run.steps(total, model=model, optimizer=optimizer):
            if step:  # the first checkpoint has no moments at all
                model[0](torch.randn(3, 2)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        weights.append(model[0].weight.tolist())
    assert weights[2] == weights[0] != weights[1]


def test_claims_are_judged_by_the_t_interval():
    table = {"ours": [{"x": v} for v in (3.0, 4.0, 8.0)], "theirs": [{"x": v} for v in (1.0, 3.0, 5.0)]}
    judged = common.judge(Claim("", "x", "ours", "theirs"), table)
    half = 4.302653 / math.sqrt(3)  # differences 2, 1, 3: sd 1, t(0.975, 2) = 4.3027
    assert judged["diff"] == 2 and judged["ci95"] == pytest.approx(half, rel=1e-6)
    assert not judged["holds"], "two standard errors would have said yes"
    assert common.judge(Claim("", "x", "ours", "theirs", margin=-0.5), table)["holds"]
    assert common.judge(Claim("", "x", "theirs", "ours", "lower", -0.5), table)["holds"]
    one = {row: cells[:1] for row, cells in table.items()}
    assert not common.judge(Claim("", "x", "ours", "theirs"), one)["holds"], "one pair never holds"


def test_onednn_products_stay_float32():
    common.use_onednn()
    a, b = torch.randn(2, 300, 300)
    exact = a.double() @ b.double()
    assert ((a @ b) - exact).abs().max() < 2e-6 * exact.abs().max()


# --- language models

SIZE = dict(vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
SIZE |= dict(max_position_embeddings=128, bos_token_id=None, eos_token_id=None, pad_token_id=None)
SIZE |= dict(num_key_value_heads=2, initializer_range=0.4)
SLIDING = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZE, sliding_window=6)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=6, max_window_layers=1)
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZE, sliding_window=6)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=6, query_pre_attn_scalar=8)
    ),
}


@pytest.mark.parametrize("name", SLIDING)
def test_batches_of_different_lengths_continue_as_each_prompt_alone(name):
    """Greedy, against passes without a cache, on both sides of the sliding window."""
    model, generator = SLIDING[name]().eval(), torch.Generator().manual_seed(1)
    for lengths in ([4], [12], [3, 5], [3, 12], [5, 7, 6]):
        prompts = [torch.randint(61, (n,), generator=generator).tolist() for n in lengths]
        found = common.generate(model, prompts, torch.zeros(len(prompts), 10), [61], temperature=0)
        for prompt, tokens in zip(prompts, found, strict=True):
            ids = list(prompt)
            for _ in range(10):
                with torch.no_grad():
                    ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            assert tokens == ids[len(prompt) :]


@pytest.fixture
def lm():
    return common.tiny_lm(11, 16, 2, heads=2, initializer_range=0.5).eval()


def test_sampling_follows_softmax_whatever_the_generation_config_says(lm):
    lm.generation_config.update(do_sample=True, top_k=1, repetition_penalty=2.0, temperature=0.1)
    n = 20_000
    tokens = common.generate(lm, [[3, 3, 3]] * n, torch.rand(n, 1), [11], temperature=0.7)
    p = (lm(torch.tensor([[3, 3, 3]])).logits[0, -1] / 0.7).softmax(-1)
    expected, observed = n * p, torch.bincount(torch.tensor(tokens)[:, 0], minlength=11)
    keep = expected > 5
    chi2 = ((observed - expected)[keep] ** 2 / expected[keep]).sum().item()
    assert keep.sum() > 3 and chi2 < 40, "the 99.99 % quantile of chi^2 with 10 degrees of freedom is 35.6"
    assert lm.generation_config.top_k == 1, "what was swapped comes back"


def test_an_answer_ends_at_any_end_id_and_does_not_depend_on_its_batch(lm, bpe_tokenizer):
    prompts, uniforms = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], torch.rand(3, 12)
    found = common.generate(lm, prompts, uniforms, [2, 3])
    for prompt, tokens, u in zip(prompts, found, uniforms, strict=True):
        assert common.generate(lm, [prompt], u[None], [2, 3]) == [tokens]
        assert not {2, 3} & set(tokens[:-1]) and (len(tokens) == 12 or tokens[-1] in (2, 3))
    assert any(len(tokens) < 12 for tokens in found)
    lm.generation_config.eos_token_id = [7, 9]
    turn = bpe_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert common.end_ids(lm, bpe_tokenizer) == sorted({7, 9, turn})


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("tied", [True, False])
def test_chunked_log_probs_are_log_softmax_in_value_and_gradient(chunk, tied):
    model = common.tiny_lm(11, 16, 2, heads=2, tie_word_embeddings=tied)
    ids = torch.randint(11, (2, 6))
    logp = (model(ids).logits[:, :-1] / 0.7).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    expected = torch.autograd.grad(logp.square().sum(), model.parameters())
    found = common.token_logprobs(model, ids, None, 0.7, chunk)
    torch.testing.assert_close(found, logp, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.square().sum(), model.parameters())
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    model.config.logits_scaling = 8.0
    with pytest.raises(UserError, match="logits_scaling"):
        common.token_logprobs(model, ids)


def test_char_tokenizer_round_trip_offsets_and_refusal(tmp_path):
    common.CharTokenizer("abc$", eos="$").save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(tmp_path)
    out = tok(["cab$"], return_offsets_mapping=True)
    assert out["input_ids"] == [[2, 0, 1, 3]] and out["offset_mapping"][0] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert tok.decode([2, 3], skip_special_tokens=True) == "c" and tok.eos_token_id == 3
    with pytest.raises(Exception, match="WordLevel"):
        tok("az")


ANSWERS = [
    ("32349", "32, 349", False),
    ("100", "0,100", False),
    ("11111111100", r"11,\! 111,\! 111,\! 100", True),
    ("4210_{5}", "4210_5", True),
    (r"\left(\frac{3}{5},\frac{8}{3}\right]", "(3/5,8/3]", True),
    (r"5.4 \text{ cents}", "5.4cents", True),
    (r"3\sqrt{13}", "3*sqrt(13)", True),
    (r"\text{(C)}", "C", True),
    ("C", r"\boxed{(C)}", True),
    ("C", "C: text", True),
    ("C", "B: text", False),
    (r"28\%", "28 percent", True),
    ("42", r"So \boxed{41}, no: \boxed{42}", True),
    ("42", r"\boxed{42} or \boxed{4", False),
    ("42", "42.", True),
    ("42", "43", False),
]


@pytest.mark.parametrize(("target", "answer", "equal"), ANSWERS)
def test_answers_agree(target, answer, equal):
    assert common.answers_agree(target, answer) == equal


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \fbox{42}", "42"),
        (r"\boxed{3}, no: \boxed{4", None),
        (r"first \boxed{5}, corrected \boxed{7}.", "7"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\text{math}}", r"\text{math}"),
        (r"\boxed{\frac{1}{2}} and more", r"\frac{1}{2}"),
        ("none", None),
    ],
)
def test_the_last_box(text, box):
    assert common.last_box(text) == box


def test_rows_are_read_whatever_their_line_ends_and_marks_and_bad_ones_are_named(tmp_path):
    plain = '{"q": "a\u2028b"}\n{"q": "c"}\n'
    for i, data in enumerate((plain.encode(), b"\xef\xbb\xbf" + plain.replace("\n", "\r\n").encode())):
        (tmp_path / f"{i}.jsonl").write_bytes(data)
        assert common.load_rows(str(tmp_path / f"{i}.jsonl"), ["q"]) == [{"q": "a\u2028b"}, {"q": "c"}]
    for name, data, words in (
        ("latin", '{"q": "é"}\n'.encode("latin-1"), ["0xe9"]),
        ("missing", b'{"q": "a"}\n{"p": "b"}\n', ["row 2", "'q'"]),
        ("number", b'{"q": 3}\n', ["row 1", "'q'"]),
        ("empty", b'{"q": " "}\n', ["row 1", "'q'"]),
    ):
        (tmp_path / f"{name}.jsonl").write_bytes(data)
        with pytest.raises(UserError) as error:
            common.load_rows(str(tmp_path / f"{name}.jsonl"), ["q"])
        assert all(w in str(error.value) for w in [name, *words]) and "\n" not in str(error.value)
    (tmp_path / "head.csv").write_text("q,a\n")
    for name, words in (("nobody/nothing", "nobody/nothing"), (str(tmp_path / "head.csv"), "head.csv")):
        with pytest.raises(UserError, match=words):
            common.load_rows(name)


def test_gym_rows_bring_their_scorer():
    rows = common.load_rows("gym:basic_arithmetic", ("question", "answer"), size=3, seed=1)
    assert len(rows) == 3 and all(r["score"](r["answer"]) == 1.0 and r["score"]("no") < 1 for r in rows)
    with pytest.raises(UserError, match="gym:nothing"):
        common.load_rows("gym:nothing")


def test_benchmark_runs_a_local_task_on_a_model_in_memory(tmp_path, bpe_tokenizer):
    model = common.tiny_lm(len(bpe_tokenizer), 16, 1, heads=2, context=256).eval()
    (tmp_path / "w.jsonl").write_text('{"question": "1", "answer": "2"}\n' * 3)
    (tmp_path / "words.yaml").write_text(
        f"task: words\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/w.jsonl}}}}\n"
        "test_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    run = Run(replace(example.CONFIGS["smoke"], out=str(tmp_path)))
    found = common.benchmark(
        model, bpe_tokenizer, ["words"], run, str(tmp_path), system_instruction="Be brief."
    )
    assert found["words"]["exact_match,none"] in (0.0, 1.0)


def test_load_lm_says_what_is_missing(tmp_path):
    for name in (str(tmp_path / "model.gguf"), "nobody/nothing"):
        with pytest.raises(UserError, match=Path(name).name):
            common.load_lm(name)


# --- reinforcement learning


def test_a_dm_control_task_is_a_gymnasium_environment_with_reproducible_starts():
    from gymnasium.utils.env_checker import check_env

    env = common.DmControl("cartpole", "swingup")
    check_env(env, skip_render_check=True)
    a, b = (env.reset(seed=5)[0] for _ in range(2))
    np.testing.assert_array_equal(a, b)
    steps, over = 0, False
    while not over:
        _, _, terminated, over, info = env.step(np.ones(1))
        steps += 1
    assert steps == 1000 and not terminated and info["physics"].shape == (4,)  # a time limit truncates
    keys = list(env.env.observation_spec())
    assert keys == ["position", "velocity"], "the suite's order"
    with pytest.raises(UserError, match="cartpole_swingupp"):
        common.DmControl("cartpole", "swingupp")


class Countdown(gymnasium.Env):
    """Rewards of the action for `length` steps; odd lengths terminate, even ones are truncated."""

    def __init__(self, length):
        self.length, self.observation_space = length, gymnasium.spaces.Box(0, 99, (1,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.left = self.length
        return np.array([self.left], np.float32), {}

    def step(self, action):
        self.left -= 1
        end = self.left == 0
        return np.array([self.left], np.float32), float(action[0]), end and self.length % 2 == 1, end, {}


def test_evaluation_counts_each_environments_first_episode_only():
    envs = gymnasium.vector.SyncVectorEnv([lambda n=n: Countdown(n) for n in (1, 2, 5)])
    returns = common.evaluate_policy(envs, lambda obs: np.full((3, 1), 0.5, np.float32), seed=0)
    assert returns.tolist() == [0.5, 1.0, 2.5]


def test_the_replay_buffer_keeps_the_last_rows_and_survives_a_checkpoint():
    replay = common.Replay(5, x=torch.zeros(1), a=torch.zeros((), dtype=torch.long))
    for i in range(4):
        replay.add(x=torch.tensor([[2.0 * i], [2.0 * i + 1]]), a=np.array([2 * i, 2 * i + 1]))
    other = common.Replay(5, x=torch.zeros(1), a=torch.zeros((), dtype=torch.long))
    other.load_state_dict(replay.state_dict())
    drawn = other.sample(500)
    assert set(drawn["a"].tolist()) == {3, 4, 5, 6, 7} and torch.equal(drawn["x"][:, 0].long(), drawn["a"])
    young = common.Replay(5, a=torch.zeros(()))
    young.add(a=torch.tensor([1.0, 2.0]))
    assert set(young.sample(200)["a"].tolist()) == {1.0, 2.0}, "rows that were never written are not drawn"


def test_ensembles_soft_updates_and_graphs_on_a_cpu():
    layer, x = common.EnsembleLinear(4, 3, 2, gain=1.5), torch.randn(4, 5, 3)
    for e, out in enumerate(layer(x)):
        torch.testing.assert_close(out, x[e] @ layer.weight[e] + layer.bias[e])
        torch.testing.assert_close(layer.weight[e].T @ layer.weight[e], 2.25 * torch.eye(2))
    target, source = (torch.nn.BatchNorm1d(3) for _ in range(2))
    with torch.no_grad():
        source.weight.fill_(3.0)
        source.running_mean.fill_(7.0)
    common.soft_update(target, source, 0.25)
    assert target.weight.tolist() == [1.5] * 3 and target.running_mean.tolist() == [0.0] * 3
    assert common.graphed(lambda t: t + 1)(torch.ones(1)).item() == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphed_update_is_the_eager_one():
    weights = []
    for graph in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(8, 8).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, capturable=True)

        def update(x, model=model, optimizer=optimizer):
            loss = model(x).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            return loss

        step = common.graphed(update) if graph else update
        for i in range(10):
            torch.manual_seed(i)
            step(torch.randn(16, 8, device="cuda"))
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(*weights)


def test_episodes_of_which_some_lack_physics_are_refused(tmp_path):
    rows = dict(observation=np.zeros((3, 2)), action=np.zeros((3, 1)), reward=np.zeros((3, 1)))
    rows |= dict(discount=np.ones((3, 1)))
    np.savez(tmp_path / "a.npz", **rows, physics=np.zeros((3, 4)))
    assert common.load_episodes(str(tmp_path))["physics"].shape == (2, 4)
    np.savez(tmp_path / "b.npz", **rows)
    with pytest.raises(UserError, match="no physics"):
        common.load_episodes(str(tmp_path))


SCRIPTS = "rlt t2l sudoku_bench diffusion_lm transformer2 fb namm mood rmc hyperbolic_rl".split()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("script", SCRIPTS)
def test_cuda_smoke_of_a_script_whose_two_ranks_share_the_gpu(script, run_script, tmp_path):
    run_script(ROOT / f"{script}.py", "--config", "smoke", "--device", "cuda", "--ranks", 2, gpu=True)
    found = results(next((tmp_path / "out").iterdir()), "results.json")
    assert found["device"] != "cpu" and found["world_size"] == 2 and found["table"]
