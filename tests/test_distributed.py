"""Two Gloo ranks: collectives, shared jobs, and training that gives what one process gives."""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import common
import rlt


def collectives(run):
    """What two ranks see of each other."""
    x = torch.tensor([1.0, 2.0]) * (run.rank + 1)
    two_workers = run.stage("workers")
    two_workers.cfg = dataclasses.replace(run.cfg, workers=2)
    try:
        run.agree("rank 1 has a problem" if run.rank == run.world_size - 1 else None)
        error = None
    except common.UserError as e:
        error = str(e)
    return {
        "mean": run.mean(x).tolist(),
        "unchanged": x.tolist(),
        "gather": run.gather({"rank": run.rank}),
        "same": [torch.rand(3, generator=run.generator("a")).tolist(), torch.rand(3).tolist()],
        "jobs": run.jobs(["a", "b", "c"], job),
        "workers": two_workers.stage("grid").jobs(["d", "e", "f"], draw),
        "error": error,
    }


def job(name, run):
    return {"by": int(os.environ.get("RANK", 0)), "world": run.world_size, "draw": torch.rand(()).item()}


def update(run):
    """One GRPO step by plain gradient descent on a fixed batch, data parallel; returns the weights."""
    cfg = run.cfg
    task = rlt.hop_task(cfg, run)
    problems = rlt.make_problems(8, cfg, torch.Generator().manual_seed(0), 0.5)
    model, reference = rlt.hop_model(cfg), rlt.hop_model(cfg)
    prompts, completions = (
        task.ids([task.fmt.teacher_prompt(e) for e in problems]),
        task.ids([e.t[: 3 + i] + "}$" for i, e in enumerate(problems)]),
    )
    mine = slice(run.rank * 8 // run.world_size, (run.rank + 1) * 8 // run.world_size)
    advantage = torch.linspace(-2, 2, 8)[mine]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rlt.grpo_update(run.wrap(model), reference, prompts[mine], completions[mine], advantage, optimizer, task)
    return {"weights": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()}


def draw(name, run):
    return {"draw": torch.rand(()).item()}


def training(run):
    """Three SFT steps and three GRPO updates of the built-in task, data parallel; returns the weights."""
    task = rlt.hop_task(run.cfg, run)
    problems = rlt.make_problems(16, run.cfg, torch.Generator().manual_seed(0), 0.5)
    torch.manual_seed(0)
    model = rlt.hop_model(run.cfg)
    student = rlt.copy_frozen(model, task)
    rlt.distil(model, problems, dataclasses.replace(task, run=run.stage("sft")), 3)
    rlt.train_grpo(model, problems, "rlt", student, dataclasses.replace(task, run=run.stage("rl")))
    accuracy = rlt.accuracy(model, problems[:5], task, 1.0, k=2).tolist()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return {"weights": weights.tolist(), "accuracy": accuracy}


if __name__ == "__main__":  # torchrun starts this file as a script
    config = dataclasses.replace(rlt.CONFIGS["smoke"], prompts=4, max_new=16, micro_tokens=100)
    with common.Run(dataclasses.replace(config, out=sys.argv[2], eval_new=16)) as this_run:
        found = globals()[sys.argv[1]](this_run)
        Path(sys.argv[2], f"{sys.argv[1]}{this_run.rank}.json").write_text(json.dumps(found))


def results(run_script, tmp_path, function, ranks):
    out = tmp_path / f"{function}{ranks}"
    out.mkdir()
    run_script(ROOT / "tests" / "test_distributed.py", function, out, ranks=ranks)
    return [json.loads((out / f"{function}{rank}.json").read_text()) for rank in range(max(1, ranks))]


def test_collectives_and_jobs(run_script, tmp_path):
    first, second = results(run_script, tmp_path, "collectives", 2)
    assert first["mean"] == second["mean"] == [1.5, 3.0]
    assert (first["unchanged"], second["unchanged"]) == ([1.0, 2.0], [2.0, 4.0])
    assert first["gather"] == second["gather"] == [{"rank": 0}, {"rank": 1}]
    assert first["same"] == second["same"], "generators agree unless a script asks for other streams"
    assert first["jobs"] == second["jobs"] and [r["by"] for r in first["jobs"].values()] == [0, 1, 0]
    assert all(r["world"] == 1 for r in first["jobs"].values())
    assert first["workers"] == second["workers"] and len(first["workers"]) == 3, (
        "two ranks with two workers each"
    )
    assert first["error"] == second["error"] == "rank 1 has a problem"
    (alone,) = results(run_script, tmp_path, "collectives", 0)
    assert alone["workers"] == first["workers"]
    assert [r["draw"] for r in alone["jobs"].values()] == [r["draw"] for r in first["jobs"].values()]


def test_an_update_on_two_ranks_is_that_of_one_process(run_script, tmp_path):
    one, *two = [*results(run_script, tmp_path, "update", 0), *results(run_script, tmp_path, "update", 2)]
    for x in two:
        torch.testing.assert_close(
            torch.tensor(x["weights"]), torch.tensor(one["weights"]), rtol=0, atol=1e-6
        )


def test_training_on_two_ranks_equals_one_process(run_script, tmp_path):
    """Adam turns the rounding noise of a zero gradient (a key's bias) into steps: hence 1e-4 after six."""
    one, *two = [*results(run_script, tmp_path, "training", 0), *results(run_script, tmp_path, "training", 2)]
    for x in two:
        torch.testing.assert_close(
            torch.tensor(x["weights"]), torch.tensor(one["weights"]), rtol=0, atol=1e-4
        )
        assert x["accuracy"] == one["accuracy"]


def rows(folder, stage):
    """Logged numbers of a stage, without the step."""
    lines = (folder / "out" / "rlt-text-s0" / stage / "metrics.jsonl").read_text().splitlines()
    return [list(json.loads(line).values()) for line in lines]


def test_sharded_models_train_as_whole_ones_do_and_resume_on_another_number_of_ranks(
    run_script, tmp_path, text_files
):
    """FSDP2 over two ranks: warm-up, RL, collection, distillation, evaluation, then a resume on one rank."""
    line = [ROOT / "rlt.py", *text_files, "--stages", "warmup,rl,collect,distil,eval", "--updates", "3"]
    run_script(*line)
    whole = {stage: rows(tmp_path, stage) for stage in ("warmup", "rl", "student-RLT")}
    out = tmp_path / "out" / "rlt-text-s0"
    traces = (out / "traces.jsonl").read_text().splitlines()
    sharded = [*line, "--shard", "--save_every", "2", "--sft_save_every", "1"]
    run_script(*sharded, ranks=2)
    for stage, expected in whole.items():
        torch.testing.assert_close(
            torch.tensor(rows(tmp_path, stage)), torch.tensor(expected), rtol=2e-3, atol=2e-4
        )
    found = [json.loads(x)["reasoning_trace"] for x in (out / "traces.jsonl").read_text().splitlines()]
    assert found == [json.loads(x)["reasoning_trace"] for x in traces]
    (out / "rl" / "checkpoint.previous.pt").rename(out / "rl" / "checkpoint.pt")  # as if killed after step 1
    before = rows(tmp_path, "rl")
    run_script(*sharded, "--resume")
    torch.testing.assert_close(torch.tensor(rows(tmp_path, "rl")), torch.tensor(before), rtol=2e-3, atol=2e-4)
    (out / "rl" / "checkpoint.previous.pt").rename(
        out / "rl" / "checkpoint.pt"
    )  # and back: one rank saved, two resume
    run_script(*sharded, "--resume", ranks=2)
    torch.testing.assert_close(torch.tensor(rows(tmp_path, "rl")), torch.tensor(before), rtol=2e-3, atol=2e-4)


def test_smoke_under_torchrun_gives_the_table_of_one_process(run_script, tmp_path):
    tables = []
    for ranks in (0, 2):
        run_script(
            ROOT / "rlt.py", "--config", "smoke", "--seeds", "1", "--out", tmp_path / str(ranks), ranks=ranks
        )
        found = json.loads((tmp_path / str(ranks) / "rlt-smoke-s0" / "results.json").read_text())
        assert found["world_size"] == max(1, ranks)
        tables.append(found["table"])
    assert tables[0] == tables[1]


def test_bad_rank_count_is_one_line(run_script, text_files):
    done = run_script(ROOT / "rlt.py", *text_files, "--prompts", "3", ranks=2, check=False)
    assert done.returncode != 0 and "--prompts 3 is no multiple of the 2 ranks" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_follows_the_cpu(tmp_path):
    found = []
    for device in ("cpu", "cuda"):
        cfg = dataclasses.replace(
            rlt.CONFIGS["smoke"], out=str(tmp_path / device), device=device, dtype="float32"
        )
        with common.Run(cfg) as run:
            torch.manual_seed(0)
            model = rlt.hop_model(cfg).to(run.device)
            task = rlt.hop_task(cfg, run)
            problems = rlt.make_problems(8, cfg, torch.Generator().manual_seed(0), 0.5)
            rlt.distil(model, problems, task, 20)
            lines = (run.folder / "metrics.jsonl").read_text().splitlines()
            found.append([json.loads(line)["loss"] for line in lines])
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-3, atol=1e-3)
