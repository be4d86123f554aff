"""DeepSpeed's own monitors: one that would fail in the rank is refused before."""

from __future__ import annotations

from pathlib import Path

import pytest

from ldft.preflight import deepspeed_refused


def test_wandb_without_a_login_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if the package were installed: DeepSpeed then fails in the rank, where nobody can log in."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    own = {"wandb.enabled": True}
    ((key, problem),) = deepspeed_refused._unconditional(own)
    assert key == "wandb.enabled" and problem.startswith("true needs a login to W&B (No API key); run wandb login, ")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password x")
    assert not list(deepspeed_refused._unconditional(own))
    (tmp_path / "netrc").unlink()
    for name, value in (("WANDB_API_KEY", "x"), ("WANDB_MODE", "offline")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            assert not list(deepspeed_refused._unconditional(own))
