"""Models by name: those that are served from the start, and folders that are opened when somebody asks for one."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from diffusify.config import DiffusionConfig, nearest
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.engine.engine import Engine


class UnknownModel(Exception):
    """No model of that name is served."""


class ModelPool:
    """What an engine can serve. A new model in `folder` is there at once; at most `keep` of its models stay open."""

    def __init__(
        self,
        engine: Engine,
        folder: Path | None = None,
        keep: int = 4,
        opener: Callable[[str], DiffusionLM] = DiffusionLM.from_pretrained,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1 model")
        self.engine, self.folder, self.keep, self._opener = engine, folder, keep, opener
        self._recent: list[str] = []  # of those from the folder, the latest last
        self._opening = asyncio.Lock()

    @property
    def closed(self) -> dict[str, DiffusionConfig]:
        """The cards of models in the folder that are not open."""
        return {
            name: DiffusionConfig.load(path) for name, path in self._folders.items() if name not in self.engine.queues
        }

    async def get(self, name: str) -> DiffusionLM:
        """The model of that name, opened if need be. UnknownModel if there is none."""
        if name not in self.engine.queues and name not in self._folders:
            raise UnknownModel(f'model "{name}" is not served{nearest(name, {**self.engine.queues, **self._folders})}')
        async with self._opening:
            if name not in self.engine.queues:
                lm = await asyncio.to_thread(self._opener, str(self._folders[name]))
                self.engine.add(name, lm)
                self._recent.append(name)
            elif name in self._recent:
                self._recent.remove(name)
                self._recent.append(name)
            self._close_some(but=name)
            return self.engine.queues[name].lm

    @property
    def _folders(self) -> dict[str, Path]:
        if self.folder is None:
            return {}
        found = sorted(self.folder.iterdir())
        return {path.name: path for path in found if (path / "diffusion_config.json").is_file()}

    def _close_some(self, but: str) -> None:
        """Let go of those that nobody has asked for the longest, and nobody uses."""
        for name in [name for name in self._recent if name != but]:
            queue = self.engine.queues[name]
            if len(self._recent) > self.keep and not queue.waiting and not queue.working:
                self._recent.remove(name)
                self.engine.remove(name)
