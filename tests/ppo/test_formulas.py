"""The pure functions of PPO against slow loops, closed forms and hand-made cases."""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sandan.ppo import formulas as ppo


SEEDS = st.integers(0, 2**31)
WIDTHS = st.integers(1, 7)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_mask(rows, width, seed):
    lengths = torch.randint(1, width + 1, (rows,), generator=torch.Generator().manual_seed(seed))
    return lengths, ppo.response_masks(lengths, width)[0]


def test_masks_come_from_lengths_and_the_critic_has_one_position_more():
    policy, value = ppo.response_masks(torch.tensor([1, 3, 4]), width=4)
    assert policy.int().tolist() == [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert value.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    policy, value = ppo.response_masks(torch.tensor([1, 3]), width=3, score_at_stop_token=True)
    assert torch.equal(policy, value)


def test_masked_sum_ignores_nan_outside_the_mask():
    values = torch.tensor([[1.0, math.nan], [2.0, math.inf]])
    assert ppo.masked_sum(values, torch.tensor([[True, False], [True, False]])) == 3


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_kl_estimators_are_unbiased(estimator):
    policy, reference = normal(5, seed=1).softmax(0), normal(5, seed=2).softmax(0)
    estimates = ppo.kl_estimate(policy.log(), reference.log(), estimator)
    assert (policy * estimates).sum().item() == pytest.approx((policy * (policy / reference).log()).sum().item())


def test_k2_is_half_the_squared_log_ratio_and_k3_is_never_negative():
    policy, reference = normal(100, seed=1), normal(100, seed=2)
    assert torch.allclose(ppo.kl_estimate(policy, reference, "k2"), (policy - reference) ** 2 / 2)
    assert (ppo.kl_estimate(policy, reference, "k3") >= 0).all()
    with pytest.raises(ValueError, match="k9"):
        ppo.kl_estimate(policy, reference, "k9")


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS, width=WIDTHS, scale=st.sampled_from([1.0, 1000.0]))
def test_kl_estimates_equal_their_definitions_and_stay_finite(seed, width, scale):
    policy, reference = normal(3, width, seed=seed) * scale, normal(3, width, seed=seed + 1) * scale
    estimates = {one: ppo.kl_estimate(policy, reference, one) for one in ("k1", "k2", "k3")}
    for row in range(3):
        for t in range(width):
            log_ratio = reference[row, t].item() - policy[row, t].item()
            assert estimates["k1"][row, t].item() == pytest.approx(-log_ratio)
            assert estimates["k2"][row, t].item() == pytest.approx(log_ratio**2 / 2)
            if abs(log_ratio) <= 20:
                assert estimates["k3"][row, t].item() == pytest.approx(math.exp(log_ratio) - 1 - log_ratio, abs=1e-9)
    assert all(one.float().isfinite().all() for one in estimates.values())


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS, width=WIDTHS, at_stop=st.booleans(), beta=st.sampled_from([0.0, 0.05, 1.0]))
def test_an_answer_gets_the_same_advantages_alone_and_in_a_padded_batch(seed, width, at_stop, beta):
    lengths, _ = random_mask(4, width, seed)
    policy_mask, value_mask = ppo.response_masks(lengths, width, at_stop)
    kl, values, scores = normal(4, width, seed=seed + 1), normal(4, width, seed=seed + 2), normal(4, seed=seed + 3)
    kl, values = kl * policy_mask, values * value_mask
    rewards = ppo.token_rewards(kl, scores, lengths, beta, at_stop)
    advantages, returns = ppo.generalized_advantages(rewards, values, 0.99, 0.9)
    for row in range(4):
        n = int(lengths[row])
        end = n - 1 if at_stop else min(n, width - 1)  # where the score is paid
        future = 0.0
        for t in reversed(range(end + 1)):
            reward = (-beta * kl[row, t].item() if t < n else 0.0) + (scores[row].item() if t == end else 0.0)
            following = values[row, t + 1].item() if t < end else 0.0
            future = reward + 0.99 * following - values[row, t].item() + 0.99 * 0.9 * future
            assert advantages[row, t].item() == pytest.approx(future, abs=1e-9)
            assert returns[row, t].item() == pytest.approx(future + values[row, t].item(), abs=1e-9)
        assert (advantages[row, end + 1 :] == 0).all()


def test_the_score_is_paid_after_the_stop_token_or_at_the_last_position():
    lengths, kl = torch.tensor([2, 4]), torch.ones(2, 4)
    paid = ppo.token_rewards(kl, torch.tensor([10.0, 20.0]), lengths, kl_coef=0.5)
    assert paid.tolist() == [[-0.5, -0.5, 9.5, -0.5], [-0.5, -0.5, -0.5, 19.5]]
    paid = ppo.token_rewards(kl, torch.tensor([10.0, 20.0]), lengths, 0.5, score_at_stop_token=True)
    assert paid.tolist() == [[-0.5, 9.5, -0.5, -0.5], [-0.5, -0.5, -0.5, 19.5]]


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([0.0, 0.95, 1.0]), width=st.integers(1, 7))
def test_advantages_equal_the_definition(seed, gamma, lam, width):
    lengths, mask = random_mask(4, width, seed)
    rewards, values = (normal(4, width, seed=seed + one) * mask for one in (1, 2))
    advantages, returns = ppo.generalized_advantages(rewards, values, gamma, lam)
    for row in range(4):
        n = int(lengths[row])
        deltas = [
            rewards[row, t] + gamma * (values[row, t + 1] if t + 1 < n else 0) - values[row, t] for t in range(n)
        ]
        for t in range(n):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, n))
            assert advantages[row, t].item() == pytest.approx(expected.item(), abs=1e-9)
    assert torch.allclose(returns, advantages + values)
    assert (advantages[~mask] == 0).all()


def test_with_lambda_1_returns_are_the_rewards_to_go():
    rewards, values = normal(3, 6, seed=1), normal(3, 6, seed=2)
    _, returns = ppo.generalized_advantages(rewards, values, gamma=1.0, lam=1.0)
    assert torch.allclose(returns, rewards.flip(1).cumsum(1).flip(1))


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_whitening_equals_the_moments_of_the_selected_values(seed):
    _, mask = random_mask(4, 6, seed)
    values = normal(4, 6, seed=seed) * 5 + 3
    chosen = values[mask]
    white = ppo.whiten(values, mask)
    expected = (chosen - chosen.mean()) / (chosen.var() + 1e-8).sqrt()
    assert torch.allclose(white[mask], expected, atol=1e-6)
    assert (white[~mask] == 0).all()
    kept = ppo.whiten(values, mask, shift_mean=False)[mask]
    assert torch.allclose(kept, expected + chosen.mean(), atol=1e-6)


def test_whitening_and_explained_variance_over_ranks_are_those_of_the_whole_batch():
    values, returns = normal(4, 6, seed=1), normal(4, 6, seed=2)
    _, mask = random_mask(4, 6, 3)

    def ranks(function):
        """Run `function` on both halves; each reduction sums what both halves have at that point."""
        halves, sums = [slice(0, 2), slice(2, 4)], []
        while True:
            seen = []

            def reduce(total, seen=seen):
                seen.append(total)
                return sums[len(seen) - 1] if len(seen) <= len(sums) else total

            results, calls = [], []
            for half in halves:
                seen.clear()
                results.append(function(half, reduce))
                calls.append(list(seen))
            if len(sums) == len(calls[0]):
                return results
            sums.append(calls[0][len(sums)] + calls[1][len(sums)])

    halves = ranks(lambda half, reduce: ppo.whiten(values[half], mask[half], reduce=reduce))
    assert torch.allclose(torch.cat(halves), ppo.whiten(values, mask))
    halves = ranks(lambda half, reduce: ppo.explained_variance(values[half], returns[half], mask[half], reduce))
    assert torch.allclose(torch.stack(halves), ppo.explained_variance(values, returns, mask))


def test_whitening_refuses_a_single_token():
    with pytest.raises(ValueError, match="at least 2 tokens, found 1"):
        ppo.whiten(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool))


def test_policy_loss_is_flat_where_clipping_is_active():
    # Ratio, advantage -> loss, gradient or not: the four corners of Schulman et al. 2017, figure 1.
    cases = [(1.5, 1.0, -1.2, False), (0.5, 1.0, -0.5, True), (1.5, -1.0, 1.5, True), (0.5, -1.0, 0.8, False)]
    for ratio, advantage, expected, moves in cases:
        logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
        losses, _, clipped = ppo.clipped_policy_loss(
            logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), cliprange=0.2
        )
        losses.sum().backward()
        assert losses.item() == pytest.approx(expected)
        assert (logprobs.grad.item() != 0) is moves
        assert clipped.item() is (not moves)


def test_policy_loss_is_finite_at_extremes():
    losses, ratio, _ = ppo.clipped_policy_loss(
        torch.tensor([[500.0]]), torch.tensor([[-500.0]]), -torch.ones(1, 1), 0.2
    )
    assert losses.isfinite().all()
    assert ratio.item() == pytest.approx(math.exp(20), rel=1e-5)


@settings(deadline=None, max_examples=50)
@given(
    seed=SEEDS,
    clip=st.sampled_from([0.1, 0.2, 0.5]),
    high=st.sampled_from([None, 0.05, 0.28, 1.0]),
    dual=st.sampled_from([None, 1.5, 3.0]),
    width=WIDTHS,
)
def test_policy_loss_and_its_gradient_equal_the_definition(seed, clip, high, dual, width):
    new, old, advantages = (normal(3, width, seed=seed + one) for one in range(3))
    new.requires_grad_(True)
    losses, ratios, active = ppo.clipped_policy_loss(new, old, advantages, clip, dual, high)
    losses.sum().backward()
    for row in range(3):
        for t in range(width):
            advantage = advantages[row, t].item()
            ratio = math.exp(new[row, t].item() - old[row, t].item())
            objective = min(ratio * advantage, min(max(ratio, 1 - clip), 1 + (high or clip)) * advantage)
            flat = objective != ratio * advantage
            if dual is not None and advantage < 0 and objective < dual * advantage:
                objective, flat = dual * advantage, True
            assert ratios[row, t].item() == pytest.approx(ratio)
            assert losses[row, t].item() == pytest.approx(-objective)
            assert active[row, t].item() is flat
            assert new.grad[row, t].item() == pytest.approx(0 if flat else -ratio * advantage)


@settings(deadline=None, max_examples=50)
@given(seed=SEEDS, clip=st.sampled_from([0.1, 0.2, 1.0]), width=WIDTHS)
def test_value_loss_and_its_gradient_equal_the_definition(seed, clip, width):
    new, old, returns = (normal(3, width, seed=seed + one) for one in range(3))
    new.requires_grad_(True)
    losses, active = ppo.clipped_value_loss(new, old, returns, clip)
    losses.sum().backward()
    for row in range(3):
        for t in range(width):
            value, before, target = (one[row, t].item() for one in (new, old, returns))
            near = min(max(value, before - clip), before + clip)
            worse = (near - target) ** 2 > (value - target) ** 2
            assert losses[row, t].item() == pytest.approx(max((near - target) ** 2, (value - target) ** 2) / 2)
            assert active[row, t].item() is worse
            assert new.grad[row, t].item() == pytest.approx(0 if worse else value - target)


def test_value_loss_takes_the_worse_of_both_and_stops_at_the_clip():
    old, returns = torch.zeros(1, 3), torch.tensor([[1.0, 1.0, -1.0]])
    values = torch.tensor([[0.1, 0.5, 0.5]], requires_grad=True)
    losses, clipped = ppo.clipped_value_loss(values, old, returns, cliprange=0.2)
    losses.sum().backward()
    assert losses.tolist() == [pytest.approx([0.5 * 0.9**2, 0.5 * 0.8**2, 0.5 * 1.5**2])]
    assert clipped.tolist() == [[False, True, False]]
    assert values.grad.tolist() == [pytest.approx([-0.9, 0.0, 1.5])]


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, width=st.integers(2, 7))
def test_explained_variance_equals_the_definition(seed, width):
    values, returns = normal(4, width, seed=seed), normal(4, width, seed=seed + 1)
    _, mask = random_mask(4, width, seed)
    kept = [(values[i, t].item(), returns[i, t].item()) for i in range(4) for t in range(width) if mask[i, t]]
    unexplained = statistics.pvariance([target - value for value, target in kept])
    expected = 1 - unexplained / max(statistics.pvariance([target for _, target in kept]), 1e-8)
    assert ppo.explained_variance(values, returns, mask).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_explained_variance_of_perfect_mean_and_wrong_critics():
    returns, mask = normal(3, 5, seed=1), torch.ones(3, 5, dtype=torch.bool)
    assert ppo.explained_variance(returns, returns, mask).item() == pytest.approx(1)
    assert ppo.explained_variance(torch.zeros_like(returns), returns, mask).item() == pytest.approx(0)
    assert ppo.explained_variance(-returns, returns, mask).item() == pytest.approx(-3)


def test_kl_controller_moves_towards_its_target_and_at_most_20_percent_a_horizon():
    assert ppo.adapted_kl_coef(0.1, kl=6, target_kl=6, episodes=100, horizon=100) == pytest.approx(0.1)
    assert ppo.adapted_kl_coef(0.1, kl=600, target_kl=6, episodes=100, horizon=100) == pytest.approx(0.12)
    assert ppo.adapted_kl_coef(0.1, kl=0, target_kl=6, episodes=50, horizon=100) == pytest.approx(0.09)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS, sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), offset=st.sampled_from([0.0, 1e4]))
def test_running_moments_are_those_of_all_values_so_far(seed, sizes, offset):
    batches = [normal(size, seed=seed + index) + offset for index, size in enumerate(sizes)]
    moments = (0.0, 0.0, 0.0)
    for batch in batches:
        moments = ppo.updated_moments(moments, batch)
    everything = torch.cat(batches)
    assert moments[:2] == pytest.approx((len(everything), everything.mean().item()))
    if len(everything) > 1:
        assert ppo.standard_deviation(moments) == pytest.approx(everything.std().item())


def test_nothing_that_has_not_varied_is_scaled():
    assert ppo.standard_deviation((0.0, 0.0, 0.0)) == 1
    assert ppo.standard_deviation(ppo.updated_moments((0.0, 0.0, 0.0), torch.full((4,), 7.0))) == 1


def test_repetition_is_the_share_of_n_grams_seen_before():
    assert ppo.repeated_share([1, 2, 3, 4, 5]) == 0
    assert ppo.repeated_share([1, 2, 3, 1, 2, 3]) == pytest.approx(1 / 4)
    assert ppo.repeated_share([7] * 12) == pytest.approx(9 / 10)
    assert ppo.repeated_share([7, 7]) == ppo.repeated_share([]) == 0
