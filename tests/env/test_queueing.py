"""The surrogate against queueing theory: M/D/1, M/G/1, M/D/c, M/G/∞ and plain arithmetic.

A PREFILL instance that takes one prompt at a time and requests of one token make a single server: the service
time is the prefill, TTFT is the time in the system.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.kinds import Batching, Role
from engine.core.setup import ClusterOptions, InstanceSpec, SloClass, blank_requests, new_cluster
from engine.latency.evaluate import TICKS_PER_S
from engine.latency.rough import device_tables
from env.surrogate.clock import new_sim
from env.surrogate.simulate import driver
from policies.load import load_policy
from policies.setting import Setting

US = TICKS_PER_S // 1_000_000


def latency(prefill=(0.0, 0.0, 0.0, 0.0), decode=(0.0, 0.0, 0.0)):
    """A device of one share: coefficients in seconds, no overheads, nothing saved by fusing."""
    return device_tables(prefill, decode)


def serve(device, arrival, prompt, output, *, n=1, policy="least_tokens", fast_forward=True, **spec):
    """Requests served by ``n`` equal instances; arrivals in ticks. Returns the request records."""
    given_spec = {"role": Role.PREFILL, "kv_tokens": 1_000_000, "max_prefills": 1, "max_batch": 1024} | spec
    specs = [InstanceSpec(pool=i, gpu=i, **given_spec) for i in range(n)]
    state = new_cluster(specs, *device, classes=[SloClass(1.0, 1.0)], options=ClusterOptions(min_decode=0))
    bound = load_policy(policy, Setting.of_state(state))
    req = blank_requests(len(arrival))
    req["arrival"], req["prompt"], req["output"] = arrival, prompt, output
    state.cluster["n_requests"] = len(req)
    state = state._replace(req=req)
    sim = new_sim(state, n_roots=len(req), fast_forward=fast_forward)
    driver(state, sim, bound)()
    return state.req


def poisson(rate, n, seed):
    """Arrivals in ticks, int64 (n,), ``rate`` per second."""
    gaps = np.random.default_rng(seed).exponential(TICKS_PER_S / rate, n)
    return np.rint(np.cumsum(gaps)).astype(np.int64)


def departures(arrival, service):
    """Single server, first come first served: D_k = max(A_k, D_{k-1}) + S_k (Lindley), in closed form."""
    work = np.cumsum(service)
    return work + np.maximum.accumulate(arrival - (work - service))


# -- one server ----------------------------------------------------------------------------------------

SERVICE_S = 0.010


def time_in_system(rate, mean, mean_square):
    """Pollaczek and Khinchine: E[S] + λ E[S²] / (2 (1 − λ E[S]))."""
    return mean + rate * mean_square / (2 * (1 - rate * mean))


def ttft_against_theory(device, service_s, prompt_of, load, n, runs):
    """Mean TTFT ÷ theory over ``runs`` runs of ``n`` requests, each held against Lindley's recursion first.

    :param service_s: seconds per entry of the prompt table; prompts are drawn from it evenly
    :return: theory taken at the arrival rate and service moments that each run's sample happened to have: the
        control variate that halves the noise of a mean over long busy periods
    """
    ratios = []
    for seed in range(runs):
        arrival = poisson(load / service_s.mean(), n, seed)
        drawn = np.random.default_rng(100 + seed).integers(0, len(service_s), n)
        req = serve(device, arrival, prompt_of[drawn], output=1)
        service = np.rint(service_s[drawn] * TICKS_PER_S).astype(np.int64)
        # Another order of the same floating-point sum may round a service time to the next tick.
        slack = 0 if len(service_s) == 1 else n
        np.testing.assert_allclose(req["first_token"], departures(arrival, service), rtol=0, atol=slack)
        np.testing.assert_array_equal(req["finished"], req["first_token"])
        s = service / TICKS_PER_S
        theory = time_in_system(n * TICKS_PER_S / arrival[-1], s.mean(), (s**2).mean())
        ratios.append((req["first_token"] - arrival).mean() / TICKS_PER_S / theory)
    return np.mean(ratios)


@pytest.mark.parametrize(("load", "runs"), [(0.3, 1), (0.6, 2), (0.9, 12)])
def test_fixed_prompts_wait_as_in_m_d_1(load, runs):
    device = latency(prefill=(0.0, 0.0, 1e-5, 0.005))
    ratio = ttft_against_theory(device, np.array([SERVICE_S]), np.array([500]), load, 400_000, runs)
    assert ratio == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(("load", "runs"), [(0.3, 1), (0.6, 2), (0.8, 8)])
def test_lognormal_prompts_wait_as_in_m_g_1(load, runs):
    """Prompts from a lognormal table, prefill quadratic in them."""
    table = np.clip(np.rint(np.exp(np.random.default_rng(1).normal(5.5, 1.0, 4096))), 1, 8192)
    a, c, d = 2e-9, 1e-5, 0.002
    ratio = ttft_against_theory(
        latency(prefill=(a, 0.0, c, d)),
        a * table**2 + c * table + d,
        table.astype(np.int32),
        load,
        400_000,
        runs,
    )
    assert ratio == pytest.approx(1.0, abs=0.02)


def test_shortest_prompt_first_keeps_the_server_busy_and_waits_less():
    """Shortest waiting prompt first moves the end of no busy period, and lowers the mean (Smith's rule)."""
    arrival = poisson(80.0, 20_000, 0)
    prompt = np.random.default_rng(5).integers(100, 1500, len(arrival))
    device = latency(prefill=(0.0, 0.0, 1e-5, 0.002))
    fcfs, srf = (serve(device, arrival, prompt, output=1, order=k) for k in (0, 1))
    assert fcfs["first_token"].max() == srf["first_token"].max()
    assert np.sum(fcfs["first_token"] - arrival) > 1.1 * np.sum(srf["first_token"] - arrival)


# -- several servers -----------------------------------------------------------------------------------


def central_queue(arrival, service, servers):
    """Departures of one queue before several servers (Kiefer and Wolfowitz's recursion), ticks."""
    free = np.zeros(servers, np.int64)
    out = np.empty_like(arrival)
    for k, t in enumerate(arrival):
        first = free.argmin()
        out[k] = free[first] = max(t, free[first]) + service
    return out


@pytest.mark.parametrize("policy", ["predicted_ttft", "round_robin"])
def test_joining_the_least_work_is_one_central_queue(policy):
    """With equal prompts least work is M/D/c with one queue, to the tick; and so is taking turns."""
    arrival = poisson(0.9 * 3 / SERVICE_S, 30_000, 3)
    device = latency(prefill=(0.0, 0.0, 1e-5, 0.005))
    req = serve(device, arrival, 500, 1, n=3, policy=policy)
    central = central_queue(arrival, int(SERVICE_S * TICKS_PER_S), 3)
    np.testing.assert_array_equal(np.sort(req["first_token"]), np.sort(central))


def test_shortest_queue_waits_longer_than_one_queue_and_less_than_separate_ones():
    """Counting prompts instead of work costs something; a random split (M/D/1 each) costs far more."""
    load = 0.9
    arrival = poisson(load * 3 / SERVICE_S, 100_000, 4)
    service = int(SERVICE_S * TICKS_PER_S)
    shortest = serve(latency(prefill=(0.0, 0.0, 1e-5, 0.005)), arrival, 500, 1, n=3)["first_token"]
    central = (central_queue(arrival, service, 3) - arrival).mean()
    split = service * (1 + load / (2 * (1 - load)))
    assert central < (shortest - arrival).mean() < central + 0.2 * (split - central)


# -- decode --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 3000), st.integers(2, 400)), min_size=1, max_size=12),
    fast_forward=st.booleans(),
)
def test_a_decode_batch_ends_when_arithmetic_says(requests, fast_forward):
    """B start together; while nobody ends, k steps take k (base + b B + a C) + a B k (k − 1) / 2 ticks."""
    prompt, output = (np.array(x) for x in zip(*requests, strict=True))
    per_ctx, per_seq, base = 7_000, 40 * US, 5_000 * US
    req = serve(
        latency(decode=(per_ctx / TICKS_PER_S, per_seq / TICKS_PER_S, base / TICKS_PER_S)),
        np.zeros(len(prompt), np.int64), prompt, output,
        role=Role.MIXED, batching=Batching.PREFILL_FIRST, prefill_tokens=10**6, max_prefills=64,
        fast_forward=fast_forward,
    )  # fmt: skip
    t, steps = int(req["first_token"].max()), 0
    for last in np.unique(output - 1):
        running = output - 1 >= last
        context, b, k = (
            int(prompt[running].sum()) + steps * int(running.sum()),
            int(running.sum()),
            int(last) - steps,
        )
        t += k * (base + per_seq * b + per_ctx * context) + per_ctx * b * (k * (k - 1) // 2)
        steps += k
        assert (req["finished"][output - 1 == last] == t).all()


def test_decode_at_constant_pace_holds_a_poisson_number_of_requests():
    """Steps of constant time make M/G/∞: mean and variance in the system are both λ (out + ½) τ."""
    step_s, output, rate = 0.020, 50, 40.0
    arrival = poisson(rate, 100_000, 7)
    device = latency(decode=(0.0, 0.0, step_s))
    req = serve(device, arrival, 16, output, role=Role.MIXED, chunk_tokens=8192, max_prefills=128, kv_tokens=1_000_000)
    # An idle instance would start a step at once; at this load that never happens after the first seconds.
    at = np.random.default_rng(8).integers(int(10e12), arrival[-1], 50_000)
    inside = np.searchsorted(arrival, at, "right") - np.searchsorted(np.sort(req["finished"]), at, "right")
    expected = rate * (output + 0.5) * step_s
    assert inside.mean() == pytest.approx(expected, rel=0.01)
    assert inside.var() == pytest.approx(expected, rel=0.05)


def test_turns_give_everybody_the_same_pace():
    """Twice as many requests as a step may hold: in turns all end together, in order one half waits."""
    n, prompt, output = 8, 1000, 41
    shared = {
        "role": Role.MIXED, "batching": Batching.PREFILL_FIRST, "prefill_tokens": 10**6, "max_prefills": 64,
        "max_ctx": 4 * (prompt + output),
    }  # fmt: skip
    device = latency(decode=(0.0, 0.0, 0.010))
    arrival = np.zeros(n, np.int64)
    turns = serve(device, arrival, prompt, output, **shared, rotate=True)
    order = serve(device, arrival, prompt, output, **shared)
    step = TICKS_PER_S // 100
    start = int(order["first_token"].max())
    assert sorted(set(order["finished"] - start)) == [40 * step, 80 * step]
    assert sorted(set(turns["finished"] - start)) == [79 * step, 80 * step]
    stepped = serve(device, arrival, prompt, output, **shared, rotate=True, fast_forward=False)
    np.testing.assert_array_equal(stepped["finished"], turns["finished"])
