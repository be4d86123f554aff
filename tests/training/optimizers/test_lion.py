"""Lion, offloaded and not, is the rule of its paper."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from ldft.training.optimizers.device_lion import DeviceLion
from tests.conftest import long
from tests.training.test_equality import plain_pytorch, relative_error, run_once  # noqa: F401


class PaperLion(torch.optim.Optimizer):
    """Program 1 of arXiv 2302.06675, one weight at a time, in fp64."""

    def __init__(self, params, lr, betas, weight_decay, **others) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure, and no loss to return
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                state = self.state[weight]
                momentum = state.setdefault("momentum", torch.zeros_like(weight, dtype=torch.float64))
                master = state.setdefault("master", weight.double())
                gradient = weight.grad.double()
                update = torch.sign(beta1 * momentum + (1 - beta1) * gradient)
                master -= group["lr"] * (update + group["weight_decay"] * master)
                momentum.mul_(beta2).add_(gradient, alpha=1 - beta2)
                weight.copy_(master)


def test_our_lion_takes_the_papers_steps() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(shape, requires_grad=True) for shape in ((7, 5), (3,), (1, 1, 130))]
    unused = torch.randn(4, requires_grad=True)
    plain = copy.deepcopy(weights)
    ours = DeviceLion([*weights, unused], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    paper = PaperLion(plain, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    before = unused.detach().clone()
    for _ in range(20):
        for mine, theirs in zip(weights, plain, strict=True):
            mine.grad = torch.randn_like(mine)
            mine.grad.view(-1)[0] = 0  # no gradient, no step but the decay's
            theirs.grad = mine.grad.clone()
        ours.step()
        paper.step()
    for mine, theirs in zip(weights, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(unused, before)


@long
@pytest.mark.parametrize("offload", ["full", "none"])
def test_training_with_lion_equals_a_plain_loop(run_once, offload: str) -> None:  # noqa: F811
    row = run_once("optimizer=lion", "optimizer.learning_rate=5e-4", "train.precision=fp32", f"offload={offload}")
    reference = plain_pytorch(row.config_json, PaperLion)
    assert reference[-1] < 0.95 * reference[0], "the loss must fall, else a missing update would not show"
    assert relative_error(row.loss, reference) < 1e-5
    assert json.loads(row.deepspeed_config_json)["optimizer"]["type"] == "Lion"
    # The comparison can fail: the other beta is far outside.
    other = json.loads(row.config_json)
    other["optimizer"]["betas"][1] = 0.5
    assert relative_error(plain_pytorch(json.dumps(other), PaperLion), reference) > 1e-4
