"""The forward pass as a program that runs without this library: StableHLO, ONNX, TensorFlow SavedModel."""
