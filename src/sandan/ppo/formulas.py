"""The formulas of PPO for language models: pure functions, to be read beside the papers.

For a prompt x and a response y_0 ... y_n sampled at temperature tau, n the index of the first stop token (or the end):

    r_t = -beta kl_t + [t = e] score                                            token rewards   Ziegler et al. 2019
    delta_t = r_t + gamma V_{t+1} - V_t,  A_t = delta_t + gamma lambda A_{t+1}     advantages   Schulman et al. 2015
    G_t = A_t + V_t                                                                   returns
    rho_t = exp(log p_new - log p_old)
    L_policy = mean max(-A rho, -A clip(rho, 1 - eps, 1 + eps))                                 Schulman et al. 2017
    L_value  = 1/2 mean max((v - G)^2, (clip(v, V - eps_v, V + eps_v) - G)^2)

Shapes: B rows (answers), T response positions. Log-probabilities and divergences are in nats. "N+" is Huang et al.
2024 (arXiv 2403.17031), whose published code decides every detail that the papers leave open.
"""

from collections.abc import Callable, Sequence

import torch


Reduce = Callable[[torch.Tensor], torch.Tensor]

# exp(20) is 5e8: far outside any clip range, and still finite in every dtype but float16.
MAX_LOG_RATIO = 20.0


def _on_one_rank(total: torch.Tensor) -> torch.Tensor:
    return total


def response_masks(
    lengths: torch.Tensor, width: int, score_at_stop_token: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return masks of the positions at which policy and critic are trained, from the lengths, not from `ids != pad`.

    Args:
        lengths (`(B,)`): tokens of each response, with its stop token.
        width: T.
        score_at_stop_token: as in [`token_rewards`]. If False the critic has one more position than the policy: the
            position after the stop token, where the score is paid (N+).

    Returns:
        The policy's and the critic's mask, both boolean `(B, T)`.
    """
    positions = torch.arange(width, device=lengths.device)
    policy_mask = positions < lengths[:, None]
    value_mask = policy_mask if score_at_stop_token else positions <= lengths[:, None]
    return policy_mask, value_mask


def masked_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the sum over the positions in the mask; values at other positions (even NaN) are ignored."""
    return torch.where(mask, values, 0).sum()


def kl_estimate(logprobs: torch.Tensor, ref_logprobs: torch.Tensor, estimator: str) -> torch.Tensor:
    """Estimate KL(policy || reference) per token from the sampled tokens (http://joschu.net/blog/kl-approx.html).

    With log r = log p_ref - log p: k1 = -log r (unbiased), k2 = log^2 r / 2, k3 = (r - 1) - log r (unbiased, never
    negative).

    Args:
        logprobs, ref_logprobs (`(B, T)`): of the sampled tokens, at the same temperature.
        estimator: `"k1"`, `"k2"` or `"k3"`.
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio.square() / 2
    if estimator == "k3":
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return log_ratio.expm1() - log_ratio
    raise ValueError(f"kl_estimator: expected 'k1', 'k2' or 'k3', found {estimator!r}")


def token_rewards(
    kl: torch.Tensor, scores: torch.Tensor, lengths: torch.Tensor, kl_coef: float, score_at_stop_token: bool = False
) -> torch.Tensor:
    """Return r_t = -beta kl_t + [t = e] score, `(B, T)` (Ziegler et al. 2019, eq. 2).

    e is the position after the last token, if the row has one (N+ and TRL), or with `score_at_stop_token` that of the
    last token itself (OpenRLHF).

    Args:
        kl (`(B, T)`): per-token KL, 0 outside the response.
        scores (`(B,)`): one score per response.
        lengths (`(B,)`): tokens of each response.
    """
    end = lengths - 1 if score_at_stop_token else lengths.clamp(max=kl.shape[1] - 1)
    return (-kl_coef * kl).scatter_add(1, end[:, None], scores[:, None])


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return generalized advantages (Schulman et al. 2015, eq. 16); V and A are 0 after the last position.

    Policy and critic may have a lambda each: advantages are then those of one call, returns those of another (decoupled
    GAE: Yuan et al. 2025, VC-PPO, arXiv 2503.01491; Yue et al. 2025, VAPO, arXiv 2504.05118). With lambda 1 returns are
    rewards to go, which do not carry the critic's own bias; the policy keeps a smaller lambda, for less variance.

    Args:
        rewards, values (`(B, T)`): both 0 outside the critic's mask.

    Returns:
        Advantages A and returns G = A + V, both `(B, T)`.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = delta + gamma * lam * next_advantage
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def whiten(
    values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True, reduce: Reduce = _on_one_rank
) -> torch.Tensor:
    """Scale to unit variance (unbiased) and, with `shift_mean`, to mean 0, over the positions in all ranks' masks.

    Args:
        values (`(B, T)`), mask (boolean `(B, T)`): the result is 0 outside the mask.
        reduce: sums a tensor over the ranks.

    Raises:
        ValueError: if fewer than two positions are in the mask, because they have no variance.
    """
    total, count = reduce(torch.stack([masked_sum(values, mask), mask.sum().to(values.dtype)]))
    if count < 2:
        raise ValueError(f"whitening needs at least 2 tokens, found {int(count)}; use a larger batch or turn it off")
    mean = total / count
    variance = reduce(masked_sum((values - mean).square(), mask)) / (count - 1)
    scaled = (values - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, scaled if shift_mean else scaled + mean, 0)


def clipped_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    cliprange: float,
    dual_clip: float | None = None,
    cliprange_high: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return max(-A rho, -A clip(rho, 1 - eps, 1 + eps)) per token (Schulman et al. 2017, eq. 7, negated).

    Where A < 0 this has no upper bound in rho: a single token that became far more probable can dominate a whole step.
    With `dual_clip` c the loss is then at most -c A (Ye et al. 2020, arXiv 1912.09729, eq. 5).

    With `cliprange_high` the upper bound is 1 + eps_high, and eps is for the lower one only (clip-higher: Yu et al.
    2025, DAPO, arXiv 2503.14476, section 3.1, eq. 10): a token of small probability may then rise further, and the
    policy's entropy falls more slowly.

    Args:
        logprobs, old_logprobs, advantages (`(B, T)`): gradients flow through `logprobs` only.
        dual_clip: c > 1, or None for no bound.
        cliprange_high: eps_high; None for eps.

    Returns:
        Losses, ratios rho and whether clipping was active, all `(B, T)`.
    """
    ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + (cliprange if cliprange_high is None else cliprange_high))
    losses, active = torch.maximum(free, clipped), clipped > free
    if dual_clip is not None:
        bound = -advantages * dual_clip
        beyond = (advantages < 0) & (losses > bound)
        losses, active = torch.where(beyond, bound, losses), active | beyond
    return losses, ratio, active


def importance_weights(logprobs: torch.Tensor, sampling_logprobs: torch.Tensor, cap: float) -> torch.Tensor:
    """Return min(p / p_sampler, cap) per token, the weights of the policy loss if another engine sampled the answers.

    The sampler's probabilities differ a little from those of the training forward, so the loss is an expectation under
    another policy. The weights correct that, and the cap bounds their variance (truncated importance sampling: Yao et
    al. 2025, "Your efficient RL framework secretly brings you off-policy RL training", https://fengyao.notion.site/off-policy-rl;
    the estimator is that of Ionides 2008). p is the policy's before the update, so a weight is the same in all epochs.

    Args:
        logprobs, sampling_logprobs (`(B, T)`): of the sampled tokens, at the same temperature. Where the sampler's is
            NaN (unknown) the weight is 1.
        cap: at least 1, or all weights would shrink.
    """
    log_ratio = (logprobs - sampling_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.exp().clamp(max=cap).masked_fill(sampling_logprobs.isnan(), 1.0)


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 1/2 max((v - G)^2, (clip(v, V - eps, V + eps) - G)^2) per token (OpenAI baselines, Ziegler et al. 2019).

    Args:
        values, old_values, returns (`(B, T)`): gradients flow through `values` only.

    Returns:
        Losses and whether clipping was active, both `(B, T)`.
    """
    near = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    free, clipped = (values - returns).square(), (near - returns).square()
    return torch.maximum(free, clipped) / 2, clipped > free


def explained_variance(
    values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, reduce: Reduce = _on_one_rank
) -> torch.Tensor:
    """Return 1 - Var(G - V) / Var(G) over the positions in the masks of all ranks.

    It is 1 for a perfect critic, and 0 or less for a useless critic.
    """

    def variance(x: torch.Tensor) -> torch.Tensor:
        total, count = reduce(torch.stack([masked_sum(x, mask), mask.sum().to(x.dtype)]))
        return reduce(masked_sum((x - total / count).square(), mask)) / count

    return 1 - variance(returns - values) / variance(returns).clamp(min=1e-8)


def adapted_kl_coef(kl_coef: float, kl: float, target_kl: float, episodes: int, horizon: int) -> float:
    """Return the next KL coefficient: beta moves by at most 20% per `horizon` episodes.

    This is the proportional controller of Ziegler et al. 2019, section 2.2.

    Args:
        kl: mean KL of the last batch, in nats per response.
        episodes: responses in that batch.
    """
    error = min(max(kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


Moments = tuple[float, float, float]


def updated_moments(moments: Moments, values: torch.Tensor, reduce: Reduce = _on_one_rank) -> Moments:
    """Return count, mean and sum of squared deviations of all values so far (Chan, Golub and LeVeque 1979, eq. 2.1).

    Args:
        moments: of the earlier values; `(0, 0, 0)` at the start.
        values (`(B,)`): this rank's new values.
        reduce: sums a tensor over the ranks.
    """
    old_count, old_mean, old_deviations = moments
    values = values.double()
    total, new_count = reduce(torch.stack([values.sum(), torch.ones_like(values).sum()])).tolist()
    mean = total / new_count
    deviations = reduce((values - mean).square().sum()).item()
    count, shift = old_count + new_count, mean - old_mean
    return (
        count,
        old_mean + shift * new_count / count,
        old_deviations + deviations + shift**2 * old_count * new_count / count,
    )


def standard_deviation(moments: Moments) -> float:
    """Return the unbiased standard deviation, or 1 if the values have not varied yet, so that it can be a divisor."""
    count, _, deviations = moments
    return (deviations / (count - 1)) ** 0.5 if count > 1 and deviations > 0 else 1.0


def repeated_share(token_ids: Sequence[int], size: int = 3) -> float:
    """Return the share of a text's n-grams of `size` tokens that occurred in it before: 0 for none, near 1 for a loop.

    It is 1 - distinct / all (the `seq-rep-n` of Welleck et al. 2020, arXiv 1908.04319, section 6).
    """
    grams = [tuple(token_ids[start : start + size]) for start in range(len(token_ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
