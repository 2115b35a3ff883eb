"""timm's parameter groups and optimizers are taken as they are."""

import pytest
import timm
import torch
from timm.optim import Lookahead, create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch.nn.functional import cross_entropy

import flatmin
from by_hand import sam_step

RHO = 0.1


def vit():
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 3, 16, 16, generator=generator), torch.arange(8) % 5


BASES = {
    "weight decay": lambda model: torch.optim.SGD(param_groups_weight_decay(model, 0.1), lr=0.1, momentum=0.9),
    "layer decay": lambda model: torch.optim.SGD(
        param_groups_layer_decay(model, 0.1, layer_decay=0.5), lr=0.1, momentum=0.9
    ),
    "factory": lambda model: create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.1, layer_decay=0.5),
    "timm's own optimizer": lambda model: create_optimizer_v2(model, opt="lamb", lr=0.01, weight_decay=0.1),
}


def train(make, is_ours, rho=RHO):
    """Three steps under timm's scheduler."""
    model = vit()
    base = make(model)
    optimizer = flatmin.SAM(base, rho, model=model) if is_ours else base
    scheduler = CosineLRScheduler(optimizer, t_initial=5, warmup_t=2, warmup_lr_init=0.01, t_in_epochs=False)
    inputs, labels = images()
    for step in range(3):

        def loss():
            return cross_entropy(model(inputs), labels)

        def closure():
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        if is_ours:
            optimizer.step(closure)
        else:
            sam_step(base, model, [loss], rho)
        scheduler.step_update(step + 1)
    return torch.cat([param.detach().flatten() for param in model.parameters()]), optimizer


@pytest.mark.parametrize("make", BASES.values(), ids=BASES.keys())
def test_timm_groups_are_taken_as_they_are(make):
    weights, optimizer = train(make, is_ours=True)
    expected, base = train(make, is_ours=False)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    assert (train(make, is_ours=False, rho=0.0)[0] - expected).abs().max() > 1e-4  # the control
    groups, plain_groups = optimizer.param_groups, base.param_groups
    assert [group["lr"] for group in groups] == [group["lr"] for group in plain_groups]
    if "lr_scale" in groups[0]:
        assert len({group["lr"] for group in groups}) > 1
    assert all(group["rho"] == RHO for group in groups)


@pytest.mark.parametrize("rho", [0.0, RHO])
def test_lookahead_goes_around_ours(rho):
    inputs, labels = images()
    found = []
    for make in (lambda base, model: flatmin.SAM(base, rho, model=model), lambda base, model: base):
        model = vit()
        inner = make(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
        optimizer = Lookahead(inner, k=2)

        def closure(optimizer=optimizer, model=model):
            optimizer.zero_grad()
            loss = cross_entropy(model(inputs), labels)
            loss.backward()
            return loss

        for _ in range(5):
            optimizer.step(closure)
        found.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert torch.equal(*found) == (rho == 0.0)
