"""Request logs and engine settings: every format read alike, and what is wrong with one named."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import SlalomError
from eval.calibrate.request_log import AMPLE_KV_TOKENS, read_log, read_settings

ROWS = [(0.1 * k, 5 + k, 1 + k % 4, 0.1 * k + 0.05, 0.1 * k + 0.05 + 0.01 * (k % 4)) for k in range(24)]
NAMES = ("arrival", "input_tokens", "output_tokens", "first_token", "last_token")
ALIASES = ("queued_ts", "input_toks", "output_toks", "first_token_ts", "last_token_ts")


def written(tmp_path, kind, rows=ROWS):
    path = tmp_path / f"log.{'csv' if kind == 'csv' else 'json'}"
    if kind == "csv":
        lines = [",".join(NAMES), *(",".join(map(str, row)) for row in rows)]
    elif kind == "bench":
        gaps = [[0.01] * (row[2] - 1) for row in rows]
        columns = list(zip(*rows, strict=True))
        whole = {"start_times": columns[0], "input_lens": columns[1], "output_lens": columns[2], "itls": gaps}
        lines = [json.dumps(whole | {"ttfts": [0.05] * len(rows)})]
    else:
        names = NAMES if kind == "jsonl" else ALIASES
        lines = [json.dumps(dict(zip(names, row, strict=True)) | {"id": "x"}) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", ["jsonl", "alias", "csv", "bench"])
def test_every_format_gives_the_same_log(tmp_path, kind):
    log = read_log(written(tmp_path, kind))
    np.testing.assert_allclose(log.arrival_s, [row[0] for row in ROWS], atol=1e-9)
    np.testing.assert_array_equal(log.prompt, [row[1] for row in ROWS])
    np.testing.assert_allclose(log.ttft_s, 0.05, atol=1e-9)
    many = log.output > 1
    np.testing.assert_allclose(log.tpot_s[many], 0.01, atol=1e-9)
    assert np.isnan(log.tpot_s[~many]).all()


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(len(ROWS))), shift=st.floats(-1e6, 1e6))
def test_order_of_lines_and_zero_of_the_clock_do_not_matter(tmp_path_factory, order, shift):
    moved = [(ROWS[k][0] + shift, *ROWS[k][1:3], ROWS[k][3] + shift, ROWS[k][4] + shift) for k in order]
    log = read_log(written(tmp_path_factory.mktemp("log"), "jsonl", moved))
    np.testing.assert_allclose(log.arrival_s, [row[0] for row in ROWS], atol=1e-6)
    np.testing.assert_array_equal(log.output, [row[2] for row in ROWS])


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        (ROWS[:5], "answered requests"),
        ([(r[0], r[1], r[2], r[0] - 1.0, r[4]) for r in ROWS], "stamps"),
        ([(*r[:4], float("nan")) for r in ROWS], "finite"),
    ],
)
def test_a_bad_log_is_one_line_with_a_remedy(tmp_path, rows, what):
    with pytest.raises(SlalomError, match=what):
        read_log(written(tmp_path, "csv", rows))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "bench"])
def test_bad_rows_are_counted_and_left_out(tmp_path, kind):
    """A null or empty first token, figures that are none, a line cut off: one row must not cost the log."""
    path = written(tmp_path, kind)
    if kind == "bench":
        whole = json.loads(path.read_text())
        bad = (("start_times", 9.0), ("input_lens", 5), ("output_lens", 3), ("ttfts", None), ("itls", [0.01, 0.01]))
        path.write_text(json.dumps({name: [*whole[name], value] for name, value in bad}))
        rows = 1
    else:
        end = ["9.0,5,3,,9.2", "9.0,5,3,x,9.2", "9.0,5,3,9.3,9.2", "9.0,5,3,nan,9.2", "9.0,5"]
        if kind == "jsonl":
            plain = dict(zip(NAMES, (9.0, 5, 3, 9.1, 9.2), strict=True))
            end = [json.dumps(plain | {"first_token": x}) for x in (None, "", "x", 9.3)] + ['{"arrival": 9.0, "inp']
        path.write_text(path.read_text() + "\n".join(end))
        rows = 5
    log = read_log(path)
    assert (log.n, log.left_out) == (24, rows)


def test_a_log_in_milliseconds_is_not_read_as_seconds(tmp_path):
    path = written(tmp_path, "csv", [(1e3 * r[0], r[1], r[2], 1e3 * r[3], 1e3 * r[4]) for r in ROWS])
    with pytest.raises(SlalomError, match=r"--time-unit \(s: 10 s, ms: 0.01 s"):
        read_log(path)
    np.testing.assert_allclose(read_log(path, "ms").ttft_s, 0.05, atol=1e-9)
    assert read_log(path, "s").ttft_s[0] == pytest.approx(50.0)
    with pytest.raises(SlalomError, match="--time-unit"):
        read_log(path, "hours")


def test_settings_are_found_at_any_depth_and_a_null_block_is_taken_off(tmp_path):
    path = tmp_path / "meta.json"
    inner = {"cache_config": {"num_gpu_blocks": 101, "block_size": 16}, "scheduler_config": {"max_num_seqs": 1}}
    outer = {"max_num_seqs": 8, "max_num_batched_tokens": 512}
    path.write_text(json.dumps({"engine_kwargs": outer, "resolved": inner}))
    found = read_settings(path)
    assert (found.max_batch, found.chunk_tokens, found.kv_tokens, found.known_kv) == (8, 512, 1600, True)
    path.write_text(json.dumps({"max_num_seqs": 8, "max_num_batched_tokens": 512}))
    assert (read_settings(path).kv_tokens, read_settings(path).known_kv) == (AMPLE_KV_TOKENS, False)


@pytest.mark.parametrize("text", ["[1, 2]", "max_num_seqs: 8", "max_num_seqs: 0\nmax_num_batched_tokens: 9", "{"])
def test_bad_settings_name_the_key(tmp_path, text):
    path = tmp_path / "engine.yaml"
    path.write_text(text)
    with pytest.raises(SlalomError, match="engine-config"):
        read_settings(path)
