"""The file that a server is started with: a configuration, and the mode."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from xshare_trtllm.config import MODES, XShareConfig
from xshare_trtllm.report import write_aside


class Setting(NamedTuple):
    """What a server runs with. mode: `on`, `shadow` (the model's own routing, with the statistics that XShare
    would have) or `off`."""

    config: XShareConfig
    mode: str = "on"

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Setting:
        """Raises ValueError for keys and values that are not known."""
        if not isinstance(values, dict):
            raise ValueError(f"expected keys and values, got {type(values).__name__}")
        mode = values.get("mode", "on")
        if mode is True or mode is False:  # YAML reads on and off as truth
            mode = "on" if mode else "off"
        if mode not in MODES:
            raise ValueError(f"mode: must be {', '.join(MODES)}, not {mode!r}")
        config = XShareConfig.from_dict({key: value for key, value in values.items() if key != "mode"})
        return cls(config, mode)

    @classmethod
    def from_yaml(cls, path: Path) -> Setting:
        """Raises ValueError for a file that is no setting, OSError where it cannot be read."""
        import yaml  # type: ignore[import-untyped,unused-ignore]

        try:
            return cls.from_dict(yaml.safe_load(path.read_text(encoding="utf-8")))
        except yaml.YAMLError as error:
            raise ValueError(f"not valid YAML: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        return self.config.to_dict() | {"mode": self.mode}

    def to_yaml(self, path: Path | None = None) -> str:
        """The file's text; written to `path` where given, which is whole at any time."""
        import yaml

        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        if path is not None:
            with write_aside(path) as aside:
                aside.write_text(text, encoding="utf-8")
        return text
