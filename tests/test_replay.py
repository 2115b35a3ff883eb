"""The second pass sees what the first saw and leaves no trace."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import flatmin
from doors import everything, through_closure, through_two_steps, train
from problems import batches, tiny_network


def _network(kind):
    torch.manual_seed(0)
    if kind == "spectral norm":  # its power iteration moves a buffer at each call, so it matters where a pass starts
        return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 8)), nn.Tanh(), nn.Linear(8, 3))
    if kind == "cumulative batch norm":
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, momentum=None), nn.Tanh(), nn.Linear(8, 3))
    if kind == "instance norm":
        norm = nn.InstanceNorm1d(1, track_running_stats=True, affine=True)
        return nn.Sequential(nn.Linear(5, 8), nn.Unflatten(1, (1, 8)), norm, nn.Flatten(), nn.Linear(8, 3))
    return nn.Sequential(nn.Linear(5, 8), nn.SyncBatchNorm(8), nn.Tanh(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize("door", [through_closure, through_two_steps])
@pytest.mark.parametrize("kind", ["spectral norm", "cumulative batch norm", "instance norm", "frozen statistics"])
def test_rho_zero_is_the_base_with_every_kind_of_buffer(kind, door):
    model, plain, careless = _network(kind), _network(kind), _network(kind)
    train(flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.0, model=model), model, door=door)
    train(torch.optim.SGD(plain.parameters(), lr=0.1), plain)
    assert torch.equal(everything(model), everything(plain))
    train(flatmin.SAM(torch.optim.SGD(careless.parameters(), lr=0.1), 0.0), careless, door=door)
    assert torch.equal(everything(careless), everything(plain)) == (kind == "frozen statistics")


def test_a_closure_may_call_the_networks_that_the_model_holds():
    found = []
    for make in (lambda base, held: flatmin.SAM(base, 0.0, model=held), lambda base, held: base):
        first = tiny_network()
        second = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        held = nn.ModuleList([first, second])
        optimizer = make(torch.optim.SGD(held.parameters(), lr=0.1, momentum=0.9), held)
        torch.manual_seed(0)
        for inputs, labels in batches():

            def closure(optimizer=optimizer, first=first, second=second, inputs=inputs, labels=labels):
                optimizer.zero_grad()
                loss = cross_entropy(second(first(inputs)), labels)
                loss.backward()
                return loss

            optimizer.step(closure)
        if isinstance(optimizer, flatmin.SAM):
            optimizer.param_groups[0]["rho"] = 0.05
            assert flatmin.doctor(optimizer, closure).is_healthy
        found.append(everything(held))
    assert torch.equal(*found)


@pytest.mark.parametrize("door", [through_closure, through_two_steps])
def test_several_calls_of_the_model_in_one_pass_see_the_same_masks(door):
    """Between the calls the first pass draws random numbers that the second does not."""
    model = nn.Dropout(0.5)
    weights = nn.Parameter(torch.ones(1000))
    optimizer = flatmin.SAM(torch.optim.SGD([weights], lr=0.0), model=model)
    masks = []

    def loss():
        if len(masks) in (0, 2):
            masks.append([])
        outputs = []
        for _ in range(3):
            outputs.append(model(weights))
            if len(masks) == 1:
                torch.rand(len(outputs))
        masks.append([output != 0 for output in outputs])
        return sum(output.sum() for output in outputs)

    torch.manual_seed(0)
    door(optimizer, loss)
    first, second = masks[1], masks[-1]
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_random_numbers_drawn_in_the_closure_before_the_model_are_repeated():
    model = tiny_network()
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    drawn = []

    def loss():
        drawn.append(torch.rand(3))
        return cross_entropy(model(batches()[0][0] + drawn[-1][0]), batches()[0][1])

    through_closure(optimizer, loss)
    assert torch.equal(drawn[0], drawn[1])


def test_the_generator_is_left_as_the_first_pass_left_it():
    model = tiny_network()
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    torch.manual_seed(3)
    model(batches()[0][0])
    expected = torch.rand(2)
    for door in (through_closure, through_two_steps):
        torch.manual_seed(3)
        door(optimizer, lambda: model(batches()[0][0]).sum())
        assert torch.equal(torch.rand(2), expected)


def test_evaluation_between_steps_is_not_replayed():
    model, other = tiny_network(), tiny_network()
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    other_optimizer = flatmin.SAM(torch.optim.SGD(other.parameters(), lr=0.1), model=other)

    def evaluate():
        with torch.no_grad():
            model.eval()(batches()[1][0])
        model.train()

    train(optimizer, model, door=through_two_steps, after=evaluate)
    train(other_optimizer, other, door=through_two_steps)
    assert torch.equal(everything(model), everything(other))


def test_calls_before_zero_grad_are_not_replayed():
    """A stray forward in training mode, then the usual loop that starts with zero_grad."""
    model = tiny_network()
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), 0.0, model=model)
    plain = tiny_network()
    base = torch.optim.SGD(plain.parameters(), lr=0.1)
    inputs, labels = batches()[0]
    for step in range(3):
        for network, each in ((model, optimizer), (plain, base)):
            torch.manual_seed(step)
            network(inputs)
            each.zero_grad()
            cross_entropy(network(inputs), labels).backward()
            if each is optimizer:
                with optimizer.perturbed():
                    cross_entropy(network(inputs), labels).backward()
            each.step()
    assert torch.equal(everything(model), everything(plain))


def _watched_dropout():
    """A network, its optimizer, and a list that will hold the mask of every call in training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    masks = []
    model[2].register_forward_hook(lambda module, _, output: masks.append(output == 0) if module.training else None)
    return model, flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model), masks


@pytest.mark.parametrize("is_evaluated", [False, True])
def test_an_evaluation_with_gradients_on_is_not_replayed(is_evaluated):
    """In a loop that never calls ``zero_grad`` before a step; dropout repeats the masks of the pass, not of a stray."""
    model, optimizer, masks = _watched_dropout()
    (inputs, labels), (others, _) = batches()[:2]
    for _ in range(3):
        if is_evaluated:
            model.eval()(others)
            torch.rand(1)
            model.train()
        cross_entropy(model(inputs), labels).backward()
        with optimizer.perturbed():
            cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    assert len(masks) == 6
    assert all(torch.equal(first, second) for first, second in zip(masks[::2], masks[1::2], strict=True))
    assert not torch.equal(masks[0], masks[2])


def test_an_evaluated_target_inside_a_pass_belongs_to_it():
    """The model's own answers in evaluation mode, sloppily with gradients on, then its training pass: both times."""
    model, optimizer, masks = _watched_dropout()
    inputs, _ = batches()[0]

    def backward():
        target = model.eval()(inputs).detach().softmax(1)
        cross_entropy(model.train()(inputs), target).backward()

    for _ in range(2):
        backward()
        with optimizer.perturbed():
            backward()
        optimizer.step()
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[2], masks[3])
    assert not torch.equal(masks[0], masks[2])


def test_buffers_are_restored_when_the_second_pass_raises():
    model, plain = tiny_network(), tiny_network()
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    num_calls = 0

    def closure():
        nonlocal num_calls
        num_calls += 1
        loss = model(batches()[0][0]).sum()
        if num_calls == 2:
            raise KeyError
        loss.backward()
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    plain(batches()[0][0])
    assert torch.equal(everything(model), everything(plain))
    assert model.num_calls == 1


def test_the_model_does_not_keep_the_optimizer_alive():
    model = tiny_network()
    optimizer = flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    replay = weakref.ref(optimizer._passes.replay)
    del optimizer
    gc.collect()
    assert replay() is None
    model(batches()[0][0])


def test_an_expanded_buffer_is_put_back_too():
    """Its entries are one number in memory, into which no operation writes as a whole."""

    class Expanded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.register_buffer("scale", torch.ones(2, 1, 5)[:, :, :1].expand(2, 4, 5))

        def forward(self, inputs):
            self.scale[:, 0, 0].add_(torch.tensor([1.0, 3.0]))
            return self.layer(inputs * self.scale[0, 0])

    model = Expanded()
    through_closure(flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model), lambda: _loss_of(model))
    assert model.scale[:, 2, 3].tolist() == [2.0, 4.0]


def test_a_sharded_buffer_is_put_back_beside_plain_ones(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh  # noqa: PLC0415

        mesh = init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
        model.register_buffer("spread", distribute_tensor(torch.ones(3), mesh, [Replicate()]))
        model.register_forward_hook(_add_one_to_spread)
        through_closure(flatmin.SAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model), lambda: _loss_of(model))
        assert model.spread.to_local().tolist() == [2.0] * 3
        assert model[1].num_batches_tracked == 1
    finally:
        torch.distributed.destroy_process_group()


def _add_one_to_spread(module, *_):
    module.spread.add_(1)


def _loss_of(model):
    inputs, labels = batches()[0]
    return cross_entropy(model(inputs), labels)
