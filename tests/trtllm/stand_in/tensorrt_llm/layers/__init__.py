"""tensorrt_llm/layers of 1.x."""
