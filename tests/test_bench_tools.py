"""The benchmarks' own tools: what they compute from samples, and that a gap is told as a gap. Nothing here is timed."""

from __future__ import annotations

import itertools
import json
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import write_folder

# Last, so that the installed package is the one that is tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import cases, measure, pareto, plots, report, results, strength
from bench.cases import Case
from bench.results import Row, Run
from eroseg_ext import attack
from eroseg_ext.cli import main
from eroseg_ext.models.small_deeplab import SmallDeepLab
from eroseg_ext.ops import backend, reference

CPU = torch.device("cpu")


def test_samples_have_percentiles_in_milliseconds() -> None:
    assert measure.percentiles(np.arange(11) / 1000) == {"p20": 2.0, "p50": 5.0, "p80": 8.0}
    assert measure.median(np.arange(11) / 1000) == 5.0


def test_every_call_takes_its_turn_and_rounds_stay_within_their_bounds() -> None:
    seen: list[int] = []
    calls = [lambda index=index: seen.append(index) for index in range(3)]
    samples = measure.time_calls(calls, CPU, seconds=0, least=7, most=9)
    assert len(samples) == 7
    assert seen[4:] == [0, 1, 2, 0, 1, 2, 0]  # after a warm-up of each and one to judge the time by
    assert len(measure.time_calls(calls, CPU, seconds=60, least=7, most=9)) == 9


class FakeCuda:
    """A device whose queue is a list: an event's time is how much work was queued before it."""

    def __init__(self) -> None:
        self.work = 0.0
        self.synchronised = 0

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        fake = self

        class Event:
            def record(self) -> None:
                self.at = fake.work

            def elapsed_time(self, end: Event) -> float:
                assert fake.synchronised, "read before the device was waited for"
                return end.at - self.at

        return Event()


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()

    def synchronize() -> None:
        fake.synchronised += 1

    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    return fake


def test_cuda_calls_are_timed_by_events_with_one_synchronisation_at_the_end(fake_cuda: FakeCuda) -> None:
    waits: list[int] = []

    def call() -> None:
        waits.append(fake_cuda.synchronised)
        fake_cuda.work += 3.0  # milliseconds, as events count

    samples = measure.time_calls([call], torch.device("cuda"), seconds=0, least=6)
    assert samples.tolist() == pytest.approx([0.003] * 6)
    assert len(set(waits[2:])) == 1


def test_cold_copies_pass_several_times_the_l2(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 50 * 2**20

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cuda = torch.device("cuda")
    for nbytes in (2**20 * size for size in (4, 10, 100, 1000)):
        copies = measure.cold_copies(cuda, nbytes)
        assert copies * nbytes >= measure.L2_PASSES * Properties.L2_cache_size
        assert copies == 1 or (copies - 1) * nbytes < measure.L2_PASSES * Properties.L2_cache_size
    assert measure.cold_copies(CPU, 1) == 1


def test_peak_memory_counts_what_is_alive_at_once_and_what_an_operation_holds_inside() -> None:
    size = 4 * 1000 * 1000

    def one_at_a_time() -> None:
        for _ in range(3):
            torch.zeros(1000, 1000)

    def three_at_once() -> None:
        kept = [torch.zeros(1000, 1000) for _ in range(3)]
        kept.clear()

    assert measure.peak_memory(one_at_a_time, CPU) == size
    assert measure.peak_memory(three_at_once, CPU) == 3 * size
    ones = torch.ones(1000, 1000)
    assert measure.peak_memory(lambda: ones.sort(1), CPU) >= 3 * size  # values, and indices of twice the size


def test_time_limit_interrupts_and_leaves_nothing_behind() -> None:
    with pytest.raises(TimeoutError, match="longer than"), measure.time_limit(0.01):
        time.sleep(5)
    with measure.time_limit(60):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_least_traffic_of_a_case() -> None:
    pixels = 2 * 5 * 7
    case = Case("erosion_grad", "toy", (2, 3, 5, 7), torch.bfloat16)
    assert case.bytes == 2 * 3 * pixels * 2 + 16 * pixels  # logits in, gradient out; label, previous and new log-odds
    assert replace(case, labels=torch.uint8).bytes == case.bytes - 7 * pixels


@pytest.mark.parametrize("shapes", cases.SHAPES)
def test_the_cases_have_names_of_their_own_and_one_has_odd_rows(shapes: str) -> None:
    found = cases.operation_cases(cases.SHAPES[shapes])
    assert len({case.name for case in found}) == len(found)
    assert all(case.name.count("/") == 2 for case in found)
    (odd,) = (case for case in found if case.data == "odd width")
    assert odd.shape[3] % 2 == 1
    assert cases.scene(Case("step", "toy", (1, 2, 4, 4), labels=torch.uint8), CPU).labels.dtype == torch.uint8


@pytest.mark.parametrize("case", cases.operation_cases(cases.SHAPES["quick"])[12:], ids=lambda case: case.name)
def test_the_call_that_is_timed_runs_on_every_implementation(case: Case) -> None:
    small = replace(case, shape=(2, 3, 6, 5))
    inputs = cases.scene(small, CPU)
    for ops in (reference, backend.select(CPU)):
        cases.call_of(small, ops, inputs)()


def rows_of(name: str, p50: float, spread: float = 0.0, case: str = "step/toy/[1,2,4,4] float32") -> list[Row]:
    values = {"p20": p50 * (1 - spread), "p50": p50, "p80": p50 * (1 + spread)}
    return [Row("operations", case, name, q, v, "ms", "cpu: a CPU", "abc1234", "2020-01-02") for q, v in values.items()]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((1.0, 0.0), (1.2, 0.0), True),
        ((1.2, 0.0), (1.0, 0.0), True),
        ((1.0, 0.0), (1.04, 0.0), False),  # less than the least change
        ((1.0, 0.15), (1.2, 0.15), False),  # the intervals meet
    ],
)
def test_a_change_is_what_exceeds_the_noise(
    before: tuple[float, float], after: tuple[float, float], expected: bool
) -> None:
    assert bool(report.changes(rows_of("fused", *before), rows_of("fused", *after))) is expected


def test_changes_are_told_the_slowest_first_and_only_what_both_files_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, figures in (("before", {"a": 1.0, "b": 1.0, "c": 1.0}), ("after", {"a": 0.5, "b": 3.0, "new": 9.0})):
        results.write(tmp_path / f"{name}.csv", [row for key, p50 in figures.items() for row in rows_of(key, p50)])
    before, after = (str(tmp_path / f"{name}.csv") for name in ("before", "after"))
    assert report.main([after, "--against", before]) == 1
    found = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in found] == ["3.00x", "0.50x"]
    assert report.main([before, "--against", before]) == 0
    assert capsys.readouterr().out == "nothing changed beyond the noise\n"


def test_rows_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    run = Run(tmp_path / "r.csv", commit="given")
    run.add("operations", "a, b", "fused", CPU, {"p50": 1.25, "peak": 2.0**30})
    run.add("attacks", "c", "eroseg", CPU, {"miou": 12.345678})
    read = results.read(tmp_path / "r.csv")
    assert read == run.rows
    assert [(row.value, row.unit) for row in read] == [(1.25, "ms"), (2.0**30, "bytes"), (12.345678, "%")]
    assert {row.commit for row in read} == {"given"}
    assert all(row.device.startswith("cpu: ") for row in read)


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv cannot be read as results of pytest bench/: its head is a,b"):
        results.read(path)
    with pytest.raises(ValueError, match="cannot be read"):
        results.read(tmp_path / "missing.csv")


def test_a_table_shows_the_last_run_and_says_what_was_not_measured() -> None:
    old = [row._replace(date="2019-01-01") for row in rows_of("compiled", 7.0)]
    rows = [*old, *rows_of("copy", 1.0), *rows_of("fused", 4.0)]
    lines = report.table("operations", rows).splitlines()
    assert [cell.strip() for cell in lines[-1].strip("|").split("|")] == [
        *("`step`", "toy", "[1,2,4,4] float32", "not measured", "not measured", "4.00 (4.00-4.00)"),
        *("not measured", "not measured", "1.00", "25 %"),
    ]
    assert report.table("operations-cuda", rows) == "operations-cuda: not measured.\n"
    assert report.table("parts", rows) == "parts: not measured.\n"
    assert report.tables([], "cuda") == ["cuda: not measured."]
    with pytest.raises(ValueError, match="no table, wanted one of: operations"):
        report.table("missing")


def test_the_tables_of_the_documentation_are_those_of_the_results() -> None:
    marked = [page for page in report.pages() if report.MARKED.search(page.read_text())]
    assert marked
    for page in marked:
        text = page.read_text()
        assert text.count("<!-- bench:") == text.count("<!-- /bench -->") == len(report.MARKED.findall(text)), page
        assert text == report.filled(text), f"{page} is out of date: python -m bench.report --write"


def test_plots_are_drawn_of_what_is_there(tmp_path: Path) -> None:
    rows = [*rows_of("fused", 4.0), *rows_of("copy", 1.0)]
    assert [path.name for path in plots.draw(rows, tmp_path)] == ["cpu-time.png"]
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())


def test_commands_are_commands_of_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = strength.commands(tmp_path / "camvid", tmp_path, "180x240")
    assert len(lines) == 2
    for _, *arguments in lines:
        # Understood as far as the files, which are not there.
        assert main.main(arguments) == 2
        assert re.search(rf"{tmp_path}/\S+ (is missing|must hold)", capsys.readouterr().err)


def test_the_table_of_an_evaluation_is_what_it_printed(tmp_path: Path) -> None:
    scores = {"miou": 50.0, "macc": 60.0, "aacc": 90.0}
    rows = [{"attack": "eroseg", "eps": 2 / 255, **scores}]
    result = {"clean": scores, "rows": rows, "worst": [{"eps": 2 / 255, "miou_bound": 40.0, **scores}]}
    (tmp_path / "evaluation.json").write_text(json.dumps(result))
    path = tmp_path / "r.csv"
    assert strength.main(["evaluation", "--work", str(tmp_path), "--csv", str(path)]) == 0
    assert report.table("evaluation", results.read(path)).splitlines()[2:] == [
        "| none | 50.00 / 60.00 / 90.00 |",
        "| `eroseg` | 50.00 / 60.00 / 90.00 |",
        "| **worst case** | **50.00 / 60.00 / 90.00** |",
        "| lower bound of its mIoU | 40.00 |",
    ]


def test_the_table_of_strength_has_a_row_per_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "camvid" / "val", 2, void=11)
    for name in ("clean", "robust"):
        (tmp_path / name).mkdir()
        torch.save(SmallDeepLab(11, 4).state_dict(), tmp_path / name / "weights.pt")
    monkeypatch.setattr(strength, "SETTINGS", [("clean", 1, 2), ("robust", 2, 1)])
    path = tmp_path / "r.csv"
    arguments = ["--data", str(tmp_path / "camvid"), "--work", str(tmp_path), "--csv", str(path)]
    assert strength.main(["table", "--size", "32x40", *arguments]) == 0
    lines = report.table("strength", results.read(path)).splitlines()
    assert lines[0] == "| method | clean 1, T=2 | robust 2, T=1 |"
    assert len(lines) == 3 + len(strength.ROWS)
    assert "not measured" not in "".join(lines)
    assert len(report.table("confident", results.read(path)).splitlines()) == 3 + len(strength.ROWS)


def test_rows_of_the_pareto_front_are_trained_once_and_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = pareto.Setting("tiny", (16, 24), clean_epochs=1, gradients=4, learning_rate=1e-3)
    monkeypatch.setattr(pareto, "OF_SCENES", tiny)
    monkeypatch.setattr(pareto, "COUNTS", {"train": 8, "choose": 2, "report": 2})
    monkeypatch.setattr(pareto, "GRADIENTS", {"choose": 1, "report": 1})
    where = ["--work", str(tmp_path), "--csv", str(tmp_path / "r.csv")]
    with pytest.raises(SystemExit):
        pareto.main(["collect", *where])
    for method, part in (("none", "report"), ("pgd", "choose"), ("pgd", "report"), ("pgd", "report")):
        assert pareto.main(["row", "--method", method, "--eps", "8", "--images", part, *where]) == 0
    assert capsys.readouterr().out.count("epoch 1: ") == 0
    assert len(list(tmp_path.glob("*/weights.pt"))) == 2
    assert pareto.main(["collect", *where]) == 0
    rows = results.read(tmp_path / "r.csv")
    lines = report.table("pareto", rows).splitlines()
    assert lines[0] == "| data | trained against | for eps | seeds | clean | eps 2/255 | eps 4/255 | eps 8/255 |"
    assert [line.split("|")[2:5] for line in lines[2:]] == [[" none ", "  ", " 1 "], [" `pgd` ", " 8/255 ", " 1 "]]
    assert [path.name for path in plots.draw(rows, tmp_path)] == ["cpu-pareto.png"]


def test_a_cell_of_the_pareto_front_is_the_mean_over_the_seeds_with_half_their_range() -> None:
    run = Run()
    for seed, miou in enumerate((40.0, 41.0, 45.0)):
        run.add("pareto", f"scenes, trained at 4/255, seed {seed}, clean", "pgd", CPU, {"miou": miou, "aacc": 90.0})
    assert (
        report.table("pareto", run.rows).splitlines()[-1] == "| scenes | `pgd` | 4/255 | 3 | 42.0 ± 2.5 / 90.0 ± 0.0 |"
    )


def test_a_curve_s_lead_is_taken_at_equal_clean_miou() -> None:
    """Both curves are miou = 100 - clean, ours raised by 2 plus the seed, with points at other places."""
    run = Run()
    for seed, (name, raised, first) in itertools.product((0, 1), ((report.LEADER, 2, 50), ("pgd", 0, 53))):
        for eps in (4, 6, 8):
            clean, case = first + 2.5 * (8 - eps), f"scenes, trained at {eps}/255, seed {seed}"
            worst = {"miou": 100 - clean + (seed + raised if raised else 0), "aacc": 80.0}
            run.add("pareto", f"{case}, clean", name, CPU, {"miou": clean, "aacc": 90.0})
            run.add("pareto", f"{case}, eps 8/255", name, CPU, worst)
    assert report.table("pareto_lead", run.rows).splitlines()[2:] == [
        "| scenes | `pgd` | 2 | +2.5 ± 0.5 / +0.0 ± 0.0 |"
    ]


def test_pgd_with_eroseg_s_balance_differs_from_pgd_by_the_weight_of_the_class_alone() -> None:
    torch.manual_seed(0)
    model, images = SmallDeepLab(5, 4).eval(), torch.rand(2, 3, 16, 24)
    labels = torch.arange(5).repeat(2 * 16 * 24)[: 2 * 16 * 24].view(2, 16, 24)
    found = [
        attack(model, images, labels, eps=8 / 255, steps=3, generator=torch.Generator().manual_seed(1), **settings)
        for settings in ({"method": "pgd"}, {**pareto.BALANCED_PGD, "balance": 0})
    ]
    assert (found[0] - found[1]).abs().max() < 1e-6
