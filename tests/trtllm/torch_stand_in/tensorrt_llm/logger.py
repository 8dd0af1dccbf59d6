"""tensorrt_llm/logger.py: `logger.info(*msg)`."""

from __future__ import annotations


class Logger:
    lines: list[str] = []  # noqa: RUF012  (a test reads them)

    def info(self, *msg: object) -> None:
        self.lines.append(" ".join(map(str, msg)))


logger = Logger()
