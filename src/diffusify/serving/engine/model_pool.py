"""The models of a server by name: fixed ones, and folders that are opened on request."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from diffusify.config import DiffusionConfig, nearest
from diffusify.sampling.diffusion_lm import DiffusionLM
from diffusify.serving.engine.engine import Engine


class UnknownModel(Exception):
    """No model of that name is served."""


class ModelPool:
    """The models of an engine, and those in `folder`, which are opened on request.

    A model that is added to `folder` is available at once. At most `keep` models of the folder stay open; the least
    recently used one is closed first. Raises ValueError if `folder` is no folder or `keep` is below 1.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path | None = None,
        keep: int = 4,
        opener: Callable[[str], DiffusionLM] = DiffusionLM.from_pretrained,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1 model")
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give the one that contains the folders of the models")
        self.engine, self.folder, self.keep, self._opener = engine, folder, keep, opener
        self._opened: list[str] = []  # models of the folder, least recently used first
        self._lock = asyncio.Lock()

    @property
    def unopened(self) -> dict[str, DiffusionConfig]:
        """The diffusion configs of the models in the folder that are not open, without invalid ones."""
        found: dict[str, DiffusionConfig] = {}
        for name, path in self._folders.items():
            if name not in self.engine.queues:
                with suppress(ValueError):  # which `get` raises
                    found[name] = DiffusionConfig.load(path)
        return found

    async def get(self, name: str) -> DiffusionLM:
        """The model of that name, opened if necessary. Raises UnknownModel if there is none."""
        if name not in self.engine.queues:
            await self._open(name)
        if name in self._opened:
            self._opened.remove(name)
            self._opened.append(name)
        self._close_idle(but=name)
        return self.engine.queues[name].lm

    async def _open(self, name: str) -> None:
        """Open a model of the folder, one at a time."""
        folders = self._folders
        if name not in folders:
            raise UnknownModel(f'model "{name}" is not served{nearest(name, {**self.engine.queues, **folders})}')
        async with self._lock:
            if name not in self.engine.queues:  # nobody has opened it meanwhile
                lm = await asyncio.to_thread(self._opener, str(folders[name]))
                self.engine.add(name, lm)
                self._opened.append(name)

    @property
    def _folders(self) -> dict[str, Path]:
        if self.folder is None:
            return {}
        found = sorted(self.folder.iterdir())
        return {path.name: path for path in found if (path / "diffusion_config.json").is_file()}

    def _close_idle(self, but: str) -> None:
        """Close the least recently used models beyond `keep` that have no requests."""
        for name in [name for name in self._opened if name != but]:
            queue = self.engine.queues[name]
            if len(self._opened) > self.keep and not queue.waiting and not queue.running:
                self._opened.remove(name)
                self.engine.remove(name)
