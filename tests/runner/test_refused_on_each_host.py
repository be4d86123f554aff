"""A command that is wrong on every host, and one that is wrong on another host alone."""

from __future__ import annotations

import pytest

from ldft.errors import LdftError
from ldft.runner import checks
from tests.conftest import compose, long
from tests.runner.conftest import ENDLESS, Hosts


def test_what_the_first_host_refuses_the_others_refuse_at_once(hosts: Hosts) -> None:
    """It never answers them; they would wait for minutes."""
    words = ("launch.device=cpu", "train.precision=fp32", "launch.sequence_parallel=2", "seq_len.tokens=97")
    first, second = hosts.start(0, *words), hosts.start(1, *words)
    said, also = first.communicate(timeout=60)[0], second.communicate(timeout=60)[0]
    assert (first.returncode, second.returncode) == (2, 2), said + also
    line = "ldft: seq_len.tokens: 97 is not divisible by launch.sequence_parallel=2; use 96 or 98\n"
    assert said.endswith(line) and also == line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        # Where plan=auto, the default, makes no plan on any host, the values are those that run.
        (("attention=flash_attention_2",), "attention.kind: flash_attention_2 needs launch.device=cuda"),
        (("launch.sequence_parallel=2", "offload=optimizer"), "launch.sequence_parallel: 2: needs offload.stage=3"),
        (("plan.tokens_per_update=2048",), "plan.tokens_per_update: 2048 needs a plan, and plan=auto makes none"),
        (("plan=none", "plan.tokens_per_update=2048"), "plan.tokens_per_update: 2048 is not used with plan=none"),
        (("plan=fastest", "plan.tokens_per_update=2048"), ""),
        ((), ""),
    ],
)
def test_what_is_refused_does_not_wait_for_a_plan(words: tuple[str, ...], says: str) -> None:
    config = compose("model=nano", "launch.device=cpu", "launch.num_hosts=2", "launch.num_ranks=2", *words)
    if not says:
        checks.check_joining(config)
        return
    with pytest.raises(LdftError, match=f"^{says}"):
        checks.check_joining(config)


@long
def test_a_host_that_refuses_its_own_command_tells_a_first_that_waits(hosts: Hosts) -> None:
    first = hosts.start(0, ENDLESS)
    hosts.wait_for("results/*/attempt-1/host-0.json")
    second = hosts.start(1, ENDLESS, "optimizer.learning_rate=-1")
    said, also = first.communicate(timeout=120)[0], second.communicate(timeout=60)[0]
    assert (first.returncode, second.returncode) == (2, 2), said + also
    line = "optimizer.learning_rate: -1 "
    assert f": {line}" in hosts.row()["error_message"] and also.startswith(f"ldft: {line}")
