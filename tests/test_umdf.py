"""umdf.py against its equations written out clip by clip, and the properties that its docstring promises."""
import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import corrkd
import test_methods
import umdf
from test_methods import ALIGNED, STREAMS, UNALIGNED, clips, half_of, numbers, target_of

model_of = partial(test_methods.model_of, "umdf")
TASKS = [("regression", 2), ("polarity", 2), ("polarity", 3), ("emotions", 2)]      # task, classes


def norm(x, layer):
    variance = x.var(-1, unbiased=False, keepdim=True) + layer.eps
    return (x - x.mean(-1, keepdim=True)) / variance.sqrt() * layer.weight + layer.bias


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def ffn(net, x):
    return linear(linear(x, net[0]).relu(), net[-1])


def block(b, x, y):
    """(2) for one clip: x (T, d), y (S, d), every head by itself."""
    d, width = x.shape[1], x.shape[1] // b.heads
    q, kv = linear(norm(x, b.norm_attention), b.q), linear(norm(y, b.norm_attention), b.kv)
    heads = []
    for h in range(b.heads):
        part = slice(h * width, (h + 1) * width)
        weight = (q[:, part] @ kv[:, :d][:, part].T / math.sqrt(width)).softmax(-1)
        heads.append(weight @ kv[:, d:][:, part])
    u = x + linear(torch.cat(heads, -1), b.out)
    return u + ffn(b.ffn, norm(u, b.norm_ffn))


def encoder(e, x, d):
    """(1) for one clip."""
    rows = F.pad(x, (0, 0, 1, 1))
    f = torch.stack([sum(e.conv.weight[:, :, k] @ rows[t + k] for k in range(3)) for t in range(len(x))])
    f = math.sqrt(d) * f
    for t in range(len(x)):
        for i in range(d):
            f[t, i] += (math.sin, math.cos)[i % 2](t / 10000 ** (2 * (i // 2) / d))
    for layer in e.layers:
        f = block(layer, f, f)
    return norm(f, e.norm)


def one_clip(model, streams):
    """(1) to (7) for one clip without padding: m -> (T_m, d_m). Returns H and y."""
    c = model.config
    f = {m: encoder(model.encoders[m], x, c.width) for m, x in streams.items()}
    if c.coarse:
        joint = torch.cat([f["text"], f["audio"], f["vision"]])
        f = {m: block(model.coarse[m], f[m], joint) for m in STREAMS}
    if c.fine:
        z = {}
        for m in STREAMS:
            text, audio, vision = (block(model.fine[f"{n}_to_{m}"], f[m], f[n]) for n in STREAMS)
            z[m] = (text + audio + vision) / 3
        f = z
    if c.enhancement:
        f = {m: z + torch.sigmoid(ffn(model.enhancement[m], z)) * z for m, z in f.items()}
    if c.aligned and c.filtering:
        e = torch.cat([f[m] for m in STREAMS], -1)
        h = (torch.sigmoid(ffn(model.filtering, e)) * e).mean(0)
    else:
        e = torch.cat([f[m].mean(0) for m in STREAMS])
        h = torch.sigmoid(ffn(model.filtering, e)) * e if c.filtering else e
    return h, ffn(model.head, h)


@pytest.mark.parametrize("ablation", ["", "no_coarse", "no_fine", "no_enhancement", "no_filtering"])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_network_is_its_equations_clip_by_clip(aligned, ablation):
    model = model_of(aligned=aligned, **umdf.ABLATIONS.get(ablation, {})).double().eval()
    x, real = clips(4, ALIGNED if aligned else UNALIGNED)
    h, y = model.represent(x, real), model(**x, real=real)
    for i in range(4):
        expected_h, expected_y = one_clip(model, {m: x[m][i, :real[m][i].sum()] for m in STREAMS})
        torch.testing.assert_close(h[i], expected_h, rtol=0, atol=1e-6)      # PE is computed in float32
        torch.testing.assert_close(y[i], expected_y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task, classes", TASKS)
def test_the_losses_are_equations_8_to_10_written_out(task, classes):
    weights = {"rep": .3, "resp": .4}
    model, (complete, real) = model_of(task, classes, dropout=0.0, **weights).double(), clips()
    missing, target = half_of(complete), target_of(task, classes)
    h_c, h_m = (model.represent(x, real).detach() for x in (complete, missing))
    y_c, y_m = (model.classify(h).detach() for h in (h_c, h_m))
    # Both halves of rep are this number; so they are of resp for a regression.
    rep = float(((h_c - h_m) ** 2).sum()) / 120 / 5
    expected = {"task_complete": 0.0, "task_missing": 0.0, "rep": rep, "resp": 0.0}
    if task == "regression":
        for i in range(5):
            expected["task_complete"] += float(y_c[i, 0] - target[i]) ** 2 / 5
            expected["task_missing"] += float(y_m[i, 0] - target[i]) ** 2 / 5
            expected["resp"] += float(y_c[i, 0] - y_m[i, 0]) ** 2 / 5
    else:
        truth, n = target.flatten().tolist(), target.numel()
        p_c, p_m = (y.reshape(n, classes).softmax(-1) for y in (y_c, y_m))
        for k, (p, q) in enumerate(zip(p_c, p_m)):
            expected["task_complete"] -= math.log(p[truth[k]]) / n
            expected["task_missing"] -= math.log(q[truth[k]]) / n
            expected["resp"] += float((p * (p / q).log() + q * (q / p).log()).sum()) / 2 / n
    expected["total"] = sum(weights.get(name, 1.0) * value for name, value in expected.items())
    assert numbers(model.losses(complete, missing, target, real)) == pytest.approx(expected, rel=1e-9)


def test_the_teacher_comes_first_in_the_divergence():
    t, s = torch.tensor([[[2.0, 0.0, 1.0]]]), torch.tensor([[[0.0, 1.0, 1.0]]])
    p, q = t[0, 0].softmax(0).tolist(), s[0, 0].softmax(0).tolist()
    expected = sum(a * math.log(a / b) for a, b in zip(p, q))
    assert umdf.divergence(t, s).item() == pytest.approx(expected)


def gradients(term, task, ablation=""):
    """Of one distillation term alone, with respect to the inputs of the complete and of the missing pass."""
    model = model_of(task, dropout=0.0, **umdf.ABLATIONS.get(ablation, {})).double()
    complete, real = clips()
    missing = half_of(complete)
    for x in (*complete.values(), *missing.values()):
        x.requires_grad_()
    model.losses(complete, missing, target_of(task), real)[term].backward()
    return [sum(float(x.grad.abs().sum()) for x in streams.values()) for streams in (complete, missing)]


@pytest.mark.parametrize("task", ["regression", "emotions"])
@pytest.mark.parametrize("term", ["rep", "resp"])
def test_each_direction_teaches_its_own_pass_and_no_other(term, task):
    complete, missing = gradients(term, task)
    assert complete > 0 and missing > 0
    assert gradients(term, task, "complete_to_missing") == [0, pytest.approx(missing, rel=1e-4)]
    assert gradients(term, task, "missing_to_complete") == [pytest.approx(complete, rel=1e-4), 0]


@pytest.mark.filterwarnings("ignore:real leaves out frames")
@pytest.mark.parametrize("aligned", [True, False])
def test_a_stream_without_a_frame_says_nothing(aligned):
    """Whatever its own layers make of padding reaches neither the other streams nor the filter."""
    model = model_of(aligned=aligned).double().eval()
    x, real = clips(3, ALIGNED if aligned else UNALIGNED)
    real = {**real, "vision": torch.zeros_like(real["vision"])}
    expected = model(**x, real=real)
    for part in (model.encoders, model.coarse, model.enhancement):
        for p in part["vision"].parameters():
            p.data += torch.randn_like(p)
    torch.testing.assert_close(model(**x, real=real), expected, rtol=0, atol=1e-12)
    x["vision"] += 1.0
    assert (model(**x, real={**real, "vision": ~real["vision"]}) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("task, classes, outputs", [("regression", 2, 1), ("polarity", 3, 3), ("emotions", 2, 8)])
def test_parameter_counts_are_pinned(task, classes, outputs):
    """By hand for d = 40: a block 2*80 + 1640 + 3280 + 1640 + 6560 + 6440 = 19720; an encoder two blocks, the
    convolution 3*40*d_m, a norm of 80; 3 coarse, 9 fine blocks; FFNs 2*(40*40+40), 2*(120*120+120); head."""
    model = umdf.UMDF({"text": 300, "audio": 74, "vision": 35}, task,
                      umdf.Config(**test_methods.SETTINGS["umdf"]), classes)
    encoders = 3 * 40 * (300 + 74 + 35) + 3 * (2 * 19720 + 80)
    head = 14520 + 121 * outputs
    assert sum(p.numel() for p in model.parameters()) == encoders + 12 * 19720 + 3 * 3280 + 29040 + head


def test_what_is_listed_is_the_default():
    listed = {"mosi": (1e-3, 128, 50, 10), "mosei": (2e-3, 16, 20, 8), "iemocap": (4e-3, 32, 30, 10)}
    assert umdf.TASKS == {"mosi": "regression", "mosei": "regression", "iemocap": "emotions"}
    for name, c in umdf.PAPER.items():
        assert (c.width, c.rep, c.resp, c.clip, c.weight_decay) == (40, 1, 1, 1, 0)
        assert c.dropout == corrkd.PAPER[name].dropout      # or the methods would not compare
        assert (c.lr, c.batch_size, c.epochs, c.heads) == listed[name]


def test_missing_copies_have_all_three_streams():
    x, real = clips(3, ALIGNED)
    with pytest.raises(ValueError, match="missing must be a dict of text, audio, vision"):
        model_of().double().losses(x, {"text": x["text"]}, target_of("regression", n=3), real)


def test_unaligned_streams_ask_for_their_config():
    with pytest.raises(ValueError, match="not aligned"):
        model_of()(**clips(2, UNALIGNED)[0])
