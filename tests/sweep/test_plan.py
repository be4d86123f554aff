"""Which cells a command line or a sweep file means, and in what order."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra
from hydra.core.plugins import Plugins

from ldft.cli import command
from ldft.sweep import loop, plan

Planned = Callable[..., plan.Plan]


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """The plan of a command line; nothing runs."""
    plans: list[plan.Plan] = []

    def only_plan(self: loop.Sweep) -> int:
        plans.append(self._plan)
        return 0

    monkeypatch.setattr(loop.Sweep, "run", only_plan)
    monkeypatch.setattr(command, "exit_codes", [])

    def make(*arguments: str) -> plan.Plan:
        line = ["ldft", *arguments, "launch.device=cpu", f"results.dir={tmp_path / 'results'}"]
        monkeypatch.setattr(sys, "argv", line)
        with monkeypatch.context() as patch:
            if (
                "-m" in arguments
            ):  # or Hydra composes everything once more beforehand, to see whether a file asks for a sweep
                patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
            assert command.main() == 0
        return plans.pop()

    return make


def labels(of: plan.Plan) -> list[str]:
    return [one.label for one in of.cells]


def test_a_grid_is_ordered_by_length(planned) -> None:
    assert labels(planned("-m", "model=tiny,nano", "seq_len=4k,1k")) == [
        "tiny 1k default",
        "nano 1k default",
        "tiny 4k default",
        "nano 4k default",
    ]


def test_hydras_own_sweep_words_work(planned) -> None:
    assert len(planned("-m", "model=glob([nano,tiny])").cells) == 2
    seeds = planned("-m", "model=nano", "train.seed=range(3)", "train.precision=choice(bf16,fp32)")
    assert labels(seeds)[0] == "nano 1k default train.seed=0 train.precision=bf16" and len(seeds.cells) == 6


def test_the_same_cell_twice_is_one_cell(planned) -> None:
    assert len(planned("-m", "model=nano", "train.seed=0,0").cells) == 1
    assert len(planned("-m", "model=nano", "seq_len.tokens=1024,1024").cells) == 1


def test_repeats_are_passes_over_all_cells_with_run_ids_of_their_own(planned) -> None:
    found = planned("-m", "model=nano", "seq_len=4k,1k", "sweep.repeats=3")
    assert [(one.tokens, one.repeat) for one in found.cells] == [
        (1024, 1), (4096, 1), (1024, 2), (4096, 2), (1024, 3), (4096, 3)
    ]  # fmt: skip
    assert len({one.run_id for one in found.cells}) == 6
    once = planned("-m", "model=nano", "seq_len=4k,1k")
    assert [one.run_id for one in once.cells] == [one.run_id for one in found.cells[:2]]


def test_a_budget_draws_the_same_cells_every_time(planned) -> None:
    line = ("-m", "model=nano", "train.seed=range(9)", "sweep.budget=4")
    first, again = planned(*line), planned(*line)
    assert [one.run_id for one in first.cells] == [one.run_id for one in again.cells] and len(first.cells) == 4
    other = planned(*line, "sweep.budget_seed=1")
    assert {one.run_id for one in other.cells} != {one.run_id for one in first.cells}
    # As many as there are, or more, are all of them; drawn ones keep their order.
    every = labels(planned("-m", "model=nano", "train.seed=range(3)"))
    assert len(every) == 3
    for budget, drawn in ((2, 2), (3, 3), (4, 3)):
        found = labels(planned("-m", "model=nano", "train.seed=range(3)", f"sweep.budget={budget}"))
        assert len(found) == drawn and found == [label for label in every if label in found]


def test_a_sweep_and_its_passes_are_named(planned) -> None:
    line = ("-m", "model=nano", "+model.extra.x=1,2")
    twice = planned(*line, "sweep.repeats=2")
    assert labels(twice)[1:3] == ["nano 1k default model.extra.x=2 #1", "nano 1k default model.extra.x=1 #2"]
    assert labels(planned(*line))[0] == "nano 1k default model.extra.x=1"
    assert re.fullmatch(r"sweep-[0-9a-f]{6}", twice.name)
    assert re.fullmatch(rf"sweeps/{twice.name}-[0-9a-f]{{6}}\.json", str(twice.path))
    config = twice.configs[twice.cells[2].run_id]
    assert (config.repeat, config.sweep.name, twice.cells[2].tokens_per_iteration) == (2, twice.name, 1024)


def test_the_smoke_sweep_has_twelve_cells_and_the_command_line_wins_over_a_file(planned) -> None:
    smoke = planned("+sweep=smoke")
    assert len(smoke.cells) == 12 and smoke.name == "smoke"
    other = planned("+sweep=smoke", "model=nano", "train.iterations=4")
    assert len(other.cells) == 6 and {config.train.iterations for config in other.configs.values()} == {4}
    assert len(planned("+sweep=smoke", "model=nano", "checkpointing=gpu").cells) == 4


def test_the_seeds_lengths_are_points_and_no_grid(planned) -> None:
    found = planned("+sweep=seed_lengths")
    assert [(one.model, one.tokens) for one in found.cells] == [
        ("llama3_1b", 16384),
        ("llama3_8b", 32768),
        ("llama3_8b", 49152),
        ("llama3_8b", 131072),
    ]


def test_the_papers_strategies_run_at_its_six_points(planned) -> None:
    found = planned("+sweep=paper_strategies", "model=nano")
    configs = [found.configs[one.run_id] for one in found.cells]
    points = [(config.train.micro_batch_size, config.seq_len.tokens) for config in configs]
    assert len(points) == 18
    assert set(points) == {(1, 4096), (8, 4096), (16, 4096), (1, 32768), (2, 32768), (3, 32768)}
    assert {config.numa.strategy.name for config in configs} == {"local_only", "naive_interleaving", "cxl_aware"}
    lion = planned("+sweep=lion", "model=nano")
    assert len(lion.cells) == 18 and {config.optimizer.name for config in lion.configs.values()} == {"lion"}


def test_the_plan_is_read_back_as_it_was(planned, tmp_path) -> None:
    found = planned("-m", "model=nano", "seq_len=4k,1k")
    (tmp_path / "results").mkdir()  # as preparing the first cell does
    found.save(tmp_path / "results")
    (back,) = plan.load_plans(tmp_path / "results")
    assert back.cells == found.cells and back.name == found.name


@pytest.mark.parametrize("damaged", [b"", b'{"name": "x", "cel', b"\xff{}"])
def test_a_damaged_plan_is_named_and_the_others_are_read(planned, tmp_path, capsys, damaged: bytes) -> None:
    found = planned("-m", "model=nano", "seq_len=4k,1k")
    torn = tmp_path / "results" / "sweeps" / "torn.json"
    torn.parent.mkdir(parents=True)
    found.save(tmp_path / "results")
    torn.write_bytes(damaged)
    torn.with_name("old.json").write_text('{"name": "of another version"}')
    assert [back.cells for back in plan.load_plans(tmp_path / "results")] == [found.cells]
    said = capsys.readouterr().err
    assert said.startswith(f"ldft: skipped unreadable {torn}: ") and said.count("\n") == 1


def test_the_newest_plan_comes_first(tmp_path) -> None:
    for at in (3.0, 1.0, 2.0):
        planned = plan.Plan(f"sweep{at:g}", at, "host", [])
        planned.save(tmp_path)
    assert [back.started_at for back in plan.load_plans(tmp_path)] == [3.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("-m", "model=nano,bogus"), "bogus"),
        (("-m", "model=nano", "train.iterationz=1,2"), "train.iterationz"),
        (("-m", "model=nano", "train.seed=1,x"), "train.seed"),
        (("-m", "model=nano", "sweep.repeats=0"), "sweep.repeats: 0"),
        (("-m", "model=nano", "sweep.budget=-1"), "sweep.budget: -1"),
        (("-m", "model=nano", "rerun=missing,all"), "rerun: "),
        (("-m", "model=nano", "train.learning_rate=interval(0,1)"), "interval"),
        (("model=nano", "sweep.repeats=3"), "add -m"),
        (("-m", "model=nano", "repeat=2"), "repeat: set by the sweep; use sweep.repeats"),
    ],
)
def test_what_cannot_be_composed_refuses_the_whole_sweep_in_one_line(
    tmp_path, monkeypatch, capfd, arguments, named
) -> None:
    monkeypatch.setattr(command, "exit_codes", [])
    monkeypatch.setattr(sys, "argv", ["ldft", *arguments, f"results.dir={tmp_path / 'results'}"])
    assert command.main() == 2
    out, err = capfd.readouterr()
    assert named in err and err.count("\n") == 1 and out == ""
    assert list(tmp_path.glob("results/*")) == []


def test_a_device_that_only_the_cells_machines_know_is_asked_for_by_name(tmp_path, monkeypatch, capfd) -> None:
    launched: list[list[str]] = []

    class Elsewhere:
        def launch(self, cells: list[list[str]], initial_job_idx: int) -> None:
            launched.extend(cells)

    monkeypatch.setattr(Plugins, "instantiate_launcher", lambda self, **given: Elsewhere())

    def main(*arguments: str) -> int:
        monkeypatch.setattr(command, "exit_codes", [])
        monkeypatch.setattr(sys, "argv", ["ldft", "-m", "model=nano", *arguments, f"results.dir={tmp_path}"])
        return command.main()

    assert main() == 2 and launched == []
    assert capfd.readouterr().err.startswith("ldft: launch.device: auto: ")
    main("launch.device=cpu,cuda", "train.precision=fp32")
    assert [cell[:2] for cell in launched] == [["model=nano", f"launch.device={name}"] for name in ("cpu", "cuda")]
