"""LAUNCHER WORLD_SIZE [PYTHON_OPTIONS_OF_RANK]...: a server, which prints what it has come to.

Against the stand-in; the parent and every worker are real processes. With TEST_OPENAI it registers routes as
the stand-in's OpenAIServer does, and prints what they answer.
"""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace


class App:
    """The one method of FastAPI that is used."""

    def __init__(self) -> None:
        self.routes: dict[str, object] = {}

    def add_api_route(self, path: str, endpoint: object, methods: list[str]) -> None:
        assert methods == ["GET"]
        self.routes[path] = endpoint


def main(launcher: str, world_size: int, *python: str) -> None:
    from tensorrt_llm.executor.executor import GenerationExecutor

    options = [option.split() for option in python] or [[]] * world_size
    llm_args = SimpleNamespace(launcher=launcher, python=options)
    try:
        made = GenerationExecutor.create("engine", model_world_size=world_size, llm_args=llm_args)
    except RuntimeError as error:
        print(f"STOPPED {error}", flush=True)
        return
    status: object = None
    if os.environ.get("TEST_OPENAI"):
        from tensorrt_llm.serve.openai_server import OpenAIServer

        routes = OpenAIServer(made, App()).app.routes
        status = {"routes": sorted(routes), "xshare": routes["/xshare"]()}
    print(f"SERVING {json.dumps(status)}", flush=True)
    if launcher != "single":
        made.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
