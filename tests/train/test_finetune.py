"""Fine-tuning on the engine: from a checkpoint to one that is kept only if it serves no worse."""

import json

import numpy as np
import pytest

from engine.errors import SlalomError
from engine.latency import Profile
from env.scenario import Scenario
from policies import registry
from policies.checkpoint.folder import Facts, load, save_network, save_rule
from policies.network.scoring import ScoringNetwork
from policies.rules import linear_score
from train.ppo.finetune import finetune


@pytest.fixture
def tiny(tmp_path):
    """The CPU scenario on the tiny random model, written down as a user would."""
    shipped = Profile.load("smollm2-cpu")
    roofline = shipped.roofline.model_copy(update={"params": 1.0, "weight_bytes": 1.0, "memory_bytes_per_s": 1e15})
    share = shipped.shares[0].model_copy(
        update={"prefill_s": (0.0, 0.0, 2e-5, 2e-3), "knot_tokens": (), "knot_s": (), "fused_shared_s": 1e-3,
                "decode_small_s": (1e-7, 1e-4, 2e-3), "decode_large_s": None}
    )  # fmt: skip
    shipped.model_copy(
        update={"name": "tiny", "model": "dummy:tiny", "engine": "slalom, float32", "shares": (share,),
                "roofline": roofline, "kv_bytes_per_token": 8.0, "fidelity": {"step_spread": 0.1}}
    ).save(tmp_path / "tiny.json")  # fmt: skip
    content = Scenario.load("smollm2-2xcpu").model_dump(mode="json")
    rates = {"rates": {"low": 1.0, "high": 900.0}, "reference_rate": 80.0}
    scenario = Scenario.parse(content | rates | {"name": "tinylive", "profile": str(tmp_path / "tiny.json")})
    (tmp_path / "tiny.yaml").write_text(scenario.to_yaml())
    return tmp_path / "tiny.yaml", scenario


def test_a_checkpoint_goes_on_learning_on_the_engine(tiny, tmp_path):
    path, scenario = tiny
    values = registry.get("linear_score").values({})
    network = ScoringNetwork(linear_score.weights(values), hidden=8)
    profile = json.loads(scenario.load_profiles()[0].to_json())
    facts = Facts("start", training={"seed": 3})
    save_network(tmp_path / "start", network, base="linear_score", base_values=values, profile=profile, facts=facts)
    result = finetune(str(path), tmp_path / "start", 2.0, out=tmp_path / "run")
    assert result["decisions"] >= 128
    assert result["updates"] >= 1
    assert "dummy:tiny" in result["device"]
    before, tuned, best = (load(tmp_path / p) for p in ("start", "run/tuned", "run/best"))
    assert any(not np.array_equal(tuned.arrays[name], before.arrays[name]) for name in tuned.arrays)
    assert np.array_equal(tuned.arrays["base"], before.arrays["base"])  # the rule inside it is frozen
    better = result["attainment_after"] > result["attainment_before"]
    assert best.manifest.name == (tuned if better else before).manifest.name
    assert tuned.manifest.training["seed"] == 3
    assert tuned.manifest.fidelity == {"step_spread": 0.1}
    with pytest.raises(SlalomError, match="a run is there already"):
        finetune(str(path), tmp_path / "start", 2.0, out=tmp_path / "run")


def test_a_rule_cannot_be_fine_tuned(tiny, tmp_path):
    path, scenario = tiny
    profile = json.loads(scenario.load_profiles()[0].to_json())
    save_rule(tmp_path / "rule", rule="least_tokens", values={}, profile=profile, facts=Facts("r"))
    with pytest.raises(SlalomError, match="--init"):
        finetune(str(path), tmp_path / "rule", 1.0)
