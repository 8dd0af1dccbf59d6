"""tensorrt_llm/serve/openai_server.py at 00057725d9: `register_routes` adds to `self.app`, a FastAPI."""

from __future__ import annotations

from typing import Any


class OpenAIServer:
    def __init__(self, generator: Any, app: Any) -> None:
        self.generator, self.app = generator, app
        self.register_routes()

    def register_routes(self) -> None:
        self.app.add_api_route("/health", self.health, methods=["GET"])

    async def health(self) -> str:
        return "ok"
