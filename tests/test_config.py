"""Diffusion configs survive JSON; an invalid one raises an error that names the field."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusify.config import DiffusionConfig, from_plain, to_plain
from diffusify.diffusion import attention, objectives, policies, quotas, ranking, schedules

CONFIGS = st.builds(
    DiffusionConfig,
    mask_token_id=st.integers(0, 9),
    shift=st.sampled_from([0, 1]),
    attention=st.one_of(
        st.builds(attention.BlockCausal, st.integers(1, 64), st.sampled_from(["token", "block"])),
        st.sampled_from([attention.Causal(), attention.Bidirectional(), attention.Prefix()]),
    ),
    architecture=st.just("LlamaForCausalLM"),
    schedule=st.one_of(st.builds(schedules.Polynomial, st.floats(0.1, 5)), st.just(schedules.Cosine())),
    objective=st.builds(
        objectives.Objective,
        weight=st.one_of(st.builds(objectives.RdmWeight, st.integers(1, 99)), st.just(objectives.Flat())),
        per=st.sampled_from(["editable", "open", "text"]),
        ar_weight=st.floats(0, 2),
    ),
    policy=st.one_of(
        st.builds(
            policies.Unmask,
            st.sampled_from([ranking.Margin(), ranking.Leftmost()]),
            st.builds(quotas.Threshold, st.floats(0.1, 1)),
        ),
        st.builds(policies.Ancestral, st.just(schedules.Cosine())),
    ),
)


@given(CONFIGS)
def test_configs_survive_json(config: DiffusionConfig) -> None:
    assert from_plain(json.loads(json.dumps(to_plain(config))), DiffusionConfig) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shift": 2}, "shift=2"),
        ({"shift": "one"}, "'one' must be one of int"),
        ({"shfit": 1}, 'did you mean "shift"'),
        ({"schedule": {"type": "Linera"}}, 'did you mean "Linear"'),
        ({"attention": {"type": "BlockCausal", "size": 4, "clean": "tokens"}}, "token, block"),
        ({"attention": {"type": "BlockCausal", "sise": 4}}, 'did you mean "size"'),
        ({"attention": "BlockCausal"}, 'attention: BlockCausal needs "size"'),
        ({"policy": "os.system"}, "must be one of Unmask, Ancestral"),
        ({"policy": {"type": []}}, 'type "[]" is not known'),
        ({"attention": "BlockCausal"}, 'BlockCausal needs "size"'),
    ],
)
def test_invalid_config_raises(change: dict, message: str, tmp_path: Path) -> None:
    plain = to_plain(DiffusionConfig(3, 1, attention.Bidirectional(), "LlamaForCausalLM")) | change
    (tmp_path / "diffusion_config.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match="diffusion_config.json") as error:
        DiffusionConfig.load(tmp_path)
    assert message in str(error.value)


def test_missing_config_says_how_to_make_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="diffusify adapt"):
        DiffusionConfig.load(tmp_path)


def test_class_name_alone_stands_for_its_defaults() -> None:
    assert from_plain("Cosine", schedules.NoiseSchedule) == schedules.Cosine()
