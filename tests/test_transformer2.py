"""transformer2.py: SVF, experts, loss, dispatch, few-shot mixing, tasks, sandbox and command line."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

import common
import transformer2
from common import UserError
from transformer2 import (
    Adapter,
    LoRALinear,
    Problem,
    SVFLinear,
    World,
    load_expert,
    load_task,
    matrices,
    right_box,
    right_letter,
    rollout,
    save_expert,
)

SMOKE = transformer2.CONFIGS["smoke"]
SIZE = dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)


CLOSE = dict(atol=1e-5, rtol=1e-4)


def toy_world():
    """An untrained tiny model, its weights large enough for uneven predictions."""
    torch.manual_seed(1)
    model = common.tiny_lm(len(transformer2.SYMBOLS), 16, 2).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    tokenizer = common.CharTokenizer(transformer2.SYMBOLS, eos="$")
    tokenizer.chat_template = transformer2.TOY_CHAT
    return World(model, tokenizer, [transformer2.SYMBOLS.index("$")], adapted(model), common.Run(SMOKE))


def adapted(model):
    layers = matrices(model, ("mlp", "qv"))
    return Adapter(model, {name: SVFLinear(x) for name, x in layers.items()})


def experts(world, count):
    return torch.rand(count, sum(world.adapter.sizes))


def problems(world, count):
    return transformer2.toy_task("add", "math", SMOKE, world.run).test[:count]


# --- singular value fine-tuning


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_factors_are_w_prime_with_the_nuclear_norm_of_w_and_a_gradient_in_closed_form(shape):
    linear, x, delta = nn.Linear(*shape), torch.randn(6, shape[0]), torch.randn(6, shape[1])
    layer, p = SVFLinear(linear), torch.randn(min(shape), requires_grad=True)
    z, s = torch.sigmoid(p), layer.s
    g = s.sum() / (s * z).sum()
    dense = layer.U @ torch.diag(s * g * z) @ layer.V.T  # eq. (3) written out
    layer.use(z, None)
    y = layer(x)
    assert_close(y, x @ dense.T + linear.bias, **CLOSE)
    assert_close(torch.linalg.svdvals(dense).sum(), s.sum(), **CLOSE)
    (y * delta).sum().backward()
    q = ((delta.T @ x) @ layer.V * layer.U).sum(0)  # u_i^T G v_i
    wanted = g * s * (q - (s * g * z * q).sum() / s.sum())  # dL/dz
    assert_close(p.grad, (wanted * z * (1 - z)).detach(), **CLOSE)
    for same, as_before in ((7 * z.detach(), y), (torch.full_like(s, 0.3), linear(x))):
        layer.use(same, None)  # the scale of z does not matter, so a constant one is W
        assert_close(layer(x), as_before, **CLOSE)


def test_a_row_of_a_mixed_batch_has_its_expert_and_one_of_ones_is_the_base_to_the_bit():
    layer, z, x, index = SVFLinear(nn.Linear(4, 6)), torch.rand(3, 4), torch.randn(5, 2, 4), [2, 0, 1, 1, 0]
    z[1] = 1.0
    layer.use(z, torch.tensor(index))
    mixed = layer(x)
    for row, k in enumerate(index):
        layer.use(z[k], None)
        assert_close(mixed[row], layer(x[row]), **CLOSE)
    assert torch.equal(mixed[2], layer.linear(x)[2])


def test_lora_starts_as_the_identity_and_adds_its_product():
    layer, x = LoRALinear(nn.Linear(5, 3)), torch.randn(4, 5)
    start = layer.start(torch.Generator())
    A, B = start.view(16, 8).split((5, 3), 1)
    layer.use(start + 1, None)
    assert_close(layer(x), layer.linear(x) + 2 * x @ (A + 1).T @ (B + 1), **CLOSE)
    assert B.abs().max() == 0


def test_outside_of_using_the_model_is_the_base_to_the_bit_also_after_an_exception():
    world = toy_world()
    ids = torch.arange(12)[None]
    before = world.model(ids).logits
    with pytest.raises(ZeroDivisionError), world.adapter.using(experts(world, 1)[0]):
        raise ZeroDivisionError
    assert torch.equal(world.model(ids).logits, before)


def test_only_the_language_model_is_adapted_and_experts_of_a_text_model_load_into_llava(tmp_path):
    towers = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    clip = transformers.CLIPVisionConfig(**towers, image_size=28, patch_size=14)
    llama = transformers.LlamaConfig(**SIZE)
    config = transformers.LlavaNextConfig(text_config=llama, vision_config=clip, image_token_index=59)
    llava = transformers.LlavaNextForConditionalGeneration(config)
    visual = dict(depth=1, embed_dim=16, num_heads=2, hidden_size=16)  # its tower is called visual.*
    config = transformers.Qwen2VLConfig(text_config=SIZE, vision_config=visual)
    qwen = transformers.Qwen2VLForConditionalGeneration(config)
    text = transformers.LlamaForCausalLM(llama)
    mine, _, other = (adapted(model) for model in (llava, qwen, text))
    assert not any(isinstance(x, SVFLinear) for x in qwen.model.visual.modules())
    assert len(mine.layers) == 10 and mine.layers.keys() == other.layers.keys()
    vector, file = torch.rand(sum(mine.sizes)), tmp_path / "e.safetensors"
    save_expert(file, other, vector)
    assert torch.equal(load_expert(file, mine, True), vector)


# --- experts


def test_a_mixture_is_linear_in_z_not_in_p_and_weights_of_zero_count_as_equal():
    z = torch.rand(2, 5)
    found = transformer2.mix(z, torch.tensor([[0.2, 0.5], [0.0, 0.0]]))
    assert_close(found, torch.stack([0.2 * z[0] + 0.5 * z[1], z.sum(0)]))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"X": torch.full((16,), torch.nan)}, "X has numbers that are not finite"),
        ({"X": torch.ones(15)}, r"X has shape \[15\], needed: \[16\]"),
        ({"X base": torch.tensor(7)}, "X was trained on other weights; --cross_model"),
        ({"Y": torch.ones(16)}, "the model adapts layers"),
    ],
)
def test_an_expert_that_does_not_fit_is_refused_by_the_name_of_its_layer(tmp_path, change, words):
    world, file, name = toy_world(), tmp_path / "e.safetensors", "layers.0.mlp.down_proj"
    vector = experts(world, 1)[0]
    save_expert(file, world.adapter, vector)
    assert torch.equal(load_expert(file, world.adapter, False), vector)
    save_file(load_file(file) | {k.replace("X", name): x for k, x in change.items()}, file)
    with pytest.raises(UserError, match=words.replace("X", name)):
        load_expert(file, world.adapter, False)


# --- answers and the loss


def test_log_probs_of_padded_answers_are_those_of_full_logits_one_by_one():
    world = toy_world()
    episodes = rollout(world, problems(world, 5), temperature=1.0)
    assert len({e.tokens for e in episodes}) > 1  # some end early
    with world.adapter.using(experts(world, 1)[0]):
        log_probs, tokens = transformer2.answer_log_probs(world, episodes)
        wanted = []
        for e in episodes:
            logits = world.model(torch.tensor([e.prompt + e.answer])).logits[0]
            wanted.append(logits[len(e.prompt) - 1 : -1].log_softmax(-1))
    assert_close(log_probs, torch.cat(wanted), atol=1e-4, rtol=1e-4)
    assert tokens.tolist() == [i for e in episodes for i in e.answer]
    for e in rollout(world, problems(world, 2), given=True):  # next-token prediction
        assert world.tokenizer.decode(e.answer) == e.problem.target + "$" and e.right


def test_reinforce_climbs_the_chance_of_right_minus_wrong():
    logits, reward = torch.randn(3, requires_grad=True), torch.tensor([1.0, -1.0, -1.0])
    logp = logits.log_softmax(0)
    chance = logp.exp().detach()  # of each answer: an expectation, not a sample
    loss = transformer2.reinforce_loss(logp, torch.zeros(3), reward * chance, 0.0)
    wanted = torch.autograd.grad((logits.softmax(0) * reward).sum(), logits)[0]
    assert_close(torch.autograd.grad(loss, logits)[0], -wanted)


def test_kl_is_that_of_the_base_from_the_new():
    base, new = torch.rand(2, 5).log_softmax(-1)
    wanted = torch.nn.functional.kl_div(new, base, reduction="sum", log_target=True)
    assert_close(transformer2.kl_divergence(base, new), wanted)


def test_prompts_are_what_the_template_says_without_a_bos_of_our_own(bpe_tokenizer):
    asked = [Problem("Do it.\n\n", "2 + 2", "4", str.__eq__, opening="It")]
    text = "<|im_start|>user\nDo it.\n\n2 + 2<|im_end|>\n<|im_start|>assistant\nIt"
    assert bpe_tokenizer.decode(transformer2.encode(asked, bpe_tokenizer)[0]) == text


# --- dispatch and few-shot mixing


@pytest.mark.parametrize(
    "text, label",
    [
        (r"\boxed{ Math }", "math"),
        (r"so \boxed{code} or \boxed{math}", "code"),
        (r"\boxed{history}", "other"),
        ("Math} of course}", "math"),
        ("math", "other"),
        ("c", "code"),
    ],
)
def test_the_first_box_is_the_category_and_what_cannot_be_read_is_other(text, label):
    assert transformer2.parse_label(text) == label


def test_the_second_pass_answers_with_the_expert_of_the_label_and_other_with_the_base(monkeypatch):
    world, labels = toy_world(), ("math", "other", "code", "math")
    world.run.cfg = replace(SMOKE, adapt="category")
    z = dict(zip(("math", "code", "category"), experts(world, 3), strict=True))
    said = itertools.cycle(labels)
    monkeypatch.setattr(transformer2, "parse_label", lambda text: next(said))
    _, answered = transformer2.answer(problems(world, 4), "math", z, world)
    found = {e.problem.question: e.answer for e in answered}
    for p, label in zip(problems(world, 4), labels, strict=True):
        with world.adapter.using(z.get(label)):
            assert rollout(world, [p])[0].answer == found[p.question]


def test_cem_is_the_textbook_one_and_breaks_ties_by_the_second_score():
    cfg, target, seen = replace(SMOKE, generations=4), torch.tensor([0.3, 0.8]), []

    def score(members):
        seen.append(members)
        distance = -(members - target).norm(dim=1)
        return torch.stack([(distance > -0.4).float(), distance], 1)

    best = transformer2.cem(score, torch.full((2,), 0.5), cfg, torch.Generator().manual_seed(3))
    g, mean, std, kept = torch.Generator().manual_seed(3), torch.tensor(0.5), 0.5, torch.tensor(0.5)
    for members in seen:
        x = (mean + std * torch.randn(32, 2, generator=g)).clip(0, 1)
        x[0] = kept
        assert_close(members, x)
        elite = x[(x - target).norm(dim=1).argsort()[:6]]
        mean, std, kept = elite.mean(0), elite.std(0), elite[0]
    assert_close(best, kept)


# --- tasks


def write(folder, name, rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_published_sets_have_the_paper_s_splits_and_lose_no_row(tmp_path):
    write(tmp_path, "gsm8k-train", [{"question": f"q{i}", "answer": f"so\n#### {i},000"} for i in range(5)])
    write(tmp_path, "gsm8k-test", [{"question": "twice", "answer": "#### 7"}] * 2)
    rows = [{"prompt": f"p{i}", "code": "", "test_imports": [], "test_list": ["1"]} for i in range(303)]
    write(tmp_path, "mbpp-test", rows)
    row = {"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    write(tmp_path, "arc_challenge-test", [row | {"question": f"a{i}"} for i in range(30)])
    cfg = replace(SMOKE, data=str(tmp_path), unseen=("reasoning=arc_challenge",))
    gsm, mbpp, arc = (load_task(x, cfg, None) for x in ("math=gsm8k", "code=mbpp", *cfg.unseen))
    for part, wanted in ((gsm.train, "q0 q2 q4"), (gsm.valid, "q1 q3"), (gsm.test, "twice twice")):
        assert [p.question for p in part] == wanted.split()
    assert [len(mbpp.train), len(mbpp.valid), len(arc.valid), len(arc.test)] == [200, 100, 10, 20]
    assert [p.question[:4] for p in mbpp.test] == ["p300", "p301", "p302"]
    assert not {*arc.valid} & {*arc.test} and {p.target for p in arc.test} == {"B"}
    assert gsm.valid[0].judge(gsm.valid[0].target, gsm.valid[0].solution)
    write(tmp_path, "gsm8k-test", [{"question": "q", "answer": 0}, {"question": "q"}])
    with pytest.raises(UserError, match=r"gsm8k-test.jsonl, row 2: KeyError"):
        load_task("math=gsm8k", cfg, None)


def test_letters_and_boxes_are_read_as_the_paper_s_code_reads_them():
    for text in ("The answer is (B), not C", "Answer: B", "A or rather B"):
        assert right_letter("B", text) and not right_letter("A", text)
    assert right_box("1200", r"\boxed{1,200}") and not right_box("7", "7")
    assert not right_box("1200", r"\boxed{2,200}")


@pytest.mark.parametrize(
    "program, passes",
    [
        ("assert 1 + 1 == 2", True),
        ("import math, re, dataclasses\nprint('x' * 10**6)", True),
        ("import os\nos._exit(0)", False),
        ("while True: pass", False),
        ("import os\nos.fork()", False),
        ("open('/tmp/written', 'w')", False),
    ],
)
def test_a_program_runs_to_its_end_within_limits_or_fails(program, passes):
    assert transformer2.run_code(program, seconds=3.0) == passes


def test_it_is_said_where_root_cannot_run_programs_as_nobody(monkeypatch):
    def refuse(*args, **more):
        raise PermissionError("no")

    monkeypatch.setattr(transformer2.subprocess, "run", refuse)
    with pytest.warns(UserWarning, match="run as root"):
        assert transformer2.confined.__wrapped__() == {}


def test_toy_answers_by_hand_and_splits_that_share_no_row():
    for operation, right in dict(add="567", sub="901", rot="cdefb", rod="23451", max="5", min="1").items():
        assert transformer2.operate(operation, "12345")[1] == right
    rows = [x for split in transformer2.SPLITS for x in transformer2.digits(split, common.Run(SMOKE))]
    assert len(set(rows)) == len(rows) == 75_000


# --- the script


def test_smoke_makes_all_rows_and_resume_repeats_them(run_main, tmp_path):
    code, out, err = run_main(transformer2, "--config", "smoke")
    assert code == 0 and "where its prompts were sent" in out, err
    folder = tmp_path / "out/transformer2-smoke-s10-tiny"
    before = json.loads((folder / "results.json").read_text())["table"]
    assert before.keys() == transformer2.ROWS.keys()
    expert = folder / "svf_reinforce_x1_add-s10"
    kept = (expert / "add.safetensors").read_bytes()
    for file in (
        *folder.glob("*/result.json"),
        *expert.glob("*.safetensors"),
        *expert.glob("step*3/.metadata"),
    ):
        file.unlink()
    code, _, err = run_main(transformer2, "--config", "smoke", "--resume", "--rows", "SVF")
    assert code == 0 and (expert / "add.safetensors").read_bytes() == kept, err
    assert json.loads((folder / "results.json").read_text())["table"]["SVF"] == before["SVF"]


def test_two_ranks_train_the_expert_that_one_trains(run_script, tmp_path):
    words = ["--config", "smoke", "--rows", "SVF", "--share", "run", "--batch", "1", "--out"]
    run_script(ROOT / "transformer2.py", *words, "one")
    run_script(ROOT / "transformer2.py", *words, "two", ranks=2)
    one, two = (load_file(*(tmp_path / out).rglob("max.safetensors")) for out in ("one", "two"))
    assert_close(one, two, atol=1e-3, rtol=0)


def test_a_model_that_rescales_its_logits_is_refused(monkeypatch, bpe_tokenizer):
    granite = transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZE, logits_scaling=8.0))
    monkeypatch.setattr(common, "load_lm", lambda *_: (granite, bpe_tokenizer))
    with pytest.raises(UserError, match="rescales its logits"):
        transformer2.open_world("granite", False, ("mlp",), "cpu", torch.float32)


def test_real_tokenizer_jsonl_tasks_and_lm_eval_go_the_same_way(run_main, text_files, tmp_path, monkeypatch):
    def adapted(model, tokenizer, tasks, run, **more):
        layer = model.get_decoder().layers[0].mlp.up_proj
        return {tasks[0]: {"alias": "x", "exact,none": float(layer.gain is not None)}}

    monkeypatch.setattr(common, "benchmark", adapted)
    rows = [{"question": f"Is {i} even?", "answer": "yes" if i % 2 else "no"} for i in range(30)]
    write(tmp_path, "even", rows)
    words = "--config text --model lm --tasks math=even.jsonl reasoning=even.jsonl --unseen code=even.jsonl"
    words += " --device cpu --steps 2 --batch 2 --test 2 --valid 2 --max_new 4 --generations 2"
    words += " --bench math=a code=b --rows SVF"
    code, _, err = run_main(transformer2, *words.split(), "B: category expert", "C: few-shot mixing")
    table = json.loads(next(tmp_path.rglob("results.json")).read_text())["table"]
    assert code == 0 and [table["SVF"][0][k] for k in "ab"] == [1, 0], err
    assert table["C: few-shot mixing"][0]["b"] == 1


def test_full_says_in_one_line_what_is_missing_and_what_it_would_take(run_main, tmp_path):
    code, out, _ = run_main(transformer2, "--config", "full", "--dry_run")
    assert code == 0 and "393,216 of an expert" in out and "hours" in out and "--data takes" in out
    _, out, _ = run_main(transformer2, "--config", "full", "--dry_run", "--modules", "qv")
    assert "163,840 of an expert" in out  # both as in the paper
    code, _, err = run_main(transformer2, "--config", "full")
    assert code == 2 and err.count("\n") == 1 and "--model" in err and not (tmp_path / "out").exists()
    code, _, err = run_main(transformer2, "--config", "smoke", "--experts", "here")
    assert (
        code == 2 and "no here/add.safe" in err and "sub.safe" not in err and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    "words, message",
    [
        ("--tasks math=toy:add math=toy:max", "one expert a category"),
        ("--tasks art=toy:add", "CATEGORY=SOURCE"),
        ("--elites 1", "2 <= --elites"),
        ("--shots 2000", "<= --sample_batch"),
        ("--modules (", "no such linear layers"),
        ("--tasks", "one expert a category"),
        ("--bench math=toy:add", "CATEGORY=SOURCE"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2(run_main, words, message):
    code, _, err = run_main(transformer2, "--config", "smoke", *words.split())
    assert code == 2 and message in err.split("\n")[-2]
