"""Models for inference engines at the edge: one graph with the streams inside (folded.py), written for ONNX Runtime
GenAI (onnx.py) and OpenVINO GenAI (openvino.py)."""
