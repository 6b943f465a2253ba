"""A model becomes an ONNX file: LEAN nodes with their function, compared with torch, quantised."""
