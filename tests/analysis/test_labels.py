"""What options, cells and refused rows are called: by the options of the config tree, as they were asked for."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest

from ldft.cli import composition
from ldft.config import Config, Goal, OffloadDevice
from ldft.config.root import flatten
from multirun_analysis import cells, compare, load
from multirun_analysis.__main__ import main
from multirun_analysis.figures import groups_to_compare
from multirun_analysis.labels import text
from multirun_analysis.options import names, values_of
from multirun_analysis.rows import differing, option_label
from tests.conftest import compose


def offload(stage: int, parameters: str, optimizer: str) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        config.offload.stage = stage
        config.offload.parameters, config.offload.optimizer = OffloadDevice[parameters], OffloadDevice[optimizer]

    return change


FULL, NONE, OWN = offload(3, "cpu", "cpu"), offload(0, "none", "none"), offload(1, "none", "cpu")


@pytest.mark.parametrize("group", [group for group in composition.groups() if group not in ("sweep", "model", "numa")])
def test_every_option_is_recognised_in_the_rows_that_it_makes(group: str) -> None:
    known = composition.groups()[group]
    made = [flatten(compose(f"{group}={option}")) for option in known]
    texts = pd.DataFrame([{key: text(value) for key, value in values.items()} for values in made])
    assert names(texts, group).tolist() == known and list(values_of(group)) == known


def test_options_of_a_group_without_a_name_are_compared_by_theirs(rows, capsys) -> None:
    rows.add(config=FULL, iteration_s=[2.0, 2.0, 2.0])
    rows.add(config=NONE, iteration_s=[1.0, 1.0, 1.0])
    rows.add(config=OWN, iteration_s=[1.5, 1.5, 1.5])
    df = load(rows.folder)
    own = "stage=1 parameters=none optimizer=cpu"
    assert option_label(df, "offload").tolist() == ["full", "none", own]
    assert df.variant.tolist() == ["offload=full", "offload=none", own]
    table = compare(df, by="offload", baseline="none").set_index("option")
    assert table.loc["full"].speedup == pytest.approx(0.5) and own in table.index
    assert main([str(rows.folder), "--by", "offload", "--baseline", "none", "--no-figures"]) == 0
    assert "Speed-up over offload=none" in capsys.readouterr().out


def test_keys_beside_an_option_are_named_only_where_rows_of_it_differ(rows) -> None:
    def every(number: int) -> Callable[[Config], None]:
        return lambda config: setattr(config.checkpointing, "every", number)

    rows.add(config=every(1))
    rows.add(config=every(2))
    df = load(rows.folder)
    assert df.variant.tolist() == ["checkpointing=cpu every=1", "checkpointing=cpu every=2"]


def test_keys_of_a_group_without_options_stand_for_themselves(rows) -> None:
    def values(batch: int, steps: int) -> Callable[[Config], None]:
        def change(config: Config) -> None:
            config.train.micro_batch_size, config.train.gradient_accumulation_steps = batch, steps

        return change

    for batch, steps in ((1, 1), (2, 1), (1, 2)):
        rows.add(config=values(batch, steps))
    found = {key: labels.tolist() for key, labels in differing(load(rows.folder)).items()}
    assert found == {
        "train.micro_batch_size": ["micro_batch_size=1", "micro_batch_size=2", "micro_batch_size=1"],
        "train.gradient_accumulation_steps": [f"gradient_accumulation_steps={n}" for n in (1, 1, 2)],
    }


def test_a_mistyped_value_changes_no_label_and_is_listed_apart(rows, capsys) -> None:
    rows.add(config=FULL)
    rows.add(config=NONE)
    before = load(rows.folder)[["model", "policy", "variant"]].values.tolist()

    def mistyped(config: Config) -> None:
        config.train.micro_batch_size, config.optimizer.learning_rate = -1, 0.5

    rows.add(status="invalid", config=mistyped, error_type="ConfigError")
    df = load(rows.folder)
    assert df[["model", "policy", "variant"]].values.tolist() == [*before, ["", "", ""]]
    assert df.apart.tolist() == [False, False, True]
    assert len(cells(df)) == 2 and groups_to_compare(df) == ["offload"]
    assert main([str(rows.folder), "--no-figures"]) == 0
    out = capsys.readouterr().out
    assert "3 rows: 2 ok, 1 invalid" in out and "Refused for a value that no other row has" in out
    assert out.count("made to be invalid [see the log]") == 1


def test_a_refused_combination_and_what_does_not_fit_stay_cells(rows) -> None:
    rows.add(config=FULL)
    rows.add(config=NONE, tokens=2048)
    rows.add(status="invalid", config=NONE, error_type="CombinationError")  # each value has another row
    rows.add(status="invalid", config=FULL, tokens=4096, error_type="DoesNotFitError")
    df = load(rows.folder)
    assert not df.apart.any()
    assert sorted(cells(df).failure) == ["", "", "does not fit", "invalid"]


def test_where_all_was_refused_nothing_is_apart(rows) -> None:
    rows.add(status="invalid", tokens=1024)
    rows.add(status="invalid", tokens=2048)
    df = load(rows.folder)
    assert not df.apart.any() and len(cells(df)) == 2


def test_deepspeeds_own_keys_make_another_option(rows) -> None:
    rows.add(config=FULL)
    rows.add(config=lambda config: config.offload.deepspeed.update({"zero_optimization": {"sub_group_size": 7}}))
    labels = option_label(load(rows.folder), "offload").tolist()
    assert labels[0] == "full" and labels[1].startswith("deepspeed=") and "sub_group_size" in labels[1]


def test_a_plan_is_called_what_was_asked_for_and_not_what_it_chose(rows) -> None:
    """So its cells at several lengths, where it chooses differently, are one line in a figure."""

    def planned(layers: int, *, lion: bool = False) -> Callable[[Config], None]:
        def change(config: Config) -> None:
            config.asked = {"plan.goal": "fastest", "checkpointing.layers": "-1", "launch.device": "auto"}
            config.plan.goal, config.checkpointing.layers = Goal.fastest, layers
            config.optimizer.name = "lion" if lion else "adamw"

        return change

    rows.add(config=planned(3))
    rows.add(config=planned(1), tokens=2048)
    rows.add(config=planned(1, lion=True), tokens=2048)
    rows.add(config=NONE)
    rows.add(config=FULL, tokens=2048)
    plans = ["plan=fastest", "plan=fastest", "plan=fastest optimizer=lion"]
    assert load(rows.folder).variant.tolist() == [*plans, "offload=none", ""]
    rows.add(config=NONE, tokens=2048)  # now too few have the default
    assert load(rows.folder).variant.tolist() == [*plans, "offload=none", "offload=full", "offload=none"]


def test_a_plan_that_was_not_made_has_no_choices(rows) -> None:
    def refused(config: Config) -> None:
        config.asked = {"plan.goal": "plan.goal: fastest: nothing fits"}

    rows.add(config=refused, status="invalid", error_type="ConfigError")
    rows.add(config=NONE)
    assert "plan" not in " ".join(load(rows.folder).variant)


def test_a_default_that_most_rows_have_is_not_named(rows) -> None:
    def overlap(value: bool | None) -> Callable[[Config], None]:
        return lambda config: setattr(config.optimizer, "overlap_step", value)

    for tokens in (512, 1024, 2048):
        rows.add(config=overlap(None), tokens=tokens)
    rows.add(config=overlap(False), tokens=1024)
    assert load(rows.folder).variant.tolist() == ["", "", "", "overlap_step=False"]
    rows.add(config=overlap(False), tokens=2048)  # three of five: both are named
    assert set(load(rows.folder).variant) == {"overlap_step=auto", "overlap_step=False"}
