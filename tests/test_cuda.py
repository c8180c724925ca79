"""What only a CUDA device can show, skipped where there is none: a step, resuming, evaluation on the other device."""
import pytest
import torch

import eval as evaluation
import train
from helpers import history, learnable, parameters, run, written

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a step, resuming and evaluation "
                                "on another device are not checked for any method")
METHODS = list(evaluation.METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_on_cuda_is_an_epoch_on_the_cpu(tmp_path, method, monkeypatch):
    """Without dropout, which draws other numbers there."""
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *_, **__: x)
    if method == "double_flow":
        monkeypatch.setattr(evaluation.METHODS[method].Half, "forward", lambda self, x: x)
    written(tmp_path / "data", learnable())
    means = []
    for device in ("cpu", "cuda"):
        assert run(tmp_path, "--device", device, "--no-resume", method=method, epochs="1") == 0
        means.append(history(tmp_path, f"mosi/{method}/s1")[0]["losses"]["total"])
    assert means[1] == pytest.approx(means[0], rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_on_cuda_goes_on_where_it_stopped(tmp_path, method, monkeypatch):
    written(tmp_path / "data", learnable())
    arguments = ("--device", "cuda", "--deterministic")
    assert run(tmp_path, *arguments, method=method, epochs="2") == 0
    whole = parameters(tmp_path, f"mosi/{method}/s1")
    (tmp_path / "runs").rename(tmp_path / "whole")
    save = train.save_state
    monkeypatch.setattr(train, "save_state", lambda *a: (save(*a), (_ for _ in ()).throw(KeyboardInterrupt)))
    assert run(tmp_path, *arguments, method=method, epochs="2") == 130
    monkeypatch.undo()
    assert run(tmp_path, *arguments, method=method, epochs="2") == 0
    assert all(torch.equal(whole[k].cpu(), v.cpu()) for k, v in parameters(tmp_path, f"mosi/{method}/s1").items())


@pytest.mark.parametrize("method", METHODS)
def test_a_run_of_cuda_is_evaluated_on_the_cpu(tmp_path, method):
    written(tmp_path / "data", learnable())
    assert run(tmp_path, "--device", "cuda", method=method, epochs="1") == 0
    for device in ("cpu", "cuda"):
        assert evaluation.main([str(tmp_path / "runs"), "--device", device, "--rates", "0.5"]) == 0
