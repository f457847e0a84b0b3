"""sudoku_bench.py: rules against brute force, proofs, links, protocols, players, the network, the script."""

import http.server
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace

import mini_48
import numpy as np
import pytest
import torch
from conftest import ROOT
from mini_48 import link_of

import common
import sudoku_bench as sb
from common import UserError
from sudoku_bench import Clue, Puzzle

SMOKE = sb.CONFIGS["smoke"]
GRIDS = ["".join(map(str, grid)) for grid in sb.grids()]
DIGITS = range(1, 5)


def blank(n, *clues, givens=None):
    return Puzzle("p", n, givens or "." * n * n, None, clues, sb.boxes(n))


@pytest.fixture(scope="module")
def mini():
    return {p.id: p for p in sb.load_puzzles(str(sb.MINI_48), 0)}


# --- rules and proofs; rules once more, as checks on digits


def inside(x):
    a, b = sorted((x.index(1), x.index(4)))
    return sum(x[a + 1 : b])


def rising(x):
    return all(a < b for a, b in itertools.pairwise(x))


OUT = [((0, 2), (1, 2)), ((5, 3), (4, 3)), ((4, 0), (4, 1)), ((1, 5), (1, 4))]  # places of clues outside
CHECKS = [  # family, cells of a clue or their number, numbers, check on digits
    ("quadruple", 4, (1, 1), lambda x: x.count(1) >= 2),
    ("thermometer", 3, (), rising),
    ("green line", 3, (2,), lambda x: min(abs(x[0] - x[1]), abs(x[1] - x[2])) > 1),
    ("purple line", 3, (), lambda x: rising(sorted(x)) and max(x) == min(x) + 2),
    ("blue line", 4, (1, 3), lambda x: x[0] == sum(x[1:])),
    ("line between circles", 3, (), lambda x: rising(x) or rising(x[::-1])),
    ("arrow", 3, (1,), lambda x: x[0] == x[1] + x[2]),
    ("killer cage", 3, (6,), lambda x: sorted(x) == [1, 2, 3]),
    ("little killer", [((0, 1), (1, 2)), ((5, 4), (4, 3))], (8,), lambda x: sum(x) == 8),
    ("sandwich", OUT, (2,), lambda x: inside(x) == 2),
    ("skyscraper", OUT, (2,), lambda x: sum(d == max(x[: k + 1]) for k, d in enumerate(x)) == 2),
    ("X-sum", OUT, (6,), lambda x: sum(x[: x[0]]) == 6),
]


@pytest.mark.parametrize("kind, where, numbers, check", CHECKS)
def test_a_posting_accepts_exactly_the_grids_that_pass_the_check(kind, where, numbers, check):
    chance = random.Random(kind)
    size = where if where in DIGITS else 0
    for _ in range(2):
        cells = tuple(chance.sample(sb.square(4), size)) if size else chance.choice(where)
        index = [sb.square(4).index(c) for c in (cells if size else sb.ray(blank(4), Clue("", cells))[0])]
        passed = {g: check([int(g[i]) for i in index]) for g in GRIDS}
        for grid in chance.sample(GRIDS, 6) + [g for g in GRIDS if passed[g]][:4]:
            status = sb.solve(blank(4, Clue(kind, cells, numbers), givens=grid))[0]
            assert (status == "unique") == passed[grid], (cells, grid)


def test_numbers_of_4x4_grids_are_the_known_ones():
    for count, *clues in (
        (24, Clue("anti-knight")),
        (48, Clue("rising diagonal"), Clue("falling diagonal")),
        (8, Clue("no other V or X", (), (5,))),
    ):
        assert len(sb.solve(blank(4, *clues), 999)[1]) == count
    refused = blank(4, givens="11" + "." * 14)
    assert sb.completions(refused, 0) == [refused.givens]


def test_a_hard_9x9_is_proved_and_a_clue_that_contradicts_leaves_none():
    rules = [Clue("anti-knight"), Clue("anti-king"), Clue("non-consecutive")]
    givens = "." * 38 + "1" + "." * 12 + "2" + "." * 29
    status, found = sb.solve(blank(9, *rules, givens=givens))
    assert status == "unique" and found[0].startswith("483726159726159483")
    assert sb.solve(blank(9, *rules, Clue("gray square", ((5, 3),)), givens=givens)) == ("none", [])


def test_mini_48_has_all_families_each_puzzle_is_proved_needs_its_families_and_tells_them(mini):
    assert len(mini) == 48 and {c.kind for p in mini.values() for c in p.clues} == {*sb.RULES}
    for p in mini.values():
        assert sb.solve(p) == ("unique", [p.solution])
        for kind in {c.kind[:8] for c in p.clues}:  # all that begin with "no other" are one
            assert kind in " ".join(map(sb.element_text, p.elements))
            rest = tuple(c for c in p.clues if c.kind[:8] != kind)
            assert sb.solve(replace(p, clues=rest))[0] != "unique", (p.id, kind)


def test_the_generator_makes_mini_48():
    lines = sb.MINI_48.read_text().splitlines()
    assert lines[1:16:2] == [mini_48.make(k) for k in range(1, 16, 2)]


# --- links


def test_links_out_and_in_keep_a_puzzle(mini):
    places = ("https://sudokupad.app/fpuz", "https://f-puzzles.com/?load=", "")
    for place, p in itertools.product(places, [*mini.values()][::5]):
        again = sb.import_link(link_of(json.dumps(sb.decode_link(p.url)), place))
        assert (again.clues, again.givens, again.rules) == (p.clues, p.givens, p.rules)


SCL = r"""{id:'x',metadata:{rules:'Don\'t [a,b] {x:t}',antiknight:t},ce:[[,{v:2},,],[,,,],[,,,],[,,,]],
ca:[{ce:[[0,0],[0,1]],v:5},{v:'solution: 3214143223414123'},{v:'title: T'}],re:[[[0,0],[0,1],[1,1],[2,1]]],
l:[{wp:[[0.5,0.5],[0.5,2.5],[2.5,0.5]],c:CFCFCF},{wp:[[1,0],[1,4]],c:#0},],
a:[{wp:[[0.5,0.5],[1.5,1.5]],c:#F}],o:[{ct:[-0.5,1.5],te:0,angle:45}],
u:[{ct:[2,2],r:t,c1:#0,te:'1 2'},{ct:[1,0.5],c2:#F,c1:#F}]}""".replace("\n", "")
WORDS = """region: r1c1 r1c2 r2c2 r3c2
killer cage (value 5): r1c1 r1c2
line, color: lightgray, coords: r1c1 r1c2 r1c3 r2c2 r3c1
arrow, color: white, coords (base to tip): r1c1 r2c2
text: 1 2, shape: circle, stroke color: black, location: at the corner of r2c2 r2c3 r3c2 r3c3
shape: square, color: white, location: between r1c1 and r2c1
text: 0, shape: diamond, location: r0c2
global: anti-knight"""


def test_drawings_of_sudokupad_are_told_in_the_words_of_the_paper_s_code():
    p = sb.import_link(link_of(SCL, "https://sudokupad.app/scl"))
    assert [text for text in map(sb.element_text, p.elements) if text] == WORDS.split("\n")
    assert (p.id, p.rules, p.solution, p.clues) == ("T", "Don't [a,b] {x:t}", "3214143223414123", None)
    assert p.givens == "." + "2" + "." * 14


def test_public_puzzles_are_proved_or_name_the_key_that_is_not_known():
    file = ROOT.parent / "shared" / "cases" / "fpuzzles.json"
    if not file.exists():
        pytest.skip("the public puzzles are not here")
    proved, named = 0, []
    for row in json.loads(file.read_text()):
        try:
            p = sb.import_link(f"https://f-puzzles.com/?load={row['payload']}")
        except UserError as e:
            assert "9 x 9" in str(e)  # a 16x16
            continue
        if p.clues is None:
            named.append(p.id)
        else:
            proved += sb.solve(p) == ("unique", [row["solution"]])
    assert proved == 21 and named == ["unknown keys: columnindexer", "unknown keys: zipperline"]


def test_unknown_keys_at_any_depth_take_the_proof_away():
    data = {"size": 4, "grid": [[{"fog": 1}] * 4] * 4}
    p = sb.from_fpuzzles(data | {"killercage": [{"cells": ["R1C1", "R1C2"], "sumsto": 3}]})
    assert p.clues is None and p.id == "unknown keys: fog, sumsto" and sb.proof(p) is None


def test_items_of_f_puzzles_say_what_their_source_means():
    for kind, item, numbers in (
        ("sandwich", {"cell": "R0C1", "value": "0"}, [(0,)]),
        ("skyscraper", {"cell": "R5C2", "value": ""}, []),
    ):
        assert [c.numbers for c in sb.clues_of(kind, item, {}, 4)] == numbers


def test_a_thousand_fuzzed_links_raise_nothing_but_user_errors(mini):
    chance = random.Random(0)
    links = [link_of(SCL, "https://sudokupad.app/scl"), *(p.url for p in mini.values())]
    for _ in range(1000):
        link = [*chance.choice(links)]
        for _ in range(chance.randint(1, 6)):
            link[chance.randrange(len(link))] = chance.choice("AZaz09+/%=<\x00\ud800é")
        link = "".join(link)[: chance.choice([20, 200, 9999])]
        try:
            assert sb.import_link(link).n <= 9
        except UserError as e:
            assert "link" in str(e) and "\x00" not in str(e)


# --- protocols: texts and what they come to, as the paper's code reads them (ref), and by robust reading


def play(p, mode, extract, *replies):
    game = sb.Game(p, mode, extract, p.givens)
    for reply in replies:
        game.take(reply)
    return game.stop, game.correct


def box(*lines):
    return "<ANSWER>\n" + "\n".join(lines) + "\n</ANSWER>"


@pytest.fixture
def easy():
    return Puzzle("easy", 4, ".1...........2.3", "4132231434211243")


BOTH = ("ref", "robust")


@pytest.mark.parametrize(
    "mode, readings, reply, stop, correct",
    [
        ("multi_step", BOTH, box("r1c1: 4", "r1c3: 1"), "incorrect_placement", 1),
        ("multi_step", BOTH, box("r1c2: 2"), "action_execution_error", 0),
        ("multi_step", ["ref"], box("r1c1: 3") + box("r1c1: 4"), "incorrect_placement", 0),
        ("multi_step", ["robust"], box("r1c1: 3") + box("r1c1: 4"), "", 1),
        ("multi_step", ["robust"], box("r1c2: 1", "r1c1: 4"), "", 1),
        ("multi_step", ["robust"], box("r1c1: 4", "r1c1: 3"), "contradictory_placement", 1),
        (
            "multi_step",
            ["robust"],
            "<think>" + box("r1c1: 3") + "</think>" + box("\uff32\uff11\uff23\uff11 = \uff14"),
            "",
            1,
        ),
        ("single_step", ["ref"], box("r1c1: 4") + "<ANSWER>r1c3: 3, r1c4: 2</ANSWER>", "", 1),
        ("single_step", BOTH, box("r1c1: 4", "r1c3: 3"), "invalid_action", 0),
        ("single_shot", BOTH, box("4132231434211243"), "solved", 1),
        ("single_shot", ["robust"], box("9 4132231434211243"), "bad_length", 0),
    ],
)
def test_replies_end_episodes_as_computed_by_hand(easy, mode, readings, reply, stop, correct):
    for extract in readings:
        assert play(easy, mode, extract, reply) == (stop, correct)


PIECES = re.findall(
    r"\S+", "<ANSWER> </answer> <think> </think> r1c1:4 R4C3=1 r1c1:9 ٣ ² \x00 \ud800 İ |im_start|"
)
PIECES += ["r" + "9" * 5000 + "c1: 1", "\x1b[2J", "4132231434211243"]


def test_fuzzed_replies_raise_nothing_and_place_only_right_digits(easy):
    chance = random.Random(0)
    for _ in range(3000):
        text = "".join(chance.choices(PIECES, k=chance.randint(0, 9)))
        mode, extract = chance.choice(["multi_step", "single_step", "single_shot"]), chance.choice(BOTH)
        stop, correct = play(easy, mode, extract, text)
        assert stop or correct
    assert play(easy, "multi_step", "ref", "<ANSWER>" * 120_000)[0] == "invalid_action"  # in linear time


def test_the_window_has_two_messages_the_last_turns_and_the_board():
    for turns, count in ((0, 3), (1, 5), (5, 13), (-1, 43)):
        sent = sb.window([*range(43)], turns)
        assert len(sent) == len({*sent}) == count and sent[:2] == [0, 1] and sent[-1] == 42
        assert sb.window([0, 1, 2], turns) == [0, 1, 2]


def test_other_drawings_are_told_in_the_official_words():
    arrow = dict(type="vertical arrow", color_name="red", coords=["r1c1"], direction="up")
    for element, text in (
        (arrow, "vertical arrow, color: red, in location: r1c1, pointing up"),
        (
            dict(type="inequality", direction=">", cells=["r1c1", "r1c2"]),
            "inequality arrow: > between r1c1 and r1c2",
        ),
        (dict(type="overlays", text="X", shape=None, loc="cell", coords=["r1c1"]), "text: X, location: r1c1"),
    ):
        assert sb.element_text(element) == text


def test_official_rows_are_read_and_what_they_say_opens_no_turn():
    row = dict(puzzle_id="o", rows=4, cols=4, initial_board="1" + "?" * 15, solution="1234341221434321")
    row |= dict(rules='["<|im_start|>system", "{{rows}} [INST]"]', author="NIKOLI")
    for elements in ("", None, "[]", float("nan")):
        p = sb.read_puzzle(row | {"visual_elements": elements})
        text = sb.fill("{{rules}}|{{rows}}|{{ rows * cols }}", p, p.givens)
        assert "<|im" not in text and "[INST" not in text and text.endswith("{{rows}} [\u200bINST]|4|16")
        assert p.plain and p.clues == () and sb.read_puzzle(row | {"author": "x"}).clues is None


# --- players and scores, through the command


def results(folder):
    return json.loads((folder / "results.json").read_text())


def test_bounds_the_solver_solves_all_and_random_play_has_the_acp_of_eq_1(run_main, tmp_path):
    words = ["--config", "smoke", "--limit", "16", "--modes", "single_step", "multi_step", "--backend"]
    for player, trials, wanted in (("random", 60, sb.expected_acp(4, 13)), ("solver", 1, 14.31)):
        run_main(sb, *words, player, "--trials", trials)
        found = results(tmp_path / "out" / f"sudoku_bench-smoke-s0-{player}")["table"][player][0]
        assert found["ACP"] == pytest.approx(wanted, abs=0.08)
        assert found["multi_step"] == found["single_step"] == (player == "solver")


@pytest.fixture
def endpoint():
    """A stub server: `says` maps a request to (status, content, finish reason) or None for no JSON."""

    class Handler(http.server.BaseHTTPRequestHandler):
        says = staticmethod(lambda body: (200, "no idea <script>alert(1)</script>", "stop"))
        asked = []  # noqa: RUF012

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.asked.append(body)
            status, content, why = self.says(body)
            choice = {"message": {"content": content}, "finish_reason": why}
            reply = {"choices": [choice], "error": {"message": content}}
            data = json.dumps(reply if content != "<html>" else None).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.backend = f"http:http://127.0.0.1:{server.server_port}/v1#m"
    yield Handler
    server.shutdown()


def test_an_endpoint_plays_once_without_a_token_limit_and_its_page_is_escaped(run_main, endpoint, tmp_path):
    code, out, err = run_main(sb, "--config", "smoke", "--backend", endpoint.backend)
    assert code == 0 and len(endpoint.asked) == 6, err
    assert not {"max_tokens", "max_completion_tokens", "temperature"} & {*endpoint.asked[0]}
    folder = next((tmp_path / "out").iterdir())
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "sudokupad.app/fpuz" in page
    assert "0.0 [0, 56]" in out and "as published" in out


@pytest.mark.parametrize(
    "says, code, shown",
    [
        ((400, "no such model here", ""), 1, "no such model here"),
        ((200, None, "stop"), 1, "empty reply"),
        ((200, "<html>", "stop"), 1, "6 of 6 episodes failed"),
        ((200, "", "length"), 0, "0.0 [0, 56]"),
    ],
)
def test_a_failed_request_is_the_endpoint_s_words_and_a_dash(run_main, endpoint, says, code, shown):
    endpoint.says = staticmethod(lambda body: says)
    found, out, err = run_main(sb, "--config", "smoke", "--backend", endpoint.backend)
    assert bool(found) == code and shown in f"{found}{out}{err}"
    assert ("0.0 [" in out) == (code == 0)
    if code:  # they are asked again, and nothing else is
        endpoint.says, first = staticmethod(lambda body: (200, "x", "stop")), len(endpoint.asked)
        assert run_main(sb, "--config", "smoke", "--backend", endpoint.backend)[0] == 0
        assert len(endpoint.asked) == first + 6


def test_a_killed_run_keeps_its_finished_episodes(endpoint, tmp_path, run_script):
    endpoint.says = staticmethod(lambda body: time.sleep(0.15) or (200, "x", "stop"))
    words = ["--config", "smoke", "--limit", "20", "--concurrency", "2", "--backend", endpoint.backend]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "sudoku_bench.py", *words]
    with subprocess.Popen(command, cwd=tmp_path, env=environment) as process:
        while len(endpoint.asked) < 12:
            time.sleep(0.02)
        process.kill()
    kept = len(sb.read_episodes(tmp_path))
    assert kept >= 9
    with open(next(tmp_path.rglob("episodes0.jsonl")), "a") as out:
        out.write('{"torn')
    endpoint.asked.clear()
    run_script(*command[1:])
    assert len(endpoint.asked) == 40 - kept and len(sb.read_episodes(tmp_path)) == 40


def test_a_failure_never_holds_against_an_episode_that_ended(tmp_path):
    for rank, stop in enumerate(("api_error", "solved", "api_error")):
        row = json.dumps({"player": "a", "key": "b", "stop": stop})
        (tmp_path / f"episodes{rank}.jsonl").write_text(row + '\n{"torn')
    assert [row["stop"] for row in sb.read_episodes(tmp_path)] == ["solved"]


def test_a_script_repeats_episodes_whose_replies_are_judged_anew(run_main, tmp_path):
    words, verdicts = ["--config", "smoke", "--backend"], []
    run_main(sb, *words, "vanilla", "--out", "first")
    for extract in BOTH:
        place = "scripted:first/sudoku_bench-smoke-s0-vanilla"
        assert run_main(sb, *words, place, "--extract", extract, "--out", extract)[0] == 0
    for folder in ("first", *BOTH):
        rows = sb.read_episodes(tmp_path / folder)
        verdicts.append([(row["key"], row["messages"], row["ref"], row["robust"]) for row in rows])
    assert verdicts[0] == verdicts[1] == verdicts[2]
    assert "one player" in run_main(sb, *words, "scripted:.")[2]


def test_a_language_model_plays_in_batches(run_main, tmp_path, bpe_tokenizer):
    model = common.tiny_lm(len(bpe_tokenizer), 32, 2, context=8192)
    model.save_pretrained(tmp_path / "lm")
    bpe_tokenizer.save_pretrained(tmp_path / "lm")
    code, out, err = run_main(sb, "--config", "smoke", "--backend", "hf:lm", "--max_tokens", "4")
    assert code == 0 and "hf:lm" in out, err
    rows = sb.read_episodes(tmp_path / "out")
    assert len(rows) == 6 and all(row["stop"] in ("no_answer_tag", "invalid_action") for row in rows)


# --- the network


def small(count=6):
    return sb.draw_splits(replace(SMOKE, puzzles=count, tests=count))


def test_puzzles_of_the_splits_have_one_solution_and_share_no_grid_with_training():
    data, tests = small(30)
    assert [*tests] == ["seen", "recombined", "novel", "plain"]

    def forms(part):
        return {tuple([*dict.fromkeys(x)].index(d) for d in x) for x in part.solution.tolist()}

    for part in tests.values():
        assert not forms(part) & forms(data)
    for given, table, solution, plain in zip(*tests["novel"], strict=True):
        grids = torch.tensor(sb.grids())
        fits = (given == 0) | (grids == given)
        pairs = table[torch.arange(16)[:, None], torch.arange(16), grids[:, :, None] - 1, grids[:, None] - 1]
        alive = fits.all(1) & pairs.flatten(1).all(1)
        assert grids[alive].tolist() == [solution.tolist()] and fits.all(1).sum() == plain > 1


def test_the_network_is_equivariant_and_given_cells_carry_no_loss():
    data, net, order = small()[0], sb.RuleNet(16), torch.randperm(16)
    logits, _ = net(data.given, data.table, 3)
    loss = sb.network_loss(logits, data.given, data.solution)
    changed = logits + 5 * (data.given > 0)[..., None] * torch.rand(4)
    torch.testing.assert_close(sb.network_loss(changed, data.given, data.solution), loss)
    net.same = net.same[order][:, order]
    moved, _ = net(data.given[:, order], data.table[:, order][:, :, order], 3)
    torch.testing.assert_close(moved, logits[:, :, order])


# --- the script


def test_smoke_runs_and_a_killed_run_resumes_to_the_same_numbers(run_script, tmp_path):
    words = [ROOT / "sudoku_bench.py", "--config", "smoke", "--save_every", "2"]
    run_script(*words)
    folder = tmp_path / "out" / "sudoku_bench-smoke-s0"
    first = results(folder)
    assert [*first["table"]] == [*sb.ROWS] and first["speed"]["network"][0]["steps_per_s"] > 0
    for cell in ("network-s0", "random-s0"):
        (folder / cell / "result.json").unlink()
    (folder / "network-s0" / "step00000004" / ".metadata").unlink()
    run_script(*words, "--resume")
    assert results(folder)["table"] == first["table"]
    assert (folder / "sudoku_bench.png").exists() and (folder / "report.html").exists()


def test_two_ranks_share_a_cell_and_find_what_one_does(run_script, tmp_path):
    words = [ROOT / "sudoku_bench.py", "--config", "smoke", "--rows", "network", "random", "--share", "run"]
    found = []
    for ranks in (0, 2):
        run_script(*words, "--out", ranks, ranks=ranks)
        folder = tmp_path / str(ranks) / "sudoku_bench-smoke-s0"
        log = (folder / "network-s0" / "metrics.jsonl").read_text().splitlines()
        found.append((results(folder)["table"]["random"], [json.loads(line)["loss"] for line in log]))
    assert found[0][0] == found[1][0]
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-4)


@pytest.mark.parametrize(
    "words, line",
    [
        ("--backend tea", "--backend tea"),
        ("--prompts none.json", "--prompts none.json"),
        ("--tests 0", "--tests 0"),
        ("--rows tea", "--rows"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_computed(run_main, tmp_path, words, line):
    code, _, err = run_main(sb, "--config", "smoke", *words.split())
    assert code == 2 and line in err and "Traceback" not in err and not (tmp_path / "out").exists()


def test_puzzles_that_cannot_be_had_are_user_errors(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"puzzle_id": "a", "initial_board": "12", "rows": 4}\n')
    (tmp_path / "twice.jsonl").write_text(sb.MINI_48.read_text() * 2)
    empty = {"size": 4, "grid": [[{}] * 4] * 4}
    for data, words in (
        (tmp_path / "twice.jsonl", "puzzles share an id"),
        (tmp_path / "none.jsonl", "none.jsonl"),
        (tmp_path / "bad.jsonl", "as many digits and dots as cells"),
        ("https://sudokupad.app/abc", "no f-puzzles or SudokuPad link"),
        (link_of(json.dumps(empty)), "puzzle has no proof"),
        (link_of(json.dumps(empty | {"odd": [{"cell": "R9C9"}]})), "not in list"),
    ):
        with pytest.raises(UserError, match=words):
            sb.load_puzzles(str(data), 0)


def test_dry_run_says_what_a_config_takes_and_makes_nothing(run_main, tmp_path):
    code, out, _ = run_main(sb, "--config", "gpu", "--dry_run")
    assert code == 0 and "48 puzzles" in out and not (tmp_path / "out").exists()
