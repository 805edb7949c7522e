"""Configurations that are wrong or not supported: every field is named, in one error."""

import math

import pytest
from peft_files import (
    CONFIG,
    refusal,
    rewritten,
)

pytestmark = pytest.mark.usefixtures("fast_compile")

FIELDS = {
    "peft_type": ("ADALORA", "peft_type 'ADALORA'; only 'LORA'"),
    "r": (0, "r=0: expected an integer of at least 1"),
    "lora_alpha": (math.nan, "lora_alpha=nan: expected a number above 0"),
    "rank_pattern": ({"q_proj": -1}, "rank_pattern={'q_proj': -1}: expected"),
    "alpha_pattern": ({r"(a)\1": 3}, r"alpha_pattern: the regex '(a)\\1': it has '\1', which is"),
    "use_dora": ("yes", "use_dora='yes': expected true or false"),
    "bias": ("some", "bias='some': expected 'none', 'all' or 'lora_only'"),
    "modules_to_save": ("lm_head", "modules_to_save='lm_head': expected a list of names"),
    "target_modules": (3, "target_modules=3: expected a list of names or a regex"),
    "layers_to_transform": ([0, "1"], "layers_to_transform=[0, '1']: expected an integer"),
    "trainable_token_indices": ([-1], "trainable_token_indices=[-1]: expected a list of rows"),
    "init_lora_weights": ("pissa", "init_lora_weights='pissa': expected an initializer that"),
    "alora_invocation_tokens": ([1, 2], "alora_invocation_tokens=[1, 2]: the adapter acts after"),
    "layer_replication": ([[0, 2]], "layer_replication=[[0, 2]]: layers are repeated"),
    "target_parameters": (["experts"], "target_parameters=['experts']: parameters of mixtures"),
    "use_qalora": (True, "use_qalora=True: inputs are pooled"),
    "use_bdlora": ({"nblocks": 2}, "use_bdlora={'nblocks': 2}: factors are block-diagonal"),
    "use_something": (True, "use_something=True: a field that peft 0.21.2 does not have"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_that_are_wrong_or_not_supported_are_named(field, tmp_path):
    value, said = FIELDS[field]
    assert said in refusal(rewritten(tmp_path, **{field: value}))


def test_all_that_is_wrong_with_a_configuration_is_in_one_error(tmp_path):
    text = refusal(rewritten(tmp_path, r=-3, kasa_config={"a": 1}, lora_bias="no", use_dora=1))
    for said in (str(tmp_path / CONFIG), "r=-3", "kasa_config=", "lora_bias='no'", "use_dora=1"):
        assert said in text
