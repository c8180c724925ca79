"""umdf.py against its equations written out clip by clip, and the properties that its docstring promises."""
import inspect
import math
import re
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import umdf
from umdf import STREAMS, UMDF, Config

DIMS = {"text": 12, "audio": 7, "vision": 5}
UNALIGNED = {"text": 9, "audio": 6, "vision": 8}
ALIGNED = dict.fromkeys(STREAMS, 8)


def model_of(task="regression", seed=0, **changes):
    torch.manual_seed(seed)
    return UMDF(DIMS, task, replace(Config(), **changes))


def clips(n, lengths, seed=1):
    """Streams and real masks with at least one frame a clip, the same mask in all streams where lengths agree."""
    g = torch.Generator().manual_seed(seed)
    real = {m: torch.arange(t) < torch.randint(1, t + 1, (n, 1), generator=g) for m, t in lengths.items()}
    if len(set(lengths.values())) == 1:
        real = dict.fromkeys(STREAMS, real["text"])
    return {m: torch.randn(n, t, DIMS[m], generator=g) * real[m][..., None] for m, t in lengths.items()}, real


def missing_copy(complete, seed=2):
    g = torch.Generator().manual_seed(seed)
    return {m: x * (torch.rand(x.shape[:2], generator=g) < .5)[..., None] for m, x in complete.items()}


def goal(task, n):
    return torch.linspace(-2, 2, n) if task == "regression" else torch.arange(4 * n).reshape(n, 4) % 2


# ------------------------------------------------------------------------------------- the equations, written out

def block(b, x, y):
    """(2) for one clip: x (T, d), y (S, d), every head by itself."""
    norm = lambda v, n: (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + n.eps).sqrt() * n.weight + n.bias
    d, width = x.shape[1], x.shape[1] // b.heads
    q, kv = norm(x, b.norm_attention) @ b.q.weight.T + b.q.bias, norm(y, b.norm_attention) @ b.kv.weight.T + b.kv.bias
    heads = []
    for h in range(b.heads):
        part = slice(h * width, (h + 1) * width)
        weight = (q[:, part] @ kv[:, :d][:, part].T / math.sqrt(width)).softmax(-1)
        heads.append(weight @ kv[:, d:][:, part])
    u = x + torch.cat(heads, -1) @ b.out.weight.T + b.out.bias
    return u + (norm(u, b.norm_ffn) @ b.ffn[0].weight.T + b.ffn[0].bias).relu() @ b.ffn[3].weight.T + b.ffn[3].bias


def ffn(net, x):
    return (x @ net[0].weight.T + net[0].bias).relu() @ net[2].weight.T + net[2].bias


def one_clip(model, streams):
    """(1) to (7) for one clip without padding: m -> (T_m, d_m). Returns H and y."""
    c, d, f = model.config, model.config.width, {}
    for m, x in streams.items():
        e, padded = model.encoders[m], F.pad(x, (0, 0, 1, 1))
        f[m] = math.sqrt(d) * torch.stack([sum(e.conv.weight[:, :, k] @ padded[t + k] for k in range(3)) for t in range(len(x))])
        for t in range(len(x)):
            f[m][t] += torch.tensor([(math.sin, math.cos)[i % 2](t / 10000 ** (2 * (i // 2) / d)) for i in range(d)]).to(x)
        for layer in e.layers:
            f[m] = block(layer, f[m], f[m])
        f[m] = F.layer_norm(f[m], (d,), e.norm.weight, e.norm.bias)
    if c.coarse:
        joint = torch.cat([f["text"], f["audio"], f["vision"]])
        f = {m: block(model.coarse[m], f[m], joint) for m in STREAMS}
    if c.fine:
        f = {m: (block(model.fine[f"text_to_{m}"], f[m], f["text"]) + block(model.fine[f"audio_to_{m}"], f[m], f["audio"])
                 + block(model.fine[f"vision_to_{m}"], f[m], f["vision"])) / 3 for m in STREAMS}
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
    x = {m: v.double() for m, v in x.items()}
    h, y = (model.represent(x, real), model(**x, real=real))
    for i in range(4):
        expected_h, expected_y = one_clip(model, {m: x[m][i, :real[m][i].sum()] for m in STREAMS})
        torch.testing.assert_close(h[i], expected_h, rtol=0, atol=1e-6)      # PE is computed in float32
        torch.testing.assert_close(y[i], expected_y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("task", ["regression", "emotions"])
def test_the_losses_are_equations_8_to_10_written_out(task):
    model = model_of(task, dropout=0.0).double()
    complete, real = clips(5, ALIGNED)
    complete = {m: x.double() for m, x in complete.items()}
    missing, target = missing_copy(complete), goal(task, 5)
    target = target.double() if task == "regression" else target
    (h_c, y_c), (h_m, y_m) = ([v.detach() for v in (model.represent(x, real), model(**x, real=real))] for x in (complete, missing))
    terms = model.losses(complete, missing, target, real)
    rep = sum(float(((h_c[i] - h_m[i]) ** 2).sum()) / 120 for i in range(5)) / 5       # both halves are this number
    task_loss, resp = {"c": 0.0, "m": 0.0}, 0.0
    for i in range(5):
        if task == "regression":
            task_loss["c"] += float((y_c[i, 0] - target[i]) ** 2) / 5
            task_loss["m"] += float((y_m[i, 0] - target[i]) ** 2) / 5
            resp += float((y_c[i, 0] - y_m[i, 0]) ** 2) / 5
            continue
        for g in range(4):
            p, q = y_c[i, g].softmax(0).tolist(), y_m[i, g].softmax(0).tolist()
            task_loss["c"] -= math.log(p[target[i, g]]) / 20
            task_loss["m"] -= math.log(q[target[i, g]]) / 20
            resp += sum(a * math.log(a / b) + b * math.log(b / a) for a, b in zip(p, q)) / 2 / 20
    expected = {"task_complete": task_loss["c"], "task_missing": task_loss["m"], "rep": rep, "resp": resp}
    assert set(terms) == set(expected) | {"total"}
    for name, value in {**expected, "total": sum(expected.values())}.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9), name


def test_the_teacher_comes_first_in_the_divergence():
    t, s = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    p, q = t[0, 0].softmax(0).tolist(), s[0, 0].softmax(0).tolist()
    assert umdf.response_distance(t, s, "emotions").item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q)))


def test_the_encoder_is_that_of_corrkd():
    """The same parameters in the other file's encoder, pooled: the same numbers, so that the methods are comparable."""
    import corrkd
    ours, other = model_of().encoders["audio"].eval(), corrkd.Encoder(7, corrkd.Config()).eval()
    for a, b in zip(ours.layers, other.layers):
        state = {k: v for k, v in a.state_dict().items() if not k.startswith(("q.", "kv."))}
        b.load_state_dict({**state, **{f"qkv.{k}": torch.cat((getattr(a.q, k), getattr(a.kv, k))) for k in ("weight", "bias")}})
    other.load_state_dict({**other.state_dict(), **{k: v for k, v in ours.state_dict().items() if not k.startswith("layers")}})
    x, real = (v["audio"] for v in clips(4, UNALIGNED))
    torch.testing.assert_close(umdf.pool(ours(x, real), real), other(x, real), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------- self-distillation

def gradients(model, which, task="regression"):
    """Of one distillation term alone, with respect to the inputs of the complete and of the missing pass."""
    complete, real = clips(4, ALIGNED)
    missing = missing_copy(complete)
    for x in (*complete.values(), *missing.values()):
        x.requires_grad_()
    model.losses(complete, missing, goal(task, 4), real)[which].backward()
    return [sum(float(x.grad.abs().sum()) for x in streams.values()) for streams in (complete, missing)]


@pytest.mark.parametrize("task", ["regression", "emotions"])
@pytest.mark.parametrize("which", ["rep", "resp"])
def test_each_direction_teaches_its_own_pass_and_no_other(which, task):
    both = gradients(model_of(task), which, task)
    to_missing = gradients(model_of(task, **umdf.ABLATIONS["complete_to_missing"]), which, task)
    to_complete = gradients(model_of(task, **umdf.ABLATIONS["missing_to_complete"]), which, task)
    assert both[0] > 0 and both[1] > 0
    assert to_missing[0] == 0 and to_missing[1] == pytest.approx(both[1], rel=1e-4)
    assert to_complete[1] == 0 and to_complete[0] == pytest.approx(both[0], rel=1e-4)


@pytest.mark.parametrize("task", ["regression", "emotions"])
def test_equal_inputs_without_dropout_have_nothing_to_distil(task):
    model = model_of(task, dropout=0.0)
    complete, real = clips(4, ALIGNED)
    terms = model.losses(complete, complete, goal(task, 4), real)
    terms["total"].backward()
    assert terms["rep"].item() == 0 and terms["resp"].item() == pytest.approx(0, abs=1e-9)
    assert terms["task_complete"].item() == terms["task_missing"].item()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_dropout_by_random_bytes():
    """Zero or 1 / (1 - p), in the right share at every place, neighbours and the bytes of one draw independent; off in evaluation."""
    torch.manual_seed(0)
    for p in (.1, .5):
        drop, x, p = umdf.Dropout(p), torch.ones(4001, 13), round(256 * p) / 256
        got = drop(x)
        kept = (got != 0).float()
        assert got.shape == x.shape and torch.allclose(got[got != 0], torch.tensor(1 / (1 - p)))
        assert (kept.mean(0) - (1 - p)).abs().max() < .04 and abs(kept.mean().item() - (1 - p)) < .01      # 5 and 4.5 deviations
        centred = (kept.flatten() - (1 - p)) / (p * (1 - p)) ** .5
        for lag in (*range(1, 17), 64):
            assert abs((centred[lag:] * centred[:-lag]).mean().item()) < .02, lag
        assert not torch.equal(got, drop(x)) and torch.equal(drop.eval()(x), x)
    share = (umdf.Dropout(.1)(torch.ones(2000, 2000)) != 0).float().mean().item()
    assert abs(share - 230 / 256) < .001            # 6 deviations; one byte value more or less is .004
    assert umdf.Dropout(.1)(torch.ones(3)).shape == (3,) and umdf.Dropout(.1)(torch.ones(0, 2, dtype=torch.float64)).dtype == torch.float64
    frame = torch.randn(5, 7, requires_grad=True)
    out = umdf.Dropout(.5)(frame)
    out.sum().backward()
    assert torch.equal(frame.grad, (out / frame).round().detach()) and torch.equal(umdf.Dropout(0.0)(frame), frame)
    for p in (1.0, -.1):
        with pytest.raises(ValueError, match="dropout must be"):
            umdf.Dropout(p)


def test_dropout_and_positions_are_those_of_corrkd():
    import corrkd
    for name in ("__init__", "forward"):
        assert inspect.getsource(getattr(corrkd.Dropout, name)) == inspect.getsource(getattr(umdf.Dropout, name))
    assert inspect.getsource(corrkd.sinusoid) == inspect.getsource(umdf.sinusoid)


def test_each_pass_has_its_own_dropout():
    complete, real = clips(4, ALIGNED)
    assert model_of().losses(complete, complete, goal("regression", 4), real)["rep"].item() > 1e-4


# ------------------------------------------------------------------------------------- padding, batches, hard input

@pytest.mark.parametrize("aligned", [True, False])
def test_a_stream_without_a_frame_says_nothing(aligned):
    """Whatever its own layers make of padding reaches neither the other streams nor the filter."""
    model = model_of(aligned=aligned).eval()
    x, real = clips(3, ALIGNED if aligned else UNALIGNED)
    real = {**real, "vision": torch.zeros_like(real["vision"])}
    expected = model(**x, real=real)
    for part in (model.encoders, model.coarse, model.enhancement):
        for p in part["vision"].parameters():
            p.data += torch.randn_like(p)
    torch.testing.assert_close(model(**x, real=real), expected, rtol=0, atol=1e-6)
    x["vision"] += 1.0
    assert (model(**x, real={**real, "vision": ~real["vision"]}) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("task", ["regression", "emotions"])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_everything_is_finite_with_its_gradient(task, aligned, n):
    """One clip; a stream that the data lacks; whole streams missing."""
    model = model_of(task, aligned=aligned)
    complete, real = clips(n, ALIGNED if aligned else UNALIGNED)
    if not aligned:
        real["vision"] = torch.zeros_like(real["vision"])
    missing = {m: x * (m == "audio") for m, x in complete.items()}
    terms = model.losses(complete, missing, goal(task, n), real)
    terms["total"].backward()
    assert all(torch.isfinite(t) for t in terms.values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model(**complete, real=real).shape == ((n, 1) if task == "regression" else (n, 4, 2))


# ------------------------------------------------------------------------------------- ablations, size, use

def test_each_ablation_changes_what_it_names_and_nothing_else():
    """Parts and terms that go, and only those; what stays starts from the same weights and, where the network is whole,
    gives the same terms."""
    complete, real = clips(6, ALIGNED)
    missing, target = missing_copy(complete), goal("regression", 6)
    full = model_of(dropout=0.0)
    reference = full.losses(complete, missing, target, real)
    lost_terms = {"no_distillation": {"rep", "resp"}, "no_rep": {"rep"}, "no_resp": {"resp"}}
    parts = {"no_coarse": "coarse.", "no_fine": "fine.", "no_enhancement": "enhancement.", "no_filtering": "filtering."}
    assert set(lost_terms) | set(parts) | {"complete_to_missing", "missing_to_complete"} == set(umdf.ABLATIONS)
    for name, changes in umdf.ABLATIONS.items():
        model = model_of(dropout=0.0, **changes)
        kept = {k: v for k, v in full.state_dict().items() if not k.startswith(parts.get(name, "nothing"))}
        assert set(model.state_dict()) == set(kept) and all(torch.equal(v, kept[k]) for k, v in model.state_dict().items()), name
        got = model.losses(complete, missing, target, real)
        assert set(got) == set(reference) - lost_terms.get(name, set()), name
        same = all(torch.equal(got[k], reference[k]) for k in got if k.startswith("task"))
        assert same is (name not in parts), name
        if name in ("complete_to_missing", "missing_to_complete"):
            assert all(got[k].item() == pytest.approx(reference[k].item() / 2) for k in ("rep", "resp"))


def test_parameter_counts_are_pinned():
    """By hand for d = 40: a block 2*80 + 1640 + 3280 + 1640 + 6560 + 6440 = 19720; an encoder two blocks, the convolution
    3*40*d_m and a norm of 80; three coarse and nine fine blocks; FFNs 2*(40*40+40) and 2*(120*120+120); head."""
    model = UMDF({"text": 300, "audio": 74, "vision": 35}, "regression")
    encoders = 3 * 40 * (300 + 74 + 35) + 3 * (2 * 19720 + 80)
    assert sum(p.numel() for p in model.parameters()) == encoders + 12 * 19720 + 3 * 3280 + 29040 + 14520 + 121


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="polarity"):
        UMDF(DIMS, "polarity")
    with pytest.raises(ValueError, match="multiple of heads"):
        model_of(heads=7)
    with pytest.raises(ValueError, match="not aligned"):
        model_of()(**clips(2, UNALIGNED)[0])


def test_the_files_own_map_names_functions_that_exist():
    """Every statement (a) to (g) and equation (1) to (10) of the opening names the place that honours it."""
    opening = umdf.__doc__
    assert [x for x in re.findall(r"^  \((\w+)\)", opening, re.M)] == [*"abcdefg", *map(str, range(1, 11))]
    for name in re.findall(r"\b(?:UMDF\.\w+|both_ways|response_distance|Encoder|Block)\b", opening):
        owner, _, member = name.partition(".")
        assert hasattr(umdf, owner) and (not member or hasattr(getattr(umdf, owner), member)), name
