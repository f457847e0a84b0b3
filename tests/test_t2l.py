"""t2l.py: heads and their sizes, starts, per-sample adapters, losses, descriptions, files, command line."""

import json
from dataclasses import replace
from math import inf, sqrt
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import common
import t2l
from common import Run, UserError
from t2l import (
    CONFIGS,
    T2L,
    Form,
    Pair,
    Task,
    alignment,
    encode,
    load_peft,
    recon_loss,
    response_loss,
    save_peft,
    to_pair,
    word_tasks,
)

SMOKE = replace(CONFIGS["smoke"], dropout=0.0)
OUTPUTS = {"q_proj": 4096, "v_proj": 1024}
SIZES = {f"{n}.{kind}": (size, 4096) for kind, size in OUTPUTS.items() for n in range(32)}
MISTRAL = Form("m", SIZES, rank=8, alpha=16.0)
LAYER = "model.layers.{}.self_attn.{}"


@pytest.fixture
def run(tmp_path):
    return Run(replace(SMOKE, out=str(tmp_path)))


def tiny(cfg=SMOKE):
    """A double model whose v_proj has fewer outputs than inputs, with the tokenizer of the words."""
    torch.manual_seed(3)
    tokenizer = common.CharTokenizer(t2l.ALPHABET + "=", eos="$")
    tokenizer.chat_template = "{{ messages[0].content }}"
    lm = common.tiny_lm(len(tokenizer), 32, 2, heads=8, num_key_value_heads=4, initializer_range=0.2)
    return t2l.Base(lm.double(), tokenizer, "tiny", cfg)


def hypernet(form, arch, **settings):
    return T2L(form, 6, replace(SMOKE, latent=16, hidden=24, arch=arch, **settings)).eval()


def words():
    return [task.train[0] for task in word_tasks(SMOKE)[0][:6]]


# --- the hypernetwork


@pytest.mark.parametrize("arch, biased, plain", [
    ("L", 55_424_000, 55_317_504), ("M", 34_412_288, 34_346_752), ("S", 4_996_096, 4_987_904)
])  # fmt: skip
def test_parameters_of_the_heads_on_mistral_are_the_paper_s(arch, biased, plain):
    assert MISTRAL.parameters == 3_407_872
    for method, count in (("t2l", biased), ("recon", plain)):
        with torch.device("meta"):
            net = T2L(MISTRAL, 1024, replace(CONFIGS["full"], arch=arch, method=method))
        assert sum(p.numel() for p in net.parameters()) == count


def test_head_l_starts_at_the_base_bit_for_bit_and_the_others_where_the_paper_s_do():
    base, z = tiny(), torch.randn(3, 6)
    batch = base.batch(words())
    bare, start = base.logits(batch, None), hypernet(base.form, "L")(z)
    assert torch.equal(base.logits(batch, start), bare)
    (A, B), (V, _) = (base.form.split(start)[LAYER.format(1, kind)] for kind in ("q_proj", "v_proj"))
    assert 0.1 < A.abs().max() <= 1 / sqrt(32) and not B.any()
    assert_close(t2l.magnitude(start, base.form), A.square().mean() + V.square().mean())
    for arch, rank in (("M", 4), ("S", 1)):
        A, B = base.form.split(hypernet(base.form, arch)(z))[LAYER.format(0, "v_proj")]
        assert torch.equal(B, A[..., :16]) and torch.linalg.matrix_rank(B[0].T @ A[0], rtol=1e-4) == rank
        assert torch.equal(base.logits(batch, hypernet(base.form, arch, init="exact")(z)), bare)


def by_hand(net, z, kind, layer, row):
    """Row `row` of A and column of B of one module, for one description, as the paper's equation reads."""
    k, (o, i), arch, place = [*net.heads].index(kind), net.form.kinds[kind], net.cfg.arch, 0
    h = net.mixer(torch.cat([net.task(z), net.depth()[layer], net.kind()[k, 0]]))
    h = h + net.block1(h)
    if arch == "S":
        place = net.place()[row] + net.block2(net.place()[row])

    def head(u):
        return net.heads[kind](net.mlp3(u + net.block2(u) + place))

    if arch == "L":
        A, B = head(h).split((4 * i, 4 * o))
    else:
        A, B = (head(h + code) for code in net.factor()[k, :, 0])
    if arch != "S":
        A, B = A.view(4, -1)[row], B.view(4, -1)[row]
    return A[:i], B[:o]


@pytest.mark.parametrize("arch", "LMS")
def test_all_adapters_at_once_are_those_of_a_loop_and_ignore_their_batch_mates(arch):
    form = tiny().form
    net, z = hypernet(form, arch, method="recon").double(), torch.randn(3, 6, dtype=torch.float64)
    parts = form.split(net.z_scores(z))
    for g, kind, layer, row in ((0, "q_proj", 1, 3), (2, "v_proj", 0, 2)):
        wanted = by_hand(net, z[g], kind, layer, row)
        for part, factor in zip(parts[LAYER.format(layer, kind)], wanted, strict=True):
            assert_close(part[g, row], factor.float())


# --- adapters in the model


def test_an_adapter_for_each_sample_is_the_merged_weights_of_each_padding_included():
    pairs = [Pair("ab=", "CD"), Pair("abcdef=", "A"), Pair("a=", "BCD")]
    cfg = replace(SMOKE, rank=3, alpha=5.0)
    base = tiny(cfg)
    adapters = torch.randn(3, base.form.parameters, dtype=torch.float64) * 0.2
    together = base.batch(pairs)
    losses = response_loss(base.logits(together, adapters), together, 0.0)
    for g, pair in enumerate(pairs):
        base, alone = tiny(cfg), base.batch([pair])
        for path, (A, B) in base.form.split(adapters).items():
            base.lm.get_submodule(path).weight.data += 5 / sqrt(3) * B[g].T @ A[g]
        loss = response_loss(base.logits(alone, None), alone, 0.0)
        assert_close(losses[g], loss[0], atol=1e-6, rtol=0)  # logits are float32


def test_a_response_is_kept_and_a_prompt_loses_its_left_but_for_the_first_id():
    base = tiny(replace(SMOKE, context=6))
    batch = base.batch([Pair("abcdefgh=", "CD")])
    assert base.tokenizer.decode(batch.ids[0]) == "ah=CD"
    assert base.tokenizer.decode(batch.targets[batch.answer]) == "CD$"


# --- losses


def test_response_loss_is_the_mean_of_each_sample_s_response_whatever_the_padding():
    base = tiny()
    batch = base.batch([Pair("abc=", "CD"), Pair("abcdefg=", "ABCDE")])
    logits = base.logits(batch, None)
    found = response_loss(logits, batch, 0.1)
    for row, (start, end) in enumerate(((3, 6), (7, 13))):
        mine = logits[row, start:end], batch.targets[row, start:end]
        assert_close(found[row], F.cross_entropy(*mine, label_smoothing=0.1))


def test_noise_is_bounded_and_only_where_gradients_are_taken():
    base = tiny(replace(SMOKE, neftune=5.0, lora_dropout=0.5))
    batch, adapters = base.batch(words()), 0.1 * torch.randn(1, base.form.parameters)
    for training in (False, True):
        with torch.set_grad_enabled(training):
            first, second = (base.logits(batch, adapters) for _ in range(2))
        assert torch.equal(first, second) != training
    noise = t2l.neftune(torch.zeros(4, 7, 32), 5.0)
    assert 0.99 < noise.abs().max() * sqrt(7 * 32) / 5 <= 1


def test_reconstruction_is_mean_absolute_z_at_zero_and_zero_is_the_average(run):
    form = tiny().form
    library, net = torch.randn(5, form.parameters) * 0.1 + 1, hypernet(form, "L", method="recon")
    t2l.reconstruct(net, library, torch.zeros(5, 1, 6), run)
    z = (library - net.mean) / net.std
    parts = [part.abs().mean() for factors in form.split(z).values() for part in factors]
    assert_close(recon_loss(0 * z, z, form), sum(parts) / 8)
    for head in net.heads.values():
        nn.init.zeros_(head.weight)
    assert_close(net(torch.randn(1, 6))[0], library.mean(0))


def test_turning_the_ranks_of_adapters_lowers_their_alignment_and_changes_the_reconstruction():
    form = tiny().form
    library = torch.randn(1, form.parameters) + 0.1 * torch.randn(6, form.parameters)
    turned = library.clone()
    for factors in form.split(turned).values():
        R = torch.linalg.qr(torch.randn(6, 4, 4))[0]
        for factor in factors:  # B^T R^T R A is what it was
            factor.copy_(R @ factor)
    assert recon_loss(library, turned, form) > 0.1
    assert alignment(library, form) > 0.9 > 0.5 > alignment(turned, form)


# --- descriptions, tasks, sampling


def test_embeddings_have_unit_mean_square_and_hashing_is_alike_in_every_process():
    texts = ["Sort the words", "Sort  the words.", "Is it 7?"]
    z = encode(texts, SMOKE, "cpu")
    assert_close(z.square().mean(1), torch.ones(3))
    assert torch.equal(z[0], z[1])
    assert z.double().sum().item() == pytest.approx(-50.5964)  # Python's own hash differs between processes


def test_an_encoder_s_vectors_are_of_each_text_alone(text_files, tmp_path):
    lm, tokenizer = common.load_lm(str(tmp_path / "lm"))
    cfg, texts = replace(SMOKE, encoder=f"hf:{tmp_path / 'lm'}:last"), ["Add the two numbers.", "Add."]
    for text, z in zip(texts, encode(texts, cfg, "cpu"), strict=True):
        state = lm.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, -1]
        assert_close(z, F.normalize(state, dim=0) * sqrt(32))


def test_a_word_task_does_what_its_name_says_and_held_out_ones_share_no_sentence_with_training():
    trained, heldout, _ = word_tasks(SMOKE)
    assert len(trained) == 48 and len(heldout) == 16
    known = {text for task in trained for text in task.descriptions}
    assert not any(known & {*task.descriptions} for task in heldout)
    prompt, response = next(task.train[0] for task in trained if task.name == "1 1")
    assert response == "".join(chr(65 + (ord(c) - 96) % 10) for c in reversed(prompt[2:]))


def test_an_sni_row_becomes_definition_problem_and_answers():
    text = "Definition: Name animals.\n\nPositive Example 1 -\nInput: x\nOutput: y\n\n"
    text += "Now complete the following example -\nInput: in the zoo\nOutput:"
    row = {"input": text, "output": ["cat", "dog"]}
    pair = to_pair(row, "f")
    assert pair.response == "cat, dog" and pair.prompt.endswith("\n\nin the zoo")
    assert pair.prompt.startswith("Name animals. Separate several answers by commas.")
    assert to_pair(row | {"output": "cat"}, "f").response == "cat"


def test_a_description_that_a_task_is_trained_on_is_not_unseen_for_another(tmp_path):
    task_folders(tmp_path, "t0", "t1")
    cfg = replace(CONFIGS["text"], data=str(tmp_path), heldout=("t1",), tests=4)
    texts = t2l.load_tasks(cfg)[1][0].descriptions
    assert len(texts) == 5 and all("Add 1" in text for text in texts)  # not "Add", nor an empty one


# --- training and evaluation


def test_oracles_trained_side_by_side_are_those_trained_with_other_mates(run):
    base, tasks, trained = tiny(), word_tasks(SMOKE)[0], []
    for mates in (tasks[:2], [tasks[0], tasks[2]]):
        run.folder = run.folder / "next"
        torch.manual_seed(5)
        net = t2l.Table(t2l.lora_start(base.form).repeat(2, 1).double())
        t2l.fit(base, mates, torch.zeros(2, 1, 1), run, net, 4, 1e-2, clip=inf)
        trained.append(net.adapters.detach())
    assert_close(trained[0][0], trained[1][0], atol=1e-10, rtol=0)
    assert not torch.allclose(trained[0][0], trained[0][1])


def test_a_response_counts_as_right_where_greedy_decoding_writes_it(run):
    base = tiny()
    adapters = 0.3 * torch.randn(1, base.form.parameters)
    for prompt, _ in words():
        ids = [base.tokenizer(prompt).input_ids]
        base.factors = base.form.split(adapters)
        *ids, base.tokenizer.eos_token_id = common.generate(base.lm, ids, torch.zeros(1, 4), [], 0)[0]
        text = base.tokenizer.decode(ids)
        wrong = ("b" if text[0] == "a" else "a") + text[1:]
        task = Task("", [], [], [Pair(prompt, text), Pair(prompt, wrong)])
        assert t2l.evaluate(base, [task], [adapters], run)["exact"] == 0.5


# --- files


def test_peft_loads_what_is_written_and_gives_the_same_logits(tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny()
    adapter = 0.1 * torch.randn(base.form.parameters)
    save_peft(adapter, base.form, tmp_path / "a")
    assert torch.equal(load_peft(tmp_path / "a", base.form), adapter)
    ids = base.batch(words()).ids
    base.factors = base.form.split(adapter[None])
    theirs = peft.PeftModel.from_pretrained(tiny().lm, tmp_path / "a")(ids).logits
    assert_close(theirs, base.lm(ids).logits)


@pytest.mark.parametrize("change, words", [
    (dict(base="other"), "'other'.*not"), (dict(rank=5), "must match"), ({}, "not finite"),
    (dict(alpha=3.0), "'lora_alpha': 3.0.*not"), (dict(sizes={"a.k_proj": (2, 3)}), "KeyError.*q_proj"),
])  # fmt: skip
def test_an_expert_of_another_form_or_with_nan_is_refused_by_name(tmp_path, change, words):
    form = tiny().form._replace(**change)
    save_peft(torch.nan * torch.ones(form.parameters), form, tmp_path / "expert")
    with pytest.raises(UserError, match=f"expert.*{words}"):
        load_peft(tmp_path / "expert", tiny().form)


# --- the script


def task_folders(folder, *names):
    for k, name in enumerate(names):
        task = folder / name
        task.mkdir(parents=True)
        texts = ["Add", " ", *(f"Add {k}, {when}" for when in ("now", "soon", "again", "twice", "first"))]
        (task / "metadata.yaml").write_text(json.dumps({"descriptions": texts}))
        rows = [{"question": f"What is {i} plus {k}?", "answer": f"It is {i + k}."} for i in range(12)]
        (task / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))


def table(folder):
    found = json.loads((folder / "results.json").read_text())["table"]
    return {row: cell for row, (cell,) in found.items()}


TEXT = "--config text --base lm --data tasks --heldout t1 --tests 4 --encoder hash --steps 3 --tasks 2"


def test_a_model_tasks_and_a_benchmark_from_folders_then_an_adapter_for_a_sentence(
    run_main, text_files, tmp_path, monkeypatch
):
    task_folders(tmp_path / "tasks", "t0", "t1", "copa", "gsm8k")
    norms, words = [], [*TEXT.split(), "--rows", "T2L", "base", "multi-task LoRA", "oracle LoRAs", "--bench"]
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda _, norm: norms.append(norm))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda: SimpleNamespace(all_tasks=["copa"]))
    monkeypatch.setattr(common, "benchmark", lambda *_, **__: {"copa": {"alias": "c", "acc,none": 0.25}})
    assert "{'t1'} is no task of lm-eval" in run_main(t2l, *words, "t1")[2]
    code, _, err = run_main(t2l, *words, "copa", "--oracle_steps", "2")
    assert code == 0, err
    assert norms == [1.0] * 6 + [inf] * 2  # the baseline is clipped as T2L is
    folder = tmp_path / "out/t2l-text-s0-lm"
    found = table(folder)
    assert found["T2L"]["loss"] != found["base"]["loss"]
    assert found["T2L"]["copa"] == 0.25 and "copa" not in found["oracle LoRAs"]
    # one task to train on: benchmarks never are
    words = f"--checkpoint {folder}/t2l_L_128_hash_1-s0/t2l.pt --save new --generate".split()
    assert "or --generate is empty" in run_main(t2l, *words, "")[2]
    code, out, err = run_main(t2l, *words, "Add 3")
    assert code == 0 and "PeftModel" in out, err
    assert run_main(t2l, *words, "Add 3")[0] == 2


def test_modules_that_some_layers_lack_are_refused_and_so_is_a_tokenizer_without_template():
    base = tiny()
    base.lm.odd = nn.Linear(32, 32)  # one, where there are two q_proj
    for modules in ((), ("q_proj", "fc"), ("q_proj", "odd")):
        with pytest.raises(UserError, match="--modules"):
            t2l.find_form(base.lm, "tiny", replace(SMOKE, modules=modules))
    base.tokenizer.chat_template = None
    with pytest.raises(UserError, match="chat template"):
        t2l.Base(base.lm, base.tokenizer, "tiny", SMOKE)


@pytest.mark.parametrize("words, message", [
    ("--config smoke --encoder bert", "bert.*hf:NAME"), ("--config smoke --base gpt2", "gpt2.*neither"),
    ("--config smoke --encoder onehot", "onehot.*--adapters"),
    ("--generate x --checkpoint none.pt", "none.pt: no hypernetwork"),
    ("--config full --data nothing", "lol_1557"),
    ("--config text --encoder hash --base lm --data tasks", "letter_counting"),
    ("--config text --encoder hash --base lm --data tasks --heldout t1 --descriptions 9", "t0.*t2.*t1"),
    ("--config text --encoder hash --base lm --data tasks --heldout t0 t1 t2", "0 tasks to train.*3 held"),
])  # fmt: skip
def test_what_makes_no_sense_is_one_line_before_anything_is_computed(
    run_main, text_files, tmp_path, words, message
):
    task_folders(tmp_path / "tasks", "t0", "t1", "t2")
    code, _, err = run_main(t2l, *words.split())
    assert code == 2 and not (tmp_path / "out").exists()
    assert t2l.re.search(message, err), err


def test_dry_run_has_the_paper_s_sizes_and_hours(run_main, tmp_path):
    code, out, _ = run_main(t2l, "--config", "full", "--data", "none", "--dry_run")
    assert code == 0 and "55,424,000" in out and "missing: --data none" in out


def test_smoke_runs_and_a_killed_run_resumes_to_the_same_numbers(run_script, tmp_path):
    words = [ROOT / "t2l.py", "--config", "smoke", "--save_every", "2"]
    run_script(*words)
    folder = tmp_path / "out/t2l-smoke-s0-tiny"
    first = table(folder)
    assert {*first} == {*t2l.ROWS}
    for name in ("t2l_L_64_hash_48", "48_adapters_S_small"):
        cell = folder / f"{name}-s0"
        (cell / "result.json").unlink()
        for newest in sorted(cell.glob("step*/.metadata"))[-1:]:
            newest.unlink()
    run_script(*words, "--resume")
    assert table(folder) == first


def test_two_ranks_that_share_a_run_and_one_task_find_what_one_does(run_script, text_files, tmp_path):
    task_folders(tmp_path / "tasks", "t0", "t1")
    tables = []
    for ranks in (1, 2):
        words = f"{TEXT} --rows T2L --neftune 0 --lora_dropout 0 --dropout 0 --out o{ranks}".split()
        run_script(ROOT / "t2l.py", *words, ranks=ranks)
        tables.append(table(tmp_path / f"o{ranks}/t2l-text-s0-lm")["T2L"])
    assert tables[0] == pytest.approx(tables[1], rel=1e-4)
