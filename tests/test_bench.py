"""The microbenchmark runner under a clock of our own, its tables and goals, and the comparison that CI makes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qnoise
from benchmarks import micro, render
from benchmarks.__main__ import main
from benchmarks.micro import cuda, fake_quantize, pack, tables
from benchmarks.micro import measure as measuring
from benchmarks.micro import run as runner
from benchmarks.micro.device_clock import DeviceClock
from benchmarks.micro.goals import CUDA_GOALS, CUDA_OPERATIONS, GOALS
from benchmarks.micro.measure import Case, Clock, Contender, GateError, check, interval, measure, optional, spread
from benchmarks.micro.peak import measure_peak, peak_bytes
from benchmarks.micro.tables import Goal, Pick
from qnoise.kernels import chunked
from qnoise.nn.packed import PackedLinear


class Time:
    """A clock that only contenders move."""

    def __init__(self) -> None:
        self.wall, self.cpu = 0.0, 0.0
        self.calls: list[str] = []

    def clock(self) -> Clock:
        return Clock(lambda: self.wall, lambda: self.cpu)

    def takes(self, name: str, seconds: Callable[[int], float], cpu: float = 0.5, **more: Any) -> Contender:
        """A contender whose n-th call (from 0; the first two warm up) takes so long."""

        def call() -> None:
            self.wall += seconds(self.calls.count(name))
            self.cpu += cpu
            self.calls.append(name)

        return Contender(name, call, **more)


def case(*contenders: Contender, check: Callable[[], None] = lambda: None, **more: Any) -> Case:
    return Case("op", {"fmt": "mxfp4", "shape": [2, 3]}, contenders, check, **more)


def entries(*cases: Case) -> Callable[[str], Any]:
    return lambda name: SimpleNamespace(TITLE=f"title of {name}", cases=lambda quick: iter(cases))


def work() -> None:
    torch.ones(10).sum()


def test_a_ratio_is_taken_within_its_round() -> None:
    """The machine slows down from round to round: the times spread, the ratio does not."""
    time = Time()
    copy = time.takes("copy", lambda n: 2.0 * 1.5**n, cpu=1.0, bytes_moved=100)
    ours = time.takes("ours", lambda n: 6.0 * 1.5**n, cpu=2.0, bytes_moved=150)
    first, second = measure(case(copy, ours, rounds=9), clock=time.clock())
    assert first["ratio"] == dict.fromkeys(["median", "p20", "p80", "low", "high"], 1.0)
    assert second["ratio"] == dict.fromkeys(["median", "p20", "p80", "low", "high"], 3.0)
    assert second["cpu_ratio"]["median"] == 2.0
    assert second["wall_ms"]["median"] == pytest.approx(6000 * 1.5 ** (2 + 4))
    assert second["wall_ms"]["p20"] < second["wall_ms"]["median"] < second["wall_ms"]["p80"]
    # 150 bytes in three times the time of 100: half the rate of the copy.
    assert second["share_of_bound"] == pytest.approx(0.5)
    assert second["gb_per_s"] == pytest.approx(150 / second["wall_ms"]["median"] / 1e6)
    assert (second["rounds"], second["calls_per_round"]) == (9, 1)


def test_contenders_take_turns_in_changing_order() -> None:
    time = Time()
    names = ["a", "b", "c"]
    slow = time.takes("slow", lambda n: 5.0, rounds=2)
    rows = measure(case(*(time.takes(name, lambda n: 1.0) for name in names), slow, rounds=20), clock=time.clock())
    assert [row["contender"] for row in rows] == [*names, "slow"]
    assert rows[-1]["rounds"] == 2
    assert rows[-1]["ratio"]["high"] is None, "two rounds give no 95 % interval"
    fast = [call for call in time.calls if call != "slow"][6:]  # without the warm-up
    rounds = [tuple(fast[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(each) == names for each in rounds)
    assert len(set(rounds)) > 3


def test_a_short_call_is_repeated_and_its_time_divided() -> None:
    time = Time()
    prepared: list[int] = []
    short = time.takes("short", lambda n: 1e-5, cpu=0.0)
    once = time.takes("once", lambda n: 1e-5, before=lambda: prepared.append(len(time.calls)))
    first, second = measure(case(short, once, rounds=4), clock=time.clock())
    assert first["calls_per_round"] == 100
    assert first["wall_ms"]["median"] == pytest.approx(0.01)
    assert "cpu_ratio" not in first, "the clock of processor time did not move"
    assert second["calls_per_round"] == 1
    assert len(prepared) == time.calls.count("once") == 5


def test_interval_is_that_of_the_order_statistics() -> None:
    # Tables of distribution-free intervals (David and Nagaraja, section 7.1): n = 10 takes the 2nd and 9th of ten.
    assert interval([float(n) for n in range(10, 0, -1)]) == {"low": 2.0, "high": 9.0}
    assert interval([float(n) for n in range(1, 31)]) == {"low": 10.0, "high": 21.0}
    assert interval([1.0] * 5) == {"low": None, "high": None}
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}


def test_a_failing_check_stops_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed: list[str] = []

    def wrong() -> None:
        raise ValueError("differs in 3 places")

    bad = case(Contender("copy", lambda: timed.append("bad")), check=wrong)
    monkeypatch.setattr(runner.micro, "ENTRIES", ("one",))
    monkeypatch.setitem(runner.run.__kwdefaults__, "entry", entries(bad, case(Contender("next", work))))
    assert main(["run", "--out", str(tmp_path)]) == 1
    assert "op fmt=mxfp4 shape=[2, 3]: the check failed" in (message := capsys.readouterr().err)
    assert "differs in 3 places" in message
    assert not timed
    assert not list(tmp_path.iterdir())
    with pytest.raises(GateError):
        runner.run(["one"], entry=entries(bad), stream=io.StringIO())


def test_result_lines_are_complete_and_appended(tmp_path: Path) -> None:
    gone = Contender("peer", None, absent="module peer is not installed")
    ours = Contender("ours", work, figures={"calls": 7})
    stream = io.StringIO()
    for _ in range(2):
        runner.run(
            ["one"],
            out=tmp_path,
            quick=True,
            command="python -m benchmarks run one",
            entry=entries(case(Contender("copy", work), ours, gone)),
            stream=stream,
        )
    lines = [json.loads(line) for line in (tmp_path / "op.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    line = lines[0]
    assert (line["schema"], line["benchmark"], line["operation"]) == (2, "one", "op")
    assert line["parameters"] == {"fmt": "mxfp4", "shape": [2, 3]}
    assert line["quick"] is True
    assert line["threads"] == 1
    assert line["command"] == "python -m benchmarks run one"
    assert {"versions", "device", "commit", "peers", "compilers", "cores"} <= set(line["environment"])
    assert "torch" in line["environment"]["versions"]
    assert line["rows"][0]["rounds"] == runner.QUICK_ROUNDS
    assert line["rows"][1]["figures"] == {"calls": 7}
    assert line["rows"][2] == {"contender": "peer", "absent": "module peer is not installed"}
    assert "title of one" in stream.getvalue()
    assert "not run: module peer is not installed" in stream.getvalue()


def test_only_chooses_cases_by_their_parameters() -> None:
    called: list[str] = []
    cases = [
        Case("op", {"fmt": fmt, "size": 4}, [Contender("copy", lambda f=fmt: called.append(f))], work, rounds=1)
        for fmt in ("mxfp4", "nvfp4")
    ]
    runner.run(["one"], only={"fmt": "nvfp4", "size": "4"}, entry=entries(*cases), stream=io.StringIO())
    assert set(called) == {"nvfp4"}
    with pytest.raises(ValueError, match="no case has fmt=fp4; there are: fmt=mxfp4, fmt=nvfp4, size=4"):
        runner.run(["one"], only={"fmt": "fp4"}, entry=entries(*cases), stream=io.StringIO())


def test_threads_are_those_of_the_case_and_come_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    copy = Contender("copy", lambda: seen.append(torch.get_num_threads()))
    one = Case("op", {"threads": 2}, [copy], lambda: torch.set_num_threads(1), rounds=1)
    runner.run(["one"], entry=entries(one), stream=io.StringIO())
    assert set(seen) == {2}
    assert torch.get_num_threads() == before


class Gpu:
    """A GPU that works behind the processor: a launch takes the processor a while, and then waits for its turn."""

    def __init__(self) -> None:
        self.host = self.free = 0.0

    def clock(self) -> DeviceClock:
        return DeviceClock(self.event, self.synchronize, self.sleep, lambda: self.host, lambda: self.host)

    def event(self) -> Any:
        made = SimpleNamespace()
        made.record = lambda: setattr(made, "at", max(self.host, self.free))
        made.elapsed_time = lambda end: 1e3 * (end.at - made.at)
        return made

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def sleep(self, cycles: int) -> None:
        self.free = max(self.host, self.free) + cycles / 2e9

    def launches(self, host: float, gpu: float) -> Callable[[], None]:
        def call() -> None:
            self.host += host
            self.free = max(self.host, self.free) + gpu

        return call


def test_a_gpu_is_timed_by_its_own_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """5 microseconds of work that take Python 50 to ask for are 5, and so they stay beside work of 2 ms; what was
    launched before is not counted."""
    gpu = Gpu()
    contenders = [
        Contender("short", gpu.launches(5e-5, 5e-6)),
        Contender("long", gpu.launches(5e-5, 2e-3)),
        Contender("prepared", gpu.launches(5e-5, 1e-3), before=gpu.launches(1.0, 3.0)),
    ]
    one = Case("op", {"device": "a GPU"}, contenders, work, rounds=6, device="cuda")
    rows = measure(one, clock=gpu.clock())
    assert [row["wall_ms"]["median"] for row in rows] == pytest.approx([0.005, 2.0, 1.0])
    assert [row["cpu_ms"]["median"] for row in rows] == pytest.approx([0.05] * 3)
    assert [row["calls_per_round"] for row in rows] == [100, 1, 1], "fewer than the launches a GPU has room for"

    monkeypatch.setattr(measuring, "DeviceClock", gpu.clock)
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runner, "environment", dict)
    monkeypatch.setattr(runner, "machine", dict)
    monkeypatch.setattr(runner, "place", lambda kind: {"device": f"the {kind}", "backend": "ours"})
    on_cpu = Case("other", {}, [Contender("copy", work)], work, rounds=1)
    with monkeypatch.context() as patch:
        patch.setattr(runner, "environment", lambda: {"versions": {"torch": "2"}, "device": "whatever"})
        runner.run(["one"], out=tmp_path, entry=entries(one, on_cpu), stream=io.StringIO())
    lines = [json.loads((tmp_path / f"{name}.jsonl").read_text()) for name in ("op", "other")]
    assert [line["environment"]["device"] for line in lines] == ["the cuda", "the cpu"]
    assert lines[0]["rows"][0]["wall_ms"]["median"] == pytest.approx(0.005)


def test_operands_of_a_gpu_take_turns() -> None:
    seen: list[int] = []
    call = cuda.in_turn([lambda n=n: seen.append(n) for n in range(3)])  # type: ignore[misc]
    for _ in range(7):
        call()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_the_cases_of_a_gpu_are_right_and_their_goals_find_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run on the CPU, with its clock: the checks pass, and no goal would read "not measured" for ever."""
    assert torch.cuda.is_available() or list(cuda.cases(quick=True)) == []
    monkeypatch.setattr(cuda, "ROUNDS", 1)
    monkeypatch.setattr(measuring, "MINIMUM_SECONDS", 0.0)
    monkeypatch.setattr(measuring.gc, "collect", lambda: None)
    tiny = cuda.Sizes((64, 64), (8, 32), ((64, 32),), (8, 32), (1, 4, 64))
    one = SimpleNamespace(TITLE="", cases=lambda quick: cuda.on("cpu", tiny))
    assert [goal.worst(tables.latest(goal.operation, tmp_path)) for goal in CUDA_GOALS] == [None] * len(CUDA_GOALS)
    runner.run(["cuda"], out=tmp_path, entry=lambda name: one, stream=io.StringIO())
    assert {path.stem for path in tmp_path.iterdir()} == set(CUDA_OPERATIONS)
    lines = [line for name in CUDA_OPERATIONS for line in tables.latest(name, tmp_path)]
    assert {line["parameters"]["device"] for line in lines} == {"cpu"}
    assert {line["parameters"]["fmt"] for line in lines if "fmt" in line["parameters"]} == set(qnoise.FORMATS)
    assert all(goal.worst(tables.latest(goal.operation, tmp_path)) is not None for goal in CUDA_GOALS)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_sees_what_lives_for_a_moment() -> None:
    size = 32 << 20
    torch.ones(4 * size, dtype=torch.uint8)  # a higher peak before, which must not count

    def call() -> torch.Tensor:
        a = torch.ones(size, dtype=torch.uint8)
        return a + a  # result and operand: twice the size at the peak

    assert peak_bytes(call) == pytest.approx(2 * size, rel=0.05)

    assert measure_peak("norm", 0, "noisy, sigma 0", quick=True) < 1 << 20


def test_a_process_of_its_own_that_fails_is_quoted() -> None:
    with pytest.raises(RuntimeError, match="no benchmark is called 'nothing'"):
        measure_peak("nothing", 0, "copy_", quick=True)


@pytest.mark.parametrize("name", micro.ENTRIES)
def test_every_entry_can_be_loaded(name: str) -> None:
    module = micro.entry(name)
    assert module.TITLE
    assert callable(module.cases)


def test_the_checks_of_our_entries_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """One unit in the last place, in one element."""

    def nudged(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            result = function(*arguments, **more)
            # What writes into a given tensor has it as the last argument or as `out`.
            values = next(v for v in (more.get("out"), result, arguments[-1]) if isinstance(v, torch.Tensor))
            values.view(-1)[-1:].view(torch.int16 if values.element_size() == 2 else torch.int32).add_(1)
            return result

        return call

    x = fake_quantize.values(64, torch.float32)
    spec = qnoise.QuantSpec("nvfp4")
    cases = [
        (fake_quantize.speed(spec, x), qnoise, "fake_quantize"),
        (fake_quantize.speed(spec, x), chunked, "fake_quantize_rows"),
        (next(pack.both(spec, x)), qnoise.BlockQuantized, "dequantize"),
        (next(pack.both(spec, x)), chunked, "dequantize_rows"),
        (cuda.fake_quantize(spec, torch.float32, (64, 64), "cpu"), qnoise, "fake_quantize"),
        (next(cuda.packing(spec, torch.bfloat16, (64, 64), "cpu")), qnoise.BlockQuantized, "dequantize"),
        (cuda.decode(2, (64, 32), "cpu"), PackedLinear, "effective_weight"),
    ]
    for each, owner, name in cases:
        check(each)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, nudged(getattr(owner, name)))
            with pytest.raises(GateError, match="reference"):
                check(each)


def test_a_peer_that_fails_is_absent_with_the_reason() -> None:
    def missing() -> Callable[[], object]:
        import no_such_library  # type: ignore[import-not-found]

        return no_such_library.call

    def broken() -> Callable[[], object]:
        raise RuntimeError("needs a GPU\nand more")

    assert optional("a", missing).absent == "module no_such_library is not installed"
    assert optional("b", broken).absent == "RuntimeError: needs a GPU"
    assert optional("c", lambda: work, rounds=3) == Contender("c", work, rounds=3, foreign=True)


def test_a_failing_call_of_ours_ends_the_run_and_a_peers_does_not() -> None:
    def fails() -> None:
        raise RuntimeError("only on a GPU")

    rows = measure(case(Contender("copy", work), optional("peer", lambda: fails), Contender("ours", work), rounds=1))
    assert rows[1] == {"contender": "peer", "absent": "RuntimeError: only on a GPU"}
    assert [row.get("rounds") for row in rows] == [1, None, 1]
    with pytest.raises(RuntimeError, match="only on a GPU"):
        measure(case(Contender("copy", work), Contender("ours", fails)))


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "nrom"]) == 2
    assert "no benchmark is called 'nrom'; there are: fake_quantize" in capsys.readouterr().err
    monkeypatch.setattr(micro, "ENTRIES", ("missing",))
    assert main(["run", "missing"]) == 2
    assert "benchmarks/micro/missing.py is listed in ENTRIES but is not there" in capsys.readouterr().err
    with pytest.raises(ValueError, match="give either `call`, or `absent`"):
        Contender("neither", None)
    with pytest.raises(ValueError, match="the first contender, to which ratios refer"):
        case(Contender("gone", None, absent="because"))
    with pytest.raises(ValueError, match="two contenders have one name"):
        case(Contender("a", work), Contender("a", work))


# --- tables, goals, and what CI compares ------------------------------------------------------------------------


def written(folder: Path, **changes: Any) -> dict[str, Any]:
    """Append a line of results with round numbers; `changes` override its fields."""

    def ran(name: str, ratio: float) -> dict[str, Any]:
        ratios = {"median": ratio, "p20": ratio, "p80": ratio, "low": ratio - 0.1, "high": ratio + 0.1}
        return {"contender": name, "rounds": 30, "wall_ms": {"median": 4 * ratio}, "ratio": ratios}

    shape = {"dtype": "bfloat16", "shape": [8, 8]}
    rows = [ran("copy_", 1.0), ran("qnoise, out=", 1.25), ran("torchao", 100.0), {"contender": "mx", "absent": "why"}]
    line = {
        "schema": 2,
        "benchmark": "fake_quantize",
        "operation": "fake_quantize",
        "quick": False,
        "command": "the command",
        "parameters": {"fmt": "mxfp4", "scale_mode": "floor", "rounding": "nearest"} | shape,
        "rows": rows,
        "environment": {
            "versions": {"torch": "2.13.0"},
            "device": "a processor",
            "cores": 2,
            "commit": "c0ffee",
            "backend": "compiled C (on)",
            "peers": {"torchao": "0.18.0"},
        },
    }
    line |= changes
    with (folder / "fake_quantize.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    return line


def test_the_newest_full_line_of_each_case_counts(tmp_path: Path) -> None:
    assert tables.latest("fake_quantize", tmp_path) == []
    written(tmp_path, command="old")
    other = written(tmp_path, parameters={"fmt": "nvfp4"})
    new = written(tmp_path, command="new")
    written(tmp_path, command="quick", quick=True)
    assert tables.latest("fake_quantize", tmp_path) == [new, other]
    written(tmp_path, schema=1)
    with pytest.raises(ValueError, match="a line of schema 1; this reads schema 2"):
        tables.latest("fake_quantize", tmp_path)


def test_goals_are_judged_by_the_worst_case(tmp_path: Path) -> None:
    ours = Goal("ours", "fake_quantize", 1.5, Pick("qnoise, out=", {"fmt": ("mxfp4", "nvfp4")}))
    upper = Goal("upper end", "fake_quantize", 1.5, Pick("qnoise, out=", key="ratio.high"))
    faster = Goal("faster", "fake_quantize", 50.0, Pick("qnoise, out=", over="torchao"), least=True)
    never = Goal("never", "fake_quantize", 1.0, Pick("mx"))
    assert [cells[2:] for cells in tables.goals([ours], tmp_path)[1]] == [["not measured", "–"]]
    line = written(tmp_path)
    found = tables.goals([ours, upper, faster, never], tmp_path)[1]
    assert found == [
        ["ours", "at most 1.5", "1.25", "yes"],
        ["upper end", "at most 1.5", "1.35", "yes"],
        ["faster", "at least 50", "80", "yes"],
        ["never", "at most 1", "not measured", "–"],
    ]
    slower = json.loads(json.dumps(line))
    slower["parameters"]["fmt"] = "nvfp4"
    slower["rows"][1]["ratio"] |= {"median": 4.0, "high": 4.1}
    written(tmp_path, **slower)
    assert [cells[2:] for cells in tables.goals([ours, upper, faster], tmp_path)[1]] == [
        ["4", "**missed**"],
        ["4.1", "**missed**"],
        ["25", "**missed**"],
    ]


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.text)
def test_every_goal_finds_its_figure(goal: Goal) -> None:
    """A goal whose names match nothing would read "not measured" for ever."""
    lines = tables.latest(goal.operation)
    listed = {row["contender"]: "absent" in row for line in lines for row in line["rows"]}
    wanted = [name for name in (getattr(goal.figure, "contender", None), getattr(goal.figure, "over", None)) if name]
    if lines and not any(listed.get(name) for name in wanted):
        assert goal.worst(lines) is not None


def test_results_are_compared_and_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- generated: speed -->\nold\n<!-- end -->\nafter\n", encoding="utf-8")
    monkeypatch.setattr(render, "documents", lambda: [page])
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert main(["results", "--check"]) == 1
    assert "page.md: not what the committed results give" in capsys.readouterr().err
    assert "\nold\n" in page.read_text(encoding="utf-8"), "--check writes nothing"
    assert main(["results"]) == 0
    assert "Not measured yet (`python -m benchmarks run fake_quantize`)." in page.read_text(encoding="utf-8")
    assert main(["results", "--check"]) == 0
    written(tmp_path)
    assert main(["results", "--check"]) == 1
    assert main(["results"]) == 0
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "1.25 [1.15, 1.35]" in text
    assert "`the command`; torch 2.13.0; a processor, 2 cores; compiled C; commit c0ffee" in text


def test_an_unknown_part_and_a_missing_end_are_named() -> None:
    with pytest.raises(ValueError, match="no generated part is called 'spede'"):
        render.render("<!-- generated: spede -->\n<!-- end -->")
    with pytest.raises(ValueError, match="no `<!-- end -->`"):
        render.render("<!-- generated: speed -->")
