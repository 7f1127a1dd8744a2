"""Networks and cases to times, memory, operations and agreement, beside diffusers in the same process."""
