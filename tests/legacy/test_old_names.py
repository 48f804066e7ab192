"""Every name of TRL 0.11 that is not in `sandan.PPOTrainer` says in one line where it is."""

import copy
import pickle
from dataclasses import fields

import pytest

import sandan
from sandan import legacy
from sandan.ppo.trl_names import OLD_METHODS, OLD_SETTINGS


def names(config):
    return {field.name for field in fields(config)}


def test_the_old_settings_are_those_of_legacy():
    # TRL had `exp_name` later, too: it is taken, as `run_name`.
    assert set(OLD_SETTINGS) == names(legacy.PPOConfig) - names(sandan.PPOConfig) - {"exp_name"}


@pytest.mark.parametrize("name", OLD_SETTINGS)
def test_an_old_setting_points_to_legacy(name):
    with pytest.raises(TypeError, match=f"{name}: a setting of TRL 0.11.*from sandan.legacy import") as error:
        sandan.PPOConfig("out", **{name: 1})
    assert "\n" not in str(error.value)


def test_a_config_is_still_copied_and_pickled(tmp_path):
    config = sandan.PPOConfig(str(tmp_path), use_cpu=True, kl_coef=0.3)
    assert copy.copy(config).kl_coef == copy.deepcopy(config).kl_coef == 0.3
    assert pickle.loads(pickle.dumps(config)).kl_coef == 0.3


def test_an_old_method_points_to_legacy(tiny):
    trainer = tiny()
    for name in OLD_METHODS:
        with pytest.raises(AttributeError, match=f"PPOTrainer.{name}: of TRL 0.11.*from sandan.legacy import"):
            getattr(trainer, name)
    with pytest.raises(AttributeError, match="'PPOTrainer' object has no attribute 'nothing'$"):
        _ = trainer.nothing


def test_an_old_import_points_to_legacy():
    with pytest.raises(ImportError, match="use from sandan.legacy import AutoModelForCausalLMWithValueHead"):
        from sandan import AutoModelForCausalLMWithValueHead  # noqa: F401
