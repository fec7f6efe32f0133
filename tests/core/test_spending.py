"""What a first level may spend in a day."""

from __future__ import annotations

import pytest

from llamacpp_mqtt_deploy.core.errors import RateLimited
from llamacpp_mqtt_deploy.core.spending import (
    DAY_S,
    REST,
    Estimate,
    LedgerRow,
    LevelLimits,
    Quotas,
    Spent,
    day_of,
)

NOON = 20_000 * DAY_S + 12 * 3600


def quotas(tokens_per_day: int = 100, **own: int) -> Quotas:
    return Quotas(LevelLimits(tokens_per_day=tokens_per_day, own_tokens_per_day=own))


def refusal(of: Quotas, level: str = "alice", now: float = NOON) -> RateLimited | None:
    try:
        of.check(level, now, retry_after_s=7.0)
    except RateLimited as refused:
        return refused
    return None


def test_whoever_has_spent_his_tokens_is_told_to_come_back_when_the_day_ends() -> None:
    spent = quotas()
    spent.spend(Spent(first_level="alice", tokens_in=60, tokens_out=39), NOON)
    assert refusal(spent) is None
    spent.spend(Spent(first_level="alice", tokens_out=1), NOON)
    refused = refusal(spent)
    assert refused is not None
    assert refused.details == {"retry_after_s": 12 * 3600}
    assert "12 h 0 min" in refused.message
    assert refusal(spent, "bob") is None
    assert refusal(spent, now=NOON + 12 * 3600) is None, "the next day"


def test_in_the_last_moment_of_a_day_the_wait_is_a_second_at_least() -> None:
    spent = quotas()
    spent.spend(Spent(first_level="alice", tokens_in=100), NOON)
    refused = refusal(spent, now=20_001 * DAY_S - 0.001)
    assert refused is not None
    assert refused.details["retry_after_s"] == 1


@pytest.mark.parametrize("parallel", [1, 10, 100])
def test_parallel_requests_come_past_a_quota_by_one_of_them_at_most(parallel: int) -> None:
    held, cost, taken = quotas(1000), 130, 0
    for number in range(parallel):
        if refusal(held) is None:
            held.set_aside(number, "alice", Estimate(tokens_in=30, tokens_out=100), NOON)
            taken += 1
    for number in range(taken):
        held.release(number)
        held.spend(Spent(first_level="alice", tokens_in=30, tokens_out=100), NOON)
    assert taken == min(parallel, 8)
    assert held.spent("alice", NOON) < 1000 + cost


def test_what_is_set_aside_is_given_back_when_the_request_was_cheaper() -> None:
    held = quotas(100)
    held.set_aside("r", "alice", Estimate(tokens_in=10, tokens_out=1000), NOON)
    refused = refusal(held)
    assert refused is not None
    assert refused.details == {"retry_after_s": 7.0}
    assert "under way" in refused.message
    held.spend(Spent(first_level="alice", tokens_in=10, tokens_out=5), NOON)
    held.release("r")
    assert refusal(held) is None


def test_a_request_that_is_set_aside_again_is_kept_once_and_given_back_once() -> None:
    held = quotas(100)
    for tokens in (90, 30):
        held.set_aside("r", "alice", Estimate(tokens_out=tokens), NOON)
    held.set_aside("free", "alice", Estimate(), NOON)
    assert refusal(held) is None, "30 are kept, not 120"
    held.set_aside("s", "alice", Estimate(tokens_out=70), NOON)
    assert refusal(held) is not None
    for _ in range(2):
        held.release("s")
    assert refusal(held) is None
    held.set_aside("t", "alice", Estimate(tokens_out=69), NOON)
    assert refusal(held) is None, "99 are kept"
    assert refusal(held, "bob") is None


def test_a_history_is_guessed_at_by_what_the_level_took_before() -> None:
    held = quotas(10_000)
    held.spend(Spent(first_level="alice", tokens_in=3000), NOON)
    for number in range(3):
        assert refusal(held) is None
        held.set_aside(number, "alice", Estimate(tokens_in=5, tokens_out=100), NOON)
    assert refusal(held) is not None


def test_no_request_is_expected_to_cost_more_than_the_context() -> None:
    held = quotas(1000)
    held.context_tokens = 256
    held.set_aside("r", "alice", Estimate(tokens_in=500_000, tokens_out=32_768), NOON)
    assert refusal(held) is None


def test_a_level_may_have_more_or_less_than_the_others_or_no_limit() -> None:
    spent = quotas(100, alice=200, bob=50, carol=0)
    for level in ("alice", "bob", "carol", "dave"):
        spent.spend(Spent(first_level=level, tokens_in=120), NOON)
    assert [level for level in ("alice", "bob", "carol", "dave") if refusal(spent, level)] == ["bob", "dave"]


def test_without_a_limit_nobody_is_refused() -> None:
    spent = quotas(0)
    spent.spend(Spent(first_level="alice", tokens_in=10**12), NOON)
    assert refusal(spent) is None


def test_the_quota_goes_on_from_what_the_ledger_has() -> None:
    spent = quotas(100)
    row = LedgerRow(day=day_of(NOON), first_level="alice", requests=3, tokens_in=90, tokens_out=10, engine_s=1.0)
    spent.reconcile([row])
    assert refusal(spent) is not None


def test_what_other_workers_of_a_pool_have_spent_counts_and_nothing_counts_twice() -> None:
    spent = quotas(100)
    mine = Spent(first_level="alice", tokens_in=30)
    spent.spend(mine, NOON)
    row = LedgerRow(day=day_of(NOON), first_level="alice", requests=3, tokens_in=60, tokens_out=10, engine_s=1.0)
    for _ in range(3):
        spent.reconcile([row])
    assert spent.spent("alice", NOON) == 70
    spent.spend(mine, NOON)
    spent.reconcile([row])  # the ledger does not have the last one yet
    assert spent.spent("alice", NOON) == 100


def test_a_clock_that_is_set_forth_and_back_makes_no_quota_anew() -> None:
    spent = quotas(100)
    spent.spend(Spent(first_level="alice", tokens_in=100), NOON)
    spent.spend(Spent(first_level="alice", tokens_in=10), NOON + 3 * DAY_S)
    spent.spend(Spent(first_level="alice", tokens_in=10), NOON - 9 * DAY_S)
    assert refusal(spent) is not None
    assert refusal(spent, now=NOON + 3 * DAY_S) is None


def test_levels_without_end_do_not_fill_the_memory_and_share_what_is_left() -> None:
    spent = quotas(100)
    for number in range(10_000):
        spent.spend(Spent(first_level=f"made-up-{number}", tokens_in=1), NOON)
    assert sum(map(len, spent._days.values())) <= 4097
    assert refusal(spent, "made-up-0") is None, "one that came early has its own count"
    assert refusal(spent, "made-up-9999") is not None
    assert spent.spent(REST, NOON) > 100
