"""The complex human instruction: letter for letter that of the checkpoints, and refusals of what is none."""

import hashlib
import inspect

import pytest
from diffusers import SanaSprintPipeline

from sana_sprint.text.instruction import COMPLEX_HUMAN_INSTRUCTION, instruction_prefix


def test_the_instruction_has_the_published_fingerprint():
    joined = "\n".join(COMPLEX_HUMAN_INSTRUCTION)
    assert len(COMPLEX_HUMAN_INSTRUCTION) == 8
    assert len(joined) == 1057
    digest = hashlib.sha256(joined.encode()).hexdigest()
    assert digest == "48290080bb4fd4a264bdc81d0647ac0221359a36506e2b3e954616d6cb48c3da"


def test_the_instruction_is_the_default_of_the_installed_diffusers():
    default = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
    assert list(COMPLEX_HUMAN_INSTRUCTION) == default


@pytest.mark.parametrize(
    ("instruction", "prefix"), [(None, ""), ([], ""), ([""], ""), (["a", "b: "], "a\nb: "), (("a",), "a")]
)
def test_lines_are_joined_by_line_breaks(instruction, prefix):
    assert instruction_prefix(instruction) == prefix


@pytest.mark.parametrize("instruction", ["User prompt: ", [1, 2], {"a": 1}])
def test_an_instruction_that_is_no_list_of_strings_is_refused(instruction):
    with pytest.raises(ValueError, match="complex_human_instruction must be a list of strings or None, got"):
        instruction_prefix(instruction)
