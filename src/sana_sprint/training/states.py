"""The state of a training run to files and back: the newest few states, and the best average."""

from pathlib import Path
from typing import Any

import torch

from sana_sprint.files import write_whole


class StateFolder:
    """`state-000400.pt` after 400 steps, and so on, and `best.pt`. Every file is there whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, step: int, state: dict[str, Any], keep: int) -> None:
        """Write the state after so many steps, and remove all but the newest `keep` states."""
        write_whole(self.folder / f"state-{step:06d}.pt", lambda partial: torch.save(state, partial))
        for path in self._states()[:-keep]:
            path.unlink()

    def save_best(self, step: int, score: float, average: dict[str, torch.Tensor]) -> None:
        content = {"step": step, "score": score, "average": average}
        write_whole(self.folder / "best.pt", lambda partial: torch.save(content, partial))

    def newest(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """The newest state, if there is one.

        Args:
            settings: the present run's, and what it learns from; those of the state, by name, must be equal.

        Raises:
            ValueError: if they are not.
        """
        states = self._states()
        if not states:
            return None
        state: dict[str, Any] = torch.load(states[-1], map_location="cpu", weights_only=True)
        names = state["settings"].keys() | settings.keys()
        changed = sorted(name for name in names if state["settings"].get(name) != settings.get(name))
        if changed:
            raise ValueError(
                f"{self.folder} belongs to a run with other settings or data ({', '.join(changed)}); choose another"
                " output folder or remove it"
            )
        return state

    def _states(self) -> list[Path]:
        """All states, the newest last."""
        return sorted(self.folder.glob("state-*.pt"), key=lambda path: int(path.stem.removeprefix("state-")))
