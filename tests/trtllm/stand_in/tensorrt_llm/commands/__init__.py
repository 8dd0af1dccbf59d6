"""tensorrt_llm/commands of 1.x."""
