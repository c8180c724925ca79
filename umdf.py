"""UMDF: A Unified Self-Distillation Framework for Multimodal Sentiment Analysis with Uncertain Missing Modalities.
Li et al., AAAI 2024, 38(9), pp. 10074-10082, https://doi.org/10.1609/aaai.v38i9.28871

This is UMDF as described, not a copy of its equations: they are not available to us, and no official code was
found. Every equation below is ours, built so that it honours what the paper's abstract, the caption of its
Figure 2 and published summaries state:

  (a) one single network learns robust representations by self-distillation            UMDF, UMDF.losses
  (b) knowledge is transferred in both directions inside that network                  both_ways
  (c) MCIM: coarse- and fine-grained crossmodal attention, hierarchical, between       UMDF.interact, Block
      modalities and within each
  (d) DFIM: enhances beneficial semantics frame by frame, then filters the redundant   UMDF.integrate
  (e) DFIM's operators are FFN, Hadamard product, sum, concatenation and sigmoid       UMDF.integrate
  (f) evaluated under uncertain missing and under complete modalities                  data.py, eval.py
  (g) MOSI with F1 and MAE, so a regression; IEMOCAP is a classification               UMDF.losses

One network sees each clip twice, complete and with frames and streams missing. Each pass learns from the label,
and each is pulled towards the other one's representation and answer. At test time it answers from what there is.

Notation: m, n in {text, audio, vision}; T frames, d = 40; sg = no gradient; superscripts c, m = complete, missing
pass; s = sigmoid; * = product of elements. Attention and means leave padding out.

  (1) F_m = Transformer_m(sqrt(d) Conv1d_k3(X_m) + PE(T_m, d))  in R^(T_m x d)                  Encoder
      as in CorrKD, the same authors' next paper; depth, pre-LayerNorm, dropout and kernel are open there too
  (2) Block(x; y) = u + FFN(LN(u)),  u = x + Attention(q = LN(x), k = v = LN(y)),  FFN 4d       Block
  (3) C_m = Block_m(F_m; [F_text; F_audio; F_vision])  joined in time: coarse                   UMDF.interact
  (4) Z_m = 1/3 sum_n Block_nm(C_m; C_n)  fine; n = m is the modality itself                    UMDF.interact
  (5) E_m = Z_m + s(FFN_m(Z_m)) * Z_m  a gate for each frame and channel: self-enhancement      UMDF.integrate
  (6) E = [E_text, E_audio, E_vision],  H = GAP(s(FFN(E)) * E)  in R^3d: selective filtering    UMDF.integrate
      aligned streams are filtered frame by frame; unaligned ones are joined after the GAP, then filtered
  (7) y = W2 relu(W1 H + b1) + b2,  3d -> 3d -> outputs                                         UMDF.classify
  (8) rep = 1/2 1/(3d) (|H^m - sg H^c|^2 + |H^c - sg H^m|^2)                                    both_ways
  (9) resp = 1/2 (D(sg y^c, y^m) + D(sg y^m, y^c))                                    both_ways, response_distance
      D(t, s): (t - s)^2 for regression, KL(softmax t || softmax s) for classification
  (10) total = task(y^c) + task(y^m) + rep + resp,  task: squared error or cross-entropy        UMDF.losses

Use in another code base (this file needs torch alone), as train.py trains it:

    model = UMDF({"text": 300, "audio": 74, "vision": 35}, "regression")    # unaligned: add Config(aligned=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=model.config.lr)
    for complete, missing, target, real in batches:             # for config.epochs epochs
        optimizer.zero_grad()
        model.losses(complete, missing, target, real)["total"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), model.config.clip)
        optimizer.step()
    # train.py takes the mean of the weights after five epochs in a row, those best on validation: our choice
    sentiment = model.eval()(text, audio, vision, real)         # (B, 1)

complete, missing: {"text": (B, T, 300), ...}, the same clips whole and with dropped frames zeroed; target (B,): scores;
real: {"text": torch.arange(T) < lengths[:, None], ...}, True = not padding, or None: then padding counts as frames.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STREAMS = ("text", "audio", "vision")
SETS = ("l", "a", "v", "la", "lv", "av", "lav")     # the papers' sets of available streams
TASKS = {"mosi": "regression", "mosei": "regression", "iemocap": "emotions"}
OUTPUTS = {"regression": 1, "emotions": 8}      # one score, or four yes/no decisions of two logits


@dataclass
class Config:
    """Nothing is known of UMDF's own settings. Learning rate, batch size, epochs, heads and width are those of the
    group's next paper on the same data (HRLF, NeurIPS 2024), for MOSI; the rest is our choice."""
    lr: float = 1e-3
    batch_size: int = 128
    epochs: int = 50
    heads: int = 10
    width: int = 40             # d
    layers: int = 2             # of the encoder (1), as in CorrKD here
    dropout: float = 0.1        # to the nearest 1/256, see Dropout
    clip: float = 1.0           # largest gradient norm
    weight_decay: float = 0.0
    rep: float = 1.0            # weight of (8); a loss of weight 0 is not computed
    resp: float = 1.0           # weight of (9)
    to_missing: bool = True     # (8), (9): the complete pass teaches the missing one
    to_complete: bool = True    # and the missing pass teaches the complete one
    coarse: bool = True         # (3); False: C_m = F_m
    fine: bool = True           # (4); False: Z_m = C_m
    enhancement: bool = True    # (5); False: E_m = Z_m
    filtering: bool = True      # (6); False: H = GAP(E)
    aligned: bool = True        # frame t of all three streams is the same moment: filter frame by frame


PAPER = {
    "mosi": Config(),
    "mosei": Config(lr=2e-3, batch_size=16, epochs=20, heads=8),
    "iemocap": Config(lr=4e-3, batch_size=32, epochs=30),
}
LISTED = {"mosi": {}, "mosei": {}, "iemocap": {}}               # nothing is listed, see Config
ABLATIONS = {
    "no_distillation": {"rep": 0.0, "resp": 0.0},               # both passes still learn from the label
    "complete_to_missing": {"to_complete": False},              # this direction only
    "missing_to_complete": {"to_missing": False},               # this direction only
    "no_coarse": {"coarse": False},
    "no_fine": {"fine": False},
    "no_enhancement": {"enhancement": False},
    "no_filtering": {"filtering": False},
    "no_rep": {"rep": 0.0},
    "no_resp": {"resp": 0.0},
}
FEATURES = {"text": 300, "audio": 74, "vision": 35}             # widths of the features that REPORTED is of
TABLE = {}                                                      # the paper's table is that of the seven sets
# The paper's numbers known to us, all on complete clips: data set -> ablation ("" = the full method) -> metric
# -> column -> number; F1 in per cent. Its numbers for missing modalities and its ablations are not known.
REPORTED = {
    "mosi": {"": {"F1": {"lav": 83.36}, "MAE": {"lav": 0.782}}},
    "mosei": {"": {}},
    "iemocap": {"": {"F1 happy": {"lav": 87.9}, "F1 sad": {"lav": 86.5}, "F1 angry": {"lav": 85.8},
                     "F1 neutral": {"lav": 70.5}}},
}


def learning_rate_factor(epoch: int) -> float:
    """What the learning rate is multiplied by in epoch 0, 1, ...: it is constant."""
    return 1.0


def sinusoid(length: int, width: int, device=None) -> Tensor:
    """PE in (1), (length, width): sin(t / 10000^(2i/width)) in column 2i, the cosine in column 2i + 1."""
    angle = torch.arange(length, device=device)[:, None] * torch.exp(
        torch.arange(0, width, 2, device=device) * (-math.log(10000.0) / width))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def pool(x: Tensor, real: Tensor | None) -> Tensor:
    """GAP: the mean over real frames, (B, T, d) -> (B, d); zeros for a clip without any. real (B, T) bool or None."""
    if real is None:
        return x.mean(1)
    return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


class Dropout(nn.Module):
    """Dropout of p, on a CPU to the nearest 1/256 and by random bytes, eight to each random integer: nn.Dropout, which
    draws a float for each element, makes a training step there 1.3 times as long."""

    def __init__(self, p: float):
        super().__init__()
        self.keep = round(256 * (1 - p))        # how many of the 256 values of a byte keep an element
        if not 0 < self.keep <= 256:
            raise ValueError(f"dropout must be at least 0 and below 1, not {p}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.keep == 256 or x.device.type != "cpu":
            return F.dropout(x, 1 - self.keep / 256, self.training)
        draws = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-2**63, None)
        kept = draws.view(torch.uint8)[:x.numel()].view(x.shape) < self.keep
        return x * kept.to(x.dtype).mul_(256 / self.keep)


class Block(nn.Module):
    """(2): x (B, T, d) attends to y (B, S, d). real (B, S) bool, True = a frame of y and not padding; None = all."""

    def __init__(self, config: Config):
        super().__init__()
        d, self.heads = config.width, config.heads
        self.norm_attention, self.norm_ffn = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.kv, self.out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.ffn = nn.Sequential(nn.Linear(d, 4 * d), nn.ReLU(), Dropout(config.dropout), nn.Linear(4 * d, d))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, y: Tensor, real: Tensor | None) -> Tensor:
        normed = self.norm_attention(x)
        q = self.q(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)          # (B, heads, T, d / heads)
        k, v = (self.kv(normed if y is x else self.norm_attention(y))
                .unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4))         # (B, heads, S, d / heads)
        mask = None
        if real is not None:
            # Where y has no frame at all, older torch makes NaN of a softmax over nothing: attend to zeros instead.
            mask, v = (real | ~real.any(1, keepdim=True))[:, None, None], v * real[:, None, :, None]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class Encoder(nn.Module):
    """(1) for one stream: (B, T, d_m) -> F_m (B, T, d).

    `real` (B, T) bool, True = not padding. Positions are counted from a clip's first real frame, so the real frames'
    answer does not depend on where or how far a clip is padded; what stands in padding afterwards means nothing.
    """

    def __init__(self, in_width: int, config: Config):
        super().__init__()
        self.width = config.width
        self.conv = nn.Conv1d(in_width, config.width, kernel_size=3, padding=1, bias=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        position = sinusoid(x.shape[1], self.width, x.device).to(x)                 # (T, d)
        if real is not None:
            x = x * real[..., None]                             # the convolution must not see padding
            position = position[(real.cumsum(1) - 1).clamp(min=0)]                  # (B, T, d)
        x = self.dropout(math.sqrt(self.width) * self.conv(x.transpose(1, 2)).transpose(1, 2) + position)
        for layer in self.layers:
            x = layer(x, x, real)
        return self.norm(x)


def response_distance(teacher: Tensor, student: Tensor, task: str) -> Tensor:
    """D in (9), the mean over clips and decisions. Answers (B, 1) for "regression": (t - s)^2; logits (B, 4, 2) for
    "emotions": KL(softmax t || softmax s)."""
    if task == "regression":
        return F.mse_loss(student, teacher)
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none")
    return kl.sum(-1).mean()


def both_ways(distance, complete: Tensor, missing: Tensor, to_missing: bool = True, to_complete: bool = True) -> Tensor:
    """(8), (9): 1/2 (distance(sg complete, missing) + distance(sg missing, complete)); a direction that is off is left
    out. distance(teacher, student) -> scalar; the gradient reaches the student of each direction alone."""
    total = complete.new_zeros(())
    if to_missing:
        total = total + distance(complete.detach(), missing)
    if to_complete:
        total = total + distance(missing.detach(), complete)
    return total / 2


class UMDF(nn.Module):
    """dims: feature width of text, audio and vision. task: "regression" (one score) or "emotions" (four yes/no
    decisions). A part that the config turns off is absent; all other parts start from the same weights. There is one
    stage, about the sets of streams beside its name."""

    stages = {"train": SETS}
    sees_missing, has_teacher = True, False     # the network is its own teacher
    teacher_outputs = encode = None             # no frozen teacher; streams interact

    def __init__(self, dims: dict[str, int], task: str, config: Config | None = None):
        super().__init__()
        config = config or Config()
        if task not in OUTPUTS:
            raise ValueError(f"UMDF: task must be one of {', '.join(OUTPUTS)}, not {task!r}")
        if config.width % config.heads or config.width % 2:
            raise ValueError(f"width {config.width} must be even and a multiple of heads ({config.heads})")
        self.config, self.task = config, task
        d, joint = config.width, 3 * config.width

        def ffn(width: int) -> nn.Sequential:
            return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
        self.encoders = nn.ModuleDict({m: Encoder(dims[m], config) for m in STREAMS})
        self.head = nn.Sequential(nn.Linear(joint, joint), nn.ReLU(), nn.Linear(joint, OUTPUTS[task]))
        self.coarse = nn.ModuleDict({m: Block(config) for m in STREAMS})
        self.fine = nn.ModuleDict({f"{n}_to_{m}": Block(config) for m in STREAMS for n in STREAMS})
        self.enhancement = nn.ModuleDict({m: ffn(d) for m in STREAMS})
        self.filtering = ffn(joint)
        for part in ("coarse", "fine", "enhancement", "filtering"):
            if not getattr(config, part):
                delattr(self, part)

    def begin(self, stage: str) -> None:
        """There is one stage, in which everything learns."""
        if stage not in self.stages:
            raise ValueError(f"no stage {stage!r}: this model has {', '.join(self.stages)}")

    def interact(self, f: dict[str, Tensor], real: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """MCIM, (3) and (4): m -> F_m (B, T_m, d) gives m -> Z_m (B, T_m, d)."""
        if self.config.coarse:
            joint = torch.cat([f[m] for m in STREAMS], dim=1)                       # (B, sum of T_m, d)
            joint_real = real and torch.cat([real[m] for m in STREAMS], dim=1)
            f = {m: self.coarse[m](f[m], joint, joint_real) for m in STREAMS}
        if self.config.fine:
            f = {m: sum(self.fine[f"{n}_to_{m}"](f[m], f[n], real and real[n]) for n in STREAMS) / 3 for m in STREAMS}
        return f

    def integrate(self, z: dict[str, Tensor], real: dict[str, Tensor] | None) -> Tensor:
        """DFIM, (5) and (6): m -> Z_m (B, T_m, d) gives H (B, 3d)."""
        if self.config.enhancement:
            z = {m: z[m] + self.enhancement[m](z[m]).sigmoid() * z[m] for m in STREAMS}
        if not self.config.aligned or not self.config.filtering:
            e = torch.cat([pool(z[m], real and real[m]) for m in STREAMS], dim=-1)  # (B, 3d)
            return self.filtering(e).sigmoid() * e if self.config.filtering else e
        e = torch.cat([z[m] * real[m][..., None] if real else z[m] for m in STREAMS], dim=-1)   # (B, T, 3d)
        e = self.filtering(e).sigmoid() * e
        return torch.cat([pool(part, real and real[m]) for m, part in zip(STREAMS, e.chunk(3, dim=-1))], dim=-1)

    def represent(self, streams: dict[str, Tensor], real: dict[str, Tensor] | None = None) -> Tensor:
        """H (B, 3d), (1) to (6)."""
        if lacking := [m for m in STREAMS if m not in streams]:
            raise ValueError(f"no {' and no '.join(lacking)} among the streams: a missing one is given as zeros")
        lengths = [streams[m].shape[1] for m in STREAMS]
        if self.config.aligned and len(set(lengths)) > 1:
            raise ValueError(f"streams of {lengths} frames are not aligned: give UMDF a Config(aligned=False)")
        f = {m: self.encoders[m](streams[m], real and real[m]) for m in STREAMS}
        return self.integrate(self.interact(f, real), real)

    def classify(self, h: Tensor) -> Tensor:
        """y of (7): H (B, 3d) -> sentiment (B, 1) or logits (B, 4, 2)."""
        y = self.head(h)
        return y if self.task == "regression" else y.unflatten(-1, (-1, 2))

    def forward(self, text: Tensor, audio: Tensor, vision: Tensor, real: dict[str, Tensor] | None = None) -> Tensor:
        """Sentiment (B, 1) or logits (B, 4, 2) of clips whose missing frames are zeros. Streams (B, T_m, d_m);
        real: m -> (B, T_m) bool, True = not padding; None = no padding."""
        return self.classify(self.represent({"text": text, "audio": audio, "vision": vision}, real))

    def losses(self, complete: dict[str, Tensor], missing: dict[str, Tensor], target: Tensor,
               real: dict[str, Tensor] | None = None, teacher: tuple | None = None) -> dict[str, Tensor]:
        """The loss terms, unweighted, and their weighted sum "total" (10).

        complete, missing: m -> (B, T_m, d_m), the same clips whole and with missing frames zeroed; target: sentiment
        (B,) for regression, classes (B, 4) of 0 and 1 for emotions. teacher is not used: there is none.
        """
        c = self.config
        both = {m: torch.cat((complete[m], missing[m])) for m in STREAMS if m in complete}  # (2B, T_m, d_m)
        h = self.represent(both, real and {m: torch.cat((real[m], real[m])) for m in STREAMS})
        (h_c, h_m), (y_c, y_m) = h.chunk(2), self.classify(h).chunk(2)
        truth = target.reshape(len(target), -1)                                     # (B, 1) or (B, 4)
        if truth.shape != y_c.shape[:2]:
            raise ValueError(f"target has shape {tuple(target.shape)}; these clips ask for {tuple(y_c.shape[:2])}")

        def task(y: Tensor) -> Tensor:
            if self.task == "regression":
                return F.mse_loss(y, truth)
            return F.cross_entropy(y.flatten(0, 1), truth.flatten())

        def responses(teacher: Tensor, student: Tensor) -> Tensor:
            return response_distance(teacher, student, self.task)
        terms = {"task_complete": task(y_c), "task_missing": task(y_m)}
        if c.rep:
            terms["rep"] = both_ways(F.mse_loss, h_c, h_m, c.to_missing, c.to_complete)
        if c.resp:
            terms["resp"] = both_ways(responses, y_c, y_m, c.to_missing, c.to_complete)
        weights = {"task_complete": 1.0, "task_missing": 1.0, "rep": c.rep, "resp": c.resp}
        terms["total"] = sum(weights[name] * term for name, term in terms.items())                  # (10)
        return terms


Model = UMDF
