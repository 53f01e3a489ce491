"""The benchmarks' own tools: what they compute from samples, and that a gap is told as a gap. Nothing here is timed."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

# Last, so that the installed package is the one that is tested.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from bench import cases, compare, experiment, kernels, loop, measure, results, whole
from bench.cases import Case
from bench.measure import Clock, Timing
from bench.report import Device, report
from bench.results import Figure
from eroseg_ext import AttackSettings, attack
from eroseg_ext.cli import main
from eroseg_ext.ops import backend, reference

CPU = torch.device("cpu")


def test_timing_has_the_percentiles_of_its_samples_in_milliseconds() -> None:
    timing = Timing(tuple(index / 1000 for index in range(11)))
    assert timing.to_json() == {"p20": 2.0, "p50": 5.0, "p80": 8.0, "rounds": 11, "drift": 2.75}


def test_drift_compares_the_halves() -> None:
    assert Timing((1.0, 1.0, 1.0, 1.5, 1.5, 1.5)).drift == pytest.approx(0.5)
    assert Timing((1.5, 1.5, 1.0, 1.0)).drift == pytest.approx(0.5)
    assert Timing((1.0,)).drift == 0.0


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_exponent_of_a_power_law(power: float) -> None:
    x = [1.0, 3.0, 10.0, 100.0]
    assert measure.exponent(x, [7 * value**power for value in x]) == pytest.approx(power, abs=1e-9)


def test_every_call_takes_its_turn_and_rounds_stay_within_their_bounds() -> None:
    seen: list[int] = []
    calls = [lambda index=index: seen.append(index) for index in range(3)]
    timing = measure.time_calls(calls, CPU, seconds=0, least=7, most=9)
    assert len(timing.seconds) == 7
    assert seen[4:] == [0, 1, 2, 0, 1, 2, 0]  # after a warm-up of each and one to judge the time by
    assert len(measure.time_calls(calls, CPU, seconds=60, least=7, most=9).seconds) == 9


def test_clock_tells_laps() -> None:
    clock = Clock(CPU)
    clock.mark()
    time.sleep(0.002)
    clock.mark()
    clock.mark()
    first, second = clock.laps()
    assert first >= 0.002
    assert second >= 0


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

    timing = measure.time_calls([call], torch.device("cuda"), seconds=0, least=6)
    assert timing.seconds == pytest.approx([0.003] * 6)
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


def test_the_kernels_cases_have_names_of_their_own_and_one_has_odd_rows() -> None:
    for quick in (True, False):
        found = cases.kernel_cases(quick)
        assert len({case.name for case in found}) == len(found)
        (odd,) = (case for case in found if case.data == "odd width")
        assert odd.shape[3] % 2 == 1
    assert cases.scene(Case("step", "toy", (1, 2, 4, 4), labels=torch.uint8), CPU).labels.dtype == torch.uint8


@pytest.mark.parametrize("case", cases.kernel_cases(quick=True)[12:], ids=lambda case: case.name)
def test_the_call_that_is_timed_runs_on_every_implementation(case: Case) -> None:
    small = replace(case, shape=(2, 3, 6, 5))
    inputs = cases.scene(small, CPU)
    for ops in (reference, backend.select(CPU)):
        cases.call_of(small, ops, inputs)()


def test_torch_selections_select_what_ours_selects() -> None:
    scores = torch.rand(3, 400, generator=torch.Generator().manual_seed(0))
    k = torch.tensor([cases.kth_ranks(400)] * 3)
    expected = reference.kth_value(scores, k)
    for select in cases.TORCH_SELECTIONS.values():
        assert torch.equal(select(scores, k), expected)


@pytest.mark.parametrize("gradient_only", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_the_loop_that_is_taken_apart_is_the_loop_of_attack(gradient_only: bool, kept: bool) -> None:
    model = torch.nn.Conv2d(3, 4, 3, padding=1).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 8, 9, generator=generator)
    labels = torch.randint(4, (2, 8, 9), generator=generator)
    config = AttackSettings(steps=4, random_start=False)
    habits = loop.Habits(gradient_only, kept)
    clock = Clock(CPU)
    adversarial = loop.run(model, images, labels, config, backend.select(CPU), habits, clock)
    assert torch.equal(adversarial, attack(model, images, labels, steps=4, random_start=False))
    split = loop.Split()
    split.add(clock.laps())
    assert [len(times) for times in split.parts.values()] == [4] * len(loop.PARTS)


def test_split_tells_ours_from_the_models_and_leaves_out_what_is_between_steps() -> None:
    split = loop.Split()
    split.add([1.0, 2.0, 4.0, 8.0, 100.0, 10.0, 20.0, 40.0, 80.0])
    assert split.steps() == [15.0, 150.0]
    assert split.ours() == [10.0, 100.0]


def ms(p50: float, spread: float = 0.0, drift: float = 0.0) -> dict[str, float]:
    return {"p20": p50 * (1 - spread), "p50": p50, "p80": p50 * (1 + spread), "rounds": 5, "drift": drift}


def figure(timing: dict[str, float], implementation: str = "fused", case: str = "c", **extra: Any) -> Figure:
    return Figure(
        suite="ops", case=case, implementation=implementation, device="cpu", shape=[1], ms=timing, extra=extra
    )


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (ms(1.0), ms(1.2), True),
        (ms(1.2), ms(1.0), True),
        (ms(1.0), ms(1.04), False),  # less than the least change
        (ms(1.0, spread=0.15), ms(1.2, spread=0.15), False),  # the intervals meet
        (ms(1.0, drift=0.3), ms(1.2), False),  # the first moved by itself
        (ms(1.0), ms(1.2, drift=0.3), False),
        (ms(1.0, drift=0.3), ms(1.5), True),
    ],
)
def test_a_change_is_what_exceeds_the_noise(before: dict[str, float], after: dict[str, float], expected: bool) -> None:
    assert compare.changed(before, after) is expected


def test_compare_lists_the_slowest_first_and_only_what_both_have() -> None:
    before = [figure(ms(1.0), case="a"), figure(ms(1.0), case="b"), figure(ms(1.0), case="c"), figure(ms(1.0))]
    after = [figure(ms(0.5), case="a"), figure(ms(3.0), case="b"), figure(ms(1.0), case="c"), figure(ms(9.0), "new")]
    found, common = compare.changes(before, after)
    assert [(change.figure["case"], change.factor) for change in found] == [("b", 3.0), ("a", 0.5)]
    assert common == 3


def result(folder: Path, name: str, figures: list[Figure], **more: Any) -> str:
    value = {
        "date": "2020-01-02T03:04:05+00:00",
        "profile": "quick",
        "load": 0.1,
        "commit": "abc1234",
        "dirty": False,
        "versions": {"torch": "2.13.0", "python": "3.11"},
        "devices": {"cpu": {"name": "A CPU", "threads": 2, "capability": "AVX2", "copy GB/s": 9.0}},
        "figures": figures,
        "skipped": {"bench/test_operations.py::test_operation[cpu-x]": "there was no kernel"},
        **more,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(value))
    return str(path)


def test_compare_reports_other_conditions_and_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = result(tmp_path, "old", [figure(ms(1.0))])
    versions = {"torch": "2.14.0", "python": "3.11"}
    new = result(tmp_path, "new", [figure(ms(2.0))], versions=versions, load=3.5)
    assert compare.main([old, new]) == 1
    out = capsys.readouterr().out
    assert "torch was 2.13.0 and is 2.14.0" in out
    assert "load 3.5 before the run new" in out
    assert "the run old" not in out
    assert "2.00x slower: ops: c, fused, cpu: 1 -> 2 ms" in out
    assert compare.main([new, old]) == 0
    assert compare.main([old, old]) == 0
    assert "1 figures in both, 0 changed" in capsys.readouterr().out
    again = result(tmp_path, "again", [figure(ms(2.5))])
    assert compare.main([old, new, "--noise", again]) == 0
    assert compare.main([old, new, "--noise", old]) == 1


def test_report_marks_what_was_not_measured(tmp_path: Path) -> None:
    case = cases.operation_cases("quick", CPU)[0]
    timing = Timing((0.004, 0.004, 0.004))
    copy = Timing((0.001, 0.001))
    fused = figure(timing.to_json(), case=case.name, op=case.op)
    results.traffic(fused, case.bytes, copy)
    path = result(tmp_path, "one", [fused])
    lines = report([results.read(path)], folder=tmp_path / "plots")
    row = next(line for line in lines if line.startswith("| `erosion_grad`"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:] == [
        *("not measured", "not measured", "4.00 (4.00-4.00)", "not measured", "not measured", "not measured", "25 %"),
        f"{case.bytes / 0.004 / 1e9:.2f}",
    ]
    for section in ("**Peers**", "**Whole attacks**", "**Scaling**"):
        assert lines[lines.index(section) + 2] == "not measured."
    assert "GPU: not measured." in lines
    assert "- not measured (1): there was no kernel" in lines
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"one-cpu-time.png", "one-cpu-roofline.png"}


def test_report_without_any_result_says_so() -> None:
    assert [line for line in report([], None) if line.endswith(": not measured.")] == [
        "CPU: not measured.",
        "GPU: not measured.",
    ]


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json is not a result"):
        results.read(str(path))
    with pytest.raises(ValueError, match="cannot be read"):
        results.read(str(tmp_path / "missing.json"))


def test_a_result_is_read_back_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "COPY_BYTES", {"cpu": 2**16})
    figures = [figure(ms(1.0), x=1)]
    results.write(tmp_path / "r.json", "quick", [CPU], figures, {"a test": "a reason"}, 0.25, commit="given")
    read = results.read(str(tmp_path / "r.json"))
    assert (read["figures"], read["skipped"]) == (figures, {"a test": "a reason"})
    assert (read["commit"], read["load"]) == ("given", 0.25)
    assert read["devices"]["cpu"]["copy GB/s"] > 0


def test_replayed_durations_are_what_was_measured() -> None:
    from bench.conftest import Replay

    replay = Replay()
    for timing in (Timing((0.5, 0.25, 4.0)), Timing((1.0,))):
        replay.load(timing)
        durations = []
        for _ in timing.seconds:  # as pytest-benchmark's runner does
            start = replay()
            durations.append(replay() - start)
        assert durations == pytest.approx(timing.seconds)


def test_kernels_that_no_time_is_left_for_are_skipped_and_the_file_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "COPY_BYTES", {"cpu": 2**16})
    out = tmp_path / "kernels.json"
    assert kernels.main(["--device", "cpu", "--quick", "--limit", "0", "--out", str(out)]) == 0
    read = results.read(str(out))
    assert read["figures"] == []
    assert set(read["skipped"].values()) == {"no time was left"}
    assert "| erosion_grad PASCAL VOC float32 NCHW | not measured |" in capsys.readouterr().out


def test_kernels_measure_one_case_twice() -> None:
    run = kernels.Run(CPU, quick=True, deadline=time.monotonic() + 60)
    case = Case("linf_step_", "toy", (1, 2, 4, 4))
    run.operation(case, "reference")
    run.once_more(case, "reference")
    (found,) = run.figures
    assert found["extra"]["bytes"] == case.bytes == 4 * 4 * 3 * 16
    assert found["again_ms"]["p50"] > 0


def test_a_figure_that_fails_is_told_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, implementation: str, *arguments: Any) -> Timing:
        if implementation == "fused":
            raise RuntimeError("CUDA error: an illegal memory access\nand more")
        return Timing((0.001,))

    monkeypatch.setattr(kernels, "timed", broken)
    run = kernels.Run(CPU, quick=True, deadline=time.monotonic() + 60)
    case = Case("linf_step_", "toy", (1, 2, 4, 4))
    for name in ("fused", "reference"):
        run.operation(case, name)
        run.once_more(case, name)
    assert run.failed
    assert run.skipped == {f"[cpu-{case.name}-fused]": "RuntimeError: CUDA error: an illegal memory access"}
    assert [figure["implementation"] for figure in run.figures] == ["reference"]
    assert run.figures[0]["again_ms"]["p50"] == 1


def test_every_way_to_attack_a_model_has_its_line(tmp_path: Path) -> None:
    run = kernels.Run(CPU, quick=True, deadline=time.monotonic() + 60)
    task = whole.Task("light", (1, 3, 16, 16), steps=2, rounds=1, device=CPU)
    for name in (whole.LOOP, whole.PGD_LOOP, whole.REFERENCE_LOOP, *whole.ATTACKS):
        run.whole(task, name)
    assert set(run.skipped) == {f"[cpu-light-{name}]" for name, way in whole.ATTACKS.items() if "graph" in way.settings}
    read = results.read(result(tmp_path, "one", run.figures))
    lines = kernels.attacks_table(Device(read, "cpu"))[2 : 2 + len(whole.ATTACKS)]
    for name, line in zip(whole.ATTACKS, lines, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:2] == ["light", name]
        assert ("not measured" in cells[2:6]) == (f"[cpu-light-{name}]" in run.skipped)
        assert cells[6] == "not measured"  # is torch's on a GPU


def test_the_experiments_commands_are_commands_of_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = experiment.commands(tmp_path / "camvid", tmp_path, 0)
    assert len(lines) == 2 * (1 + len(experiment.ATTACKS))
    for _, *arguments in lines:
        # Understood as far as the files, which are not there.
        assert main.main(arguments) == 2
        assert re.search(rf"{tmp_path}/\S+ (is missing|must hold)", capsys.readouterr().err)


def test_the_experiments_table_has_the_runs_that_are_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {"miou": 50.04, "macc": 60.0, "aacc": 90.0}
    worst = {"eps": 4 / 255, "miou": 40.0, "miou_bound": 39.0, "macc": 50.0, "aacc": 80.0}
    for seed, better in ((0, 0.0), (1, 2.0)):
        (tmp_path / f"pgd_{seed}").mkdir()
        (tmp_path / f"eval_pgd_{seed}").mkdir()
        clean = scores | {"miou": scores["miou"] + better}
        evaluation = {"images": ["a", "b"], "clean": clean, "rows": [worst | {"iou": []}], "worst": [worst]}
        (tmp_path / f"eval_pgd_{seed}" / "evaluation.json").write_text(json.dumps(evaluation))
        log = '{"epoch": 0.5, "loss": 1.0}\n{"epoch": 1.0, "miou": 50.0}\n'
        (tmp_path / f"pgd_{seed}" / "log.jsonl").write_text(log)
    assert experiment.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| `pgd` | 1 | 50.0 / 90.0 | 40.0 / 80.0 |"
    assert experiment.main(["report", str(tmp_path), "--seeds", "0", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| `pgd` | 2 | 51.0 / 90.0 | 40.0 / 80.0 |"
    assert experiment.collect(tmp_path, 0)[0]["loss"] == [[0.5, 1.0]]
