"""The programs on a device that is not there: tensors that say they lie on cuda:0 and compute on the CPU. What CUDA would
refuse is refused here, with operation and line; what makes the program wait for the device, and copies to it, are counted."""
import collections
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

import corrkd
import data
import double_flow
import eval as evaluation
import train
import umdf
from helpers import FOLDERS, ROOT, equal, feature_folders, history, learnable, official_names, parameters, written

aten, CPU, CUDA = torch.ops.aten, torch.device("cpu"), torch.device("cuda:0")
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.equal}
counted = collections.Counter()


def line() -> str:
    frames = [f for f in traceback.extract_stack() if Path(f.filename).parent == ROOT]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}" if frames else "outside of the programs"


def refuse(what):
    raise AssertionError(f"CUDA refuses {what}, {line()}")


def wait(what):
    counted.update(["waits", f"wait: {what}, {line()}"])


class Pretend(torch.Tensor):
    """A tensor "on cuda:0" around one on the CPU; it stands below autograd."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda = property(lambda self: CUDA), property(lambda self: True)

    def __new__(cls, inner):
        self = torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(),
                                                   dtype=inner.dtype, requires_grad=inner.requires_grad)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, op = dict(kwargs or {}), func.overloadpacket
        inside = tree_flatten((args, kwargs))[0]
        plain = [t for t in inside if isinstance(t, torch.Tensor) and not isinstance(t, Pretend) and t.ndim]
        if plain and torch._C._current_graph_task_id() >= 0:       # backward: autograd makes its zeros below Python
            plain = [t for t in plain if t.any()]
        if op is aten.copy_:
            counted["copies"] += bool(plain)
        elif plain and op in (aten.index, aten.index_put_) and isinstance(args[0], Pretend):
            wait(f"{op} by an index on the CPU")
        elif plain:
            refuse(f"{op} of tensors on both devices, of shapes {[tuple(t.shape) for t in inside if isinstance(t, torch.Tensor)]}")
        if isinstance(kwargs.get("generator"), torch.Generator):
            refuse(f"{op} with a generator of the CPU")
        if op in WAITS or op in (aten.index, aten.index_put_) and any(t is not None and t.dtype is torch.bool for t in args[1]):
            wait(op)
        out = func(*map(bare, args), **bare({**kwargs, **({"device": CPU} if "device" in kwargs else {})}))
        if func._schema.name.endswith("_") and isinstance(args[0], Pretend):
            return args[0]
        return there(out)


def bare(tree):
    return tree_map(lambda t: t.inner if isinstance(t, Pretend) else t, tree)


def there(tree):
    return tree_map(lambda t: Pretend(t) if isinstance(t, torch.Tensor) and not isinstance(t, Pretend) else t, tree)


def on_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class Device(TorchFunctionMode):
    """Factories and transfers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        x = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            named = [a.device if isinstance(a, torch.Tensor) else a for a in (*args[1:], kwargs.get("device"))
                     if isinstance(a, (str, torch.device, torch.Tensor))] + [x.device]
            asked = name if name in ("cpu", "cuda") else torch.device(named[0]).type
            if asked == "cuda" and not isinstance(x, Pretend):
                if not (kwargs.get("non_blocking") and getattr(x, "pinned", False)):
                    wait("a copy from memory that is not pinned")
                counted["copies"] += 1
                return Pretend(x.detach())
            if asked == "cpu" and isinstance(x, Pretend):
                wait("a copy to the CPU")
                return x.detach().inner.clone()
            args = [CPU if isinstance(a, (str, torch.device)) else a for a in args]     # what it computes on
            kwargs = {**kwargs, "device": CPU} if kwargs.get("device") else kwargs
        elif func is torch.Tensor.pin_memory:
            x = x.clone()
            x.pinned = True
            return x
        elif isinstance(x, Pretend) and func in (torch.Tensor.numpy, torch.Tensor.__array__):
            refuse(f"{name}() of a tensor on the device")
        elif isinstance(x, Pretend) and func is torch.Tensor.tolist:
            wait("tolist")
            return x.inner.tolist()
        elif isinstance(x, Pretend) and func is torch.nn.functional.one_hot:    # makes a range of its own, below Python
            return Pretend(func(x.inner, *args[1:], **kwargs))
        elif on_cuda(kwargs.get("device")):
            if kwargs.get("generator") is not None:
                refuse(f"{name} with a generator of the CPU")
            return there(func(*args, **{**kwargs, "device": CPU}))
        return func(*args, **kwargs)


@pytest.fixture
def cuda(monkeypatch):
    """All tensors of the programs are asked of this device; what is not a tensor's is replaced here."""
    counted.clear()
    save, load, submit, move = torch.save, torch.load, ThreadPoolExecutor.submit, torch.nn.Module.to

    def moved(self, device):
        for module in self.modules() if on_cuda(device) else ():
            for name, p in module._parameters.items():
                module._parameters[name] = p if p is None else torch.nn.Parameter(there(p.detach()), p.requires_grad)
        return self if on_cuda(device) else move(self, device)

    def within(work, *args, **more):        # a mode is one thread's own
        with Device():
            return work(*args, **more)
    for owner, name, put in (
            (torch, "save", lambda content, file: save(bare(content), file)),
            (torch, "load", lambda file, map_location=None, **more: (there if on_cuda(map_location) else bare)(load(file, **more))),
            (torch.nn.Module, "to", moved), (ThreadPoolExecutor, "submit", lambda self, *work, **more: submit(self, within, *work, **more)),
            (torch.cuda, "get_rng_state", lambda device: torch.get_rng_state()),
            (torch.cuda, "set_rng_state", lambda state, device: refuse("a random state on the device") if isinstance(state, Pretend)
             else torch.set_rng_state(state)),
            (torch.cuda, "get_device_name", lambda device: "a pretended GPU"),
            (torch.nn.utils.clip_grad, "_group_tensors_by_device_and_dtype",      # written in C++, where the pretence does not reach
             lambda lists: {(lists[0][0].device, lists[0][0].dtype): (lists, None)})):
        monkeypatch.setattr(owner, name, put)
    with Device():
        yield


def command(tmp_path, method, *more, device="cuda"):
    where = () if "--features" in more else ("--data-dir", str(tmp_path / "data"))
    return train.main(["--method", method, "--dataset", "mosei" if "--features" in more else "mosi", *where, "--out", str(tmp_path / "runs"),
                       "--epochs", "2", "--lr", "0.002", "--batch-size", "8", "--seeds", "1", "--device", device, *more])


def stopped_once(monkeypatch, stage):
    """A stop from the keyboard behind the first epoch of this stage."""
    store, stop = train.save_epoch, [KeyboardInterrupt]

    def stopping(folder, state, answer):
        store(folder, state, answer)
        if stop and state["stage"] == stage:
            raise stop.pop()
    monkeypatch.setattr(train, "save_epoch", stopping)


@pytest.mark.parametrize("method", evaluation.METHODS)
def test_a_run_stops_goes_on_and_is_evaluated_on_the_device(tmp_path, monkeypatch, cuda, method):
    written(tmp_path / "data", learnable(n=20))
    epoch, steps = train.train_epoch, []

    def watched(model, optimizer, clips, config, name):
        before = counted.copy()
        losses = epoch(model, optimizer, clips, config, name)
        steps.append((-(-len(clips.index) // config.batch_size), counted - before))
        return losses
    monkeypatch.setattr(train, "train_epoch", watched)
    stopped_once(monkeypatch, stage=0)
    assert command(tmp_path, method) == 130 and command(tmp_path, method) == 0
    stages = ["teacher", "student"] if method == "corrkd" else ["train"]
    assert [h["stage"] for h in history(tmp_path, f"mosi/{method}/s1")] == [s for s in stages for _ in range(2)]
    for count, seen in steps:
        assert count == 3 and seen["copies"] == 2 * count and seen["waits"] == 1, seen      # a step: one index, one of all masks
    whole = tmp_path / "whole"
    written(whole / "data", learnable(n=20))
    assert command(whole, method) == 0
    assert equal(parameters(tmp_path, f"mosi/{method}/s1"), parameters(whole, f"mosi/{method}/s1"))
    before, folder = counted.copy(), str(tmp_path / "runs" / "mosi" / method)
    assert evaluation.main([folder, "--device", "cuda", "--batch-size", "8", "--predictions", str(tmp_path / "p.csv")]) == 0
    assert counted["copies"] - before["copies"] < 150 and counted["waits"] - before["waits"] < 160, counted
    args = evaluation.parse([folder, "--device", "cuda"])
    _, model, loaded = evaluation.open_run(tmp_path / "runs" / "mosi" / method / "s1", args, CUDA, {})
    h, kind = evaluation.joint(model, loaded["test"], evaluation.METHODS[method].TASKS["mosi"], 0.5, args)
    assert isinstance(h, np.ndarray) and len(h) == len(kind) > 0


@pytest.mark.parametrize("first, second", [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_goes_on_on_another_device(tmp_path, monkeypatch, cuda, first, second):
    written(tmp_path / "data", learnable(n=12))
    stopped_once(monkeypatch, stage=1)
    assert command(tmp_path, "corrkd", device=first) == 130 and command(tmp_path, "corrkd", device=second) == 0
    assert len(history(tmp_path)) == 4
    assert evaluation.main([str(tmp_path / "runs"), "--device", second, "--protocol", "combos"]) == 0


def test_feature_folders_and_published_weights(tmp_path, cuda, capsys):
    where, *_ = feature_folders(tmp_path / "features")
    more = ["--features", *(f"{m}={d}" for m, d in where["features"].items()), "--labels", str(where["labels"])]
    assert command(tmp_path, "double_flow", *more) == 0
    model = double_flow.DoubleFlow(FOLDERS, "regression", double_flow.Config(mia="off"))
    torch.save(official_names(model), tmp_path / "published.pth")
    assert command(tmp_path, "double_flow", *more, "--official", str(tmp_path / "published.pth")) == 0
    assert evaluation.main([str(tmp_path / "runs"), "--device", "cuda"]) == 0, capsys.readouterr().err


PLANTED = {     # file -> a use of the device, and what is left when it is forgotten
    corrkd: (", dtype=torch.bool, device=inside.device", ", dtype=torch.bool"),
    umdf: ("sinusoid(x.shape[1], self.width, x.device).to(x)", "sinusoid(x.shape[1], self.width)"),
    double_flow: (", dtype=torch.bool, device=features.device", ", dtype=torch.bool"),
    data: (".to(device, non_blocking=True)", ""),
    train: ('module.Config(**run["config"])).to(device)', 'module.Config(**run["config"]))'),
    evaluation: ("data.sent([x], stream.device)", "data.sent([x], 'cpu')"),
}


@pytest.mark.parametrize("module", PLANTED, ids=lambda m: m.__name__)
def test_a_forgotten_device_is_named(tmp_path, cuda, module):
    path, (use, left), whole = Path(module.__file__), PLANTED[module], dict(module.__dict__)
    source = path.read_text()
    assert source.count(use) == 1
    written(tmp_path / "data", learnable(n=12))
    try:
        exec(compile(source.replace(use, left), path, "exec"), module.__dict__)
        more = ["--dry-run"] if module is train else []
        with pytest.raises(AssertionError, match="CUDA refuses aten.* of tensors on both devices, .*[.]py:"):
            command(tmp_path, module.__name__ if module.__name__ in evaluation.METHODS else "corrkd", *more)
    finally:
        module.__dict__.update(whole)


def test_the_pretended_device_refuses_what_cuda_refuses(cuda):
    x, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert x.device == CUDA and (x + 1).device == CUDA and (x * torch.tensor(2.)).tolist() == [2, 2, 2]
    for wrong in (lambda: x + here, lambda: here + x, lambda: x.numpy(), lambda: np.asarray(x), lambda: x.bernoulli_(generator=torch.Generator()),
                  lambda: torch.rand(3, generator=torch.Generator(), device="cuda"), lambda: torch.cuda.set_rng_state(x, CUDA),
                  lambda: torch.cat([x, here]), lambda: here[x.long()]):
        with pytest.raises(AssertionError, match="CUDA refuses"):
            wrong()
    counted.clear()
    _ = x.sum().item(), bool(x[0] > 0), x[here.long() - 1], x.cpu(), here.to("cuda"), x[x > 0]
    assert counted["waits"] == 6 and counted["copies"] == 1
    here.pin_memory().to("cuda", non_blocking=True)
    assert counted["waits"] == 6 and counted["copies"] == 2


def test_the_benchmark_measures_whole_epochs_there(cuda, capsys, monkeypatch):
    import benchmark
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(data, "SIZES", dict.fromkeys(data.SIZES, (6, 6, 6)))
    monkeypatch.setattr(benchmark.sys, "argv", ["benchmark.py", "--device", "cuda", "--only"])
    assert benchmark.main() == 0
    said = capsys.readouterr().out
    assert "a pretended GPU" in said and said.count("s an epoch") == 12
