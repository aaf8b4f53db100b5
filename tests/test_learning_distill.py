"""Distillation: it learns, keeps the best, continues where it stopped, and refuses nonsense."""

import pytest
import torch
from torch import nn

from lcnn_compile import LookupConv2d
from lcnn_compile.config import LayerConfig
from lcnn_compile.errors import CheckpointError, ConfigError, LcnnWarning
from lcnn_compile.learning import distill


class Student(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.drop(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))


def pair(seed=0):
    torch.manual_seed(seed)
    teacher = Student(nn.Conv2d(3, 8, 3, padding=1))
    teacher.head.weight.data.mul_(20)
    config = LayerConfig(dictionary_size=3, sparsity=1, group_size=2)
    student = Student(LookupConv2d.from_conv(teacher.conv, config))
    student.norm.load_state_dict(teacher.norm.state_dict())
    student.head.load_state_dict(teacher.head.state_dict())
    return student, teacher


def batches(labels=False):
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(6)]
    return [(x, torch.randint(4, (16,), generator=generator)) for x in xs] if labels else xs


def same(a, b):
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"loss": "mse"}, {"temperature": 2.0}, {"autocast": torch.bfloat16}])
def test_the_loss_falls_and_modes_come_back(options):
    student, teacher = pair()
    teacher.train()
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    student.train()
    student.drop.eval()
    history = distill(student, teacher, batches(), epochs=6, lr=0.05, progress=False, **options)
    assert history.epochs[-1].loss < 0.6 * history.epochs[0].loss
    assert len(history.epochs) == 6
    assert history.best == 5
    assert student.training
    assert not student.drop.training
    assert teacher.training
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())


def test_frozen_parameters_stay():
    student, teacher = pair()
    student.conv.dictionary.requires_grad_(False)
    before = {name: t.clone() for name, t in student.named_parameters()}
    distill(student, teacher, batches(), epochs=1, progress=False)
    moved = {name for name, t in student.named_parameters() if not torch.equal(t, before[name])}
    assert "conv.dictionary" not in moved
    assert {"conv.coefficients", "head.weight"} <= moved


def test_batch_norm_follows_only_when_asked():
    for train in (True, False):
        student, teacher = pair()
        before = student.norm.running_mean.clone()
        distill(student, teacher, batches(), epochs=1, progress=False, train_batch_norm=train)
        assert torch.equal(student.norm.running_mean, before) != train


def test_labels_take_their_share():
    student, teacher = pair()
    data = batches(labels=True)
    history = distill(student, teacher, data, epochs=20, lr=0.1, label_weight=1.0, progress=False)
    assert history.epochs[-1].loss < history.epochs[0].loss
    with pytest.raises(ConfigError, match="labels"):
        distill(student, teacher, batches(), epochs=1, label_weight=0.5, progress=False)


def test_a_run_that_was_cut_off_continues_to_the_same_end(tmp_path):
    whole, teacher = pair()
    merit = {"evaluate": lambda student: float(student.conv.coefficients.detach().norm())}
    expected = distill(whole, teacher, batches(), epochs=4, progress=False, **merit)

    class CutOff(list):
        passes = 0

        def __iter__(self):
            CutOff.passes += 1
            if CutOff.passes == 3:
                raise KeyboardInterrupt
            return super().__iter__()

    path = tmp_path / "run" / "state.safetensors"
    student, teacher = pair()
    with pytest.raises(KeyboardInterrupt):
        distill(student, teacher, CutOff(batches()), epochs=4, checkpoint=path, progress=False, **merit)
    fresh, teacher = pair()
    history = distill(fresh, teacher, batches(), epochs=4, checkpoint=path, progress=False, **merit)
    assert [e.loss for e in history.epochs] == [e.loss for e in expected.epochs]
    assert history.best == expected.best
    assert same(fresh, whole)
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]


def test_the_best_epoch_is_kept_and_patience_ends_the_run():
    student, teacher = pair()
    merits = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    snapshots = []

    def evaluate(module):
        snapshots.append({name: t.clone() for name, t in module.state_dict().items()})
        return next(merits)

    history = distill(student, teacher, batches(), epochs=5, evaluate=evaluate, patience=2, progress=False)
    assert history.stopped_early
    assert history.best == 1
    assert [e.metric for e in history.epochs] == [1.0, 3.0, 2.0, 2.5]
    assert all(torch.equal(t, snapshots[1][name]) for name, t in student.state_dict().items())


def test_networks_that_return_structures_are_matched_tensor_by_tensor():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return {"maps": y, "pooled": (y.mean((2, 3)), y.argmax(1))}

    torch.manual_seed(0)
    student, teacher = Two(), Two()
    history = distill(student, teacher, batches(), epochs=5, lr=0.05, progress=False)
    assert history.epochs[-1].loss < 0.5 * history.epochs[0].loss


def test_the_wrong_checkpoint_is_refused(tmp_path):
    student, teacher = pair()
    path = tmp_path / "state.safetensors"
    path.write_bytes(b"\x00" * 100)
    with pytest.raises(CheckpointError, match="cannot be read"):
        distill(student, teacher, batches(), epochs=1, checkpoint=path, progress=False)
    path.unlink()
    distill(nn.Sequential(nn.Conv2d(3, 8, 3)), nn.Conv2d(3, 8, 3), batches(), epochs=1, checkpoint=path, progress=False)
    with pytest.raises(CheckpointError, match="another network"):
        distill(student, teacher, batches(), epochs=1, checkpoint=path, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs"),
        ({"lr": 0.0}, "lr"),
        ({"loss": "l1"}, "loss"),
        ({"label_weight": 2}, "label_weight"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    student, teacher = pair()
    with pytest.raises(ConfigError, match=message):
        distill(student, teacher, batches(), progress=False, **{"epochs": 1, **options})


def test_a_student_without_parameters_or_a_loader_without_length_is_refused():
    student, teacher = pair()
    with pytest.raises(ConfigError, match="length"):
        distill(student, teacher, (x for x in batches()), epochs=1, progress=False)
    student.requires_grad_(False)
    with pytest.raises(ConfigError, match="requires grad"):
        distill(student, teacher, batches(), epochs=1, progress=False)


def test_two_processes_agree(tmp_path):
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["losses"] == second["losses"]
    assert all(torch.equal(t, second["weights"][name]) for name, t in first["weights"].items() if "running" not in name)
    assert (tmp_path / "state.safetensors").exists()


def _process(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    student, teacher = pair()
    wrapped = nn.parallel.DistributedDataParallel(student)
    history = distill(
        wrapped, teacher, batches()[rank::2], epochs=2, progress=False, checkpoint=f"{folder}/state.safetensors", patience=1
    )
    torch.save({"losses": [e.loss for e in history.epochs], "weights": student.state_dict()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_an_empty_loader_is_refused():
    student, teacher = pair()
    with pytest.raises(ConfigError, match="no batch"):
        distill(student, teacher, [], epochs=1, progress=False)


def test_a_run_that_ends_worse_than_it_began_says_so():
    student, teacher = pair()
    with pytest.warns(LcnnWarning, match="take a lower lr"):
        distill(student, teacher, batches(), epochs=1, lr=50.0, max_norm=None, progress=False)
