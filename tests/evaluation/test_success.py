"""Success rates and their intervals."""

import numpy as np
import pytest
from scipy import optimize, stats

from como_jax.evaluation.rollouts.success import EpisodeResult, summarize, wilson_interval


@pytest.mark.parametrize("successes, trials", [(0, 5), (1, 20), (7, 20), (19, 20), (5, 5), (480, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_interval_is_that_of_the_score_test(successes: int, trials: int, confidence: float):
    z = stats.norm.ppf((1 + confidence) / 2)
    share = successes / trials

    def score(truth: float) -> float:
        return (share - truth) ** 2 - z**2 * truth * (1 - truth) / trials

    low = optimize.brentq(score, 1e-12, share - 1e-6) if successes else 0.0
    high = optimize.brentq(score, share + 1e-6, 1 - 1e-12) if successes < trials else 1.0
    np.testing.assert_allclose(wilson_interval(successes, trials, confidence), (low, high), atol=1e-9)
    known = stats.binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    np.testing.assert_allclose(wilson_interval(successes, trials, confidence), known, atol=1e-12)


@pytest.mark.parametrize("successes, trials, confidence", [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 1.0)])
def test_what_is_no_outcome_of_trials_has_no_interval(successes: int, trials: int, confidence: float):
    with pytest.raises(ValueError, match="no interval"):
        wilson_interval(successes, trials, confidence)


def test_crashed_episodes_count_neither_as_failures_nor_as_successes():
    results = [
        EpisodeResult("a", 0, 0, steps=10, success=True),
        EpisodeResult("a", 1, 1, steps=30),
        EpisodeResult("a", 2, 2, steps=3, reason="it fell over"),
        EpisodeResult("b", 0, 0, steps=20, success=True),
        EpisodeResult("c", 0, 0, reason="it never began"),
    ]
    summary = summarize(results)
    a, b, c = summary.tasks
    assert (a.task, a.episodes, a.crashed, a.successes, a.rate) == ("a", 3, 1, 1, 0.5)
    assert (a.mean_steps, a.mean_success_steps) == (20.0, 10.0)
    assert a.interval == wilson_interval(1, 2)
    assert (b.rate, b.crashed) == (1.0, 0)
    assert (c.crashed, c.rate, c.interval, c.mean_steps, c.mean_success_steps) == (1, None, None, None, None)
    assert summary.total.rate == pytest.approx(2 / 3) and summary.total.crashed == 2
    assert summary.mean_rate == 0.75
    assert [result.outcome for result in results] == ["success", "failure", "crashed", "success", "crashed"]
    assert summarize(results[-1:]).mean_rate is None
