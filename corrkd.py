"""CorrKD: Correlation-Decoupled Knowledge Distillation for Multimodal Sentiment Analysis with Incomplete
Modalities. Li et al., CVPR 2024, pp. 12458-12468, https://arxiv.org/abs/2404.16456

A teacher is trained on complete clips and frozen. A student of the same architecture then sees copies
of the clips with frames and whole streams missing (MRM, Modality Random Missing). It learns from the
labels, and from the teacher by three losses: to place each clip where the teacher places it, away from
other clips (SCD, sample-level contrastive distillation); to be as similar to each class prototype as
the teacher is (CPD, category-guided prototype distillation); and to answer in agreement with it, the
target class and the other classes apart (RCD, response-disentangled consistency distillation). At test
time the student works alone. No official code was found.

Notation: m in {text, audio, vision}; N clips, T frames, d = 40; G decisions a clip (1, or 4 emotions)
among C classes each; superscripts t, s = teacher, student; PE = positional encoding; GAP = global
average pooling, the mean over frames; sp(z) = log(1 + exp(z)). In the code `real`, m -> (N, T), is
True where a frame belongs to the clip, missing or not, and False in padding. Marked (*): our choice,
because the paper is silent or cannot be literal. Marked (~): the form as others quote it, or as the
group's next paper prints it (HRLF, NeurIPS 2024); not checked against this paper's text. The numbers are ours.

  (1) F_m = sqrt(d) Conv1d_k3(X_m) + PE(T_m, d),  E_m = Transformer(F_m)              Encoder
      (*) The paper's kernel "3x3" cannot be literal in one dimension; no bias, so that zeros stay zeros.
      Depth 2: 3 and 4 are no better on MOSI's validation split (77.5, 77.6 and 77.7 F1, five seeds).
      Pre-LayerNorm, FFN 4d, sqrt(d), dropout .1 are usual; none in attention, where it takes half of a CPU
      step. Padding is masked, so that no answer depends on the longest clip of a batch.
  (2) H = [GAP(E_text); GAP(E_audio); GAP(E_vision)]  in R^3d  (~)                    Network.represent
  (3) f = W H + b,  R = softmax(f)  (*) one linear layer                              Network.forward
  (4) SCD = mean_i |H_i^s - H_i^t|^2 + mean_{i != j} max(0, eta - |H_i^s - H_j^t|)^2  sample_contrastive
      (~) (*) Means, since all weights are 1 and sums would be a thousand times the cross-entropy. H is
      brought to unit length: else distances are near 7, and no pair lies within eta. Without that
      (--ablate scd_raw) the validation split of MOSI has 77.9 F1, with it 77.5: not told apart.
  (5) c_k = mean of H_i over class k in the batch,  M_k(i) = cos(H_i, c_k)  (~)       prototype_consistency
  (6) CPD = 1/(N K) sum_i sum_k (M_k^s(i) - M_k^t(i))^2,  K classes in the batch (~)  prototype_consistency
      (*) The square: the paper speaks of a squared distance. A class that the batch lacks is left out.
  (7) U = [R_y],  V = [R_c for c != y]  in R^(C-1)  (~)                            response_consistency
      (*) Not renormalised: with two classes V would be the constant 1.
  (8) I(a, b) = E_p(a,b)[-sp(-T(a, b))] - E_p(a)p(b)[sp(T(a, b))]  (~)                jsd_mutual_information
      (*) T is an MLP 2k-64-64-1, one for U and one for V, which the G decisions share; both learn with the
      student. The product of marginals is every pair i != j of the batch, so that nothing is drawn.
  (9) RCD = -I_1(U^t, U^s) - I_2(V^t, V^s)  (~)                                    response_consistency
  (10) total = CE(R^s, y) + SCD + CPD + RCD  (~)                                      CorrKD.losses
      (*) CE, CPD and RCD are means over the G decisions; SCD has no classes and is computed once.
(*) The student starts from random weights, as HRLF's does. The gradient norm is clipped to 1.

Use in another code base (this file needs torch alone), as train.py trains it:

    def frames(x):      # (B, T, d) -> (B, T): True from a clip's first frame that is not zeros to its last
        n = (x != 0).any(-1)
        return n.cumsum(1) * n.flip(1).cumsum(1).flip(1) > 0

    model = CorrKD({"text": 300, "audio": 74, "vision": 35}, "polarity", classes=2)
    c = model.config
    for stage in model.stages:                              # "teacher", then "student"
        model.begin(stage)
        learning, best = [p for p in model.parameters() if p.requires_grad], -torch.inf
        optimizer = torch.optim.Adam(learning, lr=c.lr, weight_decay=c.weight_decay)
        for epoch in range(c.epochs):
            model.train()                                   # again after each validation
            for complete, target in batches:
                real = dict.fromkeys(complete, frames(torch.cat([*complete.values()], -1)))
                # (*) Copies keep one of the seven sets of streams, and lose 0 to 90 % of each stream's frames.
                missing, sets = dict(complete), torch.randint_like(complete["text"][:, :1, 0], 1, 8).long()
                for bit, m in enumerate(("text", "audio", "vision")):
                    u = torch.rand_like(complete[m][..., 0]) * real[m]      # the largest stays: no copy is empty
                    keep = (u >= torch.randint_like(u[:, :1], 10) / 10) | (u == u.amax(1, keepdim=True))
                    missing[m] = complete[m] * (keep & (sets >> bit & 1).bool())[..., None]
                optimizer.zero_grad()
                model.losses(complete, missing, target, real)["total"].backward()
                if c.clip:
                    torch.nn.utils.clip_grad_norm_(learning, c.clip)
                optimizer.step()
            score = validate(model.eval(), model.stages[stage])
            if score > best:                                # (*) the best epoch is kept
                best, kept = score, {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(kept)
    logits = model.eval()(text, audio, vision, real)        # (B, C); real: of these clips

batches: complete, {"text": (B, T, 300), ...}, whole clips; target (B,), long, classes 0 to C - 1. Of a
sentiment y they are (y > 0).long(), without the clips of y = 0. validate: F1 on the validation split, the
mean over these sets of streams; "la" is text and audio, with zeros for vision.

real is True from a clip's first frame to its last, missing frames between them too; at test as well it is that
of the whole clip. `frames` makes it of whole clips, padded in front (MulT, MultiBench) or behind with zeros.
Unaligned streams have a mask each, {m: frames(x) for m, x in complete.items()}. A stream's by lengths:
torch.arange(T) < lengths[:, None] if padded behind, torch.arange(T) >= T - lengths[:, None] if in front.
Without real padding counts as frames: the answers change unnoticed. For a stream that you do not have say
width 1 and give zeros (B, T, 1); without vision the sets are 1 to 3: randint_like(..., 1, 4),
enumerate(("text", "audio")), and validate takes l, a and la, the teacher's la.

Standardise first: by the mean and deviation of each feature over the training split's frames that are not all
zeros (a deviation of 0 is 1); clamp to +-5, and set frames of zeros to zero again.

SCD, CPD and RCD compare the clips of a batch: micro-batches and ranks change them. RCD's memory and time grow
by the square of the batch: 1.5 GB and 14 s a step on a CPU core at 1,024 clips.
In DistributedDataParallel wrap, after each `begin`, a module whose forward returns model.losses(...): with
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
TASKS = {"mosi": "polarity", "mosei": "polarity", "iemocap": "emotions"}
DECISIONS = {"polarity": 1, "emotions": 4}          # G
Streams = dict[str, Tensor]             # m -> frames (B, T_m, d_m)
Masks = dict[str, Tensor] | None        # m -> (B, T_m), True = not padding; None = no padding


@dataclass
class Config:
    """Defaults: the paper's for MOSI as quoted by others (~). All losses have weight 1 (~)."""
    lr: float = 4e-3
    batch_size: int = 64
    epochs: int = 50        # of each stage
    heads: int = 10
    margin: float = 1.2     # eta in (4)
    width: int = 40         # d in (1)
    layers: int = 2         # (*)
    dropout: float = 0.1    # (*)
    clip: float = 1.0       # (*) largest gradient norm
    weight_decay: float = 0.0
    scd: float = 1.0        # a loss of weight 0 is not computed
    cpd: float = 1.0
    rcd: float = 1.0
    kl: float = 0.0         # KL(R^t || R^s), the ablation in the place of RCD
    scd_raw: bool = False   # (4) on H itself instead of H / |H|
    student: bool = True    # False: the teacher alone
    aligned: bool = True    # whether streams are aligned; makes no difference to this method


PAPER = {
    "mosi": Config(),
    "mosei": Config(lr=2e-3, batch_size=32, epochs=20, heads=8, margin=1.0),
    "iemocap": Config(epochs=30, margin=1.4),
}
ABLATIONS = {
    "no_scd": {"scd": 0.0},
    "no_cpd": {"cpd": 0.0},
    "no_rcd": {"rcd": 0.0},
    "kl": {"rcd": 0.0, "kl": 1.0},                              # plain KL in the place of RCD
    "no_distillation": {"scd": 0.0, "cpd": 0.0, "rcd": 0.0},    # the backbone with modality dropout
    "teacher": {"student": False},                              # the backbone trained on complete clips
    "scd_raw": {"scd_raw": True},                               # the literal reading of (4)
    "layers_3": {"layers": 3},
    "layers_4": {"layers": 4},
}
FEATURES = {"text": 300, "audio": 74, "vision": 35}     # widths of the features that REPORTED is of
TABLE = {}      # the paper's table is that of the seven sets
learning_rate_factor = None     # the learning rate is constant


def _row(*numbers: float) -> dict[str, float]:
    return dict(zip((*SETS[:6], "avg", "lav"), numbers))


# The paper's F1 in per cent, five seeds, as HRLF reprints them, those of ablations as reviews do:
# data set -> ablation ("" = the full method) -> metric -> column -> number.
REPORTED = {
    "mosi": {
        "": {"F1": _row(81.20, 66.52, 60.72, 83.56, 82.41, 73.74, 74.69, 83.94)},
        "no_scd": {"F1": {"avg": 72.46}},
        "no_cpd": {"F1": {"avg": 71.81}},
        "kl": {"F1": {"avg": 73.27}},
    },
    "mosei": {"": {"F1": _row(80.76, 66.09, 62.30, 81.74, 81.28, 71.92, 74.02, 82.16)}},
    # Always "no" has an F1 of 79.0 (happy), 70.3 (sad), 65.5 (angry) and 43.9 (neutral) on the test
    # split. Below it lie happy {a} 69.6, happy {v} 68.0, happy {a,v} 70.0, happy Avg. 76.1, sad {v} 67.6.
    "iemocap": {"": {
        "F1 happy": _row(82.6, 69.6, 68.0, 84.1, 82.0, 70.0, 76.1, 87.5),
        "F1 sad": _row(82.7, 71.3, 67.6, 83.4, 82.2, 72.5, 76.6, 85.9),
        "F1 angry": _row(82.2, 67.0, 65.8, 83.9, 82.8, 67.3, 74.8, 86.1),
        "F1 neutral": _row(63.1, 54.2, 52.3, 68.5, 64.3, 57.2, 59.9, 71.5),
    }},
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


def full_precision(x: Tensor) -> Tensor:
    """float32 at least: half precision has no cdist and would lose small distances."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sinusoid(length: int, width: int, device=None) -> Tensor:
    """PE in (1), (length, width): column 2i is sin(t / 10000^(2i/width)), column 2i + 1 the cosine."""
    time = torch.arange(length, device=device)[:, None]
    column = torch.arange(0, width, 2, device=device)
    angle = time * torch.exp(column * (-math.log(10000.0) / width))
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)


class Layer(nn.Module):
    """A pre-LayerNorm Transformer layer. x (B, T, d); mask (B, 1, 1, T), True = may be attended to."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.norm_ffn = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Dropout(dropout),
                                 nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # each (B, heads, T, d / heads)
        mixture = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.dropout(self.out(mixture.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class Encoder(nn.Module):
    """(1) and the GAP of (2) for one stream: (B, T, d_m) -> (B, d).

    real (B, T), True = not padding; None = no padding. The mean and the attention leave padding out, and
    positions are counted from a clip's first real frame, so the result does not depend on where or how
    far a clip is padded. A clip without a real frame gives zeros.
    """

    def __init__(self, in_width: int, config: Config):
        super().__init__()
        self.width = config.width
        self.conv = nn.Conv1d(in_width, config.width, kernel_size=3, padding=1, bias=False)
        self.layers = nn.ModuleList(Layer(config.width, config.heads, config.dropout)
                                    for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        position = sinusoid(x.shape[1], self.width, x.device).to(x)     # (T, d)
        real = torch.ones_like(x[..., 0]).bool() if real is None else real.bool()
        check_shape("real", real, x.shape[:2])
        position = position[(real.cumsum(1) - 1).clamp(min=0)]          # (B, T, d)
        x = x * real[..., None]                                 # the convolution must not see padding
        # A clip without frames attends to its padding: older torch makes NaN of a softmax over nothing.
        mask = (real | ~real.any(1, keepdim=True))[:, None, None]
        f = self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.dropout(math.sqrt(self.width) * f + position)          # F_m (B, T, d)
        for layer in self.layers:
            x = layer(x, mask)
        x = self.norm(x)                                                # E_m (B, T, d)
        return (x * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


class Network(nn.Module):
    """The architecture that teacher and student share: (1) to (3)."""

    def __init__(self, dims: dict[str, int], outputs: int, config: Config):
        super().__init__()
        self.encoders = nn.ModuleDict({m: Encoder(dims[m], config) for m in STREAMS})
        self.classifier = nn.Linear(3 * config.width, outputs)

    def represent(self, streams: Streams, real: Masks) -> Tensor:
        """H (B, 3d) of (2)."""
        check_names(streams, "streams")
        if real is not None:
            check_names(real, "real")
        return torch.cat([self.encoders[m](streams[m], real and real[m]) for m in STREAMS], dim=-1)

    def forward(self, streams: Streams, real: Masks) -> tuple[Tensor, Tensor]:
        """H (B, 3d) and the logits f (B, outputs) of (3)."""
        h = self.represent(streams, real)
        return h, self.classifier(h)


def unit(h: Tensor) -> Tensor:
    """The rows of h (N, D) at unit length. A row of zeros stays zeros and gets a plain gradient, which
    F.normalize would multiply by 10^12."""
    length = h.norm(dim=-1, keepdim=True)
    return h / length.masked_fill(length < 1e-6, 1.0)


def sample_contrastive(student: Tensor, teacher: Tensor, margin: float,
                       normalize: bool = True) -> Tensor:
    """SCD, (4): mean_i |s_i - t_i|^2 + mean over pairs i != j of max(0, margin - |s_i - t_j|)^2.

    student, teacher: H (N, D), row i of both from the same clip; they are brought to unit length first,
    unless normalize is False. margin: 1.2 for MOSI, see PAPER. The teacher gets no gradient. With N = 1
    there is no negative pair. The gradient is finite at distance 0.
    """
    n = len(student)
    check_shape("student", student, student.reshape(n, -1).shape)
    check_shape("teacher", teacher, student.shape)
    student, teacher = full_precision(student), full_precision(teacher.detach())
    if normalize:
        student, teacher = unit(student), unit(teacher)
    positive = (student - teacher).square().sum(-1).mean()
    # Not through the matrix product: it loses the small distances. cdist's gradient at distance 0 is 0.
    distance = torch.cdist(student, teacher, compute_mode="donot_use_mm_for_euclid_dist")
    negative = F.relu(margin - distance).square().fill_diagonal_(0)
    return positive + negative.sum() / max(n * (n - 1), 1)


def prototype_consistency(student: Tensor, teacher: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """CPD, (5) and (6): mean over clips i and classes k of (cos(s_i, c_k^s) - cos(t_i, c_k^t))^2.

    student, teacher: H (N, D), the teacher's of any width; labels (N,) long in [0, num_classes). The
    teacher gets no gradient. c_k is each network's mean over the clips of class k in this batch; a class
    that the batch lacks is left out.
    """
    n = len(student)
    check_shape("student", student, student.reshape(n, -1).shape)
    check_shape("teacher", teacher, (n, teacher.shape[-1]))
    check_shape("labels", labels, (n,))
    student, teacher = full_precision(student), full_precision(teacher.detach())
    member = F.one_hot(labels, num_classes).to(student)                 # (N, C)
    count = member.sum(0)

    def similarity(h: Tensor) -> Tensor:                                # M (N, C)
        prototypes = member.T @ h / count.clamp(min=1)[:, None]
        return unit(h) @ unit(prototypes).T

    # An absent class has the prototype 0, hence similarity 0 in both networks: it is only not counted.
    with torch.autocast(student.device.type, enabled=False):            # which would multiply in half precision
        difference = similarity(student) - similarity(teacher)
    return difference.square().sum() / (n * (count > 0).sum())


def jsd_mutual_information(critic: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """(8): mean_i -sp(-T(a_i, b_i)) - mean over pairs i != j of sp(T(a_i, b_j)), at most 0.

    The Jensen-Shannon estimate of mutual information. a, b (N, k), row i of both from the same clip;
    critic maps (..., 2k) to (..., 1). One clip has no pair to compare with: 0, which gives the critic a
    gradient of zeros, so that DistributedDataParallel finds no parameter unused.
    """
    n = len(a)
    check_shape("b", b, a.shape)
    if n == 1:
        return 0 * critic(torch.cat((a, b), dim=-1)).sum()
    pairs = torch.cat((a[:, None].expand(n, n, -1), b[None].expand(n, n, -1)), dim=-1)
    score = full_precision(critic(pairs)[..., 0])                       # T(a_i, b_j) (N, N)
    apart = F.softplus(score).fill_diagonal_(0)
    return -F.softplus(-score.diagonal()).mean() - apart.sum() / (n * (n - 1))


def critic_of(width: int) -> nn.Sequential:
    """T of (8) for two parts of this width."""
    return nn.Sequential(nn.Linear(2 * width, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                         nn.Linear(64, 1))


def response_consistency(critics, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """RCD, (7) and (9): -I_1(U^t, U^s) - I_2(V^t, V^s), at least 0.

    critics: (critic_of(1), critic_of(C - 1)), for U and for V; their parameters learn with the student.
    student, teacher: R (N, C), probabilities, the softmax of logits; logits themselves are not noticed.
    labels (N,) long in [0, C). The teacher gets no gradient.
    """
    check_shape("teacher", teacher, student.shape)
    check_shape("labels", labels, student.shape[:1])
    y = labels[:, None]                                                 # (N, 1)
    others = torch.arange(student.shape[1] - 1, device=labels.device).expand(len(y), -1)
    others = others + (others >= y)                                     # the classes but y (N, C - 1)
    teacher = teacher.detach()
    u = jsd_mutual_information(critics[0], teacher.gather(1, y), student.gather(1, y))
    v = jsd_mutual_information(critics[1], teacher.gather(1, others), student.gather(1, others))
    return -u - v


def loaded(teacher: nn.Module, keys) -> None:
    """Called by PyTorch after it loaded weights; keys.missing_keys: which ones were not there."""
    if not keys.missing_keys:
        teacher.untrained = False


class CorrKD(nn.Module):
    """Teacher, student and the two critics of (8).

    dims: feature width of text, audio and vision. task: "polarity", one decision, logits (B, C); or
    "emotions", four, logits (B, 4, C). classes: C. Train the stages in the order of `stages`, each after
    `begin(stage)`; beside a stage's name stand the sets of streams that its epoch is chosen on.
    """

    def __init__(self, dims: dict[str, int], task: str, config: Config | None = None, classes: int = 2):
        super().__init__()
        config = config or Config()
        check_names(dims, "dims")
        if task not in DECISIONS:
            raise ValueError(f"CorrKD's task must be one of {', '.join(DECISIONS)}, not {task!r}")
        if config.width % config.heads or config.width % 2:
            raise ValueError(f"width {config.width} is not even or no multiple of heads ({config.heads})")
        if classes < 2:
            raise ValueError(f"classes must be 2 or more, not {classes}")
        self.config, self.task, self.classes = config, task, classes
        outputs = DECISIONS[task] * classes
        self.teacher = Network(dims, outputs, config)
        self.student = Network(dims, outputs, config)
        self.critics = nn.ModuleList((critic_of(1), critic_of(classes - 1)))    # of U and of V
        if not config.student:
            self.stages = {"teacher": SETS}         # (*) as the student, which it is compared with
        elif config.scd or config.cpd or config.rcd or config.kl:
            self.stages = {"teacher": ("lav",), "student": SETS}
        else:
            self.stages = {"student": SETS}
        self.stage, self.first_batch = None, True
        # Kept with the teacher, so that one that another model trained brings it along.
        self.teacher.untrained = "teacher" in self.stages
        self.teacher.register_load_state_dict_post_hook(loaded)

    def begin(self, stage: str) -> None:
        """Let the parameters of this stage learn and hold all others: the student stage freezes the
        teacher, and warns, once, of one that was neither trained nor loaded. A teacher that another model
        trained may be given to this one before: model.teacher = other.teacher."""
        if stage not in self.stages:
            raise ValueError(f"no stage {stage!r}: this model has {', '.join(self.stages)}")
        if stage == "student" and getattr(self.teacher, "untrained", False):
            warnings.warn("CorrKD's teacher was neither trained nor loaded, so the student learns from "
                          "random weights: train the stage 'teacher' first", stacklevel=2)
            self.teacher.untrained = False
        self.stage = stage
        self.teacher.requires_grad_(stage == "teacher")
        self.student.requires_grad_(stage == "student")
        self.critics.requires_grad_(stage == "student" and self.config.rcd != 0)
        self.train(self.training)

    def train(self, mode: bool = True) -> "CorrKD":
        super().train(mode)
        if self.stage == "student":
            self.teacher.eval()     # its answers must not move, dropout included
        return self

    def warn_of_mask(self, streams: Streams, real: Masks) -> None:
        """Warn of a mask that leaves out frames which are not zero, as one for clips padded behind does of
        clips padded in front. At the first batch alone, because a GPU is waited for."""
        if real is not None and self.first_batch:
            if any(streams[m][~real[m].bool()].any() for m in STREAMS):
                warnings.warn("real leaves out frames that are not zero: it must be True from a clip's first "
                              "frame to its last, wherever the clip is padded")
        self.first_batch = False

    @property
    def network(self) -> Network:
        """The network that this stage trains, and that answers; before any stage: the last one's."""
        stage = self.stage or [*self.stages][-1]
        return self.teacher if stage == "teacher" else self.student

    def forward(self, text: Tensor, audio: Tensor, vision: Tensor, real: Masks = None) -> Tensor:
        """Logits (B, C) or (B, 4, C) of clips (B, T_m, d_m) whose missing frames are zeros."""
        return self.classify(self.represent({"text": text, "audio": audio, "vision": vision}, real))

    def represent(self, streams: Streams, real: Masks = None) -> Tensor:
        """H (B, 3d) of (2)."""
        h = self.network.represent(streams, real)
        self.warn_of_mask(streams, real)
        return h

    def encode(self, name: str, stream: Tensor, real: Tensor | None = None) -> Tensor:
        """One stream's share of H, (B, d): H has them side by side in the order of STREAMS."""
        return self.network.encoders[name](stream, real)

    def classify(self, h: Tensor) -> Tensor:
        """H (B, 3d) -> logits (B, C) or (B, 4, C)."""
        logits = self.network.classifier(h)
        return logits if self.task == "polarity" else logits.unflatten(-1, (-1, self.classes))

    @torch.no_grad()
    def teacher_outputs(self, complete: Streams, real: Masks = None) -> tuple[Tensor, Tensor] | None:
        """H^t (B, 3d) and f^t (B, G C) of complete clips; None in a stage without a teacher. They do
        not change during a stage: compute them once and give their rows to `losses`."""
        if self.stage == "teacher" or "teacher" not in self.stages:
            return None
        return self.teacher(complete, real)

    def losses(self, complete: Streams, missing: Streams, target: Tensor, real: Masks = None,
               teacher: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """The stage's loss terms, unweighted, and their weighted sum "total" (10).

        complete, missing: the same clips whole and with missing frames zeroed; the teacher stage looks at
        complete alone. target: classes (B,) for polarity, (B, 4) for emotions. teacher: these clips' rows
        of `teacher_outputs`, or None to compute them here.
        """
        if self.stage is None:
            raise ValueError(f"losses of which stage? Call begin first: {', then '.join(self.stages)}")
        if self.stage == "teacher":
            self.teacher.untrained = False
        c, streams = self.config, complete if self.stage == "teacher" else missing
        h, f = self.network(streams, real)
        self.warn_of_mask(streams, real)
        f = f.unflatten(-1, (-1, self.classes))                         # (B, G, C)
        y = target.reshape(len(target), -1)                             # (B, G)
        check_shape("target", y, f.shape[:2])
        terms = {"task": F.cross_entropy(f.flatten(0, 1), y.flatten())}
        teacher = teacher or self.teacher_outputs(complete, real)
        if teacher is None:
            return {**terms, "total": terms["task"]}
        h_t, f_t = (output.detach() for output in teacher)
        f_t = f_t.unflatten(-1, (-1, self.classes))
        check_shape("the teacher's answer", f_t, f.shape)
        if c.scd:
            terms["scd"] = sample_contrastive(h, h_t, c.margin, not c.scd_raw)
        if c.cpd:
            each = [prototype_consistency(h, h_t, labels, self.classes) for labels in y.T]
            terms["cpd"] = torch.stack(each).mean()
        if c.rcd:
            decisions = zip(f.softmax(-1).unbind(1), f_t.softmax(-1).unbind(1), y.unbind(1))
            each = [response_consistency(self.critics, *decision) for decision in decisions]
            terms["rcd"] = torch.stack(each).mean()
        if c.kl:
            kl = F.kl_div(f.log_softmax(-1), f_t.log_softmax(-1), log_target=True, reduction="none")
            terms["kl"] = kl.sum(-1).mean()
        weights = {"task": 1.0, "scd": c.scd, "cpd": c.cpd, "rcd": c.rcd, "kl": c.kl}
        terms["total"] = sum(weights[name] * term for name, term in terms.items())  # (10)
        return terms


Model = CorrKD      # METHODS in eval.py says what the programs ask of this file
