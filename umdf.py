"""UMDF: A Unified Self-Distillation Framework for Multimodal Sentiment Analysis with Uncertain Missing
Modalities. Li et al., AAAI 2024, 38(9), pp. 10074-10082, https://doi.org/10.1609/aaai.v38i9.28871

This is UMDF as described, not a copy of its equations: they are not available to us, and no official
code was found. Every equation below is ours, built so that it honours what the paper's abstract, the
caption of its Figure 2 and published summaries state:

  (a) one single network learns robust representations by self-distillation           UMDF, UMDF.losses
  (b) knowledge is transferred in both directions inside that network                 both_ways
  (c) MCIM, the multi-grained crossmodal interaction module: coarse- and fine-       UMDF.interact, Block
      grained crossmodal attention, hierarchical, between modalities and within each
  (d) DFIM, the dynamic feature integration module: enhances beneficial semantics     UMDF.integrate
      frame by frame, then filters the redundant
  (e) DFIM's operators are FFN, Hadamard product, sum, concatenation and sigmoid      UMDF.integrate
  (f) evaluated under uncertain missing and under complete modalities                 data.py, eval.py
  (g) MOSI with F1 and MAE, so a regression; IEMOCAP is a classification              UMDF.losses

One network sees each clip twice, complete and with frames and streams missing (MRM, Modality Random
Missing). Each pass learns from the label, since the network is to answer for complete clips too, and
each is pulled towards the other one's representation and answer. At test time it answers from what
there is.

Notation: m, n in {text, audio, vision}; B clips, T frames, d = 40; sg = no gradient; superscripts c, m
= complete, missing pass; s = sigmoid; * = product of elements; PE = positional encoding; LN =
LayerNorm; FFN = Linear, ReLU, Linear; GAP = global average pooling, the mean over frames. In the code
`real`, m -> (B, T), is True where a frame belongs to the clip, missing or not, and False in padding;
attention and means leave padding out, so that no answer depends on the longest clip of a batch.

  (1) F_m = Transformer_m(sqrt(d) Conv1d_k3(X_m) + PE(T_m, d))  in R^(T_m x d)             Encoder
      two Blocks with y = x, then LN: as CorrKD's, by the same authors, so that the methods compare;
      depth, pre-LayerNorm, dropout outside attention and a kernel without bias are open there too
  (2) Block(x; y) = u + FFN(LN(u)),  u = x + Attention(q = LN(x), k = v = LN(y)),  FFN 4d  Block
  (3) C_m = Block_m(F_m; [F_text; F_audio; F_vision])  joined in time: coarse              UMDF.interact
  (4) Z_m = 1/3 sum_n Block_nm(C_m; C_n)  fine; n = m is the modality itself               UMDF.interact
  (5) E_m = Z_m + s(FFN_m(Z_m)) * Z_m  self-enhancement: a gate for each frame and         UMDF.integrate
      channel; with Z_m added it never erases
  (6) E = [E_text, E_audio, E_vision],  H = GAP(s(FFN(E)) * E)  in R^3d  filtering:        UMDF.integrate
      without E added it can erase. Aligned streams are filtered frame by frame; unaligned ones, whose
      frames do not belong together, are joined after the GAP and then filtered.
  (7) y = W2 relu(W1 H + b1) + b2,  3d -> 3d -> outputs                                    UMDF.classify
  (8) rep = 1/2 1/(3d) (|H^m - sg H^c|^2 + |H^c - sg H^m|^2)                               both_ways
  (9) resp = 1/2 (D(sg y^c, y^m) + D(sg y^m, y^c))                              both_ways, divergence
      D(u, v): (u - v)^2 for regression, KL(softmax u || softmax v) for classification
  (10) total = task(y^c) + task(y^m) + rep + resp,  task: squared error or cross-entropy   UMDF.losses
      all weights are 1, as CorrKD's; means over four decisions for emotions

Use in another code base (this file needs torch alone), as train.py trains it:

    def frames(x):      # (B, T, d) -> (B, T): True from a clip's first frame that is not zeros to its last
        n = (x != 0).any(-1)
        return n.cumsum(1) * n.flip(1).cumsum(1).flip(1) > 0

    model = UMDF({"text": 300, "audio": 74, "vision": 35}, "regression")
    c, best = model.config, -torch.inf
    optimizer = torch.optim.Adam(model.parameters(), lr=c.lr, weight_decay=c.weight_decay)
    for epoch in range(c.epochs):
        model.train()                                       # again after each validation
        for complete, target in batches:
            real = dict.fromkeys(complete, frames(torch.cat([*complete.values()], -1)))
            # Copies keep one of the seven sets of streams, and lose 0 to 90 % of each stream's frames.
            missing, sets = dict(complete), torch.randint_like(complete["text"][:, :1, 0], 1, 8).long()
            for bit, m in enumerate(("text", "audio", "vision")):
                u = torch.rand_like(complete[m][..., 0]) * real[m]      # the largest stays: no copy is empty
                keep = (u >= torch.randint_like(u[:, :1], 10) / 10) | (u == u.amax(1, keepdim=True))
                missing[m] = complete[m] * (keep & (sets >> bit & 1).bool())[..., None]
            optimizer.zero_grad()
            model.losses(complete, missing, target, real)["total"].backward()
            if c.clip:
                torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
            optimizer.step()
        score = validate(model.eval(), model.stages["train"])
        if score > best:                                    # our choice: the best epoch is kept
            best, kept = score, {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(kept)
    sentiment = model.eval()(text, audio, vision, real)     # (B, 1); real: of these clips

batches: complete, {"text": (B, T, 300), ...}, whole clips; target (B,), scores, float. validate: minus the
mean absolute error on the validation split, the mean over these sets of streams; "la" is text
and audio, with zeros for vision.
For C classes instead of a score: UMDF(dims, "polarity", classes=C), target (B,), long, 0 to
C - 1, logits (B, C). Of a sentiment y two classes are (y > 0).long(), without the clips of y = 0.

real is True from a clip's first frame to its last, missing frames between them too; at test as well it is that
of the whole clip. `frames` makes it of whole clips, padded in front (MulT, MultiBench) or behind with zeros.
Unaligned streams have a mask each, {m: frames(x) for m, x in complete.items()}, and
UMDF(..., Config(aligned=False)). A stream's by lengths:
torch.arange(T) < lengths[:, None] if padded behind, torch.arange(T) >= T - lengths[:, None] if in front.
Without real padding counts as frames: the answers change unnoticed. For a stream that you do not have say
width 1 and give zeros (B, T, 1); without vision the sets are 1 to 3: randint_like(..., 1, 4),
enumerate(("text", "audio")), and validate takes l, a and la.

Standardise first: by the mean and deviation of each feature over the training split's frames that are not all
zeros (a deviation of 0 is 1); clamp to +-5, and set frames of zeros to zero again.

No loss compares the clips of a batch: micro-batches and ranks of equal size change nothing.
In DistributedDataParallel wrap a module whose forward returns model.losses(...): with
ddp.module.losses(...) the ranks drift apart without a word.
"""
import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STREAMS = ("text", "audio", "vision")
SETS = ("l", "a", "v", "la", "lv", "av", "lav")     # the papers' sets of available streams
TASKS = {"mosi": "regression", "mosei": "regression", "iemocap": "emotions"}
DECISIONS = {"regression": 1, "polarity": 1, "emotions": 4}     # answers a clip: a score, or G decisions
Streams = dict[str, Tensor]             # m -> frames (B, T_m, d_m)
Masks = dict[str, Tensor] | None        # m -> (B, T_m), True = not padding; None = no padding


@dataclass
class Config:
    """Nothing is known of UMDF's own settings. Learning rate, batch size, epochs, heads and width are
    those of HRLF (NeurIPS 2024), the group's paper on the same data, for MOSI; the rest is our choice."""
    lr: float = 1e-3
    batch_size: int = 128
    epochs: int = 50
    heads: int = 10
    width: int = 40             # d
    layers: int = 2             # of the encoder (1), as in CorrKD here
    dropout: float = 0.1
    clip: float = 1.0           # largest gradient norm; on MOSI it acts in every step
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
FEATURES = {"text": 300, "audio": 74, "vision": 35}     # widths of the features that REPORTED is of
TABLE = {}      # the paper's table is that of the seven sets
learning_rate_factor = None     # the learning rate is constant
# The paper's numbers known to us, all on complete clips, F1 in per cent: data set -> ablation ("" = the
# full method) -> metric -> column -> number. Those for missing modalities and ablations are not known.
REPORTED = {
    "mosi": {"": {"F1": {"lav": 83.36}, "MAE": {"lav": 0.782}}},
    "mosei": {"": {}},
    "iemocap": {"": {"F1 happy": {"lav": 87.9}, "F1 sad": {"lav": 86.5}, "F1 angry": {"lav": 85.8},
                     "F1 neutral": {"lav": 70.5}}},
}


def check_names(names, what: str) -> None:
    """A ValueError unless these are the three streams. Simulated text, which Double-Flow alone uses, may
    stand beside them."""
    if not isinstance(names, dict) or set(names) - {"simulated_text"} != set(STREAMS):
        raise ValueError(f"{what} must be a dict of {', '.join(STREAMS)}: give zeros of width 1 for a "
                         "stream that you do not have")


def check_shape(name: str, x: Tensor, shape) -> None:
    """A ValueError that names both shapes, unless x has this one."""
    if x.shape != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, not {tuple(shape)}")


def sinusoid(length: int, width: int, device=None) -> Tensor:
    """PE in (1), (length, width): column 2i is sin(t / 10000^(2i/width)), column 2i + 1 the cosine."""
    time = torch.arange(length, device=device)[:, None]
    column = torch.arange(0, width, 2, device=device)
    angle = time * torch.exp(column * (-math.log(10000.0) / width))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


def masks_of(streams: Streams, real: Masks) -> Streams:
    """real as bool masks, all True where it is None."""
    if real is None:
        return {m: torch.ones_like(streams[m][..., 0]).bool() for m in STREAMS}
    check_names(real, "real")
    for m in STREAMS:
        check_shape(f"real of {m}", real[m], streams[m].shape[:2])
    return {m: real[m].bool() for m in STREAMS}


def pool(x: Tensor, real: Tensor) -> Tensor:
    """GAP: the mean over real frames, (B, T, d) -> (B, d); zeros for a clip without any. real (B, T)."""
    return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def ffn(width: int) -> nn.Sequential:
    """The FFN of (5) and (6)."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


class Block(nn.Module):
    """(2): x (B, T, d) attends to y (B, S, d). real (B, S) bool, True = a frame of y and not padding."""

    def __init__(self, config: Config):
        super().__init__()
        d, self.heads = config.width, config.heads
        self.norm_attention = nn.LayerNorm(d)
        self.norm_ffn = nn.LayerNorm(d)
        self.q = nn.Linear(d, d)
        self.kv = nn.Linear(d, 2 * d)
        self.out = nn.Linear(d, d)
        self.ffn = nn.Sequential(nn.Linear(d, 4 * d), nn.ReLU(), nn.Dropout(config.dropout),
                                 nn.Linear(4 * d, d))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, y: Tensor, real: Tensor) -> Tensor:
        x_norm = self.norm_attention(x)
        y_norm = x_norm if y is x else self.norm_attention(y)
        q = self.q(x_norm).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, d / heads)
        kv = self.kv(y_norm).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4)                                    # (B, heads, S, d / heads)
        # Where y has no frame at all, older torch makes NaN of a softmax over nothing: attend to zeros.
        mask = (real | ~real.any(1, keepdim=True))[:, None, None]
        v = v * real[:, None, :, None]
        mixture = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.dropout(self.out(mixture.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class Encoder(nn.Module):
    """(1) for one stream: (B, T, d_m) -> F_m (B, T, d).

    real (B, T) bool, True = not padding. Positions are counted from a clip's first real frame, so what
    comes of real frames is the same wherever the padding stands; what comes of padding means nothing.
    """

    def __init__(self, in_width: int, config: Config):
        super().__init__()
        self.width = config.width
        self.conv = nn.Conv1d(in_width, config.width, kernel_size=3, padding=1, bias=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        position = sinusoid(x.shape[1], self.width, x.device).to(x)         # (T, d)
        position = position[(real.cumsum(1) - 1).clamp(min=0)]              # (B, T, d)
        x = x * real[..., None]                                     # the convolution must not see padding
        f = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.dropout(math.sqrt(self.width) * f + position)
        for layer in self.layers:
            x = layer(x, x, real)
        return self.norm(x)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """D in (9) for classes: KL(softmax teacher || softmax student), the mean over all but the last dimension, C."""
    check_shape("student", student, teacher.shape)
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none")
    return kl.sum(-1).mean()


def both_ways(distance, complete: Tensor, missing: Tensor,
              to_missing: bool = True, to_complete: bool = True) -> Tensor:
    """(8), (9): 1/2 (distance(sg complete, missing) + distance(sg missing, complete)); a direction that
    is off is left out. distance(teacher, student) -> scalar, whose gradient reaches the student alone."""
    check_shape("missing", missing, complete.shape)
    total = complete.new_zeros(())
    if to_missing:
        total = total + distance(complete.detach(), missing)
    if to_complete:
        total = total + distance(missing.detach(), complete)
    return total / 2


class UMDF(nn.Module):
    """dims: feature width of text, audio and vision. task: "regression", one score (B, 1); "polarity",
    one decision, logits (B, C); or "emotions", four, logits (B, 4, C). classes: C. A part that the config
    turns off is absent. There is one stage, about the sets of streams beside its name."""

    stages = {"train": SETS}
    encode = None               # streams interact, so that none can be encoded by itself

    def __init__(self, dims: dict[str, int], task: str, config: Config | None = None, classes: int = 2):
        super().__init__()
        config = config or Config()
        check_names(dims, "dims")
        if task not in DECISIONS:
            raise ValueError(f"UMDF: task must be one of {', '.join(DECISIONS)}, not {task!r}")
        if config.width % config.heads or config.width % 2:
            raise ValueError(f"width {config.width} is not even or no multiple of heads ({config.heads})")
        if classes < 2:
            raise ValueError(f"classes must be 2 or more, not {classes}")
        self.config, self.task, self.classes = config, task, classes
        self.first_batch = True
        d, joint = config.width, 3 * config.width
        outputs = 1 if task == "regression" else DECISIONS[task] * classes
        self.encoders = nn.ModuleDict({m: Encoder(dims[m], config) for m in STREAMS})
        self.head = nn.Sequential(nn.Linear(joint, joint), nn.ReLU(), nn.Linear(joint, outputs))
        self.coarse = nn.ModuleDict({m: Block(config) for m in STREAMS})
        self.fine = nn.ModuleDict({f"{n}_to_{m}": Block(config) for m in STREAMS for n in STREAMS})
        self.enhancement = nn.ModuleDict({m: ffn(d) for m in STREAMS})
        self.filtering = ffn(joint)
        # Taken out at the end: so all other parts start from the same random weights in each ablation.
        for part in ("coarse", "fine", "enhancement", "filtering"):
            if not getattr(config, part):
                delattr(self, part)

    def begin(self, stage: str) -> None:
        """There is one stage, in which everything learns."""
        if stage not in self.stages:
            raise ValueError(f"no stage {stage!r}: this model has {', '.join(self.stages)}")

    def teacher_outputs(self, complete: Streams, real: Masks = None) -> None:
        """None: there is no frozen teacher, the network is its own."""

    def warn_of_mask(self, streams: Streams, real: Masks) -> None:
        """Warn of a mask that leaves out frames which are not zero, as one for clips padded behind does of
        clips padded in front. At the first batch alone, because a GPU is waited for."""
        if self.first_batch and any(streams[m][~real[m]].any() for m in STREAMS):
            warnings.warn("real leaves out frames that are not zero: it must be True from a clip's first "
                          "frame to its last, wherever the clip is padded")
        self.first_batch = False

    def interact(self, f: Streams, real: Streams) -> Streams:
        """MCIM, (3) and (4): F_m (B, T_m, d) to Z_m (B, T_m, d), each m. real: m -> bool (B, T_m)."""
        c = f
        if self.config.coarse:
            joint = torch.cat([f[m] for m in STREAMS], dim=1)               # (B, sum of T_m, d)
            joint_real = torch.cat([real[m] for m in STREAMS], dim=1)
            c = {m: self.coarse[m](f[m], joint, joint_real) for m in STREAMS}
        if not self.config.fine:
            return c
        z = {}
        for m in STREAMS:
            z[m] = sum(self.fine[f"{n}_to_{m}"](c[m], c[n], real[n]) for n in STREAMS) / 3
        return z

    def integrate(self, z: Streams, real: Streams) -> Tensor:
        """DFIM, (5) and (6): Z_m (B, T_m, d) of each m to H (B, 3d). real: m -> bool (B, T_m)."""
        e = z
        if self.config.enhancement:
            e = {m: z[m] + self.enhancement[m](z[m]).sigmoid() * z[m] for m in STREAMS}
        if self.config.filtering and self.config.aligned:
            # Padding is cleared: the filter joins streams, of which one may have fewer frames.
            joint = torch.cat([e[m] * real[m][..., None] for m in STREAMS], dim=-1)
            joint = self.filtering(joint).sigmoid() * joint                     # (B, T, 3d)
            e = dict(zip(STREAMS, joint.chunk(3, dim=-1)))
        h = torch.cat([pool(e[m], real[m]) for m in STREAMS], dim=-1)          # (B, 3d)
        if self.config.filtering and not self.config.aligned:
            h = self.filtering(h).sigmoid() * h
        return h

    def represent(self, streams: Streams, real: Masks = None) -> Tensor:
        """H (B, 3d), (1) to (6)."""
        check_names(streams, "streams")
        lengths = [streams[m].shape[1] for m in STREAMS]
        if self.config.aligned and len(set(lengths)) > 1:
            raise ValueError(f"streams of {lengths} frames are not aligned: use Config(aligned=False)")
        real = masks_of(streams, real)
        self.warn_of_mask(streams, real)
        f = {m: self.encoders[m](streams[m], real[m]) for m in STREAMS}
        return self.integrate(self.interact(f, real), real)

    def classify(self, h: Tensor) -> Tensor:
        """y of (7): H (B, 3d) -> score (B, 1), logits (B, C) or (B, 4, C)."""
        y = self.head(h)
        return y.unflatten(-1, (-1, self.classes)) if self.task == "emotions" else y

    def forward(self, text: Tensor, audio: Tensor, vision: Tensor, real: Masks = None) -> Tensor:
        """Score (B, 1), logits (B, C) or (B, 4, C) of clips (B, T_m, d_m), missing frames being zeros."""
        return self.classify(self.represent({"text": text, "audio": audio, "vision": vision}, real))

    def task_loss(self, y: Tensor, target: Tensor) -> Tensor:
        """Squared error or cross-entropy. y: answers of `classify`; target (B, 1) or (B, 4)."""
        if self.task == "regression":
            return F.mse_loss(y, target)
        return F.cross_entropy(y.reshape(-1, self.classes), target.flatten())

    def losses(self, complete: Streams, missing: Streams, target: Tensor, real: Masks = None,
               teacher: None = None) -> dict[str, Tensor]:
        """The loss terms, unweighted, and their weighted sum "total" (10).

        complete, missing: the same clips whole and with missing frames zeroed; target: scores (B,) for
        regression, classes (B,) for polarity, (B, 4) for emotions. There is no teacher.
        """
        c = self.config
        check_names(complete, "complete")
        check_names(missing, "missing")
        both = {m: torch.cat((complete[m], missing[m])) for m in STREAMS}   # (2B, T_m, d_m)
        real = {m: torch.cat((mask, mask)) for m, mask in masks_of(complete, real).items()}
        h = self.represent(both, real)
        h_c, h_m = h.chunk(2)
        y_c, y_m = self.classify(h).chunk(2)
        y = target.reshape(len(target), -1)                                 # (B, 1) or (B, 4)
        check_shape("target", y, (len(h_c), DECISIONS[self.task]))
        terms = {"task_complete": self.task_loss(y_c, y), "task_missing": self.task_loss(y_m, y)}
        if c.rep:
            # (8). Measured on MOSI (text and audio, three seeds), rep shrinks H more than it brings the passes
            # together: the variance of H ends at 6 % of that without rep, the distance relative to it at 87 %.
            terms["rep"] = both_ways(F.mse_loss, h_c, h_m, c.to_missing, c.to_complete)
        if c.resp:
            # (9). There resp gives 95 % of the distillation's gradient and points against the task's (mean cosine
            # -.24): the complete answer is also pulled to the one that knows less. On the README's 400 clips,
            # where distillation helps, that cosine is 0 on average, and the relative distance falls from .97 to .58.
            distance = F.mse_loss if self.task == "regression" else divergence
            terms["resp"] = both_ways(distance, y_c, y_m, c.to_missing, c.to_complete)
        weights = {"task_complete": 1.0, "task_missing": 1.0, "rep": c.rep, "resp": c.resp}
        terms["total"] = sum(weights[name] * term for name, term in terms.items())  # (10)
        return terms


Model = UMDF      # METHODS in eval.py says what the programs ask of this file
