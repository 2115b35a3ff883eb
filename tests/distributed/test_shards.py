"""Sharded parameters: FSDP2, tensor parallelism, and both at once."""

import math
import warnings
from functools import partial

import pytest
import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import flatmin
from flatmin.optim import Centralised, Filtered, Gradient
from replicas import batch, is_same_everywhere, sgd

METHODS = {
    "p2": partial(flatmin.SAM, p=2.0),
    "pinf": partial(flatmin.SAM, p=math.inf),
    "p1": partial(flatmin.SAM, p=1.0),
    "p1.5": partial(flatmin.SAM, p=1.5),
    "2 ascents": partial(flatmin.SAM, ascent_steps=2),
    "asam": flatmin.ASAM,
    "asam pinf": partial(flatmin.ASAM, p=math.inf),
    "asam p1": partial(flatmin.ASAM, p=1.0),
    "zsharp": partial(flatmin.ZSharp, quantile=0.6),
    "centralised": partial(flatmin.SharpnessAware, direction=Filtered(Gradient(), Centralised())),
}
RHO = 0.3


def network(dtype=torch.float64):
    """Rows that do not divide evenly, and a bias with fewer rows than four processes have."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).to(
        dtype
    )


def fsdp(dtype=torch.float64, **options):
    model = network(dtype)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def tensor_parallel():
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    return parallelize_module(
        network(),
        mesh,
        {"0": ColwiseParallel(output_layouts=Replicate()), "5": RowwiseParallel(input_layouts=Replicate())},
    )


def hybrid(dtype=torch.float64):
    """Two groups of replicas, shards within each."""
    return fsdp(dtype, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))


def both():
    """FSDP over pairs of processes, tensor parallelism within each pair."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(
        network(),
        mesh["tensor"],
        {"0": ColwiseParallel(output_layouts=Replicate()), "3": ColwiseParallel(), "5": RowwiseParallel()},
    )
    return fully_shard(model, mesh=mesh["data"])


BUILDERS = {"fsdp": fsdp, "tensor": tensor_parallel, "hybrid": hybrid, "both": both}


def whole(model):
    """All parameters as one vector, in every process."""
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([part.detach().flatten() for part in parts])


def shards(model):
    return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in model.parameters()]


def take_step(optimizer, model, data, door="closure", visited=None):
    inputs, labels = data

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(inputs), labels)
        loss.backward()
        if visited is not None:
            visited.append(whole(model))
        return loss

    if door == "closure":
        optimizer.step(closure)
    elif door == "two steps":
        closure()
        for _ in range(optimizer.ascent_steps):
            optimizer.first_step(zero_grad=True)
            closure()
        optimizer.second_step(zero_grad=True)
    else:
        closure()
        with optimizer.perturbed():
            closure()
        optimizer.step()


def data_of(kind, step):
    """What this process sees, and what all see together: with tensor parallelism the same."""
    size, rank = distributed.get_world_size(), distributed.get_rank()
    replicas = {"fsdp": size, "tensor": 1, "hybrid": size, "both": size // 2}[kind]
    parts = [batch(step, part) for part in range(replicas)]
    own = {"fsdp": rank, "tensor": 0, "hybrid": rank, "both": rank // 2}[kind]
    return parts[own], tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _equals_one_process(kind, method, door, dtype=torch.float64):
    model, alone = BUILDERS[kind](), network()
    optimizer = METHODS[method](sgd(model), RHO, model=model, diagnostics=True)
    reference = METHODS[method](sgd(alone), RHO, model=alone, diagnostics=True)
    for step in range(4):
        own, together = data_of(kind, step)
        visited, expected = [], []
        take_step(optimizer, model, own, door, visited)
        take_step(reference, alone, together, visited=expected)
        for here, there in zip(visited, expected, strict=True):
            assert_close(here, there, rtol=1e-11, atol=1e-12)
        for name in ("gradient_norm", "perturbed_gradient_norm", "cosine", "perturbation_norm"):
            here, there = getattr(optimizer.diagnostics, name), getattr(reference.diagnostics, name)
            assert_close(here.double(), there.double(), rtol=1e-6, atol=1e-9)
    assert_close(whole(model), whole(alone), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_fsdp_equals_one_process(two_ranks, method):
    two_ranks.run(_equals_one_process, "fsdp", method, "closure")


@pytest.mark.parametrize("door", ["two steps", "context"])
def test_fsdp_equals_one_process_through_the_other_doors(two_ranks, door):
    two_ranks.run(_equals_one_process, "fsdp", "asam", door)


@pytest.mark.parametrize("method", METHODS)
def test_tensor_parallelism_equals_one_process(two_ranks, method):
    two_ranks.run(_equals_one_process, "tensor", method, "two steps" if method == "2 ascents" else "closure")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp", "hybrid", "both"])
@pytest.mark.parametrize("method", METHODS)
def test_shards_over_four_processes_equal_one_process(four_ranks, kind, method):
    four_ranks.run(_equals_one_process, kind, method, "closure")


def _local_norms():
    """The control: a norm over this process's shards alone makes eps too long."""
    model = fsdp()
    cross_entropy(model(batch(0, 0)[0]), batch(0, 0)[1]).backward()
    local = torch.cat([p.grad.to_local().flatten() for p in model.parameters()]).norm()
    everywhere = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()]).norm()
    return float(local / everywhere)


def test_a_norm_over_local_shards_would_be_too_short(two_ranks):
    assert max(two_ranks.run(_local_norms)) < 0.95


def _ties():
    model = fsdp()
    optimizer = flatmin.SAM(sgd(model), RHO, p=1.0)
    before = whole(model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer.first_step()
    moved = whole(model) - before
    assert_close(moved[0].item(), RHO, rtol=1e-12, atol=0.0)
    assert (moved != 0).sum() == 1


def test_of_equal_entries_in_several_shards_the_first_moves(two_ranks):
    two_ranks.run(_ties)


def _restored():
    model = fsdp()
    optimizer = flatmin.SAM(sgd(model, lr=0.0, weight_decay=0.0), RHO, model=model)
    before, storage = shards(model), [p.to_local().data_ptr() for p in model.parameters()]
    visited = []
    take_step(optimizer, model, batch(0, distributed.get_rank()), visited=visited)
    assert_close((visited[1] - visited[0]).norm().item(), RHO, rtol=1e-10, atol=0.0)
    assert all(map(torch.equal, shards(model), before))
    calls = []

    def closure():
        calls.append(1)
        loss = cross_entropy(model(batch(0, 0)[0]), batch(0, 0)[1])
        loss.backward()
        if len(calls) == 2:
            raise KeyError
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert all(map(torch.equal, shards(model), before))
    assert [p.to_local().data_ptr() for p in model.parameters()] == storage


def test_each_shard_is_restored_bit_for_bit(two_ranks):
    two_ranks.run(_restored)


def _mixed(method):
    """Parameters are gathered in bfloat16; the perturbation and the update act on the float32 shards."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, alone = fsdp(torch.float32, mp_policy=policy), network(torch.float32)
    optimizer = METHODS[method](sgd(model), RHO, model=model, diagnostics=True)
    reference = METHODS[method](sgd(alone), RHO, model=alone, diagnostics=True)
    start = whole(alone)
    for step in range(4):
        (inputs, labels), (all_inputs, all_labels) = data_of("fsdp", step)
        take_step(optimizer, model, (inputs.float(), labels))
        take_step(reference, alone, (all_inputs.float(), all_labels))
    assert_close(optimizer.diagnostics.perturbation_norm.float(), torch.tensor(RHO), rtol=1e-5, atol=0.0)
    here, there = whole(model) - start, whole(alone) - start
    assert (here - there).norm() < 0.05 * there.norm()
    assert (here - there).norm() > 0
    assert is_same_everywhere(whole(model))


def test_mixed_precision_of_fsdp_ends_near_full_precision(two_ranks):
    two_ranks.run(_mixed, "p2")


def _overflow(overflowing_pass, with_scaler):
    model = fsdp(torch.float32)
    optimizer = flatmin.SAM(sgd(model), RHO, model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=with_scaler)
    inputs, labels = batch(0, distributed.get_rank())
    for attempt in range(3):
        calls, before = [], shards(model)

        def closure(calls=calls, attempt=attempt):
            calls.append(1)
            loss = cross_entropy(model(inputs.float()), labels)
            is_bad = attempt == 1 and len(calls) == overflowing_pass and distributed.get_rank() == 1
            scaler.scale(loss * (math.inf if is_bad else 1.0)).backward()
            return loss

        optimizer.step(closure, scaler=scaler)
        scaler.update()
        assert all(map(torch.equal, shards(model), before)) == (attempt == 1)
    assert optimizer.diagnostics.num_skipped_steps == 1
    if with_scaler:
        assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("with_scaler", [False, True])
def test_overflow_in_one_process_skips_the_step_in_all(two_ranks, with_scaler):
    two_ranks.run(_overflow, 1, with_scaler)
    two_ranks.run(_overflow, 2, with_scaler)


def _micro_batches():
    model, alone = fsdp(), network()
    optimizer = flatmin.SAM(sgd(model), RHO, model=model, sync="global")
    reference = flatmin.SAM(sgd(alone), RHO, model=alone)

    def closure_on(network, data):
        def closure():
            loss = cross_entropy(network(data[0]), data[1])
            loss.backward()
            return loss

        return closure

    for step in range(3):
        (first, together), (second, together_too) = data_of("fsdp", step), data_of("fsdp", step + 10)
        optimizer.step([closure_on(model, first), closure_on(model, second)])
        reference.step([closure_on(alone, together), closure_on(alone, together_too)])
    assert_close(whole(model), whole(alone), rtol=1e-11, atol=1e-12)


def test_micro_batches_of_shards_have_a_perturbation_each(two_ranks):
    two_ranks.run(_micro_batches)


def _refused():
    model = fsdp()
    for sync in ("local", 1, 2):
        with pytest.raises(
            ValueError, match=r'sync must be "global" where parameters are sharded.*step\(\[closures\]\)'
        ):
            flatmin.SAM(sgd(model), model=model, sync=sync)
        with pytest.raises(ValueError, match='sync must be "global" where parameters are sharded'):
            flatmin.SAM(sgd(model), sync=sync)


def test_local_perturbation_of_shards_is_refused(two_ranks):
    two_ranks.run(_refused)


def _first_version():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(TypeError, match="fully_shard, got FullyShardedDataParallel"):
        flatmin.SAM(sgd(model), model=model)


def test_the_first_version_of_fsdp_is_refused(two_ranks):
    two_ranks.run(_first_version)


def _adam(model):
    return flatmin.SAM(torch.optim.Adam(model.parameters(), lr=0.01), RHO, model=model)


def _save_sharded(directory):
    """Three steps, a checkpoint, three more."""
    model = fsdp()
    optimizer = _adam(model)
    for step in range(6):
        take_step(optimizer, model, data_of("fsdp", step)[0])
        if step == 2:
            optimizer.param_groups[0]["rho"] = 0.2
            model_state, optimizer_state = get_state_dict(model, optimizer)
            checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory)
    return whole(model).tolist()


def _load_sharded(directory):
    model = fsdp()
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer = _load(model, directory)
    for step in range(3, 6):
        take_step(optimizer, model, data_of("fsdp", step)[0])
    return whole(model).tolist()


def _load(model, directory):
    optimizer = _adam(model)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    assert optimizer.param_groups[0]["rho"] == 0.2
    assert optimizer.param_groups[0]["num_steps"] == 3
    return optimizer


def _together(step):
    return tuple(torch.cat(tensors) for tensors in zip(batch(step, 0), batch(step, 1), strict=True))


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_a_checkpoint_of_two_processes_loads_in_one_and_the_other_way_round(two_ranks, tmp_path):
    ended = two_ranks.run(_save_sharded, str(tmp_path / "two"))[0]
    model = network()
    optimizer = _load(model, str(tmp_path / "two"))
    for step in range(3, 6):
        take_step(optimizer, model, _together(step))
    assert_close(whole(model), torch.tensor(ended, dtype=torch.float64), rtol=1e-9, atol=1e-10)

    model = network()
    optimizer = _adam(model)
    for step in range(3):
        take_step(optimizer, model, _together(step))
    optimizer.param_groups[0]["rho"] = 0.2
    model_state, optimizer_state = get_state_dict(model, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=str(tmp_path / "one"))
    assert_close(
        torch.tensor(two_ranks.run(_load_sharded, str(tmp_path / "one"))[0]), torch.tensor(ended), rtol=1e-9, atol=1e-10
    )
