"""Random overrides for `python -m ldft dry_run=true`, in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_origin

import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given
from hypothesis import strategies as st

from ldft.cli import command, composition
from ldft.config.root import columns

KEYS = {key: kind for key, kind in columns() if key != "asked"}
GROUPS = composition.groups()
LISTS = [key for key, kind in KEYS.items() if get_origin(kind) is list]

numbers = st.one_of(
    st.integers(-2, 9),
    st.sampled_from([0, 1, 2**31 - 1, 2**63, -(2**63), 10**30]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, 1e-300, 1e300]),
).map(str)
words = st.sampled_from(
    ["", "null", "true", "none", "auto", "cpu", "cuda", "nvme", "default", "~", "~/x", "?", "''", '""', "é", "日本", "a b", "a,b",
     "[]", "{}", "[1,2]", "[0,3]", "[-1]", "[a,[b]]", "{a:1}", "{a:{b:[1]}}", "{rope_type:linear,factor:2.0}", "{type:yarn}",
     "{bf16:{enabled:1}}", "{zero_optimization:{stage:9}}", "${model.name}", "${nothing.here}", "${oc.env:NO_SUCH_VARIABLE}",
     "${hydra:job.num}", "${no_such_resolver:1}", "${", "glob(*)", "glob(zzz*)", "range(3)", "choice(a,b)", "interval(0,1)",
     "int(3)", "str(x)", "/", "/dev/null", "/nonexistent/folder", ".", "x" * 300, "\\", "=", "a=b", "@", "#", "%s", "{0}", "\t"]
)  # fmt: skip
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), max_size=12)
values = st.one_of(numbers, words, texts)
options = st.sampled_from([(group, option) for group, found in GROUPS.items() for option in found]).map("=".join)
keys = st.one_of(
    st.sampled_from(sorted(KEYS)),
    st.sampled_from(sorted(GROUPS)),
    st.sampled_from(sorted({key.rpartition(".")[0] for key in KEYS if "." in key})),
    st.sampled_from(LISTS).map(lambda key: f"{key}[0]"),
    st.sampled_from(
        ["hydra/launcher", "hydra/sweeper", "hydra.job.name", "hydra.nothing", "model.extra.x", "offload.deepspeed.x"]
    ),
    st.tuples(st.sampled_from(sorted(KEYS)), st.integers(0, 20)).map(
        lambda pair: pair[0][: pair[1]] + pair[0][pair[1] + 1 :]
    ),
    texts,
)
overrides = st.one_of(
    options,
    st.builds(lambda sign, key, value: f"{sign}{key}={value}", st.sampled_from(["", "", "", "+", "++", "~"]), keys, values),
    st.builds(lambda key: f"~{key}", keys),
    texts,
)  # fmt: skip


@given(given_overrides=st.lists(overrides, min_size=1, max_size=4))
def test_answers_in_one_line(
    given_overrides: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Before the command turns "-x" into an option, which Hydra's parser answers with its own help or a shell's completion.
    words = [word for word in given_overrides if not word.startswith("-")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ldft", "model=nano", *words, "dry_run=true"])
    GlobalHydra.instance().clear()
    code = command.main()
    _, err = capfd.readouterr()
    traceback = _traceback(tmp_path)
    said = [line for line in err.splitlines() if line.startswith("ldft: ")]
    assert not traceback and "Traceback" not in err, (words, err, traceback)
    assert code in (0, 2), (words, code, err)
    if code == 2:
        assert len(said) == 1 and err.count("\n") == 1, (words, err)
    assert not list(tmp_path.iterdir()), words


def _traceback(folder: Path) -> str:
    """What an internal error left; removed, so that the next example finds an empty folder."""
    log = folder / "ldft-internal-error.log"
    text = log.read_text() if log.exists() else ""
    log.unlink(missing_ok=True)
    return text
