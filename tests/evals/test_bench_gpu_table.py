"""The table of `bench gpu`: every line from made-up results on both sides of its goal, and what nobody measured."""

import copy
from pathlib import Path
from typing import Any

import pytest

import evals.__main__ as program
from evals.bench import attention, gpu, moe, train_step
from evals.bench._gpu_table import must_lines, stage_lines
from evals.cli import Parser
from neomoba_dist.errors import MISTAKE

# in the order of the table: what, must, and the stage that measures it
LINES = [
    ("MoBA fwd + bwd against the fastest dense kernel, 8k", "at least 1.2 x", "attention"),
    ("MoBA fwd + bwd against the fastest dense kernel, 16k", "at least 2.5 x", "attention"),
    ("MoBA fwd + bwd against the fastest dense kernel, 32k", "at least 6 x", "attention"),
    ("MoBA fwd + bwd against the fastest dense kernel, 64k", "at least 12 x", "attention"),
    ("MoBA fwd + bwd against the fastest dense kernel, 128k", "at least 24 x", "attention"),
    ("the same in phase 3's shape against SDPA", "at least 10 x", "phase3_shape"),
    ("peak memory of MoBA fwd + bwd against flash attention, 32k", "at most 1.2 x", "attention"),
    ("peak memory of MoBA fwd + bwd against flash attention, 128k", "at most 1.2 x", "attention"),
    ("MFU of phase 1, one card", "at least 45 %", "phase1"),
    ("MFU of phase 2, one card", "at least 45 %", "phase2"),
    ("MFU of phase 3, one card", "at least 35 %", "phase3"),
    ("tokens/s of phase 1 against transformers, both compiled", "at least 1.5 x", "peer"),
    ("MoE layer's time against dense, 8,192 x 512, 8 experts, top 2", "at most 1.25 x", "moe"),
    ("MoE layer's time against dense, 32,768 x 768, 32 experts, top 4", "at most 1.15 x", "moe_large"),
    ("block 128, top-k 8 against FlashAttention-2, 32k", "at least 3.4 x", "flash_moba"),
    ("block 128, top-k 8 against FlashAttention-2, 64k", "at least 5.7 x", "flash_moba"),
]
REACHED = [float(must.split()[2]) for _, must, _ in LINES]


def row(length: int, moba: float = 1.0, **rivals: float) -> dict[str, Any]:
    """Of attention.json: seconds of forward + backward; names of rivals."""
    return {
        "length": length,
        "moba": {"both": moba},
        "rivals": {name: {"name": name, "both": seconds} for name, seconds in rivals.items()},
        "moba_peers": {"fla_moba": {"both": 0.001}},
    }


def steps(mfu: float) -> dict[str, Any]:
    moba = {"length": 64, "attention": "moba", "mfu": mfu / 100, "tokens_per_second": 1e5, "peak_gib": 20.0}
    return {"rows": [moba, {**moba, "attention": "full", "mfu": 0.99}]}


def measured(figures: list[float]) -> dict[str, dict[str, Any]]:
    """Stages whose results say `figures` in the lines of the table, and more of other kernels that must not count."""
    lengths = (8192, 16384, 32768, 65536, 131072)
    # the fastest dense kernel is another one at each length
    names = ("flash", "cudnn", "flash_attn_4", "flash_attn_2", "flex")
    rows = []
    for length, ratio, fastest in zip(lengths, figures[:5], names, strict=True):
        slower = {name: 3 * ratio for name in names if name != fastest}
        rows.append(row(length, 1.0, **slower, **{fastest: ratio}))
    for place, ratio in ((2, figures[6]), (4, figures[7])):
        rows[place] |= {"moba_peak_bytes": round(ratio * 10**6), "full_peak_bytes": 10**6}
    results = {
        "attention": {"rows": rows},
        "phase3_shape": {"rows": [row(32768, 2.0, flash=99.0, cudnn=2 * figures[5], flash_attn_4=0.1)]},
        **{f"phase{n}": steps(figures[7 + n]) for n in (1, 2, 3)},
        "peer": {"comparison": {"ratio": figures[11], "tokens_per_second": {"ours": 3e5, "hf": 2e5}}},
        "moe": {"ratio": figures[12], "moe_seconds": 2.0, "dense_seconds": 1.0},
        "moe_large": {"ratio": figures[13], "moe_seconds": 2.0, "dense_seconds": 1.0},
        "flash_moba": {
            "rows": [
                row(32768, 1.0, flash=figures[14], flash_attn_2=99.0, cudnn=0.1),
                row(65536, 1.0, flash=99.0, flash_attn_2=figures[15], cudnn=0.1),
            ]
        },
    }
    ended = {"status": "ok", "seconds": 5.0, "last_lines": []}
    return {name: {**ended, "results": {f"{name}.json": result}} for name, result in results.items()}


def verdicts(figures: list[float]) -> list[str]:
    return [line[3] for line in must_lines(measured(figures))[1:]]


def missing(line: int) -> float:
    """A figure just on the wrong side of the line's goal."""
    return REACHED[line] * (1.001 if LINES[line][1].startswith("at most") else 0.999)


def test_every_line_and_its_goal() -> None:
    header, *lines = must_lines(measured(REACHED))
    assert header == ["what", "measured", "must", "verdict"]
    assert [(what, must) for what, _, must, _ in lines] == [(what, must) for what, must, _ in LINES]
    assert {verdict for *_, verdict in lines} == {"reached"}  # a goal itself counts
    shown = [line[1] for line in lines]
    assert shown[1] == "2.500 x (cudnn 2500 / 1000 ms)"
    assert shown[5] == "10.000 x (cudnn 2e+04 / 2000 ms)"
    assert shown[8] == "45.00 % (100,000 tokens/s, 20 GiB)"
    assert shown[11] == "1.500 x (300,000 / 200,000)"
    assert shown[15] == "5.700 x (flash_attn_2 5700 / 1000 ms)"


@pytest.mark.parametrize("line", range(len(LINES)), ids=[what for what, *_ in LINES])
def test_a_line_misses_alone(line: int) -> None:
    figures = [*REACHED]
    figures[line] = missing(line)
    assert verdicts(figures) == ["missed" if place == line else "reached" for place in range(len(LINES))]


def test_a_figure_that_is_no_number_is_missed() -> None:
    assert verdicts([float("nan") if place == 11 else goal for place, goal in enumerate(REACHED)])[11] == "missed"


@pytest.mark.parametrize("stage", sorted({stage for *_, stage in LINES}))
def test_what_a_stage_has_not_left_is_not_measured(stage: str) -> None:
    everything = measured(REACHED)
    absent = {name: done for name, done in everything.items() if name != stage}
    failed = {**everything, stage: {**everything[stage], "status": "stopped after 5 s", "results": {}}}
    for found in (absent, failed):
        for (what, must, of), line in zip(LINES, must_lines(found)[1:], strict=True):
            if of == stage:
                assert line == [what, "-", must, "not measured"]
            else:
                assert line[3] == "reached"


def test_what_a_row_has_not_is_not_measured() -> None:
    found = measured(REACHED)
    rows = found["attention"]["results"]["attention.json"]["rows"]
    del rows[4], rows[2]["moba_peak_bytes"], rows[2]["full_peak_bytes"]  # stopped before 128k; no memory
    found["phase2"]["results"]["phase2.json"]["rows"][0]["mfu"] = None  # a card whose peak nobody told
    found["flash_moba"]["results"]["flash_moba.json"]["rows"][0]["rivals"].clear()
    unknown = [place for place, line in enumerate(must_lines(found)[1:]) if line[3] == "not measured"]
    assert unknown == [4, 6, 7, 9, 14]


def test_cuda_graphs_stand_beside_phase_1_and_decide_nothing() -> None:
    found = measured([missing(place) if place == 8 else goal for place, goal in enumerate(REACHED)])
    found["phase1_graphs"] = copy.deepcopy(found["phase1"])
    found["phase1_graphs"]["results"]["phase1.json"]["rows"][0]["mfu"] = 0.5
    *_, (_, shown, _, verdict) = must_lines(found)[: 1 + 9]
    assert (shown, verdict) == ("44.95 % (100,000 tokens/s, 20 GiB; by CUDA graphs 50.00 %)", "missed")
    assert ["  rows of 64, moba", "100,000 tokens/s, MFU 50.00 %, 20 GiB"] in stage_lines(found)


def test_stages_stand_below() -> None:
    found = measured(REACHED)
    million = {"length": 1 << 20, "heads": 16, "moba_forward": 0.0625, "moba_forward_tflops": 175.0}
    cells = {name: [{"length": 64, "from": 1, "to": 8, "accuracy": share}] for name, share in (("moba", 1), ("own", 0))}
    for name, result in (("million", {"forward_only": [million]}), ("recall", {"cells": cells}), ("tests", None)):
        results = {} if result is None else {f"{name}.json": result}
        found[name] = {"status": "ok", "seconds": 7.0, "last_lines": ["7 passed", ""], "results": results}
    found["peer"] |= {"status": "exit code 2", "last_lines": ["error: accelerate"]}
    lines = dict(stage_lines(found))
    assert lines["tests: ok, 7 s"] == "7 passed"
    assert lines["attention: ok, 5 s"] == ""
    assert lines["peer: exit code 2, 5 s"] == "error: accelerate"
    assert lines["  1048576 tokens x 16, MoBA forward"] == "0.0625 s, 175 TFLOP/s"
    assert lines["  64 tokens, distance 1-8"] == "moba 100 %, own 0 %"


@pytest.mark.parametrize("toy", [False, True])
def test_the_commands_of_the_stages_are_those_that_exist(toy: bool) -> None:
    modules = {"attention": attention, "moe": moe, "train_step": train_step}
    parsed = {}
    for stage in gpu.stages(Path("x"), toy=toy, profile=True):
        if stage.words[3] in modules and not stage.left_out:
            module: Any = modules[stage.words[3]]
            parser = Parser("x", None)
            module.add_arguments(parser)
            parsed[stage.name] = parser.parse_args(stage.words[4:])
            assert stage.results[0].rsplit("/")[-1] in ("attention.json", "moe.json", f"{stage.name}.json")
            if module is train_step:
                config, _ = train_step.read_config(parsed[stage.name], 1)
                assert stage.results == [f"{config.phase.name}.json"]
                assert parsed[stage.name].profile == (stage.name != "peer")
    if toy:
        assert "phase1_graphs" not in parsed
        return
    assert parsed["peer"].peer == "hf"
    assert train_step.read_config(parsed["phase1_graphs"], 1)[0].phase.cuda_graphs
    assert [length for length, _ in parsed["attention"].cases] == [8192, 16384, 32768, 65536, 131072]
    assert parsed["phase3_shape"].cases == [(32768, 12)]
    shape = parsed["phase3_shape"]
    config, _ = train_step.read_config(parsed["phase3"], 1)
    assert (shape.group, shape.head_dim, shape.bidirectional, shape.rivals) == (3, 64, True, ["flash", "cudnn"])
    assert (shape.block_size, shape.top_k) == (config.model.moba_block_size, config.model.moba_top_k)
    few = parsed["flash_moba"]
    assert (few.cases, few.block_size, few.top_k) == ([(32768, 16), (65536, 16)], 128, 8)
    assert few.rivals == ["flash", "flash_attn_2"]
    large = parsed["moe_large"]
    assert (large.tokens, large.hidden, large.experts, large.top_k, large.width) == (32768, 768, 32, 4, 1024)


def test_rivals_are_refused_by_name_and_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "attention", "--cases", "64:1", "--device", "cpu", "--rivals"]
    assert program.main([*words, "flash"]) == MISTAKE
    assert "--rivals: a CPU has torch's SDPA alone" in capsys.readouterr().err
    assert program.main([*words, "flash,best"]) == MISTAKE
    assert "'flash,best' is not a list of flash, cudnn, " in capsys.readouterr().err
