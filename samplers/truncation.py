"""The truncation rules: each returns the lowest logit it keeps.

Every token equal to that logit is kept, the most probable one always. Formulas are in logits: ``log p_i = z_i - row.logz``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from decal.samplers.row import Band, Row
from decal.samplers.rule import Choice, Param, rule


@rule(paper="arXiv:1805.04833", scale=True)
def top_k(row: Row, k: Tensor = Param(50, low=1, off=0, integer=True, sweep=(2, 5, 10, 20, 50, 100))) -> Tensor:
    """Keep the ``k`` most probable tokens.

    Kept: z_i >= the k-th largest logit. Hierarchical Neural Story Generation, Fan et al. 2018.

    Elsewhere: everywhere, as `top_k`.

    Differs: tokens equal to the k-th are kept too, as in transformers and vLLM; llama.cpp, SGLang and mlx-lm keep exactly k,
    which of equals depends on the sort.
    """
    return row.upper(count=k)


@rule(paper="arXiv:1904.09751")
def top_p(row: Row, p: Tensor = Param(0.9, low=0, high=1, off=1.0, sweep=(0.1, 0.3, 0.5, 0.7, 0.9, 0.95))) -> Tensor:
    """Keep the smallest set of most probable tokens whose mass reaches ``p``.

    Kept: i with sum_{j: p_j > p_i} p_j < p. The Curious Case of Neural Text Degeneration, Holtzman et al. 2020.

    Elsewhere: everywhere, as `top_p`.

    Differs: tokens equal to the last one kept are kept too; transformers and llama.cpp split equals by the order of a sort. The
    library llm-samplers drops the token that crosses p.
    """
    return row.upper(mass=p)


@rule(paper="arXiv:2407.01082", moved=lambda t, p: {"p": p**t})
def min_p(row: Row, p: Tensor = Param(0.1, low=0, high=1, off=0.0, sweep=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5))) -> Tensor:
    """Keep tokens at least ``p`` times as probable as the most probable one.

    Kept: p_i >= p max_j p_j. Turning Up the Heat, Nguyen et al. 2024. After ``temperature(t)`` it keeps what
    ``min_p(p ** t)`` keeps before.

    Elsewhere: everywhere, as `min_p`, but for TGI.
    """
    return row.max + torch.log(p)


@rule(paper="arXiv:2411.07641", scale=True)
def top_n_sigma(row: Row, n: Tensor = Param(1.0, low=0, off=math.inf, sweep=(0.3, 0.5, 0.7, 1.0, 1.5, 2.0))) -> Tensor:
    """Keep logits within ``n`` standard deviations of the largest.

    Kept: z_i >= max_j z_j - n sd(z), sd the population standard deviation over the logits still alive. The same set before
    and after a temperature. Top-nsigma: Not All Logits Are You Need, Tang et al. 2024.

    Elsewhere: llama.cpp and KoboldCpp `top_n_sigma`; text-generation-webui and Aphrodite in part.

    Differs: text-generation-webui counts dropped tokens as logits of 0 and takes the sample standard deviation; in Aphrodite
    one dropped token makes the threshold NaN.
    """
    return row.max - n * row.std


@rule(paper="arXiv:2210.15191")
def epsilon(row: Row, eps: Tensor = Param(9e-4, low=0, high=1, off=0.0, sweep=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1))) -> Tensor:
    """Keep tokens of probability at least ``eps``.

    Kept: p_i >= eps. Truncation Sampling as Language Model Desmoothing, Hewitt et al. 2022.

    Elsewhere: transformers `epsilon_cutoff`, text-generation-webui and Aphrodite (there in units of 1e-4).
    """
    return row.logz + torch.log(eps)


@rule(paper="arXiv:2210.15191", side="before")
def eta(row: Row, eps: Tensor = Param(2e-3, low=0, high=1, off=0.0, sweep=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1))) -> Tensor:
    """Keep tokens of probability at least ``eps``, or less where the entropy is high.

    Kept: p_i >= min(eps, sqrt(eps) exp(-H)). Truncation Sampling as Language Model Desmoothing, Hewitt et al. 2022.

    Elsewhere: transformers `eta_cutoff`, text-generation-webui and Aphrodite (there in units of 1e-4).
    """
    return row.logz + torch.log(torch.minimum(eps, eps.sqrt() * torch.exp(-row.entropy)))


@rule(paper="github.com/BlinkDL/RWKV-LM")
def top_a(row: Row, a: Tensor = Param(0.2, low=0, high=1, off=0.0, sweep=(0.02, 0.05, 0.1, 0.2, 0.5, 1.0))) -> Tensor:
    """Keep tokens at least ``a`` times as probable as the square of the largest probability.

    Kept: p_i >= a (max_j p_j)^2. Bo Peng's rule.

    Elsewhere: text-generation-webui, ExLlamaV2, KoboldCpp and Aphrodite `top_a`.
    """
    return 2 * row.max - row.logz + torch.log(a)


@rule(paper="arXiv:2202.00666")
def typical(row: Row, p: Tensor = Param(0.9, low=0, high=1, off=1.0, sweep=(0.1, 0.3, 0.5, 0.7, 0.9, 0.95))) -> Band:
    """Keep the tokens whose surprise is nearest the entropy, until their mass reaches ``p``.

    Kept: the smallest set of smallest ``|-log p_i - H|`` with mass at least p. It is a band of the ranking and may leave out
    the most probable token: the paper means it to. Locally Typical Sampling, Meister et al. 2022.

    Elsewhere: transformers and llama.cpp `typical_p`, ExLlamaV2, text-generation-webui, KoboldCpp, TGI, Aphrodite.

    Differs: tokens as far from the entropy as the last one needed are kept too, as in transformers; llama.cpp splits them by
    its sort, wants a mass above p, and computes a NaN entropy where an earlier sampler left a logit of -inf in the list.
    ExLlamaV2 leaves out the token that crosses p.
    """
    return row.nearest(row.logz - row.entropy, mass=p)


@rule(paper="arXiv:2509.23234", side="after")
def p_less(row: Row, k: Tensor = Param(1.0, low=0, high=1, off=0.0, sweep=(0.05, 0.1, 0.2, 0.5, 0.8, 1.0))) -> Tensor:
    """Keep tokens at least ``k`` times as probable as two draws are to agree.

    Kept: p_i >= k sum_j p_j^2. The paper's rule has no parameter and is k = 1. p-less Sampling, 2025.
    """
    return row.logz + torch.log(k * row.collision)


@rule(paper="arXiv:2509.23234", side="after")
def p_less_norm(row: Row, k: Tensor = Param(1.0, low=0, high=1, off=0.0, sweep=(0.05, 0.1, 0.2, 0.5, 0.8, 1.0))) -> Tensor:
    """Keep tokens at least ``k`` times as probable as two draws are to agree, less what chance agreement of others adds.

    Kept: p_i >= k (n sum_j p_j^2 - 1) / (n - 1) over n tokens. The paper's rule has no parameter and is k = 1. p-less Sampling,
    2025.

    Differs: n is the number of tokens still alive, in the authors' code the size of the vocabulary, which is the same unless an
    earlier step cut. At temperature 1 it keeps nearly what ``p_less`` keeps on real rows, on hotter ones
    more.
    """
    n = row.count
    excess = (n * row.collision - 1).clamp(min=0) / (n - 1).clamp(min=1)
    return row.logz + torch.log(k * excess)


@rule(paper="trentbrick.github.io/Tail-Free-Sampling")
def tail_free(row: Row, z: Tensor = Param(0.95, low=0, high=1, off=1.0, sweep=(0.5, 0.7, 0.8, 0.9, 0.95, 0.98))) -> Tensor:
    """Keep the ranked probabilities up to where their curve has done the share ``z`` of its bending.

    Kept: the longest prefix of the ranking with sum |second differences of p| <= z of the whole sum, the difference centred on
    the prefix's last token included. Tail Free Sampling, Bricken 2019.

    Elsewhere: text-generation-webui `tfs`, ExLlamaV2 `tfs`, KoboldCpp `tfs`, Aphrodite `tfs`; llama.cpp had it until 2024.

    Differs: where the curve does not bend at all every token is kept; text-generation-webui drops the last one, always. It
    counts dropped tokens as p = 0, decal leaves them out, as ExLlamaV2 does. The old llama.cpp kept one token fewer.
    """
    return row.upper(count=row.longest(lambda top: top.curvature, at_most=z))


@rule(paper="arXiv:2509.02510", side="after")
def top_h(
    row: Row,
    alpha: Tensor = Param(0.4, low=0, high=1, off=1.0, sweep=(0.1, 0.2, 0.3, 0.4, 0.6, 0.8)),
    variant: str = Choice("paper", "cumulative"),
) -> Tensor:
    """Keep the most probable tokens as long as the entropy of their law is at most ``alpha`` times that of the whole.

    Kept: the longest prefix of the ranking with H(p_1..p_k renormalised) <= alpha H(p). The variant ``cumulative`` is what the
    authors' code and transformers compute: -sum_{i<=k} q_i log q_i <= alpha H(q), q the law of the 100 most probable tokens.
    Top-H Decoding, Baghaei Potraghloo et al. 2025.

    Elsewhere: transformers `top_h` (the variant ``cumulative``).

    Differs: the two variants keep different sets on most rows; see `variant`. In transformers 1 still cuts to 100 tokens, here
    it is off.
    """
    if variant == "paper":
        return row.upper(count=row.longest(lambda top: top.entropy, at_most=alpha * row.entropy))
    pool = row.head(100)
    size = pool.longest(lambda top: top.mass * (top.entropy - top.mass.log()), at_most=alpha * pool.entropy)
    return row.upper(count=size)


@rule(paper="arXiv:2604.11012")
def min_k(row: Row, tau: Tensor = Param(3.0, low=0, sweep=(3.0, 100.0, 200.0, 400.0, 1000.0, 3000.0))) -> Tensor:
    """Keep the most probable tokens down to the steepest fall of the logits, weighted by rank, and at least ``tau`` / range.

    Kept: the first k of the ranking, k = max(argmax_i (z_i - z_{i+1}) / i, floor(tau / (z_1 - z_n)), 1). Min-k Sampling, 2026.

    Differs: the cliff does not see temperature; the fallback does, and is below one token for tau = 3 on real rows, whose range
    is tens of logits. The larger values that are compared here are ours.
    """
    cliff = row.best(
        lambda top: torch.where(top.below.isfinite(), (top.value - top.below) / top.count, torch.nan),
        later=lambda top: (top.below - top.least) / (top.count + 1),  # a fall down to the last, right behind
    )
    fallback = torch.floor(tau / (row.max - row.min)).nan_to_num(nan=1.0, posinf=torch.inf)  # 0 / 0 on a flat row
    return row.upper(count=torch.maximum(cliff, fallback))


@rule(paper="arXiv:2512.00789", side="before")
def ees(row: Row, c: Tensor = Param(1.0, low=0, off=0.0, sweep=(0.25, 0.5, 0.75, 1.0, 1.25, 1.5))) -> Tensor:
    """Keep the most probable tokens as long as their evenness is at least ``c`` times their mass.

    Kept: the longest prefix of the ranking with H(p_1..p_k renormalised) / log k >= c sum_{i<=k} p_i; so the first k >= 2 that
    falls below is left out. The paper's rule has no parameter and is c = 1. Entropy Equilibrium Sampling, 2025.
    """
    return row.upper(count=row.longest(lambda top: top.entropy / (top.count.log() * top.mass), at_least=c))


def zipf_size(row: Row, mu: Tensor) -> Tensor:
    """How many tokens have a surprise of at most about ``mu`` bits, (B, 1), if the ranking follows Zipf's law.

    Its exponent is fitted to the 101 most probable tokens. Mirostat, Basu et al. 2021, equations 30 and 31; rounding as in the
    authors' code.
    """
    head = row.ranked(101)
    gaps = (head[:, :-1] - head[:, 1:]).nan_to_num(nan=0.0, posinf=0.0)
    known = head[:, 1:].isfinite()
    rank = torch.arange(1, gaps.shape[1] + 1, device=head.device, dtype=head.dtype)
    weight = torch.where(known, torch.log1p(1 / rank), 0.0)
    s = (weight * gaps).sum(-1, keepdim=True) / (weight * weight).sum(-1, keepdim=True)
    excess = s - 1
    # The limit of (1 - n^-e) / e at e = 0 is log n.
    log_n = row.count.log()
    total = torch.where(excess.abs() < 1e-9, log_n, -torch.expm1(-excess * log_n) / excess)
    size = torch.exp((mu * math.log(2) - total.log()) / s)
    return torch.where((s > 0) & known.any(-1, keepdim=True), size.nan_to_num(posinf=torch.inf), torch.inf).round() + 1


@rule(paper="arXiv:2007.14966", side="after")
def mirostat_k(row: Row, mu: Tensor = Param(10.0, low=0, off=math.inf, sweep=(1.0, 2.0, 3.0, 4.0, 6.0, 10.0))) -> Tensor:
    """Keep as many tokens as have a surprise of at most about ``mu`` bits under Zipf's law, fitted to the head of the row.

    Kept: the first k of the ranking, k = round((e 2^mu / (1 - n^-e))^(1/s)) + 1, e = s - 1, s the least-squares exponent of the
    101 most probable tokens. It is the cut of Mirostat 1 at a fixed mu; ``mirostat`` moves mu. Mirostat, Basu et al. 2021.
    ``epsilon(2 ** -mu)`` is the cut of Mirostat 2 likewise.

    Differs: llama.cpp rounds k towards 0, the authors' code to the nearest and adds 1, as here. n is the number of tokens still
    alive. A flat head keeps everything.
    """
    return row.upper(count=zipf_size(row, mu))
