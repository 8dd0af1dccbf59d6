"""TensorRT Edge-LLM: XShare's routing in the graphs that its exporter writes, and in its direct builder."""
