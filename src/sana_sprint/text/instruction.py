"""The complex human instruction that SANA puts before a prompt, and a list of such lines to the text of the prefix."""

from collections.abc import Sequence

# A fact of the checkpoints rather than prose of ours: the networks have read these tokens before every prompt, so not
# a letter of it may change. A test holds its fingerprint.
COMPLEX_HUMAN_INSTRUCTION: tuple[str, ...] = (
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image "
    "generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial "
    "relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping "
    "peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street "
    "lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass "
    "skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary "
    "or evaluations:",
    "User Prompt: ",
)


def instruction_prefix(instruction: Sequence[str] | None) -> str:
    """The lines of an instruction as the text that goes directly before a prompt; empty for None or no lines.

    Raises:
        ValueError: if `instruction` is not a list or tuple of strings. A single string would be joined by letters.
    """
    if instruction is None:
        return ""
    if not isinstance(instruction, (list, tuple)) or not all(isinstance(line, str) for line in instruction):
        raise ValueError(f"complex_human_instruction must be a list of strings or None, got {instruction!r}")
    return "\n".join(instruction)
